"""Trace what an artifact was made from, back to the inputs, and verify files against their records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import sha256_file
from koine.plan.store.fingerprints import fingerprint_of_content
from koine.plan.store.provenance import files_of, manifest_hash
from koine.plan.store.publish import OUTSIDE_RUN, record_of
from koine.plan.store.recording import artifact_above
from koine.plan.store.status import value_text


@dataclass
class Ancestor:
    """A node of the tree: an artifact, or an input of the plan (with an empty `record`)."""

    name: str
    path: Path
    fingerprint: str
    sha256: str
    record: dict[str, Any]
    parents: list[Ancestor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[Path, bool]:
        """What tells two nodes apart: an input of a plan may be an artifact too, which is another node."""
        return self.path, bool(self.record)

    def to_json(self) -> dict[str, Any]:
        """Return this node and its ancestors as JSON."""
        keys = (
            "step",
            "version",
            "parameters",
            "seconds",
            "peak_memory_bytes",
            "code",
            "metrics",
            "adopted_from",
        )
        return {
            "name": self.name,
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "sha256": self.sha256,
            **{key: self.record[key] for key in keys if key in self.record},
            "problems": self.problems,
            "parents": [parent.to_json() for parent in self.parents],
        }


def trace_lineage(artifact: Path, *, verify: bool = False) -> Ancestor:
    """Return the tree of ancestors of an artifact's folder.

    verify: read every file again, and list in `problems` what differs from the record.

    Raises `UserError` where the folder has no record, or a record is damaged.
    """
    if not (artifact / "artifact.json").exists():
        if not artifact.exists():
            raise UserError("no such artifact", where=artifact)
        hint = "only what a command of Koine made, or `koine adopt` registered, has a lineage"
        if (artifact / "checkpoints").is_dir():
            hint = "its training is not finished; run the same command again"
        raise UserError("holds no artifact.json", where=artifact, hint=hint)
    # Not resolved: a moved artifact behind a link belongs to the run that holds the link.
    return _ancestor(artifact.absolute(), verify, {})


def _ancestor(path: Path, verify: bool, seen: dict[Path, Ancestor]) -> Ancestor:
    if path in seen:
        return seen[path]
    record = record_of(path) or {}
    node = Ancestor(record["artifact"], path, record["fingerprint"], manifest_hash(record["files"]), record)
    seen[path] = node
    if verify:
        node.problems += list(find_damage(path, record["files"]))
    node.parents += [_parent(node, parent, verify, seen) for parent in record["parents"]]
    return node


def _parent(node: Ancestor, parent: dict[str, Any], verify: bool, seen: dict[Path, Ancestor]) -> Ancestor:
    """Return the tree of one recorded parent, and add to the problems of `node` where it is another now."""
    place = _place(node, parent)
    recorded = (parent["fingerprint"], parent["sha256"])
    if "input" in parent:
        found = Ancestor(parent["name"], place, *recorded, {})
        if verify and parent["sha256"]:
            found.problems += list(find_change(found))
        if (artifact := artifact_above(place)) is not None:
            found.parents.append(_ancestor(artifact, verify, seen))
        return found
    if not (place / "artifact.json").exists():
        return Ancestor(parent["name"], place, *recorded, {}, problems=["is gone"])
    found = _ancestor(place, verify, seen)
    if (found.fingerprint, found.sha256) != recorded:
        node.problems.append(
            f"was built from another '{parent['name']}' ({value_text(parent['sha256'])}) "
            f"than the one that is there now ({value_text(found.sha256)})"
        )
    return found


def _place(node: Ancestor, parent: dict[str, Any]) -> Path:
    """Return the path of a recorded parent: in the run, or beside a moved child, or where it was."""
    recorded = parent.get("input", parent.get("path"))
    if recorded is None:
        return run_of(node.path, node.record["artifact"]).joinpath(str(parent["name"]))
    beside = Path(os.path.normpath(node.path / parent["relative"])) if "relative" in parent else None
    if beside is not None and beside.exists() and not Path(recorded).exists():
        return beside
    return Path(recorded)


def run_of(path: Path, name: str) -> Path:
    """Return the folder of the run that holds artifact `name` at `path`."""
    if ".." in path.parts or not path.match(name):
        path = path.resolve()
    for _ in Path(name).parts:
        path = path.parent
    return path


def find_damage(folder: Path, files: dict[str, str]) -> Iterator[str]:
    """Yield what differs between an artifact's files and the hashes in its record."""
    for name, expected in files.items():
        if not (folder / name).is_file():
            yield f"file '{name}' is missing"
        elif sha256_file(folder / name) != expected:
            yield f"file '{name}' is not what was built: its sha256 differs from the record"
    for name in files_of(folder):
        if name not in files:
            yield f"file '{name}' was added later"


def find_change(node: Ancestor) -> Iterator[str]:
    """Yield a problem if an input has changed since the plan read it."""
    if not node.path.exists():
        yield "input is gone"
    elif fingerprint_of_content(node.path) != node.fingerprint:
        yield "input has changed since"


def all_ancestors(node: Ancestor) -> Iterator[Ancestor]:
    """Yield the node and its ancestors, each once."""
    seen: set[tuple[Path, bool]] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current.key not in seen:
            seen.add(current.key)
            yield current
            waiting += current.parents


def tree_lines(node: Ancestor) -> list[str]:
    """Return the tree as lines of text; the parents of a repeated artifact are shown once."""
    return list(_lines(node, "", "", set()))


def _lines(node: Ancestor, first: str, rest: str, seen: set[tuple[Path, bool]]) -> Iterator[str]:
    again = node.key in seen and bool(node.parents)
    seen.add(node.key)
    step = f"{node.record['step']} v{node.record.get('version')}" if node.record else f"input {node.path}"
    if node.record.get(OUTSIDE_RUN):
        step = f"{node.record['step']}  {node.path}"
    metrics = "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in (node.record.get("metrics") or {}).items()
        # Figures of single languages would make the line endless; `--json` has them.
        if "/" not in key
    )
    line = f"{first}{node.name}  {node.sha256[:12]}  {step}" + (f"  {metrics}" if metrics else "")
    yield line + ("  (see above)" if again else "")
    for problem in node.problems:
        yield f"{rest}  ! {problem}"
    if not again:
        for index, parent in enumerate(node.parents):
            last = index == len(node.parents) - 1
            yield from _lines(
                parent, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "), seen
            )
