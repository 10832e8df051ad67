"""Messages of the command line: one line for a user's mistake, a traceback for ours, a note for warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import click
import pytest

from koine.cli import main as command
from koine.errors import KoineWarning, UserError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Makes `koine doctor` do something else."""

    def replace(body: Callable[[], None]) -> None:
        monkeypatch.setattr(sys, "argv", ["koine", "doctor"])
        monkeypatch.setattr(
            command.LazyGroup, "get_command", lambda self, ctx, name: click.Command(name, callback=body)
        )

    return replace


def test_a_note_is_one_line_without_a_place_in_our_code(
    verb: Callable[[Callable[[], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        warnings.warn("text is\nread twice", KoineWarning, stacklevel=2)

    verb(body)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        command.main()
    assert capsys.readouterr().err == "koine: note: text is read twice\n"


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("too few", where="x.json", hint="give\nmore"), "koine: x.json: too few; give more\n", 2),
        (click.UsageError("no such thing"), "koine: no such thing\n", 2),
        # click ends the line that the terminal shows as ^C
        (KeyboardInterrupt(), "\nkoine: interrupted\n", 130),
        (click.Abort(), "koine: interrupted\n", 130),
    ],
)
def test_a_mistake_ends_in_one_line(
    error: BaseException,
    line: str,
    code: int,
    verb: Callable[[Callable[[], None]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def body() -> None:
        raise error

    verb(body)
    with pytest.raises(SystemExit) as end:
        command.main()
    assert (capsys.readouterr().err, end.value.code) == (line, code)


def test_a_bug_keeps_its_traceback(verb: Callable[[Callable[[], None]], None]) -> None:
    def body() -> None:
        raise ZeroDivisionError("ours")

    verb(body)
    with pytest.raises(ZeroDivisionError, match="ours"):
        command.main()
