"""Users' text on a terminal: markup, emoji names and escape sequences are shown and not interpreted."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from koine.cli.tables import print_table
from koine.terminal import plain_console, printable

SOURCE = Path(__file__).parents[1] / "src" / "koine"
EVIL = [
    "[/INST]",
    "[red]",
    "[link=http://x]y[/link]",
    ":smile:",
    "\x1b[2J\x9b1mhey\x07",
    "a\u202eb",
    "[bold",
    "\\[x]",
]


def test_what_steers_a_terminal_is_written_out() -> None:
    assert (
        printable("a\x1b[31m\x7f\x9b\r\n\tö東\u200d\ud800") == "a\\x1b[31m\\x7f\\x9b\\x0d\n\tö東\u200d\\ud800"
    )
    assert printable("\u202eabc\u2066") == "\\u202eabc\\u2066"


@pytest.mark.parametrize("text", EVIL)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_shows_text_as_text(text: str, terminal: bool) -> None:
    from rich.table import Table

    out = io.StringIO()
    table = Table(title=text, caption=text)
    table.add_column(text)
    table.add_row(text)
    plain_console(file=out, width=80, force_terminal=terminal, color_system=None).print(table, text)
    assert out.getvalue().count(printable(text)) == 5
    assert "\x1b[2J" not in out.getvalue()


def test_a_table_through_a_pipe_shows_text_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table("".join(EVIL))
    table.add_row("[/INST] sea")
    print_table(table)
    shown = capsys.readouterr().out
    assert printable("".join(EVIL)) in shown
    assert "[/INST] sea" in shown


def test_nobody_prints_through_a_console_that_obeys() -> None:
    """Every console is made in one place, and every text of a progress bar is plain."""
    for path in SOURCE.rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        if path.name != "terminal.py" or path.parent != SOURCE:
            assert "import Console" not in code.replace(
                "if TYPE_CHECKING:\n    from rich.console import Console", ""
            ), path
        for bar in re.findall(r"TextColumn\((?!\n)[^)]*\)", code):
            assert "markup=False" in bar, path
        assert "from_markup" not in code, path
