"""Copy exported artifacts to the names that the plan gives them."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from koine.errors import UserError
from koine.files import atomic_directory, atomic_file, copy_tree, exclusive, walk
from koine.plan.plan import Plan


def same(source: Path, target: Path) -> bool:
    """Return whether two files or folders have the same content."""
    if source.is_file():
        return target.is_file() and filecmp.cmp(source, target, shallow=False)
    if not target.is_dir():
        return False
    names = {item.relative_to(source) for item in walk(source, hidden=True)}
    there = {item.relative_to(target) for item in walk(target, hidden=True)}
    return names == there and all(filecmp.cmp(source / name, target / name, shallow=False) for name in names)


@contextmanager
def exports_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the exports of a run folder; wait for another run that holds it."""
    lock = folder / ".locks" / ".exports"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(lock, doing="writing the exports", wait=-1):
        yield


def write_exports(plan: Plan) -> None:
    """Copy each export of the plan, completely or not at all; equal copies are left alone.

    Raises `UserError` where a step did not write the exported file.
    """
    if not plan.exports:
        return
    # Runs that share their work end at the same moment: the second one waits, and finds equal copies.
    with exports_lock(plan.folder):
        _write(plan)


def _write(plan: Plan) -> None:
    for to, artifact in plan.exports.items():
        source, target = artifact.place, plan.folder / to
        if not source.exists():
            raise UserError(
                f"step '{artifact.name}' wrote no '{artifact.inside}'",
                where="plan.export",
                hint="export a file that it writes",
            )
        if target.exists() and same(source, target):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            with atomic_file(target, overwrite=True) as filling:
                shutil.copyfile(source, filling)
        else:
            with atomic_directory(target, overwrite=True) as filling:
                copy_tree(source, filling)
