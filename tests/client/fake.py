"""A server that says what docs/http.md says, on a loopback port, and that breaks on demand.

Jobs run by a clock of their own: `steps` steps, `pace_s` each, none while `hold` is set. Faults are queued a route and
used up by its next requests.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "cutedsl_secret"
WEBP = b"RIFF\x24\x00\x00\x00WEBPVP8 not a real one"
PREVIEW = base64.b64encode(b"a small picture").decode()

Fault = Callable[["Handler"], None]


def answer(status: int, body: Any = None, **headers: str) -> Fault:
    """JSON, or bytes as they are."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.answer(status, body, given)


def problem(
    kind: str, status: int, detail: str = "for a test", *, headers: dict[str, str] | None = None, **members: Any
) -> Fault:
    error = {"message": detail, "type": kind, "code": kind, "param": members.pop("param", None)}
    body = {"type": f"/problems/{kind}", "title": kind, "status": status, "detail": detail, "instance": "req-1"}
    body |= members | {"error": error}
    return lambda handler: handler.answer(status, body, headers or {}, "application/problem+json")


def slow(seconds: float) -> Fault:
    """Does what was asked, and says nothing."""

    def fault(handler: Handler) -> None:
        handler.mute = True
        handler.route()
        time.sleep(seconds)

    return fault


def drop(handler: Handler) -> None:
    """Closes the line without a word."""
    handler.cut()


def drop_late(handler: Handler) -> None:
    """Does what was asked, and closes the line without a word of it."""
    handler.mute = True
    handler.route()
    handler.cut()


def drop_halfway(handler: Handler) -> None:
    """Does what was asked, and closes the line within the answer."""
    handler.truncate = True
    handler.route()
    handler.cut()


class Job:
    def __init__(self, fake: Fake, id: str, fields: dict[str, Any]) -> None:
        self.fake = fake
        self.id = id
        self.fields = fields
        self.status = "queued"
        self.step = 0
        self.steps = fake.steps
        self.problem = fake.failures.pop(0) if fake.failures else None
        self.events: list[tuple[str, dict[str, Any]]] = [("job.queued", {"id": id, "queue_position": 1})]
        self.changed = threading.Condition()
        threading.Thread(target=self.run, daemon=True).start()

    def tell(self, name: str, data: dict[str, Any]) -> None:
        with self.changed:
            self.events.append((name, data))
            self.changed.notify_all()

    def run(self) -> None:
        while self.step < self.steps:
            while self.fake.hold.is_set() and self.status != "cancelled":
                time.sleep(0.005)
            time.sleep(self.fake.pace_s)
            if self.status == "cancelled":
                return
            self.status, self.step = "running", self.step + 1
            self.tell("job.progress", {"id": self.id, "stage": "denoise", "step": self.step, "step_count": self.steps})
            if self.step <= self.fields.get("partial_images", 0):
                about = {"index": 0, "partial_image_index": self.step - 1, "step": self.step, "width": 8, "height": 8}
                self.tell("image_generation.partial_image", {"b64_json": PREVIEW, **about})
        self.end("failed" if self.problem else "completed")

    def end(self, status: str) -> None:
        with self.changed:
            if self.status in ("completed", "failed", "cancelled"):
                return
            self.status = status
        self.tell(f"job.{status}", self.shown())

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "service": self.fields["service"],
            "status": self.status,
            "queue_position": int(self.status == "queued"),
            "progress": {"stage": "denoise", "step": self.step, "step_count": self.steps},
            "result": self.result() if self.status == "completed" else None,
            "problem": self.problem if self.status == "failed" else None,
            "cost": {"usd": "1", "tokens": 50, "charged": self.status == "completed"},
            "timings_ms": {"queue": 1.0, "run": 2.0, "total": 3.0},
            "created_at": 1760000000.0,
            "urls": {},
        }

    def result(self) -> Any:
        fields = self.fields
        if fields["service"] == "zimage":
            kind, seed = fields.get("format", "webp"), fields.get("seed", 7)
            entries = [
                {"url": f"/api/jobs/{self.id}/images/{i}.{kind}", "b64_json": None, "width": fields.get("width", 256),
                 "height": fields.get("height", 256), "seed": seed + i, "content_type": f"image/{kind}"}
                for i in range(fields.get("n", 1))
            ]  # fmt: skip
            return {"images": entries, "prompt": fields["prompt"], "steps": self.steps}
        if fields["service"] == "chronos2":
            if "series" in fields:
                return {"results": [self.forecast(values) for values in fields["series"]]}
            return self.forecast(fields["values"])
        return {"echo": fields}

    def forecast(self, values: list[Any]) -> dict[str, Any]:
        length = self.fields["prediction_length"]
        levels = self.fields.get("quantile_levels", [0.1, 0.5, 0.9])
        several = isinstance(values[0], list)

        def shaped(shift: float) -> list[Any]:
            rows = [[(row[-1] or 0) + shift] * length for row in (values if several else [values])]
            return rows if several else rows[0]

        about = {"trend": "up"} if self.fields.get("trend") else {}
        quantiles = {str(level): shaped(level - 0.5) for level in levels}
        return {"mean": shaped(0), "quantiles": quantiles, "prediction_length": length, "summary": "1 now"} | about


class Fake(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.jobs: dict[str, Job] = {}
        self.keyed: dict[str, tuple[str, bytes]] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        """method, path, headers, body of every request."""
        self.connections = 0
        self.lock = threading.Lock()
        self.steps = 3
        self.pace_s = 0.005
        self.hold = threading.Event()
        self.needs_key = False
        self.failures: list[dict[str, Any]] = []
        """Problems of the next jobs."""
        self.faults: dict[str, list[Fault]] = {}
        self.cuts: list[int] = []
        """After how many events the next streams break."""
        self.line_end = b"\n"
        self.lines = [{"seq": seq, "amount": seq} for seq in range(250, 0, -1)]

    def fail(self, route: str, *faults: Fault) -> None:
        """Queues faults of a route: "POST /api/jobs", "GET /api/jobs/ID/events"."""
        self.faults.setdefault(route, []).extend(faults)

    def sent(self, route: str) -> list[tuple[dict[str, str], bytes]]:
        """Headers and body of the requests of a route."""
        return [(headers, body) for method, path, headers, body in list(self.seen) if _route(method, path) == route]

    def finished_request(self) -> None: ...

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has left


def _route(method: str, path: str) -> str:
    return f"{method} {re.sub(r'/job-[0-9]+', '/ID', urlsplit(path).path)}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake
    mute = False
    truncate = False

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.connections += 1

    def log_message(self, *_: Any) -> None:
        pass

    def begin(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers, self.body))
        self.mute = self.truncate = False
        faults = self.server.faults.get(_route(self.command, self.path))
        if faults:
            faults.pop(0)(self)
        else:
            self.route()

    do_GET = do_POST = do_DELETE = begin

    def cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(
        self, status: int, body: Any = None, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        if self.mute:
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        given = {"content-type": kind, "content-length": str(len(data)), "x-request-id": "req-1"} | (headers or {})
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.truncate else data)

    def route(self) -> None:
        fake, path = self.server, urlsplit(self.path).path
        if fake.needs_key and self.headers.get("authorization") != f"Bearer {KEY}":
            return problem("unauthorized", 401, "no such key")(self)
        if (self.command, path) == ("POST", "/api/jobs"):
            return self.submit()
        if found := re.fullmatch(r"/api/jobs/([^/]+)(/.*)?", path):
            job = fake.jobs.get(found[1])
            if job is None:
                return problem("not-found", 404, "there is no such job")(self)
            return self.of_job(job, found[2] or "")
        if path == "/api/jobs":
            return self.answer(200, {"jobs": [job.shown() for job in reversed(fake.jobs.values())]})
        if path == "/api/billing-history":
            query = parse_qs(urlsplit(self.path).query)
            before, limit = int(query.get("before", ["1000000"])[0]), int(query["limit"][0])
            lines = [line for line in fake.lines if line["seq"] < before][:limit]
            more = lines[-1]["seq"] if len(lines) == limit else None
            return self.answer(200, {"lines": lines, "next_before": more})
        tables = {
            "/api/pricing": {"free": True, "services": []},
            "/api/balance": {"available": 12},
            "/api/deposit": {"address": "So1"},
            "/api/ps": {"models": [{"name": "demo"}]},
            "/v1/models": {"object": "list", "data": [{"id": "demo", "object": "model"}]},
            "/api/load": {"models": [{"name": "demo"}]},
            "/api/unload": {"models": []},
        }
        if path in tables:
            return self.answer(200, tables[path])
        problem("not-found", 404, "there is no such address")(self)

    def submit(self) -> None:
        fake, key = self.server, self.headers["idempotency-key"]
        known = fake.keyed.get(key)
        if known is not None:
            if known[1] != self.body:
                return problem("idempotency-mismatch", 422)(self)
            if known[0] not in fake.jobs:
                return problem("conflict", 409, "this Idempotency-Key was used before")(self)
            return self.answer(202, fake.jobs[known[0]].shown(), {"idempotency-replayed": "true"})
        with fake.lock:
            job = Job(fake, f"job-{len(fake.keyed) + 1}", json.loads(self.body))
            fake.jobs[job.id] = job
            fake.keyed[key] = job.id, self.body
        self.answer(202, job.shown())

    def of_job(self, job: Job, rest: str) -> None:
        if rest == "":
            self.answer(200, job.shown())
        elif rest == "/cancel":
            job.end("cancelled")
            self.answer(200, job.shown())
        elif rest == "/events":
            self.events(job)
        elif rest.startswith("/images/"):
            self.answer(200, WEBP, kind="image/webp")
        else:
            problem("not-found", 404)(self)

    def events(self, job: Job) -> None:
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        end = self.server.line_end
        sent = 0
        while True:
            if sent == cut:
                return self.cut()
            with job.changed:
                while len(job.events) <= sent:
                    job.changed.wait(0.05)
                    self.chunk(b": still there" + end + end)  # finds out about a client that has left
                name, data = job.events[sent]
            about = json.dumps({"type": name} | data).encode()
            event = b"event: " + name.encode() + end + b"data: " + about + end + end
            for at in range(0, len(event), 400):  # never where an event ends
                self.chunk(event[at : at + 400])
            sent += 1
            if name.removeprefix("job.") in ("completed", "failed", "cancelled"):
                return self.chunk(b"")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
