"""A loopback server, and both clients as one: what is asked of one is asked of the other, too."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from diffusionz import _client_core as core
from diffusionz.client import AsyncClient, AsyncJob, AsyncPicture, Client
from tests.client.fake import Fake


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once."""
    monkeypatch.setattr(core, "BACKOFF_S", 0.01)
    monkeypatch.setattr(core, "BACKOFF_MAX_S", 0.02)
    monkeypatch.setattr(core, "POLL_S", 0.01)


@pytest.fixture
def fake(quick: None) -> Iterator[Fake]:
    server = Fake()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.hold.clear()
    server.shutdown()
    server.server_close()


class Awaited:
    """An asynchronous object whose methods block, in an event loop of its own thread."""

    def __init__(self, target: Any, portal: Any) -> None:
        self._target = target
        self._portal = portal

    def __getattr__(self, name: str) -> Any:
        if name == "content" and isinstance(self._target, AsyncPicture):
            return self._portal.call(self._target.read)
        value = getattr(self._target, name)
        if inspect.iscoroutinefunction(value):
            return lambda *args, **fields: self._wrapped(self._portal.call(functools.partial(value, *args, **fields)))
        if inspect.ismethod(value) and name in ("events", "billing_history"):
            return lambda *args, **fields: self._walked(value(*args, **fields))
        return value

    def _walked(self, iterator: Any) -> Iterator[Any]:
        try:
            while True:
                yield self._portal.call(iterator.__anext__)
        except StopAsyncIteration:
            return
        finally:
            self._portal.call(iterator.aclose)

    def _wrapped(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._wrapped(item) for item in value]
        return Awaited(value, self._portal) if isinstance(value, (AsyncJob, AsyncPicture)) else value

    def __repr__(self) -> str:
        return repr(self._target)


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Any]:
    """make(...): a client, of either kind."""
    if request.param == "sync":
        clients: list[Client] = []

        def make_one(*args: Any, **fields: Any) -> Any:
            clients.append(Client(*args, **fields))
            return clients[-1]

        yield make_one
        for client in clients:
            client.close()
    else:
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal() as portal:
            awaited: list[Awaited] = []

            def make_awaited(*args: Any, **fields: Any) -> Any:
                awaited.append(Awaited(AsyncClient(*args, **fields), portal))
                return awaited[-1]

            yield make_awaited
            for one in awaited:
                one.aclose()


@pytest.fixture
def client(make: Any, fake: Fake) -> Any:
    return make(fake.url, timeout=60)
