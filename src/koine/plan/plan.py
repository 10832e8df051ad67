"""Plans: a graph of steps, with a handle and a fingerprint for each artifact."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.fields import check_integer
from koine.plan.step import StepInfo, split_arguments
from koine.plan.store.fingerprints import ContentCache, digest, fingerprint_of_content
from koine.plan.store.publish import record_of

if TYPE_CHECKING:
    from koine.plan.finished_run import FinishedRun

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)*")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Names that the run itself uses in its folder
RESERVED = ("logs", "plan.json", "report.html")
# Module names of plan files start with this, so that `plans.py` never clashes with an installed `plans`
PLAN_FILE = "koine_plan_file_"
MAX_THREADS = 4096


@dataclass(frozen=True)
class Artifact:
    """A handle to the output of a step or to an input; `artifact / "x"` is a file inside it."""

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
        """The path of the artifact, or of the file inside it."""
        return self.path / self.inside if self.inside else self.path


@dataclass(frozen=True)
class Node:
    """One step of a plan."""

    artifact: Artifact
    function: Callable[..., None]
    info: StepInfo
    inputs: dict[str, Any]
    parameters: dict[str, Any]
    identity: dict[str, Any]  # what the fingerprint is made of, in JSON
    parents: tuple[str, ...]
    purpose: str  # what the step is for, in one line


@dataclass(frozen=True)
class Closing:
    """A text to print when the run has succeeded, or a function of the `FinishedRun` and of paths."""

    text: str | Callable[..., str]
    inputs: dict[str, Any] = field(default_factory=dict)


def handles(value: Any) -> Iterator[Artifact]:
    """Yield every handle in an input: one, or a list or dict of them."""
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
            f"an input must be an artifact, got {value!r}", hint="wrap a path in plan.input(path, name=...)"
        )


def places(value: Any) -> Any:
    """Return an input with every handle replaced by its path."""
    if isinstance(value, Artifact):
        return value.place
    if isinstance(value, dict):
        return {key: places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [places(item) for item in value]
    return value


def encode(value: Any) -> Any:
    """Return a parameter or an input as JSON: handles by fingerprint, dataclasses field by field.

    Raises `UserError` for a value that JSON has no type for.
    """
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
        f"a parameter cannot be a {type(value).__name__}: {value!r}", hint="pass paths by plan.input"
    )


@dataclass
class Plan:
    """A graph of steps; nothing runs until `koine.plan.run.scheduler.execute` gets the plan.

    threads: CPU cores of each step that trains or evaluates (`@step(threads=0)`); None: the plan's own
    choice, or 1.
    """

    name: str
    runs: Path = Path("runs")
    threads: int | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    inputs: dict[str, Artifact] = field(default_factory=dict)
    exports: dict[str, Artifact] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    """Values of the plan function's parameters, for messages that name the one at fault."""
    closings: list[Closing] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.name):
            raise UserError(
                f"'{self.name}' cannot name a run",
                hint="begin with a letter or digit, go on with those, '-', '_' and '.'",
            )
        if self.threads is not None:
            check_integer("threads", self.threads, low=1, high=MAX_THREADS)

    @property
    def folder(self) -> Path:
        """The folder of the run's artifacts, logs and records."""
        return self.runs / self.name

    @cached_property
    def cache(self) -> ContentCache:
        """Hashes of the plan's inputs, kept from run to run."""
        return ContentCache(self.folder / ".cache" / "inputs.json")

    def input(self, path: str | Path, *, name: str) -> Artifact:
        """Return a handle to an existing file or folder, fingerprinted by content.

        Raises `UserError` where it does not exist, holds the run's own folder, or its name is taken.
        """
        place = Path(path).resolve()
        try:
            fingerprint = self._fingerprint_of_input(path, place)
        except UserError as error:
            raise self.naming_parameter(error) from None
        artifact = Artifact(name, place, fingerprint)
        if name in self.nodes or self.inputs.get(name, artifact) != artifact:
            raise UserError(f"input '{name}' collides with another of that name", hint="choose another name")
        self.inputs[name] = artifact
        return artifact

    def _fingerprint_of_input(self, path: str | Path, place: Path) -> str:
        if self.folder.resolve().is_relative_to(place):
            raise UserError(
                "holds the run's own folder, so it would change with every run",
                where=path,
                hint="give the folder of the data alone, or another --runs",
            )
        return fingerprint_of_content(place, self.cache)

    def naming_parameter(self, error: UserError) -> UserError:
        """Return an error about a path with the plan's parameter that gave the path, where one did."""
        if error.where is None:
            return error
        found = parameter_of(self.parameters, Path(error.where))
        if found is None:
            return error
        name, given = found
        return UserError(error.what, where=f"{name}={given}", hint=error.hint)

    def step(
        self, function: Callable[..., None], *, name: str, purpose: str | None = None, **given: Any
    ) -> Artifact:
        """Add a step and return the handle to the artifact that it will write.

        Args:
            function: a function decorated with `@step`.
            name: name of the artifact, and its path in the run's folder.
            purpose: what the step is for, in one line; the docstring's first line by default. Steps with the
                same purpose are one stage of the run. It is part of no fingerprint.
            given: the step's inputs (handles) and parameters, by name.

        Raises:
            UserError: not a step, a name that is taken, or an argument that the step does not take.
        """
        info = getattr(function, "__koine_step__", None)
        if not isinstance(info, StepInfo):
            shown = getattr(function, "__qualname__", repr(function))
            raise UserError(f"{shown} is not a step", hint="decorate it with @step()")
        if not NAME.fullmatch(name) or name.partition("/")[0] in RESERVED:
            raise UserError(f"'{name}' cannot name an artifact", hint="use letters, digits, '-', '_' and '/'")
        for other in [*self.nodes, *self.inputs]:
            if other == name or other.startswith(name + "/") or name.startswith(other + "/"):
                raise UserError(f"artifact '{name}' collides with '{other}'", hint="choose another name")
        inputs, parameters = split_arguments(function, given)
        parents: dict[str, None] = {}
        for key, value in inputs.items():
            for handle in handles(value):
                if self._known(handle) is None:
                    raise UserError(
                        f"input '{key}' of '{name}' is not an artifact of this plan",
                        hint="use what plan.step or plan.input returned",
                    )
                parents[handle.name] = None
        identity = {
            "step": f"{function.__module__.removeprefix(PLAN_FILE)}:{function.__qualname__}",
            "version": info.version,
            "parameters": encode(parameters),
            "inputs": encode(inputs),
        }
        path = (self.folder / name).resolve()
        artifact = Artifact(
            name, path, recorded_fingerprint(path, identity, info.formerly) or digest(identity)
        )
        if purpose is None:
            purpose = (inspect.getdoc(function) or "").partition("\n")[0].replace("`", "")
        self.nodes[name] = Node(
            artifact, function, info, inputs, parameters, identity, tuple(parents), purpose
        )
        return artifact

    def threads_of(self, name: str) -> int:
        """Return the CPU cores of a step: by its parameter `threads`, else by `@step`, else by the run."""
        node = self.nodes[name]
        own = node.parameters.get("threads", node.info.threads)
        return own if isinstance(own, int) and own > 0 else self.threads or 1

    def _known(self, handle: Artifact) -> Artifact | None:
        node = self.nodes.get(handle.name)
        known = node.artifact if node else self.inputs.get(handle.name)
        return known if known and known.fingerprint == handle.fingerprint else None

    def export(self, artifact: Artifact, to: str) -> None:
        """Copy an artifact, or a file or folder in it, to `to` in the run's folder after a successful run."""
        parts = Path(to).parts
        if not parts or Path(to).is_absolute() or any(part.startswith(".") for part in parts):
            raise UserError(f"'{to}' is not a name inside the run's folder", where="plan.export")
        if parts[0] in RESERVED or to in self.exports:
            raise UserError(f"'{to}' is taken already", where="plan.export", hint="choose another name")
        for name in self.nodes:
            if name == to or name.startswith(to + "/") or to.startswith(name + "/"):
                raise UserError(f"'{to}' collides with artifact '{name}'", where="plan.export")
        if self._known(artifact) is None:
            raise UserError(f"'{artifact.name}' is not an artifact of this plan", where="plan.export")
        self.exports[to] = artifact

    def closing(self, text: str | Callable[..., str], **inputs: Any) -> None:
        """Print a text when the run has succeeded.

        Args:
            text: the text, or a function that returns it. The function gets the `FinishedRun`, and `inputs`
                by name as paths, so that it can read what the steps have written.
            inputs: handles of this plan, or lists or dicts of them.

        Raises:
            UserError: an input is no artifact of this plan, or the function takes other inputs.
        """
        if not callable(text):
            if inputs:
                raise UserError("only a function takes inputs", where="plan.closing")
            self.closings.append(Closing(text))
            return
        for key, value in inputs.items():
            if any(self._known(handle) is None for handle in handles(value)):
                raise UserError(f"input '{key}' is not an artifact of this plan", where="plan.closing")
        try:
            inspect.signature(text).bind(None, **inputs)
        except TypeError as error:
            raise UserError(
                f"{getattr(text, '__qualname__', text)}: {error}",
                where="plan.closing",
                hint="give it the run, and the inputs by name",
            ) from None
        self.closings.append(Closing(text, {key: places(value) for key, value in inputs.items()}))

    def closing_texts(self, run: FinishedRun) -> list[str]:
        """Return what is to be printed when the run has succeeded.

        Raises `UserError` where a function returns something else than text.
        """
        texts = []
        for closing in self.closings:
            text: object = closing.text(run, **closing.inputs) if callable(closing.text) else closing.text
            if not isinstance(text, str):
                name = getattr(closing.text, "__qualname__", closing.text)
                raise UserError(f"{name} returned {type(text).__name__}, not text", where="plan.closing")
            texts.append(text)
        return texts


def parameter_of(parameters: Mapping[str, Any], place: Path) -> tuple[str, str] | None:
    """Return name and text of the parameter that gave a path or a folder above it; None where none did.

    A parameter gives a path, several of them, or `NAME=PATH` texts.
    """
    found: list[tuple[int, str, str]] = []
    for name, value in parameters.items():
        for item in value if isinstance(value, tuple | list) else (value,):
            text = item.partition("=")[2] if isinstance(item, str) else ""
            path = item if isinstance(item, Path) else Path(text) if text else None
            if path is None:
                continue
            root = path.resolve()
            if place in (path, root):
                found.append((len(root.parts), name, str(item)))
            elif place.is_relative_to(root):
                found.append((len(root.parts), name, f"{item}/{place.relative_to(root)}"))
    return max(found)[1:] if found else None


def recorded_fingerprint(path: Path, identity: dict[str, Any], formerly: tuple[str, ...]) -> str | None:
    """Return the recorded fingerprint of an artifact that need not be built again.

    These are adopted artifacts, and those that the same step built under a former name. None for any other.
    """
    known = record_of(path)
    if known is None:
        return None
    recorded = str(known["fingerprint"])
    renamed = known["step"] in formerly and digest({**identity, "step": known["step"]}) == recorded
    return recorded if renamed or known["step"] == "adopted" else None
