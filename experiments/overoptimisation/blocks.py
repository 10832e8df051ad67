"""Blocks of the report: verdicts, the stop rule, and curves of some runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common.hypotheses import verdict_blocks
from experiments.overoptimisation import statistics as st
from experiments.overoptimisation.runs import LIKELIHOOD, P_WIN, Rows, Run, Runs

Block = dict[str, Any]
NAMES = {"dpo": "DPO", "ipo": "IPO", "slic": "Hinge"}
BY_STEP = (
    ("Likelihoods and margin", "nats per token", ("chosen", "rejected", "margin")),
    ("Entropy of the top 10", "bits", ("entropy",)),
    ("Mass of the top 10", "probability", ("mass",)),
    ("P_win", "probability", (P_WIN,)),
)


def report_blocks(
    runs: Runs, hypotheses: Mapping[str, Mapping[str, Any]], rule: Mapping[str, Any] | None
) -> list[Block]:
    """Return all blocks, the verdicts first."""
    blocks = verdict_blocks(hypotheses)
    if rule is not None:
        blocks.append(rule_table(rule))
    shown = shown_runs(runs)
    blocks += curves(shown, rule)
    blocks.append(gold_against_kl(shown))
    blocks.append(p_win_against_likelihood(runs.select(nll=False)))
    return blocks


def rule_table(rule: Mapping[str, Any]) -> Block:
    """Return the table of the stop rule."""
    constants = ", ".join(f"{name} {value:g}" for name, value in rule["constants"].items())
    rows = [
        ["constants", constants],
        ["detected", f"{rule['detected']} of {rule['over_optimised']} over-optimised runs"],
        ["false alarms", f"{rule['false_alarms']} of {rule['other']} other runs"],
        ["lead", "–" if rule["lead"] is None else f"{rule['lead']:g} steps"],
        ["regret in P_win", f"{rule['regret']:.4f}"],
        ["regret of the last checkpoint", f"{rule['regret_of_the_last']:.4f}"],
        ["regret of the first", f"{rule['regret_of_the_first']:.4f}"],
    ]
    caption = f"Chosen on {rule['chosen_on']} runs, measured on {rule['measured_on']} others."
    return {"kind": "table", "title": "Stop rule", "caption": caption, "columns": ["", ""], "rows": rows}


def shown_runs(runs: Runs) -> Runs:
    """Return the runs that are drawn: of the first seed, each loss at its smallest, a middle and its largest strength."""
    seed = min(run.seed for run in runs.rows)
    chosen = {}
    for loss in NAMES:
        own = [run for run in sorted(runs.rows) if run.loss == loss and run.seed == seed and not run.nll]
        for one in {0, len(own) // 2, len(own) - 1} if own else set():
            chosen[own[one]] = runs.rows[own[one]]
    return Runs(dict(sorted(chosen.items())))


def label(run: Run) -> str:
    """Return the name of a run in a legend."""
    return f"{NAMES[run.loss]} {run.strength:g}"


def curves(runs: Runs, rule: Mapping[str, Any] | None) -> list[Block]:
    """Return plots by step: of each loss, the likelihoods and the margin; entropy, mass and P_win of all shown."""
    blocks = []
    for loss in sorted({run.loss for run in runs.rows}):
        run = min(one for one in runs.rows if one.loss == loss)
        title, unit, names = BY_STEP[0]
        series = [_course(runs.rows[run], name, name) for name in names]
        stop = _stop(runs.rows[run], rule)
        if stop is not None:
            values = [value for one in series for value in one["y"]]
            series.append({"name": "stop", "x": [stop, stop], "y": [min(values), max(values)]})
        blocks.append(_lines(f"{title}, {label(run)}", unit, "step", series))
    for title, unit, (name,) in BY_STEP[1:]:
        series = [_course(rows, name, label(run)) for run, rows in runs.rows.items()]
        blocks.append(_lines(title, unit, "step", series[:8]))
    return blocks


def _stop(rows: Rows, rule: Mapping[str, Any] | None) -> int | None:
    """Return the step at which the rule stops a run; None: it does not."""
    from koine.align.overoptimisation import Constants, verdict

    return None if rule is None else verdict(rows, Constants(**rule["constants"])).step


def _course(rows: Rows, name: str, title: str) -> Block:
    return {"name": title, "x": [row["step"] for row in rows], "y": [row[name] for row in rows]}


def gold_against_kl(runs: Runs) -> Block:
    """Return the plot of gold reward against KL: a line for each shown run, from its start."""
    series = [
        {"name": label(run), "x": [row["kl"] for row in rows], "y": [row["gold"] for row in rows]}
        for run, rows in runs.rows.items()
    ]
    return _lines("Gold reward against KL", "gold reward, 0 to 6", "KL, nats per token", series[:8])


def p_win_against_likelihood(runs: Runs) -> Block:
    """Return the plot of P_win against likelihood, both less their seed's start: the runs, a line, a quadratic."""
    x, y = runs.change(LIKELIHOOD), runs.change(P_WIN)
    series = []
    for loss, name in NAMES.items():
        own = np.array([run.loss == loss for run in runs.rows], dtype=bool)
        order = np.argsort(x[own], kind="stable")
        if own.any():
            series.append({"name": name, "x": x[own][order].tolist(), "y": y[own][order].tolist()})
    if len(runs) > 3 and x.std() > 0:
        at = np.linspace(x.min(), x.max(), 40)
        z = (at - x.mean()) / x.std()
        for name, degree in (("line", 1), ("quadratic", 2)):
            fit = st.fitted_curve(x, y, degree)
            values = sum(coefficient * z**power for power, coefficient in enumerate(fit))
            series.append({"name": name, "x": at.tolist(), "y": np.asarray(values).tolist()})
    return _lines(
        "P_win against likelihood, after the last step",
        "P_win less the start",
        "nats per token less the start",
        series,
    )


def _lines(title: str, unit: str, x: str, series: Sequence[Block]) -> Block:
    return {"kind": "lines", "title": title, "x_label": x, "y_label": unit, "series": list(series)}
