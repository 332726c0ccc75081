"""Models that are served: loaded once, kept for a while, let go for others, and never under who uses them."""

from __future__ import annotations

import asyncio
import math
import pathlib
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx2
import pytest

import diffusionz
from diffusionz.server import models as module
from diffusionz.server.metrics import Metrics
from diffusionz.server.models import Models, Spec, parse_keep_alive
from diffusionz.server.problems import Problem

from .conftest import Start

PATIENCE_S = 120.0


class StandIn:
    """A model whose loading and freeing the test sees, and can hold up or make fail."""

    made: list[StandIn]
    gates: dict[str, threading.Event]  # model -> loading waits for it
    failures: dict[str, list[Exception]]  # model -> what its next loads raise
    closing: threading.Event  # freeing waits for it
    growth: dict[str, int]  # model -> its bytes in memory for each one in a file

    def __init__(self, model: str, **options: Any) -> None:
        name = pathlib.Path(model).name
        if gate := self.gates.get(name):
            assert gate.wait(PATIENCE_S)
        self.name, self.options, self.closed, self.users = name, options, False, 0
        StandIn.made.append(self)
        if self.failures.get(name):
            raise self.failures[name].pop(0)
        self.device, self.precision = options.get("device", "cpu"), "float32"
        files = sum(file.stat().st_size for file in pathlib.Path(model).glob("*.safetensors"))
        self.memory = {"weights_bytes": files * self.growth.get(name, 1)}

    def close(self) -> None:
        assert not self.users, f"{self.name} was freed under who uses it"
        assert self.closing.wait(PATIENCE_S)
        self.closed = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    monkeypatch.setattr(module, "FAMILIES", {"zimage": StandIn, "chronos2": StandIn})
    StandIn.made, StandIn.gates, StandIn.failures, StandIn.closing = [], {}, {}, threading.Event()
    StandIn.closing.set()
    StandIn.growth = {}
    yield StandIn
    for gate in StandIn.gates.values():
        gate.set()
    StandIn.closing.set()


@pytest.fixture
def make(stand_in: type[StandIn], tmp_path: pathlib.Path) -> Callable[..., Models]:
    """make("abc", size=100, budget_bytes=200): models a, b and c of 100 bytes of weights each."""

    def models(names: str, size: int = 100, **options: Any) -> Models:
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
            (tmp_path / name / "config.json").write_bytes(bytes(1000))  # no weights
        return Models((Spec(name, "zimage", str(tmp_path / name)) for name in names), Metrics(), **options)

    return models


def on(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), PATIENCE_S))  # type: ignore[arg-type]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def loaded(models: Models) -> list[str]:
    return [row["name"] for row in models.ps()]


def count(models: Models, reason: str) -> float:
    """How many were let go for a reason."""
    return sum(
        sample.value
        for metric in models.metrics.evictions.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.labels["reason"] == reason
    )


async def hold(models: Models, name: str, until: asyncio.Event, keep_alive: float | str | None = None) -> None:
    async with models.use(name, keep_alive) as model:
        assert model.name == name and not model.closed
        model.users += 1
        try:
            await until.wait()
            assert not model.closed
        finally:
            model.users -= 1


# --- keep_alive ---


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (5, 5.0), (0, 0.0), (0.5, 0.5), (-1, math.inf), (-0.5, math.inf), (10**400, math.inf), (-(10**400), math.inf),
        ("10m", 600.0), ("1h30m", 5400.0), ("1h30m10s", 5410.0), ("1.5h", 5400.0), ("250ms", 0.25), ("5s", 5.0),
        ("24h", 86400.0), ("5", 5.0), ("0", 0.0), ("-1", math.inf), ("-1m", math.inf), ("-0", 0.0), (" 10M ", 600.0),
    ],
)  # fmt: skip
def test_keep_alive_as_ollama_spells_it(value: float | str, seconds: float) -> None:
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "-",
        "m",
        "ten",
        "10 m",
        "10mm",
        "10d",
        "1e3",
        "--1",
        "m10",
        "1.5",
        "٣",
        "nan",
        "inf",
        math.nan,
        True,
        None,
    ],
)
def test_keep_alive_that_is_none(value: Any) -> None:
    with pytest.raises(Problem) as caught:
        parse_keep_alive(value)
    assert (caught.value.kind, caught.value.param) == ("invalid-request", "keep_alive")


def test_a_long_keep_alive_is_refused_before_it_is_read() -> None:
    began = time.process_time()
    for text in ("1" * 1_000_000, "1.1" * 300_000):
        with pytest.raises(Problem) as caught:
            parse_keep_alive(text)
        assert len(caught.value.detail) < 200
    assert time.process_time() - began < 5  # its pattern would have taken hours


# --- Loading ---


def test_however_many_wait_it_is_loaded_once(make: Callable[..., Models], stand_in: type[StandIn]) -> None:
    async def work() -> None:
        models = make("a")
        gate = stand_in.gates["a"] = threading.Event()
        done = asyncio.Event()
        users = [asyncio.create_task(hold(models, "a", done)) for _ in range(20)]
        await asyncio.sleep(0.05)
        users[0].cancel()  # who began the loading leaves: the others get it all the same
        await asyncio.sleep(0)
        assert models.ps() == []
        gate.set()
        await until(lambda: bool(models.ps()) and models.ps()[0]["running"] == 19)
        done.set()
        await asyncio.gather(*users[1:])
        assert users[0].cancelled() and len(stand_in.made) == 1
        async with models.use("a") as model:
            assert model is stand_in.made[0]
        await models.close()
        assert stand_in.made[0].closed and models.held_bytes == 0

    on(work)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (diffusionz.ModelError("a secret path is not there"), "model-unavailable"),
        (diffusionz.ArgumentError("no such precision"), "model-unavailable"),
        (OSError(5, "input/output error"), "model-unavailable"),
    ],
)
def test_a_failure_is_told_to_all_who_wait_and_the_next_tries_again(
    make: Callable[..., Models], stand_in: type[StandIn], error: Exception, kind: str
) -> None:
    async def work() -> None:
        models = make("a", budget_bytes=100)
        gate = stand_in.gates["a"] = threading.Event()
        stand_in.failures["a"] = [error]
        never = asyncio.Event()
        users = [asyncio.create_task(hold(models, "a", never)) for _ in range(3)]
        await asyncio.sleep(0.02)
        gate.set()
        for answer in await asyncio.gather(*users, return_exceptions=True):
            assert isinstance(answer, Problem) and answer.kind == kind and answer.retry_after_s
            assert "secret" not in answer.detail
        assert len(stand_in.made) == 1 and models.ps() == [] and models.held_bytes == 0
        async with models.use("a") as model:
            assert not model.closed
        assert len(stand_in.made) == 2 and models.held_bytes == 100
        await models.close()

    on(work)


def test_out_of_memory_lets_idle_ones_go_and_tries_once_more(
    make: Callable[..., Models], stand_in: type[StandIn]
) -> None:
    async def work() -> None:
        models, done = make("abc"), asyncio.Event()
        await models.load("a")
        used = asyncio.create_task(hold(models, "b", done))
        await until(lambda: loaded(models) == ["a", "b"])
        stand_in.failures["c"] = [diffusionz.OutOfMemoryError("the device is full")]
        await models.load("c")
        assert loaded(models) == ["b", "c"] and count(models, "out of memory") == 1
        stand_in.failures["a"] = [diffusionz.OutOfMemoryError("full"), MemoryError()]
        with pytest.raises(Problem) as caught:
            await models.load("a")
        assert caught.value.kind == "out-of-memory" and caught.value.retry_after_s == 30
        assert loaded(models) == ["b"] and models.held_bytes == 100
        done.set()
        await used
        await models.load("a")
        assert loaded(models) == ["a", "b"]
        await models.close()

    on(work)


def test_models_that_are_not_there(make: Callable[..., Models]) -> None:
    async def work() -> None:
        models = make("ab")
        for call in (models.load("x"), models.unload("x"), models.preload("x")):
            with pytest.raises(Problem) as caught:
                await call
            assert (caught.value.kind, caught.value.param) == ("not-found", "model")
            assert "a, b" in caught.value.detail
        assert models.find(None, "zimage").name == "a" and models.find("b", "zimage").name == "b"
        for name, family in ((None, "chronos2"), ("x", "zimage"), ("a", "chronos2")):
            with pytest.raises(Problem, match="there is no model"):
                models.find(name, family)
        await models.close()

    on(work)


# --- Letting go ---


def test_an_idle_model_goes_after_its_time_and_not_before(make: Callable[..., Models], stand_in: type[StandIn]) -> None:
    async def work() -> None:
        models = make("abcd", keep_alive_s=0.2)
        for name, keep_alive in (("a", None), ("b", "50ms"), ("c", 0), ("d", -1)):
            began = time.monotonic()
            await models.load(name, keep_alive)
            model = stand_in.made[-1]
            if name == "d":
                await asyncio.sleep(0.4)
                assert not model.closed and models.ps()[0]["expires_at"] is None
                continue
            await until(lambda model=model: model.closed)  # type: ignore[misc]
            assert time.monotonic() - began >= {"a": 0.2, "b": 0.05, "c": 0}[name]
        await until(lambda: loaded(models) == ["d"])
        await until(lambda: count(models, "idle") == 3)
        async with models.use("d"):  # its next use says anew how long it stays
            assert models.ps()[0]["expires_at"] is None
            began = time.time()
        assert began + 0.19 < models.ps()[0]["expires_at"] < time.time() + 0.21
        await until(lambda: stand_in.made[-1].closed)
        await models.close()

    on(work)


def test_a_model_in_use_does_not_go_however_old(make: Callable[..., Models], stand_in: type[StandIn]) -> None:
    async def work() -> None:
        models, done = make("ab", keep_alive_s=0.0), asyncio.Event()
        used = asyncio.create_task(hold(models, "a", done, 0))
        await until(lambda: loaded(models) == ["a"])
        for _ in range(3):
            await models.load("a", 0)  # a short use beside the long one
            await models.load("b", 0)
            await until(lambda: "b" not in loaded(models))
        assert loaded(models) == ["a"] and models.ps()[0]["running"] == 1
        done.set()
        await used
        await until(lambda: models.ps() == [])
        assert [model.name for model in stand_in.made] == ["a", "b", "b", "b"]
        await models.close()

    on(work)


def test_what_was_preloaded_stays_unless_a_call_says_otherwise(make: Callable[..., Models]) -> None:
    async def work() -> None:
        models = make("a", keep_alive_s=0.0)
        await models.preload("a")
        for keep_alive in (None, "1h", None):
            async with models.use("a", keep_alive):
                pass
        await asyncio.sleep(0.4)
        assert loaded(models) == ["a"] and models.ps()[0]["expires_at"] is None
        await models.load("a", 0)
        await until(lambda: models.ps() == [])
        await models.close()

    on(work)


def test_the_one_used_longest_ago_makes_room(make: Callable[..., Models]) -> None:
    async def work() -> None:
        models = make("abc", budget_bytes=200)
        for name in "aba":
            await models.load(name)
        await models.load("c")
        assert loaded(models) == ["a", "c"]
        await models.load("b")
        assert loaded(models) == ["b", "c"]
        assert count(models, "memory budget") == 2 and models.held_bytes == 200
        await models.close()

    on(work)


def test_a_model_over_the_whole_budget_is_refused_and_nothing_goes_for_it(
    make: Callable[..., Models], tmp_path: pathlib.Path
) -> None:
    async def work() -> None:
        models = make("ab", budget_bytes=150)
        (tmp_path / "b" / "more.safetensors").write_bytes(bytes(100))
        await models.load("a")
        with pytest.raises(Problem, match="GB of weights") as caught:
            await models.load("b")
        assert caught.value.kind == "model-unavailable"
        assert loaded(models) == ["a"] and models.held_bytes == 100
        await models.close()

    on(work)


def test_what_weighs_more_in_memory_than_in_its_files_counts_with_that(
    make: Callable[..., Models], stand_in: type[StandIn]
) -> None:
    """Files of bfloat16 are twice as much in float32."""

    async def work() -> None:
        models = make("abcd", budget_bytes=250)
        stand_in.growth |= {"c": 2, "d": 3}
        for name in "abc":
            await models.load(name)
        assert loaded(models) == ["c"] and models.held_bytes == 200
        await models.load("b")
        await models.load("c")
        assert loaded(models) == ["c"] and models.held_bytes == 200
        for _ in range(2):
            with pytest.raises(Problem, match="GB of weights"):
                await models.load("d")
            assert models.held_bytes in (0, 200)
        assert sum(model.name == "d" for model in stand_in.made) == 1  # known by now
        assert all(model.closed for model in stand_in.made if model.name != "c")
        await models.close()

    on(work)


def test_who_waits_for_room_gets_it_in_turn(make: Callable[..., Models], stand_in: type[StandIn]) -> None:
    async def work() -> None:
        models = make("abcd", budget_bytes=100)
        ends = {name: asyncio.Event() for name in "abcd"}
        users = {}
        for entry in models._entries.values():
            entry.size = 100  # known: else a thread finds it out, and the fastest would be the first
        for name in "acbd":
            users[name] = asyncio.create_task(hold(models, name, ends[name]))
            await asyncio.sleep(0.03)
        await until(lambda: loaded(models) == ["a"])
        users["b"].cancel()  # b is loaded in its turn all the same, and lets go at once
        for name, following in (("a", "c"), ("c", "d")):
            assert loaded(models) == [name] and models.held_bytes == 100
            ends[name].set()
            await users[name]
            await until(lambda following=following: loaded(models) == [following])  # type: ignore[misc]
        assert [model.name for model in stand_in.made if model.name != "b"] == ["a", "c", "d"]
        ends["d"].set()
        await users["d"]
        await models.close()

    on(work)


def test_a_model_asked_for_while_it_is_being_freed_counts_once(
    make: Callable[..., Models], stand_in: type[StandIn]
) -> None:
    async def work() -> None:
        models = make("a", budget_bytes=250)
        await models.load("a")
        stand_in.closing.clear()
        unloading = asyncio.create_task(models.unload("a"))
        await until(lambda: models.ps() == [])
        done = asyncio.Event()
        used = asyncio.create_task(hold(models, "a", done))
        await until(lambda: loaded(models) == ["a"])
        assert models.held_bytes == 200  # the old one is not gone yet
        stand_in.closing.set()
        await unloading
        assert models.held_bytes == 100 and loaded(models) == ["a"]
        done.set()
        await used
        await models.close()
        assert models.held_bytes == 0

    on(work)


def test_unload_waits_for_who_uses_it_and_for_who_loads_it(
    make: Callable[..., Models], stand_in: type[StandIn]
) -> None:
    async def work() -> None:
        models, done = make("a"), asyncio.Event()
        await models.unload("a")  # it is not there: fine
        gate = stand_in.gates["a"] = threading.Event()
        used = asyncio.create_task(hold(models, "a", done, -1))
        await asyncio.sleep(0.01)
        unloading = asyncio.create_task(models.unload("a"))
        await asyncio.sleep(0.05)
        assert not unloading.done()
        gate.set()
        await until(lambda: loaded(models) == ["a"])
        await asyncio.sleep(0.06)
        assert not unloading.done() and not stand_in.made[0].closed
        done.set()
        await used
        await unloading
        assert models.ps() == [] and stand_in.made[0].closed and count(models, "asked") == 1
        await models.close()

    on(work)


def test_close_lets_all_go_even_what_is_being_loaded(make: Callable[..., Models], stand_in: type[StandIn]) -> None:
    async def work() -> None:
        models = make("ab")
        await models.load("a")
        gate = stand_in.gates["b"] = threading.Event()
        loading = asyncio.create_task(models.load("b"))
        await asyncio.sleep(0.02)
        loading.cancel()
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, gate.set)
        await models.close()
        assert all(model.closed for model in stand_in.made) and len(stand_in.made) == 2
        assert models.ps() == [] and models.held_bytes == 0

    on(work)


@pytest.mark.parametrize("seed", range(4))
def test_in_any_traffic_the_budget_holds_and_nothing_goes_under_its_users(
    make: Callable[..., Models], stand_in: type[StandIn], tmp_path: pathlib.Path, seed: int
) -> None:
    async def work() -> None:
        draw = random.Random(seed)
        models = make("abcde", budget_bytes=300, keep_alive_s=0.01)
        (tmp_path / "e" / "more.safetensors").write_bytes(bytes(100))  # twice the size
        over, used, refused = [], 0, 0

        async def one() -> None:
            nonlocal used, refused
            await asyncio.sleep(draw.random() * 0.5)
            name = draw.choice("abcde")
            if draw.random() < 0.1:
                error = draw.choice([diffusionz.ModelError("gone"), diffusionz.OutOfMemoryError("full")])
                stand_in.failures.setdefault(name, []).append(error)
            try:
                async with models.use(name, draw.choice([None, 0, "20ms", -1])) as model:
                    assert model.name == name and not model.closed
                    over.append(models.held_bytes > 300)
                    model.users += 1
                    await asyncio.sleep(draw.random() * 0.01)
                    assert not model.closed
                    model.users -= 1
                used += 1
            except Problem:
                refused += 1

        await asyncio.gather(*(one() for _ in range(150)))
        assert not any(over) and used > 100 and used + refused == 150
        await models.close()
        assert models.held_bytes == 0 and models.ps() == []
        assert all(model.closed for model in stand_in.made if hasattr(model, "memory"))

    on(work)


# --- The real ones ---


def test_the_demo_models(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        specs = [
            Spec("picture", "zimage", "zimage-demo", {"device": "cpu"}),
            Spec("forecast", "chronos2", "demo", {"device": "cpu", "precision": "float32"}),
            Spec("nowhere", "zimage", "/nowhere"),
        ]
        models, began = Models(specs, Metrics()), time.time()
        assert specs[0].side_pixels == 256 and specs[2].side_pixels == 1024
        assert models.ps() == []
        async with models.use("forecast") as model:
            forecast = model.forecast([1.0, 2.0, 3.0, 4.0], 2, [0.5], progress=False)
            assert forecast.quantiles.shape == (1, 1, 2)
            (row,) = models.ps()
            assert row["running"] == 1 and row["expires_at"] is None
        before = time.time()
        await models.load("picture", "1h")
        about = {row["name"]: row for row in models.ps()}
        assert list(about) == ["picture", "forecast"]
        assert about["forecast"] | {"expires_at": 0, "loaded_at": 0, "size": 0} == {
            "name": "forecast", "family": "chronos2", "size": 0, "size_vram": 0, "device": "cpu",
            "precision": "float32", "running": 0, "expires_at": 0, "loaded_at": 0,
        }  # fmt: skip
        assert before + 3599 < about["picture"]["expires_at"] < time.time() + 3601
        assert began + 239 < about["forecast"]["expires_at"] < before + 241
        assert began - 1 < about["forecast"]["loaded_at"] <= about["picture"]["loaded_at"] < time.time() + 1
        assert models.held_bytes == sum(row["size"] for row in about.values()) > 1_000_000
        with pytest.raises(Problem, match="nowhere cannot be loaded"):
            await models.load("nowhere")
        await models.unload("picture")
        assert loaded(models) == ["forecast"]
        await models.close()

    on(work)


def test_over_http(start: Start) -> None:
    """Loading, looking and letting go, by a caller on the machine of a free server."""
    with start("--free", "--keep-alive", "1h") as server, server.client() as client:
        assert client.get("/api/ps").json() == {"models": []}
        shown = client.post("/api/load", json={"model": "chronos2-demo", "keep_alive": "-1"})
        assert shown.status_code == 200, shown.text
        assert [row["expires_at"] for row in shown.json()["models"]] == [None]
        body = {"values": [1, 2, 3], "prediction_length": 1}
        assert client.post("/forecast", json=body).status_code == 200
        (row,) = client.get("/api/ps").json()["models"]
        assert row["expires_at"] == pytest.approx(time.time() + 3600, abs=60)
        assert client.post("/forecast", json=body | {"keep_alive": 0}).status_code == 200
        deadline = time.monotonic() + PATIENCE_S
        while client.get("/api/ps").json()["models"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert client.post("/forecast", json=body).status_code == 200  # loaded again
        assert client.post("/api/unload", json={"model": "chronos2-demo"}).json() == {"models": []}
        for path, wrong, status, param in (
            ("/api/load", {"model": "nothing"}, 404, "model"),
            ("/api/unload", {"model": "nothing"}, 404, "model"),
            ("/api/load", {}, 400, "model"),
            ("/api/load", {"model": "chronos2-demo", "keep_alive": "soon"}, 400, "keep_alive"),
            ("/api/load", {"model": "chronos2-demo", "keepalive": 1}, 400, "keepalive"),
            ("/forecast", body | {"keep_alive": "1" * 100_000}, 400, "keep_alive"),
            ("/forecast", body | {"keep_alive": True}, 400, "keep_alive"),
            ("/forecast", body | {"model": "nothing"}, 404, "model"),
            ("/forecast", body | {"model": "zimage-demo"}, 404, "model"),
        ):
            answer: httpx2.Response = client.post(path, json=wrong)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
