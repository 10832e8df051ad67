"""Tables are complete through a pipe, and no cell is cut off in a terminal of 80 characters."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from koine.cli.data import data
from koine.cli.evaluate.output import print_table_block
from koine.evaluate.bits import bits_blocks
from koine.evaluate.question_answering import question_blocks


def measured(value: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.1, value + 0.1], **more}


BITS = {
    "bits_per_byte": 2.3456,
    "interval": [2.2456, 2.4456],
    "bytes": 123_456_789,
    "documents": 123_456,
    "tokens": 45_678_901,
}
RESULT = {
    "overall": BITS,
    "languages": dict.fromkeys(("de", "zh-Hant"), BITS),
    "domains": {"encyclopedia": BITS},
}
BY_KIND = {
    name: measured(0.5, questions=1_000, majority_baseline=0.25) for name in ("recall", "generalisation")
}
QUESTIONS = {
    "questions": {
        "overall": BY_KIND,
        "languages": {"de": BY_KIND},
        "majority_baseline": {"answers_from": "training questions"},
    }
}


def in_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console",
        lambda **_: Console(file=out, width=width, force_terminal=True, color_system=None),
    )
    return out


@pytest.mark.parametrize(
    "block", [bits_blocks(RESULT)[0], question_blocks(QUESTIONS)[0]], ids=["bits", "questions"]
)
def test_the_tables_of_an_evaluation_fit_80_characters(
    block: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = in_a_terminal(monkeypatch, 80)
    print_table_block(block)
    assert "…" not in out.getvalue()
    assert "123,456,789" in out.getvalue() or "1,000" in out.getvalue()


def sample(out: Path) -> str:
    words = [
        "sample",
        "--languages",
        "de,zh-Hant,hi",
        "--documents-per-language",
        "20",
        "--questions-per-language",
        "10",
        "--code-bytes",
        "0",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(data, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("columns", ["40"])
def test_a_row_is_a_line_through_a_pipe(
    columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = sample(tmp_path / "w").splitlines()
    assert lines[0].split() == [
        "language",
        "name",
        "texts",
        "bytes",
        "held",
        "out",
        "its",
        "bytes",
        "chats",
        "recall",
        "new",
        "facts",
        "new",
        "places",
    ]
    assert [line.split()[0] for line in lines[1:4]] == ["de", "zh-Hant", "hi"]
    assert not any("…" in line for line in lines)


def test_the_sample_fits_a_terminal_of_80_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = in_a_terminal(monkeypatch, 80)
    sample(tmp_path / "w")
    shown = out.getvalue()
    assert "…" not in shown
    # Headings break at spaces alone.
    assert all(word in shown.split() for word in ("language", "texts", "chats", "recall", "facts", "places"))
