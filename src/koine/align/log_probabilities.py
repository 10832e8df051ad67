"""Log-probabilities of completions: only their positions pass the head, a few rows of logits at a time.

Shape suffixes: n completion tokens, c tokens of a chunk, d hidden size, v vocabulary, C completions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from koine.data.groups import GroupBatch
from koine.model.attention.segments import SegmentContext, SegmentPlace
from koine.model.decoder import Decoder
from koine.model.language_model import LanguageModel
from koine.model.linear import times_transposed
from koine.train.loss import default_chunk


class LogProbabilities(NamedTuple):
    """Log-probabilities of completions, natural logarithms.

    sums: over the tokens that count, `[C]` float32 (float64 of a float64 model).
    lengths: number of these tokens, `[C]`, of the same dtype.
    """

    sums: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """Log-probability a token, `[C]`."""
        return self.sums / self.lengths


def completion_log_probabilities(
    model: LanguageModel, batch: GroupBatch, *, temperature: float = 1.0
) -> LogProbabilities:
    """Compute the log-probability of each completion after its prompt.

    Our own decoder computes a prompt once for all of its completions. Another class gets each completion in a
    row of its own.

    temperature: divides the logits, as when the completions were sampled.
    """
    token_log_probabilities_n = token_log_probabilities(model, batch, temperature=temperature)
    sums = token_log_probabilities_n.new_zeros(batch.completions)
    sums = sums.index_add(0, batch.completion_of, token_log_probabilities_n)
    return LogProbabilities(sums, batch.completion_lengths.to(sums.dtype))


def token_log_probabilities(model: LanguageModel, batch: GroupBatch, *, temperature: float = 1.0) -> Tensor:
    """Compute the log-probability of each completion token, `[n]` in the order of `batch.predicted`."""
    hidden_nd, targets_n = predicting_states(model, batch)
    weight = model.output_weight
    if weight is None:
        return _by_own_head(model, hidden_nd, targets_n, temperature)
    # cap * tanh(logits / cap) / T is (cap / T) * tanh((logits / T) / (cap / T)).
    softcap = None if model.logit_softcap is None else model.logit_softcap / temperature
    result: Tensor = _ChunkedLogProbabilities.apply(  # type: ignore[no-untyped-call]
        hidden_nd,
        weight,
        targets_n,
        float(model.logit_scale) / temperature,
        softcap,
        default_chunk(*weight.shape),
    )
    return result


def predicting_states(model: LanguageModel, batch: GroupBatch) -> tuple[Tensor, Tensor]:
    """Return the hidden states that predict completion tokens, `[n, d]`, and these tokens `[n]`."""
    if isinstance(model, Decoder):
        hidden = model(batch.tokens, context=segment_context(model, batch))
    else:
        batch = batch.separate()
        hidden = model(batch.tokens, attention_mask=(batch.document_ids >= 0).long())
    return hidden.flatten(0, 1)[batch.predicting], batch.predicted


def segment_context(model: Decoder, batch: GroupBatch) -> SegmentContext:
    """Return the attention of a batch of groups."""
    places = [SegmentPlace(one.row, one.start, one.length, one.parent) for one in batch.segments]
    windows = [layer.window for layer in model.config.layers]
    return SegmentContext(places, batch.positions, windows, model.config.attention_softcap)


def _by_own_head(model: LanguageModel, hidden_nd: Tensor, targets_n: Tensor, temperature: float) -> Tensor:
    """Compute log-probabilities with a head that is more than one matrix, in chunks that are recomputed."""

    def of_chunk(hidden_cd: Tensor, targets_c: Tensor) -> Tensor:
        logits_cv = model.logits(hidden_cd).float() / temperature
        return logits_cv.gather(1, targets_c[:, None])[:, 0] - logits_cv.logsumexp(dim=-1)

    size = default_chunk(model.vocab_size, hidden_nd.shape[-1])
    parts = zip(torch.split(hidden_nd, size), torch.split(targets_n, size), strict=True)
    found = [checkpoint(of_chunk, hidden, targets, use_reentrant=False) for hidden, targets in parts]
    return torch.cat(found) if found else hidden_nd.new_zeros(0, dtype=torch.float32)


class _ChunkedLogProbabilities(torch.autograd.Function):
    # The loss decides the gradient of each completion, so the logits are computed again in the backward pass:
    # one more matmul with the head, in place of logits of the whole batch in memory.
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        targets_n: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        upcast = torch.promote_types(hidden_nd.dtype, torch.float32)
        out_n = torch.empty(len(hidden_nd), dtype=upcast, device=hidden_nd.device)
        log_sums_n = torch.empty_like(out_n)
        for start in range(0, len(hidden_nd), chunk):
            span = slice(start, start + chunk)
            logits_cv = _logits(hidden_nd[span], weight_vd, scale, softcap)[0].to(upcast)
            log_sums_n[span] = torch.logsumexp(logits_cv, dim=-1)
            out_n[span] = logits_cv.gather(1, targets_n[span, None])[:, 0] - log_sums_n[span]
        ctx.save_for_backward(hidden_nd, weight_vd, targets_n, log_sums_n)
        ctx.scale, ctx.softcap, ctx.chunk = scale, softcap, chunk
        return out_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        hidden_nd, weight_vd, targets_n, log_sums_n = ctx.saved_tensors
        upcast = log_sums_n.dtype
        grad_hidden_nd = torch.empty_like(hidden_nd)
        grad_weight_vd = torch.zeros_like(weight_vd, dtype=upcast) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_nd), ctx.chunk):
            span = slice(start, start + ctx.chunk)
            hidden_cd, targets_c1, grad_c1 = hidden_nd[span], targets_n[span, None], grad_n[span, None]
            logits_cv, slope_cv = _logits(hidden_cd, weight_vd, ctx.scale, ctx.softcap)
            # d log p(target) = onehot - softmax.
            gradient_cv = logits_cv.to(upcast).sub_(log_sums_n[span, None]).exp_().mul_(-grad_c1)
            gradient_cv = gradient_cv.scatter_add_(1, targets_c1, grad_c1).to(hidden_cd.dtype)
            if slope_cv is not None:
                gradient_cv = gradient_cv.mul_(slope_cv)
            torch.mm(gradient_cv, weight_vd, out=grad_hidden_nd[span])
            if grad_weight_vd is None:
                continue
            if grad_weight_vd.dtype == hidden_cd.dtype:
                grad_weight_vd.addmm_(gradient_cv.t(), hidden_cd)
            else:
                grad_weight_vd += torch.mm(gradient_cv.t(), hidden_cd)
        weight_grad = None if grad_weight_vd is None else grad_weight_vd.mul_(ctx.scale).to(weight_vd.dtype)
        return grad_hidden_nd.mul_(ctx.scale), weight_grad, None, None, None, None


def _logits(
    hidden_cd: Tensor, weight_vd: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return scaled and capped logits `[c, v]`, a new tensor, and the cap's derivative; None without a cap."""
    logits_cv = times_transposed(hidden_cd if scale == 1.0 else hidden_cd * scale, weight_vd)
    if softcap is None:
        return logits_cv, None
    shares_cv = logits_cv.div_(softcap).tanh_()
    return shares_cv * softcap, 1 - shares_cv.square()
