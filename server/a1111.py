"""AUTOMATIC1111's API, /sdapi/v1: for the many programs that draw with it.

A field that has no meaning here is ignored, as A1111 ignores it, and `info` lists under "ignored" those that were
given. What would draw something else than was asked for is refused: a mask, resize modes that fill, several images at
once.

cfg_scale. A1111 mixes uncond + s (cond - uncond), Z-Image cond + g (cond - uncond): g = s - 1, and 1 is off in the one
as 0 is in the other. But 7 is A1111's default, which programs send although nobody chose it, and to the API it is the
same as saying nothing; Z-Image-Turbo, distilled to draw without guidance, draws ruins with it, at twice the time. So 7
means what nothing means, the model's own: none. Every other value means itself; who wants 7 asks for 7.01.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections import OrderedDict
from typing import Annotated, Any

import orjson
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusionz.server import calls
from diffusionz.server.caller import Caller
from diffusionz.server.calls import json_body, json_response, state_of
from diffusionz.server.decoding import called, convert, decode
from diffusionz.server.jobs import Job
from diffusionz.server.pictures import Pictures, Start
from diffusionz.server.problems import Problem, invalid
from diffusionz.server.schemas import ImageRequest

CFG_DEFAULT = 7.0
PREVIEWS = 3  # of each picture; each is a small part of a step
KEPT = 10_000  # accounts whose chosen model is remembered, and tasks that have ended
_HASH = re.compile(r" \[[0-9a-f]{8,64}\]$")  # A1111 shows a model as "name [hash]"
_DATA = re.compile(r"data:image/[a-z+]+;base64,")


class Txt2Img(Struct, kw_only=True):
    """A picture of a prompt, in A1111's words. null is as good as nothing; other fields are ignored."""

    prompt: str | None = None
    negative_prompt: str | None = None
    width: Annotated[int, Meta(ge=16, description="Rounded down to a multiple of 16; the model's without.")] | None = (
        None
    )
    height: Annotated[int, Meta(ge=16, description="Rounded down to a multiple of 16; the model's without.")] | None = (
        None
    )
    steps: Annotated[int, Meta(ge=1, description="8 without.")] | None = None
    cfg_scale: (
        Annotated[
            float,
            Meta(
                ge=0,
                le=100,
                description="1 and less: no guidance, else guidance = cfg_scale - 1; 7 is as nothing: none.",
            ),
        ]
        | None
    ) = None
    seed: Annotated[int, Meta(ge=-1, le=2**53 - 1, description="-1: a random one.")] | None = None
    batch_size: Annotated[int, Meta(ge=1, le=1000)] | None = None
    n_iter: Annotated[int, Meta(ge=1, le=1000, description="Times batch_size: how many pictures.")] | None = None
    send_images: Annotated[bool, Meta(description="Whether the pictures are in the answer.")] | None = None
    override_settings: Annotated[dict[str, Any], Meta(description="sd_model_checkpoint: the model.")] | None = None
    force_task_id: (
        Annotated[str, Meta(max_length=200, description="A name for the task, for /internal/progress.")] | None
    ) = None


class Img2Img(Txt2Img, kw_only=True):
    """The same, from a picture."""

    init_images: Annotated[
        list[str], Meta(min_length=1, max_length=1, description="A PNG or WebP in base64, or as a data: URL.")
    ]
    denoising_strength: (
        Annotated[float, Meta(gt=0, le=1, description="The share of the steps that run; 0.75 without.")] | None
    ) = None
    resize_mode: (
        Annotated[int, Meta(ge=0, le=1, description="0: stretched to width and height, 1: cut to their shape.")] | None
    ) = None
    mask: Annotated[str, Meta(description="Refused: there are none.")] | None = None


class Options(Struct):
    """Of the caller's account; all but the model are ignored."""

    sd_model_checkpoint: Annotated[str, Meta(max_length=300)] | None = None


class TaskProgress(Struct):
    """Which task is asked about."""

    id_task: Annotated[str, Meta(max_length=200)]
    id_live_preview: int | None = None
    live_preview: bool | None = None


# What a Problem of the service zimage calls its fields -> what A1111 does.
_NAMES = {
    "n": "batch_size",
    "guidance": "cfg_scale",
    "image": "init_images",
    "strength": "denoising_strength",
    "model": "override_settings.sd_model_checkpoint",
}

# What programs ask for when they start.
CONSTANT: dict[str, Any] = {
    "samplers": [{"name": "Euler", "aliases": ["euler"], "options": {}}],
    "schedulers": [
        {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1.0, "need_inner_model": False}
    ],
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
    "loras": [],
    "hypernetworks": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "extensions": [],
    "cmd-flags": {"api": True},
}


class Desk:
    """The tasks that are on their way through these routes, and the models that accounts have chosen.

    Progress and interrupt are about the tasks of here alone: who draws at the page is not stopped by a program that
    tidies up.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, list[tuple[str, Job]]] = {}  # of each account, the newest last
        self._ended: OrderedDict[tuple[str, str], None] = OrderedDict()  # (account, task)
        self._chosen: OrderedDict[str, str] = OrderedDict()  # account -> model

    async def txt2img(self, request: Request) -> Response:
        """POST /sdapi/v1/txt2img"""
        return await self._draw(request, Txt2Img)

    async def img2img(self, request: Request) -> Response:
        """POST /sdapi/v1/img2img"""
        return await self._draw(request, Img2Img)

    async def _draw(self, request: Request, kind: type[Txt2Img]) -> Response:
        state = state_of(request)
        caller = await _caller(request)
        body = await json_body(request)
        given = decode(body, dict[str, Any])
        fields = convert(given, kind)
        pictures = state.service("zimage")
        assert isinstance(pictures, Pictures)
        with called(_NAMES):
            drawn = self._request(request, caller, fields)
            start = None
            if isinstance(fields, Img2Img):
                start = await _start(pictures, fields, drawn)
                drawn.width = drawn.height = None
            order = await pictures.check(drawn, start)
        job, headers = await calls.submit(request, order, caller, body)
        task = fields.force_task_id or job.id
        tasks = self._tasks.setdefault(caller.account, [])
        tasks.append((task, job))
        try:
            await calls.ended(request, job)
        finally:
            tasks.remove((task, job))
            if not tasks:
                self._tasks.pop(caller.account, None)
            _remember(self._ended, (caller.account, task), None)
        return json_response(_answer(job, fields, given), headers=headers)

    def _request(self, request: Request, caller: Caller, fields: Txt2Img) -> ImageRequest:
        """The same request in the words of the service. Raises Problem."""
        name = (fields.override_settings or {}).get("sd_model_checkpoint") or self._chosen.get(caller.account)
        drawn = ImageRequest(
            prompt=fields.prompt or "",
            negative_prompt=fields.negative_prompt or None,
            model=_model(request, name) if name is not None else None,
            width=fields.width and fields.width // 16 * 16,
            height=fields.height and fields.height // 16 * 16,
            seed=None if fields.seed in (None, -1) else fields.seed,
            guidance=_guidance(fields.cfg_scale),
            n=(fields.batch_size or 1) * (fields.n_iter or 1),
            format="png",
            partial_images=PREVIEWS,
        )
        if fields.steps is not None:
            drawn.steps = fields.steps
        return drawn

    async def progress(self, request: Request) -> Response:
        """GET /sdapi/v1/progress: of the caller's newest task that waits or runs."""
        caller = await _caller(request)
        tasks = self._tasks.get(caller.account)
        if not tasks:
            return json_response(
                {
                    "progress": 0.0,
                    "eta_relative": 0.0,
                    "state": _state("", None),
                    "current_image": None,
                    "textinfo": None,
                }
            )
        task, job = tasks[-1]
        share, eta = _share(job)
        image = None if request.query_params.get("skip_current_image", "false").lower() == "true" else _preview(job)
        about = {
            "progress": share,
            "eta_relative": eta,
            "state": _state(task, job),
            "current_image": image,
            "textinfo": _text(job),
        }
        return json_response(about)

    async def task_progress(self, request: Request) -> Response:
        """POST /internal/progress: of the task with this force_task_id."""
        caller = await _caller(request)
        asked = decode(await json_body(request), TaskProgress)
        found = next((job for task, job in self._tasks.get(caller.account, []) if task == asked.id_task), None)
        about: dict[str, Any] = {
            "active": found is not None and found.status == "running",
            "queued": found is not None and found.status == "queued",
            "completed": found is None and (caller.account, asked.id_task) in self._ended,
            "progress": None,
            "eta": None,
            "live_preview": None,
            "id_live_preview": asked.id_live_preview if asked.id_live_preview is not None else -1,
            "textinfo": None if found is None else _text(found),
        }
        if found is not None and found.status == "running":
            about["progress"], about["eta"] = _share(found)
            number = len(found.previews) - 1
            if asked.live_preview is not False and number >= 0 and number != asked.id_live_preview:
                about["live_preview"] = f"data:image/webp;base64,{_preview(found)}"
                about["id_live_preview"] = number
        return json_response(about)

    async def interrupt(self, request: Request) -> Response:
        """POST /sdapi/v1/interrupt: cancels the caller's tasks; quiet when there are none."""
        caller = await _caller(request)
        for _, job in self._tasks.get(caller.account, []):
            job.cancel()
        return json_response({})

    async def options(self, request: Request) -> Response:
        """GET and POST /sdapi/v1/options"""
        caller = await _caller(request)
        if request.method == "GET":
            names = _names(request)
            chosen = self._chosen.get(caller.account) or next(iter(names), None)
            return json_response(
                {
                    "sd_model_checkpoint": chosen,
                    "sd_checkpoint_hash": "",
                    "samples_format": "png",
                    "CLIP_stop_at_last_layers": 1,
                }
            )
        given = decode(await json_body(request), dict[str, Any])
        name = convert(given, Options).sd_model_checkpoint
        if name is not None:
            with called({"model": "sd_model_checkpoint"}):
                _remember(self._chosen, caller.account, _model(request, name))
        return json_response(None)

    def routes(self) -> list[Route]:
        base = "/sdapi/v1"
        return [
            Route(f"{base}/progress", self.progress),
            Route(f"{base}/txt2img", self.txt2img, methods=["POST"]),
            Route(f"{base}/img2img", self.img2img, methods=["POST"]),
            Route(f"{base}/interrupt", self.interrupt, methods=["POST"]),
            Route(f"{base}/options", self.options, methods=["GET", "POST"]),
            Route(f"{base}/sd-models", sd_models),
            Route("/internal/progress", self.task_progress, methods=["POST"]),
            *(Route(f"{base}/{name}", _constant(value), name=f"a1111:{name}") for name, value in CONSTANT.items()),
        ]


async def sd_models(request: Request) -> Response:
    """GET /sdapi/v1/sd-models"""
    return json_response(
        [
            {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
            for name in _names(request)
        ]
    )


def _constant(value: Any) -> Any:
    content = orjson.dumps(value)

    async def answer(request: Request) -> Response:
        return Response(content, media_type="application/json")

    return answer


async def _caller(request: Request) -> Caller:
    """As everywhere; and by Basic authentication, the only one that A1111's programs know: the password is the key."""
    callers = state_of(request).callers
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic" or state_of(request).credits is None:
        return await callers.caller(request)
    try:
        key = binascii.a2b_base64(text.strip().encode("ascii")).decode().partition(":")[2]
    except (ValueError, UnicodeError):
        raise Problem("unauthorized", "the Authorization is not Basic's base64 of NAME:KEY") from None
    return await callers.of_key(key)


def _names(request: Request) -> list[str]:
    return [spec.name for spec in state_of(request).models.specs if spec.family == "zimage"]


def _model(request: Request, title: Any) -> str:
    """The name of the model that A1111 calls so. Raises Problem."""
    name = title if title in _names(request) else _HASH.sub("", str(title)[:300])
    return state_of(request).models.find(name, "zimage").name


def _guidance(cfg_scale: float | None) -> float:
    """See the module."""
    return 0.0 if cfg_scale in (None, CFG_DEFAULT) else max(cfg_scale - 1, 0.0)


async def _start(pictures: Pictures, fields: Img2Img, drawn: ImageRequest) -> Start:
    """The picture to start from, in the size that is asked for. Raises Problem."""
    if fields.mask:
        raise invalid("there are no masks here: leave mask away, and the whole image is drawn anew", "mask")
    text = fields.init_images[0]
    data = _DATA.match(text[:60])
    try:
        start = await pictures.start(binascii.a2b_base64(text[data.end() if data else 0 :].encode("ascii")))
    except (binascii.Error, UnicodeEncodeError):
        raise invalid("init_images must hold a PNG or WebP in base64", "init_images") from None
    drawn.strength = _strength(fields) or drawn.strength
    width = drawn.width or max(start.width // 16, 1) * 16
    height = drawn.height or max(start.height // 16, 1) * 16
    return await pictures.resized(_cut(start, width, height) if fields.resize_mode == 1 else start, width, height)


def _strength(fields: Txt2Img) -> float | None:
    return (fields.denoising_strength or 0.75) if isinstance(fields, Img2Img) else None


def _cut(start: Start, width: int, height: int) -> Start:
    """The middle of a picture, in the shape of width to height."""
    import numpy

    new_width = min(start.width, max(1, round(start.height * width / height)))
    new_height = min(start.height, max(1, round(start.width * height / width)))
    x, y = (start.width - new_width) // 2, (start.height - new_height) // 2
    pixels = numpy.frombuffer(start.rgb, numpy.uint8).reshape(start.height, start.width, 3)
    return Start(pixels[y : y + new_height, x : x + new_width].tobytes(), new_width, new_height)


# --- Answers ---


def _answer(job: Job, fields: Txt2Img, given: dict[str, Any]) -> dict[str, Any]:
    assert job.result is not None
    made = orjson.loads(job.result.json)
    images = made["images"]
    first = images[0]
    prompt, negative = made["prompt"], made["negative_prompt"] or ""
    cfg_scale = made["guidance"] + 1
    known = set(type(fields).__struct_fields__)
    texts = [
        f"{prompt}\n"
        + (f"Negative prompt: {negative}\n" if negative else "")
        + f"Steps: {made['steps']}, Sampler: Euler, CFG scale: {cfg_scale:g}, Seed: {image['seed']}, "
        + f"Size: {image['width']}x{image['height']}, Model: {made['model']}"
        for image in images
    ]
    info = {
        "prompt": prompt,
        "all_prompts": [prompt] * len(images),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(images),
        "seed": first["seed"],
        "all_seeds": [image["seed"] for image in images],
        "subseed": -1,
        "all_subseeds": [-1] * len(images),
        "subseed_strength": 0,
        "width": first["width"],
        "height": first["height"],
        "sampler_name": "Euler",
        "steps": made["steps"],
        "cfg_scale": cfg_scale,
        "guidance": made["guidance"],
        "batch_size": len(images),
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "sd_model_name": made["model"],
        "sd_model_hash": None,
        "clip_skip": 1,
        "denoising_strength": _strength(fields),
        "extra_generation_params": {},
        "job_timestamp": _timestamp(job),
        "job_id": job.id,
        "ignored": sorted(name for name, value in given.items() if name not in known and value not in _NOTHING),
    }
    sent = job.result.files if fields.send_images is not False else ()
    return {
        "images": [base64.b64encode(file.content).decode() for file in sent],
        # As A1111, without the pictures that the client has itself.
        "parameters": {name: value for name, value in given.items() if name not in ("init_images", "mask")},
        "info": orjson.dumps(info).decode(),
    }


_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def _share(job: Job) -> tuple[float, float]:
    """(how much of it is done, 0..1; in how many seconds it will be)."""
    if job.status != "running" or not job.step_count:
        return 0.0, 0.0
    share = min(job.step / job.step_count, 1.0)
    elapsed = time.monotonic() - job.arrived - job.timings_ms.get("queue", 0.0) / 1e3
    return share, elapsed / share - elapsed if share else 0.0


def _state(task: str, job: Job | None) -> dict[str, Any]:
    return {
        "skipped": False,
        "interrupted": job is not None and job.cancel_asked,
        "stopping_generation": False,
        "job": task,
        "job_count": 0 if job is None else 1,
        "job_no": 0,
        "job_timestamp": "0" if job is None else _timestamp(job),
        "sampling_step": 0 if job is None else job.step,
        "sampling_steps": 0 if job is None else job.step_count,
    }


def _preview(job: Job) -> str | None:
    return job.previews[-1]["b64_json"] if job.previews else None


def _text(job: Job) -> str:
    return f"In queue: {job.queue_position}" if job.status == "queued" else job.stage


def _timestamp(job: Job) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(job.created_at))


def _remember(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > KEPT:
        kept.popitem(last=False)


def routes() -> list[Route]:
    return Desk().routes()
