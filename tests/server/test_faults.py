"""What breaks: the process, the signals, the model's files, the memory, the ledger and its disk. Nothing is charged
that was not delivered, and what can go on goes on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import resource
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from diffusionz.hub import locate
from diffusionz.server.jobs import STOP_S
from tests.server.conftest import Running, Start, ended, until
from tests.server.shops import CHRONOS2, PATIENCE_S, ZIMAGE, Shop, devnet, no_traceback

PICTURE = {"service": "zimage", "prompt": "a red circle", "steps": 2}
SLOW = {"service": "zimage", "prompt": "a blue square", "steps": 50, "n": 4}
FORECAST = {"service": "chronos2", "values": [1, 2, 3, 4, 5], "prediction_length": 2}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with devnet(tmp_path_factory.mktemp("chain")) as url:
        yield url


@pytest.fixture
def shop(chain: str, tmp_path: pathlib.Path) -> Iterator[Shop]:
    """A shop of the test's own, whose books are right at the end."""
    shop = Shop(tmp_path / "shop", chain)
    yield shop
    shop.audit("--offline")


def code(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["code"]) if answer.status_code >= 400 else "ok"


# --- The process ends ---


def test_killed_under_load(shop: Shop, start: Start) -> None:
    """Clients that send again what was cut off pay for what they got, once."""
    buyer, count = shop.buyer(10_000 * CHRONOS2), 12
    delivered: list[str] = []
    doubtful: list[tuple[str, dict[str, Any]]] = []
    cut = threading.Event()

    def customer(server: Running, number: int) -> None:
        body = FORECAST if number % 3 else PICTURE
        with buyer.client(server) as client:
            for i in range(10_000):
                key = f"{number}-{i}"
                try:
                    answer = client.post("/api/service", json=body, headers={"idempotency-key": key})
                    assert answer.status_code == 200, answer.text
                    delivered.append(str(body["service"]))
                except (httpx2.TransportError, ValueError):
                    doubtful.append((key, body))
                    return
                if cut.is_set():
                    return

    with shop.serving(start) as server, concurrent.futures.ThreadPoolExecutor(count) as pool:
        tasks = [pool.submit(customer, server, number) for number in range(count)]
        until(lambda: len(delivered) >= 30)
        server.process.kill()
        cut.set()
        for task in tasks:
            task.result()
    assert doubtful, "nothing was cut off"
    shop.audit("--offline")
    with shop.serving(start) as server, buyer.client(server) as client:
        assert shop.balance(buyer)[1] == 0, "still held for calls of the server that was killed"
        for key, body in doubtful:
            answer = client.post("/api/service", json=body, headers={"idempotency-key": key})
            # Had it not come so far as to be held, it is a new one.
            if answer.status_code == 200:
                delivered.append(str(body["service"]))
            else:
                assert code(answer) == "conflict", answer.text
        no_traceback(server)
    lines = shop.lines(buyer)
    assert lines["post"] - lines["refund"] == len(delivered), (lines, Counter(delivered))
    spent = delivered.count("zimage") * ZIMAGE + delivered.count("chronos2") * CHRONOS2
    assert shop.balance(buyer)[0] == 10_000 * CHRONOS2 - spent


@pytest.mark.parametrize("drain_s", [120.0, 5.0])
def test_told_to_stop_under_load(shop: Shop, start: Start, drain_s: float) -> None:
    """With time, everybody is served; without, those who wait get their credit back, and are told."""
    buyer = shop.buyer(100 * ZIMAGE)
    much = {"steps": 10} if drain_s > 60 else {"steps": 50, "width": 512, "height": 512}
    body = {"service": "zimage", "prompt": "a star", "n": 2} | much
    told: list[str] = []
    with shop.serving(start, "--drain", str(drain_s)) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def watch(client: httpx2.Client) -> None:
            with client.stream("POST", "/api/service", json=body | {"stream": True}) as stream:
                told.extend(line for line in stream.iter_lines() if line.startswith("event: "))

        with buyer.client(server) as client, buyer.client(server) as probe:
            waiting = [pool.submit(client.post, "/api/service", json=body) for _ in range(3)]
            watching = pool.submit(watch, client)
            kept = client.post("/api/jobs", json=SLOW | {"n": 2}).json()  # it lasts while the server is looked at
            until(lambda: len(probe.get("/api/jobs").json()["jobs"]) == 5)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: probe.get("/readyz").status_code == 503)
            assert probe.get("/readyz").json()["status"] == "draining" and probe.get("/healthz").status_code == 200
            for path, sent in (("/api/service", PICTURE), ("/forecast", {"values": [1, 2]}), ("/api/jobs", FORECAST)):
                answer = probe.post(path, json=sent)
                assert (answer.status_code, code(answer)) == (503, "draining")
                assert int(answer.headers["retry-after"]) >= 1
            assert probe.get(f"/api/jobs/{kept['id']}").status_code == 200
            answers = [task.result() for task in waiting]
            watching.result()
        assert server.process.wait(PATIENCE_S) == 0
        no_traceback(server)
    lines = shop.lines(buyer)
    if drain_s > 60:
        assert {answer.status_code for answer in answers} == {200} and told[-1] == "event: job.completed"
        assert lines == {"hold": 5, "post": 5}
    else:
        assert all(code(answer) in ("ok", "cancelled") for answer in answers)
        assert told[-1] in ("event: job.completed", "event: job.cancelled")
        assert lines["hold"] == 5 and lines["void"] >= 1 and lines["post"] + lines["void"] == 5
        done = [code(answer) for answer in answers].count("ok") + (told[-1] == "event: job.completed")
        assert done <= lines["post"] <= done + 1  # nobody waited for the fifth
    assert shop.balance(buyer) == ((100 - 2 * lines["post"]) * ZIMAGE, 0)


def test_told_twice_it_stops_at_once(shop: Shop, start: Start) -> None:
    """Also with a job whose price is just being held, by a ledger that somebody else has."""
    buyer = shop.buyer(100 * ZIMAGE)
    with shop.serving(start, "--drain", "300") as server, buyer.client(server) as client:
        running = client.post("/api/jobs", json=SLOW).json()["id"]
        until(lambda: client.get(f"/api/jobs/{running}").json()["status"] == "running")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            with shop.locked():
                held = pool.submit(client.post, "/api/jobs", json=SLOW)
                with server.client() as probe:
                    until(lambda: probe.get("/readyz").json()["jobs"] == 2)
                    server.process.send_signal(signal.SIGTERM)
                    until(lambda: probe.get("/readyz").status_code == 503)  # else both signals may be one
                    server.process.send_signal(signal.SIGTERM)
                    until(lambda: "told again to stop" in server.log.read_text())
            # At once: it does not wait as long as for those who do not stop.
            assert server.process.wait(STOP_S - 1) == 0
            with contextlib.suppress(httpx2.TransportError):
                held.result()
        no_traceback(server)
    lines = shop.lines(buyer)
    assert lines["hold"] == lines["void"] == lines.total() / 2  # the second may have waited too long for the lock
    assert shop.balance(buyer) == (100 * ZIMAGE, 0)


# --- Models ---


@pytest.fixture
def models(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with copies of the demo models that may be damaged."""
    for family in ("zimage", "chronos2"):
        shutil.copytree(locate("demo", family), tmp_path / family)
    return tmp_path


def test_model_files_that_are_gone_or_damaged(models: pathlib.Path, start: Start) -> None:
    pictures, forecasts = models / "zimage", models / "chronos2"
    of_pictures = {"prompt": "a star", "steps": 1}
    of_forecasts = {"values": [1, 2, 3]}
    weights = pictures / "transformer" / "diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    with (
        start("--free", "--keep-alive", "0", "--zimage", str(pictures), "--chronos2", str(forecasts)) as server,
        server.client() as client,
    ):

        def serves(yes: bool) -> None:
            until(lambda: client.get("/api/ps").json()["models"] == [])  # it is loaded anew each time
            answer = client.post("/generate", json=of_pictures)
            assert answer.status_code == (200 if yes else 503), answer.text[:500]
            if not yes:
                assert code(answer) == "model-unavailable" and int(answer.headers["retry-after"]) >= 1
                assert str(models) not in answer.text, "where files are is the operator's to know"
            assert client.post("/forecast", json=of_forecasts).status_code == 200

        serves(True)
        pictures.rename(models / "away")
        serves(False)
        (models / "away").rename(pictures)
        serves(True)
        for damage in (good[: len(good) // 2], good[:8], b"", b"\xff" * 8 + good[8:], b"{}", good[:8] + b"{" * 100):
            weights.write_bytes(damage)
            serves(False)
        weights.unlink()
        serves(False)
        weights.mkdir()
        serves(False)
        weights.rmdir()
        weights.write_bytes(good)
        config = pictures / "transformer" / "config.json"
        about = config.read_text()
        for text in ("", "{", "[]", "{}", '{"n_layers": "x"}', about.replace(": ", ": -"), "\0" * 100):
            config.write_text(text)
            serves(False)
        config.write_text(about)
        serves(True)
        (forecasts / "model.safetensors").write_bytes(b"nothing")
        until(lambda: client.get("/api/ps").json()["models"] == [])
        assert code(client.post("/forecast", json=of_forecasts)) == "model-unavailable"
        assert client.post("/generate", json=of_pictures).status_code == 200
        no_traceback(server)


def test_models_that_do_not_fit_together(models: pathlib.Path, start: Start) -> None:
    """One makes room for the other, never under a running job, and however many wait it is loaded once."""
    shutil.copytree(models / "zimage", models / "second")
    arguments = ("--zimage", f"first={models / 'zimage'}", "--zimage", f"second={models / 'second'}")
    with (
        start("--free", *arguments, "--memory-budget", "60MB", "--keep-alive", "-1") as server,
        server.client() as client,
        concurrent.futures.ThreadPoolExecutor(16) as pool,
    ):
        long = pool.submit(client.post, "/api/service", json=SLOW | {"model": "first", "n": 1})
        until(lambda: [row["name"] for row in client.get("/api/ps").json()["models"]] == ["first"])
        short = {"service": "zimage", "prompt": "x", "steps": 1, "model": "second"}
        others = [pool.submit(client.post, "/api/service", json=short) for _ in range(12)]
        while not long.done():
            loaded = [row["name"] for row in client.get("/api/ps").json()["models"]]
            assert len(loaded) <= 1
            time.sleep(0.02)
        assert long.result().status_code == 200
        assert {other.result().status_code for other in others} == {200}
        assert [row["name"] for row in client.get("/api/ps").json()["models"]] == ["second"]
        loads = Counter(line["message"].split()[1] for line in server.lines() if " loaded in " in line["message"])
        assert loads == {"first": 1, "second": 1}
        no_traceback(server)


def test_keep_alive(start: Start) -> None:
    with start("--free", "--keep-alive", "-1") as server, server.client() as client:

        def loaded() -> dict[str, Any]:
            return {row["family"]: row["expires_at"] for row in client.get("/api/ps").json()["models"]}

        assert client.post("/forecast", json={"values": [1, 2]}).status_code == 200
        assert loaded() == {"chronos2": None}
        assert client.post("/forecast", json={"values": [1, 2], "keep_alive": "30s"}).status_code == 200
        assert 0 < loaded()["chronos2"] - time.time() <= 30
        for keep_alive, seconds in (("700ms", 0.7), (0, 0)):
            began = time.monotonic()
            assert client.post("/forecast", json={"values": [1, 2], "keep_alive": keep_alive}).status_code == 200
            until(lambda: loaded() == {})
            assert time.monotonic() - began >= seconds
        assert client.post("/api/load", json={"model": "chronos2-demo", "keep_alive": "1h"}).status_code == 200
        assert 3500 < loaded()["chronos2"] - time.time() < 3601
        assert client.post("/api/unload", json={"model": "chronos2-demo"}).status_code == 200
        assert loaded() == {}


def test_out_of_memory(shop: Shop, start: Start) -> None:
    buyer = shop.buyer(100 * ZIMAGE)
    with shop.serving(start) as server, buyer.client(server) as client:
        for body in (PICTURE, FORECAST):
            assert client.post("/api/service", json=body).status_code == 200
        status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
        size = int(status.split("VmSize:")[1].split()[0]) * 1024
        for spare in (24, 64, 96):  # MiB; LibTorch, oneDNN and the C++ runtime each say it in their own way
            resource.prlimit(server.process.pid, resource.RLIMIT_AS, (size + spare * 2**20, resource.RLIM_INFINITY))
            answer = client.post("/api/service", json=PICTURE | {"width": 2048, "height": 2048})
            assert (answer.status_code, code(answer)) == (503, "out-of-memory"), (spare, answer.text[:500])
            assert int(answer.headers["retry-after"]) >= 1 and ".cpp" not in answer.text
        rows = {"service": "chronos2", "series": [list(range(1000))] * 900, "prediction_length": 1000}
        answer = client.post("/api/service", json=rows)
        assert code(answer) in ("ok", "out-of-memory", "insufficient-credit")
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for body in (PICTURE, FORECAST):
            assert client.post("/api/service", json=body).status_code == 200
        no_traceback(server)
    lines = shop.lines(buyer)
    assert lines["hold"] == lines["post"] + lines["void"] and lines["void"] >= 1


# --- The ledger ---


@contextlib.contextmanager
def alive(server: Running) -> Iterator[list[float]]:
    """Asks for /healthz all the time; when each answer came."""
    times: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        with server.client() as client:
            while not stop.wait(0.02):
                assert client.get("/healthz").status_code == 200
                times.append(time.monotonic())

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield times
        finally:
            stop.set()
            asking.result()


def test_a_ledger_that_somebody_else_has(shop: Shop, start: Start) -> None:
    buyer, fresh, price = shop.buyer(100 * ZIMAGE), shop.buyer(7), 0
    with shop.serving(start) as server, buyer.client(server) as client, alive(server) as times:
        for body in (PICTURE, FORECAST):  # both models are loaded
            assert client.post("/api/service", json=body).status_code == 200
        price += ZIMAGE + CHRONOS2
        # For a moment: who asks waits.
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            with shop.locked():
                soon = [pool.submit(client.post, "/api/service", json=FORECAST) for _ in range(4)]
                time.sleep(0.5)
            assert {answer.result().status_code for answer in soon} == {200}
            price += 4 * CHRONOS2
            # While a picture is drawn, and a while longer than a request waits: it is charged when the lock is gone.
            drawn = client.post("/api/jobs", json=PICTURE).json()["id"]
            with shop.locked():
                began, before = time.monotonic(), len(times)
                late = [pool.submit(client.post, "/api/service", json=FORECAST) for _ in range(4)]
                for answer in (one.result() for one in late):
                    assert (answer.status_code, code(answer)) == (503, "ledger-unavailable"), answer.text
                    assert int(answer.headers["retry-after"]) >= 1
                assert time.monotonic() - began < 8
                assert len(times) - before > 10, "nobody else waits for the lock"
                assert client.get("/api/pricing").status_code == 200
                with fresh.client(server) as reader:  # a key that was never used; who only reads is served
                    assert reader.get("/api/balance").json()["posted"] == 7
                time.sleep(0.5)
            job = ended(client, drawn)
            assert job["status"] == "completed" and job["cost"]["charged"]
            price += ZIMAGE
        assert client.post("/api/service", json=FORECAST).status_code == 200
        price += CHRONOS2
        no_traceback(server)
    assert shop.balance(buyer) == (100 * ZIMAGE - price, 0)


def test_a_ledger_that_does_not_come_back_in_time(shop: Shop, start: Start) -> None:
    """What cannot be charged is not delivered; its price is given back when that can be written."""
    buyer = shop.buyer(10 * ZIMAGE)
    with shop.serving(start) as server, buyer.client(server) as client:
        assert client.post("/api/service", json=PICTURE).status_code == 200
        id = client.post("/api/jobs", json=PICTURE | {"steps": 50}).json()["id"]
        with shop.locked():
            until(lambda: " ledger: database is locked" in server.log.read_text())
        # Asked after the lock has gone: with the lock, who asks would wait behind it.
        job = ended(client, id)
        assert (job["status"], job["cost"], job["result"]) == ("failed", None, None), job
        assert job["problem"]["error"]["code"] == "ledger-unavailable"
        assert client.get(f"/api/jobs/{id}/result").status_code == 503
        assert client.post("/api/service", json=PICTURE).status_code == 200
        no_traceback(server)
    assert shop.settled(buyer, 5) == {"hold": 3, "post": 2, "void": 1}
    assert shop.balance(buyer) == (8 * ZIMAGE, 0)


def test_a_disk_that_is_full(shop: Shop, start: Start) -> None:
    """The kernel writes no file of the server's beyond a size, as if the disk had no more room."""
    buyer = shop.buyer(100 * ZIMAGE)
    with shop.serving(start) as server, buyer.client(server) as client:
        for body in (PICTURE, FORECAST):
            assert client.post("/api/service", json=body).status_code == 200
        log = pathlib.Path(f"/proc/{server.process.pid}/fd/2")
        wal = pathlib.Path(f"{shop.database}-wal")
        until(lambda: wal.stat().st_size > log.stat().st_size + 20_000 or not _spend(client))
        drawn = client.post("/api/jobs", json=PICTURE | {"steps": 50}).json()["id"]
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (wal.stat().st_size, resource.RLIM_INFINITY))
        calls = shop.calls()
        for _ in range(3):
            answer = client.post("/api/service", json=FORECAST)
            assert (answer.status_code, code(answer)) == (503, "ledger-unavailable"), answer.text
            assert client.get("/healthz").status_code == 200
        assert shop.calls() == calls and client.get("/api/balance").json()["held"] == ZIMAGE
        until(lambda: client.get(f"/api/jobs/{drawn}").json()["progress"]["stage"] == "encode")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        # What was drawn meanwhile is charged now.
        assert ended(client, drawn)["cost"]["charged"]
        assert client.post("/api/service", json=FORECAST).status_code == 200
        no_traceback(server)
    lines = shop.settled(buyer)
    assert lines["hold"] == lines["post"], lines


def _spend(client: httpx2.Client) -> bool:
    return client.post("/api/service", json=FORECAST).status_code == 200


@pytest.mark.parametrize("lost", ["folder", "database", "pepper"])
def test_a_ledger_that_is_gone(shop: Shop, start: Start, tmp_path: pathlib.Path, lost: str) -> None:
    """Its settings are there and something else is not, or is no ledger: it does not start, and says why in a line."""
    folder, settings = shop.database.parent, shop.config
    moved = {"folder": folder, "database": shop.database, "pepper": pathlib.Path(str(shop.settings.pepper_file))}[lost]
    away = tmp_path / "away"
    os.rename(moved, away)
    try:
        if lost == "folder":
            settings = str(away / "payments.toml")
        if lost == "database":
            moved.write_bytes(b"no ledger" * 1000)
        with pytest.raises(AssertionError) as failed, start("--payments", settings):
            pass
        assert "Traceback" not in str(failed.value) and moved.name in str(failed.value), failed.value
    finally:
        os.rename(away, moved)
