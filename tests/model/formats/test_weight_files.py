"""Which of several weight files is loaded: the one that transformers chooses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.errors import UserError
from koine.model import Decoder, ModelConfig, load_causal_lm, load_model, save_model
from koine.model.formats.weight_files import weight_files
from tests.model.formats.conftest import ids, llama, logits

transformers = pytest.importorskip("transformers", reason="the classes need the extra [hf]")


@pytest.mark.parametrize("beside", ["index", "pickled", "variant"])
def test_the_file_that_transformers_chooses_is_loaded(beside: str, tmp_path: Path) -> None:
    """A safetensors file lies beside other files with other weights."""
    folder, other = llama(tmp_path / "model"), llama(tmp_path / "other", seed=1)
    if beside == "index":
        shutil.copy(other / "model.safetensors", folder / "model-00001-of-00001.safetensors")
        names = dict.fromkeys(load_file(other / "model.safetensors"), "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": names})
        )
    elif beside == "pickled":
        torch.save(load_file(other / "model.safetensors"), folder / "pytorch_model.bin")
    else:
        shutil.copy(other / "model.safetensors", folder / "model.fp16.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert (logits(load_causal_lm(folder)) - theirs(ids()).logits).abs().max() <= 1e-5
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_our_decoder_and_merging_load_the_same_file(tiny: ModelConfig, tmp_path: Path) -> None:
    from koine.model.formats.safetensors_stream import Checkpoint

    model = Decoder(tiny)
    save_model(model, tmp_path / "model")
    shard = tmp_path / "model" / "model-00001-of-00001.safetensors"
    stored = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in stored.items()}, shard)
    index = {"weight_map": dict.fromkeys(stored, shard.name)}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = load_model(tmp_path / "model")
    assert torch.equal(opened.norm.weight, model.norm.weight)
    checkpoint = Checkpoint(tmp_path / "model")
    assert torch.equal(checkpoint.read("model.norm.weight"), stored["model.norm.weight"])
    checkpoint.close()


def test_pickled_weights_alone(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    expected = logits(load_causal_lm(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    # Opened by its class: the sums are taken in another order.
    assert torch.allclose(logits(load_causal_lm(folder)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors", ""]
)
def test_shards_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="names a file outside its folder"):
        weight_files(tmp_path)
