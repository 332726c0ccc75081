"""POST /invocations and GET /ping: the JSON that Chronos-2's own container on SageMaker speaks.

https://github.com/amazon-science/chronos-forecasting/blob/main/notebooks/deploy-chronos-to-amazon-sagemaker.ipynb

What it refuses and this does not: series of fewer than five observations, and entries of one request whose covariates
are not the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from typing import Annotated, Any

import numpy
import orjson
from msgspec import Meta, Struct, field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusionz.server import calls
from diffusionz.server.calls import json_body, json_response, state_of
from diffusionz.server.decoding import called, decode
from diffusionz.server.forecasts import Forecasts, Series, Task, to_array, to_series
from diffusionz.server.jobs import Job, Order, Result
from diffusionz.server.lanes import Lane
from diffusionz.server.problems import Problem, invalid
from diffusionz.server.schemas import ForecastBatchRequest, Number

Covariate = list[float | str | bool | None]


class Input(Struct, kw_only=True, forbid_unknown_fields=True):
    """One item: a series, or several that inform each other, and what is known beside it."""

    target: Annotated[
        list[Number | list[Number]],
        Meta(
            min_length=1,
            description="A series, oldest first; or several of one length, [targets][time]. null: missing.",
        ),
    ]
    item_id: Annotated[str | int, Meta(description="Of this item alone; its forecast carries it.")] | None = None
    start: (
        Annotated[str, Meta(max_length=40, description="Of the first value, in ISO 8601; needs parameters.freq.")]
        | None
    ) = None
    past_covariates: (
        Annotated[dict[str, Covariate], Meta(description="As long as target; numbers, or categories as strings.")]
        | None
    ) = None
    future_covariates: (
        Annotated[
            dict[str, Covariate], Meta(description="prediction_length values each; each is in past_covariates, too.")
        ]
        | None
    ) = None


class Parameters(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to forecast."""

    prediction_length: Annotated[int, Meta(ge=1, description="Steps to forecast.")] = 1
    quantile_levels: Annotated[list[float], Meta(min_length=1, description="Each over 0 and under 1.")] = field(
        default_factory=lambda: [0.1, 0.5, 0.9]
    )
    freq: (
        Annotated[
            str,
            Meta(
                max_length=20,
                description="What lies between two values, as pandas writes it: 1h, 2W; needs start in every input.",
            ),
        ]
        | None
    ) = None
    batch_size: Annotated[
        int,
        Meta(
            ge=1,
            le=2**31 - 1,
            description="Rows that inform each other at most, with cross_learning; of no account without.",
        ),
    ] = 256
    cross_learning: Annotated[bool, Meta(description="All inputs inform each other.")] = False
    predict_batches_jointly: Annotated[bool, Meta(description="The former name of cross_learning.")] = False
    model: (
        Annotated[str, Meta(max_length=200, description="A name that /v1/models lists; not of the container's.")] | None
    ) = None


class Invocation(Struct, kw_only=True, forbid_unknown_fields=True):
    """A request as Chronos-2's container on SageMaker takes it."""

    inputs: Annotated[list[Input], Meta(min_length=1)]
    parameters: Parameters = field(default_factory=Parameters)


# What a Problem of the service chronos2 calls its fields -> where they are here.
_NAMES = {
    "series": "inputs",
    "values": "inputs",
    "prediction_length": "parameters.prediction_length",
    "quantile_levels": "parameters.quantile_levels",
    "model": "parameters.model",
}


@dataclasses.dataclass(frozen=True)
class _Item:
    """An input as the engine takes it. Items of equal schemas can be one task."""

    entry: Any
    targets: int
    schema: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The tasks of a request: each with the places of its items in `inputs`."""

    invocation: Invocation
    levels: list[float]
    tasks: list[tuple[Task, list[int]]]
    starts: list[str | None]


class Invocations:
    """The service chronos2, for requests and answers in the container's words."""

    name = "chronos2"
    schema: type[Struct] = Invocation
    lane: Lane | None = None

    def __init__(self, forecasts: Forecasts) -> None:
        self._forecasts = forecasts

    async def order(self, body: bytes) -> Order:
        invocation = decode(body, Invocation)
        given, inputs = invocation.parameters, invocation.inputs
        levels = sorted(set(given.quantile_levels))
        # The options, in the words of the service.
        request = ForecastBatchRequest(
            series=[], prediction_length=given.prediction_length, quantile_levels=levels, model=given.model
        )
        with called(_NAMES):
            rows = values = 0
            for one in inputs:
                count = _targets(one)
                rows += count + len(one.past_covariates or ())
                values += sum(len(row) if isinstance(row, list) else 1 for row in one.target)
            self._forecasts.check_size(rows, values, request)
            items = [_item(one, f"inputs[{i}]", given.prediction_length) for i, one in enumerate(inputs)]
            _check_ids(inputs)
            groups: dict[tuple[Any, ...], list[int]] = {}
            for i, item in enumerate(items):
                groups.setdefault(item.schema, []).append(i)
            joint = given.cross_learning or given.predict_batches_jointly
            if joint and len(groups) > 1:
                raise invalid(
                    "with cross_learning all inputs must have as many targets and the same covariates", "inputs"
                )
            tasks = [
                (
                    self._forecasts.task(
                        request,
                        [items[i].entry for i in places],
                        [items[i].targets for i in places],
                        schema,
                        "entries",
                        given.batch_size if joint else 0,
                    ),
                    places,
                )
                for schema, places in groups.items()
            ]
        # pandas counts the steps: on a thread, as it is imported here, and takes its time.
        starts: list[str | None] = [None] * len(inputs)
        if _timed(invocation):
            starts = await asyncio.to_thread(_starts, invocation)
        return Order(self, _Plan(invocation, levels, tasks, starts), units=sum(item.targets for item in items))

    async def run(self, job: Job) -> list[bytes]:
        return [await self._forecasts.forecast(task) for task, _ in job.order.request.tasks]

    async def finish(self, job: Job, raw: list[bytes]) -> Result:
        plan: _Plan = job.order.request
        inputs = plan.invocation.inputs
        predictions: list[dict[str, Any]] = [{}] * len(inputs)
        for (_, places), answer in zip(plan.tasks, raw, strict=True):
            for i, made in zip(places, orjson.loads(answer), strict=True):
                # A target that came as a list of series is answered so, of one series, too.
                nested = _nested(inputs[i])
                of = dict(zip(plan.levels, made["quantiles"], strict=True))
                rows = {"mean": made["mean"]}
                rows |= {str(level): of[level] for level in plan.invocation.parameters.quantile_levels}
                one = {name: value if nested else value[0] for name, value in rows.items()}
                about = {"item_id": inputs[i].item_id, "start": plan.starts[i]}
                predictions[i] = one | {name: value for name, value in about.items() if value is not None}
        return Result(orjson.dumps({"predictions": predictions}))


def _nested(one: Input) -> bool:
    return isinstance(one.target[0], list)


def _targets(one: Input) -> int:
    return len(one.target) if _nested(one) else 1


def _item(one: Input, where: str, horizon: int) -> _Item:
    """Raises Problem."""
    rows: list[Any] = one.target if _nested(one) else [one.target]
    if any(not isinstance(row, list) or len(row) != len(rows[0]) for row in rows) or any(
        isinstance(value, list) for row in rows for value in row
    ):
        raise invalid(f"{where}.target must be numbers, or lists of numbers of one length", f"{where}.target")
    target = numpy.stack([to_series(row, f"{where}.target") for row in rows])
    past, future = one.past_covariates or {}, one.future_covariates or {}
    if not past and not future:
        return _Item(target if _nested(one) else target[0], len(rows), ())
    columns = {name: _column(values, len(rows[0]), f"{where}.past_covariates.{name}") for name, values in past.items()}
    ahead = {name: _column(values, horizon, f"{where}.future_covariates.{name}") for name, values in future.items()}
    for name, values in ahead.items():
        if name not in past:
            raise invalid(
                f"{where}: the covariate {name!r} has a future and no past; it must be in past_covariates, too",
                f"{where}.future_covariates.{name}",
            )
        if values.dtype != columns[name].dtype:
            raise invalid(
                f"{where}: the covariate {name!r} has numbers in one of past and future, and categories in the other",
                f"{where}.future_covariates.{name}",
            )
    entry = {"target": target if _nested(one) else target[0], "past_covariates": columns, "future_covariates": ahead}
    categories = tuple(sorted(name for name, values in columns.items() if values.dtype == object))
    schema: tuple[Any, ...] = (len(rows), tuple(sorted(past)), tuple(sorted(future)))
    if categories:
        # With one target a category becomes a mean of that item; with several, its number among all of the call. So
        # that what is forecast does not depend on the others, as in the container, those are calls of their own.
        schema += (categories, *([where] if len(rows) > 1 else []))
    return _Item(entry, len(rows), schema)


def _column(values: Covariate, length: int, where: str) -> Series | numpy.typing.NDArray[Any]:
    """float32 [length], or of categories object [length]. Raises Problem."""
    if len(values) != length:
        raise invalid(f"{where} has {len(values)} values; it must have {length}", where)
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds & {str, bool}:
        return to_array(values, where)  # type: ignore[arg-type]
    if len(kinds) > 1:
        raise invalid(f"{where} must be all numbers, or all strings", where)
    return numpy.array(values, object)


def _check_ids(inputs: list[Input]) -> None:
    seen = set()
    for i, one in enumerate(inputs):
        if one.item_id is not None and one.item_id in seen:
            raise invalid(f"item_id is {one.item_id!r} in two inputs; it must be one's alone", f"inputs[{i}].item_id")
        seen.add(one.item_id)


def _timed(invocation: Invocation) -> bool:
    """Whether the inputs have times. Raises Problem where a part of what that takes is missing."""
    freq = invocation.parameters.freq
    for i, one in enumerate(invocation.inputs):
        if (one.start is None) != (freq is None):
            raise invalid(
                "start and parameters.freq come together: freq with a start in every input, or none of them",
                f"inputs[{i}].start" if one.start is None else "parameters.freq",
            )
    return freq is not None


def _starts(invocation: Invocation) -> list[str | None]:
    """Of each item, the time of its forecast's first step. Raises Problem."""
    import pandas

    freq = invocation.parameters.freq
    try:
        step = pandas.tseries.frequencies.to_offset(freq)
    except ValueError:
        raise invalid(f"freq is {freq!r}, which pandas does not know", "parameters.freq") from None
    if step.n < 1:
        raise invalid(f"freq is {freq!r}; time must go forward", "parameters.freq")
    starts: list[str | None] = []
    for i, one in enumerate(invocation.inputs):
        try:
            first = pandas.Timestamp(datetime.datetime.fromisoformat(one.start or ""))
        except ValueError:
            raise invalid(f"start is {one.start!r}; it must be a time in ISO 8601", f"inputs[{i}].start") from None
        steps = len(one.target[0]) if _nested(one) else len(one.target)  # type: ignore[arg-type]
        try:
            # Where pandas.date_range(start, freq=freq) has its steps.
            starts.append((step.rollforward(first) + steps * step).isoformat())
        except (ValueError, OverflowError, TypeError):
            raise invalid(
                f"{steps} steps of {freq} from {one.start} are beyond what pandas counts", f"inputs[{i}].start"
            ) from None
    return starts


async def invocations(request: Request) -> Response:
    """POST /invocations"""
    state = state_of(request)
    caller = await state.callers.caller(request)
    body = await json_body(request)
    forecasts = state.service("chronos2")
    assert isinstance(forecasts, Forecasts)
    job, headers = await calls.submit(request, await Invocations(forecasts).order(body), caller, body)
    await calls.ended(request, job)
    assert job.result is not None
    return Response(job.result.json, headers=headers, media_type="application/json")


async def ping(request: Request) -> Response:
    """GET /ping: whether it takes work."""
    state = state_of(request)
    if state.jobs.draining or not state.ready:
        raise Problem("draining", "the server takes no work now", retry_after_s=5)
    return json_response({"status": "Healthy"})


def routes() -> list[Route]:
    return [Route("/invocations", invocations, methods=["POST"]), Route("/ping", ping)]
