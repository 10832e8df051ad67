"""The process that runs one step: lock, work folder, provenance, publication."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import struct
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from koine.errors import UserError
from koine.files import clear_partials, disk_errors, exclusive, explain, read_json, sha256_file, walk
from koine.plan.loading import load_plan_file
from koine.plan.run.job import HEADER, Job
from koine.plan.run.peak_memory import PeakMemory
from koine.plan.run.progress import write_progress
from koine.plan.store.fingerprints import ContentCache, fingerprint_of_content, stamp
from koine.plan.store.provenance import environment, files_of, hashes, manifest_hash, sizes
from koine.plan.store.publish import (
    REMOVE,
    check_damage,
    current_state,
    lock_of,
    prepare_work,
    publish,
    record_of,
    recover,
)


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that a rerun never races with an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def start_guardian() -> int:
    """Fork a process that kills this worker's process group when standard input closes; return its id.

    The parent holds the other end and closes it when the step has ended; if the parent is killed, the
    system closes it. So neither the worker nor any process that it has started outlives the run.
    """
    guardian = os.fork()
    if guardian:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        return guardian
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


@dataclass(frozen=True)
class InputState:
    """The state of a step's inputs before it runs: its parents' records and the stamps of their files."""

    recorded: list[dict[str, Any]]
    stamps: dict[str, list[int]]


def parents_of(job: Job) -> list[dict[str, Any]]:
    """Return name, fingerprint and content hash of each parent, as they are now.

    Raises `UserError` where a parent has changed since the plan was made, or is damaged.
    """
    found = []
    for parent in job.parents:
        path = Path(parent["path"])
        entry = {"name": parent["name"], "fingerprint": parent["fingerprint"]}
        if parent["input"]:
            found.append({**entry, "input": str(path), "sha256": parent["fingerprint"]})
            continue
        known = record_of(path)
        if known is None or known["fingerprint"] != parent["fingerprint"]:
            raise UserError(
                f"artifact '{parent['name']}' was changed by another run while '{job.name}' was being built",
                where=path,
                hint="let one run end before starting another with other settings, or give it another --name",
            )
        check_damage(path, known)
        found.append({**entry, "sha256": manifest_hash(known["files"])})
    return found


def read_input_state(job: Job) -> InputState:
    """Return the state of a step's inputs before it begins.

    Raises `UserError` where one has changed since the plan was made.
    """
    # Stamps come first: a change while the content is read is then found at the end.
    stamps = stamps_of(job)
    before = InputState(parents_of(job), stamps)
    for parent in job.parents:
        if parent["input"]:
            check_other_content(job, parent, "has changed since this run began")
    return before


def stamps_of(job: Job) -> dict[str, list[int]]:
    """Return the stamp of every file of the parents."""
    files: list[Path] = []
    for parent in job.parents:
        path = Path(parent["path"])
        if parent["input"]:
            files += [path] if path.is_file() else walk(path) if path.is_dir() else []
        else:
            files += files_of(path).values()
    return {str(file): stamp(file.stat()) for file in files if file.exists()}


def check_other_content(job: Job, parent: dict[str, Any], what: str) -> None:
    """Raise `UserError` where an input differs from the content that the plan was made with.

    Files with their old stamp are not read again.
    """
    path = Path(parent["path"])
    cache = ContentCache(Path(job.folder) / ".cache" / "inputs.json")
    if not path.exists() or fingerprint_of_content(path, cache) != parent["fingerprint"]:
        raise UserError(f"input '{parent['name']}' {what}", where=path, hint="run the same command again")


def check_changes(job: Job, before: InputState) -> None:
    """Raise `UserError` where an input has changed since the step began."""
    if parents_of(job) != before.recorded:
        raise UserError("an input changed while the step ran", where=job.name, hint="run it again")
    now = stamps_of(job)
    if now == before.stamps:
        return
    for parent in job.parents:
        path = Path(parent["path"])
        if parent["input"]:
            check_other_content(job, parent, "changed while the step ran")
            continue
        known = (record_of(path) or {}).get("files", {})
        for name, file in files_of(path).items():
            if now.get(str(file)) != before.stamps.get(str(file)) and sha256_file(file) != known.get(name):
                raise UserError(
                    f"artifact '{parent['name']}' changed while the step ran: its file '{name}'",
                    where=path,
                    hint=REMOVE,
                )


def build(job: Job, *, guardian: int | None = None) -> str:
    """Build one artifact under its lock; return `built`, or `reused` if another process has built it."""

    def waiting() -> None:
        write_progress(
            Path(job.progress), fraction=0.0, text="waiting: another run is building it", waiting=True
        )

    run = Path(job.folder)
    with exclusive(lock_of(run, job.name), doing=f"building {job.name}", wait=-1, waiting=waiting):
        return _build(job, run, guardian)


def _build(job: Job, run: Path, guardian: int | None) -> str:
    recover(run, job.name)
    known = record_of(run / job.name)
    if known is not None and (known["fingerprint"] == job.fingerprint or known["step"] == "adopted"):
        check_damage(run / job.name, known)
        return "reused"
    found = current_state(run, job.name)
    before = read_input_state(job)
    kept = "run the same command again to continue"
    with disk_errors(run / job.name, kept=kept):
        work, attempt = prepare_work(run, job.name, job.fingerprint)
        clear_partials(work)
        begun = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{HEADER}{begun}: {job.name}, attempt {attempt}, process {os.getpid()}", flush=True)
        function, inputs, parameters = function_of(job)
        # The wall clock may be set back meanwhile: durations need the monotonic one.
        started, clock, computed = time.time(), time.monotonic(), cpu_seconds()
        with PeakMemory(without=guardian) as peak:
            function(**inputs, **parameters, out=work)
        seconds, used = time.monotonic() - clock, cpu_seconds() - computed
        check_changes(job, before)
        metrics = work / "metrics.json"
        # Partial files of a killed attempt, or of a process that the step has started.
        clear_partials(work)
        record = {
            "artifact": job.name,
            **job.identity,
            "parents": before.recorded,
            "fingerprint": job.fingerprint,
            "code": job.code,
            "environment": environment(job.threads),
            "argv": list(job.argv),
            "started": started,
            "finished": started + seconds,
            "seconds": seconds,
            "cpu_seconds": used,
            "attempts": attempt,
            "peak_memory_bytes": peak.bytes,
            "estimate": job.estimate,
            "metrics": read_json(metrics) if metrics.exists() else {},
            "files": hashes(work),
            "bytes": sizes(work),
        }
        publish(run, job.name, record, found)
    return "built"


def cpu_seconds() -> float:
    """Return the CPU time of this process and its ended children, in seconds."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def function_of(job: Job) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the step's function, its inputs and its parameters."""
    if job.file is not None:
        load_plan_file(Path(job.file))
    else:
        __import__(job.module)
    name, inputs, parameters = pickle.loads(job.call)
    function: Any = sys.modules[job.module]
    for part in name.split("."):
        function = getattr(function, part)
    return function, inputs, parameters


def fail(job: Job, error: UserError) -> NoReturn:
    """Write the error to the log and to the parent, then exit with code 2.

    The parent cannot rely on the log's last line: another run may have written to it meanwhile.
    """
    print(f"koine: {error}", file=sys.stderr, flush=True)
    write_progress(Path(job.progress), error=str(error))
    sys.exit(2)


def main() -> None:
    """Read a job from standard input and run it; exit code 0, 2 for a user's mistake, 1 for a crash."""
    die_with_parent(int(sys.argv[1]))
    # Unbuffered: the guardian waits for the end of the same descriptor, so nothing may stay in a buffer here.
    content = b""
    while len(content) < 8 or len(content) < 8 + struct.unpack("<Q", content[:8])[0]:
        part = os.read(0, 1 << 20)
        if not part:
            sys.exit(1)
        content += part
    guardian = start_guardian()
    job: Job = pickle.loads(content[8:])
    # Model cards name the command that the user gave, not that of this process.
    sys.argv = list(job.argv)
    try:
        result = build(job, guardian=guardian)
        write_progress(Path(job.progress), fraction=1.0, text="", result=result)
    except UserError as error:
        fail(job, error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except SystemExit as error:
        # A step that calls sys.exit(0) has not returned and nothing was published: it is no success.
        if error.code in (0, None):
            print("the step ended the process instead of returning", file=sys.stderr, flush=True)
            sys.exit(1)
        raise
    except OSError as error:
        # An error of the disk or the file server, not of the step: one line as everywhere.
        fail(job, explain(error) or UserError(str(error)))
    except Exception as error:  # noqa: BLE001 - the traceback goes to the log, the exit code to the parent
        traceback.print_exc()
        write_progress(Path(job.progress), error=" ".join(f"{type(error).__name__}: {error}".split()))
        sys.exit(1)


if __name__ == "__main__":
    main()
