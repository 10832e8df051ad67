"""A rename to another file system becomes a copy."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from koine.files import (
    publish_directory,
)
from tests.files.trees import names, tree


def test_a_rename_to_another_file_system_becomes_a_copy(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"koine-test-{os.getpid()}"
    if not other.parent.is_dir() or other.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    try:
        tree(other, "old/x")
        tree(tmp_path, "work/new", "work2/newer")
        (tmp_path / "link").symlink_to(other / "old")
        publish_directory(tmp_path / "work", tmp_path / "link")
        assert names(other) == ["old", "old/new"]
        (tmp_path / "missing").symlink_to(other / "fresh")
        publish_directory(tmp_path / "work2", tmp_path / "missing")
        assert names(other) == ["fresh", "fresh/newer", "old", "old/new"]
        assert names(tmp_path) == ["link", "missing"]
    finally:
        shutil.rmtree(other)


def test_a_rename_that_the_system_calls_cross_device_becomes_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, "work/new", "there/old/x")
    real = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    publish_directory(tmp_path / "work", tmp_path / "there/old")
    assert names(tmp_path) == ["there", "there/old", "there/old/new"]
