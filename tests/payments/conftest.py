"""What the tests of payments share: a clock that stands still, and a ledger in a file of its own."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from diffusionz.payments.database import Connection, open_database
from diffusionz.payments.ledger import Ledger

if TYPE_CHECKING:
    from tests.payments.world import World


class Clock:
    """Seconds since 1970 that pass when the test says so."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger_path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def connection(ledger_path: pathlib.Path) -> Iterator[Connection]:
    connection = open_database(ledger_path)
    yield connection
    connection.close()


@pytest.fixture
def ledger(connection: Connection, clock: Clock) -> Ledger:
    """With the users a and b, who have nothing yet."""
    ledger = Ledger(connection, clock)
    for name in ("user:a", "user:b"):
        ledger.open_account(name, "user")
    return ledger


@pytest.fixture
def build(tmp_path: pathlib.Path) -> Iterator[Callable[..., World]]:
    """build(**options): a new World of tests/payments/world.py, closed at the end."""
    from tests.payments.world import World

    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(tmp_path / f"{len(worlds)}.db", **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(build: Callable[..., World]) -> World:
    return build()
