"""Find stop strings in text that arrives token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Decodes token ids to text incrementally, never to part of a character."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class StopStrings:
    """The text of one completion, up to the first stop string.

    `text` may be shown at any time: it never holds a stop string, nor, before the end, the start of one.
    """

    def __init__(self, decoder: TextDecoder, stops: Sequence[str]) -> None:
        self.decoder, self.stops = decoder, tuple(stops)
        self.text = ""
        self.found = False
        self._pending = ""

    def push(self, token: int) -> bool:
        """Add a token; return whether it completes a stop string."""
        self._add(self.decoder.push(token))
        return self.found

    def finish(self) -> str:
        """Return the whole text, with the pending start of a stop string that never came."""
        if not self.found:
            self._add(self.decoder.flush())
        if not self.found:
            self.text += self._pending
        self._pending = ""
        return self.text

    def _add(self, new: str) -> None:
        self._pending += new
        found_at = [index for stop in self.stops if (index := self._pending.find(stop)) >= 0]
        if found_at:
            self.text += self._pending[: min(found_at)]
            self._pending, self.found = "", True
            return
        held = max((_overlap(self._pending, stop) for stop in self.stops), default=0)
        shown = len(self._pending) - held
        self.text += self._pending[:shown]
        self._pending = self._pending[shown:]


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of `text` that may start `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
