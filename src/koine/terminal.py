"""Text of users on a terminal: shown as it is, never obeyed.

A record may hold `[red]`, which `rich` takes for markup, or an escape sequence, which the terminal obeys.
Whatever prints text that is not ours prints it through here.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_TURNS_TEXT = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that make a terminal show the text around them in another order."""


def printable(text: str) -> str:
    """Write control characters but newline and tab, and those that turn the order of text, as escapes."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    if unicodedata.category(character) == "Cc":
        return f"\\x{ord(character):02x}"
    if character in _TURNS_TEXT or unicodedata.category(character) == "Cs":
        return f"\\u{ord(character):04x}"
    return character


def plain_console(**options: Any) -> Console:
    """A console of `rich` that takes no text for markup, for an emoji's name, or for an escape sequence."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False, **options)
    render = console.render_str

    def render_printable(text: str, **others: Any) -> Any:
        return render(printable(text), **others)

    # Every text, also of a table's cell or title, passes here before it is shown.
    console.render_str = render_printable  # type: ignore[method-assign]
    return console
