"""Forecasts that share an engine's call: each is what it would be alone, and nobody waits, or fails, for another."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

import diffusionz
from diffusionz.server import forecasts as module
from diffusionz.server import models as models_module
from diffusionz.server.forecasts import Forecasts, Task
from diffusionz.server.limits import Limits
from diffusionz.server.metrics import Metrics
from diffusionz.server.models import Models, Spec
from diffusionz.server.problems import Problem

from .conftest import PATIENCE_S, Running

SERIES = [112, 118, 132, 129, 121, 135, 148, 148, 136, 119, 104, 118]


@pytest.fixture(scope="module")
def model() -> Any:
    """The engine, to compare with."""
    with diffusionz.Chronos2("demo", device="cpu") as made:
        yield made


class Desk:
    """The service and its batcher, in a loop of the test's; `calls` is what the engine was asked for: tasks a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limits: Limits | None = None, model: str = "demo") -> None:
        self.metrics = Metrics()
        specs = [Spec("chronos2-demo", "chronos2", model, {"device": "cpu"}), Spec("gone", "chronos2", "/nowhere")]
        self.models = Models(specs, self.metrics)
        self.service = Forecasts(self.models, limits or Limits(), self.metrics)
        monkeypatch.setattr(module.Batcher, "TARGET_S", math.inf)  # a busy machine's calls are as large as others'
        self.calls: list[list[Task]] = []
        self.gate = threading.Event()
        self.gate.set()
        real = module.forecast

        def forecast(model: Any, tasks: list[Task], on_progress: Any = None) -> list[bytes]:
            self.calls.append(tasks)
            assert self.gate.wait(PATIENCE_S)
            return real(model, tasks, on_progress)

        monkeypatch.setattr(module, "forecast", forecast)

    async def ask(self, **body: Any) -> Any:
        order = await self.service.order(orjson.dumps(body))
        return orjson.loads(await self.service.forecast(order.request))

    async def refusal(self, **body: Any) -> Problem:
        with pytest.raises(Problem) as caught:
            await self.service.order(orjson.dumps(body))
        return caught.value

    def observed(self) -> tuple[float, float]:
        """(engine calls, series in them) by /metrics."""
        (metric,) = self.metrics.batch_series.collect()
        values = {sample.name: sample.value for sample in metric.samples if "bucket" not in sample.name}
        return values["diffusionz_forecast_batch_series_count"], values["diffusionz_forecast_batch_series_sum"]

    def calling(self) -> int:
        return len(self.calls)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """on(work, limits): runs work(desk)."""

    def run(work: Callable[[Desk], Awaitable[None]], limits: Limits | None = None) -> None:
        async def inside() -> None:
            desk = Desk(monkeypatch, limits)
            try:
                await asyncio.wait_for(work(desk), PATIENCE_S)
            finally:
                desk.gate.set()
                await desk.models.close()

        asyncio.run(inside())

    return run


# --- The same as alone ---


def draw_request(draw: random.Random) -> dict[str, Any]:
    """Any request of those that a client may send, with few kinds of options so that they meet in one call."""
    horizon = draw.choice([3, 3, 20])

    def series(length: int) -> list[float | None]:
        level, missing = draw.uniform(1, 1000), draw.choice([0, 0, 0.2])
        values: list[float | None] = [
            None if draw.random() < missing else round(level * (1 + 0.3 * math.sin(i / 5)) + draw.uniform(0, 1), 3)
            for i in range(length)
        ]
        values[-1] = values[-1] or level
        values[0] = values[0] or level
        return values

    length = draw.choice([2, 7, 16, 50, 333])
    levels = sorted(draw.sample([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95], draw.randint(1, 4)))
    body: dict[str, Any] = {"prediction_length": horizon, "quantile_levels": levels}
    kind = draw.choice(["one", "one", "targets", "ohlc", "many", "candles", "covariates", "trend"])
    if kind in ("many", "candles"):
        count = 4 * draw.randint(1, 2) if kind == "candles" else draw.randint(1, 5)
        body["series"] = [series(length if kind == "candles" else draw.choice([2, 16, 50])) for _ in range(count)]
    else:
        targets = {"targets": draw.randint(1, 3), "ohlc": 4}.get(kind)
        body["values"] = [series(length) for _ in range(targets)] if targets else series(length)
    if kind in ("ohlc", "candles"):
        body["constrain_ohlc"] = True
    if kind == "covariates":
        body["past_covariates"] = {"x": series(length), "y": series(length)}
        body["future_covariates"] = {"x": series(horizon)}
    body["trend"] = kind == "trend"
    return body | {name: True for name in ("returns", "monotone") if draw.random() < 0.25}


def alone(model: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What the engine gives for a request by itself, one dict a series."""
    arrays = [numpy.array(row, numpy.float32) for row in body.get("series", [])]
    if not arrays:
        entry: Any = numpy.array(body["values"], numpy.float32)
        if "past_covariates" in body:
            entry = {
                "target": entry,
                "past_covariates": {k: numpy.array(v, numpy.float32) for k, v in body["past_covariates"].items()},
                "future_covariates": {k: numpy.array(v, numpy.float32) for k, v in body["future_covariates"].items()},
            }
        arrays = [entry]
    elif body.get("constrain_ohlc"):
        arrays = [numpy.stack(arrays[i : i + 4]) for i in range(0, len(arrays), 4)]
    options = {name: body.get(name, False) for name in ("monotone", "returns", "constrain_ohlc")}
    levels = body["quantile_levels"]
    made = model.forecast(arrays, body["prediction_length"], levels, progress=False, **options)
    trends = made.trend if body["trend"] else None
    trends = [trends] if isinstance(trends, str) else trends
    lines = made.summary().split("\n")
    heads = [f"{name}: " if name else "" for name in made.names()]
    return [
        {
            "mean": made.mean[i],
            "quantiles": {str(level): made.quantiles[i, place] for place, level in enumerate(levels)},
            "summary": lines[i].removeprefix(heads[i]),
        }
        | ({"trend": trends[i]} if trends else {})
        for i in range(len(made))
    ]


def same(answer: dict[str, Any], expected: dict[str, Any], horizon: int) -> None:
    """Bit by bit."""

    def bits(values: Any) -> list[int]:
        return list(numpy.array(values, numpy.float32).view(numpy.uint32))

    assert answer["prediction_length"] == horizon
    assert bits(answer["mean"]) == bits(expected["mean"])
    assert list(answer["quantiles"]) == list(expected["quantiles"])
    for level, values in expected["quantiles"].items():
        assert bits(answer["quantiles"][level]) == bits(values)
    assert answer["summary"] == expected["summary"]
    assert answer.get("trend") == expected.get("trend")


@pytest.mark.parametrize("seed", range(4))
def test_what_shares_a_call_is_bit_for_bit_what_it_is_alone(on: Callable[..., None], model: Any, seed: int) -> None:
    draw = random.Random(seed)
    bodies = [draw_request(draw) for _ in range(30)]

    async def work(desk: Desk) -> None:
        answers = await asyncio.gather(*(desk.ask(**body) for body in bodies))
        for body, answer in zip(bodies, answers, strict=True):
            expected, horizon = alone(model, body), body["prediction_length"]
            if "series" in body:
                parts = answer["results"]
            elif isinstance(body["values"][0], list):  # a list of each member, one a target
                parts = [
                    {name: answer[name][i] for name in ("mean", "summary", *(["trend"] if body["trend"] else []))}
                    | {
                        "quantiles": {level: rows[i] for level, rows in answer["quantiles"].items()},
                        "prediction_length": answer["prediction_length"],
                    }
                    for i in range(len(body["values"]))
                ]
            else:
                parts = [answer]
            assert len(parts) == len(expected)
            for part, one in zip(parts, expected, strict=True):
                same(part, one, horizon)
        assert desk.calling() < len(bodies) and max(map(len, desk.calls)) > 2
        calls, series = desk.observed()
        assert calls == desk.calling() and series == sum(sum(task.targets) for tasks in desk.calls for task in tasks)

    on(work)


def test_levels_that_look_alike_are_each_there(on: Callable[..., None]) -> None:
    async def work(desk: Desk) -> None:
        levels = [0.1234567, 0.1234568, 0.5, 1 - 1e-7]
        answer = await desk.ask(values=SERIES, quantile_levels=levels, prediction_length=2)
        assert [float(level) for level in answer["quantiles"]] == levels

    on(work)


# --- Sharing ---


def test_requests_at_once_are_one_call(on: Callable[..., None]) -> None:
    async def work(desk: Desk) -> None:
        await asyncio.gather(*(desk.ask(values=SERIES[: i + 2], prediction_length=4) for i in range(10)))
        assert desk.calling() == 1 and desk.observed() == (1, 10)

    on(work)


def test_a_lone_client_never_waits_for_others(on: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 0
    real = module.Batcher._gather

    async def gather(self: Any) -> None:
        nonlocal waited
        waited += 1
        await real(self)

    monkeypatch.setattr(module.Batcher, "_gather", gather)

    async def work(desk: Desk) -> None:
        for _ in range(5):
            await desk.ask(values=SERIES)
        assert waited == 0 and desk.calling() == 5
        await asyncio.gather(*(desk.ask(values=SERIES) for _ in range(4)))
        await desk.ask(values=SERIES)  # it may be the first of four again
        assert waited >= 1
        before = waited
        for _ in range(5):
            await desk.ask(values=SERIES)
        assert waited == before

    on(work)


def test_those_that_come_while_the_engine_works_are_the_next_call(on: Callable[..., None]) -> None:
    async def work(desk: Desk) -> None:
        await desk.ask(values=SERIES)
        desk.gate.clear()
        first = asyncio.create_task(desk.ask(values=SERIES))
        while desk.calling() < 2:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(desk.ask(values=SERIES)) for _ in range(6)]
        await asyncio.sleep(0.01)
        desk.gate.set()
        await asyncio.gather(first, *others)
        assert [len(tasks) for tasks in desk.calls] == [1, 1, 6]

    on(work)


def test_a_call_is_no_longer_than_its_time_and_its_rows(on: Callable[..., None]) -> None:
    async def work(desk: Desk) -> None:
        body: dict[str, Any] = {"series": [SERIES, SERIES, SERIES]}
        await asyncio.gather(*(desk.ask(**body) for _ in range(5)))
        assert [len(tasks) for tasks in desk.calls] == [2, 2, 1]  # of 8 series at most
        desk.calls.clear()
        batcher = desk.service._batchers["chronos2-demo"]
        batcher.TARGET_S, batcher._s_per_work = 0.1, 1.0  # as if each took minutes
        await asyncio.gather(*(desk.ask(values=SERIES) for _ in range(3)))
        assert len(desk.calls[0]) == 1

    on(work, Limits(rows=8))


def test_concurrent_clients_share_calls(free_server: Running) -> None:
    def figures(client: httpx2.Client) -> tuple[float, float]:
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
            if sample.name.startswith("diffusionz_forecast_batch_series_")
        }
        return found["diffusionz_forecast_batch_series_count"], found["diffusionz_forecast_batch_series_sum"]

    with free_server.client() as client, ThreadPoolExecutor(24) as pool:
        client.post("/forecast", json={"values": SERIES}).raise_for_status()
        calls, series = figures(client)
        # Short ones, of which also a busy machine forecasts several within the time that a call may take.
        body = {"values": [float(i % 7) for i in range(60)], "prediction_length": 8}

        def ask(_: int) -> str:
            answer = client.post("/forecast", json=body).raise_for_status().json()
            assert answer.pop("id").startswith("job-")
            return str(answer)

        answers = list(pool.map(ask, range(96)))
        assert len(set(answers)) == 1
        more_calls, more_series = figures(client)
    assert more_series - series == 96
    assert more_calls - calls < 90  # mostly ten or so; a busy machine's calls are smaller


# --- One of them ---


def test_one_that_the_engine_refuses_does_not_spoil_the_others(on: Callable[..., None], model: Any) -> None:
    async def work(desk: Desk) -> None:
        good = SERIES
        bad = await desk.service.order(orjson.dumps({"values": good}))
        bad.request.entries[0] = numpy.full(3, numpy.nan, numpy.float32)  # what check() would have refused
        answers = await asyncio.gather(
            desk.ask(values=good), desk.service.forecast(bad.request), desk.ask(values=good[:5]), return_exceptions=True
        )
        assert isinstance(answers[1], diffusionz.ArgumentError)
        for answer, values in ((answers[0], good), (answers[2], good[:5])):
            body = {"values": values, "prediction_length": 16, "quantile_levels": [0.1, 0.5, 0.9], "trend": False}
            same(answer, alone(model, body)[0], 16)
        assert [len(tasks) for tasks in desk.calls] == [3, 1, 1, 1]

    on(work)


def test_a_model_that_is_not_there_is_told_to_all_and_to_nobody_else(on: Callable[..., None]) -> None:
    async def work(desk: Desk) -> None:
        answers = await asyncio.gather(
            *(desk.ask(values=SERIES, model=name) for name in ("gone", "chronos2-demo", "gone")),
            return_exceptions=True,
        )
        assert [getattr(answer, "kind", "") for answer in answers] == ["model-unavailable", "", "model-unavailable"]
        assert isinstance(answers[1], dict)

    on(work)


def test_a_model_that_is_being_loaded_holds_up_no_other(
    on: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), models_module._construct

    def construct(spec: Spec) -> Any:
        assert spec.name != "gone" or gate.wait(PATIENCE_S)
        return real(spec)

    monkeypatch.setattr(models_module, "_construct", construct)
    monkeypatch.setattr(models_module, "size_bytes", lambda spec: 1)

    async def work(desk: Desk) -> None:
        waiting = asyncio.create_task(desk.ask(values=SERIES, model="gone"))
        await asyncio.sleep(0.01)
        assert (await desk.ask(values=SERIES))["prediction_length"] == 16
        assert not waiting.done()
        gate.set()
        with pytest.raises(Problem, match="gone cannot be loaded"):
            await waiting

    on(work)


def test_one_that_leaves_takes_nothing_from_the_others(on: Callable[..., None]) -> None:
    async def work(desk: Desk) -> None:
        expected = await desk.ask(values=SERIES)
        desk.gate.clear()
        first = [asyncio.create_task(desk.ask(values=SERIES)) for _ in range(3)]
        while desk.calling() < 2:
            await asyncio.sleep(0.001)
        second = [asyncio.create_task(desk.ask(values=SERIES)) for _ in range(3)]
        await asyncio.sleep(0.01)
        first[1].cancel()  # it is being forecast
        second[1].cancel()  # it waits
        await asyncio.sleep(0)
        desk.gate.set()
        answers = await asyncio.gather(*first, *second, return_exceptions=True)
        for i, answer in enumerate(answers):
            assert isinstance(answer, asyncio.CancelledError) if i in (1, 4) else answer == expected
        assert [len(tasks) for tasks in desk.calls] == [1, 3, 2]

    on(work)


def test_a_call_that_nobody_waits_for_any_more_stops_and_is_not_made_again(on: Callable[..., None]) -> None:
    async def work(desk: Desk) -> None:
        long = {"series": [[float(i % 9) for i in range(200)]] * 8, "prediction_length": 200}
        desk.gate.clear()
        tasks = [asyncio.create_task(desk.ask(**long)) for _ in range(2)]  # the first call ever, so it is watched
        while desk.calling() < 1:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        desk.gate.set()
        assert (await desk.ask(values=SERIES))["prediction_length"] == 16
        assert [len(tasks) for tasks in desk.calls] == [2, 1]
        assert desk.observed() == (1, 1)

    on(work)


# --- What is refused ---

ROW = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "values"),
        ({"values": []}, "values"),
        ({"values": "1,2,3"}, "values"),
        ({"values": ROW, "series": [ROW]}, "values"),
        ({"values": [None, None]}, "values"),
        ({"values": [[]]}, "values"),
        ({"values": [[1.0, 2.0], [1.0]]}, "values"),
        ({"values": [[1.0, 2.0], 3.0]}, "values"),
        ({"values": [1.0, [2.0]]}, "values"),
        ({"values": [1.0, 1e39]}, "values"),
        ({"values": [1.0, "2"]}, "values[1]"),
        ({"values": ROW * 30}, "values"),
        ({"values": ROW, "prediction_length": 0}, "prediction_length"),
        ({"values": ROW, "prediction_length": 33}, "prediction_length"),
        ({"values": ROW, "prediction_length": 1.5}, "prediction_length"),
        ({"values": ROW, "context_length": 0}, "context_length"),
        ({"values": ROW, "quantile_levels": []}, "quantile_levels"),
        ({"values": ROW, "quantile_levels": [0.5, 0.1]}, "quantile_levels"),
        ({"values": ROW, "quantile_levels": [0.5, 0.5]}, "quantile_levels"),
        ({"values": ROW, "quantile_levels": [0.0, 0.5]}, "quantile_levels"),
        ({"values": ROW, "quantile_levels": [0.5, 1.0]}, "quantile_levels"),
        ({"values": ROW, "quantile_levels": [0.1, 0.2, 0.3, 0.4, 0.5]}, "quantile_levels"),
        ({"values": ROW, "model": "nothing"}, "model"),
        ({"values": ROW, "keep_alive": "soon"}, "keep_alive"),
        ({"values": ROW, "horizon": 3}, "horizon"),
        ({"values": ROW, "constrain_ohlc": True}, "constrain_ohlc"),
        ({"values": [ROW] * 3, "constrain_ohlc": True}, "constrain_ohlc"),
        ({"values": [ROW] * 9}, "series"),
        ({"values": [1.0, -2.0, 3.0], "returns": True}, "values"),
        ({"values": [1.0, 0.0, 3.0], "returns": True}, "values"),
        ({"values": [1.0], "returns": True}, "values"),
        ({"values": [1.0, 2.0, None], "returns": True}, "values"),
        ({"values": ROW, "past_covariates": {"x": [1.0]}}, "past_covariates.x"),
        ({"values": ROW, "past_covariates": {"x": [1e39] * 4}}, "past_covariates.x"),
        ({"values": ROW, "past_covariates": {"x": ROW * 25}}, "values"),
        ({"values": ROW, "future_covariates": {"x": [1.0] * 16}}, "future_covariates.x"),
        ({"values": ROW, "past_covariates": {"x": ROW}, "future_covariates": {"x": [1.0]}}, "future_covariates.x"),
        ({"values": ROW, "past_covariates": {str(i): ROW for i in range(8)}}, "series"),
        ({"series": []}, "series"),
        ({"series": None}, "series"),
        ({"series": [ROW, []]}, "series[1]"),
        ({"series": [ROW, [None]]}, "series[1]"),
        ({"series": [ROW, [1.0, -1e39]]}, "series[1]"),
        ({"series": [[1.0]] * 9}, "series"),
        ({"series": [ROW * 13] * 2}, "values"),
        ({"series": [ROW] * 3, "constrain_ohlc": True}, "series"),
        ({"series": [ROW, ROW, ROW, [1.0], *[ROW] * 4], "constrain_ohlc": True}, "series[0]"),
        ({"series": [*[ROW] * 4, ROW, ROW, ROW, [1.0]], "constrain_ohlc": True}, "series[4]"),
        ({"series": [ROW, [1.0, -2.0]], "returns": True}, "series[1]"),
        ({"series": [ROW], "past_covariates": {"x": ROW}}, "past_covariates"),
    ],
)  # fmt: skip
def test_what_is_refused_names_its_field(on: Callable[..., None], body: dict[str, Any], param: str) -> None:
    async def work(desk: Desk) -> None:
        problem = await desk.refusal(**body)
        assert problem.status in (400, 404) and problem.param == param, problem.detail
        assert desk.calling() == 0

    on(work, Limits(rows=8, values=100, horizon=32, levels=4))


@pytest.mark.parametrize(
    ("body", "units"),
    [
        ({"values": ROW}, 1),
        ({"values": [ROW]}, 1),
        ({"values": [ROW] * 4}, 4),
        ({"values": [ROW] * 4, "constrain_ohlc": True}, 4),
        ({"values": ROW, "past_covariates": {"x": ROW, "y": ROW}}, 1),
        ({"series": [ROW] * 5}, 5),
        ({"series": [ROW] * 8, "constrain_ohlc": True}, 8),
        ({"values": ROW, "trend": True, "prediction_length": 500, "quantile_levels": [0.1, 0.2]}, 1),
        # At the edge of what is allowed, it is allowed:
        ({"values": [*[None] * 5, 1.0, None], "context_length": 10**9}, 1),
        ({"values": [-5.0, 0.0, *ROW], "returns": True, "context_length": 3}, 1),
        ({"values": [3.4e38, -3.4e38]}, 1),
    ],
)
def test_a_series_that_is_forecast_is_a_unit(on: Callable[..., None], body: dict[str, Any], units: int) -> None:
    async def work(desk: Desk) -> None:
        order = await desk.service.order(orjson.dumps(body))
        assert order.units == units
        orjson.loads(await desk.service.forecast(order.request))

    on(work)
