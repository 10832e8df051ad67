"""The negative log-likelihood of whole documents, each alone from its BOS, whatever their length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits are made for a part of the positions at a time: about this many float32 values. An accelerator wants large pieces; a
# processor's caches hold small ones, and a batch of 2,048 tokens is both the fastest there and a third of the memory of 32,768.
_LOGITS = {"cpu": 4 * 1024 * 1024, "accelerator": 32 * 1024 * 1024}
# Rows of a batch are few where they are long.
_TOKENS = {"cpu": 2 * 1024, "accelerator": 32 * 1024}


class ScoringModel(Protocol):
    """What scoring asks of a model: `koine.model`'s decoder and any wrapped causal LM have it."""

    training: bool

    def __call__(self, tokens: Tensor, /) -> Tensor: ...
    def logits(self, hidden: Tensor, /) -> Tensor: ...
    def eval(self) -> object: ...
    def train(self, mode: bool = True) -> object: ...


@contextmanager
def evaluating(model: ScoringModel) -> Iterator[None]:
    """Inference mode, without dropout; the model is given back as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Window:
    """A part of a document's tokens to run the model on, of which the last `scored` predictions count."""

    document: int
    tokens: tuple[int, ...]  # inputs and, shifted by one, targets
    scored: int


def windows(document: int, tokens: Sequence[int], max_length: int) -> list[Window]:
    """Cut `tokens` (BOS first) so that every token after BOS is predicted exactly once.

    A document of at most `max_length` inputs is one window. A longer one is read in windows of `max_length` that
    overlap by half, and a window scores only what the one before did not: every prediction there sees at least
    `max_length // 2` tokens.
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
    """Sum of -ln p (nats) over every token after the first, for each document (token ids, BOS first).

    Rows are padded on the right: causal attention never sees what follows, so a score does not depend on the batch.
    """
    pieces = [
        window for index, tokens in enumerate(documents) for window in windows(index, tokens, max_length)
    ]
    pieces.sort(key=lambda window: len(window.tokens))
    totals = [0.0] * len(documents)
    with evaluating(model):
        for batch in _batches(pieces, batch_size, _TOKENS[_kind(device)]):
            for window, value in zip(batch, _score(model, batch, device), strict=True):
                totals[window.document] += value
    return totals


def _kind(device: torch.device | str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else "accelerator"


def _batches(pieces: Sequence[Window], batch_size: int, most_tokens: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in pieces:  # shortest first, so the newest is the longest
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(window.tokens) > most_tokens):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _score(model: ScoringModel, batch: Sequence[Window], device: torch.device | str) -> list[float]:
    length = max(len(window.tokens) for window in batch) - 1
    tokens = torch.zeros(len(batch), length, dtype=torch.int64)
    targets = torch.full((len(batch), length), -100, dtype=torch.int64)
    for row, window in enumerate(batch):
        ids = torch.tensor(window.tokens, dtype=torch.int64)
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(ids) - 1 - window.scored : len(ids) - 1] = ids[-window.scored :]
    hidden = model(tokens.to(device))
    rows, positions = torch.nonzero(targets != -100, as_tuple=True)
    wanted = targets[rows, positions].to(device)
    rows, positions = rows.to(device), positions.to(device)
    totals = torch.zeros(len(batch), dtype=torch.float64, device=device)
    size = max(1, _LOGITS[_kind(device)] // _vocab_size(model, hidden))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        logits = model.logits(hidden[rows[part], positions[part]]).float()
        nll = F.cross_entropy(logits, wanted[part], reduction="none")
        totals.index_add_(0, rows[part], nll.double())
    return [float(value) for value in totals.tolist()]


def _vocab_size(model: ScoringModel, hidden: Tensor) -> int:
    return int(model.logits(hidden[:1, 0]).shape[-1])
