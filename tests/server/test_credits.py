"""The ledger beside an event loop: what is asked together is one transaction, and what blocks blocks nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from diffusionz.payments import shop
from diffusionz.payments.addresses import Seed, derive_pool
from diffusionz.payments.charges import Failure
from diffusionz.payments.database import open_database
from diffusionz.payments.errors import (
    AddressError,
    BalanceError,
    ConfigurationError,
    ConflictError,
    ExpiredError,
    IdentifierError,
    IdentityError,
    NotFoundError,
    StorageError,
)
from diffusionz.payments.keys import DAY_S, Key, Keys
from diffusionz.payments.rates import PICO, RateRules
from diffusionz.payments.settings import Settings, create_secret
from diffusionz.server import credits as credits_module
from diffusionz.server.credits import Credits

from .conftest import PATIENCE_S

TOKEN = 10**6
FORECAST = 25 * TOKEN  # half a dollar at a high of two cents
IMAGE = 50 * TOKEN
CLIENT = "127.0.0.1"

Test = Callable[[Credits], Coroutine[Any, Any, None]]


def settings_in(folder: pathlib.Path) -> Settings:
    """No chain is there, and none is needed."""
    return Settings(
        database=str(folder / "payments.db"),
        network="localnet",
        genesis_hash=str(Pubkey.from_bytes(bytes([1] * 32))),
        mint=str(Pubkey.from_bytes(bytes([2] * 32))),
        treasury=str(Pubkey.from_bytes(bytes([3] * 32))),
        pepper_file=str(folder / "pepper"),
        domain="localhost",
        rates_token_sources=("fixed",),
        rates_fixed_token=PICO // 100,
        rates_first_high=PICO // 50,
        rates=RateRules(min_sources=1, market_min_samples=1),
    )


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> Settings:
    """Of a ledger whose user:a has a thousand tokens."""
    create_secret(tmp_path / "pepper")
    made = settings_in(tmp_path)
    with contextlib.closing(open_database(made.database)) as connection:
        parts = shop.assemble(made, connection)
        parts.addresses.add(derive_pool(Seed(bytes(range(32))), "localnet", 0, 2))
        for account in ("user:a", "user:b"):
            parts.ledger.open_account(account, "user")
        parts.ledger.transfer("gift", "adjustments", "user:a", 1000 * TOKEN, "gift")

        async def refresh() -> None:
            async with parts.rates_client() as rates:
                await rates.refresh()

        asyncio.run(refresh())
    return made


@pytest.fixture
def run(settings: Settings) -> Callable[..., None]:
    """run(test, **changes of settings): the test within an open Credits; the ledger is sound afterwards."""

    def within(test: Test, **changes: Any) -> None:
        async def go() -> None:
            async with Credits(dataclasses.replace(settings, **changes)) as credits:
                await test(credits)

        asyncio.run(go())
        with shop.opened(settings) as parts:
            assert [line for line in parts.ledger.check() if not line.holds] == []

    return within


@pytest.fixture
def locked(settings: Settings) -> Iterator[Callable[[float], contextlib.AbstractContextManager[None]]]:
    """with locked(seconds): another process has the ledger's lock, and gives it back after so long, or at the end."""

    @contextlib.contextmanager
    def lock(seconds: float) -> Iterator[None]:
        code = (
            "import sys, time; from diffusionz.payments.database import immediate, open_database\n"
            "with immediate(open_database(sys.argv[1])): print('locked', flush=True); time.sleep(float(sys.argv[2]))"
        )
        command = [sys.executable, "-c", code, settings.database, str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "locked\n"
            try:
                yield
            finally:
                process.kill()

    yield lock


@contextlib.asynccontextmanager
async def worst_lag() -> AsyncIterator[list[float]]:
    """A list of one: for how long the loop stood still, at worst, within the block; by the ticks of another thread,
    which stands still as well when it is the whole process that does not run."""
    worst, ticks, done = [0.0], [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.005):
            ticks[0] += 1

    async def watch() -> None:
        while True:
            before = ticks[0]
            await asyncio.sleep(0.005)
            worst[0] = max(worst[0], (ticks[0] - before) * 0.005)

    thread, task = threading.Thread(target=tick), asyncio.create_task(watch())
    thread.start()
    try:
        yield worst
    finally:
        task.cancel()
        done.set()
        thread.join()


async def key_of(credits: Credits, **options: Any) -> Key:
    made = await credits.create_key("user:a", **options)
    return await credits.authenticate(made.secret)


async def spent(credits: Credits, key: Key) -> int:
    return await credits._run(lambda: credits._keys.spent(key.id, int(time.time()) // DAY_S))


def test_a_call_is_held_and_posted(run: Callable[..., None]) -> None:
    async def test(credits: Credits) -> None:
        key = await key_of(credits, name="k", services=["zimage"], daily_limit=500 * TOKEN)
        hold = await credits.hold(key, "user:a", "zimage", 4, "call-1", "hash", 60)
        assert (hold.state, hold.tokens, hold.created) == ("held", 4 * IMAGE, True)
        balance = await credits.balance("user:a")
        assert (balance["posted"], balance["held"], balance["available"]) == (1000 * TOKEN, 4 * IMAGE, 800 * TOKEN)
        assert (balance["usd"], balance["decimals"], balance["symbol"]) == ("16.00", 6, "CUTEDSL")
        assert await spent(credits, key) == 4 * IMAGE
        posted = await credits.post("call-1", 3)
        assert (posted.state, posted.charged) == ("posted", 3 * IMAGE)
        assert await credits.post("call-1", 3) == posted  # a lost answer is asked for again
        assert await spent(credits, key) == 3 * IMAGE
        refunded = await credits.refund("call-1", Failure.result_lost)
        assert refunded.state == "refunded" and await spent(credits, key) == 0
        assert await credits.find("call-1") == refunded and await credits.find("call-2") is None
        kinds = [(line["kind"], line["posted"], line["held"]) for line in await credits.history("user:a")]
        assert kinds == [
            ("refund", 3 * IMAGE, 0),
            ("post", -3 * IMAGE, -4 * IMAGE),
            ("hold", 0, 4 * IMAGE),
            ("transfer", 1000 * TOKEN, 0),
        ]
        (last,) = await credits.history("user:a", limit=1)
        assert len(await credits.history("user:a", before=last["seq"])) == 3
        with pytest.raises(ConflictError):
            await credits.void("call-1")

    run(test)


def test_a_call_without_a_key_and_one_that_is_voided(run: Callable[..., None]) -> None:
    async def test(credits: Credits) -> None:
        await credits.hold(None, "user:a", "chronos2", 1, "one", "hash", 60)
        assert (await credits.void("one", "engine_error")).state == "voided"
        assert (await credits.void("one", "engine_error")).state == "voided"
        key = await key_of(credits, daily_limit=FORECAST)
        await credits.hold(key, "user:a", "chronos2", 1, "two", "hash", 60)
        with pytest.raises(IdentityError, match="may spend"):
            await credits.hold(key, "user:a", "chronos2", 1, "three", "hash", 60)
        await credits.void("two")
        await credits.hold(key, "user:a", "chronos2", 1, "three", "hash", 60)  # what was voided does not count
        assert (await credits.balance("user:a"))["held"] == FORECAST

    run(test)


def test_a_refused_hold_counts_nowhere(run: Callable[..., None]) -> None:
    async def test(credits: Credits) -> None:
        key = await key_of(credits, services=["zimage"], daily_limit=1_000_000 * TOKEN)
        poor = await key_of(credits, daily_limit=IMAGE - 1)
        revoked = await key_of(credits)
        await credits.revoke_key("user:a", revoked.id)
        for who, service, units, error in (
            (key, "chronos2", 1, IdentityError),
            (key, "zimage", 21, BalanceError),
            (key, "nothing", 1, IdentityError),
            (poor, "zimage", 1, IdentityError),
            (poor, "nothing", 1, NotFoundError),
            (revoked, "zimage", 1, IdentityError),
        ):
            with pytest.raises(error):
                await credits.hold(who, "user:a", service, units, "call", "hash", 60)
            assert await credits.find("call") is None
            assert await spent(credits, who) == 0
        with pytest.raises(ConflictError, match="is not user:b's"):
            await credits.hold(key, "user:b", "zimage", 1, "call", "hash", 60)
        assert (await credits.balance("user:a"))["held"] == 0
        with pytest.raises(NotFoundError):
            await credits.post("call")
        for id in ("", "x" * 49, "a/b", "../../etc", "a b", "é"):
            with pytest.raises(IdentifierError):
                await credits.hold(None, "user:a", "zimage", 1, id, "hash", 60)

    run(test)


def test_the_same_call_is_held_and_counted_once(run: Callable[..., None]) -> None:
    async def test(credits: Credits) -> None:
        key, other = await key_of(credits, daily_limit=TOKEN**2), await key_of(credits, daily_limit=TOKEN**2)
        holds = await asyncio.gather(
            *(credits.hold(who, "user:a", "zimage", 1, "call", "hash", 60) for who in (key, key, other, key))
        )
        assert [hold.created for hold in holds] == [True, False, False, False]
        assert (await spent(credits, key), await spent(credits, other)) == (IMAGE, 0)
        with pytest.raises(ConflictError):
            await credits.hold(key, "user:a", "zimage", 1, "call", "another", 60)

    run(test)


def test_of_many_at_once_so_many_are_held_as_the_balance_pays(run: Callable[..., None]) -> None:
    async def test(credits: Credits) -> None:
        key = await key_of(credits)
        answers = await asyncio.gather(
            *(credits.hold(key, "user:a", "chronos2", 1, f"call-{n}", "hash", 60) for n in range(200)),
            return_exceptions=True,
        )
        held = [n for n, answer in enumerate(answers) if not isinstance(answer, BaseException)]
        assert len(held) == 1000 * TOKEN // FORECAST
        assert all(isinstance(answer, BalanceError) for n, answer in enumerate(answers) if n not in held)
        await asyncio.gather(*(credits.post(f"call-{n}") for n in held))
        assert (await credits.balance("user:a"))["posted"] == 0

    run(test)


@contextlib.asynccontextmanager
async def line_up(credits: Credits) -> AsyncIterator[None]:
    """What is asked in the block waits in line, and so is done together."""
    gate = threading.Event()
    waiting = asyncio.create_task(credits._run(gate.wait))
    await asyncio.sleep(0)  # it is the first in line
    try:
        yield
    finally:
        gate.set()
    await waiting


def test_those_that_wait_in_line_share_a_transaction_and_not_their_fate(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []
    together = Credits._together
    monkeypatch.setattr(Credits, "_together", lambda self, works: [shared.append(len(works)), together(self, works)][1])

    async def test(credits: Credits) -> None:
        poor, key = await key_of(credits, daily_limit=IMAGE), await key_of(credits)
        async with line_up(credits):
            asked = [
                asyncio.create_task(credits.hold(who, "user:a", service, units, call, "hash", 60))
                for who, service, units, call in (
                    (poor, "zimage", 1, "one"),
                    (poor, "zimage", 1, "two"),  # beyond the key's limit
                    (key, "zimage", 21, "three"),  # beyond the balance
                    (key, "nothing", 1, "four"),
                    (key, "zimage", 19, "five"),
                    (key, "zimage", 19, "five"),  # again
                    (key, "chronos2", 1, "six"),  # beyond what is left
                )
            ]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        answers = [type(each) if isinstance(each, BaseException) else each.created for each in outcomes]
        assert answers == [True, IdentityError, BalanceError, NotFoundError, True, False, BalanceError]
        assert shared == [7]
        assert (await credits.balance("user:a"))["held"] == 20 * IMAGE and await spent(credits, poor) == IMAGE

    run(test)


@pytest.mark.parametrize("how", ["raises", "rolls back"])
def test_when_the_disk_fails_under_one_nothing_is_written_for_any(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def test(credits: Credits) -> None:
        for call in ("a", "b"):
            await credits.hold(None, "user:a", "zimage", 1, call, "hash", 60)
        hold = credits._charges.hold

        def failing(account: str, service: str, units: int, call_id: str, *rest: Any) -> Any:
            held = hold(account, service, units, call_id, *rest)
            if call_id == "two" and how == "raises":
                raise StorageError("database or disk is full")
            if call_id == "two":
                credits._connection.execute("ROLLBACK")  # as SQLite does by itself
            return held

        monkeypatch.setattr(credits._charges, "hold", failing)
        async with line_up(credits):
            holds = [
                asyncio.create_task(credits.hold(None, "user:a", "zimage", 1, call, "hash", 60))
                for call in ("one", "two", "three")
            ]
            posts = [asyncio.create_task(credits.post(call)) for call in ("a", "b")]
            await asyncio.sleep(0)
        failures = await asyncio.gather(*holds, return_exceptions=True)
        assert all(isinstance(failure, StorageError) for failure in failures), failures
        for call in ("one", "two", "three"):
            assert await credits.find(call) is None
        # What ends a call is tried again, and so is done after all.
        assert [posted.state for posted in await asyncio.gather(*posts)] == ["posted", "posted"]
        assert (await credits.balance("user:a"))["posted"] == 900 * TOKEN

    run(test)


def test_after_its_time_a_hold_is_not_posted(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credits_module, "RESOLVE_S", 120)

    async def test(credits: Credits) -> None:
        key = await key_of(credits, daily_limit=IMAGE)
        hold = await credits.hold(key, "user:a", "zimage", 1, "call", "hash", 1)
        await asyncio.sleep(hold.expires_at - time.time() + 0.01)
        began = time.monotonic()
        with pytest.raises(ExpiredError):
            await credits.post("call")
        assert time.monotonic() - began < 60  # only a ledger that cannot be written is tried again
        assert (await credits.void("call")).state == "expired" and await spent(credits, key) == 0

    run(test)


def test_a_locked_ledger_refuses_holds_in_time_and_leaves_the_loop_alone(
    run: Callable[..., None], locked: Callable[..., Any]
) -> None:
    async def test(credits: Credits) -> None:
        key = await key_of(credits)
        with locked(60):
            async with worst_lag() as lag:
                began = time.monotonic()
                answers = await asyncio.gather(
                    *(credits.hold(key, "user:a", "zimage", 1, f"call-{n}", "hash", 60) for n in range(20)),
                    return_exceptions=True,
                )
                took = time.monotonic() - began
                assert (await credits.balance("user:a"))["available"] == 1000 * TOKEN  # readers do not wait
            assert all(isinstance(answer, StorageError) and "locked" in str(answer) for answer in answers)
            # All wait from when they were asked, not one after the other, which would take twenty times as long.
            assert credits_module.BUSY_TIMEOUT_S - 0.3 < took < 10 * credits_module.BUSY_TIMEOUT_S
            assert lag[0] < 0.5
        assert (await credits.hold(key, "user:a", "zimage", 1, "call-0", "hash", 60)).created
        assert (await credits.balance("user:a"))["held"] == IMAGE

    run(test)


def test_a_lock_that_is_soon_given_back_is_waited_for(
    run: Callable[..., None], locked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credits_module, "BUSY_TIMEOUT_S", 60)  # soon, whatever the machine makes of half a second

    async def test(credits: Credits) -> None:
        with locked(0.5):
            assert (await credits.hold(None, "user:a", "zimage", 1, "call", "hash", 60)).created

    run(test)


def test_what_was_delivered_is_posted_when_the_lock_is_free_again(
    run: Callable[..., None], locked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credits_module, "BUSY_TIMEOUT_S", 0.1)

    async def test(credits: Credits) -> None:
        key = await key_of(credits)
        for call in ("one", "two", "three"):
            await credits.hold(key, "user:a", "zimage", 1, call, "hash", 60)
        monkeypatch.setattr(credits_module, "RESOLVE_S", 60)
        with locked(120):
            asked = [asyncio.ensure_future(work) for work in (credits.post("one"), credits.void("two"))]
            await asyncio.sleep(1)  # each has been tried more than once
            assert not any(work.done() for work in asked)
        assert [hold.state for hold in await asyncio.gather(*asked)] == ["posted", "voided"]
        monkeypatch.setattr(credits_module, "RESOLVE_S", 0.8)
        with locked(60):
            began = time.monotonic()
            with pytest.raises(StorageError, match="locked"):
                await credits.post("three")
            assert 0.3 < time.monotonic() - began < 30
        assert (await credits.find("three")).state == "held"  # type: ignore[union-attr]

    run(test)


def test_a_hold_that_nobody_waits_for_any_more_is_voided(
    run: Callable[..., None], locked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credits_module, "BUSY_TIMEOUT_S", 60)

    async def test(credits: Credits) -> None:
        key = await key_of(credits, daily_limit=IMAGE)
        with locked(60):
            asking = asyncio.create_task(credits.hold(key, "user:a", "zimage", 1, "call", "hash", 60))
            await asyncio.sleep(0.1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        found = await credits.find("call")  # behind the hold and its void in the queue
        assert found is not None and found.state == "voided" and await spent(credits, key) == 0
        # One that was there before is another request's.
        await credits.hold(None, "user:a", "chronos2", 1, "other", "hash", 60)
        asking = asyncio.create_task(credits.hold(None, "user:a", "chronos2", 1, "other", "hash", 60))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert (await credits.find("other")).state == "held"  # type: ignore[union-attr]

    run(test)


def test_the_loop_goes_on_beside_many_calls(run: Callable[..., None]) -> None:
    async def test(credits: Credits) -> None:
        async def call(n: int) -> None:
            await credits.hold(None, "user:a", "chronos2", 1, f"call-{n}", "hash", 60)
            await credits.void(f"call-{n}")

        async with worst_lag() as lag:
            for first in range(0, 200, 20):
                await asyncio.gather(*(call(first + n) for n in range(20)))
        assert lag[0] < 0.5

    run(test)


def test_signing_in_and_linking(run: Callable[..., None]) -> None:
    async def test(credits: Credits) -> None:
        wallet, second = Keypair(), Keypair()
        address = str(wallet.pubkey())
        challenge = await credits.challenge(address, CLIENT)
        signature = wallet.sign_message(challenge.text.encode())
        signed_in = await credits.sign_in(address, challenge.nonce, str(signature))
        assert signed_in.new and (await credits.balance(signed_in.account))["available"] == 0
        with pytest.raises(IdentityError):
            await credits.sign_in(address, challenge.nonce, bytes(signature))  # the nonce is used
        challenge = await credits.link_challenge(signed_in.account, str(second.pubkey()), CLIENT)
        signature = second.sign_message(challenge.text.encode())
        await credits.link(str(second.pubkey()), challenge.nonce, bytes(signature))
        assert set(await credits.wallets(signed_in.account)) == {address, str(second.pubkey())}

    run(test)

    async def without(credits: Credits) -> None:
        with pytest.raises(ConfigurationError, match="domain is not set"):
            await credits.challenge(str(Keypair().pubkey()), CLIENT)
        assert await credits.wallets("user:a") == []

    run(without, domain=None)


def test_keys(run: Callable[..., None]) -> None:
    async def test(credits: Credits) -> None:
        made = await credits.create_key("user:a", "mine", ["zimage"], 5)
        assert made.secret not in repr(made)
        assert (await credits.authenticate(made.secret)).id == made.key.id
        assert (await credits.set_daily_limit("user:a", made.key.id, None)).daily_limit is None
        assert [key.name for key in await credits.keys("user:a")] == ["mine"]
        with pytest.raises(NotFoundError, match="not for sale"):
            await credits.create_key("user:a", services=["zimmage"])
        with pytest.raises(NotFoundError):
            await credits.revoke_key("user:b", made.key.id)
        await credits.revoke_key("user:a", made.key.id)
        for secret in (made.secret, made.secret[:-1], "", "cutedsl_", "é"):
            with pytest.raises(IdentityError):
                await credits.authenticate(secret)

    run(test)


def hold_and_wait(folder: pathlib.Path, secret: str, ready: Any) -> None:
    """A server's process, in the middle of a call."""

    async def go() -> None:
        async with Credits(settings_in(folder)) as credits:
            key = await credits.authenticate(secret)
            await credits.hold(key, "user:a", "chronos2", 1, "cut-off", "request", 600)
            ready.set()
            await asyncio.sleep(600)

    asyncio.run(go())


def test_what_a_killed_server_held_is_given_back(
    run: Callable[..., None], settings: Settings, tmp_path: pathlib.Path
) -> None:
    """By the first that serves from the ledger again, to the key's limit too; not beside a server that lives."""
    with shop.opened(settings) as parts:
        key = Keys.from_settings(settings, parts.connection).create("user:a", daily_limit=100 * TOKEN)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    server = context.Process(target=hold_and_wait, args=(tmp_path, key.secret, ready))
    server.start()
    try:
        assert ready.wait(PATIENCE_S)

        async def beside(credits: Credits) -> None:
            assert (await credits.balance("user:a"))["held"] == FORECAST

        run(beside)
    finally:
        server.kill()
        server.join()

    async def after(credits: Credits) -> None:
        assert (await credits.balance("user:a"))["held"] == 0
        hold = await credits.find("cut-off")
        assert hold is not None and hold.state == "voided"
        with shop.opened(settings) as parts:
            assert Keys.from_settings(settings, parts.connection).spent(key.key.id, int(time.time()) // DAY_S) == 0
        (line,) = [line for line in await credits.history("user:a") if line["kind"] == "void"]
        assert line["note"] == "the server ended before it was done"

    run(after)


def test_an_address_for_deposits(run: Callable[..., None], settings: Settings) -> None:
    async def test(credits: Credits) -> None:
        same = await asyncio.gather(*(credits.deposit_address("user:a") for _ in range(5)))
        about = same[0]
        assert [other["address"] for other in same] == [about["address"]] * 5
        assert (about["mint"], about["network"], about["decimals"]) == (settings.mint, "localnet", 6)
        assert [currency["currency"] for currency in about["currencies"]] == ["CUTEDSL", "SOL"]
        assert about["deposits"] == [] and about["arriving"] == []
        with shop.opened(settings) as parts:  # as the watcher does
            parts.deposits.watch()
            parts.deposits.show_arriving([(about["address"], 5)])
        assert (await credits.balance("user:a"))["arriving"] == [{"currency": "SOL", "amount": 5, "decimals": 9}]
        assert (await credits.deposit_address("user:b"))["address"] != about["address"]
        with pytest.raises(NotFoundError):
            await credits.deposit_address("user:nobody")
        with shop.opened(settings) as parts:
            parts.ledger.open_account("user:c", "user")
        with pytest.raises(AddressError, match="pool of deposit addresses is empty"):
            await credits.deposit_address("user:c")

    run(test)


def test_prices(run: Callable[..., None], settings: Settings) -> None:
    async def test(credits: Credits) -> None:
        pricing = await credits.pricing()
        services = {service["name"]: service for service in pricing["services"]}
        assert (services["zimage"]["usd"], services["zimage"]["tokens"]) == ("1.00", IMAGE)
        assert (services["flux_image"]["usd"], services["flux_image"]["tokens"]) == ("0.04", 4 * TOKEN)  # at the market
        assert (services["tts"]["unit"], services["tts"]["per"]) == ("character", 100)
        assert pricing["rates"] == {"ath": "0.02", "market": "0.01"}
        assert pricing["token"] == {
            "symbol": "CUTEDSL", "mint": settings.mint, "decimals": 6, "network": "localnet"
        }  # fmt: skip

    run(test)

    async def stale(credits: Credits) -> None:
        services = {service["name"]: service for service in (await credits.pricing())["services"]}
        assert services["zimage"]["tokens"] == IMAGE and services["zimage"]["why"] is None
        assert services["flux_image"]["tokens"] is None and "a rate needs 9" in services["flux_image"]["why"]

    run(stale, rates=RateRules(min_sources=1, market_min_samples=9))

    async def none(credits: Credits) -> None:
        assert all(service["tokens"] is None for service in (await credits.pricing())["services"])
        assert (await credits.balance("user:a"))["usd"] is None

    time.sleep(max(0, 2.1 - time.time() % 1))  # samples have whole seconds
    run(none, rates=RateRules(min_sources=1, market_min_samples=1, high_max_age_s=1, max_age_s=1))


def test_a_low_balance_is_noted(run: Callable[..., None], settings: Settings) -> None:
    async def test(credits: Credits) -> None:
        await credits.subscribe("user:a", "ann@example.org", 980 * TOKEN)
        await credits.hold(None, "user:a", "chronos2", 1, "call", "hash", 60)
        await credits.post("call")
        with shop.opened(settings) as parts:
            notices = parts.connection.execute("SELECT account, kind, tokens FROM notices").fetchall()
            assert notices == [("user:a", "low_balance", 975 * TOKEN)]
        await credits.unsubscribe("user:a")

    run(test, smtp_host="127.0.0.1", mail_from="shop@example.org")

    async def without(credits: Credits) -> None:
        with pytest.raises(ConfigurationError, match="smtp_host is not set"):
            await credits.subscribe("user:a", "ann@example.org")

    run(without)


def test_what_was_asked_before_the_end_is_done(settings: Settings) -> None:
    async def go() -> None:
        credits = Credits(settings)
        await credits.open()
        asked = [
            asyncio.create_task(credits.hold(None, "user:a", "chronos2", 1, f"call-{n}", "hash", 60)) for n in range(5)
        ]
        await asyncio.sleep(0)
        await credits.close()
        assert all(hold.created for hold in await asyncio.gather(*asked))
        with pytest.raises(StorageError, match="closed"):
            await credits.balance("user:a")
        await credits.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"database": "nowhere.db"}, "there is no nowhere.db"),
        ({"pepper_file": None}, "pepper_file is not set"),
        ({"mint": None}, "mint is not set"),
        ({"mint": str(Pubkey.from_bytes(bytes([9] * 32)))}, "this database was made for"),
    ],
)
def test_settings_that_are_wrong_are_told_when_it_opens(
    settings: Settings, changes: dict[str, Any], message: str
) -> None:
    async def go() -> None:
        async with Credits(dataclasses.replace(settings, **changes)):
            raise AssertionError("it opened")

    with pytest.raises(ConfigurationError, match=message):
        asyncio.run(go())
