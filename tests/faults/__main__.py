"""`python -m tests.faults`: run all faults, some stages, or one case (docs/explanation/faults.md)."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import plan
from tests.faults.interpose import NoCompilerError
from tests.faults.laboratory import Laboratory
from tests.faults.plan import Order
from tests.faults.stages import BY_NAME, STAGES

GROUPS = ("kill", "fail", "writers", "full disk", "links", "hostile server", "damage")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("stages", nargs="*", help="stages, or data, moved, damage, hostile [default: all]")
    parser.add_argument("--minutes", type=float, default=28.0, help="time for all [28]")
    parser.add_argument("--processes", type=int, default=2, help="cases at a time [2]")
    parser.add_argument("--only", action="append", choices=GROUPS, help="only cases of these groups")
    parser.add_argument("--most", type=int, help="at most this many cases")
    parser.add_argument("--list", action="store_true", help="print the stages and stop")
    parser.add_argument("--report", type=Path, help="write all failures to this JSON file")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it")
    for name in ("kill-at", "torn-at", "fail-at", "appear-at", "two-at", "pages", "bytes"):
        parser.add_argument(f"--{name}", type=int, help="one case alone")
    for name in ("errno", "other", "output", "read", "which", "what", "command", "reader", "file"):
        parser.add_argument(f"--{name}", help="one case alone")
    parser.add_argument("--repeat", action="store_true", help="one case alone: two undisturbed runs")
    return parser.parse_args(words)


def one_case(given: argparse.Namespace) -> Order | None:
    """Return the single case of the command line, if there is one."""
    stage = given.stages[0] if given.stages else ""
    if given.repeat:
        return {"case": "repeat", "stage": stage}
    if given.kill_at is not None:
        return {"case": "kill", "stage": stage, "at": given.kill_at}
    if given.torn_at is not None:
        return {"case": "kill", "stage": stage, "at": given.torn_at, "torn": True}
    if given.fail_at is not None:
        return {"case": "fail", "stage": stage, "at": given.fail_at, "errno": given.errno or "EIO"}
    if given.appear_at is not None:
        return {"case": "appear", "stage": stage, "at": given.appear_at}
    if given.two_at is not None:
        return {"case": "two", "stage": stage, "other": given.other or stage, "at": given.two_at}
    if given.pages is not None:
        return {"case": "disk", "stage": stage, "pages": given.pages}
    if given.bytes is not None:
        return {"case": "limit", "stage": stage, "bytes": given.bytes}
    if given.output is not None:
        return {"case": "output", "stage": stage, "what": given.output}
    if given.read is not None:
        return {"case": "read", "stage": stage, "what": given.read, "which": given.which}
    if given.what is None:
        return None
    if stage == "data":
        return {"case": "data", "what": given.what, "command": given.command}
    if stage == "damage":
        return {"case": "spoil", "reader": given.reader, "file": given.file, "what": given.what}
    return {"case": stage, "what": given.what}


def cases_of(laboratory: Laboratory, given: argparse.Namespace) -> list[Order]:
    """Return all requested cases, in order."""
    asked = set(given.stages)
    found = []
    for name, known in laboratory.known.items():
        if not asked or name in asked:
            found += plan.of_stage(BY_NAME[name], known)
            found += plan.group("kill", [{"case": "repeat", "stage": name}], first=1)
    if not asked:
        found += plan.of_pairs(laboratory.known)
    if not asked or "data" in asked:
        found += [entry for entry in plan.of_folders() if entry[1]["case"] == "data"]
    if not asked or "moved" in asked:
        found += [entry for entry in plan.of_folders() if entry[1]["case"] == "moved"]
    if not asked or "hostile" in asked:
        found += plan.of_server(laboratory.port())
    if not asked or "damage" in asked:
        found += plan.of_damage(laboratory.files(), count=16)
    orders = plan.in_order(found)
    if given.only:
        orders = [order for order in orders if order["group"] in given.only]
    return orders[: given.most]


def main() -> int:
    """Run the command line. The exit code is 0 if no case ended in a traceback or in silence."""
    given, begin = arguments(), time.monotonic()
    if given.list:
        print("\n".join(f"{stage.name:24} koine {stage.command}" for stage in STAGES))
        return 0
    unknown = set(given.stages) - {*BY_NAME, "data", "moved", "damage", "hostile"}
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; see --list", file=sys.stderr)
        return 2
    base = given.keep or Path(tempfile.mkdtemp(prefix="koine-faults-"))
    base.mkdir(parents=True, exist_ok=True)
    alone = one_case(given)
    try:
        laboratory = Laboratory(base, 1 if alone else given.processes)
    except NoCompilerError as error:
        print(f"skipped: {error}")
        return 0
    try:
        names = [stage.name for stage in plan.needed(names_for(given, alone))]
        laboratory.learn(names)
        if alone is not None:
            if alone["case"] == "hostile":
                alone["port"] = laboratory.port()
            answer = laboratory.hands[0].ask({"do": "try", "keep": given.keep is not None, **alone})
            print(json.dumps(answer, indent=2, ensure_ascii=False))
            return int(answer["verdict"] not in ("whole", "line", "skipped"))
        print(f"{len(names)} stages learnt in {time.monotonic() - begin:.0f} s", flush=True)
        laboratory.try_all(cases_of(laboratory, given), until=begin + 60 * given.minutes)
        print("\n".join(laboratory.tally.lines()))
        if given.report:
            given.report.write_text(json.dumps(laboratory.tally.failures, indent=1, ensure_ascii=False))
        return int(not laboratory.tally.good())
    finally:
        laboratory.end()
        if given.keep is None:
            shutil.rmtree(base, ignore_errors=True)


def names_for(given: argparse.Namespace, alone: Order | None) -> list[str]:
    """Return the stages whose undisturbed runs must be known."""
    if not given.stages:
        return [stage.name for stage in STAGES]
    names = [name for name in given.stages if name in BY_NAME]
    if alone and "other" in alone:
        names.append(alone["other"])
    if "damage" in given.stages:
        names += ["train-pretrain", "run", "merge-linear", "data-tokenize"]
    if "moved" in given.stages or any("@finished" in BY_NAME[name].command for name in names):
        names.append("run")
    if any("@halfway" in BY_NAME[name].command for name in names):
        names.append("train-pretrain")
    return names


if __name__ == "__main__":
    sys.exit(main())
