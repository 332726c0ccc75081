"""Services that run elsewhere, through the whole server and against a loopback double of fal.ai's queue."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from diffusionz import ArgumentError
from diffusionz.payments.prices import SERVICES
from diffusionz.server import providers
from diffusionz.server.problems import Problem
from diffusionz.server.providers.breaker import Breaker
from diffusionz.server.providers.fal import Fal, FalSettings
from diffusionz.server.providers.web import Hosts, Unanswered, Web
from diffusionz.server.settings import Settings
from tests.server.conftest import Customer, Running, Start, ended, until
from tests.server.fal_server import JPEG, KEY, MP4, PNG, FalServer, fal_server

TOTAL_S = 60.0
HASTE = {"request_s": 2.0, "download_s": 3.5, "total_s": 6.0}  # of the server that is asked for what does not come


@pytest.fixture(scope="module")
def fal() -> Iterator[FalServer]:
    with fal_server() as server:
        yield server


@pytest.fixture(scope="module")
def serve(start: Start, fal: FalServer, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """serve(*arguments, **settings of fal): a server that has the double as its provider, as a context manager; its
    log never has the key."""

    @contextlib.contextmanager
    def serving(*arguments: str, **settings: Any) -> Iterator[Running]:
        settings = {
            "base_url": fal.url, "concurrency": 40, "request_s": 30.0, "download_s": 30.0, "total_s": TOTAL_S,
            "poll_s": 0.2, "image_bytes": 100_000, "failures": 1000,
        } | settings  # fmt: skip
        config = tmp_path_factory.mktemp("settings") / "server.toml"
        config.write_text(
            "drain_s = 0.2\n[providers.fal]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items())
        )
        env = os.environ | {"FAL_KEY": KEY}
        with start(*arguments, "--config", str(config), env=env) as server:
            yield server
        log = server.log.read_text()
        assert not any(part in log for part in (KEY, *KEY.split(":"), "Traceback", "fault ")), log

    return serving


@pytest.fixture(scope="module")
def server(serve: Start) -> Iterator[Running]:
    with serve("--free") as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


# --- What works ---


def test_a_picture(client: httpx2.Client, fal: FalServer) -> None:
    answer = client.post("/api/service", json={"service": "flux_image", "prompt": "a fairy", "seed": 5})
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["service"], job["status"], job["cost"]) == ("flux_image", "completed", None)
    assert job["result"] == {
        "images": [
            {
                "url": f"/api/jobs/{job['id']}/images/0.jpeg", "b64_json": None, "width": 1024, "height": 1024,
                "seed": 5, "content_type": "image/jpeg",
            }
        ],
        "prompt": "a fairy", "steps": 4, "model": "fal-ai/flux/schnell",
    }  # fmt: skip
    file = client.get(job["result"]["images"][0]["url"])
    assert (file.content, file.headers["content-type"]) == (JPEG, "image/jpeg")
    (asked,) = fal.of("a fairy")
    assert asked.model == "fal-ai/flux/schnell"
    assert asked.arguments == {
        "prompt": "a fairy", "image_size": {"width": 1024, "height": 1024}, "num_images": 1, "num_inference_steps": 4,
        "output_format": "jpeg", "enable_safety_checker": True, "seed": 5,
    }  # fmt: skip
    assert asked.headers["x-fal-request-timeout"] == "60"
    assert fal.keys_at_media == []
    assert asked.id not in fal.cancelled


def test_several_pictures_in_fals_own_words(client: httpx2.Client, fal: FalServer) -> None:
    body = {
        "prompt": "two",
        "num_images": 2,
        "image_size": "landscape_4_3",
        "format": "png",
        "response_format": "b64_json",
    }
    job = client.post("/api/service", json={"service": "flux_image"} | body).json()
    images = job["result"]["images"]
    assert [base64.b64decode(image["b64_json"]) for image in images] == [PNG, PNG]
    assert (images[0]["width"], images[1]["url"]) == (1024, f"/api/jobs/{job['id']}/images/1.png")
    assert fal.of("two")[0].arguments["image_size"] == "landscape_4_3"


def test_the_file_is_the_body(client: httpx2.Client) -> None:
    body = {"service": "flux_image", "prompt": "raw", "seed": 3, "response_format": "binary"}
    answer = client.post("/api/service", json=body)
    assert (answer.content, answer.headers["content-type"], answer.headers["x-seed"]) == (JPEG, "image/jpeg", "3")
    del body["response_format"]
    assert client.post("/api/service", json=body, headers={"accept": "image/*"}).content == JPEG


def test_a_video(client: httpx2.Client, fal: FalServer) -> None:
    job = client.post("/api/service", json={"service": "ltx_video", "prompt": "waves", "aspect_ratio": "9:16"}).json()
    (video,) = job["result"]["videos"]
    assert video == {
        "url": f"/api/jobs/{job['id']}/videos/0.mp4", "width": 1920, "height": 1080, "duration": 6.0, "fps": 25,
        "seed": None, "content_type": "video/mp4",
    }  # fmt: skip
    file = client.get(video["url"])
    assert (file.content, file.headers["content-type"]) == (MP4, "video/mp4")
    (asked,) = fal.of("waves")
    assert asked.model == "fal-ai/ltx-2.3/text-to-video/fast"
    assert asked.arguments == {"prompt": "waves", "duration": 6, "resolution": "1080p", "aspect_ratio": "9:16"}


def test_a_video_of_a_picture(client: httpx2.Client, fal: FalServer) -> None:
    image = base64.b64encode(PNG).decode()
    answer = client.post("/api/service", json={"service": "ltx_video", "prompt": "it moves", "image": image})
    assert answer.status_code == 200, answer.text
    (asked,) = fal.of("it moves")
    assert asked.model == "fal-ai/ltx-2.3/image-to-video/fast"
    assert asked.arguments["image_url"] == f"data:image/png;base64,{image}"


def test_the_queue_there_is_progress_here(client: httpx2.Client) -> None:
    told = []
    body = {"service": "flux_image", "prompt": "watched", "stream": True}
    with client.stream("POST", "/api/service", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                data = json.loads(line[6:])
                told.append((data["type"], data.get("stage"), data.get("step"), data.get("step_count")))
    progress = [one[1:] for one in told if one[0] == "job.progress"]
    expected = [
        ("submit", 0, 0), ("provider-queue", 0, 1), ("provider-queue", 1, 1),
        ("provider", 1, 4), ("provider", 2, 4), ("provider", 3, 4), ("download", 3, 4),
    ]  # fmt: skip
    # Two that follow each other at once may be told as one.
    assert [one for one in progress if one != ("running", 0, 0)] == [one for one in expected if one in progress]
    assert {"provider-queue", "provider"} <= {one[0] for one in progress}
    assert [one[0] for one in told[-2:]] == ["image_generation.completed", "job.completed"]


def test_more_than_may_run_there_wait_here(serve: Start, fal: FalServer) -> None:
    with serve("--free", concurrency=1) as server, server.client() as client:
        first = client.post("/api/jobs", json={"service": "flux_image", "prompt": "fault never"}).json()
        until(lambda: fal.of("fault never"))
        second = client.post("/api/jobs", json={"service": "ltx_video", "prompt": "second"}).json()
        assert client.get(second["urls"]["self"]).json()["queue_position"] == 1
        assert not fal.of("second")
        client.post(first["urls"]["cancel"])
        assert ended(client, second["id"])["status"] == "completed"


# --- What is refused here ---


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"service": "flux_image"}, "prompt"),
        ({"service": "flux_image", "prompt": ""}, "prompt"),
        ({"service": "flux_image", "prompt": "x" * 5000}, "prompt"),
        ({"service": "flux_image", "prompt": "x", "widht": 512}, "widht"),
        ({"service": "flux_image", "prompt": "x", "width": 500}, "width"),
        ({"service": "flux_image", "prompt": "x", "width": 8192}, "width"),
        ({"service": "flux_image", "prompt": "x", "width": 4096, "height": 4096}, "width"),
        ({"service": "flux_image", "prompt": "x", "image_size": "huge"}, "image_size"),
        ({"service": "flux_image", "prompt": "x", "image_size": {"width": 1e9, "height": 64}}, "image_size.width"),
        ({"service": "flux_image", "prompt": "x", "image_size": "square", "width": 512}, "image_size"),
        ({"service": "flux_image", "prompt": "x", "num_images": 5}, "num_images"),
        ({"service": "flux_image", "prompt": "x", "num_images": 2, "n": 3}, "n"),
        ({"service": "flux_image", "prompt": "x", "n": 2, "response_format": "binary"}, "n"),
        ({"service": "flux_image", "prompt": "x", "steps": 13}, "steps"),
        ({"service": "flux_image", "prompt": "x", "enable_safety_checker": False}, "enable_safety_checker"),
        ({"service": "ltx_video", "prompt": "x", "duration": 8}, "duration"),
        ({"service": "ltx_video", "prompt": "x", "duration": 7}, "duration"),
        ({"service": "ltx_video", "prompt": "x", "resolution": "2160p"}, "resolution"),
        ({"service": "ltx_video", "prompt": "x", "seed": 1}, "seed"),
        ({"service": "ltx_video", "prompt": "x", "response_format": "binary"}, "response_format"),
        ({"service": "ltx_video", "prompt": "x", "image": "http://127.0.0.1/x.png"}, "image"),
        ({"service": "ltx_video", "prompt": "x", "image": "data:text/html,hi"}, "image"),
        ({"service": "ltx_video", "prompt": "x", "image": "bm8gcGljdHVyZQ=="}, "image"),
        ({"service": "ltx_video", "prompt": "x", "image": "§"}, "image"),
    ],
)
def test_a_wrong_request_is_not_passed_on(
    client: httpx2.Client, fal: FalServer, body: dict[str, Any], param: str
) -> None:
    before = len(fal.asked)
    answer = client.post("/api/service", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert len(fal.asked) == before


# --- What goes wrong there ---

DROPPED, KEPT = True, False

# fault: (status, a word of the detail, whether the request is cancelled there)
FAULTS: dict[str, tuple[int, str, bool]] = {
    "submit-drop": (502, "broke the connection off", KEPT),
    "submit-hang": (504, "did not answer", KEPT),
    "submit-500": (502, "fal failed: Internal [31m Server Error", KEPT),
    "submit-401": (502, "does not take this server's requests", KEPT),
    "submit-403": (502, "does not take this server's requests", KEPT),
    "submit-422": (400, "fal refuses it: Input is wrong", KEPT),
    "submit-429": (502, "takes no more requests", KEPT),
    "submit-malformed": (502, "not JSON", KEPT),
    "submit-elsewhere": (502, "not its own", KEPT),
    "submit-redirect": (502, "status 307", KEPT),
    "status-flaky": (200, "", KEPT),
    "status-500": (502, "Internal Server Error", DROPPED),
    "status-hang": (504, "", DROPPED),
    "status-drip": (504, "", DROPPED),
    "status-malformed": (502, "no object", DROPPED),
    "status-unknown": (502, "not known", DROPPED),
    "status-huge": (502, "more than", DROPPED),
    "never": (504, "was not done in 6 seconds", DROPPED),
    "result-policy": (400, "flagged by a content checker", KEPT),
    "result-nsfw": (400, "safety checker withheld", KEPT),
    "result-500": (502, "fal failed: The runner failed", KEPT),
    "result-html": (502, "status 502", KEPT),
    "result-downstream": (502, "Downstream", KEPT),
    "result-timeout": (504, "Request timed out", KEPT),
    "result-malformed": (502, "not JSON", KEPT),
    "result-empty": (502, "pictures that were asked for", KEPT),
    "media-404": (502, "status 404", KEPT),
    "media-flaky": (200, "", KEPT),
    "media-moved": (200, "", KEPT),
    "media-huge": (502, "more than 100000 bytes", KEPT),
    "media-endless": (502, "more than 100000 bytes", KEPT),
    "media-drip": (504, "3.5 seconds", KEPT),
    "media-html": (502, "not image/jpeg", KEPT),
    "media-lies": (502, "not image/jpeg", KEPT),
    "media-gzip": (502, "compressed", KEPT),
    "media-short": (502, "broke the connection off", KEPT),
    "media-private": (502, "not among its own", KEPT),
    "media-metadata": (502, "not among its own", KEPT),
    "media-loop": (502, "without end", KEPT),
    "media-file-url": (502, "not among its own", KEPT),
    "media-data-url": (502, "not among its own", KEPT),
}


LATE = {fault for fault, (status, *_) in FAULTS.items() if status == 504} - {"result-timeout"}


@pytest.fixture(scope="module")
def outcomes(serve: Start, server: Running, fal: FalServer) -> dict[str, httpx2.Response]:
    """The answers to all faults, which are asked for at once: most take their time. What never comes is asked of a
    server that soon gives up; on a busy machine it might give up the others, too."""
    with (
        serve("--free", **HASTE) as hasty,
        hasty.client() as impatient,
        server.client() as client,
        ThreadPoolExecutor(len(FAULTS)) as pool,
    ):

        def ask(fault: str) -> httpx2.Response:
            asked = impatient if fault in LATE else client
            return asked.post("/api/service", json={"service": "flux_image", "prompt": f"fault {fault}"})

        return dict(zip(FAULTS, pool.map(ask, FAULTS), strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault(outcomes: dict[str, httpx2.Response], fal: FalServer, fault: str) -> None:
    status, word, dropped = FAULTS[fault]
    answer = outcomes[fault]
    assert answer.status_code == status, answer.text
    timeout = "6" if fault in LATE else "60"
    asked = [one for one in fal.of(f"fault {fault}") if one.headers["x-fal-request-timeout"] == timeout]
    assert len(asked) >= 1 if fault == "never" else len(asked) == 1  # whatever happens: never asked for twice
    assert (asked[-1].id in fal.cancelled) == dropped
    assert fal.touched == [] and fal.keys_at_media == []
    assert not any(part in answer.text for part in (KEY, *KEY.split(":"), "127.0.0.1", "Exhausted"))
    if status != 200:
        problem = answer.json()
        assert word in problem["detail"] and len(problem["detail"]) < 400
        assert problem["type"] == {
            400: "/problems/invalid-request", 502: "/problems/provider-error", 504: "/problems/provider-timeout",
        }[status]  # fmt: skip
        assert problem["detail"].isprintable()
    if fault == "submit-422":
        assert answer.json()["error"]["param"] == "steps"
    if fault == "submit-429":
        assert answer.headers["retry-after"] == "7"


def test_the_operator_reads_what_users_do_not(outcomes: dict[str, httpx2.Response], server: Running) -> None:
    lines = [line["message"] for line in server.lines() if "refuses this server" in line["message"]]
    assert any("status 401: bad key …:…, …" in line or "status 401: bad key …, …" in line for line in lines)
    assert any("Exhausted balance" in line for line in lines)


# --- Cancelling ---


@pytest.mark.parametrize("stage", ["submit-slow", "never"])
def test_a_cancel_reaches_them(client: httpx2.Client, fal: FalServer, stage: str) -> None:
    before = len(fal.of(f"fault {stage}"))
    job = client.post("/api/jobs", json={"service": "flux_image", "prompt": f"fault {stage}"}).json()
    until(lambda: len(fal.of(f"fault {stage}")) > before)
    asked = fal.of(f"fault {stage}")[-1]
    if stage == "never":
        until(lambda: asked.looks)
    client.post(job["urls"]["cancel"])
    assert ended(client, job["id"])["status"] == "cancelled"
    assert asked.id in fal.cancelled  # before our job's end is told


def test_a_client_that_leaves_cancels_there(server: Running, fal: FalServer) -> None:
    before = len(fal.of("fault never"))
    with server.left("/api/service", {"service": "flux_image", "prompt": "fault never"}):
        until(lambda: len(fal.of("fault never")) > before and fal.of("fault never")[-1].looks)
    until(lambda: fal.of("fault never")[-1].id in fal.cancelled)


def test_a_server_that_stops_leaves_nothing_running_there(serve: Start, fal: FalServer) -> None:
    with serve("--free") as server, server.client() as client:
        before = len(fal.of("fault never"))
        client.post("/api/jobs", json={"service": "flux_image", "prompt": "fault never"})
        until(lambda: len(fal.of("fault never")) > before and fal.of("fault never")[-1].looks)
        assert server.stop() == 0
    assert fal.of("fault never")[-1].id in fal.cancelled


# --- The circuit ---


def test_a_breaker() -> None:
    now = [0.0]
    breaker = Breaker("x", failures=2, pause_s=10, clock=lambda: now[0])

    def job(kind: str | None) -> None:
        with contextlib.suppress(Problem), breaker.job():
            if kind is not None:
                raise Problem(kind, "")

    job("provider-error")
    job("invalid-request")  # it answered: the count begins anew
    job("provider-timeout")
    with contextlib.suppress(asyncio.CancelledError), breaker.job():
        raise asyncio.CancelledError  # says nothing
    assert not breaker.is_open
    job("provider-error")
    assert breaker.is_open
    with pytest.raises(Problem) as refused:
        breaker.check()
    assert (refused.value.kind, refused.value.retry_after_s) == ("provider-error", 10)
    now[0] = 10.0
    breaker.check()
    with breaker.job():  # half open: this one tries it, others are refused meanwhile
        with pytest.raises(Problem):
            breaker.check()
    breaker.check()
    assert not breaker.is_open
    job("provider-error")
    job("provider-error")
    now[0] = 20.0
    job("provider-error")  # the one that tried it failed
    assert breaker.is_open
    now[0] = 30.0
    with contextlib.suppress(asyncio.CancelledError), breaker.job():
        raise asyncio.CancelledError  # so did that one's client; after a pause another may
    assert breaker.is_open
    now[0] = 40.0
    assert not breaker.is_open


def test_the_circuit_opens_and_closes(serve: Start, fal: FalServer) -> None:
    body = {"service": "flux_image", "prompt": "circuit"}
    with serve("--free", failures=2, pause_s=5) as server, server.client() as client:
        fal.down = True
        try:
            assert [client.post("/api/service", json=body).status_code for _ in range(2)] == [502, 502]
        finally:
            fal.down = False
        opened = time.monotonic()
        refused = client.post("/api/service", json=body)
        assert refused.status_code == 502 and 1 <= int(refused.headers["retry-after"]) <= 5
        assert "left alone" in refused.json()["detail"] and not fal.of("circuit")
        # The other model is not to blame.
        assert client.post("/api/service", json={"service": "ltx_video", "prompt": "meanwhile"}).status_code == 200
        time.sleep(max(0.0, opened + 5.1 - time.monotonic()))
        assert client.post("/api/service", json=body).status_code == 200
        assert client.post("/api/service", json=body).status_code == 200


def test_a_provider_that_is_not_there(serve: Start) -> None:
    with serve("--free", base_url="http://127.0.0.1:9") as server, server.client() as client:
        answer = client.post("/api/service", json={"service": "flux_image", "prompt": "x"})
        assert (answer.status_code, answer.json()["detail"]) == (502, "fal cannot be reached")


@pytest.mark.parametrize(
    ("error", "calls"),
    [(httpx2.ConnectError, 3), (httpx2.ConnectTimeout, 3), (httpx2.ReadError, 1), (httpx2.WriteError, 1)],
)
def test_work_is_asked_for_again_only_while_nothing_was_sent(error: type[Exception], calls: int) -> None:
    made = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        made.append(request)
        if len(made) < 3:
            raise error("no")
        return httpx2.Response(200, stream=httpx2.ByteStream(b"{}"))

    async def go() -> None:
        web = Web(connect_s=1, connections=1, proxies=False)
        await web.close()
        web._client = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
        await web.submit("https://queue.fal.run/m", seconds=5, headers={}, content=b"{}")

    with contextlib.nullcontext() if calls == 3 else pytest.raises(Unanswered):
        asyncio.run(go())
    assert len(made) == calls


def test_an_older_model_with_other_fields() -> None:
    async def go() -> None:
        fal = {"ltx_video": "fal-ai/ltx-video", "ltx_video_from_image": "fal-ai/ltx-video/image-to-video"}
        made = Settings(free=True, providers={"fal": fal})
        async with providers.opened(made, None, {"FAL_KEY": KEY}) as (_, video):
            order = await video.order(b'{"prompt": "x", "seed": 1, "negative_prompt": "y"}')
            assert video.translated(order.request) == (
                "fal-ai/ltx-video", {"prompt": "x", "seed": 1, "negative_prompt": "y"}
            )  # fmt: skip
            with pytest.raises(Problem, match="knows no duration; it knows negative_prompt, seed"):
                await video.order(b'{"prompt": "x", "duration": 6}')

    asyncio.run(go())


# --- What it costs ---


def test_what_is_delivered_is_charged_and_nothing_else(serve: Start, fal: FalServer) -> None:
    with serve("--dev") as server:
        one = Customer(server)
        try:
            one.deposit(100)
            prices = {row["name"]: row for row in one.client.get("/api/pricing").json()["services"]}
            assert (prices["flux_image"]["usd"], prices["flux_image"]["unit"]) == ("0.04", "image")
            assert (prices["ltx_video"]["usd"], prices["ltx_video"]["first_party"]) == ("0.30", False)
            before = one.balance()["posted"]
            good = one.client.post("/api/service", json={"service": "flux_image", "prompt": "paid", "n": 2})
            assert good.status_code == 200, good.text
            cost = good.json()["cost"]
            assert (cost["usd"], cost["charged"]) == ("0.08", True)
            spent = before - one.balance()["posted"]
            assert spent == cost["tokens"] > 0
            for fault in ("submit-drop", "status-malformed", "result-policy", "media-private", "media-lies"):
                body = {"service": "flux_image", "prompt": f"fault {fault}"}
                assert one.client.post("/api/service", json=body).status_code in (400, 502)
            job = one.client.post("/api/jobs", json={"service": "flux_image", "prompt": "fault never"}).json()
            assert one.balance()["available"] < one.balance()["posted"]  # held
            one.client.post(job["urls"]["cancel"])
            assert ended(one.client, job["id"])["cost"] is None
            balance = one.balance()
            assert balance["posted"] == balance["available"] == before - spent
        finally:
            one.close()


# --- Settings, and what is not there ---


def opened(values: dict[str, Any] | None, environ: dict[str, str], prices: Any = None, **settings: Any) -> list[str]:
    async def names() -> list[str]:
        providers_ = {} if values is None else {"fal": values}
        made = Settings(providers=providers_, **({"free": True} | settings))
        async with providers.opened(made, prices, environ) as services:
            return [service.name for service in services]

    return asyncio.run(names())


def test_without_a_key_it_is_not_there() -> None:
    both = ["flux_image", "ltx_video"]
    sold = {"free": False, "payments": "payments.toml"}
    assert opened({}, {"FAL_KEY": KEY}) == both
    assert opened({}, {}) == opened({}, {"FAL_KEY": "  "}) == opened(None, {}, SERVICES, **sold) == []
    assert opened(None, {"FAL_KEY": KEY}) == []  # nobody asked for it, and nobody would pay
    assert opened(None, {"FAL_KEY": KEY}, SERVICES, **sold) == both
    assert opened({"services": ["ltx_video"]}, {"FAL_KEY": KEY}) == ["ltx_video"]
    assert opened({}, {"FAL_KEY": KEY}, {"flux_image": SERVICES["flux_image"]}) == ["flux_image"]


def test_a_server_without_a_key(start: Start) -> None:
    env = {name: value for name, value in os.environ.items() if name != "FAL_KEY"}
    with start("--free", env=env) as server, server.client() as client:
        answer = client.post("/api/service", json={"service": "flux_image", "prompt": "x"})
        assert answer.status_code == 404
        names = [row["name"] for row in client.get("/api/pricing").json()["services"]]
        assert names == ["zimage", "chronos2"]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"key": KEY}, "FAL_KEY alone"),
        ({"concurency": 3}, "did you mean concurrency?"),
        ({"concurrency": 0}, "above 0"),
        ({"total_s": "300"}, "number above 0"),
        ({"services": ["flux"]}, "there are flux_image, ltx_video"),
        ({"services": "flux_image"}, "list of strings"),
        ({"flux_image": "../../admin"}, "must be a model"),
        ({"flux_image": "fal-ai/../admin"}, "must be a model"),
        ({"base_url": "http://queue.fal.run"}, "https"),
        ({"base_url": "https://me@queue.fal.run"}, "https"),
        ({"base_url": "ftp://queue.fal.run"}, "https"),
        ({"media_hosts": ["*"]}, "name such as"),
    ],
)
def test_wrong_settings(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ArgumentError, match=word.replace("?", r"\?")) as refused:
        opened(values, {"FAL_KEY": KEY})
    assert KEY not in str(refused.value)


def test_wrong_keys_and_units() -> None:
    with pytest.raises(ArgumentError) as refused:
        opened({}, {"FAL_KEY": "two\nlines"})
    assert "two" not in str(refused.value)
    prices = {"flux_image": dataclasses.replace(SERVICES["flux_image"], unit="megapixel")}
    with pytest.raises(ArgumentError, match="counts 'image'"):
        opened({}, {"FAL_KEY": KEY}, prices)
    with pytest.raises(ArgumentError, match="there is fal"):
        asyncio.run(providers.opened(Settings(free=True, providers={"replicate": {}})).__aenter__())


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("https://fal.media/files/x.png", True),
        ("https://v3b.fal.media/files/x.png", True),
        ("https://fal.media:443/x", True),
        ("https://FAL.MEDIA/x", True),
        ("http://fal.media/x", False),
        ("https://fal.media:8443/x", False),
        ("https://fal.media.evil.example/x", False),
        ("https://notfal.media/x", False),
        ("https://evil.example/fal.media", False),
        ("https://fal.media@evil.example/x", False),
        ("https://evil.example\\.fal.media/x", False),
        ("https://evil.example\t.fal.media/x", False),
        ("https://169.254.169.254/x", False),
        ("https://[::1]/x", False),
        ("https://127.0.0.1/x", False),
        ("https://fal.media:x/", False),
        ("//fal.media/x", False),
        ("file:///etc/passwd", False),
        ("data:image/png;base64,AA", False),
        ("", False),
    ],
)
def test_where_files_are_fetched_from(url: str, may: bool) -> None:
    assert Hosts(("fal.media",)).has(url) == may


def test_the_key_is_in_no_log_line(fal: FalServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def go() -> None:
        provider = Fal(FalSettings(base_url=fal.url), KEY, loopback=True)
        hasty = Fal(FalSettings(base_url=fal.url, request_s=1.0), KEY, loopback=True)
        try:
            arguments = {"num_images": 1, "output_format": "jpeg", "image_size": "square"}
            ticket = await provider.submit("fal-ai/flux/schnell", {"prompt": "logged"} | arguments)
            while not (await provider.status(ticket)).ended:
                pass
            output = await provider.result(ticket)
            await provider.file(output["images"][0]["url"], ("image/jpeg",), 10**6)
            for fault in ("submit-401", "submit-drop", "submit-hang"):
                asked = hasty if fault == "submit-hang" else provider
                with pytest.raises(Problem) as raised:
                    await asked.submit("fal-ai/flux/schnell", {"prompt": f"fault {fault}"} | arguments)
                assert KEY not in str(raised.value) + repr(raised.value) + repr(raised.value.__cause__)
            assert KEY not in repr(provider)
        finally:
            await provider.close()
            await hasty.close()

    asyncio.run(go())
    assert caplog.records
    assert not any(part in caplog.text for part in (KEY, *KEY.split(":")))
