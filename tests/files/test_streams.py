"""Pipes, devices and open descriptors are written through: complete, or nothing at all, and never replaced."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from koine.errors import KoineWarning, UserError
from koine.files import atomic_file, is_standard_output, write_atomically
from koine.files.streams import descriptor_of

# The reader of a pipe is a thread, which may open it late: that is noted.
pytestmark = pytest.mark.filterwarnings("ignore:.*waiting for a program that reads from it")

DATA = bytes(range(256)) * 2000  # no text, and more than a pipe holds


def write_file(out: Path) -> None:
    with atomic_file(out) as file:
        file.write_bytes(DATA)


def write_content(out: Path) -> None:
    write_atomically(out, DATA)


WRITERS = pytest.mark.parametrize("write", [write_file, write_content])


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], bytes]]]:
    """A named pipe that a thread reads, and a function that returns what came."""
    path, came = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: came.append(path.read_bytes()), daemon=True)
    reader.start()

    def read() -> bytes:
        reader.join(60)
        return came[0]

    yield path, read
    if reader.is_alive():
        path.write_bytes(b"")


@WRITERS
@pytest.mark.parametrize("linked", [False, True])
def test_a_named_pipe_gets_all_bytes_and_stays(
    write: Callable[[Path], None], linked: bool, pipe: tuple[Path, Callable[[], bytes]], temporary: Path
) -> None:
    path, read = pipe
    out = path
    if linked:
        out = path.with_name("link")
        out.symlink_to(path)
    write(out)
    assert read() == DATA
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert out.is_symlink() == linked
    assert list(temporary.iterdir()) == []


def test_after_an_error_a_pipe_gets_nothing(pipe: tuple[Path, Callable[[], bytes]], temporary: Path) -> None:
    path, read = pipe
    with pytest.raises(UserError, match="wrong"), atomic_file(path) as file:  # noqa: PT012
        file.write_bytes(b"half")
        raise UserError("wrong")
    assert read() == b""
    assert list(temporary.iterdir()) == []


def test_a_note_says_that_a_pipe_waits_for_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = subprocess.Popen(["sh", "-c", f"sleep 0.3; cat {path} > {tmp_path}/came"])
    with pytest.warns(KoineWarning, match="waiting for a program that reads from it"):
        write_content(path)
    assert reader.wait() == 0
    assert (tmp_path / "came").read_bytes() == DATA


def test_a_reader_that_leaves_is_a_broken_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BrokenPipeError), atomic_file(path) as file:  # noqa: PT012
        file.write_bytes(DATA)
        os.close(reader)


@WRITERS
def test_a_device_is_written_through_a_link_and_stays(
    write: Callable[[Path], None], tmp_path: Path, temporary: Path
) -> None:
    before = Path("/dev/null").stat()
    (tmp_path / "link").symlink_to("/dev/null")
    for out in (Path("/dev/null"), tmp_path / "link"):
        write(out)
    after = Path("/dev/null").lstat()
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_rdev, after.st_mode) == (before.st_ino, before.st_rdev, before.st_mode)
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in Path("/dev").iterdir() if path.name.startswith(".null")] == []
    with pytest.raises(UserError, match="/dev/full: the disk is full"):
        write(Path("/dev/full"))


@WRITERS
@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_a_descriptor_is_written_where_it_stands(
    write: Callable[[Path], None], name: str, tmp_path: Path, temporary: Path
) -> None:
    # A descriptor of a regular file: opened again it would be written from the beginning, or be replaced.
    with (tmp_path / "log").open("wb") as file:
        file.write(b"before ")
        file.flush()
        inode = os.fstat(file.fileno()).st_ino
        (tmp_path / "link").symlink_to(name.format(file.fileno()))
        write(tmp_path / "link")
        write(Path(name.format(file.fileno())))
        file.write(b" after")
    assert (tmp_path / "log").read_bytes() == b"before " + DATA * 2 + b" after"
    assert (tmp_path / "log").stat().st_ino == inode


def test_descriptors_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        number = file.fileno()
    with pytest.raises(UserError, match=f"/dev/fd/{number}: is not open; open it in the shell"):
        write_file(Path(f"/dev/fd/{number}"))
    with (tmp_path / "file").open("rb") as file, pytest.raises(UserError, match="open for reading only"):
        write_file(Path(f"/dev/fd/{file.fileno()}"))


def test_only_links_to_descriptors_are_descriptors(tmp_path: Path) -> None:
    (tmp_path / "7").write_text("a file")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("/dev/stdout")
    (tmp_path / "round").symlink_to("round")
    found = {name: descriptor_of(tmp_path / name) for name in ("7", "one", "round", "missing")}
    assert found == {"7": None, "one": 1, "round": None, "missing": None}
    assert descriptor_of(Path("/dev/stderr")) == 2


def test_standard_output_is_recognised_under_other_names(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from koine.files import is_standard_output\n"
        "print([is_standard_output(Path(name)) for name in sys.argv[1:]])"
    )
    names = ["/dev/stdout", "/dev/fd/1", "/dev/stderr", "/dev/null", str(tmp_path / "none")]
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert done.stdout == "[True, True, False, False, False]\n"
    with (tmp_path / "out").open("w") as file:
        subprocess.run([sys.executable, "-c", program, "/dev/stdout", str(tmp_path / "out")], stdout=file)
    # A file by its own name is an ordinary output, also where the shell writes there too.
    assert (tmp_path / "out").read_text() == "[True, False]\n"
    assert not is_standard_output(tmp_path / "none")


def test_a_full_disk_of_temporary_files_is_named(
    pipe: tuple[Path, Callable[[], bytes]], temporary: Path
) -> None:
    path, read = pipe
    expected = f"{temporary}: the disk is full, and {path} is collected here before it is written; set TMPDIR"
    with pytest.raises(UserError, match=expected), atomic_file(path) as file:  # noqa: PT012
        file.write_bytes(b"half")
        raise OSError(28, os.strerror(28))
    assert read() == b""


def test_a_descriptor_that_does_not_block_gets_all_bytes() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    came: list[bytes] = []

    def drain() -> None:
        with os.fdopen(read, "rb") as file:
            came.append(file.read())

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    write_content(Path(f"/dev/fd/{write}"))
    os.close(write)
    reader.join(60)
    assert came == [DATA]
