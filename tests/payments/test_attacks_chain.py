"""The attack checklist's chain side, A1 to A29, on a dev chain with the real token programs.

Most end with the invariants: what is recorded is exactly what the cluster did, balances are sums of movements, and
on the chain + swept + lost = credited + waiting.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from solders.address_lookup_table_account import AddressLookupTableAccount
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM
from solders.system_program import CreateAccountParams, TransferParams, create_account, transfer
from solders.transaction import VersionedTransaction
from spl.token import instructions as spl
from spl.token import models
from spl.token.constants import ASSOCIATED_TOKEN_PROGRAM_ID, TOKEN_2022_PROGRAM_ID, TOKEN_PROGRAM_ID
from spl.token.instructions import AuthorityType

from diffusionz.payments.addresses import DerivedAddress, Seed, derive_pool
from diffusionz.payments.chain import Chain
from diffusionz.payments.database import IntegrityError, open_database
from diffusionz.payments.deposits import SOL
from diffusionz.payments.devnet import faults, mints
from diffusionz.payments.errors import AddressError, ChainError, ConfigurationError, SeedError
from tests.payments.world import NETWORK, SECRET, Deadly, Killed, World, Yielding

MEMO = Pubkey.from_string("MemoSq4gqABAXKb96qnH8TysNcWxMyWCqXgDLGmfcHr")
LOOKUP_TABLES = Pubkey.from_string("AddressLookupTab1e1111111111111111111111111")
U64_MAX = 2**64 - 1


def key_of(world: World, address: Pubkey) -> Keypair:
    """The private key of a deposit address."""
    entry = world.addresses.derivation(str(address))
    return world.seeds[entry.version].keypair(entry.network, entry.position)


def token_account_of(world: World, owner: Pubkey, amount: int) -> Keypair:
    """A token account of `owner` beside the associated one, with eve's tokens in it."""
    account = Keypair()
    record = world.send(
        [
            create_account(CreateAccountParams(
                from_pubkey=world.eve.pubkey(), to_pubkey=account.pubkey(), lamports=2_039_280, space=165,
                owner=TOKEN_PROGRAM_ID,
            )),
            spl.initialize_account(models.InitializeAccountParams(
                program_id=TOKEN_PROGRAM_ID, account=account.pubkey(), mint=world.mint, owner=owner,
            )),
            world.devnet.transfer_instruction(world.mint, world.eve.pubkey(), account.pubkey(), amount),
        ],
        account,
    )  # fmt: skip
    assert record.error is None, record.logs
    return account


def test_A1_failed_transaction_credits_nothing(world: World) -> None:
    address = world.issue()
    world.pay(address, 7)
    failed = world.send([world.pay_instruction(address, 10**12), world.pay_instruction(address, 10**18)])
    assert failed.error is not None
    world.settle()
    listed = world.run(world.chain.signatures(world.token_account(address)))
    assert [entry.signature for entry in listed if entry.error] == [failed.signature]
    assert world.deposits.record(world.run(world.chain.transaction(failed.signature))) == []
    assert world.credit() == 7
    world.check()


def test_A2_another_mint_credits_nothing(world: World) -> None:
    """Same decimals, same owner, even in one transaction with one true base unit."""
    address = world.issue()
    fake = world.devnet.create_mint(6, name="fake")
    world.devnet.mint_to(fake, world.eve.pubkey(), 10**15)
    world.devnet.transfer(fake, world.eve, address, 10**12)
    both = world.send(
        [
            world.devnet.create_instruction(world.mint, address, world.eve.pubkey()),
            world.devnet.transfer_instruction(
                fake, world.eve.pubkey(), world.devnet.token_address(fake, address), 10**12
            ),
            world.pay_instruction(address, 1),
        ]
    )
    assert both.error is None
    world.settle()
    assert world.credit() == 1
    world.check()


def test_A3_another_token_program_credits_nothing(world: World) -> None:
    address = world.issue()
    twin = world.devnet.create_mint(6, name="twin", program=TOKEN_2022_PROGRAM_ID)
    world.devnet.mint_to(twin, world.eve.pubkey(), 10**12)
    world.devnet.transfer(twin, world.eve, address, 10**9)
    world.settle()
    world.run(world.watcher.reconcile())
    assert world.credit() == 0
    world.check()


def test_A3_the_mints_program_is_checked_at_start(build: Callable[..., World]) -> None:
    world = build(program=TOKEN_2022_PROGRAM_ID)
    world.connection.execute("DELETE FROM pins")
    wrong = world.new_deposits(world.connection, token_program=str(TOKEN_PROGRAM_ID))
    with pytest.raises(ConfigurationError, match="token_program"):
        world.run(world.new_watcher(deposits=wrong).start())


def test_A4_a_reassigned_token_account_credits_nothing(world: World) -> None:
    """setAuthority makes the address the owner of somebody's full account: there the sweeper would never look."""
    address = world.issue()
    account = token_account_of(world, world.eve.pubkey(), 5_000_000)
    handed_over = world.send(
        [
            spl.set_authority(models.SetAuthorityParams(
                program_id=TOKEN_PROGRAM_ID, account=account.pubkey(), authority=AuthorityType.ACCOUNT_OWNER,
                current_authority=world.eve.pubkey(), signers=[], new_authority=address,
            ))
        ]
    )  # fmt: skip
    assert handed_over.error is None, handed_over.logs
    world.settle()
    assert world.run(world.chain.token_accounts(address, world.mint))[account.pubkey()].amount == 5_000_000
    assert world.credit() == 0
    world.run(world.watcher.reconcile())
    assert (world.credit(), world.alarms()) == (0, {"stray tokens"})
    world.check()


def test_A5_a_second_token_account_is_reported_and_not_credited(world: World) -> None:
    address = world.issue()
    account = token_account_of(world, address, 3_000)
    world.pay(address, 5)
    world.settle()
    world.run(world.watcher.reconcile())
    assert world.credit() == 5
    [(kind, subject, detail)] = world.deposits.alarms()
    assert (kind, subject) == ("stray tokens", str(account.pubkey()))
    assert "3000 base units" in detail and str(address) in detail
    rows = world.connection.execute("SELECT account, address, amount FROM strays").fetchall()
    assert rows == [(str(account.pubkey()), str(address), "3000")]
    world.check()


def test_A6_several_transfers_in_a_transaction_are_one_deposit(world: World) -> None:
    address, other = world.issue(), world.issue("user:b")
    for receiver in (address, other):
        world.devnet.create_token_account(world.mint, receiver)
    sent = world.send([world.pay_instruction(address, 100 + n) for n in range(3)] + [world.pay_instruction(other, 9)])
    assert sent.error is None
    world.settle()
    assert (world.credit(), world.credit("user:b")) == (303, 9)
    assert sorted(world.movements()) == [("deposit", str(world.mint), 9), ("deposit", str(world.mint), 303)]
    world.check()


def test_A7_an_inner_transfer_is_credited(world: World) -> None:
    """No instruction of the transaction pays: the associated token program calls the token program to do it."""
    address, other_mint = world.issue(), world.devnet.create_mint(6, name="other")
    world.devnet.create_token_account(world.mint, address)
    outer = world.devnet.token_address(other_mint, address)
    world.devnet.create_token_account(other_mint, address)
    nested = world.token_account(outer)
    world.pay(outer, 4321)  # to the token account of a token account
    recover = Instruction(
        ASSOCIATED_TOKEN_PROGRAM_ID,
        b"\x02",  # RecoverNested
        [
            AccountMeta(nested, False, True),
            AccountMeta(world.mint, False, False),
            AccountMeta(world.token_account(address), False, True),
            AccountMeta(outer, False, False),
            AccountMeta(other_mint, False, False),
            AccountMeta(address, True, True),
            AccountMeta(TOKEN_PROGRAM_ID, False, False),
        ],
    )
    record = world.send([recover], key_of(world, address))
    assert record.error is None, record.logs
    assert any(record.inner)
    world.settle()
    assert world.credit() == 4321 + world.rate * 2_039_280  # and the nested account's rent, which is SOL of the address
    world.check()


def test_A8_an_account_from_a_lookup_table_is_credited(world: World) -> None:
    """In a version 0 transaction the token account may be named in a table alone."""
    address = world.issue()
    world.devnet.create_token_account(world.mint, address)
    slot = world.devnet.slot - 1
    eve = world.eve.pubkey()
    table, bump = Pubkey.find_program_address([bytes(eve), slot.to_bytes(8, "little")], LOOKUP_TABLES)
    metas = [AccountMeta(table, False, True), AccountMeta(eve, True, False), AccountMeta(eve, True, True),
             AccountMeta(SYSTEM, False, False)]  # fmt: skip
    create = Instruction(LOOKUP_TABLES, bytes(4) + slot.to_bytes(8, "little") + bytes([bump]), metas)
    keys = [world.token_account(address), address]
    extend = Instruction(
        LOOKUP_TABLES, b"\2\0\0\0" + len(keys).to_bytes(8, "little") + b"".join(map(bytes, keys)), metas
    )
    made = world.send([create, extend])
    assert made.error is None, made.logs
    world.devnet.advance(2)
    pays = [world.pay_instruction(address, 77),
            transfer(TransferParams(from_pubkey=eve, to_pubkey=address, lamports=10**9))]  # fmt: skip
    message = MessageV0.try_compile(
        eve, pays, [AddressLookupTableAccount(table, keys)], world.devnet.cluster.blockhash(world.devnet.slot)
    )
    assert not {world.token_account(address), address} & set(message.account_keys)
    paid = world.devnet.land(VersionedTransaction(message, [world.eve]))
    assert paid.error is None, paid.logs
    world.settle()
    assert world.credit() == 77 + world.rate * 10**9
    world.check()


def test_A9_a_transfer_fee_is_not_credited(build: Callable[..., World]) -> None:
    """The instruction says 1,000,000, the account got 950,000; the fee held back in it does not stop the sweep."""
    world = build(program=TOKEN_2022_PROGRAM_ID, extensions=[mints.transfer_fee(500, 10**12)])
    world.run(world.watcher.start())
    address = world.issue()
    world.pay(address, 1_000_000)
    world.settle()
    assert world.credit() == 950_000
    world.sweep()
    assert world.statuses() == ["landed"]
    assert world.devnet.token_balance(world.mint, world.treasury) == 902_500
    world.settle()
    assert (world.credit(), world.alarms()) == (950_000, set())
    world.check()


def test_A9_extensions_that_are_not_allowed_are_refused(build: Callable[..., World]) -> None:
    eve = Keypair().pubkey()
    for extension in (
        mints.transfer_fee(500, 10**12), mints.permanent_delegate(eve), mints.transfer_hook(MEMO), mints.pausable(eve),
        mints.non_transferable(), mints.close_authority(eve), mints.interest_bearing(10, eve),
    ):  # fmt: skip
        world = build(program=TOKEN_2022_PROGRAM_ID)
        world.mint = world.devnet.create_mint(6, name="extended", program=TOKEN_2022_PROGRAM_ID, extensions=[extension])
        world.devnet.finalize()
        world.connection.execute("DELETE FROM pins")
        deposits = world.new_deposits(world.connection, mint=str(world.mint))
        with pytest.raises(ConfigurationError, match=extension.name):
            world.run(world.new_watcher(deposits=deposits).start())
    pointer = build(program=TOKEN_2022_PROGRAM_ID, extensions=[mints.metadata_pointer(eve)])
    pointer.run(pointer.watcher.start())


def test_A10_a_deposit_in_the_slot_of_the_sweep_is_kept(world: World) -> None:
    address = world.issue()
    world.pay(address, 1_000)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.settle()
    world.run(world.sweeper.step())
    slot = world.devnet.slot
    world.pay(address, 234)
    world.devnet.transfer_sol(world.eve, address, 10**8)
    assert {record.slot for record in world.devnet.cluster.records_of(world.token_account(address))} >= {slot}
    world.settle()
    world.run(world.sweeper.resolve())
    assert world.statuses() == ["landed", "landed"]
    assert world.credit() == 1_234 + world.rate * (10**9 + 10**8)
    world.check()
    world.sweep()
    assert world.devnet.token_balance(world.mint, world.treasury) == 1_234
    world.settle()
    world.check()


def test_A11_a_sweep_is_neither_a_deposit_nor_a_charge(world: World) -> None:
    address = world.issue()
    world.pay(address, 500)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.settle()
    before = world.credit()
    history = world.ledger.history("user:a")
    world.sweep()
    world.settle()
    assert world.credit() == before and world.ledger.history("user:a") == history
    assert sorted(world.movements()) == sorted(
        [
            ("deposit", str(world.mint), 500),
            ("deposit", SOL, 10**9),
            ("sweep", str(world.mint), -500),
            ("sweep", SOL, -(10**9)),
        ]
    )
    assert world.devnet.token_balance(world.mint, world.treasury) == 500
    assert world.devnet.balance(world.treasury) == 10**9 + 2_039_280  # and the closed account's rent
    world.check()


def test_A11_the_treasury_cannot_be_a_deposit_address(world: World) -> None:
    world.treasury = world.issue()
    with pytest.raises(ConfigurationError, match="is a deposit address"):
        world.new_deposits(world.connection)


def test_A12_what_a_fork_drops_is_never_credited(world: World) -> None:
    address = world.issue()
    signature = world.pay(address, 10**6)
    world.scan()
    assert world.deposits.arriving("user:a") == []  # only processed: not even shown
    world.devnet.drop(signature)
    world.devnet.finalize()
    for _ in range(3):
        world.settle()
    assert (world.credit(), world.deposits.arriving("user:a")) == (0, [])
    world.check()


def test_A12_what_lands_again_after_a_fork_is_credited_once(world: World) -> None:
    address = world.issue()
    signature = world.pay(address, 10**6)
    world.devnet.advance(1)
    world.scan()
    assert world.deposits.arriving("user:a") == [(str(world.mint), 10**6)]
    for transaction in world.devnet.drop(signature):
        world.scan()
        assert world.deposits.arriving("user:a") == []
        try:
            world.devnet.land(transaction)
        except ValueError:  # its blockhash was the abandoned block's
            world.pay(address, 10**6)
    world.settle()
    assert world.credit() == 10**6
    world.check()


def test_A13_what_is_not_final_is_shown_and_cannot_be_spent(world: World) -> None:
    address = world.issue()
    world.pay(address, 50)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.devnet.advance(1)
    for _ in range(30):
        world.scan()
        assert sorted(world.deposits.arriving("user:a")) == sorted([(str(world.mint), 50), (SOL, 10**9)])
        assert world.credit() == 0
        world.devnet.advance(1)
    world.devnet.advance(1)
    world.scan()
    assert world.deposits.arriving("user:a") == []
    assert world.credit() == 50 + world.rate * 10**9
    world.check()


def test_A13_what_becomes_final_is_not_seen_twice(world: World) -> None:
    """Seen in a server's test: a balance that had the deposit in it, and the deposit on its way beside it."""
    seen = []

    class Looking(Chain):
        async def accounts(self, *args: Any, **options: Any) -> Any:
            seen.append((world.credit(), world.deposits.arriving("user:a")))
            return await super().accounts(*args, **options)

    address = world.issue()
    world.pay(address, 10**6)
    world.devnet.advance(1)
    world.scan()
    world.pay(address, 50)
    world.devnet.finalize()  # both: more is recorded than was shown
    chain = Looking(world.devnet.client())
    world.run(world.new_watcher(chain).scan())
    assert seen == [(0, [(str(world.mint), 10**6)]), (10**6 + 50, [])]  # before it is read, and before the next look
    world.run(chain.close())
    world.check()


def test_A14_a_signature_that_is_listed_twice_is_credited_once(world: World) -> None:
    address = world.issue()
    world.pay(address, 11)
    with world.devnet.fault(faults.repeating, "getSignaturesForAddress") as fault:
        world.settle()
    assert fault.hits
    for _ in range(3):
        world.connection.close()
        world.open()
        world.connection.execute("UPDATE chain_accounts SET listed_to = 0")
        world.run(world.watcher.reconcile())
        world.scan()
    assert world.credit() == 11
    world.check()


def test_A14_two_watchers_at_once_credit_once(world: World) -> None:
    addresses = [world.issue(), world.issue("user:b")]
    for n in range(12):
        world.pay(addresses[n % 2], 100 + n)
    world.devnet.finalize()
    connections = [open_database(world.path) for _ in range(3)]
    chain = Yielding(world.chain)
    watchers = [world.new_watcher(chain, world.new_deposits(connection)) for connection in connections]

    async def race() -> None:
        await asyncio.gather(*(watcher.scan() for watcher in watchers), world.watcher.scan())

    world.run(race())
    for connection in connections:
        connection.close()
    assert world.credit() + world.credit("user:b") == sum(range(100, 112))
    world.check()


def test_A14_processes_that_record_the_same_transactions_credit_once(world: World) -> None:
    address = world.issue()
    signatures = [world.pay(address, 1 + n) for n in range(20)]
    world.devnet.finalize()
    world.deposits.watch()
    transactions = [world.run(world.chain.transaction(signature)) for signature in signatures]
    fork = multiprocessing.get_context("fork")

    def record() -> None:
        deposits = world.new_deposits(open_database(world.path, busy_timeout_s=120.0))
        for transaction in transactions:
            deposits.record(transaction)

    processes = [fork.Process(target=record) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert world.credit() == sum(range(1, 21))
    world.settle()
    world.check()


def test_A15_a_node_that_does_not_know_the_cursor_credits_nothing_twice(world: World) -> None:
    """It begins the history again instead of going on from the given entry."""

    def forgetful(call: faults.Call, proceed: faults.Proceed) -> Any:
        call.params[1].pop("before", None)
        call.params[1].pop("until", None)
        return proceed()

    address = world.issue()
    for n in range(5):
        world.pay(address, 10 + n)
    world.devnet.finalize()
    with world.devnet.fault(forgetful, "getSignaturesForAddress"):
        [refused] = world.scan().failed.values()
        assert "again after" in refused
        assert world.credit() == sum(range(10, 15))  # what could be read counts, and the place is kept
        assert world.connection.execute("SELECT max(listed_to) FROM chain_accounts").fetchone() == (0,)
    world.settle()
    assert world.credit() == sum(range(10, 15))
    world.check()


def test_A16_a_burst_of_entries_hides_no_deposit(world: World) -> None:
    """1,100 transfers of nothing on top of a deposit, and 40 below it: more than a page, and than a scan's budget."""
    address, other = world.issue(), world.issue("user:b")
    world.devnet.create_token_account(world.mint, address)
    for _ in range(40):
        world.send([world.pay_instruction(address, 0)])
    world.pay(address, 987)
    for n in range(1_100):
        world.send([world.pay_instruction(address, 0)])
        if n % 100 == 0:
            world.devnet.advance(1)
    world.pay(other, 5)
    world.devnet.finalize()
    world.scan()
    assert world.credit("user:b") == 5  # whose scan did not wait for the spam
    assert world.credit() == 0
    scans = 1
    while world.credit() == 0:
        world.scan()
        scans += 1
    assert (world.credit(), scans) == (987, 12)  # 1,100 entries in steps of 100, then the deposit
    while world.connection.execute(
        "SELECT listed_to FROM chain_accounts WHERE account = ?", (str(world.token_account(address)),)
    ).fetchone() == (0,):
        world.scan()
    world.devnet.rpc.installed.clear()
    with world.devnet.fault(lambda call, proceed: proceed(), "getTransaction") as counted:
        world.pay(address, 13)
        world.settle()
    assert world.credit() == 1_000
    assert counted.hits < 150  # the known part of the history is not fetched again
    world.check()


def test_A17_a_missing_entry_is_noticed_and_found(world: World) -> None:
    address = world.issue()
    world.pay(address, 5)
    world.devnet.advance(200)
    hidden = world.pay(address, 60)
    world.devnet.advance(200)
    world.pay(address, 700)
    with world.devnet.fault(faults.missing(hidden), "getSignaturesForAddress"):
        found = world.settle()
        assert found.unexplained == [str(world.token_account(address))]
        assert world.credit() == 705
        assert world.alarms() == set()  # it may be a listing that lags
        world.devnet.advance(30)
        world.scan()
        [(kind, subject, detail)] = world.deposits.alarms()
        assert (kind, subject) == ("unexplained balance", str(world.token_account(address)))
        assert "the chain has 765" in detail and "recorded are 705" in detail
        world.pay(address, 8_000)  # goes on working
        world.devnet.finalize()
        assert world.scan().unexplained
        assert world.credit() == 8_705
    world.devnet.advance(3_000)  # past the pause between readings of the whole history
    assert world.scan().unexplained == []
    assert (world.credit(), world.deposits.alarms()) == (8_765, [])
    world.check()


def test_A17_reconciling_reads_everything_at_once(world: World) -> None:
    address = world.issue()
    hidden = [world.pay(address, 60), world.pay(address, 1)]
    world.devnet.advance(200)
    world.pay(address, 700)
    with world.devnet.fault(faults.missing(*hidden), "getSignaturesForAddress"):
        world.settle()
    assert world.credit() == 700
    assert world.run(world.watcher.reconcile()).unexplained == []
    assert (world.credit(), world.deposits.alarms()) == (761, [])
    world.check()


def panic(call: faults.Call, proceed: faults.Proceed) -> Any:
    """An error body that makes solders panic, which is no Exception."""
    raise faults.RpcError(-32002, "x", {"err": [0, 1], "logs": [], "accounts": None})


FAULTS = [
    faults.too_many_requests, faults.too_many_requests_in_body, faults.unavailable, faults.unhealthy, faults.timeout,
    faults.lost_reply, faults.null, faults.garbage, faults.html, faults.cut_off, panic,
]  # fmt: skip


@pytest.mark.parametrize("method", ["getMultipleAccounts", "getSignaturesForAddress", "getTransaction"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_A18_a_failing_node_moves_nothing(world: World, fault: faults.Fault, method: str) -> None:
    address = world.issue()
    world.pay(address, 31)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.devnet.finalize()
    with world.devnet.fault(fault, method) as installed:
        if method == "getMultipleAccounts":
            with pytest.raises(ChainError):
                world.scan()
        else:
            assert len(world.scan().failed) == 2
        assert installed.hits
        assert world.movements() == []
        assert world.connection.execute("SELECT max(listed_to) FROM chain_accounts").fetchone() == (0,)
        assert world.alarms() == set()
    world.scan()
    assert world.credit() == 31 + world.rate * 10**9
    world.check()


def test_A18_the_task_survives_everything(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Under `run`: each fault in turn, then a panic and a full disk out of nowhere; then a deposit."""
    address = world.issue()
    world.pay(address, 31)
    world.devnet.finalize()

    class Panic(BaseException):
        pass

    async def scenario() -> None:
        caplog.set_level(logging.CRITICAL)
        task = asyncio.create_task(world.watcher.run())
        for fault in FAULTS:
            with world.devnet.fault(fault) as installed:
                while installed.hits < 2:
                    await asyncio.sleep(0.001)
        assert not task.done() and world.watcher.failures
        watch = world.deposits.watch
        for error in (Panic("panicked"), OSError("disk full"), MemoryError(), KeyError("x"), GeneratorExitLike()):
            raised = []

            def broken(error: BaseException = error, raised: list[int] = raised) -> int:
                raised.append(1)
                raise error

            world.deposits.watch = broken  # type: ignore[method-assign]
            while len(raised) < 2:
                await asyncio.sleep(0.001)
            world.deposits.watch = watch  # type: ignore[method-assign]
        while world.credit() == 0:
            await asyncio.sleep(0.001)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    class GeneratorExitLike(BaseException):
        pass

    world.run(asyncio.wait_for(scenario(), 300))
    assert world.credit() == 31
    world.check()


def test_A19_another_transaction_than_asked_for_credits_nothing(world: World) -> None:
    address, other = world.issue(), world.issue("user:b")
    world.pay(address, 1)
    rich = world.pay(other, 10**9)
    world.devnet.finalize()
    with world.devnet.fault(faults.swapped(rich), "getTransaction"):
        world.scan()
        assert world.credit() == 0
    world.scan()
    assert (world.credit(), world.credit("user:b")) == (1, 10**9)
    world.check()


def test_A19_a_listing_of_another_address_credits_nothing(world: World) -> None:
    address, other = world.issue(), world.issue("user:b")
    world.pay(address, 1)
    world.pay(other, 10**9)
    world.devnet.finalize()

    def of_other(call: faults.Call, proceed: faults.Proceed) -> Any:
        call.params[0] = str(world.token_account(other))
        return proceed()

    def of_another_slot(call: faults.Call, proceed: faults.Proceed) -> Any:
        return [entry | {"slot": entry["slot"] + 1} for entry in proceed()]

    for lie in (of_other, of_another_slot):
        with world.devnet.fault(lie, "getSignaturesForAddress"):
            found = world.scan()
            assert str(world.token_account(address)) in found.failed
        assert world.credit() == 0
    world.scan()
    assert (world.credit(), world.credit("user:b")) == (1, 10**9)
    world.check()


def test_A19_another_cluster_is_refused_at_start(world: World) -> None:
    with world.devnet.fault(faults.other_genesis, "getGenesisHash"):
        with pytest.raises(ConfigurationError, match="genesis_hash: the cluster's is"):
            world.run(world.watcher.start())
        with pytest.raises(ConfigurationError, match="genesis_hash: the cluster's is"):
            world.run(world.sweeper.start())
    world.run(world.watcher.start())
    world.run(world.sweeper.start())


def test_A19_a_node_that_lags_after_a_fail_over_is_refused(world: World) -> None:
    address = world.issue()
    world.pay(address, 1)
    world.settle()
    world.devnet.advance(100)
    world.pay(address, 2)
    world.settle()
    with world.devnet.fault(faults.lagging(60)):
        with pytest.raises(ChainError, match="behind"):
            world.scan()
    with world.devnet.fault(faults.lagging(60), "getSignaturesForAddress"):  # balances new, history old
        world.pay(address, 4)
        world.devnet.finalize()
        assert list(world.scan().failed) == [str(world.token_account(address))]
    assert (world.credit(), world.alarms()) == (3, set())
    world.scan()
    assert world.credit() == 7
    world.check()


@pytest.mark.parametrize("decimals", [0, 9])
def test_A20_the_smallest_amounts(build: Callable[..., World], decimals: int) -> None:
    world = build(decimals=decimals)
    world.run(world.watcher.start())
    address = world.issue()
    world.pay(address, 0)
    world.pay(address, 1)
    world.settle()
    assert world.credit() == 1
    world.devnet.transfer_sol(world.eve, address, 890_880)
    world.devnet.transfer_sol(world.eve, address, 1)
    world.settle()
    assert world.credit() == 1 + 890_881 * world.rate
    world.sweep()
    world.settle()
    assert world.devnet.token_balance(world.mint, world.treasury) == 1
    world.check()


def test_A20_dust_of_sol_adds_up(world: World) -> None:
    """Worth less than a base unit each: kept, and credited together as soon as they are worth one."""
    address = world.issue()
    world.devnet.transfer_sol(world.eve, address, 900_000)
    world.deposits.sol_to_tokens = lambda lamports, now: (lamports // 1_000_000, "1 for 1,000,000")
    world.settle()
    assert world.credit() == 0
    assert [row.reason for row in world.deposits.waiting()] == ["is worth less than one base unit of the token"]
    world.devnet.transfer_sol(world.eve, address, 200_000)
    world.settle()
    assert (world.credit(), world.deposits.waiting()) == (1, [])
    assert world.connection.execute("SELECT count(*), count(DISTINCT transfer) FROM credited").fetchone() == (2, 1)
    world.check()


def test_A20_the_largest_amount_is_kept_as_an_alarm(build: Callable[..., World]) -> None:
    """u64's maximum fits no ledger of i64: nothing is credited in part, and nothing else is disturbed."""
    world = build(supply=10**6)
    address, other = world.issue(), world.issue("user:b")
    world.run(world.watcher.start())
    world.devnet.mint_to(world.mint, world.eve.pubkey(), U64_MAX - 10**6)
    world.devnet.finalize()
    with pytest.raises(ConfigurationError, match=f"supply of {U64_MAX}; at most {2**63 - 1}"):
        world.run(world.watcher.start())
    world.pay(address, U64_MAX - 5)
    world.pay(other, 5)
    world.settle()
    assert (world.credit(), world.credit("user:b")) == (0, 5)
    details = {kind: detail for kind, _, detail in world.deposits.alarms()}
    assert str(U64_MAX - 5) in details["beyond the ledger's range"]
    world.run(world.sweeper.step())  # moves the other's, and leaves what is not booked
    assert world.devnet.token_balance(world.mint, address) == U64_MAX - 5


def test_A20_the_largest_amount_that_the_ledger_can_hold(build: Callable[..., World]) -> None:
    world = build(supply=2**63 - 1)
    world.run(world.watcher.start())
    address = world.issue()
    world.pay(address, 2**63 - 1)
    world.settle()
    assert world.credit() == 2**63 - 1
    world.sweep()
    world.settle()
    assert world.devnet.token_balance(world.mint, world.treasury) == 2**63 - 1
    world.check()


def test_A20_a_credit_that_the_ledger_refuses_waits(world: World) -> None:
    """The account is as full as a number can be: the deposit stays as evidence, is not swept, and is reported."""
    address = world.issue()
    world.ledger.transfer("full", "adjustments", "user:a", 2**63 - 3, "test")
    world.pay(address, 10)
    world.settle()
    [waiting] = world.deposits.waiting("user:a")
    assert waiting.amount == 10 and "refused by the ledger" in waiting.reason
    assert world.alarms() == {"refused by the ledger"}
    world.sweep()
    assert world.statuses() == []
    world.scan()
    assert len(world.deposits.waiting()) == 1
    world.check()


def test_A21_sol_is_the_change_of_the_balance(world: World) -> None:
    """An address that pays fees, and into which somebody closes a token account: what it has more is the deposit."""
    address = world.issue()
    world.devnet.transfer_sol(world.eve, address, 10**9)
    key = key_of(world, address)
    world.devnet.send(
        [transfer(TransferParams(from_pubkey=world.eve.pubkey(), to_pubkey=address, lamports=10**6))], key, world.eve
    )  # the address pays the fee of both signatures
    account = token_account_of(world, world.eve.pubkey(), 0)
    closed = world.send(
        [
            spl.close_account(models.CloseAccountParams(
                program_id=TOKEN_PROGRAM_ID, account=account.pubkey(), dest=address, owner=world.eve.pubkey(),
            ))
        ]
    )  # fmt: skip
    assert closed.error is None, closed.logs
    world.settle()
    assert sorted(delta for _, _, delta in world.movements()) == [10**6 - 10_000, 2_039_280, 10**9]
    assert world.credit() == world.rate * (10**9 + 10**6 - 10_000 + 2_039_280)
    world.check()


def test_A22_late_deposits_are_credited_to_the_same_account(world: World) -> None:
    address = world.issue()
    world.pay(address, 100)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.settle()
    world.sweep()
    assert world.devnet.cluster.account(world.token_account(address)) is None
    world.devnet.advance(40 * 86400 * 5 // 2)  # forty days
    world.watcher = world.new_watcher(rotation_s=60.0)
    world.settle()
    world.pay(address, 42)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.devnet.finalize()
    for _ in range(6):  # a rotation: the address is no longer looked at in every scan
        world.devnet.advance(25)
        world.scan()
    assert world.credit() == 142 + 2 * 10**9 * world.rate
    world.sweep()
    world.settle()
    assert world.devnet.token_balance(world.mint, world.treasury) == 142
    world.check()


def test_A22_an_account_with_an_address_is_never_deleted(world: World) -> None:
    address = world.issue()
    for statement in (
        "DELETE FROM accounts WHERE name = 'user:a'",
        "UPDATE accounts SET name = 'user:z' WHERE name = 'user:a'",
    ):
        with pytest.raises(IntegrityError):
            world.connection.execute(statement)
    world.pay(address, 3)
    world.settle()
    assert world.credit() == 3


def test_A23_a_deposit_between_the_look_and_the_sweep(world: World) -> None:
    """Closing the account would burn it: the sweep fails as a whole, and is built again when it can no longer land."""
    address = world.issue()
    world.pay(address, 100)
    world.devnet.transfer_sol(world.eve, address, 10**9)
    world.settle()
    sniped = 0

    class Sniped:
        """The chain, and somebody who pays in just after the sweeper has looked."""

        def __getattr__(self, name: str) -> Any:
            return getattr(world.chain, name)

        async def latest_blockhash(self) -> Any:
            nonlocal sniped
            sniped += 1
            world.pay(address, 11)
            world.devnet.transfer_sol(world.eve, address, 10**5)  # what is left may not be less than the rent
            return await world.chain.latest_blockhash()

    world.run(world.new_sweeper(chain=Sniped()).step())
    world.settle()
    world.run(world.sweeper.resolve())
    assert (world.statuses(), sniped) == (["open", "open"], 2)
    world.expire()
    world.run(world.sweeper.resolve())
    assert world.statuses() == ["expired", "expired"]
    world.check()
    world.devnet.advance(200)
    world.sweep()
    world.settle()
    assert world.devnet.token_balance(world.mint, world.treasury) == 100 + 11 * 2
    assert world.devnet.balance(address) == 0
    assert world.statuses() == ["expired", "expired", "landed", "landed"]
    world.check()


@pytest.mark.parametrize("fault", [faults.lost_reply, faults.timeout, faults.too_many_requests, panic, faults.garbage])
def test_A24_a_lost_reply_neither_doubles_nor_sticks(world: World, fault: faults.Fault) -> None:
    address = world.issue()
    world.pay(address, 100)
    world.settle()
    with world.devnet.fault(fault, "sendTransaction", times=1) as installed:
        world.run(world.sweeper.step())
    assert installed.hits == 1
    assert world.statuses() == ["open"]
    world.connection.close()
    world.open()  # the sweeper is restarted
    world.run(world.sweeper.step())
    world.devnet.finalize()
    world.run(world.sweeper.step())
    assert world.statuses() == ["landed"]
    landed = [r for r in world.devnet.cluster.records_of(world.treasury) if r.error is None]
    assert len(landed) == 1
    assert world.devnet.token_balance(world.mint, world.treasury) == 100
    world.settle()
    world.check()


def test_A24_no_new_sweep_before_the_old_one_cannot_land(world: World) -> None:
    address = world.issue()
    world.pay(address, 100)
    world.settle()
    with world.devnet.fault(faults.timeout, "sendTransaction"):  # nothing that is sent arrives
        world.run(world.sweeper.step())
        for _ in range(14):
            world.devnet.advance(10)
            world.run(world.sweeper.step())
            assert world.statuses() == ["open"]
        world.devnet.advance(50)
        world.run(world.sweeper.step())
        assert world.statuses() == ["expired"]  # and the account rests a while
    world.devnet.advance(200)
    world.sweep()
    assert world.statuses() == ["expired", "landed"]
    world.settle()
    world.check()


def steps_of(world: World, chain: Any) -> Callable[[], Any]:
    """Everything that the two processes do, with `chain`."""
    watcher, sweeper = world.new_watcher(chain=chain), world.new_sweeper(chain=chain)

    async def work() -> None:
        await watcher.scan()
        await sweeper.step()
        world.devnet.finalize()
        await sweeper.step()
        await watcher.scan()

    return work


@pytest.mark.parametrize("after", [False, True], ids=["before_the_request", "after_the_answer"])
def test_A25_a_crash_at_any_await_loses_and_doubles_nothing(build: Callable[..., World], after: bool) -> None:
    at, survived = 0, False
    while not survived:
        at += 1
        world = build()
        address, other = world.issue(), world.issue("user:b")
        world.pay(address, 100)
        world.devnet.transfer_sol(world.eve, address, 10**9)
        world.pay(other, 20)
        world.devnet.finalize()
        deadly = Deadly(world.chain, at, after=after)
        try:
            world.run(steps_of(world, deadly)())
        except Killed:
            pass
        survived = not deadly.killed
        world.connection.close()
        world.open()
        for _ in range(3):
            world.run(steps_of(world, world.chain)())
        assert world.credit() == 100 + world.rate * 10**9, at
        assert world.credit("user:b") == 20, at
        assert world.statuses() == ["landed", "landed"], at
        assert world.devnet.token_balance(world.mint, world.treasury) == 120, at
        assert world.alarms() == set(), at
        world.check()
    assert at > 15  # there were so many awaits


def test_A25_kill_9_at_any_await_of_the_watcher(build: Callable[..., World]) -> None:
    """As above with a true SIGKILL, of a forked process that shares the database's file."""
    at, survived = 0, False
    while not survived:
        at += 1
        world = build()
        address = world.issue()
        for n in range(3):
            world.pay(address, 100 + n)
        world.devnet.transfer_sol(world.eve, address, 10**9)
        world.devnet.finalize()
        world.connection.close()
        child = os.fork()
        if child == 0:
            try:
                world.runner = asyncio.Runner()
                world.open()
                deadly = Deadly(world.chain, at, after=at % 2 == 0, kill=lambda: os.kill(os.getpid(), signal.SIGKILL))
                world.run(world.new_watcher(chain=deadly).scan())
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        survived = status == 0
        world.open()
        world.scan()
        assert world.credit() == 303 + world.rate * 10**9, at
        world.check()
    assert at > 8


def test_A26_memos_and_references_name_nobody(world: World) -> None:
    address, other = world.issue(), world.issue("user:b")
    world.devnet.create_token_account(world.mint, address)
    memo = json.dumps({"deposit": str(other), "account": "user:b", "amount": 10**9}).encode()
    pays = world.pay_instruction(address, 8)
    referring = Instruction(pays.program_id, pays.data, [*pays.accounts, AccountMeta(other, False, False)])
    sent = world.send([Instruction(MEMO, memo, []), referring])
    assert sent.error is None, sent.logs
    to_herself = world.devnet.transfer_instruction(
        world.mint, world.eve.pubkey(), world.token_account(world.eve.pubkey()), 10**9
    )
    assert world.send([Instruction(MEMO, memo, []), to_herself]).error is None
    world.pay(other, 1)  # so that the other's history is read
    world.settle()
    world.run(world.watcher.reconcile())
    assert (world.credit(), world.credit("user:b")) == (8, 1)
    world.check()


def test_A27_addresses_of_another_network_or_seed_are_refused(world: World) -> None:
    here, there = ({a.address for a in derive_pool(Seed(SECRET), network, 0, 40)} for network in (NETWORK, "mainnet"))
    assert not here & there
    with pytest.raises(AddressError, match="is of network 'mainnet'"):
        world.addresses.add(derive_pool(Seed(SECRET), "mainnet", 0, 1))
    stranger = Pubkey.from_string(min(there))
    world.pay(stranger, 10**6)
    world.issue()
    world.settle()
    world.run(world.watcher.reconcile())
    assert world.movements() == []


def test_A27_a_rotated_seed_leaves_the_old_addresses_in_use(world: World) -> None:
    old = world.issue()
    world.seeds[2] = Seed(bytes(32), 2)
    world.addresses.add(derive_pool(world.seeds[2], NETWORK, 0, 5))
    new = world.issue()
    assert world.addresses.derivation(str(new)) == DerivedAddress(NETWORK, 2, 0, str(new))
    world.pay(old, 1)
    world.pay(new, 2)
    world.settle()
    world.sweep()
    assert (world.credit(), world.devnet.token_balance(world.mint, world.treasury)) == (3, 3)
    world.settle()
    world.check()


def test_A27_with_another_seed_nothing_is_signed(world: World) -> None:
    address = world.issue()
    world.pay(address, 1)
    world.settle()
    for seeds in ({1: Seed(bytes(32))}, {2: Seed(SECRET, 2)}):
        world.seeds = seeds
        with pytest.raises(SeedError):
            world.run(world.new_sweeper().run())
    assert (world.statuses(), world.alarms()) == ([], {"wrong seed"})
    assert world.devnet.token_balance(world.mint, address) == 1
    assert SECRET.hex() not in str(world.deposits.alarms())


def test_A28_a_token_that_can_be_frozen_or_seized_is_refused(build: Callable[..., World]) -> None:
    frozen = build(freeze_authority=True)
    with pytest.raises(ConfigurationError, match="can freeze accounts"):
        frozen.run(frozen.watcher.start())
    frozen.run(frozen.new_watcher(allow_freeze=True).start())
    seized = build(program=TOKEN_2022_PROGRAM_ID, extensions=[mints.permanent_delegate(Keypair().pubkey())])
    with pytest.raises(ConfigurationError, match="permanent_delegate"):
        seized.run(seized.new_watcher(extensions=frozenset()).start())


def test_A28_a_deposit_that_is_frozen_after_its_credit(build: Callable[..., World]) -> None:
    world = build(freeze_authority=True)
    address, other = world.issue(), world.issue("user:b")
    world.pay(address, 100)
    world.pay(other, 20)
    world.settle()
    freeze = models.FreezeAccountParams(
        program_id=TOKEN_PROGRAM_ID, account=world.token_account(address), mint=world.mint,
        authority=world.eve.pubkey(), multi_signers=[],
    )  # fmt: skip
    assert world.send([spl.freeze_account(freeze)]).error is None
    world.settle()
    assert world.alarms() == {"frozen"}
    world.sweep()
    assert world.statuses() == ["landed"]
    assert world.devnet.token_balance(world.mint, world.treasury) == 20
    world.settle()
    world.check()


def test_A28_a_deposit_that_is_seized_after_its_credit(build: Callable[..., World]) -> None:
    """The issuer takes it back with a permanent delegate: a loss in the books, an alarm, no user's account changes."""
    thief = Keypair()
    world = build(program=TOKEN_2022_PROGRAM_ID, extensions=[mints.permanent_delegate(thief.pubkey())])
    address = world.issue()
    world.pay(address, 100)
    world.settle()
    world.devnet.create_token_account(world.mint, thief.pubkey())
    seize = spl.transfer_checked(
        models.TransferCheckedParams(
            program_id=TOKEN_2022_PROGRAM_ID, source=world.token_account(address), mint=world.mint,
            dest=world.token_account(thief.pubkey()), owner=thief.pubkey(), amount=60, decimals=6, signers=[],
        )
    )  # fmt: skip
    assert world.send([seize], thief).error is None
    world.settle()
    assert world.movements() == [("deposit", str(world.mint), 100), ("loss", str(world.mint), -60)]
    assert (world.credit(), world.alarms()) == (100, {"loss"})
    assert world.ledger.balance("adjustments").posted == -60
    world.sweep()
    world.settle()
    assert world.devnet.token_balance(world.mint, world.treasury) == 40
    world.check()


def test_A28_a_theft_with_our_own_key_is_no_sweep(world: World) -> None:
    """Even if it gives a little to the treasury."""
    address = world.issue()
    world.pay(address, 100)
    world.settle()
    world.devnet.create_token_account(world.mint, world.treasury)
    key = key_of(world, address)
    stolen = [
        world.devnet.transfer_instruction(world.mint, address, world.token_account(to), amount)
        for to, amount in ((world.treasury, 1), (world.eve.pubkey(), 99))
    ]
    assert world.send(stolen, key).error is None
    world.settle()
    assert world.movements()[-1] == ("loss", str(world.mint), -100)
    assert world.alarms() == {"loss"}


def test_A29_the_mint_cannot_change_under_a_database(world: World) -> None:
    address = world.issue()
    world.pay(address, 5)
    world.settle()
    other = world.devnet.create_mint(6, name="other")
    for changes in ({"mint": str(other)}, {"decimals": 9}, {"token_program": str(TOKEN_2022_PROGRAM_ID)},
                    {"genesis_hash": "1" * 32}):  # fmt: skip
        [name] = changes
        with pytest.raises(ConfigurationError, match=rf"{name} is .* but this database was made for"):
            world.new_deposits(world.connection, **changes)
    with pytest.raises(IntegrityError, match="needs another database"):
        world.connection.execute("UPDATE pins SET mint = ?", (str(other),))
    assert world.movements() == [("deposit", str(world.mint), 5)]  # the evidence names the mint for ever
    with pytest.raises(IntegrityError, match="never changed"):
        world.connection.execute("UPDATE movements SET mint = ?", (str(other),))
    world.new_deposits(world.connection)
    world.check()
