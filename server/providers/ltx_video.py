"""The service ltx_video: videos by LTX, of a prompt, or of a picture and a prompt."""

from __future__ import annotations

import binascii
from typing import Annotated, Any, Literal

from msgspec import Meta

from diffusionz.server.jobs import File, Job
from diffusionz.server.limits import Limits
from diffusionz.server.problems import Problem, invalid
from diffusionz.server.providers.breaker import Breaker
from diffusionz.server.providers.fal import content_type_of
from diffusionz.server.providers.remote import Provider, Remote, RemoteRequest

SECONDS = 6  # the shortest that LTX-2 makes

# Fields beside the prompt and the picture that a family of models knows; they are not passed on where they would be
# passed over.
_KNOWN = {
    "fal-ai/ltx-video": {"negative_prompt", "seed"},
    "fal-ai/ltx-2": {"duration", "aspect_ratio", "fps", "audio"},
}


class LtxRequest(RemoteRequest):
    """A video of a prompt; made by LTX, elsewhere."""

    image: (
        Annotated[str, Meta(description="The first frame: base64 of a PNG, JPEG or WebP, or a data: URL.")] | None
    ) = None
    duration: Annotated[Literal[6, 8, 10], Meta(description="Seconds; 6 without.")] | None = None
    aspect_ratio: Literal["16:9", "9:16"] | None = None
    fps: Annotated[Literal[24, 25, 48, 50], Meta(description="Frames a second; 25 without.")] | None = None
    audio: Annotated[bool, Meta(description="With sound, which is the default.")] | None = None
    negative_prompt: Annotated[str, Meta(description="For models that know it.")] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**53 - 1, description="For models that know it.")] | None = None
    response_format: Literal["url"] = "url"


class LtxVideo(Remote):
    name = "ltx_video"
    unit = "video"
    schema = LtxRequest

    def __init__(
        self, provider: Provider, limits: Limits, breaker: Breaker,
        *, model: str, model_from_image: str, longest_s: int, file_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(provider, limits, breaker)
        self._model = model
        self._model_from_image = model_from_image
        self._longest_s = longest_s
        self._file_bytes = file_bytes

    def check(self, request: LtxRequest) -> int:
        if len(request.negative_prompt or "") > self._limits.prompt_characters:
            raise invalid(f"at most {self._limits.prompt_characters} characters are allowed", param="negative_prompt")
        model = self._of(request)
        known = _known(model)
        for name in ("duration", "aspect_ratio", "fps", "audio", "negative_prompt", "seed"):
            if getattr(request, name) is not None and name not in known:
                raise invalid(f"{model} knows no {name}; it knows {', '.join(sorted(known))}", param=name)
        if (request.duration or 0) > self._longest_s:
            raise invalid(
                f"duration is {request.duration}; at most {self._longest_s} seconds are sold", param="duration"
            )
        if request.image is not None:
            request.image = _data_url(request.image)
        return 1

    def translated(self, request: LtxRequest) -> tuple[str, dict[str, Any]]:
        model = self._of(request)
        arguments: dict[str, Any] = {"prompt": request.prompt}
        if request.image is not None:
            arguments["image_url"] = request.image
        if "duration" in _known(model):
            # All that costs by its size is said, so that another default there changes no price.
            arguments |= {"duration": request.duration or SECONDS, "resolution": "1080p"}
        for ours, theirs in (
            ("aspect_ratio", "aspect_ratio"), ("fps", "fps"), ("audio", "generate_audio"),
            ("negative_prompt", "negative_prompt"), ("seed", "seed"),
        ):  # fmt: skip
            if (value := getattr(request, ours)) is not None:
                arguments[theirs] = value
        return model, arguments

    async def collected(self, request: LtxRequest, output: dict[str, Any]) -> tuple[dict[str, Any], list[File]]:
        video = output.get("video")
        if not isinstance(video, dict):
            raise Problem("provider-error", "fal did not send the video that was asked for")
        file = await self._provider.file(video.get("url"), ("video/mp4",), self._file_bytes)
        seed = output.get("seed")
        about = {
            "videos": [
                {
                    "url": "",
                    "width": _number(video.get("width")),
                    "height": _number(video.get("height")),
                    "duration": _number(video.get("duration")),
                    "fps": _number(video.get("fps")),
                    "seed": seed if type(seed) is int else request.seed,
                    "content_type": file.content_type,
                }
            ],
            "prompt": request.prompt,
            "model": self._of(request),
        }
        return about, [file]

    def finished(self, job: Job, about: dict[str, Any], files: list[File]) -> None:
        about["videos"][0]["url"] = f"/api/jobs/{job.id}/videos/0.{files[0].extension}"

    def _of(self, request: LtxRequest) -> str:
        return self._model if request.image is None else self._model_from_image


def _known(model: str) -> set[str]:
    return next((known for family, known in _KNOWN.items() if model.startswith(family)), set())


def _data_url(text: str) -> str:
    """A picture's data: URL, with the type that it has. Raises Problem."""
    if text[:8].lower().startswith(("http:", "https:")):
        raise invalid("image is a URL; send the picture itself, in base64", param="image")
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise invalid("image is a data: URL that is not base64", param="image")
    try:
        kind = content_type_of(binascii.a2b_base64(text.encode("ascii"), strict_mode=True))
    except (ValueError, UnicodeEncodeError):
        raise invalid("image is not base64", param="image") from None
    if kind is None or not kind.startswith("image/"):
        raise invalid("image is no PNG, JPEG or WebP", param="image")
    return f"data:{kind};base64,{text}"


def _number(value: object) -> int | float | None:
    return value if type(value) in (int, float) and value > 0 else None  # type: ignore[operator, return-value]
