"""The optional extras of the package: what each adds, whether it is installed, and importing from one.

An installation that was interrupted leaves a package whose metadata are there and whose files are not (or the
reverse); that is told apart from "not installed", because the fix differs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from koine.errors import UserError

State = Literal["installed", "not installed", "broken"]

PURPOSES = {
    "hf": "open any causal LM of transformers, beyond Cohere, Cohere2 and Koine's own directories",
    "grammar": "answers that follow a JSON schema, a regular expression or a grammar: koine.generate.Grammar",
    "cluster": "run plans on a Ray cluster: koine run PLAN --executor ray",
    "measure": "compare tokenizers in tiktoken's and SentencePiece's formats: koine tokenizer measure",
    "sentences": "embed domains by a sentence encoder: koine upcycle nexus --encoder FOLDER",
    "gguf": "export dense models for llama.cpp: koine model export --format gguf",
    "docs": "build the documentation site: make docs",
    "dev": "the tests, the type checker, the linters",
}

# distribution (lower case) -> the module to import, where the two names differ by more than - and _
MODULES = {
    "fonttools": "fontTools",
    "import-linter": "importlinter",
    "pytest-xdist": "xdist",
    "tensorboardx": "tensorboardX",
}
# `ruff` is a program and `types-*` are stubs: there is nothing to import
NOT_IMPORTABLE = ("ruff", "types-")

IMPORT_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Package:
    """One distribution as found in this environment."""

    name: str
    state: State
    version: str | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Extra:
    """One optional extra: what it adds and the state of each package that it asks for."""

    name: str
    purpose: str
    packages: tuple[Package, ...]

    @property
    def state(self) -> State:
        """`broken` where any package is broken, `installed` where all are there, else `not installed`."""
        states = {package.state for package in self.packages}
        if "broken" in states:
            return "broken"
        return "installed" if states <= {"installed"} else "not installed"


def install_line(extra: str) -> str:
    """The pip command that adds `extra`."""
    return f"{sys.executable} -m pip install 'koine[{extra}]'"


def repair_line(package: str) -> str:
    """The pip command that repairs a half-installed package."""
    return f"{sys.executable} -m pip install --force-reinstall --no-deps {package}"


def requirements(extra: str | None = None) -> list[str]:
    """Names of the distributions that `koine` asks for: those of `extra`, or the core's for None.

    An extra that names other extras of koine (`dev`) is resolved to their packages too.
    """
    names: list[str] = []
    for line in importlib.metadata.requires("koine") or []:
        requirement, _, marker = line.partition(";")
        of = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", marker)
        if (of.group(1) if of else None) != extra:
            continue
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", requirement.strip())
        assert match is not None, line
        name, nested = match.groups()
        if name.lower() == "koine":
            for part in (nested or "").split(","):
                names += requirements(part.strip())
        else:
            names.append(name)
    return names


def import_problem(module: str) -> str | None:
    """Import `module` in a process of its own; the last line of the error, or None where it works."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"import did not end in {IMPORT_TIMEOUT_SECONDS:.0f} s"
    if process.returncode == 0:
        return None
    lines = process.stderr.strip().splitlines()
    return lines[-1] if lines else f"import ended with code {process.returncode}"


def inspect_package(name: str) -> Package:
    """Find out whether the distribution `name` is installed whole: metadata, files, and a working import."""
    module = MODULES.get(name.lower(), name.lower().replace("-", "_"))
    importable = not name.startswith(NOT_IMPORTABLE)
    try:
        distribution = importlib.metadata.distribution(name)
        version = distribution.metadata["Version"]
    except importlib.metadata.PackageNotFoundError:
        if importable and importlib.util.find_spec(module) is not None:
            return Package(name=name, state="broken", problem="files without metadata")
        return Package(name=name, state="not installed")
    if not version:
        return Package(name=name, state="broken", problem="metadata without a version")
    if importable and (problem := import_problem(module)):
        return Package(name=name, state="broken", version=version, problem=problem)
    return Package(name=name, state="installed", version=version)


def inspect_packages(names: Iterable[str]) -> dict[str, Package]:
    """`inspect_package` for many distributions at once."""
    distinct = sorted(set(names))
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(distinct, pool.map(inspect_package, distinct), strict=True))


def inspect_installation() -> tuple[list[Package], list[Extra]]:
    """The core's packages, and every extra that the package declares, as they are in this environment."""
    declared = importlib.metadata.metadata("koine").get_all("Provides-Extra") or []
    core = requirements()
    wanted = {extra: requirements(extra) for extra in sorted(declared, key=list(PURPOSES).index)}
    found = inspect_packages([*core, *(name for names in wanted.values() for name in names)])
    return [found[name] for name in core], [
        Extra(name=extra, purpose=PURPOSES[extra], packages=tuple(found[name] for name in names))
        for extra, names in wanted.items()
    ]


def import_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, which the extra `extra` brings, for `purpose` ("open a Llama checkpoint").

    Raises `UserError` with the command that fixes it where it is missing or only half installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        try:
            importlib.metadata.distribution(top)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"to {purpose}, the package '{top}' is needed and not installed", hint=install_line(extra)
            ) from error
        raise UserError(
            f"to {purpose}, the package '{top}' is needed; it is installed but its import fails "
            f"({type(error).__name__}: {error}), as after an interrupted installation",
            hint=repair_line(top),
        ) from error
