"""Merged partial attention equals attention over all keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from koine.generate.cache.split_attention import (
    attention_by_matmul,
    mask_bias,
    merge_attention_states,
    partial_attention,
)


def slab_of(parts: int, keys: int, dtype: torch.dtype, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Keys and values `[parts, 2 heads, keys, 8]`; `apart`: as they lie in a slab, head by head."""
    if apart:
        k, v = torch.randn(2, 2, parts, keys, 8).to(dtype).transpose(1, 2)
    else:
        k, v = torch.randn(2, parts, 2, keys, 8).to(dtype)
    return k, v


@pytest.mark.parametrize("attend", [partial_attention, attention_by_matmul])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_attention_is_a_softmax_over_unmasked_keys(
    attend: object, apart: bool, dtype: torch.dtype
) -> None:
    assert callable(attend)
    q = torch.randn(5, 2, 3, 8).to(dtype)
    keys, values = slab_of(5, 16, dtype, apart=apart)
    hidden = torch.arange(16) > torch.tensor([3, 15, 0, 7, 15])[:, None]
    mixed, log_sum = attend(q, keys, values, mask_bias(hidden, dtype))
    scores = (q.float() @ keys.float().transpose(-1, -2)).masked_fill(hidden[:, None, None], -torch.inf)
    # float32: another order of the sums; bfloat16: 8 bits of weights and values of about 1.
    near = 1e-5 if dtype == torch.float32 else 0.05
    assert mixed.dtype == dtype
    assert log_sum.dtype == torch.float32
    assert (mixed.float() - scores.softmax(-1) @ values.float()).abs().max() <= near
    assert (log_sum - scores.logsumexp(-1)).abs().max() <= near


@pytest.mark.parametrize("attend", [partial_attention, attention_by_matmul])
def test_merged_chunks_equal_attention_over_all_keys(attend: object) -> None:
    """Rows of two, one and three chunks; one chunk is wholly masked, and one belongs to no row."""
    assert callable(attend)
    rows = torch.tensor([0, 2, 1, 0, 2, 2, 0])
    q = torch.randn(3, 2, 3, 8)
    keys, values = slab_of(7, 4, torch.float32, apart=True)
    hidden = torch.zeros(7, 4, dtype=torch.bool)
    hidden[3, 2:], hidden[5], hidden[6] = True, True, True
    mixed, sums = attend(q[rows], keys, values, mask_bias(hidden, torch.float32))
    got = merge_attention_states(mixed, sums, rows, 3)
    for row in range(3):
        whole_keys, whole_values = (
            torch.cat([part[index][:, ~hidden[index]] for index in range(7) if rows[index] == row], dim=1)
            for part in (keys, values)
        )
        expected = torch.softmax(q[row] @ whole_keys.transpose(-1, -2), dim=-1) @ whole_values
        # float32, another order of the sums.
        assert torch.allclose(got[row], expected, atol=1e-5)
