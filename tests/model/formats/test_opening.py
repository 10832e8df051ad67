"""Model folders are opened as transformers does, in the requested precision; faults are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.errors import KoineWarning, UserError
from koine.model import Decoder, ModelConfig, load_causal_lm, load_model, save_model
from koine.model.causal_lm import load_as_stored, load_with_transformers
from koine.model.formats.weight_files import widest_dtype
from tests.model.formats.conftest import LLAMA, ids, llama, logits

transformers = pytest.importorskip("transformers", reason="the classes need the extra [hf]")


# Precision


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "falcon_h1", "gemma3_text"])
def test_float32_is_float32(kind: str, tmp_path: Path) -> None:
    """Weights stored in bfloat16, some in float32, config.json with bfloat16: all is computed in float32."""
    fields = LLAMA | {"head_dim": 8, "num_key_value_heads": 2}
    own = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}, "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    }}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**fields, **own.get(kind, {}))
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")
    mixed = {name: t.float() if "norm" in name else t for name, t in stored.items()}
    for name in mixed:
        if "norm" in name:
            mixed[name] = mixed[name] + 1e-3 * torch.randn_like(mixed[name])
    save_file(mixed, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    ours = load_with_transformers(tmp_path / "m", dtype=torch.float32)
    assert {p.dtype for p in (*ours.parameters(), *ours.buffers()) if p.is_floating_point()} == {
        torch.float32
    }
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    if kind != "gpt_oss":  # whose experts have no float64
        exact = exact.double()
    with torch.no_grad():
        expected = exact(ids(), use_cache=False).logits
    got = logits(ours)
    assert got.dtype == torch.float32
    # bfloat16 would be off by 1e-3 and more.
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    ours.inner.save_pretrained(tmp_path / "again")
    assert {t.dtype for t in load_file(tmp_path / "again/model.safetensors").values()} == {torch.float32}


def test_stored_weights_are_not_rounded_when_they_are_rewritten(tmp_path: Path) -> None:
    """config.json has bfloat16, the file float32: training and rewriting use the dtype of the file."""
    folder = llama(tmp_path / "m")
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | {"dtype": "bfloat16"}))
    assert widest_dtype(folder) == torch.float32
    stored = load_file(folder / "model.safetensors")
    state = load_as_stored(folder).stored_tensors()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_our_decoder_opens_the_widest_dtype_of_mixed_storage(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny)
    save_model(model, tmp_path / "m")
    stored = load_file(tmp_path / "m/model.safetensors")
    mixed = {name: t.bfloat16() if name == "model.norm.weight" else t for name, t in stored.items()}
    save_file(mixed, tmp_path / "m/model.safetensors")
    opened = load_model(tmp_path / "m")
    assert torch.equal(opened.embedding.weight, model.embedding.weight)
    assert load_model(tmp_path / "m", dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


# What does not belong together


def test_unused_tensors_are_warned_of(tmp_path: Path) -> None:
    """With fewer layers in config.json than in the weights, half a model would be evaluated."""
    folder = llama(tmp_path / "m")
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | {"num_hidden_layers": 1}))
    with pytest.warns(
        KoineWarning, match=r"9 tensors of the weights belong to no part of the model.*layers\.1\."
    ):
        load_with_transformers(folder)
    with pytest.raises(UserError, match="has 9 unknown tensors"):
        load_causal_lm(folder)


def test_nan_in_the_weights_of_a_transformers_class_is_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"][3] = float("nan")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        load_with_transformers(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 5}, {"num_attention_heads": 0}, {"hidden_size": -4}, {"hidden_size": None},
        {"rms_norm_eps": "x"},
        {"rope_parameters": []}, {"rope_parameters": {"rope_type": "none of these"}}, {"hidden_act": "sulu"},
        {"num_hidden_layers": 1.5},
        {"torch_dtype": 7, "dtype": None}, {"vocab_size": 10**9}, {"model_type": ["llama"]},
        {"layer_types": 3}, {"auto_map": 3, "model_type": "x"},
        {"quantization_config": {"quant_method": "awq"}}, {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "nothing"}},
        {"quantization_config": 3}, {"tie_word_embeddings": "maybe"}, {"max_position_embeddings": "long"},
        {"head_dim": 7},
        {"transformers_weights": "../x.safetensors"}, {"architectures": 7}, {"pad_token_id": "x"},
    ],
)  # fmt: skip
def test_every_invalid_configuration_is_a_user_error_or_opens(change: dict[str, Any], tmp_path: Path) -> None:
    folder = llama(tmp_path / "m")
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(value | change))
    said, model = "", None
    try:
        model = load_causal_lm(folder)
    except UserError as error:
        said = str(error)
    if model is None:
        assert str(folder) in said
        assert len(said) < 600
    else:
        assert torch.isfinite(logits(model)).all()
