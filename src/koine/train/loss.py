"""Cross-entropy over a large vocabulary, with the logits of a few rows in memory at a time.

Shape suffixes: m = all tokens, n = tokens that have a target, c = tokens of a chunk, d = hidden size,
v = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from koine.model.linear import times_transposed

IGNORE = -100
CHUNK_BYTES = 16 * 2**20
"""Least size of the float32 logits of a chunk: smaller makes the matmuls narrow."""


def default_chunk(vocab_size: int, hidden_size: int) -> int:
    """Return the rows of logits in memory at a time.

    At least as many as `CHUNK_BYTES` hold, and as many as make the logits as large as the gradient of the
    output matrix. Each chunk adds to that gradient, so fewer rows would spend their time on this sum.
    """
    return max(64, CHUNK_BYTES // (4 * vocab_size), hidden_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    # The loss is a sum, so its gradients are known up to one factor as soon as the logits are. They are
    # computed in the forward pass, chunk by chunk, and the logits are not needed again.
    @staticmethod
    def forward(
        ctx: Any,
        hidden_md: Tensor,
        weight_vd: Tensor,
        targets_m: Tensor,
        scale: float,
        chunk: int,
        with_gradients: bool,
        softcap: float | None,
    ) -> Tensor:
        accumulate = torch.promote_types(hidden_md.dtype, torch.float32)
        loss = torch.zeros((), dtype=accumulate, device=hidden_md.device)
        has_target = targets_m != IGNORE
        rows_n = None if bool(has_target.all()) else has_target.nonzero().squeeze(1)
        hidden_nd, targets_n = (
            (hidden_md, targets_m) if rows_n is None else (hidden_md[rows_n], targets_m[rows_n])
        )
        grad_nd = torch.empty_like(hidden_nd) if with_gradients else None
        # A head that is not trained, as with an adapter, needs no second matmul.
        with_weight = with_gradients and ctx.needs_input_grad[1]
        grad_vd = torch.zeros_like(weight_vd, dtype=accumulate) if with_weight else None
        for start in range(0, len(hidden_nd), chunk):
            hidden_cd, targets_c1 = hidden_nd[start : start + chunk], targets_n[start : start + chunk, None]
            # Hidden states are scaled before the matmul, gradients after it: one pass less over the logits.
            logits_cv = times_transposed(hidden_cd if scale == 1.0 else hidden_cd * scale, weight_vd)
            slope_cv = None
            if softcap is not None:
                shares_cv = logits_cv.div_(softcap).tanh_()
                slope_cv = 1 - shares_cv.square() if with_gradients else None
                logits_cv = shares_cv.mul_(softcap)
            probabilities_cv = torch.softmax(logits_cv, dim=-1, dtype=accumulate)
            # The largest probability is 1 / sum exp(logit - largest). With it, log-sum-exp needs no second
            # exponential over the vocabulary, and its logarithm is never that of 0.
            log_sum_c = logits_cv.amax(dim=-1).to(accumulate) - probabilities_cv.amax(dim=-1).log()
            loss += (log_sum_c - logits_cv.gather(1, targets_c1).squeeze(1).to(accumulate)).sum()
            if grad_nd is None:
                continue
            # Subtract 1 before the cast: in bfloat16 0.999 is 1, and the target's gradient would vanish.
            gradient_cv = probabilities_cv.scatter_add_(
                1, targets_c1, probabilities_cv.new_full(targets_c1.shape, -1.0)
            ).to(hidden_cd.dtype)
            if slope_cv is not None:
                gradient_cv = gradient_cv.mul_(slope_cv)
            torch.mm(gradient_cv, weight_vd, out=grad_nd[start : start + len(hidden_cd)])
            if grad_vd is None:
                continue
            if grad_vd.dtype == hidden_cd.dtype:
                grad_vd.addmm_(gradient_cv.t(), hidden_cd)
            else:
                grad_vd += torch.mm(gradient_cv.t(), hidden_cd)
        if grad_nd is not None:
            grad_md = grad_nd.mul_(scale)
            if rows_n is not None:
                grad_md = torch.zeros_like(hidden_md).index_copy_(0, rows_n, grad_nd)
            ctx.save_for_backward(
                grad_md, None if grad_vd is None else grad_vd.mul_(scale).to(weight_vd.dtype)
            )
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_md, grad_vd = ctx.saved_tensors
        factor = grad.to(grad_md.dtype)
        weight_grad_vd = None if grad_vd is None else grad_vd * factor
        return grad_md * factor, weight_grad_vd, None, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the SUM of `-log softmax(scale * hidden @ weight.T)[target]` over targets other than -100.

    Args:
        hidden: `[..., hidden]`; matmuls run in its dtype, everything between them in float32 (float64 stays).
        weight: `[vocab, hidden]`.
        targets: `[...]` int64; -100 has no loss and costs no matmul.
        scale: factor on the logits.
        softcap: the scaled logits become `softcap * tanh(logits / softcap)`; None leaves them.
        chunk: rows of logits in memory at a time; None: `default_chunk`.

    Returns:
        A scalar, float32 (float64 for float64).
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if chunk is None:
        chunk = default_chunk(*weight.shape)
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat, weight.to(flat.dtype), targets.reshape(-1), scale, chunk, with_gradients, softcap
    )
    assert isinstance(result, Tensor)
    return result
