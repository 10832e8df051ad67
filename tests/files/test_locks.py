"""One process at a time writes; a lock leaves no file."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.files import (
    atomic_directory,
    exclusive,
)
from tests.files.trees import names, tree


def test_a_lock_leaves_no_file_and_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with exclusive(path, doing="working"):
        with pytest.raises(UserError, match="another process is working"), exclusive(path, doing="working"):
            pass
        with (
            pytest.raises(UserError, match="another process"),
            exclusive(path, doing="working", wait=0.1),
        ):
            pass
    assert names(tmp_path) == []


def test_a_lock_file_with_content_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    with exclusive(tmp_path / ".lock", doing="working"):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Each adds one to a number; the lock's file is removed and made again between them."""
    program = (
        "import sys; from pathlib import Path; from koine.files import exclusive\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with exclusive(folder / '.lock', doing='counting', wait=-1):\n"
        "        number = int((folder / 'n').read_text())\n"
        "        (folder / 'n').write_text(str(number + 1))\n"
    )
    (tmp_path / "n").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "n").read_text() == "60"
    assert names(tmp_path) == ["n"]


def test_a_file_system_without_locks_brings_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    tree(tmp_path, ".out.12.partial/of-whom")
    with pytest.warns(UserWarning, match="no locks"), atomic_directory(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    # Whose it is cannot be known there.
    assert names(tmp_path) == [".out.12.partial", ".out.12.partial/of-whom", "out", "out/x"]
