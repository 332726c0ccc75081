"""fal.ai's queue on loopback, over real HTTP, with everything that can go wrong: a request's prompt names its fault.

    with fal_server() as fal:
        ...                     # fal.url; fal.asked, what was asked; fal.cancelled, the ids

The shapes are those of https://docs.fal.ai/model-endpoints/queue: each look at a request takes it one place on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

KEY = "key-id-0123456789:secret-abcdefghijklmnop"
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 40
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
MP4 = b"\x00\x00\x00\x18ftypmp42" + bytes(range(256)) * 100
PLACES, STEPS = 2, 3


@dataclasses.dataclass
class Asked:
    """A request of the queue's API."""

    id: str
    model: str
    arguments: dict[str, Any]
    headers: dict[str, str]
    looks: int = 0

    @property
    def fault(self) -> str:
        prompt = str(self.arguments.get("prompt", ""))
        return prompt.removeprefix("fault ") if prompt.startswith("fault ") else ""


class FalServer:
    def __init__(self) -> None:
        self.url = ""
        self.asked: dict[str, Asked] = {}
        self.cancelled: list[str] = []
        self.keys_at_media: list[str] = []
        self.elsewhere = ""
        """Another server of this machine, which nobody must be sent to."""
        self.touched: list[str] = []
        """What was asked of it."""
        self.down = False
        self._tries: dict[str, int] = {}
        self._numbers = itertools.count(1)

    def of(self, prompt: str) -> list[Asked]:
        """What was asked with a prompt."""
        return [asked for asked in self.asked.values() if asked.arguments.get("prompt") == prompt]

    # --- ASGI ---

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while (message := await receive()) and message.get("more_body"):
            body += message["body"]
        body += message.get("body", b"")
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        exchange = Exchange(send)
        path = scope["path"].strip("/").split("/")
        if path[0] == "files":
            await self._media(exchange, path[1], path[2], headers)
            return
        if self.down:
            await exchange.json(503, {"detail": "down"})
            return
        if headers.get("authorization") != f"Key {KEY}":
            await exchange.json(401, {"detail": "Cannot access application: authentication is required"})
            return
        if scope["method"] == "POST":
            await self._submit(exchange, "/".join(path), json.loads(body), headers)
            return
        # owner/app/requests/id[/status|/cancel]: without the model's subpath
        at = path.index("requests")
        asked = self.asked.get(path[at + 1])
        if asked is None or at != 2 or asked.model.split("/")[:2] != path[:2]:
            await exchange.json(404, {"detail": "Request not found"})
            return
        match [scope["method"], *path[at + 2 :]]:
            case ["GET", "status"]:
                await self._status(exchange, asked)
            case ["GET"]:
                await self._result(exchange, asked)
            case ["PUT", "cancel"]:
                self.cancelled.append(asked.id)
                await exchange.json(202, {"status": "CANCELLATION_REQUESTED"})
            case _:
                await exchange.json(405, {"detail": "Method Not Allowed"})

    async def _submit(self, exchange: Exchange, model: str, arguments: dict[str, Any], headers: dict[str, str]) -> None:
        asked = Asked(f"req-{next(self._numbers)}", model, arguments, headers)
        self.asked[asked.id] = asked
        base = f"{self.url}/{'/'.join(model.split('/')[:2])}/requests/{asked.id}"
        about = {
            "request_id": asked.id, "status": "IN_QUEUE", "queue_position": PLACES,
            "status_url": base + "/status", "response_url": base, "cancel_url": base + "/cancel",
        }  # fmt: skip
        match asked.fault:
            case "submit-drop":
                exchange.drop()
            case "submit-hang":
                await asyncio.sleep(30)
            case "submit-slow":
                await asyncio.sleep(2)
                await exchange.json(200, about)
            case "submit-500":
                await exchange.json(500, {"detail": "Internal\r\n\x1b[31m Server Error"})
            case "submit-401":
                await exchange.json(401, {"detail": f"bad key {KEY}, {KEY.split(':')[1]}"})
            case "submit-403":
                await exchange.json(403, {"detail": "User is locked. Reason: Exhausted balance."})
            case "submit-422":
                at = {"loc": ["body", "num_inference_steps"], "msg": "Input is wrong", "type": "less_than_equal"}
                await exchange.json(422, {"detail": [at]})
            case "submit-429":
                await exchange.json(429, {"detail": "Too many"}, [(b"retry-after", b"7")])
            case "submit-malformed":
                await exchange.raw(200, b"application/json", b"{nope")
            case "submit-elsewhere":
                await exchange.json(200, about | {"status_url": self.elsewhere + "/status"})
            case "submit-redirect":
                await exchange.raw(307, b"text/plain", b"", [(b"location", self.elsewhere.encode())])
            case _:
                await exchange.json(200, about)

    async def _status(self, exchange: Exchange, asked: Asked) -> None:
        asked.looks += 1
        match asked.fault:
            case "status-flaky" if asked.looks in (1, 3):
                exchange.drop() if asked.looks == 1 else await exchange.json(503, {"detail": "later"})
                return
            case "status-500":
                await exchange.json(500, {"detail": "Internal Server Error"})
                return
            case "status-hang":
                await asyncio.sleep(30)
            case "status-drip":
                await exchange.drip(b'{"status": "IN_QUEUE"', 0.25)
                return
            case "status-malformed":
                await exchange.raw(200, b"application/json", b'["IN_QUEUE"]')
                return
            case "status-unknown":
                await exchange.json(200, {"status": "PONDERING"})
                return
            case "status-huge":
                await exchange.endless(b"application/json")
                return
        looks = 1 if asked.fault == "never" else asked.looks
        if looks <= PLACES:
            await exchange.json(202, {"status": "IN_QUEUE", "queue_position": PLACES - looks, "request_id": asked.id})
        elif looks <= PLACES + STEPS:
            step = looks - PLACES
            logs = [{"message": f" 50%|##   | {step}/4 [00:00<00:00, 9.9it/s]", "level": "STDERR", "timestamp": "2026"}]
            await exchange.json(202, {"status": "IN_PROGRESS", "logs": logs})
        else:
            await exchange.json(200, {"status": "COMPLETED", "logs": [], "metrics": {"inference_time": 0.5}})

    async def _result(self, exchange: Exchange, asked: Asked) -> None:
        match asked.fault:
            case "result-policy":
                flagged = {
                    "loc": ["body", "prompt"], "msg": "The content was flagged by a content checker.",
                    "type": "content_policy_violation", "input": asked.arguments["prompt"],
                }  # fmt: skip
                await exchange.json(422, {"detail": [flagged]})
                return
            case "result-500":
                await exchange.json(500, {"detail": "The runner " + "failed " * 200})
                return
            case "result-html":
                await exchange.raw(502, b"text/html", b"<h1>nginx</h1>")
                return
            case "result-downstream":
                await exchange.json(400, {"detail": [{"msg": "Downstream", "type": "downstream_service_error"}]})
                return
            case "result-timeout":
                await exchange.json(504, {"detail": "Request timed out", "error_type": "request_timeout"})
                return
            case "result-malformed":
                await exchange.raw(200, b"application/json", b"\xff\xfe")
                return
            case "result-empty":
                await exchange.json(200, {"images": [], "seed": 1})
                return
        name = asked.fault or "good"
        seed = asked.arguments.get("seed", 4242)
        if "video" in asked.model:
            url = f"{self.url}/files/{name}/0.mp4"
            video = {"url": url, "content_type": "video/mp4", "width": 1920, "height": 1080, "duration": 6.0, "fps": 25}
            await exchange.json(200, {"video": video})
            return
        form = asked.arguments["output_format"]
        urls = {"media-file-url": "file:///etc/passwd", "media-data-url": "data:image/jpeg;base64,/9j/4AAQ"}
        size = asked.arguments["image_size"]
        side = size if isinstance(size, dict) else {"width": 1024, "height": 768}
        images = [
            {"url": urls.get(name, f"{self.url}/files/{name}/{asked.id}-{i}.{form}"), "content_type": f"image/{form}"}
            | side
            for i in range(asked.arguments["num_images"])
        ]
        flags = [asked.fault == "result-nsfw"] * len(images)
        about = {"images": images, "seed": seed, "has_nsfw_concepts": flags, "prompt": "...", "timings": {"x": 1.0}}
        await exchange.json(200, about)

    async def _media(self, exchange: Exchange, fault: str, name: str, headers: dict[str, str]) -> None:
        if "authorization" in headers:
            self.keys_at_media.append(name)
        tries = self._tries[name] = self._tries.get(name, 0) + 1
        kind, content = {
            "mp4": (b"video/mp4", MP4), "png": (b"image/png", PNG), "jpeg": (b"image/jpeg", JPEG),
        }[name.rpartition(".")[2]]  # fmt: skip
        to = {
            "media-private": self.elsewhere + "/secret",
            "media-metadata": "http://169.254.169.254/latest/meta-data/",
            "media-loop": f"{self.url}/files/media-loop/{name}",
            "media-moved": f"/files/good/{name}",
        }.get(fault)
        if to is not None:
            await exchange.raw(302, b"text/plain", b"", [(b"location", to.encode())])
            return
        match fault:
            case "media-404":
                await exchange.json(404, {"detail": "gone"})
            case "media-flaky" if tries == 1:
                exchange.drop()
            case "media-huge":
                await exchange.start(200, kind, [(b"content-length", b"99999999999")])
                exchange.drop()
            case "media-endless":
                await exchange.endless(kind, content)
            case "media-drip":
                await exchange.drip(content, 0.25)
            case "media-html":
                await exchange.raw(200, b"text/html", b"<script>alert(1)</script>")
            case "media-lies":
                await exchange.raw(200, kind, b"<script>alert(1)</script>")
            case "media-gzip":
                await exchange.raw(200, kind, b"\x1f\x8b" + content, [(b"content-encoding", b"gzip")])
            case "media-short":
                await exchange.start(200, kind, [(b"content-length", b"%d" % (len(content) + 1))])
                await exchange.part(content)
                exchange.drop()
            case _:
                await exchange.raw(200, kind, content)


class Exchange:
    """One answer, or what is left of it."""

    def __init__(self, send: Any) -> None:
        self._send = send

    async def start(self, status: int, kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *headers]}
        )

    async def part(self, data: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def raw(
        self, status: int, kind: bytes, data: bytes, headers: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        await self.start(status, kind, [*(headers or []), (b"content-length", b"%d" % len(data))])
        await self.part(data, more=False)

    async def json(self, status: int, value: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        await self.raw(status, b"application/json", json.dumps(value).encode(), headers)

    async def drip(self, data: bytes, pause_s: float) -> None:
        await self.start(200, b"image/jpeg", [(b"content-length", b"%d" % len(data))])
        for byte in data:
            await self.part(bytes([byte]))
            await asyncio.sleep(pause_s)

    async def endless(self, kind: bytes, first: bytes = b"") -> None:
        await self.start(200, kind, [])
        await self.part(first)
        for _ in range(2000):
            await self.part(bytes(2**16))
            await asyncio.sleep(0)

    def drop(self) -> None:
        """Ends the connection as a crash would."""
        self._send.__self__.transport.abort()


@contextlib.contextmanager
def fal_server() -> Iterator[FalServer]:
    fal = FalServer()

    async def elsewhere(scope: Any, receive: Any, send: Any) -> None:
        fal.touched.append(scope["path"])
        await Exchange(send).raw(200, b"image/jpeg", JPEG)

    with _serving(elsewhere) as fal.elsewhere, _serving(fal) as fal.url:
        yield fal


@contextlib.contextmanager
def _serving(app: Any) -> Iterator[str]:
    """The application on a free port of loopback, in a thread of its own."""
    config = uvicorn.Config(
        app, port=0, log_level="critical", lifespan="off", proxy_headers=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(5)
