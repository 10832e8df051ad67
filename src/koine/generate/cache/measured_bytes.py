"""Measure the bytes of the KV cache that `transformers` keeps for a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from koine.generate.cache.cached_forward import CachedForward
from koine.generate.cache_support import probe_cache_support

if TYPE_CHECKING:
    from koine.model.causal_lm import CausalLM

CHUNK = 2048
"""Tokens of a forward pass, where the class takes chunks."""


def measure_cache_bytes(model: CausalLM, ids: Sequence[int]) -> int | None:
    """Return the bytes of all tensors in the cache after a prefill of `ids`; None for a class without cache."""
    with torch.inference_mode():
        support = probe_cache_support(model.inner)
        if support == "none":
            return None
        forward, past = CachedForward(model.inner), None
        size = CHUNK if support == "chunks" else len(ids)
        for start in range(0, len(ids), size):
            _, past = forward(ids[start : start + size], past)
    return tensor_bytes(past)


def tensor_bytes(cache: Any) -> int:
    """Return the bytes of all tensors in an object of `transformers`; a tensor held twice counts once."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting = [cache]
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
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())
