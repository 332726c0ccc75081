"""What the two model families share: how a model is loaded and let go, and a call that can be watched and stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from diffusionz import _blocking
from diffusionz._errors import ArgumentError
from diffusionz.hub import Path, locate
from diffusionz.progress import Progress, Watch, read_progress

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

Value = TypeVar("Value")

PRECISIONS = {"auto": 0, "float32": 1, "bfloat16": 2, "fp8": 3, "float16": 4, "tf32": 5}  # DIFFUSIONZ_PRECISION_*

_MEMORY = ("weights_bytes", "lora_bytes", "shared_by", "device_bytes", "device_peak_bytes", "device_held_bytes")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


class Model:
    """A model that is loaded on a device. Subclasses say of which family, and what it does."""

    _FAMILY: ClassVar[str]
    _PRECISIONS: ClassVar[tuple[str, ...]]

    model: str
    """The model as it was asked for."""
    path: str
    """The folder or file that was loaded."""
    info: dict[str, Any]
    """What the model is; each family says more."""

    def __init__(self, model: Path, precision: str) -> None:
        """Checks what can be checked before the library is loaded."""
        self._context: Any = None
        self.model = os.fspath(model)
        self.path = locate(model, self._FAMILY)
        if precision not in self._PRECISIONS:
            raise ArgumentError(f'precision is "{precision}"; it must be one of {", ".join(self._PRECISIONS)}')

    def _load(
        self, options: Any, device: str, precision: str, threads: int, init: Any, free: Any, info: Any, memory: Any
    ) -> None:
        """Fills in the options that every family has, and loads. The last four are the family's functions."""
        import json

        from diffusionz._ffi import c_int, c_string, check, ffi, text

        options.device_id = _device_id(device)
        options.precision = PRECISIONS[precision]
        options.num_threads = c_int("threads", threads)
        path = c_string("model", self.path)

        def load() -> Any:
            out = ffi.new(ffi.typeof(init).args[2])
            check(init(path, options, out))
            return ffi.gc(out[0], free)

        self._context = _blocking.run(load)
        self.info = json.loads(text(info(self._context)))
        self._memory_info = memory

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:0"; of several "cuda:0,cuda:1"."""
        return str(self.info["device"])

    @property
    def precision(self) -> str:
        """ "float32", "bfloat16", ...: what "auto" came to."""
        return str(self.info["precision"])

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on the model's devices: "weights_bytes", shared by "shared_by" objects of the same model, and
        "lora_bytes", this object's own. Of the whole process on CUDA devices: "device_bytes" in use,
        "device_peak_bytes", the most that were, and "device_held_bytes", in use or kept for the next call."""
        from diffusionz._ffi import check, ffi

        info = ffi.new("DiffusionZMemoryInfo *", {"struct_size": ffi.sizeof("DiffusionZMemoryInfo")})
        check(self._memory_info(self._alive(), info))
        return {name: getattr(info, name) for name in _MEMORY}

    def close(self) -> None:
        """Frees the model, once calls that still run have returned. A second call is quiet."""
        # The context is freed when its last reference goes, and a running call holds one: nothing waits here, and
        # nothing is freed under a call.
        self._context = None

    def _alive(self) -> Any:
        if self._context is None:
            raise ArgumentError(f"{self!r} was closed")
        return self._context

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = f"{type(self).__name__} {self.model}"
        if self._context is None:
            return f"<{name}, closed>"
        memory = self.memory
        mebibytes = (memory["weights_bytes"] + memory["lora_bytes"]) / 2**20
        return f"<{name} on {self.device}, {self.precision}, {mebibytes:.1f} MiB>"


def watched(
    work: Callable[[Any], Value],
    on_progress: Callable[[Progress], object] | None,
    progress: bool | None,
    *,
    unit: str = "step",
    patience: float = 0.0,
    on_tick: Callable[[Any], object] | None = None,
) -> tuple[Value, Progress]:
    """(`work(task)`, where its task stood at the end), for a call of the library with a `DiffusionZTask *`.

    `on_progress` and `progress` are those of `ZImage.generate`; the bar counts in `unit`s and appears when the call has
    lasted `patience` seconds. `on_tick` is called with the task as often as `on_progress`. What either raises, and
    Ctrl-C, stop the call and are raised.
    """
    from diffusionz._ffi import ffi, lib

    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    watch = Watch(task, on_progress, progress, unit=unit, patience=patience, on_tick=on_tick)
    try:
        value = _blocking.run(
            lambda: work(task),
            tick=watch.tick if watch.wanted else None,
            cancel=lambda: lib.diffusionz_task_cancel(task),
        )
        watch.tick()
    finally:
        watch.close()
    return value, read_progress(task)


def _device_id(device: str) -> int:
    """The ABI's number for a device's name."""
    kind, colon, index = str(device).partition(":")
    if device == "auto":
        from diffusionz._ffi import lib

        return 0 if lib.diffusionz_device_count() > 0 else -1
    if device == "cpu":
        return -1
    if kind == "cuda" and (not colon or (index.isascii() and index.isdigit() and len(index) <= 4)):
        return int(index or 0)
    raise ArgumentError(f'device is "{device}"; it must be auto, cpu, cuda, or cuda:N')


def byte_count(name: str, value: int | str | None) -> int:
    """Bytes in a number or in "8GB", "7.5 GiB"; 0 for None."""
    if value is None:
        return 0
    text = str(value).strip()
    number = text.rstrip("BGIKMTbgikmt ")
    unit = text[len(number) :].strip().upper()
    try:
        count = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        count = 0.0
    if not 1 <= count < 2**63:
        raise ArgumentError(f'{name} is "{value}"; it must be bytes, or a number with a unit: 8GB, 7.5GiB, 500MB')
    return int(count)
