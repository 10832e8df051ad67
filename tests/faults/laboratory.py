"""Build the world, start worker processes, hand out cases, and add up results."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import interpose
from tests.faults.cases import Call
from tests.faults.plan import Known, Order, again
from tests.faults.stages import BY_NAME

ROOT = Path(__file__).parents[2]
VERDICTS = ("whole", "line", "traceback", "silent")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of the workers: these sources, one thread, no network."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "400",
        **more,
    }


class DiedError(Exception):
    """A worker process has ended."""


class Hand:
    """One worker process (`worker.py`)."""

    def __init__(self, base: Path, number: int) -> None:
        self.base, self.number = base, number
        # Another hash seed in each: what depends on the order of a set comes out otherwise.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.worker", str(base), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(base / f"worker-{number}.log").open("a"), text=True, cwd=ROOT,
            env=environment(LD_PRELOAD=str(interpose.library()), PYTHONHASHSEED=str(number + 1)),
        )  # fmt: skip

    def ask(self, order: Order) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise DiedError((self.base / f"worker-{self.number}.log").read_text()[-2000:])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Tally:
    """Counts of the cases' results."""

    rows: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    planned: Counter[tuple[str, str]] = field(default_factory=Counter)
    unlearnt: dict[str, str] = field(default_factory=dict)

    def add(self, order: Order, answer: dict[str, Any]) -> None:
        if answer["verdict"] == "skipped":
            self.skipped[answer["why"]] += 1
            return
        self.rows.setdefault(row_of(order), Counter())[answer["verdict"]] += 1
        if answer["verdict"] in ("traceback", "silent"):
            self.failures.append({"order": order, "again": again(order), **answer})

    def sums(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for row in self.rows.values():
            total += row
        return total

    def good(self) -> bool:
        sums = self.sums()
        return not (sums["traceback"] or sums["silent"] or self.unlearnt)

    def lines(self) -> list[str]:
        """The table, the failures by kind, and the line at the end."""
        width = max((len(stage) for stage, _ in self.rows), default=5)
        told = [
            f"{'':{width}}  {'':14} {'cases':>6} {'of':>6} {'whole':>6} {'line':>6} {'trace':>6} {'silent':>6}"
        ]
        for (stage, kind), row in sorted(self.rows.items()):
            counts = " ".join(f"{row[verdict]:6}" for verdict in VERDICTS)
            told.append(f"{stage:{width}}  {kind:14} {row.total():6} {self.planned[stage, kind]:6} {counts}")
        told += [f"skipped {count}: {why}" for why, count in self.skipped.items()]
        told += [f"does not work undisturbed: {stage}: {why}" for stage, why in self.unlearnt.items()]
        by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for failure in self.failures:
            by_kind.setdefault((failure["verdict"], kind_of(failure["why"])), []).append(failure)
        for (verdict, _), same in sorted(by_kind.items(), key=lambda entry: -len(entry[1])):
            stages = Counter(row_of(failure["order"])[0] for failure in same)
            where = ", ".join(f"{stage} {count}" for stage, count in stages.most_common(8))
            told += [
                "",
                f"{verdict}, {len(same)} times ({where}): {same[0]['why']}",
                f"    {same[0]['again']}",
            ]
        sums = self.sums()
        told += [
            "",
            f"cases {sums.total()}, whole {sums['whole']}, one clear line {sums['line']}, traceback {sums['traceback']}, "
            f"silent {sums['silent']}",
        ]
        return told


def row_of(order: Order) -> tuple[str, str]:
    """Return the row of the table in which a case counts."""
    place = (
        order.get("stage")
        or order.get("reader")
        or {"data": order.get("command"), "hostile": "endpoint"}.get(order["case"])
        or "run"
    )
    return str(place), str(order.get("group", order["case"]))


def kind_of(why: str) -> str:
    """Return a reason without names, numbers and lists, to group cases of one kind."""
    short = re.sub(
        r"'[^']*'|\"[^\"]*\"|[\w.-]*/[\w./-]*(?<!\.py)|\.\w[\w.]*|\d+|\bn{20,}",
        "…",
        why.partition("; left over")[0],
    )
    return re.sub(r"(…[ ,;>-]*)+", "… ", short)[:100]


class Laboratory:
    """Worker processes that know all requested stages, and a world for them."""

    def __init__(self, base: Path, hands: int) -> None:
        self.base = base
        subprocess.run(
            [sys.executable, "-m", "tests.faults.worlds", str(base / "world")], check=True, cwd=ROOT, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.hands = [Hand(base, number) for number in range(hands)]
        self.known: dict[str, Known] = {}
        self.lessons: dict[str, Order] = {}
        self.tally = Tally()
        self._server: subprocess.Popen[str] | None = None

    def learn(self, names: Iterable[str]) -> None:
        """Have every process know these stages: the first one what they leave, the others what they must leave."""
        names = list(names)
        first = self.hands[0]
        early = [name for name in names if not _later(name)]
        shares: list[list[str]] = [early[number :: len(self.hands)] for number in range(len(self.hands))]
        _together(
            [
                lambda hand=hand, share=share: [self._learn(hand, name) for name in share]
                for hand, share in zip(self.hands, shares, strict=True)
            ]
        )
        self._begins(first)
        for name in names:
            if _later(name):
                self._learn(first, name)
        _together([lambda hand=hand: self._catch_up(hand) for hand in self.hands])

    def _learn(self, hand: Hand, name: str) -> None:
        order = {"do": "learn", "stage": name}
        if BY_NAME[name].begins_as is not None:
            order["begins"] = str(self.base / "world" / "halfway")
        answer = hand.ask(order)
        if "failed" in answer:
            self.tally.unlearnt[name] = answer["failed"]
            return
        size = hand.ask({"do": "sizes", "stage": name})["bytes"]
        self.known[name] = Known([Call(*call) for call in answer["calls"]], answer["seconds"], size)
        self.lessons[name] = {**order, "do": "know", "wanted": answer["wanted"], "by": hand.number}

    def _catch_up(self, hand: Hand) -> None:
        for lesson in self.lessons.values():
            if lesson["by"] != hand.number:
                hand.ask(lesson)

    def _begins(self, hand: Hand) -> None:
        """What other stages and readers begin with: a training half done, one done, a run, a merge half done."""
        world = self.base / "world"
        if "train-pretrain" in self.known:
            second = next(
                call.number
                for call in self.known["train-pretrain"].calls
                if call.kind == "rename" and call.path.endswith("checkpoints/step-000002")
            )
            hand.ask(
                {
                    "do": "make",
                    "stage": "train-pretrain",
                    "kill_at": second + 1,
                    "into": str(world / "halfway"),
                }
            )
            hand.ask({"do": "make", "stage": "train-pretrain", "into": str(world / "trained")})
        if "run" in self.known:
            hand.ask({"do": "make", "stage": "run", "into": str(world / "finished")})
        for stage, last, into in (
            ("merge-linear", "journal", "halfmerged"),
            ("data-tokenize", "shard-00000.json", "halftokenized"),
        ):
            if stage in self.known:
                there = [
                    call.number
                    for call in self.known[stage].calls
                    if last in call.path and call.kind != "unlink"
                ]
                order = {"do": "make", "stage": stage, "kill_at": there[-1] + 1, "into": str(world / into)}
                hand.ask(order)

    def files(self) -> dict[str, Any]:
        """The files that can be spoilt."""
        return self.hands[0].ask({"do": "files"})

    def port(self) -> int:
        """Start the hostile server, once; its port."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.hostile"],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment(),
            )
            assert self._server.stdout is not None
            self._port = int(self._server.stdout.readline())
        return self._port

    def try_all(self, orders: list[Order], *, until: float, say: bool = True) -> None:
        """Hand the cases out, in order, until time ends (of `time.monotonic`)."""
        waiting: queue.SimpleQueue[Order] = queue.SimpleQueue()
        for order in orders:
            self.tally.planned[row_of(order)] += 1
            waiting.put(order)
        lock = threading.Lock()
        begin = told = time.monotonic()

        def work(place: int) -> None:
            nonlocal told
            while time.monotonic() < until:
                try:
                    order = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answer = self.hands[place].ask({"do": "try", **order})
                except DiedError as error:
                    answer = {"verdict": "silent", "why": f"the laboratory died: {error}"}
                    self.hands[place] = Hand(self.base, self.hands[place].number + len(self.hands))
                    for lesson in self.lessons.values():
                        self.hands[place].ask(lesson)
                with lock:
                    self.tally.add(order, answer)
                    if say and time.monotonic() - told > 30:
                        told = time.monotonic()
                        sums = self.tally.sums()
                        print(f"{told - begin:5.0f} s: {dict(sums)}, {waiting.qsize()} waiting", flush=True)

        _together([lambda place=place: work(place) for place in range(len(self.hands))])

    def end(self) -> None:
        for hand in self.hands:
            hand.end()
        if self._server is not None:
            self._server.kill()
            self._server.wait()


def _later(name: str) -> bool:
    stage = BY_NAME[name]
    return stage.begins_as is not None or "@halfway" in stage.command or "@finished" in stage.command


def _together(works: list[Any]) -> None:
    """Do all at once, each in a thread; the first error is raised."""
    errors: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
