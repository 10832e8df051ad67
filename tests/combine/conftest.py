"""Models to merge."""

from __future__ import annotations

from pathlib import Path

import pytest

from .models import write_branches


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """`base`, and `a` and `b` branched from it."""
    base, branches = write_branches(tmp_path, ("a", "b"))
    return {"base": base, **branches}
