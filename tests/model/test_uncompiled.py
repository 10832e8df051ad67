"""Functions that torch.compile leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor

from koine.model import Decoder, ModelConfig
from koine.model.uncompiled import uncompiled


def test_a_compiled_function_calls_it_as_it_is() -> None:
    """It runs at each call, on tensors and not on the compiler's stand-ins, and so does what it calls."""
    seen: list[tuple[bool, type]] = []

    def deeper(x: Tensor) -> Tensor:
        seen.append((torch.compiler.is_compiling(), type(x)))
        return x.sin()

    @uncompiled
    def inner(x: Tensor) -> Tensor:
        return deeper(x)

    def outer(x: Tensor) -> Tensor:
        return inner(x * 2) + 1

    compiled = torch.compile(outer, backend="eager")
    x = torch.randn(4)
    expected = (x * 2).sin() + 1
    for count in (1, 2, 3):
        assert torch.equal(compiled(x), expected)
        assert seen == [(False, Tensor)] * count
    assert torch.equal(outer(x), expected)


def test_compiled_blocks_compute_what_they_did(tiny: ModelConfig) -> None:
    torch.manual_seed(0)
    model = Decoder(tiny)
    tokens = torch.arange(30).view(1, 30)

    def logits_and_gradient() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits = model.logits(model(tokens))
        logits.square().mean().backward()
        assert model.embedding.weight.grad is not None
        return logits.detach(), model.embedding.weight.grad.clone()

    before = logits_and_gradient()
    for block in model.blocks:
        block.compile(backend="eager")
    for got, expected in zip(logits_and_gradient(), before, strict=True):
        torch.testing.assert_close(got, expected)
