"""How well tokenizers serve languages: compression, fertility, parity, and how evenly their vocabulary is used.

| measure | definition |
|---|---|
| `bytes_per_token` | UTF-8 bytes of the text over its tokens |
| `characters_per_token` | code points over tokens |
| `tokens_per_word` | tokens over words, where words are runs of non-spaces; absent where the script writes none |
| `tokens_per_sentence` | tokens over records that have a translation into English, in parallel text |
| `parity` | tokens of these records over those of their English translations (Petrov et al. 2023, "premium") |
| `renyi_efficiency` | H_2.5(p) / log V of the token frequencies p (Zouhar et al. 2023) |
| `unknown_share` | share of the bytes that the tokenizer reads as unknown (`[UNK]`) or drops; **each such byte counts as one token** in all rows |
| `partial_character_share` | share of tokens that are not whole characters: bytes, or pieces of characters |
| `distinct_tokens` | different tokens that the text uses |
| `cost_per_megabyte` | price of 10^6 bytes of text, at a given price of 10^6 tokens |

Unknown text counts as its bytes because one `[UNK]` for a word would be the best compression of all: a tokenizer that does not know a script
would win on it.

Groups (all languages, and each cluster) hold the means over their languages, so that a large language does not hide a small one, and the
Gini coefficient of what a text costs: of parity in parallel text, else of tokens per byte (0: all pay the same).
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koine.errors import KoineWarning, UserError
from koine.languages import CLUSTERS, language
from koine.tokenizer.token_bytes import AnyTokenizer, scored_lengths

RENYI_ORDER = 2.5
"""Zouhar et al. 2023 found that this order predicts translation quality best."""

# Scripts that are written without spaces between words.
UNSPACED_SCRIPTS = frozenset(
    {"Hans", "Hant", "Hani", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Java", "Bali", "Talu", "Lana"}
)
REFERENCE = "en"
BATCH_BYTES = 2_000_000

Measures = dict[str, Any]
"""Numbers by name; for all languages together also `scripts`: tokens of the vocabulary, and used ones, by script."""


@dataclass(frozen=True)
class MeasuredText:
    """A piece of text to measure. Units of one `parallel_id` are translations of each other."""

    language: str
    text: str
    parallel_id: str | None = None


@dataclass
class _Text:
    """What does not depend on the tokenizer, of one language."""

    bytes: int = 0
    characters: int = 0
    words: int = 0
    parallel: dict[str, int] = field(default_factory=dict)  # identifier -> place in the token counts


@dataclass
class _Count:
    """What one tokenizer made of one language."""

    tokens: int = 0
    unknown: int = 0  # bytes, each counted as a token
    frequencies: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    parallel: list[int] = field(default_factory=list)


def measure(
    tokenizers: Mapping[str, AnyTokenizer],
    units: Iterable[MeasuredText],
    *,
    languages: Collection[str] | None = None,
    price_per_million: float | None = None,
) -> dict[str, dict[str, Measures]]:
    """tokenizer -> language -> measure, and tokenizer -> `overall` and `cluster:NAME` for the groups.

    The text is read once, in batches; memory grows with vocabularies and languages, and with the number of parallel units, not with the
    text. Special tokens in the text count as plain text.

    languages: the codes to report; English among `units` beside them serves as the reference of parity alone.

    A tokenizer that reads text as unknown or drops it is named in a `KoineWarning`.

    Raises `UserError` where there is no text at all.
    """
    if not tokenizers:
        raise UserError("no tokenizer to measure", hint="give at least one")
    texts: dict[str, _Text] = {}
    counts: dict[str, dict[str, _Count]] = {name: {} for name in tokenizers}
    seconds = dict.fromkeys(tokenizers, 0.0)
    for batch in _batches(units):
        by_language: dict[str, list[MeasuredText]] = {}
        for unit in batch:
            by_language.setdefault(unit.language, []).append(unit)
        for code, group in by_language.items():
            places = _read(texts.setdefault(code, _Text()), group, code)
            for name, tokenizer in tokenizers.items():
                start = time.perf_counter()
                encoded = tokenizer.encode_batch([unit.text for unit in group])
                seconds[name] += time.perf_counter() - start
                lengths, unknown = scored_lengths(tokenizer, [unit.text for unit in group], encoded)
                count = counts[name].setdefault(code, _Count())
                count.unknown += sum(unknown)
                _count(count, encoded, lengths, places, tokenizer.vocab_size)
    shown = [code for code in sorted(texts) if languages is None or code in languages]
    if not shown:
        raise UserError("no text to measure", hint="give text in the languages asked for")
    total = sum(text.bytes for text in texts.values())
    _say_unknown(texts, counts, shown)
    result = {}
    for name, tokenizer in tokenizers.items():
        partial = _partial(tokenizer)
        rows = {
            code: _measures(texts, counts[name], code, tokenizer.vocab_size, partial, price_per_million)
            for code in shown
        }
        groups = _groups(rows)
        groups["overall"]["vocabulary_size"] = tokenizer.vocab_size
        groups["overall"]["megabytes_per_second"] = total / 1e6 / max(seconds[name], 1e-9)
        used = np.sum([counts[name][code].frequencies for code in shown], axis=0) > 0
        groups["overall"]["scripts"] = scripts_of_vocabulary(tokenizer, used)
        result[name] = {**rows, **groups}
    return result


def _say_unknown(
    texts: Mapping[str, _Text], counts: Mapping[str, Mapping[str, _Count]], codes: Sequence[str]
) -> None:
    for name, by_language in counts.items():
        shares = {code: by_language[code].unknown / max(texts[code].bytes, 1) for code in codes}
        worst = [code for code in sorted(shares, key=lambda code: -shares[code]) if shares[code] >= 0.0005]
        if worst:
            named = ", ".join(f"{shares[code]:.1%} of {code}" for code in worst[:5])
            warnings.warn(
                f"{name} has no tokens for {named}{' and others' if len(worst) > 5 else ''}: unknown text counts as a token a byte",
                KoineWarning,
                stacklevel=3,
            )


def _batches(units: Iterable[MeasuredText]) -> Iterator[list[MeasuredText]]:
    batch: list[MeasuredText] = []
    size = 0
    for unit in units:
        batch.append(unit)
        size += len(unit.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read(text: _Text, units: Sequence[MeasuredText], code: str) -> list[int]:
    """Add the units to the language's text; the places in the list of those that are the first with their parallel identifier."""
    spaced = language(code).script not in UNSPACED_SCRIPTS if code != "und" else False
    places = []
    for place, unit in enumerate(units):
        text.bytes += len(unit.text.encode("utf-8"))
        text.characters += len(unit.text)
        text.words += len(unit.text.split()) if spaced else 0
        if unit.parallel_id is not None and unit.parallel_id not in text.parallel:
            text.parallel[unit.parallel_id] = len(text.parallel)
            places.append(place)
    return places


def _count(
    count: _Count,
    encoded: Sequence[Sequence[int]],
    lengths: Sequence[int],
    places: Sequence[int],
    vocab_size: int,
) -> None:
    count.tokens += sum(lengths)
    count.parallel += [lengths[place] for place in places]
    flat = np.fromiter(
        (token for ids in encoded for token in ids), dtype=np.int64, count=sum(map(len, encoded))
    )
    if not count.frequencies.size:
        count.frequencies = np.zeros(vocab_size, dtype=np.int64)
    count.frequencies += np.bincount(flat, minlength=vocab_size)


def _partial(tokenizer: AnyTokenizer) -> NDArray[np.bool_]:
    """Which tokens do not stand for whole characters."""
    return np.array([not _whole(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])


def _whole(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _measures(
    texts: Mapping[str, _Text],
    counts: Mapping[str, _Count],
    code: str,
    vocab_size: int,
    partial: NDArray[np.bool_],
    price: float | None,
) -> Measures:
    text, count = texts[code], counts[code]
    tokens = max(count.tokens, 1)
    row: Measures = {
        "bytes": text.bytes,
        "tokens": count.tokens,
        "bytes_per_token": text.bytes / tokens,
        "characters_per_token": text.characters / tokens,
        "renyi_efficiency": renyi_efficiency(count.frequencies, vocab_size),
        "unknown_share": count.unknown / max(text.bytes, 1),
        "partial_character_share": (float(count.frequencies[partial].sum()) + count.unknown) / tokens,
        "distinct_tokens": int((count.frequencies > 0).sum()),
    }
    if text.words:
        row["tokens_per_word"] = count.tokens / text.words
    shared = text.parallel.keys() & texts[REFERENCE].parallel.keys() if REFERENCE in texts else set()
    if shared:
        here = sum(count.parallel[text.parallel[key]] for key in shared)
        reference, places = counts[REFERENCE], texts[REFERENCE].parallel
        there = sum(reference.parallel[places[key]] for key in shared)
        row["parallel_sentences"] = len(shared)
        row["tokens_per_sentence"] = here / len(shared)
        row["parity"] = here / max(there, 1)
    if price is not None:
        row["cost_per_megabyte"] = tokens / text.bytes * price
    return row


def renyi_efficiency(frequencies: NDArray[np.int64], vocab_size: int, *, order: float = RENYI_ORDER) -> float:
    """H_order(p) / log(vocab_size), with H_a(p) = log(sum p^a) / (1 - a): 1 where every token is as frequent as every other."""
    total = frequencies.sum()
    if not total or vocab_size < 2:
        return 0.0
    p = frequencies[frequencies > 0] / total
    return float(math.log((p**order).sum()) / (1.0 - order) / math.log(vocab_size))


def gini(values: Sequence[float]) -> float:
    """Gini coefficient: half the mean absolute difference of all pairs, over the mean; 0 where all are equal."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    size, total = len(ordered), ordered.sum()
    if size < 2 or total <= 0:
        return 0.0
    return float((2 * np.arange(1, size + 1) - size - 1) @ ordered / (size * total))


def _groups(rows: Mapping[str, Measures]) -> dict[str, Measures]:
    groups = {"overall": list(rows)}
    for cluster in CLUSTERS:
        members = [code for code in rows if code != "und" and language(code).cluster == cluster]
        if members:
            groups[f"cluster:{cluster}"] = members
    found = {}
    for name, members in groups.items():
        inside = [rows[code] for code in members]
        mean: Measures = {"languages": len(members)}
        for key in inside[0] | dict.fromkeys(key for row in inside for key in row):
            values = [row[key] for row in inside if key in row]
            if key in ("bytes", "tokens", "parallel_sentences"):
                mean[key] = sum(values)
            else:
                mean[key] = sum(values) / len(values)
        parities = [row["parity"] for row in inside if "parity" in row]
        costs = parities if len(parities) == len(inside) else [1.0 / row["bytes_per_token"] for row in inside]
        mean["gini"] = gini(costs)
        found[name] = mean
    return found


def scripts_of_vocabulary(tokenizer: AnyTokenizer, used: NDArray[np.bool_]) -> dict[str, dict[str, int]]:
    """script -> `tokens` in the vocabulary, and those of them `used`. Tokens without letters are `Zyyy`, parts of characters `bytes`."""
    found: dict[str, dict[str, int]] = {}
    for index in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(index)
        if not data:
            continue
        row = found.setdefault(script_of(data), {"tokens": 0, "used": 0})
        row["tokens"] += 1
        row["used"] += int(used[index])
    return dict(sorted(found.items(), key=lambda item: -item[1]["tokens"]))


def script_of(data: bytes) -> str:
    """ISO 15924 code of the script of most of a token's letters."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes"
    scripts = [found for character in text if (found := _script(character)) not in ("Zyyy", "Zinh", "Zzzz")]
    return max(scripts, key=scripts.count) if scripts else "Zyyy"


@functools.cache
def _script(character: str) -> str:
    from fontTools.unicodedata import script

    return str(script(character))
