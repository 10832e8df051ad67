"""The process in which one step runs: lock, work folder, provenance, publication."""

from __future__ import annotations

import ctypes
import os
import pickle
import platform
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from koine import __version__
from koine.errors import UserError
from koine.files import exclusive, fsync_tree, publish_directory, read_json, sha256_file, write_json


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, so that a rerun never races with an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def build(job: dict[str, Any]) -> None:
    """Build one artifact under its lock, or find that another process has built it meanwhile."""
    folder, name, fingerprint = Path(job["folder"]), job["name"], job["fingerprint"]
    final, work = folder / name, folder / ".work" / name
    mark = folder / ".work" / f"{name}.json"
    with exclusive(folder / ".locks" / f"{name}.lock", doing=f"building {name}", wait=-1):
        record = final / "artifact.json"
        if record.exists() and read_json(record).get("fingerprint") == fingerprint:
            print(f"{name}: built meanwhile by another process; reused")
            return
        if work.exists() and (not mark.exists() or read_json(mark) != fingerprint):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        write_json(mark, fingerprint)
        started = time.time()
        job["function"](**job["inputs"], **job["parameters"], out=work)
        metrics = work / "metrics.json"
        files = sorted(p for p in work.rglob("*") if p.is_file() and p != work / "artifact.json")
        provenance = {
            **job["recipe"],
            "fingerprint": fingerprint,
            "code": {"koine": __version__},
            "environment": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "cores": os.cpu_count(),
                "threads": job["threads"],
            },
            "argv": job["argv"],
            "started": started,
            "finished": time.time(),
            "seconds": time.time() - started,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "metrics": read_json(metrics) if metrics.exists() else {},
            "files": {p.relative_to(work).as_posix(): sha256_file(p) for p in files},
        }
        write_json(work / "artifact.json", provenance)
        fsync_tree(work)
        final.parent.mkdir(parents=True, exist_ok=True)
        publish_directory(work, final)
        mark.unlink()


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    try:
        build(pickle.load(sys.stdin.buffer))
    except UserError as error:
        print(f"koine: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception:  # noqa: BLE001 - the traceback is the log's last word, and the exit code tells the parent
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
