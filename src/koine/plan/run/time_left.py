"""Progress of a whole run: share of the work that is done, and time left.

Work is weighed by expected seconds. The estimates of steps are corrected by what finished steps took, first
by those of the same function; steps that are reused take no part.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

PRIOR_SHARE = 0.2
"""Weight of the uncorrected estimates, in shares of all expected seconds, against steps of other functions."""
TRUSTED_FRACTION = 0.25
"""Progress of a running step after which its own speed alone counts, not its estimate."""
MEASURED_FRACTION = 0.1
"""Progress of a running step after which its speed corrects the estimates of others."""


@dataclass(kw_only=True)
class StepProgress:
    """One step that a run builds.

    function: the step's function; estimates of one function err alike.
    expected: estimated seconds; None where nothing is known.
    cores, memory: what it needs while it runs, as the scheduler counts it.
    started: when it started, on the monotonic clock; None while it waits.
    fraction: share that is done. first: time and fraction of its first report, after imports and resuming.
    seconds: how long it took; None until it has ended.
    measured: whether `seconds` is the time of a build; not so if it failed or another run built it.
    """

    function: str
    expected: float | None
    parents: tuple[str, ...]
    cores: int = 1
    memory: int = 0
    started: float | None = None
    fraction: float = 0.0
    first: tuple[float, float] | None = None
    seconds: float | None = None
    measured: bool = True

    def elapsed(self, now: float) -> float:
        """Return the seconds that it has run so far."""
        if self.seconds is not None:
            return self.seconds
        return 0.0 if self.started is None else now - self.started

    def speed(self, now: float) -> float | None:
        """Return the seconds that the whole step takes at the speed since its first report."""
        if self.first is None or self.fraction <= self.first[1]:
            return None
        return (now - self.first[0]) / (self.fraction - self.first[1])

    def comparison(self, now: float) -> tuple[float, float] | None:
        """Return measured and expected seconds of the same work; None before enough of it is done."""
        if not self.expected or not self.measured:
            return None
        if self.seconds is not None:
            return self.seconds, self.expected
        speed = self.speed(now)
        if speed is None or self.first is None or self.fraction - self.first[1] < MEASURED_FRACTION:
            return None
        return speed * self.fraction, self.expected * self.fraction

    def left(self, total: float, now: float) -> float:
        """Return the seconds that it still needs, where `total` are expected in all."""
        if self.seconds is not None:
            return 0.0
        if self.started is None:
            return total
        speed = self.speed(now)
        if speed is None or self.first is None:
            since = now - (self.started if self.first is None else self.first[0])
            return max((1.0 - self.fraction) * total - since, 0.05 * since)
        trust = min(1.0, (self.fraction - self.first[1]) / TRUSTED_FRACTION)
        return (1.0 - self.fraction) * (trust * speed + (1.0 - trust) * total)


@dataclass(frozen=True)
class Overall:
    """Display of a run.

    ended: steps that have ended. fraction: share of the work. seconds_left: None while nothing is known.
    """

    ended: int
    steps: int
    fraction: float
    seconds_left: float | None

    @property
    def step(self) -> int:
        """Number of the step that will end next, from 1; of the last one at the end."""
        return min(self.ended + 1, self.steps)


@dataclass
class RunProgress:
    """The steps that a run builds, in the order in which they are to start, and what they have done so far.

    cores, memory: those of the executor; memory None where it does not count.
    """

    steps: dict[str, StepProgress]
    cores: int
    memory: int | None = None
    shown_fraction: float = field(default=0.0, init=False)

    def start(self, name: str) -> None:
        """Record that a step has started."""
        self.steps[name].started = time.monotonic()

    def report(self, name: str, fraction: float) -> None:
        """Record the progress of a running step."""
        one = self.steps[name]
        if one.first is None and fraction > 0.0:
            one.first = (time.monotonic(), fraction)
        one.fraction = max(one.fraction, fraction)

    def end(self, name: str, *, measured: bool) -> None:
        """Record that a step has ended, or will never run; `measured`: whether it was built."""
        one = self.steps[name]
        one.seconds, one.measured = one.elapsed(time.monotonic()), measured

    def overall(self) -> Overall:
        """Return the state of the whole run."""
        now, steps = time.monotonic(), self.steps
        ended = sum(one.seconds is not None for one in steps.values())
        totals = self.expected_totals(now)
        share, seconds_left = ended / len(steps) if steps else 1.0, None
        if totals is not None:
            left = {name: one.left(totals[name], now) for name, one in steps.items()}
            done, missing = sum(one.elapsed(now) for one in steps.values()), sum(left.values())
            share = done / (done + missing) if done + missing > 0.0 else share
            seconds_left = makespan(steps, left, self.cores, self.memory)
        # Corrected estimates must not move the bar back.
        self.shown_fraction = max(self.shown_fraction, share)
        return Overall(ended, len(steps), self.shown_fraction, seconds_left)

    def expected_totals(self, now: float) -> dict[str, float] | None:
        """Return the corrected seconds of each step; None where nothing is known of any.

        A step without an estimate is expected to take as long as those that have ended, or as the others.
        """
        steps = self.steps.values()
        compared: dict[str, list[tuple[float, float]]] = {}
        for one in steps:
            if (pair := one.comparison(now)) is not None:
                compared.setdefault(one.function, []).append(pair)
        prior = PRIOR_SHARE * sum(one.expected or 0.0 for one in steps)
        general = ratio([(prior, prior), *(pair for pairs in compared.values() for pair in pairs)])
        factors = {one.function: ratio(compared.get(one.function, ())) or general or 1.0 for one in steps}
        totals = {
            name: one.expected * factors[one.function]
            for name, one in self.steps.items()
            if one.expected is not None
        }
        took = [one.seconds for one in steps if one.seconds is not None and one.measured]
        usual = mean(took or totals.values())
        return None if usual is None else {name: totals.get(name, usual) for name in self.steps}


def ratio(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Return measured over expected seconds of all pairs together; None where nothing was expected."""
    pairs = list(pairs)
    expected = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / expected if expected > 0.0 else None


def mean(values: Iterable[float]) -> float | None:
    """Return the arithmetic mean; None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None


def makespan(steps: dict[str, StepProgress], left: dict[str, float], cores: int, memory: int | None) -> float:
    """Return the seconds until all steps have ended, if they start as the scheduler starts them.

    left: seconds that each step still needs.
    """
    unmet = {
        name: sum(parent in steps and steps[parent].seconds is None for parent in one.parents)
        for name, one in steps.items()
        if one.seconds is None
    }
    consumers: dict[str, list[str]] = {name: [] for name in steps}
    for name in unmet:
        for parent in steps[name].parents:
            if parent in unmet:
                consumers[parent].append(name)
    place = {name: number for number, name in enumerate(steps)}
    running = [(left[name], place[name], name) for name in unmet if steps[name].started is not None]
    heapq.heapify(running)
    used = sum(steps[name].cores for _, _, name in running)
    held = sum(steps[name].memory for _, _, name in running)
    ready = [(place[name], name) for name in unmet if steps[name].started is None and unmet[name] == 0]
    heapq.heapify(ready)
    now = 0.0
    while running or ready:
        skipped = []
        while ready and (used < cores or not running):
            number, name = heapq.heappop(ready)
            one = steps[name]
            fits = used + one.cores <= cores and (memory is None or held + one.memory <= memory)
            if running and not fits:
                skipped.append((number, name))
                continue
            heapq.heappush(running, (now + left[name], number, name))
            used, held = used + one.cores, held + one.memory
        for entry in skipped:
            heapq.heappush(ready, entry)
        now, _, name = heapq.heappop(running)
        used, held = used - steps[name].cores, held - steps[name].memory
        for consumer in consumers[name]:
            unmet[consumer] -= 1
            if unmet[consumer] == 0:
                heapq.heappush(ready, (place[consumer], consumer))
    return now
