"""The evidence of deposits and its double entries: once, together or not at all, and never changed."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from diffusionz.payments.addresses import derive_pool
from diffusionz.payments.database import IntegrityError
from diffusionz.payments.deposits import SOL
from diffusionz.payments.errors import AddressError, AmountError, ConfigurationError, RateError
from tests.payments.world import NETWORK, World


def test_sol_without_a_rate_waits_and_is_credited_later(world: World) -> None:
    """At the rate of that moment; and tokens need none."""
    address = world.issue()
    world.rate = None
    world.pay(address, 10)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.settle()
    assert world.credit() == 10
    [waiting] = world.deposits.waiting("user:a")
    assert (waiting.mint, waiting.amount) == (SOL, 10**9)
    assert waiting.reason == "waits for a rate: no source answers"
    assert world.deposits.waiting("user:b") == []
    world.devnet.transfer_sol(world.eve, address, 5)
    world.settle()
    assert len(world.deposits.waiting()) == 2
    world.check()
    world.rate = 7
    world.devnet.advance(100)
    world.scan()
    assert (world.credit(), world.deposits.waiting()) == (10 + 7 * (10**9 + 5), [])
    rates = world.connection.execute("SELECT DISTINCT rate FROM credits ORDER BY rate").fetchall()
    assert rates == [("1 to 1",), (f"7 at {world.devnet.time}",)]
    world.rate = 1_000  # a later rate changes nothing
    world.settle()
    assert world.credit() == 10 + 7 * (10**9 + 5)
    world.check()


@pytest.mark.parametrize("error", [RateError("the feed is stale"), AmountError("beyond the ledger")])
def test_whatever_is_wrong_with_a_rate_the_evidence_stays(world: World, error: Exception) -> None:
    address = world.issue()
    world.devnet.transfer_sol(world.eve, address, 10**9)

    def refuse(lamports: int, now: float) -> tuple[int, str]:
        raise error

    world.deposits.sol_to_tokens = refuse
    world.settle()
    [waiting] = world.deposits.waiting()
    assert str(error) in waiting.reason
    world.check()


def test_an_absurd_rate_credits_nothing(world: World) -> None:
    address = world.issue()
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.deposits.sol_to_tokens = lambda lamports, now: (2**63, "absurd")
    world.settle()
    assert (world.credit(), world.alarms()) == (0, {"refused by the ledger"})
    assert len(world.deposits.waiting()) == 1
    world.check()


def test_evidence_and_entry_are_one_transaction(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    address = world.issue()
    world.pay(address, 10)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.devnet.finalize()
    for part in ("ledger.transfer", "on_credit"):

        def broken(*arguments: object) -> None:
            raise RuntimeError("the power goes")

        with monkeypatch.context() as patch:
            target, _, name = part.rpartition(".")
            patch.setattr(getattr(world.deposits, target) if target else world.deposits, name, broken)
            with pytest.raises(RuntimeError):
                world.scan()
        for table in ("movements", "waiting", "credits", "credited", "transfers"):
            assert world.connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table
        assert world.addresses.unused("user:a") == [str(address)]
    world.scan()
    assert world.credit() == 10 + world.rate * 10**9
    world.check()


def test_who_wants_to_know_is_told_of_each_credit_once(world: World) -> None:
    told: list[tuple[str, int]] = []
    world.deposits.on_credit = lambda user, tokens: told.append((user, tokens))
    address, other = world.issue(), world.issue("user:b")
    world.pay(address, 10)
    world.pay(other, 20)
    world.devnet.transfer_sol(world.eve, other, 10**9)
    for _ in range(3):
        world.settle()
    assert sorted(told) == [("user:a", 10), ("user:b", 20), ("user:b", world.rate * 10**9)]


def test_evidence_is_never_changed(world: World) -> None:
    address = world.issue()
    world.pay(address, 10)
    world.settle()
    for statement in (
        "UPDATE movements SET delta = 11", "DELETE FROM movements", "UPDATE credits SET rate = 'x'",
        "DELETE FROM credits", "UPDATE credited SET transfer = 'x'", "DELETE FROM credited",
        "UPDATE pins SET decimals = 9",
        "INSERT INTO movements SELECT NULL, signature, account, mint, kind, delta, slot, block_time, 1 FROM movements",
        "INSERT INTO movements SELECT NULL, 'x', account, mint, kind, 1.5, slot, block_time, 1 FROM movements",
        "INSERT INTO movements SELECT NULL, 'x', account, mint, 'sweep', 10, slot, block_time, 1 FROM movements",
        "INSERT INTO movements SELECT NULL, 'x', 'elsewhere', mint, kind, 10, slot, block_time, 1 FROM movements",
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            world.connection.execute(statement)
    world.check()


def test_the_same_evidence_has_the_same_id_anywhere(build: Callable[..., World]) -> None:
    """So that a credit from a backup and one from a new look at the chain are the same one."""
    ids = []
    for _ in range(2):
        world = build()
        address = world.issue()
        world.pay(address, 10)
        world.devnet.transfer_sol(world.eve, address, 10**9)
        world.settle()
        ids.append(world.connection.execute("SELECT id FROM transfers ORDER BY id").fetchall())
    assert ids[0] == ids[1] and len(ids[0]) == 2
    assert all(id.startswith("deposit:") and len(id) == 56 for (id,) in ids[0])


def test_B17_a_restored_backup_looks_at_the_chain_again(world: World, tmp_path: pathlib.Path) -> None:
    """What was deposited and swept after the backup is found; nothing is credited twice; no sweep looks like a loss."""
    address, later = world.issue(), world.issue()
    world.pay(address, 100)
    world.settle()
    backup = tmp_path / "backup.db"
    world.connection.execute("VACUUM INTO ?", (str(backup),))
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.pay(later, 7)
    world.settle()
    world.sweep()
    world.settle()
    world.pay(address, 42)
    world.settle()
    expected = world.credit()
    world.check()

    world.connection.close()
    world.path = backup
    world.open()
    assert world.credit() == 100
    world.run(world.watcher.reconcile())
    assert (world.credit(), world.alarms()) == (expected, set())
    world.check()
    world.sweep()
    world.settle()
    assert world.devnet.token_balance(world.mint, world.treasury) == 149
    world.check()


def test_B17_addresses_that_a_backup_forgot_are_given_to_nobody_else(world: World, tmp_path: pathlib.Path) -> None:
    backup = tmp_path / "backup.db"
    world.connection.execute("VACUUM INTO ?", (str(backup),))
    forgotten = world.issue("user:a")
    world.connection.close()
    world.path = backup
    world.open()
    assert world.addresses.retire_free() == 40
    with pytest.raises(AddressError, match="pool of deposit addresses is empty"):
        world.issue("user:b")
    world.addresses.add(derive_pool(world.seeds[1], NETWORK, 40, 5))
    assert world.issue("user:b") != forgotten
    world.pay(forgotten, 9)
    world.settle()
    assert (world.credit("user:b"), world.credit("adjustments")) == (0, 9)
    world.check()


def test_an_alarm_is_raised_once_until_it_is_cleared(world: World, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        world.deposits.alarm("kind", "subject", "first")
    assert world.deposits.alarms() == [("kind", "subject", "first")]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    world.deposits.clear_alarm("kind", "subject")
    world.deposits.clear_alarm("kind", "subject")
    assert world.deposits.alarms() == []
    world.deposits.alarm("kind", "subject", "second")
    assert world.deposits.alarms() == [("kind", "subject", "second")]
    assert world.connection.execute("SELECT count(*) FROM alarms").fetchone() == (2,)


def test_only_exactly_our_account_counts(world: World) -> None:
    """Of what a node tells, the mint, the owner and the program of the account must be ours; and it did not fail."""
    address = world.issue()
    signature = world.pay(address, 10)
    world.devnet.finalize()
    world.deposits.watch()
    told = world.run(world.chain.transaction(signature))
    [ours] = [token for token in told.post_tokens if token.account == world.token_account(address)]
    other = world.eve.pubkey()
    for wrong in ({"mint": other}, {"owner": other}, {"owner": None}, {"program": other}, {"account": other}):
        tokens = tuple(replace(token, **wrong) if token is ours else token for token in told.post_tokens)
        assert world.deposits.record(replace(told, post_tokens=tokens)) == [], wrong
    assert world.deposits.record(replace(told, error="InstructionError")) == []
    assert [movement.delta for movement in world.deposits.record(told)] == [10]
    assert world.deposits.record(told) == []
    assert world.credit() == 10
    world.check()


def test_nothing_of_others_is_recorded(world: World) -> None:
    stranger = world.devnet.keypair("stranger").pubkey()
    signature = world.pay(stranger, 10)
    world.devnet.finalize()
    world.issue()
    world.deposits.watch()
    assert world.deposits.record(world.run(world.chain.transaction(signature))) == []


def test_an_address_is_used_from_its_first_deposit_on(world: World) -> None:
    address = world.issue()
    assert world.addresses.unused("user:a") == [str(address)]
    world.pay(address, 1)
    assert world.addresses.unused("user:a") == [str(address)]
    world.settle()
    assert world.addresses.unused("user:a") == []


def test_a_database_is_for_one_token(world: World) -> None:
    with pytest.raises(ConfigurationError, match="decimals is 9, but this database was made for 6; use a new database"):
        world.new_deposits(world.connection, decimals=9)
    for name in ("mint", "token_program"):
        with pytest.raises(ConfigurationError, match=f"{name} is 'l0'; it must be 32 bytes in base58"):
            world.new_deposits(world.connection, **{name: "l0"})
