"""The table of docs/reference/preference-losses.md says what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from koine.align.loss_spec import LossSpec
from koine.align.loss_terms import LOSSES

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "preference-losses.md"


def table() -> dict[str, dict[str, str]]:
    """The rows of the page's table by the name of the loss."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_page_names_all_losses_in_order() -> None:
    assert list(table()) == list(LOSSES)


def test_the_page_gives_parameters_and_defaults() -> None:
    for name, row in table().items():
        expected = {
            field.name: repr(float(field.default)).removesuffix(".0")
            for field in dataclasses.fields(LOSSES[name])
        }
        assert dict(re.findall(r"`(\w+)=([\d.e-]+)`", row["parameters"])) == expected, name


def test_the_page_says_what_each_loss_takes_and_needs() -> None:
    for name, row in table().items():
        spec, kind = LossSpec.parse(name), LOSSES[name]
        assert row["takes"] == kind.takes, name
        assert row["reference"].split(",")[0] == ("yes" if spec.needs_reference else "no"), name
        number = str(spec.completions) if spec.completions else f"{spec.fewest_completions} or more"
        assert row["groups"] == f"{spec.groups}, {number}", name


def test_conditions_of_the_reference_name_the_parameter() -> None:
    conditional = {name: row["reference"] for name, row in table().items() if "for" in row["reference"]}
    for name, text in conditional.items():
        [parameter] = re.findall(r"for `(\w+)` > 0", text)
        assert not LossSpec.parse(f"{name}:{parameter}=0").needs_reference
    assert set(conditional) == {"slic", "rloo"}
