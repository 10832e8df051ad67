"""The attention variants of arXiv 2501.18795 as lists of layers, and the name of a list.

| variant | layers |
|---|---|
| `rope` | all full, with RoPE |
| `qk-norm` | the same, with a LayerNorm on q and k before the rotation |
| `nope` | all full, no position encoding |
| `rnope` | full with RoPE and full without positions, alternating |
| `rnope-swa` | windowed with RoPE, every `full_every`-th full without positions: the variant of the presets |

On a model that has weights (`with_attention`), a layer keeps its norm of q and k and its own base of RoPE.
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

    A layer keeps its norm of q and k, whose weights exist, and its own base of RoPE (Gemma-3), with which its
    weights were trained; `rope_theta` is the base of the other layers. Windows are those of the variant.
    `qk-norm` adds norms where there are none. `rnope-swa` has the window of the layers that are there, where
    none is given. A window or a ratio alone requires that the layers are RNoPE-SWA.

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
        wanted = variant_layers(chosen, len(layers), window=window, full_every=full_every, qk_norm=qk_norm)
        layers = tuple(_keeping(before, after) for before, after in zip(layers, wanted, strict=True))
    rotated = [layer for layer in layers if layer.rope]
    if rope_theta is not None and not rotated:
        raise UserError("no layer has RoPE, so rope_theta has no effect", hint="leave it out with nope")
    if rope_theta is not None and all(layer.rope_theta is not None for layer in rotated):
        raise UserError(
            "every layer with RoPE has a base of its own, so rope_theta has no effect", hint="leave it out"
        )
    return replace(config, layers=layers, rope_theta=config.rope_theta if rope_theta is None else rope_theta)


def _keeping(before: LayerSpec, after: LayerSpec) -> LayerSpec:
    """Return a layer of a variant with what has to stay of the layer that it replaces."""
    return replace(
        after,
        qk_norm=before.qk_norm or after.qk_norm,
        rope_theta=before.rope_theta if after.rope else None,
    )


def _plain(layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Return layers without what a variant does not say: norms of q and k, and bases of RoPE."""
    return tuple(replace(layer, qk_norm=None, rope_theta=None) for layer in layers)


def _full_every(layers: tuple[LayerSpec, ...]) -> int | None:
    """Return the ratio of full layers of RNoPE-SWA, None for other layers."""
    windows = {layer.window for layer in layers} - {None}
    if len(windows) != 1:
        return None
    window = windows.pop()
    assert window is not None
    ratios, plain = range(2, len(layers) + 1), _plain(layers)
    return next((n for n in ratios if hybrid_layers(len(layers), window=window, full_every=n) == plain), None)


def variant_name(config: ModelConfig) -> str:
    """Return the paper's name of the layers, for example `RNoPE-SWA 3:1, window 256, θ 10,000`.

    Other layers are listed, a pattern that repeats once.
    """
    layers = config.layers
    bases = {layer.rope_theta or config.rope_theta for layer in layers if layer.rope}
    theta = f", θ {_number(*bases)}" if len(bases) == 1 else ""
    normed = {layer.qk_norm is not None for layer in layers}
    name = _variant_of(_plain(layers)) if len(normed) == 1 and len(bases) < 2 else None
    if name is not None:
        with_norm = ", QK-norm" if normed == {True} else ""
        return "QK-Norm" + theta if name == "RoPE" and with_norm else name + theta + with_norm
    period = next(n for n in range(1, len(layers) + 1) if layers == (layers[:n] * len(layers))[: len(layers)])
    repeated = len(layers) >= 2 * period > 2
    runs = [
        (len(list(run)), _layer_name(spec, config.rope_theta if len(bases) > 1 else None))
        for spec, run in groupby(layers[:period] if repeated else layers)
    ]
    words = ", ".join(f"{count} x {words}" for count, words in runs)
    return (f"every {period} layers: " if repeated else "") + words + theta


def _variant_of(plain: tuple[LayerSpec, ...]) -> str | None:
    """Return the name of layers without norms of q and k; None for other layers than the variants'."""
    names: dict[Variant, str] = {"rope": "RoPE", "nope": "NoPE", "rnope": "RNoPE 1:1"}
    for variant, words in names.items():
        if plain == variant_layers(variant, len(plain)):
            return words
    ratio = _full_every(plain)
    if ratio is None:
        return None
    window = next(layer.window for layer in plain if layer.window is not None)
    return f"RNoPE-SWA {ratio - 1}:1, window {window:,}"


def _number(value: float) -> str:
    return f"{value:,.10g}"


def _layer_name(spec: LayerSpec, theta: float | None) -> str:
    """Return the words for one layer. theta: the model's base, where the layers have several."""
    words = ("RoPE" if spec.rope else "NoPE") + (" with QK-norm" if spec.qk_norm else "")
    details = [] if spec.window is None else [f"window {spec.window:,}"]
    if theta is not None and spec.rope:
        details.append(f"θ {_number(spec.rope_theta or theta)}")
    return words + (f" ({', '.join(details)})" if details else "")


def set_rope_theta(model: Decoder, rope_theta: float) -> None:
    """Change the base of RoPE; the weights stay. Raises as `with_attention`."""
    reconfigure(model, with_attention(model.config, rope_theta=rope_theta))


def reconfigure(model: Decoder, config: ModelConfig) -> None:
    """Replace the configuration of a model and its blocks by one of the same sizes and layers."""
    for module in model.modules():
        if isinstance(getattr(module, "config", None), ModelConfig):
            module.config = config  # type: ignore[assignment]
