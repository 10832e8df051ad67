"""From a committed results file to its figures and Markdown tables: what the plots of every experiment share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.hypotheses import verdict_markdown
from koine.errors import UserError
from koine.files import read_json

Results = dict[str, Any]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text cells."""
    lines = [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def save_figure(figure: Any, out: Path) -> None:
    """Write a figure of matplotlib and let it go; the same figures give the same bytes, whatever the day."""
    from matplotlib import pyplot as plt

    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def show_results(
    figures: Mapping[str, Callable[[Results, Path], None]], tables: Sequence[Callable[[Results], str]]
) -> None:
    """The program of an experiment's plots: read the results file that the command line names, write `STEM_NAME.svg` of each figure beside it, and print
    the verdicts and the tables. Raises `UserError` where no file is named."""
    import matplotlib as mpl

    if len(sys.argv) != 2:
        raise UserError("no results file", hint=f"python {sys.argv[0]} results/laptop.json")
    path = Path(sys.argv[1])
    results = read_json(path)
    # Without it the names of an SVG's parts are random.
    mpl.rcParams["svg.hashsalt"] = "koine"
    for name, draw in figures.items():
        draw(results, path.with_name(f"{path.stem}_{name}.svg"))
    for table in (lambda found: verdict_markdown(found["hypotheses"]), *tables):
        print(table(results))
