"""Plans: steps under former names, and the cores of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from koine.errors import UserError
from koine.files import read_json, write_json
from koine.plan import Artifact, FinishedRun, Plan, step
from koine.plan.run.scheduler import execute
from koine.plan.store.status import statuses

OLD, NEW = "koine.recipes.words:write", "tests.plan.test_plan:write_words"


@step(formerly=(OLD,))
def write_words(*, words: int, out: Path) -> None:
    (out / "text").write_text("word " * words)


@step()
def copy(data: Path, *, out: Path) -> None:
    (out / "text").write_bytes((data / "text").read_bytes())


@step()
def documented(*, out: Path) -> None:
    """Write `out` nothing.

    More about it.
    """


@step(threads=0)
def train(*, out: Path) -> None: ...


@step(threads=3)
def fixed(*, out: Path) -> None: ...


@step(threads=3)
def own(*, threads: int, out: Path) -> None: ...


def make(folder: Path, function: Any = write_words, words: int = 2) -> Plan:
    plan = Plan("run", folder)
    plan.step(copy, name="copy", data=plan.step(function, name="words", words=words))
    return plan


def test_artifacts_of_a_former_name_are_reused(tmp_path: Path) -> None:
    """The record gets the name that the step had before it moved, with the fingerprints of that time."""
    from koine.plan.store.fingerprints import digest

    execute(make(tmp_path))
    path = tmp_path / "run" / "words" / "artifact.json"
    record = read_json(path)
    keys = ("step", "version", "parameters", "inputs")
    record["step"] = OLD
    record["fingerprint"] = digest({key: record[key] for key in keys})
    write_json(path, record)
    plan = make(tmp_path)
    assert plan.nodes["words"].artifact.fingerprint == record["fingerprint"]
    assert statuses(plan)["words"].state == "reused"
    changed = statuses(make(tmp_path, words=3))["words"]
    assert changed.reasons == ("parameters.words: 2 → 3",)
    # Of another step the parameters are not compared.
    record["step"] = "other:step"
    write_json(path, record)
    assert statuses(make(tmp_path))["words"].reasons == (f"was built by another step: other:step, now {NEW}",)


@pytest.mark.parametrize(("threads", "cores"), [(None, (1, 3, 2)), (4, (4, 3, 2))])
def test_the_cores_of_a_step(tmp_path: Path, threads: int | None, cores: tuple[int, ...]) -> None:
    plan = Plan("run", tmp_path, threads)
    plan.step(train, name="train")
    plan.step(fixed, name="fixed")
    plan.step(own, name="own", threads=2)
    assert tuple(plan.threads_of(name) for name in plan.nodes) == cores
    with pytest.raises(UserError, match="threads is 0; it must be at least 1"):
        Plan("run", tmp_path, 0)


def read_copy(run: FinishedRun, copied: Path, *, more: dict[str, Path] | None = None) -> str:
    extra = " ".join(more or {})
    return f"{(copied / 'text').read_text()}in {run.folder.name} {extra}".strip()


def test_a_closing_reads_artifacts_when_the_run_is_over(tmp_path: Path) -> None:
    plan = make(tmp_path)
    copied = Artifact("copy", plan.nodes["copy"].artifact.path, plan.nodes["copy"].artifact.fingerprint)
    plan.closing("plain text")
    plan.closing(read_copy, copied=copied, more={"a": copied})
    nodes = execute(plan)
    run = FinishedRun(plan.folder, 1.0, tuple(nodes.values()))
    assert plan.closing_texts(run) == ["plain text", "word word in run a"]
    plan.closing(lambda run: [run.folder])  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="returned list, not text"):
        plan.closing_texts(run)


def test_closings_that_cannot_work_are_refused_before_the_run(tmp_path: Path) -> None:
    plan = make(tmp_path)
    with pytest.raises(UserError, match="is not an artifact of this plan"):
        plan.closing(read_copy, copied=Artifact("z", tmp_path, "0"))
    with pytest.raises(UserError, match="read_copy: missing a required argument: 'copied'"):
        plan.closing(read_copy)
    with pytest.raises(UserError, match="only a function takes inputs"):
        plan.closing("text", copied=plan.nodes["copy"].artifact)


def test_the_purpose_of_a_step_is_its_docstring_and_in_no_fingerprint(tmp_path: Path) -> None:
    plan = Plan("run", tmp_path)
    one = plan.step(documented, name="one")
    two = plan.step(documented, name="two", purpose="Say it otherwise.")
    assert one.fingerprint == two.fingerprint
    plan.step(fixed, name="three")
    assert [node.purpose for node in plan.nodes.values()] == ["Write out nothing.", "Say it otherwise.", ""]
    execute(plan)
    recorded = read_json(plan.folder / "plan.json")["nodes"]
    assert [node["purpose"] for node in recorded] == ["Write out nothing.", "Say it otherwise.", ""]


def test_a_steps_parameter_cannot_have_a_name_of_plan_step() -> None:
    with pytest.raises(UserError, match="cannot be called 'purpose'"):

        @step()
        def wrong(*, purpose: str, out: Path) -> None: ...
