"""StarCoder2: a plain feed-forward, and biases of every projection and norm."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import LLAMA_NORMS, Family, TensorNames
from koine.model.families.reading import (
    Defaults,
    layer_count,
    read_common,
    read_window,
    same_layers,
    window_of,
    write_common,
)

DEFAULTS = Defaults(
    context=4096, kv_heads=2, eps=1e-5, eps_name="norm_epsilon", activation="gelu_pytorch_tanh", tied=True,
    initializer_range=0.018042, bos=50_256, eos=50_256,
)  # fmt: skip


def _read(fields: Fields) -> ModelConfig:
    bias = fields.boolean("use_bias", True)
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec(window=read_window(fields))),
        arrangement="pre_norm",
        norm_bias=True,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        gated=False,
        logit_scale=1.0,
        model_type="starcoder2",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        "use_bias": config.mlp_bias,
        "sliding_window": window_of(config),
    }


FAMILY = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer={**LLAMA_NORMS, "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
)
