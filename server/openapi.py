"""/openapi.json, the whole surface for programs, and /llms.txt, one page for agents. Both are made of the route table,
the request types and `OPERATIONS`, once, and are constant bytes from then on.

A test holds OPERATIONS against the routes: neither has what the other has not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import diffusionz
from diffusionz.server import a1111, accounts, api, openai, sagemaker
from diffusionz.server.caller import COOKIE
from diffusionz.server.calls import state_of
from diffusionz.server.models import FAMILIES
from diffusionz.server.page import Content
from diffusionz.server.problems import KINDS, Problem
from diffusionz.server.schemas import ForecastBatchRequest, ForecastRequest, ImageRequest
from diffusionz.server.state import State

# --- Answers, as types ---

Row = list[float | None]


class ErrorOfOpenAI(Struct):
    message: str
    type: str
    code: str
    param: str | None = None


class ProblemBody(Struct):
    """RFC 9457's problem, with OpenAI's error beside it. Some types have more members: see /docs."""

    type: Annotated[str, Meta(description="/problems/KIND")]
    title: str
    status: int
    detail: str
    error: ErrorOfOpenAI
    instance: Annotated[str, Meta(description="The request's id.")] | UnsetType = UNSET
    retry_after_s: int | UnsetType = UNSET


class Picture(Struct):
    url: Annotated[str, Meta(description="Of the file, relative to the server.")]
    b64_json: str | None
    width: int
    height: int
    seed: int
    content_type: str


class Pictures(Struct):
    """What zimage delivers."""

    images: list[Picture]
    prompt: str
    negative_prompt: str | None
    steps: int
    guidance: float
    model: str


class Forecast(Struct):
    """What chronos2 delivers of one series; of several targets each member is a list of them."""

    mean: list[float | Row | None]
    quantiles: Annotated[dict[str, list[float | Row | None]], Meta(description="level -> [steps]")]
    prediction_length: int
    summary: str | list[str]
    trend: Annotated[str | list[str], Meta(description="up, down, flat or anomaly.")] | UnsetType = UNSET


class Forecasts(Struct):
    """What chronos2 delivers of many series."""

    results: list[Forecast]


class WithId(Struct):
    id: Annotated[str, Meta(description="The job's.")]


class Cost(Struct):
    usd: str
    tokens: Annotated[int, Meta(description="Base units.")]
    charged: bool


class Progress(Struct):
    stage: str
    step: int
    step_count: int


class Job(Struct):
    """A job as it stands."""

    id: str
    service: str
    status: Annotated[str, Meta(extra_json_schema={"enum": ["queued", "running", "completed", "failed", "cancelled"]})]
    created_at: Annotated[float, Meta(description="Seconds since 1970.")]
    queue_position: Annotated[int, Meta(description="Jobs that come first.")]
    progress: Progress
    result: Annotated[Any, Meta(description="Of its service; null until it is completed.")]
    problem: ProblemBody | None
    cost: Annotated[Cost, Meta(description="null on a --free server.")] | None
    timings_ms: dict[str, float]
    urls: dict[str, str]


class JobList(Struct):
    jobs: Annotated[list[Job], Meta(description="Newest first.")]


class LoadedModel(Struct):
    name: str
    family: str
    size: Annotated[int, Meta(description="Bytes of weights.")]
    size_vram: int
    device: str
    precision: str
    running: int
    expires_at: Annotated[float, Meta(description="Seconds since 1970; null: never.")] | None
    loaded_at: float


class LoadedModels(Struct):
    models: list[LoadedModel]


class OpenAIModel(Struct):
    id: str
    object: str
    created: int
    owned_by: str
    family: str


class OpenAIModels(Struct):
    object: str
    data: list[OpenAIModel]


class OpenAIImage(Struct):
    seed: int
    b64_json: str | UnsetType = UNSET
    url: str | UnsetType = UNSET


class OpenAIImages(Struct):
    """OpenAI's ImagesResponse. usage is all 0: pictures are priced by the piece, and `cost` says what was charged."""

    created: int
    data: list[OpenAIImage]
    background: str
    output_format: str
    size: str
    usage: dict[str, Any]
    id: str
    model: str
    cost: Cost | None


class Predictions(Struct):
    """As Chronos-2's container answers: mean, each level by its number, and item_id and start where they were given."""

    predictions: list[dict[str, Any]]


class A1111Images(Struct):
    images: Annotated[list[str], Meta(description="PNG in base64.")]
    parameters: dict[str, Any]
    info: Annotated[str, Meta(description="JSON: seeds, infotexts, and the fields that were ignored.")]


class A1111Progress(Struct):
    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: Annotated[str, Meta(description="WebP in base64.")] | None
    textinfo: str | None


class Health(Struct):
    status: str


# --- Operations ---

_MEDIA_FILES = ("image/webp", "image/png")
_SPENDING = (400, 401, 402, 403, 404, 406, 409, 413, 415, 422, 429, 502, 503, 504)
_STREAM = {
    "text/event-stream": {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
        "description": "An event; its data is JSON.",
    }
}
_FILE = {media: {"type": "string", "format": "binary"} for media in _MEDIA_FILES}
_ANY: dict[str, Any] = {}

Answer = Any
"""A type of an answer's JSON, or {media type: schema}; several of them in a tuple."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One method of one path. `asks`: types of its JSON body. `who`: anybody, caller, spender, owner or operator."""

    tag: str
    summary: str
    answer: Answer = None
    asks: tuple[type, ...] = ()
    example: Any = None
    about: str = ""
    who: str = "anybody"
    status: int = 200
    also: Mapping[int, Answer] = dataclasses.field(default_factory=dict)
    refusals: tuple[int, ...] = ()
    query: tuple[tuple[str, dict[str, Any], str], ...] = ()
    form: str = ""
    """What of a multipart form is a file."""


_PROMPT = "a red circle on a blue background"
_VALUES = [112, 118, 132, 129, 121, 135, 148, 148]
_INPUT = {"target": _VALUES, "item_id": "air", "start": "2026-01-01"}
_WALLET_QUERY = (("wallet", {"type": "string", "maxLength": 64}, "Must be one of the account's."),)
_ADDRESS = "7WNkWhhDqHDWJd2yCjYwsAcAzNHXyNSk1AAAaGUuJ1cV"

OPERATIONS: dict[tuple[str, str], Operation] = {
    # --- Services ---
    ("POST", "/generate"): Operation(
        "services",
        "Draw a picture; the answer is the file, unless response_format is given",
        (_FILE, (Pictures, WithId)),
        (ImageRequest,),
        {"prompt": _PROMPT, "seed": 7},
        who="spender",
    ),
    ("POST", "/forecast"): Operation(
        "services",
        "Forecast a series, or several that inform each other",
        ((Forecast, WithId), (Forecasts, WithId)),
        (ForecastRequest, ForecastBatchRequest),
        {"values": _VALUES, "prediction_length": 4},
        who="spender",
    ),
    ("POST", "/forecast_batch"): Operation(
        "services",
        "Forecast many series, each by itself",
        ((Forecasts, WithId), (Forecast, WithId)),
        (ForecastBatchRequest, ForecastRequest),
        {"series": [_VALUES, [3, 1, 4, 1, 5, 9, 2, 6]], "prediction_length": 2},
        who="spender",
    ),
    ("POST", "/api/service"): Operation(
        "services",
        "Any service, by name",
        (Job, _STREAM, _FILE),
        example={"service": "zimage", "prompt": _PROMPT},
        about='With "background": true it answers 202 at once, with "stream": true with the job\'s events.',
        who="spender",
        also={202: Job},
    ),
    # --- Jobs ---
    ("POST", "/api/jobs"): Operation(
        "jobs",
        "Start a job, and do not wait for it",
        Job,
        example={"service": "zimage", "prompt": _PROMPT},
        who="spender",
        status=202,
    ),
    ("GET", "/api/jobs"): Operation("jobs", "Your latest jobs", JobList, who="caller"),
    ("GET", "/api/jobs/{id}"): Operation("jobs", "A job as it stands", Job, who="caller", refusals=(404,)),
    ("DELETE", "/api/jobs/{id}"): Operation("jobs", "Stop a job; again is fine", Job, who="caller", refusals=(404,)),
    ("POST", "/api/jobs/{id}/cancel"): Operation(
        "jobs", "Stop a job; again is fine", Job, who="caller", refusals=(404,)
    ),
    ("GET", "/api/jobs/{id}/result"): Operation(
        "jobs",
        "A job's result alone",
        ({"application/json": _ANY},),
        who="caller",
        refusals=(400, 404, 409, 429, 502, 503, 504),
    ),
    ("GET", "/api/jobs/{id}/events"): Operation(
        "jobs",
        "A job's events, to its end",
        _STREAM,
        who="caller",
        refusals=(404, 429),
        about="job.queued, job.progress, image_generation.partial_image, image_generation.completed, and last one of "
        "job.completed, job.failed, job.cancelled.",
    ),
    ("GET", "/api/jobs/{id}/images/{number}.{extension}"): Operation(
        "jobs", "A picture", _FILE, about="For whoever knows the job's id.", refusals=(404,)
    ),
    ("GET", "/api/jobs/{id}/videos/{number}.{extension}"): Operation(
        "jobs",
        "A video",
        {"video/mp4": {"type": "string", "format": "binary"}},
        about="For whoever knows the job's id.",
        refusals=(404,),
    ),
    # --- OpenAI ---
    ("POST", "/v1/images/generations"): Operation(
        "openai",
        "OpenAI's: draw",
        (OpenAIImages, _STREAM),
        (openai.Generation,),
        {"prompt": _PROMPT, "size": "256x256", "seed": 7},
        who="spender",
        about="With stream: image_generation.partial_image and image_generation.completed.",
    ),
    ("POST", "/v1/images/edits"): Operation(
        "openai",
        "OpenAI's: draw from a picture",
        (OpenAIImages, _STREAM),
        (openai.Edit,),
        {"prompt": _PROMPT, "image": "@out.webp", "strength": "0.7"},
        who="spender",
        form="image",
        about="With stream: image_edit.partial_image and image_edit.completed. The picture is brought to size.",
    ),
    ("GET", "/v1/models"): Operation("openai", "Models that are served", OpenAIModels),
    ("GET", "/v1/models/{id}"): Operation("openai", "A model", OpenAIModel, refusals=(404,)),
    # --- SageMaker ---
    ("POST", "/invocations"): Operation(
        "sagemaker",
        "Forecasts, as Chronos-2's container on SageMaker answers them",
        Predictions,
        (sagemaker.Invocation,),
        {"inputs": [_INPUT], "parameters": {"prediction_length": 3, "freq": "1D"}},
        who="spender",
    ),
    ("GET", "/ping"): Operation("sagemaker", "Whether it takes work", Health, refusals=(503,)),
    # --- AUTOMATIC1111 ---
    ("POST", "/sdapi/v1/txt2img"): Operation(
        "a1111",
        "A1111's: draw",
        A1111Images,
        (a1111.Txt2Img,),
        {"prompt": _PROMPT, "steps": 8, "seed": 7},
        who="spender",
        about="Fields that mean nothing here are ignored, and listed in info.",
    ),
    ("POST", "/sdapi/v1/img2img"): Operation(
        "a1111",
        "A1111's: draw from a picture",
        A1111Images,
        (a1111.Img2Img,),
        {"prompt": _PROMPT, "denoising_strength": 0.7, "init_images": ["PNG OR WEBP IN BASE64"]},
        who="spender",
    ),
    ("GET", "/sdapi/v1/progress"): Operation(
        "a1111",
        "A1111's: how far your newest task is",
        A1111Progress,
        who="caller",
        query=(("skip_current_image", {"type": "boolean"}, "Without the preview."),),
    ),
    ("POST", "/sdapi/v1/interrupt"): Operation(
        "a1111", "A1111's: stop your tasks", {"application/json": _ANY}, who="caller"
    ),
    ("GET", "/sdapi/v1/options"): Operation(
        "a1111", "A1111's: the model that is chosen", {"application/json": _ANY}, who="caller"
    ),
    ("POST", "/sdapi/v1/options"): Operation(
        "a1111",
        "A1111's: choose a model",
        {"application/json": _ANY},
        (a1111.Options,),
        {"sd_model_checkpoint": "zimage-demo"},
        who="caller",
        refusals=(404,),
    ),
    ("GET", "/sdapi/v1/sd-models"): Operation("a1111", "A1111's: models that draw", {"application/json": _ANY}),
    ("POST", "/internal/progress"): Operation(
        "a1111",
        "A1111's: how far the task of a force_task_id is",
        {"application/json": _ANY},
        (a1111.TaskProgress,),
        {"id_task": "task(1)"},
        who="caller",
    ),
    **{
        ("GET", f"/sdapi/v1/{name}"): Operation("a1111", f"A1111's: {name}; a constant", {"application/json": _ANY})
        for name in a1111.CONSTANT
    },
    # --- Models ---
    ("GET", "/api/ps"): Operation("models", "Models that are loaded", LoadedModels),
    ("POST", "/api/load"): Operation(
        "models",
        "Load a model",
        LoadedModels,
        (api.Load,),
        {"model": "zimage-demo", "keep_alive": "10m"},
        who="operator",
        refusals=(404, 503),
    ),
    ("POST", "/api/unload"): Operation(
        "models",
        "Let a model go, once nothing runs on it",
        LoadedModels,
        (api.Load,),
        {"model": "zimage-demo"},
        who="operator",
        refusals=(404,),
    ),
    # --- Accounts ---
    ("GET", "/api/pricing"): Operation("accounts", "What calls cost now", {"application/json": _ANY}, refusals=(503,)),
    ("GET", "/api/balance"): Operation(
        "accounts", "What the account has", {"application/json": _ANY}, who="account", query=_WALLET_QUERY
    ),
    ("GET", "/api/billing-history"): Operation(
        "accounts",
        "What came in and what was charged, newest first",
        {"application/json": _ANY},
        who="account",
        refusals=(400,),
        query=(
            ("limit", {"type": "integer", "minimum": 1, "maximum": accounts.HISTORY_MAX}, "100 without."),
            ("before", {"type": "integer", "minimum": 1, "maximum": 2**62}, "The seq of a line: those before it."),
            *_WALLET_QUERY,
        ),
    ),
    ("GET", "/api/deposit"): Operation(
        "accounts",
        "Where to send tokens, and what arrives",
        {"application/json": _ANY},
        who="account",
        query=_WALLET_QUERY,
    ),
    ("GET", "/api/deposit/qr.svg"): Operation(
        "accounts",
        "The same address, for wallets to scan",
        {"image/svg+xml": {"type": "string"}},
        who="account",
        query=_WALLET_QUERY,
    ),
    ("POST", "/api/sign-in/challenge"): Operation(
        "accounts",
        "A text to sign with a wallet",
        {"application/json": _ANY},
        (accounts.Address,),
        {"address": _ADDRESS},
        refusals=(404, 429, 503),
    ),
    ("POST", "/api/sign-in"): Operation(
        "accounts",
        "Sign in, the first time with a key as answer",
        {"application/json": _ANY},
        (accounts.Signed,),
        {"address": _ADDRESS, "nonce": "NONCE OF THE CHALLENGE", "signature": "BASE58 OR BASE64"},
        refusals=(404, 503),
    ),
    ("POST", "/api/sign-out"): Operation("accounts", "End the browser's session", {"application/json": _ANY}),
    ("GET", "/api/account"): Operation(
        "accounts", "The account and its wallets", {"application/json": _ANY}, who="account", query=_WALLET_QUERY
    ),
    ("GET", "/api/keys"): Operation("accounts", "The account's keys", {"application/json": _ANY}, who="owner"),
    ("POST", "/api/keys"): Operation(
        "accounts",
        "A new key, shown once",
        {"application/json": _ANY},
        (accounts.NewKey,),
        {"name": "laptop", "services": ["chronos2"]},
        who="owner",
        status=201,
        refusals=(409,),
    ),
    ("DELETE", "/api/keys/{id}"): Operation("accounts", "Revoke a key", {"application/json": _ANY}, who="owner"),
    ("PATCH", "/api/keys/{id}"): Operation(
        "accounts",
        "What a key may spend a day, in base units; null: no limit",
        {"application/json": _ANY},
        (accounts.ChangedKey,),
        {"daily_limit": 1000000},
        who="owner",
    ),
    ("POST", "/api/dev/faucet"): Operation(
        "accounts",
        "Tokens and SOL of a dev chain",
        {"application/json": _ANY},
        (accounts.Faucet,),
        {"address": _ADDRESS, "tokens": 250},
        refusals=(404, 409, 503),
    ),
    # --- Operations ---
    ("GET", "/healthz"): Operation("operations", "200 as long as it lives", Health),
    ("GET", "/readyz"): Operation("operations", "503 while it starts or drains", Health, also={503: Health}),
    ("GET", "/metrics"): Operation(
        "operations", "Prometheus' text", {"text/plain": {"type": "string"}}, who="operator"
    ),
    ("GET", "/api/limits"): Operation(
        "operations", "What one request, one key and the server may ask for", dict[str, float]
    ),
    ("GET", "/openapi.json"): Operation("operations", "This document", {"application/json": _ANY}),
    ("GET", "/llms.txt"): Operation("operations", "A page for agents", {"text/plain": {"type": "string"}}),
}

# Statuses that whoever asks so may meet, beyond his answer's.
_REFUSALS = {
    "anybody": (),
    "caller": (401, 403),
    "spender": _SPENDING,
    "account": (401, 403, 404, 503),
    "owner": (401, 403, 404, 503),
    "operator": (403,),
}

_PATH_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"type": "string", "minLength": 1}, "Of the job, the model or the key."),
    "number": ({"type": "integer", "minimum": 0}, "From 0."),
    "extension": ({"type": "string", "pattern": "^[a-z0-9]{2,5}$"}, "Of the file's format: webp, png, mp4."),
}

_IDEMPOTENCY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same key and body get the same job's answer; the call goes on when its client leaves.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}

_SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "anybody": [],
    "caller": [{"key": []}, {"session": []}],
    "spender": [{"key": []}, {"session": []}],
    "account": [{"key": []}, {"session": []}],
    "owner": [{"session": []}],
    "operator": [{"operator": []}, {}],  # whoever calls from the machine itself may be the operator
}


# What the server's limits say of a field, wherever it is asked for.
_BOUNDS = {
    "prompt": ("maxLength", "prompt_characters"),
    "negative_prompt": ("maxLength", "prompt_characters"),
    "width": ("maximum", "side_pixels"),
    "height": ("maximum", "side_pixels"),
    "steps": ("maximum", "steps"),
    "num_inference_steps": ("maximum", "steps"),
    "n": ("maximum", "pictures"),
    "batch_size of Txt2Img": ("maximum", "pictures"),
    "batch_size of Img2Img": ("maximum", "pictures"),
    "n_iter": ("maximum", "pictures"),
    "series": ("maxItems", "rows"),
    "inputs": ("maxItems", "rows"),
    "prediction_length": ("maximum", "horizon"),
    "quantile_levels": ("maxItems", "levels"),
}


def documented(app: Starlette) -> Iterator[tuple[str, str]]:
    """(method, path) of every route that is for programs."""
    for route in app.routes:
        if isinstance(route, Route) and route.include_in_schema:
            path = re.sub(r"{(\w+):\w+}", r"{\1}", route.path)
            yield from ((method, path) for method in sorted(route.methods or ()) if method != "HEAD")


def document(state: State, routes: list[tuple[str, str]]) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    found = _Types(state)
    paths: dict[str, dict[str, Any]] = {}
    for method, path in routes:
        operation = OPERATIONS.get((method, path))
        if operation is not None:
            paths.setdefault(path, {})[method.lower()] = _operation(state, found, method, path, operation)
    codes = sorted({kind.status for kind in KINDS.values()})
    problem = {"application/problem+json": {"schema": found.ref(ProblemBody)}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "diffusionz",
            "version": diffusionz.__version__,
            "summary": "Pictures with Z-Image, forecasts with Chronos-2.",
            "description": "/llms.txt says the same on one page, /docs with samples. "
            "Whatever fails answers application/problem+json; /problems/TYPE says what to do.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in OPERATIONS.values())],
        "paths": paths,
        "components": {
            "schemas": found.components(),
            "responses": {
                str(code): {
                    "description": "; ".join(kind.title for kind in KINDS.values() if kind.status == code),
                    "content": problem,
                }
                for code in codes
            },
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key of an account."},
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": COOKIE,
                    "description": "Of a browser that signed in.",
                },
                "operator": {"type": "http", "scheme": "bearer", "description": "DIFFUSIONZ_ADMIN_TOKEN."},
            },
        },
    }


def _operation(state: State, found: _Types, method: str, path: str, operation: Operation) -> dict[str, Any]:
    about: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
    }
    if operation.about:
        about["description"] = operation.about
    parameters: list[dict[str, Any]] = []
    for name in re.findall(r"{(\w+)}", path):
        schema, text = _PATH_PARAMETERS[name]
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema, "description": text})
    for name, schema, text in operation.query:
        parameters.append({"name": name, "in": "query", "schema": schema, "description": text})
    if operation.who == "spender":
        parameters.append(_IDEMPOTENCY)
    if parameters:
        about["parameters"] = parameters
    asked = _asked(state, found, path, operation)
    if asked:
        about["requestBody"] = {"required": True, "content": asked}
    about["responses"] = {
        str(status): {"description": operation.summary, "content": found.content(answer)}
        for status, answer in {operation.status: operation.answer, **operation.also}.items()
    }
    refusals = {500, *operation.refusals, *_REFUSALS[operation.who]}
    if asked:
        refusals |= {400, 413, 415}
    for status in sorted(refusals - {operation.status, *operation.also}):
        about["responses"][str(status)] = {"$ref": f"#/components/responses/{status}"}
    if not state.settings.free or operation.who == "operator":
        about["security"] = _SECURITY[operation.who]
    return about


def _asked(state: State, found: _Types, path: str, operation: Operation) -> dict[str, Any]:
    """{media type: schema and example} of the body; empty when there is none."""
    if path in ("/api/service", "/api/jobs") and operation.example is not None:
        choices = [
            {
                "allOf": [
                    found.ref(schema),
                    {"properties": {"service": {"const": service.name}}, "required": ["service"]},
                ]
            }
            for service in state.services.values()
            for schema in (service.schema, *((ForecastBatchRequest,) if service.schema is ForecastRequest else ()))
        ]
        return {"application/json": {"schema": {"anyOf": choices}, "example": operation.example}}
    if not operation.asks:
        return {}
    if operation.form:
        schema = dict(found.schema(operation.asks[0]))
        # A form has no null: a field is there, or it is not.
        fields = {
            name: about["anyOf"][0] if "anyOf" in about else about for name, about in schema["properties"].items()
        }
        schema["properties"] = {operation.form: {"type": "string", "format": "binary"}} | fields
        schema["required"] = [operation.form, *schema["required"]]
        encoding = {operation.form: {"contentType": ", ".join(_MEDIA_FILES)}}
        return {"multipart/form-data": {"schema": schema, "encoding": encoding}}
    refs = [found.ref(asked) for asked in operation.asks]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"application/json": {"schema": schema, "example": operation.example}}


class _Types:
    """The schemas of all types that the document names."""

    def __init__(self, state: State) -> None:
        types: list[Any] = [ForecastBatchRequest, ProblemBody, *(service.schema for service in state.services.values())]
        for operation in OPERATIONS.values():
            types += operation.asks
            for answer in (operation.answer, *operation.also.values()):
                types += _types_of(answer)
        self._types = list(dict.fromkeys(types))
        self._refs, self._components = msgspec.json.schema_components(
            self._types, ref_template="#/components/schemas/{name}"
        )
        # Services elsewhere have limits of their own.
        elsewhere = {service.schema.__name__ for service in state.services.values() if service.name not in FAMILIES}
        for title, schema in self._components.items():
            for name, about in schema.get("properties", {}).items() if title not in elsewhere else ():
                word, limit = _BOUNDS.get(name) or _BOUNDS.get(f"{name} of {title}") or ("", "")
                if limit:
                    field = about["anyOf"][0] if "anyOf" in about else about
                    field[word] = min(getattr(state.limits, limit), field.get(word, math.inf))

    def ref(self, kind: Any) -> dict[str, Any]:
        return self._refs[self._types.index(kind)]

    def schema(self, kind: Any) -> dict[str, Any]:
        """The schema itself of a Struct."""
        return dict(self._components[self.ref(kind)["$ref"].rpartition("/")[2]])

    def components(self) -> dict[str, Any]:
        return self._components

    def content(self, answer: Answer) -> dict[str, Any]:
        """{media type: {"schema": ...}} of an Operation's answer."""
        parts = answer if isinstance(answer, tuple) else (answer,)
        content: dict[str, Any] = {}
        json = []
        for part in parts:
            if isinstance(part, dict):
                content |= {media: {"schema": schema} for media, schema in part.items()}
            elif isinstance(part, tuple):
                json.append({"allOf": [self.ref(kind) for kind in part]})
            else:
                json.append(self.ref(part))
        if json:
            content["application/json"] = {"schema": json[0] if len(json) == 1 else {"anyOf": json}}
        return content


def _types_of(answer: Answer) -> list[Any]:
    if isinstance(answer, tuple):
        return [kind for part in answer for kind in _types_of(part)]
    return [] if isinstance(answer, dict) else [answer]


# --- For agents ---


def page(state: State, routes: list[tuple[str, str]], origin: str) -> str:
    """/llms.txt of a server that is reached at `origin`."""
    settings = state.settings
    key = "" if settings.free else ' -H "Authorization: Bearer $DIFFUSIONZ_API_KEY"'
    lines = [
        "# diffusionz",
        "",
        f"> Pictures with Z-Image and forecasts with Chronos-2, at {origin}. Version {diffusionz.__version__}.",
        "",
        "Calls are free here and need no key."
        if settings.free
        else "Calls that spend carry Authorization: Bearer KEY; signing in with a Solana wallet at /account gives one.",
        f"Models: {', '.join(f'{spec.name} ({spec.family})' for spec in state.models.specs)}.",
        f"Services: {', '.join(state.services)}.",
        "",
        f"- [The whole surface, OpenAPI 3.1]({origin}/openapi.json)",
        f"- [Documentation with samples]({origin}/docs)",
        "- Python: `from diffusionz import Client`; OpenAI's client works with base_url "
        f'"{origin}/v1", and what it has no argument for goes into extra_body.',
        "",
    ]
    tag = ""
    for method, path in [known for known in OPERATIONS if known in set(routes)]:
        operation = OPERATIONS[method, path]
        if operation.tag == "a1111" and path.removeprefix("/sdapi/v1/") in a1111.CONSTANT:
            continue
        if operation.tag != tag:
            tag = operation.tag
            lines += [f"## {tag}", ""]
        with_key = key if operation.who in ("caller", "spender", "account") else ""
        lines += [
            f"{method} {path}: {operation.summary}. {operation.about}".rstrip(),
            "",
            "    " + _curl(origin, method, path, operation, with_key),
            "",
        ]
    lines += ["## Errors", ""]
    lines += ["Each is application/problem+json: type, title, status, detail, and OpenAI's error beside it.", ""]
    lines += ["| status | type | what to do |", "|---|---|---|"]
    lines += [f"| {kind.status} | {name} | {kind.advice} |" for name, kind in sorted(KINDS.items(), key=_by_status)]
    lines += ["", "## Prices", "", *_prices(state), "", "## Limits", ""]
    lines += [f"- {field.name}: {getattr(state.limits, field.name):.12g}" for field in dataclasses.fields(state.limits)]
    return "\n".join(lines) + "\n"


def _by_status(item: tuple[str, Any]) -> tuple[int, str]:
    return item[1].status, item[0]


def _curl(origin: str, method: str, path: str, operation: Operation, key: str) -> str:
    file = "0.mp4" if "/videos/" in path else "0.webp"
    path = path.replace("{id}", "ID").replace("{number}.{extension}", file)
    line = f"curl -s {origin}{path}{key}"
    if operation.form:
        return line + "".join(f" -F '{name}={value}'" for name, value in operation.example.items())
    if operation.example is not None:
        method = "" if method == "POST" else f" -X {method}"
        file = " -H 'Accept: image/webp' -o out.webp" if path == "/generate" else ""
        return f"{line}{method} --json '{orjson.dumps(operation.example).decode()}'{file}"
    return line if method == "GET" else f"{line} -X {method}"


def _prices(state: State) -> list[str]:
    if state.ledger is None:
        return ["None: calls are free."]
    from diffusionz.payments.prices import format_usd

    prices = state.ledger.settings.prices
    return [
        f"- {name}: {format_usd(price.micro_usd)} USD for {price.per} {price.unit}"
        for name, price in prices.items()
        if name in state.services
    ] + ["", "GET /api/pricing says what that is in tokens at the moment. What fails or is cancelled costs nothing."]


# --- Routes ---

_ORIGIN = re.compile(r"https?://([a-z0-9.-]{1,253}|\[[0-9a-f:]+\])(:[0-9]{1,5})?", re.IGNORECASE)


def routes() -> list[Route]:
    # Made at the first request, as the whole route table is there by then. A visitor chooses the Host that the page
    # names, so how many are kept is bounded.
    @functools.lru_cache(maxsize=1)
    def made(state: State, app: Starlette) -> Content:
        return Content(orjson.dumps(document(state, list(documented(app)))), "application/json")

    @functools.lru_cache(maxsize=16)
    def written(state: State, app: Starlette, origin: str) -> Content:
        return Content(page(state, list(documented(app)), origin).encode(), "text/plain; charset=utf-8")

    async def openapi(request: Request) -> Response:
        """GET /openapi.json"""
        return made(state_of(request), request.app).response(request)

    async def llms(request: Request) -> Response:
        """GET /llms.txt"""
        origin = state_of(request).settings.public_url or str(request.base_url).rstrip("/")
        if not _ORIGIN.fullmatch(origin):  # its lines are for a shell
            raise Problem("invalid-request", "the Host is not a host")
        return written(state_of(request), request.app, origin).response(request)

    return [Route("/openapi.json", openapi), Route("/llms.txt", llms)]
