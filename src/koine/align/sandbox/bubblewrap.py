"""The command that starts a process in bubblewrap (`bwrap`), and whether this machine can run it.

The process has namespaces of its own for users, processes, mounts, network and IPC. It sees `/usr` and the
interpreter, read-only, a bare `/dev`, and an empty `/tmp` in memory; no home, no `/etc`, no `/proc`. Its
environment is empty but for what is set here.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from koine.align.sandbox.limits import Limits
from koine.errors import UserError

NOBODY = 65534
"""User and group of the process where we are root: the kernel never limits the number of root's processes."""
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}
_INSTALL = "install it, for example: apt-get install bubblewrap"
_NAMESPACES = (
    "allow unprivileged user namespaces: `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu, "
    "`--security-opt seccomp=unconfined --security-opt apparmor=unconfined` for a Docker container"
)


def find_bwrap() -> str:
    """Return the path of `bwrap`; raise `UserError` where there is none."""
    if not sys.platform.startswith("linux"):
        raise UserError(
            "the sandbox for unit tests needs Linux", hint="run this reward on Linux, or take another reward"
        )
    found = shutil.which("bwrap")
    if found is None:
        raise UserError("the sandbox for unit tests needs 'bwrap' (bubblewrap)", hint=_INSTALL)
    return found


def startup_error(message: str) -> UserError:
    """Return the error for a sandbox that does not start, with how to mend it.

    message: what `bwrap` or the interpreter wrote to standard error.
    """
    lines = message.strip().splitlines()
    last = lines[-1] if lines else "no message"
    if "nknown option" in last:
        hint = "bubblewrap 0.8 or later is needed; `bwrap --version` says which this is"
    elif any(word in last for word in ("not permitted", "ermission denied", "namespace", "No space left")):
        hint = _NAMESPACES
    else:
        hint = "try `bwrap --unshare-all --ro-bind / / true`"
    return UserError(f"the sandbox for unit tests does not start: {last}", hint=hint)


@functools.cache
def find_interpreter() -> Path:
    """Return the Python that runs programs in the sandbox: ours, or that of the distribution.

    As root the sandbox runs as `nobody`, who may not read an interpreter below `/root`.
    """
    for candidate in _interpreters():
        if candidate.is_file() and (os.geteuid() != 0 or _is_public(candidate)):
            return candidate
    raise UserError(
        f"the sandbox for unit tests runs as 'nobody', who cannot read {sys.base_prefix}",
        hint="work as an ordinary user, or install the distribution's python3",
    )


def _interpreters() -> Iterator[Path]:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    yield Path(sys.base_prefix).resolve() / "bin" / name
    for place in ("/usr/local/bin", "/usr/bin"):
        yield Path(place, name)
    for place in ("/usr/local/bin", "/usr/bin"):
        yield Path(place, "python3")


def _is_public(path: Path) -> bool:
    """Return whether everybody may read a file: others may enter each folder on the way."""
    resolved = path.resolve()
    return bool(resolved.stat().st_mode & 0o005) and all(
        folder.stat().st_mode & 0o001 for folder in resolved.parents
    )


def command(limits: Limits, seccomp_fd: int | None) -> list[str]:
    """Return the command line up to the program to run, with the interpreter as its last word.

    seccomp_fd: descriptor, inherited by the process, that holds the filter; None for no filter.
    """
    python = find_interpreter()
    line = [
        find_bwrap(),
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
    ]
    line += ["--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        line += ["--setenv", name, value]
    for folder in _system_folders(python):
        line += ["--ro-bind", folder, folder]
    for link in ("/bin", "/lib", "/lib64"):
        if Path(link).is_symlink():
            line += ["--symlink", str(Path(link).readlink()), link]
    # Without the linker's cache, libraries of /usr/local/lib are not found.
    line += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    # Last: nothing but /tmp can be written, and /tmp has a size. /dev has a /dev/shm of unlimited size.
    line += ["--dev", "/dev", "--remount-ro", "/dev"]
    line += ["--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    if seccomp_fd is not None:
        line += ["--seccomp", str(seccomp_fd)]
    return [*line, str(python)]


def _system_folders(python: Path) -> list[str]:
    """Return the folders to show: those of the system, and the interpreter's where it lies elsewhere."""
    folders = [
        "/usr",
        *(name for name in ("/bin", "/lib", "/lib64") if Path(name).is_dir() and not Path(name).is_symlink()),
    ]
    home = python.resolve().parent.parent
    if not home.is_relative_to("/usr"):
        folders.append(str(home))
    return folders
