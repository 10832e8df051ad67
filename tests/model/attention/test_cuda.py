"""Attention on CUDA (FlexAttention, fused and masked SDPA) against a dense softmax in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from koine.model.attention.dispatch import attend, attend_cached, document_starts_of
from koine.model.attention.flex import _window_mask
from tests.model.attention.test_dispatch import dense

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Sums over at most 1,023 keys; the gradients of keys and values add up as many queries of each of three
# heads.
FLOAT32, GRADIENT = 1e-4, 1e-3
HEAD = 32


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Reset the compiler: each window is compiled on its own, and it gives up after a few of one function."""
    torch._dynamo.reset()
    _window_mask.cache_clear()
    yield
    torch._dynamo.reset()


def inputs(batch: int, time: int, kv_heads: int, groups: int) -> list[Tensor]:
    """Return q (scaled), k and v on the CPU."""
    generator = torch.Generator().manual_seed(time)
    shapes = [(batch, time, kv_heads, groups, HEAD), *[(batch, time, kv_heads, HEAD)] * 2]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return [q * HEAD**-0.5, k, v]


def moved(tensors: list[Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(device, dtype).detach().requires_grad_() for tensor in tensors]


def packed(time: int) -> Tensor:
    """Return document ids of two rows: some documents, one of a single token, padding after the first row."""
    cuts = torch.tensor([[time // 5, time // 5 + 1, time // 2], [1, time // 3, time - 1]])
    documents = (torch.arange(time)[None, :, None] >= cuts[:, None]).sum(-1)
    documents[0, time - time // 7 :] = -1
    return documents


def cases() -> list[tuple[int, int | None]]:
    """Return odd lengths below and above FlexAttention's smallest, with windows from 1 to all."""
    lengths = (5, 129, 257, 513, 1023)
    windows = (1, 2, 127, 128, 129, 250)
    return [
        (time, window)
        for time in lengths
        for window in (None, *(one for one in windows if one < time), time - 1, time)
    ]


@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("time", "window"), cases())
def test_forward_and_backward_equal_the_dense_softmax(
    time: int, window: int | None, groups: int, with_documents: bool
) -> None:
    documents = packed(time) if with_documents else None
    starts = None if documents is None else document_starts_of(documents)
    exact = moved(inputs(2, time, 2, groups), "cpu", torch.float64)
    ours = moved(inputs(2, time, 2, groups), "cuda", torch.float32)
    expected = dense(exact[0], exact[1], exact[2], window, documents)
    got = attend(*ours, window=window, document_starts=None if starts is None else starts.cuda())
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=FLOAT32)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, exact, grad)
    found = torch.autograd.grad(got, ours, grad.to("cuda", torch.float32))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=GRADIENT)


def test_a_window_first_used_in_inference_mode_can_be_trained_with() -> None:
    tensors = moved(inputs(1, 300, 2, 2), "cuda", torch.float32)
    with torch.inference_mode():
        attend(*(tensor.detach() for tensor in tensors), window=9, document_starts=None)
    attend(*tensors, window=9, document_starts=None).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 2, 33, 128, 400, 1000])
@pytest.mark.parametrize(("past", "time"), [(0, 7), (1, 1), (131, 5), (257, 301), (500, 1)])
def test_cached_attention_equals_the_softmax(past: int, time: int, window: int | None, groups: int) -> None:
    """The cached keys of a windowed layer begin with the oldest that the first query sees."""
    positions = past + time
    first = 0 if window is None else max(0, past - window + 1)
    q, k, v = inputs(2, positions, 2, groups)
    expected = dense(q.double(), k.double(), v.double(), window, None)[:, past:]
    got = attend_cached(
        q[:, past:].cuda(),
        k[:, first:].transpose(1, 2).cuda(),
        v[:, first:].transpose(1, 2).cuda(),
        window=window,
    )
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=FLOAT32)
