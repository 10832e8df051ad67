"""Folders made outside a run: their records, and the lineage through them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from koine.errors import KoineWarning, UserError
from koine.files import atomic_directory, sha256_file
from koine.plan import Plan, step
from koine.plan.run.scheduler import execute
from koine.plan.store.lineage import all_ancestors, trace_lineage, tree_lines
from koine.plan.store.recording import artifact_above, recorded
from koine.plan.store.status import statuses


@step()
def copy(source: Path, *, out: Path) -> None:
    (out / "text").write_text((source / "text").read_text())


def make(out: Path, text: str, **parents: Any) -> Path:
    with (
        recorded(out, step="make", parents=parents, parameters={"text": text}),
        atomic_directory(out, overwrite=True) as folder,
    ):
        (folder / "text").write_text(text)
        (folder / "metrics.json").write_text('{"loss": 1.5}')
    return out


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "artifact.json").read_text()))


def test_a_published_folder_has_its_record(tmp_path: Path) -> None:
    out = make(tmp_path / "a", "x")
    found = record(out)
    assert found["files"] == {name: sha256_file(out / name) for name in ("text", "metrics.json")}
    assert found["step"] == "make"
    assert found["parameters"] == {"text": "x"}
    assert found["metrics"] == {"loss": 1.5}
    assert found["outside_run"] is True
    assert {"code", "environment", "argv", "seconds", "peak_memory_bytes", "fingerprint"} <= found.keys()


def test_parents_with_and_without_a_record(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "weights").write_text("w")
    make(tmp_path / "a", "x")
    make(tmp_path / "b", "y", model=[tmp_path / "a", foreign], remote="hub:some/thing", none=None)
    tree = trace_lineage(tmp_path / "b", verify=True)
    assert [(one.name, bool(one.record), one.problems) for one in tree.parents] == [
        ("a", True, []),
        ("foreign", False, []),
        ("thing", False, []),
    ]
    assert tree.parents[2].path == Path("hub:some/thing")
    (foreign / "weights").write_text("other")
    make(tmp_path / "a", "another")
    problems = [
        problem
        for one in all_ancestors(trace_lineage(tmp_path / "b", verify=True))
        for problem in one.problems
    ]
    assert any("input has changed since" in one for one in problems)
    assert any("was built from another 'a'" in one for one in problems)


def test_a_part_of_an_artifact_is_its_child(tmp_path: Path) -> None:
    with recorded(tmp_path / "a", step="make", parents={}), atomic_directory(tmp_path / "a") as folder:
        (folder / "deep").mkdir()
        (folder / "deep/text").write_text("x")
    (tmp_path / "a/later").mkdir()
    assert artifact_above(tmp_path / "a/deep") == tmp_path / "a"
    assert artifact_above(tmp_path / "a/later") is None, "its record does not list it"
    make(tmp_path / "b", "y", data=tmp_path / "a/deep")
    [parent] = record(tmp_path / "b")["parents"]
    assert (parent["name"], parent["inside"]) == ("a", "deep")


def test_a_moved_tree_keeps_its_lineage(tmp_path: Path) -> None:
    make(tmp_path / "here/a", "x")
    make(tmp_path / "here/b", "y", model=tmp_path / "here/a")
    (tmp_path / "here").rename(tmp_path / "there")
    tree = trace_lineage(tmp_path / "there/b", verify=True)
    assert [one.problems for one in all_ancestors(tree)] == [[], []]
    assert tree.parents[0].path == tmp_path / "there/a"


def test_a_folder_filled_in_place_gets_its_record_at_the_end_and_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "a"

    def fill() -> None:
        with recorded(out, step="train", parents={}):
            out.mkdir(exist_ok=True)
            (out / "text").write_text("x")

    fill()
    first = (out / "artifact.json").read_bytes()
    fill()
    assert (out / "artifact.json").read_bytes() == first
    (out / "text").write_text("longer")
    (out / "artifact.json").unlink()
    fill()
    assert "text" in record(out)["files"]


def test_no_record_after_an_error_or_beside_other_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), recorded(tmp_path / "a", step="make", parents={}):
        raise ZeroDivisionError
    assert not (tmp_path / "a/artifact.json").exists()
    with recorded(tmp_path / "b", step="make", parents={}), atomic_directory(tmp_path / "c") as folder:
        (folder / "text").write_text("x")
    assert not (tmp_path / "c/artifact.json").exists()


def test_a_parent_that_changes_meanwhile_is_said(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")

    def work() -> None:
        with (
            recorded(tmp_path / "a", step="make", parents={"data": tmp_path / "data"}),
            atomic_directory(tmp_path / "a") as folder,
        ):
            (folder / "text").write_text("x")
            (tmp_path / "data").write_text("other")

    with pytest.warns(KoineWarning, match="changed while it was read"):
        work()
    assert record(tmp_path / "a")["parents"][0]["changed"] is True


def test_a_run_neither_replaces_nor_reuses_it(tmp_path: Path) -> None:
    make(tmp_path / "in", "x")
    make(tmp_path / "runs/demo/copy", "mine")
    plan = Plan("demo", tmp_path / "runs")
    plan.step(copy, name="copy", source=plan.input(tmp_path / "in", name="in"))
    with pytest.raises(UserError, match="is no artifact, and is not replaced"):
        statuses(plan)
    assert (tmp_path / "runs/demo/copy/text").read_text() == "mine"


def test_the_lineage_of_a_run_goes_on_through_its_inputs(tmp_path: Path) -> None:
    make(tmp_path / "a", "x")
    make(tmp_path / "b", "y", model=tmp_path / "a")
    plan = Plan("demo", tmp_path / "runs")
    made = plan.step(copy, name="copy", source=plan.input(tmp_path / "b", name="in"))
    execute(plan)
    lines = tree_lines(trace_lineage(made.path))
    assert [line.strip("└─ ").split("  ")[0] for line in lines] == ["copy", "in", "b", "a"]
    # And a folder that is made of a run's artifact names the run's own record.
    make(tmp_path / "c", "z", model=made.path)
    assert "copy" in tree_lines(trace_lineage(tmp_path / "c"))[1]


def test_a_file_of_that_name_that_is_not_ours_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "project/data").mkdir(parents=True)
    (tmp_path / "project/artifact.json").write_text('{"mine": 1}')
    (tmp_path / "project/data/text").write_text("x")
    make(tmp_path / "a", "y", data=tmp_path / "project/data")
    assert record(tmp_path / "a")["parents"][0]["input"] == os.fspath(tmp_path / "project/data")
