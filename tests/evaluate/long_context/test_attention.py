"""Attention masses and entropies, against the weights of transformers and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.errors import UserError
from koine.evaluate.long_context import attention as module
from koine.evaluate.long_context.attention import (
    SEGMENTS,
    attention_of,
    block_attention,
    describe,
    entropy_bits,
    layer_kinds,
    segment_ids,
)
from koine.model import CausalLM, Decoder, LayerSpec, ModelConfig, hybrid_layers, save_model

TIME = 40


@pytest.fixture
def config() -> ModelConfig:
    """Wide initialisation, so that attention is far from uniform."""
    torch.manual_seed(0)
    return ModelConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layers=hybrid_layers(4, window=7),
        initializer_range=0.15,
        eos_token_id=98,
    )


def eager(model: Decoder, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    save_model(model, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        (None, "Cohere2ForCausalLM"),
        ((LayerSpec(),) * 3, "CohereForCausalLM"),
        ((LayerSpec(qk_norm="heads"),) * 3, "CohereForCausalLM"),
    ],
)
def test_weights_are_those_of_transformers(
    config: ModelConfig, layers: tuple[LayerSpec, ...] | None, name: str, tmp_path: Path
) -> None:
    model = Decoder(config if layers is None else replace(config, layers=layers)).eval()
    if layers is not None and layers[0].qk_norm:
        for block in model.blocks:
            torch.nn.init.uniform_(block.q_norm.weight, 0.5, 2.0)
            torch.nn.init.uniform_(block.k_norm.weight, 0.5, 2.0)
    theirs = eager(model, tmp_path)
    assert type(theirs).__name__ == name
    ids = torch.randint(6, 98, (1, TIME))
    inputs: list[torch.Tensor] = []
    with torch.no_grad():
        model(ids, block_outputs=inputs)
        expected = theirs(ids, output_attentions=True).attentions
        for block, x, weights in zip(model.blocks, inputs, expected, strict=False):
            ours = block_attention(block, x, slice(25, TIME))
            assert ours.shape == (4, TIME - 25, TIME)
            assert (ours - weights[0, :, 25:]).abs().max() <= 1e-5
    assert len(expected) == len(model.blocks)


def test_masses_and_entropies_from_their_definition(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masses and entropies of our decoder, in one part and row by row, and of transformers, equal numpy's."""
    np = pytest.importorskip("numpy")
    model = Decoder(config)
    theirs = eager(model, tmp_path)
    ids = torch.randint(6, 98, (TIME,)).tolist()
    segments = segment_ids(TIME, needles=[(12, 18), (20, 22)], question_start=30)
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), output_attentions=True).attentions
    rows = np.stack([one[0, :, 30:].double().numpy() for one in out])  # [layers, heads, rows, time]

    def entropy(p: Any) -> Any:
        return -np.where(p > 0, p * np.log2(np.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)

    keys = {"begin": [*range(10)], "needle": [*range(12, 18), 20, 21], "question": [*range(30, TIME)]}
    keys["context"] = sorted(set(range(TIME)) - {at for part in keys.values() for at in part})
    mass = np.stack([rows[..., keys[name]].sum(axis=-1).mean(axis=-1) for name in SEGMENTS], axis=-1)
    found = [attention_of(model, ids, segments), attention_of(CausalLM(theirs).eval(), ids, segments)]
    monkeypatch.setattr(module, "_WEIGHTS", 1)
    found.append(attention_of(model, ids, segments))
    for attention in found:
        assert np.abs(attention.mass.numpy() - mass).max() <= 1e-5
        assert (attention.mass.sum(dim=-1) - 1).abs().max() <= 1e-5
        for ours, expected in (
            (attention.entropy_of_rows, entropy(rows).mean(axis=-1)),
            (attention.entropy_of_mean_row, entropy(rows.mean(axis=2))),
            (attention.entropy_of_layer_mean_row, entropy(rows.mean(axis=(1, 2)))),
            (attention.entropy_of_total_mean_row, entropy(rows.mean(axis=(0, 1, 2)))),
        ):
            assert np.abs(ours.numpy() - expected).max() <= 1e-4
    assert not theirs.training
    assert theirs.config._attn_implementation == "eager"
    shown = describe(model, found[0], prompts=1)
    assert shown["kinds"]["sliding RoPE"]["layers"] == 3
    assert shown["kinds"]["full NoPE"]["mass"]["needle"] == pytest.approx(mass[3, :, 1].mean(), abs=1e-5)
    assert shown["overall"]["mass"]["begin"] == pytest.approx(mass[..., 0].mean(), abs=1e-5)
    assert shown["layers"][2]["heads"][1]["mass"]["context"] == pytest.approx(mass[2, 1, 2], abs=1e-5)
    assert sum(shown["overall"]["mass"].values()) == pytest.approx(1.0, abs=1e-5)


def test_uniform_attention_has_its_closed_form(config: ModelConfig) -> None:
    """Queries of zeros look at all that they see alike: entropy log2 of its number, masses its shares."""
    model = Decoder(config)
    with torch.no_grad():
        for block in model.blocks:
            block.in_proj.weight[: config.attention_size] = 0.0
    segments = segment_ids(TIME, needles=[(12, 18)], question_start=TIME - 1)
    found = attention_of(model, list(range(6, 6 + TIME)), segments)  # one row: the last position
    assert layer_kinds(model) == ["sliding RoPE"] * 3 + ["full NoPE"]
    expected = torch.tensor([math.log2(7)] * 3 + [math.log2(TIME)])[:, None].expand(4, 4)
    for entropy in (found.entropy_of_rows, found.entropy_of_mean_row):
        assert torch.allclose(entropy, expected, atol=1e-5)
    full = dict(zip(SEGMENTS, found.mass[3, 0].tolist(), strict=True))
    assert full == pytest.approx(
        {"begin": 10 / TIME, "needle": 6 / TIME, "context": 23 / TIME, "question": 1 / TIME}, abs=1e-6
    )
    window = dict(zip(SEGMENTS, found.mass[0, 0].tolist(), strict=True))
    assert window == pytest.approx({"begin": 0, "needle": 0, "context": 6 / 7, "question": 1 / 7}, abs=1e-6)


def test_the_two_entropies_differ() -> None:
    """Two rows that look at one key each: no entropy in the rows, one bit in their mean."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert entropy_bits(rows).tolist() == [0.0, 0.0]
    assert float(entropy_bits(rows.mean(dim=0))) == pytest.approx(1.0)


def test_segments() -> None:
    ids = segment_ids(20, needles=[(3, 6), (12, 14)], question_start=17, begin=5)
    names = "".join(SEGMENTS[index][0] for index in ids.tolist())
    assert names == "bbbnnncccccc" + "nn" + "ccc" + "qqq"
    with pytest.raises(UserError, match="must follow a context"):
        segment_ids(20, needles=[], question_start=20)


def test_training_mode_and_hooks_are_left_as_they_were(config: ModelConfig) -> None:
    model = Decoder(config).train()
    attention_of(model, list(range(6, 26)), segment_ids(20, needles=[], question_start=15))
    assert model.training
    assert not any(block._forward_pre_hooks for block in model.blocks)
