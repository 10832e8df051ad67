"""Damaged GGUF files: one error each, found before memory is allocated for what the file claims."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koine.errors import UserError
from koine.model.formats.importing.gguf_file import GgufFile
from koine.model.formats.importing.runner import import_model, planned_import

from .gguf_files import converted, metadata_of, random_model, saved_state, small_llama, write_file

pytest.importorskip("gguf", reason="reading GGUF files needs the extra [gguf]")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    config = small_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    tensors = converted(saved_state(random_model(config), folder / "saved"), config, "llama")
    return write_file(folder / "small.gguf", "llama", metadata_of(config, "llama"), tensors, kind="Q8_0")


def patched(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_truncated_file_is_refused(data: st.DataObject, small: Path) -> None:
    content = small.read_bytes()
    # The last tensor is followed by padding.
    size = data.draw(st.integers(0, len(content) - 64))
    file = small.with_name("cut.gguf")
    file.write_bytes(content[:size])
    with pytest.raises(UserError), planned_import(file):
        pass


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_changed_bytes_of_the_header_give_an_error_line_or_a_model(data: st.DataObject, small: Path) -> None:
    content = small.read_bytes()
    end = content.rindex(b"output_norm.weight") + 64
    at = data.draw(st.integers(0, end))
    value = data.draw(st.binary(min_size=1, max_size=8))
    file = small.with_name("changed.gguf")
    file.write_bytes(patched(content, at, value))
    tracemalloc.start()
    try:
        with planned_import(file) as plan:
            plan.describe()
    except UserError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 50_000_000


LARGE = struct.pack("<Q", 2**62)


def after(content: bytes, text: bytes, skip: int = 0) -> int:
    return content.index(text) + len(text) + skip


def at_of_array(content: bytes) -> int:
    """Return the place of the number of tokens: after the key, its type and the type of its entries."""
    return after(content, b"tokenizer.ggml.tokens", 8)


def at_of_entry(content: bytes, name: bytes) -> int:
    """Return the place after a tensor's name: the number of dimensions."""
    return after(content, name)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "the header has 4 bytes, and 0 are left"),
    "magic": (lambda content: b"ggml" + content[4:], r"is no GGUF file \(it begins with b'ggml'\)"),
    "version 1": (lambda content: patched(content, 4, struct.pack("<I", 1)), "is a GGUF file of version 1"),
    "version 9": (lambda content: patched(content, 4, struct.pack("<I", 9)), "is a GGUF file of version 9"),
    "big-endian": (lambda content: patched(content, 4, struct.pack(">I", 3)), "is a big-endian GGUF file"),
    "tensors": (lambda content: patched(content, 8, LARGE), "names 4,611,686,018,427,387,904 tensors"),
    "pairs": (lambda content: patched(content, 16, LARGE), "names 4,611,686,018,427,387,904 metadata values"),
    "a key's length": (lambda content: patched(content, 24, LARGE), "has 4,611,686,018,427,387,904 bytes"),
    "entries": (
        lambda content: patched(content, at_of_array(content), LARGE),
        "'tokenizer.ggml.tokens' has 4,611,686,018,427,387,904 entries",
    ),
    "a list of lists": (
        lambda content: patched(content, at_of_array(content) - 4, struct.pack("<I", 9)),
        "is a list of the unknown type 9",
    ),
    "a value's type": (
        lambda content: patched(content, after(content, b"llama.block_count"), struct.pack("<I", 77)),
        "is of the unknown type 77",
    ),
    "a name that is no UTF-8": (
        lambda content: content.replace(b"llama.block_count", b"llama.block_coun\xff", 1),
        "holds text that is not UTF-8",
    ),
    "dimensions": (
        lambda content: patched(content, at_of_entry(content, b"output_norm.weight"), struct.pack("<I", 9)),
        "output_norm.weight has 9 dimensions",
    ),
    "a shape": (
        lambda content: patched(content, at_of_entry(content, b"output_norm.weight") + 4, LARGE),
        "output_norm.weight ends at byte",
    ),
    "no rows": (
        lambda content: patched(content, at_of_entry(content, b"output_norm.weight") + 4, bytes(8)),
        r"output_norm.weight has the shape \[0\]",
    ),
    "a type": (
        lambda content: patched(
            content, at_of_entry(content, b"token_embd.weight") + 20, struct.pack("<I", 999)
        ),
        "token_embd.weight is of the type 999; these are read: F32, F16, BF16, Q8_0",
    ),
    "a type that is not read": (
        lambda content: patched(
            content, at_of_entry(content, b"token_embd.weight") + 20, struct.pack("<I", 16)
        ),
        "token_embd.weight is of the type IQ2_XXS",
    ),
    "blocks": (
        lambda content: patched(
            content, at_of_entry(content, b"output_norm.weight") + 12, struct.pack("<I", 12)
        ),
        "rows of 32, which are no whole blocks of Q4_K",
    ),
    "an offset": (
        lambda content: patched(
            content, at_of_entry(content, b"output_norm.weight") + 16, struct.pack("<Q", 2**40)
        ),
        "output_norm.weight ends at byte",
    ),
    "an odd offset": (
        lambda content: patched(
            content, at_of_entry(content, b"output_norm.weight") + 16, struct.pack("<Q", 33)
        ),
        "no multiple of 32",
    ),
    "an overlap": (
        lambda content: patched(content, at_of_entry(content, b"output_norm.weight") + 16, bytes(8)),
        "overlaps",
    ),
    "a tensor twice": (
        lambda content: content.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"),
        "has the tensor 'blk.0.attn_q.weight' twice",
    ),
    "a key twice": (
        lambda content: content.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"),
        "has the metadata 'tokenizer.ggml.eos_token_id' twice",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, small: Path, tmp_path: Path) -> None:
    change, says = DAMAGE[name]
    file = tmp_path / "damaged.gguf"
    file.write_bytes(change(small.read_bytes()))
    with pytest.raises(UserError, match=says):
        import_model(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.gguf"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda writer: writer.add_uint16("split.count", 3), "is part 1 of 3; join the parts"),
        (lambda writer: writer.add_uint32("general.alignment", 33), "'general.alignment' is 33"),
    ],
)
def test_metadata_of_the_file(change: Callable[[Any], object], says: str, tmp_path: Path) -> None:
    config = small_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    tensors = converted(saved_state(random_model(config), tmp_path / "saved"), config, "llama")
    file = write_file(tmp_path / "m.gguf", "llama", metadata_of(config, "llama"), tensors, change=change)
    with pytest.raises(UserError, match=says):
        GgufFile([file])


def test_unknown_architectures_and_kinds_of_file(tmp_path: Path) -> None:
    for name, kind, says in (
        ("mamba", "model", "is of the architecture 'mamba'; these are imported: llama, smollm3, qwen2"),
        ("clip", "mmproj", "is a GGUF file of the type 'mmproj', no model"),
    ):
        file = write_file(
            tmp_path / f"{name}.gguf", name, {}, {}, change=lambda writer, kind=kind: writer.add_type(kind)
        )
        with pytest.raises(UserError, match=says), planned_import(file):
            pass
