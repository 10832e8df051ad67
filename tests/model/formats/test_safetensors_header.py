"""The header's parser gives the verdict of the `safetensors` library on every header, sound or not, and
refuses in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from koine.errors import UserError
from koine.model.formats.safetensors_header import BITS, header_bytes, read_header

SOUND = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
WITH = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":%s}}'


def verdicts(file: Path) -> tuple[bool, bool]:
    """Whether the library takes a file, and whether we do."""
    try:
        with safe_open(file, framework="np") as opened:
            opened.keys()
        library = True
    except SafetensorError:
        library = False
    try:
        read_header(file)
    except UserError as error:
        return library, "\n" in str(error)
    return library, True


def with_header(header: str | bytes, data: int = 8, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def odd_texts() -> Iterator[str]:
    yield from (
        SOUND, f" {SOUND}", f"{SOUND} ", f"{SOUND}\0", f"\ufeff{SOUND}", f"\n{SOUND}", SOUND[:-1], "", "[]",
        "null", "1", '""', "{}",
        f"// a\n{SOUND}", SOUND[:-1] + ",}", f"{SOUND[:-1]},{SOUND[1:]}", "{'a':1}",
    )  # fmt: skip
    for metadata in ("null", "{}", '{"a":1}', "[]", '{"a":"b"}', '{"a":"b","a":"c"}', '"b"', '{"a":null}'):
        yield f'{{"__metadata__":{metadata},{SOUND[1:]}'
    yield f'{{"__metadata__":{{}},"__metadata__":{{}},{SOUND[1:]}'
    for value in (
        "null", "{}", '"F32"', "1", '["F32",[2],[0,8]]', '["F32",[2]]', '["F32",[2],[0,8],1]',
        '{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}',
        '{"dtype":{"F32":1},"shape":[2],"data_offsets":[0,8]}',
        '{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}',
        '{"dtype":"F32","shape":[02],"data_offsets":[0,8]}',
        '{"dtype":"F32","shape":null,"data_offsets":[0,8]}',
        '{"dtype":"F32","shape":{},"data_offsets":[0,8]}',
        '{"dtype":null,"shape":[2],"data_offsets":[0,8]}', '{"dtype":"F32","shape":"2","data_offsets":[0,8]}',
        '{"shape":[2],"data_offsets":[0,8]}', '{"dtype":"F32","shape":[2]}',
    ):  # fmt: skip
        yield f'{{"a":{value}}}'
    for more in (
        "1",
        "NaN",
        "Infinity",
        "1e999",
        "9" * 300,
        "9" * 5000,
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        '"\n"',
        '{"x":1,"x":2}',
    ):
        yield WITH % more
    for depth in (120, 124, 125, 126, 127, 130, 100_000):
        yield WITH % ("[" * depth + "]" * depth)
        yield WITH % ('{"x":' * min(depth, 200) + "1" + "}" * min(depth, 200))
    for shape in (
        "2.0", "-2", "2e0", "true", "null", "-0", "18446744073709551616", "18446744073709551615", '"2"',
        "[2]", "1,2", "2,1", "2,-0", "0",
        "", "2,0", "4294967296,4294967296", "4294967296,4294967296,0", "0,18446744073709551615,3",
        "4611686018427387904",
    ):  # fmt: skip
        for end in (8, 0, 4):
            yield f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,{end}]}}}}'
    for offsets in (
        "8,0", "0,9", "-8,0", "-1,7", "0,8,9", "0", "", "0.0,8", "0,8.0", "1,9", "0,true",
        "0,18446744073709551624", "8,16", "0,null",
        "4,12", "18446744073709551608,0", "18446744073709551608,18446744073709551616",
    ):  # fmt: skip
        yield f'{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[{offsets}]}}}}'


def odd_files() -> Iterator[bytes]:
    for text in odd_texts():
        for data in (8, 0, 7, 9):
            yield with_header(text, data)
    yield with_header(b"\xff" + SOUND.encode())
    yield with_header(SOUND.encode("utf-16"))
    for length in (0, 1, 7, 55, 2**31, 2**32, 2**63, 2**64 - 1, 2**64 - 8, 10**8, 10**8 + 1):
        yield with_header(SOUND, length=length)
    yield from (bytes(count) for count in range(9))
    for dtype in (*BITS, "F128", "f32", "E4M3", "I4", "", "F8_E3M4"):
        for count in (0, 1, 2, 4, 8):
            size = BITS.get(dtype, 8) * count // 8
            yield with_header(json.dumps({"a": entry(dtype, [count], [0, size])}), size)


def random_files(seed: int) -> Iterator[bytes]:
    """Several tensors of which one is spoilt, and sound headers with a character changed."""
    chance = random.Random(seed)
    for _ in range(150):
        at, header = 0, dict[str, Any]()
        for number in range(chance.randint(1, 4)):
            dtype, count = (
                chance.choice(["F32", "BF16", "U8", "F4", "F8_E4M3", "I64"]),
                chance.choice([0, 2, 3]),
            )
            size = BITS[dtype] * count // 8
            header[f"t{number}"] = entry(dtype, [count], [at, at + size])
            at += size
        one = header[chance.choice(list(header))]
        kind, more = chance.randrange(6), 0
        if kind == 1:
            one["data_offsets"][chance.randrange(2)] += chance.choice([-1, 1, 2, -4])
        elif kind == 2:
            one["shape"] = [chance.choice([0, 1, 2, -1, 3])]
        elif kind == 3:
            one["data_offsets"] = list(header[chance.choice(list(header))]["data_offsets"])
        elif kind == 4:
            more = chance.choice([1, -1])
        items = list(header.items())
        chance.shuffle(items)
        yield with_header(json.dumps(dict(items)), max(0, at + more))
    for _ in range(300):
        text = bytearray(SOUND.encode())
        for _ in range(chance.choice([1, 1, 2])):
            place, new = chance.randrange(len(text)), ord(chance.choice('{}[]",:0123456789-.eEntfu\\ \xff'))
            kind = chance.randrange(3)
            if kind == 0:
                text[place] = new
            elif kind == 1:
                del text[place]
            else:
                text.insert(place, new)
        yield with_header(bytes(text))


def test_every_header_gets_the_verdict_of_the_library(tmp_path: Path) -> None:
    files = [*odd_files(), *random_files(0)]
    file, counts = tmp_path / "model.safetensors", [0, 0]
    for content in files:
        file.write_bytes(content)
        library, ours = verdicts(file)
        assert library == ours, content[:300]
        counts[library] += 1
    # Both verdicts are tried.
    assert len(files) > 1000
    assert min(counts) > 200


def test_headers_of_the_library_are_read(tmp_path: Path) -> None:
    tensors = {
        "x": torch.randn(5, 3),
        "y": torch.zeros(0, 2, dtype=torch.int64),
        "é": torch.tensor(1.5).to(torch.bfloat16),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    content = file.read_bytes()
    for name, found in read_header(file).items():
        assert found.shape == tuple(tensors[name].shape)
        raw = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b""
        assert content[found.begin : found.end] == raw
    assert read_header(file).keys() == tensors.keys()


def test_the_library_reads_our_headers(tmp_path: Path) -> None:
    layout = {"x": ("F32", (5, 3)), "y": ("I64", (0, 2)), "z": ("BF16", ())}
    file = tmp_path / "model.safetensors"
    file.write_bytes(header_bytes(layout, metadata={"format": "pt"}) + bytes(62))
    with safe_open(file, framework="pt") as opened:
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == {  # noqa: SIM118
            name: shape for name, (_, shape) in layout.items()
        }


@pytest.mark.parametrize("kind", ["folder", "missing"])
def test_a_missing_file_is_refused(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        read_header(tmp_path / "model.safetensors")
