"""Chunked cross-entropy beside torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from koine.train import chunked_cross_entropy
from koine.train.loss import default_chunk


def inputs(
    dtype: torch.dtype, rows: int = 37, hidden: int = 16, vocab: int = 50
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::4] = -100
    return h, w, targets


@pytest.mark.parametrize("chunk", [1, 8, 1000, None])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_equals_torch(chunk: int | None, scale: float) -> None:
    h, w, targets = inputs(torch.float64)
    ours = chunked_cross_entropy(h, w, targets, scale=scale, chunk=chunk)
    theirs = F.cross_entropy(h @ w.t() * scale, targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    # The factor checks that the incoming gradient is applied.
    expected = torch.autograd.grad(theirs * 3, (h, w))
    for got, want in zip(torch.autograd.grad(ours * 3, (h, w)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck() -> None:
    h, w, targets = inputs(torch.float64, rows=6, hidden=4, vocab=7)
    assert torch.autograd.gradcheck(
        lambda a, b: chunked_cross_entropy(a, b, targets, scale=0.5, chunk=2), (h, w)
    )


def test_bfloat16_is_within_its_rounding() -> None:
    # bfloat16 has 8 bits: inputs, logits and gradients are each rounded by up to 2^-9 of themselves, about 1
    # % together.
    h, w, targets = inputs(torch.bfloat16, rows=256)
    ours = chunked_cross_entropy(h, w, targets, scale=0.25, chunk=64)
    theirs = F.cross_entropy(h.float() @ w.float().t() * 0.25, targets, ignore_index=-100, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=0)
    for got, want in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(theirs, (h, w)), strict=True):
        assert (got.float() - want.float()).norm() < 0.01 * want.float().norm()


def test_nothing_to_learn_is_zero() -> None:
    h, w, targets = inputs(torch.float32)
    loss = chunked_cross_entropy(h, w, torch.full_like(targets, -100))
    assert loss == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (h, w)))


def test_no_gradients_without_need() -> None:
    h, w, targets = inputs(torch.float32)
    with torch.no_grad():
        assert not chunked_cross_entropy(h, w, targets).requires_grad


def test_a_chunk_of_logits_is_no_larger_than_the_gradient_or_16_megabytes() -> None:
    assert default_chunk(8192, 256) * 8192 * 4 == 16 * 2**20
    assert default_chunk(49_152, 576) == 576
    assert default_chunk(10**6, 32) == 64
