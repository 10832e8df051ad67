"""Standard input and pipes are data like any file: read more than once, of any kind, named in messages."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from koine.data import read_records
from koine.data.piped import local_copy
from koine.errors import UserError
from tests.bad_inputs import worlds

ROWS = [{"text": "Die Katze schläft.", "language": "de"}, {"text": "नदी बहती है।", "language": "hi"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def koine(command: str, data: bytes | None, place: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "koine", *command.split()], input=data, cwd=place, capture_output=True
    )  # fmt: skip


def parquet() -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


def arrow_stream() -> bytes:
    import io

    import pyarrow as pa

    file, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


CONTENTS = {
    "lines": LINES,
    "array": json.dumps(ROWS).encode(),
    "gzip": gzip.compress(LINES),
    "utf-16": LINES.decode().encode("utf-16"),
    "byte-order-mark": b"\xef\xbb\xbf" + LINES,
    "csv": b"language,text\n" + "".join(f"{row['language']},{row['text']}\n" for row in ROWS).encode(),
    "semicolons": b"text;language\n" + "".join(f"{row['text']};{row['language']}\n" for row in ROWS).encode(),
    "tsv": b"text\tlanguage\n" + "".join(f"{row['text']}\t{row['language']}\n" for row in ROWS).encode(),
    "parquet": parquet(),
    "arrow": arrow_stream(),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_the_content_of_a_pipe_decides_how_it_is_read(content: bytes, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True).start()
    reader = read_records(pipe)
    for _ in range(2):
        records = list(reader)
        assert [(one["text"], one["language"], one["source"]) for one in records] == [
            (row["text"], row["language"], "pipe") for row in ROWS
        ]
    assert pipe.is_fifo()


def test_plain_text_is_read_by_paragraphs(tmp_path: Path) -> None:
    number, other = os.pipe()
    os.write(other, b"One, two.\n\nThree,\ntext.\n")
    os.close(other)
    try:
        found = [record["text"] for record in read_records(f"/dev/fd/{number}", language="en")]
    finally:
        os.close(number)
    assert found == ["One, two.", "Three,\ntext."]


def test_a_file_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert local_copy(tmp_path / "a.jsonl") == tmp_path / "a.jsonl"


def test_a_bad_record_is_said_to_be_of_standard_input(tmp_path: Path) -> None:
    done = koine("data inspect - --max-bad 0.5", LINES + b'{"none": 1}\n', tmp_path)
    assert done.returncode == 0
    assert b"standard input, line 3: " in done.stdout
    done = koine("data inspect -", gzip.compress(LINES)[:-9], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(b"koine: standard input: the compressed data is damaged or cut off")


def test_standard_input_that_is_closed_or_empty_is_one_line(tmp_path: Path) -> None:
    word = f"{sys.executable} -m koine data inspect - "
    for redirected, expected in (
        ("<&-", "standard input: is closed; give a file, or pipe data to the command"),
        ("</dev/null", "holds no records"),
    ):
        done = subprocess.run(["bash", "-c", word + redirected], capture_output=True, text=True)
        assert done.returncode == 2
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_copy_goes_with_the_process(tmp_path: Path) -> None:
    program = (
        "from koine.data import read_records\n"
        "reader = read_records('-')\n"
        "print(len(list(reader)), reader.files[0].exists(), reader.files[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], input=LINES, capture_output=True, check=True)
    count, there, copy = done.stdout.decode().split()
    assert (count, there) == ("2", "True")
    assert not Path(copy).parent.exists()


COMMANDS = {
    "data inspect": ("data inspect -", None),
    "data tokenize": ("data tokenize - --tokenizer tokenizer --workers 2 --out new", "new"),
    "evaluate": ("evaluate model --data - --limit 2 --out new", "new"),
    "merge search": ("merge search model branch --data d=- --limit 2 --parts 1 --rounds 0 --out new", "new"),
    "tokenizer train": ("tokenizer train --data - --vocab-size 300 --min-frequency 2 --out new", "new"),
    "tokenizer measure": ("tokenizer measure tokenizer --data - --out new", "new"),
    "tokenizer weights": ("tokenizer weights --data -", None),
    "tokenizer predict": ("tokenizer predict tokenizer --data - --primary de", None),
    "tokenizer extend": ("tokenizer extend tokenizer --data - --tokens 3 --out new", "new"),
}


@pytest.mark.parametrize(("command", "out"), COMMANDS.values(), ids=COMMANDS)
def test_commands_read_records_from_standard_input(command: str, out: str | None, tmp_path: Path) -> None:
    worlds.having("tokenizer", "text", "model", "branch")(tmp_path)
    done = koine(command, (tmp_path / "text.jsonl").read_bytes(), tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert out is None or (tmp_path / out).exists()


def test_a_mixture_is_read_from_standard_input(tmp_path: Path) -> None:
    done = koine("train pretrain --preset koine-0.5m --mixture - --out new", b'{"phases": 7}', tmp_path)
    assert done.returncode == 2
    assert b"phases" in done.stderr


def test_a_socket_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.jsonl")
        with pytest.raises(UserError, match="a device or a socket, which holds no data"):
            read_records("s.jsonl")
