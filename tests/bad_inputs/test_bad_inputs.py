"""Every bad input gets its one line, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from koine.cli.main import main

from .case import ANYTHING, Case, listing
from .table import PAGE, SECTIONS, page

CASES = [case for cases in SECTIONS.values() for case in cases]


def name_of(case: Case) -> str:
    return re.sub(r"[^a-z0-9]+", "-", case.mistake.lower()).strip("-")


def pattern_of(says: str) -> str:
    return "koine: " + ".*".join(re.escape(part) for part in says.split(ANYTHING)) + "\n"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_bad_input_gets_its_line(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # A file of plans is a module of its own in each case, found where the case runs.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "plans", raising=False)
    if case.prepare:
        case.prepare(tmp_path)
    before = listing(tmp_path)
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["koine", *shlex.split(case.command)])
    with monkeypatch.context() as during:
        if case.during:
            case.during(during)
        with pytest.raises(SystemExit) as end:
            main()
    said = "".join(line for line in capfd.readouterr().err.splitlines(True) if not line.startswith("step "))
    assert re.fullmatch(pattern_of(case.says), said), said
    assert end.value.code == 2
    after = listing(tmp_path)
    if case.leaves:
        after = {name: content for name, content in after.items() if not name.startswith(case.leaves)}
    assert after == before


def test_cases_are_unique_and_many() -> None:
    assert len({name_of(case) for case in CASES}) == len(CASES) >= 30


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.bad_inputs.table --write"
