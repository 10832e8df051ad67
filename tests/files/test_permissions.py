"""Outputs have the permissions that the umask and their folder give, as the shell's `>` and `mkdir` do."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from koine.files import (
    apply_umask,
    atomic_directory,
    atomic_file,
    copy_tree,
    exclusive,
    write_atomically,
)


@contextmanager
def umask(value: int) -> Iterator[None]:
    old = os.umask(value)
    try:
        yield
    finally:
        os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o027, 0o077])
def test_new_files_and_folders_have_the_modes_of_the_umask(mask: int, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/private").write_text("x")
    (tmp_path / "source/private").chmod(0o400)
    with umask(mask):
        write_atomically(tmp_path / "a", "x")
        with atomic_file(tmp_path / "b") as file:
            file.write_text("x")
        with atomic_directory(tmp_path / "above/out") as folder:
            (folder / "c").write_text("x")
        copy_tree(tmp_path / "source", tmp_path / "copy")
        with exclusive(tmp_path / "lock", doing="testing it"):
            assert mode(tmp_path / "lock") == 0o666 & ~mask
    files = ("a", "b", "above/out/c", "copy/private")
    assert {mode(tmp_path / name) for name in files} == {0o666 & ~mask}
    assert {mode(tmp_path / name) for name in ("above", "above/out", "copy")} == {0o777 & ~mask}


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o027, 0o077])
def test_a_private_file_of_a_library_gets_the_mode_of_the_umask(mask: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("x")
    path.chmod(0o600)
    with umask(mask):
        apply_umask(path)
    assert mode(path) == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("x")
    path.chmod(0o640)
    with umask(0o022), atomic_file(path, overwrite=True) as file:
        file.write_text("y")
    assert (path.read_text(), mode(path)) == ("y", 0o640)


def test_a_setgid_folder_gives_its_group(tmp_path: Path) -> None:
    groups = [group for group in (*os.getgroups(), 12345) if group != os.getegid()]
    shared = tmp_path / "shared"
    shared.mkdir()
    for group in groups:
        try:
            os.chown(shared, -1, group)
        except PermissionError:
            continue
        break
    else:
        pytest.skip("this user has one group only")
    shared.chmod(0o2775)
    with umask(0o002):
        write_atomically(shared / "a", "x")
        with atomic_file(shared / "b") as file:
            file.write_text("x")
        with atomic_directory(shared / "out") as folder:
            (folder / "c").write_text("x")
            (folder / "inside").mkdir()
        apply_umask(shared / "a")
    names = ("a", "b", "out", "out/c", "out/inside")
    assert {(shared / name).stat().st_gid for name in names} == {group}
    assert mode(shared / "out") == mode(shared / "out/inside") == 0o2775
    assert mode(shared / "a") == mode(shared / "b") == 0o664
