"""The JSON-RPC methods over HTTP: an ASGI application for uvicorn, and a transport that needs no socket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx2

from diffusionz.payments.devnet.faults import ConnectionLost
from diffusionz.payments.devnet.rpc import Rpc

_HEADERS = [(b"content-type", b"application/json; charset=utf-8")]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


def application(rpc: Rpc) -> Application:
    """POST / is JSON-RPC, GET /health says "ok". Everything runs on the event loop's thread, as LiteSVM demands."""

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"a devnet serves HTTP, not {scope['type']}")
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["method"] == "GET" and scope["path"] == "/health":
            status, answer = 200, b"ok"
        elif scope["method"] != "POST":
            status, answer = 405, b"Used HTTP Method is not allowed. POST or OPTIONS is required\n"
        else:
            try:
                status, answer = rpc.reply(body)
            except ConnectionLost:
                status, answer = 504, b"upstream request timeout"
        await send({"type": "http.response.start", "status": status, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": answer})

    return app


class Transport(httpx2.AsyncBaseTransport):
    """Carries an HTTP client's requests to `rpc` within the process."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = await request.aread()
        try:
            status, answer = self._rpc.reply(body)
        except ConnectionLost:
            raise httpx2.ReadTimeout("the devnet lost the reply", request=request) from None
        return httpx2.Response(status, headers=_HEADERS, content=answer)
