"""Print users' text on a terminal as it is, never as markup or escape sequences.

A record may hold `[red]`, which `rich` takes for markup, or an escape sequence, which the terminal executes.
All code that prints text of users prints it through this module.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the order in which a terminal shows the text around them."""


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
