"""Small random checkpoints of every family: which configurations are tested.

A new family needs an entry in `CASES`, nothing else. The first case of a family is the one in the table of
`tests.model.families.table`; let it have the family's usual features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

WINDOW = 8
TEXT_LENGTH = 45
"""Tokens of the longest text: several windows, and longer than `ORIGINAL_LENGTH`."""
ORIGINAL_LENGTH = 16
"""`original_max_position_embeddings` of the cases with scaled RoPE."""
VOCABULARY = 97

_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of `transformers`.

    model_type: as in config.json. name: what is special. changes: fields of the configuration that differ
    from `_COMMON` and from the class's defaults.
    """

    model_type: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model_type}-{self.name}"

    def fields(self) -> dict[str, Any]:
        """Return the fields that the configuration is built from."""
        return {**_COMMON, **self.changes}

    @property
    def dynamic(self) -> bool:
        """True: RoPE's frequencies depend on the length of the text."""
        rope = self.changes.get("rope_parameters") or {}
        return rope.get("rope_type") == "dynamic"


def rope(rope_type: str, theta: float = 10_000.0, **others: Any) -> dict[str, Any]:
    """Return `rope_parameters`; types that need the original length have it."""
    if rope_type in ("llama3", "yarn"):
        others = {"original_max_position_embeddings": ORIGINAL_LENGTH, **others}
    return {"rope_type": rope_type, "rope_theta": theta, **others}


_LINEAR = rope("linear", factor=2.5)
_LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
_YARN = rope("yarn", factor=4.0)
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

_OF_FAMILY: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "gqa": {"rope_parameters": rope("default", 5_000.0)},
        "mha-as-llama-2": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
        "tied": {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 3},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "head-dim": {"head_dim": 16, "num_key_value_heads": 1},
        "linear": {"rope_parameters": _LINEAR},
        "dynamic": {
            "rope_parameters": rope("dynamic", factor=2.0),
            "max_position_embeddings": ORIGINAL_LENGTH,
        },
        "llama3": {"rope_parameters": _LLAMA3, "head_dim": 16},
        "yarn": {"rope_parameters": _YARN, "head_dim": 16},
        "yarn-all-fields": {
            # A base and limits with which the ramp begins after the first frequency.
            "rope_parameters": rope(
                "yarn",
                100.0,
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=1.5,
                beta_slow=0.5,
                mscale=0.8,
                mscale_all_dim=0.6,
            ),
            "head_dim": 16,
        },
        "yarn-attention-factor": {"rope_parameters": rope("yarn", factor=4.0, attention_factor=1.3)},
    },
    "smollm3": {
        "nope": {"num_hidden_layers": 4},
        "untied-biases": {
            "no_rope_layers": [1, 0, 1],
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "windowed": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
        "windows-with-rope": {
            "no_rope_layers": [1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        "yarn": {"rope_parameters": _YARN, "no_rope_layers": [1, 0, 1]},
    },
    "mistral": {
        "window": {"sliding_window": WINDOW},
        "full": {"sliding_window": None, "head_dim": 16},
        "tied": {"sliding_window": WINDOW + 3, "tie_word_embeddings": True},
        "yarn": {"sliding_window": None, "rope_parameters": _YARN},
    },
    "qwen2": {
        "tied": {"tie_word_embeddings": True, "rope_parameters": rope("default", 1_000_000.0)},
        "untied": {"num_attention_heads": 6, "num_key_value_heads": 2},
        "windowed": _WINDOWED,
        "yarn": {"rope_parameters": _YARN},
    },
    "qwen3": {
        "head-dim": {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": rope("default", 1e6)},
        "untied-biases": {"head_dim": 12, "attention_bias": True},
        "windowed": {"head_dim": 16, **_WINDOWED},
        "yarn": {"head_dim": 16, "rope_parameters": _YARN},
    },
    "gemma2": {
        "soft-caps": {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 23,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 0.5,
        },
        "no-caps": {
            "head_dim": 12,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        "untied": {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": False,
        },
    },
    "gemma3_text": {
        "two-bases": {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 23,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "num_key_value_heads": 1,
        },
        "pattern-of-6": {
            "head_dim": 16,
            "num_hidden_layers": 7,
            "sliding_window": WINDOW + 1,
            "query_pre_attn_scalar": 16,
        },
        "linear": {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": rope("linear", 100_000.0, factor=8.0),
                "sliding_attention": rope("default", 5_000.0),
            },
        },
        "soft-cap-untied": {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "final_logit_softcapping": 6.0,
            "tie_word_embeddings": False,
        },
    },
    "olmo2": {
        "gqa": {"rope_parameters": rope("default", 500_000.0)},
        "mha-tied-biases": {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True},
        "yarn": {"rope_parameters": _YARN},
    },
    "phi3": {
        "window": {"sliding_window": WINDOW, "rope_parameters": rope("default")},
        "partial-rotary": {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": rope("default", partial_rotary_factor=0.75),
        },
        "mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    },
    "granite": {
        "multipliers": {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.5,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "tie_word_embeddings": True,
        },
        "biases": {
            "embedding_multiplier": 1.5,
            "logits_scaling": 0.7,
            "residual_multiplier": 1.3,
            "attention_multiplier": 0.4,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "plain": {"num_key_value_heads": 4, "attention_multiplier": 12**-0.5},
        "linear": {"rope_parameters": _LINEAR, "attention_multiplier": 0.3},
    },
    "starcoder2": {
        "window": {"sliding_window": WINDOW},
        "no-biases-untied": {"use_bias": False, "tie_word_embeddings": False},
        "mha-linear": {"num_key_value_heads": 4, "rope_parameters": _LINEAR},
    },
    "cohere": {
        "tied": {"logit_scale": 0.3},
        "qk-norm": {"use_qk_norm": True, "logit_scale": 0.3},
        "untied-biases": {"attention_bias": True, "tie_word_embeddings": False, "logit_scale": 1.7},
        "qk-norm-biases": {"attention_bias": True, "use_qk_norm": True, "num_key_value_heads": 4},
        "linear": {"rope_parameters": _LINEAR},
    },
    "cohere2": {
        "window-nope": {"sliding_window": WINDOW, "num_hidden_layers": 5, "logit_scale": 0.3},
        "biases": {
            "sliding_window": WINDOW,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "untied": {
            "sliding_window": WINDOW + 3,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "yarn": {"sliding_window": WINDOW, "rope_parameters": _YARN},
    },
    "mixtral": {
        "top-2": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "windowed-tied": {"num_local_experts": 3, "sliding_window": WINDOW, "tie_word_embeddings": True},
        "yarn": {"num_local_experts": 3, "head_dim": 12, "rope_parameters": _YARN},
    },
    "qwen2_moe": {
        "shared": {**_EXPERTS, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 72},
        "windowed": {
            **_EXPERTS,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    },
    "qwen3_moe": {
        "head-dim": {**_EXPERTS, "moe_intermediate_size": 40, "head_dim": 16},
        "windowed-biases": {
            **_EXPERTS,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    },
    "olmoe": {
        "gqa": _EXPERTS,
        "normalised": {**_EXPERTS, "norm_topk_prob": True, "attention_bias": True, "rope_parameters": _YARN},
    },
    "flex_olmo": {
        "gqa": _EXPERTS,
        "normalised-tied": {**_EXPERTS, "norm_topk_prob": True, "tie_word_embeddings": True},
    },
}

CASES = tuple(
    Case(model_type=model_type, name=name, changes=changes)
    for model_type, cases in _OF_FAMILY.items()
    for name, changes in cases.items()
)


def model_types() -> tuple[str, ...]:
    """Return the families that have cases, in the order of the table."""
    return tuple(_OF_FAMILY)


def first_case(model_type: str) -> Case:
    """Return the case that stands for the family in the table."""
    return next(case for case in CASES if case.model_type == model_type)
