"""Runs the application under uvicorn, from the first log line to the last job."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from diffusionz import ArgumentError, DiffusionzError
from diffusionz._context import byte_count
from diffusionz.hub import locate
from diffusionz.server import logs, providers
from diffusionz.server.app import create_app
from diffusionz.server.connection import Connection
from diffusionz.server.forecasts import Forecasts
from diffusionz.server.jobs import Service
from diffusionz.server.metrics import Metrics
from diffusionz.server.models import Models, parse_keep_alive
from diffusionz.server.pictures import Pictures
from diffusionz.server.settings import Settings

logger = logging.getLogger(__name__)

LINGER_S = 5  # for connections, once all jobs have ended


def run(settings: Settings) -> int:
    """Serves until it is told to stop; returns the exit status. Raises ArgumentError, OSError, PaymentsError."""
    # The engine's threads spin for milliseconds while they wait for each other, and would take the cores from those who
    # answer; if they slept at once, each of a forecast's many waits would cost a wake-up. Some 50 us are enough.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    logs.configure(settings.log_format)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    metrics = Metrics()
    models = Models(
        settings.models,
        metrics,
        budget_bytes=byte_count("memory_budget", settings.memory_budget),
        keep_alive_s=parse_keep_alive(settings.keep_alive),
    )
    for spec in settings.models:
        try:
            locate(spec.model, spec.family)
        except DiffusionzError as error:  # it may come yet, and the others can be served
            logger.warning("model %s is not there: %s", spec.name, error)
    with _listening(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        async with contextlib.AsyncExitStack() as stack:
            ledger = await _ledger(settings, address, stack)
            services: list[Service] = [
                Pictures(models, settings.limits, devices=settings.device_count),
                Forecasts(models, settings.limits, metrics),
                *await stack.enter_async_context(
                    providers.opened(settings, ledger.settings.prices if ledger else None)
                ),
            ]
            app = create_app(settings, models, ledger, services=services)
            config = uvicorn.Config(
                app,
                loop="none",
                http=functools.partial(Connection, limits=settings.limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=LINGER_S,
                proxy_headers=settings.trusted_proxies is not None,
                forwarded_allow_ips=settings.trusted_proxies,
            )
            server = _Server(config, app.parts.jobs, settings.drain_s)
            collect_seldom()
            _announce(settings, f"http://{address}")
            await server.serve(sockets=[listener])
            return 0 if server.started else 1


def collect_seldom() -> None:
    """Has Python's collector look for cycles more seldom, and never among what is there now.

    By default it looks after every 700 objects that stay, through all of them every so often: bodies of many small
    lists and twenty thousand jobs that are kept made it a quarter of a request's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


async def _ledger(settings: Settings, address: str, stack: contextlib.AsyncExitStack) -> Any:
    """The ledger that the settings ask for; None for a server that gives its work away."""
    if settings.free:
        return None
    from diffusionz.server.credits import Credits
    from diffusionz.server.ledger import Ledger

    if settings.dev:
        from diffusionz.payments.devshop import dev_shop

        domain = settings.public_url.partition("://")[2] if settings.public_url else address
        shop, faucet = await stack.enter_async_context(dev_shop(domain=domain, uri=settings.public_url))
        return Ledger(shop, faucet)
    from diffusionz.payments import settings as payments

    ledger = Ledger(payments.load(settings.payments))
    async with Credits(ledger.settings):  # a ledger that cannot be opened is said in a line, before uvicorn starts
        return ledger


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ArgumentError for an address that is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=False)
    except OSError as error:
        raise ArgumentError(f"{host} port {port} cannot be listened at: {error.strerror or error}") from None


def _announce(settings: Settings, url: str) -> None:
    if settings.log_format == "json":
        logger.info("listening", extra={"fields": {"url": url}})
        return
    who = {
        "free": "calls are free" + (", for everybody" if settings.free_for_all else ", for this machine alone"),
        "dev": "calls cost tokens of a dev chain, which the faucet gives away",
        "payments": f"calls cost tokens, by {settings.payments}",
    }[settings.mode]
    names = ", ".join(spec.name for spec in settings.models)
    print(f"diffusionz at {url}  ({names}; {who}); Ctrl-C stops it", file=sys.stderr)


class _Server(uvicorn.Server):
    """Lets jobs end before it closes: at the first signal it takes no new ones and says so at /readyz, while whoever
    waits goes on waiting; at the second all are cancelled, and given back; at the third it is gone."""

    def __init__(self, config: uvicorn.Config, jobs: Any, drain_s: float) -> None:
        super().__init__(config)
        self._jobs = jobs
        self._drain_s = drain_s
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # every second
            now = self._loop.time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.close_if_late(now)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not told to uvicorn, which would raise the signal again at its end, before all else is closed.
        self._signals += 1
        if not self.started:
            self.should_exit = True
        elif self._signals == 1:
            self._loop.call_soon_threadsafe(self._drain)
        elif self._signals == 2:
            self._loop.call_soon_threadsafe(self._hurry)
        else:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)

    def _hurry(self) -> None:
        logger.warning("told again to stop: %d jobs are cancelled", self._jobs.active)
        self._jobs.cancel_all()
        self.should_exit = True

    def _drain(self) -> None:
        async def drain() -> None:
            logger.info("draining: %d jobs wait or run", self._jobs.active)
            await self._jobs.drain(self._drain_s)
            self.should_exit = True

        if self._draining is None:
            self._draining = asyncio.create_task(drain())
