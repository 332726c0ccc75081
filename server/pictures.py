"""The service zimage: pictures of prompts."""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import os
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import orjson

from diffusionz import Cancelled, Image, ImageError, Preview, Progress
from diffusionz.image import to_rgb
from diffusionz.server.decoding import decode
from diffusionz.server.jobs import File, Job, Order, Result
from diffusionz.server.lanes import Lane
from diffusionz.server.limits import Limits
from diffusionz.server.models import Models, parse_keep_alive
from diffusionz.server.problems import invalid
from diffusionz.server.schemas import ImageRequest
from diffusionz.server.threads import in_thread, posted

_USUAL = 1024 * 1024 * 8  # pixels times steps of a job of weight 1


@dataclasses.dataclass(frozen=True)
class Start:
    """The picture that another starts from: raw RGB."""

    rgb: bytes
    width: int
    height: int


class Pictures:
    """Draws with the models of the family zimage, one picture a device at a time."""

    name = "zimage"
    schema = ImageRequest

    def __init__(self, models: Models, limits: Limits, *, devices: int = 1) -> None:
        self._models = models
        self._limits = limits
        self.lane: Lane = Lane("zimage", devices)
        self._threads = ThreadPoolExecutor(devices, "diffusionz-draw")
        self._codecs = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), "diffusionz-encode")

    async def order(self, body: bytes) -> Order:
        return await self.check(decode(body, ImageRequest))

    async def check(self, request: ImageRequest, start: Start | None = None) -> Order:
        """An order of a decoded request; `start` is its image, where that is decoded, too. Raises Problem."""
        limits = self._limits
        side = self._models.find(request.model, self.name).side_pixels
        if request.keep_alive is not None:
            parse_keep_alive(request.keep_alive)
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
            _most(name, len(text), limits.prompt_characters, "characters")
            if "\0" in text:  # the engine would say so too, after the price was held
                raise invalid(f"{name} holds a NUL character", param=name)
        _most("steps", request.steps, limits.steps, "steps")
        _most("n", request.n, limits.pictures, "pictures")
        if request.response_format == "binary" and request.n > 1:
            raise invalid(f"n is {request.n}; a binary answer is one picture", param="n")
        if request.image is not None:
            start = await self._start(request.image)
        if start is not None:
            for name, asked, there in (("width", request.width, start.width), ("height", request.height, start.height)):
                if asked not in (None, there):
                    raise invalid(
                        f"{name} is {asked} and the given image's {there}; they must be equal",
                        param=name,
                    )
                if there % 16:
                    raise invalid(
                        f"the given image's {name} is {there}; it must be a multiple of 16",
                        param="image",
                    )
        width, height = (start.width, start.height) if start else (request.width or side, request.height or side)
        _most("width", width, limits.side_pixels, "pixels")
        _most("height", height, limits.side_pixels, "pixels")
        _most("width", width * height, limits.pixels, "pixels in all")
        if request.seed is None:
            request.seed = secrets.randbits(32)
        return Order(self, (request, start), request.n, request.n * width * height * request.steps / _USUAL)

    async def _start(self, text: str) -> Start:
        """The picture of a base64 string or a data: URL; nothing is fetched from anywhere. Raises Problem."""
        if text.startswith("data:"):
            head, comma, text = text.partition(",")
            if not comma or not head.endswith(";base64"):
                raise invalid("image is a data: URL that is not base64", param="image")
        elif text[:8].lower().startswith(("http:", "https:")):
            raise invalid("image is a URL; send the picture itself, in base64", param="image")
        try:
            data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
        except (ValueError, UnicodeEncodeError):
            raise invalid("image is not base64", param="image") from None
        return await self.start(data)

    async def start(self, data: bytes) -> Start:
        """The picture of a file's bytes, PNG or WebP. Raises Problem."""
        _most("image", _pixels_claimed(data), self._limits.pixels, "pixels in all")
        try:
            rgb, width, height = await in_thread(self._codecs, lambda: to_rgb(data))
        except ImageError as error:
            raise invalid(f"image: {error}", param="image") from None
        return Start(rgb, width, height)

    async def resized(self, start: Start, width: int, height: int) -> Start:
        """The picture in another size. Raises Problem."""
        _most("width", max(width, height), self._limits.side_pixels, "pixels")
        _most("width", width * height, self._limits.pixels, "pixels in all")
        if (width, height) == (start.width, start.height):
            return start
        return Start(
            await in_thread(self._codecs, lambda: resized(start.rgb, start.width, start.height, width, height)),
            width,
            height,
        )

    async def run(self, job: Job) -> list[Image]:
        request, start = job.order.request
        spec = self._models.find(request.model, self.name)
        loop, stop = asyncio.get_running_loop(), threading.Event()

        def on_progress(progress: Progress) -> None:
            if stop.is_set():
                raise Cancelled("the job was cancelled")
            posted(loop, job.running, progress.stage, progress.step, progress.step_count)

        job.running("loading")
        async with self._models.use(spec.name, request.keep_alive) as model:
            options: dict[str, Any] = {}
            if start is not None:
                import numpy

                pixels = numpy.frombuffer(start.rgb, numpy.uint8).reshape(start.height, start.width, 3)
                options = {"init_image": pixels, "strength": request.strength}
            if request.partial_images:
                options["previews"] = request.partial_images
                options["on_preview"] = lambda preview: posted(loop, job.preview, _preview_event(preview))
            return await in_thread(
                self._threads,
                lambda: model.generate_batch(
                    request.prompt,
                    count=request.n,
                    width=request.width,
                    height=request.height,
                    steps=request.steps,
                    seed=request.seed,
                    guidance=request.guidance,
                    negative_prompt=request.negative_prompt,
                    on_progress=on_progress,
                    progress=False,
                    **options,
                ),
                stop,
            )

    async def finish(self, job: Job, raw: list[Image]) -> Result:
        request: ImageRequest = job.order.request[0]
        job.running("encode", job.step, job.step_count)

        def encoded(image: Image) -> bytes:
            return image.encode(request.format, quality=request.quality)

        contents = await asyncio.gather(*(in_thread(self._codecs, partial(encoded, image)) for image in raw))
        files = tuple(File(content, f"image/{request.format}") for content in contents)
        images = []
        for i, (image, file) in enumerate(zip(raw, files, strict=True)):
            inline = request.response_format == "b64_json"
            images.append(
                {
                    "url": f"/api/jobs/{job.id}/images/{i}.{file.extension}",
                    "b64_json": base64.b64encode(file.content).decode() if inline else None,
                    "width": image.width,
                    "height": image.height,
                    "seed": image.seed,
                    "content_type": file.content_type,
                }
            )
        about = {
            "images": images,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "steps": request.steps,
            "guidance": request.guidance,
            "model": self._models.find(request.model, self.name).name,
        }
        return Result(orjson.dumps(about), files)


def resized(rgb: bytes, width: int, height: int, new_width: int, new_height: int) -> bytes:
    """Raw RGB in another size: each new pixel is the mean of those around its place, weighted by a triangle as wide as
    two pixels of the coarser of both grids, as Pillow's BILINEAR does it."""
    import numpy

    def along_rows(pixels: Any, size: int) -> Any:
        old = len(pixels)
        scale = max(old / size, 1.0)
        centres = (numpy.arange(size) + 0.5) * old / size
        first = numpy.floor(centres - scale + 0.5).astype(int)
        out, total = numpy.zeros((size, *pixels.shape[1:]), numpy.float32), numpy.zeros(size, numpy.float32)
        for tap in range(int(2 * scale) + 2):
            weight = numpy.maximum(0, 1 - abs(first + tap + 0.5 - centres) / scale).astype(numpy.float32)
            weight[(first + tap < 0) | (first + tap >= old)] = 0
            out += weight[:, None, None] * pixels[numpy.clip(first + tap, 0, old - 1)]
            total += weight
        return out / total[:, None, None]

    pixels = numpy.frombuffer(rgb, numpy.uint8).reshape(height, width, 3)
    half = along_rows(pixels, new_height).swapaxes(0, 1)
    return bytes(numpy.rint(along_rows(half, new_width).swapaxes(0, 1)).astype(numpy.uint8).tobytes())


def _preview_event(preview: Preview) -> dict[str, Any]:
    """The fields of image_generation.partial_image; made on the drawing's thread."""
    picture = preview.picture
    return {
        "b64_json": base64.b64encode(picture.encode("webp", quality=70)).decode(),
        "partial_image_index": preview.preview,
        "index": preview.image,
        "step": preview.step,
        "step_count": preview.step_count,
        "width": picture.width,
        "height": picture.height,
        "output_format": "webp",
    }


def _most(param: str, value: int, most: int, unit: str) -> None:
    if value > most:
        raise invalid(f"{param} is {value} {unit}; at most {most} are allowed", param=param)


def _pixels_claimed(data: bytes) -> int:
    """Pixels that the head of a PNG or WebP claims, before anything is decoded: a small file may be a huge picture.
    0 for what is neither, which the decoder refuses. https://developers.google.com/speed/webp/docs/riff_container"""

    def number(at: int, size: int, order: Literal["big", "little"] = "little") -> int:
        return int.from_bytes(data[at : at + size], order)

    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return number(16, 4, "big") * number(20, 4, "big")
    match data[:4] + data[8:16]:
        case b"RIFFWEBPVP8X":
            return (number(24, 3) + 1) * (number(27, 3) + 1)
        case b"RIFFWEBPVP8 ":
            return (number(26, 2) & 0x3FFF) * (number(28, 2) & 0x3FFF)
        case b"RIFFWEBPVP8L":
            bits = number(21, 4)
            return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    return 0
