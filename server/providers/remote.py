"""Services that run elsewhere: a provider's queue, as a service of the registry.

    ticket = await provider.submit(model, arguments)     # once; from here on it costs
    async for status in ...: await provider.status(ticket)
    output = await provider.result(ticket)
    await provider.cancel(ticket)                        # whenever its result is no longer wanted

A new provider is one class with these methods; a new service one subclass of `Remote`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from typing import Annotated, Any, Protocol

import orjson
from msgspec import Meta, Struct

from diffusionz.server.decoding import decode
from diffusionz.server.jobs import File, Job, Order, Result
from diffusionz.server.lanes import Lane
from diffusionz.server.limits import Limits
from diffusionz.server.problems import Problem, invalid
from diffusionz.server.providers.breaker import Breaker

logger = logging.getLogger(__name__)

CANCEL_S = 5.0  # for telling a provider that its work is not wanted; a job's end waits no longer for that
POLL_FIRST_S = 0.15  # the pause after the first look; each is longer than the one before


@dataclasses.dataclass(frozen=True)
class Ticket:
    """A request that a provider has taken. The URLs are at the provider's own address."""

    id: str
    status_url: str
    result_url: str
    cancel_url: str


@dataclasses.dataclass(frozen=True)
class Status:
    """How far it is. `position`: requests that come first, while it is not `started`. `step` of `step_count`: as far
    as the provider says."""

    started: bool = False
    ended: bool = False
    position: int | None = None
    step: int = 0
    step_count: int = 0


class Provider(Protocol):
    """Somebody else's queue. Every method raises Problem, of the kinds provider-error, provider-timeout and, for what
    the request's sender can change, invalid-request; never with a key in its text."""

    name: str
    lane: Lane
    """How many of our jobs it works on at once, those of all its services together."""
    total_s: float
    """The longest that a job may take there."""
    poll_s: float
    """The longest pause between two looks at a job."""

    async def submit(self, model: str, arguments: dict[str, Any]) -> Ticket:
        """Asks for the work; it arrives once at most."""

    async def status(self, ticket: Ticket) -> Status: ...

    async def result(self, ticket: Ticket) -> dict[str, Any]:
        """What came of it, once it has ended; that it failed is a Problem."""

    async def cancel(self, ticket: Ticket) -> None:
        """Says that it is no longer wanted. It may end all the same."""

    async def file(self, url: Any, types: tuple[str, ...], most_bytes: int) -> File:
        """A file that a result names, of one of these content types."""


class RemoteRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What a request to a service elsewhere may carry."""

    service: Annotated[str, Meta(max_length=64)] | None = None
    stream: Annotated[bool, Meta(description="Answer with events.")] = False
    background: Annotated[bool, Meta(description="Answer 202 at once, with the job's URLs.")] = False
    wallet_address: (
        Annotated[str, Meta(max_length=64, description="If given, it must be a wallet of the key's account.")] | None
    ) = None
    prompt: Annotated[str, Meta(min_length=1, description="What to make.")]


class Remote:
    """A service of a provider; subclasses say what it takes and gives."""

    name: str
    unit: str
    """What the price table has to count."""
    schema: type[RemoteRequest]

    def __init__(self, provider: Provider, limits: Limits, breaker: Breaker) -> None:
        self._provider = provider
        self._limits = limits
        self._breaker = breaker
        self.lane: Lane = provider.lane

    async def order(self, body: bytes) -> Order:
        request = decode(body, self.schema)
        most = self._limits.prompt_characters
        if len(request.prompt) > most:
            raise invalid(f"prompt is {len(request.prompt)} characters; at most {most} are allowed", param="prompt")
        units = self.check(request)
        self._breaker.check()  # before anything is held
        return Order(self, request, units, float(units))

    # --- What subclasses say ---

    def check(self, request: Any) -> int:
        """How many units it comes to. Raises Problem."""
        raise NotImplementedError

    def translated(self, request: Any) -> tuple[str, dict[str, Any]]:
        """(model, arguments), as the provider knows them."""
        raise NotImplementedError

    async def collected(self, request: Any, output: dict[str, Any]) -> tuple[dict[str, Any], list[File]]:
        """The result's JSON but for the URLs, and its files. Raises Problem for an output that is not as agreed."""
        raise NotImplementedError

    def finished(self, job: Job, about: dict[str, Any], files: list[File]) -> None:
        """Puts the files' URLs into the JSON."""
        raise NotImplementedError

    # --- The work ---

    async def run(self, job: Job) -> tuple[dict[str, Any], list[File]]:
        total_s = self._provider.total_s
        with self._breaker.job():
            try:
                async with asyncio.timeout(total_s):
                    return await self._made(job)
            except TimeoutError:
                raise Problem(
                    "provider-timeout", f"{self._provider.name} was not done in {total_s:g} seconds"
                ) from None

    async def _made(self, job: Job) -> tuple[dict[str, Any], list[File]]:
        request, provider = job.order.request, self._provider
        model, arguments = self.translated(request)
        job.running("submit")
        ticket = await self._submitted(model, arguments)
        try:
            await self._watched(job, ticket)
        except BaseException:  # cancelled, out of time, or nobody knows how far it is: it must not go on costing
            await self._dropped(ticket)
            raise
        output = await provider.result(ticket)
        job.running("download", job.step, job.step_count)
        return await self.collected(request, output)

    async def _submitted(self, model: str, arguments: dict[str, Any]) -> Ticket:
        """Submits, and when it is cancelled meanwhile waits a little for the ticket: without it, what was taken could
        not be cancelled."""
        submitting = asyncio.ensure_future(self._provider.submit(model, arguments))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            await asyncio.wait((submitting,), timeout=CANCEL_S)
            if not submitting.done():
                submitting.cancel()
                logger.warning("%s: a request was let go of while it was sent; it may have arrived", self.name)
            elif not submitting.cancelled() and submitting.exception() is None:
                await self._dropped(submitting.result())
            raise

    async def _watched(self, job: Job, ticket: Ticket) -> None:
        """Returns when it has ended there."""
        first: int | None = None
        pause_s = POLL_FIRST_S
        while not (status := await self._provider.status(ticket)).ended:
            if status.started:
                job.running("provider", status.step, status.step_count)
            else:
                position = status.position or 0
                first = max(first or 0, position)
                job.running("provider-queue", first - position, first)
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(pause_s * 1.4, self._provider.poll_s)

    async def _dropped(self, ticket: Ticket) -> None:
        """Cancels it there; that this fails changes nothing for the job."""
        try:
            async with asyncio.timeout(CANCEL_S):
                await self._provider.cancel(ticket)
        except (Problem, TimeoutError):
            logger.warning("%s: request %.60r could not be cancelled there, and may cost", self.name, ticket.id)

    async def finish(self, job: Job, raw: tuple[dict[str, Any], list[File]]) -> Result:
        about, files = raw
        self.finished(job, about, files)
        return Result(orjson.dumps(about), tuple(files))
