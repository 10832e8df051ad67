"""Figures and tables of a results file.

python -m experiments.bam.plots experiments/bam/results/laptop.json
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from experiments.common.figures import markdown_table, save_figure, show_results, verdict_table

NAMES = {
    "seed": "seed",
    "btx": "BTX",
    "bam-shared": "BAM, shared keys",
    "bam-shared-flops": "… as many operations",
    "bam-shared-seconds": "… as many seconds",
    "bam": "BAM, own keys",
    "bam-flops": "… as many operations",
    "bam-seconds": "… as many seconds",
    "shared-top-2": "shared keys, top-2",
    "shared-top-1": "shared keys, top-1",
    "btx-6": "BTX of six",
    "btx-6-top-3": "BTX of six, top-3",
}
"""Arms from top to bottom of the figure and the table."""


def by_seed(results: dict[str, Any], arm: str, domain: str | None = None) -> list[float]:
    """Bits per byte of a domain or of their mean, one value a seed."""
    runs = [results["runs"][f"{arm}/{seed}"] for seed in results["seeds"]]
    return [one["mean"] if domain is None else one["bits_per_byte"][domain] for one in runs]


def mixtures(results: dict[str, Any], out: Path) -> None:
    """Draw each mixture's bits per byte minus those of BTX with the same seed; every seed is a dot."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    arms = [arm for arm in NAMES if arm not in ("seed", "btx")]
    base = by_seed(results, "btx")
    for row, arm in enumerate(arms):
        found = [one - other for one, other in zip(by_seed(results, arm), base, strict=True)]
        axis.scatter(found, [row] * len(found), s=14, color="C0")
        axis.plot(
            [statistics.mean(found)] * 2,
            [row - 0.3, row + 0.3],
            color="C1",
            linewidth=2,
            solid_capstyle="butt",
        )
    axis.axvline(0.0, color="0.4", linewidth=0.8)
    axis.set_yticks(range(len(arms)), [NAMES[arm] for arm in arms])
    axis.invert_yaxis()
    axis.set_xlabel("bits per byte less BTX's of the same seed (dots: seeds; bars: means)")
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, out)


def arm_table(results: dict[str, Any]) -> str:
    """Means over seeds of each arm as a Markdown table; also in docs/explanation/combining.md."""
    domains = list(results["runs"]["seed/0"]["bits_per_byte"])
    rows = []
    for arm, name in NAMES.items():
        cells = [f"{statistics.mean(by_seed(results, arm, domain)):.3f}" for domain in (*domains, None)]
        seconds = results["latency"].get(arm)
        rows.append([name, *cells, f"{statistics.mean(seconds):.3f}" if seconds else ""])
    return markdown_table(["arm", *domains, "mean", "latency, s"], rows)


if __name__ == "__main__":
    show_results({"mixtures": mixtures}, [verdict_table, arm_table])
