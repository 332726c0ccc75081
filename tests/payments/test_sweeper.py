"""Sweeps: written down before they are sent, to the treasury only, several accounts a transaction, once."""

from __future__ import annotations

import asyncio
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction
from spl.token import instructions as spl
from spl.token import models
from spl.token.constants import TOKEN_PROGRAM_ID

from diffusionz.payments.addresses import Addresses, Seed
from diffusionz.payments.database import IntegrityError, open_database
from diffusionz.payments.deposits import SOL
from diffusionz.payments.devnet import faults
from diffusionz.payments.errors import ConfigurationError, SeedError
from tests.payments.world import NETWORK, SECRET, World, Yielding


def issue(world: World, count: int) -> list[Pubkey]:
    addresses = Addresses(world.connection, NETWORK, max_open=count, clock=world.clock)
    return [Pubkey.from_string(addresses.issue("user:a")) for _ in range(count)]


def sent(world: World) -> list[VersionedTransaction]:
    rows = world.connection.execute("SELECT raw FROM sweeps ORDER BY id").fetchall()
    return [VersionedTransaction.from_bytes(raw) for (raw,) in rows]


def parts(world: World) -> list[int]:
    """How many accounts each sweep has."""
    return [
        count for (count,) in world.connection.execute("SELECT count(*) FROM sweep_parts GROUP BY sweep ORDER BY sweep")
    ]


def rest(world: World) -> None:
    """The longest that an account rests after a sweep that did not land."""
    world.devnet.advance(3_600 * 5 // 2 + 1)


def test_six_deposits_share_a_transaction(world: World) -> None:
    world.devnet.create_token_account(world.mint, world.treasury)
    addresses = issue(world, 13)
    for n, address in enumerate(addresses):
        world.pay(address, n + 1)
    world.settle()
    before = world.devnet.balance(world.gas.pubkey())
    world.sweep()
    assert world.statuses() == ["landed"] * 3
    assert parts(world) == [6, 6, 1]
    assert max(len(bytes(transaction)) for transaction in sent(world)) <= 1232
    assert world.devnet.token_balance(world.mint, world.treasury) == sum(range(1, 14))
    # Each account's rent is worth 400 times the fee for its signature.
    assert world.devnet.balance(world.treasury) == 13 * 2_039_280
    assert before - world.devnet.balance(world.gas.pubkey()) == (13 + 3) * 5_000
    assert all(world.devnet.cluster.account(world.token_account(address)) is None for address in addresses)
    world.settle()
    world.check()


def test_the_first_sweep_makes_the_treasurys_account(world: World) -> None:
    for address in issue(world, 6):
        world.pay(address, 5)
    world.settle()
    assert world.devnet.cluster.account(world.token_account(world.treasury)) is None
    world.sweep()
    assert set(world.statuses()) == {"landed"}
    assert world.devnet.token_balance(world.mint, world.treasury) == 30
    world.settle()
    world.check()


def test_sol_is_swept_to_nothing(world: World) -> None:
    addresses = issue(world, 12)
    for address in addresses:
        world.devnet.transfer_sol(world.eve, address, 10**9)
    world.settle()
    world.sweep()
    assert parts(world) == [9, 3] and world.statuses() == ["landed", "landed"]
    assert [world.devnet.balance(address) for address in addresses] == [0] * 12
    assert world.devnet.balance(world.treasury) == 12 * 10**9
    world.settle()
    assert {(kind, mint) for kind, mint, _ in world.movements()} == {("deposit", SOL), ("sweep", SOL)}
    world.check()


def test_what_costs_more_than_it_brings_stays(world: World) -> None:
    [address] = issue(world, 1)
    world.devnet.transfer_sol(world.eve, address, 900_000)
    world.settle()
    world.sweeper = world.new_sweeper(min_lamports=1_000_000)
    world.sweep()
    assert world.statuses() == []
    world.devnet.transfer_sol(world.eve, address, 100_000)
    world.settle()
    world.sweep()
    assert (world.statuses(), world.devnet.balance(world.treasury)) == (["landed"], 1_000_000)
    world.settle()
    world.check()


def test_a_sweep_is_on_the_disk_before_it_is_sent(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    seen = []

    def look(call: faults.Call, proceed: faults.Proceed) -> Any:
        other = open_database(world.path)
        seen.append(other.execute("SELECT signature, status FROM sweeps").fetchall())
        other.close()
        return proceed()

    with world.devnet.fault(look, "sendTransaction"):
        world.run(world.sweeper.step())
    assert seen == [[(str(sent(world)[0].signatures[0]), "open")]]


def test_every_sweep_pays_the_treasury_and_nobody_else(world: World) -> None:
    for address in issue(world, 3):
        world.pay(address, 5)
        world.devnet.transfer_sol(world.eve, address, 10**9)
    world.settle()
    world.sweep()
    for transaction in sent(world):
        record = world.devnet.cluster.record(transaction.signatures[0])
        assert record is not None
        gains = {
            key
            for key, pre, post in zip(record.keys, record.pre_lamports, record.post_lamports, strict=True)
            if post > pre
        }
        assert gains <= {world.treasury, world.token_account(world.treasury)}
        before = {state.index: state.amount for state in record.pre_tokens}
        assert {
            record.keys[state.index] for state in record.post_tokens if state.amount > before.get(state.index, 0)
        } <= {world.token_account(world.treasury)}


def test_the_treasurys_key_must_not_be_here(world: World) -> None:
    world.gas = world.devnet.keypair("treasury")
    with pytest.raises(ConfigurationError, match="same wallet"):
        world.new_sweeper()


def test_without_gas_nothing_is_signed(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    world.gas = Keypair()
    world.sweeper = world.new_sweeper()
    world.sweep()
    assert (world.statuses(), world.alarms()) == ([], {"gas is low"})
    world.devnet.airdrop(world.gas.pubkey(), 10**9)
    world.devnet.finalize()
    world.sweep()
    assert (world.statuses(), world.alarms()) == (["landed"], set())


def test_nothing_is_swept_while_a_deposit_is_on_its_way(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    world.pay(address, 6)
    world.devnet.advance(1)
    world.run(world.sweeper.step())
    assert world.statuses() == []
    world.settle()
    world.sweep()
    assert (world.statuses(), world.devnet.token_balance(world.mint, world.treasury)) == (["landed"], 11)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.settle()
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.devnet.advance(1)
    world.run(world.sweeper.step())
    assert world.statuses() == ["landed"]


def test_a_sweep_is_open_until_it_is_final(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    world.run(world.sweeper.step())
    for _ in range(31):
        world.devnet.advance(1)
        world.run(world.sweeper.step())
        assert (world.statuses(), len(world.movements())) == (["open"], 1)
    world.devnet.advance(1)
    world.run(world.sweeper.step())
    assert (world.statuses(), len(world.movements())) == (["landed"], 2)


def test_a_sweep_expires_by_blocks_and_not_by_slots(world: World) -> None:
    """Slots that no leader used do not bring the end of a blockhash nearer: what was sent may still land."""
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    with world.devnet.fault(faults.timeout, "sendTransaction"):
        world.run(world.sweeper.step())
        world.devnet.skip(500)
        world.devnet.advance(40)
        world.run(world.sweeper.step())
        assert world.statuses() == ["open"]
    world.sweep()
    assert world.statuses() == ["landed"]


def test_two_sweepers_at_once_sweep_once(world: World) -> None:
    for address in issue(world, 8):
        world.pay(address, 5)
    world.settle()
    connections = [open_database(world.path) for _ in range(3)]
    chain = Yielding(world.chain)
    sweepers = [world.new_sweeper(chain, world.new_deposits(connection)) for connection in connections]

    async def race() -> None:
        await asyncio.gather(*(sweeper.step() for sweeper in sweepers))

    world.run(race())
    assert sum(parts(world)) == 8
    world.devnet.finalize()
    world.run(race())
    for connection in connections:
        connection.close()
    assert set(world.statuses()) == {"landed"}
    assert world.devnet.token_balance(world.mint, world.treasury) == 40
    world.settle()
    world.check()


def test_an_account_is_in_one_open_sweep(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    world.run(world.sweeper.step())
    account = str(world.token_account(address))
    world.connection.execute(
        "INSERT INTO sweeps (signature, raw, last_valid_height, created_at) VALUES ('x', x'', 1, 1)"
    )
    with pytest.raises(IntegrityError):
        world.connection.execute("INSERT INTO sweep_parts (sweep, account, amount) VALUES (2, ?, 5)", (account,))
    world.connection.execute("DELETE FROM sweeps WHERE signature = 'x'")
    world.devnet.finalize()
    world.run(world.sweeper.resolve())
    with pytest.raises(IntegrityError, match="resolved once"):
        world.connection.execute("UPDATE sweeps SET status = 'open', resolved_at = NULL")


def freeze(world: World, address: Pubkey, *, thaw: bool = False) -> None:
    program, account, eve = TOKEN_PROGRAM_ID, world.token_account(address), world.eve.pubkey()
    if thaw:
        instruction = spl.thaw_account(
            models.ThawAccountParams(program_id=program, account=account, mint=world.mint, authority=eve)
        )
    else:
        instruction = spl.freeze_account(
            models.FreezeAccountParams(program_id=program, account=account, mint=world.mint, authority=eve)
        )
    assert world.send([instruction]).error is None


def test_a_sweep_that_lands_and_fails_is_tried_again_one_by_one(build: Callable[..., World]) -> None:
    """One account is frozen after the look, and nobody tries the transaction out: it lands and fails."""
    world = build(freeze_authority=True)
    addresses = issue(world, 3)
    for address in addresses:
        world.pay(address, 5)
    world.settle()

    def frozen_meanwhile(call: faults.Call, proceed: faults.Proceed) -> Any:
        freeze(world, addresses[1])
        call.params[1]["skipPreflight"] = True
        return proceed()

    with world.devnet.fault(frozen_meanwhile, "sendTransaction", times=1):
        world.run(world.sweeper.step())
    world.devnet.advance(2)
    world.run(world.sweeper.resolve())
    assert world.statuses() == ["open"]  # a fork may still let it land and succeed
    world.settle()
    world.run(world.sweeper.resolve())
    assert (world.statuses(), world.alarms()) == (["failed"], {"frozen"})
    assert world.devnet.token_balance(world.mint, world.treasury) == 0
    world.run(world.sweeper.step())
    assert world.statuses() == ["failed"]  # a pause
    rest(world)
    world.sweep()
    assert world.statuses() == ["failed", "landed", "landed"] and parts(world) == [3, 1, 1]
    assert world.devnet.token_balance(world.mint, world.treasury) == 10
    freeze(world, addresses[1], thaw=True)
    world.settle()
    world.sweep()
    assert world.devnet.token_balance(world.mint, world.treasury) == 15
    world.settle()
    world.check()


def test_an_account_rests_longer_after_each_failure(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    waits = []
    with world.devnet.fault(faults.timeout, "sendTransaction"):
        for attempt in range(1, 5):
            world.run(world.sweeper.step())
            assert world.statuses() == ["expired"] * (attempt - 1) + ["open"]
            world.devnet.advance(190)
            world.run(world.sweeper.step())
            assert world.statuses() == ["expired"] * attempt
            began = world.clock()
            while "open" not in world.statuses() and world.clock() - began < 4_000:
                world.devnet.advance(25)  # 10 s
                world.run(world.sweeper.step())
            waits.append(world.clock() - began)
            world.connection.execute("DELETE FROM sweep_parts WHERE open = 1")
            world.connection.execute("DELETE FROM sweeps WHERE status = 'open'")
    assert waits == [60, 120, 240, 480]
    world.sweep()
    assert world.statuses()[-1] == "landed"
    world.settle()
    world.check()


def test_a_sweep_that_a_fork_drops_lands_again(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    world.run(world.sweeper.step())
    [sweep] = sent(world)
    world.devnet.advance(2)
    world.devnet.drop(sweep.signatures[0])
    world.run(world.sweeper.step())
    assert world.statuses() == ["open"]
    world.devnet.finalize()
    world.run(world.sweeper.step())
    if world.statuses() == ["open"]:  # its blockhash was of the abandoned block
        world.expire()
        world.run(world.sweeper.step())
        assert world.statuses() == ["expired"]
        rest(world)
        world.sweep()
    assert world.statuses()[-1] == "landed"
    assert world.devnet.token_balance(world.mint, world.treasury) == 5
    world.settle()
    world.check()


def test_a_landed_sweep_waits_until_it_can_be_read(world: World) -> None:
    """Its status is known before its balances are: then it stays open, and so do the others' turns come."""
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    world.run(world.sweeper.step())
    world.devnet.finalize()
    with world.devnet.fault(faults.null, "getTransaction"):
        world.run(world.sweeper.step())
        assert world.statuses() == ["open"]
    world.run(world.sweeper.step())
    assert world.statuses() == ["landed"]
    world.settle()
    world.check()


def test_the_watcher_may_see_a_sweep_first(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    world.run(world.sweeper.step())
    world.settle()
    assert world.movements()[-1] == ("sweep", str(world.mint), -5)
    world.run(world.sweeper.step())
    assert (world.statuses(), len(world.movements())) == (["landed"], 2)
    world.check()


def test_B15_nothing_secret_is_written_anywhere(
    world: World, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    with world.devnet.fault(faults.garbage, "sendTransaction", times=1):
        world.run(world.sweeper.step())
    world.sweep()
    wrong = bytes(range(100, 132))
    world.seeds = {1: Seed(wrong)}
    world.pay(address, 5)
    world.settle()
    errors = ""
    try:
        world.run(world.new_sweeper().step())
    except SeedError as error:
        errors = repr(error)
    assert errors
    key = Seed(SECRET).keypair(NETWORK, 0)
    gas = bytes(world.gas)[:32]
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir()) + (caplog.text + errors).encode()
    for secret in (SECRET, wrong, bytes(key)[:32], gas):
        for shown in (secret, secret.hex().encode(), str(Keypair.from_seed(secret)).encode()):
            assert shown not in written


def test_run_goes_on_after_failures_and_stops_at_a_wrong_seed(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()

    async def scenario() -> None:
        task = asyncio.create_task(world.sweeper.run())
        for fault in (faults.too_many_requests_in_body, faults.garbage, faults.html, faults.timeout):
            with world.devnet.fault(fault) as installed:
                while installed.hits < 2:
                    await asyncio.sleep(0.001)
        while world.statuses() != ["landed"]:
            world.devnet.advance(1)
            await asyncio.sleep(0.001)
        world.sweeper.seeds = {}
        world.pay(address, 5)
        world.devnet.finalize()
        await world.watcher.scan()
        with pytest.raises(SeedError):
            await task

    world.run(asyncio.wait_for(scenario(), 300))
    assert world.alarms() == {"wrong seed"}


def test_signatures_are_those_of_the_bytes(world: World) -> None:
    [address] = issue(world, 1)
    world.pay(address, 5)
    world.settle()
    world.run(world.sweeper.step())
    for signature, raw in world.connection.execute("SELECT signature, raw FROM sweeps"):
        transaction = VersionedTransaction.from_bytes(raw)
        assert Signature.from_string(signature) == transaction.signatures[0]
        assert all(transaction.verify_with_results())
