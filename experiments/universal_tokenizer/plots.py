"""Figures of a results file, and its table of verdicts.

python -m experiments.universal_tokenizer.plots experiments/universal_tokenizer/results/laptop.json
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from experiments.common.figures import save_figure, show_results

ARMS = {
    "universal": "Universal, 0 %",
    "universal-5": "Universal, 5 %",
    "cluster": "Cluster",
    "replaced-distill": "replaced, distilled",
    "replaced-subword-mean": "replaced, mean of pieces",
    "replaced-random": "replaced, random",
}


def curves(results: dict[str, Any], arm: str) -> tuple[list[int], list[list[float]]]:
    """Return the steps, and for each seed the mean over expanded languages."""
    expanded = results["languages"]["expanded"]
    found = []
    steps: list[int] = []
    for seed in results["seeds"]:
        tracked = results["runs"][f"continued/{arm}/{seed}"]
        steps = sorted(map(int, tracked))
        found.append([statistics.mean(tracked[str(one)][code] for code in expanded) for one in steps])
    return [max(one, 0) for one in steps], found


def adaptation(results: dict[str, Any], out: Path) -> None:
    """Draw bits per byte of the expanded languages during adaptation, by steps and by *expanded* bytes.

    The primary fifth of the text is not counted.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, label in zip(axes, ("steps", "steps × bytes per token of expanded text"), strict=True):
        for arm, name in ARMS.items():
            steps, seeds = curves(results, arm)
            scale = 1.0
            if axis is axes[1]:
                scale = results["training_bytes_per_token"]["cluster" if arm == "cluster" else "universal"]
            x = [one * scale for one in steps]
            middle = [statistics.mean(part) for part in zip(*seeds, strict=True)]
            (line,) = axis.plot(x, middle, label=name, linewidth=1.5)
            low, high = ([edge(part) for part in zip(*seeds, strict=True)] for edge in (min, max))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits per byte, expanded languages")
    axes[0].set_ylim(top=min(8.0, axes[0].get_ylim()[1]))
    axes[1].legend(fontsize=8, frameon=False)
    save_figure(figure, out)


def sweep(results: dict[str, Any], out: Path) -> None:
    """Draw Universal minus Cluster on the primary languages after pretraining, by vocabulary size."""
    entry = results["hypotheses"]["UT9"]
    sizes = sorted(map(int, entry["measured"]))
    middle = [entry["measured"][str(size)] for size in sizes]
    low = [entry["measured"][str(size)] - entry["interval"][str(size)][0] for size in sizes]
    figure, axis = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    axis.axhline(0.0, color="0.4", linewidth=0.8)
    axis.errorbar(sizes, middle, yerr=low, marker="o", capsize=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_xlabel("vocabulary")
    axis.set_ylabel("Universal − Cluster,\nbits per byte, primary")
    axis.grid(alpha=0.3)
    save_figure(figure, out)


def predicted(results: dict[str, Any], out: Path) -> None:
    """Draw the expected cost of each expanded language against its bits per byte after adaptation."""
    after = results["predictor"]["bits_per_byte_after"]
    figure, axis = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for one in results["predictor"]["expected"]:
        axis.scatter(one["cost"], after[one["language"]], s=14, color="C0")
        axis.annotate(
            one["language"],
            (one["cost"], after[one["language"]]),
            fontsize=8,
            xytext=(3, 2),
            textcoords="offset points",
        )
    axis.set_xlabel("expected cost, before any training")
    axis.set_ylabel("bits per byte after adaptation")
    axis.grid(alpha=0.3)
    save_figure(figure, out)


def table(results: dict[str, Any]) -> str:
    """Verdicts as a Markdown table; also in docs/explanation/universal-tokenizer.md."""
    lines = ["| id | verdict | measured, bits per byte (95 % interval) | paper |", "|---|---|---|---|"]
    for name, one in results["hypotheses"].items():
        if name == "UT9":
            measured = "; ".join(
                f"{value:+.3f} ({one['interval'][size][0]:+.3f} to {one['interval'][size][1]:+.3f}) "
                f"at {int(size):,}"
                for size, value in one["measured"].items()
            )
        elif name == "UT5" and one["measured"] is not None:
            measured = ", ".join(
                f"{part['measured']:.1f} ({part['interval'][0]:.1f} to {part['interval'][1]:.1f}) "
                f"times per {unit}"
                for unit, part in (("step", one), ("byte", one["per_byte"]))
            )
        else:
            measured = f"{one['measured']:+.3f} ({one['interval'][0]:+.3f} to {one['interval'][1]:+.3f})"
        lines.append(f"| {name} | {one['verdict']} | {measured} | {one['paper']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    figures = {"adaptation": adaptation, "sweep": sweep, "predictor": predicted}
    show_results(figures, [table], salt=Path(sys.argv[-1]).stem)
