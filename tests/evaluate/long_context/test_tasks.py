"""Planned prompts, and tasks without room."""

from __future__ import annotations

from typing import Any

import pytest

from koine.errors import UserError
from koine.evaluate.long_context.prompts import Material
from koine.evaluate.long_context.tasks import plan_cells


def test_cells_without_room_are_left_out_unless_they_were_named(materials: dict[str, Material]) -> None:
    arguments: dict[str, Any] = {"seed": 0, "material": materials["en"], "questions": None}
    cells, left_out = plan_cells(["single", "frequent-words"], [120], [50], 2, strict=False, **arguments)
    assert {cell.task for cell in cells} == {"single"}
    assert [one["task"] for one in left_out] == ["frequent-words"]
    with pytest.raises(UserError, match="has no room for the task 'frequent-words'"):
        plan_cells(["frequent-words"], [120, 60], [50], 2, strict=True, **arguments)
    cells, left_out = plan_cells(["frequent-words"], [120, 900], [50], 2, strict=True, **arguments)
    assert {cell.length for cell in cells} == {900}
    assert [(one["task"], one["length"]) for one in left_out] == [("frequent-words", 120)]
