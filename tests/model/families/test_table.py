"""The committed table of families lists every family and column, and each cell is what its check gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import model_types
from .columns import COLUMNS, Cell, Column, run_column
from .table import PAGE, page, read_page

HOW = "run: python -m tests.model.families.table --write"


def committed() -> dict[tuple[str, str], str]:
    """Return the words of the committed table."""
    return read_page(PAGE.read_text(encoding="utf-8"))


def test_the_page_lists_every_family_and_every_column() -> None:
    expected = {(model_type, column.title) for model_type in model_types() for column in COLUMNS}
    assert committed().keys() == expected, HOW


def test_the_page_is_read_as_it_is_written() -> None:
    cells = {
        (model_type, column.title): Cell("no", "a | reason") if number % 2 else Cell("yes")
        for number, model_type in enumerate(model_types())
        for column in COLUMNS
    }
    assert read_page(page(cells)) == {place: cell.word for place, cell in cells.items()}


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.title.replace(" ", "-"))
@pytest.mark.parametrize("model_type", model_types())
def test_each_cell_is_what_its_check_gives(model_type: str, column: Column, tmp_path: Path) -> None:
    assert run_column(column, model_type, tmp_path).word == committed()[model_type, column.title], HOW
