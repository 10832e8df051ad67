"""No dependency without a reason: docs/reference/dependencies.md lists exactly what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib

import yaml

from .manual import ROOT


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~;\[ ]", requirement)[0].lower() for requirement in requirements}


def rows(heading: str, column: int) -> set[str]:
    """The names in one column of the table under `heading`."""
    page = (ROOT / "docs" / "reference" / "dependencies.md").read_text(encoding="utf-8")
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[column] for line in section.splitlines() if line.startswith("|")][2:]
    return {name.strip().lower() for cell in cells for name in cell.split(",")}


def test_every_core_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert rows("Core", 1) == names(project["dependencies"])


def test_every_extra_has_its_reason() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert rows("Extras", 1) == set(extras)
    assert rows("Extras", 2) == names([line for lines in extras.values() for line in lines]) - {"koine-lm"}


def test_the_hooks_are_the_checks_of_the_makefile() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        assert hook["language"] == "system"
        assert hook["entry"].replace(".venv/bin", "$(BIN)") in makefile
