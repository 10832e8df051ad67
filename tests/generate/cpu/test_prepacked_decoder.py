"""The prepacked forward pass equals the decoder without a cache, for one sequence and for batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.paged_cache import CachedSequence, PagedCache
from koine.generate.cpu.prepacked_decoder import PrepackedDecoder, build_prepacked_decoder
from koine.generate.cpu.prepacked_linear import PrepackedLinear, TransposedLinear, can_prepack, prepack
from koine.model import Decoder, ModelConfig
from koine.model.config import MixtureConfig, QKNorm


def read_prompts(forward: PrepackedDecoder, cache: PagedCache, texts: list[Tensor]) -> list[CachedSequence]:
    """Half of each text, then the rest."""
    sequences = [cache.add() for _ in texts]
    halves = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in texts]
    for parts in zip(*halves, strict=True):
        read_part(forward, cache, sequences, list(parts))
    return sequences


def read_part(
    forward: PrepackedDecoder, cache: PagedCache, sequences: list[CachedSequence], parts: list[Tensor]
) -> list[Tensor]:
    context = PrefillContext(cache, sequences, [len(part) for part in parts])
    return list(torch.split(forward(torch.cat(parts), context), [len(part) for part in parts]))


def in_steps(
    model: Decoder, forward: PrepackedDecoder, cache: PagedCache, texts: list[tuple[CachedSequence, Tensor]]
) -> list[Tensor]:
    """Hidden states of the rest of each text, one token of all of them a step."""
    found, last = [], None
    sequences = [sequence for sequence, _ in texts]
    cache.arrange(sequences)
    begins = [sequence.length for sequence in sequences]
    for step in range(min(len(ids) - begin for (_, ids), begin in zip(texts, begins, strict=True))):
        last = DecodeContext(cache, sequences, last)
        tokens = torch.tensor([int(ids[begin + step]) for (_, ids), begin in zip(texts, begins, strict=True)])
        found.append(forward(tokens, last).clone())
    return [torch.stack(rows) for rows in zip(*found, strict=True)]


@pytest.mark.parametrize("layout", [PrepackedLinear, TransposedLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [None, "heads"])
@torch.inference_mode()
def test_steps_equal_the_decoder_without_a_cache(
    tiny: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    layout: type[torch.nn.Module],
    qk_norm: QKNorm | None,
) -> None:
    monkeypatch.setattr("koine.generate.cpu.prepacked_linear.best_layout", lambda dtype: layout)
    torch.manual_seed(0)
    layers = tuple(replace(spec, qk_norm=qk_norm) for spec in tiny.layers)
    model = Decoder(replace(tiny, rope_theta=500.0, layers=layers)).to(dtype).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    if not can_prepack(model):
        pytest.skip("this processor or build of torch packs no such weights")
    prepack(model)
    forward = build_prepacked_decoder(model)
    assert forward is not None
    long, short, late = (torch.randint(6, 98, (length,)) for length in (75, 40, 30))
    whole = {len(ids): model(ids[None])[0] for ids in (long, short, late)}
    # float32: the same sums in another order, hidden states are of the order of 1; bfloat16 rounds each of
    # them to 8 bits.
    near = 2e-5 if dtype == torch.float32 else 0.15
    cache = PagedCache.of_model(model, page=16)
    [first] = read_prompts(forward, cache, [long[:5]])
    # Alone: the window fills, then wraps, and the pages become several.
    [got] = in_steps(model, forward, cache, [(first, long[:45])])
    assert (got - whole[75][5:45]).abs().max() <= near
    second, third = read_prompts(forward, cache, [short[:20], late[:2]])
    texts = [(third, late[:12]), (first, long), (second, short)]
    for rows, begin, end, of in zip(
        in_steps(model, forward, cache, texts), (2, 45, 20), (12, 55, 30), (30, 75, 40), strict=True
    ):
        assert (rows - whole[of][begin:end]).abs().max() <= near
    # Alone again, after the others have left.
    cache.remove(third)
    cache.remove(second)
    [got] = in_steps(model, forward, cache, [(first, long)])
    assert (got - whole[75][55:]).abs().max() <= near


@pytest.fixture
def packed(tiny: ModelConfig) -> tuple[Decoder, PrepackedDecoder]:
    """A small model and what reads it."""
    model = prepack(Decoder(tiny).eval())
    forward = build_prepacked_decoder(model)
    if forward is None:
        pytest.skip("this build of torch packs no weights")
    return model, forward


@torch.inference_mode()
def test_prompts_equal_the_decoder_without_a_cache(packed: tuple[Decoder, PrepackedDecoder]) -> None:
    """One alone, several packed, and on from where each was."""
    model, forward = packed
    texts = [torch.randint(6, 98, (length,)) for length in (90, 33, 41)]
    whole = [model(ids[None])[0] for ids in texts]
    cache = PagedCache.of_model(model, page=16)
    sequences = [cache.add() for _ in texts]
    got = [read_part(forward, cache, sequences[:1], [texts[0][:50]])]
    got.append(read_part(forward, cache, sequences, [texts[0][50:], texts[1], texts[2][:9]]))
    got.append(read_part(forward, cache, sequences[2:], [texts[2][9:]]))
    expected = [[whole[0][:50]], [whole[0][50:], whole[1], whole[2][:9]], [whole[2][9:]]]
    for parts, wanted in zip(got, expected, strict=True):
        for part, one in zip(parts, wanted, strict=True):
            # float32, as above.
            assert (part - one).abs().max() <= 2e-5


@torch.inference_mode()
def test_pages_in_several_runs(packed: tuple[Decoder, PrepackedDecoder]) -> None:
    """A sequence whose pages do not lie together, alone: its windows are read in place all the same."""
    model, forward = packed
    ids, other = torch.randint(6, 98, (60,)), torch.randint(6, 98, (20,))
    cache = PagedCache.of_model(model, page=4)
    sequences = read_prompts(forward, cache, [ids[:3], other[:4]])
    texts = list(zip(sequences, (ids[:19], other), strict=True))
    in_steps(model, forward, cache, texts)
    cache.remove(texts[1][0])
    [got] = in_steps(model, forward, cache, [(texts[0][0], ids)])
    assert (got - model(ids[None])[0, 19:]).abs().max() <= 2e-5


def test_models_without_a_prepacked_forward_pass(tiny: ModelConfig) -> None:
    assert build_prepacked_decoder(Decoder(tiny)) is None
    mixture = replace(tiny, mixture=MixtureConfig(experts=("a", "b")))
    assert build_prepacked_decoder(prepack(Decoder(mixture))) is None
