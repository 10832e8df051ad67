"""Outputs are complete or absent, one writer at a time; nothing new is replaced."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.files import (
    atomic_directory,
    atomic_file,
    claim,
    copy_tree,
    disk_errors,
    exclusive,
    explain,
    make_folder,
    publish_directory,
    read_json,
    walk,
    write_atomically,
    write_json,
)


def names(folder: Path) -> list[str]:
    """Everything below a folder, hidden too, links not followed."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# The walk


def tree(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


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


# Folders


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


def test_a_link_to_a_disk_that_is_away_is_said(tmp_path: Path) -> None:
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


# Files


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


@pytest.mark.parametrize("make", [make_fifo, make_device, make_socket])
def test_devices_pipes_and_sockets_are_never_replaced(make: object, tmp_path: Path) -> None:
    place = tmp_path / "s"
    make(place)  # type: ignore[operator]
    kind = place.lstat().st_mode
    (tmp_path / "link").symlink_to(place)
    for out in (place, tmp_path / "link"):
        with pytest.raises(UserError, match="which is not replaced"), atomic_file(out, overwrite=True):
            pass
        with pytest.raises(UserError, match="which is not replaced"):
            write_atomically(out, "text")
        with pytest.raises(UserError, match="not replaced"), atomic_directory(out, overwrite=True):
            pass
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


# Locks


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


def test_a_file_system_without_locks_is_said_and_used(
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


# What the system refuses

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
def test_what_the_system_refuses_is_one_line_and_leaves_nothing(
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


def test_errors_of_libraries_are_told_as_the_systems(tmp_path: Path) -> None:
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


def test_an_error_about_another_file_is_told_of_that_file(tmp_path: Path) -> None:
    told = explain(PermissionError(errno.EACCES, "Permission denied", "/data/text.jsonl"), tmp_path / "out")
    assert str(told) == "/data/text.jsonl: access is refused (Permission denied); check its permissions"
    told = explain(OSError(errno.EIO, "Input/output error", "/data/text.jsonl"), tmp_path / "out")
    assert str(told).startswith("/data/text.jsonl: the disk reports an error")


def test_what_could_not_be_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
