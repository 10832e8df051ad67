"""The support matrix is read from the project file and the constraints, and both hold together."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from koine import extras, support
from koine.errors import UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


class Metadata:
    """The part of a distribution that the support matrix is read from."""

    requires = ("click>=8.1", "torch>=2.11", "ray>=2.40; extra == 'cluster'")
    classifiers = tuple(f"Programming Language :: Python :: 3.{minor}" for minor in (14, 11, 12, 13))

    @property
    def metadata(self) -> Metadata:
        return self

    def get_all(self, name: str) -> list[str] | None:
        return [*self.classifiers, "Topic :: Text Processing"] if name == "Classifier" else None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "own_distribution", Metadata)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("version", "note"),
    [
        ("3.11.7", "supported: 3.11 to 3.14"),
        ("3.14.0rc2", "supported: 3.11 to 3.14"),
        ("3.10.13", "NOT supported: use 3.11 to 3.14"),
        ("3.15.0", "NOT supported: use 3.11 to 3.14"),
    ],
)
def test_the_note_about_python(version: str, note: str) -> None:
    assert support.python_note(version) == note


@pytest.mark.usefixtures("installed")
def test_the_note_about_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "tested_version", {"torch": "2.13.0"}.get)
    assert support.torch_note("2.13.0+cu130") == "supported: 2.11 or newer; tested with this one"
    assert support.torch_note("2.11.0") == "supported: 2.11 or newer; tested with 2.13.0"
    assert support.torch_note("2.9.1") == "NOT supported: use 2.11 or newer"


def test_without_an_installation_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "own_distribution", lambda: None)
    assert (support.python_note("3.12.1"), support.torch_note("2.13.0")) == ("", "")


def test_the_constraints_are_those_of_the_checkout() -> None:
    assert support.constraints_file() == ROOT / "constraints.txt"
    assert support.tested_version("torch") is not None
    assert support.tested_version("no-such-package") is None


def test_missing_constraints_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "__file__", str(tmp_path / "support.py"))
    with pytest.raises(UserError, match=r"constraints\.txt: the file of tested versions is missing"):
        support.constraints_file()


def test_the_classifiers_are_what_the_project_file_allows() -> None:
    minors = [int(found[1]) for one in PROJECT["classifiers"] if (found := support.PYTHON.fullmatch(one))]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    assert sys.version_info[1] in minors


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_of_the_checks_is_pinned_within_its_bounds() -> None:
    extras_of = PROJECT["optional-dependencies"]
    nested = next(line for line in extras_of["dev"] if line.startswith("koine-lm["))
    names = nested.partition("[")[2].rstrip("]").split(",")
    required = [PROJECT["dependencies"], extras_of["dev"], *(extras_of[name] for name in names)]
    wanted = {
        canonical(found[1]): found[2]
        for lines in required
        for line in lines
        if (found := support.LEAST.match(line))
    }
    assert {"torch", "transformers", "ray", "sphinx"} <= set(wanted)
    lines = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {canonical(name): version for name, equals, version in lines if equals}
    parts = support.version_parts
    wrong = {name: least for name, least in wanted.items() if parts(pins.get(name, "0")) < parts(least)}
    assert wrong == {}


def test_the_metadata_is_read_field_by_field() -> None:
    own = extras.own_distribution()
    if own is not None:
        assert extras.first_field(own, "Name") in ("koine-lm", "koine")
        assert extras.first_field(own, "No-Such-Field") is None
