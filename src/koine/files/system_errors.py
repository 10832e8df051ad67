"""Turn errors of the operating system into one line for the user."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from koine.errors import UserError, first_line

NOTHING_KEPT = "nothing half-written was kept"

# errno -> (what is wrong, how to fix it); the system's own words follow where these name no single cause.
CAUSES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another place"),
    errno.EFBIG: (
        "a file grows larger than the file system or `ulimit -f` allows",
        "choose another place, or raise the limit",
    ),
    errno.EACCES: ("cannot write here", "choose a folder that you may write to"),
    errno.EPERM: ("cannot write here", "choose a folder that you may write to"),
    errno.EROFS: ("cannot write here", "choose a folder that you may write to"),
    errno.ENAMETOOLONG: ("the name is longer than the file system allows", "choose a shorter one"),
    errno.ELOOP: ("a link that leads back to itself", "remove the link, or give what it should lead to"),
    errno.EXDEV: ("cannot be moved to another file system", "choose a place on the same file system"),
    errno.EBUSY: ("is in use", "end what uses it (a mount, another program), then run the command again"),
    errno.ETXTBSY: ("is in use", "end what uses it (a mount, another program), then run the command again"),
    errno.ESTALE: (
        "the file server has lost it (stale file handle)",
        "mount it again, then run the command again",
    ),
    errno.EIO: (
        "the disk reports an error (input/output error)",
        "check the disk, then run the command again",
    ),
    errno.EMFILE: ("too many files are open", "raise the limit: ulimit -n 4096"),
    errno.ENFILE: ("too many files are open", "end other programs, then run the command again"),
}
# For a file that is only read: the texts of CAUSES are about writing.
DENIED = (errno.EACCES, errno.EPERM)
UNKNOWN = "check the disk, then run the command again"
# How libraries say that a write failed where they raise no OSError.
LIBRARIES = re.compile(
    r"PytorchStreamWriter failed|unexpected pos|file write failed|I/O error|IoError|os error \d+"
)


@contextmanager
def disk_errors(path: Path, *, kept: str = NOTHING_KEPT) -> Iterator[None]:
    """Turn errors of the system while `path` is written into a `UserError` of one line.

    Args:
        path: What is written.
        kept: What is left of the work, for the message of a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reported = explain(error, path, kept=kept)
        if reported is None:
            raise
        raise reported from error
    except BaseException as error:
        # Exceptions of libraries: torch's CheckpointException is no `Exception`, safetensors has its own.
        reported = explain(error, path, kept=kept) if type(error).__name__ in WRAPPERS else None
        if reported is None:
            raise
        raise reported from error


WRAPPERS = ("SafetensorError", "CheckpointException")


def explain(error: BaseException, path: Path | None = None, *, kept: str = "") -> UserError | None:
    """Return the `UserError` for an error of the system, also a wrapped one; None for any other error.

    Args:
        error: The error, or a library's exception that wraps it.
        path: What was being written. An error about another file names that file.
        kept: What is left of the work, for the message of a full disk.
    """
    found = system_error(error)
    if found is None or isinstance(found, BrokenPipeError | ConnectionError):
        return None
    named = name_of(found)
    about = named is None or path is None or _concerns(named, path)
    where = path if about and path is not None else named
    code = found.errno
    if code == errno.ENOENT:
        if path is not None and named is not None and _beside(named, path):
            # `/proc`, or a folder that another process has removed meanwhile.
            what, hint = (
                "no file can be made here",
                "choose another place, and leave the folder alone while this runs",
            )
        else:
            what, hint = "no such file or folder", "check the name; it may have been removed while this ran"
        return UserError(what, where=named or path, hint=hint)
    if code == errno.EISDIR:
        return UserError(
            "a folder stands where a file must go",
            where=named or path,
            hint="choose another place or remove the folder",
        )
    if code in (errno.ENOTDIR, errno.EEXIST):
        return UserError(
            "a file stands where a folder must go",
            where=named or path,
            hint="choose another place or remove the file",
        )
    if code in DENIED and not about:
        return UserError(
            f"access is refused ({os.strerror(code)})", where=where, hint="check its permissions"
        )
    if code in CAUSES:
        what, hint = CAUSES[code]
    elif code is not None:
        what, hint = f"the system refuses ({os.strerror(code)})", UNKNOWN
    else:
        what, hint = f"the system refuses ({first_line(found)})", UNKNOWN
    if code in (errno.ENOSPC, errno.EDQUOT) and kept:
        hint = f"{hint}; {kept}"
    return UserError(what, where=where, hint=hint)


def system_error(error: BaseException) -> OSError | None:
    """Return the system's error behind an exception; None where there is none.

    It is the exception itself, or what a library has wrapped into text or a list of its own.
    """
    if isinstance(error, OSError):
        return error
    if type(error).__name__ == "CheckpointException":
        # torch.distributed.checkpoint: {rank: (exception, traceback)}
        for wrapped, *_ in getattr(error, "failures", {}).values():
            if isinstance(wrapped, BaseException) and (found := system_error(wrapped)) is not None:
                return found
        return None
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        text = str(error)
        if not LIBRARIES.search(text):
            return None
        if isinstance(error.__cause__ or error.__context__, OSError):
            cause = error.__cause__ or error.__context__
            assert isinstance(cause, OSError)
            return cause
        code = re.search(r"os error (\d+)", text)
        if code is not None:
            return OSError(int(code[1]), os.strerror(int(code[1])))
        return OSError(first_line(error).partition("] . ")[2] or first_line(error))
    return None


def name_of(error: OSError) -> Path | None:
    """Return the file that a system error names; None without one or for a file descriptor."""
    name = error.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    return Path(name) if isinstance(name, str | os.PathLike) else None


def _concerns(named: Path, path: Path) -> bool:
    """Return whether `named` is `path`, is inside it, holds it, or is a temporary name beside it."""
    own, other = path.absolute(), named.absolute()
    if other.is_relative_to(own) or own.is_relative_to(other):
        return True
    beside = f".{own.name[:40]}"
    return other.is_relative_to(own.parent) and other.relative_to(own.parent).parts[0].startswith(beside)


def _beside(named: Path, path: Path) -> bool:
    """Return whether `named` is in the folder of `path` or below it."""
    return named.absolute().is_relative_to(path.absolute().parent)
