"""Cases that disturb one call: a kill, a failing call, a folder of another program, a second writer."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.interpose import KINDS, Control
from tests.faults.judge import Listing, Result, WrongError, check_end, difference, listing, temporary, visible
from tests.faults.life import Life, Running, live
from tests.faults.stages import Stage

SECONDS = 60.0
"""After so long a command hangs."""

NEED_SPACE = (
    KINDS["open"] | KINDS["write"] | KINDS["mkdir"] | KINDS["link"] | KINDS["truncate"] | KINDS["map"]
)
EVERYTHING = sum(KINDS.values())
LATER = {"ENOSPC": NEED_SPACE, "EDQUOT": NEED_SPACE, "EROFS": EVERYTHING - KINDS["write"] - KINDS["fsync"]}
"""Kinds of later calls that fail too: a full disk stays full, but what is removed is removed."""

FAILS = {
    "ENOSPC": ("open", "write", "mkdir", "link", "truncate", "fsync", "map", "rename"),
    "EIO": tuple(KINDS),
    "ESTALE": tuple(KINDS),
    "EXDEV": ("rename", "link"),
    "EBUSY": ("rename", "unlink", "mkdir", "open"),
    "EFBIG": ("write", "truncate"),
    "EDQUOT": ("open", "write", "mkdir", "link", "truncate", "fsync"),
    "EROFS": ("open", "mkdir", "rename", "link", "unlink", "truncate"),
}
"""Which calls can fail so."""


@dataclass(frozen=True)
class Call:
    """A writing call of the undisturbed run."""

    number: int
    kind: str
    path: str


class Bench:
    """Folders for cases, with the results of all stages' undisturbed runs."""

    def __init__(self, base: Path, *, worker: int) -> None:
        self.world, self.worker = base / "world", worker
        self.place = base / f"cases-{worker}"
        self.place.mkdir(exist_ok=True)
        self.wanted: dict[str, Listing] = {}
        self.begins: dict[str, Path] = {}
        self.idle_bytes = 0
        self.number = 0

    def fresh(self) -> tuple[Path, Path]:
        """An empty folder to work in, and one for what belongs to the case."""
        self.number += 1
        place = self.place / f"{self.number:06d}"
        (place / "work").mkdir(parents=True)
        return place / "work", place

    def start(self, stage: Stage) -> tuple[Path, Path]:
        """As `fresh`, with what the stage begins with."""
        work, place = self.fresh()
        if stage.begins_as is not None:
            shutil.copytree(self.begins[stage.name], work, dirs_exist_ok=True)
        return work, place

    def begin_of(self, stage: Stage) -> Listing:
        return listing(self.begins[stage.name]) if stage.begins_as is not None else {}


def again(bench: Bench, stage: Stage, work: Path, place: Path, first: str | None) -> Life:
    """Run the same command again and check that its result is that of the undisturbed run."""
    life = live(stage.words(bench.world), work, place / "again", seconds=SECONDS)
    found, wanted = listing(work), bench.wanted[stage.name]
    try:
        line = check_end(life)
    except WrongError as error:
        raise WrongError(error.verdict, f"{error.why} (in the run after it)") from None
    if line is not None and "--overwrite" in line and any(out not in found for out in stage.outs):
        # Of several files one may have its name already; the line says how to go on.
        words = [*stage.words(bench.world), "--overwrite"]
        line = check_end(live(words, work, place / "overwrite", seconds=SECONDS))
        found = listing(work)
    if line is not None and (difference(wanted, found) or "exist" not in line):
        raise WrongError("silent", f"the next run is refused: {line}; {difference(wanted, found)}")
    if difference(wanted, found):
        raise WrongError("silent", f"after the next run: {difference(wanted, found)}")
    return life


def kill(bench: Bench, stage: Stage, number: int, *, torn: bool = False) -> Result:
    """Kill everything at a call. Visible outputs must be complete, and the same command must then succeed."""
    work, place = bench.start(stage)
    life = live(
        stage.words(bench.world), work, place / "first", seconds=SECONDS, kill_at=number, torn=int(torn)
    )
    if not life.reached:
        check_end(life)
    visible(stage, listing(work), bench.wanted[stage.name], bench.begin_of(stage))
    again(bench, stage, work, place, None)
    return Result("whole")


def fail(bench: Bench, stage: Stage, number: int, name: str) -> Result:
    """Let a call fail. The command must report one line and leave nothing partial, or succeed without it."""
    work, place = bench.start(stage)
    before, wanted = listing(work), bench.wanted[stage.name]
    life = live(
        stage.words(bench.world), work, place / "first", seconds=SECONDS,
        fail_at=number, fail_errno=getattr(errno, name), fail_later=LATER.get(name, 0),
    )  # fmt: skip
    line = check_end(life)
    found = listing(work)
    visible(stage, found, wanted, before)
    if line is None:
        told = difference(wanted, found)
        more = {one: content for one, content in found.items() if one not in wanted}
        kept = {one: content for one, content in found.items() if one in wanted}
        if difference(wanted, kept) or len(temporary(more)) < len(more):
            raise WrongError("silent", f"success, but {told}")
        if told:
            # What could not be removed may stay until the next command.
            again(bench, stage, work, place, line)
        return Result("whole")
    if "nothing half-written" in line and stage.shape in ("folder", "file"):
        left = {one: content for one, content in found.items() if before.get(one) != content}
        if left:
            raise WrongError("silent", f"the line is not true ({line}): {difference(before, found)}")
    if name != "EROFS" and stage.shape in ("folder", "file") and (left := temporary(found)):
        raise WrongError("silent", f"left over: {', '.join(left[:4])}")
    again(bench, stage, work, place, line)
    return Result("line", said=line)


PRECIOUS = b"a stranger's work\n"


def appear(bench: Bench, stage: Stage, number: int) -> Result:
    """While the command waits at a call, create something under `--out`; it must survive."""
    work, place = bench.start(stage)
    out = work / stage.outs[0]
    (place / "first").mkdir()
    control = Control(place / "first" / "control", root=work, stop_at=number)
    running = Running(stage.words(bench.world), work, place / "first", control, limits={})
    made = None
    if running.stopped(SECONDS) and not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        if stage.shape == "file":
            made = out
        else:
            out.mkdir()
            made = out / "precious.txt"
        made.write_bytes(PRECIOUS)
    control.set("go_on", 1)
    life = running.end(SECONDS)
    control.close()
    line = check_end(life)
    if made is not None:
        if not made.is_file() or made.read_bytes() != PRECIOUS:
            raise WrongError("silent", f"deleted what appeared; ended with {line or 'success'}")
        if line is None:
            raise WrongError("silent", "success, but --out holds somebody else's work")
    return Result("whole" if line is None else "line", said=line or "")


def two(bench: Bench, stage: Stage, other: Stage, number: int) -> Result:
    """While the command waits at a call, run another with the same `--out`.

    One complete result must be there afterwards.
    """
    work, place = bench.start(stage)
    lives, controls = [], []
    for name, numbers in (("first", {"stop_at": number}), ("second", {})):
        (place / name).mkdir()
        controls.append(Control(place / name / "control", root=work, **numbers))
    words = [stage.words(bench.world), other.words(bench.world)]
    first = Running(words[0], work, place / "first", controls[0], limits={})
    first.stopped(SECONDS)
    second = Running(words[1], work, place / "second", controls[1], limits={})
    # Where it waits for the first, that one must go on.
    second.poll(1.0)
    controls[0].set("go_on", 1)
    lives = [first.end(SECONDS), second.end(SECONDS)]
    for control in controls:
        control.close()
    lines = [check_end(life) for life in lives]
    found = listing(work)
    ends = ["success" if line is None else line for line in lines]
    wanted = [bench.wanted[stage.name], bench.wanted[other.name]]
    done = [index for index, line in enumerate(lines) if line is None]
    if len(done) == 2 and wanted[0] != wanted[1]:
        raise WrongError("silent", "both report success, and one result is lost")
    if len(done) == 2 and stage.shape not in ("training", "run") and "done already" not in lives[1].out:
        raise WrongError("silent", "both report success")
    for index in done:
        if difference(wanted[index], found):
            raise WrongError("silent", f"{ends}: {difference(wanted[index], found)}")
    if not done and temporary(found):
        raise WrongError("silent", f"both refuse and leave {temporary(found)[:4]}")
    return Result("whole" if len(done) == 2 else "line", said=next((line for line in lines if line), ""))


def calls_of(log: Path) -> list[Call]:
    """Return the calls that an undisturbed run logged."""
    found = []
    for line in log.read_text().splitlines():
        number, kind, path = line.split(" ", 2)
        found.append(Call(int(number), kind, path))
    return found


def spread(
    calls: list[Call], most: int, *, always: tuple[str, ...] = ("rename", "unlink", "mkdir", "link")
) -> list[Call]:
    """Return about `most` of the calls: all of the kinds `always`, and every k-th of the others."""
    first = [call for call in calls if call.kind in always]
    rest = [call for call in calls if call.kind not in always]
    if len(first) > most:
        first = first[:: -(-len(first) // max(1, most))]
    stride = max(1, -(-len(rest) // max(1, most - len(first))))
    return sorted({*first, *rest[::stride]}, key=lambda call: call.number)


def failures(calls: list[Call]) -> Iterator[tuple[Call, str]]:
    """Return every way in which each call can fail."""
    for call in calls:
        for name, kinds in FAILS.items():
            if call.kind in kinds:
                yield call, name
