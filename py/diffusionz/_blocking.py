"""Calls that block in the library while Python stays awake."""

from __future__ import annotations

import atexit
import os
import threading
from _queue import SimpleQueue
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

# Often enough for a bar to look alive and for a stop to feel immediate. The end of a call is not polled for.
POLL_SECONDS = 0.05

# Threads are kept between calls: LibTorch's own threads and caches belong to the thread that made them, and making them
# anew costs several milliseconds. That is why a server's threads do not make their calls themselves, either: each would
# have OpenMP threads of its own, and libgomp lets all sleep at once where they are more than the cores. A forecast of
# the demo over HTTP then took 3.9 ms on two cores, not 1.5. These are the inboxes of those that wait, the latest last.
_idle: list[SimpleQueue[Callable[[], None]]] = []
_running: set[threading.Event] = set()


def run(
    work: Callable[[], Value],
    *,
    tick: Callable[[], object] | None = None,
    cancel: Callable[[], object] | None = None,
) -> Value:
    """Returns `work()`, which runs on another thread: Python handles signals on the main thread only between bytecodes,
    so a main thread inside the library would not notice Ctrl-C.

    `tick` is called some twenty times a second meanwhile. When it raises, or Ctrl-C is pressed, `cancel` is called,
    the end of `work` is waited for, and that exception is raised. Without a `cancel`, or at a second Ctrl-C, nothing is
    waited for and `work` ends by itself: it must own everything that it uses.
    """
    done = threading.Event()
    values: list[Value] = []
    errors: list[BaseException] = []
    todo = [work]
    del work

    def job() -> None:
        try:
            # Popped, here and below: once the caller has its answer, nothing may keep the model alive.
            values.append(todo.pop()())
        except BaseException as error:
            errors.append(error)

    started = False
    try:
        _start(job, done)
        started = True
        while not done.wait(None if tick is None else POLL_SECONDS):
            if tick is not None:
                tick()
    except BaseException:
        if cancel is not None:
            cancel()
            if started:
                done.wait()
        raise
    if errors:
        raise errors.pop()
    return values.pop()


def _start(job: Callable[[], None], done: threading.Event) -> None:
    """Has a thread call `job` and set `done`."""
    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="diffusionz", daemon=True).start()

    def last() -> None:
        try:
            job()
        finally:
            _idle.append(inbox)  # before the caller goes on, so that its next call finds this thread
            _running.discard(done)
            done.set()

    _running.add(done)
    inbox.put(last)


def _serve(inbox: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        inbox.get()()


@atexit.register
def _finish() -> None:
    """No call may be inside the library when it is unloaded."""
    for done in list(_running):
        done.wait()


os.register_at_fork(after_in_child=_idle.clear)  # a forked process has only the thread that forked
