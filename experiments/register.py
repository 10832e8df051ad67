"""Register of all measured hypotheses, as in docs/explanation/papers.md.

python -m experiments.register
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koine.files import read_json

HERE = Path(__file__).resolve().parent
SCALES = ("laptop", "laptop-deep", "gpu", "cluster")

# Verdicts whose experiment has a known fault. Remove each when the experiment has run again without it.
UNDER_REVIEW = {
    "RN1": (
        "weight decay pulled down the gains of QK-Norm, and the tie of 0.03 bits per byte that "
        "counts as equal is seven times the paper's effect"
    ),
    "RN2": (
        "weight decay pulled down the gains of QK-Norm, and NoPE had not learnt to find the fact at"
        " the training length"
    ),
    "RN3": "weight decay pulled down the gains of QK-Norm, and smaller gains alone spread attention",
    "RN6": (
        "RoPE finds 15 % of the facts at its own training length, so that beyond it there is "
        "nothing to lose; seeds are bimodal"
    ),
    "UT8": (
        "25 of 26 languages stand at the cap of text a language, so that the arms have nearly the "
        "same weights"
    ),
    "CA2": (
        "the relative loss says how far the experts moved from their seed, not which part of their "
        "gain the merge keeps"
    ),
    "AE3": (
        "the merge is worse than one model trained on all languages, and at hidden 128 than the "
        "base, which the rule does not ask"
    ),
}


def measured(entry: Mapping[str, Any]) -> str:
    """Format the headline of a hypothesis and its interval; of a sweep, every size."""

    def one(value: float, interval: list[float]) -> str:
        return f"{value:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"

    value, interval = entry["measured"], entry["interval"]
    if isinstance(value, dict):
        return "; ".join(f"{size}: {one(value[size], interval[size])}" for size in value)
    return "–" if value is None else one(value, interval)


def standing(name: str, entry: Mapping[str, Any]) -> str:
    """Return the verdict of a hypothesis, marked where it is under review."""
    verdict = str(entry["verdict"])
    return f"under review (was: {verdict})" if name in UNDER_REVIEW else verdict


def reviews() -> str:
    """Return the list of verdicts under review in Markdown, each with its reason."""
    return "".join(f"- {name}: {reason}.\n" for name, reason in UNDER_REVIEW.items())


def table(folder: Path = HERE) -> str:
    """Return the register in Markdown: a row for each hypothesis and scale, by name of experiment."""
    lines = [
        "| id | experiment | scale | seeds | verdict | headline (95 % interval) |",
        "|---|---|---|---|---|---|",
    ]
    for experiment in sorted(path.parent.name for path in folder.glob("*/plan.py")):
        for scale in SCALES:
            file = folder / experiment / "results" / f"{scale}.json"
            if file.exists():
                results = read_json(file)
                lines += [
                    f"| {name} | `{experiment}` | {scale} | {len(results['seeds'])} "
                    f"| {standing(name, entry)} | {measured(entry)} |"
                    for name, entry in results["hypotheses"].items()
                ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())
    print(reviews())
