"""Evaluation of a reward model on held-out pairs: accuracy, calibration, correlation with length, by language.

| figure | meaning |
|---|---|
| `loss` | Bradley-Terry loss without margins and centring, nats |
| `accuracy` | mean probability of the label that the scores agree with; a tie is 0.5 |
| `accuracy_length_matched` | the same over pairs of about equal lengths |
| `accuracy_of_longer` | the same for "the longer completion is better": what length alone gives |
| `calibration_error` | expected calibration error of `sigmoid(difference)` |
| `length_correlation` | Pearson correlation of score and completion length, in tokens |
| `length_difference_correlation` | the same of the differences inside a pair, free of how prompts differ |
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from koine.align.reward_scores import completion_scores
from koine.align.source_batches import source_batches
from koine.data.groups import fewest_tokens
from koine.data.shards import TokenSource
from koine.errors import KoineWarning, UserError
from koine.fields import check_integer, check_number
from koine.files import sha256_file
from koine.model.reward_model import RewardModel

BINS = 10
LENGTH_SHARE = 0.1
"""Pairs count as of equal length where the lengths differ by at most this share of the longer one."""
PREFIX = "pair_"
"""Before the figures' names among the metrics of a training."""


class PairScore(NamedTuple):
    """A pair as a reward model scores it.

    probability: that the first completion is the better one. scores, lengths: of both, lengths in tokens.
    """

    language: str
    probability: float
    scores: tuple[float, float]
    lengths: tuple[int, int]


@torch.inference_mode()
def score_pairs(
    model: RewardModel, tokens: TokenSource, *, time: int, rows: int = 4, limit: int | None = None
) -> list[PairScore]:
    """Score the pairs of a token source, in its order.

    Args:
        model: the reward model.
        tokens: pairs, tokenized with the model's tokenizer.
        time: tokens of a row; longer completions are cut.
        rows: rows of a forward pass.
        limit: pairs of each language at most, from the start; None: all.

    Raises:
        UserError: the source holds no pairs, or none that fits a row.
    """
    check_pairs(tokens)
    if tokens.vocab_size > model.vocab_size:
        raise UserError(
            f"the pairs have ids up to {tokens.vocab_size}, the reward model knows {model.vocab_size}",
            where=tokens.path,
            hint="tokenize with the tokenizer of the reward model",
        )
    chosen = _first_of_languages(tokens, limit)
    fitting = [number for number in chosen if fewest_tokens(tokens.segments(number)) <= time]
    if not fitting:
        raise UserError(f"no pair fits a row of {time} tokens", where=tokens.path, hint="choose longer rows")
    if left_out := len(chosen) - len(fitting):
        warnings.warn(
            f"{tokens.path}: {left_out} pairs are left out, whose prompt is longer than a row of {time} tokens",
            KoineWarning,
            stacklevel=2,
        )
    pairs: list[PairScore] = []
    for batch, _ in source_batches(tokens, "pairs", fitting, time=time, rows=rows):
        scores = completion_scores(model, batch.to(model.device)).tolist()
        lengths = batch.completion_lengths.tolist()
        first = 0
        for number, group in enumerate(batch.groups):
            pairs.append(
                PairScore(
                    group.language,
                    group.probability,
                    (scores[first], scores[first + 1]),
                    (lengths[first], lengths[first + 1]),
                )
            )
            first += int((batch.group_of == number).sum())
    return pairs


def _first_of_languages(tokens: TokenSource, limit: int | None) -> list[int]:
    """Return the numbers of the first `limit` groups of each language."""
    counts: dict[str, int] = {}
    chosen = []
    for number, code in enumerate(tokens.languages.tolist()):
        counts[code] = counts.get(code, 0) + 1
        if limit is None or counts[code] <= limit:
            chosen.append(number)
    return chosen


def evaluate_pairs(
    pairs: Sequence[PairScore], *, length_share: float = LENGTH_SHARE, bins: int = BINS
) -> dict[str, Any]:
    """Return the figures of all pairs and of each language, the worst language, and the calibration's bins.

    Args:
        pairs: what `score_pairs` returned.
        length_share: difference of lengths up to which pairs are of equal length, as a share of the longer.
        bins: of the calibration; they divide the confidence from 0.5 to 1 evenly.

    Raises:
        UserError: there is no pair, or a bound is out of its range.
    """
    check_number("length_share", length_share, low=0, high=1)
    check_integer("bins", bins, low=1)
    if not pairs:
        raise UserError("there is no pair to evaluate on", hint="give pairs with prompt, chosen and rejected")
    codes = sorted({pair.language for pair in pairs})
    languages = {
        code: pair_figures([pair for pair in pairs if pair.language == code], length_share, bins)
        for code in codes
    }
    return {
        "overall": pair_figures(pairs, length_share, bins),
        "languages": languages,
        "worst_language": min(codes, key=lambda code: languages[code]["accuracy"] or 0.0),
        "length_share": length_share,
        "calibration": calibration_bins(pairs, bins),
    }


def pair_figures(pairs: Sequence[PairScore], length_share: float, bins: int) -> dict[str, float | None]:
    """Return the figures of some pairs (see the module); None where there is nothing to compute one of."""
    probability, difference, scores, lengths = _arrays(pairs)
    right = _agreement(difference, probability)
    length_difference = lengths[:, 0] - lengths[:, 1]
    matched = np.abs(length_difference) <= length_share * lengths.max(axis=1)
    loss = probability * np.logaddexp(0, -difference) + (1 - probability) * np.logaddexp(0, difference)
    return {
        "pairs": len(pairs),
        "loss": float(loss.mean()),
        "accuracy": float(right.mean()),
        "accuracy_length_matched": float(right[matched].mean()) if matched.any() else None,
        "pairs_length_matched": int(matched.sum()),
        "accuracy_of_longer": float(_agreement(length_difference, probability).mean()),
        "calibration_error": expected_calibration_error(calibration_bins(pairs, bins)),
        "length_correlation": correlation(scores.reshape(-1), lengths.reshape(-1)),
        "length_difference_correlation": correlation(difference, length_difference),
    }


def calibration_bins(pairs: Sequence[PairScore], bins: int) -> list[dict[str, Any]]:
    """Return the pairs by confidence: `low`, `high`, `pairs`, and the means `confidence` and `accuracy`.

    The confidence of a pair is `sigmoid(|difference|)`, from 0.5 to 1: the probability that the completion with
    the higher score is the better one. `accuracy` is how often it is. Which one is called the first changes
    nothing. The means of an empty bin are None.
    """
    probability, difference, _, _ = _arrays(pairs)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = _agreement(difference, probability)
    edges = np.linspace(0.5, 1, bins + 1)
    at = np.clip(np.floor((confidence - 0.5) * 2 * bins), 0, bins - 1).astype(int)
    found = []
    for number in range(bins):
        inside = at == number
        found.append(
            {
                "low": float(edges[number]),
                "high": float(edges[number + 1]),
                "pairs": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if inside.any() else None,
                "accuracy": float(right[inside].mean()) if inside.any() else None,
            }
        )
    return found


def expected_calibration_error(bins: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean over pairs of the gap between confidence and accuracy of their bin (arXiv 1706.04599)."""
    total = sum(one["pairs"] for one in bins)
    gaps = (one["pairs"] * abs(one["confidence"] - one["accuracy"]) for one in bins if one["pairs"])
    return float(sum(gaps) / total)


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """Return Pearson's correlation; None where one of the two is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _agreement(difference: NDArray[np.float64], probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of the label that the sign of each difference agrees with; 0.5 for none."""
    agreement: NDArray[np.float64] = (1 + np.sign(difference) * (2 * probability - 1)) / 2
    return agreement


def _arrays(
    pairs: Sequence[PairScore],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return labels `[n]`, differences of scores `[n]`, scores `[n, 2]` and lengths `[n, 2]`."""
    scores = np.array([pair.scores for pair in pairs], dtype=np.float64)
    lengths = np.array([pair.lengths for pair in pairs], dtype=np.float64)
    probability = np.array([pair.probability for pair in pairs], dtype=np.float64)
    return probability, scores[:, 0] - scores[:, 1], scores, lengths


class RewardProbe:
    """An `evaluate` function for the training loop: figures on held-out pairs, of which the first is the loss.

    The metrics are `pair_loss`, `pair_accuracy` and so on, and of each language `pair_accuracy/de`.
    """

    def __init__(self, tokens: TokenSource, *, time: int, rows: int = 4, limit: int | None = None) -> None:
        """tokens: held-out pairs. The other arguments are those of `score_pairs`."""
        self.tokens, self.time, self.rows, self.limit = tokens, time, rows, limit
        self.languages = sorted(set(tokens.languages.tolist()))

    def evaluation(self, model: RewardModel) -> dict[str, Any]:
        """Return all figures (`evaluate_pairs`)."""
        return evaluate_pairs(
            score_pairs(model, self.tokens, time=self.time, rows=self.rows, limit=self.limit)
        )

    def __call__(self, model: Any, steps_done: int) -> dict[str, float]:
        return tracked_figures(self.evaluation(model))

    @property
    def names(self) -> list[str]:
        """Names of the figures; one is left out where nothing can be computed, such as a correlation."""
        return [PREFIX + one for one in _TRACKED] + [f"{PREFIX}accuracy/{code}" for code in self.languages]

    def identity(self) -> dict[str, Any]:
        """Return the pairs and how they are read, as JSON values."""
        pairs = sha256_file(self.tokens.path / "manifest.json")
        return {"pairs": pairs, "time": self.time, "limit": self.limit}


def tracked_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a training from what `evaluate_pairs` returned."""
    figures = {PREFIX + name: found["overall"][name] for name in _TRACKED}
    for code, of_language in found["languages"].items():
        figures[f"{PREFIX}accuracy/{code}"] = of_language["accuracy"]
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


_TRACKED = (
    "loss", "accuracy", "accuracy_length_matched", "calibration_error", "length_difference_correlation",
)  # fmt: skip


def evaluation_blocks(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of `evaluate_pairs` as blocks of a report: a table by language, and the calibration."""
    columns = ["language", *_COLUMNS.values()]
    share = f"{100 * found['length_share']:g} %"
    rows = [
        [code, *(_text(name, figures[name]) for name in _COLUMNS)]
        for code, figures in {"all": found["overall"], **found["languages"]}.items()
    ]
    worst = found["worst_language"]
    title = (
        f"Held-out pairs; worst language: {worst}. Lengths are matched where they differ by {share} at most."
    )
    bins = [one for one in found["calibration"] if one["pairs"]]
    return [
        {"kind": "table", "title": title, "columns": columns, "rows": rows},
        {
            "kind": "table",
            "title": "Calibration: how often the completion with the higher score is the better one",
            "columns": ["confidence", "pairs", "mean confidence", "accuracy"],
            "rows": [
                [
                    f"{one['low']:.2f} to {one['high']:.2f}",
                    f"{one['pairs']:,}",
                    f"{one['confidence']:.3f}",
                    f"{one['accuracy']:.3f}",
                ]
                for one in bins
            ],
        },
    ]


_COLUMNS = {
    "pairs": "pairs",
    "loss": "loss",
    "accuracy": "accuracy",
    "accuracy_length_matched": "length-matched",
    "accuracy_of_longer": "longer wins",
    "calibration_error": "calibration error",
    "length_correlation": "length correlation",
    "length_difference_correlation": "in a pair",
}


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if name == "pairs" else f"{value:.3f}"


EVALUATION = "reward_evaluation.json"
"""File in a reward model's folder with the figures on held-out pairs."""


def open_pairs(path: Path, tokenizer_fingerprint: str | None) -> TokenSource:
    """Open held-out pairs; raises `UserError` for other groups, and for pairs of another tokenizer."""
    tokens = TokenSource(path)
    check_pairs(tokens)
    if tokenizer_fingerprint is not None and tokens.tokenizer_fingerprint != tokenizer_fingerprint:
        raise UserError(
            "tokenized with another tokenizer than the reward model's",
            where=path,
            hint="run `koine data tokenize` again with the tokenizer of the model",
        )
    return tokens


def check_pairs(tokens: TokenSource) -> None:
    """Raise `UserError` for a token source that holds no pairs."""
    if tokens.kind != "preferences":
        held = "documents" if tokens.kind == "documents" else f"{tokens.kind} completions"
        raise UserError(
            f"holds {held}, and a reward model learns from pairs",
            where=tokens.path,
            hint="tokenize prompt, chosen and rejected with --kind preferences",
        )
