"""Both clients against a loopback server that breaks in every way that one can."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import pytest

import diffusionz
from diffusionz import _client_core as core
from diffusionz.client import (
    ApiError,
    ArgumentError,
    AsyncClient,
    AsyncJob,
    Cancelled,
    Client,
    Conflict,
    ConnectionFailed,
    EngineError,
    IdempotencyMismatch,
    InsufficientCredit,
    InvalidRequest,
    Job,
    JobPreview,
    JobProgress,
    NotFound,
    QueueFull,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
    WaitTimeout,
)
from tests.client.fake import KEY, WEBP, Fake, answer, drop, drop_halfway, drop_late, problem, slow

ROOT = pathlib.Path(__file__).resolve().parents[2]


def body(sent: tuple[dict[str, str], bytes]) -> dict[str, Any]:
    return dict(json.loads(sent[1]))


# --- What is said, and what comes back ---


def test_a_picture(client: Any, fake: Fake, tmp_path: pathlib.Path) -> None:
    picture = client.zimage("a cat", width=512, seed=5, negative_prompt=None, steps=4)
    assert body(fake.sent("POST /api/jobs")[0]) == {
        "service": "zimage", "prompt": "a cat", "width": 512, "seed": 5, "steps": 4,
    }  # fmt: skip
    assert (picture.seed, picture.width, picture.height) == (5, 512, 256)
    assert picture.url == f"{fake.url}/api/jobs/job-1/images/0.webp"
    assert (picture.job_id, picture.cost["usd"], picture.timings_ms["total"]) == ("job-1", "1", 3.0)
    assert not fake.sent("GET /api/jobs/ID/images/0.webp")  # fetched when asked for, and once
    assert picture.content == picture.content == WEBP
    picture.save(tmp_path / "out.webp")
    assert (tmp_path / "out.webp").read_bytes() == WEBP
    assert len(fake.sent("GET /api/jobs/ID/images/0.webp")) == 1
    with pytest.raises(ArgumentError, match=r"must end in .webp or .png"):
        picture.save(tmp_path / "out.jpg")


def test_several_pictures_are_a_list_even_of_one(client: Any) -> None:
    assert [picture.seed for picture in client.zimage("a cat", n=2)] == [7, 8]
    assert len(client.zimage("a cat", n=1)) == 1


def test_a_forecast(client: Any, fake: Fake) -> None:
    forecast = client.chronos2(values=[1.0, float("nan"), 3], prediction_length=2, past_covariates={"x": (1, None, 2)})
    assert body(fake.sent("POST /api/jobs")[0]) == {
        "service": "chronos2", "values": [1, None, 3], "prediction_length": 2, "trend": True,
        "past_covariates": {"x": [1, None, 2]},
    }  # fmt: skip
    assert forecast.mean == [3, 3]
    assert forecast.quantiles["0.1"] == forecast.quantile(0.1) == [2.6, 2.6]
    assert (forecast.summary, forecast.trend, forecast.prediction_length) == ("1 now", "up", 2)
    with pytest.raises(ArgumentError, match=r"0\.3 was not asked for; there are 0\.1, 0\.5, 0\.9"):
        forecast.quantile(0.3)
    assert client.chronos2([[1, 2], [3, 4]], 3).mean == [[2, 2, 2], [4, 4, 4]]


def test_forecasts_of_a_batch(client: Any, fake: Fake) -> None:
    forecasts = client.chronos2_batch(series=[[1, 2], [3]], prediction_length=1)
    assert [forecast.mean for forecast in forecasts] == [[2], [3]]
    assert [forecast.trend for forecast in forecasts] == [None, None]
    assert body(fake.sent("POST /api/jobs")[0])["series"] == [[1, 2], [3]]


def test_any_service(client: Any) -> None:
    assert client.service("caption", image=b"1", depth=2)["echo"] == {"service": "caption", "image": "MQ==", "depth": 2}
    assert client.service("zimage", prompt="a cat").seed == 7
    assert client.service("chronos2", values=[float("nan"), 2], prediction_length=1).mean == [2]


def test_progress_and_previews(client: Any) -> None:
    progress: list[JobProgress] = []
    previews: list[JobPreview] = []
    client.zimage("a cat", on_progress=progress.append, on_preview=previews.append)
    assert progress[-1] == ("denoise", 3, 3, 0)
    assert [moment.step for moment in progress] == sorted(moment.step for moment in progress)
    assert [preview.number for preview in previews] == [0, 1, 2]
    assert previews[0].content == b"a small picture"


def test_account_and_models(client: Any, fake: Fake) -> None:
    assert client.pricing()["free"]
    assert client.balance() == {"available": 12}
    client.balance(wallet="So&me")
    assert fake.seen[-1][1] == "/api/balance?wallet=So%26me"
    assert client.deposit()["address"] == "So1"
    assert client.models()[0]["id"] == "demo"
    assert client.ps() == client.load("demo", "10m")["models"] == [{"name": "demo"}]
    assert body(fake.sent("POST /api/load")[0]) == {"model": "demo", "keep_alive": "10m"}
    client.unload("demo")


def test_the_history_comes_in_pages_as_it_is_read(client: Any, fake: Fake) -> None:
    lines = client.billing_history()
    assert next(iter(lines))["seq"] == 250
    assert len(fake.sent("GET /api/billing-history")) == 1
    lines.close()
    assert [line["seq"] for line in client.billing_history()] == list(range(250, 0, -1))
    fake.lines = fake.lines[:100]  # a last page that is full
    assert len(list(client.billing_history())) == 100
    fake.lines = []
    assert list(client.billing_history()) == []


def test_connections_are_kept(client: Any, fake: Fake) -> None:
    for _ in range(10):
        client.chronos2([1, 2, 3])
    assert fake.connections == 1


def test_fields_that_are_none_of_ours(client: Any, fake: Fake) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        client.zimage("a cat", widht=5)
    with pytest.raises(TypeError, match="past_covariates"):
        client.chronos2_batch([[1]], past_covariates={})
    with pytest.raises(ArgumentError, match="timeout"):
        client.zimage("a cat", timeout=-1)
    with pytest.raises(ArgumentError, match="wait"):
        client.submit("zimage", prompt="a cat", on_progress=print)
    assert not fake.seen


# --- Jobs ---


def test_a_job_from_its_order_to_its_result(client: Any, fake: Fake) -> None:
    fake.hold.set()
    job = client.submit("zimage", prompt="a cat", partial_images=2)
    assert (job.id, job.service, job.status, job.done) == ("job-1", "zimage", "queued", False)
    assert job.progress.queue_position == 1
    assert client.job("job-1").status == "queued"
    assert [other.id for other in client.jobs()] == ["job-1"]
    fake.hold.clear()
    events = list(job.events())
    assert [event.type for event in events][-1] == "job.completed"
    assert [event.preview.number for event in events if event.preview] == [0, 1]
    assert (job.status, job.done, job.cost["charged"]) == ("completed", True, True)
    requests = len(fake.seen)
    assert job.result().seed == 7
    job.wait()  # it knows
    assert len(fake.seen) == requests
    assert client.job("job-1").result().content == WEBP


def test_a_job_is_waited_for(client: Any, fake: Fake) -> None:
    steps: list[int] = []
    job = client.submit("chronos2", values=[1, 2], prediction_length=1).wait(lambda moment: steps.append(moment.step))
    assert job.status == "completed"
    assert steps[-1] == 3
    assert client.submit("zimage", prompt="x", n=1).result()[0].seed == 7


def test_a_job_is_cancelled(client: Any, fake: Fake) -> None:
    fake.hold.set()
    job = client.submit("zimage", prompt="a cat")
    job.cancel()
    assert job.status == "cancelled"
    job.cancel()
    with pytest.raises(Cancelled, match="job-1 was cancelled"):
        job.result()


def test_a_job_that_failed_raises_its_problem(client: Any, fake: Fake) -> None:
    fake.failures = [{"type": "/problems/engine-error", "status": 500, "detail": "the device is gone"}] * 2
    job = client.submit("zimage", prompt="a cat").wait()
    assert job.problem["detail"] == "the device is gone"
    with pytest.raises(EngineError, match="the device is gone") as caught:
        job.result()
    assert (caught.value.status, caught.value.job_id) == (500, "job-1")
    with pytest.raises(EngineError):
        client.zimage("a cat")
    assert len(fake.jobs) == 2  # it is not asked for again


def test_a_job_that_failed_for_a_moment_is_asked_for_again(client: Any, fake: Fake) -> None:
    busy = {"type": "/problems/out-of-memory", "status": 503, "detail": "no memory", "retry_after_s": 0}
    fake.failures = [busy, busy]
    assert client.zimage("a cat", idempotency_key="mine").seed == 7
    assert list(fake.keyed) == ["mine", "mine~1", "mine~2"]
    # Whoever repeats the call comes to the same job.
    client.zimage("a cat", idempotency_key="mine")
    assert len(fake.jobs) == 3
    fake.failures = [busy | {"retry_after_s": 3600}]
    with pytest.raises(Unavailable, match="in 3600 seconds"):
        client.zimage("a cat")


def test_unknown_jobs(client: Any) -> None:
    with pytest.raises(NotFound, match="no such job"):
        client.job("job-99")
    with pytest.raises(NotFound):
        client.job("../../api/pricing")


def test_a_timeout_of_a_call_cancels_its_job(client: Any, fake: Fake) -> None:
    fake.hold.set()
    began = time.monotonic()
    with pytest.raises(WaitTimeout, match=r"1\.5 seconds") as caught:
        client.zimage("a cat", timeout=1.5)
    assert 1.4 < time.monotonic() - began < 30  # the client's own is longer, and the job never ends
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.job_id == "job-1"
    assert fake.jobs["job-1"].status == "cancelled"


def test_a_timeout_of_a_wait_leaves_the_job(client: Any, fake: Fake) -> None:
    fake.hold.set()
    job = client.submit("zimage", prompt="a cat")
    with pytest.raises(WaitTimeout):
        job.wait(timeout=0.2)
    assert fake.jobs["job-1"].status == "queued"
    fake.hold.clear()
    assert job.result().seed == 7


def test_what_a_callback_raises_cancels_the_job(client: Any, fake: Fake) -> None:
    fake.steps = 10_000  # it does not end before it is cancelled

    def stop(progress: JobProgress) -> None:
        raise Cancelled("that is enough")

    with pytest.raises(Cancelled, match="that is enough"):
        client.zimage("a cat", on_progress=stop)
    assert fake.jobs["job-1"].status == "cancelled"


def test_leaving_the_events_leaves_the_job(client: Any, fake: Fake) -> None:
    job = client.submit("zimage", prompt="a cat")
    events = job.events()
    next(events)
    events.close()
    assert job.result().seed == 7


# --- Keys that make a call one call ---


def test_every_call_has_a_key_of_its_own_and_keeps_it(client: Any, fake: Fake) -> None:
    fake.fail("POST /api/jobs", answer(503, {}), drop, drop_late, drop_halfway)
    assert client.zimage("a cat").seed == 7
    client.zimage("a cat")
    keys = [headers["idempotency-key"] for headers, _ in fake.sent("POST /api/jobs")]
    assert len(set(keys[:5])) == 1
    assert keys[5] != keys[0]
    assert len(fake.jobs) == 2
    assert len({sent for _, sent in fake.sent("POST /api/jobs")}) == 1  # the same bytes


def test_a_key_of_the_callers(client: Any, fake: Fake) -> None:
    first = client.zimage("a cat", idempotency_key="mine")
    assert client.zimage("a cat", idempotency_key="mine").job_id == first.job_id
    with pytest.raises(IdempotencyMismatch, match="Choose a new idempotency_key"):
        client.zimage("a dog", idempotency_key="mine")


def test_a_call_that_may_have_arrived_says_its_key(client: Any, fake: Fake) -> None:
    fake.fail("POST /api/jobs", *[drop_late] * 6)
    with pytest.raises(ConnectionFailed) as caught:
        client.zimage("a cat")
    key = caught.value.idempotency_key
    assert key and f"idempotency_key='{key}'" in str(caught.value)
    assert client.zimage("a cat", idempotency_key=key).job_id == "job-1"
    assert len(fake.jobs) == 1


def test_a_server_that_was_started_anew(client: Any, fake: Fake) -> None:
    """It does not know the job, or has its key in the ledger and says that it is used up."""

    def forget(handler: Any) -> None:
        fake.jobs.clear()
        drop(handler)

    for forget_keys in (True, False):
        fake.fail("GET /api/jobs/ID/events", forget)
        if forget_keys:
            fake.fail("GET /api/jobs/ID/events")
        fake.keyed.clear()
        assert client.zimage("a cat").seed == 7
    # The first job was lost while its answer was on its way.
    fake.fail("POST /api/jobs", lambda handler: (drop_late(handler), fake.jobs.clear())[0])
    assert client.zimage("a cat").seed == 7
    with pytest.raises(Conflict, match="used before"):
        fake.jobs.clear()
        client.zimage("a cat", idempotency_key=list(fake.keyed)[-1])


# --- Asking again, or not ---


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_pass_is_asked_again(client: Any, fake: Fake, status: int) -> None:
    fake.fail(
        "GET /api/balance", answer(status, b"<html><title>Bad</title>", content_type="text/html"), answer(status, {})
    )
    assert client.balance() == {"available": 12}
    assert len(fake.sent("GET /api/balance")) == 3


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 406, 408, 409, 410, 413, 415, 418, 422, 500, 501])
def test_what_will_not_pass_is_asked_once(client: Any, fake: Fake, status: int) -> None:
    for route, ask in (
        ("POST /api/jobs", lambda: client.zimage("a cat")),
        ("GET /api/balance", client.balance),
    ):
        fake.fail(route, answer(status, {}))
        with pytest.raises(ApiError) as caught:
            ask()
        assert caught.value.status == status
        assert len(fake.sent(route)) == 1
    assert not fake.jobs


def test_retries_end(make: Any, fake: Fake) -> None:
    fake.fail("POST /api/jobs", *[problem("queue-full", 429, "512 jobs wait", queue_depth=512)] * 4)
    with pytest.raises(QueueFull, match="512 jobs wait") as caught:
        make(fake.url, max_retries=3).zimage("a cat")
    assert caught.value.problem["queue_depth"] == 512
    assert len(fake.sent("POST /api/jobs")) == 4
    fake.fail("GET /api/balance", drop)
    with pytest.raises(ConnectionFailed):
        make(fake.url, max_retries=0).balance()
    assert len(fake.sent("GET /api/balance")) == 1


def test_retry_after_is_waited_for(client: Any, fake: Fake) -> None:
    began = time.monotonic()
    fake.fail("POST /api/jobs", problem("queue-full", 429, headers={"retry-after": "1"}))
    client.zimage("a cat")
    assert 1 <= time.monotonic() - began < 30
    fake.fail("POST /api/jobs", problem("draining", 503, headers={"retry-after": "3600"}))
    with pytest.raises(Unavailable, match="Ask again in 3600 seconds") as caught:
        client.zimage("a cat")
    assert caught.value.retry_after == 3600
    fake.fail("POST /api/jobs", problem("queue-full", 429, headers={"retry-after": "30"}))
    with pytest.raises(QueueFull):  # there is no time for that
        client.zimage("a cat", timeout=2)


def test_credit_and_keys(make: Any, client: Any, fake: Fake) -> None:
    short = problem("insufficient-credit", 402, "too little", available=1, needed=50, deposit_url="/api/deposit")
    fake.fail("POST /api/jobs", short)
    with pytest.raises(InsufficientCredit) as caught:
        client.zimage("a cat")
    assert (caught.value.available, caught.value.needed) == (1, 50)
    assert caught.value.deposit_url == f"{fake.url}/api/deposit"
    fake.fail("POST /api/jobs", problem("invalid-request", 400, "must be a multiple of 16", param="width"))
    with pytest.raises(InvalidRequest, match=r"^width: must be a multiple of 16") as refused:
        client.zimage("a cat", width=17)
    assert (refused.value.param, refused.value.request_id) == ("width", "req-1")
    fake.needs_key = True
    with pytest.raises(Unauthorized, match="DIFFUSIONZ_API_KEY"):
        client.balance()
    assert make(fake.url, KEY).zimage("a cat").content == WEBP


def test_nobody_is_there(make: Any) -> None:
    import socket

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = make(f"http://127.0.0.1:{unused.getsockname()[1]}", max_retries=1)
        with pytest.raises(ConnectionFailed, match=r"diffusionz serve") as caught:
            client.zimage("a cat")
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.idempotency_key is None  # it never arrived


def test_a_silent_server(make: Any, fake: Fake) -> None:
    began = time.monotonic()
    fake.fail("GET /api/balance", *[lambda handler: time.sleep(60)] * 2)
    with pytest.raises(ConnectionFailed, match="silent for too long"):
        make(fake.url, timeout=0.2, max_retries=1).balance()
    assert time.monotonic() - began < 30


def test_answers_that_are_none(client: Any, fake: Fake) -> None:
    for wrong in (b"<html><title>A router</title></html>", b"", b"{", b"[]", b"5", b"[" * 100_000, b"\xff\xfe"):
        fake.fail("GET /api/balance", answer(200, wrong))
        with pytest.raises(UnexpectedAnswer, match="DIFFUSIONZ_URL"):
            client.balance()
        fake.fail("POST /api/jobs", answer(202, wrong))
        with pytest.raises(UnexpectedAnswer):
            client.zimage("a cat")
    for wrong_job in ({}, {"id": 5, "status": "queued"}, {"id": "x"}):
        fake.fail("POST /api/jobs", answer(202, wrong_job))
        with pytest.raises(UnexpectedAnswer, match="not a job"):
            client.zimage("a cat")
    fake.fail("GET /v1/models", answer(200, {"data": 5}))
    with pytest.raises(UnexpectedAnswer, match="not the list"):
        client.models()
    fake.fail("GET /api/balance", answer(500, b"<html><title>Oops</title>"))
    with pytest.raises(ApiError, match=r"a web page \(Oops\)"):
        client.balance()


@pytest.mark.parametrize(
    "result",
    [
        {"images": [{}]},
        {"images": [5]},
        {"images": []},
        {"images": [{"url": "file:///etc/passwd"}]},
        {"images": [{"b64_json": "%"}]},
    ],
)
def test_pictures_that_are_none(client: Any, fake: Fake, result: Any) -> None:
    done = {"id": "job-1", "service": "zimage", "status": "completed", "result": result}
    fake.fail("POST /api/jobs", answer(202, done))
    with pytest.raises(UnexpectedAnswer):
        client.zimage("a cat").content  # noqa: B018


@pytest.mark.parametrize(
    "result",
    [
        5,
        {},
        {"mean": [1]},
        {"mean": 5, "quantiles": {}},
        {"results": 5},
        {"mean": [1], "quantiles": {"x": 5}},
    ],
)
def test_forecasts_that_are_none(client: Any, fake: Fake, result: Any) -> None:
    done = {"id": "job-1", "service": "chronos2", "status": "completed", "result": result}
    fake.fail("POST /api/jobs", answer(202, done))
    with pytest.raises(UnexpectedAnswer, match="lacks something"):
        client.chronos2([1, 2])


# --- Events that break ---


def types(job: Any) -> list[str]:
    return [event.type for event in job.events()]


ALL = ["job.queued", *["job.progress"] * 3, "job.completed"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends(client: Any, fake: Fake, end: bytes) -> None:
    fake.line_end = end
    assert types(client.submit("chronos2", values=[1], prediction_length=1)) == ALL


def test_streams_that_break_are_opened_anew_and_nothing_comes_twice(client: Any, fake: Fake) -> None:
    fake.cuts = [1, 2, 3, 4]
    fake.pace_s = 0.05
    assert types(client.submit("chronos2", values=[1], prediction_length=1)) == ALL
    assert len(fake.sent("GET /api/jobs/ID/events")) == 5


@pytest.mark.parametrize("status", [404, 405, 429, 500, 501, 503])
def test_without_a_stream_the_job_is_looked_at(client: Any, fake: Fake, status: int) -> None:
    fake.fail("GET /api/jobs/ID/events", answer(status if status != 404 else 406, {}))
    fake.pace_s, fake.steps = 0.1, 10
    progress: list[JobProgress] = []
    assert client.zimage("a cat", on_progress=progress.append).seed == 7
    assert len(fake.sent("GET /api/jobs/ID/events")) == 1
    assert progress[-1].step > 0
    assert len(progress) == len(set(progress))


@pytest.mark.parametrize(
    "fault",
    [
        drop,
        answer(200, b"", content_type="text/event-stream"),
        answer(200, b"event: job.completed\ndata: {}\n\n", content_type="text/event-stream"),
        answer(200, b"event: job.completed\ndata: [\n\n", content_type="text/event-stream"),
        answer(200, b'event: job.progress\ndata: {"step": "x"}\n\n', content_type="text/event-stream"),
        answer(200, b"event: job.progress\ndata: 5\n\n", content_type="text/event-stream"),
        answer(200, b"\xff\xfe\x00", content_type="text/event-stream"),
        answer(200, b"<html>", content_type="text/html"),
    ],
)
def test_streams_of_nonsense(client: Any, fake: Fake, fault: Any) -> None:
    fake.fail("GET /api/jobs/ID/events", *[fault] * 10)
    fake.pace_s = 0.05
    assert client.zimage("a cat", on_progress=lambda moment: None).seed == 7
    assert len(fake.sent("GET /api/jobs/ID/events")) <= 10


def test_a_stream_that_is_held_back(client: Any, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a proxy that waits for its end."""
    monkeypatch.setattr(core, "SILENCE_S", 0.3)
    fake.fail("GET /api/jobs/ID/events", lambda handler: time.sleep(60))
    fake.pace_s = 0.2
    began = time.monotonic()
    assert client.zimage("a cat").seed == 7
    assert time.monotonic() - began < 30


def test_a_server_that_goes_away_while_it_works(make: Any, quick: None) -> None:
    fake = Fake()
    threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    fake.pace_s = 0.1

    def leave(moment: JobProgress) -> None:
        if fake.socket.fileno() != -1:
            fake.shutdown()
            fake.server_close()
            fake.cuts = [0] * 99

    fake.cuts = [1]
    with pytest.raises(ConnectionFailed) as caught:
        make(fake.url, max_retries=2).zimage("a cat", on_progress=leave)
    assert caught.value.job_id == "job-1"
    assert caught.value.idempotency_key is not None


# --- The key is the server's alone ---


def test_redirects_do_not_carry_the_key_elsewhere(make: Any, fake: Fake) -> None:
    other = Fake()
    threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    client = make(fake.url, KEY)
    try:
        # A picture may lie elsewhere; its host is not told the key.
        fake.fail("GET /api/jobs/ID/images/0.webp", answer(302, {}, location=f"{other.url}/api/ps"))
        assert client.zimage("a cat").content.startswith(b'{"models"')
        # Whatever else is not followed there, and what spends not at all.
        for status in (301, 302, 303, 307, 308):
            fake.fail("POST /api/jobs", answer(status, {}, location=f"{other.url}/api/jobs"))
            with pytest.raises(UnexpectedAnswer, match="redirected to"):
                client.zimage("a cat")
            fake.fail("GET /api/balance", answer(status, {}, location=f"{other.url}/api/balance"))
            with pytest.raises(UnexpectedAnswer, match="redirected to"):
                client.balance()
        assert len(other.seen) == 1
        assert all("authorization" not in headers for _, _, headers, _ in other.seen)
        assert all(headers["authorization"] == f"Bearer {KEY}" for _, _, headers, _ in fake.seen)
        # At home it may wander.
        fake.fail("GET /api/balance", answer(302, {}, location="/api/deposit"))
        assert client.balance() == {"address": "So1"}
        fake.fail("POST /api/jobs", answer(308, {}, location="/api/jobs"))
        assert client.zimage("a cat").seed == 7
        fake.fail("GET /api/balance", *[answer(302, {}, location="/api/balance")] * 6)
        with pytest.raises(UnexpectedAnswer, match="redirected 5 times"):
            client.balance()
        for nowhere in ("file:///etc/passwd", "http://[", "//x.example/"):
            fake.fail("GET /api/balance", answer(302, {}, location=nowhere))
            with pytest.raises(UnexpectedAnswer, match="not followed"):
                client.balance()
    finally:
        other.shutdown()
        other.server_close()


def test_pictures_of_a_provider_are_fetched_without_the_key(make: Any, fake: Fake) -> None:
    other = Fake()
    threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    result = {"images": [{"url": f"{other.url}/api/ps", "content_type": "image/jpeg"}]}
    done = {"id": "job-1", "service": "flux_image", "status": "completed", "result": result}
    fake.fail("POST /api/jobs", answer(202, done))
    picture = make(fake.url, KEY).service("flux_image", prompt="a cat")
    assert picture.content
    assert "authorization" not in other.seen[0][2]
    with pytest.raises(ArgumentError, match=r"is image/jpeg; it must end in .jpg or .jpeg"):
        picture.save("a.png")
    other.shutdown()
    other.server_close()


def test_the_key_is_nowhere_to_be_read(make: Any, fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    client = make(fake.url, KEY, max_retries=0)
    texts = [repr(client)]
    fake.fail("POST /api/jobs", drop, answer(500, {}), answer(200, b"<html>"), answer(302, {}, location="http://x/"))
    for _ in range(4):
        with pytest.raises(diffusionz.DiffusionzError) as caught:
            client.zimage("a cat")
        error: BaseException | None = caught.value
        texts += traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
        while error is not None:
            texts += [repr(error), repr(error.args), repr(vars(error))]
            error = error.__context__ or error.__cause__
    job = client.submit("zimage", prompt="a cat")
    texts += [repr(job), repr(job.result())]
    assert KEY in str(fake.seen)
    assert not [text for text in texts if KEY in text and "test_client.py" not in text]
    assert KEY not in str(capfd.readouterr())


# --- Interrupted ---

INTERRUPTED = """
import sys, diffusionz
client = diffusionz.Client(sys.argv[1])
print("begun", flush=True)
try:
    client.zimage("a cat", on_progress=lambda moment: print("seen", flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
"""


def start(fake: Fake) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", INTERRUPTED, fake.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("when", ["running", "submitting"])
def test_ctrl_c_cancels_the_job(fake: Fake, when: str) -> None:
    fake.hold.set()
    if when == "submitting":  # the job is there, and its id has not come
        fake.fail("POST /api/jobs", slow(120))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, fake.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"begun\n"
    if when == "running":
        assert process.stdout.readline() == b"seen\n"
    while not fake.jobs:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert b"interrupted" in out
    assert b"KeyboardInterrupt" in err
    assert [job.status for job in fake.jobs.values()] == ["cancelled"]


def test_ctrl_c_before_anything_arrived_asks_for_nothing(fake: Fake) -> None:
    fake.fail("POST /api/jobs", problem("queue-full", 429, headers={"retry-after": "30"}))
    code = (
        "import time\nreally = time.sleep\n"
        "def sleep(seconds): print('waits', flush=True); really(seconds)\ntime.sleep = sleep\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code + INTERRUPTED, fake.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == [b"begun\n", b"waits\n"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert len(fake.seen) == 1


@pytest.mark.parametrize("when", ["running", "submitting"])
def test_a_cancelled_task_cancels_its_job(fake: Fake, when: str) -> None:
    import asyncio

    fake.hold.set()
    if when == "submitting":
        fake.fail("POST /api/jobs", slow(2))

    async def main() -> None:
        async with AsyncClient(fake.url) as client:
            task = asyncio.create_task(client.zimage("a cat"))
            while not fake.jobs or (when == "running" and not fake.sent("GET /api/jobs/ID/events")):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.zimage("another"), 2)

    asyncio.run(main())
    assert [job.status for job in fake.jobs.values()] == ["cancelled"] * 2


# --- What only one of them has ---


def test_many_at_once(fake: Fake) -> None:
    import asyncio

    async def main() -> None:
        async with AsyncClient(fake.url) as client:
            forecasts = await asyncio.gather(*(client.chronos2([i], 1) for i in range(50)))
            assert [forecast.mean for forecast in forecasts] == [[i] for i in range(50)]
            pictures = await asyncio.gather(*(client.zimage("x", seed=i) for i in range(20)))
            assert await asyncio.gather(*(picture.read() for picture in pictures)) == [WEBP] * 20

    asyncio.run(main())
    with Client(fake.url) as client:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda i: client.chronos2([i], 1).mean, range(50))) == [[i] for i in range(50)]


def test_coroutines_may_be_callbacks(fake: Fake) -> None:
    import asyncio

    seen: list[Any] = []

    async def main() -> None:
        async def note(moment: Any) -> None:
            await asyncio.sleep(0)
            seen.append(moment)

        async with AsyncClient(fake.url) as client:
            picture = await client.zimage("x", on_progress=note, on_preview=note)
            again = await client.zimage("x", image=picture)
            assert "image" in body(fake.sent("POST /api/jobs")[-1])
            assert again.seed == 7

    asyncio.run(main())
    assert {type(moment) for moment in seen} == {JobProgress, JobPreview}


def test_a_picture_in_a_notebook(fake: Fake) -> None:
    with Client(fake.url) as client:
        picture = client.zimage("x")
        assert picture._repr_html_().startswith('<img src="data:image/webp;base64,UklGR')
        assert client.zimage("x", image=picture).seed == 7


def test_both_clients_have_the_same_methods() -> None:
    for sync, other in ((Client, AsyncClient), (Job, AsyncJob)):
        renamed = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}
        others = {renamed.get(name, name): value for name, value in vars(other).items() if inspect.isfunction(value)}
        for name, method in vars(sync).items():
            if inspect.isfunction(method):
                ours, theirs = inspect.signature(method), inspect.signature(others[name])
                assert str(ours.parameters) == str(theirs.parameters).replace("AsyncClient", "Client"), name
                assert method.__doc__ or name.startswith("_"), name
        assert {name for name in others if not name.startswith("_")} <= set(vars(sync))


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, time, diffusionz\n"
        "assert 'httpx2' not in sys.modules and 'diffusionz.client' not in sys.modules\n"
        "t = time.process_time(); from diffusionz import Client; t = time.process_time() - t\n"
        "print(any(name in sys.modules for name in ('httpx2', 'numpy', 'torch', 'anyio')), t < 0.2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


USES = """
from diffusionz import AsyncClient, Client
from diffusionz.client import AsyncPicture, Picture, Prediction

def use(client: Client, several: int) -> None:
    one: Picture = client.zimage("x", width=256, timeout=None)
    some: list[Picture] = client.zimage("x", n=several, on_progress=lambda moment: moment.step)
    forecast: Prediction = client.chronos2(values=[1, 2.0, None], monotone=True)
    forecasts: list[Prediction] = client.chronos2_batch([[1]], constrain_ohlc=True)

async def use_async(client: AsyncClient) -> None:
    one: AsyncPicture = await client.zimage("x")
    some: list[AsyncPicture] = await client.zimage("x", n=2)
    async for event in (await client.submit("zimage", prompt="x")).events():
        print(event.progress)
"""


def test_types(tmp_path: pathlib.Path) -> None:
    (tmp_path / "right.py").write_text(USES)
    (tmp_path / "wrong.py").write_text(
        'from diffusionz import Client\nClient().zimage("x", widht=5)\nClient().zimage("x", n=2).url\n'
        'Client().zimage("x", width="5")\n'
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    environment = os.environ | {"MYPYPATH": str(ROOT / "py")}
    done = subprocess.run(
        [*command, "right.py", "wrong.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    wrong = {line.partition(": error:")[0] for line in done.stdout.splitlines() if ": error:" in line}
    assert wrong == {"wrong.py:2", "wrong.py:3", "wrong.py:4"}, done.stdout + done.stderr


def test_style() -> None:
    files = [*sorted((ROOT / "py" / "diffusionz").glob("*client*.py")), ROOT / "examples" / "python" / "agents.py"]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "tests/client", *map(str, files)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
