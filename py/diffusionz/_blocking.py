"""Calls that block in the library while Python stays awake."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

# Often enough for a bar to look alive and for a stop to feel immediate. The end of a call is not polled for.
POLL_SECONDS = 0.05


def run(
    work: Callable[[], Value],
    *,
    tick: Callable[[], object] | None = None,
    cancel: Callable[[], object] | None = None,
) -> Value:
    """Returns `work()`, which runs on a thread of its own: Python handles signals on the main thread only between
    bytecodes, so a main thread inside the library would not notice Ctrl-C.

    `tick` is called some twenty times a second meanwhile. When it raises, or Ctrl-C is pressed, `cancel` is called,
    the end of `work` is waited for, and that exception is raised. Without a `cancel`, or at a second Ctrl-C, nothing is
    waited for and `work` ends by itself: it must own everything that it uses.
    """
    done = threading.Event()
    values: list[Value] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            values.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=target, name="diffusionz")
    try:
        thread.start()
        while not done.wait(None if tick is None else POLL_SECONDS):
            if tick is not None:
                tick()
    except BaseException:
        if cancel is not None:
            cancel()
            if thread.ident is not None:
                done.wait()
        raise
    if errors:
        # Popped: an error that hung on a variable of its own traceback's frame would keep the model alive.
        raise errors.pop()
    return values.pop()
