"""Figures and tables of a results file.

python -m experiments.merging.plots experiments/merging/results/laptop.json
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from experiments.common.figures import markdown_table, mean_bits, save_figure, show_results, verdict_table

DOMAINS = ("code", "reviews", "maths")
PAIR = ("code", "maths")
MERGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear": ("linear", DOMAINS),
    "touched-up": ("linear, touched up", DOMAINS),
    "task-arithmetic": ("task arithmetic, scale 1.5", DOMAINS),
    "ties": ("TIES", DOMAINS),
    "dare-ties": ("DARE-TIES", DOMAINS),
    "model-stock": ("Model Stock", DOMAINS),
    "linear-pair": ("linear, two models", PAIR),
    "slerp-pair": ("SLERP, two models", PAIR),
}
CLUSTERS = ("romance", "slavic", "others")
SIZES = ("small", "large")


def relative_loss(results: dict[str, Any], arm: str, domain: str) -> list[float]:
    """Relative loss of an arm against the domain's own expert, one value a seed."""
    return [
        one / own - 1.0
        for one, own in zip(
            mean_bits(results, arm, [domain]), mean_bits(results, f"expert-{domain}", [domain]), strict=True
        )
    ]


def collisions(results: dict[str, Any], out: Path) -> None:
    """Draw the loss of each merge against each domain's own expert; every seed is a dot."""
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    for number, domain in enumerate(DOMAINS):
        for row, (arm, (_, domains)) in enumerate(MERGES.items()):
            if domain in domains:
                found = relative_loss(results, arm, domain)
                axis.scatter(
                    [100 * value for value in found],
                    [row + 0.2 * (number - 1)] * len(found),
                    s=14,
                    color=f"C{number}",
                    label=domain if row == 0 else None,
                )
    axis.axvline(0.0, color="0.4", linewidth=0.8)
    axis.set_yticks(range(len(MERGES)), [name for name, _ in MERGES.values()])
    axis.invert_yaxis()
    axis.set_xlabel("bits per byte above the domain's own expert, %")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, out)


def domain_table(results: dict[str, Any]) -> str:
    """Loss of each merge against each domain's own expert, means over seeds, as a Markdown table.

    Also in docs/explanation/combining.md.
    """
    rows = []
    for arm, (name, domains) in MERGES.items():
        cells = [
            f"{statistics.mean(relative_loss(results, arm, domain)):+.1%}" if domain in domains else ""
            for domain in DOMAINS
        ]
        rows.append([name, *cells])
    return markdown_table(["merge", *DOMAINS], rows)


def language_table(results: dict[str, Any]) -> str:
    """Bits per byte over all eleven languages, means over seeds, as a Markdown table.

    Also in docs/explanation/combining.md.
    """
    languages = list(results["runs"]["small-clusters/0"]["bits_per_byte"])
    rows = {
        "base": "-base",
        **{f"cluster {name} alone": f"-{name}" for name in CLUSTERS},
        "merge of clusters": "-clusters",
        "merge of single languages": "-languages",
        "one model on all languages, as many steps as the clusters together": "-joint",
    }
    cells = [
        [name, *(f"{statistics.mean(mean_bits(results, f'{size}{arm}', languages)):.3f}" for size in SIZES)]
        for name, arm in rows.items()
    ]
    return markdown_table(["model", *SIZES], cells)


if __name__ == "__main__":
    show_results({"collisions": collisions}, [verdict_table, domain_table, language_table])
