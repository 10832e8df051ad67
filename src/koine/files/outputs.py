"""Outputs of commands: written by one process at a time, complete or absent.

Nothing is replaced that was not there at the start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from koine.errors import UserError
from koine.files.locks import exclusive
from koine.files.publishing import OTHER_OUT, State, changed_error, publish_directory, state_of
from koine.files.streams import check_stream, is_stream, spooled
from koine.files.system_errors import NOTHING_KEPT, disk_errors, explain
from koine.files.writing import beside, fsync_directory, fsync_file, fsync_tree, real_file, remove

EXAMPLE_FILES = {"--page": "long.html", "--report": "report.html"}
LEFTOVER = re.compile(r"\..+\.(\d+\.(?:partial|old))", re.DOTALL)
# Errors of file systems without hard links
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_FINISHING: ContextVar[tuple[tuple[str, Callable[[Path], None]], ...]] = ContextVar("_FINISHING", default=())


@dataclass(frozen=True)
class Claim:
    """The right to write an output: no other command writes it before this one has ended.

    Attributes:
        out: The path as the user gave it.
        place: The path with links followed.
        found: What stood there at the start.
    """

    out: Path
    place: Path
    found: State | None

    def beside(self, ending: str) -> Path:
        """Return a hidden name in the same folder: `.NAME.ENDING`."""
        return beside(self.place, ending)

    def publish(self, temporary: Path) -> None:
        """Sync a finished folder and rename it to the output; see `publish_directory`."""
        for place, finish in _FINISHING.get():
            if place == os.path.realpath(self.place):
                finish(temporary)
        fsync_tree(temporary)
        publish_directory(temporary, self.place, found=self.found, where=self.out)


@contextmanager
def before_publishing(out: Path, finish: Callable[[Path], None]) -> Iterator[None]:
    """Have `finish` called with the complete folder of the output `out`, before it gets its name.

    So a record of the folder is published with it, whichever function inside this context writes the folder.
    """
    earlier = _FINISHING.set((*_FINISHING.get(), (os.path.realpath(out), finish)))
    try:
        yield
    finally:
        _FINISHING.reset(earlier)


@contextmanager
def claim(
    out: Path, *, overwrite: bool = False, reads: Iterable[Path] = (), kept: str = NOTHING_KEPT
) -> Iterator[Claim]:
    """Claim a folder to write: check it, make its parents, lock it, and remove leftovers of killed commands.

    A link is followed. Errors of the system inside become one line, and parents that were made for nothing
    are removed.

    Args:
        out: The folder.
        overwrite: Allow one that holds something.
        reads: What the command reads.
        kept: What is left of the work, for the message of a full disk.

    Raises:
        UserError: `out` holds something (without `overwrite`), is or holds what is read, cannot be written,
            or is being written.
    """
    out = Path(out)
    with disk_errors(out, kept=kept):
        check_no_stream(out)
        place = real_folder(out)
        if overwrite:
            check_replacing(out, reads)
        try:
            _check_absent(out, place, overwrite=overwrite)
        except UserError:
            # A command that was killed after its last rename left its lock.
            clear_leftovers(out, place)
            raise
        with (
            _parents(out, place),
            _locked(out, place),
            hide_temporary_name(out, place.with_name(f".{place.name[:40]}")),
        ):
            _check_absent(out, place, overwrite=overwrite)
            yield Claim(out, place, state_of(place))


@contextmanager
def _parents(out: Path, place: Path) -> Iterator[None]:
    """Make the missing folders above an output; remove them again after an error."""
    missing = [folder for folder in place.parents if not folder.exists()]
    if missing and out.is_symlink():
        raise UserError(
            f"leads to {place}, whose folder is not there", where=out, hint="is its disk mounted?"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            # Another process may use it by now, or have removed it.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _locked(out: Path, place: Path) -> Iterator[None]:
    """Hold the lock of an output; with it, leftovers of killed commands belong to no running command."""
    lock = beside(place, "lock")
    hint = "wait for it to end, or choose another --out"
    with exclusive(lock, doing="writing it", where=out, hint=hint) as has_locks:
        if has_locks:
            recover(place)
        yield


def find_leftovers(place: Path) -> list[Path]:
    """Find what killed commands left beside an output: `.NAME.PID.partial` and `.NAME.PID.old`."""
    if not place.parent.is_dir():
        return []
    found = []
    for entry in os.scandir(place.parent):
        if _is_leftover(entry.name, place):
            found.append(place.parent / entry.name)
    return sorted(found)


def _is_leftover(name: str, place: Path) -> bool:
    """Return whether a temporary name belongs to the output, also that of a temporary file of its own."""
    match = LEFTOVER.fullmatch(name)
    if match is None:
        return False
    return beside(place, match[1]).name == name or _is_leftover(name[1 : -len(match[1]) - 1], place)


def clear_leftovers(out: Path, place: Path) -> None:
    """Remove what a killed command left beside an output, unless another command is writing it."""
    lock = beside(place, "lock")
    if find_leftovers(place) or (lock.is_file() and lock.stat().st_size == 0):
        with contextlib.suppress(UserError), _locked(out, place):
            pass


def recover(place: Path) -> None:
    """Remove leftovers; restore the old output where a kill came between the two renames of a replacement.

    The caller holds the lock of `place`.
    """
    for left in find_leftovers(place):
        if left.suffix == ".old" and not os.path.lexists(place):
            left.rename(place)
        else:
            remove(left)


def real_folder(out: Path) -> Path:
    """Resolve the path of a folder to be written.

    Raises `UserError` for the current folder, those above it, and a circular link.
    """
    place = Path(os.path.realpath(out)) if out.is_symlink() or out.name in ("", "..") else out
    if place.is_symlink():
        raise UserError("a link that leads back to itself", where=out, hint=f"remove it, or {OTHER_OUT}")
    if Path.cwd().resolve().is_relative_to(place.resolve()):
        raise UserError(
            "is the current folder or one above it, which cannot be replaced",
            where=out,
            hint="give the name of a new folder",
        )
    return place


def check_no_stream(out: Path) -> None:
    """Raise `UserError` where a folder to be written is standard output, a pipe or a device."""
    if is_stream(out):
        raise UserError(
            "a pipe, a device or a descriptor, and a folder is written",
            where=out,
            hint="give the name of a new folder",
        )


def make_folder(out: Path) -> None:
    """Make a folder to write in, with those above it; of a link, its target."""
    check_no_stream(out)
    if not out.is_symlink():
        out.mkdir(parents=True, exist_ok=True)
        return
    place = Path(os.path.realpath(out))
    if not place.parent.is_dir():
        raise UserError(
            f"leads to {place}, whose folder is not there", where=out, hint="is its disk mounted?"
        )
    place.mkdir(exist_ok=True)


def _check_absent(out: Path, place: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(place):
        return
    if place.is_dir():
        if not overwrite and any(place.iterdir()):
            raise UserError("exists already", where=out, hint="choose another --out or remove it first")
        return
    if not place.is_file():
        raise UserError("neither a file nor a folder, and not replaced", where=out, hint=OTHER_OUT)
    if overwrite:
        raise UserError(
            "a file stands where a folder must go", where=out, hint=f"{OTHER_OUT} or remove the file"
        )
    raise UserError("exists already", where=out, hint="choose another --out or remove it first")


@contextmanager
def atomic_directory(out: Path, *, overwrite: bool = False, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a folder to fill; on success it becomes `out`, on failure it is removed and `out` is as before.

    Raises `UserError` as `claim` does, and where `out` appeared or changed while the folder was filled.
    """
    with claim(out, overwrite=overwrite, reads=reads) as claimed:
        temporary = claimed.beside(f"{os.getpid()}.partial")
        temporary.mkdir()
        with _removed_on_failure(claimed.out, temporary):
            yield temporary
            claimed.publish(temporary)


@contextmanager
def hide_temporary_name(out: Path, temporary: Path) -> Iterator[None]:
    """Report errors about `temporary` or its content as errors about `out`, the name that the user knows."""
    try:
        yield
    except UserError as error:
        if error.where is not None and error.where.startswith(str(temporary)):
            raise UserError(error.what, where=out, hint=error.hint) from error
        raise


@contextmanager
def _removed_on_failure(out: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if os.path.lexists(temporary):
            reported = explain(error, out, kept=f"what was begun could not be removed: {temporary}")
            if reported is not None:
                raise reported from error
        raise


def check_output_file(out: Path, *, overwrite: bool = False, option: str = "--out") -> Path:
    """Resolve and check the path of a file to be written, before any work is done for it.

    Pipes, character devices and descriptors (`/dev/stdout`) are written through and need no `overwrite`.

    Raises:
        UserError: Its folder is missing, it is a socket or a disk, or it exists (without `overwrite`).
    """
    with disk_errors(out):
        if is_stream(out):
            check_stream(out)
            return out
        if not out.parent.is_dir():
            raise UserError(
                "no such folder", where=out.parent, hint=f"make it first, or choose another {option}"
            )
        if out.is_dir():
            example = EXAMPLE_FILES.get(option, "results.json")
            raise UserError("a folder", where=out, hint=f"give the file to write, such as {example}")
        place = real_file(out)
        if not place.parent.is_dir():
            raise UserError(
                f"leads to {place}, whose folder is not there", where=out, hint="is its disk mounted?"
            )
        if not overwrite and os.path.lexists(place):
            clear_leftovers(out, place)
            raise UserError("exists already", where=out, hint=f"add --overwrite, or choose another {option}")
    return place


@contextmanager
def atomic_file(out: Path, *, overwrite: bool = False, option: str = "--out") -> Iterator[Path]:
    """Yield a path to write to; on success it becomes `out`, on failure it is removed and `out` is as before.

    A link is followed. What goes to a pipe or a device is collected first, and written at the end. A replaced
    file keeps its permissions.

    Raises `UserError` as `check_output_file` does, where another command is writing `out`, and where `out`
    appeared or changed meanwhile.
    """
    out = Path(out)
    if is_stream(out):
        with spooled(out) as temporary:
            yield temporary
        return
    place = check_output_file(out, overwrite=overwrite, option=option)
    with disk_errors(out), _locked(out, place):
        check_output_file(out, overwrite=overwrite, option=option)
        found = state_of(place)
        temporary = beside(place, f"{os.getpid()}.partial")
        with hide_temporary_name(out, temporary), _removed_on_failure(out, temporary):
            yield temporary
            fsync_file(temporary)
            if found is not None and place.exists():
                temporary.chmod(stat.S_IMODE(place.stat().st_mode))
            _name_file(temporary, place, found, out)


def _name_file(temporary: Path, place: Path, found: State | None, out: Path) -> None:
    """Rename a finished file to its place, replacing only what stood there at the start."""
    if found is not None:
        if state_of(place) != found:
            raise changed_error(out)
        temporary.replace(place)
        fsync_directory(place.parent)
        return
    try:
        # A hard link fails where the name is taken; a rename would replace it.
        os.link(temporary, place)
    except FileExistsError:
        raise changed_error(out) from None
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(place):
            raise changed_error(out) from None
        temporary.rename(place)
    try:
        fsync_directory(place.parent)
    except OSError:
        # The rename would not survive a power cut: undo it.
        place.unlink()
        raise
    # Where it cannot be removed now, the next command that writes here removes it.
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def check_replacing(out: Path, reads: Iterable[Path]) -> None:
    """Raise `UserError` where an output would replace what the command reads, or a folder that holds it."""
    place = out.resolve()
    for read in reads:
        if os.path.lexists(place) and read.exists() and read.resolve().is_relative_to(place):
            what = "is" if read.resolve() == place else f"holds {read}, which is"
            raise UserError(f"{what} read by this command", where=out, hint=OTHER_OUT)


def check_inside(out: Path, folders: Iterable[Path]) -> None:
    """Raise `UserError` where a new folder would lie inside one of those that it is made from."""
    place = out.resolve()
    for folder in folders:
        if folder.resolve() in place.parents:
            raise UserError(
                f"lies inside {folder}, which is read", where=out, hint="choose another --out, beside it"
            )
