"""Definition of a bad input: the files it needs, the command, the error line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# In an expected line, this stands for any text: a library's own words, a temporary path.
ANYTHING = "…"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One bad input.

    mistake: what the user did, for the page. command: the words after `koine`, as in a shell, run in a folder
    that `prepare` has filled. says: the line on standard error, without the leading `koine: `. prepare: fills
    the folder; gets its path. simulated: how an external condition is simulated, if it is not real (shown on
    the page). leaves: a folder that keeps finished work on purpose. during: replaces things while the command
    runs; gets pytest's monkeypatch.
    """

    mistake: str
    command: str
    says: str
    prepare: Callable[[Path], None] | None = None
    simulated: str | None = None
    during: Callable[..., object] | None = None
    leaves: str | None = None


def listing(folder: Path) -> dict[str, str]:
    """Return every file and folder below `folder` with a hash of its content, to find changes.

    Empty lock files are skipped: removing one would take it from another process that waits for it.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name + "/"] = ""
        elif path.is_file() and not (path.name.endswith(".lock") and path.stat().st_size == 0):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
