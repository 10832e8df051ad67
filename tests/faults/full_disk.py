"""A disk that is full, and files that may not grow."""

from __future__ import annotations

import resource
import subprocess

from tests.faults.cases import SECONDS, Bench, again
from tests.faults.judge import Result, WrongError, check_end, difference, listing, temporary, visible
from tests.faults.life import live
from tests.faults.stages import Stage


class SkippedError(Exception):
    """A case cannot be run here; holds the reason."""


def size_of(stage: Stage, bench: Bench) -> int:
    """Return the bytes of a stage's outputs."""
    work, place = bench.start(stage)
    live(stage.words(bench.world), work, place / "first", seconds=SECONDS)
    return sum(path.stat().st_size for path in work.rglob("*") if path.is_file())


def mounted(bench: Bench, stage: Stage, pages: int) -> Result:
    """Run on a file system of this many pages of 4 KiB; then again where there is room."""
    work, place = bench.fresh()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={pages * 4}k", "tmpfs", str(work)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SkippedError(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        life = live(stage.words(bench.world), work, place / "first", seconds=SECONDS)
        line = check_end(life)
        found, wanted = listing(work), bench.wanted[stage.name]
        visible(stage, found, wanted, {})
        if line is None:
            if difference(wanted, found):
                raise WrongError("silent", f"success, but {difference(wanted, found)}")
            return Result("whole")
        if "nothing half-written" in line and stage.shape in ("folder", "file") and found:
            raise WrongError("silent", f"the line is not true ({line}): {', '.join(list(found)[:4])}")
        if stage.shape in ("folder", "file") and (left := temporary(found)):
            raise WrongError("silent", f"left over: {', '.join(left[:4])}")
        subprocess.run(["mount", "-o", "remount,size=256m", str(work)], check=True)
        again(bench, stage, work, place, line)
        return Result("line", said=line)
    finally:
        subprocess.run(["umount", str(work)], check=True)


def limited(bench: Bench, stage: Stage, most: int) -> Result:
    """Run with a limit on the size of files (RLIMIT_FSIZE)."""
    work, place = bench.start(stage)
    life = live(
        stage.words(bench.world), work, place / "first", seconds=SECONDS, limits={resource.RLIMIT_FSIZE: most}
    )
    line = check_end(life)
    found, wanted = listing(work), bench.wanted[stage.name]
    visible(stage, found, wanted, bench.begin_of(stage))
    if line is None:
        if difference(wanted, found):
            raise WrongError("silent", f"success, but {difference(wanted, found)}")
        return Result("whole")
    if stage.shape in ("folder", "file") and (left := temporary(found)):
        raise WrongError("silent", f"left over: {', '.join(left[:4])}")
    again(bench, stage, work, place, line)
    return Result("line", said=line)
