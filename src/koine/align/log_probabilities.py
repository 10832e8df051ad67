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
from koine.train.loss import CHUNK_BYTES, default_chunk

KEPT_BYTES = 4 * CHUNK_BYTES
"""Most bytes of softmax probabilities that are kept for the backward pass."""


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
    return head_log_probabilities(model, hidden_nd, targets_n, temperature=temperature)


def head_log_probabilities(
    model: LanguageModel, hidden_nd: Tensor, targets_n: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Compute the log-probability of each target from the hidden state that predicts it, `[n]`."""
    weight = model.output_weight
    if weight is None:
        return _by_own_head(model, hidden_nd, targets_n, temperature)
    # cap * tanh(logits / cap) / T is (cap / T) * tanh((logits / T) / (cap / T)).
    softcap = None if model.logit_softcap is None else model.logit_softcap / temperature
    trains = torch.is_grad_enabled() and (hidden_nd.requires_grad or weight.requires_grad)
    result: Tensor = _ChunkedLogProbabilities.apply(  # type: ignore[no-untyped-call]
        hidden_nd,
        weight,
        targets_n,
        float(model.logit_scale) / temperature,
        softcap,
        default_chunk(*weight.shape),
        KEPT_BYTES if trains else 0,
    )
    return result


def predicting_states(model: LanguageModel, batch: GroupBatch) -> tuple[Tensor, Tensor]:
    """Return the hidden states that predict completion tokens, `[n, d]`, and these tokens `[n]`."""
    if _has_dynamic_rope(model):
        # A prompt is rotated by the length of the whole conversation, so that completions cannot share it.
        batch = batch.separate()
    if isinstance(model, Decoder):
        if batch.tokens.device.type == "cpu":
            # Attention goes segment by segment there, so rows are only a way to count tokens.
            batch = batch.without_padding()
        hidden = model(batch.tokens, context=segment_context(model, batch))
    else:
        batch = batch.separate()
        hidden = model(batch.tokens, attention_mask=(batch.document_ids >= 0).long())
    return hidden.flatten(0, 1)[batch.predicting], batch.predicted


def _has_dynamic_rope(model: LanguageModel) -> bool:
    scaling = model.config.rope_scaling if isinstance(model, Decoder) else None
    return scaling is not None and scaling.kind == "dynamic"


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
    # The loss decides the gradient of each completion only after this. What does not depend on it, softmax -
    # onehot, is kept up to `kept_bytes`. For the other chunks the logits are computed again in the backward
    # pass: one more matmul with the head, in place of logits of the whole batch in memory.
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        targets_n: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        kept_bytes: int = 0,
    ) -> Tensor:
        upcast = torch.promote_types(hidden_nd.dtype, torch.float32)
        out_n = torch.empty(len(hidden_nd), dtype=upcast, device=hidden_nd.device)
        log_sums_n = torch.empty_like(out_n)
        room = kept_bytes
        kept: list[Tensor] = []
        for start in range(0, len(hidden_nd), chunk):
            span = slice(start, start + chunk)
            logits_cv, slope_cv = _logits(hidden_nd[span], weight_vd, scale, softcap)
            probabilities_cv = torch.softmax(logits_cv, dim=-1, dtype=upcast)
            # The largest probability is 1 / sum exp(logit - largest), so log-sum-exp needs no other pass.
            log_sums_n[span] = logits_cv.amax(dim=-1).to(upcast) - probabilities_cv.amax(dim=-1).log()
            out_n[span] = logits_cv.gather(1, targets_n[span, None])[:, 0].to(upcast) - log_sums_n[span]
            room -= logits_cv.nbytes
            if room >= 0:
                kept.append(_slopes(probabilities_cv, targets_n[span], slope_cv, hidden_nd.dtype))
        ctx.save_for_backward(hidden_nd, weight_vd, targets_n, log_sums_n)
        ctx.scale, ctx.softcap, ctx.chunk, ctx.kept = scale, softcap, chunk, kept
        return out_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        hidden_nd, weight_vd, targets_n, log_sums_n = ctx.saved_tensors
        upcast = log_sums_n.dtype
        grad_hidden_nd = torch.empty_like(hidden_nd)
        grad_weight_vd = torch.zeros_like(weight_vd, dtype=upcast) if ctx.needs_input_grad[1] else None
        # d log p(target) = onehot - softmax = -slopes. The gradient of each token scales the narrow factors.
        factors_n1 = grad_n[:, None] * -ctx.scale
        kept, ctx.kept = iter(ctx.kept), []
        for start in range(0, len(hidden_nd), ctx.chunk):
            span = slice(start, start + ctx.chunk)
            hidden_cd = hidden_nd[span]
            slopes_cv = next(kept, None)
            if slopes_cv is None:
                logits_cv, slope_cv = _logits(hidden_cd, weight_vd, ctx.scale, ctx.softcap)
                probabilities_cv = logits_cv.to(upcast).sub_(log_sums_n[span, None]).exp_()
                slopes_cv = _slopes(probabilities_cv, targets_n[span], slope_cv, hidden_cd.dtype)
            torch.mm(slopes_cv, weight_vd, out=grad_hidden_nd[span])
            if grad_weight_vd is None:
                continue
            scaled_cd = (hidden_cd * factors_n1[span]).to(hidden_cd.dtype)
            if grad_weight_vd.dtype == hidden_cd.dtype:
                grad_weight_vd.addmm_(slopes_cv.t(), scaled_cd)
            else:
                grad_weight_vd += torch.mm(slopes_cv.t(), scaled_cd)
        weight_grad = None if grad_weight_vd is None else grad_weight_vd.to(weight_vd.dtype)
        grad_hidden_nd.mul_(factors_n1)
        return grad_hidden_nd, weight_grad, None, None, None, None, None


def _slopes(
    probabilities_cv: Tensor, targets_c: Tensor, slope_cv: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the derivative of -log p(target) by the uncapped logits, `[c, v]`; overwrite `probabilities_cv`."""
    # Subtract 1 before the cast: in bfloat16 0.999 is 1, and the target's gradient would vanish.
    minus_one_c1 = probabilities_cv.new_full((len(targets_c), 1), -1.0)
    slopes_cv = probabilities_cv.scatter_add_(1, targets_c[:, None], minus_one_c1).to(dtype)
    return slopes_cv if slope_cv is None else slopes_cv.mul_(slope_cv)


def _logits(
    hidden_cd: Tensor, weight_vd: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return scaled and capped logits `[c, v]`, a new tensor, and the cap's derivative; None without a cap."""
    logits_cv = times_transposed(hidden_cd if scale == 1.0 else hidden_cd * scale, weight_vd)
    if softcap is None:
        return logits_cv, None
    shares_cv = logits_cv.div_(softcap).tanh_()
    return shares_cv * softcap, 1 - shares_cv.square()
