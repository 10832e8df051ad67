"""Draw text to the languages' weights: streaming, deterministic, and never repeating a language in silence."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from koine.errors import KoineWarning, UserError

Texts = Callable[[], Iterable[str]]


def count_bytes(texts_by_language: Mapping[str, Texts]) -> dict[str, int]:
    """UTF-8 bytes of each language's text, in one pass of constant memory.

    Raises `UserError` for text that is not valid Unicode (a lone surrogate).
    """
    sizes = {}
    for code, texts in texts_by_language.items():
        size = 0
        for text in texts():
            size += byte_length(text, code)
        sizes[code] = size
    return sizes


def byte_length(text: str, language: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UserError(
            f"text of language '{language}' is not valid Unicode (a lone surrogate at character {error.start})",
            mend="repair or remove the record",
        ) from None


def quotas(
    sizes: Mapping[str, int], weights: Mapping[str, float], *, sample_bytes: int | None, max_repeats: float
) -> dict[str, float]:
    """Bytes to draw of each language: weight times `sample_bytes` (default: all bytes there are), at most
    `max_repeats` times what the language has.

    A language that must be repeated, or that even then falls short of its weight, is named in a `KoineWarning`.
    """
    if sample_bytes is not None and sample_bytes <= 0:
        raise UserError(f"the sample is {sample_bytes} bytes", mend="give a number above 0")
    if max_repeats < 1:
        raise UserError(f"the limit of repeats is {max_repeats}", mend="give at least 1")
    total = sum(sizes.values()) if sample_bytes is None else sample_bytes
    wanted = {code: weights[code] * total for code in sizes}
    drawn = {code: min(wanted[code], max_repeats * sizes[code]) for code in sizes}
    repeated = {code: drawn[code] / sizes[code] for code in sizes if drawn[code] > sizes[code] * (1 + 1e-9)}
    if repeated:
        reached = math.fsum(drawn.values())
        parts = []
        for code, times in repeated.items():
            part = f"{code} {times:.1f} times"
            if drawn[code] < wanted[code] * (1 - 1e-9):
                part += f" (the limit; its share is {drawn[code] / reached:.1%}, not {weights[code]:.1%})"
            parts.append(part)
        warnings.warn(
            "to reach its weight, text is read more than once: "
            + ", ".join(parts)
            + "; give more text, a smaller sample, or another weighting",
            KoineWarning,
            stacklevel=3,
        )
    return drawn


def draw(texts: Texts, *, size: int, quota: float, seed: int, language: str) -> Iterator[str]:
    """Yield texts of one language worth `quota` bytes, out of `size`, spread evenly over the data.

    Whole passes first, then a part by error diffusion: each text adds its share to a credit and is taken when the
    credit passes a threshold drawn from the seed, so the bytes drawn differ from the quota by about one text.
    """
    passes, rest = divmod(quota / size, 1.0)
    for _ in range(int(passes)):
        yield from texts()
    if rest * size < 1.0:
        return
    digest = hashlib.blake2b(f"{seed}/{language}".encode(), digest_size=8).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    credit = 0.0
    thresholds: list[float] = []
    for index, text in enumerate(texts()):
        if index % 1024 == 0:
            thresholds = generator.random(1024).tolist()
        length = byte_length(text, language)
        credit += rest * length
        if credit > thresholds[index % 1024] * length:
            credit -= length
            yield text
