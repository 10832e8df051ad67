"""Broken model directories end in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from koine.errors import UserError
from koine.model import Decoder, LayerSpec, ModelConfig, load_model, preset, read_config, save_model


@pytest.fixture
def saved(tiny: ModelConfig, tmp_path: Path) -> Path:
    save_model(Decoder(tiny), tmp_path / "model")
    return tmp_path / "model"


def test_the_same_weights_give_the_same_bytes(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny)
    for name in "ab":
        save_model(model, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_model_is_saved_into_its_tokenizers_folder(tiny: ModelConfig, tmp_path: Path) -> None:
    """In the folder itself, and through a link to it."""
    folder, link = tmp_path / "model", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    (folder / "tokenizer.json").write_text("{}")
    for tokenizer in (folder, link):
        save_model(Decoder(tiny), folder, tokenizer=tokenizer)
        assert (folder / "tokenizer.json").read_text() == "{}"
    assert load_model(folder).config == tiny


def test_truncated_weights_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(saved)


def test_nan_is_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(UserError, match="norm.weight holds NaN"):
        load_model(saved)


def test_a_missing_tensor_is_named(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors \(model.layers.1.mlp.up_proj.weight\)"):
        load_model(saved)


def test_shapes_that_differ_from_the_configuration_are_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["intermediate_size"] = 47
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json says"):
        load_model(saved)


def test_impossible_sizes_and_unknown_presets_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'koine-8m'"):
        preset("koine-8mm")
    with pytest.raises(UserError, match="not a multiple of num_kv_heads"):
        ModelConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_heads=3,
            num_kv_heads=2,
            head_dim=4,
            layers=(),
        )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu'; Koine's own decoder implements silu, swish"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_type is 'longrope'; Koine's own decoder implements default, linear",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mrope_section": [1]}},
            "rope_parameters.mrope_section is",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "the field 'factor' of the RoPE scaling is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is given"),
        ({"layer_types": ["full_attention"] * 3}, "'layer_types' has 3 entries and num_hidden_layers is 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "an entry of layer_types is 'chunked_attention'"),
        ({"layer_types": "full"}, "the field 'layer_types' is 'full'; it must be a list"),
        ({"hidden_size": "32"}, "the field 'hidden_size' is '32'; it must be an integer"),
        ({"num_attention_heads": 0}, "the field 'num_attention_heads' is 0"),
        ({"logit_scale": "a quarter"}, "the field 'logit_scale' is 'a quarter'; it must be a number"),
        ({"eos_token_id": "end"}, "the field 'eos_token_id' is 'end'; it must be a token id"),
        (
            {"model_type": "koine", "layers": [{"windows": 3}] * 4},
            "objects with the keys qk_norm, rope, rope_theta, window",
        ),
        ({"vocab_size": None}, "the field 'vocab_size' is missing"),
    ],
)
def test_unsupported_fields_of_a_configuration_are_refused(
    saved: Path, change: dict[str, Any], line: str
) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as error:
        load_model(saved)
    assert line in str(error.value)
    assert str(saved / "config.json") in str(error.value)


def test_files_with_other_content_are_refused(saved: Path) -> None:
    # A whole file beside an index would be read in its place.
    (saved / "model.safetensors").rename(saved / "model-1.safetensors")
    (saved / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(UserError, match="holds no weight_map"):
        load_model(saved)
    (saved / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "model-2.safetensors"}}'
    )
    with pytest.raises(UserError, match="the shard model-2.safetensors is missing"):
        load_model(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        load_model(saved)


def test_a_full_disk_leaves_no_part_of_the_weights(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_model(Decoder(tiny), tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_a_model_can_be_saved_into_its_own_folder(saved: Path, tiny: ModelConfig) -> None:
    """A model that was opened from a folder can be saved into it: its tensors are not the file's pages."""
    model = load_model(saved)
    save_model(model, saved)
    again = load_model(saved)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layer_lists_are_saved_and_loaded(tiny: ModelConfig, tmp_path: Path) -> None:
    """Every kind of layer list comes back as it was, under whichever type it is saved."""
    kinds = {
        "cohere": (LayerSpec(),) * 2,
        "cohere2": (LayerSpec(window=3), LayerSpec(rope=False), LayerSpec(window=3)),
        "koine": (
            LayerSpec(window=3),
            LayerSpec(window=5),
            LayerSpec(qk_norm="heads"),
            LayerSpec(rope=False),
        ),
    }
    for kind, layers in kinds.items():
        for tied in (True, False):
            config = replace(tiny, layers=layers, tie_embeddings=tied, rope_theta=50_000.0, logit_scale=0.75)
            folder = tmp_path / f"{kind}-{tied}"
            save_model(Decoder(config), folder)
            assert json.loads((folder / "config.json").read_text())["model_type"] == kind
            assert read_config(folder) == config
