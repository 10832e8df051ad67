"""Figures and tables of a results file.

python -m experiments.overoptimisation.plots experiments/overoptimisation/results/laptop.json
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import matplotlib as mpl

mpl.use("svg")
import numpy as np
from matplotlib import pyplot as plt

from experiments.common.figures import Results, markdown_table, save_figure, show_results, verdict_table
from experiments.overoptimisation import statistics as st
from experiments.overoptimisation.blocks import NAMES, label, shown_runs
from experiments.overoptimisation.runs import LIKELIHOOD, P_WIN, Runs

COLOURS = {"dpo": "C0", "ipo": "C1", "slic": "C2"}


def p_win_against_likelihood(results: Results, out: Path) -> None:
    """Draw P_win against likelihood, both less their seed's start: a dot a run, a line and a quadratic."""
    runs = Runs.from_json(results["runs"]).select(nll=False)
    x, y = runs.change(LIKELIHOOD), runs.change(P_WIN)
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for loss, name in NAMES.items():
        own = [run.loss == loss for run in runs.rows]
        axis.scatter(x[own], y[own], s=16, color=COLOURS[loss], label=name)
    at = np.linspace(x.min(), x.max(), 100)
    z = (at - x.mean()) / x.std()
    for degree, style in ((1, "--"), (2, "-")):
        fit = st.fitted_curve(x, y, degree)
        axis.plot(at, sum(one * z**power for power, one in enumerate(fit)), style, color="0.3", linewidth=1)
    axis.axhline(0.0, color="0.6", linewidth=0.8)
    axis.set_xlabel("log-likelihood of the chosen answers, nats per token, less the start")
    axis.set_ylabel("P_win less the start")
    axis.legend(frameon=False)
    save_figure(figure, out)


def courses(results: Results, out: Path) -> None:
    """Draw P_win, entropy, mass and KL by step, for each loss at three strengths of the first seed."""
    runs = shown_runs(Runs.from_json(results["runs"]))
    figure, axes = plt.subplots(2, 2, figsize=(7.5, 5.2), layout="constrained", sharex=True)
    panels = ((P_WIN, "P_win"), ("entropy", "entropy of the top 10, bits"), ("mass", "mass of the top 10"), ("kl", "KL, nats per token"))  # fmt: skip
    for axis, (name, title) in zip(axes.flat, panels, strict=True):
        for number, (run, rows) in enumerate(runs.rows.items()):
            axis.plot(
                [row["step"] for row in rows],
                [row[name] for row in rows],
                ("-", "--", ":")[number % 3],
                color=COLOURS[run.loss],
                linewidth=1.2,
                label=label(run),
            )
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8
    )
    save_figure(figure, out)


def run_table(results: Results) -> str:
    """Means over seeds of each configuration as a Markdown table."""
    runs = Runs.from_json(results["runs"])
    rows = []
    for name in dict.fromkeys(run.configuration for run in runs.rows):
        own = [evaluations for run, evaluations in runs.rows.items() if run.configuration == name]
        loss, strength, nll = name.split("/")
        final = {figure: fmean(one[-1][figure] for one in own) for figure in own[0][-1]}
        best = fmean(max(row[P_WIN] for row in one) for one in own)
        rows.append(
            [
                NAMES[loss],
                strength,
                nll if nll != "0" else "",
                f"{best:.3f}",
                *(f"{final[figure]:.3f}" for figure in (P_WIN, "gold", "chosen", "margin", "kl")),
                *(f"{final[figure]:.2f}" for figure in ("entropy", "mass", "ead", "f1", "length")),
            ]
        )
    columns = ["loss", "strength", "NLL", "best P_win", "P_win", "gold", "chosen", "margin", "KL", "entropy", "mass", "EAD", "F1", "length"]  # fmt: skip
    return markdown_table(columns, rows)


def rule_table(results: Results) -> str:
    """Return the stop rule's constants and how it did, as Markdown; "" without a rule."""
    rule = results["stop_rule"]
    if rule is None:
        return ""
    constants = ", ".join(f"{name} {value:g}" for name, value in rule["constants"].items())
    regrets = [f"{rule[name]:.4f}" for name in ("regret", "regret_of_the_default", "regret_of_the_last", "regret_of_the_first")]  # fmt: skip
    return f"{constants}\n\n{rule['text']}\n\n" + markdown_table(
        ["regret of the rule", "default constants", "last checkpoint", "first"], [regrets]
    )


if __name__ == "__main__":
    show_results(
        {"likelihood": p_win_against_likelihood, "courses": courses}, [verdict_table, run_table, rule_table]
    )
