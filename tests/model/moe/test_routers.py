"""Routers: soft gates, and scores by domain embeddings."""

from __future__ import annotations

import math

import pytest
import torch

from koine.model.moe.routers import DomainRouter, soft_gates


def test_soft_gates_keep_the_largest_without_renormalising() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.0]], dtype=torch.float64)
    whole = torch.softmax(logits, dim=-1)
    assert torch.equal(soft_gates(logits, None), whole)
    assert torch.equal(soft_gates(logits, 3), whole)
    assert torch.equal(soft_gates(logits, 2), whole * torch.tensor([[1.0, 0.0, 1.0]]))


def test_cached_expert_embeddings_follow_the_weights() -> None:
    router = DomainRouter(8, 3, 4)
    router.reset_parameters()
    x = torch.randn(5, 8)
    with torch.no_grad():
        before = router(x)
        assert torch.equal(router(x), before)
        router.out.mul_(2.0)
        assert torch.allclose(router(x), 2.0 * before)
        router.domains.zero_()
        assert not router(x).any()


def test_a_domain_router_by_hand() -> None:
    """`x . W2 (silu(gate) * up)` (arXiv 2408.15901, section 3): W1 has the gate's rows, then those of up."""
    router = DomainRouter(2, 1, 1)
    with torch.no_grad():
        router.domains.copy_(torch.tensor([[2.0]]))
        # Gates 2 and -2, ups 6 and 8.
        router.into.copy_(torch.tensor([[1.0], [-1.0], [3.0], [4.0]]))
        router.out.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    silu = {value: value / (1 + math.exp(-value)) for value in (2.0, -2.0)}
    expected = [silu[2.0] * 6.0, 0.5 * silu[-2.0] * 8.0]
    assert router.expert_embeddings()[0].tolist() == pytest.approx(expected, rel=1e-6)
    found = router(torch.tensor([[1.0, 10.0]]))
    assert found.tolist() == [[pytest.approx(expected[0] + 10.0 * expected[1], rel=1e-6)]]
