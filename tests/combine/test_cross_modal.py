"""The language model inside a random Aya Vision, merged with a text model; everything else stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from koine.combine.cross_modal import merge_cross_modal, text_name
from koine.errors import UserError
from koine.model import Decoder, ModelConfig, hybrid_layers, save_model

from .test_merge import tensors


def text_config(hidden_size: int = 32) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, hidden_size=hidden_size, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
        layers=hybrid_layers(4, window=8), logit_scale=0.0625,
    )  # fmt: skip


@pytest.fixture
def aya_vision(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    text = transformers.Cohere2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, sliding_window=8, bos_token_id=5, eos_token_id=7, pad_token_id=0,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(0)
    config = transformers.AyaVisionConfig(text_config=text, vision_config=vision)
    transformers.AyaVisionForConditionalGeneration(config).save_pretrained(tmp_path / "aya")
    return tmp_path / "aya"


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_alpha_is_the_multimodal_models_weight(aya_vision: Path, tmp_path: Path, alpha: float) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(Decoder(text_config()), tmp_path / "text")
    done = merge_cross_modal(
        aya_vision, tmp_path / "text", tmp_path / "out", alpha=alpha, max_shard_bytes=50_000
    )
    before, text, after = (tensors(path) for path in (aya_vision, tmp_path / "text", tmp_path / "out"))
    assert done["merged"] == sum(text_name(name) in text for name in before)
    assert done["merged"] == len(text)
    for name, tensor in after.items():
        theirs = text_name(name)
        if theirs in text:
            assert torch.allclose(tensor, alpha * before[name] + (1 - alpha) * text[theirs], atol=1e-7), name
        else:
            assert torch.equal(tensor, before[name]), name
    opened = transformers.AyaVisionForConditionalGeneration.from_pretrained(tmp_path / "out")
    weight = opened.get_input_embeddings().weight
    assert torch.equal(weight, after["language_model.model.embed_tokens.weight"])


def test_names_of_both_layouts() -> None:
    assert (
        text_name("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    )
    assert text_name("language_model.lm_head.weight") == "lm_head.weight"
    assert text_name("vision_tower.head.weight") is None


def test_what_does_not_fit(aya_vision: Path, tmp_path: Path) -> None:
    save_model(Decoder(text_config(hidden_size=64)), tmp_path / "wide")
    with pytest.raises(UserError, match="has shape"):
        merge_cross_modal(aya_vision, tmp_path / "wide", tmp_path / "out", alpha=0.4)
    with pytest.raises(UserError, match="lacks model"):
        merge_cross_modal(aya_vision, aya_vision, tmp_path / "out", alpha=0.4)
    save_model(Decoder(text_config()), tmp_path / "text")
    with pytest.raises(UserError, match="alpha is 1.5"):
        merge_cross_modal(aya_vision, tmp_path / "text", tmp_path / "out", alpha=1.5)
    assert not (tmp_path / "out").exists()
