"""Walks over folders of the user: links are followed, loops end, pipes are left out."""

from __future__ import annotations

import os
from pathlib import Path

from koine.files import (
    copy_tree,
    walk,
)
from tests.files.trees import names, tree


def walked(folder: Path, **options: bool) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in walk(folder, **options)]


def test_a_walk_follows_links_and_keeps_the_order_of_names(tmp_path: Path) -> None:
    tree(tmp_path / "data", "b/2.txt", "a.txt", "c.txt")
    tree(tmp_path / "elsewhere", "x/1.txt")
    (tmp_path / "data/ab").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/d.txt").symlink_to(tmp_path / "elsewhere/x/1.txt")
    assert walked(tmp_path / "data") == ["a.txt", "ab/x/1.txt", "b/2.txt", "c.txt", "d.txt"]


def test_loops_end_and_each_real_folder_is_entered_once_by_its_own_name(tmp_path: Path) -> None:
    tree(tmp_path, "data/real/1.txt", "data/2.txt", "other/3.txt")
    (tmp_path / "data/loop").symlink_to(".")
    (tmp_path / "data/above").symlink_to("..")
    (tmp_path / "data/a").symlink_to("real")
    (tmp_path / "other/back").symlink_to(tmp_path / "data")
    (tmp_path / "data/round").symlink_to("round")
    found = walked(tmp_path / "data")
    # A link to nothing is listed, so that whoever reads it says so; `above` is another folder, entered once.
    assert found == ["2.txt", "above/other/3.txt", "real/1.txt", "round"]


def test_hidden_files_pipes_and_devices_are_no_data(tmp_path: Path) -> None:
    tree(tmp_path, "a.txt", ".hidden/b.txt", ".c.json.12.partial")
    os.mkfifo(tmp_path / "pipe.txt")
    assert walked(tmp_path) == ["a.txt"]
    assert walked(tmp_path, hidden=True) == [".c.json.12.partial", ".hidden/b.txt", "a.txt"]


def test_a_copy_of_a_loop_ends(tmp_path: Path) -> None:
    tree(tmp_path, "data/1.txt")
    (tmp_path / "data/loop").symlink_to(".")
    copy_tree(tmp_path / "data", tmp_path / "copy")
    assert names(tmp_path / "copy") == ["1.txt"]
