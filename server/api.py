"""The server's own routes: services, jobs, forecasts and pictures as the source's tools ask for them."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusionz.server import calls
from diffusionz.server.caller import Caller
from diffusionz.server.calls import json_body, json_response, state_of
from diffusionz.server.decoding import decode
from diffusionz.server.jobs import Job, Order
from diffusionz.server.problems import Problem


class _Head(msgspec.Struct):
    """What /api/service reads of a body before it knows the service."""

    service: str | None = None
    stream: bool = False
    background: bool = False
    wallet_address: str | None = None
    response_format: str | None = None


async def service(request: Request) -> Response:
    """POST /api/service"""
    caller = await state_of(request).callers.caller(request)
    body = await json_body(request)
    head = decode(body, _Head)
    if head.background:
        return await _accepted(request, caller, body, head)
    job, headers = await _submitted(request, caller, body, head)
    if head.stream:
        return calls.events(request, job, headers, cancel_when_gone=True)
    await calls.ended(request, job)
    if head.response_format == "binary" and (response := _file(job, headers)):
        return response
    return calls.picture(request, job, headers) or json_response(job.shown(), headers=headers)


async def jobs(request: Request) -> Response:
    """POST and GET /api/jobs"""
    caller = await state_of(request).callers.caller(request)
    if request.method != "POST":  # HEAD is a GET, too
        return json_response({"jobs": [job.shown() for job in state_of(request).jobs.list(caller)]})
    body = await json_body(request)
    return await _accepted(request, caller, body, decode(body, _Head))


async def _submitted(request: Request, caller: Caller, body: bytes, head: _Head) -> tuple[Job, dict[str, str]]:
    state = state_of(request)
    order = await state.service(head.service).order(body)
    await calls.check_wallet(request, caller, head.wallet_address)
    if head.stream:
        state.streams.check(caller.account)
    return await calls.submit(request, order, caller, body)


async def _accepted(request: Request, caller: Caller, body: bytes, head: _Head) -> Response:
    job, headers = await _submitted(request, caller, body, head)
    return json_response(job.shown(), 202, headers | {"location": f"/api/jobs/{job.id}"})


async def generate(request: Request) -> Response:
    """POST /generate: the file itself, unless another answer is asked for."""
    body = await json_body(request)
    head = decode(body, _Head)
    asked = head.response_format
    job, headers = await _direct(request, "zimage", body, head)
    # Whatever Accept says: `curl --json ... -o out.webp` asks for JSON, and means the file.
    if asked in (None, "binary"):
        response = calls.picture(request, job, headers) or _file(job, headers)
        assert response is not None
        return response
    return _result(job, headers)


async def forecast(request: Request) -> Response:
    """POST /forecast and /forecast_batch"""
    body = await json_body(request)
    job, headers = await _direct(request, "chronos2", body, decode(body, _Head))
    return _result(job, headers)


async def _direct(request: Request, name: str, body: bytes, head: _Head) -> tuple[Job, dict[str, str]]:
    """The ended job of a route that is one service's."""
    state = state_of(request)
    caller = await state.callers.caller(request)
    order: Order = await state.service(name).order(body)
    await calls.check_wallet(request, caller, head.wallet_address)
    job, headers = await calls.submit(request, order, caller, body)
    await calls.ended(request, job)
    return job, headers


def _result(job: Job, headers: dict[str, str]) -> Response:
    """The result's members, with the job's id."""
    assert job.result is not None
    json = job.result.json
    return Response(b'{"id":"' + job.id.encode() + b'",' + json[1:], headers=headers, media_type="application/json")


def _file(job: Job, headers: dict[str, str]) -> Response | None:
    assert job.result is not None
    if not job.result.files:
        return None
    file = job.result.files[0]
    seed = orjson.loads(job.result.json)["images"][0]["seed"]
    return Response(file.content, headers=headers | {"x-seed": str(seed)}, media_type=file.content_type)


# --- One job ---


async def _own(request: Request) -> Job:
    state = state_of(request)
    return state.jobs.find(request.path_params["id"], await state.callers.caller(request))


async def job(request: Request) -> Response:
    """GET and DELETE /api/jobs/{id}"""
    found = await _own(request)
    if request.method == "DELETE":
        found.cancel()
    return json_response(found.shown())


async def cancel(request: Request) -> Response:
    """POST /api/jobs/{id}/cancel"""
    found = await _own(request)
    found.cancel()
    return json_response(found.shown())


async def result(request: Request) -> Response:
    """GET /api/jobs/{id}/result"""
    found = await _own(request)
    if found.problem is not None:
        raise found.problem
    if found.result is None:
        raise Problem("conflict", f"the job is {found.status}, its result is not there yet", retry_after_s=1)
    return Response(found.result.json, media_type="application/json")


async def events(request: Request) -> Response:
    """GET /api/jobs/{id}/events"""
    found = await _own(request)
    return calls.events(request, found, {}, cancel_when_gone=False)


async def image(request: Request) -> Response:
    """GET /api/jobs/{id}/images/{number}.{extension} and videos: for whoever has the job's id, which cannot be guessed,
    so that a URL can be given on."""
    found = state_of(request).jobs.find(request.path_params["id"])
    number, extension = request.path_params["number"], request.path_params["extension"]
    files = found.result.files if found.result else ()
    if number >= len(files) or files[number].extension != extension:
        raise Problem("not-found", "the job has no such file")
    return Response(
        files[number].content,
        headers={"cache-control": "private, max-age=3600, immutable"},
        media_type=files[number].content_type,
    )


# --- Models ---


async def ps(request: Request) -> Response:
    """GET /api/ps"""
    return json_response({"models": state_of(request).models.ps()})


class Load(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    keep_alive: float | str | None = None


async def load(request: Request) -> Response:
    """POST /api/load"""
    asked, models = await _of_operator(request)
    await models.load(asked.model, asked.keep_alive)
    return json_response({"models": models.ps()})


async def unload(request: Request) -> Response:
    """POST /api/unload"""
    asked, models = await _of_operator(request)
    await models.unload(asked.model)
    return json_response({"models": models.ps()})


async def _of_operator(request: Request) -> tuple[Load, Any]:
    state = state_of(request)
    state.check_operator(request)
    return decode(await json_body(request), Load), state.models


def routes() -> list[Route]:
    """In the order of how often they are asked for: Starlette looks from the first on."""
    return [
        Route("/forecast", forecast, methods=["POST"]),
        Route("/api/service", service, methods=["POST"]),
        Route("/forecast_batch", forecast, methods=["POST"]),
        Route("/generate", generate, methods=["POST"]),
        Route("/api/jobs", jobs, methods=["GET", "POST"]),
        Route("/api/jobs/{id}", job, methods=["GET", "DELETE"]),
        Route("/api/jobs/{id}/events", events),
        Route("/api/jobs/{id}/result", result),
        Route("/api/jobs/{id}/cancel", cancel, methods=["POST"]),
        Route("/api/jobs/{id}/images/{number:int}.{extension}", image),
        Route("/api/jobs/{id}/videos/{number:int}.{extension}", image),
        Route("/api/ps", ps),
        Route("/api/load", load, methods=["POST"]),
        Route("/api/unload", unload, methods=["POST"]),
    ]
