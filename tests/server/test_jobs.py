"""Jobs as clients see them: answers, events, cancelling, idempotency, results that are kept."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from .conftest import PATIENCE_S, Running, ended, until

SLOW = {"service": "zimage", "prompt": "a blue square", "steps": 50, "n": 4}


def events(response: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, data) of a stream of server-sent events."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def test_a_picture_is_the_engines(free: httpx2.Client) -> None:
    from diffusionz import ZImage

    answer = free.post("/api/service", json={"service": "zimage", "prompt": "a red circle", "seed": 7, "format": "png"})
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["status"], job["cost"], job["service"]) == ("completed", None, "zimage")
    image = job["result"]["images"][0]
    assert (image["width"], image["height"], image["seed"], image["b64_json"]) == (256, 256, 7, None)
    file = free.get(image["url"])
    assert file.headers["content-type"] == "image/png"
    with ZImage("demo", device="cpu") as model:
        assert file.content == model.generate("a red circle", seed=7).png


@pytest.mark.parametrize("response_format", ["b64_json", "url", "binary"])
def test_the_same_picture_in_three_forms(free: httpx2.Client, response_format: str) -> None:
    body = {"service": "zimage", "prompt": "a green square", "seed": 3, "response_format": response_format}
    answer = free.post("/api/service", json=body)
    direct = free.post("/generate", json={"prompt": "a green square", "seed": 3})
    assert direct.headers["content-type"] == "image/webp" and direct.headers["x-seed"] == "3"
    if response_format == "binary":
        content = answer.content
    else:
        image = answer.json()["result"]["images"][0]
        content = base64.b64decode(image["b64_json"]) if image["b64_json"] else free.get(image["url"]).content
    assert content == direct.content


def test_several_pictures_have_seeds_in_a_row(free: httpx2.Client) -> None:
    answer = free.post(
        "/generate", json={"prompt": "a star", "seed": 5, "n": 2, "steps": 2, "response_format": "b64_json"}
    )
    assert [image["seed"] for image in answer.json()["images"]] == [5, 6]


def test_a_stream_tells_of_every_stage(free: httpx2.Client) -> None:
    # So many steps that a busy server, which tells several at once, tells of more than one.
    body = {"service": "zimage", "prompt": "a red circle", "steps": 24, "partial_images": 2, "stream": True}
    with free.stream("POST", "/api/service", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = list(events(answer))
    names = [name for name, _ in told]
    assert names[-2:] == ["image_generation.completed", "job.completed"]
    assert all(data["type"] == name for name, data in told)
    steps = [data["step"] for name, data in told if name == "job.progress" and data["stage"] == "denoise"]
    assert steps == sorted(steps) and len(set(steps)) > 1
    previews = [data for name, data in told if name == "image_generation.partial_image"]
    assert 1 <= len(previews) <= 2  # the newest replaces one that nobody has seen yet
    assert base64.b64decode(previews[-1]["b64_json"])[8:12] == b"WEBP"
    assert told[-1][1]["result"]["images"][0]["url"].startswith("/api/jobs/")


def test_a_job_in_the_background(free: httpx2.Client) -> None:
    accepted = free.post("/api/jobs", json={"service": "chronos2", "values": [1, 2, 3, 4], "prediction_length": 2})
    assert accepted.status_code == 202 and accepted.headers["location"] == accepted.json()["urls"]["self"]
    id = accepted.json()["id"]
    job = ended(free, id)
    assert job["status"] == "completed" and len(job["result"]["mean"]) == 2
    assert free.get(job["urls"]["result"]).json() == job["result"]
    assert id in [other["id"] for other in free.get("/api/jobs").json()["jobs"]]
    assert list(job["timings_ms"]) == ["queue", "run", "total"]


def test_a_running_job_stops_within_a_step(free: httpx2.Client) -> None:
    id, asked = free.post("/api/jobs", json=SLOW).json()["id"], list[int]()
    with free.stream("GET", f"/api/jobs/{id}/events") as stream:
        for name, data in events(stream):
            if name == "job.progress" and data["step"] >= 1 and not asked:
                answer = free.post(f"/api/jobs/{id}/cancel")
                assert answer.status_code == 200
                asked.append(answer.json()["progress"]["step"])
            last = name
    assert last == "job.cancelled"
    again = free.post(f"/api/jobs/{id}/cancel")
    assert again.status_code == 200 and again.json()["status"] == "cancelled"
    # In steps, as a machine may be slow: not to the end of this picture's 50, nor of the 200 of all.
    assert again.json()["progress"]["step"] - asked[0] < 40
    refused = free.get(f"/api/jobs/{id}/result")
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "cancelled"


def test_a_waiting_job_can_be_cancelled_and_tells_its_place(free: httpx2.Client) -> None:
    first = free.post("/api/jobs", json=SLOW).json()["id"]
    second = free.post("/api/jobs", json=SLOW).json()["id"]
    third = free.post("/api/jobs", json=SLOW).json()
    assert third["status"] == "queued"
    deadline = time.monotonic() + PATIENCE_S
    while (place := free.get(f"/api/jobs/{third['id']}").json()["queue_position"]) != 2:
        assert place < 2 and time.monotonic() < deadline
        time.sleep(0.01)
    assert free.delete(f"/api/jobs/{second}").json()["id"] == second
    assert ended(free, second)["status"] == "cancelled"
    assert free.get(f"/api/jobs/{third['id']}").json()["queue_position"] == 1
    for id in (third["id"], first):
        free.delete(f"/api/jobs/{id}")
        assert ended(free, id)["status"] == "cancelled"


def begun(client: httpx2.Client, before: list[str]) -> str:
    """The id of the job that was not among the newest `before`, as soon as it is there."""
    return str(until(lambda: set(listed(client)[:1]) - set(before)).pop())


def listed(client: httpx2.Client) -> list[str]:
    """The ids of the jobs that are listed, newest first; one at least."""
    return [job["id"] for job in client.get("/api/jobs").json()["jobs"]] or [""]


def test_a_client_that_leaves_cancels_its_call(free_server: Running, free: httpx2.Client) -> None:
    before = listed(free)
    with free_server.left("/api/service", SLOW):
        id = begun(free, before)
    assert ended(free, id)["status"] == "cancelled"


def test_a_client_that_leaves_a_stream_cancels_its_call(free: httpx2.Client) -> None:
    with free.stream("POST", "/api/service", json=SLOW | {"stream": True}) as stream:
        id = stream.headers["x-job-id"]
        next(events(stream))
    assert ended(free, id)["status"] == "cancelled"


def test_a_client_that_leaves_the_events_cancels_nothing(free: httpx2.Client) -> None:
    id = free.post("/api/jobs", json={"service": "zimage", "prompt": "a star", "steps": 20}).json()["id"]
    with free.stream("GET", f"/api/jobs/{id}/events") as stream:
        next(events(stream))
    assert ended(free, id)["status"] == "completed"


def test_with_an_idempotency_key_it_goes_on_and_is_answered_again(free_server: Running, free: httpx2.Client) -> None:
    body = {"service": "zimage", "prompt": "a red circle", "steps": 40}
    headers = {"idempotency-key": f"key-{time.monotonic_ns()}"}
    before = listed(free)
    with free_server.left("/api/service", body, headers):
        begun(free, before)
    # As the client sent it then: byte for byte.
    sent = {"content": json.dumps(body), "headers": headers | {"content-type": "application/json"}}
    answers = [free.post("/api/service", **sent) for _ in range(2)]
    assert [answer.headers["idempotency-replayed"] for answer in answers] == ["true", "true"]
    assert answers[0].json()["id"] == answers[1].json()["id"] and answers[0].json()["status"] == "completed"
    other = free.post("/api/service", json=body | {"steps": 3}, headers=headers)
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency-mismatch"


def test_equal_requests_at_once_under_one_key_are_one_job(free: httpx2.Client) -> None:
    body = {"service": "zimage", "prompt": "a red circle", "steps": 8}
    headers = {"idempotency-key": f"key-{time.monotonic_ns()}"}
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(free.post("/api/service", json=body, headers=headers).json()["id"]))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 6 and len(set(ids)) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/jobs/job-nothing", 404),
        ("DELETE", "/api/jobs/..%2f..%2fetc", 404),
        ("GET", "/api/jobs/job-nothing/images/0.webp", 404),
        ("GET", "/api/jobs/job-nothing/images/-1.webp", 404),
        ("GET", "/nothing", 404),
        ("PUT", "/forecast", 405),
        ("GET", "/api/load", 405),
    ],
)
def test_what_is_not_there(free: httpx2.Client, method: str, path: str, status: int) -> None:
    answer = free.request(method, path)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status and body["error"]["message"] == body["detail"]
    assert body["instance"] == answer.headers["x-request-id"]


def test_request_ids_are_kept_when_they_are_harmless(free: httpx2.Client) -> None:
    assert free.get("/healthz", headers={"x-request-id": "mine-1.2"}).headers["x-request-id"] == "mine-1.2"
    for bad in ("a b", "x" * 200, "é".encode()):
        assert free.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"] != bad
