"""Decode attention over a KV cache stored in chunks; partial results are combined by log-sum-exp.

Shapes: c chunks (pages, runs of pages, rings), r rows (sequences), k key heads, g query heads of a key head
(groups), s keys of a chunk, d head size (`q_ckgd`, `keys_cksd`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from koine.hardware import is_intel

MASKED_SCORE = -1e30
"""Added to the score of a masked key.

Finite: a chunk with all keys masked gets weight 0 when merged, and not NaN.
"""


def mask_bias(masked_cs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores, `[c, 1, 1, s]`, from a bool mask that is True on masked keys."""
    lowest = max(MASKED_SCORE, torch.finfo(dtype).min / 2)
    bias_cs = torch.zeros(masked_cs.shape, dtype=dtype, device=masked_cs.device)
    return bias_cs.masked_fill_(masked_cs, lowest)[:, None, None]


def partial_attention(
    q_ckgd: Tensor,
    keys_cksd: Tensor,
    values_cksd: Tensor,
    bias: Tensor | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each chunk's query (scaled) to the chunk's keys.

    bias: see `mask_bias`; None masks nothing. softcap: see `koine.model.attention.dispatch.attend`.
    Returns the output `[c, k, g, d]`, and the log-sum-exp of the scores `[c, k, g]` in float32.
    """
    if q_ckgd.device.type != "cpu" or softcap is not None:
        return attention_by_matmul(q_ckgd, keys_cksd, values_cksd, bias, softcap)
    # The fused kernel takes keys of any strides in place. 256 keys take 15 µs; matmuls and a softmax take 19,
    # in bfloat16 60 (docs/explanation/log.md).
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_ckgd, log_sums_ckg = fused(q_ckgd, keys_cksd, values_cksd, 0.0, False, attn_mask=bias, scale=1.0)
    return out_ckgd, log_sums_ckg


def matmuls_are_faster(q: Tensor) -> bool:
    """Return whether `attend_chunks` is faster than the fused kernel of the CPU.

    EPYC, float32: 1.5 to 2.2 times (docs/explanation/log.md).
    """
    return q.device.type == "cpu" and q.dtype == torch.float32 and not is_intel()


def attend_chunks(q_kgd: Tensor, chunks: Sequence[Tensor], softcap: float | None = None) -> Tensor:
    """Attend one query (scaled) to the keys of all chunks, `[k, g, d]`.

    chunks: keys and values `[2, k, s, d]`, all of them visible.
    """
    scores = [torch.bmm(q_kgd, chunk[0].transpose(1, 2)) for chunk in chunks]
    scores_kgs = scores[0] if len(scores) == 1 else torch.cat(scores, dim=2)
    if softcap is not None:
        scores_kgs = scores_kgs.div_(softcap).tanh_().mul_(softcap)
    weights_kgs = torch.softmax(scores_kgs, dim=2)
    if len(chunks) == 1:
        return torch.bmm(weights_kgs, chunks[0][1])
    parts = weights_kgs.split_with_sizes([chunk.shape[2] for chunk in chunks], dim=2)
    out_kgd = torch.bmm(parts[0], chunks[0][1])
    for part, chunk in zip(parts[1:], chunks[1:], strict=True):
        out_kgd.baddbmm_(part, chunk[1])
    return out_kgd


def attention_by_matmul(
    q_ckgd: Tensor,
    keys_cksd: Tensor,
    values_cksd: Tensor,
    bias: Tensor | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `partial_attention` on any device.

    In a slab, chunks and heads are not adjacent: one matmul over both would copy the keys. There each head
    has its own.
    """
    adjacent = keys_cksd.stride(0) == keys_cksd.shape[1] * keys_cksd.stride(1)
    product = torch.matmul if adjacent else _matmul_by_heads
    scores_ckgs = product(q_ckgd, keys_cksd.transpose(-1, -2)).float()
    if softcap is not None:
        scores_ckgs = scores_ckgs.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores_ckgs += bias
    log_sums_ckg = scores_ckgs.logsumexp(dim=-1)
    weights_ckgs = (scores_ckgs - log_sums_ckg[..., None]).exp_()
    return product(weights_ckgs.to(q_ckgd.dtype), values_cksd), log_sums_ckg


def _matmul_by_heads(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.bmm(a[:, head], b[:, head]) for head in range(a.shape[1])], dim=1)


def merge_attention_states(out_ckgd: Tensor, log_sums_ckg: Tensor, rows_c: Tensor, rows: int) -> Tensor:
    """Merge the chunks of each row, `[r, k, g, d]`, in the dtype of `out_ckgd`.

    out_ckgd, log_sums_ckg: of `partial_attention`. rows_c: the row of each chunk. rows: number of rows.
    Every row needs a chunk with at least one key that is not masked.
    """
    sums_ckg1 = log_sums_ckg[..., None]
    shape = (rows, *sums_ckg1.shape[1:])
    highest_rkg1 = torch.full(shape, -torch.inf, dtype=sums_ckg1.dtype, device=sums_ckg1.device)
    highest_rkg1.scatter_reduce_(0, rows_c[:, None, None, None].expand_as(sums_ckg1), sums_ckg1, "amax")
    weights_ckg1 = (sums_ckg1 - highest_rkg1[rows_c]).exp_()
    total_rkg1 = torch.zeros_like(highest_rkg1).index_add_(0, rows_c, weights_ckg1)
    merged_rkgd = torch.zeros((rows, *out_ckgd.shape[1:]), dtype=sums_ckg1.dtype, device=sums_ckg1.device)
    merged_rkgd.index_add_(0, rows_c, out_ckgd * weights_ckg1)
    return (merged_rkgd / total_rkg1).to(out_ckgd.dtype)
