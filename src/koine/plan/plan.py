"""A plan: inert handles to artifacts, the fingerprint of each, and why it must be built or not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import read_json, sha256_file
from koine.plan.step import StepInfo, split

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)*")


@dataclass(frozen=True)
class Artifact:
    """A handle to something that a plan has or will have; `artifact / "x"` is a file inside it."""

    name: str
    path: Path
    fingerprint: str
    inside: str = ""

    def __truediv__(self, part: str) -> Artifact:
        if Path(part).is_absolute() or ".." in Path(part).parts:
            raise UserError(f"'{part}' leads out of artifact '{self.name}'")
        return dataclasses.replace(self, inside=f"{self.inside}/{part}".lstrip("/"))

    @property
    def place(self) -> Path:
        return self.path / self.inside if self.inside else self.path


@dataclass(frozen=True)
class Node:
    """One step of a plan."""

    artifact: Artifact
    function: Callable[..., None]
    info: StepInfo
    inputs: dict[str, Any]
    parameters: dict[str, Any]
    recipe: dict[str, Any]  # what the fingerprint is made of, in JSON
    parents: tuple[str, ...]


def handles(value: Any) -> Iterator[Artifact]:
    """Every handle in an input: one, or a list or dict of them."""
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from handles(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from handles(item)
    elif value is not None:
        raise UserError(
            f"an input must be an artifact, got {value!r}", mend="wrap a path in plan.input(path)"
        )


def encode(value: Any) -> Any:
    """JSON of a parameter or an input, handles by fingerprint."""
    if isinstance(value, Artifact):
        return {"artifact": value.name, "inside": value.inside, "fingerprint": value.fingerprint}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            "dataclass": type(value).__qualname__,
            **{f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"a parameter cannot be a {type(value).__name__}: {value!r}", mend="pass paths by plan.input"
    )


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def fingerprint_of_content(path: Path) -> str:
    """sha256 over the relative names and contents of a file or folder."""
    if not path.exists():
        raise UserError("no such file or folder", where=path)
    if path.is_file():
        return sha256_file(path)
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return digest([[item.relative_to(path).as_posix(), sha256_file(item)] for item in files])


@dataclass
class Plan:
    """Collects steps; nothing runs until an executor is given the plan."""

    name: str
    runs: Path = Path("runs")
    nodes: dict[str, Node] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def input(self, path: str | Path, *, name: str) -> Artifact:
        """A handle to an existing file or folder, fingerprinted by content."""
        place = Path(path).resolve()
        return Artifact(name, place, fingerprint_of_content(place))

    def step(self, function: Callable[..., None], *, name: str, **given: Any) -> Artifact:
        """Add a step; returns the handle to what it will write."""
        info = getattr(function, "__koine_step__", None)
        if not isinstance(info, StepInfo):
            raise UserError(f"{function.__qualname__} is not a step", mend="decorate it with @step()")
        if not NAME.fullmatch(name):
            raise UserError(f"'{name}' cannot name an artifact", mend="use letters, digits, '-', '_' and '/'")
        for other in self.nodes:
            if other == name or other.startswith(name + "/") or name.startswith(other + "/"):
                raise UserError(f"artifact '{name}' collides with '{other}'", mend="choose another name")
        inputs, parameters = split(function, given)
        recipe = {
            "step": f"{function.__module__}:{function.__qualname__}",
            "version": info.version,
            "parameters": encode(parameters),
            "inputs": encode(inputs),
        }
        artifact = Artifact(name, (self.folder / name).resolve(), digest(recipe))
        parents = tuple(dict.fromkeys(h.name for value in inputs.values() for h in handles(value)))
        self.nodes[name] = Node(artifact, function, info, inputs, parameters, recipe, parents)
        return artifact


def differences(old: Any, new: Any, field_name: str = "") -> list[str]:
    """`field: old → new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines: list[str] = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{field_name}.{key}" if field_name else str(key)
            lines += differences(old.get(key), new.get(key), inner)
        return lines
    return [] if old == new else [f"{field_name}: {old!r} → {new!r}"]


def why(node: Node) -> list[str]:
    """Why a step must run: `["new"]`, or what changed, field by field; empty where it is up to date."""
    record = node.artifact.path / "artifact.json"
    if not record.exists():
        return ["new"]
    old = read_json(record)
    if old.get("fingerprint") == node.artifact.fingerprint:
        return []
    return differences({key: old.get(key) for key in node.recipe}, node.recipe) or ["fingerprint changed"]
