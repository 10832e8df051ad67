"""Parameters, FLOPs and cache bytes against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.paged_cache import SLAB, PagedCache
from koine.model import Decoder, LayerSpec, ModelConfig, hybrid_layers, preset
from koine.model.counting import (
    all_full,
    cache_bytes,
    cache_bytes_per_token,
    count_parameters,
    forward_flops,
    training_flops_per_token,
    visible_pairs,
)

SMALL = ModelConfig(
    vocab_size=100,
    hidden_size=8,
    intermediate_size=20,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    layers=(LayerSpec(window=3), LayerSpec(rope=False)),
)
# One block: q 8x8, k and v 4x8 each, gate and up 20x8 each = 8 * (8 + 4 + 4 + 20 + 20) = 448;
# o 8x8 and down 8x20 = 8 * (8 + 20) = 224; together 672. With its norm 680; two blocks 1,360.
# Embedding 100 * 8 = 800, counted once; final norm 8. Total 800 + 1,360 + 8 = 2,168.


def test_parameters_by_hand_and_by_torch() -> None:
    count = count_parameters(SMALL)
    assert (count.total, count.non_embedding) == (2_168, 1_368)
    assert sum(p.numel() for p in Decoder(SMALL).parameters()) == 2_168


def test_command_r7b_sizes() -> None:
    # Command R7B: 4096 hidden, 32 layers, FFN 14336, 32/8 heads of 128, vocabulary
    # 256,000. A block holds q, o 4096^2 each = 33,554,432; k, v 1024 * 4096 each = 8,388,608; three FFN
    # matrices 3 * 4096 * 14336 = 176,160,768; norm 4,096: 218,107,904. 32 of them 6,979,452,928; embedding
    # 1,048,576,000; final norm 4,096.
    assert count_parameters(preset("koine-8b")).total == 6_979_452_928 + 1_048_576_000 + 4_096


def test_visible_pairs() -> None:
    # Five positions, window 3: 1 + 2 + 3 + 3 + 3.
    assert visible_pairs(5, 3) == 12
    assert visible_pairs(5, None) == visible_pairs(5, 9) == 15


def test_flops_by_hand() -> None:
    # Five tokens: matrices 2 * 5 * (2 * 672 + 100 * 8) = 21,440; pairs 12 + 15 = 27, each 4 * 8 (two heads of
    # four) = 864.
    assert forward_flops(SMALL, 5) == 21_440 + 864
    assert round(training_flops_per_token(SMALL, 5) * 5) == 3 * 22_304


def test_flops_against_the_operations_that_torch_counts() -> None:
    """torch counts the dispatched matrix products, in which blocks also compute masked pairs.

    So its count may only be larger. With one layer, no window and one block the difference is the masked half
    of the square.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = Decoder(SMALL)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens))
    # Two layers of full 5 x 5 squares = 50 pairs in place of 27.
    assert counter.get_total_flops() == 21_440 + 50 * 32


def test_cache_bytes_by_hand_and_in_the_cache() -> None:
    # One token: k and v of one head of four, two bytes, two layers = 2 * 4 * 2 * 2 = 32.
    assert cache_bytes_per_token(SMALL) == 32
    # Ten tokens: the window holds 3, the full layer 10: 2 * 4 * 2 * 13 = 208.
    assert cache_bytes(SMALL, 10) == 208
    model = Decoder(SMALL).bfloat16().eval()
    cache = PagedCache.of_model(model, page=5)
    sequences = [cache.add() for _ in range(3)]
    with torch.no_grad():
        model(torch.zeros(1, 18, dtype=torch.long), context=PrefillContext(cache, sequences, [6, 6, 6]))
        for _ in range(4):
            model(torch.zeros(3, 1, dtype=torch.long), context=DecodeContext(cache, sequences))
    # Whole pages, and rings with their three places filled.
    assert cache.bytes_held() == 3 * 208
    # Ten positions fill two pages of five each: nothing is held that is not used.
    assert cache.pages_in_use == 6


def test_a_windowed_layer_allocates_one_window() -> None:
    config = ModelConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        layers=hybrid_layers(4, window=16),
    )
    model = Decoder(config).eval()
    cache = PagedCache.of_model(model, page=8)
    sequence = cache.add()
    with torch.no_grad():
        for _ in range(200):
            model(torch.zeros(1, 1, dtype=torch.long), context=DecodeContext(cache, [sequence]))
    assert [cache.ring(layer)[0].shape for layer in (0, 1, 2)] == [(1, 1, 16, 8)] * 3
    assert cache.pages_in_use == 25
    assert cache.bytes_held() == cache_bytes(config, 200, element_bytes=4)
    # As in Command A (command-a.md): at 128k a quarter of the layers is full, and the windows are small
    # beside it.
    big = preset("koine-8b")
    share = cache_bytes(big, 131_072) / (cache_bytes_per_token(big) * 131_072)
    # (24 * 4096 + 8 * 131072) / (32 * 131072)
    assert share == 0.2734375


def held_after(config: ModelConfig, lengths: Sequence[int], page: int) -> PagedCache:
    """Return a KV cache after the prefill of sequences of these lengths."""
    model = Decoder(config).eval()
    cache = PagedCache.of_model(model, page=page)
    sequences = [cache.add() for _ in lengths]
    with torch.inference_mode():
        tokens = torch.randint(0, config.vocab_size, (1, sum(lengths)))
        model(tokens, context=PrefillContext(cache, sequences, lengths))
    return cache


def written_bytes(cache: PagedCache) -> int:
    """Return the bytes that are not zero any more, in all allocated tensors."""
    slabs = [cache.slab(layer, number) for layer in cache.full for number in range(cache.slabs)]
    rings = [cache.ring(layer) for layer in cache.windowed]
    return sum(int(part.count_nonzero()) * part.element_size() for pair in (*slabs, *rings) for part in pair)


@pytest.mark.parametrize("lengths", [(1,), (16, 3, 40), (9,) * 11])
def test_bytes_in_use_are_counted_in_the_tensors(lengths: tuple[int, ...]) -> None:
    """Written bytes follow the formula, used ones the formula with full pages; reserved ones are bounded."""
    config, page = replace(SMALL, layers=hybrid_layers(4, window=6)), 8
    cache = held_after(config, lengths, page)
    # Keys and values of random weights are never exactly 0.
    assert written_bytes(cache) == sum(cache_bytes(config, length, element_bytes=4) for length in lengths)
    position = 2 * config.kv_size * 4
    whole = sum(-(-length // page) * page + 3 * min(length, 6) for length in lengths)
    assert cache.bytes_held() == whole * position
    # Full layers: less than a slab more than is needed; rings: as many slots as sequences, and a quarter.
    pages = sum(-(-length // page) for length in lengths)
    slots = len(lengths) * 5 / 4
    most = (pages + max(SLAB, pages)) * page + 3 * slots * 6
    assert cache.bytes_held() <= cache.bytes_reserved() <= most * position
    cache.remove(cache.sequences[0])
    assert cache.bytes_held() < whole * position


def test_a_hybrid_holds_a_quarter_of_the_full_cache_at_128k() -> None:
    """131,072 tokens of keys and values in real tensors, a layer at a time, without a forward pass."""
    hybrid = ModelConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=4,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        layers=hybrid_layers(4, window=4096),
    )
    held, chunk = {}, 8192
    for config in (hybrid, all_full(hybrid)):
        cache = PagedCache(config, torch.float32, torch.device("cpu"))
        sequence = cache.add()
        for _ in range(131_072 // chunk):
            context = PrefillContext(cache, [sequence], [chunk])
            for layer in range(4):
                k, v = torch.rand(2, 1, chunk, 1, 2).add(1)
                context.write_kv(layer, k, v)
            context.finish()
        assert sequence.length == 131_072
        assert written_bytes(cache) == cache.bytes_held() == cache_bytes(config, 131_072, element_bytes=4)
        held[config] = cache.bytes_held()
    ratio = held[hybrid] / held[all_full(hybrid)]
    # (3 * 4,096 + 131,072) / (4 * 131,072)
    assert ratio == 0.2734375
    assert 0.25 <= ratio <= 0.30
