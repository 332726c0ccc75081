"""OpenAI's images API, as its official client speaks it: /v1/images/generations, /v1/images/edits, /v1/models.

What OpenAI's API has and a picture here has not is taken and has no effect, where that does no harm: quality,
moderation, style, complexity, input_fidelity, user, safety_identifier. What would come out as something else than was
asked for is refused: a transparent background, a mask, JPEG, several images to edit. Beyond OpenAI's there are
negative_prompt, num_inference_steps, guidance_scale, seed and, for edits, strength; the client sends them from
extra_body.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta, Struct
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusionz.server import calls
from diffusionz.server.caller import Caller
from diffusionz.server.calls import json_body, json_response, state_of
from diffusionz.server.decoding import called, convert, decode
from diffusionz.server.jobs import Job
from diffusionz.server.models import Spec
from diffusionz.server.pictures import Pictures, Start
from diffusionz.server.problems import Problem, invalid
from diffusionz.server.schemas import ImageRequest

FORM_FIELDS = 64
FORM_FILES = 20
_BOOT = int(time.time())
_QUALITIES = ("low", "medium", "high", "xhigh", "max")

# Pictures are priced by the piece, not by tokens: `cost` beside it says what was charged.
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}

# What a Problem of the service zimage calls its fields -> what OpenAI does.
_NAMES = {
    "width": "size",
    "height": "size",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "format": "output_format",
    "quality": "output_compression",
}


def _one_of(*names: str, about: str) -> Any:
    """A text of these; others are refused with a sentence that says why, so the type itself takes them."""
    return Meta(description=about, extra_json_schema={"enum": list(names)})


_IGNORED = Meta(description="Taken, and of no effect.")


class Generation(Struct, kw_only=True, forbid_unknown_fields=True):
    """A request as OpenAI's client sends it, with what diffusion models have beyond it. null is as good as nothing."""

    prompt: Annotated[str, Meta(description="What to draw.")]
    model: (
        Annotated[str, Meta(max_length=200, description="A name that /v1/models lists; the first that draws without.")]
        | None
    ) = None
    n: Annotated[int, Meta(ge=1, description="How many pictures; 1 without.")] | None = None
    size: (
        Annotated[
            str,
            Meta(
                pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$",
                description="WIDTHxHEIGHT, multiples of 16; auto: the model's own, of an edit the image's.",
            ),
        ]
        | None
    ) = None
    response_format: Annotated[str, _one_of("b64_json", "url", about="b64_json without.")] | None = None
    output_format: Annotated[str, _one_of("png", "webp", about="png without.")] | None = None
    output_compression: (
        Annotated[int, Meta(ge=0, le=100, description="Quality of lossy WebP; 100 without, which PNG always has.")]
        | None
    ) = None
    stream: Annotated[bool, Meta(description="Answer with events.")] | None = None
    partial_images: (
        Annotated[int, Meta(ge=0, le=8, description="With stream: previews, WebP of half the size.")] | None
    ) = None
    background: Annotated[str, _one_of("opaque", "auto", about="All pictures are opaque.")] | None = None
    quality: Annotated[str, _IGNORED] | None = None
    moderation: Annotated[str, _IGNORED] | None = None
    style: Annotated[str, _IGNORED] | None = None
    complexity: Annotated[str, _IGNORED] | None = None
    user: Annotated[str, _IGNORED] | None = None
    safety_identifier: Annotated[str, _IGNORED] | None = None
    negative_prompt: Annotated[str, Meta(description="What to keep away from; used with guidance_scale.")] | None = None
    num_inference_steps: Annotated[int, Meta(ge=1, description="8 without.")] | None = None
    guidance_scale: (
        Annotated[float, Meta(ge=0, le=100, description="Classifier-free guidance; 0, as without, is off.")] | None
    ) = None
    seed: (
        Annotated[int, Meta(ge=0, le=2**53 - 1, description="Picture i has seed + i; a random one without.")] | None
    ) = None


class Edit(Generation, kw_only=True, forbid_unknown_fields=True):
    """The same of an edit's form, beside the file `image`."""

    input_fidelity: Annotated[str, _IGNORED] | None = None
    strength: (
        Annotated[float, Meta(gt=0, le=1, description="The share of the steps that run on the image; 0.6 without.")]
        | None
    ) = None


class ModelNotFound(Problem):
    """As OpenAI's API says it."""

    def __init__(self, name: str, known: str) -> None:
        super().__init__("not-found", f"The model {name!r} does not exist; there are: {known}", param="model")

    def body(self, instance: str | None = None) -> dict[str, Any]:
        body = super().body(instance)
        body["error"] |= {"type": "invalid_request_error", "code": "model_not_found"}
        return body


async def generations(request: Request) -> Response:
    """POST /v1/images/generations"""
    caller = await state_of(request).callers.caller(request)
    body = await json_body(request)
    return await _draw(request, caller, decode(body, Generation), body, None)


async def edits(request: Request) -> Response:
    """POST /v1/images/edits"""
    caller = await state_of(request).callers.caller(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Problem("unsupported-media-type", f"the body is {kind[:60]!r}; it must be multipart/form-data")
    texts: dict[str, str] = {}
    images: list[bytes] = []
    async with request.form(max_files=FORM_FILES, max_fields=FORM_FIELDS) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if name == "mask":
                raise invalid("there are no masks here: leave mask away, and the whole image is edited", "mask")
            if (name == "image") != isinstance(value, UploadFile):
                raise invalid(f"{name[:80]} must {'' if name == 'image' else 'not '}be a file", name[:80])
            if isinstance(value, UploadFile):
                images.append(await value.read())
            elif value or name == "prompt":  # an empty field of a form is none
                texts[name] = value
    fields = convert(texts, Edit)
    if len(images) != 1:
        raise invalid(f"{len(images)} images are given; it must be one, as PNG or WebP", "image")
    # The boundary is another at each attempt: what is asked for is hashed, not how it came.
    digest = hashlib.blake2b(images[0]).digest() + msgspec.json.encode(fields)
    return await _draw(request, caller, fields, digest, images[0])


async def _draw(request: Request, caller: Caller, fields: Generation, body: bytes, image: bytes | None) -> Response:
    state = state_of(request)
    pictures = state.service("zimage")
    assert isinstance(pictures, Pictures)
    _check_model(request, fields.model)
    with called(_NAMES):
        size = _size(fields)
        start = None if image is None else await _start(pictures, image, size)
        order = await pictures.check(_request(fields, size if start is None else None), start)
    if fields.stream:
        state.streams.check(caller.account)
    job, headers = await calls.submit(request, order, caller, body)
    if fields.stream:
        return calls.events(request, job, headers, cancel_when_gone=True, told=_Told(fields, edit=image is not None))
    await calls.ended(request, job)
    return json_response(_answer(request, job, fields), headers=headers)


def _check_model(request: Request, name: str | None) -> None:
    specs = [spec for spec in state_of(request).models.specs if spec.family == "zimage"]
    if name is not None and name not in [spec.name for spec in specs]:
        raise ModelNotFound(name, ", ".join(spec.name for spec in specs) or "none")


def _size(fields: Generation) -> tuple[int, int] | None:
    """(width, height); None: to be chosen. Raises Problem."""
    if fields.size in (None, "auto"):
        return None
    width, height = map(int, re.findall("[0-9]+", fields.size or ""))
    if width % 16 or height % 16 or not width or not height:
        raise invalid(f"size is {fields.size}; width and height must be multiples of 16", "size")
    return width, height


async def _start(pictures: Pictures, image: bytes, size: tuple[int, int] | None) -> Start:
    """The image of an edit, in the size of the picture that is made of it. Raises Problem."""
    start = await pictures.start(image)
    return await pictures.resized(start, *(size or (max(start.width // 16, 1) * 16, max(start.height // 16, 1) * 16)))


def _request(fields: Generation, size: tuple[int, int] | None) -> ImageRequest:
    """The same request in the words of the service. Raises Problem."""
    for name, allowed in (
        ("output_format", ("png", "webp")),
        ("response_format", ("b64_json", "url")),
        ("background", ("opaque", "auto")),
    ):
        value = getattr(fields, name)
        if value is not None and value not in allowed:
            raise invalid(f"{name} is {value[:40]!r}; it must be {' or '.join(allowed)}", name)
    format = fields.output_format or "png"
    if format == "png" and fields.output_compression not in (None, 100):
        raise invalid("output_compression is for webp; a PNG loses nothing", "output_compression")
    asked: dict[str, Any] = {
        "negative_prompt": fields.negative_prompt,
        "model": fields.model,
        "n": fields.n,
        "steps": fields.num_inference_steps,
        "seed": fields.seed,
        "guidance": fields.guidance_scale,
        "quality": fields.output_compression if fields.output_compression is not None else 100,
        "partial_images": fields.partial_images if fields.stream else None,
        "strength": fields.strength if isinstance(fields, Edit) else None,
    }
    if size is not None:
        asked["width"], asked["height"] = size
    given = {name: value for name, value in asked.items() if value is not None}
    # As "url": what is kept is the file, and base64 is made of it when it is answered.
    return ImageRequest(prompt=fields.prompt, format=format, response_format="url", **given)  # type: ignore[arg-type]


def _answer(request: Request, job: Job, fields: Generation) -> dict[str, Any]:
    assert job.result is not None
    made = orjson.loads(job.result.json)
    origin = state_of(request).settings.public_url or str(request.base_url).rstrip("/")
    data = [
        {"url": origin + image["url"]} if fields.response_format == "url" else {"b64_json": _base64(file.content)}
        for image, file in zip(made["images"], job.result.files, strict=True)
    ]
    first = made["images"][0]
    return {
        "created": int(job.created_at),
        "data": [one | {"seed": image["seed"]} for one, image in zip(data, made["images"], strict=True)],
        "background": "opaque",
        "output_format": fields.output_format or "png",
        **({"quality": fields.quality} if fields.quality in _QUALITIES else {}),
        "size": f"{first['width']}x{first['height']}",
        "usage": _USAGE,
        "id": job.id,
        "model": made["model"],
        "cost": job.cost,
    }


class _Told:
    """A job's events in OpenAI's words; those that it has none for are not told."""

    def __init__(self, fields: Generation, *, edit: bool) -> None:
        self.prefix = "image_edit" if edit else "image_generation"
        self.about = {
            "background": "opaque",
            "quality": fields.quality if fields.quality in _QUALITIES else "auto",
        }

    def __call__(self, job: Job, name: str, data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        about = self.about | {"created_at": int(time.time())}
        if name == "image_generation.partial_image":
            size = {"size": f"{data['width']}x{data['height']}"}
            return [(f"{self.prefix}.partial_image", data | about | size)]
        if job.ended and job.problem is not None:
            return [("error", {"error": job.problem.body(job.request_id)["error"]})]
        if name != "job.completed" or job.result is None:
            return []
        of_all: dict[str, Any] = {"usage": _USAGE, "cost": job.cost, "id": job.id}
        return [
            (
                f"{self.prefix}.completed",
                {
                    "b64_json": _base64(file.content),
                    "output_format": file.extension,
                    "size": f"{image['width']}x{image['height']}",
                    "seed": image["seed"],
                    "index": i,
                }
                | about
                | of_all,
            )
            for i, (image, file) in enumerate(
                zip(orjson.loads(job.result.json)["images"], job.result.files, strict=True)
            )
        ]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- Models ---


async def models(request: Request) -> Response:
    """GET /v1/models, for anybody"""
    return json_response({"object": "list", "data": [_shown(spec) for spec in state_of(request).models.specs]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}, for anybody"""
    name, specs = request.path_params["id"], state_of(request).models.specs
    for spec in specs:
        if spec.name == name:
            return json_response(_shown(spec))
    raise ModelNotFound(name[:200], ", ".join(spec.name for spec in specs))


def _shown(spec: Spec) -> dict[str, Any]:
    return {"id": spec.name, "object": "model", "created": _BOOT, "owned_by": "diffusionz", "family": spec.family}


def routes() -> list[Route]:
    return [
        Route("/v1/images/generations", generations, methods=["POST"]),
        Route("/v1/images/edits", edits, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", model),
    ]
