"""Bad inputs in data files: odd records, odd layouts, compressed files that never end."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import worlds
from .case import Case

HINT = "fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)"


def one_bad(reason: str, name: str = "text.jsonl", place: str = "line 41") -> str:
    """Return the message about one bad record among 41."""
    return (
        f"1 of 41 records are bad (2.4%, at most 1.0% may be); the first is {name}, {place}: {reason}; {HINT}"
    )


def odd(mistake: str, line: Any, reason: str) -> Case:
    """Forty sound records, and one that is not."""
    return Case(
        mistake=mistake,
        command="data inspect text.jsonl",
        prepare=worlds.text_with(*worlds.records(), line),
        says=one_bad(reason),
    )


def file_of(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    """A file of these bytes."""
    return lambda folder: (folder / name).write_bytes(content() if callable(content) else content) and None


def bad_file(mistake: str, name: str, content: bytes | Callable[[], bytes], says: str) -> Case:
    return Case(
        mistake=mistake,
        command=f"data inspect {name}",
        prepare=file_of(name, content),
        says=f"{name}: {says}",
    )


def offline(monkeypatch: Any) -> None:
    """Let the hub's client ask nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def linked(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(to)


def bomb() -> bytes:
    """130 MiB of empty lines, packed."""
    import zstandard

    stream = zstandard.ZstdCompressor().compressobj()
    return b"".join([*(stream.compress(b"\n" * 2**20) for _ in range(130)), stream.flush()])


def wide_window() -> bytes:
    """Compress as `zstd --ultra --long=30` does."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return bytes(stream.compress(b'{"text": "a"}\n') + stream.flush())


def cut_arrow() -> bytes:
    import pyarrow as pa

    sink, table = io.BytesIO(), pa.Table.from_pylist(worlds.records())
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()[:-30]


def with_dates() -> bytes:
    """A table whose only text is a column of dates."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array([2**62] * 3, pa.timestamp("ns"))}), sink)
    return sink.getvalue()


RECORDS = "\n".join(json.dumps(record) for record in worlds.records())
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}

CASES = (
    odd("an integer of 5,000 digits", '{"text": "a", "n": ' + "7" * 5000 + "}", "JSON with an integer of thousands of digits"),
    odd("a record nested a hundred thousand levels deep", '{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "JSON nested too deeply"),
    odd("a source that is no text", {"text": "a", "source": 5}, "the source is 5, not a text"),
    odd("a domain that is no text", {"text": "a", "domain": ["tales"]}, "the domain is ['tales'], not a text"),
    odd("a language that is no text", {"text": "a", "language": 3}, "the language is 3, not a text"),
    odd("a list for an identifier", {"text": "a", "id": [1]}, "the id is [1], not a text"),
    odd("half a surrogate pair in an identifier", '{"text": "a", "id": "\\ud800"}', r"the id is '\ud800', not a text"),
    odd("a number for a text", {"text": 7}, "the text is int, not a string"),
    odd("a text without a word in any language", {"text": {"de": None, "en": " "}}, "the text is empty in every language"),
    odd("a NUL in a text", {"text": "a\0b"}, "the text holds NUL characters"),
    odd("a list in place of a record", ["a"], "a JSON list, not an object"),
    odd("a chat that ends with the user", {"conversations": [{"from": "human", "value": "hello"}]}, "the last message is not the assistant's"),
    odd("a chat with an unknown speaker", {"conversations": [{"from": "narrator", "value": "hello"}]}, "message 1 has the role 'narrator'; known: system, user, assistant"),
    odd("a chat with a picture in it", {"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT["messages"][1]]}, "message 1: a part is of the type 'image'; only text is read"),
    odd("a chat that calls a tool", {"conversations": [{"from": "human", "value": "hello"}, {"from": "function_call", "value": "{}"}]}, "message 2 is a tool's or calls one; records hold the roles system, user, assistant"),
    odd("a control character in a field's name", '{"te\\u001bxt": "a"}', r"neither 'text' nor 'messages' (it has te\x1bxt)"),
    Case(
        mistake="a line longer than any document",
        command="data inspect text.jsonl",
        prepare=file_of("text.jsonl", lambda: RECORDS.encode() + b'\n{"text": "' + b"a" * (64 * 2**20) + b'"}\n'),
        says=one_bad("a line longer than 67108864 bytes"),
    ),
    Case(
        mistake="a comma forgotten in a JSON array",
        command="data inspect text.json",
        prepare=file_of("text.json", ("[" + ",\n".join(RECORDS.split("\n")) + ', {"text" "a"}]').encode()),
        says=one_bad("not JSON (Expecting ':' delimiter at column 9)", "text.json", "record 41"),
    ),
    bad_file("a JSON array cut short", "text.json", ("[" + ",\n".join(RECORDS.split("\n"))).encode(), "ends inside a JSON array or object; it is truncated or damaged; copy or write it again"),
    bad_file("an object over several lines cut short", "text.jsonl", b'{\n "text": "a",\n', "ends inside a JSON array or object; it is truncated or damaged; copy or write it again"),
    bad_file("a zip archive", "texts.zip", b"PK\3\4", "an archive '.zip' is not read; unpack it, and give the folder"),
    bad_file("a tar archive", "texts.tar.gz", gzip.compress(b""), "an archive '.tar.gz' is not read; unpack it, and give the folder"),
    bad_file("a small file that unpacks to very much", "text.jsonl.zst", bomb, "more than …times its size comes out of the compressed file, which is no text; unpack it yourself where it is meant"),
    bad_file("a file that needs a gigabyte to be unpacked", "text.jsonl.zst", wide_window, "unpacking needs more than 128 MiB of memory; unpack it yourself, or pack it with a smaller window"),
    bad_file("a zstandard file cut short", "text.jsonl.zst", lambda: wide_window_cut(), "the compressed data is damaged or cut off (the file ends inside a frame); copy or download it again"),
    bad_file("something behind an xz file", "text.jsonl.xz", lambda: packed_xz() + b"more", "the compressed data is damaged or cut off (what follows the first stream is none); copy or download it again"),
    bad_file("an Arrow file cut short", "text.arrow", cut_arrow, "not a whole Arrow file (…); it is truncated or damaged; copy or write it again"),
    bad_file("an ORC file that is none", "text.orc", b"ORC", "not a whole ORC file (…); it is truncated or damaged; copy or write it again"),
    Case(
        mistake="a table whose text is dates",
        command="data inspect text.parquet",
        prepare=file_of("text.parquet", with_dates),
        says="3 of 3 records are bad (100.0%, at most 1.0% may be); the first is text.parquet, row 1: …; " + HINT,
    ),
    Case(
        mistake="a table without a column of text",
        command="data inspect text.csv",
        prepare=file_of("text.csv", b"title,body\na,b\n"),
        says="text.csv: records of no known format, with the fields title, body; known: preference (chosen, rejected); scored-completions (completions, scores); unpaired-preference (label, prompt or messages); messages (messages); sharegpt (conversations or conversation); alpaca (instruction, output or response); text (text or translation); prompt-completion (prompt, completion or response); question-answer (question or query, answer or response). Map fields (--field text=COLUMN), or name the format (--format)",
    ),
    Case(
        mistake="a format of records that does not exist",
        command="data inspect text.jsonl --format alpacca",
        prepare=worlds.text_with(*worlds.records()),
        says="unknown format 'alpacca'; did you mean 'alpaca'?",
    ),
    Case(
        mistake="records of another format than the one that is named",
        command="data inspect text.jsonl --format alpaca",
        prepare=file_of("text.jsonl", b'{"prompt": "Sky?", "completion": "Blue."}'),
        says="1 of 1 records are bad (100.0%, at most 1.0% may be); the first is text.jsonl, line 1: lacks fields of the format alpaca: instruction, output or response (it has prompt, completion); "
        + HINT,
    ),
    Case(
        mistake="preference records without a prompt",
        command="data inspect text.jsonl",
        prepare=file_of("text.jsonl", b'{"chosen": "Blue.", "rejected": "Red."}'),
        says="1 of 1 records are bad (100.0%, at most 1.0% may be); the first is text.jsonl, line 1: no prompt, and the answers have no common beginning; "
        + HINT,
    ),
    Case(
        mistake="answers with the label of bad ones alone",
        command="data inspect text.jsonl",
        prepare=file_of("text.jsonl", b'{"prompt": "Sky?", "completion": "Red.", "label": false}'),
        says="text.jsonl: none of the 1 answers is labelled as chosen; take the others: chosen (label true) or rejected (false)",
    ),
    Case(
        mistake="a word with one slash that is no local path, without a connection",
        command="data inspect texts/german",
        simulated="HF_HUB_OFFLINE is set",
        during=offline,
        says="texts/german: no such local path, and the cache does not hold the data set 'texts/german', and HF_HUB_OFFLINE is set; unset it once, to fetch it",
    ),
    Case(
        mistake="a subset of a model of the hub",
        command="model describe org/name:de",
        says="org/name:de: 'de' after the colon: a model has no subsets; give org/name",
    ),
    Case(
        mistake="a CSV file with a header alone",
        command="data inspect text.csv",
        prepare=file_of("text.csv", b"text,language\r\n"),
        says="text.csv: holds no records; the files are empty",
    ),
    Case(
        mistake="a row of CSV with a cell too few",
        command="data inspect text.csv",
        prepare=file_of("text.csv", b"text;language\na;de\nb\n"),
        says="1 of 2 records are bad (50.0%, at most 1.0% may be); the first is text.csv, line 3: 1 cells where the header has 2; " + HINT,
    ),
    Case(
        mistake="a link as data whose disk is not mounted",
        command="data inspect text.jsonl",
        prepare=linked("text.jsonl", "/no/such/disk/text.jsonl"),
        says="text.jsonl: a link that leads to /no/such/disk/text.jsonl, which is not there; fix or remove the link; is its disk mounted?",
    ),
    Case(
        mistake="a link in a folder of data that leads back to itself",
        command="data inspect .",
        prepare=linked("text.jsonl", "text.jsonl"),
        says="text.jsonl: a link that leads back to itself; fix or remove the link; is its disk mounted?",
    ),
    Case(
        mistake="a device as data",
        command="data inspect /dev/null",
        says="/dev/null: a device or a socket, which holds no data; give a file, a folder or a pipe",
    ),
    Case(
        mistake="data from a descriptor that is not open",
        command="data inspect /dev/fd/321",
        says="/dev/fd/321: is closed; give a file, or pipe data to the command",
    ),
    Case(
        mistake="a Hugging Face data set that names a file elsewhere",
        command="data inspect texts",
        prepare=worlds.written("texts/state.json", '{"_data_files": [{"filename": "../data-0.arrow"}]}'),
        says="texts/state.json: …",
    ),
    Case(
        mistake="a Hugging Face data set whose list of files is nested without end",
        command="data inspect texts",
        prepare=worlds.written("texts/state.json", "[" * 100_000),
        says="texts/state.json: not valid JSON (nested too deeply); the file is damaged or truncated; write it again",
    ),
)  # fmt: skip


def packed_xz() -> bytes:
    import lzma

    return lzma.compress(RECORDS.encode())


def wide_window_cut() -> bytes:
    import zstandard

    return zstandard.compress(RECORDS.encode())[:-5]
