"""kill -9 at random moments of a process, and the same call again."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from koine.files import sha256_file

LIVES = 6
"""Of one output at most: the last one is not killed."""


def kill_and_repeat(
    run: Callable[[Path], object], folder: Path, *, kills: int, seed: int, files: Sequence[str]
) -> float:
    """Run `run(out)` once undisturbed, then killed and repeated until there were `kills`; compare the files.

    Each life is a fork: it starts in milliseconds where the caller has imported everything before. The moment
    of a kill is drawn over the whole of a life.

    Args:
        run: writes to the folder `out`, and resumes there.
        folder: `folder / "whole"` is the undisturbed output, the others lie beside it.
        kills: how many at least.
        seed: of the moments.
        files: must be equal byte for byte.

    Returns:
        The seconds of the undisturbed life. Raises `AssertionError` where a life fails or a file differs.
    """

    def life(out: Path) -> int:
        child = os.fork()
        if child == 0:
            try:
                run(out)
                os._exit(0)
            except BaseException:  # noqa: BLE001 (reported; nothing of the child may return to the caller)
                traceback.print_exc()
                os._exit(1)
        return child

    begin = time.monotonic()
    whole = folder / "whole"
    _, status = os.waitpid(life(whole), 0)
    assert status == 0, status
    length = time.monotonic() - begin
    wanted = {name: sha256_file(whole / name) for name in files}
    draw = random.Random(seed)
    killed = rounds = 0
    while killed < kills:
        rounds += 1
        out = folder / f"killed-{rounds}"
        for attempt in range(LIVES):
            child = life(out)
            if attempt < LIVES - 1:
                time.sleep(draw.uniform(0.02, 1.1 * length))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                killed += 1
                continue
            assert status == 0, status
            break
        differ = [name for name in files if sha256_file(out / name) != wanted[name]]
        assert not differ, f"round {rounds} ended in other files: {differ}"
    return length
