"""Write the table of families: what works with which class of `transformers`.

`python -m tests.model.families.table --write` runs every check of `columns` for one checkpoint of each family
and writes docs/reference/families.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from .cases import first_case, model_types
from .columns import COLUMNS, Cell, run_column

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "families.md"

HEAD = """\
# Families of models: what works

Koine's own decoder computes the families of this table. You open, train, run and save a checkpoint of them as
its own class: the folder that Koine writes opens in `transformers` without Koine. To see which family a
checkpoint has, read `model_type` in its `config.json`. Any other causal language model opens through
`transformers` (extra `hf`).

The table is generated from `tests/model/families/`: every cell is the result of a check on a small random
checkpoint that `transformers` wrote. The tests repeat the check of every cell, and those of the first columns
on more shapes: scaled RoPE, windows, biases, tied and untied embeddings.
"""

Cells = Mapping[tuple[str, str], Cell]
"""By `model_type` and title of the column."""


def run_all() -> dict[tuple[str, str], Cell]:
    """Run every check for every family."""
    cells = {}
    for model_type in model_types():
        for column in COLUMNS:
            with tempfile.TemporaryDirectory() as work:
                cells[model_type, column.title] = run_column(column, model_type, Path(work))
    return cells


def architecture(model_type: str) -> str:
    """Return the name of the family's class in `transformers`."""
    config = transformers.AutoConfig.for_model(model_type, **first_case(model_type).fields())
    with torch.device("meta"):
        return type(transformers.AutoModelForCausalLM.from_config(config)).__name__


def page(cells: Cells) -> str:
    """Return the page of the manual."""
    titles = [column.title for column in COLUMNS]
    lines = [HEAD, _row("class", "`model_type`", *titles), _row(*["---"] * (2 + len(titles)))]
    for model_type in model_types():
        words = [cells[model_type, title].word for title in titles]
        lines.append(_row(architecture(model_type), f"`{model_type}`", *words))
    lines += ["", "What the columns mean:", ""]
    lines += [f"- **{column.title}**: {column.meaning}" for column in COLUMNS]
    reasons = _reasons(cells)
    if reasons:
        lines += ["", "Where the table says no, Koine says:", "", *reasons]
    return "\n".join(lines) + "\n"


def _reasons(cells: Cells) -> list[str]:
    """Return a line for each reason of a "no", with the families and columns that have it."""
    places: dict[str, dict[str, list[str]]] = {}
    for (model_type, title), cell in cells.items():
        if cell.reason:
            places.setdefault(cell.reason, {}).setdefault(model_type, []).append(title)
    return [
        f"- {reason}: " + "; ".join(f"`{kind}` ({', '.join(titles)})" for kind, titles in found.items())
        for reason, found in places.items()
    ]


def read_page(text: str) -> dict[tuple[str, str], str]:
    """Return the words of a page's table, by `model_type` and title of the column."""
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.split("\n") if line[:1] == "|"
    ]
    titles = rows[0][2:]
    return {
        (row[1].strip("`"), title): word
        for row in rows[2:]
        for title, word in zip(titles, row[2:], strict=True)
    }


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/reference/families.md")
    text = page(run_all())
    if parser.parse_args().write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)
