"""Jobs: what was asked for, how far it is, and what came of it; from a valid order to its charge.

    order = service.order(request)                   # valid, or a Problem; nothing is held yet
    job, replayed = await jobs.submit(order, caller, request_hash=..., idempotency_key=...)
    await job.wait()                                 # or watch job.events()

A job is admitted (or refused: draining, queue full), its price is held, it runs, what it delivered is charged, and only
then it is completed. Whatever fails or is cancelled on the way is voided and costs nothing. One task carries each job
through all of this, so that its end is reached however it ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import orjson

from diffusionz.server.caller import Caller
from diffusionz.server.limits import Limits
from diffusionz.server.problems import Problem, problem_of

if TYPE_CHECKING:
    from diffusionz.server.lanes import Lane
    from diffusionz.server.metrics import Metrics
    from diffusionz.server.till import Till

logger = logging.getLogger(__name__)

JOBS_KEPT = 20_000  # ended ones, whatever their results' size
STOP_S = 30  # for what was cancelled at the server's end: a step of the engine, and the ledger
GRACE_S = 120  # a hold outlives its job's time by this, so that a job that ends in time can be charged


@dataclasses.dataclass(frozen=True)
class File:
    """A picture of a result."""

    content: bytes
    content_type: str

    @property
    def extension(self) -> str:
        return self.content_type.partition("/")[2]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a service delivered: JSON, as it is sent, with the files that it names."""

    json: bytes
    files: tuple[File, ...] = ()

    @property
    def size_bytes(self) -> int:
        return len(self.json) + sum(len(file.content) for file in self.files)


@dataclasses.dataclass
class Order:
    """A valid request, and what it comes to: `units` of the price table, `weight` of the queue's time."""

    service: Service
    request: Any
    units: int = 1
    weight: float = 1.0


class Service(Protocol):
    """Something that can be asked for by name. One that is registered is priced, queued, shown and documented."""

    name: str

    @property
    def schema(self) -> type[msgspec.Struct]:
        """What its requests are."""

    @property
    def lane(self) -> Lane | None:
        """Where its jobs take turns; None when it orders them by itself."""

    async def order(self, body: bytes) -> Order:
        """Decodes and checks a request's JSON. Raises Problem."""

    async def run(self, job: Job) -> Any:
        """Does the work, during the job's turn in the lane. Cancelled like any task; it must leave nothing running."""

    async def finish(self, job: Job, raw: Any) -> Result:
        """Makes the result of what `run` gave, when the lane is free again for the next job."""


class Job:
    """One request on its way. Its attributes are for reading; times are seconds, `created_at` since 1970."""

    def __init__(
        self, id: str, order: Order, caller: Caller, request_id: str, request_hash: str, key: tuple[str, str] | None
    ) -> None:
        self.id = id
        self.order = order
        self.caller = caller
        self.request_id = request_id
        self.request_hash = request_hash
        self.key = key
        """(account, Idempotency-Key), when it has one: then it goes on when its client leaves."""
        self.status = "queued"
        self.stage = "queued"
        self.step = 0
        self.step_count = 0
        self.created_at = time.time()
        self.timings_ms: dict[str, float] = {}
        self.result: Result | None = None
        self.problem: Problem | None = None
        self.cost: dict[str, Any] | None = None
        self.previews: list[dict[str, Any]] = []
        self.watchers = 0
        """Requests that wait for it, or watch it."""
        self.arrived = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self.begun = False
        self.cancel_asked = False
        self.late = False
        """Its time was over before it was done."""
        self.settling = False
        """It is being charged for: a cancel comes too late."""
        self._until_change: set[asyncio.Future[None]] = set()
        self._until_end: set[asyncio.Future[None]] = set()

    @property
    def service(self) -> str:
        return self.order.service.name

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed", "cancelled")

    @property
    def queue_position(self) -> int:
        """Jobs that come first; 0 when it runs, or ended."""
        lane = self.order.service.lane
        return lane.position(self) if lane is not None and self.status == "queued" else 0

    # --- What its service tells it ---

    def running(self, stage: str, step: int = 0, step_count: int = 0) -> None:
        """Says how far it is."""
        if not self.ended and (stage, step, step_count) != (self.stage, self.step, self.step_count):
            self.status, self.stage, self.step, self.step_count = "running", stage, step, step_count
            self.changed()

    def preview(self, event: dict[str, Any]) -> None:
        """Shows a picture on its way: the fields of an image_generation.partial_image."""
        if not self.ended:
            self.previews.append(event)
            self.changed()

    # --- Waiting for it ---

    async def wait(self, patience_s: float | None = None) -> bool:
        """Returns when it has ended, or after this time; whether it has."""
        if not self.ended:
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            # Cheaper than asyncio.timeout, and every call waits.
            timer = None if patience_s is None else loop.call_later(patience_s, _wake, future)
            self._until_end.add(future)
            try:
                await future
            finally:
                self._until_end.discard(future)
                if timer is not None:
                    timer.cancel()
        return self.ended

    async def change(self) -> None:
        """Returns when something has changed."""
        future = asyncio.get_running_loop().create_future()
        self._until_change.add(future)
        try:
            await future
        finally:
            self._until_change.discard(future)

    def changed(self) -> None:
        """Wakes those who watch it, and when it has ended those who wait for that."""
        for future in [*self._until_change, *(self._until_end if self.ended else ())]:
            _wake(future)

    def cancel(self) -> None:
        """Stops it; quiet when it has ended, or is being charged for."""
        if self.ended or self.settling or self.cancel_asked:
            return
        self.cancel_asked = True
        # A task that is cancelled before its first step never enters `_carry`, which has to end the job.
        if self.task is not None and self.begun:
            self.task.cancel()

    def stop_late(self) -> None:
        """Stops it because its time is over."""
        assert self.task is not None
        self.late = True
        self.task.cancel()

    # --- Showing it ---

    def shown(self) -> dict[str, Any]:
        """The job as /api/jobs/{id} answers it."""
        base = f"/api/jobs/{self.id}"
        return {
            "id": self.id,
            "service": self.service,
            "status": self.status,
            "created_at": self.created_at,
            "queue_position": self.queue_position,
            "progress": {"stage": self.stage, "step": self.step, "step_count": self.step_count},
            "result": None if self.result is None else orjson.Fragment(self.result.json),
            "problem": None if self.problem is None else self.problem.body(self.request_id),
            "cost": self.cost,
            "timings_ms": self.timings_ms,
            "urls": {"self": base, "events": base + "/events", "cancel": base + "/cancel", "result": base + "/result"},
        }

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(name, data) of what happens to it, from now to its end."""
        position = progress = None
        seen = 0
        while True:
            if self.status == "queued" and position != (position := self.queue_position):
                yield "job.queued", {"id": self.id, "queue_position": position}
            for event in self.previews[seen:]:
                seen += 1
                yield "image_generation.partial_image", event
            now = (self.stage, self.step, self.step_count)
            if self.status == "running" and progress != (progress := now):
                yield "job.progress", {"id": self.id, "stage": now[0], "step": now[1], "step_count": now[2]}
            if self.ended:
                yield f"job.{self.status}", self.shown()
                return
            if seen == len(self.previews) and now == (self.stage, self.step, self.step_count):
                await self.change()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Jobs:
    """All jobs of the server: admits them, carries them through, and keeps what came of them for a while."""

    def __init__(self, limits: Limits, metrics: Metrics, till: Till | None) -> None:
        self.limits = limits
        self.metrics = metrics
        self.till = till
        self.draining = False
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._keyed: dict[tuple[str, str], Job] = {}
        self._ended: OrderedDict[str, float] = OrderedDict()  # id -> when, oldest first
        self._gone: OrderedDict[str, str] = OrderedDict()  # id -> account, of those that are no longer kept
        self._kept_bytes = 0
        self._by_account: Counter[str] = Counter()  # jobs that wait or run
        self._by_service: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}  # of a job of a service, a running mean
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> int:
        """Jobs that wait or run."""
        return self._by_account.total()

    # --- In ---

    async def submit(
        self,
        order: Order,
        caller: Caller,
        *,
        request_hash: str,
        request_id: str,
        idempotency_key: str | None = None,
    ) -> tuple[Job, bool]:
        """(the job, its price held; whether it was there before). Raises Problem: then nothing is held."""
        key = (caller.account, idempotency_key) if idempotency_key is not None else None
        if key is not None and (known := self._keyed.get(key)) is not None:
            if known.request_hash != request_hash:
                raise Problem("idempotency-mismatch", "the Idempotency-Key was sent before, with another request")
            return known, True
        self._admit(order.service.name, caller.account)
        job = Job("job-" + secrets.token_urlsafe(18), order, caller, request_id, request_hash, key)
        self._jobs[job.id] = job
        if key is not None:
            self._keyed[key] = job
        self._by_account[caller.account] += 1
        self._by_service[job.service] += 1
        try:
            if self.till is not None:
                await self.till.hold(job, int(self.limits.job_s) + GRACE_S, self.limits.result_s)
        except BaseException as error:
            left = isinstance(error, asyncio.CancelledError)
            job.problem = Problem("cancelled", "the request was cut off") if left else problem_of(error)
            job.status = "failed"
            self._end(job)
            self._forget(job)  # it never was a job: its key may be used again
            if left:
                raise
            raise job.problem from None
        job.task = asyncio.create_task(self._carry(job))
        self._tasks.add(job.task)
        job.task.add_done_callback(self._tasks.discard)
        return job, False

    def _admit(self, service: str, account: str) -> None:
        """Raises Problem when there is no room. Nothing is awaited between this and taking the room."""
        if self.draining:
            raise Problem("draining", "the server is about to stop and takes no new jobs", retry_after_s=10)
        limits = self.limits
        for count, most, whose in (
            (self._by_account[account], limits.queue_per_key, "of yours"),
            (self._by_service[service], limits.queue_per_service, f"of {service}"),
            (self.active, limits.queue, "in all"),
        ):
            if count >= most:
                self.metrics.refused.labels(service, "queue-full").inc()
                seconds = count * self._seconds.get(service, 1.0)
                raise Problem(
                    "queue-full",
                    f"{count} jobs {whose} wait or run; at most {most} may",
                    retry_after_s=min(120.0, math.ceil(seconds)),
                    queue_depth=count,
                )

    async def _carry(self, job: Job) -> None:
        """Takes a job to its end."""
        service = job.order.service
        job.begun = True
        try:
            if job.cancel_asked:  # while its price was held
                raise asyncio.CancelledError
            # Cheaper than asyncio.timeout, and every job has one.
            timer = asyncio.get_running_loop().call_later(self.limits.job_s, job.stop_late)
            try:
                if service.lane is None:
                    raw = await self._run(job)
                else:
                    async with service.lane.turn(job):
                        raw = await self._run(job)
                result = await service.finish(job, raw)
            finally:
                timer.cancel()
            job.settling = True
            if self.till is not None:
                await self.till.charge(job)
            job.result = result
            job.status = job.stage = "completed"
        except asyncio.CancelledError:
            if job.late and not job.cancel_asked:
                job.problem = Problem("timeout", f"the job was not done within {self.limits.job_s:g} seconds")
                job.status = "failed"
            else:
                job.problem = Problem("cancelled", "the job was cancelled; nothing was charged")
                job.status = "cancelled"
        except Exception as error:
            job.problem = problem_of(error, job.request_id)
            job.status = "failed"
        if job.problem is not None and job.problem.status >= 500:
            about = {"request_id": job.request_id, "job": job.id, "service": job.service}
            if not job.problem.kind.startswith("provider"):  # who may quote what was asked for
                about["detail"] = job.problem.detail
            logger.warning("a job failed: %s", job.problem.kind, extra={"fields": about})
        if job.problem is not None and self.till is not None:
            # Before its end is told: who sees it cancelled sees its credit, too.
            await self.till.void(job, job.problem.kind)
        self._end(job)

    async def _run(self, job: Job) -> Any:
        began = time.monotonic()
        job.timings_ms["queue"] = (began - job.arrived) * 1e3
        job.running("running")
        try:
            return await job.order.service.run(job)
        finally:
            seconds = time.monotonic() - began
            job.timings_ms["run"] = seconds * 1e3
            mean = self._seconds.get(job.service, seconds)
            self._seconds[job.service] = mean + 0.1 * (seconds - mean)

    def _end(self, job: Job) -> None:
        job.timings_ms["total"] = (time.monotonic() - job.arrived) * 1e3
        self._by_account[job.caller.account] -= 1
        if not self._by_account[job.caller.account]:
            del self._by_account[job.caller.account]
        self._by_service[job.service] -= 1
        self._ended[job.id] = time.monotonic()
        self._kept_bytes += job.result.size_bytes if job.result else 0
        self._expire()
        self.metrics.ended(job)
        job.changed()
        job.order.request = None  # it may be large, and is of no use any more
        if not job.watchers:
            job.previews.clear()

    # --- Out ---

    def find(self, id: str, caller: Caller | None = None) -> Job:
        """The job of an id; of the caller's account, when one is given. Raises Problem."""
        self._expire()
        job = self._jobs.get(id)
        if caller is not None and self._gone.get(id) == caller.account:
            raise Problem("gone", "the job has ended, and what came of it was kept for its time")
        if job is None or (caller is not None and job.caller.account != caller.account):
            raise Problem("not-found", "there is no such job, or it is no longer kept")
        return job

    def list(self, caller: Caller, limit: int = 50) -> list[Job]:
        """The caller's jobs, newest first."""
        return [job for job in reversed(self._jobs.values()) if job.caller.account == caller.account][:limit]

    def _expire(self) -> None:
        """Forgets the oldest ended jobs: those beyond their time, their number, or the memory for results."""
        limits, now = self.limits, time.monotonic()
        while self._ended:
            id, at = next(iter(self._ended.items()))
            if now - at < limits.result_s and len(self._ended) <= JOBS_KEPT and self._kept_bytes <= limits.result_bytes:
                return
            self._gone[id] = self._jobs[id].caller.account
            if len(self._gone) > JOBS_KEPT:
                self._gone.popitem(last=False)
            self._forget(self._jobs[id])

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id], self._ended[job.id]
        self._kept_bytes -= job.result.size_bytes if job.result else 0
        if job.key is not None:
            del self._keyed[job.key]

    async def drain(self, patience_s: float) -> None:
        """Takes no more jobs, and returns when all have ended; those that have not after `patience_s` are cancelled."""
        self.draining = True
        if not await self._idle(patience_s):
            logger.warning("%d jobs did not end in %g seconds and are cancelled", self.active, patience_s)
            self.cancel_all()
            await self._idle(STOP_S)

    def cancel_all(self) -> None:
        for job in list(self._jobs.values()):
            job.cancel()

    async def _idle(self, patience_s: float) -> bool:
        """Returns when no job waits or runs, or after this time; whether none does."""
        deadline = time.monotonic() + patience_s
        # Looked at now and then: a job whose price is being held has no task yet that could be waited for.
        while self.active and (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.02))
        return not self.active
