"""The architectures of llama.cpp that models are exported as, and what each cannot compute.

llama.cpp runs its own code for an architecture (its `src/models/*.cpp`) and ignores what that code does not
read, without a warning. So a model is rejected here, by name, where llama.cpp would compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from koine.errors import UserError
from koine.model.config import Activation, LayerSpec, ModelConfig, hybrid_layers
from koine.model.formats.config_json import OWN_TYPE, model_type

# llama.cpp's command-r has QK-norm from this number of layers on (Command R+), and none below.
_COMMAND_R_QK_NORM_LAYERS: Final = 64
_EVERY: Final = {2: "second", 4: "fourth", 6: "sixth"}
_BIASES: Final = {
    "attention_bias": "q, k and v",
    "attention_out_bias": "the attention's output",
    "mlp_bias": "the feed-forward",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp: the models that it computes under one name.

    name: `general.architecture`.
    pairs: RoPE rotates neighbours (`LLAMA_ROPE_TYPE_NORM`), not halves.
    free_head_dim: the heads' size is a key of its own; else the hidden size divided by the heads.
    biases: fields of `ModelConfig` that may be true.
    needs_biases: all of them must be.
    output: the output matrix is always the embedding (`tied`), a tensor of its own (`own`), or either.
    window_every: there are windows, and without a pattern in the file every such layer is full; None: every
        layer is full.
    needs_windows: there must be one.
    nope_every: every such layer has no RoPE; None: the rotated layers are those of the class.
    partial_rotary: RoPE may rotate a part of a head.
    llama3: reads `rope_freqs`, by which frequencies are divided.
    scales_windows: RoPE's scaling holds in windowed layers.
    wide_layers: with this number of layers, scores are scaled by the hidden size divided by the heads instead
        of the heads' size.
    activation: of the feed-forward.
    needs_softcaps: scores and logits are always capped.
    normalises_experts: whether the weights of a token's experts are divided by their sum; None: no experts.
    expert_width: the width of an expert is a key of its own beside that of dense layers.
    multi_head: every query head has a key head of its own.
    scale: `logit_scale` multiplies (Cohere), or divides beside further multipliers (Granite).
    """

    name: str
    pairs: bool = False
    free_head_dim: bool = False
    biases: tuple[str, ...] = ()
    needs_biases: bool = False
    output: Literal["tied", "own", "either"] = "either"
    window_every: int | None = None
    needs_windows: bool = False
    nope_every: int | None = None
    partial_rotary: bool = False
    llama3: bool = False
    scales_windows: bool = True
    wide_layers: int | None = None
    activation: Activation = "silu"
    needs_softcaps: bool = False
    normalises_experts: bool | None = None
    expert_width: bool = False
    multi_head: bool = False
    scale: Literal["factor", "divisor"] | None = None


_ATTENTION: Final = ("attention_bias",)
_LLAMA: Final = Architecture(name="llama", pairs=True, free_head_dim=True, biases=tuple(_BIASES), llama3=True)

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "smollm3": Architecture(
        name="smollm3", pairs=True, free_head_dim=True, biases=_ATTENTION, nope_every=4
    ),
    "qwen2": Architecture(name="qwen2", biases=_ATTENTION),
    "qwen3": Architecture(name="qwen3", free_head_dim=True, biases=_ATTENTION),
    "gemma2": Architecture(
        name="gemma2", free_head_dim=True, biases=_ATTENTION, output="tied", window_every=2, needs_windows=True,
        wide_layers=46, activation="gelu_tanh", needs_softcaps=True,
    ),
    "gemma3_text": Architecture(
        name="gemma3", free_head_dim=True, biases=_ATTENTION, window_every=6, scales_windows=False,
        wide_layers=62, activation="gelu_tanh",
    ),
    "olmo2": Architecture(name="olmo2", biases=_ATTENTION, output="own"),
    "phi3": Architecture(name="phi3", partial_rotary=True),
    "granite": Architecture(
        name="granite", pairs=True, free_head_dim=True, biases=tuple(_BIASES), llama3=True, scale="divisor"
    ),
    "starcoder2": Architecture(
        name="starcoder2", biases=tuple(_BIASES), needs_biases=True, activation="gelu_tanh"
    ),
    "mixtral": replace(_LLAMA, biases=(), normalises_experts=True),
    "qwen2_moe": Architecture(name="qwen2moe", biases=_ATTENTION, output="own", normalises_experts=False, expert_width=True),
    "qwen3_moe": Architecture(
        name="qwen3moe", free_head_dim=True, biases=_ATTENTION, normalises_experts=True, expert_width=True
    ),
    "olmoe": Architecture(
        name="olmoe", biases=_ATTENTION, output="own", normalises_experts=False, multi_head=True
    ),
    "cohere": Architecture(
        name="command-r", pairs=True, biases=_ATTENTION, output="tied", partial_rotary=True, scale="factor"
    ),
    "cohere2": Architecture(
        name="cohere2", pairs=True, biases=_ATTENTION, output="tied", window_every=4, needs_windows=True,
        partial_rotary=True, scale="factor",
    ),
}  # fmt: skip
"""By the `model_type` of `transformers`."""


def architecture_of(config: ModelConfig, *, where: Path) -> Architecture:
    """Return the architecture of llama.cpp that is exactly this model. Raises `UserError` without one.

    A model with windows, where llama.cpp has none, is the same up to the shortest window (`context_of`).
    """

    def refuse(what: str, hint: str) -> UserError:
        return UserError(f"llama.cpp has no architecture for this model: {what}", where=where, hint=hint)

    kind = model_type(config)
    if config.mixture is not None and kind == OWN_TYPE:
        raise refuse("it is a mixture of experts", "export the dense models that it was made of")
    if kind == OWN_TYPE:
        raise refuse(
            _why_not_cohere2(config),
            "its cohere2 has windowed layers with RoPE (one window for all), full ones without positions, "
            "and no QK-norm",
        )
    if kind not in ARCHITECTURES:
        raise refuse(f"it is a {kind}", f"exported are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[kind]
    for what, hint in _obstacles(config, architecture):
        raise refuse(what, hint)
    return architecture


def _obstacles(config: ModelConfig, architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Yield what llama.cpp would compute differently, each with what it computes."""
    name, count = f"its {architecture.name}", len(config.layers)
    if not config.tie_embeddings and architecture.output == "tied":
        yield "its output matrix is not the embedding", "it reads tied models of this kind only"
    if config.attention_size != config.hidden_size and not architecture.free_head_dim:
        yield (
            f"{config.num_heads} heads of {config.head_dim} are not the hidden size {config.hidden_size}",
            "it derives the one from the other",
        )
    for field, words in _BIASES.items():
        if getattr(config, field) and field not in architecture.biases:
            yield f"it has biases of {words}", f"{name} has none"
        if not getattr(config, field) and architecture.needs_biases:
            yield f"it has no biases of {words}", f"{name} needs them"
    if config.activation != architecture.activation:
        yield f"its activation is {config.activation}", f"{name} has {architecture.activation}"
    if config.mixture is not None and config.mixture.normalise_top_k != architecture.normalises_experts:
        ours, theirs = (
            ("are", "does not divide") if config.mixture.normalise_top_k else ("are not", "divides")
        )
        yield f"the weights of a token's experts {ours} divided by their sum", f"{name} {theirs} them"
    if architecture.multi_head and config.num_kv_heads != config.num_heads:
        yield (
            f"{config.num_heads} query heads share {config.num_kv_heads} key heads",
            f"{name} has one for each",
        )
    yield from _layer_obstacles(config, architecture)
    yield from _score_obstacles(config, architecture)
    yield from _rope_obstacles(config, architecture)
    if architecture.name == "command-r":
        normed = config.layers[0].qk_norm is not None
        if normed != (count >= _COMMAND_R_QK_NORM_LAYERS):
            yield (
                f"{count} layers {'with' if normed else 'without'} QK-norm",
                f"{name} has QK-norm from {_COMMAND_R_QK_NORM_LAYERS} layers on and only there",
            )


def _layer_obstacles(config: ModelConfig, architecture: Architecture) -> Iterator[tuple[str, str]]:
    name = f"its {architecture.name}"
    if architecture.needs_windows and not any_window(config):
        yield "no layer has a window", f"{name} has windowed and full layers"
    every = architecture.nope_every
    if every is not None:
        for index, layer in enumerate(config.layers):
            if layer.rope != bool((index + 1) % every):
                yield (
                    f"layer {index} has {'' if layer.rope else 'no '}RoPE",
                    f"in {name} exactly every {_EVERY[every]} layer has none",
                )


def _score_obstacles(config: ModelConfig, architecture: Architecture) -> Iterator[tuple[str, str]]:
    name = f"its {architecture.name}"
    if architecture.scale != "divisor":
        wide = len(config.layers) == architecture.wide_layers
        size = config.hidden_size // config.num_heads if wide else config.head_dim
        if not math.isclose(config.score_scale, size**-0.5, rel_tol=1e-6):
            yield (
                f"its scores are scaled by {config.score_scale:.4g}",
                f"{name} scales them by {size} ** -0.5",
            )
    for cap, words in ((config.attention_softcap, "scores"), (config.logit_softcap, "logits")):
        if cap is None and architecture.needs_softcaps:
            yield f"its {words} are not soft-capped", f"{name} always caps them"


def _rope_obstacles(config: ModelConfig, architecture: Architecture) -> Iterator[tuple[str, str]]:
    name, scaling = f"its {architecture.name}", config.rope_scaling
    if config.rotary_dim not in (None, config.head_dim) and not architecture.partial_rotary:
        yield (
            f"RoPE rotates {config.rotary_dim} of {config.head_dim} entries of a head",
            f"{name} rotates all",
        )
    if scaling is None:
        return
    if scaling.kind == "dynamic":
        yield "its RoPE is scaled by the length of the text ('dynamic')", "it scales by a constant factor"
    if scaling.kind == "llama3" and not architecture.llama3:
        yield "its RoPE is scaled as in Llama 3 ('llama3')", f"{name} cannot scale so"
    if scaling.kind == "yarn":
        if not architecture.scales_windows and any_window(config):
            yield "its RoPE is scaled by YaRN in full layers only", f"{name} scales so in all layers"
        if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
            yield (
                f"YaRN's beta_fast and beta_slow are {scaling.beta_fast:g} and {scaling.beta_slow:g}",
                "it takes 32 and 1",
            )
        if not scaling.truncate:
            yield "YaRN's bounds are not rounded (truncate is false)", "it always rounds them"


def any_window(config: ModelConfig) -> bool:
    """Return whether a layer has a window."""
    return any(layer.window is not None for layer in config.layers)


def context_of(config: ModelConfig, architecture: Architecture) -> int:
    """Return the longest text that llama.cpp computes as we do.

    It is the model's context, or the shortest window where llama.cpp has no windows: up to there a layer with
    a window and one without see the same.
    """
    windows = [layer.window for layer in config.layers if layer.window is not None]
    if architecture.window_every is not None:
        return config.max_position_embeddings
    return min([config.max_position_embeddings, *windows])


def standard_windows(config: ModelConfig, architecture: Architecture) -> bool:
    """Return whether the full layers are those that llama.cpp assumes where the file has no pattern."""
    every = architecture.window_every
    assert every is not None
    return all(
        (layer.window is None) == ((index + 1) % every == 0) for index, layer in enumerate(config.layers)
    )


def full_layers_phrase(architecture: Architecture) -> str:
    """Return which layers are full by default, in words."""
    assert architecture.window_every is not None
    return f"exactly every {_EVERY[architecture.window_every]} layer is full"


def standard_hybrid(config: ModelConfig) -> tuple[LayerSpec, ...]:
    """Return layers of the count and window of `config`, every fourth one full, as Cohere2 has them."""
    window = max(layer.window or 0 for layer in config.layers)
    return hybrid_layers(len(config.layers), window=window)


def _why_not_cohere2(config: ModelConfig) -> str:
    """Return what distinguishes a model that no class computes from Cohere2."""
    layers = config.layers
    windows = sorted({layer.window for layer in layers if layer.window is not None})
    if config.arrangement != "parallel":
        return "no class of transformers computes its combination of features"
    if len(windows) > 1:
        return f"its windows differ ({', '.join(map(str, windows))})"
    for index, layer in enumerate(layers):
        if layer.qk_norm:
            return f"layer {index} has QK-norm"
        if layer.window is not None and not layer.rope:
            return f"layer {index} has a window and no RoPE"
        if windows and layer.window is None and layer.rope:
            return f"layer {index} is full with RoPE beside layers that are not"
    return "no class of transformers computes its combination of features"
