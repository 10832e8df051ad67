"""Provenance of an artifact: versions of the code, the machine, hashes of its files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from koine import __version__
from koine.files import sha256_file, walk
from koine.plan.store.fingerprints import digest


def code_version() -> dict[str, Any]:
    """Return Koine's version and, in its own checkout, the commit and whether files differ from it."""
    package = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            process = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    found: dict[str, Any] = {"koine": __version__}
    # An installed package may lie in another project's checkout: its commit says nothing about Koine.
    if git("ls-files", "--error-unmatch", "errors.py") is not None:
        found["commit"] = git("rev-parse", "HEAD")
        found["dirty"] = bool(git("status", "--porcelain", "--", str(package)))
    return found


def environment(threads: int) -> dict[str, Any]:
    """Return the versions and the machine that a result can depend on, without importing torch."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "tokenizers", "numpy")},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of an artifact by relative name, without its artifact.json.

    Hidden files and the targets of links are included.
    """
    found = {file.relative_to(folder).as_posix(): file for file in walk(folder, hidden=True)}
    return {name: file for name, file in found.items() if name != "artifact.json" and file.exists()}


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of an artifact, by relative name."""
    return {name: sha256_file(file) for name, file in files_of(folder).items()}


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of an artifact, by relative name."""
    return {name: file.stat().st_size for name, file in files_of(folder).items()}


def manifest_hash(files: dict[str, str]) -> str:
    """Return one sha256 for all files of an artifact, over the names and hashes in its record."""
    return digest(files)
