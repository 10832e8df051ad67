"""Steps in buffers that stay equal the decoder without a cache: alone and together, windows that fill and wrap, sequences that come and go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from koine.model import Decoder, LayerSpec, ModelConfig
from koine.model.config import MixtureConfig
from koine.model.packed import PackedLinear, TransposedLinear, can_pack, pack
from koine.model.paged_cache import CachedSequence, PagedCache
from koine.model.reading import StepReading, StretchReading
from koine.model.stepper import Stepper, stepper_of


def read_prompt(model: Decoder, cache: PagedCache, ids: Tensor) -> CachedSequence:
    sequence = cache.add()
    model(ids[None], reading=StretchReading(cache, [sequence], [len(ids)]))
    return sequence


def in_steps(
    model: Decoder, stepper: Stepper, cache: PagedCache, texts: list[tuple[CachedSequence, Tensor]]
) -> list[Tensor]:
    """Hidden states of the rest of each text, one token of all of them a step."""
    found, last = [], None
    sequences = [sequence for sequence, _ in texts]
    cache.arrange(sequences)
    begins = [sequence.length for sequence in sequences]
    for step in range(min(len(ids) - begin for (_, ids), begin in zip(texts, begins, strict=True))):
        last = StepReading(cache, sequences, last)
        tokens = torch.tensor([int(ids[begin + step]) for (_, ids), begin in zip(texts, begins, strict=True)])
        found.append(stepper(tokens, last).clone())
    return [torch.stack(rows) for rows in zip(*found, strict=True)]


@pytest.mark.parametrize("layout", [PackedLinear, TransposedLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_steps_equal_the_decoder_without_a_cache(
    tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layout: type[torch.nn.Module]
) -> None:
    monkeypatch.setattr("koine.model.packed.best_layout", lambda dtype: layout)
    torch.manual_seed(0)
    model = Decoder(replace(tiny, rope_theta=500.0)).to(dtype).eval()
    if not can_pack(model):
        pytest.skip("this processor or build of torch packs no such weights")
    pack(model)
    stepper = stepper_of(model)
    assert stepper is not None
    long, short, late = (torch.randint(6, 98, (length,)) for length in (75, 40, 30))
    whole = {len(ids): model(ids[None])[0] for ids in (long, short, late)}
    # float32: the same sums in another order, hidden states are of the order of 1; bfloat16 rounds each of them to 8 bits.
    near = 2e-5 if dtype == torch.float32 else 0.15
    cache = model.new_cache(page=16)
    first = read_prompt(model, cache, long[:5])
    # Alone: the window fills, then wraps, and the pages become several.
    [got] = in_steps(model, stepper, cache, [(first, long[:45])])
    assert (got - whole[75][5:45]).abs().max() <= near
    second, third = read_prompt(model, cache, short[:20]), read_prompt(model, cache, late[:1])
    texts = [(third, late[:11]), (first, long), (second, short)]
    for rows, begin, end, of in zip(
        in_steps(model, stepper, cache, texts), (1, 45, 20), (11, 55, 30), (30, 75, 40), strict=True
    ):
        assert (rows - whole[of][begin:end]).abs().max() <= near
    # Alone again, after the others have left.
    cache.remove(third)
    cache.remove(second)
    [got] = in_steps(model, stepper, cache, [(first, long)])
    assert (got - whole[75][55:]).abs().max() <= near


@torch.inference_mode()
def test_pages_in_several_runs(tiny: ModelConfig) -> None:
    """A sequence whose pages do not lie together, alone: its windows are read in place all the same."""
    model = pack(Decoder(tiny).eval())
    stepper = stepper_of(model)
    if stepper is None:
        pytest.skip("this build of torch packs no weights")
    ids, other = torch.randint(6, 98, (60,)), torch.randint(6, 98, (20,))
    cache = model.new_cache(page=4)
    texts = [(read_prompt(model, cache, ids[:3]), ids[:19]), (read_prompt(model, cache, other[:4]), other)]
    in_steps(model, stepper, cache, texts)
    cache.remove(texts[1][0])
    [got] = in_steps(model, stepper, cache, [(texts[0][0], ids)])
    assert (got - model(ids[None])[0, 19:]).abs().max() <= 2e-5


def test_who_has_none(tiny: ModelConfig) -> None:
    assert stepper_of(Decoder(tiny)) is None
    normed = replace(tiny, layers=(LayerSpec(qk_norm=True),))
    mixture = replace(tiny, mixture=MixtureConfig(experts=("a", "b")))
    assert stepper_of(pack(Decoder(normed))) is None
    assert stepper_of(pack(Decoder(mixture))) is None
