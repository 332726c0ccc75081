"""The keeper: deposits are credited and swept while it runs, whatever fails begins again, and it stops when told."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from solders.pubkey import Pubkey

from diffusionz.payments import shop
from diffusionz.payments.background import Background
from diffusionz.payments.chain import TIMEOUT_S
from diffusionz.payments.database import immediate, open_database
from diffusionz.payments.devnet import Devnet
from diffusionz.payments.errors import ConfigurationError, SeedError
from diffusionz.payments.keeper import Keeper, Status
from diffusionz.payments.notices import Notices
from diffusionz.payments.settings import Settings, load
from diffusionz.payments.watcher import Watcher
from tests.payments.world import port_of_ones_own

NOWHERE = "http://127.0.0.1:9"  # the port that discards
PATIENCE_S = 120.0  # for what is done in a second where nobody else is busy


class LiveChain:
    """A devnet that ticks in a thread of its own; deposits are final after a tenth of a second."""

    def __init__(self) -> None:
        self.devnet: Devnet
        self.url = ""
        self.background = Background("test-devnet", self._serve)
        self.background.start()
        until(lambda: self.url)

    async def _serve(self) -> None:
        self.devnet = Devnet(seed=7, slot_seconds=0.02, finalized_lag=5, genesis_time=int(time.time()))
        async with self.devnet.serving(ticking=True) as url:
            self.url = url
            await asyncio.Event().wait()

    def pay(self, settings: Settings, address: str, tokens: int) -> None:
        async def mint() -> None:
            self.devnet.mint_to(Pubkey.from_string(str(settings.mint)), Pubkey.from_string(address), tokens)

        self.background.call(mint()).result(PATIENCE_S)

    @contextlib.contextmanager
    def serving_at(self, port: int) -> Iterator[None]:
        """The same chain at another port, for a while."""
        ended: asyncio.Event

        async def serve() -> None:
            nonlocal ended
            ended = asyncio.Event()
            async with self.devnet.serving(port=port):
                await ended.wait()

        async def end() -> None:
            ended.set()

        served = self.background.call(serve())
        try:
            yield
        finally:
            self.background.call(end()).result(PATIENCE_S)
            served.result(PATIENCE_S)


def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def chain() -> Iterator[LiveChain]:
    chain = LiveChain()
    yield chain
    assert chain.background.stop(PATIENCE_S)


@pytest.fixture
def settings(chain: LiveChain, tmp_path: pathlib.Path) -> Settings:
    """Of a new shop on the chain, with a user:a."""
    asyncio.run(shop.create(tmp_path / "shop", rpc_url=chain.url, addresses=5))
    made = load(tmp_path / "shop" / shop.CONFIG, environ={})
    with shop.opened(made) as parts:
        parts.ledger.open_account("user:a", "user")
    return made


@pytest.fixture
def port() -> Iterator[int]:
    with port_of_ones_own() as port:
        yield port


@pytest.fixture
def keep() -> Iterator[Callable[..., Keeper]]:
    """keep(settings): a Keeper in a hurry that was started, and is stopped at the end."""
    keepers: list[Keeper] = []

    def start(settings: Settings, **options: Any) -> Keeper:
        quick = {
            "scan_interval_s": 0.05,
            "sweep_interval_s": 0.1,
            "expiry_interval_s": 0.1,
            "mail_interval_s": 0.1,
            "backoff_s": 0.05,
            "backoff_max_s": 0.2,
        }
        keepers.append(Keeper(settings, **quick | options))
        began = time.monotonic()
        keepers[-1].start()
        assert time.monotonic() - began < TIMEOUT_S / 2
        return keepers[-1]

    yield start
    for keeper in keepers:
        assert keeper.stop(TIMEOUT_S * 3 / 4)
        assert not any(status.running for status in keeper.status().values())


def well(status: Status) -> bool:
    """All of one look: the keeper's thread goes on meanwhile."""
    return status.running and status.failures == 0 and time.time() - (status.last_success or 0) < 60


def credit(settings: Settings, account: str = "user:a") -> int:
    with shop.opened(settings) as parts:
        return parts.ledger.balance(account).posted


def issue(settings: Settings) -> str:
    with shop.opened(settings) as parts:
        return parts.addresses.issue("user:a")


def test_what_a_server_needs_goes_on_by_itself(
    chain: LiveChain, settings: Settings, keep: Callable[..., Keeper]
) -> None:
    settings = dataclasses.replace(
        settings, smtp_host="127.0.0.1", smtp_port=9, smtp_security="none", mail_from="shop@example.org"
    )
    with shop.opened(settings) as parts:
        address = parts.addresses.issue("user:a")
        Notices.from_settings(settings, parts.connection).subscribe("user:a", "ann@example.org", low_balance=10)
        parts.ledger.open_account("user:b", "user")
        parts.ledger.transfer("gift", "adjustments", "user:b", 100, "gift")
        soon = int(time.time()) + 2
        assert parts.ledger.hold("forgotten", "user:b", "revenue:first_party", 60, soon, "zimage").accepted
    keeper = keep(settings)
    assert set(keeper.status()) == {"holds", "rates", "watcher", "sweeper", "notices"}
    chain.pay(settings, address, 5_000_000)
    until(lambda: credit(settings) == 5_000_000)
    with shop.opened(settings) as parts:
        until(lambda: parts.ledger.balance("user:b").held == 0)
        until(lambda: keeper.status()["rates"].running)
        assert parts.rates.token_rate("market", time.time()).pico_usd == 10**10
        swept = "SELECT sum(delta) FROM movements WHERE kind = 'sweep'"
        until(lambda: parts.connection.execute(swept).fetchone()[0] == -5_000_000)
        noted = parts.connection.execute("SELECT account, kind, tokens FROM notices").fetchall()
        assert noted == [("user:a", "deposit", 5_000_000)]  # whether it waits still, or is being sent
        assert [line for line in parts.ledger.check() if not line.holds] == []
        assert parts.deposits.alarms() == []
    until(lambda: all(well(status) for status in keeper.status().values()))


def test_a_node_that_comes_later_and_goes_again(
    chain: LiveChain, settings: Settings, keep: Callable[..., Keeper], port: int
) -> None:
    address = issue(settings)
    keeper = keep(dataclasses.replace(settings, rpc_urls=(f"http://127.0.0.1:{port}/secret-key",)))
    until(lambda: keeper.status()["watcher"].failures >= 2 and keeper.status()["sweeper"].failures >= 1)
    until(lambda: keeper.status()["holds"].running and keeper.status()["rates"].running)  # which need no chain
    assert not keeper.status()["watcher"].running
    assert "secret-key" not in str(keeper.status())
    with chain.serving_at(port):
        chain.pay(settings, address, 7)
        until(lambda: credit(settings) == 7)
        until(lambda: well(keeper.status()["watcher"]))
    until(lambda: keeper.status()["watcher"].failures >= 2)
    with chain.serving_at(port):
        until(lambda: keeper.status()["watcher"].running)


def test_the_next_node_is_asked(chain: LiveChain, settings: Settings, keep: Callable[..., Keeper]) -> None:
    address = issue(settings)
    keep(dataclasses.replace(settings, rpc_urls=(NOWHERE, chain.url)))
    chain.pay(settings, address, 9)
    until(lambda: credit(settings) == 9)


class Panic(BaseException):
    """As solders raises them."""


@pytest.mark.parametrize("failure", [Panic("hunter2"), ValueError("hunter2"), asyncio.CancelledError("hunter2")])
def test_what_raises_is_begun_again_and_disturbs_nobody(
    chain: LiveChain,
    settings: Settings,
    keep: Callable[..., Keeper],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: BaseException,
) -> None:
    scan, broken = Watcher.scan, True

    async def scan_or_fail(self: Watcher) -> Any:
        if broken:
            raise failure
        return await scan(self)

    monkeypatch.setattr(Watcher, "scan", scan_or_fail)
    address = issue(settings)
    chain.pay(settings, address, 3)
    keeper = keep(settings)
    until(lambda: keeper.status()["watcher"].failures >= 3)
    until(lambda: keeper.status()["holds"].running and keeper.status()["rates"].running)
    said = keeper.status()["watcher"].last_error
    assert said is not None and said.startswith(f"{type(failure).__name__} at test_keeper.py:")
    broken = False
    until(lambda: credit(settings) == 3 and keeper.status()["watcher"].running)
    assert "watcher: 3 failures in a row" in caplog.text and "hunter2" not in caplog.text


def test_a_source_without_a_rate_is_told(settings: Settings, keep: Callable[..., Keeper]) -> None:
    settings = dataclasses.replace(
        settings, rates_token_sources=("file",), rates_token_file="nowhere.json", rates_interval_s=1
    )
    keeper = keep(settings)
    said = until(lambda: keeper.status()["rates"].last_error)
    assert keeper.asked_for_rates()  # a server with nothing to sell is no server that starts
    assert "token: rate refused" in said and "nowhere.json" in said
    assert keeper.status()["rates"].running and keeper.status()["rates"].failures >= 1


def test_a_locked_ledger_is_waited_for(settings: Settings, keep: Callable[..., Keeper]) -> None:
    other = open_database(settings.database)
    with immediate(other):
        keeper = keep(settings)
        until(lambda: keeper.status()["holds"].failures >= 1)
        assert "locked" in str(keeper.status()["holds"].last_error)
        assert not keeper.asked_for_rates()
    until(lambda: keeper.status()["watcher"].running)
    until(keeper.asked_for_rates)
    other.close()


def test_stop_does_not_wait_for_a_node_that_is_silent(settings: Settings, keep: Callable[..., Keeper]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        keeper = keep(dataclasses.replace(settings, rpc_urls=(f"http://127.0.0.1:{silent.getsockname()[1]}",)))
        until(lambda: keeper.status()["holds"].running)
        assert keeper.stop(TIMEOUT_S * 3 / 4)
    assert keeper.stop()  # again is fine
    assert Keeper(settings).stop()  # and before it was started


def test_stop_while_the_ledger_is_locked(settings: Settings, keep: Callable[..., Keeper]) -> None:
    keeper = keep(settings)
    until(lambda: keeper.status()["watcher"].running)
    other = open_database(settings.database)
    with immediate(other):
        time.sleep(0.3)
        assert keeper.stop(8)  # others wait 10 s for the lock
    other.close()


def test_without_the_seed_nothing_is_swept(settings: Settings, keep: Callable[..., Keeper]) -> None:
    keeper = keep(dataclasses.replace(settings, seed_file=None))
    assert set(keeper.status()) == {"holds", "rates", "watcher"}


def test_settings_that_cannot_work_are_refused_at_once(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="mint is not set"):
        Keeper(dataclasses.replace(settings, mint=None)).start()
    pathlib.Path(str(settings.gas_key_file)).write_text("[1, 2, 3]")
    with pytest.raises(ConfigurationError, match="is not a wallet"):
        Keeper(settings).start()
    pathlib.Path(str(settings.seed_file)).unlink()
    with pytest.raises(SeedError, match="No such file"):
        Keeper(settings).start()
