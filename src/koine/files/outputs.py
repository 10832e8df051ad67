"""Outputs of commands: one writer at a time, whole or absent, and nothing replaced that was not there at the
start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from koine.errors import KoineWarning, UserError
from koine.files.locks import exclusive
from koine.files.system_errors import NOTHING_KEPT, disk_errors, explain
from koine.files.writing import beside, fsync_directory, fsync_file, fsync_tree, real_file, remove

State = frozenset[tuple[str, int, int, int]]
"""Content of a file or folder.

Relative name, inode, bytes and modification time (both 0 for folders) of all that is below.
"""

ANY = frozenset({("", -1, -1, -1)})
"""The state of something that may be replaced whatever it is, because only we write there."""

OTHER_OUT = "choose another --out"
EXAMPLES = {"--page": "long.html", "--report": "report.html"}
LEFTOVER = re.compile(r"\..+\.(\d+\.(?:partial|old))", re.DOTALL)
# Of file systems that cannot give a file a second name
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def state_of(path: Path) -> State | None:
    """Read the state of a file or folder; None for nothing. Links are not followed."""
    try:
        about = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(about.st_mode):
        return frozenset({("", about.st_ino, about.st_size, about.st_mtime_ns)})
    found = {("", about.st_ino, 0, 0)}
    for folder, folders, files in os.walk(path):
        for name in [*folders, *files]:
            item = Path(folder) / name
            about = item.lstat()
            shown = (0, 0) if stat.S_ISDIR(about.st_mode) else (about.st_size, about.st_mtime_ns)
            found.add((str(item.relative_to(path)), about.st_ino, *shown))
    return frozenset(found)


@dataclass(frozen=True)
class Claim:
    """The right to write an output: no other command writes it before this one has ended.

    out: as the user gave it. place: where it really lies, links followed. found: what stood there at the
    start.
    """

    out: Path
    place: Path
    found: State | None

    def beside(self, ending: str) -> Path:
        """A hidden name beside the output: `.NAME.ENDING`."""
        return beside(self.place, ending)

    def publish(self, temporary: Path) -> None:
        """Sync a finished folder and give it the output's name; see `publish_directory`."""
        fsync_tree(temporary)
        publish_directory(temporary, self.place, found=self.found, where=self.out)


@contextmanager
def claim(
    out: Path, *, overwrite: bool = False, reads: Iterable[Path] = (), kept: str = NOTHING_KEPT
) -> Iterator[Claim]:
    """Claim a folder to write: checked, its parents made, locked, and freed of what killed commands left
    beside it.

    A link is followed: what it leads to is written. Errors of the system inside become one line; then `kept`
    says what is left where the disk is full, and parents that were made for nothing are removed.

    Raises `UserError` where `out` holds something (unless `overwrite`), is or holds what is read (`reads`),
    cannot be written, or is being written.
    """
    out = Path(out)
    with disk_errors(out, kept=kept):
        place = real_folder(out)
        if overwrite:
            check_replacing(out, reads)
        try:
            _refuse_existing(out, place, overwrite=overwrite)
        except UserError:
            # A command that was killed after its last rename left its lock.
            clear_leftovers(out, place)
            raise
        with (
            _parents(out, place),
            _locked(out, place),
            hide_temporary_name(out, place.with_name(f".{place.name[:40]}")),
        ):
            _refuse_existing(out, place, overwrite=overwrite)
            yield Claim(out, place, state_of(place))


@contextmanager
def _parents(out: Path, place: Path) -> Iterator[None]:
    """The folders above an output, made where they are missing, and removed again where nothing came of
    it.
    """
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
            # Somebody else may use it by now, or have removed it.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _locked(out: Path, place: Path) -> Iterator[None]:
    """The lock of an output, under which leftovers of killed commands are known to be nobody's."""
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
    """Return whether a temporary name is the output's.

    Also for that of a file which is written under such a name itself.
    """
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
    """Put back what a kill between the two renames of a replacement left aside, and remove all other
    leftovers.

    Needs the lock of whoever writes `place`.
    """
    for left in find_leftovers(place):
        if left.suffix == ".old" and not os.path.lexists(place):
            left.rename(place)
        else:
            remove(left)


def real_folder(out: Path) -> Path:
    """Resolve the path of a folder to be written.

    Raises `UserError` for the current folder and those above it, and for a link that leads round in a circle.
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


def make_folder(out: Path) -> None:
    """Make a folder to write in, with those above it; where it is a link, what that leads to."""
    if not out.is_symlink():
        out.mkdir(parents=True, exist_ok=True)
        return
    place = Path(os.path.realpath(out))
    if not place.parent.is_dir():
        raise UserError(
            f"leads to {place}, whose folder is not there", where=out, hint="is its disk mounted?"
        )
    place.mkdir(exist_ok=True)


def _refuse_existing(out: Path, place: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(place):
        return
    if place.is_dir():
        if not overwrite and any(place.iterdir()):
            raise UserError("exists already", where=out, hint="choose another --out or remove it first")
        return
    if overwrite and not place.is_file():
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
    """Tell errors about `temporary`, or what is inside it, of `out`.

    The user does not know the names beside it.
    """
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
            told = explain(error, out, kept=f"what was begun could not be removed: {temporary}")
            if told is not None:
                raise told from error
        raise


def check_output_file(out: Path, *, overwrite: bool = False, option: str = "--out") -> Path:
    """Resolve and check the path of a file to be written, before any work is done for it.

    Raises `UserError` where its folder is missing, for what is no file (folders, devices, pipes, sockets),
    and for an existing file unless `overwrite`.
    """
    with disk_errors(out):
        if not out.parent.is_dir():
            raise UserError(
                "no such folder", where=out.parent, hint=f"make it first, or choose another {option}"
            )
        if out.is_dir():
            example = EXAMPLES.get(option, "results.json")
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
    """Yield a path to write to; on success it becomes the file `out`, on failure it is removed and `out` is
    as before.

    Raises `UserError` as `check_output_file` does, where another command is writing `out`, and where `out`
    appeared or changed meanwhile.
    """
    out = Path(out)
    place = check_output_file(out, overwrite=overwrite, option=option)
    with disk_errors(out), _locked(out, place):
        check_output_file(out, overwrite=overwrite, option=option)
        found = state_of(place)
        temporary = beside(place, f"{os.getpid()}.partial")
        with hide_temporary_name(out, temporary), _removed_on_failure(out, temporary):
            yield temporary
            fsync_file(temporary)
            _name_file(temporary, place, found, out)


def _name_file(temporary: Path, place: Path, found: State | None, out: Path) -> None:
    """Give a finished file its name, replacing only what stood there at the start."""
    if found is not None:
        if state_of(place) != found:
            raise _changed(out)
        temporary.replace(place)
        fsync_directory(place.parent)
        return
    try:
        # A second name fails where the first is taken, which a rename does not.
        os.link(temporary, place)
    except FileExistsError:
        raise _changed(out) from None
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(place):
            raise _changed(out) from None
        temporary.rename(place)
    try:
        fsync_directory(place.parent)
    except OSError:
        # It would not survive a power cut: it has not happened.
        place.unlink()
        raise
    # The next command that writes here removes it, where it cannot be removed now.
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _changed(out: Path) -> UserError:
    return UserError(
        "appeared or changed while this ran, and is left as it is", where=out, hint=f"{OTHER_OUT} and run it again"
    )  # fmt: skip


def check_replacing(out: Path, reads: Iterable[Path]) -> None:
    """Raise `UserError` where an output would replace what the command reads, or a folder that holds it."""
    place = out.resolve()
    for read in reads:
        if os.path.lexists(place) and read.exists() and read.resolve().is_relative_to(place):
            what = "is" if read.resolve() == place else f"holds {read}, which is"
            raise UserError(f"{what} read by this command", where=out, hint=OTHER_OUT)


def check_inside(out: Path, folders: Iterable[Path]) -> None:
    """Raise `UserError` where a new folder would be, or lie inside, one of those that it is made from."""
    place = out.resolve()
    for folder in folders:
        if folder.resolve() in place.parents:
            raise UserError(
                f"lies inside {folder}, which is read", where=out, hint="choose another --out, beside it"
            )


def publish_directory(
    temporary: Path, out: Path, *, found: State | None = ANY, where: Path | None = None
) -> None:
    """Rename a finished folder to `out`, replacing what stood there at the start (`found`; default: whatever
    stands there).

    A link is followed, to another file system too. A kill in between leaves what was there as
    `.NAME.PID.old`, which `recover` puts back.

    Raises `UserError` about `where` (default: `out`) if something else than `found` stands there by now.
    """
    place = Path(os.path.realpath(out)) if out.is_symlink() else out
    where = where or out
    now = state_of(place)
    if now is not None and found not in (ANY, now):
        raise _changed(where)
    temporary = _same_file_system(temporary, place)
    if now is None or (place.is_dir() and not any(place.iterdir())):
        _rename(temporary, place, where)
        try:
            fsync_directory(place.parent)
        except OSError:
            # It would not survive a power cut: it has not happened.
            place.rename(temporary)
            raise
        return
    old = beside(place, f"{os.getpid()}.old")
    place.rename(old)
    try:
        if found not in (ANY, state_of(old)):
            raise _changed(where)
        _rename(temporary, place, where)
        fsync_directory(place.parent)
    except (OSError, UserError):
        if not os.path.lexists(temporary) and os.path.lexists(place):
            place.rename(temporary)
        if not os.path.lexists(place):
            old.rename(place)
        raise
    try:
        remove(old)
    except OSError as error:
        warnings.warn(
            f"{old}: cannot be removed ({error.strerror}); remove it yourself", KoineWarning, stacklevel=2
        )


def _rename(temporary: Path, place: Path, where: Path) -> None:
    """Name a folder; what is not empty is never replaced by that."""
    try:
        temporary.rename(place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and os.path.lexists(place):
            raise _changed(where) from None
        if error.errno != errno.EXDEV or temporary.parent == place.parent:
            raise
        # Bind mounts and quotas of projects part what looks like one file system.
        _copied_beside(temporary, place).rename(place)


def _same_file_system(temporary: Path, place: Path) -> Path:
    """The finished folder, copied beside its place where a rename cannot bring it there."""
    if temporary.stat().st_dev == place.parent.stat().st_dev:
        return temporary
    return _copied_beside(temporary, place)


def _copied_beside(temporary: Path, place: Path) -> Path:
    """Move a finished folder beside its place by copying it."""
    copy = beside(place, f"{os.getpid()}.partial")
    try:
        shutil.copytree(temporary, copy, symlinks=True)
        fsync_tree(copy)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    shutil.rmtree(temporary)
    return copy
