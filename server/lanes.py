"""Taking turns at a device: one job after the other, fair between those who ask.

    async with lane.turn(job):
        ...                     # the device is this job's

Start-time fair queueing (Goyal, Vin, Cheng 1996): a job starts, in virtual time, when the account's job before it ends
there, or now; the earliest start comes first. Who sends a hundred pictures waits behind them himself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import heapq
import itertools
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusionz.server.jobs import Job


@dataclasses.dataclass(order=True)
class _Waiting:
    start: float
    number: int  # of its arrival: the first of equals comes first
    job: Job = dataclasses.field(compare=False)
    turn: asyncio.Future[None] = dataclasses.field(compare=False)


class Lane:
    """Turns at `width` devices, or at one that does `width` jobs at once."""

    def __init__(self, name: str, width: int = 1) -> None:
        self.name = name
        self.width = width
        self.running = 0
        self._waiting: list[_Waiting] = []  # a heap; those that left are still in it
        self._now = 0.0  # virtual time: the start of the job that began last
        self._until: dict[str, float] = {}  # account -> when its last job ends, in virtual time
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def turn(self, job: Job) -> AsyncIterator[None]:
        """Waits for the job's turn. When it is cancelled meanwhile, it leaves the queue."""
        await self._arrive(job)
        try:
            yield
        finally:
            self.running -= 1
            self._next()

    async def _arrive(self, job: Job) -> None:
        account = job.caller.account
        start = max(self._now, self._until.get(account, 0.0))
        self._until[account] = start + job.order.weight
        waiting = _Waiting(start, next(self._numbers), job, asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, waiting)
        self._next()
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled():  # it was given the turn in the same moment
                self.running -= 1
                self._next()
            else:
                self._moved()
            raise

    def _next(self) -> None:
        while self.running < self.width and self._waiting:
            first = heapq.heappop(self._waiting)
            if first.turn.done():
                continue
            self._now = first.start
            self.running += 1
            first.turn.set_result(None)
        if not self._waiting:
            # Nobody waits: what accounts have used before no longer counts.
            self._until = {account: end for account, end in self._until.items() if end > self._now}
        self._moved()

    def _moved(self) -> None:
        """Tells those who watch a waiting job that its place may be another."""
        for waiting in self._waiting:
            if waiting.job.watchers:
                waiting.job.changed()

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return sum(not waiting.turn.done() for waiting in self._waiting)

    def position(self, job: Job) -> int:
        """How many jobs come before it, the running ones among them."""
        own = next((waiting for waiting in self._waiting if waiting.job is job), None)
        if own is None:
            return 0
        return self.running + sum(waiting < own and not waiting.turn.done() for waiting in self._waiting)
