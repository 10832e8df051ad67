"""Linear layers through oneDNN against torch's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from koine.model import linear as module
from koine.model.linear import MIN_ROWS, Linear, linear, times_transposed


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use oneDNN on any processor whose torch has it."""
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(module, "_prefers_onednn", lambda: True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(MIN_ROWS,), (2, MIN_ROWS), (3,)])
def test_equals_torch_with_gradients(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, 20, requires_grad=True)
    weight = torch.randn(12, 20, requires_grad=True)
    offsets = torch.randn(12, requires_grad=True) if bias else None
    inputs = [tensor for tensor in (x, weight, offsets) if tensor is not None]
    ours, theirs = linear(x, weight, offsets), F.linear(x, weight, offsets)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, offsets), theirs)


def test_frozen_weights_get_no_gradient() -> None:
    x, weight = torch.randn(MIN_ROWS, 20, requires_grad=True), torch.randn(12, 20)
    linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(MIN_ROWS, -1))
    assert weight.grad is None


def test_weights_with_other_strides_do_not_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN would multiply them in a loop that takes seconds.
    monkeypatch.setattr(module, "_onednn", lambda *_: pytest.fail("a weight that is not contiguous"))
    x, weight = torch.randn(MIN_ROWS, 20), torch.randn(12, 40)[:, :20]
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(times_transposed(x, weight), x @ weight.t())


def test_is_a_linear_layer_with_the_same_state() -> None:
    ours, theirs = Linear(20, 12), nn.Linear(20, 12)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(MIN_ROWS, 20)
    torch.testing.assert_close(ours(x), theirs(x))
