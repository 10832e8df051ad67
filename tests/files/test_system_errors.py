"""What the operating system refuses is one line and leaves nothing."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.files import (
    atomic_directory,
    atomic_file,
    disk_errors,
    explain,
    write_json,
)
from tests.files.trees import names

CODES = [
    errno.ESTALE,
    errno.EBUSY,
    errno.EXDEV,
    errno.EIO,
    errno.EFBIG,
    errno.EDQUOT,
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", ["os.rename", "os.replace", "os.fsync", "os.mkdir", "io.open"])
def test_an_error_of_the_system_is_one_line_and_leaves_nothing(
    code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = {"os": os, "io": io}[call.partition(".")[0]], call.partition(".")[2]
    real = getattr(module, name)

    def refuse(path: object, *arguments: object, **named: object) -> object:
        if isinstance(path, int) or "partial" in str(path):
            raise OSError(code, os.strerror(code), *([] if isinstance(path, int) else [str(path)]))
        return real(path, *arguments, **named)

    def write() -> None:
        with atomic_directory(tmp_path / "out") as folder:
            write_json(folder / "x.json", {})

    with monkeypatch.context() as patch, pytest.raises(UserError) as told:  # noqa: PT012
        patch.setattr(module, name, refuse)
        write()
    assert str(tmp_path / "out") in str(told.value)
    assert ".partial" not in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert names(tmp_path) == []


def test_errors_of_libraries_are_reported_as_errors_of_the_system(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    class CheckpointException(BaseException):
        def __init__(self) -> None:
            self.failures = {0: (OSError(errno.ENOSPC, "No space left on device"), None)}

    out = tmp_path / "out"
    for error, said in (
        (OSError("1000 requested and 0 written"), "the system refuses (1000 requested and 0 written)"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "disk is full",
        ),
        (SafetensorError("Error while serializing: I/O error: short write"), "short write"),
        (CheckpointException(), "the disk is full"),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"
            ),
            "the system refuses (PytorchStreamWriter failed writing file data/0)",
        ),
    ):
        with pytest.raises(UserError, match="out: ") as told, disk_errors(out):
            raise error
        assert said in str(told.value)
    for other in (
        RuntimeError("mat1 and mat2 shapes"),
        SafetensorError("invalid header"),
        BrokenPipeError(32, "x"),
    ):
        with pytest.raises(type(other)), disk_errors(out):
            raise other


def test_an_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    told = explain(PermissionError(errno.EACCES, "Permission denied", "/data/text.jsonl"), tmp_path / "out")
    assert str(told) == "/data/text.jsonl: access is refused (Permission denied); check its permissions"
    told = explain(OSError(errno.EIO, "Input/output error", "/data/text.jsonl"), tmp_path / "out")
    assert str(told).startswith("/data/text.jsonl: the disk reports an error")


def test_leftovers_that_cannot_be_removed_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="could not be removed: .*partial"):  # noqa: PT012
        patch.setattr(shutil, "rmtree", lambda path, **named: None)
        write()


def test_what_a_kill_after_the_last_rename_left_goes_with_the_next_refusal(tmp_path: Path) -> None:
    """The next command refuses to replace the result, and removes lock and leftovers of the killed one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").write_text("whole")
    (tmp_path / "out.json").write_text("{}")
    for name in (
        ".out.lock",
        ".out.77.partial",
        ".out.json.lock",
        ".out.json.77.partial",
        "..out.json.77.partial.77.partial",
    ):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match="exists already"), atomic_file(tmp_path / "out.json"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.json"]
