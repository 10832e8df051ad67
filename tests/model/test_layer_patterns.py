"""Every attention variant is built, named, trained, saved with its model type, and opened again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from koine.cli.attention_options import NAMES
from koine.cli.model import model as model_command
from koine.errors import UserError
from koine.generate import generate
from koine.generate.sampling import Sampling
from koine.model import (
    VARIANTS,
    Decoder,
    LayerSpec,
    ModelConfig,
    load_model,
    preset,
    read_config,
    register_with_transformers,
    save_model,
    set_rope_theta,
    variant_layers,
    variant_name,
    with_attention,
)

PATTERNS = {
    # Window or "full", R for RoPE, Q for QK-norm and RoPE, N for none.
    "rope": "R R R R",
    "qk-norm": "Q Q Q Q",
    "nope": "N N N N",
    "rnope": "R N R N",
    "rnope-swa": "R5 R5 R5 N",
    "own": "R5 Q7 N R",
}
CLASSES = {
    "rope": "CohereForCausalLM",
    "qk-norm": "CohereForCausalLM",
    "nope": "Cohere2ForCausalLM",
    "rnope": "KoineForCausalLM",
    "rnope-swa": "Cohere2ForCausalLM",
    "own": "KoineForCausalLM",
}


def spec(text: str) -> LayerSpec:
    window = int(text[1:]) if len(text) > 1 else None
    return LayerSpec(window=window, rope=text[0] != "N", qk_norm="heads" if text[0] == "Q" else None)


def variant(tiny: ModelConfig, name: str, **more: Any) -> ModelConfig:
    if name == "own":
        return replace(tiny, layers=tuple(spec(text) for text in PATTERNS["own"].split()))
    window = 5 if name == "rnope-swa" else None
    return with_attention(tiny, attention=name, window=window, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layers_of_a_variant(name: Any) -> None:
    layers = variant_layers(name, 4, window=5 if name == "rnope-swa" else None)
    assert layers == tuple(spec(text) for text in PATTERNS[name].split())


@pytest.mark.parametrize(
    ("every", "pattern"),
    [(2, "R9 N R9 N R9 N R9 N"), (8, "R9 R9 R9 R9 R9 R9 R9 N"), (3, "R9 R9 N R9 R9 N R9 R9")],
)
def test_any_ratio_and_window(every: int, pattern: str) -> None:
    layers = variant_layers("rnope-swa", 8, window=9, full_every=every)
    assert layers == tuple(spec(text) for text in pattern.split())


@pytest.mark.parametrize("name", [*VARIANTS, "own"])
def test_a_variant_trains_saves_loads_and_generates(tiny: ModelConfig, name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the comparison needs the extra [hf]")
    register_with_transformers()
    model = Decoder(replace(variant(tiny, name), rope_theta=777.0)).train()
    ids = torch.randint(8, 98, (4, 24))
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(8):
        loss = F.cross_entropy(model.logits(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == CLASSES[name]
    with torch.no_grad():
        expected = model.logits(model(ids))
        assert torch.equal(again.logits(again(ids)), expected)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0.0, atol=1e-5)
        continued = theirs.generate(ids[:1, :9], max_new_tokens=12, do_sample=False, eos_token_id=None)
    [answer] = generate(again, [ids[0, :9].tolist()], Sampling(max_new_tokens=12, temperature=0.0))
    assert answer.tokens == continued[0, 9:].tolist()


def test_names(tiny: ModelConfig) -> None:
    names = {name: variant_name(variant(tiny, name)) for name in (*VARIANTS, "own")}
    assert names == {
        "rope": "RoPE, θ 10,000",
        "qk-norm": "QK-Norm, θ 10,000",
        "nope": "NoPE",
        "rnope": "RNoPE 1:1, θ 10,000",
        "rnope-swa": "RNoPE-SWA 3:1, window 5, θ 10,000",
        "own": "1 x RoPE (window 5), 1 x RoPE with QK-norm (window 7), 1 x NoPE, 1 x RoPE, θ 10,000",
    }
    assert variant_name(preset("koine-8b")) == "RNoPE-SWA 3:1, window 4,096, θ 50,000"
    eight = preset("koine-8m", full_every=8, window=32, rope_theta=2e6)
    assert variant_name(eight) == "RNoPE-SWA 7:1, window 32, θ 2,000,000"


def test_theta_changes_and_the_weights_do_not(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(8, 98, (1, 30))
    with torch.no_grad():
        first = model(ids)
        set_rope_theta(model, 200.0)
        assert not torch.allclose(model(ids), first)
        save_model(model, tmp_path)
        assert torch.equal(load_model(tmp_path)(ids), model(ids))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"] == 200.0
    assert read_config(tmp_path) == replace(tiny, rope_theta=200.0)


def test_options_without_effect_are_refused(tiny: ModelConfig) -> None:
    for fields, line in (
        ({"attention": "rop"}, "unknown attention 'rop'; did you mean 'rope'"),
        ({"attention": "rope", "window": 5}, "rope has no use for a window"),
        ({"attention": "rnope", "full_every": 2}, "rnope has no use for a ratio of full layers"),
        ({"attention": "nope", "rope_theta": 5.0}, "no layer has RoPE"),
        ({"full_every": 8}, "full_every is 8 of 4 layers; choose from 2 to 4"),
        ({"window": 0}, "the window is 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be at least 1"),
    ):
        with pytest.raises(UserError, match=line):
            with_attention(tiny, **fields)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a window or a ratio of full layers without attention"):
        with_attention(variant(tiny, "rope"), window=5)
    with pytest.raises(UserError, match="rnope-swa needs a window"):
        with_attention(variant(tiny, "rope"), attention="rnope-swa")


def test_describe_names_the_variant(tmp_path: Path) -> None:
    def described(*arguments: str) -> str:
        return CliRunner().invoke(model_command, ["describe", *arguments], catch_exceptions=False).output

    assert NAMES == VARIANTS
    assert "RNoPE-SWA 1:1, window 32, θ 10,000" in described(
        "koine-8m", "--full-every", "2", "--window", "32"
    )
    got = json.loads(described("koine-8m", "--attention", "nope", "--json"))
    assert (got["attention"], got["rope_theta"], got["model_type"]) == ("NoPE", None, "cohere2")
    save_model(Decoder(preset("koine-0.5m", 300, attention="rnope")), tmp_path)
    assert "RNoPE 1:1, θ 10,000" in described(str(tmp_path))
    with pytest.raises(UserError, match="--window is for presets"):
        described(str(tmp_path), "--window", "3")
