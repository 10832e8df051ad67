"""Checks before a run: what a step's check gets and hands on, whose parameter an error names, disk and folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from koine.errors import KoineWarning, UserError
from koine.plan import Estimate, Plan, PlannedInput, step
from koine.plan.loading import make_plan
from koine.plan.run import checks
from koine.plan.run.dry_run import dry_run_lines
from koine.plan.run.scheduler import execute

GOT: dict[str, Any] = {}


def count_lines(data: PlannedInput, *, least: int) -> int:
    """Know the number of lines before anything runs."""
    GOT["data"] = data
    lines = len(data.path.read_text().splitlines())
    if lines < least:
        raise UserError(f"has {lines} lines, and at least {least} are needed", where=data.path)
    return lines


def estimate_lines(data: Path, *, least: int, planned: Mapping[str, Any]) -> Estimate:
    GOT["planned"] = planned
    return Estimate(2**20, 1.0, disk_bytes=1000, temporary_bytes=500)


@step(check=count_lines, estimate=estimate_lines)
def copy(data: Path, *, least: int, out: Path) -> None:
    (out / "text").write_text(data.read_text())


def check_sum(parts: list[PlannedInput], named: dict[str, PlannedInput], *, most: int) -> None:
    GOT["parts"], GOT["named"] = parts, named
    total = sum(part.facts for part in parts)
    if total > most:
        raise UserError(f"{total} lines are too many", hint=f"at most {most} are possible")


@step(check=check_sum)
def join(parts: list[Path], named: dict[str, Path], *, most: int, out: Path) -> None:
    (out / "text").write_text("".join((part / "text").read_text() for part in parts))


def plan_of(plan: Plan, *, texts: tuple[Path, ...], least: int = 1, most: int = 10) -> None:
    parts = [
        plan.step(copy, name=f"copy/{index}", data=plan.input(path, name=f"given/{index}"), least=least)
        for index, path in enumerate(texts)
    ]
    plan.step(join, name="joined", parts=parts, named={"first": parts[0] / "text"}, most=most)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ...]:
    monkeypatch.chdir(tmp_path)
    for name, count in (("a.txt", 2), ("b.txt", 3)):
        Path(name).write_text("line\n" * count)
    return Path("a.txt"), Path("b.txt")


def made(texts: tuple[Path, ...], **parameters: Any) -> Plan:
    return make_plan(plan_of, {"texts": texts, **parameters})


def test_a_check_gets_the_inputs_and_the_facts_of_earlier_checks(texts: tuple[Path, ...]) -> None:
    plan = made(texts)
    dry_run_lines(plan)
    assert GOT["data"] == PlannedInput(texts[1].resolve(), exists=True)
    assert [(part.exists, part.facts) for part in GOT["parts"]] == [(False, 2), (False, 3)]
    assert GOT["planned"] == {"data": GOT["data"]}
    # Of a file inside an artifact nothing is known.
    assert GOT["named"]["first"] == PlannedInput(plan.folder.resolve() / "copy/0/text", exists=False)


def test_an_artifact_that_is_up_to_date_exists_and_is_not_checked_again(texts: tuple[Path, ...]) -> None:
    execute(made(texts))
    GOT.clear()
    with pytest.raises(TypeError):  # the facts of what is there are on disk: this check does not read them
        dry_run_lines(made(texts, most=9))
    assert "data" not in GOT
    assert [part.exists for part in GOT["parts"]] == [True, True]


def test_an_error_names_the_parameter_that_gave_the_path(texts: tuple[Path, ...]) -> None:
    with pytest.raises(UserError, match=r"^texts=a\.txt: has 2 lines, and at least 3 are needed$"):
        dry_run_lines(made(texts, least=3))
    with pytest.raises(UserError, match=r"^texts=c\.txt: no such file or folder$"):
        made((*texts, Path("c.txt")))


def test_an_error_about_no_path_names_the_step(texts: tuple[Path, ...]) -> None:
    with pytest.raises(UserError, match=r"^step 'joined': 5 lines are too many; at most 4 are possible$"):
        dry_run_lines(made(texts, most=4))


def test_a_run_is_refused_before_anything_is_built(texts: tuple[Path, ...]) -> None:
    plan = made(texts, most=4)
    with pytest.raises(UserError, match="too many"):
        execute(plan)
    assert not plan.folder.exists()


@pytest.mark.parametrize("where", ["runs", "runs/plan_of", "runs/plan_of/deeper"])
def test_a_file_in_place_of_the_runs_folder_is_named(texts: tuple[Path, ...], where: str) -> None:
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    Path(where).write_text("")
    plan = make_plan(plan_of, {"texts": texts}, runs=Path("runs/plan_of" if "deeper" in where else "runs"))
    if "deeper" in where:
        plan = make_plan(plan_of, {"texts": texts}, runs=Path(where).parent, name="deeper")
    with pytest.raises(UserError, match="a file, and the run needs a folder here"):
        dry_run_lines(plan)
    with pytest.raises(UserError, match="a file, and the run needs a folder here"):
        execute(plan)


def test_a_link_that_leads_nowhere_is_named(texts: tuple[Path, ...]) -> None:
    Path("runs").symlink_to("away")
    with pytest.raises(UserError, match="a link that leads nowhere"):
        dry_run_lines(made(texts))


def test_a_folder_that_cannot_be_written_is_named(
    texts: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written"):
        dry_run_lines(made(texts))


def test_the_disk_must_hold_all_artifacts_and_the_largest_temporary_files(
    texts: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two copies of 1,000 bytes, and 500 bytes while one is being made.
    monkeypatch.setattr(checks, "free_disk_bytes", lambda path: 2_499)
    says = r"will write about 2 KiB \(1 KiB of it for copy/0\), and 2 KiB are free; free some, or choose"
    with pytest.raises(UserError, match=says):
        execute(made(texts))
    # A dry run may be for another machine.
    with pytest.warns(KoineWarning, match=says):
        lines = dry_run_lines(made(texts))
    assert any(line.startswith("Disk: about 2 KiB to write") for line in lines)
    monkeypatch.setattr(checks, "free_disk_bytes", lambda path: 2_999)
    with pytest.warns(KoineWarning, match="will write about 2 KiB"):
        dry_run_lines(made(texts))
    monkeypatch.setattr(checks, "free_disk_bytes", lambda path: 3_001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dry_run_lines(made(texts))


def test_a_step_that_needs_more_memory_than_is_free_is_named(
    texts: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koine.plan.run.dry_run.available_memory", lambda: 2**19)
    with pytest.warns(KoineWarning, match=r"'copy/.' may need 1 MiB of memory, and 512 KiB are free"):
        dry_run_lines(made(texts))
