"""Figures and tables of a results file.

python -m experiments.nexus.plots experiments/nexus/results/laptop.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from experiments.common.figures import markdown_table, mean_bits, save_figure, show_results, verdict_table

NEW = "code"
ROUTERS = {"nexus": "Nexus", "linear": "linear, reset"}
NAMES = {
    "seed": "seed",
    "average": "dense average",
    "nexus": "Nexus",
    "linear": "linear router",
    "nexus-low": "Nexus, balance 0.0005",
    "linear-low": "linear, balance 0.0005",
}
"""Arms before the extension, from top to bottom of the table."""


def budgets(results: dict[str, Any]) -> list[int]:
    """Budgets of the extension in steps, ascending from 0."""
    return sorted(
        int(arm.removeprefix("nexus-").partition("/")[0])
        for arm in results["runs"]
        if arm.startswith("nexus-") and arm.endswith("/0") and arm.split("-")[1].split("/")[0].isdigit()
    )


def extension(results: dict[str, Any], out: Path) -> None:
    """Draw bits per byte of new and old domains, and the new expert's share, by steps of extension."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    steps = budgets(results)
    old = [name for name in results["runs"]["seed/0"]["bits_per_byte"] if name != NEW]
    panels: tuple[tuple[str, Callable[[str], list[float]]], ...] = (
        ("bits per byte, the new domain", lambda arm: mean_bits(results, arm, [NEW])),
        ("bits per byte, the others", lambda arm: mean_bits(results, arm, old)),
        (
            "share of the new domain's tokens\nthat its expert gets",
            lambda arm: [
                results["runs"][f"{arm}/{seed}"]["routing"][NEW]["chosen"][NEW] for seed in results["seeds"]
            ],
        ),
    )
    for axis, (label, values) in zip(axes, panels, strict=True):
        for router, name in ROUTERS.items():
            found = [values(f"{router}-{one}") for one in steps]
            middle = [statistics.mean(one) for one in found]
            (line,) = axis.plot(steps, middle, marker="o", markersize=3, label=name)
            axis.fill_between(
                steps,
                [min(one) for one in found],
                [max(one) for one in found],
                color=line.get_color(),
                alpha=0.15,
                linewidth=0,
            )
        axis.set_xlabel("steps of the extension")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[2].set_ylim(0.0, 1.0)
    axes[0].legend(fontsize=8, frameon=False)
    save_figure(figure, out)


def arm_table(results: dict[str, Any]) -> str:
    """Bits per byte of each arm as a Markdown table; also in docs/explanation/combining.md."""
    domains = list(results["runs"]["seed/0"]["bits_per_byte"])
    rows = dict(NAMES)
    for router, name in ROUTERS.items():
        rows |= {
            f"{router}-{steps}": f"{name}, extended, {f'{steps} steps' if steps else 'no step'}"
            for steps in budgets(results)
        }
    cells = []
    for arm, name in rows.items():
        bits = [f"{statistics.mean(mean_bits(results, arm, [domain])):.3f}" for domain in domains]
        shares = [
            results["runs"][f"{arm}/{seed}"]["routing"].get(NEW, {}).get("chosen", {}).get(NEW)
            for seed in results["seeds"]
        ]
        known = [share for share in shares if share is not None]
        cells.append([name, *bits, f"{statistics.mean(known):.0%}" if known else ""])
    return markdown_table(["arm", *domains, "share of code's tokens to its expert"], cells)


if __name__ == "__main__":
    show_results({"extension": extension}, [verdict_table, arm_table])
