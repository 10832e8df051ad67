"""Register an existing folder as an artifact of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import atomic_directory, copy_tree, exclusive, read_json, walk, write_json
from koine.plan.command_line import recorded_command
from koine.plan.plan import NAME, RESERVED, Plan
from koine.plan.store.fingerprints import digest
from koine.plan.store.provenance import code_version, environment, hashes, manifest_hash, sizes
from koine.plan.store.publish import lock_of, recover


def adopt_folder(source: Path, *, name: str, run: str, runs: Path = Path("runs")) -> Path:
    """Copy `source` to artifact `name` of a run and return its path; its step is then never run.

    It is a copy, so that the artifact stays as recorded whatever happens to the original. Remove the folder
    to have the step build it again. If `source` is itself an artifact, its record is kept in the new one as
    `origin`.

    Raises `UserError` for a folder that is missing or empty, a name that is taken, and a run that is building
    it now.
    """
    plan = Plan(run, runs)
    final = plan.folder / name
    _check_folder(source, name, plan)
    with exclusive(lock_of(plan.folder, name), doing=f"building {name}"):
        recover(plan.folder, name)
        with atomic_directory(final) as work:
            started, clock = time.time(), time.monotonic()
            copy_tree(source, work)
            record = _record(source, name, work)
            record |= {
                "started": started,
                "finished": time.time(),
                "seconds": time.monotonic() - clock,
            }
            write_json(work / "artifact.json", record)
    return final


def _check_folder(source: Path, name: str, plan: Plan) -> None:
    """Raise `UserError` unless `source` can become artifact `name` of the run."""
    if not source.exists():
        raise UserError("no such folder", where=source)
    if not source.is_dir():
        raise UserError(
            "is a file; an artifact is a folder", where=source, hint="put it into a folder of its own"
        )
    if not NAME.fullmatch(name) or name.partition("/")[0] in RESERVED:
        raise UserError(f"'{name}' cannot name an artifact", hint="use letters, digits, '-', '_' and '/'")
    final = plan.folder / name
    if final.resolve().is_relative_to(source.resolve()):
        raise UserError("holds the run itself", where=source, hint="adopt the folder of the artifact alone")
    if not walk(source, hidden=True):
        raise UserError("holds no files", where=source)
    for parent in final.relative_to(plan.folder).parents:
        if (plan.folder / parent / "artifact.json").exists():
            raise UserError(f"'{name}' lies inside artifact '{parent}'", hint="choose another name")
    if final.exists():
        raise UserError("exists already", where=final, hint="remove it first, or choose another name")


def _record(source: Path, name: str, work: Path) -> dict[str, Any]:
    """Return the record of an adopted artifact whose files lie in `work`."""
    origin, metrics = work / "artifact.json", work / "metrics.json"
    files = hashes(work)
    return {
        "artifact": name,
        "step": "adopted",
        "version": "1",
        "parameters": {},
        "inputs": {},
        "adopted_from": str(source.resolve()),
        "origin": read_json(origin) if origin.exists() else None,
        "parents": [],
        "code": code_version(),
        "environment": environment(1),
        "argv": recorded_command(),
        "metrics": read_json(metrics) if metrics.exists() else {},
        "fingerprint": digest({"adopted": manifest_hash(files)}),
        "files": files,
        "bytes": sizes(work),
    }
