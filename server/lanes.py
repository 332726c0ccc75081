"""Taking turns at a device: one job after the other, fair between those who ask.

    async with lane.turn(job):
        ...                     # the device is this job's

Start-time fair queueing (Goyal, Vin, Cheng 1996): a job starts, in virtual time, when the account's job before it ends
there, or when it arrives; the earliest start comes first. Who sends a hundred pictures waits behind them himself. What
starts when is found out anew each time, so that a job that leaves the queue has cost its account nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusionz.server.jobs import Job


@dataclasses.dataclass(eq=False)
class _Waiting:
    since: float  # in virtual time
    number: int  # of its arrival: the first of equals comes first
    job: Job
    turn: asyncio.Future[None]


class Lane:
    """Turns at `width` devices, or at one that does `width` jobs at once."""

    def __init__(self, name: str, width: int = 1) -> None:
        self.name = name
        self.width = width
        self.running = 0
        self._waiting: dict[str, list[_Waiting]] = {}  # account -> in order; none is empty
        self._now = 0.0  # virtual time: the start of the job that began last
        self._until: dict[str, float] = {}  # account -> when its last job that began ends, in virtual time
        self._numbers = itertools.count()
        self._places: dict[int, int] | None = None  # of waiting jobs, by their id(); None: not known yet

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
        waiting = _Waiting(self._now, next(self._numbers), job, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(account, []).append(waiting)
        self._next()
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled():  # it was given the turn in the same moment
                self.running -= 1
                if account in self._until:
                    self._until[account] -= job.order.weight
                self._next()
            else:
                self._leave(waiting)
                self._moved()
            raise

    def _next(self) -> None:
        while self.running < self.width:
            first = min(
                (head for account in self._waiting for head in [next(self._starts(account), None)] if head),
                default=None,
            )
            if first is None:
                break
            start, _, waiting = first
            self._leave(waiting)
            self._now = start
            self._until[waiting.job.caller.account] = start + waiting.job.order.weight
            self.running += 1
            waiting.turn.set_result(None)
        if not self._waiting:
            # Nobody waits: what accounts have used before counts only against those who come while it still runs.
            self._until = {account: end for account, end in self._until.items() if self.running and end > self._now}
        self._moved()

    def _leave(self, waiting: _Waiting) -> None:
        account = waiting.job.caller.account
        self._waiting[account].remove(waiting)
        if not self._waiting[account]:
            del self._waiting[account]

    def _starts(self, account: str) -> Iterator[tuple[float, int, _Waiting]]:
        """(its start, its number, a waiting job) of the account's, in order."""
        end = self._until.get(account, 0.0)
        for waiting in self._waiting[account]:
            if not waiting.turn.done():  # else it was cancelled, and is about to leave
                start = max(waiting.since, end)
                yield start, waiting.number, waiting
                end = start + waiting.job.order.weight

    def _moved(self) -> None:
        """Tells those who watch a waiting job that its place may be another."""
        self._places = None
        for queue in self._waiting.values():
            for waiting in queue:
                if waiting.job.watchers:
                    waiting.job.changed()

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return sum(not waiting.turn.done() for queue in self._waiting.values() for waiting in queue)

    def position(self, job: Job) -> int:
        """How many jobs come before it, the running ones among them."""
        if self._places is None:
            order = sorted(place for account in self._waiting for place in self._starts(account))
            self._places = {id(waiting.job): place for place, (_, _, waiting) in enumerate(order)}
        place = self._places.get(id(job))
        return 0 if place is None else self.running + place
