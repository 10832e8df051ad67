"""Predict the cost of adapting a model to languages, from its tokenizer and pretraining text alone.

Two figures are ranked, and the ranks averaged:

- **compression**: tokens per byte under the model's tokenizer. Longer sequences hold fewer bytes a step.
- **script overlap**: the share of the language's letters that the primary languages' text has too. A letter
  never seen has to be learnt from nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from koine.errors import UserError, did_you_mean
from koine.tokenizer.token_bytes import AnyTokenizer, scored_lengths

SEEN_SHARE = 1e-5
"""A letter counts as seen if it is at least this share of the primary languages' letters."""


@dataclass(frozen=True)
class Expected:
    """Expected adaptation cost of one language; a higher `cost` is a more expensive adaptation."""

    language: str
    tokens_per_byte: float
    script_overlap: float
    cost: float


def predict_costs(
    tokenizer: AnyTokenizer, texts: Mapping[str, Sequence[str]], *, primary: Iterable[str]
) -> list[Expected]:
    """Rank the languages of `texts` that are not `primary` by expected adaptation cost, highest first.

    `cost` is the mean of the two ranks, from 0 (cheapest) to 1. Raises `UserError` if a primary language has
    no text, or there is no other language.
    """
    known = set(primary)
    for code in sorted(known - texts.keys()):
        raise UserError(f"no text of the primary language '{code}'", hint=did_you_mean(code, texts))
    seen: Counter[str] = Counter()
    for code in known & texts.keys():
        seen.update(_letters(texts[code]))
    expanded = [code for code in texts if code not in known]
    if not seen or not expanded:
        raise UserError(
            "no text of the primary languages" if not seen else "no language beside the primary ones",
            hint="give text of both, and name the primary ones",
        )
    total = seen.total()
    familiar = {letter for letter, count in seen.items() if count >= SEEN_SHARE * total}
    rate, overlap = {}, {}
    for code in expanded:
        size = sum(len(text.encode("utf-8")) for text in texts[code])
        lengths, _ = scored_lengths(tokenizer, texts[code], tokenizer.encode_batch(texts[code]))
        rate[code] = sum(lengths) / max(size, 1)
        letters = _letters(texts[code])
        overlap[code] = sum(letters[letter] for letter in familiar) / max(letters.total(), 1)
    by_rate, by_overlap = ranks(rate), ranks({code: -value for code, value in overlap.items()})
    found = [
        Expected(code, rate[code], overlap[code], (by_rate[code] + by_overlap[code]) / 2) for code in expanded
    ]
    return sorted(found, key=lambda one: (-one.cost, one.language))


def _letters(texts: Sequence[str]) -> Counter[str]:
    """Count the letters of texts."""
    return Counter(character for text in texts for character in text if character.isalpha())


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Return ranks from 0 (smallest) to 1 (largest); equal values share their mean rank."""
    ordered = sorted(values, key=lambda code: values[code])
    found: dict[str, float] = {}
    start = 0
    while start < len(ordered):
        end = start
        while end < len(ordered) and values[ordered[end]] == values[ordered[start]]:
            end += 1
        for code in ordered[start:end]:
            found[code] = (start + end - 1) / 2 / max(len(ordered) - 1, 1)
        start = end
    return found


def spearman(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    """Compute Spearman's rank correlation over the keys of both; nan if one side is constant."""
    keys = [key for key in left if key in right]
    a, b = ranks({key: left[key] for key in keys}), ranks({key: right[key] for key in keys})
    mean_a, mean_b = (sum(side.values()) / max(len(keys), 1) for side in (a, b))
    covariance = sum((a[key] - mean_a) * (b[key] - mean_b) for key in keys)
    spread = (
        sum((a[key] - mean_a) ** 2 for key in keys) * sum((b[key] - mean_b) ** 2 for key in keys)
    ) ** 0.5
    return covariance / spread if spread else float("nan")
