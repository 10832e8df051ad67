"""The program inside the sandbox: runs a candidate once for each input and passes its output on.

Its text is given to the sandbox's interpreter with `-c`. It imports few modules, because the start of an interpreter
is most of a run's time: `json` alone would take as long as the rest. It reads one Python literal from standard
input: `source`, `tests` (dictionaries with `stdin` or `expression`) and `limits`. It writes one JSON object a line: `{"ready": true}`, then for each test its `status` (`ok`, `failed`,
`time`, `output`) and `output`. It knows no expected value. A candidate that kills it or writes in its place
only loses outputs: the verdict is made outside.
"""

from __future__ import annotations

import builtins
import os
import resource
import select
import sys
import time
from _json import encode_basestring_ascii as json_string

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` takes long to import
    from typing import Any, NoReturn

RESULT_FD = 3
"""Where a child writes the value of an expression."""
LAST_FD = 256
SIGKILL = 9  # the module `signal` takes long to import


def encode(value: object, depth: int = 0) -> str:
    """Return a value as JSON text that keeps apart what JSON does not: tuples, sets, keys, infinities.

    Values of subclasses (`Counter`, `IntEnum`, named tuples) become those of the class that they derive from.
    """
    if depth > 100:
        raise ValueError("nested too deeply")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json_string(str(value))
    if isinstance(value, int):
        return f'{{"int": "{int(value):x}"}}'
    if isinstance(value, float):
        return f'{{"float": "{float(value)!r}"}}'
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            name = "set" if kind is frozenset else kind.__name__
            return f'{{"{name}": [{", ".join([encode(one, depth + 1) for one in value])}]}}'
    if isinstance(value, dict):
        pairs = [f"[{encode(key, depth + 1)}, {encode(one, depth + 1)}]" for key, one in value.items()]
        return f'{{"dict": [{", ".join(pairs)}]}}'
    raise TypeError(f"a value of the type {type(value).__name__}")


def limit(limits: dict[str, Any]) -> None:
    """Lower the limits of this process and of all its children."""
    seconds = int(limits["seconds"]) + 1
    for name, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NPROC, limits["processes"] + 2),  # and bubblewrap's process, and this program's
        (resource.RLIMIT_AS, limits["memory_bytes"]),
    ):
        resource.setrlimit(name, (value, value))


def input_file(text: str) -> int:
    """Return a descriptor of a file without a name that holds `text`."""
    fd = os.open("/tmp", os.O_RDWR | os.O_TMPFILE | os.O_EXCL, 0o600)
    write_all(fd, text.encode("utf-8", "surrogatepass"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def run_candidate(
    source: str, test: dict[str, str], limits: dict[str, Any], stdin: int, out: int
) -> NoReturn:
    """Run the candidate in this process, which is a child; does not return."""
    code = 1
    try:
        os.setsid()
        nothing = os.open("/dev/null", os.O_RDWR)
        is_program = "stdin" in test
        os.dup2(stdin, 0)
        os.dup2(out, 1 if is_program else RESULT_FD)
        os.dup2(nothing, 2)
        if not is_program:
            os.dup2(nothing, 1)
        os.closerange(3 if is_program else RESULT_FD + 1, LAST_FD)
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        vars(builtins).update(exit=sys.exit, quit=sys.exit)  # `site`, which adds them, is not loaded
        limit(limits)
        names: dict[str, Any] = {
            "__name__": "__main__" if is_program else "candidate",
            "__builtins__": builtins,
        }
        try:
            exec(compile(source, "<candidate>", "exec"), names)
        except SystemExit as ending:
            if not is_program:
                raise
            code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
        else:
            code = 0
        if not is_program:
            value = eval(compile(test["expression"], "<test>", "eval"), names)
            write_all(RESULT_FD, encode(value).encode())
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # wait for threads, as the interpreter does at its end
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001  # whatever the candidate raises, exit code 1 says that it failed
        code = code or 1
    finally:
        os._exit(code & 0xFF)


def collect(out: int, child: int, limits: dict[str, Any]) -> tuple[str, bytes]:
    """Return status and output of a child: read until it has ended, or is over its time or its output."""
    deadline = time.monotonic() + limits["seconds"]
    parts, size, status, open_ = [], 0, None, True
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return "time", b""
        if open_:
            # A daemon may hold the pipe open after the child's end, so the wait is short.
            if select.select([out], [], [], min(left, 0.02))[0]:
                part = os.read(out, 65536)
                open_ = bool(part)
                parts.append(part)
                size += len(part)
                if size > limits["output_bytes"]:
                    return "output", b""
                continue
        elif status is None:
            time.sleep(0.0003)
        if status is not None:
            return ("ok" if status == 0 else "failed"), b"".join(parts)
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = code


def end_all() -> None:
    """Kill all processes but this one and bubblewrap's, which is the first, and wait for the own ones."""
    try:  # noqa: SIM105  # `contextlib` takes long to import
        os.kill(-1, SIGKILL)
    except ProcessLookupError:
        pass
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def run_test(source: str, test: dict[str, str], limits: dict[str, Any]) -> tuple[str, str]:
    """Run one test in a child; afterwards no process of the candidate is left."""
    stdin = input_file(test.get("stdin", ""))
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        run_candidate(source, test, limits, stdin, into)
    os.close(into)
    os.close(stdin)
    try:
        status, output = collect(out, child, limits)
    finally:
        os.close(out)
        end_all()
    return status, output.decode("utf-8", "replace")


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` to a descriptor."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def main() -> None:
    """Read the job, run its tests."""
    parts = []
    while part := os.read(0, 1 << 20):
        parts.append(part)
    job = eval(b"".join(parts), {"__builtins__": {}})
    write_all(1, b'{"ready": true}\n')
    for test in job["tests"]:
        try:
            status, output = run_test(job["source"], test, job["limits"])
        except OSError:
            # A candidate of an earlier test has filled /tmp.
            status, output = "failed", ""
        write_all(1, f'{{"status": "{status}", "output": {json_string(output)}}}\n'.encode())


if __name__ == "__main__":
    main()
