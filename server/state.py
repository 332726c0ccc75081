"""The parts of a running server, by name: what its routes reach through `state_of(request)`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING

from starlette.requests import Request

from diffusionz.server.caller import Callers, is_loopback
from diffusionz.server.jobs import Jobs, Service
from diffusionz.server.limits import Limits
from diffusionz.server.metrics import Metrics
from diffusionz.server.models import Models
from diffusionz.server.problems import Problem, invalid
from diffusionz.server.settings import Settings

if TYPE_CHECKING:
    from diffusionz.server.credits import Credits
    from diffusionz.server.ledger import Ledger

logger = logging.getLogger(__name__)


class Streams:
    """How many event streams an account has open."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def opened(self, account: str) -> Iterator[None]:
        """One more, for the time of the block. Raises Problem when no more may be open."""
        self.check(account)
        self._open[account] += 1
        try:
            yield
        finally:
            self._open[account] -= 1
            if not self._open[account]:
                del self._open[account]

    def check(self, account: str) -> None:
        """Raises Problem when no more may be opened; before a job is made whose events nobody could then be told."""
        if self._open[account] >= self._most:
            raise Problem(
                "rate-limited", f"{self._most} event streams are open, which are allowed; close one", retry_after_s=5
            )


@dataclasses.dataclass(eq=False)
class State:
    """See the modules of the same names. ledger is None where nothing costs anything."""

    settings: Settings
    metrics: Metrics
    models: Models
    services: Mapping[str, Service]
    jobs: Jobs
    callers: Callers
    streams: Streams
    ledger: Ledger | None = None
    ready: bool = False

    @property
    def limits(self) -> Limits:
        return self.settings.limits

    @property
    def credits(self) -> Credits | None:
        return self.ledger.credits if self.ledger else None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From the first request that may be taken to the last that has ended."""
        metrics = self.metrics
        metrics.gauge("jobs_active", "Jobs that wait or run.", lambda: self.jobs.active)
        metrics.gauge("models_bytes", "Weights of the models that are loaded.", lambda: self.models.held_bytes)
        for service in self.services.values():
            if (lane := service.lane) is not None:
                metrics.gauge(
                    f"{service.name}_queue_depth", "Jobs that wait for a device.", lambda lane=lane: lane.depth
                )
        async with contextlib.AsyncExitStack() as stack:
            if self.ledger is not None:
                await stack.enter_async_context(self.ledger.opened())
            stack.push_async_callback(self.models.close)
            stack.push_async_callback(self.jobs.drain, self.settings.drain_s)
            loading = asyncio.create_task(self._preload())
            try:
                yield
            finally:
                loading.cancel()

    async def _preload(self) -> None:
        for name in self.settings.preload:
            try:
                await self.models.preload(name)
            except Exception as error:  # the other models can be served all the same
                logger.error("preload %s: %s", name, error)
        self.ready = True

    def service(self, name: str | None) -> Service:
        """Raises Problem."""
        known = ", ".join(self.services)
        if name is None:
            raise invalid(f"service is missing; there are: {known}", param="service")
        if name not in self.services:
            raise Problem("not-found", f"there is no service {name[:64]!r}; there are: {known}", param="service")
        return self.services[name]

    def check_operator(self, request: Request, *, loopback: bool = False) -> None:
        """Raises Problem for who is not the operator: who has the token, or calls a server of this machine's own from
        it; with `loopback` also any other from this machine."""
        settings = self.settings
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if settings.admin_token and scheme.lower() == "bearer":
            if hmac.compare_digest(token.strip().encode(), settings.admin_token.encode()):
                return
        own = settings.dev or (settings.free and not settings.free_for_all)
        if (own or loopback) and is_loopback(request):
            return
        raise Problem("forbidden", "this is the operator's: it needs DIFFUSIONZ_ADMIN_TOKEN as its Bearer token")
