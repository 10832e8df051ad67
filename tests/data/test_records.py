"""Records: every kind of file, bad records reported with file and line, constant memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from koine.data import read_records
from koine.errors import UserError

RECORDS = [
    {
        "id": str(number),
        "text": f"Satz {number}\nmit zwei Zeilen, „Zeichen“",
        "language": "de",
        "extra": number,
    }
    for number in range(30)
]


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8")


def as_csv(records: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, records[0].keys())
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode("utf-8")


def parquet(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


def text(records: list[dict[str, Any]]) -> bytes:
    return "\n\n".join(record["text"] for record in records).encode("utf-8")


def arrow(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: (
        zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :])
    ),
}


@pytest.mark.parametrize("packed", COMPRESS)
@pytest.mark.parametrize(
    ("kind", "write"), [(".jsonl", jsonl), (".csv", as_csv), (".parquet", parquet), (".arrow", arrow)]
)
def test_every_kind_and_compression(kind: str, write: Any, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"some.data{kind}{packed}"
    path.write_bytes(COMPRESS[packed](write(RECORDS)))
    found = list(read_records(path))
    assert [(r["id"], r["text"], r["language"]) for r in found] == [
        (r["id"], r["text"], r["language"]) for r in RECORDS
    ]
    assert [int(r["extra"]) for r in found] == list(range(30))


@pytest.mark.parametrize("packed", COMPRESS)
def test_compressed_plain_text(packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"some.txt{packed}"
    path.write_bytes(COMPRESS[packed](text(RECORDS)))
    assert [r["text"] for r in read_records(path)] == [r["text"] for r in RECORDS]


def test_extensions_may_be_upper_case(tmp_path: Path) -> None:
    for packed, compress in COMPRESS.items():
        (tmp_path / f"A{len(packed)}{packed}.JSONL{packed.upper()}").write_bytes(compress(jsonl(RECORDS[:1])))
    assert len(list(read_records(tmp_path))) == len(COMPRESS)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['a,"one', "b,two", "c,three"], r"a quote in line 2 is not closed as it should be \(line 4: unexpected end"),
        (['a,"one', "b,two", 'c,"three"'], r"a quote in line 2 is not closed as it should be \(line 4: ',' expected"),
    ],
)  # fmt: skip
def test_a_quote_that_is_not_closed_does_not_swallow_the_rest(
    lines: list[str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["id,text", *lines]) + "\n")
    with pytest.raises(UserError, match=says):
        list(read_records(tmp_path / "a.csv", max_bad_share=1.0))


def test_a_quote_inside_one_line_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\na,"one" two\nb,"three"\n')
    reader = read_records(tmp_path / "a.csv", max_bad_share=0.5)
    assert [r["text"] for r in reader] == ["three"]
    assert "line 2: not CSV" in str(reader.examples[0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "state.json: not valid JSON"),
        ("{}", "state.json: lists no _data_files"),
        ("[]", "state.json: lists no _data_files"),
        ('{"_data_files": [{"filename": 3}]}', "state.json: lists no _data_files"),
        ('{"_data_files": [{"filename": "data-0.arrow"}]}', "data-0.arrow: is missing; state.json lists it"),
    ],
)
def test_a_damaged_state_json_is_an_error(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("unit", "texts"),
    [("paragraph", ["a b\nc", "d"]), ("line", ["a b", "c", "d"]), ("file", ["a b\nc\n\nd"])],
)
def test_plain_text(unit: Any, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("a b\nc\n\nd\n", encoding="utf-8")
    assert [r["text"] for r in read_records(tmp_path / "plain.txt", language="deu", unit=unit)] == texts


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
def test_a_truncated_file_is_an_error(packed: str, tmp_path: Path) -> None:
    whole = COMPRESS[packed](jsonl(RECORDS * 200))
    (tmp_path / f"cut.jsonl{packed}").write_bytes(whole[: -len(whole) // 4])
    with pytest.raises(UserError, match="damaged or cut off"):
        list(read_records(tmp_path / f"cut.jsonl{packed}", max_bad_share=1.0))


def test_fields_are_mapped_and_codes_normalised(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        jsonl([{"content": "x", "lang": "swh_Latn"}, {"content": "y", "lang": "pt-BR"}])
    )
    found = list(read_records(tmp_path / "a.jsonl", fields={"text": "content"}))
    assert [(r["text"], r["language"], r["id"]) for r in found] == [
        ("x", "sw", "a.jsonl:1"),
        ("y", "pt", "a.jsonl:2"),
    ]
    with pytest.raises(UserError, match="did you mean 'text'"):
        read_records(tmp_path / "a.jsonl", fields={"txt": "content"})


BAD = [
    ('{"text": 3}', "not a string"),
    ('{"text": " "}', "empty"),
    ("{", "not JSON"),
    ('["a"]', "not an object"),
    ('{"title": "a"}', "neither 'text' nor 'messages'"),
    ('{"text": "a", "language": "xq"}', "unknown language 'xq'"),
    ('{"text": "a\\ud800"}', "lone surrogate"),
    ('{"text": "a\\u0000"}', "NUL"),
    ('{"messages": []}', "at least one message"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "the role 'bot'"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "not the assistant's"),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        "both of the user",
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_records_are_reported_with_file_and_line(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(RECORDS) + line.encode() + b"\n")
    reader = read_records(path, max_bad_share=0.05)
    assert len(list(reader)) == 30
    assert reader.bad == 1
    assert str(reader.examples[0]).startswith(f"{path}, line 31: ")
    assert reason in reader.examples[0].reason
    with pytest.raises(UserError, match=r"1 of 31 records are bad \(3.2%, at most 1.0% may be\)"):
        list(read_records(path))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(RECORDS) + '{"text": "Größe"}\n'.encode("latin-1"))
    (tmp_path / "b.csv").write_bytes(as_csv(RECORDS) + "31,Größe,de,31\n".encode("latin-1"))
    for name in ("a.jsonl", "b.csv"):
        reader = read_records(tmp_path / name, max_bad_share=0.05)
        assert len(list(reader)) == 30
        assert "not UTF-8" in reader.examples[0].reason


def test_hugging_face_folders(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    (hub / "README.md").write_text("a data set")
    for split, part in (("train", RECORDS[:20]), ("test", RECORDS[20:])):
        (hub / "data" / f"{split}-00000-of-00001.parquet").write_bytes(parquet(part))
    assert [r["id"] for r in read_records(hub)] == [r["id"] for r in RECORDS[:20]]
    assert [r["id"] for r in read_records(hub, split="test")] == [r["id"] for r in RECORDS[20:]]
    assert len(list(read_records(hub, split="all"))) == 30
    with pytest.raises(UserError, match="it has: test, train, all"):
        read_records(hub, split="validation")
    # What `save_to_disk` writes for several splits: a folder each, with Arrow streams named in state.json.
    saved = tmp_path / "saved"
    for split, part in (("train", RECORDS[:20]), ("test", RECORDS[20:])):
        folder = saved / split
        folder.mkdir(parents=True)
        table = pa.Table.from_pylist(part)
        with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
        (folder / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
        )
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [r["id"] for r in read_records(saved)] == [r["id"] for r in RECORDS[:20]]
    assert [r["id"] for r in read_records(saved / "test", split="all")] == [r["id"] for r in RECORDS[20:]]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for copies in (20, 400):
        path = tmp_path / f"{copies}.jsonl.gz"
        path.write_bytes(gzip.compress(jsonl([{"text": "x" * 1000}] * 30) * copies, compresslevel=1))
        tracemalloc.start()
        assert sum(1 for _ in read_records(path)) == 30 * copies
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Twenty times the data; what is left is noise of the allocator.
    assert peaks[1] < 1.5 * peaks[0]


def test_a_text_without_empty_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    line = "x" * 99
    path.write_text(f"{line}\n" * 25_000, encoding="utf-8")
    texts = [record["text"] for record in read_records(path)]
    assert len(texts) == 3
    assert max(map(len, texts)) <= 2**20 + 100
    assert "\n".join(texts) == "\n".join([line] * 25_000)


def test_a_row_of_translations_is_one_record_per_language(tmp_path: Path) -> None:
    path = tmp_path / "parallel.jsonl"
    rows = [
        {"id": "1", "text": {"eng_Latn": "a map", "deu_Latn": "eine Karte", "xxx_Latn": "?"}, "split": "dev"},
        {"id": "2", "text": {"deu_Latn": "ein Fluss"}},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    reader = read_records(path, max_bad_share=0.5)
    found = [(record["id"], record["language"], record["text"]) for record in reader]
    assert found == [("1", "en", "a map"), ("1", "de", "eine Karte"), ("2", "de", "ein Fluss")]
    assert reader.bad == 1
    # a language that was not asked for is passed over, also where its code is unknown
    german = read_records(path, languages=["de"], max_bad_share=0.0)
    assert [record["text"] for record in german] == ["eine Karte", "ein Fluss"]
    assert german.bad == 0
    assert all(record["translated"] for record in read_records(path, languages=["deu"]))
