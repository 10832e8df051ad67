"""The versions that this release supports, and those that it was tested with."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from koine import __distribution__
from koine.errors import UserError
from koine.extras import own_distribution

PYTHON = re.compile(r"Programming Language :: Python :: 3\.(\d+)")
LEAST = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)")


def constraints_file() -> Path:
    """Return the file of the tested versions, which pip reads with `--constraint`.

    Raises `UserError` where the installation lacks it.
    """
    path = Path(__file__).with_name("constraints.txt")
    if not path.is_file():
        raise UserError(
            "the file of tested versions is missing", where=str(path), hint=f"reinstall {__distribution__}"
        )
    return path.resolve()


@cache
def tested_version(package: str) -> str | None:
    """Return the version of `package` in the constraints; None where it is not among them."""
    for line in constraints_file().read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("==")
        if equals and name.lower() == package:
            return version.strip()
    return None


def supported_pythons() -> list[int]:
    """Return the minor versions of Python 3 in the classifiers of the installation, ascending."""
    own = own_distribution()
    classifiers = (own.metadata.get_all("Classifier") if own is not None else None) or []
    return sorted(int(found[1]) for one in classifiers if (found := PYTHON.fullmatch(one)))


def least_version(package: str) -> str | None:
    """Return the least version of `package` that the installation asks for; None where there is none."""
    own = own_distribution()
    for line in (own.requires if own is not None else None) or []:
        if (found := LEAST.match(line)) and found[1].lower() == package:
            return found[2]
    return None


def version_parts(version: str) -> tuple[int, ...]:
    """Return the numbers at the beginning of a version: (2, 13, 0) for `2.13.0+cu130`."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", version)[0]))


def python_note(version: str) -> str:
    """Return what the support matrix says of a version of Python, in words; empty without metadata."""
    minors = supported_pythons()
    if not minors:
        return ""
    matrix = f"3.{minors[0]} to 3.{minors[-1]}"
    inside = version_parts(version)[:2] in {(3, minor) for minor in minors}
    return f"supported: {matrix}" if inside else f"NOT supported: use {matrix}"


def torch_note(version: str) -> str:
    """Return what the support matrix says of a version of torch, in words; empty without metadata."""
    least, tested = least_version("torch"), tested_version("torch")
    if least is None:
        return ""
    if version_parts(version) < version_parts(least):
        return f"NOT supported: use {least} or newer"
    same = tested is not None and version_parts(version) == version_parts(tested)
    return f"supported: {least} or newer; tested with {'this one' if same else tested}"
