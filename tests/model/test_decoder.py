"""The decoder: window, NoPE, norm, logit scale, gradient checkpointing, padding, context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from koine.generate.cache.contexts import PrefillContext
from koine.generate.cache.paged_cache import PagedCache
from koine.model import Decoder, LayerSpec, ModelConfig, preset
from koine.model.norm import Norm


def one_layer(tiny: ModelConfig, spec: LayerSpec) -> Decoder:
    return Decoder(replace(tiny, layers=(spec,))).eval()


def last(model: Decoder, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)[:, -1]


@pytest.mark.parametrize("rope", [True, False])
def test_the_edge_of_the_window(tiny: ModelConfig, rope: bool) -> None:
    """Window 7: the query at position 7 sees keys 1 to 7 and not key 0."""
    model = one_layer(tiny, LayerSpec(window=7, rope=rope))
    ids = torch.randint(6, 98, (1, 8))
    outside, inside = ids.clone(), ids.clone()
    outside[0, 0] = 3
    inside[0, 1] = 3
    assert torch.equal(last(model, ids), last(model, outside))
    assert (last(model, ids) - last(model, inside)).abs().max() > 1e-3


def test_a_nope_layer_ignores_the_order_of_earlier_tokens(tiny: ModelConfig) -> None:
    ids = torch.randint(6, 98, (1, 12))
    shuffled = ids.clone()
    shuffled[0, :-1] = ids[0, torch.randperm(11)]
    blind, seeing = one_layer(tiny, LayerSpec(rope=False)), one_layer(tiny, LayerSpec())
    # float32, the same terms summed in another order.
    assert torch.allclose(last(blind, ids), last(blind, shuffled), atol=1e-5)
    assert (last(seeing, ids) - last(seeing, shuffled)).abs().max() > 1e-3


def test_the_norm_is_centred_and_computed_in_float32() -> None:
    norm = Norm(64, preset("koine-0.5m"))
    x = torch.randn(3, 64, dtype=torch.float64)
    norm.double()
    # Root-mean-square norms would see the shift.
    assert torch.allclose(norm(x), norm(x + 5.0), atol=1e-12)
    # 1,000 + noise of size 1: bfloat16 keeps the noise in steps of 4, but its mean must not lose bits on top
    # of that.
    coarse = (1000 + 30 * x).bfloat16()
    exact = norm(coarse.double())
    assert (norm.bfloat16()(coarse).double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_the_logit_scale_changes_probabilities_and_not_the_argmax(tiny: ModelConfig) -> None:
    model = Decoder(tiny).eval()
    hidden = model(torch.randint(6, 98, (2, 9)))
    before = model.logits(hidden)
    model.config = replace(tiny, logit_scale=2 * tiny.logit_scale)
    assert torch.equal(model.logits(hidden), 2 * before)
    assert torch.equal(
        before, torch.nn.functional.linear(hidden, model.output_weight) * model.logit_scale / 2
    )


def test_recomputed_blocks_give_the_same_gradients(tiny: ModelConfig) -> None:
    model = Decoder(tiny).train()
    ids = torch.randint(6, 98, (2, 20))
    documents = (torch.arange(20) // 9).expand(2, 20)

    def gradients() -> list[Tensor]:
        loss = model.logits(model(ids, document_ids=documents)).logsumexp(-1).sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    kept = gradients()
    model.gradient_checkpointing = True
    for a, b in zip(kept, gradients(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny: ModelConfig, side: str) -> None:
    model = Decoder(tiny).eval()
    rows = [torch.randint(6, 98, (length,)) for length in (11, 4, 23)]
    ids, mask = torch.zeros(3, 23, dtype=torch.long), torch.zeros(3, 23, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(23 - len(tokens), 23) if side == "left" else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    documents = torch.zeros_like(ids)
    with torch.no_grad():
        for extra in ({}, {"document_ids": documents}):
            together = model(ids, attention_mask=mask, **extra)[mask.bool()]
            alone = torch.cat([model(tokens[None])[0] for tokens in rows])
            # float32, other block boundaries.
            assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("extra", ["document_ids", "attention_mask", "positions"])
def test_a_context_excludes_positions_documents_and_masks(tiny: ModelConfig, extra: str) -> None:
    model = Decoder(tiny).eval()
    ids, cache = torch.randint(6, 98, (1, 4)), PagedCache.of_model(model)
    context = PrefillContext(cache, [cache.add()], [4])
    with pytest.raises(ValueError, match="a context has"):
        model(ids, context=context, **{extra: torch.zeros_like(ids)})
