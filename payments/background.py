"""A thread with an event loop of its own, for work whose blocking must stall nobody else's loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """Runs `main()` in a daemon thread from `start` until it ends, or `stop` cancels it. Used once."""

    def __init__(self, name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._main = main
        self._begun = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()
        self._begun.wait()

    def call(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs a coroutine in the thread's loop, beside `main`; await it with asyncio.wrap_future."""
        assert self._loop is not None, "it has been started"
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Cancels `main` and waits for its end; whether it came in time. Doing it again, or before `start`, is fine."""
        if self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
                self._loop.call_soon_threadsafe(self._task.cancel)
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._until_cancelled())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # its message may have anything in it
            logger.error("the thread %s ended with %s", self._thread.name, type(error).__name__)
        finally:
            self._begun.set()

    async def _until_cancelled(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._begun.set()
        await self._main()
