"""The requests, as types: decoding one checks it, and /openapi.json is made of the same types.

Unknown fields are refused: a misspelt `width` is no width. What depends on the model or the settings (how many pixels,
which models) is checked by the service.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

# Both a number of seconds and Ollama's spelling: "10m", -1 (for ever), 0 (right after this job).
KeepAlive = int | float | str

Number = float | None
"""A value of a series; null is missing."""


Levels = Annotated[list[float], Meta(min_length=1, description="Ascending, each over 0 and under 1.")]


class Request(Struct, kw_only=True, forbid_unknown_fields=True):
    """What every service's request may carry."""

    service: (
        Annotated[
            str,
            Meta(
                max_length=64,
                description="At /api/service and /api/jobs: zimage, chronos2, or another that /api/pricing lists.",
            ),
        ]
        | None
    ) = None
    stream: Annotated[bool, Meta(description="Answer with events.")] = False
    background: Annotated[bool, Meta(description="Answer 202 at once, with the job's URLs.")] = False
    model: (
        Annotated[str, Meta(max_length=200, description="A name that /v1/models lists; the service's default without.")]
        | None
    ) = None
    keep_alive: (
        Annotated[
            KeepAlive,
            Meta(description='How long the model stays loaded afterwards: seconds, "10m", 0, or -1 for ever.'),
        ]
        | None
    ) = None
    wallet_address: (
        Annotated[str, Meta(max_length=64, description="If given, it must be a wallet of the key's account.")] | None
    ) = None


class ImageRequest(Request):
    """A picture, or several, of a prompt."""

    prompt: Annotated[str, Meta(description="What to draw.")]
    negative_prompt: Annotated[str, Meta(description="What to keep away from; used with guidance.")] | None = None
    width: Annotated[int, Meta(ge=16, multiple_of=16, description="Pixels; the model's own without.")] | None = None
    height: Annotated[int, Meta(ge=16, multiple_of=16, description="Pixels; the model's own without.")] | None = None
    steps: Annotated[int, Meta(ge=1, description="Transformer evaluations.")] = 8
    seed: (
        Annotated[int, Meta(ge=0, le=2**53 - 1, description="Picture i has seed + i; a random one without.")] | None
    ) = None
    guidance: Annotated[float, Meta(ge=0, le=100, description="Classifier-free guidance; 0 is off.")] = 0.0
    n: Annotated[int, Meta(ge=1, description="How many pictures.")] = 1
    image: (
        Annotated[str, Meta(description="A picture to start from: base64 of a PNG or WebP, or a data: URL.")] | None
    ) = None
    strength: Annotated[float, Meta(gt=0, le=1, description="With image: the share of the steps that run.")] = 0.6
    format: Annotated[Literal["webp", "png"], Meta(description="Of the file.")] = "webp"
    quality: Annotated[int, Meta(ge=0, le=100, description="Of lossy WebP.")] = 90
    response_format: Annotated[
        Literal["b64_json", "url", "binary"],
        Meta(description="base64 in the answer, a URL to fetch it from, or the file itself as the body (n=1)."),
    ] = "url"
    partial_images: Annotated[int, Meta(ge=0, le=8, description="Previews to make while it is drawn.")] = 0


class ForecastRequest(Request):
    """A forecast of one series, or of several that inform each other."""

    values: Annotated[
        list[Number | list[Number]],
        Meta(
            min_length=1,
            description="A series, oldest first; or several of one length, [targets][time]. null: missing.",
        ),
    ]
    prediction_length: Annotated[int, Meta(ge=1, description="Steps to forecast.")] = 16
    quantile_levels: Levels = field(default_factory=lambda: [0.1, 0.5, 0.9])
    past_covariates: dict[str, list[Number]] | None = None
    future_covariates: dict[str, list[Number]] | None = None
    context_length: Annotated[int, Meta(ge=1, le=2**53 - 1, description="Steps of history to read.")] | None = None
    monotone: Annotated[bool, Meta(description="Sort each step's quantiles, so that they never cross.")] = False
    constrain_ohlc: Annotated[
        bool, Meta(description="The four targets are open, high, low, close: high is the highest.")
    ] = False
    returns: Annotated[bool, Meta(description="Forecast log returns, give prices.")] = False
    trend: Annotated[
        bool, Meta(description="Say also whether it goes up, down, flat, or is an anomaly: a second pass.")
    ] = False


class ForecastBatchRequest(Request):
    """Forecasts of many series, independent of each other. With constrain_ohlc, each four series are one candle's
    open, high, low, close, and inform each other."""

    series: Annotated[list[list[Number]], Meta(min_length=1, description="[series][time]; lengths may differ.")]
    prediction_length: Annotated[int, Meta(ge=1, description="Steps to forecast.")] = 16
    quantile_levels: Levels = field(default_factory=lambda: [0.1, 0.5, 0.9])
    context_length: Annotated[int, Meta(ge=1, le=2**53 - 1)] | None = None
    monotone: bool = False
    constrain_ohlc: bool = False
    returns: bool = False
    trend: bool = False
