"""What a user did wrong, said so that they can fix it.

A `UserError` ends the program with one line and exit code 2; anything else that escapes is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

_LONGEST = 1500
"""Characters that a message shows of what is wrong: it may hold what stood in a file."""


class KoineWarning(UserWarning):
    """Something that works but that the user should know of (a source repeated too often, for example)."""


class UserError(Exception):
    """A mistake in the input, told in one line: what is wrong, where, and how to fix it."""

    def __init__(self, what: str, *, where: str | Path | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        shown = what if len(what) <= _LONGEST else f"{what[:_LONGEST]}..."
        line = shown if self.where is None else f"{self.where}: {shown}"
        if hint:
            line = f"{line}; {hint}"
        super().__init__(printable(" ".join(line.split())))


def printable(text: str) -> str:
    """Escape what no terminal prints, or takes for a command.

    These are control characters and halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def first_line(error: BaseException) -> str:
    """The first line of what a library's exception says; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The `count` candidates that look most like `word`, best first; empty where none is close."""
    by_lower: dict[str, str] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), candidate)
    matches = difflib.get_close_matches(word.lower(), list(by_lower), n=count, cutoff=0.5)
    return [by_lower[match] for match in matches]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A fix such as `did you mean 'de' or 'da'?`; where nothing is close, the list of what is known."""
    known = list(candidates)
    matches = nearest(word, known)
    if matches:
        return "did you mean " + " or ".join(f"'{match}'" for match in matches) + "?"
    shown = ", ".join(sorted(known)[:12])
    return f"known: {shown}" + (", ..." if len(known) > 12 else "")
