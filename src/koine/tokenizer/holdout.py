"""Hold out a share of a text: every 20th text of each language, from its second, the same in every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

EVERY = 20


def split_texts(
    read: Callable[[], Iterable[tuple[str, str]]], *, heldout: bool, every: int | None = EVERY
) -> Callable[[], Iterator[tuple[str, str]]]:
    """Return a function that yields the held-out (language, text), or the others.

    `every=None` holds nothing out. A language's only text is not held out.
    """

    def part() -> Iterator[tuple[str, str]]:
        met: Counter[str] = Counter()
        for code, text in read():
            met[code] += 1
            if heldout == (every is not None and met[code] % every == 2 % every):
                yield code, text

    return part
