"""Errors of the user, reported so that they can fix them.

A `UserError` ends the program with one line and exit code 2. Any other exception is a bug of ours and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

_MAX_CHARACTERS = 1500
"""Characters of `what` that a message shows: it may quote a file."""


class KoineWarning(UserWarning):
    """Something that works but that the user should know (for example: a source is repeated too often)."""


class UserError(Exception):
    """A mistake in the input, reported in one line: what is wrong, where, and how to fix it."""

    def __init__(self, what: str, *, where: str | Path | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        shown = what if len(what) <= _MAX_CHARACTERS else f"{what[:_MAX_CHARACTERS]}..."
        line = shown if self.where is None else f"{self.where}: {shown}"
        if hint:
            line = f"{line}; {hint}"
        super().__init__(printable(" ".join(line.split())))


def printable(text: str) -> str:
    """Escape control characters and lone surrogates, which a terminal does not print or takes as commands."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message; its class name where that is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return the `count` candidates most similar to `word`, best first; empty where none is close."""
    by_lower: dict[str, str] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), candidate)
    matches = difflib.get_close_matches(word.lower(), list(by_lower), n=count, cutoff=0.5)
    return [by_lower[match] for match in matches]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return a hint such as `did you mean 'de' or 'da'?`; where nothing is close, the known words."""
    known = list(candidates)
    matches = nearest(word, known)
    if matches:
        return "did you mean " + " or ".join(f"'{match}'" for match in matches) + "?"
    shown = ", ".join(word or "(empty)" for word in sorted(known)[:12])
    return f"known: {shown}" + (", ..." if len(known) > 12 else "")
