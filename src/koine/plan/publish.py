"""An artifact's way from its work folder to its name, and the mending of what a kill left on that way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.fields import Fields
from koine.files import fsync_tree, publish_directory, read_json, write_json

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
        raise UserError(error.what, where=path, mend=REMOVE) from None
    for key in ("artifact", "step", "fingerprint", "files", "parents"):
        if not isinstance(record, dict) or key not in record:
            raise UserError(f"has no '{key}'", where=path, mend=REMOVE)
    _check(Fields(record, path, whole_file=REMOVE))
    return dict(record)


def _check(record: Fields) -> None:
    """Raise `UserError` where a field of an artifact's record is of another kind than the one that is written."""
    name = record.text("artifact")
    if not name or "\0" in name or name.startswith("/") or ".." in Path(name).parts:
        raise record.wrong("artifact", "the name of an artifact")
    for key in ("step", "fingerprint"):
        record.text(key)
    files = record.inner("files")
    for file in files.value:
        files.text(file)
    for parent in record.entries("parents"):
        one = Fields(parent, record.where, whole_file=REMOVE)
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


def leftovers(run: Path, name: str) -> list[Path]:
    """Earlier versions of an artifact, moved aside by a publication that was killed before its end."""
    final = run / name
    return sorted(final.parent.glob(f".{final.name}.*.old")) if final.parent.is_dir() else []


def recover(run: Path, name: str) -> None:
    """After a kill between the two renames, put the earlier artifact back; after the second, remove it. Needs the lock."""
    final = run / name
    for old in leftovers(run, name):
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


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
        if work.exists():
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"fingerprint": fingerprint, "attempts": attempt})
    return work, attempt


def publish(run: Path, name: str, record: dict[str, Any]) -> None:
    """Write the record, make everything safe on the disk, and give the work folder its name."""
    work, final = work_folder(run, name), run / name
    write_json(work / "artifact.json", record)
    fsync_tree(work)
    final.parent.mkdir(parents=True, exist_ok=True)
    publish_directory(work, final)
    mark_of(run, name).unlink(missing_ok=True)
