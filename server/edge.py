"""The outermost layer, pure ASGI: request ids, size and time of bodies, headers of every answer, and the log line."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusionz.server.problems import Problem
from diffusionz.server.state import State

logger = logging.getLogger("diffusionz.server.access")

_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_BOOT = secrets.token_hex(6)
_NUMBERS = itertools.count(1)

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
]


class Edge:
    """Wraps the whole application."""

    def __init__(self, app: ASGIApp, parts: State) -> None:
        self.app = app
        self.parts = parts
        self.limits = parts.limits
        self.metrics = parts.metrics
        self.access_log = parts.settings.access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id, length = b"", None
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = value if _ID.fullmatch(value) else b""
            elif name == b"content-length":
                length = value
        request_id = request_id or b"%s-%d" % (_BOOT.encode(), next(_NUMBERS))
        scope["request_id"] = request_id.decode()
        scope["parts"] = self.parts
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *_HEADERS]
            await send(message)

        try:
            if length is not None and length.isdigit() and int(length) > self.limits.body_bytes:
                await self._too_large().response(scope["request_id"])(scope, receive, sending)
            else:
                await self.app(scope, self._limited(receive), sending)
        finally:
            seconds = time.perf_counter() - began
            self.metrics.answered(scope["method"], status, seconds)
            if self.access_log:
                logger.info(
                    "request",
                    extra={
                        "fields": {
                            "request_id": scope["request_id"],
                            "method": scope["method"],
                            "path": scope["path"],
                            "status": status,
                            "ms": round(seconds * 1e3, 2),
                            "client": (scope.get("client") or ("",))[0],
                        }
                    },
                )

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, which fails for a body that is too large, or comes too slowly."""
        read, deadline = 0, 0.0

        async def receiving() -> Message:
            nonlocal read, deadline
            if read < 0:  # the body was read: this waits for the client to leave, however long
                return await receive()
            if not deadline:
                deadline = asyncio.get_running_loop().time() + self.limits.body_s
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Problem(
                    "too-large",
                    f"the body did not arrive within {self.limits.body_s:g} seconds",
                    headers={"connection": "close"},
                ) from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self.limits.body_bytes:
                    raise self._too_large()
                if not message.get("more_body", False):
                    read = -1
            return message

        return receiving

    def _too_large(self) -> Problem:
        return Problem(
            "too-large",
            f"the body is over {self.limits.body_bytes} bytes, which are allowed",
            headers={"connection": "close"},
        )
