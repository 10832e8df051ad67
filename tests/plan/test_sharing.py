"""Two runs at once, failures side by side, and a run with nothing to do."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from koine.plan import Plan, step
from koine.plan.run import progress
from koine.plan.store.fingerprints import SETTLED_SECONDS
from tests.plan.running import koine, start, until

PLAN = """\
import os, time
from pathlib import Path
from koine.errors import UserError
from koine.plan import Plan, step
from koine.plan.run.progress import report

@step()
def slow(*, n: int, out: Path) -> None:
    with open(out.parents[3] / "times-built", "a") as file:
        file.write("x")
    for i in range(n):
        report(i / n, f"item {i}")
        time.sleep(0.1)
    (out / "text").write_text(str(n))

@step()
def follow(source: Path, *, out: Path) -> None:
    time.sleep(0.5)
    (out / "text").write_text((source / "text").read_text())

@step()
def mistaken(*, out: Path) -> None:
    raise UserError("not like this", where="here", hint="do that")

@step()
def crash(*, out: Path) -> None:
    raise ValueError("broken on purpose")

@step()
def read(data: Path, *, out: Path) -> None:
    (out / "text").write_text(data.read_text())

def demo(plan: Plan, *, n: int = 2) -> None:
    last = plan.step(follow, name="last", source=plan.step(slow, name="slow", n=n))
    plan.export(last / "text", "answer.txt")
    plan.export(last, "folder")
    plan.closing("that was it")

def two_mistakes(plan: Plan) -> None:
    plan.step(mistaken, name="one")
    plan.step(mistaken, name="two")

def both(plan: Plan) -> None:
    plan.step(mistaken, name="one")
    plan.step(crash, name="two")

def reading(plan: Plan, *, data: Path) -> None:
    plan.step(read, name="text", data=plan.input(data, name="data"))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "plans.py").write_text(PLAN)
    return tmp_path


def test_a_second_run_waits_says_so_and_reuses(place: Path) -> None:
    first = start(place, "run", "plans.py:demo", "--set", "n=20")
    until((place / "times-built").exists)
    second = start(place, "run", "plans.py:demo", "--set", "n=20")
    message, _ = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "waiting: another run is building it" in message
    assert "step 1 of 2: slow: reused (another run built it) after" in message
    assert (place / "times-built").read_text() == "x"
    log = (place / "runs/demo/logs/slow.log").read_text()
    assert log.count("attempt") == 1


def test_two_runs_with_different_settings_in_one_folder_never_mix(place: Path) -> None:
    first = start(place, "run", "plans.py:demo", "--set", "n=2")
    until((place / "runs/demo/.work/last").exists)
    second = start(place, "run", "plans.py:demo", "--set", "n=1")
    _, message = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert (place / "runs/demo/last/text").read_text() == "1"
    # The first either was done before the second replaced its input, or was refused.
    assert first.returncode == 0 or "was changed by another run" in message


def test_every_failed_step_is_named_with_its_log(place: Path) -> None:
    code, _, err = koine(place, "run", "plans.py:two_mistakes")
    assert code == 2
    assert sorted(err.splitlines()) == [
        f"koine: step '{name}' failed (log: runs/two_mistakes/logs/{name}.log): here: not like this; do that"
        for name in ("one", "two")
    ]
    code, _, err = koine(place, "run", "plans.py:both")
    assert code == 1
    assert "step 'one' failed" in err
    assert "step 'two' failed (log: runs/both/logs/two.log): ValueError: broken on purpose" in err
    assert "  | Traceback (most recent call last):" in err


def test_exports_the_record_and_the_closing_lines(place: Path) -> None:
    code, out, _ = koine(place, "run", "plans.py:demo", "--set", "n=1")
    assert code == 0
    assert out.splitlines()[-1] == "that was it"
    run = place / "runs/demo"
    assert (run / "answer.txt").read_text() == (run / "folder/text").read_text() == "1"
    assert koine(place, "run", "plans.py:demo", "--set", "n=2")[0] == 0
    assert (run / "answer.txt").read_text() == (run / "folder/text").read_text() == "2"
    record = json.loads((run / "plan.json").read_text())
    assert record["status"] == "succeeded"
    assert {node["name"]: (node["status"], node["parents"]) for node in record["nodes"]} == {
        "slow": ("built", []),
        "last": ("built", ["slow"]),
    }
    assert not list((run / ".progress").iterdir())


def test_a_run_with_nothing_to_do_loads_no_torch_and_reads_no_input(place: Path) -> None:
    (place / "data.txt").write_text("data")
    old = time.time() - 10 * SETTLED_SECONDS
    os.utime(place / "data.txt", (old, old))
    command = ["run", "plans.py:reading", "--set", "data=data.txt"]
    assert koine(place, *command)[0] == 0
    program = (
        "import sys\n"
        "import koine.plan.store.fingerprints as content\n"
        "def read(path): raise AssertionError(f'{path} was read again')\n"
        "content.sha256_file = read\n"
        "from koine.cli.main import cli\n"
        f"cli.main({command!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'ray', 'pyarrow', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "reused" in process.stdout
    # Content of the same size at another time is read, and found to be different.
    (place / "data.txt").write_text("DATA")
    assert "inputs.data.fingerprint" in koine(place, *command, "--dry-run")[1]


def test_a_recipe_is_planned_without_torch() -> None:
    program = (
        "import sys\n"
        "from koine.plan import Plan\n"
        "from koine.plan.store.status import statuses\n"
        "from koine.recipes.quickstart import quickstart\n"
        "plan = Plan('quickstart')\n"
        "quickstart(plan)\n"
        "assert statuses(plan)\n"
        "assert 'torch' not in sys.modules\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_live_bars_on_a_terminal(place: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "koine", "run", "plans.py:demo", "--set", "n=15"],
        cwd=place,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(slave)
    message = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        message += part
    os.close(master)
    assert process.wait() == 0
    text = message.decode()
    assert re.search(r"item \d+", text)
    assert "━" in text
    assert re.search(r"step 1 of 2 .*\d+%.*left", text)
    assert "that was it" in text


def test_progress_goes_to_the_file_of_the_run_and_nowhere_outside_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    progress.report(0.5, "x")
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "told"))
    progress.report(1.0, "all")
    assert progress.read_progress(tmp_path / "told") == {"fraction": 1.0, "text": "all"}
    with pytest.raises(ValueError, match="between 0 and 1"):
        progress.report(1.5)


@step()
def plain(data: Path, *, n: int = 1, out: Path) -> None: ...


def test_wrong_names_and_inputs_of_a_plan_are_refused(tmp_path: Path) -> None:
    from koine.errors import UserError
    from koine.plan import Artifact

    (tmp_path / "data").write_text("x")
    plan = Plan("demo", tmp_path)
    data = plan.input(tmp_path / "data", name="data")
    first = plan.step(plain, name="a/b", data=data)
    for given, message in [
        ({"function": len, "name": "x"}, "is not a step"),
        ({"function": plain, "name": "../x", "data": data}, "cannot name an artifact"),
        ({"function": plain, "name": "logs", "data": data}, "cannot name an artifact"),
        ({"function": plain, "name": "a", "data": data}, "collides with 'a/b'"),
        ({"function": plain, "name": "data", "data": data}, "collides with 'data'"),
        ({"function": plain, "name": "x", "data": tmp_path}, "must be an artifact"),
        ({"function": plain, "name": "x", "data": None}, "must be an artifact, got None"),
        (
            {"function": plain, "name": "x", "data": Artifact("z", tmp_path, "0")},
            "not an artifact of this plan",
        ),
        ({"function": plain, "name": "x", "data": data, "n": 1.5}, "must be <class 'int'>"),
        ({"function": plain, "name": "x", "data": data, "m": 1}, "no parameter 'm'"),
        ({"function": plain, "name": "x"}, "'data' is missing"),
    ]:
        with pytest.raises(UserError, match=message):
            plan.step(**given)  # type: ignore[arg-type]
    for to, message in [
        ("../x", "inside the run"),
        ("plan.json", "taken"),
        ("a", "collides"),
        ("/x", "inside"),
    ]:
        with pytest.raises(UserError, match=message):
            plan.export(first, to)
    with pytest.raises(UserError, match="leads out"):
        first / ".." / "x"
    with pytest.raises(UserError, match="cannot name a run"):
        Plan("a/b", tmp_path)
    with pytest.raises(UserError, match="holds the run's own folder"):
        plan.input(tmp_path, name="all")
    with pytest.raises(UserError, match="no such file"):
        plan.input(tmp_path / "none", name="none")


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("{}", "has no 'artifact'")])
def test_a_damaged_record_is_named_with_a_hint(place: Path, content: str, message: str) -> None:
    assert koine(place, "run", "plans.py:demo", "--set", "n=0")[0] == 0
    (place / "runs/demo/slow/artifact.json").write_text(content)
    for command in (["run", "plans.py:demo"], ["lineage", "runs/demo/last"]):
        code, _, err = koine(place, *command)
        assert code == 2
        assert message in err
        assert "remove the artifact's folder" in err
