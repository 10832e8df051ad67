"""Every tensor type: the imported numbers are the `gguf` library's, and the logits those of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from koine.errors import UserError
from koine.model.formats.importing.gguf_tensors import halves
from koine.model.formats.importing.gguf_types import TYPES
from koine.model.formats.importing.runner import import_model, planned_import

from .gguf_files import (
    VOCABULARY,
    add_byte_level_tokenizer,
    add_metadata,
    converted,
    metadata_of,
    random_bytes,
    random_model,
    saved_state,
    small_llama,
    write_file,
)
from .reference import loaded_by_transformers

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the extra [gguf]")
transformers = pytest.importorskip("transformers")

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""The library dequantises these and does not quantise to them: the files here hold random blocks."""


def file_of(kind: str, folder: Path) -> Path:
    """Write a Llama whose matrices are of one type."""
    config = small_llama()
    tensors = converted(saved_state(random_model(config), folder / "saved"), config, "llama")
    path = folder / "model.gguf"
    if kind not in K_QUANTS:
        return write_file(path, "llama", metadata_of(config, "llama"), tensors, kind=kind)
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, metadata_of(config, "llama"), "llama")
    add_byte_level_tokenizer(writer)
    number = gguf.GGMLQuantizationType[kind]
    for seed, (name, tensor) in enumerate(tensors.items()):
        if tensor.dim() > 1:
            writer.add_tensor(name, random_bytes(kind, tuple(tensor.shape), seed), raw_dtype=number)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_values_and_logits_of_every_type(kind: str, tmp_path: Path) -> None:
    file = file_of(kind, tmp_path)
    import_model(file, tmp_path / "out", dtype=torch.float32)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    reader = gguf.GGUFReader(file)
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = {
        "blk.1.ffn_down": "mlp.down_proj",
        "blk.1.attn_v": "self_attn.v_proj",
        "blk.1.attn_q": "self_attn.q_proj",
    }
    for theirs, name in names.items():
        values = torch.from_numpy(np.array(stored[f"{theirs}.weight"]))
        if theirs.endswith("attn_q"):
            values = halves(values, 4)
        assert torch.equal(ours[f"model.layers.1.{name}.weight"], values)
    assert {str(tensor.tensor_type.name) for tensor in reader.tensors} == {kind, "F32"}

    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(VOCABULARY)[None, :32]
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, loaded_by_transformers(file)(tokens).logits)


@pytest.mark.parametrize(
    ("kind", "dtype", "written"),
    [
        ("F32", None, torch.float32),
        ("F16", None, torch.float16),
        ("BF16", None, torch.bfloat16),
        ("Q8_0", None, torch.float32),
        ("Q4_1", torch.bfloat16, torch.bfloat16),
        ("F16", torch.float32, torch.float32),
    ],
)
def test_the_dtype(kind: str, dtype: torch.dtype | None, written: torch.dtype, tmp_path: Path) -> None:
    file = file_of(kind, tmp_path)
    with planned_import(file, dtype=dtype) as plan:
        about = plan.describe()
    assert about["dtype"] == str(written).removeprefix("torch.")
    import_model(file, tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {written}
    assert about["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert about["tensors"] == len(tensors)
    full = torch.float32
    if dtype is torch.bfloat16:
        import_model(file, tmp_path / "full")
        exact = load_file(tmp_path / "full" / "model.safetensors")
        assert all(torch.equal(tensors[name], exact[name].to(written)) for name in exact)
        assert {tensor.dtype for tensor in exact.values()} == {full}


def test_mixed_types_are_float32_and_told(tmp_path: Path) -> None:
    config = small_llama()
    tensors = converted(saved_state(random_model(config), tmp_path / "saved"), config, "llama")

    def kind(name: str) -> str:
        return "Q8_0" if "ffn" in name else "F16"

    file = write_file(tmp_path / "model.gguf", "llama", metadata_of(config, "llama"), tensors, kind=kind)
    about = import_model(file, tmp_path / "out")
    assert about["dtype"] == "float32"
    assert {name: one["tensors"] for name, one in about["quantisation"].items()} == {
        "F16": 10,
        "Q8_0": 6,
        "F32": 5,
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(value: float, tmp_path: Path) -> None:
    config = small_llama()
    model = random_model(config)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    tensors = converted(saved_state(model, tmp_path / "saved"), config, "llama")
    file = write_file(tmp_path / "model.gguf", "llama", metadata_of(config, "llama"), tensors)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        import_model(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    config = small_llama()
    model = random_model(config)
    model.model.norm.weight.data[0] = 1e5
    tensors = converted(saved_state(model, tmp_path / "saved"), config, "llama")
    file = write_file(tmp_path / "model.gguf", "llama", metadata_of(config, "llama"), tensors)
    with pytest.raises(UserError, match="which float16 cannot"):
        import_model(file, tmp_path / "out", dtype=torch.float16)


def test_large_tensors_are_read_in_pieces_and_large_models_are_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes come out whatever the size of pieces and shards; no piece is larger than it may be."""
    from koine.model.formats.importing import gguf_types, plan

    file = file_of("Q8_0", tmp_path)
    import_model(file, tmp_path / "whole")
    sizes: list[int] = []
    values = gguf_types.TensorType.values

    def watched(self: Any, data: Any) -> torch.Tensor:
        found = values(self, data)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(gguf_types.TensorType, "values", watched)
    monkeypatch.setattr(plan, "PIECE_NUMBERS", 1024)
    import_model(file, tmp_path / "pieces", max_shard_bytes=2_000_000)
    # q and k, whose rows are put in another order, are read at once.
    assert max(sizes) == 256 * 256
    assert sorted(set(sizes))[:3] == [256, 1024, 128 * 256]
    shards = sorted((tmp_path / "pieces").glob("model-*.safetensors"))
    assert len(shards) >= 3
    assert (tmp_path / "pieces" / "model.safetensors.index.json").is_file()
    pieces: dict[str, torch.Tensor] = {}
    for shard in shards:
        pieces |= load_file(shard)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pieces")
