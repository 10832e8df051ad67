"""What was read before and may be read on from: a few beginnings of texts, the longest matching one first."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import islice

from koine.generate.cache.paged_cache import CachedSequence, PagedCache, Prefix

MIN_TOKENS = 32
"""A common beginning of fewer tokens is read again rather than kept."""

COMPARED_PROMPTS = 64
"""Prompts that a new one is compared with, to find what prompts have in common: so many earlier ones, and so many that wait."""


class PrefixCache:
    """Beginnings of texts with their keys and values, least recently used first out.

    entries, window_bytes: at most so many beginnings, and bytes of their windows (a hybrid keeps a copy of its windows for each).
    """

    def __init__(self, cache: PagedCache, *, entries: int, window_bytes: int = 512 * 2**20) -> None:
        self.cache, self.entries, self.window_bytes = cache, entries, window_bytes
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._recent: deque[Sequence[int]] = deque(maxlen=COMPARED_PROMPTS)

    def __len__(self) -> int:
        return len(self._kept)

    def longest_match(self, prompt: Sequence[int]) -> Prefix | None:
        """The longest kept beginning of `prompt` that leaves at least one token to read."""
        found: tuple[int, ...] | None = None
        for tokens in self._kept:
            longer = len(tokens) > (0 if found is None else len(found))
            if longer and len(tokens) < len(prompt) and tokens == tuple(prompt[: len(tokens)]):
                found = tokens
        if found is None:
            return None
        self._kept.move_to_end(found)
        return self._kept[found]

    def shared_length(self, prompt: Sequence[int], others: Iterable[Sequence[int]], *, known: int = 0) -> int:
        """How many tokens `prompt` has in common with a prompt of the recent ones or of the first of `others`: reading stops there once, so
        that the next one can go on from it.

        known: tokens that a kept beginning has already. 0 where what is common is the whole prompt or hardly more than that, since a stop
        costs a step and a copy of the windows; and where no beginnings are kept.
        """
        if not self.entries:
            return 0
        longest_match = 0
        for other in (*self._recent, *islice(others, COMPARED_PROMPTS)):
            if other is not prompt:
                longest_match = max(longest_match, common_length(prompt, other))
        self._recent.append(prompt)
        longest_match = min(longest_match, len(prompt) - 1)
        return (
            longest_match
            if longest_match >= known + MIN_TOKENS and tuple(prompt[:longest_match]) not in self._kept
            else 0
        )

    def keep(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        """Keep `sequence` as it is now; `tokens` are what was read."""
        key = tuple(tokens)
        if not self.entries or len(key) < MIN_TOKENS:
            return
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        assert len(key) == sequence.length
        self._kept[key] = self.cache.prefix(sequence)
        while len(self._kept) > self.entries or self._bytes() > self.window_bytes:
            self.evict_oldest()

    def evict_oldest(self) -> bool:
        """Give up the beginning that was used longest ago; False where none is left."""
        if not self._kept:
            return False
        _, prefix = self._kept.popitem(last=False)
        self.cache.release(prefix)
        return True

    def _bytes(self) -> int:
        return sum(prefix.bytes() for prefix in self._kept.values())


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    # Halving compares slices at the speed of C, where a loop would look at every token.
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
