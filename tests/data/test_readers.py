"""Data files in every layout give the same texts; bad records are counted; time and memory are bounded."""

from __future__ import annotations

import bz2
import datetime
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
import zstandard

from koine.data import decompression, read_records, tokenize
from koine.data import lines as line_reading
from koine.data.json_rows import _Cutter
from koine.errors import UserError

TEXTS = [f"The {n}th lamp – „quay“ – burns until the tide comes in." for n in range(60)]
ROWS = [{"text": text, "language": "en"} for text in TEXTS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
JSONL = LINES.encode()
PIECES = [JSONL[begin : begin + 997] for begin in range(0, len(JSONL), 997)]
BOM = b"\xef\xbb\xbf"
TABLE = pa.table({"text": TEXTS, "language": ["en"] * 60})
NOTE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00note"
CELLS = "text,language\r\n" + "".join(f'"{text}",en\r\n' for text in TEXTS)


def parquet(columns: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def ipc(table: pa.Table, *, stream: bool) -> bytes:
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    return sink.getvalue()


def written(write: Callable[[Any, Any], None]) -> bytes:
    sink = io.BytesIO()
    write(TABLE, sink)
    return sink.getvalue()


def sharegpt() -> list[dict[str, Any]]:
    return [
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]} for text in TEXTS
    ]


FILES: dict[str, bytes] = {
    # compression: several members, frames and streams, padding, and names that do not tell the truth
    "members.jsonl.gz": b"".join(map(gzip.compress, PIECES)),
    "frames.jsonl.zst": NOTE + b"".join(zstandard.compress(piece) + NOTE for piece in PIECES),
    "bytewise.jsonl.zst": b"".join(zstandard.compress(JSONL[n : n + 1]) for n in range(len(JSONL))),
    "streams.jsonl.xz": b"".join(lzma.compress(piece) + b"\0" * 4 for piece in PIECES),
    "old.jsonl.xz": lzma.compress(JSONL, format=lzma.FORMAT_ALONE),
    "streams.jsonl.bz2": b"".join(map(bz2.compress, PIECES)),
    "not.jsonl.gz": JSONL,
    "gzip.jsonl": gzip.compress(JSONL),
    "xz.jsonl.gz": lzma.compress(JSONL),
    "cells.csv.gz": gzip.compress(CELLS.encode()),
    "text.txt.zst": zstandard.compress("\n\n".join(TEXTS).encode()),
    # encodings and line ends
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16be.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "unmarked.jsonl": LINES.encode("utf-16-le"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "utf16.csv": CELLS.encode("utf-16"),
    "utf16.txt": "\r\n\r\n".join(TEXTS).encode("utf-16"),
    "utf16.jsonl.gz": gzip.compress(LINES.encode("utf-16")),
    "cr.txt": "\r\r".join(TEXTS).encode(),
    "cr.jsonl": JSONL.replace(b"\n", b"\r"),
    "cr.csv": CELLS.replace("\r\n", "\r").encode(),
    "crlf.jsonl": JSONL.replace(b"\n", b"\r\n\r\n"),
    "boms.jsonl": b"".join(BOM + line for line in JSONL.splitlines(True)),
    "two-boms.jsonl": BOM + BOM + JSONL,
    "boms.txt": b"\n\n".join(BOM + text.encode() for text in TEXTS),
    "boms.csv": BOM + BOM + CELLS.encode(),
    "no-end.jsonl": JSONL.rstrip(),
    # layouts of JSON
    "array.json": json.dumps(ROWS).encode(),
    "array.jsonl": b"\n " + BOM + json.dumps(ROWS, indent=2).encode(),
    "array-utf16.json": json.dumps(ROWS).encode("utf-16"),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "arrays.json": json.dumps(ROWS[:30]).encode() + b"\n" + json.dumps(ROWS[30:]).encode(),
    "pretty.jsonl": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "pretty.json": "\n\n".join(json.dumps(row, indent=4) for row in ROWS).encode(),
    "joined.json": "".join(json.dumps(row) for row in ROWS).encode(),
    "commas.jsonl": ",\n".join(json.dumps(row) for row in ROWS).encode() + b",\n",
    "escapes.json": json.dumps([{**row, "x": '\\" ]}, [{ \\\\'} for row in ROWS]).encode(),
    "sharegpt.json": json.dumps(sharegpt()).encode(),
    "chats.parquet": parquet({"conversations": [row["conversations"] for row in sharegpt()]}),
    "parts.jsonl": "\n".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": text}]},
                ]
            }
        )
        for text in TEXTS
    ).encode(),
    "nan.jsonl": "\n".join(
        json.dumps({**row, "id": float("nan"), "source": float("nan"), "score": float("inf")}) for row in ROWS
    ).encode(),
    # cells
    "semicolon.csv": CELLS.replace("text,", "text;").replace('",en', '";en').encode(),
    "tabs.csv": CELLS.replace("text,", "text\t").replace('",en', '"\ten').encode(),
    "tabs.tsv": CELLS.replace("text,", "text\t").replace('",en', '"\ten').encode(),
    "sep.csv": b"sep=;\r\n" + CELLS.replace("text,", "text;").replace('",en', '";en').encode(),
    "twice.csv": ("id,text,language,text\n" + "".join(f'{n},"{text}",en,\n' for n, text in enumerate(TEXTS))).encode(),
    "wide.csv": CELLS.replace('",en', '",en,,,').encode() + b"\r\n\r\n",
    "blank.csv": b"\r\n\r\n" + CELLS.encode(),
    "spaces.csv": CELLS.replace("text,", " text , ").encode(),
    # tables
    "stream.arrow": ipc(TABLE, stream=True),
    "file.arrow": ipc(TABLE, stream=False),
    "file.arrow.zst": zstandard.compress(ipc(TABLE, stream=False)),
    "v2.feather": written(lambda table, sink: feather.write_feather(table, sink)),
    "rows.orc": written(lambda table, sink: orc.write_table(table, sink)),
    "rows.orc.gz": gzip.compress(written(lambda table, sink: orc.write_table(table, sink))),
    "binary.parquet": parquet({"text": pa.array([t.encode() for t in TEXTS], pa.binary()), "language": [b"en"] * 60}),
    "large.parquet": parquet(
        {"text": pa.array(TEXTS, pa.large_string()), "language": pa.array(["en"] * 60).dictionary_encode()}
    ),
    "views.arrow": ipc(pa.table({"text": pa.array(TEXTS, pa.string_view())}), stream=True),
    "dictionary.parquet": parquet({"text": pa.array(TEXTS).dictionary_encode()}),
    "dots.parquet": parquet({"text.x": [1] * 60, "text": TEXTS, "x": [{"text": 1}] * 60}),
}  # fmt: skip


def text_of(record: dict[str, Any]) -> str:
    return str(record["text"] if "text" in record else record["messages"][-1]["content"])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("carry", [None, ()])
def test_every_layout_gives_the_same_texts(name: str, carry: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    reader = read_records(tmp_path / name, language="en", max_bad_share=0.0, carry=carry)
    assert [text_of(record) for record in reader] == TEXTS
    assert reader.bad == 0


def test_line_ends_inside_text_are_kept(tmp_path: Path) -> None:
    odd = "one\u2028two\u0085three\x0bfour"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": odd}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(odd, encoding="utf-8")
    (tmp_path / "c.csv").write_bytes(b'text,x\r\n"one\r\ntwo ""three""\rfour",1\r\n')
    assert [record["text"] for record in read_records(tmp_path)] == [odd, odd, 'one\r\ntwo "three"\rfour']


def test_a_line_end_on_the_edge_of_a_block_is_one_line_end(tmp_path: Path) -> None:
    """Blocks have 64 KiB; the carriage return is at each of four positions around the edge."""
    for size in range(65_530, 65_540):
        (tmp_path / "a.csv").write_bytes(b'text\r\n"' + b"x" * size + b'\r\ny"\r\n"z"\r\n')
        assert [record["text"] for record in read_records(tmp_path / "a.csv")] == ["x" * size + "\r\ny", "z"]


def test_elements_of_an_array_are_cut_the_same_at_every_edge() -> None:
    whole = json.dumps([{"a": '\\"]},{["\\\\'}, [1, [2]], "x,]", 7, {"b": {"c": []}}, None]).encode()
    for edge in range(len(whole) + 1):
        cut = _Cutter()
        found = [*cut.push(whole[:edge]), *cut.push(whole[edge:])]
        assert [json.loads(part) for part in found] == json.loads(whole)
        assert not cut.open


def test_a_language_without_a_text_is_no_record(tmp_path: Path) -> None:
    rows = [
        {"en": text, "de": None if n % 3 else "Die Lampe.", "fr": " " if n % 4 == 0 else "La lampe."}
        for n, text in enumerate(TEXTS)
    ]
    pq.write_table(pa.table({"translation": rows}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    for name in ("a.parquet", "b.jsonl"):
        reader = read_records(tmp_path / name, max_bad_share=0.0, carry=())
        codes = [record["language"] for record in reader]
        assert {code: codes.count(code) for code in set(codes)} == {"en": 60, "de": 20, "fr": 45}


ODD = [
    ('{"text": "a", "n": %s}' % ("7" * 5000), "integer of thousands of digits"),
    ('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ('{"text": "a", "n": ' + '{"a":' * 50_000 + "}" * 50_001, "JSON"),
    ('{"text": "a", "source": 5}', "the source is 5, not a text"),
    ('{"text": "a", "source": ["b"]}', "the source is ['b'], not a text"),
    ('{"text": "a", "domain": {"b": 1}}', "the domain is {'b': 1}, not a text"),
    ('{"text": "a", "domain": true}', "the domain is True, not a text"),
    ('{"text": "a", "language": 5}', "the language is 5, not a text"),
    ('{"text": "a", "language": ["en"]}', "the language is ['en'], not a text"),
    ('{"text": "a", "language": "%s"}' % ("e" * 100_000), "language"),
    ('{"text": "a", "id": "\\ud800"}', "the id is '\\ud800', not a text"),
    ('{"text": "a", "source": "\\udfff"}', "the source is '\\udfff', not a text"),
    ('{"text": "a", "id": [1]}', "the id is [1], not a text"),
    ('{"text": "a", "id": true}', "the id is True, not a text"),
    ('{"text": 1e999}', "the text is float"),
    ('{"text": ["a"]}', "the text is list"),
    ('{"text": {"en": 3}}', "the text is int"),
    ('{"text": {"en": "", "de": null}}', "empty in every language"),
    ('{"\\ud800": 1}', "neither 'text' nor 'messages'"),
    ('{"messages": {"role": "user"}}', "not a list"),
    ('{"messages": [{"role": {"a": 1}, "content": "b"}]}', "the role {'a': 1}"),
    ('{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": null}]}', "NoneType"),
    ('{"conversations": "b"}', "not a list"),
    ("[" * 200_000, "nested too deeply"),
    ('"text"', "a JSON str"),
    ("NaN", "a JSON float"),
    ('{"text": "a\0b"}', "not JSON"),
    ('{"text": "%s"}' % ("x" * 70_000), "longer than"),
]  # fmt: skip


@pytest.mark.parametrize("place", ["line", "array"])
@pytest.mark.parametrize(("odd", "why"), ODD)
def test_one_odd_record_is_one_bad_record(
    odd: str, why: str, place: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "longer" in why:
        monkeypatch.setattr("koine.data.lines.LONGEST_LINE", 60_000)
        monkeypatch.setattr("koine.data.json_rows.LONGEST_LINE", 60_000)
    elif place == "array" and odd.count("[") != odd.count("]"):
        pytest.skip("brackets that are not closed end an array's file")
    lines = LINES.splitlines()
    content = "\n".join([*lines, odd, *lines])
    if place == "array":
        content = "[" + ",".join([*lines, odd, *lines]) + "]"
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    reader = read_records(path, max_bad_share=0.02)
    assert [record["text"] for record in reader] == TEXTS * 2
    assert reader.bad == 1
    assert why in reader.examples[0].reason
    shown = str(reader.examples[0])
    assert shown.isprintable()
    assert len(shown) < 600
    # what came through can be written again, in UTF-8
    assert tokenize(path, tokenizer, out=tmp_path / "tokens", max_bad_share=0.02).good == 120


@pytest.mark.parametrize("value", [3, 2.5, None, "x", 10**18])
def test_labels_that_are_numbers_or_missing(value: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "id": value, "source": None, "domain": ""}))
    (record,) = read_records(tmp_path / "a.jsonl")
    assert record["id"] == ("a.jsonl:1" if value is None else str(value))
    assert (record["source"], record["domain"], record["language"]) == ("a", "text", "und")


UNREADABLE = {
    "nanoseconds": pa.array([2**62] * 60, pa.timestamp("ns")),
    "far": pa.array([2**50] * 60, pa.timestamp("s")),
    "duration": pa.array([2**62] * 60, pa.duration("s")),
    "date": pa.array([2**30] * 60, pa.date32()),
    "zone": pa.array([0] * 60, pa.timestamp("us", tz="Nowhere/Never")),
    "decimal": pa.array([1] * 60, pa.decimal128(38, 2)),
    "map": pa.array([[("k", 1), ("k", 2)]] * 60, pa.map_(pa.string(), pa.int64())),
    "nested": pa.array([[[{"a": [datetime.date(2020, 1, 1)]}]]] * 60),
    "bytes": pa.array([b"\xff"] * 60, pa.binary()),
    "null": pa.nulls(60),
}


@pytest.mark.parametrize("carry", [None, ()])
@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_column_that_is_not_needed_is_ignored(name: str, carry: Any, tmp_path: Path) -> None:
    table = pa.table({"odd": UNREADABLE[name], "text": TEXTS})
    (tmp_path / "a.parquet").write_bytes(parquet({"odd": UNREADABLE[name], "text": TEXTS}))
    (tmp_path / "b.arrow").write_bytes(ipc(table, stream=True))
    (tmp_path / "c.arrow").write_bytes(ipc(table, stream=False))
    records = list(read_records(tmp_path, max_bad_share=0.0, carry=carry))
    assert [record["text"] for record in records] == TEXTS * 3
    if carry == ():
        assert all("odd" not in record for record in records)


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path) -> None:
    """The pages of the other column are destroyed, so reading them would fail."""
    sink = io.BytesIO()
    marks = [f"{n:08d}" * 500 for n in range(60)]
    table = pa.table({"text": TEXTS, "answer": TEXTS, "image": marks})
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    content = sink.getvalue().replace(b"\xa0\x0f\0\0" + marks[5].encode(), b"\xff" * (4 + len(marks[5])))
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match="not a whole Parquet file"):
        list(read_records(tmp_path / "a.parquet"))
    records = list(read_records(tmp_path / "a.parquet", carry=("answer",)))
    assert [(record["text"], record["answer"]) for record in records] == list(zip(TEXTS, TEXTS, strict=True))


def test_text_of_a_table_that_is_no_utf8_is_one_bad_record(tmp_path: Path) -> None:
    cells = [*(text.encode() for text in TEXTS), b"\xff\xfe"]
    marked = pa.array(cells, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": pa.array(cells, pa.binary())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": marked}), tmp_path / "b.parquet")
    (tmp_path / "c.arrow").write_bytes(ipc(pa.table({"text": marked}), stream=True))
    for name in ("a.parquet", "b.parquet", "c.arrow"):
        reader = read_records(tmp_path / name, max_bad_share=0.02)
        assert [record["text"] for record in reader] == TEXTS
        assert "the field 'text' cannot be read" in reader.examples[0].reason


def test_arrow_offsets_that_point_outside_are_an_error(tmp_path: Path) -> None:
    """Followed, they would lead out of the process's memory."""
    offsets = pa.py_buffer(memoryview(bytearray(b"\0\0\0\0\xff\xff\xff\x7f\x05\0\0\0")).toreadonly())
    wild = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abcde"))
    (tmp_path / "a.arrow").write_bytes(ipc(pa.table({"text": wild}), stream=True))
    with pytest.raises(UserError, match="not a whole Arrow stream"):
        list(read_records(tmp_path / "a.arrow"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "ends inside a JSON array or object"),
        ("a.json", b'{\n"text": "a",\n', "ends inside a JSON array or object"),
        ("a.zip", b"PK\3\4", "an archive '.zip' is not read; unpack it"),
        ("a.jsonl.tar.gz", b"", "an archive '.jsonl.tar.gz' is not read; unpack it"),
        ("a.csv", b"text,language\n", "holds no records"),
        ("a.jsonl.gz", b"", "holds no records"),
        ("a.jsonl.zst", NOTE, "holds no records"),
        ("a.jsonl.zst", zstandard.compress(JSONL)[:-3], "damaged or cut off"),
        ("a.jsonl.xz", lzma.compress(JSONL)[:-3], "damaged or cut off"),
        ("a.jsonl.xz", lzma.compress(JSONL) + b"more", "damaged or cut off"),
        ("a.jsonl.bz2", bz2.compress(JSONL)[:-3], "damaged or cut off"),
        ("a.jsonl.bz2", bz2.compress(JSONL) + b"\0more", "damaged or cut off"),
        ("a.arrow", ipc(TABLE, stream=False)[:-20], "not a whole Arrow file"),
        ("a.orc", b"ORC", "not a whole ORC file"),
        ("a.feather", b"FEA1" + b"\0" * 20, "not a whole Arrow file"),
        ("a.txt", "Größe\n".encode("utf-16")[:-1], "not UTF-8"),
        ("a.txt", b"abc\0def\n", "NUL"),
        ("a.csv", b"text\nabc\0def\n", "NUL"),
        ("a.jsonl", LINES.encode("latin-1", "replace").replace(b"?", b"\xe4"), "not UTF-8"),
    ],
)
def test_unreadable_files_give_one_line(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_records(tmp_path / name))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def packed_lines(compress: Any, line: bytes, size: int) -> bytes:
    """Compress `size` bytes of one repeated line without holding them."""
    block = line * (2**20 // len(line))
    packed = [compress.compress(block) for _ in range(size // len(block))]
    return b"".join([*packed, compress.flush()])


BOMBS: dict[str, Callable[[], Any]] = {
    ".zst": lambda: zstandard.ZstdCompressor().compressobj(),
    ".xz": lambda: lzma.LZMACompressor(preset=1),
    ".bz2": lambda: bz2.BZ2Compressor(),
}


@pytest.mark.parametrize("packed", BOMBS)
def test_decompression_bombs_are_refused(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompression, "SUSPECTS", ((2**23, 200),))
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(packed_lines(BOMBS[packed](), b"\n", 2**26))
    assert path.stat().st_size < 2**16
    with pytest.raises(UserError, match="times its size comes out of the compressed file"):
        list(read_records(path))


def test_zstandard_takes_linear_time_and_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of 300 MB out of 20 KB; quadratic code would take minutes.

    Memory is that of the longest line and one feed.
    """
    monkeypatch.setattr(decompression, "SUSPECTS", ((2**40, 1),))
    monkeypatch.setattr(line_reading, "LONGEST_LINE", 2**22)
    path = tmp_path / "a.jsonl.zst"
    compress = zstandard.ZstdCompressor().compressobj()
    packed = [compress.compress(JSONL)]
    packed += [compress.compress(b"x" * 2**20) for _ in range(300)]
    path.write_bytes(b"".join([*packed, compress.compress(b"\n" + JSONL), compress.flush()]))
    tracemalloc.start()
    reader = read_records(path, max_bad_share=0.02)
    assert [record["text"] for record in reader] == TEXTS * 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.bad == 1
    assert peak < 2**27


def test_a_window_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(JSONL) + stream.flush())
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**29}]
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(JSONL, filters=filters))
    for name in ("a.jsonl.zst", "b.jsonl.xz"):
        with pytest.raises(UserError, match="needs more than 128 MiB of memory"):
            list(read_records(tmp_path / name))


def test_other_files_in_a_folder_are_ignored(tmp_path: Path) -> None:
    for name in ("README.md", ".DS_Store", "_SUCCESS", ".a.jsonl.crc", "dataset_info.json", "a.jsonl.crc"):
        (tmp_path / name).write_bytes(b"{")
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    assert len(list(read_records(tmp_path, max_bad_share=0.0))) == 60
