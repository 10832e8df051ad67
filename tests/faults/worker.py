"""A process that has imported everything and forks one command after another.

It reads orders from standard input, a JSON object a line, and answers each with one. `python -m tests.faults`
starts some.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import cases, corruption, full_disk, hostile, links
from tests.faults.cases import SECONDS, Bench, calls_of
from tests.faults.judge import Result, WrongError, check_end, difference, listing, temporary
from tests.faults.life import adopt_orphans, live
from tests.faults.links import MEMORY
from tests.faults.stages import BY_NAME, Stage

Order = dict[str, Any]


def import_everything() -> None:
    """Import what the commands import, so that a fork has it; no thread may run before a fork."""
    warnings.simplefilter("ignore")
    from koine.cli.main import VERBS

    for module, _, _ in VERBS.values():
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)


def import_what_it_imported(names: Path) -> None:
    """Import the modules that a command loaded; errors of libraries at import are ignored."""
    for name in names.read_text().split():
        if name not in sys.modules and not name.startswith(("koine_plan", "__", "tests.")):
            try:
                importlib.import_module(name)
            except (ImportError, AttributeError, RuntimeError, ValueError, TypeError, OSError):
                continue


def probe(bench: Bench, stage: Stage) -> tuple[Path, Path]:
    """Run a stage undisturbed, and import what it imported."""
    work, place = bench.start(stage)

    def act() -> None:
        from koine.cli.main import main

        sys.argv = ["koine", *stage.words(bench.world)]
        try:
            main()
        finally:
            (place / "modules").write_text("\n".join(sys.modules))

    life = live(act, work, place / "probe", seconds=300.0)
    if life.code:
        raise RuntimeError(f"{stage.name} does not work undisturbed: {life.err[-2000:]}")
    import_what_it_imported(place / "modules")
    return work, place


def learn(bench: Bench, order: Order) -> dict[str, Any]:
    """Run a stage undisturbed, twice; every other run must give the same outputs."""
    stage = BY_NAME[order["stage"]]
    if stage.begins_as is not None:
        bench.begins[stage.name] = Path(order["begins"])
    probe(bench, stage)
    work, place = bench.start(stage)
    begin = time.monotonic()
    life = live(stage.words(bench.world), work, place / "first", seconds=300.0, log=place / "log")
    seconds = time.monotonic() - begin
    if life.code or "Traceback" in life.err:
        raise RuntimeError(f"{stage.name} does not work undisturbed: {life.err[-2000:]}")
    bench.wanted[stage.name] = listing(work)
    return {
        "wanted": bench.wanted[stage.name],
        "calls": [[call.number, call.kind, call.path] for call in calls_of(place / "log")],
        "seconds": seconds,
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def make(bench: Bench, order: Order) -> dict[str, Any]:
    """Keep a stage's outputs, killed at a call or complete, as the start of others."""
    stage, into = BY_NAME[order["stage"]], Path(order["into"])
    work, place = bench.start(stage)
    live(stage.words(bench.world), work, place / "first", seconds=SECONDS, kill_at=order.get("kill_at", 0))
    shutil.copytree(work, into, symlinks=True)
    return {}


def files(bench: Bench, order: Order) -> dict[str, Any]:
    """Return the files that can be damaged for each reader, with their sizes."""
    return {reader.name: corruption.targets(bench, reader) for reader in corruption.READERS}


def sizes(bench: Bench, order: Order) -> dict[str, Any]:
    """Return the bytes of a stage's outputs."""
    return {"bytes": full_disk.size_of(BY_NAME[order["stage"]], bench)}


def know(bench: Bench, order: Order) -> dict[str, Any]:
    """Take another process's results of a stage, and check that this process gets the same."""
    stage = BY_NAME[order["stage"]]
    if stage.begins_as is not None:
        bench.begins[stage.name] = Path(order["begins"])
    bench.wanted[stage.name] = order["wanted"]
    probe(bench, stage)
    return {}


def repeat(bench: Bench, stage: Stage) -> Result:
    """Run undisturbed in another process: the same bytes, and no temporary names."""
    work, place = bench.start(stage)
    live(stage.words(bench.world), work, place / "first", seconds=SECONDS)
    found = listing(work)
    if stage.shape != "run" and (left := temporary(found)):
        raise WrongError("silent", f"an undisturbed run leaves {', '.join(left[:4])}")
    if told := difference(bench.wanted[stage.name], found):
        raise WrongError("silent", f"two undisturbed runs differ: {told}")
    return Result("whole")


def ask_hostile(bench: Bench, trick: str, port: int) -> Result:
    """Ask the hostile server; see `hostile.py`."""
    work, place = bench.fresh()
    life = live(
        hostile.ask(f"http://127.0.0.1:{port}/{trick}/v1"), work, place / "first", seconds=2 * hostile.MOST_SECONDS,
        limits={resource.RLIMIT_AS: MEMORY},
    )  # fmt: skip
    # An answer that is the key is an answer; that it stands in the cache and is handed over is what was asked for.
    kept = (
        ""
        if trick == "key-in-content"
        else "".join(path.read_text(errors="replace") for path in work.rglob("*") if path.is_file())
    )
    told = life.err + ("" if trick == "key-in-content" else life.out)
    if any(hostile.shown(told + kept)):
        raise WrongError("silent", f"the key shows: {(told or kept)[-300:]!r}")
    line = check_end(life)
    if life.seconds > hostile.MOST_SECONDS:
        raise WrongError("silent", f"took {life.seconds:.0f} s")
    if life.peak_bytes > bench.idle_bytes + hostile.MOST_BYTES:
        raise WrongError("silent", f"took {(life.peak_bytes - bench.idle_bytes) >> 20} MiB")
    answers = hostile.TRICKS[trick].answers
    if line is None and answers is False:
        raise WrongError("silent", f"taken for an answer: {life.out[:200]}")
    if line is not None and answers is True:
        raise WrongError("silent", f"refused: {line[:300]}")
    if line is not None and (len(line) > 2000 or not line.isprintable()):
        raise WrongError("silent", f"no clear line: {line[:200]!r}, {len(line)} characters")
    return Result("whole" if line is None else "line", said=line or "")


CASES: dict[str, Callable[[Bench, Order], Result]] = {
    "repeat": lambda bench, order: repeat(bench, BY_NAME[order["stage"]]),
    "kill": lambda bench, order: cases.kill(
        bench, BY_NAME[order["stage"]], order["at"], torn=order.get("torn", False)
    ),
    "fail": lambda bench, order: cases.fail(bench, BY_NAME[order["stage"]], order["at"], order["errno"]),
    "appear": lambda bench, order: cases.appear(bench, BY_NAME[order["stage"]], order["at"]),
    "two": lambda bench, order: cases.two(
        bench, BY_NAME[order["stage"]], BY_NAME[order["other"]], order["at"]
    ),
    "disk": lambda bench, order: full_disk.mounted(bench, BY_NAME[order["stage"]], order["pages"]),
    "limit": lambda bench, order: full_disk.limited(bench, BY_NAME[order["stage"]], order["bytes"]),
    "output": lambda bench, order: links.output(bench, BY_NAME[order["stage"]], order["what"]),
    "read": lambda bench, order: links.read(bench, BY_NAME[order["stage"]], order["what"], order["which"]),
    "data": lambda bench, order: links.data_folder(bench, order["what"], order["command"]),
    "moved": lambda bench, order: links.moved(bench, order["what"]),
    "spoil": lambda bench, order: corruption.spoilt(
        bench, corruption.BY_NAME[order["reader"]], order["file"], order["what"]
    ),
    "hostile": lambda bench, order: ask_hostile(bench, order["what"], order["port"]),
}


PREPARATIONS = {"learn": learn, "know": know, "make": make, "files": files, "sizes": sizes}


def judged(bench: Bench, order: Order) -> dict[str, Any]:
    """Run one case; its folders are removed unless it failed."""
    begin = time.monotonic()
    first = bench.number
    try:
        result = CASES[order["case"]](bench, order)
    except WrongError as error:
        result = Result(error.verdict, why=error.why)
    except full_disk.SkippedError as error:
        return {"verdict": "skipped", "why": str(error)}
    # A message that is not one: the laboratory itself has failed, which counts as silent.
    except Exception as error:  # noqa: BLE001
        result = Result("silent", why=f"the laboratory failed: {type(error).__name__}: {error}")
    for number in range(first + 1, bench.number + 1):
        if result.verdict in ("whole", "line") and not order.get("keep"):
            shutil.rmtree(bench.place / f"{number:06d}", ignore_errors=True)
    return {
        "verdict": result.verdict,
        "why": result.why.replace(str(bench.place), "CASES").replace(str(bench.world), "WORLD"),
        "said": result.said,
        "seconds": time.monotonic() - begin,
        "place": str(bench.place / f"{bench.number:06d}"),
    }


def main() -> None:
    """Answer orders until standard input ends."""
    base, number = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    adopt_orphans()
    import_everything()
    bench = Bench(base, worker=number)
    bench.idle_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] in PREPARATIONS:
            try:
                answer = PREPARATIONS[order["do"]](bench, order)
            except (RuntimeError, OSError) as error:
                answer = {"failed": str(error)}
        else:
            bench.idle_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer = judged(bench, order)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
