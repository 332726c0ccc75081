"""What operators look at: liveness, readiness, figures that are right, and a log that keeps secrets."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import re
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from diffusionz.server import models as models_module
from diffusionz.server.app import create_app
from diffusionz.server.forecasts import Forecasts
from diffusionz.server.limits import Limits
from diffusionz.server.metrics import Metrics
from diffusionz.server.models import Models, Spec
from diffusionz.server.settings import Settings

from .conftest import PATIENCE_S, Customer, Running, Start, ended

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def figures(client: httpx2.Client) -> Figures:
    """{(name, labels): value} of /metrics, by Prometheus' own parser."""
    answer = client.get("/metrics").raise_for_status()
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name.removeprefix("diffusionz_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def figure(found: Figures, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


@pytest.fixture(scope="module")
def server(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One of this file's own, whose traffic is known; it logs every request."""
    config = tmp_path_factory.mktemp("config") / "server.toml"
    config.write_text(
        '[models.picture]\nfamily = "zimage"\nmodel = "demo"\n[models.forecast]\nfamily = "chronos2"\nmodel = "demo"\n'
        '[models.lost]\nfamily = "chronos2"\nmodel = "/nowhere"\n[limits]\nsteps = 30\nbody_s = 12.5\n'
    )
    with start("--free", "--config", str(config), "--access-log") as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx2.Client]:
    with server.client() as made:
        yield made


def lines_of(server: Running, request_id: str, message: str) -> list[dict[str, Any]]:
    """The log's lines of a request, once one says so."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = [line for line in server.lines() if line.get("request_id") == request_id]
        if any(line["message"].startswith(message) for line in found):
            return found
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.02)


def test_alive_and_ready(client: httpx2.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200 and ready.json()["status"] == "ok" and ready.json()["jobs"] == 0
    assert client.head("/healthz").status_code == 200


def test_limits_are_those_of_the_one_table(client: httpx2.Client) -> None:
    expected = dataclasses.replace(Limits(), steps=30, body_s=12.5)
    assert client.get("/api/limits").json() == dataclasses.asdict(expected)


def test_the_figures_are_those_of_the_traffic(client: httpx2.Client) -> None:
    before = figures(client)
    series = {"values": [1, 2, 3, 4], "prediction_length": 2}
    for _ in range(3):
        client.post("/forecast", json=series).raise_for_status()
    client.post("/forecast_batch", json={"series": [[1, 2], [3, 4]], "prediction_length": 2}).raise_for_status()
    client.post("/generate", json={"prompt": "a circle", "steps": 2}).raise_for_status()
    assert client.post("/forecast", json={"values": []}).status_code == 400
    assert client.post("/forecast", json=series | {"model": "lost"}).status_code == 503
    assert client.get("/nothing").status_code == 404
    long = {"service": "zimage", "prompt": "a circle", "steps": 30, "n": 4}
    id = client.post("/api/jobs", json=long).json()["id"]
    assert figure(figures(client), "jobs_active") == 1
    client.delete(f"/api/jobs/{id}")
    assert ended(client, id)["status"] == "cancelled"
    during = figures(client)
    assert figure(during, "models_bytes") == sum(row["size"] for row in client.get("/api/ps").json()["models"]) > 0
    client.post("/api/unload", json={"model": "forecast"}).raise_for_status()
    client.post("/forecast", json=series).raise_for_status()
    after = figures(client)

    def more(name: str, **labels: str) -> float:
        return figure(after, name, **labels) - figure(before, name, **labels)

    assert more("jobs_total", service="chronos2", status="completed") == 5
    assert more("jobs_total", service="chronos2", status="failed") == 1
    assert more("jobs_total", service="zimage", status="completed") == 1
    assert more("jobs_total", service="zimage", status="cancelled") == 1
    assert more("http_requests_total", method="POST", status="200") == 7  # 4 + 1 + unload + 1
    assert more("http_requests_total", method="POST", status="202") == 1
    assert more("http_requests_total", method="POST", status="400") == 1
    assert more("http_requests_total", method="POST", status="503") == 1
    assert more("http_requests_total", method="GET", status="404") == 1
    assert more("http_requests_total", method="DELETE", status="200") == 1
    answers = sum(value for (name, _), value in after.items() if name == "http_requests_total")
    assert figure(after, "http_request_seconds_count") == answers
    assert more("forecast_batch_series_count") == 5 and more("forecast_batch_series_sum") == 6
    assert more("model_load_seconds_count", model="forecast") == 2  # it was let go in between
    assert more("model_load_seconds_count", model="picture") == 1
    assert more("model_evictions_total", model="forecast", reason="asked") == 1
    assert more("job_stage_seconds_count", service="chronos2", stage="run") == 6
    assert more("job_stage_seconds_count", service="zimage", stage="total") == 2
    assert 0 < more("job_stage_seconds_sum", service="zimage", stage="run") < PATIENCE_S
    assert (figure(after, "jobs_active"), figure(after, "zimage_queue_depth")) == (0, 0)
    assert figure(after, "process_resident_memory_bytes") > 10_000_000


def test_labels_are_few_whatever_is_asked(client: httpx2.Client) -> None:
    """A stranger must not be able to fill the memory with labels."""
    for i in range(20):
        client.get(f"/stranger-{i}")
        client.request("PROPFIND", "/healthz")
        client.post("/api/service", json={"service": f"stranger-{i}"})
    shown = client.get("/metrics").text
    assert "stranger" not in shown and "PROPFIND" not in shown
    assert 'method="other"' in shown


def test_refusals_are_counted_by_their_reason(start: Start, tmp_path: pathlib.Path) -> None:
    (tmp_path / "server.toml").write_text("free = true\n[limits]\nqueue_per_key = 1\n")
    with start("--config", str(tmp_path / "server.toml")) as server, server.client() as client:
        long = {"service": "zimage", "prompt": "a circle", "steps": 50, "n": 4}
        id = client.post("/api/jobs", json=long).json()["id"]
        for _ in range(2):
            refused = client.post("/forecast", json={"values": [1, 2]})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        client.delete(f"/api/jobs/{id}")
        assert figure(figures(client), "jobs_refused_total", service="chronos2", reason="queue-full") == 2


def test_metrics_are_the_operators(server: Running) -> None:
    with server.client() as client:
        assert client.get("/metrics").status_code == 200
        for proxied in ("x-forwarded-for", "forwarded", "x-real-ip"):
            refused = client.get("/metrics", headers={proxied: "127.0.0.1"})
            assert refused.status_code == 403 and refused.json()["error"]["code"] == "forbidden"
            assert client.post("/api/load", json={"model": "picture"}, headers={proxied: "1.2.3.4"}).status_code == 403


# --- Starting, and draining ---


def test_it_is_ready_once_the_preloaded_are_there_and_not_when_it_drains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    gate = threading.Event()

    class Slow:
        device, precision = "cpu", "float32"
        memory = types.MappingProxyType({"weights_bytes": 1})

        def __init__(self, model: str) -> None:
            assert gate.wait(PATIENCE_S)
            if model.endswith("broken"):
                raise RuntimeError("as nobody expected")

        def close(self) -> None:
            pass

    monkeypatch.setattr(models_module, "FAMILIES", {"chronos2": Slow})
    for name in ("broken", "fine"):
        (tmp_path / name).mkdir()
    specs = tuple(Spec(name, "chronos2", str(tmp_path / name)) for name in ("broken", "fine"))

    async def work() -> None:
        settings = Settings(free=True, models=specs, preload=("broken", "fine"), drain_s=0.1)
        models = Models(specs, Metrics())
        app = create_app(settings, models, services=[Forecasts(models, settings.limits, models.metrics)])
        transport = httpx2.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client, app.parts.running():
            starting = await client.get("/readyz")
            assert starting.status_code == 503 and int(starting.headers["retry-after"]) > 0
            assert starting.json()["status"] == "starting"
            assert (await client.get("/healthz")).status_code == 200
            gate.set()
            deadline = time.monotonic() + PATIENCE_S
            while (await client.get("/readyz")).status_code != 200:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            assert (await client.get("/readyz")).json() == {"status": "ok", "jobs": 0, "models": ["fine"]}
            await app.parts.jobs.drain(0)
            draining = await client.get("/readyz")
            assert draining.status_code == 503 and draining.json()["status"] == "draining"
            assert (await client.get("/healthz")).status_code == 200
            refused = await client.post("/forecast", json={"values": [1, 2]})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"

    asyncio.run(work())


# --- The log ---


def test_the_access_log_has_each_request_and_nothing_of_its_body(server: Running, client: httpx2.Client) -> None:
    client.post(
        "/generate?token=s3cret-query", json={"prompt": "s3cret-prompt", "steps": 0}, headers={"x-request-id": "log-1"}
    )
    (line,) = lines_of(server, "log-1", "request")
    assert (line["method"], line["path"], line["status"], line["client"]) == ("POST", "/generate", 400, "127.0.0.1")
    assert line["level"] == "info" and line["ms"] > 0 and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", line["time"])
    assert "s3cret" not in server.log.read_text()


def test_without_the_option_there_is_no_line_a_request(free_server: Running, free: httpx2.Client) -> None:
    free.get("/healthz").raise_for_status()
    assert not [line for line in free_server.lines() if line["message"] == "request"]


def test_a_failure_is_in_the_log_with_its_requests_id(server: Running, client: httpx2.Client) -> None:
    body = {"values": [1, 2], "model": "lost"}
    answer = client.post("/forecast", json=body, headers={"x-request-id": "lost-1"})
    assert answer.status_code == 503 and answer.json()["instance"] == "lost-1"
    lines = lines_of(server, "lost-1", "a job failed")
    failed = next(line for line in lines if line["message"].startswith("a job failed"))
    assert (failed["level"], failed["service"], failed["message"]) == (
        "warning",
        "chronos2",
        "a job failed: model-unavailable",
    )
    assert failed["job"].startswith("job-")
    # In the background, too, where no answer carries it.
    job = client.post("/api/jobs", json=body | {"service": "chronos2"}, headers={"x-request-id": "lost-2"}).json()
    assert lines_of(server, "lost-2", "a job failed")
    assert client.get(f"/api/jobs/{job['id']}").json()["problem"]["instance"] == "lost-2"
    # The operator is told which file it is; the user is not.
    assert any("/nowhere" in line["message"] for line in server.lines()) and "/nowhere" not in answer.text


def test_an_unexpected_error_is_in_the_log_with_its_requests_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        settings = Settings(free=True)
        models = Models(settings.models, Metrics())
        service = Forecasts(models, settings.limits, models.metrics)
        app = create_app(settings, models, services=[service])
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client, app.parts.running():
            for attribute in ("order", "run"):

                async def broken(*_: Any) -> Any:
                    raise ZeroDivisionError("a defect")

                with monkeypatch.context() as patch:
                    patch.setattr(service, attribute, broken)
                    headers = {"x-request-id": f"defect-{attribute}"}
                    answer = await client.post("/forecast", json={"values": [1, 2]}, headers=headers)
                assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
                assert "defect" not in answer.json()["detail"] and "ZeroDivision" not in answer.text
                assert any(
                    getattr(record, "fields", {}).get("request_id") == f"defect-{attribute}" and record.exc_info
                    for record in caplog.records
                )

    asyncio.run(work())


def test_every_line_is_json_and_none_has_a_secret(customer: Callable[..., Customer], dev_server: Running) -> None:
    """Whatever is sent, and wherever it fails."""
    someone = customer(2000)
    prompt, number = "zyx-secret-prompt", 987654.321
    pictures = [
        {"prompt": prompt, "steps": 2},
        {"prompt": prompt, "steps": 0},
        {"prompt": prompt, "model": "nothing"},
        {"prompt": prompt, "image": "zyx-secret-image"},
        {"prompt": prompt, "zyx-secret-field": 1},
        {"prompt": prompt * 1000},
    ]
    series = [
        {"values": [number, number, 3]},
        {"values": [number, "zyx-secret-value"]},
        {"values": [number, -number], "returns": True},
        {"series": [[number], []]},
    ]
    for client in (someone.client, someone.browser):
        for body in pictures:
            client.post("/generate", json=body)
            client.post("/api/jobs", json=body | {"service": "zimage"})
        for body in series:
            client.post("/forecast", json=body)
    stranger = "cutedsl_" + "zyxsecretkey" * 4
    for key in (stranger, someone.key[:-1], someone.key + "x"):
        assert (
            someone.server.client().get("/api/balance", headers={"authorization": f"Bearer {key}"}).status_code == 401
        )
    someone.client.post("/api/keys", json={"name": "zyx-secret-name"})
    made = someone.browser.post("/api/keys", json={"name": "x"}, headers={"sec-fetch-site": "same-origin"})
    assert made.status_code == 201, made.text
    # The jobs too, which are in no other test's figures then.
    for job in someone.client.get("/api/jobs").json()["jobs"]:
        ended(someone.client, job["id"])
    text = dev_server.log.read_text().rpartition("\n")[0]  # the last line may be half written
    for line in text.splitlines():
        about = json.loads(line)
        assert {"time", "level", "logger", "message"} <= about.keys()
    for secret in ("zyx", "987654", someone.key, made.json()["secret"], someone.key.split("_")[-1][-20:]):
        assert secret not in text


# --- Credit ---


def test_credit_that_was_charged_is_counted(customer: Callable[..., Customer], dev_server: Running) -> None:
    someone = customer(2000)
    with dev_server.client() as operator:
        before, had = figures(operator), someone.balance()["available"]
        someone.client.post("/forecast", json={"values": [1, 2, 3]}).raise_for_status()
        someone.client.post("/forecast_batch", json={"series": [[1, 2], [3, 4]]}).raise_for_status()
        assert someone.client.post("/forecast", json={"values": []}).status_code == 400
        forecasts = had - someone.balance()["available"]
        someone.client.post("/generate", json={"prompt": "a circle", "steps": 1}).raise_for_status()
        pictures = had - forecasts - someone.balance()["available"]
        after = figures(operator)

        def more(service: str) -> float:
            return figure(after, "credits_total", service=service, kind="charged") - figure(
                before, "credits_total", service=service, kind="charged"
            )

        assert (more("chronos2"), more("zimage")) == (forecasts, pictures) and forecasts > 0 and pictures > 0
        poor = customer()
        failed = figure(after, "jobs_total", service="zimage", status="failed")
        assert poor.client.post("/generate", json={"prompt": "a circle"}).status_code == 402
        last = figures(operator)
        refused = figure(last, "jobs_refused_total", service="zimage", reason="insufficient-credit")
        assert refused - figure(before, "jobs_refused_total", service="zimage", reason="insufficient-credit") == 1
        assert figure(last, "jobs_total", service="zimage", status="failed") == failed  # it never was a job
        ready = operator.get("/readyz").json()
        assert ready["status"] == "ok" and "payments" in ready
