"""Command lines: of a run as it is recorded, and those that a run tells its user to type."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_CREDENTIALS = re.compile(r"(?<=://)[^/\s?#]*@")
_QUERY = re.compile(r"(?i)((?:^|[?&;\s])[a-z_-]*(?:key|token|secret|password)=)[^&#;\s]+")


def recorded_command(words: Sequence[str] | None = None) -> list[str]:
    """Return the words of a command, with `***` for passwords and keys in addresses.

    The default is the command of this process.
    """
    return [
        _QUERY.sub(r"\1***", _CREDENTIALS.sub("***@", word)) if "://" in word else word
        for word in (sys.argv if words is None else words)
    ]


def shell_command(*words: str | Path) -> str:
    """Return a `koine` command that works in the shell that started this process.

    `koine` stays `koine` where the shell finds this one, and is `.venv/bin/koine` or the like elsewhere.
    Paths below the working directory become relative; words are quoted where the shell needs it.
    """
    shown = [shown_path(word) if isinstance(word, Path) else word for word in words]
    return " ".join([*program(), *map(shlex.quote, shown)])


def shown_path(path: Path) -> str:
    """Return a path as a user of this working directory would type it."""
    # A link below the working directory is shown as it was given: resolve() would follow it.
    absolute, here = Path(os.path.abspath(path)), Path.cwd()  # noqa: PTH100
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def program() -> list[str]:
    """Return the quoted words that start this `koine` from the shell that started this process."""
    started = Path(sys.argv[0])
    if started.name != "koine":
        # Started as a module or from a Python program: the command lies beside the interpreter.
        started = Path(sys.executable).with_name("koine")
    found = shutil.which("koine")
    if found is not None and started.exists() and Path(found).samefile(started):
        return ["koine"]
    if started.exists():
        shown = shown_path(started)
        return [shlex.quote(shown if "/" in shown else f"./{shown}")]
    return [shlex.quote(shown_path(Path(sys.executable))), "-m", "koine"]
