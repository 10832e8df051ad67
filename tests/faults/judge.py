"""Judge the end of a case: whole, one clear line, a traceback, or silent."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.faults.life import Life
from tests.faults.stages import Stage

Verdict = Literal["whole", "line", "traceback", "silent"]
Listing = dict[str, str]

# What two undisturbed runs differ in, on purpose: when, how long, where, by which process.
VOLATILE = {
    "seconds", "cpu_seconds", "started", "finished", "tokens_per_second", "matmul_rate_share", "ceiling_share", "megabytes_per_second", "peak_memory_bytes", "attempts",
    "environment", "argv", "code", "log", "nodes", "status", "reasons",
}  # fmt: skip
TIMES = re.compile(rb"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?)?Z?")
TEMPORARY = re.compile(r"(^|/)\.[^/]*|\.partial|\.tmp|\.old|\.lock|\.unfinished|~$")
TRACES = (
    "Traceback (most recent call last)",
    "panicked at",
    "Exception ignored in",
    "Segmentation fault",
    "Fatal Python error",
)


@dataclass
class Result:
    """The end of one case, and how to run it alone."""

    verdict: Verdict
    why: str = ""
    name: str = ""
    again: str = ""
    said: str = ""
    seconds: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)


class WrongError(Exception):
    """A case ended in a way that it must not."""

    def __init__(self, verdict: Verdict, why: str) -> None:
        super().__init__(why)
        self.verdict: Verdict = verdict
        self.why = why


def listing(folder: Path, *, place: Path | None = None) -> Listing:
    """Return everything below `folder`, with a hash of the reproducible content."""
    found: Listing = {}
    for parent, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(parent) / name
            told = str(path.relative_to(folder))
            told = re.sub(r"events\.out\.tfevents[^/]*", "events", told)
            if path.is_symlink():
                found[told] = f"-> {path.readlink()}"
            elif path.is_dir():
                found[told + "/"] = ""
            elif path.is_file():
                found[told] = digest(path, place or folder)
            else:
                found[told] = "special"
    return found


def digest(path: Path, place: Path) -> str:
    """Hash a file's content without times, durations and the case's own path."""
    if path.name.startswith("events.out.tfevents"):
        return "events"
    content = path.read_bytes().replace(os.fsencode(place), b"PLACE")
    if path.suffix in (".json", ".jsonl") and content:
        try:
            values = [
                json.loads(line) for line in (content.splitlines() if path.suffix == ".jsonl" else [content])
            ]
        except ValueError:
            return "not JSON " + hashlib.sha256(content).hexdigest()
        if path.name == "artifact.json":
            values = [without_speed(value) for value in values]
        content = json.dumps([steady(value) for value in values], sort_keys=True).encode()
    elif path.suffix in (".html", ".log", ".md"):
        return "a page" if content else "empty"
    return hashlib.sha256(TIMES.sub(b"TIME", content)).hexdigest()


def without_speed(record: Any) -> Any:
    """Remove the artifact's name, and the hashes and sizes of files that hold a training's speed, from a record."""
    if not isinstance(record, dict):
        return record
    changed = dict(record)
    # The artifact of `--out LINK` has the name of the folder that the link leads to.
    changed.pop("artifact", None)
    for key in ("files", "bytes"):
        if isinstance(record.get(key), dict):
            changed[key] = {
                name: value
                for name, value in record[key].items()
                if name != "metrics.jsonl" and not name.startswith("tensorboard/")
            }
    return changed


def steady(value: Any) -> Any:
    """Remove the fields that differ between two undisturbed runs on purpose."""
    if isinstance(value, dict):
        return {key: steady(entry) for key, entry in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [steady(entry) for entry in value]
    return value


def difference(wanted: Listing, found: Listing) -> str:
    """Describe the first differences of two listings."""
    lines = [f"missing {name}" for name in wanted if name not in found]
    lines += [f"left over {name}" for name in found if name not in wanted]
    lines += [f"other content in {name}" for name in wanted if name in found and wanted[name] != found[name]]
    return "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")


def temporary(found: Listing) -> list[str]:
    """Return names that only our own temporary files have."""
    return [name for name in found if TEMPORARY.search(name)]


def said(life: Life) -> list[str]:
    """Return the last lines of the command, without notes and progress."""
    lines = [line for line in life.err.splitlines() if line.strip()]
    return [line for line in lines if line.startswith("koine: ") and not line.startswith("koine: note: ")]


def check_end(life: Life) -> str | None:
    """Return None for success, or the error line. Raises `WrongError` for anything else."""
    if life.late:
        raise WrongError("silent", f"did not end within {life.seconds:.0f} s")
    trace = next((trace for trace in TRACES if trace in life.err), None)
    if trace is not None:
        raise WrongError("traceback", last_words(life))
    if life.code == 0:
        return None
    lines = said(life)
    if life.code == 2 and len(lines) == 1:
        return lines[0]
    if life.code == 2 and lines and len(set(lines)) == 1:
        return lines[0]
    raise WrongError("traceback", f"exit code {life.code}, {len(lines)} lines: {last_words(life)}")


def last_words(life: Life) -> str:
    """Return the end of a traceback: our innermost line of code, and the error."""
    places = re.findall(r'File "[^"]*/src/(koine/[^"]+)", line (\d+)', life.err)
    place = ":".join(places[-1]) if places else ""
    lines = [line for line in life.err.splitlines() if line.strip()]
    return f"{place} {lines[-1][:300] if lines else 'said nothing'}".strip()


def visible(stage: Stage, found: Listing, wanted: Listing, before: Listing) -> None:
    """Raise `WrongError` if something partial is under a name that users see.

    A folder or file is complete or absent. In a training's folder, each file under its final name is
    complete; in a run's folder, each artifact is complete or absent.
    """
    for out in stage.outs:
        if stage.shape == "training":
            mine = {
                name: content
                for name, content in _of(found, out).items()
                if not TEMPORARY.search(name)
                and not re.search(r"/(checkpoints|tensorboard)/|metrics\.jsonl$", name)
                and not name.endswith("/")
            }
            wrong = [name for name, content in mine.items() if wanted.get(name) != content]
            if wrong:
                raise WrongError("silent", f"half-written: {', '.join(wrong[:4])}")
            continue
        mine, whole, old = _of(found, out), _of(wanted, out), _of(before, out)
        if mine and mine not in (whole, old):
            raise WrongError("silent", f"half-written under its name: {difference(whole, mine)}")


def _of(found: Listing, out: str) -> Listing:
    return {name: content for name, content in found.items() if name == out or name.startswith(out + "/")}
