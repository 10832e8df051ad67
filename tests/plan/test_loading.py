"""Plan files as users write them, with their mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.errors import UserError
from koine.recipes import find_plan
from tests.plan.running import koine as command

GOOD = """\
from pathlib import Path
from helpers_of_mine import text
from koine.plan import Plan, step

@step()
def write(*, out: Path) -> None:
    (out / "text").write_text(text)

def demo(plan: Plan) -> None:
    plan.step(write, name="text")
"""


@pytest.mark.parametrize(
    ("content", "asked", "message"),
    [
        (None, "plans.py:demo", "plans.py: no such plan file"),
        ("def demo(plan:\n", "plans.py:demo", "plans.py:1: not valid Python"),
        (
            "x = 1\nimport nonesuch_at_all\n",
            "plans.py:demo",
            "plans.py:2: cannot be imported (ModuleNotFoundError",
        ),
        ("x = 1 / 0\n", "plans.py:demo", "plans.py:1: cannot be imported (ZeroDivisionError"),
        ("def demo(plan): ...\n", "plans.py:dmo", "no plan function 'dmo'; did you mean 'demo'?"),
        ("def demo(plan): ...\n", "plans.py", "say plans.py:demo"),
        ("demo = 1\n", "plans.py:demo", "no plan function 'demo'"),
        (None, "quickstrat", "unknown recipe 'quickstrat'; did you mean 'quickstart'?"),
    ],
)
def test_each_mistake_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, asked: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("plans.py").write_text(content)
    with pytest.raises(UserError) as error:
        find_plan(asked)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["random.py", "folder/torch.py", "koine.py"])
def test_a_plan_file_may_be_called_like_an_installed_module(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(GOOD)
    (path.parent / "helpers_of_mine.py").write_text("text = 'mine'\n")
    code, out, err = command(tmp_path, "run", f"{name}:demo")
    assert code == 0, err + out
    assert (tmp_path / "runs/demo/text/text").read_text() == "mine"


def test_fingerprints_do_not_depend_on_where_the_plan_file_lies(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "plans.py").write_text(GOOD)
        (tmp_path / folder / "helpers_of_mine.py").write_text("text = 'mine'\n")
    assert command(tmp_path, "run", "one/plans.py:demo")[0] == 0
    assert "Nothing to do" in command(tmp_path, "run", "two/plans.py:demo", "--dry-run")[1]
