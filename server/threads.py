"""Blocking work on threads, for tasks that may be cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

Value = TypeVar("Value")


async def in_thread(pool: Executor, work: Callable[[], Value], stop: threading.Event | None = None) -> Value:
    """`work()` on a thread of the pool. When the task is cancelled, `stop` is set, and the work's end is waited for
    all the same: until then what it works on is not free."""
    future: asyncio.Future[Value] = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if stop is not None:
            stop.set()
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue  # asked twice; it stops no sooner for that
        future.exception() if not future.cancelled() else None
        raise


def posted(loop: asyncio.AbstractEventLoop, callback: Callable[..., Any], *args: Any) -> None:
    """Calls back on the loop, from another thread; quiet when the loop is closed."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        pass
