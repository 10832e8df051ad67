"""The reference: random checkpoints that `transformers` writes, and what its own class computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.model.drift import hidden_states

from .cases import VOCABULARY, Case


def write_checkpoint(case: Case, folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Path:
    """Write a checkpoint of random weights as `transformers` saves it."""
    config = transformers.AutoConfig.for_model(case.model_type, **case.fields())
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    return folder


def _randomise(model: Any, seed: int) -> None:
    """Draw all weights so that an exchanged, ignored or doubled one shows in the output.

    Attention is far from uniform, norms differ from channel to channel and no bias is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name or weight.dim() == 1:
                # Around the initial value: 1, or 0 for biases and for Gemma's norms.
                weight.add_(0.3 * noise)
            elif "embed_tokens" in name:
                # Small beside what the blocks add: else a tied model repeats its input.
                weight.copy_(0.05 * noise)
            else:
                weight.copy_(1.2 * noise / weight.shape[1] ** 0.5)


def open_reference(folder: Path) -> Any:
    """Open a checkpoint by `transformers`, with its plain attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def text(length: int, seed: int = 0) -> list[int]:
    """Return random ids without special tokens."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def forget_length(model: Any) -> None:
    """Reset the frequencies of dynamic RoPE: the class keeps those of the longest text so far."""
    with torch.no_grad():
        model(torch.tensor([[3]]))


def reference_blocks(model: Any, ids: Sequence[int]) -> list[Tensor]:
    """Return the input of the first block and each block's output, `[1, time, hidden]`."""
    forget_length(model)
    with torch.no_grad():
        return hidden_states(model, torch.tensor([ids]))


def reference_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the logits `[time, vocab]` of one text, without a cache."""
    forget_length(model)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def reference_cached_logits(model: Any, chunks: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits `[time, vocab]` of one text that is given chunk by chunk, with a cache."""
    forget_length(model)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(torch.tensor([chunk]), past_key_values=cache).logits[0] for chunk in chunks]
    return torch.cat(parts)


def reference_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Return `count` greedy tokens of `generate`; no token ends the text."""
    forget_length(model)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(error)
