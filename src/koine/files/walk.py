"""Walk over folders of the user, for reading, fingerprinting and copying."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from koine.errors import UserError


def walk(folder: Path, *, hidden: bool = False) -> list[Path]:
    """Return all files below `folder`, through links, in the order of their names.

    Each real folder is entered once, so that a link to a folder above it ends. A folder that can be reached
    by its own name and by a link is listed under its own name. Devices, pipes and sockets are left out. A
    broken link is listed, so that its reader reports it.

    Args:
        folder: Where to begin.
        hidden: Include names that begin with a dot (version control, editors, half-written files).

    Raises:
        UserError: A folder cannot be listed.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    linked = [folder]
    while linked:
        below: list[Path] = []
        for place in linked:
            below += _enter(place, seen, found, hidden=hidden)
        linked = sorted(below)
    return sorted(found)


def _enter(folder: Path, seen: set[tuple[int, int]], found: list[Path], *, hidden: bool) -> Iterator[Path]:
    """Add the files of a folder and the real folders below it to `found`; yield links to folders."""
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        about = place.stat()
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        try:
            with os.scandir(place) as entries:
                listed = list(entries)
        except PermissionError:
            raise UserError("cannot be read", where=place, hint="check its permissions") from None
        for entry in listed:
            path = place / entry.name
            if entry.name.startswith(".") and not hidden:
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_symlink() and _is_folder(path):
                yield path
            elif _is_file_or_nothing(path):
                found.append(path)


def _is_folder(path: Path) -> bool:
    """Return whether a link leads to a folder; a circular link does not."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _is_file_or_nothing(path: Path) -> bool:
    """Return whether a path is a regular file, or a broken link."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def copy_tree(source: Path, target: Path, *, hidden: bool = True) -> None:
    """Copy the files that `walk` finds below `source` to `target`; links are followed.

    Modification times are kept; permissions are those of new files.
    """
    for file in walk(source, hidden=hidden):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        about = file.stat()
        os.utime(place, ns=(about.st_atime_ns, about.st_mtime_ns))
