"""Loss per position: use of distant context, and behaviour beyond the length of training.

Shape suffixes: b batch, t positions, h hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from koine.errors import UserError
from koine.evaluate.bootstrap import bootstrap_interval
from koine.evaluate.log_likelihood import ScoringModel, evaluating

FIRST_EDGE = 8
# Float32 values of the logits that are in memory at once (128 MiB).
_LOGITS = 32 * 1024 * 1024


def bin_edges(length: int) -> list[int]:
    """Return `0, 8, 12, 16, 24, 32, 48, ...`: two bins an octave, up to `length` predictions."""
    edges = [0]
    edge = FIRST_EDGE
    while edge < length:
        edges += [edge, edge * 3 // 2]
        edge *= 2
    return [edge for edge in edges if edge < length] + [length]


def token_losses(
    model: ScoringModel, tokens: Sequence[int], *, device: torch.device | str = "cpu"
) -> list[float]:
    """Return -ln p (nats) of every token after the first, computing the logits in parts."""
    tokens_bt = torch.tensor([list(tokens)], device=device)
    losses: list[float] = []
    with evaluating(model):
        hidden_th = model(tokens_bt[:, :-1])[0]
        targets_t = tokens_bt[0, 1:]
        size = max(1, _LOGITS // int(model.logits(hidden_th[:1]).shape[-1]))
        for start in range(0, len(targets_t), size):
            part = slice(start, start + size)
            losses += F.cross_entropy(
                model.logits(hidden_th[part]).float(), targets_t[part], reduction="none"
            ).tolist()
    return losses


def loss_by_position(
    model: ScoringModel,
    documents: Iterable[Sequence[int]],
    *,
    token_bytes: Callable[[int], int],
    lengths: Sequence[int],
    device: torch.device | str = "cpu",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure nats per token and bits per byte by position, over documents of at least `max(lengths)` tokens.

    Args:
        model: a causal LM.
        documents: token ids, BOS first; only the first `max(lengths)` tokens count.
        token_bytes: returns the number of UTF-8 bytes of a token.
        lengths: in tokens.
        device: where the model is.
        confidence: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `{"documents": n, "bins": [{"start", "end", "nats_per_token", "interval", "bits_per_byte", "tokens"}],
        "lengths": {length: {"nats_per_token", "interval", "bits_per_byte"}}}`. A bin holds the predictions
        `start` to `end - 1`; prediction `i` sees `i + 1` tokens. The entry of a length is the mean of all
        predictions in the first `length` tokens. Intervals are bootstrap intervals of nats per token over
        documents, `None` for one document.

    Raises:
        UserError: where there is no document, or a shorter one.
    """
    longest = max(lengths)
    edges = bin_edges(longest - 1)
    rows: list[list[float]] = []
    sizes: list[list[float]] = []
    for document in documents:
        if len(document) < longest:
            raise UserError(
                f"a document has {len(document)} tokens and the length is {longest}",
                hint="join short documents, or give shorter lengths",
            )
        tokens = list(document[:longest])
        rows.append([0.0, *itertools.accumulate(token_losses(model, tokens, device=device))])
        sizes.append([0.0, *itertools.accumulate(float(token_bytes(token)) for token in tokens[1:])])
    if not rows:
        raise UserError("no document to measure the loss on", hint="give longer texts with --haystack")

    def measure(start: int, end: int) -> dict[str, Any]:
        nats = [row[end] - row[start] for row in rows]
        count = float(end - start)
        size = math.fsum(row[end] - row[start] for row in sizes)
        interval = bootstrap_interval(
            [value / count for value in nats], confidence=confidence, resamples=resamples, seed=seed
        )
        return {
            "nats_per_token": math.fsum(nats) / (count * len(nats)),
            "interval": None if interval is None else list(interval),
            "bits_per_byte": math.fsum(nats) / math.log(2.0) / size if size else None,
        }

    return {
        "documents": len(rows),
        "bins": [
            {"start": start, "end": end, **measure(start, end), "tokens": (end - start) * len(rows)}
            for start, end in itertools.pairwise(edges)
        ],
        "lengths": {str(length): measure(0, length - 1) for length in sorted(lengths)},
    }


def long_documents(
    texts: Iterable[str], encode: Callable[[str], list[int]], *, bos: int, length: int, count: int
) -> tuple[list[list[int]], bool]:
    """Return `count` documents of exactly `length` tokens (BOS first), and whether texts were joined.

    A text of several times the length gives several documents. All texts are joined, with an empty line
    between, only where that gives more documents than the long texts alone, and these are fewer than `count`.
    """
    first = list(itertools.islice(texts, max(2000, 4 * count)))
    found = list(itertools.islice(_cut((encode(text) for text in first), bos, length), count))
    if len(found) == count:
        return found, False
    joined = [token for text in first for token in encode(text + "\n\n")]
    several = list(itertools.islice(_cut([joined], bos, length), count))
    return (several, True) if len(several) > len(found) else (found, False)


def _cut(streams: Iterable[list[int]], bos: int, length: int) -> Iterator[list[int]]:
    step = length - 1
    for stream in streams:
        for start in range(0, len(stream) - step + 1, step):
            yield [bos, *stream[start : start + step]]
