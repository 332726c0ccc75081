"""The service chronos2: forecasts of series. Those that arrive together are one call of the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy
import orjson
from numpy.typing import NDArray

from diffusionz import Cancelled, DiffusionzError, Progress
from diffusionz.server.decoding import decode
from diffusionz.server.jobs import Job, Order, Result
from diffusionz.server.limits import Limits
from diffusionz.server.metrics import Metrics
from diffusionz.server.models import Models, parse_keep_alive
from diffusionz.server.problems import invalid
from diffusionz.server.schemas import ForecastBatchRequest, ForecastRequest
from diffusionz.server.threads import in_thread

Series = NDArray[numpy.float32]


class _Peek(msgspec.Struct):
    """Which of the two requests a body is."""

    series: msgspec.Raw = msgspec.Raw()


@dataclasses.dataclass(frozen=True)
class Task:
    """What the engine is asked for: `entries` as `Chronos2.forecast` takes them, one a forecast of the answer."""

    entries: list[Any]
    targets: list[int]  # of each entry
    levels: list[float]
    shared: tuple[Any, ...]
    """All that must be equal for two tasks to be one call. What is forecast does not depend on it being one."""
    keep_alive: float | str | None
    answer: str
    """What the result is made of: "one" series, the "targets" of one entry, "many" series, or "entries"."""
    cross_learning: int = 0
    """Entries inform each other, in batches of so many rows; 0: they do not."""

    @property
    def work(self) -> float:
        """About in proportion to the engine's time: values read and steps written."""
        horizon = self.shared[1]
        return float(sum(_values(entry) for entry in self.entries) + 16 * horizon * sum(self.targets))


class Forecasts:
    """Forecasts with the models of the family chronos2."""

    name = "chronos2"
    schema = ForecastRequest
    lane = None  # its batches take turns by themselves

    def __init__(self, models: Models, limits: Limits, metrics: Metrics) -> None:
        self._models = models
        self._limits = limits
        self._metrics = metrics
        self._batchers: dict[str, Batcher] = {}  # model -> its own: one that is being loaded holds up no other
        self._thread = ThreadPoolExecutor(1, "diffusionz-forecast")  # of all: the device does one call at a time

    async def order(self, body: bytes) -> Order:
        if decode(body, _Peek).series:
            return self.check_batch(decode(body, ForecastBatchRequest))
        return self.check(decode(body, ForecastRequest))

    def check(self, request: ForecastRequest) -> Order:
        """An order of a decoded request. Raises Problem."""
        rows: Any = request.values
        several = any(isinstance(value, list) for value in rows)
        if not several:
            rows = [rows]
        elif any(not isinstance(row, list) or len(row) != len(rows[0]) for row in rows):
            raise invalid(
                "values must be numbers, or rows of one length; rows of several lengths go as series",
                param="values",
            )
        past, future = request.past_covariates or {}, request.future_covariates or {}
        covariates = past.keys() | future.keys()
        count = sum(map(len, itertools.chain(rows, past.values(), future.values())))
        self.check_size(len(rows) + len(covariates), count, request)
        targets = numpy.stack([to_series(row, "values") for row in rows])
        if request.returns:
            for row in targets:
                _check_prices(row, request.context_length, "values")
        entry: Any = targets if len(rows) > 1 else targets[0]
        if request.constrain_ohlc and len(rows) != 4:
            raise invalid(
                f"constrain_ohlc needs four series in values, open, high, low, close; there are {len(rows)}",
                param="constrain_ohlc",
            )
        schema: tuple[Any, ...] = ()
        if covariates:
            entry, schema = self._with_covariates(request, entry, len(rows[0]))
        return self._order(request, [entry], [len(rows)], schema, "targets" if several else "one")

    def check_batch(self, request: ForecastBatchRequest) -> Order:
        """An order of a decoded batch. Raises Problem."""
        series = request.series
        self.check_size(len(series), sum(map(len, series)), request)
        arrays = [to_series(values, f"series[{i}]") for i, values in enumerate(series)]
        if request.returns:
            for i, array in enumerate(arrays):
                _check_prices(array, request.context_length, f"series[{i}]")
        if not request.constrain_ohlc:
            return self._order(request, arrays, [1] * len(arrays), (), "many")
        if len(arrays) % 4:
            raise invalid(
                f"constrain_ohlc needs series in fours, open, high, low, close; there are {len(arrays)}",
                param="series",
            )
        candles = [arrays[i : i + 4] for i in range(0, len(arrays), 4)]
        for i, candle in enumerate(candles):
            if len({len(array) for array in candle}) > 1:
                raise invalid(
                    f"series {4 * i} to {4 * i + 3} are one candle's and have different lengths",
                    param=f"series[{4 * i}]",
                )
        return self._order(request, [numpy.stack(candle) for candle in candles], [4] * len(candles), (), "many")

    def _order(
        self,
        request: ForecastRequest | ForecastBatchRequest,
        entries: list[Any],
        targets: list[int],
        schema: tuple[Any, ...],
        answer: str,
    ) -> Order:
        return Order(self, self.task(request, entries, targets, schema, answer), units=sum(targets))

    def task(
        self,
        request: ForecastRequest | ForecastBatchRequest,
        entries: list[Any],
        targets: list[int],
        schema: tuple[Any, ...],
        answer: str,
        cross_learning: int = 0,
    ) -> Task:
        """A task of checked entries, with the request's options; those of equal `schema` may be one call. Raises
        Problem."""
        spec = self._models.find(request.model, self.name)
        if request.keep_alive is not None:
            parse_keep_alive(request.keep_alive)
        levels = [float(level) for level in request.quantile_levels]
        if not all(0 < level < 1 for level in levels) or any(a >= b for a, b in itertools.pairwise(levels)):
            raise invalid(
                f"quantile_levels is {levels}; they must ascend, each over 0 and under 1",
                param="quantile_levels",
            )
        # Sorting each step's quantiles mixes the levels, so there all must be the same.
        alike = tuple(levels) if request.monotone else ()
        shared = (
            spec.name,
            request.prediction_length,
            request.context_length,
            request.monotone,
            request.constrain_ohlc,
            request.returns,
            request.trend,
            alike,
            schema,
        )
        return Task(entries, targets, levels, shared, request.keep_alive, answer, cross_learning)

    async def forecast(self, task: Task) -> bytes:
        """The JSON of the task's result."""
        name = task.shared[0]
        if name not in self._batchers:
            self._batchers[name] = Batcher(self._models, self._metrics, self._limits.rows, self._thread)
        return await self._batchers[name].forecast(task)

    def _with_covariates(
        self, request: ForecastRequest, target: Any, length: int
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        past, future = request.past_covariates or {}, request.future_covariates or {}
        for name, values in past.items():
            if len(values) != length:
                raise invalid(
                    f"the covariate {name!r} has {len(values)} values; it must have {length}, like values",
                    param=f"past_covariates.{name}",
                )
        for name, values in future.items():
            if name not in past:
                raise invalid(
                    f"the covariate {name!r} has a future and no past; it must be in past_covariates too",
                    param=f"future_covariates.{name}",
                )
            if len(values) != request.prediction_length:
                raise invalid(
                    f"the covariate {name!r} has {len(values)} future values; it must have {request.prediction_length}",
                    param=f"future_covariates.{name}",
                )
        entry = {
            "target": target,
            "past_covariates": {name: to_array(values, f"past_covariates.{name}") for name, values in past.items()},
            "future_covariates": {
                name: to_array(values, f"future_covariates.{name}") for name, values in future.items()
            },
        }
        # Entries of one call must have as many targets, and the same covariates.
        return entry, (target.size // length, tuple(sorted(past)), tuple(sorted(future)))

    def check_size(self, rows: int, values: int, request: ForecastRequest | ForecastBatchRequest) -> None:
        limits = self._limits
        for param, count, most, unit in (
            ("series", rows, limits.rows, "series and covariates"),
            ("values", values, limits.values, "values"),
            ("prediction_length", request.prediction_length, limits.horizon, "steps"),
            ("quantile_levels", len(request.quantile_levels), limits.levels, "levels"),
        ):
            if count > most:
                raise invalid(f"{count} {unit} are asked for; at most {most} are allowed", param=param)

    async def run(self, job: Job) -> bytes:
        return await self.forecast(job.order.request)

    async def finish(self, job: Job, raw: bytes) -> Result:
        return Result(raw)


@dataclasses.dataclass(eq=False)
class _Asked:
    task: Task
    answer: asyncio.Future[bytes]


class Batcher:
    """Makes one engine call of a model's tasks that are there when the engine is free.

    While it works the next tasks gather. When several came together last time, it waits a little for as many to come
    again, since clients that were answered together ask together; one that is alone never waits. A call takes as much
    as can be done in `TARGET_S`, by what the calls before took, so that nobody waits long for the others.
    """

    TARGET_S = 0.1
    WINDOW_S = 0.005  # at most, and a quarter of the last call's time

    def __init__(self, models: Models, metrics: Metrics, rows: int, thread: ThreadPoolExecutor) -> None:
        self._models = models
        self._metrics = metrics
        self._rows = rows
        self._pending: list[_Asked] = []
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = thread
        self._last_count = 1
        self._last_s = 0.0
        self._s_per_work = 0.0  # a running mean

    async def forecast(self, task: Task) -> bytes:
        """The JSON of the task's result."""
        asked = _Asked(task, asyncio.get_running_loop().create_future())
        self._pending.append(asked)
        self._arrived.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await asked.answer

    async def _work(self) -> None:
        while self._pending:
            if self._last_count > 1:
                await self._gather()
            batch = self._take()
            if batch:
                await self._answer(batch)

    async def _gather(self) -> None:
        """Waits a little for as many tasks as came last time."""
        try:
            async with asyncio.timeout(min(self.WINDOW_S, self._last_s / 4)):
                while len(self._pending) < self._last_count:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass

    def _take(self) -> list[_Asked]:
        """The oldest task with all that can be done beside it."""
        self._pending = [asked for asked in self._pending if not asked.answer.done()]  # the others were cancelled
        batch: list[_Asked] = []
        rest: list[_Asked] = []
        work, rows = 0.0, 0
        for asked in self._pending:
            task = asked.task
            fits = not batch or (
                task.shared == batch[0].task.shared
                and not (task.cross_learning or batch[0].task.cross_learning)
                and rows + sum(task.targets) <= self._rows
                and (work + task.work) * self._s_per_work <= self.TARGET_S
            )
            if fits:
                batch.append(asked)
                work, rows = work + task.work, rows + sum(task.targets)
            else:
                rest.append(asked)
        self._pending = rest
        return batch

    async def _answer(self, batch: list[_Asked]) -> None:
        """Runs a batch; nothing that goes wrong leaves anybody waiting."""
        self._last_count = len(batch)
        try:
            task = batch[0].task
            async with self._models.use(
                task.shared[0],
                next((asked.task.keep_alive for asked in batch if asked.task.keep_alive is not None), None),
            ) as model:
                answers = await self._call(model, batch)
        except Exception as error:
            answers = [error] * len(batch)
        for asked, answer in zip(batch, answers, strict=True):
            if asked.answer.done():
                continue
            if isinstance(answer, BaseException):
                asked.answer.set_exception(answer)
            else:
                asked.answer.set_result(answer)

    async def _call(self, model: Any, batch: list[_Asked]) -> list[bytes | Exception]:
        stop = threading.Event()

        def on_progress(_: Progress) -> None:
            if stop.is_set():
                raise Cancelled("nobody waits for the forecast any more")

        def gone(_: object) -> None:
            if all(asked.answer.cancelled() for asked in batch):
                stop.set()

        for asked in batch:
            asked.answer.add_done_callback(gone)
        tasks = [asked.task for asked in batch]
        work = sum(task.work for task in tasks)
        # What takes longer than a moment is watched, so that it can be stopped; watching has its price.
        watch = on_progress if work * self._s_per_work > self.TARGET_S or not self._s_per_work else None

        def call() -> tuple[list[bytes], float]:
            began = time.perf_counter()
            return forecast(model, tasks, watch), time.perf_counter() - began

        try:
            made, self._last_s = await in_thread(self._thread, call, stop)
        except (DiffusionzError, MemoryError) as error:
            if len(batch) == 1:
                return [error]
            # One task's fault, or too many for the memory, is not the others': each by itself.
            waiting = [[asked] if not asked.answer.done() else [] for asked in batch]
            return [(await self._call(model, alone))[0] if alone else error for alone in waiting]
        mean = self._s_per_work or self._last_s / work
        self._s_per_work = mean + 0.2 * (self._last_s / work - mean)
        self._metrics.batch_series.observe(sum(sum(task.targets) for task in tasks))
        return list(made)


def forecast(model: Any, tasks: list[Task], on_progress: Any = None) -> list[bytes]:
    """The JSON of each task's result, by one call of the engine; all have the same `shared`."""
    _, horizon, context_length, monotone, constrain_ohlc, returns, trend, _, _ = tasks[0].shared
    levels = sorted({level for task in tasks for level in task.levels})
    made = model.forecast(
        [entry for task in tasks for entry in task.entries],
        horizon,
        levels,
        context_length=context_length,
        monotone=monotone,
        constrain_ohlc=constrain_ohlc,
        returns=returns,
        cross_learning=tasks[0].cross_learning > 0,
        batch_size=tasks[0].cross_learning or 256,
        on_progress=on_progress,
        progress=False,
    )
    place = {level: i for i, level in enumerate(levels)}
    quantiles, means = made.quantiles, made.mean
    sentences = []
    if any(task.answer != "entries" for task in tasks):
        sentences = [
            line.removeprefix(f"{name}: ") for name, line in zip(made.names(), made.summary().split("\n"), strict=True)
        ]
    trends = made.trend if trend else None
    trends = [trends] if isinstance(trends, str) else trends

    def shown(i: int, levels: list[float]) -> dict[str, Any]:
        about = {
            "mean": means[i],
            "quantiles": {str(level): quantiles[i, place[level]] for level in levels},
            "prediction_length": horizon,
            "summary": sentences[i],
        }
        return about | ({"trend": trends[i]} if trends else {})

    answers, start = [], 0
    for task in tasks:
        begin, start = start, start + sum(task.targets)
        if task.answer == "entries":
            answers.append(
                _entries(task, means[begin:start], quantiles[begin:start, [place[level] for level in task.levels]])
            )
            continue
        parts = [shown(i, task.levels) for i in range(begin, start)]
        if task.answer == "one":
            value: Any = parts[0]
        elif task.answer == "targets":
            value = {
                name: [part[name] for part in parts]
                for name in parts[0]
                if name not in ("quantiles", "prediction_length")
            }
            value["quantiles"] = {key: [part["quantiles"][key] for part in parts] for key in parts[0]["quantiles"]}
            value["prediction_length"] = horizon
        else:
            value = {"results": parts}
        answers.append(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
    return answers


def _entries(task: Task, means: Series, quantiles: Series) -> bytes:
    """[{"mean": [targets][steps], "quantiles": [levels][targets][steps]}, ...], one an entry."""
    ends = list(itertools.accumulate(task.targets, initial=0))
    value = [
        {
            "mean": numpy.ascontiguousarray(means[a:b]),
            "quantiles": numpy.ascontiguousarray(quantiles[a:b].swapaxes(0, 1)),
        }
        for a, b in itertools.pairwise(ends)
    ]
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def to_array(values: list[float | None], param: str) -> Series:
    """float32 [time]; NaN where a value is null. Raises Problem for a value that is no float32."""
    with numpy.errstate(over="ignore"):
        array = numpy.array(values, numpy.float32)  # None becomes NaN
    if numpy.isinf(array).any():
        raise invalid(f"{param} has a value beyond float32's range, about 3.4e38", param=param)
    return array


def to_series(values: list[float | None], param: str) -> Series:
    """As `to_array`; something must have been observed."""
    array = to_array(values, param)
    if not len(array) or numpy.isnan(array).all():
        raise invalid(f"{param} has no values; one at least must be there", param=param)
    return array


def _check_prices(array: Series, context_length: int | None, param: str) -> None:
    """Raises Problem for what has no returns. As the engine does, but before anything is held."""
    read = array if context_length is None else array[-context_length - 1 :]
    if (read <= 0).any():
        raise invalid(f"{param} has a price that is not over 0, which has no returns", param=param)
    if len(read) < 2 or numpy.isnan(read[-1]):
        raise invalid(f"{param} needs two prices at least, the last one among them, for returns", param=param)


def _values(entry: Any) -> int:
    if isinstance(entry, dict):
        return _values(entry["target"]) + sum(map(len, entry["past_covariates"].values()))
    return int(entry.size)
