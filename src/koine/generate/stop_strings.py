"""Strings that end an answer, found in the text as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextDecoder(Protocol):
    """Turns ids into text, never into half a character."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class StopStrings:
    """The text of one answer, up to the first of some strings.

    `text` is what may be shown: it never holds a stop string, nor, before the end, the beginning of one.
    """

    def __init__(self, decoder: TextDecoder, stops: Sequence[str]) -> None:
        self.decoder, self.stops = decoder, tuple(stops)
        self.text = ""
        self.found = False
        self._held = ""

    def push(self, token: int) -> bool:
        """Add a token; True where it completes a stop string."""
        self._add(self.decoder.push(token))
        return self.found

    def finish(self) -> str:
        """The whole text, with what was held back where no stop string came of it."""
        if not self.found:
            self._add(self.decoder.flush())
        if not self.found:
            self.text += self._held
        self._held = ""
        return self.text

    def _add(self, new: str) -> None:
        self._held += new
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.text += self._held[: min(places)]
            self._held, self.found = "", True
            return
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        self.text += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
