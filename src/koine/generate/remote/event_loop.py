"""Run a coroutine from synchronous code, also inside a running event loop (a notebook, a web server)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of its own thread, and return its result.

    Ctrl-C meanwhile cancels the coroutine, lets it clean up, and is raised here.
    """
    begun = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        begun.set()
        return await coroutine

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="koine-calls") as pool:
        future = pool.submit(asyncio.run, main())
        try:
            return future.result()
        except BaseException:
            if not future.done():
                begun.wait()
                loop, task = running[0]
                # The task may end at this moment.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(task.cancel)
            raise
