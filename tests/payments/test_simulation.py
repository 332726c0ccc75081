"""Goal: nothing that users, chains, crashes, clocks and rate feeds do together makes money appear or disappear.

Method: see simulation.py, which is also a program: it runs as many steps as one likes. A failure shows its seed, and
the command that repeats it. What longer runs found is here as small tests.
"""

from __future__ import annotations

import asyncio
import logging
import pathlib
from collections.abc import Iterator

import pytest

from tests.payments.simulation import simulate, simulate_with_processes
from tests.payments.world import World


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """A simulated day has more warnings than anybody reads."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(1, 7))
def test_A25_simulation_every_invariant_holds_after_each_of_700_steps(seed: int, tmp_path: pathlib.Path) -> None:
    world = asyncio.run(simulate(seed, 700, tmp_path, calm_every=350))
    assert world.crashes > 5 and world.machine_crashes > 0
    assert len(world.auditor.recorded) > 30 and world.auditor.seen["transfers"] > 50


def test_A25_simulation_with_processes_that_sigkill_ends_at_any_moment(tmp_path: pathlib.Path) -> None:
    world = asyncio.run(simulate_with_processes(7, 120, tmp_path, calm_every=60))
    assert world.happened["scan in a process, killed"] + world.happened["sweep in a process, killed"] > 3


def test_the_same_seed_gives_the_same_course(tmp_path: pathlib.Path) -> None:
    courses = []
    for attempt in "ab":
        (tmp_path / attempt).mkdir()
        world = asyncio.run(simulate(8, 150, tmp_path / attempt, calm_every=150))
        courses.append((world.auditor.truth, world.happened, world.chance.random()))
    assert courses[0] == courses[1]


def test_a_fault_is_found_and_its_seed_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base unit too little for each call."""
    monkeypatch.setattr("diffusionz.payments.rates.Rate.base_units", lambda rate, micro_usd: micro_usd)
    with pytest.raises(AssertionError) as caught:
        asyncio.run(simulate(9, 700, tmp_path))
    assert any("python -m tests.payments.simulation --seed 9 --steps 700" in note for note in caught.value.__notes__)


# What the simulation found -------------------------------------------------------------------------------------------


def test_a_cold_address_with_a_long_unread_history_is_read_on_in_every_scan(tmp_path: pathlib.Path) -> None:
    """With `budget` entries each time it has its turn, cheap spam would delay a deposit by days."""
    world = World(tmp_path / "ledger.db")
    address = world.issue()
    world.scan()
    world.devnet.advance(3 * 9000)  # three hours
    world.pay(address, 77)
    for _ in range(30):
        world.send([world.pay_instruction(address, 0)])
    world.devnet.finalize()
    watcher = world.new_watcher(hot_s=3600.0, rotation_s=600.0, budget=5)
    for _ in range(10):
        world.run(watcher.scan())
        world.devnet.advance(5)
    assert world.credit() == 77
    world.check()
    world.close()
