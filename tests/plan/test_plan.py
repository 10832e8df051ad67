"""Plans: steps under former names, and the cores of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from koine.errors import UserError
from koine.files import read_json, write_json
from koine.plan import Plan, step
from koine.plan.run.scheduler import execute
from koine.plan.store.status import statuses

OLD, NEW = "koine.recipes.words:write", "tests.plan.test_plan:write_words"


@step(formerly=(OLD,))
def write_words(*, words: int, out: Path) -> None:
    (out / "text").write_text("word " * words)


@step()
def copy(data: Path, *, out: Path) -> None:
    (out / "text").write_bytes((data / "text").read_bytes())


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
