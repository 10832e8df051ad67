"""Broken model directories end in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from koine.errors import UserError
from koine.model import Decoder, ModelConfig, Sampling, load_model, preset, save_model, stream


@pytest.fixture
def saved(tiny: ModelConfig, tmp_path: Path) -> Path:
    save_model(Decoder(tiny), tmp_path / "model")
    return tmp_path / "model"


def test_the_same_weights_give_the_same_bytes(tiny: ModelConfig, tmp_path: Path) -> None:
    model = Decoder(tiny)
    for name in "ab":
        save_model(model, tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_truncated_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(saved)


def test_nan(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(UserError, match="norm.weight holds NaN"):
        load_model(saved)


def test_missing_tensor(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 tensors \(model.layers.1.mlp.up_proj.weight\)"):
        load_model(saved)


def test_other_shapes_than_the_configuration(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["intermediate_size"] = 47
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json says"):
        load_model(saved)


def test_impossible_sizes_and_unknown_presets() -> None:
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


def test_sampling(tiny: ModelConfig) -> None:
    """A row's draw follows from its own seed alone; limits on the candidates hold; bad values are refused."""
    model = Decoder(tiny).eval()
    prompts = [[5, 9, 12], [5, 44]]
    free = Sampling(max_new_tokens=12, temperature=2.0, seed=4)

    def drawn(sampling: Sampling, which: list[list[int]]) -> list[list[int | None]]:
        return [step.tokens for step in stream(model, which, sampling)]

    both, again = drawn(free, prompts), drawn(free, prompts)
    assert both == again
    assert [row[0] for row in both] == [row[0] for row in drawn(free, prompts[:1])]
    greedy = drawn(Sampling(max_new_tokens=12), prompts)
    for limit in (
        Sampling(max_new_tokens=12, temperature=2.0, top_k=1),
        Sampling(max_new_tokens=12, temperature=2.0, top_p=1e-6),
        Sampling(max_new_tokens=12, temperature=2.0, min_p=1.0),
    ):
        assert drawn(limit, prompts) == greedy
    with pytest.raises(UserError, match="top_p is 1.5"):
        Sampling(top_p=1.5)
    with pytest.raises(UserError, match="a prompt is empty"):
        drawn(free, [[]])
