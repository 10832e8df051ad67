"""The language model inside a random Aya Vision is merged with a text model; everything else stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from koine.cli.merge.cross_modal import command
from koine.combine.merging.cross_modal import estimate_cross_modal, merge_cross_modal, text_name
from koine.errors import UserError
from koine.model import Decoder, ModelConfig, hybrid_layers, save_model
from tests.combine.merge_configs import tensors


def text_config(hidden_size: int = 32, layers: int = 4) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layers=hybrid_layers(layers, window=8),
        logit_scale=0.0625,
    )


@pytest.fixture
def aya_vision(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    text = transformers.Cohere2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        bos_token_id=5,
        eos_token_id=7,
        pad_token_id=0,
    )
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


def test_models_that_do_not_fit_are_refused(aya_vision: Path, tmp_path: Path) -> None:
    save_model(Decoder(text_config(hidden_size=64)), tmp_path / "wide")
    with pytest.raises(UserError, match="has shape"):
        merge_cross_modal(aya_vision, tmp_path / "wide", tmp_path / "out", alpha=0.4)
    with pytest.raises(UserError, match="lacks model"):
        merge_cross_modal(aya_vision, aya_vision, tmp_path / "out", alpha=0.4)
    save_model(Decoder(text_config(layers=5)), tmp_path / "deep")
    with pytest.raises(UserError, match="has model.layers.4.*, which the language model inside"):
        merge_cross_modal(aya_vision, tmp_path / "deep", tmp_path / "out", alpha=0.4)
    save_model(Decoder(text_config()), tmp_path / "text")
    with pytest.raises(UserError, match="lies inside"):
        merge_cross_modal(aya_vision, tmp_path / "text", aya_vision / "out", alpha=0.4)
    with pytest.raises(UserError, match="alpha is 1.5"):
        merge_cross_modal(aya_vision, tmp_path / "text", tmp_path / "out", alpha=1.5)
    assert not (tmp_path / "out").exists()


def test_tokens_of_both_models_have_one_id(aya_vision: Path, tmp_path: Path) -> None:
    """The multimodal model may have image tokens of its own; any other difference is refused."""
    save_model(Decoder(text_config()), tmp_path / "text")
    content: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
    (tmp_path / "text" / "tokenizer.json").write_text(json.dumps(content))
    image = {**content, "added_tokens": [{"content": "<image>", "id": 2}]}
    (aya_vision / "tokenizer.json").write_text(json.dumps(image))
    merge_cross_modal(aya_vision, tmp_path / "text", tmp_path / "out", alpha=0.4)
    for other, says in (
        ({**content, "normalizer": {"type": "NFC"}}, "they differ in normalizer"),
        ({**content, "added_tokens": [{"content": "<image>", "id": 3}]}, "they differ in ids"),
    ):
        (tmp_path / "text" / "tokenizer.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=says):
            merge_cross_modal(aya_vision, tmp_path / "text", tmp_path / "other", alpha=0.4)


def test_copied_tensors_are_checked_too(aya_vision: Path, tmp_path: Path) -> None:
    save_model(Decoder(text_config()), tmp_path / "text")
    stored = tensors(aya_vision)
    name = next(name for name in stored if text_name(name) is None and stored[name].dim() > 1)
    stored[name].view(-1)[3] = float("nan")
    save_file(stored, aya_vision / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity; this checkpoint is broken"):
        merge_cross_modal(aya_vision, tmp_path / "text", tmp_path / "out", alpha=0.4)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_an_estimate(aya_vision: Path, tmp_path: Path) -> None:
    save_model(Decoder(text_config()), tmp_path / "text")
    found = estimate_cross_modal(aya_vision, tmp_path / "text", tmp_path / "out", alpha=0.4)
    done = merge_cross_modal(aya_vision, tmp_path / "text", tmp_path / "out", alpha=0.4)
    assert {"merged": found.merged, "copied": found.copied} == done
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors(tmp_path / "out").values())
    assert found.output_bytes == written
    arguments = [str(aya_vision), str(tmp_path / "text"), "--dry-run", "--out", str(tmp_path / "no")]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.output.startswith(f"{found.merged} tensors to merge, {found.copied} to copy")
    assert not (tmp_path / "no").exists()
