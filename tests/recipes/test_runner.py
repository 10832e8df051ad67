"""`run_plan`: a plan run from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.errors import UserError
from koine.recipes import run_plan

PLAN = """\
from pathlib import Path
from typing import Annotated

from koine.plan import Parameter, Plan, step


@step(threads=0)
def write(*, words: int, out: Path) -> None:
    import os

    (out / "text.txt").write_text("word " * words + os.environ["OMP_NUM_THREADS"])


def small(plan: Plan, *, words: Annotated[int, Parameter("Words to write.", low=1)] = 3) -> None:
    plan.step(write, name="text", words=words)
"""


def test_a_plan_runs_from_python(tmp_path: Path) -> None:
    (tmp_path / "plans.py").write_text(PLAN)
    plan = f"{tmp_path / 'plans.py'}:small"
    first = run_plan(plan, out=tmp_path / "runs" / "first", words=2, threads=2)
    assert first.folder == tmp_path / "runs" / "first"
    assert first.status == {"text": "built"}
    assert (first.artifacts["text"] / "text.txt").read_text() == "word word 2"
    assert (first.folder / "report.html").exists()
    # Threads change no fingerprint.
    again = run_plan(plan, out=tmp_path / "runs" / "first", words=2)
    assert again.status == {"text": "reused"}
    with pytest.raises(UserError, match="words is 0; it must be at least 1"):
        run_plan(plan, out=tmp_path / "runs" / "second", words=0)
    assert not (tmp_path / "runs" / "second").exists()


def test_the_example_of_the_docstring_names_a_recipe_and_its_parameters(tmp_path: Path) -> None:
    """The call of the docstring is made, with a mistake added so that nothing is trained."""
    with pytest.raises(UserError, match="adapt_steps is 0"):
        run_plan("quickstart", out=tmp_path / "first", preset="koine-0.5m", pretrain_steps=100, adapt_steps=0)
