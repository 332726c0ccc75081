"""Where a call stands, and showing it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from diffusionz.image import Image

# Indexed by DIFFUSIONZ_STAGE_*; tests/python holds them against the header.
STAGES = ("idle", "queued", "text", "denoise", "decode", "done", "forecast")


class Progress(NamedTuple):
    """A moment of a running call."""

    stage: str
    """One of "idle", "queued", "text", "denoise", "decode", "done", "forecast"."""
    step: int
    """Transformer steps done, over all pictures of the call; of a forecast, rows done."""
    step_count: int
    """Steps, or rows, in all; 0 until it is known."""
    image: int
    """Pictures finished."""
    image_count: int
    queue_ms: float
    """Milliseconds spent waiting so far; likewise the four below."""
    text_ms: float
    denoise_ms: float
    decode_ms: float
    forecast_ms: float


class Preview(NamedTuple):
    """A picture in the making: what it would become if the rest of its way were straight."""

    image: int
    """Which picture of the call this is of, from 0: the index into what `generate_batch` returns."""
    preview: int
    """Which of that picture's previews, from 0."""
    preview_count: int
    """Previews of that picture in all."""
    step: int
    """Steps of that picture done by then."""
    step_count: int
    """Steps of that picture in all."""
    picture: Image
    """The preview itself, half as wide and high as the picture will be, with its seed. It has no timings, and no
    metadata: it is not what those parameters draw."""


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
        now.forecast_ms,
    )


def take_preview(task: Any, seed: int) -> Preview | None:
    """The newest preview of a `DiffusionZTask *` that was not taken yet. `seed` is that of the call's first picture."""
    from diffusionz._ffi import check, ffi, lib

    now = ffi.new("DiffusionZPreview *", {"struct_size": ffi.sizeof("DiffusionZPreview")})
    check(lib.diffusionz_task_take_preview(task, now))
    if now.rgb == ffi.NULL:
        return None
    try:
        rgb = bytearray(ffi.buffer(now.rgb, 3 * now.width * now.height))
        picture = Image(rgb, now.width, now.height, seed=seed + now.image, timings={}, metadata_json="{}")
        return Preview(now.image, now.preview, now.preview_count, now.step, now.step_count, picture)
    finally:
        lib.diffusionz_free_preview(now)


class Bar:
    """A bar on stderr of the steps, or rows, that are done."""

    def __init__(self, unit: str) -> None:
        from tqdm import tqdm

        class Quiet(tqdm):  # type: ignore[misc]
            monitor_interval = 0  # no thread that refreshes stalled bars: this one is refreshed from outside

        self._bar: Any = Quiet(total=None, unit=unit, leave=False, dynamic_ncols=True, file=sys.stderr)

    def update(self, progress: Progress) -> None:
        self._bar.total = progress.step_count or None
        self._bar.n = progress.step
        self._bar.set_description_str(progress.stage, refresh=True)

    def close(self) -> None:
        self._bar.close()


class Watch:
    """Shows the progress of one task to whoever wants to see it."""

    def __init__(
        self,
        task: Any,
        on_progress: Callable[[Progress], object] | None,
        bar: bool | None,
        *,
        unit: str = "step",
        patience: float = 0.0,
        on_tick: Callable[[Any], object] | None = None,
    ) -> None:
        """`bar`: whether to show one, after `patience` seconds; None shows it in a terminal. `on_tick` is called with
        the task after the others."""
        self._task = task
        self._on_progress = on_progress
        self._on_tick = on_tick
        self._unit = unit
        self._bar: Bar | None = None
        self._wants_bar = sys.stderr is not None and sys.stderr.isatty() if bar is None else bar
        self._bar_from = time.monotonic() + patience

    @property
    def wanted(self) -> bool:
        return self._wants_bar or self._on_progress is not None or self._on_tick is not None

    def tick(self) -> None:
        if not self.wanted:
            return
        now = read_progress(self._task)
        if self._wants_bar:
            if self._bar is None and time.monotonic() >= self._bar_from:
                self._bar = Bar(self._unit)
            if self._bar is not None:
                self._bar.update(now)
        if self._on_progress is not None:
            self._on_progress(now)
        if self._on_tick is not None:
            self._on_tick(self._task)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
