"""Find out by experiment how a model of `transformers` may go on from its own KV cache.

Recurrent classes differ in what theirs allows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from koine.model.lm_head import forward_arguments, forward_logits, probe_tokens

Continuing = Literal["chunks", "tokens", "none"]
"""After a cache: any number of tokens, one token, or none (each token reads the whole text)."""

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits, of the largest logit, that rounding explains."""


def cache_name(inner: Any) -> str | None:
    """The argument and the output by which a model's cache goes in and out; None where it has none."""
    names = forward_arguments(inner)
    if "use_cache" not in names:
        return None
    return next((name for name in ("past_key_values", "cache_params") if name in names), None)


def continuing(inner: Any) -> Continuing:
    """Find out how a model may go on from its cache, by comparing with one forward pass."""
    name = cache_name(inner)
    if name is None or probe_tokens(inner).shape[1] < 6:
        return "none"
    device = next(iter(inner.parameters())).device
    ids = probe_tokens(inner)[:1].to(device)
    whole = forward_logits(inner, {"input_ids": ids, "use_cache": False})[0]
    time = int(ids.shape[1])
    tried: list[tuple[Continuing, list[int]]] = [("chunks", [time // 2, time - 2]), ("tokens", [time - 2])]
    for kind, cuts in tried:
        ends = [*cuts, time - 1, time]
        if _agrees(inner, name, ids, whole, ends):
            return kind
    return "none"


def _agrees(inner: Any, name: str, ids: Tensor, whole: Tensor, ends: list[int]) -> bool:
    """Return whether reading in pieces that end at `ends` gives the same logits.

    Each is read after the cache of those before. whole: `[time, vocab]`.
    """
    past, start = None, 0
    allowed = CLOSE.get(whole.dtype, 5e-2) * max(1e-6, float(whole.abs().max()))
    for end in ends:
        try:
            out = inner(input_ids=ids[:, start:end], use_cache=True, **{name: past})
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
            # A class that cannot go on so says it in its own way.
            return False
        past, got = getattr(out, name, None), out.logits[0, -1]
        if past is None or not float((got - whole[end - 1]).abs().max()) <= allowed:
            return False
        start = end
    return True
