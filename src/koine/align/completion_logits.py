"""Next-token logits of one or more models over completions, a few positions at a time.

Shape suffixes: b rows, t positions, h hidden size, n completion tokens of a chunk, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from koine.model.language_model import LanguageModel

MOST_TOKENS = 2048
"""Tokens of a forward pass, with padding."""
MOST_LOGITS = 4 * 1024 * 1024
"""Logits of each model that are in memory at once."""


class Continuation(NamedTuple):
    """Token ids of a prompt and of what follows it."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


class Chunk(NamedTuple):
    """Completion tokens, and the logits that predict them.

    number: `[n]`, the continuation of each token.
    tokens: `[n]`, ids.
    logits: one `[n, v]` for each model.
    """

    number: Tensor
    tokens: Tensor
    logits: tuple[Tensor, ...]


def completion_logits(
    models: Sequence[LanguageModel], continuations: Sequence[Continuation]
) -> Iterator[Chunk]:
    """Yield the logits of every completion token, shortest continuations first.

    Rows are padded on the right, which a causal model does not see. The caller sets the models to evaluation.
    Each needs a prompt of at least one token.
    """
    device = next(models[0].parameters()).device
    for batch in _batches(continuations):
        time = max(len(one.prompt) + len(one.completion) for one in batch.values()) - 1
        tokens_bt = torch.zeros(len(batch), time, dtype=torch.int64)
        rows: list[int] = []
        columns: list[int] = []
        numbers: list[int] = []
        targets: list[int] = []
        for row, (number, (prompt, completion)) in enumerate(batch.items()):
            ids = torch.tensor([*prompt, *completion][:-1], dtype=torch.int64)
            tokens_bt[row, : len(ids)] = ids
            rows += [row] * len(completion)
            columns += range(len(prompt) - 1, len(prompt) + len(completion) - 1)
            numbers += [number] * len(completion)
            targets += completion
        hidden = [model(tokens_bt.to(device))[rows, columns] for model in models]
        size = max(1, MOST_LOGITS // max(model.vocab_size for model in models))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = tuple(
                model.logits(hidden_nh[part]) for model, hidden_nh in zip(models, hidden, strict=True)
            )
            yield Chunk(
                torch.tensor(numbers[part], device=device), torch.tensor(targets[part], device=device), logits
            )


def _batches(continuations: Sequence[Continuation]) -> Iterator[dict[int, Continuation]]:
    """Yield continuations by number, in batches of at most `MOST_TOKENS` padded tokens."""
    batch: dict[int, Continuation] = {}
    order = sorted(
        (len(one.prompt) + len(one.completion), number)
        for number, one in enumerate(continuations)
        if one.completion
    )
    for length, number in order:
        if batch and (len(batch) + 1) * length > MOST_TOKENS:
            yield batch
            batch = {}
        batch[number] = continuations[number]
    if batch:
        yield batch


def mean_log_likelihoods(model: LanguageModel, continuations: Sequence[Continuation]) -> list[float]:
    """Return the log-likelihood per token of each completion, in nats; all need tokens."""
    sums = torch.zeros(len(continuations), dtype=torch.float64)
    for chunk in completion_logits([model], continuations):
        logits_nv = chunk.logits[0].float()
        found_n = logits_nv.log_softmax(dim=-1).gather(1, chunk.tokens[:, None])[:, 0]
        sums.index_add_(0, chunk.number.cpu(), found_n.double().cpu())
    lengths = torch.tensor([len(one.completion) for one in continuations], dtype=torch.float64)
    return [float(value) for value in (sums / lengths).tolist()]
