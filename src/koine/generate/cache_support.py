"""Find out by experiment how a transformers model continues from its KV cache.

Recurrent classes differ in what their cache allows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from koine.model.lm_head import forward_arguments, forward_logits, probe_tokens

CacheSupport = Literal["chunks", "tokens", "none"]
"""What a model takes after a cache: any number of tokens, one token, or none (each step recomputes all)."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits that rounding explains, relative to the largest logit."""


def cache_name(inner: Any) -> str | None:
    """Return the name of the model's argument and output that holds its cache, or None where it has none."""
    names = forward_arguments(inner)
    if "use_cache" not in names:
        return None
    return next((name for name in ("past_key_values", "cache_params") if name in names), None)


def probe_cache_support(inner: Any) -> CacheSupport:
    """Find out what a model's cache allows, by comparing its logits with one forward pass without a cache."""
    name = cache_name(inner)
    if name is None or probe_tokens(inner).shape[1] < 6:
        return "none"
    device = next(iter(inner.parameters())).device
    ids = probe_tokens(inner)[:1].to(device)
    expected_tv = forward_logits(inner, {"input_ids": ids, "use_cache": False})[0]
    time = int(ids.shape[1])
    splits: list[tuple[CacheSupport, list[int]]] = [
        ("chunks", [time // 2, time - 2]),
        ("tokens", [time - 2]),
    ]
    for support, ends in splits:
        if _agrees(inner, name, ids, expected_tv, [*ends, time - 1, time]):
            return support
    return "none"


def _agrees(inner: Any, name: str, ids: Tensor, expected_tv: Tensor, ends: list[int]) -> bool:
    """Return whether the model gives the same logits chunk by chunk, each after the cache of those before.

    expected_tv: logits of one forward pass, `[time, vocab]`. ends: where each chunk ends.
    """
    past, start = None, 0
    allowed = TOLERANCE.get(expected_tv.dtype, 5e-2) * max(1e-6, float(expected_tv.abs().max()))
    for end in ends:
        try:
            out = inner(input_ids=ids[:, start:end], use_cache=True, **{name: past})
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
            # Each class that does not support this raises its own error.
            return False
        past, got_v = getattr(out, name, None), out.logits[0, -1]
        if past is None or not float((got_v - expected_tv[end - 1]).abs().max()) <= allowed:
            return False
        start = end
    return True


def cache_tensor_bytes(past: Any) -> int:
    """Return the bytes of all tensors in a cache object of transformers; a tensor held twice counts once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting = [past]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found[one.data_ptr()] = one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif type(one).__module__.partition(".")[0] == "transformers":
            waiting += vars(one).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values() if tensor.numel())
