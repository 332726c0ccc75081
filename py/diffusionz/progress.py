"""Where a call stands, and showing it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# Indexed by DIFFUSIONZ_STAGE_*; tests/python holds them against the header.
STAGES = ("idle", "queued", "text", "denoise", "decode", "done")


class Progress(NamedTuple):
    """A moment of a running call."""

    stage: str
    """One of "idle", "queued", "text", "denoise", "decode", "done"."""
    step: int
    """Transformer steps done, over all pictures of the call."""
    step_count: int
    """Transformer steps in all; 0 until it is known."""
    image: int
    """Pictures finished."""
    image_count: int
    queue_ms: float
    """Milliseconds spent waiting so far; likewise the three below."""
    text_ms: float
    denoise_ms: float
    decode_ms: float


def read_progress(task: Any) -> Progress:
    """The moment that a `DiffusionZTask *` is in."""
    from diffusionz._ffi import check, ffi, lib

    now = ffi.new("DiffusionZProgress *", {"struct_size": ffi.sizeof("DiffusionZProgress")})
    check(lib.diffusionz_task_progress(task, now))
    return Progress(
        STAGES[now.stage] if 0 <= now.stage < len(STAGES) else "unknown",
        now.step,
        now.step_count,
        now.image,
        now.image_count,
        now.queue_ms,
        now.text_ms,
        now.denoise_ms,
        now.decode_ms,
    )


class Bar:
    """A bar of transformer steps on stderr."""

    def __init__(self) -> None:
        from tqdm import tqdm

        class Quiet(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no thread that refreshes stalled bars: this one is refreshed from outside

        self._bar: Any = Quiet(total=None, unit="step", leave=False, dynamic_ncols=True, file=sys.stderr)

    def update(self, progress: Progress) -> None:
        self._bar.total = progress.step_count or None
        self._bar.n = progress.step
        self._bar.set_description_str(progress.stage, refresh=True)

    def close(self) -> None:
        self._bar.close()


class Watch:
    """Shows the progress of one task to whoever wants to see it."""

    def __init__(self, task: Any, on_progress: Callable[[Progress], object] | None, bar: bool | None) -> None:
        if bar is None:
            bar = sys.stderr is not None and sys.stderr.isatty()
        self._task = task
        self._on_progress = on_progress
        self._bar = Bar() if bar else None

    @property
    def wanted(self) -> bool:
        return self._bar is not None or self._on_progress is not None

    def tick(self) -> None:
        if not self.wanted:
            return
        now = read_progress(self._task)
        if self._bar is not None:
            self._bar.update(now)
        if self._on_progress is not None:
            self._on_progress(now)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
