"""Plans on a Ray cluster of two nodes on this machine, and the loss of a process in mid-step."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from koine.errors import UserError
from koine.plan import Plan, step
from koine.plan.run.job import make_job
from koine.plan.run.ray import RayExecutor, Task
from koine.plan.run.scheduler import PlanFailedError, execute
from tests.plan.running import until

pytest.importorskip("ray")


@step()
def walk(*, steps: int, pause: float, out: Path) -> None:
    """A random walk in floating point that saves each step, and goes on from what is saved."""
    import random
    import time

    saved = out / "saved"
    begin, x = (0, 0.0)
    if saved.exists():
        first, second = saved.read_text().split()
        begin, x = int(first), float.fromhex(second)
    with (out.parent / f"{out.name}.pids").open("a") as file:
        print(os.getpid(), file=file)
    for i in range(begin, steps):
        x = x * 0.9 + random.Random(i).gauss(0.0, 1.0)
        (out / "saving").write_text(f"{i + 1} {x.hex()}")
        (out / "saving").replace(saved)
        time.sleep(pause)


@step()
def join(left: Path, right: Path, *, out: Path) -> None:
    import ray.util  # the package is importable under its own name in a worker

    (out / "both").write_text(
        (left / "saved").read_text() + (right / "saved").read_text() + ray.util.__name__
    )


@step()
def crash(*, out: Path) -> None:
    raise ValueError("broken on purpose")


@step()
def saves(*, out: Path) -> None:
    import time

    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    (out / "started").write_text("")
    while not asked:
        time.sleep(0.02)
    (out / "saved").write_text("")
    raise SystemExit(143)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 1024**2, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    made.add_node(num_cpus=1, object_store_memory=80 * 1024**2)
    yield made.address
    ray.shutdown()
    made.shutdown()


def walks(runs: Path, pause: float) -> Plan:
    plan = Plan("walks", runs)
    left = plan.step(walk, name="left", steps=40, pause=pause)
    plan.step(join, name="both", left=left, right=plan.step(walk, name="right", steps=20, pause=pause))
    return plan


def test_a_lost_process_is_started_again_and_ends_in_the_same_bits(cluster: str, tmp_path: Path) -> None:
    killed: list[int] = []

    def lose() -> None:
        """Kill the worker of `left` in mid-step, and then the Ray process that runs its second attempt."""
        work = tmp_path / "ray/walks/.work"
        until(lambda: (work / "left/saved").exists())
        killed.append(int((work / "left.pids").read_text().split()[0]))
        os.kill(killed[0], signal.SIGKILL)
        until(lambda: len((work / "left.pids").read_text().split()) > 1)
        second = int((work / "left.pids").read_text().split()[1])
        ray_process = psutil.Process(second).parent()
        assert ray_process is not None
        assert ray_process.name().startswith("ray::")
        ray_process.kill()
        killed.append(second)
        until(lambda: not psutil.pid_exists(second) or psutil.Process(second).status() == "zombie")

    executor = RayExecutor(cluster)
    assert executor.cores == 2
    thread = threading.Thread(target=lose)
    thread.start()
    execute(walks(tmp_path / "ray", 0.1), executor=executor)
    thread.join()
    assert len(killed) == 2
    assert len((tmp_path / "ray/walks/.work/left.pids").read_text().split()) == 3
    execute(walks(tmp_path / "local", 0.0))
    for name in ("left/saved", "right/saved", "both/both"):
        assert (tmp_path / "ray/walks" / name).read_bytes() == (tmp_path / "local/walks" / name).read_bytes()


def test_a_step_that_crashes_is_reported_and_not_repeated(cluster: str, tmp_path: Path) -> None:
    plan = Plan("bad", tmp_path)
    plan.step(crash, name="crash")
    with pytest.raises(PlanFailedError, match="broken on purpose") as error:
        execute(plan, executor=RayExecutor(cluster))
    assert error.value.exit_code == 1
    assert (tmp_path / "bad/logs/crash.log").read_text().count("=== ") == 1


def test_a_step_that_is_asked_to_stop_can_save(cluster: str, tmp_path: Path) -> None:
    plan = Plan("asked", tmp_path)
    plan.step(saves, name="saves")
    (tmp_path / "told").mkdir()
    job = make_job(plan, plan.nodes["saves"], code={}, estimate=None, progress=tmp_path / "told/saves")
    task = RayExecutor(cluster).start(job)
    work = tmp_path / "asked/.work/saves"
    until((work / "started").exists)
    task.stop(signal.SIGINT)
    until(lambda: task.poll() is not None)
    assert task.code == 130
    assert (work / "saved").exists()
    assert not (tmp_path / "asked/saves").exists()


def test_a_missing_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody can answer here
        with pytest.raises(UserError, match="no Ray cluster answers there"):
            RayExecutor(f"127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(UserError, match="'nowhere' is no address"):
        RayExecutor("nowhere")


def test_a_step_that_never_began_still_gets_a_log(tmp_path: Path) -> None:
    class LostError(Exception):
        pass

    class LostCluster:
        """What a task sees of Ray when the cluster ends before the worker has started."""

        exceptions = SimpleNamespace(RayError=LostError)

        def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
            return references, []

        def get(self, reference: str) -> int:
            raise LostError("the node died")

    log = tmp_path / "logs/tokenizer/universal.log"
    assert Task(LostCluster(), "reference", log).poll() == 1
    assert log.read_text() == "the cluster gave up: the node died\n"
