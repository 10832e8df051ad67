"""Blocked, windowed and cached attention against a dense masked softmax written with einsum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from koine.model import Decoder, ModelConfig
from koine.model.attention.cpu_blocked import blocked_attention
from koine.model.attention.cpu_fused import fused_attention, threads_idle
from koine.model.attention.cpu_windowed import _document_masks, windowed_attention
from koine.model.attention.dispatch import (
    _attend_in_blocks,
    attend,
    attend_cached,
    document_starts_of,
    masked_attend,
)


def visible(time: int, window: int | None, documents: Tensor | None) -> Tensor:
    """Return which key a query may see, `[batch or 1, time, time]`."""
    query, key = torch.arange(time)[:, None], torch.arange(time)[None, :]
    seen = (key <= query) & (key > query - (window or time))
    if documents is None:
        return seen[None]
    same = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]
    return seen & (same | (query == key))


def dense(q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None) -> Tensor:
    """Compute attention of q `[batch, time, kv_heads, groups, head_dim]` (scaled) by one softmax."""
    scores = torch.einsum("btkgd,bskd->bkgts", q, k)
    hidden = ~visible(q.shape[1], window, documents)[:, None, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2)


def inputs(batch: int, time: int, kv_heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(batch, time, kv_heads, groups, 4), (batch, time, kv_heads, 4), (batch, time, kv_heads, 4)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), time=st.integers(1, 70), groups=st.integers(1, 3), packed=st.booleans())
def test_blocks_equal_the_dense_softmax_with_gradients(
    data: st.DataObject, time: int, groups: int, packed: bool
) -> None:
    window = data.draw(st.one_of(st.none(), st.integers(1, time + 3)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    documents = None
    if packed:
        documents = torch.randint(0, 4, (2, time)).sort(dim=1).values
        documents[0, time - time // 4 :] = -1  # padding at the end of a row
    q, k, v = inputs(2, time, 2, groups, torch.float64)
    starts = None if documents is None else document_starts_of(documents)
    ours = attend(q, k, v, window=window, document_starts=starts)
    theirs = dense(q, k, v, window, documents)
    # float64: only the order of the sums differs.
    assert torch.allclose(ours, theirs, atol=1e-12)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    time=st.integers(1, 70),
    past=st.integers(0, 80),
    window=st.integers(1, 90) | st.none(),
    seed=st.integers(0, 99),
)
def test_cached_attention_equals_the_last_rows_of_the_dense_softmax(
    time: int, past: int, window: int | None, seed: int
) -> None:
    """The cached keys of a windowed layer begin with the oldest that the first query sees."""
    torch.manual_seed(seed)
    positions = past + time
    first = 0 if window is None else max(0, past - window + 1)
    q, k, v = (x.detach() for x in inputs(3, positions, 2, 3, torch.float64))
    expected = dense(q, k, v, window, None)[:, past:]
    keys, values = k[:, first:].transpose(1, 2), v[:, first:].transpose(1, 2)
    ours = attend_cached(q[:, past:], keys, values, window=window)
    # float64: only the order of the sums differs.
    assert torch.allclose(ours, expected, atol=1e-12)
    # Without gradients, full layers use the fused kernel.
    with torch.inference_mode():
        read = attend_cached(q[:, past:], keys, values, window=window)
    assert torch.allclose(read, expected, atol=1e-12)
    # The path of other devices, on the same inputs.
    masked = masked_attend(
        q.flatten(2, 3).transpose(1, 2)[:, :, past:],
        k.transpose(1, 2),
        v.transpose(1, 2),
        window=window,
        document_starts=None,
    )
    assert torch.allclose(masked.transpose(1, 2).flatten(2), expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    time=st.integers(1, 300),
    window=st.integers(1, 150),
    groups=st.integers(1, 3),
    packed=st.booleans(),
)
def test_windows_through_the_fused_kernel_equal_the_dense_softmax_with_gradients(
    data: st.DataObject, time: int, window: int, groups: int, packed: bool
) -> None:
    """Sequences shorter than a block, windows wider than the sequence, several rows, cached positions."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch = data.draw(st.integers(1, 3))
    documents, past = None, 0
    if packed:
        documents = torch.randint(0, 4, (batch, time)).sort(dim=1).values
        documents[0, time - time // 4 :] = -1
    elif batch == 1:
        past = data.draw(st.integers(0, 200))
    q, k, v = inputs(batch, past + time, 2, groups, torch.float64)
    starts = None if documents is None else document_starts_of(documents)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    ours = windowed_attention(q[:, past:], keys, values, window=window, document_starts=starts).flatten(2)
    theirs = dense(q, k, v, window, documents)[:, past:]
    # float64: only the order of the sums differs.
    assert torch.allclose(ours, theirs, atol=1e-12)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize(
    ("batch", "time", "past", "window", "packed"), [(1, 70, 3, 5, False), (2, 66, 0, 3, True)]
)
def test_gradcheck_of_windows(batch: int, time: int, past: int, window: int, packed: bool) -> None:
    q = torch.randn(batch, time, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(batch, 1, past + time, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    starts = document_starts_of((torch.arange(time) // 9).expand(batch, -1)) if packed else None
    assert torch.autograd.gradcheck(
        lambda q, k, v: windowed_attention(q, k, v, window=window, document_starts=starts), (q, k, v)
    )


def test_document_masks_are_cached_as_long_as_the_documents() -> None:
    starts = document_starts_of(torch.arange(200)[None] // 50)
    q, k, v = inputs(1, 200, 1, 2, torch.float32)
    with torch.inference_mode():
        read = attend(q, k, v, window=10, document_starts=starts)
    kept = _document_masks[starts]
    assert attend(q, k, v, window=10, document_starts=starts).backward(torch.ones_like(read)) is None
    assert list(_document_masks[starts]) == list(kept) == [(10, 2, torch.float32)]
    held = len(_document_masks)
    del starts, kept
    assert len(_document_masks) == held - 1


@pytest.mark.parametrize("window", [None, 1, 3, 11])
def test_gradcheck(window: int | None) -> None:
    q = torch.randn(2, 11 * 2, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 11, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 11, 4, dtype=torch.float64, requires_grad=True)
    starts = document_starts_of(torch.tensor([[0] * 4 + [1] * 5 + [2] * 2]))
    assert torch.autograd.gradcheck(
        lambda q, k, v: blocked_attention(q, k, v, window=window, document_starts=starts, block=4), (q, k, v)
    )
    # The last five queries alone, six keys before them.
    late = q.detach()[:, 12:].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v: blocked_attention(
            q, k, v, past=6, window=window, document_starts=starts[:, 6:], block=2
        ),
        (late, k, v),
    )


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    """Outputs of size about 1 differ by at most 0.05.

    Weights sum to one, so the error is at most the rounding of scores (below 10: 2^-8 * 10 = 4 % of a weight)
    and of values.
    """
    q, k, v = inputs(2, 200, 2, 2, torch.float32)
    exact = dense(q, k, v, 33, None)
    heads = k.transpose(1, 2), v.transpose(1, 2)
    for kernel in (_attend_in_blocks, windowed_attention):
        rounded = kernel(*(x.bfloat16() for x in (q, *heads)), window=33, document_starts=None)
        assert rounded.dtype == torch.bfloat16
        assert (rounded.flatten(2).float() - exact).abs().max() < 0.05


class Scores(TorchDispatchMode):
    """Counts the scores that products and fused kernels compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.count += args[0].shape[0] * args[0].shape[1] * args[1].shape[2]
        elif func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.count += args[0].shape[:3].numel() * args[1].shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [_attend_in_blocks, windowed_attention])
def test_windowed_layers_compute_only_their_window(kernel: Any) -> None:
    """The scores computed grow with time * window, not with time squared."""
    totals = []
    for time in (512, 1024, 2048):
        q, k, v = (x.detach() for x in inputs(1, time, 1, 1, torch.float32))
        with Scores() as scores:
            kernel(q, k.transpose(1, 2), v.transpose(1, 2), window=64, document_starts=None)
        totals.append(scores.count)
    assert totals[0] >= 512 * 64
    assert totals[1] < 2.1 * totals[0]
    assert totals[2] < 2.1 * totals[1]


def test_packed_documents_equal_separate_ones(tiny: ModelConfig) -> None:
    model = Decoder(tiny).eval()
    parts = [torch.randint(6, 98, (1, length)) for length in (9, 17, 4)]
    ids = torch.cat([torch.full((1, part.shape[1]), i) for i, part in enumerate(parts)], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])
    with torch.no_grad():
        packed = model(torch.cat(parts, dim=1), document_ids=ids, positions=positions)
        shifted = model(torch.cat(parts, dim=1), document_ids=ids)
        alone = torch.cat([model(part) for part in parts], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)
    # Rotary attention sees differences of positions only, so positions need not begin again at each document.
    assert torch.allclose(shifted, alone, atol=1e-4)


@pytest.mark.parametrize(("batch", "kv_heads", "groups"), [(1, 3, 3), (2, 1, 4), (1, 2, 1)])
def test_the_fused_kernel_with_gradients_by_query_head_equals_the_dense_softmax(
    batch: int, kv_heads: int, groups: int
) -> None:
    torch.manual_seed(0)
    q, k, v = inputs(batch, 37, kv_heads, groups, torch.float64)
    heads = q.flatten(2, 3).transpose(1, 2)
    ours = fused_attention(heads, k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
    theirs = dense(q, k, v, None, None)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gradcheck_of_the_fused_kernel() -> None:
    q = torch.randn(1, 6, 9, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 3, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(fused_attention, (q, k, v))


def test_threads_idle_where_key_heads_cannot_be_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert threads_idle(torch.zeros(1, 3, 5, 4), groups=3)
    assert not threads_idle(torch.zeros(2, 3, 5, 4), groups=3)
    assert not threads_idle(torch.zeros(1, 3, 5, 4), groups=1)
