"""Write the `artifact.json` of a folder that a command makes outside a run, so that it has a lineage.

`recorded` works around any call that writes the folder:

    with recorded(Path("soup"), step="soup", parameters={"weights": [0.5, 0.5]}, parents={"models": paths}):
        koine.combine.merge(paths, out="soup", weights=[0.5, 0.5])
"""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import KoineWarning, UserError
from koine.files import before_publishing, read_json, walk, write_json
from koine.files.stand_ins import sources_of
from koine.plan.command_line import recorded_command
from koine.plan.store.fingerprints import digest, fingerprint_of_content, stamp
from koine.plan.store.provenance import code_version, environment, hashes, manifest_hash, sizes
from koine.plan.store.publish import OUTSIDE_RUN, damage_by_size, record_of

Parents = Mapping[str, Path | str | Iterable[Path | str] | None]
"""What a folder is made from, by role: paths of files and folders, or the name of something remote."""


@contextmanager
def recorded(
    out: Path,
    *,
    step: str,
    parents: Parents,
    parameters: Mapping[str, Any] | None = None,
    version: str = "1",
    metrics: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Iterator[None]:
    """Write `artifact.json` into the folder `out` that is made inside this context.

    A folder that is published as a whole gets its record before its name. One that is filled in place, as by
    a training, gets it at the end of the context, unless an earlier call has written it. After an exception
    there is no record.

    Args:
        out: the folder.
        step: what makes it, such as `koine merge ties`.
        parents: what it is made from, by role. A parent's record is found in its folder or in one above it.
            One without a record is recorded by its path and the sha256 of its content.
        parameters: JSON values that the result depends on.
        version: version of the step.
        metrics: returns the figures of the finished folder; default: its `metrics.json`, if there is one.
    """
    sources = _sources(parents)
    started, clock = time.time(), time.monotonic()
    before = {source.path: _stamps(source) for source in sources}
    written = False

    def finish(folder: Path) -> None:
        nonlocal written
        files = hashes(folder)
        identity = {
            "step": step,
            "version": version,
            "parameters": dict(parameters or {}),
        }
        found = [source.to_json(out, changed=_stamps(source) != before[source.path]) for source in sources]
        seconds = time.monotonic() - clock
        record = {
            "artifact": Path(os.path.realpath(out)).name,
            **identity,
            "parents": found,
            "fingerprint": digest({**identity, "parents": [one["fingerprint"] for one in found]}),
            OUTSIDE_RUN: True,
            "code": code_version(),
            "environment": environment(_threads()),
            "argv": recorded_command(),
            "started": started,
            "finished": started + seconds,
            "seconds": seconds,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "metrics": dict((metrics or _metrics)(folder)),
            "files": files,
            "bytes": sizes(folder),
        }
        write_json(folder / "artifact.json", record)
        written = True

    with before_publishing(out, finish):
        yield
    if not written and out.is_dir() and not _is_recorded(out):
        finish(out)


@dataclass(frozen=True)
class _Source:
    """A parent: a file or folder that exists, or the name of something that this machine does not hold."""

    role: str
    given: str
    path: Path

    def to_json(self, out: Path, *, changed: bool) -> dict[str, Any]:
        """Return the entry of `artifact.json`; paths are kept absolute and relative to `out`."""
        changes: dict[str, Any] = {}
        if changed:
            warnings.warn(
                f"{self.given} changed while it was read; the record has its present sha256",
                KoineWarning,
                stacklevel=4,
            )
            changes = {"changed": True}
        if not self.path.exists():
            name = self.path.name or self.given
            return {"name": name, "role": self.role, "input": self.given, "fingerprint": "", "sha256": ""}
        artifact = artifact_above(self.path)
        if artifact is not None:
            record = record_of(artifact) or {}
            inside = self.path.relative_to(artifact).as_posix()
            return {
                "name": record["artifact"],
                "role": self.role,
                "path": str(artifact),
                "relative": os.path.relpath(artifact, os.path.realpath(out)),
                **({} if inside == "." else {"inside": inside}),
                "fingerprint": record["fingerprint"],
                "sha256": manifest_hash(record["files"]),
                **changes,
            }
        content = fingerprint_of_content(self.path)
        return {
            "name": self.path.name,
            "role": self.role,
            "input": str(self.path),
            "relative": os.path.relpath(self.path, os.path.realpath(out)),
            "fingerprint": content,
            "sha256": content,
            **changes,
        }


def artifact_above(path: Path) -> Path | None:
    """Return the artifact that a file or folder is, or lies in; None where no record lists it."""
    for folder in (path, *path.parents):
        if not (folder / "artifact.json").is_file():
            continue
        try:
            record = record_of(folder)
        except UserError:
            # Not a record of ours: a project of the user's may have a file of this name.
            return None
        inside = path.relative_to(folder).as_posix()
        known = (record or {}).get("files", {})
        is_listed = inside == "." or any(file == inside or file.startswith(f"{inside}/") for file in known)
        return folder if is_listed else None
    return None


def _sources(parents: Parents) -> list[_Source]:
    """Return the parents in order, each path once."""
    found: dict[str, _Source] = {}
    for role, value in parents.items():
        given = [value] if isinstance(value, str | Path) else list(value or ())
        for one in (part for each in given for part in sources_of(each) or (each,)):
            # Links are not resolved: an artifact behind a link belongs to the run that holds the link.
            path = Path(os.path.abspath(one))  # noqa: PTH100 - Path.absolute keeps `..`
            found.setdefault(os.path.realpath(one), _Source(role, str(one), path))
    return list(found.values())


def _stamps(source: _Source) -> dict[str, list[int]]:
    path = source.path
    files = walk(path) if path.is_dir() else [path]
    return {str(file): stamp(file.stat()) for file in files if file.exists()}


def _is_recorded(folder: Path) -> bool:
    """Return whether a folder has a record whose files are all there."""
    record = record_of(folder)
    return record is not None and not list(damage_by_size(folder, record))


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    return dict(read_json(path)) if path.exists() else {}


def _threads() -> int:
    """Return the threads that torch computes with; without torch, the cores."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else os.cpu_count() or 1
