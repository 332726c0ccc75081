"""From a request to a job, and from a job to an answer: what all routes that call a service share."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from diffusionz.server.caller import Caller
from diffusionz.server.jobs import Job, Order
from diffusionz.server.problems import Problem, invalid

if TYPE_CHECKING:
    from diffusionz.server.state import State, Streams

HEARTBEAT_S = 10.0
PATIENCE_S = 0.05  # before it is looked whether the client is still there

_KEY = re.compile(r"[!-~]{1,255}")


def state_of(request: Request) -> State:
    """The parts of the server that a request belongs to."""
    state: State = request.scope["parts"]
    return state


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


async def json_body(request: Request) -> bytes:
    """The body of a request with JSON. Raises Problem for another type."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise Problem("unsupported-media-type", f"the body is {kind[:60]!r}; it must be application/json")
    # As request.body() does, without a generator for what mostly is one message.
    chunks: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


async def check_wallet(request: Request, caller: Caller, wallet: str | None, param: str = "wallet_address") -> None:
    """Raises Problem for a wallet that is not of the caller's account: naming an address opens nothing."""
    credits = state_of(request).credits
    if wallet is not None and credits is not None and wallet not in await credits.wallets(caller.account):
        raise Problem("forbidden", "the wallet is not one of the account's that calls", param=param)


async def submit(request: Request, order: Order, caller: Caller, body: bytes) -> tuple[Job, dict[str, str]]:
    """(the job of a request, the headers that its answer has to carry). Raises Problem."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise invalid("the Idempotency-Key must be 1 to 255 visible ASCII characters", param="Idempotency-Key")
    digest = hashlib.blake2b(request.scope["path"].encode() + b"\n" + body, digest_size=24).hexdigest()
    job, replayed = await state_of(request).jobs.submit(
        order, caller, request_hash=digest, request_id=request.scope["request_id"], idempotency_key=key
    )
    return job, {"x-job-id": job.id} | ({"idempotency-replayed": "true"} if replayed else {})


async def ended(request: Request, job: Job) -> Job:
    """The job, when it is completed. A client that leaves cancels it, unless it has an Idempotency-Key or somebody
    else watches. Raises Problem when it came to nothing."""
    job.watchers += 1
    try:
        # Most forecasts end sooner than a task that listens for the client's leaving would have cost.
        stays = await job.wait(PATIENCE_S) or await _stays(request, job)
    finally:
        job.watchers -= 1
    if not stays:
        _abandon(job)
        raise Problem("cancelled", "the client has left")
    if job.problem is not None:
        raise job.problem
    return job


def _abandon(job: Job) -> None:
    """A client has left its call: it is cancelled when nobody else watches, and no Idempotency-Key says that its answer
    will be asked for. Quiet after its end."""
    if not job.watchers and job.key is None:
        job.cancel()


async def _stays(request: Request, job: Job) -> bool:
    """Waits for the job; False when the client left before its end."""
    done, gone = asyncio.ensure_future(job.wait()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
        return done.done()
    finally:
        done.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


Told = Callable[[Job, str, dict[str, Any]], Iterable[tuple[str, dict[str, Any]]]]
"""(job, name, data) of an event -> the events that the client is sent for it."""


def events(
    request: Request, job: Job, headers: dict[str, str], *, cancel_when_gone: bool, told: Told | None = None
) -> Response:
    """The job's events as a stream; a Problem in its place when the caller has too many open."""
    return _Events(
        _stream(job, told or _with_pictures),
        headers=headers | {"cache-control": "no-store", "x-accel-buffering": "no"},
        media_type="text/event-stream",
        job=job,
        streams=state_of(request).streams,
        cancel_when_gone=cancel_when_gone,
    )


class _Events(StreamingResponse):
    """A stream that counts while it is open, and whose client watches the job as long."""

    def __init__(self, *args: Any, job: Job, streams: Streams, cancel_when_gone: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._job = job
        self._streams = streams
        self._cancel_when_gone = cancel_when_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self._job
        job.watchers += 1
        try:
            with self._streams.opened(job.caller.account):
                await super().__call__(scope, receive, send)
        finally:
            # Nothing is awaited here: a client that has left has this task cancelled at each await.
            job.watchers -= 1
            if self._cancel_when_gone:
                _abandon(job)


async def _stream(job: Job, told: Told) -> AsyncIterator[bytes]:
    iterator = job.events()
    coming: asyncio.Future[Any] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(iterator))
            done, _ = await asyncio.wait((coming,), timeout=HEARTBEAT_S)
            if not done:
                yield b": still there\n\n"
                continue
            try:
                name, data = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            for event, about in told(job, name, data):
                yield b"event: %s\ndata: %s\n\n" % (event.encode(), orjson.dumps({"type": event} | about))
    finally:
        if coming is not None:
            coming.cancel()


def _with_pictures(job: Job, name: str, data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """An event, after an image_generation.completed of each picture when it is the last one."""
    if name != "job.completed" or job.result is None or not job.result.files:
        return [(name, data)]
    images = orjson.loads(job.result.json).get("images", [])
    return [*(("image_generation.completed", {"index": i} | image) for i, image in enumerate(images)), (name, data)]


def picture(request: Request, job: Job, headers: dict[str, str]) -> Response | None:
    """The first picture as the body, when the client accepts that rather than JSON."""
    assert job.result is not None
    wanted = request.headers.get("accept", "*/*")
    if not job.result.files or "application/json" in wanted or "image/" not in wanted:
        return None
    file = job.result.files[0]
    if file.content_type not in wanted and not ("image/*" in wanted and file.content_type.startswith("image/")):
        raise Problem("not-acceptable", f"the picture is {file.content_type}; ask for it, or say another format")
    return Response(file.content, headers=headers, media_type=file.content_type)
