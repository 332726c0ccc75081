"""The application: which parts there are, and which routes reach them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from diffusionz import DiffusionzError
from diffusionz.server import a1111, accounts, api, openai, openapi, operations, page, sagemaker
from diffusionz.server.caller import Callers
from diffusionz.server.edge import Edge
from diffusionz.server.jobs import Jobs, Service
from diffusionz.server.models import Models
from diffusionz.server.problems import Problem, problem_of
from diffusionz.server.settings import Settings
from diffusionz.server.state import State, Streams

if TYPE_CHECKING:
    from diffusionz.server.ledger import Ledger


def create_app(
    settings: Settings, engines: Models, ledger: Ledger | None = None, *, services: Iterable[Service]
) -> Edge:
    """The ASGI application of a server that has these models and, where calls cost something, this ledger."""
    metrics = engines.metrics
    registry: Mapping[str, Service] = {service.name: service for service in services}
    jobs = Jobs(settings.limits, metrics, ledger.till if ledger else None)
    callers = Callers(ledger.credits if ledger else None)
    streams = Streams(settings.limits.events_per_key)
    state = State(settings, metrics, engines, registry, jobs, callers, streams, ledger)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with state.running():
            yield

    routes: list[BaseRoute] = [
        *api.routes(),
        *operations.routes(),
        *openai.routes(),
        *sagemaker.routes(),
        *accounts.routes(),
        *a1111.routes(),
        *openapi.routes(),
        *page.routes(_page(state)),
    ]
    # Errors that have a meaning are named: Starlette raises again, into the log, what only Exception's handler answers.
    handlers: dict[Any, Any] = {HTTPException: _refused, Problem: _problem, Exception: _problem}
    handlers |= {DiffusionzError: _problem, MemoryError: _problem, ClientDisconnect: _left}
    if ledger is not None:
        from diffusionz.payments.errors import PaymentsError

        handlers[PaymentsError] = _problem
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Edge(app, state)


def _page(state: State) -> page.Context:
    """What the pages say of this server."""
    import diffusionz
    from diffusionz.payments.prices import format_usd

    models = [
        {"name": spec.name, "family": spec.family, "width": spec.side_pixels, "height": spec.side_pixels}
        for spec in state.models.specs
    ]
    settings, ledger = state.settings, state.ledger
    services, token = [], {}
    if ledger is not None:
        prices = ledger.settings.prices
        services = [
            {
                "name": name,
                "unit": prices[name].unit,
                "per": prices[name].per,
                "usd": format_usd(prices[name].micro_usd),
            }
            for name in state.services
            if name in prices
        ]
        token = {"symbol": ledger.settings.token_symbol, "decimals": ledger.settings.token_decimals}
    return page.Context(
        diffusionz.__version__,
        settings.limits,
        free=settings.free,
        dev=settings.dev,
        models=models,
        services=services,
        token=token,
    )


async def _problem(request: Request, error: Exception) -> Response:
    request_id = request.scope.get("request_id")
    return problem_of(error, request_id).response(request_id)


async def _left(request: Request, error: Exception) -> Response:
    """The client has left before its request was all here. Nobody reads this; the status is for the metrics."""
    return Response(status_code=499)


async def _refused(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: an unknown path, a method that a path has not."""
    assert isinstance(error, HTTPException)
    kind = {404: "not-found", 405: "method-not-allowed", 413: "too-large"}.get(error.status_code, "invalid-request")
    detail = f"there is nothing at {request.url.path[:200]}" if kind == "not-found" else str(error.detail)
    return Problem(kind, detail, headers=dict(error.headers or {})).response(request.scope.get("request_id"))
