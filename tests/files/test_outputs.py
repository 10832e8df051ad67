"""Outputs are complete or absent, one writer at a time; nothing new is replaced."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.files import (
    atomic_directory,
    atomic_file,
    claim,
    make_folder,
    read_json,
    write_atomically,
    write_json,
)
from tests.files.trees import names, tree


def test_a_folder_is_published_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a/b/out") as folder:
        write_json(folder / "x.json", {})
        assert not (tmp_path / "a/b/out").exists()
    assert names(tmp_path) == ["a", "a/b", "a/b/out", "a/b/out/x.json"]


def test_a_failure_leaves_nothing_not_even_the_parents(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong"), atomic_directory(tmp_path / "a/b/out") as folder:  # noqa: PT012
        (folder / "half").write_text("half")
        raise UserError("wrong")
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", ["theirs", None])
def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path: Path, content: str | None) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="appeared"), atomic_directory(out) as folder:  # noqa: PT012
        (folder / "ours").write_text("ours")
        out.mkdir()
        if content:
            (out / "x").write_text(content)
    assert names(tmp_path) == (["out", "out/x"] if content else ["out"])


def test_a_file_that_appears_where_the_folder_goes_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="appeared"), atomic_directory(tmp_path / "out"):
        (tmp_path / "out").write_text("theirs")
    assert (tmp_path / "out").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path) == ["out", "out/x"]


def test_only_what_was_there_at_the_start_is_overwritten(tmp_path: Path) -> None:
    tree(tmp_path, "out/old")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    with atomic_directory(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out", "out/new"]
    with (  # noqa: PT012
        pytest.raises(UserError, match="changed while"),
        atomic_directory(tmp_path / "out", overwrite=True) as folder,
    ):
        (folder / "newer").write_text("newer")
        (tmp_path / "out/notes").write_text("added meanwhile")
    assert names(tmp_path) == ["out", "out/new", "out/notes"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with (
        atomic_directory(tmp_path / "out") as folder,
        pytest.raises(UserError, match="another process is writing it"),
        atomic_directory(tmp_path / "out"),
    ):
        pass
    assert not folder.exists()
    assert names(tmp_path) == ["out"]


def test_two_names_of_one_folder_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        claim(tmp_path / "real/out"),
        pytest.raises(UserError, match="another process"),
        claim(tmp_path / "link/out"),
    ):
        pass


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import os, sys, signal; from pathlib import Path; from koine.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'big').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert len(names(tmp_path)) == 3  # the folder, the file in it, the lock
    tree(tmp_path, ".out.notes.partial/mine", ".other.12.partial/theirs")
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path) == [
        ".other.12.partial",
        ".other.12.partial/theirs",
        ".out.notes.partial",
        ".out.notes.partial/mine",
        "out",
        "out/x",
    ]


def test_a_folder_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    tree(tmp_path, ".out.12.old/x")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out", "out/x"]


def test_a_link_is_written_where_it_leads(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    tree(disk, "full/old")
    (disk / "empty").mkdir()
    for name, overwrite in (("empty", False), ("full", True), ("missing", False)):
        (tmp_path / name).symlink_to(disk / name)
        with atomic_directory(tmp_path / name, overwrite=overwrite) as folder:
            (folder / "new").write_text("new")
        assert (tmp_path / name).is_symlink()
        assert names(disk / name) == ["new"]
    assert names(disk) == [
        "empty",
        "empty/new",
        "full",
        "full/new",
        "missing",
        "missing/new",
    ]


def test_a_folder_to_write_in_is_made_where_its_link_leads(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("there")
    for _ in range(2):
        make_folder(tmp_path / "out")
        assert (tmp_path / "there").is_dir()
    (tmp_path / "away").symlink_to("mount/there")
    with pytest.raises(UserError, match="is its disk mounted"):
        make_folder(tmp_path / "away")


def test_a_link_to_a_disk_that_is_away_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "mount/run/out")
    with pytest.raises(UserError, match="is its disk mounted"), atomic_directory(tmp_path / "out"):
        pass
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match="back to itself"), atomic_directory(tmp_path / "round"):
        pass


@pytest.mark.parametrize("out", [".", "..", "/", "a/..", "../.."])
def test_the_current_folder_is_never_replaced(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UserError, match="current folder"), atomic_directory(Path(out), overwrite=True):
        pass


def test_names_up_to_what_the_file_system_allows(tmp_path: Path) -> None:
    for count in (230, 255):
        with atomic_directory(tmp_path / ("x" * count)) as folder:
            (folder / "a").write_text("a")
        write_json(tmp_path / ("y" * count), {})
        with atomic_file(tmp_path / ("z" * count)) as file:
            file.write_text("z")
    assert len(names(tmp_path)) == 8
    for write in (atomic_directory, atomic_file):
        with (
            pytest.raises(UserError, match="longer than the file system allows"),
            write(tmp_path / ("x" * 256)),
        ):
            pass


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    with atomic_directory(tmp_path / name) as folder:
        write_json(folder / "x.json", {"path": name})
    assert read_json(tmp_path / name / "x.json") == {"path": name}


def test_an_existing_file_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("old")
    with pytest.raises(UserError, match="add --overwrite"), atomic_file(tmp_path / "out.json"):
        pass
    with atomic_file(tmp_path / "out.json", overwrite=True) as file:
        file.write_text("new")
    assert (tmp_path / "out.json").read_text() == "new"
    assert names(tmp_path) == ["out.json"]


def test_a_file_that_appears_or_changes_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for overwrite in (False, True):
        with (  # noqa: PT012
            pytest.raises(UserError, match="appeared or changed"),
            atomic_file(out, overwrite=overwrite) as file,
        ):
            file.write_text("ours")
            out.write_text("theirs" if not overwrite else "theirs, later")
    assert out.read_text() == "theirs, later"
    assert names(tmp_path) == ["out.json"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out.json") as file:
        with (
            pytest.raises(UserError, match="another process is writing it"),
            atomic_file(tmp_path / "out.json"),
        ):
            pass
        file.write_text("ours")
    with pytest.raises(UserError, match="exists already"), atomic_file(tmp_path / "out.json"):
        pass


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this user may make no device")


def make_socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def make_disk(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(7, 250))
    except PermissionError:
        pytest.skip("this user may make no device")


@pytest.mark.parametrize("make", [make_fifo, make_device, make_socket, make_disk])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_never_replaces_a_pipe_a_device_or_a_socket(
    make: Callable[[Path], None], overwrite: bool, tmp_path: Path
) -> None:
    place = tmp_path / "s"
    make(place)
    kind = place.lstat().st_mode
    (tmp_path / "link").symlink_to(place)
    for out in (place, tmp_path / "link"):
        with (
            pytest.raises(UserError, match="and a folder is written|and not replaced"),
            atomic_directory(out, overwrite=overwrite),
        ):
            pass
    assert place.lstat().st_mode == kind
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("make", [make_socket, make_disk])
def test_a_file_never_replaces_a_socket_or_a_disk(make: Callable[[Path], None], tmp_path: Path) -> None:
    place = tmp_path / "s"
    make(place)
    kind = place.lstat().st_mode
    (tmp_path / "link").symlink_to(place)
    for out in (place, tmp_path / "link"):
        with pytest.raises(UserError, match="which is not replaced"), atomic_file(out, overwrite=True):
            pass
        with pytest.raises(UserError, match="which is not replaced"):
            write_atomically(out, "text")
    assert place.lstat().st_mode == kind
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    (tmp_path / "new.json").symlink_to("fresh.json")
    with pytest.raises(UserError, match="exists already"), atomic_file(tmp_path / "link.json"):
        pass
    with atomic_file(tmp_path / "link.json", overwrite=True) as file:
        file.write_text("new")
    with atomic_file(tmp_path / "new.json") as file:
        file.write_text("new")
    write_atomically(tmp_path / "link.json", "newer")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "newer"
    assert (tmp_path / "fresh.json").read_text() == "new"
