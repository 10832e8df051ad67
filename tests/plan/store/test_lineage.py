"""Provenance, lineage, verification, adoption."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.plan import Artifact, Plan, step
from koine.plan.run.scheduler import execute
from koine.plan.store.adopt import adopt_folder
from koine.plan.store.lineage import all_ancestors, trace_lineage, tree_lines
from koine.plan.store.status import statuses


@step(version="2")
def write(data: Path, *, word: str, out: Path) -> None:
    (out / "text").write_text(data.read_text() + word)
    (out / "metrics.json").write_text('{"loss": 1.25}')


@step()
def copy(source: Path, *, out: Path) -> None:
    (out / "text").write_text(source.read_text())


def demo(runs: Path, word: str = "a") -> tuple[Plan, Artifact]:
    plan = Plan("demo", runs)
    first = plan.step(write, name="words/first", data=plan.input(runs / "data.txt", name="data"), word=word)
    return plan, plan.step(copy, name="second", source=first / "text")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "data.txt").write_text("data ")
    return tmp_path


def states(plan: Plan) -> dict[str, str]:
    return {name: status.state for name, status in statuses(plan).items()}


def test_the_record_is_complete_and_its_hashes_are_those_of_the_files(runs: Path) -> None:
    plan, _ = demo(runs)
    execute(plan)
    record = json.loads((runs / "demo/words/first/artifact.json").read_text())
    of = {
        name: hashlib.sha256((runs / "demo/words/first" / name).read_bytes()).hexdigest()
        for name in ("text", "metrics.json")
    }
    assert record["files"] == of
    assert record["parents"][0]["sha256"] == hashlib.sha256(b"data ").hexdigest()
    assert (record["step"], record["version"]) == ("tests.plan.store.test_lineage:write", "2")
    assert record["parameters"] == {"word": "a"}
    assert record["metrics"] == {"loss": 1.25}
    assert record["code"]["koine"]
    assert {"python", "torch", "tokenizers", "platform", "cores", "threads"} <= record["environment"].keys()
    assert {
        "argv",
        "started",
        "finished",
        "seconds",
        "peak_memory_bytes",
        "attempts",
        "estimate",
    } <= record.keys()
    second = json.loads((runs / "demo/second/artifact.json").read_text())
    manifest = json.dumps(dict(sorted(of.items())), sort_keys=True).encode()
    assert second["parents"] == [
        {
            "name": "words/first",
            "fingerprint": record["fingerprint"],
            "sha256": hashlib.sha256(manifest).hexdigest(),
        }
    ]


def test_the_tree_and_what_verification_finds(runs: Path) -> None:
    plan, second = demo(runs)
    execute(plan)
    lines = tree_lines(trace_lineage(second.path, verify=True))
    assert [line.replace("   └", "└").split("  ")[0] for line in lines] == [
        "second",
        "└─ words/first",
        "└─ data",
    ]
    assert "loss=1.25" in lines[1]
    (runs / "demo/words/first/text").write_text("data b")
    (runs / "demo/words/first/more").write_text("")
    (runs / "demo/second/text").unlink()
    (runs / "data.txt").write_text("other")
    problems = {node.name: node.problems for node in all_ancestors(trace_lineage(second.path, verify=True))}
    assert problems == {
        "second": ["file 'text' is missing"],
        "words/first": [
            "file 'text' is not what was built: its sha256 differs from the record",
            "file 'more' was added later",
        ],
        "data": ["input has changed since"],
    }
    shutil.rmtree(runs / "demo/words")
    assert trace_lineage(second.path).parents[0].problems == ["is gone"]


def test_a_rebuilt_ancestor_is_reported(runs: Path) -> None:
    plan, second = demo(runs)
    execute(plan)
    other = Plan("demo", runs)
    other.step(write, name="words/first", data=other.input(runs / "data.txt", name="data"), word="b")
    execute(other)
    assert "was built from another 'words/first'" in trace_lineage(second.path).problems[0]


@pytest.mark.parametrize(("make", "message"), [(False, "no such artifact"), (True, "holds no artifact.json")])
def test_folders_without_a_lineage_are_refused(runs: Path, make: bool, message: str) -> None:
    if make:
        (runs / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        trace_lineage(runs / "folder")


def test_an_adopted_folder_stands_in_for_the_step_and_what_led_to_it(runs: Path) -> None:
    mine = runs / "mine"
    mine.mkdir()
    (mine / "text").write_text("my own")
    adopt_folder(mine, name="second", run="demo", runs=runs)
    plan, second = demo(runs)
    assert states(plan) == {"words/first": "not needed", "second": "adopted"}
    execute(plan)
    assert not (runs / "demo/words").exists()
    assert (second.path / "text").read_text() == "my own"
    assert trace_lineage(second.path, verify=True).problems == []


def test_steps_after_an_adopted_artifact_are_built_from_it_and_again_when_it_changes(runs: Path) -> None:
    plan, second = demo(runs)
    execute(plan)
    mine = runs / "mine"
    mine.mkdir()
    (mine / "text").write_text("my own")
    shutil.rmtree(runs / "demo/words/first")
    adopt_folder(mine, name="words/first", run="demo", runs=runs)
    plan, second = demo(runs)
    assert states(plan) == {"words/first": "adopted", "second": "build"}
    execute(plan)
    assert (second.path / "text").read_text() == "my own"
    assert states(demo(runs)[0]) == {"words/first": "adopted", "second": "reused"}
    shutil.rmtree(runs / "demo/words/first")
    assert states(demo(runs)[0]) == {"words/first": "build", "second": "build"}


def test_an_adopted_artifact_keeps_its_own_record(runs: Path) -> None:
    plan, second = demo(runs)
    execute(plan)
    place = adopt_folder(second.path, name="copy", run="other", runs=runs)
    record = json.loads((place / "artifact.json").read_text())
    assert record["origin"]["step"] == "tests.plan.store.test_lineage:copy"
    assert list(record["files"]) == ["text"]


def test_folders_that_cannot_be_adopted_are_refused(runs: Path) -> None:
    plan, second = demo(runs)
    execute(plan)
    (runs / "empty").mkdir()
    for source, name, message in [
        (runs / "missing", "x", "no such folder"),
        (runs / "data.txt", "x", "is a file"),
        (runs / "empty", "x", "holds no files"),
        (runs, "x", "holds the run itself"),
        (second.path, "words/first", "exists already"),
        (second.path, "words/first/in", "lies inside artifact 'words/first'"),
        (second.path, "../x", "cannot name an artifact"),
        (second.path, "logs", "cannot name an artifact"),
    ]:
        with pytest.raises(UserError, match=message):
            adopt_folder(source, name=name, run="demo", runs=runs)
    with pytest.raises(UserError, match="cannot name a run"):
        adopt_folder(second.path, name="x", run="../demo", runs=runs)
