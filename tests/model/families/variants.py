"""Attention variants on a family's checkpoint, against its own class with other layers put into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from koine.model import (
    VARIANTS,
    Decoder,
    ModelConfig,
    load_model,
    register_with_transformers,
    save_model,
    with_attention,
)
from koine.model.attention_change import change_attention

from .cases import TEXT_LENGTH
from .reference import open_reference, reference_logits, text

WINDOW, FULL_EVERY = 5, 2


def other_config(config: ModelConfig, variant: Any) -> ModelConfig:
    """Return a configuration with a variant; the windows are shorter than the text."""
    more = {"window": WINDOW, "full_every": FULL_EVERY} if variant == "rnope-swa" else {}
    return with_attention(config, attention=variant, **more)


def attention_variants(folder: Path, work: Path, agree: Callable[[Tensor, Tensor, str], None]) -> None:
    """Every variant computes what the class does with those layers, and is saved and opened with its weights."""
    register_with_transformers()
    ids = text(TEXT_LENGTH)
    for variant in VARIANTS:
        given = load_model(folder)
        config = other_config(given.config, variant)
        changed = change_attention(load_model(folder), config)
        carried(given, changed)
        with torch.no_grad():
            logits = changed.logits(changed(torch.tensor([ids])))[0]
        expected = reference_logits(with_layers(open_reference(folder), given.config, config), ids)
        agree(logits, expected, f"logits of {variant}")
        save_model(changed, work / variant)
        again = load_model(work / variant)
        assert again.config.layers == config.layers
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), changed.parameters(), strict=True))
        opened = transformers.AutoModelForCausalLM.from_pretrained(
            work / variant, attn_implementation="eager"
        )
        agree(reference_logits(opened.eval(), ids), expected, f"logits of the saved {variant}")


def carried(given: Decoder, changed: Decoder) -> None:
    """All weights are those of the given model; new ones are norms of q and k without a gain."""
    before, after = given.state_dict(), changed.state_dict()
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name in after.keys() - before.keys():
        assert name.endswith(("q_norm.weight", "k_norm.weight"))
        assert (after[name] == (0.0 if given.config.norm_unit_offset else 1.0)).all()


def with_layers(theirs: Any, given: ModelConfig, wanted: ModelConfig) -> Any:
    """Make a model of `transformers` compute the layers of a configuration: positions, windows, norms of q and k."""
    for layer, before, after in zip(theirs.model.layers, given.layers, wanted.layers, strict=True):
        attention = layer.self_attn
        if hasattr(attention, "use_rope"):
            attention.use_rope = 1
        if theirs.config.model_type == "cohere2":
            # The class rotates where there is a window; eager attention reads it nowhere else.
            attention.sliding_window = 1
        attention.register_forward_pre_hook(_replacing(after.rope, after.window), with_kwargs=True)
        if after.qk_norm is not None and before.qk_norm is None:
            _add_norms(attention, wanted)
    return theirs


def _replacing(rope: bool, window: int | None) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        time = hidden.shape[1]
        distance = torch.arange(time)[:, None] - torch.arange(time)[None]
        hidden_keys = (distance < 0) | (distance >= (time if window is None else window))
        kwargs["attention_mask"] = torch.zeros(1, 1, time, time).masked_fill(hidden_keys, float("-inf"))
        cos, sin = kwargs["position_embeddings"]
        if not rope:
            kwargs["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        return args, kwargs

    return hook


def _add_norms(attention: Any, config: ModelConfig) -> None:
    """Normalise each head of q and k after their projection."""
    size, eps = config.head_dim, config.norm_eps
    norm = F.layer_norm if config.norm == "layer_norm" else F.rms_norm

    def normed(x: Tensor) -> Tensor:
        return norm(torch.unflatten(x, -1, (-1, size)), (size,), eps=eps).flatten(-2)

    if hasattr(attention, "qkv_proj"):
        width = (config.num_heads + config.num_kv_heads) * size
        attention.qkv_proj.register_forward_hook(
            lambda module, inputs, out: torch.cat((normed(out[..., :width]), out[..., width:]), dim=-1)
        )
        return
    for projection in (attention.q_proj, attention.k_proj):
        projection.register_forward_hook(lambda module, inputs, out: normed(out))
