"""What operators and their tools ask: is it alive, does it take work, what does it count."""

from __future__ import annotations

import dataclasses

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from diffusionz.server.calls import json_response, state_of

_ALIVE = b'{"status":"ok"}'


async def healthz(request: Request) -> Response:
    """GET /healthz: 200 as long as the event loop turns."""
    return Response(_ALIVE, media_type="application/json")


async def readyz(request: Request) -> Response:
    """GET /readyz: 503 while it starts, which takes a first look for prices too, or drains."""
    state = state_of(request)
    started = state.ready and (state.ledger is None or state.ledger.keeper.asked_for_rates())
    reason = "draining" if state.jobs.draining else "" if started else "starting"
    about = {"status": reason or "ok", "jobs": state.jobs.active, "models": [row["name"] for row in state.models.ps()]}
    if state.ledger is not None:
        about["payments"] = state.ledger.keeper.status()
    return json_response(about, 503 if reason else 200, {"retry-after": "5"} if reason else None)


async def metrics(request: Request) -> Response:
    """GET /metrics, for the operator."""
    state = state_of(request)
    state.check_operator(request, loopback=True)
    return PlainTextResponse(state.metrics.text(), media_type="text/plain; version=0.0.4")


async def limits(request: Request) -> Response:
    """GET /api/limits"""
    return json_response(dataclasses.asdict(state_of(request).limits))


def routes() -> list[Route]:
    return [
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/api/limits", limits),
    ]
