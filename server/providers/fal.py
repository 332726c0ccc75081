"""fal.ai's queue. https://docs.fal.ai/model-endpoints/queue and https://docs.fal.ai/errors say what is read here."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from typing import Any

import orjson

from diffusionz.server.jobs import File
from diffusionz.server.lanes import Lane
from diffusionz.server.problems import Problem, invalid
from diffusionz.server.providers.remote import Status, Ticket
from diffusionz.server.providers.web import PASSING, Answer, Hosts, Unanswered, Web, origin_of

logger = logging.getLogger(__name__)

MEDIA_HOSTS = ("fal.media", "fal.run", "fal.ai")
EXPIRES_S = 3600  # of their copies of the files; ours is what users get
MESSAGE_CHARACTERS = 300

_STEP = re.compile(r"\b(\d{1,5})/(\d{1,5}) \[")  # of a tqdm bar in the log: " 50%|█████     | 2/4 [00:00<00:00"
_RESULT_PASSING = PASSING - {500}  # a 500 is how the job ended


@dataclasses.dataclass(frozen=True)
class FalSettings:
    """`[providers.fal]` of the server's settings. Times in seconds."""

    base_url: str = "https://queue.fal.run"
    services: tuple[str, ...] = ("flux_image", "ltx_video")
    flux_image: str = "fal-ai/flux/schnell"
    """The models, by fal's names."""
    ltx_video: str = "fal-ai/ltx-2.3/text-to-video/fast"
    ltx_video_from_image: str = "fal-ai/ltx-2.3/image-to-video/fast"
    ltx_video_s: int = 6
    """The longest video that is made for the price of one: fal asks by the second."""
    concurrency: int = 8
    connect_s: float = 5.0
    request_s: float = 20.0
    """One exchange with the queue."""
    download_s: float = 60.0
    """One file."""
    total_s: float = 300.0
    poll_s: float = 2.0
    failures: int = 5
    """In a row, of one service, after which it is left alone for `pause_s`."""
    pause_s: float = 30.0
    image_bytes: int = 32 * 2**20
    video_bytes: int = 64 * 2**20
    media_hosts: tuple[str, ...] = MEDIA_HOSTS
    """Names, with all below them, that files are fetched from."""


class Fal:
    """A Provider. `key` is in no log line, message or result."""

    name = "fal"

    def __init__(self, settings: FalSettings, key: str, *, loopback: bool = False) -> None:
        self._settings = settings
        self._base = settings.base_url.rstrip("/")
        self._origin = origin_of(self._base)
        self._key = key
        self._headers = {"authorization": f"Key {key}", "accept": "application/json"}
        self._hosts = Hosts(settings.media_hosts, self._origin if loopback else None)
        self._web = Web(connect_s=settings.connect_s, connections=2 * settings.concurrency + 8, proxies=not loopback)
        self.lane = Lane("fal", settings.concurrency)
        self.total_s = settings.total_s
        self.poll_s = settings.poll_s

    def __repr__(self) -> str:
        return f"Fal({self._base!r})"

    async def close(self) -> None:
        await self._web.close()

    async def submit(self, model: str, arguments: dict[str, Any]) -> Ticket:
        headers = self._headers | {
            "content-type": "application/json",
            # Not begun in time, it need not begin: also when this server dies and nobody is left to cancel.
            "x-fal-request-timeout": f"{self.total_s:g}",
            "x-fal-object-lifecycle-preference": json.dumps({"expiration_duration_seconds": EXPIRES_S}),
        }
        try:
            answer = await self._web.submit(
                f"{self._base}/{model}",
                seconds=self._settings.request_s,
                headers=headers,
                content=orjson.dumps(arguments),
            )
            if answer.status not in (200, 201, 202):
                raise self._problem(answer, "submit")
            about = answer.json()
        except Unanswered as error:
            raise self._unanswered(error) from None
        # They say not to make these URLs from the id. But our key goes to them.
        ticket = Ticket(
            *(str(about.get(name) or "") for name in ("request_id", "status_url", "response_url", "cancel_url"))
        )
        for url in (ticket.status_url, ticket.result_url, ticket.cancel_url):
            if origin_of(url) != self._origin:
                raise Problem("provider-error", "fal sent an address that is not its own")
        return ticket

    async def status(self, ticket: Ticket) -> Status:
        url = ticket.status_url + ("&" if "?" in ticket.status_url else "?") + "logs=1"
        about = await self._get(url, "status", PASSING, ok=(200, 202))
        match about.get("status"):
            case "IN_QUEUE":
                position = about.get("queue_position")
                return Status(position=position if type(position) is int and position >= 0 else None)
            case "IN_PROGRESS":
                return Status(True, False, None, *_step(about.get("logs")))
            case "COMPLETED" | "FAILED" | "CANCELED" | "CANCELLED":
                return Status(started=True, ended=True)
        raise Problem("provider-error", "fal said a status that is not known")

    async def result(self, ticket: Ticket) -> dict[str, Any]:
        return await self._get(ticket.result_url, "result", _RESULT_PASSING, ok=(200,))

    async def cancel(self, ticket: Ticket) -> None:
        try:  # 400 is "already completed", 404 "not found": there is nothing left to cancel
            answer = await self._web.repeat(
                "PUT", ticket.cancel_url, seconds=self._settings.request_s, headers=self._headers
            )
        except Unanswered as error:
            raise self._unanswered(error) from None
        if answer.status >= 500:
            raise self._problem(answer, "cancel")

    async def file(self, url: Any, types: tuple[str, ...], most_bytes: int) -> File:
        if not isinstance(url, str):
            raise Problem("provider-error", "fal sent a file without an address")
        try:
            answer = await self._web.download(
                url, self._hosts, seconds=self._settings.download_s, most_bytes=most_bytes
            )
        except Unanswered as error:
            raise self._unanswered(error) from None
        if answer.status != 200:
            raise Problem("provider-error", f"fal's file was not to be had: status {answer.status}")
        said = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        found = content_type_of(answer.body)
        # What browsers are told is what the file is, and it must be what was asked for.
        if found not in types or said not in (found, "application/octet-stream", "binary/octet-stream"):
            raise Problem("provider-error", f"fal sent a file that is not {' or '.join(types)}")
        return File(answer.body, found)

    async def _get(self, url: str, what: str, passing: frozenset[int], ok: tuple[int, ...]) -> dict[str, Any]:
        try:
            answer = await self._web.repeat(
                "GET", url, seconds=self._settings.request_s, headers=self._headers, passing=passing
            )
            if answer.status not in ok:
                raise self._problem(answer, what)
            return answer.json()
        except Unanswered as error:
            raise self._unanswered(error) from None

    # --- What went wrong ---

    def _unanswered(self, error: Unanswered) -> Problem:
        return Problem("provider-timeout" if error.timeout else "provider-error", f"fal {error}")

    def _problem(self, answer: Answer, what: str) -> Problem:
        """What an answer says that is not the wanted one; `what` was asked for."""
        status = answer.status
        message, kind, field = self._said(answer)
        if status in (401, 402, 403) or (status == 404 and what == "submit"):
            # The operator's: the key, the account, the model's name.
            logger.error("fal refuses this server: status %d: %s", status, message)
            return Problem("provider-error", "fal does not take this server's requests at the moment")
        judged = what in ("submit", "result")  # the request, rather than how we ask after it
        if judged and status in (400, 413, 422) and not kind.startswith("downstream_service"):
            said = f"fal refuses it: {message}" if message else "fal refuses it"
            return invalid(said, param=_OURS.get(field, field) if field else None)
        if status in (408, 504) or "timeout" in kind:
            return Problem("provider-timeout", f"fal was not done in time{': ' + message if message else ''}")
        if status == 429:
            pause_s = min(answer.retry_after_s or 5.0, 60.0)
            return Problem("provider-error", "fal takes no more requests at the moment", retry_after_s=pause_s)
        return Problem("provider-error", f"fal failed: {message or f'status {status}'}")

    def _said(self, answer: Answer) -> tuple[str, str, str | None]:
        """(message, type, field) of an answer's JSON: {"detail": [{"loc", "msg", "type"}]} of a model, or
        {"detail": text, "error_type"} of the queue."""
        try:
            about = answer.json()
        except Unanswered:
            return "", "", None
        detail, kind = about.get("detail", about.get("error")), about.get("error_type", "")
        field = None
        if isinstance(detail, list):
            first = detail[0] if detail and isinstance(detail[0], dict) else {}
            place = first.get("loc")
            names = [part for part in place if isinstance(part, str)] if isinstance(place, list) else []
            if names and names[-1] != "body" and re.fullmatch(r"[a-z_]{1,40}", names[-1]):
                field = names[-1]
            detail, kind = first.get("msg"), first.get("type", "")
        return self._cleaned(detail), kind if isinstance(kind, str) else "", field

    def _cleaned(self, text: object) -> str:
        """Their words, short, on one line, and without our key."""
        if not isinstance(text, str):
            return ""
        for secret in (self._key, *self._key.split(":")):
            if len(secret) >= 8:
                text = text.replace(secret, "…")
        text = " ".join("".join(character if character.isprintable() else " " for character in text[:4000]).split())
        return text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 1] + "…"


# Their fields that have other names here.
_OURS = {"image_url": "image", "output_format": "format", "num_inference_steps": "steps", "generate_audio": "audio"}


def content_type_of(data: bytes) -> str | None:
    """What a file is, by its first bytes."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp":
        return "video/mp4"
    return None


def _step(logs: object) -> tuple[int, int]:
    """(step, step_count) of the newest bar in the log; zeros without one."""
    for line in reversed(logs if isinstance(logs, list) else []):
        message = line.get("message") if isinstance(line, dict) else None
        if isinstance(message, str) and (found := _STEP.findall(message[-2000:])):
            step, count = (int(number) for number in found[-1])
            if 0 < count and step <= count:
                return step, count
    return 0, 0
