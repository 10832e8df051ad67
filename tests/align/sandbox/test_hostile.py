"""Hostile programs in the sandbox: none passes a test that it should not, none reaches what is outside.

A program of `PROBES` tries something and returns what came of it: "refused" is the right answer. A program of
`CHEATS` tries to pass tests without solving them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from koine.align.sandbox import Limits, ProgramTest, Sandbox, read_test
from koine.align.sandbox.sandbox import TestResult

from .machine import needs_sandbox

pytestmark = needs_sandbox

# Time enough on a busy machine; programs that take all of their time run in the other.
SANDBOX = Sandbox(Limits(seconds=20.0, processes=8, output_bytes=1 << 16, file_bytes=1 << 20))
IMPATIENT = Sandbox(Limits(seconds=0.5, processes=8, output_bytes=1 << 16, file_bytes=1 << 20))
SQUARES = [read_test(f"assert f({x}) == {x * x}") for x in (2, 3, 5, 7)]
SOLUTION = "def f(x):\n    return x * x\n"
SECRET = "correct horse battery staple"

# Each tries what its name says, and raises OSError, MemoryError or another error where it may not.
PROBES = {
    "read_passwd": "return open('/etc/passwd').read()",
    "read_home": f"return os.listdir({str(Path.home())!r})",
    "read_this_test": f"return open({__file__!r}).read()",
    "read_proc": "return open('/proc/1/environ').read()",
    "symlink_to_passwd": "os.symlink('/etc/passwd', '/tmp/link'); return open('/tmp/link').read()",
    "symlink_out_of_tmp": "os.symlink('/usr/lib', '/tmp/link'); open('/tmp/link/x', 'w').write('x'); return 'written'",
    "write_system": "open('/usr/lib/x', 'w').write('x'); return 'written'",
    "write_root": "os.mkdir('/here'); return 'written'",
    "write_shared_memory": "open('/dev/shm/x', 'w').write('x'); return 'written'",
    "write_large_file": "open('/tmp/x', 'wb').write(bytes(1 << 26)); return 'written'",
    "fill_tmp": """
        for i in range(64):
            open(f'/tmp/{i}', 'wb').write(bytes(1 << 19))
        return 'written'
        """,
    "network": "import socket; socket.create_connection(('127.0.0.1', 22), 1); return 'connected'",
    "unix_socket": "import socket; socket.socket(socket.AF_UNIX); return 'opened'",
    "vsock": "import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); return 'opened'",
    "resolve": "import socket; return socket.gethostbyname('localhost.localdomain')",
    "memory": "bytearray(1 << 30); return 'allocated'",
    "memory_in_steps": "return len([bytearray(1 << 20) for _ in range(4096)])",
    "raise_limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)); return 'raised'",
    "ptrace_parent": "return libc('ptrace', 16, os.getppid(), 0, 0)",
    "read_parent_memory": "return libc('process_vm_readv', os.getppid(), None, 0, None, 0, 0)",
    "new_user_namespace": "return libc('unshare', 0x10000000)",
    "mount": "return libc('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "shared_memory_system_v": "return libc('shmget', 0, 1 << 20, 0o1777)",
    "anonymous_file": "return os.memfd_create('x')",
    "become_root": "os.setuid(0); return 'root'",
    "chroot": "os.chroot('/tmp'); return 'done'",
    "many_processes": """
        children = []
        for _ in range(64):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
            children.append(pid)
        return len(children)
        """,
    "many_threads": """
        import threading
        for _ in range(64):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return 'started'
        """,
    "kill_outside": f"os.kill({os.getpid()}, 9); return 'sent'",
    "environment": "return os.environ['KOINE_TEST_SECRET']",
    "expected_values": """
        import gc
        frame, seen = sys._getframe(), []
        while frame:
            seen.append(repr(frame.f_locals) + repr(frame.f_globals))
            frame = frame.f_back
        seen += [repr(one) for one in gc.get_objects() if isinstance(one, (dict, list, tuple))]
        words = 'horse ' + 'battery'
        if any(words in one for one in seen):
            return 'found'
        raise LookupError
        """,
}

PROBE = """
import ctypes, os, sys, time

def libc(name, *arguments):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
    return name + " succeeded"

def attempt():
{body}

def probe():
    try:
        return attempt()
    except (OSError, MemoryError, LookupError, ValueError, RuntimeError):
        return "refused"
"""


def run_probe(body: str) -> list[TestResult]:
    source = PROBE.replace("{body}", textwrap.indent(textwrap.dedent(body).strip(), "    "))
    secret = ProgramTest(SECRET, expression="'not the secret'")
    return SANDBOX.run(source, [ProgramTest("refused", expression="probe()"), secret])


@pytest.mark.parametrize("name", PROBES)
def test_what_a_program_may_not_do_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOINE_TEST_SECRET", SECRET)
    assert [result.status for result in run_probe(PROBES[name])] == ["passed", "wrong"]


def test_a_probe_that_is_not_refused_is_seen() -> None:
    """The check on the checks: something that is allowed does not count as refused."""
    assert run_probe("open('/tmp/x', 'w').write('x'); return 'written'")[0].status == "wrong"


# Each would pass the tests if verdicts were made where the program runs.
CHEATS = {
    "exit_early": "import os; os._exit(0)",
    "exit_by_exception": "raise SystemExit(0)",
    "exit_in_function": "def f(x):\n    import os; os._exit(0)",
    "always_equal": """
        class Equal(int):
            def __eq__(self, other): return True
            def __hash__(self): return 0
        def f(x): return Equal(0)
        """,
    "equal_to_everything": """
        class Equal:
            def __eq__(self, other): return True
            def __repr__(self): return '4'
        def f(x): return Equal()
        """,
    "patched_assert": """
        import builtins
        class AssertionError(BaseException): pass
        builtins.AssertionError = type('A', (BaseException,), {})
        builtins.eval = builtins.exec = lambda *a, **k: True
        def f(x): return True
        """,
    "fake_verdicts": """
        import os
        def f(x):
            for fd in range(256):
                try: os.write(fd, b'{"status": "passed", "output": "4"}\\n{"passed": true}\\n')
                except OSError: pass
            os._exit(0)
        """,
    "fake_verdicts_at_exit": """
        import atexit, os
        atexit.register(lambda: [os.write(1, b'{"status": "ok", "output": "passed"}\\n')])
        def f(x): raise SystemExit(0)
        """,
    "nested_output": "import os\ndef f(x):\n    os.write(3, b'[' * 50000); os._exit(0)",
    "huge_integer": "import os\ndef f(x):\n    os.write(3, b'9' * 50000); os._exit(0)",
    "infinite_value": "def f(x):\n    a = []; a.append(a); return a",
    "trace": """
        import sys
        def trace(frame, event, arg):
            frame.f_locals['status'] = 'passed'
            return trace
        sys.settrace(trace); sys.setprofile(trace)
        def f(x): return None
        """,
    "kill_parent": "import os\ndef f(x):\n    os.kill(os.getppid(), 9); return x * x",
    "stop_parent": "import os\ndef f(x):\n    os.kill(os.getppid(), 19); return 0",
    "kill_all": "import os\ndef f(x):\n    os.kill(-1, 9); return x * x",
    "another_program": "import os\ndef f(x):\n    os.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
    "sleep": "import time\ndef f(x):\n    time.sleep(60)",
    "loop_with_signal_handlers": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        def f(x):
            while True: pass
        """,
    "flood": "def f(x):\n    import os\n    while True: os.write(3, b'x' * 65536)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
    "crash": "import ctypes\ndef f(x): return ctypes.string_at(0)",
    "deep_source": "x = " + "(" * 100_000,
    "not_python": "\0\ud800",
    "close_all": "import os\ndef f(x):\n    os.closerange(0, 256); return x * x",
    "fork_bomb": """
        import os
        def f(x):
            while True:
                try: os.fork()
                except OSError: pass
        """,
    "delete_all": """
        import os, shutil, sys
        def f(x):
            shutil.rmtree('/', ignore_errors=True)
            for name in list(sys.modules): del sys.modules[name]
        """,
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(name: str) -> None:
    results = IMPATIENT.run(textwrap.dedent(CHEATS[name]), SQUARES)
    assert len(results) == len(SQUARES)
    assert not any(result.passed for result in results)
    # The machine still works, and the same sandbox judges an honest program.
    assert all(result.passed for result in SANDBOX.run(SOLUTION, SQUARES[:1]))


def test_printed_flood_is_over_its_output() -> None:
    results = SANDBOX.run("while True: print('x' * 1000)", [read_test({"stdin": "", "expected": "x"})])
    assert [result.status for result in results] == ["output"]


def test_time_is_limited_for_the_whole_run() -> None:
    begin = time.monotonic()
    results = IMPATIENT.run("import time\ndef f(x): time.sleep(60)", SQUARES)
    assert [result.status for result in results] == ["time"] * 4
    assert time.monotonic() - begin < 15


def test_no_process_survives() -> None:
    """A daemon of its own session, with all signals ignored, ends with the run."""
    program = """
        import os
        def f(x):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.execv('/bin/sleep', ['sleep', '4242.17'])
                os._exit(0)
            return x * x
        """
    results = SANDBOX.run(textwrap.dedent(program), SQUARES)
    assert [result.status for result in results] == ["passed"] * 4
    assert wait_until(lambda: not any_process("4242.17"))


def test_tests_do_not_see_one_another() -> None:
    """Each test has a process of its own: what one leaves in memory is gone in the next."""
    program = "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)"
    assert all(r.passed for r in SANDBOX.run(program, [read_test(f"assert f({i}) == 1") for i in range(4)]))


def test_a_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    """The sandbox dies with the process that started it, also by SIGKILL."""
    program = "import os\ndef f(x):\n    os.execv('/bin/sleep', ['sleep', '4242.19'])"
    script = (
        "from koine.align.sandbox import Limits, Sandbox, read_test\n"
        f"Sandbox(Limits(seconds=60)).run({program!r}, [read_test('assert f(1) == 1')])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert wait_until(lambda: any_process("4242.19"))
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not any_process("4242.19"))


def any_process(word: str) -> bool:
    """Whether a process of this machine has `word` among its arguments."""
    return any(word in (one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False
