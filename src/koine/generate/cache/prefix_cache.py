"""Prefix cache: KV caches of earlier texts, reused by prompts that begin with them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import islice

from koine.generate.cache.paged_cache import CachedSequence, PagedCache, Prefix

MIN_TOKENS = 32
"""A shared prefix of fewer tokens is computed again rather than cached."""

COMPARED_PROMPTS = 64
"""A new prompt is compared with so many earlier prompts and so many waiting ones, to find shared prefixes."""


class PrefixCache:
    """Prefixes with their KV cache, evicted least recently used first.

    entries: most prefixes. window_bytes: most bytes of their windows (a hybrid copies its windows for each
        prefix).
    """

    def __init__(self, cache: PagedCache, *, entries: int, window_bytes: int = 512 * 2**20) -> None:
        self.cache, self.entries, self.window_bytes = cache, entries, window_bytes
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._recent: deque[Sequence[int]] = deque(maxlen=COMPARED_PROMPTS)

    def __len__(self) -> int:
        return len(self._prefixes)

    def longest_match(self, prompt: Sequence[int]) -> Prefix | None:
        """Return the longest cached prefix of `prompt` that leaves at least one token to prefill."""
        found: tuple[int, ...] | None = None
        for tokens in self._prefixes:
            longer = len(tokens) > (0 if found is None else len(found))
            if longer and len(tokens) < len(prompt) and tokens == tuple(prompt[: len(tokens)]):
                found = tokens
        if found is None:
            return None
        self._prefixes.move_to_end(found)
        return self._prefixes[found]

    def shared_length(
        self, prompt: Sequence[int], others: Iterable[Sequence[int]], *, cached: int = 0
    ) -> int:
        """Return how many tokens `prompt` shares with a recent prompt or one of the first of `others`.

        Prefill pauses there once, so that the next prompt can reuse the prefix. A pause costs a step and a
        copy of the windows. So the result is 0 where the shared prefix is hardly longer than `cached` (tokens
        that are in the cache already), where it is cached, and where no prefixes are kept.
        """
        if not self.entries:
            return 0
        longest = 0
        for other in (*self._recent, *islice(others, COMPARED_PROMPTS)):
            if other is not prompt:
                longest = max(longest, common_length(prompt, other))
        self._recent.append(prompt)
        longest = min(longest, len(prompt) - 1)
        worthwhile = longest >= cached + MIN_TOKENS and tuple(prompt[:longest]) not in self._prefixes
        return longest if worthwhile else 0

    def add(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        """Cache `sequence` as it is now; `tokens` are those whose keys and values it holds."""
        key = tuple(tokens)
        if not self.entries or len(key) < MIN_TOKENS:
            return
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
            return
        assert len(key) == sequence.length
        self._prefixes[key] = self.cache.prefix(sequence)
        while len(self._prefixes) > self.entries or self._bytes() > self.window_bytes:
            self.evict_oldest()

    def evict_oldest(self) -> bool:
        """Evict the least recently used prefix; return False where there is none."""
        if not self._prefixes:
            return False
        _, prefix = self._prefixes.popitem(last=False)
        self.cache.release(prefix)
        return True

    def _bytes(self) -> int:
        return sum(prefix.bytes() for prefix in self._prefixes.values())


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    # Bisection compares slices at the speed of C, where a loop would look at every token.
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
