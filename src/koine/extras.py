"""Optional extras of the package: what each adds, whether it is installed, how to import from it.

An interrupted installation leaves metadata without files, or files without metadata. Such a package is
"broken" and not "not installed", because the fix differs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from koine import __distribution__, __version__
from koine.errors import UserError

State = Literal["installed", "not installed", "broken"]

PURPOSES = {
    "hf": "open any causal LM of transformers, beyond Cohere, Cohere2 and Koine's own directories",
    "peft": "LoRA adapters of models that only transformers computes: koine train sft --lora-rank 16",
    "grammar": "answers that follow a JSON schema, a regular expression or a grammar: koine.generate.Grammar",
    "cluster": "run plans on a Ray cluster: koine run PLAN --executor ray",
    "measure": "compare tokenizers in tiktoken's and SentencePiece's formats: koine tokenizer measure",
    "sentences": "embed domains by a sentence encoder: koine upcycle nexus --encoder FOLDER",
    "gguf": "export models for llama.cpp, and import GGUF files: koine model export, koine model import",
    "langid": "identify the language of a text: rewards by language, koine.language_id.identify",
    "track": "send a training's figures to wandb, trackio or MLflow: koine train pretrain --track wandb",
    "docs": "build the documentation site: make docs",
    "dev": "the tests, the type checker, the linters",
}

# distribution (lower case) -> the module to import, where the two names differ by more than - and _
MODULES = {
    "fonttools": "fontTools",
    "import-linter": "importlinter",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
    "tensorboardx": "tensorboardX",
}
# `ruff` is a program and `types-*` are stubs: there is nothing to import
NOT_IMPORTABLE = ("ruff", "types-")

IMPORT_TIMEOUT_SECONDS = 120.0

OLD_NAME = "koine"
"""The name of the distribution in version 0.1.0, and on the package index that of another project."""


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
        """Return `broken` if any package is, `installed` if all are, else `not installed`."""
        states = {package.state for package in self.packages}
        if "broken" in states:
            return "broken"
        return "installed" if states <= {"installed"} else "not installed"


def install_line(extra: str) -> str:
    """Return the pip command that adds `extra`."""
    return f"{sys.executable} -m pip install '{__distribution__}[{extra}]'"


def repair_line(package: str) -> str:
    """Return the pip command that repairs a broken package."""
    return f"{sys.executable} -m pip install --force-reinstall --no-deps {package}"


def find_distribution(name: str) -> importlib.metadata.Distribution | None:
    """Return the distribution `name` of this environment, or None."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_field(distribution: importlib.metadata.Distribution, name: str) -> str | None:
    """Return a field of a distribution's metadata, or None; `metadata[name]` will raise where it is missing."""
    return next(iter(distribution.metadata.get_all(name) or ()), None)


def is_ours(distribution: importlib.metadata.Distribution) -> bool:
    """Return whether a distribution `koine` is an installation of this project under its old name."""
    return any(
        entry.group == "console_scripts" and entry.value == "koine.cli.main:main"
        for entry in distribution.entry_points
    )


def own_distribution() -> importlib.metadata.Distribution | None:
    """Return Koine's own distribution: `koine-lm`, or an installation under the old name `koine`.

    None where Koine is imported from a folder that was never installed.
    """
    if (found := find_distribution(__distribution__)) is not None:
        return found
    old = find_distribution(OLD_NAME)
    return old if old is not None and is_ours(old) else None


def reinstall_line() -> str:
    """Return the pip command that installs Koine again: from its checkout, or from the package index."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():
        return f"{sys.executable} -m pip install --editable {checkout}"
    return f"{sys.executable} -m pip install --force-reinstall --no-deps {__distribution__}"


def name_problems() -> list[str]:
    """Return one line for each thing that is wrong with Koine's name in this environment, with its fix.

    The name `koine` on the package index belongs to another project; ours is `koine-lm`.
    """
    problems = []
    old = find_distribution(OLD_NAME)
    uninstall = f"{sys.executable} -m pip uninstall --yes {OLD_NAME}"
    if old is not None and is_ours(old):
        problems.append(f"installed under its old name '{OLD_NAME}'; fix: {uninstall} && {reinstall_line()}")
    elif old is not None:
        about = first_field(old, "Summary") or "no summary"
        problems.append(
            f"'{OLD_NAME}' {old.version} here is another project's package ({about}), and Koine is "
            f"{__distribution__}; fix: {uninstall} && {reinstall_line()}"
        )
    if own_distribution() is None:
        problems.append(
            f"{__distribution__} {__version__} runs from {Path(__file__).parent} without an installation, so "
            f"its packages are not listed; fix: {reinstall_line()}"
        )
    return problems


def requirements(extra: str | None = None) -> list[str]:
    """Return the names of the distributions that `extra` requires; None: those of the core.

    Extras of Koine inside an extra (`dev`) are resolved to their packages. Without an installation of Koine
    there are none.
    """
    own = own_distribution()
    names: list[str] = []
    for line in (own.requires if own is not None else None) or []:
        requirement, _, marker = line.partition(";")
        of = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", marker)
        if (of.group(1) if of else None) != extra:
            continue
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", requirement.strip())
        assert match is not None, line
        name, nested = match.groups()
        if name.lower() in (__distribution__, OLD_NAME):
            for part in (nested or "").split(","):
                names += requirements(part.strip())
        else:
            names.append(name)
    return names


def import_problem(module: str) -> str | None:
    """Import `module` in a process of its own; return the last line of the error, or None."""
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


def files_problem(module: str) -> str | None:
    """Return what is wrong with a module's files, without importing it; None where nothing shows."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return "metadata without files"
    # What is left of a package without its `__init__.py` is a namespace of folders without Python files.
    if spec.origin is None and not any(
        any(Path(place).glob("*.py")) for place in spec.submodule_search_locations or ()
    ):
        return "its files are gone but for folders"
    return None


def inspect_package(name: str, *, imports: bool = True) -> Package:
    """Find out whether a distribution is installed: metadata, files, and a working import.

    imports: try the import, in a process of its own, which takes seconds for a large package.
    """
    module = MODULES.get(name.lower(), name.lower().replace("-", "_"))
    importable = not name.startswith(NOT_IMPORTABLE)
    try:
        distribution = importlib.metadata.distribution(name)
        version = first_field(distribution, "Version")
    except importlib.metadata.PackageNotFoundError:
        if importable and importlib.util.find_spec(module) is not None:
            return Package(name=name, state="broken", problem="files without metadata")
        return Package(name=name, state="not installed")
    if not version:
        return Package(name=name, state="broken", problem="metadata without a version")
    if importable and (problem := import_problem(module) if imports else files_problem(module)):
        return Package(name=name, state="broken", version=version, problem=problem)
    return Package(name=name, state="installed", version=version)


def inspect_packages(names: Iterable[str], *, imports: bool = True) -> dict[str, Package]:
    """Inspect several distributions at once."""
    distinct = sorted(set(names))
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(functools.partial(inspect_package, imports=imports), distinct)
        return dict(zip(distinct, found, strict=True))


def inspect_installation(*, imports: bool = True) -> tuple[list[Package], list[Extra]]:
    """Return the state of the core's packages and of every extra; `imports`: try to import each."""
    own = own_distribution()
    declared = [] if own is None else own.metadata.get_all("Provides-Extra") or []
    core = requirements()
    wanted = {extra: requirements(extra) for extra in sorted(declared, key=list(PURPOSES).index)}
    names = [*core, *(name for names in wanted.values() for name in names)]
    found = inspect_packages(names, imports=imports)
    return [found[name] for name in core], [
        Extra(name=extra, purpose=PURPOSES[extra], packages=tuple(found[name] for name in names))
        for extra, names in wanted.items()
    ]


def import_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import a module of an extra; raise `UserError` with the fix where it is missing or broken.

    Args:
        module: The module.
        extra: The extra that brings it.
        purpose: What it is needed for, such as "open a Llama checkpoint".
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
