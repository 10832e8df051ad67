"""Print on a terminal: users' text as it is, and nothing but answers and errors under `--quiet`.

A record may hold `[red]`, which `rich` takes for markup, or an escape sequence, which the terminal executes.
All code that prints text of users prints it through this module. All code that shows progress or notes asks
`is_quiet` first, or prints with `note`.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the order in which a terminal shows the text around them."""

_QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment variables that silence the libraries that we call."""

_quiet = False


def is_quiet() -> bool:
    """Return whether progress and notes are not to be shown (`--quiet`)."""
    return _quiet


@contextmanager
def quiet_output(quiet: bool = True) -> Iterator[None]:
    """Show no progress and no notes inside the block, where `quiet` is true; libraries show none either."""
    global _quiet
    before, added = _quiet, {name: _QUIET_LIBRARIES[name] for name in _QUIET_LIBRARIES.keys() - os.environ}
    if quiet:
        os.environ.update(added)
    _quiet = quiet
    try:
        yield
    finally:
        _quiet = before
        for name in added if quiet else ():
            os.environ.pop(name, None)


def note(text: str, *, err: bool = False) -> None:
    """Print a line beside the answer, such as where a file was written; nothing under `--quiet`.

    err: on standard error.
    """
    if not _quiet:
        print(printable(text), file=sys.stderr if err else sys.stdout, flush=True)


def printable(text: str) -> str:
    """Escape control characters (not newline and tab) and those that change the order of text."""
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character in "\n\t":
        return character
    if unicodedata.category(character) == "Cc":
        return f"\\x{ord(character):02x}"
    if character in _BIDI_CONTROLS or unicodedata.category(character) == "Cs":
        return f"\\u{ord(character):04x}"
    return character


def _reader_has_gone() -> None:
    """Raise the `BrokenPipeError` that is handled; `rich` would exit on its own, with another status."""
    raise


def plain_console(**options: Any) -> Console:
    """Return a console of `rich` that interprets no markup, emoji names or escape sequences in text."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False, **options)
    render = console.render_str

    def render_printable(text: str, **others: Any) -> Any:
        return render(printable(text), **others)

    # Every text, also of a table's cell or title, passes here before it is shown.
    console.render_str = render_printable  # type: ignore[method-assign]
    console.on_broken_pipe = _reader_has_gone  # type: ignore[method-assign]
    return console
