"""Both clients against `diffusionz serve` with the bundled models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from diffusionz.client import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectionFailed,
    Event,
    IdempotencyMismatch,
    InsufficientCredit,
    InvalidRequest,
    JobPreview,
    JobProgress,
    NotFound,
    Unauthorized,
    UnexpectedAnswer,
    WaitTimeout,
)

pytest.importorskip("uvloop", reason="needs the extra `server`")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERIES = [112.0, 118, 132, 129, float("nan"), 135, 148, 148, 136, 119]
LONG = {"steps": 50, "n": 4}  # a picture that is not done soon
PATIENCE_S = 120.0


class Server:
    """A process of `diffusionz serve`."""

    def __init__(self, *options: str, log: pathlib.Path) -> None:
        self.options = options
        self.log = log
        self.start(0)

    def start(self, port: int) -> None:
        command = [sys.executable, "-m", "diffusionz", "serve", "--log", "text", "--port", str(port), *self.options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"diffusionz at (http://127.0.0.1:(\d+))", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.url, self.port = found[1], int(found[2])
        while True:  # it listens before it answers
            with contextlib.suppress(ConnectionFailed), Client(self.url, max_retries=20) as client:
                client.pricing()
                return

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server("--free", log=tmp_path_factory.mktemp("server") / "log")
    yield server
    server.stop()


@pytest.fixture
def client(make: Any, server: Server) -> Any:
    return make(server.url)


# --- The work ---


def test_the_picture_is_the_engines(client: Any, engine_demo: Any, tmp_path: pathlib.Path) -> None:
    fields = {"width": 128, "height": 128, "steps": 3, "seed": 11}
    picture = client.zimage("a red circle on a blue background", format="png", **fields)
    expected = engine_demo.generate("a red circle on a blue background", **fields)
    (tmp_path / "a.png").write_bytes(picture.content)
    from diffusionz.image import to_rgb

    rgb, *size = to_rgb(picture.content)
    assert (*size, picture.width, picture.height, picture.seed) == (128, 128, 128, 128, 11)
    assert numpy.array_equal(numpy.frombuffer(rgb, numpy.uint8), expected.pixels.ravel())
    # In WebP, and from there to PNG.
    picture = client.zimage("a red circle on a blue background", **fields)
    assert picture.content_type == "image/webp"
    picture.save(tmp_path / "b.webp")
    picture.save(tmp_path / "b.png")
    assert to_rgb(tmp_path / "b.webp")[0] == to_rgb(tmp_path / "b.png")[0]
    assert len(client.zimage("x", n=2, steps=1, width=64, height=64)) == 2
    # And on from it.
    again = client.zimage("a green circle", image=tmp_path / "b.webp", strength=0.5, steps=2, seed=1)
    assert (again.width, again.height) == (128, 128)


@pytest.fixture(scope="module")
def engine_demo() -> Iterator[Any]:
    from diffusionz import ZImage

    with ZImage("demo", device="cpu") as model:
        yield model


def test_the_forecast_is_the_engines(client: Any) -> None:
    from diffusionz import Chronos2

    levels = [0.05, 0.5, 0.95]
    with Chronos2("demo", device="cpu") as model:
        expected = model.forecast(SERIES, prediction_length=5, quantile_levels=levels)
        forecast = client.chronos2(SERIES, 5, quantile_levels=levels)
        assert forecast.mean == pytest.approx(expected.mean[0].tolist(), rel=1e-4)
        for i, level in enumerate(levels):
            assert forecast.quantile(level) == pytest.approx(expected.quantiles[0, i].tolist(), rel=1e-4)
        assert forecast.trend == expected.trend
        assert forecast.summary == expected.summary()
    several = client.chronos2(numpy.array([SERIES, SERIES[::-1]]), 3)
    assert numpy.shape(several.mean) == numpy.shape(several.quantiles["0.1"]) == (2, 3)
    assert len(several.trend) == 2
    known = {"holiday": [0.0] * 10}
    assert len(client.chronos2(SERIES, 2, past_covariates=known, future_covariates={"holiday": [1, 0]}).mean) == 2


def test_a_batch_of_candles(client: Any) -> None:
    candle = [[10.0, 11, 12, 11], [12.0, 13, 13, 12], [9.0, 10, 11, 10], [11.0, 12, 11, 11]]
    forecasts = client.chronos2_batch(candle, 4, constrain_ohlc=True)
    means = numpy.array([forecast.mean for forecast in forecasts])
    assert (means.max(0) == means[1]).all()
    assert (means.min(0) == means[2]).all()
    lengths = client.chronos2_batch([[1, 2, 3], numpy.arange(50)], 2, trend=True)
    assert [len(forecast.mean) for forecast in lengths] == [2, 2]
    assert lengths[1].trend in ("up", "down", "flat", "anomaly")


def test_progress_and_previews(client: Any) -> None:
    progress: list[JobProgress] = []
    previews: list[JobPreview] = []
    client.zimage("a red circle", steps=6, on_progress=progress.append, on_preview=previews.append)
    steps = [moment.step for moment in progress]
    assert steps == sorted(steps)
    assert progress[-1].step == progress[-1].step_count == 6
    numbers = [preview.number for preview in previews]
    assert numbers and numbers == sorted(set(numbers))
    assert all(preview.content[:4] == b"RIFF" for preview in previews)


def test_events_end_with_the_picture(client: Any) -> None:
    job = client.submit("zimage", prompt="x", steps=2, width=64, height=64)
    events: list[Event] = list(job.events())
    assert events[-1].type == "job.completed"
    assert [event.data["seed"] for event in events if event.type == "image_generation.completed"] == [job.result().seed]
    assert client.job(job.id).result().content == job.result().content
    assert job.id in [other.id for other in client.jobs()]


def test_models(client: Any) -> None:
    client.load("zimage-demo", "10m")
    assert {"zimage-demo"} <= {model["name"] for model in client.ps()}
    client.unload("zimage-demo")
    assert "zimage-demo" not in {model["name"] for model in client.ps()}


def test_models_that_can_be_asked_for(client: Any) -> None:
    assert {"zimage-demo", "chronos2-demo"} <= {model["id"] for model in client.models()}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"width": 17}, "width"),
        ({"width": 2**20}, "width"),
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"n": 1000}, "n"),
        ({"seed": -1}, "seed"),
        ({"guidance": -1}, "guidance"),
        ({"image": b"not a picture"}, "image"),
        ({"prompt": "x" * 10_000}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(client: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.zimage(**({"prompt": "x"} | fields))
    assert caught.value.param == param
    assert caught.value.request_id


def test_what_is_not_there_is_said(client: Any) -> None:
    with pytest.raises(InvalidRequest):
        client.chronos2([])
    with pytest.raises(InvalidRequest):
        client.chronos2([1, 2], prediction_length=10**6)
    with pytest.raises((InvalidRequest, NotFound), match="nope"):
        client.service("nope")
    with pytest.raises((InvalidRequest, NotFound), match="nope"):
        client.zimage("x", model="nope")
    with pytest.raises(NotFound):
        client.job("job-nope")
    with pytest.raises(NotFound, match="free"):
        client.balance()


# --- Stopping ---


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_is_cancelled_within_a_step(client: Any) -> None:
    job = client.submit("zimage", prompt="x", **LONG)
    until(lambda: job.refresh().status == "running")
    job.cancel()
    until(lambda: job.refresh().done)
    assert job.status == "cancelled"
    with pytest.raises(Cancelled):
        job.result()
    job.cancel()


def test_a_timeout_and_a_callback_cancel_it(client: Any) -> None:
    with pytest.raises(WaitTimeout) as caught:
        client.zimage("x", timeout=2, **LONG)
    until(lambda: client.job(caught.value.job_id).status == "cancelled")

    def enough(moment: JobProgress) -> None:
        if moment.step >= 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        client.zimage("x", on_progress=enough, **LONG)
    until(lambda: client.jobs()[0].status == "cancelled")


def test_ctrl_c_cancels_it(client: Any, server: Server) -> None:
    code = (
        "import sys, diffusionz\n"
        "diffusionz.Client(sys.argv[1]).zimage('x', steps=50, n=4,"
        " on_progress=lambda moment: print(moment.step, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    for line in process.stdout:
        if int(line) >= 1:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE_S)
    assert b"KeyboardInterrupt" in error
    until(lambda: client.jobs()[0].status == "cancelled")


def test_a_cancelled_task_cancels_it(server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(server.url) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.zimage("x", steps=50, n=4), 2.0)
            job = (await client.jobs())[0]
            async for event in job.events():
                assert event.type != "job.completed"
            assert job.status == "cancelled"

    asyncio.run(main())


# --- Under load, and when things break ---


def test_more_at_once_than_streams_are_allowed(server: Server) -> None:
    """Whoever gets no stream looks at its job every now and then."""

    async def main() -> None:
        async with AsyncClient(server.url) as client:
            fields = {"width": 64, "height": 64, "steps": 1}
            pictures = await asyncio.gather(*(client.zimage("x", seed=i, **fields) for i in range(48)))
            assert [picture.seed for picture in pictures] == list(range(48))
            forecasts = await asyncio.gather(*(client.chronos2([*SERIES, i], 1) for i in range(60)))
            assert len({forecast.mean[0] for forecast in forecasts}) > 50

    asyncio.run(main())


def test_a_queue_that_is_full_is_waited_for(server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(server.url, max_retries=20) as client:
            fields = {"width": 64, "height": 64, "steps": 1}
            assert len(await asyncio.gather(*(client.zimage("x", **fields) for _ in range(100)))) == 100

    asyncio.run(main())


def test_the_line_breaks(make: Any, server: Server) -> None:
    """A proxy that cuts each connection after a few kilobytes: the call ends well, and is one job."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cut = [300, 600, 900, 700, 1200]  # bytes of the answers on the next connections

        def carry(one: socket.socket, left: int) -> None:
            with one, socket.create_connection(("127.0.0.1", server.port)) as other:
                threading.Thread(target=pump, args=(one, other, 10**9), daemon=True).start()
                pump(other, one, left)

        def pump(source: socket.socket, target: socket.socket, left: int) -> None:
            with contextlib.suppress(OSError):
                while left > 0 and (data := source.recv(min(left, 200))):
                    target.sendall(data)
                    left -= len(data)
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    one, _ = listener.accept()
                    threading.Thread(target=carry, args=(one, cut.pop(0) if cut else 10**9), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        client = make(f"http://127.0.0.1:{listener.getsockname()[1]}")
        before = len(make(server.url).jobs())
        progress: list[JobProgress] = []
        picture = client.zimage("x", steps=8, on_progress=progress.append)
        assert picture.content[:4] == b"RIFF"
        assert len(make(server.url).jobs()) == before + 1 or before == 50  # as many as it lists
        assert not cut
        assert len(progress) == len(set(progress))


def test_a_server_that_is_killed_and_started_again(make: Any, tmp_path: pathlib.Path) -> None:
    server = Server("--free", log=tmp_path / "log")
    try:
        client = make(server.url, max_retries=20)
        killed: list[bool] = []

        def kill(moment: JobProgress) -> None:
            if not killed and moment.step >= 1:
                killed.append(True)
                server.stop(signal.SIGKILL)
                threading.Thread(target=server.start, args=(server.port,), daemon=True).start()

        assert client.zimage("x", steps=8, seed=3, on_progress=kill).seed == 3
        assert killed
    finally:
        server.stop()


def test_a_server_that_stops_lets_the_call_end(make: Any, tmp_path: pathlib.Path) -> None:
    server = Server("--free", log=tmp_path / "log")
    progress: list[JobProgress] = []

    def stop(moment: JobProgress) -> None:
        if not progress:
            server.process.send_signal(signal.SIGTERM)
        progress.append(moment)

    assert make(server.url).zimage("x", steps=8, seed=3, on_progress=stop).seed == 3
    assert progress[-1].step == 8
    server.process.wait(PATIENCE_S)


# --- Credit ---


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("solders", reason="needs the extra `payments`")
    server = Server("--dev", log=tmp_path_factory.mktemp("shop") / "log")
    yield server
    server.stop()


def sign_in(shop: Server) -> tuple[str, str]:
    """(address, key) of a new account."""
    import httpx2
    from solders.keypair import Keypair

    pair = Keypair()
    address = str(pair.pubkey())
    with httpx2.Client(base_url=shop.url, timeout=PATIENCE_S) as http:
        challenge = http.post("/api/sign-in/challenge", json={"address": address}).raise_for_status().json()
        signature = base64.b64encode(bytes(pair.sign_message(challenge["text"].encode()))).decode()
        about = {"address": address, "nonce": challenge["nonce"], "signature": signature}
        return address, http.post("/api/sign-in", json=about).raise_for_status().json()["api_key"]


def give(shop: Server, client: Any, tokens: int) -> None:
    import httpx2

    address = client.deposit()["address"]
    body = {"address": address, "tokens": tokens}
    httpx2.post(f"{shop.url}/api/dev/faucet", json=body, timeout=PATIENCE_S).raise_for_status()
    until(lambda: client.balance()["available"] > 0)


def test_calls_are_paid_once(make: Any, shop: Server) -> None:
    with pytest.raises(Unauthorized, match="DIFFUSIONZ_API_KEY"):
        make(shop.url).zimage("x")
    with pytest.raises(Unauthorized):
        make(shop.url, "cutedsl_wrong").balance()
    address, key = sign_in(shop)
    client = make(shop.url, key)
    with pytest.raises(InsufficientCredit, match=re.escape(f"{shop.url}/api/deposit")) as caught:
        client.zimage("x")
    assert caught.value.available == 0
    assert caught.value.needed and caught.value.needed > 0
    give(shop, client, 1_000_000)
    before = client.balance(wallet=address)["available"]
    fields: dict[str, Any] = {"width": 64, "height": 64, "steps": 1}
    picture = client.zimage("x", idempotency_key="once", **fields)
    assert picture.cost["charged"]
    paid = before - client.balance()["available"]
    assert paid == picture.cost["tokens"] == caught.value.needed
    assert client.zimage("x", idempotency_key="once", **fields).job_id == picture.job_id
    with pytest.raises(IdempotencyMismatch):
        client.zimage("y", idempotency_key="once", **fields)
    # What is refused, or cancelled, is free.
    with pytest.raises(InvalidRequest):
        client.zimage("x", width=17)
    with pytest.raises(WaitTimeout):
        client.zimage("x", timeout=2, **LONG)
    until(lambda: client.jobs()[0].status == "cancelled")
    assert client.balance()["available"] == before - paid
    lines = list(client.billing_history())
    assert lines
    assert [line["seq"] for line in lines] == sorted((line["seq"] for line in lines), reverse=True)
    # Another account's job is not there.
    stranger = make(shop.url, sign_in(shop)[1])
    with pytest.raises(NotFound):
        stranger.job(picture.job_id)
    assert stranger.jobs() == []


# --- The examples ---


def test_the_examples_of_agents_run(server: Server, tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "python" / "agents.py"), str(tmp_path)],
        env=os.environ | {"DIFFUSIONZ_URL": server.url}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "had it crashed: anomaly" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {
        "chart.webp", "card_open.webp", "card_high.webp", "card_low.webp", "card_close.webp",
    }  # fmt: skip


def test_another_program_is_told_apart(make: Any, tmp_path: pathlib.Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        client = make(f"http://127.0.0.1:{port}", max_retries=20)
        with pytest.raises((NotFound, UnexpectedAnswer), match="web page"):
            client.pricing()
        (tmp_path / "api").mkdir()
        (tmp_path / "api" / "pricing").write_text("<html><title>Not it</title></html>")
        with pytest.raises(UnexpectedAnswer, match=r"a web page \(Not it\).*DIFFUSIONZ_URL"):
            client.pricing()
    finally:
        process.terminate()
        process.wait()
