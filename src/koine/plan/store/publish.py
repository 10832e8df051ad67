"""Publish artifacts: from the work folder to the final name, with repair after a kill."""

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
OUTSIDE_RUN = "outside_run"
"""Field of a record that no run wrote (`koine.plan.store.recording`); a run does not replace such a folder."""


def record_of(artifact: Path) -> dict[str, Any] | None:
    """Return the record of an artifact; None where there is no such artifact.

    Raises `UserError` where the record is damaged.
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
    """Raise `UserError` for a field of an artifact's record that has a wrong type."""
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
        for key in ("input", "path", "relative", "role", "inside"):
            one.text(key, None)
    record.inner("metrics", None)


def work_folder(run: Path, name: str) -> Path:
    """Return the folder of an artifact while it is being built."""
    return run / ".work" / name


def artifact_name(out: Path) -> str:
    """Return the name of an output for people: RUN/ARTIFACT for the work folder of a step, else its folder's."""
    parts = out.absolute().parts
    if ".work" not in parts[1:]:
        return out.absolute().name
    place = parts.index(".work")
    return "/".join((parts[place - 1], *parts[place + 1 :]))


def mark_of(run: Path, name: str) -> Path:
    """Return the file with the fingerprint and the number of attempts of a work folder."""
    return run / ".work" / f"{name}.json"


def lock_of(run: Path, name: str) -> Path:
    """Return the lock file that is held while the artifact is built or adopted."""
    return run / ".locks" / f"{name}.lock"


def real_place(run: Path, name: str) -> Path:
    """Return an artifact's path in the run, or the target if the user has put a link there.

    Raises `UserError` where the target is missing: an artifact on an unmounted disk must not be built a
    second time.
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
    """Return the files that a killed publication left beside an artifact."""
    return leftovers_of(real_place(run, name))


def recover(run: Path, name: str) -> None:
    """Undo or complete a killed publication; the caller holds the lock.

    Between the two renames the earlier artifact is put back; after the second it is removed.
    """
    recover_output(real_place(run, name))


def current_state(run: Path, name: str) -> State | None:
    """Return the state of an artifact's path before it is built.

    Raises `UserError` where something other than an artifact is there.
    """
    place = real_place(run, name)
    found = state_of(place)
    empty = found is None or (place.is_dir() and not any(place.iterdir()))
    if not empty and not _is_of_a_run(place):
        raise UserError(
            "is no artifact, and is not replaced", where=run / name, hint="move it away, then run again"
        )
    return found


def _is_of_a_run(place: Path) -> bool:
    """Return whether a run or `koine adopt` wrote a folder, and no other command."""
    path = place / "artifact.json"
    if not path.exists():
        return False
    record = read_json(path)
    return not (isinstance(record, dict) and record.get(OUTSIDE_RUN))


def damage_by_size(place: Path, record: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each file of an artifact that is missing or has another size than recorded."""
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
    """Raise `UserError` where a file of an artifact is missing or has another size than recorded."""
    for problem in damage_by_size(place, record):
        raise UserError(problem, where=place, hint=REMOVE)


def prepare_work(run: Path, name: str, fingerprint: str) -> tuple[Path, int]:
    """Return the work folder and the number of this attempt.

    Files of an earlier attempt with the same fingerprint stay in the folder.
    """
    work, mark = work_folder(run, name), mark_of(run, name)
    known: dict[str, Any] = read_json(mark) if mark.exists() else {}
    attempt = 1
    if work.exists() and known.get("fingerprint") == fingerprint:
        attempt = int(known["attempts"]) + 1
    else:
        # The mark is removed first: a half-removed work folder must not be continued from.
        mark.unlink(missing_ok=True)
        if os.path.lexists(work):
            remove(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"fingerprint": fingerprint, "attempts": attempt})
    return work, attempt


def publish(run: Path, name: str, record: dict[str, Any], found: State | None) -> None:
    """Write the record, flush all files to disk, and rename the work folder to its final name.

    found: the state from `current_state`; nothing else is replaced.
    """
    work, final = work_folder(run, name), run / name
    write_json(work / "artifact.json", record)
    fsync_tree(work)
    final.parent.mkdir(parents=True, exist_ok=True)
    publish_directory(work, final, found=found)
    mark_of(run, name).unlink(missing_ok=True)
