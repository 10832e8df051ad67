"""An artifact's way from its work folder to its name, and the fixing of what a kill left on that way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.fields import Fields
from koine.files import (
    State,
    fsync_tree,
    publish_directory,
    read_json,
    remove,
    state_of,
    write_json,
)
from koine.files import find_leftovers as leftovers_of
from koine.files import recover as recover_output

REMOVE = "remove the artifact's folder to have it built again"


def record_of(artifact: Path) -> dict[str, Any] | None:
    """The record beside an artifact; None where there is no such artifact.

    Raises `UserError` where it is damaged.
    """
    path = artifact / "artifact.json"
    if not path.exists():
        return None
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(error.what, where=path, hint=REMOVE) from None
    for key in ("artifact", "step", "fingerprint", "files", "parents"):
        if not isinstance(record, dict) or key not in record:
            raise UserError(f"has no '{key}'", where=path, hint=REMOVE)
    _check(Fields(record, path, hint_if_broken=REMOVE))
    return dict(record)


def _check(record: Fields) -> None:
    """Raise `UserError` for a field of an artifact's record that is of a wrong type."""
    name = record.text("artifact")
    if not name or "\0" in name or name.startswith("/") or ".." in Path(name).parts:
        raise record.wrong("artifact", "the name of an artifact")
    for key in ("step", "fingerprint"):
        record.text(key)
    files = record.inner("files")
    for file in files.value:
        files.text(file)
    for parent in record.entries("parents"):
        one = Fields(parent, record.where, hint_if_broken=REMOVE)
        for key in ("name", "fingerprint", "sha256"):
            one.text(key)
        one.text("input", None)
    record.inner("metrics", None)


def work_folder(run: Path, name: str) -> Path:
    """Where an artifact is while it is being built."""
    return run / ".work" / name


def mark_of(run: Path, name: str) -> Path:
    """The file that says for which fingerprint the work folder is, and how often it was attempted."""
    return run / ".work" / f"{name}.json"


def lock_of(run: Path, name: str) -> Path:
    """The lock that whoever builds or adopts the artifact holds."""
    return run / ".locks" / f"{name}.lock"


def real_place(run: Path, name: str) -> Path:
    """Resolve an artifact's place: its path in the run, or the target of the user's link there.

    Raises `UserError` where that is not there: what lies on a disk that is away must not be built a second
    time.
    """
    final = run / name
    if not final.is_symlink():
        return final
    place = Path(os.path.realpath(final))
    if not place.exists():
        raise UserError(
            f"leads to {place}, which is not there",
            where=final,
            hint="mount its disk; or, if it is gone, remove the link",
        )
    return place


def leftovers(run: Path, name: str) -> list[Path]:
    """Find what a killed publication left beside an artifact."""
    return leftovers_of(real_place(run, name))


def recover(run: Path, name: str) -> None:
    """After a kill between the two renames, put the earlier artifact back; after the second, remove it. Needs the lock."""
    recover_output(real_place(run, name))


def standing(run: Path, name: str) -> State | None:
    """Read what stands in an artifact's place before it is built.

    Raises `UserError` where that is something else than an artifact of ours.
    """
    place = real_place(run, name)
    found = state_of(place)
    empty = found is None or (place.is_dir() and not any(place.iterdir()))
    if not empty and not (place / "artifact.json").exists():
        raise UserError(
            "is no artifact, and is not replaced", where=run / name, hint="move it away, then run again"
        )
    return found


def damage_by_size(place: Path, record: dict[str, Any]) -> Iterator[str]:
    """The files of an artifact that are gone, or of another size than was recorded."""
    sizes = record.get("bytes", {})
    for name in record["files"]:
        try:
            size = (place / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            yield f"its file '{name}' is missing"
            continue
        if size != sizes.get(name, size):
            yield f"its file '{name}' has {size:,} bytes, and {sizes[name]:,} were written"


def check_damage(place: Path, record: dict[str, Any]) -> None:
    """Raise `UserError` where an artifact that is about to be used is not whole by the sizes of its files."""
    for problem in damage_by_size(place, record):
        raise UserError(problem, where=place, hint=REMOVE)


def prepare_work(run: Path, name: str, fingerprint: str) -> tuple[Path, int]:
    """The work folder, with what an earlier attempt at the same fingerprint left in it, and the number of this attempt."""
    work, mark = work_folder(run, name), mark_of(run, name)
    known: dict[str, Any] = read_json(mark) if mark.exists() else {}
    attempt = 1
    if work.exists() and known.get("fingerprint") == fingerprint:
        attempt = int(known["attempts"]) + 1
    else:
        # The mark goes first: a work folder that was being removed must never pass for one to continue from.
        mark.unlink(missing_ok=True)
        if os.path.lexists(work):
            remove(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"fingerprint": fingerprint, "attempts": attempt})
    return work, attempt


def publish(run: Path, name: str, record: dict[str, Any], found: State | None) -> None:
    """Write the record, make everything safe on the disk, and give the work folder its name.

    found: what stood there before, see `standing`; nothing else is replaced.
    """
    work, final = work_folder(run, name), run / name
    write_json(work / "artifact.json", record)
    fsync_tree(work)
    final.parent.mkdir(parents=True, exist_ok=True)
    publish_directory(work, final, found=found)
    mark_of(run, name).unlink(missing_ok=True)
