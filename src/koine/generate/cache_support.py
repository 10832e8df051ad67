"""Find out by experiment how a transformers model continues from its KV cache.

Recurrent classes differ in what their cache allows, and classes with position schemes of their own in whether
padding on the left changes anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from koine.generate.cache.cached_forward import CachedForward, cache_name
from koine.model.lm_head import forward_logits, probe_tokens

if TYPE_CHECKING:
    from koine.generate.cache.padded_cache import LayerShape

CacheSupport = Literal["chunks", "tokens", "none"]
"""What a model takes after a cache: any number of tokens, one token, or none (each step recomputes all)."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits that rounding explains, relative to the largest logit."""

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError, KeyError)
"""Errors of classes that do not support a cache or padding: each raises its own."""

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies depend on the longest text of a batch, as `transformers` computes them."""


def probe_cache_support(inner: Any) -> CacheSupport:
    """Find out what a model's cache allows, by comparing its logits with one forward pass without a cache."""
    if cache_name(inner) is None or probe_tokens(inner).shape[1] < 6:
        return "none"
    ids = probe_tokens(inner)[0].tolist()
    expected_tv = _uncached(inner, ids)
    time = len(ids)
    splits: list[tuple[CacheSupport, list[int]]] = [
        ("chunks", [time // 2, time - 2]),
        ("tokens", [time - 2]),
    ]
    for support, ends in splits:
        if _agrees(CachedForward(inner), ids, expected_tv, [*ends, time - 1, time]):
            return support
    return "none"


def probe_padding(inner: Any) -> list[LayerShape] | None:
    """Find out whether a model can continue texts of different lengths in one left-padded batch.

    Logits of a batch that rows join and leave are compared with those of each text alone, without a cache.

    Returns:
        What each layer keeps of a token; None where texts must be continued one by one.
    """
    ids = probe_tokens(inner)
    if cache_name(inner) != "past_key_values" or ids.shape[1] < 12 or _depends_on_neighbours(inner):
        return None
    from koine.generate.cache.padded_cache import PaddedCache, layer_shapes

    texts = {"long": ids[0].tolist(), "short": ids[1].tolist()[3:], "late": ids[1].tolist()[-7:]}
    expected = {name: _uncached(inner, text) for name, text in texts.items()}
    forward = CachedForward(inner)
    try:
        _, past = forward(texts["long"][:3], None)
        shapes = layer_shapes(past)
        if shapes is None:
            return None
        batch, alone = PaddedCache(shapes), PaddedCache(shapes)

        def agrees(cache: PaddedCache, **places: slice) -> bool:
            """Continue texts, in the order of the cache's rows; compare the logits of the last tokens."""
            got_rv = forward.batch(cache, [texts[name][place] for name, place in places.items()])
            return all(
                _close(got_v, expected[name], length - 1)
                for name, got_v, length in zip(places, got_rv, cache.lengths, strict=True)
            )

        # Two prompts together, then one token of each; a third prompt in two chunks joins; the longest leaves.
        first = agrees(batch, long=slice(8), short=slice(3)) and agrees(
            batch, long=slice(8, 9), short=slice(3, 4)
        )
        if not (first and agrees(alone, late=slice(2)) and agrees(alone, late=slice(2, 5))):
            return None
        batch.join(alone)
        if not agrees(batch, long=slice(9, 10), short=slice(4, 5), late=slice(5, 6)):
            return None
        batch.remove(0)
        if not agrees(batch, late=slice(6, 7), short=slice(5, 6)):
            return None
    except REFUSALS:
        return None
    return shapes


def _depends_on_neighbours(inner: Any) -> bool:
    """Return whether a class computes something from the whole batch that 16 tokens do not show."""
    kinds: list[object] = []
    for module in inner.modules():
        kind = getattr(module, "rope_type", None)
        kinds += kind.values() if isinstance(kind, dict) else [kind]
    layer_types = getattr(inner.config.get_text_config(), "layer_types", None) or ()
    return any(kind in LENGTH_DEPENDENT_ROPE for kind in kinds) or "chunked_attention" in layer_types


def _uncached(inner: Any, ids: list[int]) -> Tensor:
    """Return logits `[time, vocab]` of one forward pass without a cache."""
    device = next(iter(inner.parameters())).device
    return forward_logits(inner, {"input_ids": torch.tensor([ids], device=device), "use_cache": False})[0]


def _agrees(forward: CachedForward, ids: list[int], expected_tv: Tensor, ends: list[int]) -> bool:
    """Return whether the model gives the same logits chunk by chunk, each after the cache of those before.

    expected_tv: logits of one forward pass, `[time, vocab]`. ends: where each chunk ends.
    """
    past, start = None, 0
    for end in ends:
        try:
            got_v, past = forward(ids[start:end], past)
        except REFUSALS:
            return False
        if past is None or not _close(got_v, expected_tv, end - 1):
            return False
        start = end
    return True


def _close(got_v: Tensor, expected_tv: Tensor, place: int) -> bool:
    """Return whether logits differ from those at `place` by rounding only."""
    allowed = TOLERANCE.get(expected_tv.dtype, 5e-2) * max(1e-6, float(expected_tv.abs().max()))
    return float((got_v - expected_tv[place]).abs().max()) <= allowed
