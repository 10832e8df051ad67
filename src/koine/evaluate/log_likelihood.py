"""Negative log-likelihood of whole documents of any length, each on its own from BOS.

Shape suffixes: b rows of a batch, t positions, h hidden size, n scored positions of a batch, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Float32 values of the logits that are in memory at once. An accelerator needs large parts. On a CPU small
# parts fit into the caches: 2,048 tokens are the fastest and need a third of the memory of 32,768.
_LOGITS = {"cpu": 4 * 1024 * 1024, "accelerator": 32 * 1024 * 1024}
# Tokens of a batch, with padding: long rows make small batches.
_TOKENS = {"cpu": 2 * 1024, "accelerator": 32 * 1024}


class ScoringModel(Protocol):
    """Interface that scoring needs; our decoder and wrapped causal LMs of `transformers` have it."""

    training: bool

    def __call__(self, tokens: Tensor, /) -> Tensor: ...
    def logits(self, hidden: Tensor, /) -> Tensor: ...
    def eval(self) -> object: ...
    def train(self, mode: bool = True) -> object: ...


@contextmanager
def evaluating(model: ScoringModel) -> Iterator[None]:
    """Run the model in inference mode without dropout, then restore its training mode."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Window:
    """Tokens of a part of a document; the last `scored` predictions count."""

    document: int
    tokens: tuple[int, ...]  # inputs and, shifted by one, targets
    scored: int


def windows(document: int, tokens: Sequence[int], max_length: int) -> list[Window]:
    """Cut `tokens` (BOS first) into windows so that every token after BOS is predicted exactly once.

    A document of at most `max_length` inputs is one window. The windows of a longer one overlap by half. Each
    scores only what the one before did not, so every prediction sees at least `max_length // 2` tokens.
    """
    total = len(tokens) - 1
    if total <= 0:
        return []
    first = min(total, max_length)
    result = [Window(document, tuple(tokens[: first + 1]), first)]
    done = first
    step = max(1, max_length - max_length // 2)
    while done < total:
        end = min(total, done + step)
        start = max(0, end - max_length)
        result.append(Window(document, tuple(tokens[start : end + 1]), end - done))
        done = end
    return result


def negative_log_likelihoods(
    model: ScoringModel,
    documents: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_length: int,
    device: torch.device | str,
) -> list[float]:
    """Return the sum of -ln p (nats) over every token after the first, for each document (ids, BOS first).

    Rows are padded on the right. A causal mask hides the padding, so a score does not depend on the batch.
    """
    pending = [
        window for index, tokens in enumerate(documents) for window in windows(index, tokens, max_length)
    ]
    pending.sort(key=lambda window: len(window.tokens))
    totals = [0.0] * len(documents)
    with evaluating(model):
        for batch in _batches(pending, batch_size, _TOKENS[_kind(device)]):
            for window, value in zip(batch, _score(model, batch, device), strict=True):
                totals[window.document] += value
    return totals


def _kind(device: torch.device | str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else "accelerator"


def _batches(pending: Sequence[Window], batch_size: int, most_tokens: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in pending:  # ascending length, so this one is the longest of the batch
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(window.tokens) > most_tokens):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _score(model: ScoringModel, batch: Sequence[Window], device: torch.device | str) -> list[float]:
    """Return the sum of -ln p (nats) over the scored tokens of each window."""
    length = max(len(window.tokens) for window in batch) - 1
    tokens_bt = torch.zeros(len(batch), length, dtype=torch.int64)
    targets_bt = torch.full((len(batch), length), -100, dtype=torch.int64)
    for row, window in enumerate(batch):
        ids = torch.tensor(window.tokens, dtype=torch.int64)
        tokens_bt[row, : len(ids) - 1] = ids[:-1]
        targets_bt[row, len(ids) - 1 - window.scored : len(ids) - 1] = ids[-window.scored :]
    hidden_bth = model(tokens_bt.to(device))
    rows_n, positions_n = torch.nonzero(targets_bt != -100, as_tuple=True)
    targets_n = targets_bt[rows_n, positions_n].to(device)
    rows_n, positions_n = rows_n.to(device), positions_n.to(device)
    totals_b = torch.zeros(len(batch), dtype=torch.float64, device=device)
    size = max(1, _LOGITS[_kind(device)] // _vocab_size(model, hidden_bth))
    for start in range(0, len(rows_n), size):
        part = slice(start, start + size)
        logits_nv = model.logits(hidden_bth[rows_n[part], positions_n[part]]).float()
        nll_n = F.cross_entropy(logits_nv, targets_n[part], reduction="none")
        totals_b.index_add_(0, rows_n[part], nll_n.double())
    return [float(value) for value in totals_b.tolist()]


def _vocab_size(model: ScoringModel, hidden_bth: Tensor) -> int:
    return int(model.logits(hidden_bth[:1, 0]).shape[-1])
