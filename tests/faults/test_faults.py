"""The part of the fault injection in every test run; `make faults` runs all of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import hostile, plan
from tests.faults.cases import failures, spread
from tests.faults.interpose import NoCompilerError, library
from tests.faults.laboratory import ROOT, Laboratory, environment
from tests.faults.plan import Order
from tests.faults.stages import STAGES

QUICK = [stage.name for stage in STAGES if stage.quick]


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    try:
        library()
    except NoCompilerError as error:
        pytest.skip(str(error))
    built = Laboratory(tmp_path_factory.mktemp("faults"), 1)
    built.learn(QUICK)
    yield built
    built.end()


def tried(laboratory: Laboratory, orders: list[Order]) -> None:
    """Run cases; none may end in a traceback or in silence."""
    before = len(laboratory.tally.failures)
    laboratory.try_all(orders, until=time.monotonic() + 600, say=False)
    wrong = [
        f"{one['verdict']}: {one['why']}\n    {one['again']}" for one in laboratory.tally.failures[before:]
    ]
    assert not wrong, "\n".join(wrong)
    assert not laboratory.tally.unlearnt


@pytest.mark.parametrize("name", QUICK)
def test_a_kill_leaves_a_whole_result_or_none_and_the_next_run_ends_in_the_same_bytes(
    laboratory: Laboratory, name: str
) -> None:
    calls = spread(laboratory.known[name].calls, 4, always=("rename",))
    orders = [
        {"case": "kill", "stage": name, "at": call.number, "torn": call.kind == "write"} for call in calls
    ]
    tried(laboratory, [{"case": "repeat", "stage": name}, *orders])


@pytest.mark.parametrize("name", QUICK)
def test_a_call_that_fails_is_one_clear_line(laboratory: Laboratory, name: str) -> None:
    calls = laboratory.known[name].calls
    orders = []
    for part, error in enumerate(("EROFS", "ENOSPC", "EIO", "ESTALE", "EDQUOT")):
        can = [call.number for call, how in failures(calls) if how == error]
        orders.append({"case": "fail", "stage": name, "at": can[len(can) * part // 5], "errno": error})
    rename = next(call.number for call in reversed(calls) if call.kind == "rename")
    orders.append({"case": "fail", "stage": name, "at": rename, "errno": "EXDEV"})
    tried(laboratory, orders)


@pytest.mark.parametrize("name", QUICK)
def test_one_writer_wins_and_what_appears_is_kept(laboratory: Laboratory, name: str) -> None:
    rename = next(call.number for call in reversed(laboratory.known[name].calls) if call.kind == "rename")
    tried(
        laboratory,
        [
            {"case": "appear", "stage": name, "at": rename},
            {"case": "two", "stage": name, "other": name, "at": rename},
        ],
    )


def test_outputs_that_are_links_devices_and_pipes_stay(laboratory: Laboratory) -> None:
    whats = ("link-to-empty-folder", "link-to-file", "link-to-itself", "device", "pipe", "long-name", "dot")
    tried(laboratory, [{"case": "output", "stage": "tokenizer-train", "what": what} for what in whats])


def test_a_hostile_server_gets_one_line(laboratory: Laboratory) -> None:
    tricks = [
        "good", "reset-in-body", "cut-body", "gzip-lie", "deep", "content-parts-odd", "finish-map", "status-502", "key-in-error-cut",
        "key-in-location", "key-in-reason", "key-in-finish",
    ]  # fmt: skip
    assert set(tricks) <= set(hostile.TRICKS)
    tried(laboratory, [{"case": "hostile", "what": trick, "port": laboratory.port()} for trick in tricks])


def test_damaged_files_are_refused(laboratory: Laboratory) -> None:
    orders = [
        {"case": "spoil", "reader": "merge", "file": "model.safetensors", "what": "cut-1"},
        {"case": "spoil", "reader": "evaluate", "file": "tokenizer.json", "what": "cut-1"},
        {"case": "spoil", "reader": "train-tokens", "file": "shard-00000.tokens", "what": "flip-100-3"},
        {"case": "spoil", "reader": "train-tokens", "file": "manifest.json", "what": "flip-100-3"},
    ]
    tried(laboratory, orders)


def test_the_library_sees_what_the_system_sees(laboratory: Laboratory, tmp_path: Path) -> None:
    """Renames and new folders, as strace counts them: the library must see every call."""
    traced = tmp_path / "trace"
    stage = next(stage for stage in STAGES if stage.name == "merge-linear")
    command = [sys.executable, "-m", "koine", *stage.words(laboratory.base / "world")]
    (tmp_path / "work").mkdir()
    try:
        subprocess.run(
            ["strace", "-f", "-qq", "-e", "trace=rename,renameat,renameat2,ftruncate,fallocate", "-o", traced, *command],
            check=True, capture_output=True, cwd=tmp_path / "work", env=environment(),
        )  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"strace cannot be used here: {error}")
    lines = [
        line for line in traced.read_text().splitlines() if "unfinished" not in line and "resumed" not in line
    ]
    known = laboratory.known["merge-linear"].calls
    assert sum("rename" in line for line in lines) == sum(call.kind == "rename" for call in known)
    assert sum("ftruncate(" in line or "fallocate(" in line for line in lines) == sum(
        call.kind == "truncate" for call in known
    )


def test_every_case_can_be_tried_alone() -> None:
    """The line of a failure holds everything to run its case."""
    for order in (
        {"case": "kill", "stage": "run", "at": 3},
        {"case": "kill", "stage": "run", "at": 3, "torn": True},
        {"case": "fail", "stage": "run", "at": 3, "errno": "EIO"},
        {"case": "spoil", "reader": "merge", "file": "config.json", "what": "cut-1"},
        {"case": "data", "what": "loop", "command": "train"},
        {"case": "hostile", "what": "good"},
    ):
        from tests.faults.__main__ import arguments, one_case

        words = plan.again(order).split()[3:]
        assert one_case(arguments(words)) == order


@pytest.mark.faults
def test_the_whole_laboratory() -> None:
    """All of `make faults`, as a test."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
