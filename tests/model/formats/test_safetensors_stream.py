"""Safetensors checkpoints: files chosen as transformers does, never outside the folder, read as written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.errors import UserError
from koine.model.formats.safetensors_stream import Checkpoint, CheckpointWriter
from koine.model.formats.weight_files import weight_files


def write_index(folder: Path, weight_map: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_single_file_is_read_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    stored = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(stored, tmp_path / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    write_index(tmp_path, dict.fromkeys(stored, "model-00001-of-00001.safetensors"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()["lm_head.weight"]
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("lm_head.weight"), theirs)
    checkpoint.close()


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/../../b", "..\\other", "C:\\other", "", "..", "C:other"],
)
def test_an_index_must_not_name_files_outside(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    write_index(tmp_path / "model", {"x": name})
    for opens in (weight_files, Checkpoint):
        with pytest.raises(UserError, match="a file outside its folder"):
            opens(tmp_path / "model")


@pytest.mark.parametrize("weight_map", [None, [], "x", 3, {"x": 3}, {"x": None}, {"x": ["a"]}])
def test_an_index_of_wrong_types(weight_map: Any, tmp_path: Path) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(UserError, match="holds no weight_map"):
        weight_files(tmp_path)


def test_a_shard_may_be_a_link_and_lie_in_a_folder_below(tmp_path: Path) -> None:
    """As the cache of the hub keeps files."""
    folder = tmp_path / "model"
    save_file({"x": torch.ones(2)}, tmp_path / "blob")
    (folder / "deep").mkdir(parents=True)
    (folder / "one.safetensors").symlink_to(tmp_path / "blob")
    save_file({"y": torch.ones(2)}, folder / "deep" / "two.safetensors")
    write_index(folder, {"x": "one.safetensors", "y": "deep/two.safetensors"})
    checkpoint = Checkpoint(folder)
    assert set(checkpoint) == {"x", "y"}
    checkpoint.close()


def test_files_are_read_and_written_as_safetensors_does(tmp_path: Path) -> None:
    """The library reads what we write and the reverse, piece by piece."""
    content = {"x": torch.randn(5, 3), "y": torch.randn(4).to(torch.bfloat16), "z": torch.tensor(7)}
    save_file(content, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("x", 1, 4), content["x"][1:4])
    assert torch.equal(checkpoint.read("y"), content["y"])
    assert int(checkpoint.read("z")) == 7
    (tmp_path / "out").mkdir()
    writer = CheckpointWriter(
        tmp_path / "out",
        {name: (one.dtype, one.shape) for name, one in content.items()},
        max_shard_bytes=10**9,
    )
    writer.write("x", content["x"][2:], 2)
    writer.write("x", content["x"][:2])
    writer.write("y", content["y"])
    writer.write("z", content["z"])
    writer.close()
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in content.items())
    checkpoint.close()
