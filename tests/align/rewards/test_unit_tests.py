"""The reward of unit tests: code blocks, counts of tests, shares, and a machine without bubblewrap."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.align.rewards import Answered, score
from koine.align.rewards.unit_tests import UnitTests, last_code_block, read_tests
from koine.align.sandbox import Sandbox, bubblewrap
from koine.align.sandbox import sandbox as sandbox_module
from koine.errors import UserError

from ..sandbox.machine import needs_sandbox

TESTS = [f"assert f({x}) == {x * x}" for x in range(4)]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("First\n```\nx = 1\n```\nthen\n``` Python\nx = 2\n```\nend", "x = 2\n"),
        ("```bash\nls\n```\n", None),
        ("```python\nx = 1\n```\n```bash\nls\n```", "x = 1\n"),
        ("```python\nx = 1", None),
        ("x = 1", None),
        ("```py\n```", ""),
        ("text ```python\nx\n```", None),
    ],
)
def test_code_blocks(text: str, code: str | None) -> None:
    assert last_code_block(text) == code


def test_at_least_four_tests() -> None:
    assert len(read_tests({"tests": TESTS})) == 4
    for tests, message in (
        (TESTS[:3], "has 3 tests"),
        ([], "has 0 tests"),
        (None, "tests are None"),
        ([*TESTS, "x"], "test 5"),
    ):
        with pytest.raises(UserError, match=message):
            read_tests({"tests": tests})


def test_without_code_block_is_minus_one_and_needs_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert UnitTests()([], "I cannot program.", {"tests": TESTS}) == -1.0


@needs_sandbox
def test_shares() -> None:
    programs = ("return x * x", "return 0", "return x * x if x < 2 else 0", "return x +")
    completions = [f"Here:\n```python\ndef f(x):\n    {body}\n```\n" for body in programs]
    outcomes = score(
        UnitTests(workers=2, seconds=20),
        [Answered([], text, {"tests": TESTS}) for text in (*completions, "none")],
    )
    assert [outcome.value for outcome in outcomes] == [1.0, 0.25, 0.5, 0.0, -1.0]


@pytest.fixture
def _unprobed() -> None:
    sandbox_module._probe.cache_clear()


@pytest.mark.usefixtures("_unprobed")
def test_bubblewrap_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs 'bwrap'.*apt-get install bubblewrap"):
        UnitTests().check({"tests": TESTS})


@pytest.mark.usefixtures("_unprobed")
@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("bwrap: Creating new namespace failed: Operation not permitted", "unprivileged user namespaces"),
        ("bwrap: setting up uid map: Permission denied", "unprivileged user namespaces"),
        ("bwrap: Unknown option --disable-userns", "0.8 or later"),
        ("bwrap: Can't find source path", "bwrap --unshare-all"),
    ],
)
def test_bubblewrap_that_cannot_run(
    message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in its place that says what bubblewrap says on such machines."""
    fake = tmp_path / "bwrap"
    fake.write_text(f'#!/bin/sh\necho "{message}" >&2\nexit 1\n')
    fake.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o001 == 0:
            monkeypatch.setattr(bubblewrap.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: str(fake))
    with pytest.raises(UserError) as caught:
        Sandbox().check()
    assert message in str(caught.value)
    assert hint in str(caught.value)


def test_no_interpreter_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bubblewrap.find_interpreter.cache_clear()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python3").write_text("")
    monkeypatch.setattr(bubblewrap, "_interpreters", lambda: iter([closed / "python3"]))
    monkeypatch.setattr(bubblewrap.os, "geteuid", lambda: 0)
    with pytest.raises(UserError, match="nobody"):
        bubblewrap.find_interpreter()
    bubblewrap.find_interpreter.cache_clear()
