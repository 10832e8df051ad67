"""The architectures of llama.cpp that are imported, and the class of `transformers` that each is.

An entry says which metadata become which fields of `config.json`, and which tensors a block has under the
names of `transformers`. What these are called in the file is known to the `gguf` library's tensor-name maps.
Names and values follow llama.cpp's converter (`convert_hf_to_gguf.py`), read in reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

# Sizes in the shapes below, one letter each:
#   v vocabulary  h hidden  f feed-forward  q heads * head_dim  k key-value heads * head_dim  d head_dim
#   n heads  m key-value heads  e experts  x feed-forward of an expert  s feed-forward of the shared expert
#   p q + 2k  g 2f  1 one
Shapes = Mapping[str, str]

_COMMON: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_RMS: Final = {**_COMMON, "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_LAYER_NORM: Final = {**_COMMON, "attention.layer_norm_epsilon": "layer_norm_eps"}

_ATTENTION: Final = {
    "self_attn.q_proj.weight": "qh",
    "self_attn.k_proj.weight": "kh",
    "self_attn.v_proj.weight": "kh",
    "self_attn.o_proj.weight": "hq",
}
_QKV_BIASES: Final = {
    "self_attn.q_proj.bias": "q",
    "self_attn.k_proj.bias": "k",
    "self_attn.v_proj.bias": "k",
}
_FEED_FORWARD: Final = {
    "mlp.gate_proj.weight": "fh",
    "mlp.up_proj.weight": "fh",
    "mlp.down_proj.weight": "hf",
}
_PRE_NORMS: Final = {"input_layernorm.weight": "h", "post_attention_layernorm.weight": "h"}
_SANDWICH_NORMS: Final = {
    **_PRE_NORMS,
    "pre_feedforward_layernorm.weight": "h",
    "post_feedforward_layernorm.weight": "h",
}
_HEAD_NORMS: Final = {"self_attn.q_norm.weight": "d", "self_attn.k_norm.weight": "d"}
_DENSE: Final = {**_ATTENTION, **_FEED_FORWARD, **_PRE_NORMS}
_EXPERTS: Final = {
    "mlp.gate.weight": "eh",
    "mlp.experts.*.gate_proj.weight": "xh",
    "mlp.experts.*.up_proj.weight": "xh",
    "mlp.experts.*.down_proj.weight": "hx",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp and its class in `transformers`.

    Attributes:
        model_type, model_class: of `transformers`.
        fields: metadata (without the architecture's prefix) -> field of `config.json`.
        block: tensors of a block -> their shape; `*` is the number of an expert.
        switches: field of `config.json` -> tensors that a block has where it is true. The file has the first
            of them or not.
        defaults: values of metadata that the file may leave out, as llama.cpp takes them.
        constants: fields of `config.json` that are the same in every such model.
        optional: fields that a file may leave out and `defaults` does not give.
        permuted: whether the converter interleaved the rows of q and k for llama.cpp's rotation of pairs.
        norm_offset: whether the converter added 1 to the weights of norms.
        ignored: more metadata that change nothing.
    """

    model_type: str
    model_class: str
    fields: Mapping[str, str]
    block: Shapes
    switches: Mapping[str, Shapes] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    permuted: bool = False
    norm_offset: bool = False
    ignored: tuple[str, ...] = ()


_LLAMA: Final = Architecture(
    model_type="llama",
    model_class="LlamaForCausalLM",
    fields=_RMS,
    block=_DENSE,
    switches={
        "attention_bias": {**_QKV_BIASES, "self_attn.o_proj.bias": "h"},
        "mlp_bias": {"mlp.gate_proj.bias": "f", "mlp.up_proj.bias": "f", "mlp.down_proj.bias": "h"},
    },
    constants={"hidden_act": "silu"},
    permuted=True,
)

MIXTRAL: Final = Architecture(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    fields={**_RMS, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    block={
        **_ATTENTION,
        **_PRE_NORMS,
        "block_sparse_moe.gate.weight": "eh",
        "block_sparse_moe.experts.*.w1.weight": "fh",
        "block_sparse_moe.experts.*.w3.weight": "fh",
        "block_sparse_moe.experts.*.w2.weight": "hf",
    },
    constants={"hidden_act": "silu", "sliding_window": None},
    permuted=True,
)
"""The class for `llama` where the metadata name experts."""

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": _LLAMA,
    "smollm3": Architecture(
        model_type="smollm3",
        model_class="SmolLM3ForCausalLM",
        fields=_RMS,
        block=_DENSE,
        constants={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
        permuted=True,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        model_class="Qwen2ForCausalLM",
        fields=_RMS,
        block={**_DENSE, **_QKV_BIASES},
        constants={"hidden_act": "silu", "use_sliding_window": False},
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        model_class="Qwen3ForCausalLM",
        fields=_RMS,
        block={**_DENSE, **_HEAD_NORMS},
        constants={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    ),
    "qwen2moe": Architecture(
        model_type="qwen2_moe",
        model_class="Qwen2MoeForCausalLM",
        fields={
            **_RMS,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        block={
            **_ATTENTION,
            **_QKV_BIASES,
            **_PRE_NORMS,
            **_EXPERTS,
            "mlp.shared_expert.gate_proj.weight": "sh",
            "mlp.shared_expert.up_proj.weight": "sh",
            "mlp.shared_expert.down_proj.weight": "hs",
            "mlp.shared_expert_gate.weight": "1h",
        },
        constants={
            "hidden_act": "silu",
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": False,
        },
        optional=("intermediate_size",),
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        model_class="Qwen3MoeForCausalLM",
        fields={
            **_RMS,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        block={**_ATTENTION, **_PRE_NORMS, **_HEAD_NORMS, **_EXPERTS},
        constants={
            "hidden_act": "silu",
            "use_sliding_window": False,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
        optional=("intermediate_size",),
    ),
    "olmoe": Architecture(
        model_type="olmoe",
        model_class="OlmoeForCausalLM",
        fields={
            **_RMS,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "attention.clamp_kqv": "clip_qkv",
        },
        block={
            **_ATTENTION,
            **_PRE_NORMS,
            "self_attn.q_norm.weight": "q",
            "self_attn.k_norm.weight": "k",
            **_EXPERTS,
        },
        constants={"hidden_act": "silu", "attention_bias": False, "norm_topk_prob": False},
        optional=("clip_qkv",),
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        model_class="Gemma2ForCausalLM",
        fields={
            **_RMS,
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        defaults={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        block={**_ATTENTION, **_FEED_FORWARD, **_SANDWICH_NORMS},
        constants={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        norm_offset=True,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        fields={
            **_RMS,
            "attention.sliding_window": "sliding_window",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        block={**_ATTENTION, **_FEED_FORWARD, **_SANDWICH_NORMS, **_HEAD_NORMS},
        constants={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        norm_offset=True,
        ignored=("mm.tokens_per_image",),
        optional=("final_logit_softcapping",),
    ),
    "olmo2": Architecture(
        model_type="olmo2",
        model_class="Olmo2ForCausalLM",
        fields=_RMS,
        block={
            **_ATTENTION,
            **_FEED_FORWARD,
            "post_attention_layernorm.weight": "h",
            "post_feedforward_layernorm.weight": "h",
            "self_attn.q_norm.weight": "q",
            "self_attn.k_norm.weight": "k",
        },
        constants={"hidden_act": "silu", "attention_bias": False},
    ),
    "phi3": Architecture(
        model_type="phi3",
        model_class="Phi3ForCausalLM",
        fields={**_RMS, "attention.sliding_window": "sliding_window"},
        block={
            "self_attn.qkv_proj.weight": "ph",
            "self_attn.o_proj.weight": "hq",
            "mlp.gate_up_proj.weight": "gh",
            "mlp.down_proj.weight": "hf",
            **_PRE_NORMS,
        },
        constants={"hidden_act": "silu"},
        optional=("sliding_window",),
    ),
    "granite": Architecture(
        model_type="granite",
        model_class="GraniteForCausalLM",
        fields={
            **_RMS,
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        defaults={"embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0},
        block=_DENSE,
        switches=_LLAMA.switches,
        constants={"hidden_act": "silu"},
        permuted=True,
        ignored=("rope.scaling.finetuned",),
    ),
    "command-r": Architecture(
        model_type="cohere",
        model_class="CohereForCausalLM",
        fields={**_LAYER_NORM, "logit_scale": "logit_scale"},
        block={**_ATTENTION, **_FEED_FORWARD, "input_layernorm.weight": "h"},
        switches={"use_qk_norm": {"self_attn.q_norm.weight": "nd", "self_attn.k_norm.weight": "md"}},
        constants={"hidden_act": "silu", "attention_bias": False},
    ),
    "cohere2": Architecture(
        model_type="cohere2",
        model_class="Cohere2ForCausalLM",
        fields={**_LAYER_NORM, "logit_scale": "logit_scale", "attention.sliding_window": "sliding_window"},
        block={**_ATTENTION, **_FEED_FORWARD, "input_layernorm.weight": "h"},
        constants={"hidden_act": "silu", "attention_bias": False},
    ),
}
