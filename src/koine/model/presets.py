"""Presets: sizes from half a million to eight billion parameters."""

from __future__ import annotations

from dataclasses import dataclass

from koine.errors import UserError, did_you_mean
from koine.model.config import ModelConfig
from koine.model.layer_patterns import Variant, variant_layers, with_attention


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named size. `vocab_size` is the one that the name's parameter count includes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    window: int
    vocab_size: int
    rope_theta: float = 10_000.0
    logit_scale: float = 0.25
    head_dim: int | None = None


PRESETS: dict[str, Preset] = {
    "koine-0.5m": Preset(
        layers=4, hidden=64, intermediate=192, heads=2, kv_heads=1, window=64, vocab_size=4_096
    ),
    "koine-2m": Preset(
        layers=4, hidden=128, intermediate=384, heads=4, kv_heads=1, window=128, vocab_size=8_192
    ),
    "koine-4m": Preset(
        layers=8, hidden=160, intermediate=480, heads=5, kv_heads=1, window=128, vocab_size=8_192
    ),
    "koine-8m": Preset(
        layers=8, hidden=256, intermediate=768, heads=8, kv_heads=2, window=256, vocab_size=8_192
    ),
    "koine-35m": Preset(
        layers=12, hidden=448, intermediate=1_344, heads=7, kv_heads=1, window=512, vocab_size=16_384
    ),
    "koine-135m": Preset(
        layers=16, hidden=768, intermediate=2_304, heads=12, kv_heads=4, window=1_024, vocab_size=32_768
    ),
    "koine-350m": Preset(
        layers=24, hidden=1_024, intermediate=3_072, heads=16, kv_heads=4, window=1_024, vocab_size=65_536
    ),
    "koine-1b": Preset(
        layers=24,
        hidden=1_792,
        intermediate=5_376,
        heads=14,
        kv_heads=2,
        window=2_048,
        vocab_size=65_536,
        head_dim=128,
    ),
    "koine-3b": Preset(
        layers=32,
        hidden=2_560,
        intermediate=7_680,
        heads=20,
        kv_heads=4,
        window=4_096,
        vocab_size=128_000,
        rope_theta=50_000.0,
    ),
    "koine-8b": Preset(
        layers=32,
        hidden=4_096,
        intermediate=14_336,
        heads=32,
        kv_heads=8,
        window=4_096,
        vocab_size=256_000,
        rope_theta=50_000.0,
    ),
}


def preset(
    name: str,
    vocab_size: int | None = None,
    *,
    attention: Variant | None = None,
    window: int | None = None,
    full_every: int | None = None,
    rope_theta: float | None = None,
) -> ModelConfig:
    """Return the configuration of a preset.

    Args:
        name: of `PRESETS`.
        vocab_size: number of tokens; None: that of the preset's parameter count.
        attention, window, full_every, rope_theta: see `koine.model.layer_patterns.with_attention`; None: the
            preset's own, RNoPE-SWA.

    Raises:
        UserError: the name is unknown, or the attention does not fit together.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'", hint=did_you_mean(name, PRESETS))
    size = PRESETS[name]
    config = ModelConfig(
        vocab_size=vocab_size or size.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_heads=size.heads,
        num_kv_heads=size.kv_heads,
        head_dim=size.head_dim or size.hidden // size.heads,
        layers=variant_layers("rnope-swa", size.layers, window=size.window),
        rope_theta=size.rope_theta,
        logit_scale=size.logit_scale,
    )
    return with_attention(
        config, attention=attention, window=window, full_every=full_every, rope_theta=rope_theta
    )
