"""GGUF files of random models, converted as llama.cpp's `convert_hf_to_gguf.py` does, with the `gguf` library."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VOCABULARY = 96
"""Rows of the embedding of every model here; the tokenizer has fewer tokens."""

BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
"""The byte-level alphabet's characters that stand for themselves; enough for these tests."""


def permuted(weights: Tensor, heads: int) -> Tensor:
    """Interleave the halves of each head (`LlamaModel.permute`)."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def converted(state: Mapping[str, Tensor], config: Any, architecture: str) -> dict[str, Tensor]:
    """Return the tensors under llama.cpp's names and in its layout. `state` has the names of saved files."""
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture in ("llama", "smollm3", "granite") and re.search(r"\.[qk]_proj\.", name):
            tensor = permuted(tensor, heads if ".q_proj." in name else groups)
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor.squeeze(0)
        if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            stacks.setdefault(f"{expert[1]}.{expert[3]}.weight", {})[int(expert[2])] = tensor
            continue
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    for name, experts in stacks.items():
        stacked = torch.stack([experts[index] for index in range(len(experts))])
        found[names.get_name(name, try_suffixes=(".weight",))] = stacked
    return found


def metadata_of(config: Any, architecture: str) -> dict[str, Any]:
    """Return the metadata that the converter writes for a configuration, without the architecture's prefix."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * (rope.get("partial_rotary_factor") or 1.0)),
        "vocab_size": config.vocab_size,
    }
    norm = "layer_norm_eps" if architecture in ("command-r", "cohere2") else "rms_norm_eps"
    key = "attention.layer_norm_epsilon" if norm == "layer_norm_eps" else "attention.layer_norm_rms_epsilon"
    values[key] = float(getattr(config, norm))
    more = {
        "logit_scale": "logit_scale",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
        "num_experts": "expert_count",
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "clip_qkv": "attention.clamp_kqv",
    }
    if architecture in ("gemma2", "gemma3", "cohere2", "phi3"):
        more["sliding_window"] = "attention.sliding_window"
    for field, name in more.items():
        value = getattr(config, field, None)
        if value is not None:
            values[name] = value
    if rope["rope_type"] in ("linear", "yarn"):
        values["rope.scaling.type"] = rope["rope_type"]
        values["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return values


def add_byte_level_tokenizer(writer: Any, *, pre: str = "gpt-2") -> list[str]:
    """Add a small byte-level BPE vocabulary; return its tokens."""
    words = ["Ġ", "th", "Ġth", "he"]
    tokens = ["<|end|>", "<|begin|>", *BYTES[: VOCABULARY - 12], *words]
    tokens = list(dict.fromkeys(tokens))
    tokens += ["t"] if "t" not in tokens else []
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["t h", "Ġ th", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
    return tokens


def add_metadata(writer: Any, values: Mapping[str, Any], architecture: str) -> None:
    """Add metadata below the architecture's prefix."""
    for key, value in values.items():
        name = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)


def write_file(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    kind: str | Callable[[str], str] = "F32",
    tokenizer: Callable[[Any], object] | None = add_byte_level_tokenizer,
    change: Callable[[Any], object] | None = None,
) -> Path:
    """Write a GGUF file.

    kind: type of the matrices; vectors are F32. change: adds more to the writer, before the tensors.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, values, architecture)
    if tokenizer is not None:
        tokenizer(writer)
    if change is not None:
        change(writer)
    for name, tensor in tensors.items():
        wanted = (kind if isinstance(kind, str) else kind(name)) if tensor.dim() > 1 else "F32"
        data = tensor.detach().to(torch.float32).numpy()
        number = gguf.GGMLQuantizationType[wanted]
        writer.add_tensor(name, gguf.quantize(data, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def saved_state(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model as `transformers` saves them."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def random_model(config: Any, *, seed: int = 0) -> Any:
    """Build a model with weights that are far from their initial values, norms and biases too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.2, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.3, 1.2)
    return model


def small_llama(**fields: Any) -> Any:
    """Return the configuration of a Llama that fits blocks of 256."""
    from transformers import LlamaConfig

    given = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 0, "pad_token_id": None, **fields,
    }  # fmt: skip
    return LlamaConfig(**given)


def random_bytes(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Return blocks of a type as bytes, random but for their float16 scales, which are small numbers."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for place in at:
        scales = rng.uniform(0.0001, 0.001, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)
