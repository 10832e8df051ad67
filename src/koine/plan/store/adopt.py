"""Registers an existing folder as an artifact of a run, in place of building it."""

from __future__ import annotations

import time
from pathlib import Path

from koine.errors import UserError
from koine.files import atomic_directory, copy_tree, exclusive, read_json, walk, write_json
from koine.plan.command_line import recorded_command
from koine.plan.plan import NAME, RESERVED, Plan
from koine.plan.store.fingerprints import digest
from koine.plan.store.provenance import code_version, environment, hashes, manifest_hash, sizes
from koine.plan.store.publish import lock_of, recover


def adopt(source: Path, *, name: str, run: str, runs: Path = Path("runs")) -> Path:
    """Copy `source` to artifact `name` of a run; a plan's step of that name is then never run. Returns its path.

    It is a copy, so that the artifact stays what was recorded whatever happens to the original; remove the folder to
    have the step build it again. Where `source` is itself an artifact, its record is kept inside the new one as `origin`.

    Raises `UserError` for a folder that is missing or empty, a name that is taken, and a run that is building it now.
    """
    plan = Plan(run, runs)
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
    with exclusive(lock_of(plan.folder, name), doing=f"building {name}"):
        recover(plan.folder, name)
        with atomic_directory(final) as work:
            started, begun = time.time(), time.monotonic()
            copy_tree(source, work)
            origin = work / "artifact.json"
            record = {
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
                "started": started,
                "metrics": read_json(work / "metrics.json") if (work / "metrics.json").exists() else {},
            }
            files = hashes(work)
            record |= {
                "fingerprint": digest({"adopted": manifest_hash(files)}),
                "finished": time.time(),
                "seconds": time.monotonic() - begun,
                "files": files,
                "bytes": sizes(work),
            }
            write_json(origin, record)
    return final
