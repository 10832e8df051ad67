"""The process in which one step runs: lock, work folder, provenance, publication."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from koine.errors import UserError
from koine.files import disk_errors, read_json
from koine.plan.job import HEADER, Job
from koine.plan.loading import load_plan_file
from koine.plan.memory import PeakMemory
from koine.plan.progress import write as tell
from koine.plan.provenance import environment, hashes, manifest_hash
from koine.plan.publish import lock_of, prepare_work, publish, record_of, recover


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that a rerun never races with an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def start_guardian() -> int:
    """Fork a process that kills the whole group of this worker when standard input closes; returns its id.

    The parent holds the other end: it closes it when the step has ended, and the system does so when the parent is
    killed, on every Unix. So neither the worker nor anything that it has started outlives the run.
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


def parents_of(job: Job) -> list[dict[str, Any]]:
    """Name, fingerprint and content hash of each parent, as they are now.

    Raises `UserError` where a parent is no longer what the plan was made with.
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
                mend="let one run end before starting another with other settings, or give it another --name",
            )
        found.append({**entry, "sha256": manifest_hash(known["files"])})
    return found


def build(job: Job, *, guardian: int | None = None) -> str:
    """Build one artifact under its lock; `reused` where another process has built it meanwhile, else `built`."""
    run = Path(job.folder)
    path = lock_of(run, job.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(Path(job.progress), fraction=0.0, text="waiting: another run is building it", waiting=True)
        lock.acquire()
    try:
        return _build(job, run, guardian)
    finally:
        lock.release()


def _build(job: Job, run: Path, guardian: int | None) -> str:
    recover(run, job.name)
    known = record_of(run / job.name)
    if known is not None and (known["fingerprint"] == job.fingerprint or known["step"] == "adopted"):
        return "reused"
    parents = parents_of(job)
    with disk_errors(run / job.name):
        work, attempt = prepare_work(run, job.name, job.fingerprint)
        begun = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{HEADER}{begun}: {job.name}, attempt {attempt}, process {os.getpid()}", flush=True)
        if job.file is not None:
            load_plan_file(Path(job.file))
        else:
            __import__(job.module)
        name, inputs, parameters = pickle.loads(job.call)
        function: Any = sys.modules[job.module]
        for part in name.split("."):
            function = getattr(function, part)
        started = time.time()
        with PeakMemory(without=guardian) as peak:
            function(**inputs, **parameters, out=work)
        seconds = time.time() - started
        if parents_of(job) != parents:
            raise UserError("an input changed while the step ran", where=job.name, mend="run it again")
        metrics = work / "metrics.json"
        publish(
            run,
            job.name,
            {
                "artifact": job.name,
                **job.recipe,
                "parents": parents,
                "fingerprint": job.fingerprint,
                "code": job.code,
                "environment": environment(job.threads),
                "argv": list(job.argv),
                "started": started,
                "finished": time.time(),
                "seconds": seconds,
                "attempts": attempt,
                "peak_memory_bytes": peak.bytes,
                "estimate": job.estimate,
                "metrics": read_json(metrics) if metrics.exists() else {},
                "files": hashes(work),
            },
        )
    return "built"


def main() -> None:
    """Read a job from standard input and do it; the exit code is 0, 2 for a user's mistake, 1 for a crash."""
    die_with_parent(int(sys.argv[1]))
    # Unbuffered: what the guardian waits for on the same descriptor must not lie in a buffer here.
    content = b""
    while len(content) < 8 or len(content) < 8 + struct.unpack("<Q", content[:8])[0]:
        part = os.read(0, 1 << 20)
        if not part:
            sys.exit(1)
        content += part
    guardian = start_guardian()
    job: Job = pickle.loads(content[8:])
    try:
        result = build(job, guardian=guardian)
        tell(Path(job.progress), fraction=1.0, text="", result=result)
    except UserError as error:
        print(f"koine: {error}", file=sys.stderr, flush=True)
        # Told to the parent too: another run may have written to the log meanwhile.
        tell(Path(job.progress), error=str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except SystemExit as error:
        # A step that leaves by sys.exit(0) has not returned: nothing was published, so it must not look like success.
        if error.code in (0, None):
            print("the step ended the process instead of returning", file=sys.stderr, flush=True)
            sys.exit(1)
        raise
    except Exception as error:  # noqa: BLE001 - the traceback is the log's last word, and the exit code tells the parent
        traceback.print_exc()
        tell(Path(job.progress), error=" ".join(f"{type(error).__name__}: {error}".split()))
        sys.exit(1)


if __name__ == "__main__":
    main()
