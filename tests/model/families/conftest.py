"""Fixtures: each case, and the checkpoints that `transformers` wrote of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .cases import CASES, Case, first_case

# Their assertions then show both sides, as those of a test module.
for name in ("checks", "methods", "variants"):
    pytest.register_assert_rewrite(f"tests.model.families.{name}")
pytest.importorskip("transformers", reason="the comparison needs the extra [hf]")

Checkpoint = Callable[[Case, torch.dtype], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a function that writes a case's checkpoint, once per dtype; tests only read it."""
    from .reference import write_checkpoint

    root = tmp_path_factory.mktemp("families")

    def written(case: Case, dtype: torch.dtype) -> Path:
        folder = root / f"{case}-{str(dtype).removeprefix('torch.')}"
        return folder if folder.exists() else write_checkpoint(case, folder, dtype)

    return written


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Return every case in turn."""
    got = request.param
    assert isinstance(got, Case)
    return got


@pytest.fixture
def folder(case: Case, checkpoint: Checkpoint) -> Path:
    """Return the float32 checkpoint of the case."""
    return checkpoint(case, torch.float32)


@pytest.fixture(params=[case for case in CASES if case != first_case(case.model_type)], ids=str)
def further_case(request: pytest.FixtureRequest) -> Case:
    """Return every case but the first of a family: that one has the same checks in the table (`test_table`)."""
    got = request.param
    assert isinstance(got, Case)
    return got


@pytest.fixture
def further_folder(further_case: Case, checkpoint: Checkpoint) -> Path:
    """Return the float32 checkpoint of the case."""
    return checkpoint(further_case, torch.float32)
