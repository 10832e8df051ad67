"""The paged KV cache: bytes in use, pages that are given back, a cache that is full."""

from __future__ import annotations

import pytest
import torch

from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.paged_cache import SLAB, OutOfPages, PagedCache
from koine.model import Decoder, ModelConfig
from koine.model.counting import cache_bytes
from tests.generate.prompts import prompt_of


def test_memory_follows_use(tiny: ModelConfig) -> None:
    """Bytes in use follow the formula, in whole pages; empty slabs are freed, but for one."""
    model = Decoder(tiny).eval()
    cache = PagedCache.of_model(model, page=4)
    long, short = cache.add(), cache.add()
    with torch.inference_mode():
        model(
            torch.tensor([prompt_of(4 * SLAB * 3, 1)]), context=PrefillContext(cache, [long], [4 * SLAB * 3])
        )
        model(torch.tensor([prompt_of(3, 2)]), context=PrefillContext(cache, [short], [3]))
    lengths = (4 * SLAB * 3, 3)
    place = 2 * tiny.kv_size * 4
    # One full layer, whose second sequence has a page of four.
    assert cache.bytes_held() == place + sum(cache_bytes(tiny, length, element_bytes=4) for length in lengths)
    most = cache.bytes_reserved()
    cache.remove(long)
    cache.remove(short)
    assert cache.pages_in_use == 0
    # 97 pages took slabs of 32, 32 and 64 pages; the first stays.
    assert most - cache.bytes_reserved() == (32 + 64) * 2 * 4 * tiny.kv_size * 4
    assert cache.add().slot == 0


def test_pages_far_apart_and_a_cache_that_is_full(tiny: ModelConfig) -> None:
    """Of many sequences only the first and the last stay: their pages are gathered, not read in place."""
    model = Decoder(tiny).eval()
    cache = PagedCache.of_model(model, page=4, max_pages=20)
    prompts = [prompt_of(8, seed) for seed in range(10)]
    sequences = [cache.add() for _ in prompts]
    with torch.inference_mode():
        for prompt, sequence in zip(prompts, sequences, strict=True):
            model(torch.tensor([prompt]), context=PrefillContext(cache, [sequence], [8]))
        with pytest.raises(OutOfPages):
            DecodeContext(cache, sequences)
        for sequence in sequences[1:-1]:
            cache.remove(sequence)
        kept = [sequences[-1], sequences[0]]
        cache.arrange(kept)
        got = model(torch.tensor([[7], [9]]), context=DecodeContext(cache, kept))[:, 0]
        expected = [model(torch.tensor([[*prompts[i], token]]))[0, -1] for i, token in ((-1, 7), (0, 9))]
    # float32, summed in another order.
    assert torch.allclose(got, torch.stack(expected), atol=1e-5)
