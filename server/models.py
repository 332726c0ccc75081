"""The models that are served: loaded when first asked for, let go after a while, several at once within a budget.

    async with models.use("zimage-demo", keep_alive=None) as model:
        ...                     # it is loaded, and stays so until here

However many wait for a model, it is loaded once. Under the memory budget the one that was used longest ago makes room;
one that is in use never does. keep_alive is Ollama's: seconds or "10m" after the last use, 0 for at once, negative for
never.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from diffusionz import Chronos2, DiffusionzError, ZImage
from diffusionz.hub import locate
from diffusionz.server.problems import Problem, invalid

if TYPE_CHECKING:
    from diffusionz.server.metrics import Metrics

logger = logging.getLogger(__name__)

FAMILIES: dict[str, type[ZImage] | type[Chronos2]] = {"zimage": ZImage, "chronos2": Chronos2}
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_YEAR_S = 366 * 86400.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A model that can be served: its name, its family, what is loaded, and how (arguments of the family's class)."""

    name: str
    family: str
    model: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def side_pixels(self) -> int:
        """The side of the pictures that the model draws when no size is asked for, told without loading it; 1024 where
        it cannot be told."""
        try:
            with open(os.path.join(locate(self.model, self.family), "vae", "config.json"), encoding="utf-8") as file:
                return max(int(json.load(file)["sample_size"]) // 16, 1) * 16
        except (OSError, ValueError, KeyError, DiffusionzError):
            return 1024


class _Entry:
    """A spec, and its model while it is loaded."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.model: Any = None
        self.loading: asyncio.Task[None] | None = None
        self.users = 0
        self.size = 0  # of its weights in memory, in bytes; 0: not known yet
        self.bytes = 0  # the same while they count: from before it is loaded until it is freed
        self.loaded_at = 0.0  # since 1970
        self.used_at = 0.0  # of the monotonic clock, like expires_at
        self.expires_at = math.inf
        self.keep_alive_s: float | None = None  # the server's when None

    @property
    def idle(self) -> bool:
        return self.model is not None and not self.users


class Models:
    """The models of `specs`; the first of a family is its default."""

    def __init__(
        self, specs: Iterable[Spec], metrics: Metrics, *, budget_bytes: int = 0, keep_alive_s: float = 240.0
    ) -> None:
        """budget_bytes: of all weights together; 0: no limit."""
        self._entries = {spec.name: _Entry(spec) for spec in specs}
        self.metrics = metrics
        self._budget = budget_bytes
        self._keep_alive_s = keep_alive_s
        self._room = asyncio.Lock()  # those who need room get it in the order of their asking
        self._released = asyncio.Event()  # something may have become idle
        self._reaper: asyncio.Task[None] | None = None
        # Loading and freeing block for seconds, and must not wait for a pool that pictures are encoded in.
        self._threads = ThreadPoolExecutor(2, "diffusionz-models")

    @property
    def specs(self) -> list[Spec]:
        return [entry.spec for entry in self._entries.values()]

    def find(self, name: str | None, family: str) -> Spec:
        """The model of that name, or the family's default. Raises Problem."""
        for spec in self.specs:
            if spec.family == family and name in (None, spec.name):
                return spec
        known = ", ".join(spec.name for spec in self.specs if spec.family == family) or "none"
        raise Problem("not-found", f"there is no model {name!r} of {family}; there are: {known}", param="model")

    def spec(self, name: str) -> Spec:
        """The model of that name. Raises Problem."""
        if name not in self._entries:
            raise Problem(
                "not-found", f"there is no model {name!r}; there are: {', '.join(self._entries)}", param="model"
            )
        return self._entries[name].spec

    @contextlib.asynccontextmanager
    async def use(self, name: str, keep_alive: float | str | None = None) -> AsyncIterator[Any]:
        """The loaded model, for the time of the block. Raises Problem."""
        entry = self._entries[name]
        usual = self._keep_alive_s if entry.keep_alive_s is None else entry.keep_alive_s
        seconds = usual if keep_alive is None else parse_keep_alive(keep_alive)
        entry.users += 1  # before anything is awaited: from now on it is not let go
        try:
            while entry.model is None:
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._load(entry))
                    entry.loading.add_done_callback(_seen)
                # Shielded: who leaves must not take the model from the others who wait for it.
                await asyncio.shield(entry.loading)
            yield entry.model
        finally:
            entry.users -= 1
            entry.used_at = time.monotonic()
            entry.expires_at = entry.used_at + seconds
            if not entry.users:
                self._look()

    async def load(self, name: str, keep_alive: float | str | None = None) -> None:
        """Loads a model before it is needed. Raises Problem."""
        self.spec(name)
        async with self.use(name, keep_alive):
            pass

    async def preload(self, name: str) -> None:
        """Loads a model to keep it: it stays after other calls, too, unless they say otherwise. Raises Problem."""
        self.spec(name)
        self._entries[name].keep_alive_s = math.inf
        await self.load(name)

    async def unload(self, name: str) -> None:
        """Lets a model go, now or as soon as nothing runs on it and nobody loads it. Raises Problem for an unknown
        one."""
        self.spec(name)
        entry = self._entries[name]
        while entry.users or entry.loading is not None:
            await asyncio.sleep(0.02)
        await self._free(entry, "asked")

    async def close(self) -> None:
        """Lets all go; nothing may run on them."""
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.wait([self._reaper])  # it may be about to take off what it has let go
        for entry in self._entries.values():
            if entry.loading is not None:
                await asyncio.wait([entry.loading])
            await self._free(entry, "shutdown")
        self._threads.shutdown()

    def ps(self) -> list[dict[str, Any]]:
        """What is loaded, as /api/ps shows it; expires_at is in seconds since 1970, null: never."""
        ahead = time.time() - time.monotonic()
        rows = []
        for entry in self._entries.values():
            if entry.model is None:
                continue
            memory = entry.model.memory
            on_device = memory["weights_bytes"] if entry.model.device != "cpu" else 0
            expires = None if entry.users or math.isinf(entry.expires_at) else entry.expires_at + ahead
            rows.append(
                {
                    "name": entry.spec.name,
                    "family": entry.spec.family,
                    "size": memory["weights_bytes"],
                    "size_vram": on_device,
                    "device": entry.model.device,
                    "precision": entry.model.precision,
                    "running": entry.users,
                    "expires_at": expires,
                    "loaded_at": entry.loaded_at,
                }
            )
        return rows

    # --- Parts ---

    async def _load(self, entry: _Entry) -> None:
        spec, began = entry.spec, time.monotonic()
        taken = 0
        try:
            needed = entry.size or await self._in_thread(size_bytes, spec)
            await self._make_room(entry, needed)
            taken = needed
            try:
                model = await self._in_thread(_construct, spec)
            except MemoryError:
                # What is idle may be what fills the device.
                for other in self._idle():
                    await self._free(other, "out of memory")
                model = await self._in_thread(_construct, spec)
            # In another precision than the files' it is larger, or smaller, than they are.
            entry.size = model.memory["weights_bytes"]
            entry.bytes, taken = entry.bytes + entry.size - taken, entry.size
            while self._budget and self.held_bytes > self._budget and (idle := self._idle()):
                await self._free(idle[0], "memory budget")
            if self._budget and entry.size > self._budget:
                await self._in_thread(model.close)
                raise self._too_large(entry)
            entry.model = model
            entry.loaded_at, entry.used_at = time.time(), time.monotonic()
            self.metrics.loads.labels(spec.name).observe(time.monotonic() - began)
            logger.info("model %s loaded in %.2f s", spec.name, time.monotonic() - began)
        except MemoryError as error:
            logger.error("model %s: %s", spec.name, error)
            raise Problem(
                "out-of-memory", f"the model {spec.name} does not fit in memory now", retry_after_s=30
            ) from None
        except (DiffusionzError, OSError) as error:
            logger.error("model %s: %s", spec.name, error)
            raise Problem("model-unavailable", f"the model {spec.name} cannot be loaded", retry_after_s=60) from None
        finally:
            entry.loading = None
            if entry.model is None:
                entry.bytes -= taken
            if not entry.users:  # all who waited have left
                self._look()

    async def _make_room(self, entry: _Entry, needed: int) -> None:
        """Returns when `needed` bytes are within the budget, and takes them."""
        if self._budget and needed > self._budget:
            entry.size = needed
            raise self._too_large(entry)
        async with self._room:
            while self._budget and self.held_bytes + needed > self._budget:
                idle = self._idle()
                if idle:
                    await self._free(idle[0], "memory budget")
                    continue
                self._released.clear()
                await self._released.wait()
            entry.bytes += needed  # beside what it had, while that is being freed

    def _too_large(self, entry: _Entry) -> Problem:
        size, most = entry.size / 1e9, self._budget / 1e9
        logger.error("model %s: %.2f GB of weights are over the memory budget of %.2f GB", entry.spec.name, size, most)
        return Problem(
            "model-unavailable",
            f"the model {entry.spec.name} has {size:.2f} GB of weights, the server keeps at most {most:.2f} GB",
        )

    @property
    def held_bytes(self) -> int:
        """Bytes of weights that are loaded, or being loaded."""
        return sum(entry.bytes for entry in self._entries.values())

    def _idle(self) -> list[_Entry]:
        """Loaded and not in use, the one that was used longest ago first."""
        return sorted((e for e in self._entries.values() if e.idle), key=lambda e: e.used_at)

    async def _free(self, entry: _Entry, reason: str) -> None:
        if entry.model is None or entry.users:
            return
        model, entry.model = entry.model, None
        held = entry.bytes
        try:
            # Shielded: who is cancelled while this waits for its thread must not leave the model open.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._threads, model.close))
        finally:
            entry.bytes -= held  # it may be loading anew by now
        self.metrics.evictions.labels(entry.spec.name, reason).inc()
        logger.info("model %s let go: %s", entry.spec.name, reason)
        self._released.set()

    def _look(self) -> None:
        """Something has become idle: lets those who wait for room, and the reaper, know."""
        self._released.set()
        if self._reaper is None or self._reaper.done():
            self._reaper = asyncio.create_task(self._reap())

    async def _reap(self) -> None:
        """Lets go what has expired, until nothing is left that will."""
        while True:
            waits = [entry.expires_at for entry in self._entries.values() if entry.idle]
            if not waits or math.isinf(min(waits)):
                return
            # Those that become idle meanwhile may expire earlier: it looks again now and then.
            await asyncio.sleep(max(0.0, min(min(waits) - time.monotonic(), 0.25)))
            for entry in self._idle():
                if entry.expires_at <= time.monotonic():
                    await self._free(entry, "idle")

    async def _in_thread(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


def _seen(task: asyncio.Task[None]) -> None:
    """A load's failure is told to those who wait for it; when none is left, it was logged."""
    if not task.cancelled():
        task.exception()


def parse_keep_alive(value: float | str) -> float:
    """Seconds; infinity for a negative value. Raises Problem."""
    seconds: float | None = None  # or an int beyond all floats
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    elif isinstance(value, str) and len(value) <= 32:  # beyond that the pattern would take its time
        text = value.strip().lower()
        negative, text = text.startswith("-"), text.removeprefix("-")
        if text and _DURATION.sub("", text) == "":
            seconds = sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION.findall(text))
        elif text.isascii() and text.isdecimal():
            seconds = float(text)
        if seconds is not None and negative:
            seconds = -seconds
    if seconds is None or seconds != seconds:  # NaN
        raise invalid(
            f'keep_alive is {str(value)[:40]!r}; it must be seconds, "10m", 0, or -1 for ever',
            param="keep_alive",
        )
    return math.inf if seconds < 0 or seconds > _YEAR_S else float(seconds)


def size_bytes(spec: Spec) -> int:
    """The bytes of a model's weight files, about what it will hold. Raises ModelError."""
    path = locate(spec.model, spec.family)
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
        if name.endswith(".safetensors")
    )


def _construct(spec: Spec) -> Any:
    return FAMILIES[spec.family](spec.model, **spec.options)
