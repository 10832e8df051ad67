"""Figures and tables of a results file.

python -m experiments.rope_to_nope.plots experiments/rope_to_nope/results/laptop.json
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
    "rope": "RoPE",
    "qk-norm": "QK-Norm",
    "nope": "NoPE",
    "rnope-10k": "RNoPE, θ 10k",
    "rnope-100k": "RNoPE, θ 100k",
    "rnope-2m": "RNoPE, θ 2M",
    "rnope-4m": "RNoPE, θ 4M",
    "swa-1": "RNoPE-SWA 1:1",
    "swa-3": "RNoPE-SWA 3:1",
    "swa-7": "RNoPE-SWA 7:1",
}
DRAWN = ("rope", "qk-norm", "nope", "rnope-10k", "swa-1", "swa-3")
"""Arms of the figures; the others are in the table only."""


def drawn(results: dict[str, Any]) -> list[str]:
    """Return the arms of `DRAWN` that the results have."""
    return [arm for arm in DRAWN if arm in results["arms"]]


def by_seed(results: dict[str, Any], arm: str, length: str, measure: str) -> list[float]:
    """Return a measure of the answers, one value a seed."""
    return [results["runs"][f"{arm}/{seed}"]["answers"][length][measure] for seed in results["seeds"]]


def by_length(results: dict[str, Any], out: Path) -> None:
    """Draw log-probability and accuracy of the right value, by length of the text."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, what, label in zip(
        axes, ("log_probability", "accuracy"), ("log-probability of the value, nats", "accuracy"), strict=True
    ):
        for arm in drawn(results):
            lengths = list(results["runs"][f"{arm}/0"]["answers"])
            seeds = [by_seed(results, arm, length, what) for length in lengths]
            x = [int(length) for length in lengths]
            (line,) = axis.plot(
                x, [statistics.mean(one) for one in seeds], marker="o", markersize=3, label=NAMES[arm]
            )
            axis.fill_between(
                x,
                [min(one) for one in seeds],
                [max(one) for one in seeds],
                color=line.get_color(),
                alpha=0.15,
                linewidth=0,
            )
        axis.axvline(results["lengths"]["long"], color="0.6", linewidth=0.8, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{one:,}" for one in x])
        axis.set_xlabel("tokens of the text (dashed: the longest in training)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    save_figure(figure, out)


def attention(results: dict[str, Any], out: Path) -> None:
    """Draw the attention mass on the right fact, layer by layer."""
    figure, axis = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
    for arm in drawn(results):
        runs = [results["runs"][f"{arm}/{seed}"]["attention"] for seed in results["seeds"]]
        middle = [
            statistics.mean(layers[index]["mass"]["needle"] for layers in runs)
            for index in range(len(runs[0]))
        ]
        axis.plot(range(1, len(middle) + 1), middle, marker="o", markersize=3, label=NAMES[arm])
    axis.set_xlabel("layer")
    axis.set_ylabel("attention mass on the fact")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, out)


SEGMENTS = {
    "begin": "beginning",
    "needle": "the fact",
    "context": "other text",
    "question": "question and answer",
}


def segments(results: dict[str, Any], out: Path) -> None:
    """Draw attention mass by segment and attention entropy of each layer, means over seeds."""
    arms = drawn(results)
    width = max(2.1 * len(arms), 7.0)
    figure, axes = plt.subplots(
        2, len(arms), figsize=(width, 4.6), sharex=True, sharey="row", layout="constrained"
    )
    for arm, above, below in zip(arms, *axes, strict=True):
        runs = [results["runs"][f"{arm}/{seed}"]["attention"] for seed in results["seeds"]]
        layers = range(len(runs[0]))
        places = [layer + 1 for layer in layers]
        bottom = [0.0] * len(places)
        for segment, label in SEGMENTS.items():
            mass = [statistics.mean(run[layer]["mass"][segment] for run in runs) for layer in layers]
            above.bar(places, mass, bottom=bottom, width=0.85, label=label)
            bottom = [a + b for a, b in zip(bottom, mass, strict=True)]
        entropy = [statistics.mean(run[layer]["entropy_of_rows"] for run in runs) for layer in layers]
        full = [runs[0][layer]["kind"].startswith("full") for layer in layers]
        below.bar(places, entropy, width=0.85, color=["0.3" if one else "0.75" for one in full])
        above.set_title(NAMES[arm], fontsize=9)
        below.set_xlabel("layer")
        below.set_xticks(places)
    axes[0][0].set_ylabel("attention mass")
    axes[1][0].set_ylabel("entropy, bits\n(light: windows)")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    save_figure(figure, out)


def arm_table(results: dict[str, Any]) -> str:
    """Means over seeds of each arm as a Markdown table; also in docs/explanation/rope-to-nope.md."""
    lengths = list(next(iter(results["runs"].values()))["answers"])
    header = [f"{int(length):,}" for length in lengths]
    rows = []
    for arm in results["arms"]:
        bits = statistics.mean(results["runs"][f"{arm}/{seed}"]["bits_per_byte"] for seed in results["seeds"])
        cells = [
            f"{statistics.mean(by_seed(results, arm, length, 'log_probability')):.2f} "
            f"({statistics.mean(by_seed(results, arm, length, 'accuracy')):.0%})"
            for length in lengths
        ]
        rows.append([NAMES[arm], f"{bits:.3f}", *cells])
    return markdown_table(["arm", "bits per byte, short", *(f"{one} tokens" for one in header)], rows)


if __name__ == "__main__":
    show_results(
        {"length": by_length, "attention": attention, "segments": segments}, [verdict_table, arm_table]
    )
