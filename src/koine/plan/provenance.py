"""What is recorded beside an artifact about the code and the machine that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from koine import __version__
from koine.files import sha256_file
from koine.plan.content import digest


def code_version() -> dict[str, Any]:
    """Koine's version and, where it runs from its own checkout, the commit and whether files differ from it."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            process = subprocess.run(
                ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    found: dict[str, Any] = {"koine": __version__}
    # A package installed below somebody else's checkout is not tracked there: that commit says nothing about us.
    if git("ls-files", "--error-unmatch", "errors.py") is not None:
        found["commit"] = git("rev-parse", "HEAD")
        found["dirty"] = bool(git("status", "--porcelain", "--", str(package)))
    return found


def environment(threads: int) -> dict[str, Any]:
    """The versions and the machine that a result can depend on. Importing torch only for its version is not worth it."""

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


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file below `folder` but its artifact.json, by relative name."""
    files = sorted(item for item in folder.rglob("*") if item.is_file() and item != folder / "artifact.json")
    return {item.relative_to(folder).as_posix(): sha256_file(item) for item in files}


def manifest_hash(files: dict[str, str]) -> str:
    """One sha256 for all files of an artifact: over the names and hashes in its record."""
    return digest(files)
