"""Measure tokenizers by language: compression, fertility, parity, and how evenly the vocabulary is used.

| measure | definition |
|---|---|
| `bytes_per_token` | UTF-8 bytes of the text over its tokens |
| `characters_per_token` | code points over tokens |
| `tokens_per_word` | tokens over words (fertility), runs of non-spaces; absent for unspaced scripts |
| `tokens_per_sentence` | tokens over records that have a translation into English, in parallel text |
| `parity` | tokens of these records over those of their translations (Petrov et al. 2023, "premium") |
| `renyi_efficiency` | H_2.5(p) / log V of the token frequencies p (Zouhar et al. 2023) |
| `unknown_share` | share of bytes read as unknown (`[UNK]`) or dropped; **each counts as one token** |
| `partial_character_share` | share of tokens that are not whole characters: bytes, or pieces of characters |
| `distinct_tokens` | different tokens that the text uses |
| `cost_per_megabyte` | price of 10^6 bytes of text, at a given price of 10^6 tokens |

Unknown text counts as its bytes because one `[UNK]` for a word would be the best compression of all. A
tokenizer that does not know a script would win on it.

Groups (all languages, and each cluster) hold the means over their languages, so that a large language does
not hide a small one. They also hold the Gini coefficient of a text's cost (0: all languages pay the same):
the cost is parity in parallel text, else tokens per byte.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koine.errors import KoineWarning, UserError
from koine.languages import CLUSTERS, language
from koine.tokenizer.loaders import open_tokenizer
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
"""Numbers by name; `overall` also holds `scripts`: tokens of the vocabulary, and used ones, by script."""


@dataclass(frozen=True)
class MeasuredText:
    """A text to measure. Texts of the same `parallel_id` are translations of each other."""

    language: str
    text: str
    parallel_id: str | None = None


@dataclass
class _Text:
    """Totals of one language's text that no tokenizer changes."""

    bytes: int = 0
    characters: int = 0
    words: int = 0
    parallel: dict[str, int] = field(default_factory=dict)
    """parallel_id -> index in `_Count.parallel`."""


@dataclass
class _Count:
    """Token counts of one tokenizer for one language."""

    tokens: int = 0
    unknown: int = 0
    """Bytes that are read as unknown; each counts as a token."""
    frequencies: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Occurrences of each token, `[vocab_size]`."""
    parallel: list[int] = field(default_factory=list)
    """Tokens of each parallel text."""


def measure(
    tokenizers: Mapping[str, AnyTokenizer | str | Path],
    texts: Mapping[str, Iterable[str]] | Iterable[MeasuredText],
    *,
    languages: Collection[str] | None = None,
    price_per_million: float | None = None,
) -> dict[str, dict[str, Measures]]:
    """Measure tokenizers on the same texts, by language and over groups of languages.

    The texts are read once, in batches. Memory grows with vocabularies, languages and the number of parallel
    texts, not with their length. Special tokens in the texts count as plain text.

    Example:
        >>> from koine.tokenizer import measure
        >>> found = measure({"ours": "tokenizer", "llama": "models/llama"}, {"de": german, "sw": swahili})
        >>> found["ours"]["sw"]["bytes_per_token"]

    Args:
        tokenizers: by name, each an open tokenizer or the path of one that `open_tokenizer` opens.
        texts: language code -> texts; or `MeasuredText` items, which can say that texts are translations.
        languages: codes to report; `None`: all. Other English text is then only the reference of parity.
        price_per_million: price of 10^6 tokens, for `cost_per_megabyte`.

    Returns:
        dict: Measures by tokenizer and language; `overall` and `cluster:NAME` hold means over languages.

    Raises:
        UserError: there is no tokenizer or no text, or a path holds no tokenizer.

    A `KoineWarning` names each tokenizer that reads text as unknown or drops it.
    """
    if not tokenizers:
        raise UserError("no tokenizer to measure", hint="give at least one")
    opened = {
        name: open_tokenizer(one) if isinstance(one, str | Path) else one for name, one in tokenizers.items()
    }
    totals: dict[str, _Text] = {}
    counts: dict[str, dict[str, _Count]] = {name: {} for name in opened}
    seconds = dict.fromkeys(opened, 0.0)
    for batch in _batches(_with_language(texts)):
        by_language: dict[str, list[MeasuredText]] = {}
        for one in batch:
            by_language.setdefault(one.language, []).append(one)
        for code, group in by_language.items():
            places = _add_texts(totals.setdefault(code, _Text()), group, code)
            plain = [one.text for one in group]
            for name, tokenizer in opened.items():
                start = time.perf_counter()
                encoded = tokenizer.encode_batch(plain)
                seconds[name] += time.perf_counter() - start
                lengths, unknown = scored_lengths(tokenizer, plain, encoded)
                count = counts[name].setdefault(code, _Count())
                count.unknown += sum(unknown)
                _add_tokens(count, encoded, lengths, places, tokenizer.vocab_size)
    reported = [code for code in sorted(totals) if languages is None or code in languages]
    if not reported:
        raise UserError("no text to measure", hint="give text in the languages asked for")
    _warn_of_unknown(totals, counts, reported)
    size = sum(text.bytes for text in totals.values())
    result = {}
    for name, tokenizer in opened.items():
        rows = _rows(totals, counts[name], reported, tokenizer, price_per_million)
        groups = _groups(rows)
        groups["overall"]["vocabulary_size"] = tokenizer.vocab_size
        groups["overall"]["megabytes_per_second"] = size / 1e6 / max(seconds[name], 1e-9)
        used = np.sum([counts[name][code].frequencies for code in reported], axis=0) > 0
        groups["overall"]["scripts"] = scripts_of_vocabulary(tokenizer, used)
        result[name] = {**rows, **groups}
    return result


def _with_language(texts: Mapping[str, Iterable[str]] | Iterable[MeasuredText]) -> Iterator[MeasuredText]:
    """Yield texts with their language, whichever way they were given."""
    if not isinstance(texts, Mapping):
        yield from texts
        return
    for given, several in texts.items():
        code = given if given == "und" else language(given).code
        for text in several:
            yield MeasuredText(code, text)


def _warn_of_unknown(
    texts: Mapping[str, _Text], counts: Mapping[str, Mapping[str, _Count]], codes: Sequence[str]
) -> None:
    for name, by_language in counts.items():
        shares = {code: by_language[code].unknown / max(texts[code].bytes, 1) for code in codes}
        worst = [code for code in sorted(shares, key=lambda code: -shares[code]) if shares[code] >= 0.0005]
        if worst:
            named = ", ".join(f"{shares[code]:.1%} of {code}" for code in worst[:5])
            warnings.warn(
                f"{name} has no tokens for {named}{' and others' if len(worst) > 5 else ''}: "
                "unknown text counts as a token a byte",
                KoineWarning,
                stacklevel=3,
            )


def _batches(texts: Iterable[MeasuredText]) -> Iterator[list[MeasuredText]]:
    batch: list[MeasuredText] = []
    size = 0
    for one in texts:
        batch.append(one)
        size += len(one.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add_texts(total: _Text, texts: Sequence[MeasuredText], code: str) -> list[int]:
    """Add texts to a language's totals.

    Returns the indices of the texts that are the first with their `parallel_id`.
    """
    spaced = language(code).script not in UNSPACED_SCRIPTS if code != "und" else False
    places = []
    for place, one in enumerate(texts):
        total.bytes += len(one.text.encode("utf-8"))
        total.characters += len(one.text)
        total.words += len(one.text.split()) if spaced else 0
        if one.parallel_id is not None and one.parallel_id not in total.parallel:
            total.parallel[one.parallel_id] = len(total.parallel)
            places.append(place)
    return places


def _add_tokens(
    count: _Count,
    encoded: Sequence[Sequence[int]],
    lengths: Sequence[int],
    places: Sequence[int],
    vocab_size: int,
) -> None:
    """Add the tokens of one batch to a tokenizer's counts for a language."""
    count.tokens += sum(lengths)
    count.parallel += [lengths[place] for place in places]
    flat = np.fromiter(
        (token for ids in encoded for token in ids), dtype=np.int64, count=sum(map(len, encoded))
    )
    if not count.frequencies.size:
        count.frequencies = np.zeros(vocab_size, dtype=np.int64)
    count.frequencies += np.bincount(flat, minlength=vocab_size)


def _partial(tokenizer: AnyTokenizer) -> NDArray[np.bool_]:
    """Return for each token whether it is less than whole characters, `[vocab_size]`."""
    return np.array([not _whole(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])


def _whole(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _rows(
    texts: Mapping[str, _Text],
    counts: Mapping[str, _Count],
    codes: Sequence[str],
    tokenizer: AnyTokenizer,
    price: float | None,
) -> dict[str, Measures]:
    """Return one tokenizer's measures by language."""
    partial = _partial(tokenizer)
    return {code: _measures(texts, counts, code, tokenizer.vocab_size, partial, price) for code in codes}


def _measures(
    texts: Mapping[str, _Text],
    counts: Mapping[str, _Count],
    code: str,
    vocab_size: int,
    partial: NDArray[np.bool_],
    price: float | None,
) -> Measures:
    """Return one tokenizer's measures for the language `code`; parity is relative to English in `texts`."""
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
    """Return H_order(p) / log(vocab_size), where H_a(p) = log(sum p^a) / (1 - a).

    It is 1 where all tokens are equally frequent.
    """
    total = frequencies.sum()
    if not total or vocab_size < 2:
        return 0.0
    p = frequencies[frequencies > 0] / total
    return float(math.log((p**order).sum()) / (1.0 - order) / math.log(vocab_size))


def gini(values: Sequence[float]) -> float:
    """Compute the Gini coefficient: half the mean absolute difference of all pairs, over the mean."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    size, total = len(ordered), ordered.sum()
    if size < 2 or total <= 0:
        return 0.0
    return float((2 * np.arange(1, size + 1) - size - 1) @ ordered / (size * total))


def _groups(rows: Mapping[str, Measures]) -> dict[str, Measures]:
    """Return the measures of all languages together and of each cluster: means, sums of sizes, and Gini."""
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
    """Count the tokens of a vocabulary, and the `used` ones, by script.

    Tokens without letters count as `Zyyy`, parts of characters as `bytes`.
    """
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
    """Return the ISO 15924 code of the script that most letters of a token have."""
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
