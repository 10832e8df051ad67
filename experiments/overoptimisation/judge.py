"""One verdict a hypothesis, and the constants of the stop rule, as EXPECTED.md set before the first run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from experiments.common.hypotheses import (
    above,
    below,
    combine_verdicts,
    estimated,
    interval,
)
from experiments.overoptimisation import statistics as st
from experiments.overoptimisation.blocks import report_blocks
from experiments.overoptimisation.runs import LIKELIHOOD, P_WIN, Runs
from experiments.overoptimisation.statistics import Array, Estimated, Index
from koine.files import write_json
from koine.plan import step
from koine.steps import estimates

FEWEST = 12
"""Runs without which a hypothesis is inconclusive."""
LENGTH_MARGIN = 0.3
"""Largest correlation that counts as none (LO3)."""
NLL_MARGIN = 0.02
"""Largest effect of the NLL on P_win, at the same likelihood, that counts as none (LO4)."""
EQUIVALENCE = 0.90
"""Confidence of the interval that must lie inside a margin: two one-sided tests at 5 %."""
LOSS = 0.05
"""Fall of P_win from its peak from which a run is over-optimised."""
STRONGEST = 2
"""Strengths of a loss that count as its strongest, of six."""
Entry = dict[str, Any]


def verdicts(runs: Runs) -> dict[str, Entry]:
    """Judge LO1 to LO9."""
    alone = runs.select(nll=False)
    return {
        "LO1": likelihood_against_p_win(alone),
        "LO2": margin_against_p_win(alone.select(losses=("dpo", "ipo"))),
        "LO3": likelihood_against_length(runs),
        "LO4": nll_at_given_likelihood(runs.select(losses=("dpo",)), runs),
        "LO5": likelihood_against(
            "ead", alone, -1, "negative (qualitative)", "diversity falls with likelihood"
        ),
        "LO6": likelihood_against("f1", alone, 1, "positive (qualitative)", "memory rises with likelihood"),
        "LO7": entropy_turn(alone.select(losses=("dpo", "ipo"))),
        "LO8": hinge_mass(alone.select(losses=("slic",))),
        "LO9": likelihood_against_distance(runs),
    }


def sign_of(found: Estimated, sign: int) -> str:
    """Judge the claim that an estimate has a sign: its whole interval, or none of it, lies on that side."""
    low, high = (found.low, found.high) if sign > 0 else (-found.high, -found.low)
    if not math.isfinite(low + high):
        return "inconclusive"
    return "reproduced" if low > 0 else "not reproduced" if high < 0 else "inconclusive"


def sign_known(found: Estimated) -> int:
    """Return the sign of an estimate whose interval lies on one side of 0; else 0."""
    return {"reproduced": 1, "not reproduced": -1, "inconclusive": 0}[sign_of(found, 1)]


def inside(found: Estimated, margin: float) -> str:
    """Judge the claim that an estimate is no further from 0 than `margin`."""
    if not math.isfinite(found.low + found.high):
        return "inconclusive"
    if -margin <= found.low and found.high <= margin:
        return "reproduced"
    return "not reproduced" if found.low > margin or found.high < -margin else "inconclusive"


def judged(
    runs: Runs, verdict: Callable[[], str], series: Mapping[str, Estimated], paper: str, why: str
) -> Entry:
    """Return the entry of a hypothesis; with fewer than `FEWEST` runs it is inconclusive."""
    if len(runs) < FEWEST:
        return estimated("inconclusive", {}, paper, f"{why}; {len(runs)} runs are too few")
    found = {name: (one.value, one.interval) for name, one in series.items()}
    return estimated(verdict(), found, paper, why)


def likelihood_against_p_win(runs: Runs) -> Entry:
    """LO1: a quadratic predicts P_win of a run left out better than a line, and it is an inverted U."""
    paper, why = "RMSE -24.42 % (7B), -25.78 % (35B)", "the best likelihood lies in the middle"
    if len(runs) < FEWEST:
        return judged(runs, str, {}, paper, why)
    x, y = runs.change(LIKELIHOOD), runs.change(P_WIN)
    gain = st.bootstrap(lambda index: st.quadratic_gain(x, y, index), len(runs))
    bend = st.bootstrap(lambda index: st.curvature(x, y, index), len(runs))
    turn = st.bootstrap(lambda index: st.turning_point(x[index], y[index]), len(runs))
    is_inside = "reproduced" if 0 < turn.value < 1 else "not reproduced"
    return judged(
        runs,
        lambda: combine_verdicts([sign_of(gain, 1), sign_of(bend, -1), is_inside]),
        {"RMSE of the quadratic less": gain, "curvature": bend, "turn, share of the range": turn},
        paper,
        why,
    )


def margin_against_p_win(runs: Runs) -> Entry:
    """LO2: runs with the largest margins win less often than those with middle ones."""
    paper, why = "largest margins degrade after about 1,000 steps", "the largest margins are not the best"
    if len(runs) < FEWEST:
        return judged(runs, str, {}, paper, why)
    x, y = runs.change("margin"), runs.change(P_WIN)

    def largest_less_middle(index: Index) -> float:
        order = index[np.argsort(x[index], kind="stable")]
        third = len(order) // 3
        return float(y[order[-third:]].mean() - y[order[third:-third]].mean())

    found = st.bootstrap(largest_less_middle, len(runs))
    return judged(runs, lambda: sign_of(found, -1), {"largest third less middle third": found}, paper, why)


def likelihood_against_length(runs: Runs) -> Entry:
    """LO3: length does not go with likelihood."""
    paper, why = "-0.114 (7B), +0.198 (35B)", "length does not explain likelihood"
    if len(runs) < FEWEST:
        return judged(runs, str, {}, paper, why)
    x, y = runs.change(LIKELIHOOD), runs.change("length")
    found = st.bootstrap(lambda index: st.correlation(x[index], y[index]), len(runs), confidence=EQUIVALENCE)
    return judged(runs, lambda: inside(found, LENGTH_MARGIN), {"correlation": found}, paper, why)


def nll_at_given_likelihood(dpo: Runs, runs: Runs) -> Entry:
    """LO4: where the likelihood is the same, more NLL does not change P_win."""
    paper, why = "qualitative", "the NLL matters only through the likelihood"
    betas = {run.strength for run in dpo.select(nll=True).rows}
    used = Runs({run: rows for run, rows in dpo.rows.items() if run.strength in betas})
    if len(used) < FEWEST:
        return judged(used, str, {}, paper, why)
    weights = sorted({run.nll for run in used.rows})
    level = np.array([weights.index(run.nll) / (len(weights) - 1) for run in used.rows])
    x, y = used.change(LIKELIHOOD), used.change(P_WIN)
    effect = st.bootstrap(
        lambda index: st.effect_at_given(x, level, y, index), len(used), confidence=EQUIVALENCE
    )
    moved = st.bootstrap(lambda index: st.rank_correlation(level[index], x[index]), len(used))
    return judged(
        used,
        lambda: inside(effect, NLL_MARGIN),
        {"P_win, strongest NLL less none": effect, "rank correlation of NLL and likelihood": moved},
        paper,
        why,
    )


def likelihood_against(name: str, runs: Runs, sign: int, paper: str, why: str) -> Entry:
    """LO5, LO6: likelihood and another figure go together, or against each other."""
    if len(runs) < FEWEST:
        return judged(runs, str, {}, paper, why)
    x, y = runs.change(LIKELIHOOD), runs.change(name)
    found = st.bootstrap(lambda index: st.rank_correlation(x[index], y[index]), len(runs))
    return judged(runs, lambda: sign_of(found, sign), {"rank correlation": found}, paper, why)


def entropy_turn(runs: Runs) -> Entry:
    """LO7: in a run, entropy turns down where P_win peaks: nearer than in runs that are shuffled."""
    paper, why = "coincide (qualitative)", "the turn of the entropy marks the peak"
    used, turn, peak = turning_runs(runs)
    if len(used) < FEWEST:
        return judged(used, str, {}, paper, f"{why}; of {len(runs)} runs those where both turn")
    gain = st.bootstrap(lambda index: st.gap_gain(turn, peak, index), len(used))
    share = st.shuffled_share(turn, peak)
    gap = st.bootstrap(lambda index: float(np.median(np.abs(turn - peak)[index])), len(used))
    p = Estimated(share, share, share)

    def verdict() -> str:
        return "reproduced" if share <= 0.05 else "not reproduced" if gain.low > 0 else "inconclusive"

    return judged(
        used,
        verdict,
        {
            "median gap less that of shuffled runs, share of the training": gain,
            "median gap, share of the training": gap,
            "share of shuffles with a smaller gap": p,
        },
        paper,
        why,
    )


def turning_runs(runs: Runs) -> tuple[Runs, Array, Array]:
    """Return the runs whose entropy and P_win both peak inside, and these places as shares of the training."""
    if not len(runs):
        return runs, np.zeros(0), np.zeros(0)
    steps = runs.steps()
    found = [st.peaks(runs.courses(name)) for name in ("entropy", P_WIN)]
    last = len(steps) - 1
    keep = np.logical_and.reduce([(one > 0) & (one < last) for one in found])
    used = Runs({run: rows for (run, rows), kept in zip(runs.rows.items(), keep, strict=True) if kept})
    turn, peak = (steps[one[keep]] / steps[-1] for one in found)
    return used, turn, peak


def hinge_mass(runs: Runs) -> Entry:
    """LO8: with the strongest hinge losses, the entropy rises while the mass of the top 10 falls."""
    paper, why = "yes on some runs", "hinge spreads probability beyond the top 10"
    used = runs.strongest(STRONGEST)
    if len(used) < 3 or len(runs) < FEWEST:
        return judged(Runs({}), str, {}, paper, why)
    changes = {name: st.slopes(used.courses(name)).tolist() for name in ("mass", "entropy")}
    found = {
        f"{name}, change over the training": Estimated(fmean(values), *interval(values))
        for name, values in changes.items()
    }
    verdict = combine_verdicts([below(changes["mass"]), above(changes["entropy"])])
    return judged(runs, lambda: verdict, found, paper, why)


def likelihood_against_distance(runs: Runs) -> Entry:
    """LO9: the distance to the reference falls with the likelihood on one side, and rises on the other.

    Source of the test by two lines: U. Simonsohn, Two lines (2018).
    """
    paper, why = (
        "not monotone (qualitative)",
        "likelihood does not tell how far the policy is from the reference",
    )
    if len(runs) < FEWEST:
        return judged(runs, str, {}, paper, why)
    x, y = runs.change(LIKELIHOOD), runs.final("l2")
    at = st.break_of(x, y)
    low = st.bootstrap(lambda index: st.side_slope(x, y, at, -1, index), len(runs))
    high = st.bootstrap(lambda index: st.side_slope(x, y, at, 1, index), len(runs))
    signs = (sign_known(low), sign_known(high))
    verdict = "inconclusive" if 0 in signs else "reproduced" if signs[0] != signs[1] else "not reproduced"
    rank = st.bootstrap(lambda index: st.rank_correlation(x[index], y[index]), len(runs))
    return judged(
        runs,
        lambda: verdict,
        {"rank correlation": rank, "slope below the break": low, "slope above it": high},
        paper,
        why,
    )


# --- the pilot, and the stop rule ---


def pilot(runs: Runs) -> dict[str, Any]:
    """Return how much P_win each of the strongest losses loses from its peak, and whether that is enough.

    The two strongest of every loss must lose `LOSS`, else the data change, not the claim.
    """
    used = runs.select(nll=False).strongest(STRONGEST)
    lost = {run.key: peak_less_last(rows) for run, rows in used.rows.items()}
    return {"lost": lost, "enough": bool(lost) and min(lost.values()) >= LOSS}


def peak_less_last(rows: Any) -> float:
    """Return how far P_win has fallen from its peak at the end."""
    values = [row[P_WIN] for row in rows]
    return float(max(values) - values[-1])


def stop_rule(runs: Runs) -> dict[str, Any] | None:
    """Choose the constants of the stop rule on half of the configurations, and measure it on the others.

    Regrets are in P_win: of the rule, of keeping the last evaluation, and of keeping the first.
    """
    from koine.align.calibration import choose_constants, measure_rule
    from koine.align.overoptimisation import Constants

    names = sorted({run.configuration for run in runs.rows})
    halves = [
        [
            gold_run(rows)
            for run, rows in sorted(runs.rows.items())
            if names.index(run.configuration) % 2 == half
        ]
        for half in (0, 1)
    ]
    if not all(halves):
        return None
    candidates = [
        Constants(rise=rise, fall=fall, mass_fall=mass, diversity_rise=diversity, patience=patience)
        for patience, rise, fall, mass, diversity in product(
            (2, 1, 3), (0.05, 0.02, 0.1, 0.2), (0.05, 0.02, 0.1, 0.2), (0.02, 0.005, 0.05), (0.0, 0.02, -1.0)
        )
    ]
    chosen = choose_constants(halves[0], candidates, loss=LOSS)
    measured = measure_rule(halves[1], chosen, loss=LOSS)
    default = measure_rule(halves[1], Constants(), loss=LOSS)
    constants = {
        name: value for name, value in asdict(replace(chosen, calibration=None)).items() if value is not None
    }
    return {
        "constants": constants,
        "chosen_on": len(halves[0]),
        "measured_on": len(halves[1]),
        **asdict(measured),
        "regret_of_the_default": default.regret,
        "regret_of_the_last": fmean(max(run.gold) - run.gold[-1] for run in halves[1]),
        "regret_of_the_first": fmean(max(run.gold) - run.gold[0] for run in halves[1]),
        "text": str(measured),
    }


def gold_run(rows: Any) -> Any:
    """Return a run as the calibration reads it: its figures, and P_win as gold."""
    from koine.align.calibration import GoldRun

    return GoldRun(tuple(rows), tuple(row[P_WIN] for row in rows))


def needs(runs: Mapping[str, Path], **_: Any) -> Any:
    """Return the estimate of `judge`: the bootstraps."""
    found = estimates.comparison()
    return replace(found, seconds=20.0 if len(runs) >= FEWEST else 2.0, memory_bytes=300 * 2**20)


@step(version="1", estimate=needs)
def judge(runs: dict[str, Path], *, scale: str, seeds: tuple[int, ...], out: Path) -> None:
    """Write results.json (every evaluation of every run, one verdict a hypothesis) and the report."""
    found = Runs.read(runs)
    hypotheses, rule = verdicts(found), stop_rule(found)
    write_json(
        out / "results.json",
        {
            "experiment": "overoptimisation",
            "scale": scale,
            "seeds": list(seeds),
            "hypotheses": hypotheses,
            "pilot": pilot(found),
            "stop_rule": rule,
            "runs": found.to_json(),
        },
    )
    write_json(
        out / "report.json",
        {"title": "Over-optimisation: verdicts", "blocks": report_blocks(found, hypotheses, rule)},
    )
