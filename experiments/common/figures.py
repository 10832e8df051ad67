"""Figures and Markdown tables of a results file, as all experiments draw them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.domains import DomainRuns
from experiments.common.hypotheses import verdict_markdown
from koine.errors import UserError
from koine.files import read_json

Results = dict[str, Any]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of text cells."""
    lines = [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def mean_bits(results: Results, arm: str, domains: Sequence[str]) -> list[float]:
    """Mean bits per byte over some domains, one value a seed."""
    return DomainRuns(results["runs"], results["seeds"]).bits(arm, domains)


def verdict_table(results: Results) -> str:
    """Verdicts of all hypotheses as a Markdown table."""
    return verdict_markdown(results["hypotheses"])


def save_figure(figure: Any, out: Path) -> None:
    """Write a matplotlib figure and close it; the same results give the same bytes."""
    from matplotlib import pyplot as plt

    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def show_results(
    figures: Mapping[str, Callable[[Results, Path], None]],
    tables: Sequence[Callable[[Results], str]],
    *,
    salt: str = "koine",
) -> None:
    """Draw the figures of the results file that the command line names, and print its tables.

    Writes `STEM_NAME.svg` beside the file for each figure. Raises `UserError` where no file is named.

    Args:
        figures: by name, functions that draw results to a path.
        tables: functions that return Markdown.
        salt: of the ids inside an SVG, which are random without it.
    """
    import matplotlib as mpl

    if len(sys.argv) != 2:
        raise UserError("no results file", hint=f"python {sys.argv[0]} results/laptop.json")
    path = Path(sys.argv[1])
    results = read_json(path)
    mpl.rcParams["svg.hashsalt"] = salt
    for name, draw in figures.items():
        draw(results, path.with_name(f"{path.stem}_{name}.svg"))
    for table in tables:
        print(table(results))
