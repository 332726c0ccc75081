"""Turns at a device: fair between accounts, whoever comes, goes, or changes his mind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionz.server.lanes import Lane


class Bench:
    """A lane, and jobs that run on it until they are told to end."""

    def __init__(self, width: int = 1) -> None:
        self.lane = Lane("zimage", width)
        self.started: list[Any] = []  # in order
        self.running: list[Any] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._ends: dict[int, asyncio.Event] = {}

    async def arrive(self, account: str = "a", weight: float = 1.0, watchers: int = 0) -> Any:
        job = SimpleNamespace(
            caller=SimpleNamespace(account=account), order=SimpleNamespace(weight=weight), watchers=watchers, told=0
        )
        job.changed = lambda: setattr(job, "told", job.told + 1)
        self._ends[id(job)] = asyncio.Event()
        self.tasks[id(job)] = asyncio.create_task(self._carry(job))
        await self.settle()
        return job

    async def _carry(self, job: Any) -> None:
        async with self.lane.turn(job):
            self.started.append(job)
            self.running.append(job)
            try:
                await self._ends[id(job)].wait()
            finally:
                self.running.remove(job)

    async def end(self, job: Any | None = None) -> None:
        self._ends[id(job or self.running[0])].set()
        await self.settle()

    async def cancel(self, job: Any) -> None:
        self.tasks[id(job)].cancel()
        await self.settle()

    async def drain(self) -> None:
        while self.running:
            await self.end()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.gather(*self.tasks.values(), return_exceptions=True), 5)

    @staticmethod
    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def on(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))  # type: ignore[arg-type]


WEIGHTS = st.sampled_from([0.25, 1.0, 1.0, 4.0])
ARRIVAL = st.tuples(st.just("arrive"), st.sampled_from("abc"), WEIGHTS)
END = st.tuples(st.just("end"), st.just(""), st.just(0.0))
CANCEL = st.tuples(st.just("cancel"), st.just(""), st.floats(0, 1, exclude_max=True))


@given(st.lists(st.one_of(ARRIVAL, ARRIVAL, END), max_size=40), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_whoever_waits_gets_his_share(ops: list[tuple[str, str, float]], width: int) -> None:
    """Between two accounts that both wait all the while, what they were given differs by one job of each at most; the
    theorem of start-time fair queueing, for any interval of any history. And no device is idle while somebody waits."""

    async def work() -> None:
        bench = Bench(width)
        history: list[tuple[frozenset[str], Any]] = []  # (who waited before the start, the job that started)
        waiting: list[Any] = []

        def look(before: frozenset[str]) -> None:
            for job in bench.started[len(history) :]:
                history.append((before, job))
                waiting.remove(job)
                before = frozenset(other.caller.account for other in waiting)
            assert len(bench.running) == bench.lane.running <= width
            assert not waiting or len(bench.running) == width
            assert bench.lane.depth == len(waiting)

        for op, account, weight in ops:
            if op == "arrive":
                job = await bench.arrive(account, weight)
                waiting.append(job)
                look(frozenset(other.caller.account for other in waiting))
            elif bench.running:
                before = frozenset(other.caller.account for other in waiting)
                await bench.end()
                look(before)
        while bench.running:
            before = frozenset(other.caller.account for other in waiting)
            await bench.end()
            look(before)
        assert not waiting

        for x, y in itertools.combinations("abc", 2):
            most = {
                who: max((j.order.weight for _, j in history if j.caller.account == who), default=0) for who in (x, y)
            }
            for begin in range(len(history)):
                given_to = Counter({x: 0.0, y: 0.0})
                for before, job in history[begin:]:
                    if not {x, y} <= before:
                        break
                    given_to[job.caller.account] += job.order.weight
                    assert abs(given_to[x] - given_to[y]) <= most[x] + most[y]
        for who in "abc":
            ours = [list(bench.tasks).index(id(job)) for _, job in history if job.caller.account == who]
            assert ours == sorted(ours)

    on(work)


@given(st.lists(st.one_of(ARRIVAL, ARRIVAL, END, CANCEL), max_size=30), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_who_leaves_the_queue_was_never_there(ops: list[tuple[str, str, float]], width: int) -> None:
    """The others start in the order in which they would have without those who left."""

    async def replay(ops: list[tuple[str, str, float]], left: set[int]) -> tuple[list[int], set[int]]:
        bench, jobs, gone = Bench(width), [], set()
        for number, (op, account, weight) in enumerate(ops):
            if op == "arrive" and number not in left:
                jobs.append((number, await bench.arrive(account, weight)))
            elif op == "end" and bench.running:
                await bench.end()
            elif op == "cancel":
                waiting = [(n, job) for n, job in jobs if job not in bench.started and n not in gone]
                if waiting and not left:
                    number, job = waiting[int(weight * len(waiting))]
                    gone.add(number)
                    await bench.cancel(job)
        await bench.drain()
        assert (bench.lane.running, bench.lane.depth) == (0, 0)
        numbers = {id(job): number for number, job in jobs}
        return [numbers[id(job)] for job in bench.started], gone

    async def work() -> None:
        started, gone = await replay(ops, set())
        if gone:
            assert await replay(ops, gone) == (started, set())

    on(work)


@given(st.lists(st.one_of(ARRIVAL, ARRIVAL, END, CANCEL), max_size=30), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_place_in_the_queue_is_the_place_in_which_it_starts(ops: list[tuple[str, str, float]], width: int) -> None:
    async def work() -> None:
        bench, jobs = Bench(width), []
        for op, account, weight in ops:
            if op == "arrive":
                jobs.append(await bench.arrive(account, weight))
            elif op == "end" and bench.running:
                await bench.end()
            elif op == "cancel":
                waiting = [job for job in jobs if bench.lane.position(job)]
                if waiting:
                    await bench.cancel(waiting[int(weight * len(waiting))])
        waiting = sorted((job for job in jobs if bench.lane.position(job)), key=bench.lane.position)
        assert [bench.lane.position(job) for job in waiting] == list(range(width, width + len(waiting)))
        assert all(bench.lane.position(job) == 0 for job in bench.started)
        before = len(bench.started)
        await bench.drain()
        assert bench.started[before:] == waiting

    on(work)


def test_a_hundred_of_one_account_do_not_keep_another_waiting() -> None:
    async def work() -> None:
        bench = Bench()
        for _ in range(100):
            await bench.arrive("many")
        await bench.end()
        one = await bench.arrive("one")
        assert bench.lane.position(one) <= 2
        await bench.end()
        await bench.end()
        assert one in bench.started
        await bench.drain()

    on(work)


def test_a_heavy_job_counts_for_what_it_is() -> None:
    """Whoever asks for pictures of four times the work gets a quarter as many."""

    async def work() -> None:
        bench = Bench()
        jobs = [await bench.arrive("heavy", 4.0) for _ in range(8)]
        jobs += [await bench.arrive("light", 1.0) for _ in range(8)]
        while not all(job in bench.started for job in jobs if job.caller.account == "light"):
            await bench.end()
        assert sum(job.caller.account == "heavy" for job in bench.started) in (2, 3)
        await bench.drain()

    on(work)


def test_what_was_used_in_a_quiet_hour_is_not_held_against_anybody() -> None:
    async def work() -> None:
        bench = Bench()
        await bench.arrive("early", 1000.0)
        await bench.end()
        await bench.arrive("now")
        first, second = await bench.arrive("early"), await bench.arrive("other")
        assert bench.lane.position(first) < bench.lane.position(second)
        await bench.drain()

    on(work)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_as_many_as_there_are_devices_run_at_once(width: int) -> None:
    async def work() -> None:
        bench = Bench(width)
        for number in range(8):
            await bench.arrive("abc"[number % 3])
        assert len(bench.running) == width and bench.lane.depth == 8 - width
        await bench.end()
        assert len(bench.running) == width and bench.lane.depth == 7 - width
        await bench.drain()
        assert len(bench.started) == 8

    on(work)


def test_a_turn_that_is_given_and_cancelled_in_one_moment_goes_to_the_next() -> None:
    async def work() -> None:
        bench = Bench()
        first, second, third = [await bench.arrive(account) for account in "abc"]
        bench._ends[id(first)].set()
        while second not in bench.started and bench.lane.position(second):
            await asyncio.sleep(0)
        assert second not in bench.started  # it has the turn, and does not know it yet
        bench.tasks[id(second)].cancel()
        await bench.settle()
        assert bench.started == [first, third] and bench.lane.running == 1
        assert bench.tasks[id(second)].cancelled()
        await bench.drain()
        assert bench.lane.running == 0

    on(work)


def test_a_turn_is_not_given_to_who_was_cancelled_and_has_not_left_yet() -> None:
    async def work() -> None:
        bench = Bench()
        first, second, third = [await bench.arrive("a") for _ in range(3)]
        bench.tasks[id(second)].cancel()
        bench._ends[id(first)].set()
        assert bench.lane.position(third) == 1 and bench.lane.depth == 1
        await bench.settle()
        assert bench.started == [first, third]
        await bench.drain()

    on(work)


def test_a_job_that_fails_gives_its_turn_back() -> None:
    async def work() -> None:
        lane, job = Lane("zimage"), SimpleNamespace()
        job.caller, job.order, job.watchers = SimpleNamespace(account="a"), SimpleNamespace(weight=1.0), 0
        with pytest.raises(ZeroDivisionError):
            async with lane.turn(job):  # type: ignore[arg-type]
                assert lane.running == 1
                raise ZeroDivisionError
        assert lane.running == 0
        async with lane.turn(job):  # type: ignore[arg-type]
            assert lane.running == 1

    on(work)


def test_those_who_watch_a_waiting_job_hear_when_its_place_changes() -> None:
    async def work() -> None:
        bench = Bench()
        first, second, _ = [await bench.arrive("a") for _ in range(3)]
        watched, unwatched = await bench.arrive("a", watchers=1), await bench.arrive("a")
        for change in (bench.cancel(second), bench.end(first)):
            told = watched.told
            await change
            assert watched.told > told
        assert unwatched.told == 0
        await bench.drain()

    on(work)
