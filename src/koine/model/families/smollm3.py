"""SmolLM3: a Llama in which some layers have no position encoding, and some perhaps a window."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import LLAMA_NORMS, Family, TensorNames
from koine.model.families.reading import (
    FULL,
    WINDOWED,
    Defaults,
    keep,
    layer_count,
    layer_types_of,
    one_a_layer,
    read_common,
    read_layer_types,
    read_window,
    window_of,
    write_common,
)

DEFAULTS = Defaults(
    context=32_768, kv_heads=4, theta=2_000_000.0, tied=True, pad=128_004, bos=128_000, eos=128_001
)


def _read(fields: Fields) -> ModelConfig:
    count = layer_count(fields)
    interval = fields.integer("no_rope_layer_interval", 4, low=1)
    rope = [(index + 1) % interval != 0 for index in range(count)]
    if fields.get("no_rope_layers", None) is not None:
        # The field says which layers have RoPE, against its name.
        rope = [bool(one) for one in one_a_layer(fields, "no_rope_layers", count)]
    window = read_window(fields) if fields.boolean("use_sliding_window", False) else None
    windowed = [window is not None and not rotated for rotated in rope]
    types = read_layer_types(fields, count, [WINDOWED if one else FULL for one in windowed])
    bias = fields.boolean("attention_bias", False)
    keep(fields, "no_rope_layer_interval")
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=tuple(
            LayerSpec(window=window if name == WINDOWED else None, rope=rotated)
            for name, rotated in zip(types, rope, strict=True)
        ),
        arrangement="pre_norm",
        norm="rms_norm",
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        logit_scale=1.0,
        model_type="smollm3",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    window = window_of(config)
    return {
        **write_common(config, DEFAULTS),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(layer.rope) for layer in config.layers],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": layer_types_of(config),
    }


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer=LLAMA_NORMS),
)
