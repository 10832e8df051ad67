"""Sample text by language weights: streaming, deterministic, with a warning for every repeated language."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from koine.errors import KoineWarning, UserError
from koine.fields import check_integer, check_number

Texts = Callable[[], Iterable[str]]
# Texts by language, or one stream of (language, text); called anew for every pass.
Corpus = Mapping[str, Texts] | Callable[[], Iterable[tuple[str, str]]]


def stream(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """Yield (language, text) of one pass over the corpus."""
    if isinstance(corpus, Mapping):
        for code, texts in corpus.items():
            for text in texts():
                yield code, text
    else:
        yield from corpus()


def count_bytes(corpus: Corpus) -> dict[str, int]:
    """Count the UTF-8 bytes of each language's text, in one pass of constant memory.

    Raises `UserError` for text that is not valid Unicode (a lone surrogate).
    """
    sizes: dict[str, int] = dict.fromkeys(corpus, 0) if isinstance(corpus, Mapping) else {}
    for code, text in stream(corpus):
        sizes[code] = sizes.get(code, 0) + byte_length(text, code)
    return sizes


def byte_length(text: str, language: str) -> int:
    """Return the UTF-8 bytes of a text. Raises `UserError` for a lone surrogate."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UserError(
            f"text of language '{language}' is not valid Unicode "
            f"(a lone surrogate at character {error.start})",
            hint="repair or remove the record",
        ) from None


def quotas(
    sizes: Mapping[str, int], weights: Mapping[str, float], *, sample_bytes: int | None, max_repeats: float
) -> dict[str, float]:
    """Return the bytes to draw of each language: weight times `sample_bytes` (default: all bytes).

    At most `max_repeats` times a language's own bytes. A `KoineWarning` names languages that must be repeated
    or that still fall short of their weight.
    """
    if sample_bytes is not None:
        check_integer("sample_bytes", sample_bytes, low=1)
    check_number("max_repeats", max_repeats, low=1)
    total = sum(sizes.values()) if sample_bytes is None else sample_bytes
    wanted = {code: weights[code] * total for code in sizes}
    drawn = {code: min(wanted[code], max_repeats * sizes[code]) for code in sizes}
    repeated = {code: drawn[code] / sizes[code] for code in sizes if drawn[code] > sizes[code] * (1 + 1e-9)}
    if repeated:
        reached = math.fsum(drawn.values())
        short = reached < total * (1 - 1e-9)
        parts = []
        for code, times in repeated.items():
            part = f"{code} {times:.1f} times"
            if drawn[code] < wanted[code] * (1 - 1e-9):
                part += f" (the limit; its share is {drawn[code] / reached:.1%}, not {weights[code]:.1%})"
            parts.append(part)
        warnings.warn(
            "to reach its weight, text is read more than once: "
            + ", ".join(parts)
            + (f"; {reached:,.0f} bytes are drawn in all, not {total:,.0f}" if short else "")
            + "; give more text, a smaller sample, or another weighting",
            KoineWarning,
            stacklevel=3,
        )
    return drawn


def draw(
    corpus: Corpus, *, sizes: Mapping[str, int], quota: Mapping[str, float], seed: int
) -> Iterator[tuple[str, int]]:
    """Yield (text, times) worth `quota[language]` of the `sizes[language]` bytes, evenly spread, in one pass.

    At a rate of 2.3 each text is taken twice, and the remaining 0.3 follows by error diffusion: each text
    adds its part to its language's credit and is taken once more when the credit passes a threshold drawn
    from the seed. The bytes drawn differ from the quota by about one text. A language's draws do not depend
    on the texts between its own.
    """
    state = {code: _Diffusion(quota[code] / sizes[code], seed, code) for code in sizes}
    for code, text in stream(corpus):
        if times := state[code].times(byte_length(text, code)):
            yield text, times


class _Diffusion:
    """Choose how often to take each text of one language, so that `rate` of all bytes are taken."""

    def __init__(self, rate: float, seed: int, language: str) -> None:
        self._whole, self._part = divmod(rate, 1.0)
        digest = hashlib.blake2b(f"{seed}/{language}".encode(), digest_size=8).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
        self._thresholds: list[float] = []
        self._credit = 0.0

    def times(self, length: int) -> int:
        """Return how often to take the next text, of `length` bytes."""
        if self._part < 1e-9:
            return int(self._whole)
        if not self._thresholds:
            self._thresholds = self._generator.random(1024).tolist()
        self._credit += self._part * length
        if self._credit <= self._thresholds.pop() * length:
            return int(self._whole)
        self._credit -= length
        return int(self._whole) + 1
