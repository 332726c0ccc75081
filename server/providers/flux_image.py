"""The service flux_image: pictures by FLUX.1 schnell."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from diffusionz.server.jobs import File, Job
from diffusionz.server.limits import Limits
from diffusionz.server.problems import Problem, invalid
from diffusionz.server.providers.breaker import Breaker
from diffusionz.server.providers.remote import Provider, Remote, RemoteRequest

SIDE = 1024  # pixels, where nothing is said: as for our own pictures

Side = Annotated[int, Meta(ge=64, multiple_of=16)]


class Size(Struct, forbid_unknown_fields=True):
    width: Side
    height: Side


class FluxRequest(RemoteRequest):
    """A picture, or several, of a prompt; drawn by FLUX.1 schnell, elsewhere."""

    image_size: (
        Annotated[
            Literal["square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"] | Size,
            Meta(description="In place of width and height: fal's names, or both as an object."),
        ]
        | None
    ) = None
    width: Annotated[Side, Meta(description="Pixels; 1024 without.")] | None = None
    height: Annotated[Side, Meta(description="Pixels; 1024 without.")] | None = None
    num_images: Annotated[int, Meta(ge=1, description="How many pictures; n is the same.")] | None = None
    n: Annotated[int, Meta(ge=1, description="How many pictures.")] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**53 - 1, description="Of all pictures; a random one without.")] | None = None
    steps: Annotated[int, Meta(ge=1, le=12, description="The model is made for 4.")] = 4
    format: Annotated[Literal["jpeg", "png"], Meta(description="Of the file.")] = "jpeg"
    response_format: Annotated[
        Literal["b64_json", "url", "binary"],
        Meta(description="base64 in the answer, a URL to fetch it from, or the file itself as the body (n=1)."),
    ] = "url"


class FluxImage(Remote):
    name = "flux_image"
    unit = "image"
    schema = FluxRequest

    def __init__(self, provider: Provider, limits: Limits, breaker: Breaker, *, model: str, file_bytes: int) -> None:
        super().__init__(provider, limits, breaker)
        self._model = model
        self._file_bytes = file_bytes

    def check(self, request: FluxRequest) -> int:
        if request.num_images is not None and request.n not in (None, request.num_images):
            raise invalid(f"num_images is {request.num_images} and n is {request.n}; they are the same", param="n")
        count = _count(request)
        if count > self._limits.pictures:
            name = "n" if request.num_images is None else "num_images"
            raise invalid(f"{name} is {count} pictures; at most {self._limits.pictures} are allowed", param=name)
        if request.response_format == "binary" and count > 1:
            raise invalid(f"n is {count}; a binary answer is one picture", param="n")
        if request.image_size is not None and (request.width, request.height) != (None, None):
            raise invalid("image_size is given, and width or height too; say one", param="image_size")
        size = _size(request)
        if isinstance(size, dict):
            for name, side in size.items():
                if side > self._limits.side_pixels:
                    raise invalid(
                        f"{name} is {side} pixels; at most {self._limits.side_pixels} are allowed", param=name
                    )
            if (pixels := size["width"] * size["height"]) > self._limits.pixels:
                raise invalid(
                    f"the picture is {pixels} pixels in all; at most {self._limits.pixels} are allowed", "width"
                )
        return count

    def translated(self, request: FluxRequest) -> tuple[str, dict[str, Any]]:
        arguments: dict[str, Any] = {
            "prompt": request.prompt,
            "image_size": _size(request),
            "num_images": _count(request),
            "num_inference_steps": request.steps,
            "output_format": request.format,
            "enable_safety_checker": True,  # the operator's account answers for what is drawn
        }
        if request.seed is not None:
            arguments["seed"] = request.seed
        return self._model, arguments

    async def collected(self, request: FluxRequest, output: dict[str, Any]) -> tuple[dict[str, Any], list[File]]:
        images, count = output.get("images"), _count(request)
        if not isinstance(images, list) or len(images) != count or not all(isinstance(one, dict) for one in images):
            raise Problem("provider-error", f"fal did not send the {count} pictures that were asked for")
        # A picture that their checker withheld comes as a black one, which nobody wants to pay for.
        withheld = output.get("has_nsfw_concepts")
        if isinstance(withheld, list) and any(flag is True for flag in withheld):
            raise invalid("fal's safety checker withheld a picture of this prompt; nothing was charged", param="prompt")
        wanted = (f"image/{request.format}",)
        files = await asyncio.gather(*(self._provider.file(one.get("url"), wanted, self._file_bytes) for one in images))
        seed = output.get("seed")
        about = {
            "images": [
                {
                    "url": "",
                    "b64_json": base64.b64encode(file.content).decode()
                    if request.response_format == "b64_json"
                    else None,
                    "width": _number(one.get("width")),
                    "height": _number(one.get("height")),
                    "seed": seed if type(seed) is int else request.seed,
                    "content_type": file.content_type,
                }
                for one, file in zip(images, files, strict=True)
            ],
            "prompt": request.prompt,
            "steps": request.steps,
            "model": self._model,
        }
        return about, list(files)

    def finished(self, job: Job, about: dict[str, Any], files: list[File]) -> None:
        for i, file in enumerate(files):
            about["images"][i]["url"] = f"/api/jobs/{job.id}/images/{i}.{file.extension}"


def _count(request: FluxRequest) -> int:
    return request.num_images or request.n or 1


def _size(request: FluxRequest) -> str | dict[str, int]:
    """As fal takes it."""
    size = request.image_size
    if isinstance(size, str):
        return size
    if size is not None:
        return {"width": size.width, "height": size.height}
    return {"width": request.width or SIDE, "height": request.height or SIDE}


def _number(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
