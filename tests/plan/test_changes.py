"""Changes of inputs are noticed, also behind links; artifacts may lie on another disk; progress may be missing."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from koine.data import read_records
from koine.errors import UserError
from koine.files import exclusive, walk
from koine.plan import Plan, step
from koine.plan.run.job import make_job
from koine.plan.run.progress import read_progress, report, write_progress
from koine.plan.run.scheduler import remove_dead_progress
from koine.plan.run.worker import build
from koine.plan.store.fingerprints import ContentCache, fingerprint_of_content
from koine.plan.store.publish import lock_of
from koine.plan.store.status import statuses

# What happens to the world while a step runs.
MEANWHILE: list[Callable[[], None]] = []


@step(version="1")
def count(data: Path, *, words: int = 0, out: Path) -> None:
    number = len(list(read_records(data, split="all")))
    for happens in MEANWHILE:
        happens()
    (out / "n").write_text(str(number))


@step(version="1")
def double(one: Path, *, out: Path) -> None:
    number = int((one / "n").read_text())
    for happens in MEANWHILE:
        happens()
    (out / "n").write_text(str(2 * number))


@pytest.fixture(autouse=True)
def nothing_happens() -> None:
    MEANWHILE.clear()


def text(path: Path, records: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"text {number}", "language": "en"}) for number in range(records)]
    path.write_text("\n".join(lines) + "\n")


def plan_of(place: Path, words: int = 0) -> Plan:
    plan = Plan("small", place / "runs")
    one = plan.step(count, name="count", data=plan.input(place / "data", name="data"), words=words)
    plan.step(double, name="double", one=one)
    return plan


def run(plan: Plan) -> list[str]:
    """Build what must be built, in this process; return the names of the built artifacts."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    plan.cache.save()
    built = []
    for name, status in statuses(plan).items():
        if status.state == "build":
            job = make_job(plan, plan.nodes[name], code={}, estimate=None, progress=plan.folder / "told")
            assert build(job) == "built"
            built.append(name)
    return built


def result(place: Path) -> int:
    return int((place / "runs/small/double/n").read_text())


def test_a_truncated_file_behind_a_link_changes_the_fingerprint(tmp_path: Path) -> None:
    text(tmp_path / "far/a.jsonl", 120)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "far")
    (tmp_path / "data/loop").symlink_to(".")
    assert run(plan_of(tmp_path)) == ["count", "double"]
    assert result(tmp_path) == 240
    assert run(plan_of(tmp_path)) == []
    text(tmp_path / "far/a.jsonl", 10)
    assert run(plan_of(tmp_path)) == ["count", "double"]
    assert result(tmp_path) == 20


def test_readers_and_fingerprints_see_the_same_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    text(data / "a.jsonl", 3)
    text(data / "b/c.jsonl", 3)
    for name in ("x", "y"):
        (data / name).symlink_to("b")
        (data / "b" / name).symlink_to("..")
    before = fingerprint_of_content(data)
    assert len(list(read_records(data, split="all"))) == 6
    text(data / ".hidden.jsonl", 3)
    text(data / ".a.jsonl.12.partial", 3)
    os.mkfifo(data / "pipe.jsonl")
    assert len(list(read_records(data, split="all"))) == 6
    assert fingerprint_of_content(data) == before
    assert len(walk(data)) == 2


def test_a_saved_data_set_may_not_list_files_outside_its_folder(tmp_path: Path) -> None:
    text(tmp_path / "other.jsonl", 1)
    for name in ("../other.jsonl", str(tmp_path / "other.jsonl")):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data/state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(UserError, match="it must be the name of a file in the same folder"):
            list(read_records(tmp_path / "data"))


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    path, cache = tmp_path / "x", ContentCache(tmp_path / "cache.json")
    path.write_text("before")
    old = time.time() - 100
    os.utime(path, (old, old))
    first = cache.sha256(path)
    path.write_text("after!")
    os.utime(path, (old, old))
    assert cache.sha256(path) != first


def test_a_file_with_a_time_in_the_future_is_cached(tmp_path: Path) -> None:
    path, cache = tmp_path / "x", ContentCache(tmp_path / "cache.json")
    path.write_text("text")
    future = time.time() + 10_000
    os.utime(path, (future, future))
    cache.sha256(path)
    assert list(cache.entries) == [str(path)]


def test_an_input_that_changes_while_a_step_runs_fails_it(tmp_path: Path) -> None:
    text(tmp_path / "data/a.jsonl", 10)
    for happens in (
        lambda: text(tmp_path / "data/a.jsonl", 11),
        lambda: text(tmp_path / "data/b.jsonl", 1),
        lambda: (tmp_path / "data/b.jsonl").unlink(),
        lambda: shutil.rmtree(tmp_path / "data"),
    ):
        MEANWHILE[:] = [happens]
        with pytest.raises(UserError, match="input 'data' changed while the step ran"):
            run(plan_of(tmp_path))
        assert not (tmp_path / "runs/small/count").exists()
    text(tmp_path / "data/a.jsonl", 10)
    # Touched and not changed: no reason to fail.
    MEANWHILE[:] = [lambda: os.utime(tmp_path / "data/a.jsonl")]
    assert run(plan_of(tmp_path)) == ["count", "double"]


def test_an_input_that_changed_before_its_step_fails_it(tmp_path: Path) -> None:
    text(tmp_path / "data/a.jsonl", 10)
    plan = plan_of(tmp_path)
    text(tmp_path / "data/a.jsonl", 11)
    with pytest.raises(UserError, match="has changed since this run began"):
        run(plan)


def test_an_artifact_that_changes_while_it_is_read_fails_the_step(tmp_path: Path) -> None:
    text(tmp_path / "data/a.jsonl", 10)
    run(plan_of(tmp_path))
    shutil.rmtree(tmp_path / "runs/small/double")
    MEANWHILE[:] = [lambda: bool((tmp_path / "runs/small/count/n").write_text("11"))]
    with pytest.raises(UserError, match="'count' changed while the step ran: its file 'n'"):
        run(plan_of(tmp_path))


def test_a_reused_artifact_is_checked_by_file_sizes(tmp_path: Path) -> None:
    text(tmp_path / "data/a.jsonl", 10)
    run(plan_of(tmp_path))
    path = tmp_path / "runs/small/count/n"
    path.write_text("1")
    with pytest.raises(UserError, match="'n' has 1 bytes, and 2 were written"):
        run(plan_of(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="'n' is missing"):
        run(plan_of(tmp_path))
    shutil.rmtree(path.parent)
    assert run(plan_of(tmp_path)) == ["count"]


@pytest.mark.parametrize("moved", ["runs/small/count", "runs/small", "runs"])
def test_a_moved_and_linked_artifact_is_rebuilt_at_its_target(moved: str, tmp_path: Path) -> None:
    text(tmp_path / "data/a.jsonl", 10)
    run(plan_of(tmp_path))
    (tmp_path / "disk").mkdir()
    (tmp_path / moved).rename(tmp_path / "disk/there")
    (tmp_path / moved).symlink_to(tmp_path / "disk/there")
    assert run(plan_of(tmp_path)) == []
    for records in (11, 12):
        text(tmp_path / "data/a.jsonl", records)
        assert run(plan_of(tmp_path)) == ["count", "double"]
        assert run(plan_of(tmp_path)) == []
        assert result(tmp_path) == 2 * records
    assert (tmp_path / moved).is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["there"]


def test_temporary_files_of_a_killed_attempt_are_not_published(tmp_path: Path) -> None:
    text(tmp_path / "data/a.jsonl", 10)
    work = tmp_path / "runs/small/.work/count"

    def left() -> None:
        (work / ".n.json.4711.partial").write_text("{")
        (work / "deep").mkdir(exist_ok=True)
        (work / "deep/.m.12.partial").mkdir(exist_ok=True)
        (work / "deep/.m.lock").touch()

    MEANWHILE[:] = [lambda: left() if work.is_dir() else None]
    run(plan_of(tmp_path))
    names = sorted(path.name for path in (tmp_path / "runs/small/count").rglob("*"))
    assert names == ["artifact.json", "deep", "n"]


def test_a_folder_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    text(tmp_path / "data/a.jsonl", 10)
    (tmp_path / "runs/small/count").mkdir(parents=True)
    (tmp_path / "runs/small/count/notes").write_text("mine")
    with pytest.raises(UserError, match="is no artifact, and is not replaced"):
        run(plan_of(tmp_path))


def test_locks_of_artifacts_leave_no_files(tmp_path: Path) -> None:
    text(tmp_path / "data/a.jsonl", 10)
    run(plan_of(tmp_path))
    assert list((tmp_path / "runs/small/.locks").rglob("*.lock")) == []
    with exclusive(lock_of(tmp_path / "runs/small", "count"), doing="building"):
        assert lock_of(tmp_path / "runs/small", "count").exists()


def test_a_run_continues_where_progress_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / "gone/told", tmp_path):
        monkeypatch.setenv("KOINE_PROGRESS", str(place))
        report(1.0, "done")
        assert read_progress(place) == {}
    told = tmp_path / "told"
    for content in (
        "{",
        "[1]",
        '{"fraction": "half"}',
        '{"fraction": 7}',
        '{"fraction": NaN}',
        '{"text": 3}',
        "",
    ):
        told.write_text(content)
        assert read_progress(told) == {}
    told.write_bytes(b"\xff\xfe")
    assert read_progress(told) == {}
    write_progress(told, fraction=0.5, text="half", waiting=True)
    assert read_progress(told) == {"fraction": 0.5, "text": "half", "waiting": True}


def test_other_files_in_the_progress_folder_are_kept(tmp_path: Path) -> None:
    import platform

    names = [f"{platform.node()}-notes", f"{platform.node()}-", "other-12"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / f"{platform.node()}-4000000").mkdir()
    remove_dead_progress(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
