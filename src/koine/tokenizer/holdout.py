"""A share of a text that nothing is learnt from, the same at every reading: every 20th text of each language, from its second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

EVERY = 20


def split_texts(
    read: Callable[[], Iterable[tuple[str, str]]], *, heldout: bool, every: int | None = EVERY
) -> Callable[[], Iterator[tuple[str, str]]]:
    """A function that reads the held-out (language, text), or the others. `every` None holds nothing out.

    A language's only text is not held out.
    """

    def part() -> Iterator[tuple[str, str]]:
        met: Counter[str] = Counter()
        for code, text in read():
            met[code] += 1
            if heldout == (every is not None and met[code] % every == 2 % every):
                yield code, text

    return part
