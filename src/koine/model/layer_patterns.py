"""The attention variants of arXiv 2501.18795 as lists of layers, and the name of a list.

| variant | layers |
|---|---|
| `rope` | all full, with RoPE |
| `qk-norm` | the same, with a LayerNorm on q and k before the rotation |
| `nope` | all full, no position encoding |
| `rnope` | full with RoPE and full without positions, alternating |
| `rnope-swa` | windowed with RoPE, every `full_every`-th full without positions: the variant of the presets |
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal, get_args

from koine.errors import UserError, did_you_mean
from koine.model.config import LayerSpec, ModelConfig, QKNorm, hybrid_layers

if TYPE_CHECKING:
    from koine.model.decoder import Decoder

Variant = Literal["rope", "qk-norm", "nope", "rnope", "rnope-swa"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


def variant_layers(
    name: Variant,
    count: int,
    *,
    window: int | None = None,
    full_every: int | None = None,
    qk_norm: QKNorm = "heads",
) -> tuple[LayerSpec, ...]:
    """Return `count` layers of the variant `name`.

    Args:
        name: see the table of this module.
        count: number of layers.
        window: tokens; for `rnope-swa` alone.
        full_every: for `rnope-swa` alone; default 4.
        qk_norm: kind of norm, for `qk-norm` alone.

    Raises:
        UserError: the name is unknown, or the variant takes no window or ratio, or no full layer is left.
    """
    if name not in VARIANTS:
        raise UserError(f"unknown attention '{name}'", hint=did_you_mean(name, VARIANTS))
    if name == "rnope-swa":
        return _windowed(count, window, 4 if full_every is None else full_every)
    for given, what in ((window, "a window"), (full_every, "a ratio of full layers")):
        if given is not None:
            raise UserError(f"{name} has no use for {what}", hint="choose rnope-swa, or leave it out")
    if name == "rnope":
        return tuple(LayerSpec(rope=index % 2 == 0) for index in range(count))
    return (LayerSpec(rope=name != "nope", qk_norm=qk_norm if name == "qk-norm" else None),) * count


def _windowed(count: int, window: int | None, full_every: int) -> tuple[LayerSpec, ...]:
    if window is None:
        raise UserError(
            "rnope-swa needs a window", hint="give the number of tokens that a windowed layer sees"
        )
    if window < 1:
        raise UserError(f"the window is {window}", hint="it must be at least 1")
    if not 2 <= full_every <= count:
        raise UserError(
            f"full_every is {full_every} of {count} layers",
            hint=f"choose from 2 to {count}, so that there are windowed layers and a full one",
        )
    return hybrid_layers(count, window=window, full_every=full_every)


def with_attention(
    config: ModelConfig,
    *,
    attention: Variant | None = None,
    window: int | None = None,
    full_every: int | None = None,
    rope_theta: float | None = None,
) -> ModelConfig:
    """Return a configuration of the same sizes with other attention; arguments that are None stay.

    A window or a ratio alone requires that the layers are RNoPE-SWA.

    Raises `UserError` for a combination without effect, such as a window with `rope` or a theta with `nope`.
    """
    layers = config.layers
    if attention is not None or window is not None or full_every is not None:
        ratio = _full_every(layers)
        if attention is None and ratio is None:
            raise UserError("a window or a ratio of full layers without attention", hint="add rnope-swa")
        chosen: Variant = "rnope-swa" if attention is None else attention
        if chosen == "rnope-swa":
            window = next((w for w in (window, *(layer.window for layer in layers)) if w is not None), None)
            full_every = ratio if full_every is None else full_every
        qk_norm: QKNorm = "heads" if config.norm == "layer_norm" else "head"
        layers = variant_layers(chosen, len(layers), window=window, full_every=full_every, qk_norm=qk_norm)
    if rope_theta is not None and not any(layer.rope for layer in layers):
        raise UserError("no layer has RoPE, so rope_theta has no effect", hint="leave it out with nope")
    return replace(config, layers=layers, rope_theta=config.rope_theta if rope_theta is None else rope_theta)


def _full_every(layers: tuple[LayerSpec, ...]) -> int | None:
    """Return the ratio of full layers of RNoPE-SWA, None for other layers."""
    windows = {layer.window for layer in layers} - {None}
    if len(windows) != 1:
        return None
    window = windows.pop()
    assert window is not None
    ratios = range(2, len(layers) + 1)
    return next(
        (n for n in ratios if hybrid_layers(len(layers), window=window, full_every=n) == layers), None
    )


def variant_name(config: ModelConfig) -> str:
    """Return the paper's name of the layers, for example `RNoPE-SWA 3:1, window 256, θ 10,000`."""
    layers, theta = config.layers, f", θ {config.rope_theta:,.10g}"
    everywhere: dict[Variant, str] = {"rope": "RoPE", "qk-norm": "QK-Norm"}
    for name, words in everywhere.items():
        kind: QKNorm = layers[0].qk_norm or "heads"
        if layers == variant_layers(name, len(layers), qk_norm=kind):
            return words + theta
    if layers == variant_layers("nope", len(layers)):
        return "NoPE"
    if layers == variant_layers("rnope", len(layers)):
        return "RNoPE 1:1" + theta
    ratio = _full_every(layers)
    if ratio is not None:
        window = next(layer.window for layer in layers if layer.window is not None)
        return f"RNoPE-SWA {ratio - 1}:1, window {window:,}{theta}"
    runs = [(len(list(run)), _layer_name(spec)) for spec, run in groupby(layers)]
    return ", ".join(f"{count} x {words}" for count, words in runs) + (
        theta if any(layer.rope for layer in layers) else ""
    )


def _layer_name(spec: LayerSpec) -> str:
    words = ("RoPE" if spec.rope else "NoPE") + (" with QK-norm" if spec.qk_norm else "")
    return words + ("" if spec.window is None else f" (window {spec.window:,})")


def set_rope_theta(model: Decoder, rope_theta: float) -> None:
    """Change the base of RoPE; the weights stay. Raises as `with_attention`."""
    reconfigure(model, with_attention(model.config, rope_theta=rope_theta))


def reconfigure(model: Decoder, config: ModelConfig) -> None:
    """Replace the configuration of a model and its blocks by one of the same sizes and layers."""
    for module in model.modules():
        if isinstance(getattr(module, "config", None), ModelConfig):
            module.config = config  # type: ignore[assignment]
