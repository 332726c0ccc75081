"""What the watcher asks of a node, and when; what it does when answers are late, incomplete or missing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from solders.pubkey import Pubkey

from diffusionz.payments.addresses import Addresses, derive_pool
from diffusionz.payments.devnet import faults
from diffusionz.payments.errors import ChainError, ConfigurationError
from tests.payments.world import NETWORK, World


@contextmanager
def counting(world: World) -> Iterator[Counter[str]]:
    """How often each method of the node is called inside the `with`."""
    counts: Counter[str] = Counter()

    def count(call: faults.Call, proceed: faults.Proceed) -> Any:
        counts[call.method] += 1
        return proceed()

    with world.devnet.fault(count):
        yield counts


def issue_many(world: World, count: int) -> list[str]:
    addresses = Addresses(world.connection, NETWORK, max_open=count, clock=world.clock)
    addresses.add(derive_pool(world.seeds[1], NETWORK, 1_000, count))
    return [addresses.issue("user:a") for _ in range(count)]


def test_a_hundred_accounts_are_one_request(world: World) -> None:
    """250 addresses are 500 accounts; once for what is final, once for what is on its way. No history is read."""
    issue_many(world, 250)
    with counting(world) as counts:
        assert world.scan().looked_at == 500
    assert counts == {"getMultipleAccounts": 10}


def test_a_history_is_read_once(world: World) -> None:
    address = world.issue()
    for n in range(5):
        world.pay(address, n + 1)
    with counting(world) as counts:
        world.settle()
    assert (counts["getSignaturesForAddress"], counts["getTransaction"]) == (2, 5)  # two: the second page is empty
    with counting(world) as counts:
        world.settle()
    assert (counts["getSignaturesForAddress"], counts["getTransaction"]) == (0, 0)
    for _ in range(3):
        world.send([world.pay_instruction(address, 0)])  # nothing comes: not even looked at
    world.devnet.advance(500)
    world.pay(address, 6)
    with counting(world) as counts:
        world.settle()
    assert counts["getTransaction"] == 1 + 3
    world.devnet.advance(500)
    world.pay(address, 7)
    with counting(world) as counts:
        world.settle()
    assert counts["getTransaction"] == 1  # what was read is known, also where nothing came
    assert world.credit() == 28
    world.check()


def test_quiet_addresses_take_turns(world: World) -> None:
    """After a week an address is looked at once a rotation, and a deposit to it still found."""
    addresses = issue_many(world, 30)
    world.scan()
    world.devnet.advance(8 * 86400 * 5 // 2)
    world.watcher = world.new_watcher(rotation_s=60.0)
    assert world.scan().looked_at == 60  # the first of a process
    looked_at = []
    for _ in range(60):
        world.devnet.advance(5)  # 2 s
        looked_at.append(world.scan().looked_at)
    assert set(looked_at) == {2}  # two of sixty accounts a scan, thirty scans a rotation
    world.pay(Pubkey.from_string(addresses[17]), 9)
    world.devnet.finalize()
    for _ in range(31):
        world.devnet.advance(5)
        world.scan()
    assert world.credit() == 9
    world.devnet.advance(5)
    assert world.scan().looked_at > 2  # it is looked at in every scan again
    world.check()


def test_a_new_address_is_watched_from_the_next_scan_on(world: World) -> None:
    world.scan()
    address = world.issue()
    world.pay(address, 3)
    world.settle()
    assert world.credit() == 3


def test_an_entry_that_is_listed_late_is_no_alarm(world: World) -> None:
    """Within the overlap: the next scans read the newest part of the history again, and then it is there."""
    address = world.issue()
    world.pay(address, 1)
    world.devnet.advance(400)
    world.scan()
    late = world.pay(address, 20)
    world.pay(address, 300)
    with world.devnet.fault(faults.missing(late), "getSignaturesForAddress"):
        assert world.settle().unexplained
        assert world.credit() == 301
    with counting(world) as counts:
        assert world.scan().unexplained == []
    assert counts["getTransaction"] == 1
    assert world.credit() == 321
    assert world.connection.execute("SELECT count(*) FROM alarms").fetchone() == (0,)
    world.check()


def test_one_address_in_trouble_does_not_stop_the_others(world: World) -> None:
    address, other = world.issue(), world.issue("user:b")
    bad = world.pay(address, 1)
    world.pay(other, 2)
    world.devnet.finalize()

    def unknown(call: faults.Call, proceed: faults.Proceed) -> Any:
        return None if call.params[0] == str(bad) else proceed()

    with world.devnet.fault(unknown, "getTransaction"):
        found = world.scan()
    assert list(found.failed) == [str(world.token_account(address))]
    assert (world.credit(), world.credit("user:b")) == (0, 2)
    world.scan()
    assert world.credit() == 1
    world.check()


def test_addresses_in_trouble_come_last(world: World) -> None:
    """Five whose transactions a node has lost, before one that is well: it waits for one scan at most."""
    lost = {str(world.pay(Pubkey.from_string(address), 1)) for address in issue_many(world, 5)}
    world.pay(world.issue("user:b"), 2)
    world.devnet.finalize()

    def unknown(call: faults.Call, proceed: faults.Proceed) -> Any:
        return None if call.params[0] in lost else proceed()

    with world.devnet.fault(unknown, "getTransaction"):
        for _ in range(3):
            with pytest.raises(ChainError):
                world.scan()
        assert world.credit("user:b") == 2
    world.scan()
    assert world.credit() == 5
    world.check()


def test_a_node_that_fails_again_and_again_is_left_alone(world: World) -> None:
    for n in range(6):
        world.pay(Pubkey.from_string(issue_many_one(world)), n + 1)
    world.devnet.finalize()
    with counting(world) as counts, world.devnet.fault(faults.too_many_requests, "getSignaturesForAddress"):
        with pytest.raises(ChainError):
            world.scan()
        assert counts["getSignaturesForAddress"] == 0 or counts["getSignaturesForAddress"] == 3
    world.scan()
    assert world.credit() == 21


def issue_many_one(world: World) -> str:
    return Addresses(world.connection, NETWORK, max_open=100, clock=world.clock).issue("user:a")


def test_start_refuses_what_is_not_the_token(world: World, build: Callable[..., World]) -> None:
    world.run(world.watcher.start())
    for changes, message in (
        ({"mint": str(world.eve.pubkey())}, "is not a token's mint"),
        ({"mint": str(Pubkey.default())}, "is not a token's mint"),
        ({"decimals": 9}, "decimals: .* has 6, expected 9"),
    ):
        world.connection.execute("DELETE FROM pins")
        deposits = world.new_deposits(world.connection, **changes)
        with pytest.raises(ConfigurationError, match=message):
            world.run(world.new_watcher(deposits=deposits).start())


def test_run_credits_within_a_scan_of_finality_and_stops_when_told(world: World) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(world.watcher.run())
        for n in range(5):
            before = world.credit()
            world.pay(address, n + 1)
            world.devnet.finalize()
            for _ in range(2_000):
                if world.credit() != before:
                    break
                await asyncio.sleep(0.001)
            assert world.credit() == before + n + 1
        assert world.watcher.last_success == world.clock() and world.watcher.failures == 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    address = world.issue()
    world.run(scenario())
    world.check()


def test_a_history_whose_middle_is_forgotten_is_read_from_the_top(world: World) -> None:
    """A long one is read over several scans, and in between another node takes over that lacks the last entry read."""
    address = world.issue()
    world.pay(address, 1)
    for _ in range(30):
        world.send([world.pay_instruction(address, 0)])
    world.watcher = world.new_watcher(budget=10)
    world.settle()

    def without_cursor(call: faults.Call, proceed: faults.Proceed) -> Any:
        if "before" in call.params[1]:
            raise faults.RpcError(-32602, "unknown signature")
        return proceed()

    with world.devnet.fault(without_cursor, "getSignaturesForAddress"):
        for _ in range(10):
            world.scan()
    assert world.credit() == 0
    for _ in range(4):
        world.scan()
    assert world.credit() == 1
    world.check()


def test_an_empty_database_is_scanned(world: World) -> None:
    found = world.scan()
    assert (found.looked_at, found.recorded, found.failed) == (0, 0, {})
    assert world.run(world.watcher.reconcile()).looked_at == 0


def test_a_repeated_page_does_not_go_on_for_ever(world: World) -> None:
    address = world.issue()
    world.pay(address, 1)
    world.devnet.finalize()
    pages = 0

    def same_page(call: faults.Call, proceed: faults.Proceed) -> Any:
        nonlocal pages
        pages += 1
        call.params[1].pop("before", None)
        return proceed()

    with world.devnet.fault(same_page, "getSignaturesForAddress"):
        [message] = world.scan().failed.values()
    assert pages == 2 and "again after" in message
    world.pay(address, 2)
    world.settle()  # ends the reading that had stopped
    world.scan()
    assert world.credit() == 3
