"""A connection, with bounds for the head of a request, for which uvicorn's parser has none."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from diffusionz.server.limits import Limits


class Connection(HttpToolsProtocol):
    """uvicorn's. It is closed when a head grows beyond `head_bytes`, and by `close_if_late` when one is not whole after
    `head_s`; a connection that has sent nothing yet counts as one. Between two requests uvicorn itself closes it."""

    def __init__(self, *, limits: Limits, **parts: Any) -> None:
        super().__init__(**parts)
        self._limits = limits
        self._began: float | None = None  # a head that is not whole yet, in the loop's time
        self._size = 0  # what has come of it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._began = self.loop.time()

    def data_received(self, data: bytes) -> None:
        began = self._began
        super().data_received(data)
        if began is None or self._began is not began:  # these bytes are of another request, too
            return
        self._size += len(data)
        if self._size > self._limits.head_bytes and not self.transport.is_closing():
            self.send_400_response(f"The head of a request has at most {self._limits.head_bytes} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._began is None:  # else it counts from when the connection was made
            self._began = self.loop.time()

    def on_headers_complete(self) -> None:
        self._began, self._size = None, 0
        super().on_headers_complete()

    def close_if_late(self, now: float) -> None:
        """now: the loop's time."""
        if self._began is not None and now - self._began > self._limits.head_s and not self.transport.is_closing():
            self.transport.close()
