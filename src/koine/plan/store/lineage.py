"""Trace what an artifact was made from, back to the inputs, and verify files against their records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import sha256_file
from koine.plan.store.fingerprints import fingerprint_of_content
from koine.plan.store.provenance import files_of, manifest_hash
from koine.plan.store.publish import record_of
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
        raise UserError(
            "holds no artifact.json",
            where=artifact,
            hint="only what `koine run` built or `koine adopt` registered has a lineage",
        )
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
    run = run_of(path, record["artifact"])
    for parent in record["parents"]:
        if "input" in parent:
            found = Ancestor(
                parent["name"], Path(parent["input"]), parent["fingerprint"], parent["sha256"], {}
            )
            if verify:
                found.problems += list(find_change(found))
        else:
            place = run / parent["name"]
            if (place / "artifact.json").exists():
                found = _ancestor(place, verify, seen)
                if found.fingerprint != parent["fingerprint"] or found.sha256 != parent["sha256"]:
                    node.problems.append(
                        f"was built from another '{parent['name']}' ({value_text(parent['sha256'])}) "
                        f"than the one that is there now ({value_text(found.sha256)})"
                    )
            else:
                found = Ancestor(
                    parent["name"], place, parent["fingerprint"], parent["sha256"], {}, problems=["is gone"]
                )
        node.parents.append(found)
    return node


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
    seen: set[Path] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current.path not in seen:
            seen.add(current.path)
            yield current
            waiting += current.parents


def tree_lines(node: Ancestor) -> list[str]:
    """Return the tree as lines of text; the parents of a repeated artifact are shown once."""
    return list(_lines(node, "", "", set()))


def _lines(node: Ancestor, first: str, rest: str, seen: set[Path]) -> Iterator[str]:
    again = node.path in seen and bool(node.parents)
    seen.add(node.path)
    step = f"{node.record['step']} v{node.record.get('version')}" if node.record else f"input {node.path}"
    metrics = "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in (node.record.get("metrics") or {}).items()
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
