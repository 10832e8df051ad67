"""Every hypothesis that was measured, of all experiments and scales: `python experiments/register.py` prints the table that docs/papers.md holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koine.files import read_json

HERE = Path(__file__).resolve().parent
SCALES = ("laptop", "laptop-deep", "gpu", "cluster")


def measured(entry: Mapping[str, Any]) -> str:
    """The headline of a hypothesis and its interval; of a sweep, every size."""

    def one(value: float, interval: list[float]) -> str:
        return f"{value:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"

    value, interval = entry["measured"], entry["interval"]
    if isinstance(value, dict):
        return "; ".join(f"{size}: {one(value[size], interval[size])}" for size in value)
    return "–" if value is None else one(value, interval)


def table(folder: Path = HERE) -> str:
    """A row for each hypothesis and scale, by the name of the experiment."""
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
                    f"| {name} | `{experiment}` | {scale} | {len(results['seeds'])} | {entry['verdict']} | {measured(entry)} |"
                    for name, entry in results["hypotheses"].items()
                ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())
