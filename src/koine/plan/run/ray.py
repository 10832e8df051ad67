"""Run steps as tasks of a Ray cluster whose machines share the run's folder.

Each task starts the same worker process as the local executor, on the machine that Ray chooses. The run's
folder, the inputs, the plan's file and the Python environment must have the same paths on every machine,
and the file system must support locks. A task that is lost with its machine or its process is started again
by Ray, up to `RETRIES` times, and continues in the step's work folder.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.extras import import_extra
from koine.plan.run.job import Job, Process

RETRIES = 3
POLL_SECONDS = 0.1
CONNECT_SECONDS = 5.0
OBJECT_STORE_BYTES = 100 * 1024**2  # jobs are small: what steps exchange goes through files


class WorkerLostError(Exception):
    """The process of a step was killed from outside; Ray starts the task again."""


def run_job(content: bytes) -> int:
    """Run a pickled job to its end on this machine (the Ray task); return the worker's exit code.

    Raises `WorkerLostError` where the worker was killed, so that Ray starts the task again.
    """
    job: Job = pickle.loads(content)
    process = Process(job)
    try:
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:  # what Ray raises in a task that is cancelled
        process.stop(signal.SIGTERM)
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
        raise
    finally:
        process.kill()
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        raise WorkerLostError(f"the worker of '{job.name}' was killed by signal {-code}")
    return code


class Task:
    """A step that runs on the cluster."""

    def __init__(self, ray: Any, reference: Any, log: Path) -> None:
        self.ray, self.reference, self.log = ray, reference, log
        self.code: int | None = None
        self.stopped = False

    def poll(self) -> int | None:
        """Return the worker's exit code; 1 where Ray has given up, with its reason in the step's log."""
        if self.code is None and self.ray.wait([self.reference], timeout=0)[0]:
            try:
                self.code = int(self.ray.get(self.reference))
            except (self.ray.exceptions.RayError, WorkerLostError) as error:
                self.code = 130 if self.stopped else 1
                reason = "stopped" if self.stopped else f"the cluster gave up: {' '.join(str(error).split())}"
                self.log.parent.mkdir(parents=True, exist_ok=True)  # the worker may never have started
                with self.log.open("a", encoding="utf-8") as file:
                    print(reason, file=file)
        return self.code

    def stop(self, number: int) -> None:
        """Ask the step to save and end; every signal reaches it as SIGTERM."""
        if not self.stopped:
            self.stopped = True
            self.ray.cancel(self.reference, force=False)

    def kill(self) -> None:
        """Kill the task and its process."""
        self.stopped = True
        self.ray.cancel(self.reference, force=True)
        while self.poll() is None:
            time.sleep(POLL_SECONDS)


def check_address(address: str) -> None:
    """Raise `UserError` where nothing answers at `[ray://]host:port`; Ray itself tries for over a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        if address == "auto":
            return
        raise UserError(f"'{address}' is no address", where="--address", hint="give host:port, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers there ({error})",
            where=f"--address {address}",
            hint="start one with `ray start --head`, or leave --address out for one on this machine",
        ) from None


class RayExecutor:
    """Runs steps as Ray tasks, as many at once as there are cores; `address` None starts a cluster here."""

    def __init__(self, address: str | None = None) -> None:
        # Ray would send usage statistics, and the user was not asked.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray: Any = import_extra("ray", extra="cluster", purpose="run a plan on a Ray cluster")
        import_extra("ray.exceptions", extra="cluster", purpose="run a plan on a Ray cluster")
        self.ray = ray
        if not ray.is_initialized():
            if address is not None:
                check_address(address)
            own = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
            try:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level="error",
                    **({} if address else own),
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"cannot reach a Ray cluster ({' '.join(str(error).split())[:200]})",
                    where=f"--address {address}" if address else "Ray",
                    hint="start one with `ray start --head`, or leave --address out for one on this machine",
                ) from error
        self.cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.free_memory: int | None = None
        self.task = ray.remote(run_job)

    def start(self, job: Job) -> Task:
        """Submit a step to the cluster."""
        options = self.task.options(
            name=job.name,
            num_cpus=job.threads,
            max_retries=RETRIES,
            retry_exceptions=[WorkerLostError],
        )
        return Task(self.ray, options.remote(pickle.dumps(job)), Path(job.log))
