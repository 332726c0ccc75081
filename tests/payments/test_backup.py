"""Backups that are complete or not there; restored ledgers that catch up with the chain, and credit nobody twice."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from diffusionz.payments.addresses import Addresses, derive_pool
from diffusionz.payments.audit import audit
from diffusionz.payments.backup import Restored, backup, restore
from diffusionz.payments.database import Connection, immediate, open_database
from diffusionz.payments.devnet import faults
from diffusionz.payments.errors import AddressError, ChainError, ConfigurationError, IdentityError, StorageError
from diffusionz.payments.identity import Identity
from diffusionz.payments.keys import Keys
from diffusionz.payments.ledger import Ledger
from diffusionz.payments.watcher import Watcher
from tests.payments.world import NETWORK, Deadly, Killed, World


@pytest.fixture
def world(tmp_path: pathlib.Path) -> Iterator[World]:
    world = World(tmp_path / "ledger.db")
    yield world
    world.close()


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "backup.db"


def bring_back(world: World, copy: pathlib.Path, chain: Any = None, **changes: Any) -> Restored:
    """Stops everything, restores, and starts again."""

    def new_watcher(connection: Connection) -> Watcher:
        return world.new_watcher(chain, world.new_deposits(connection, **changes))

    world.connection.close()
    try:
        return world.run(restore(copy, world.path, new_watcher, network=NETWORK))
    finally:
        world.open()


def files(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_backup_is_one_complete_private_file(world: World, copy: pathlib.Path) -> None:
    world.pay(world.issue(), 7)
    world.settle()
    made = backup(world.connection, copy)
    assert (made.path, made.transfers, made.last_at) == (str(copy), 1, int(world.clock()))
    assert made.size_bytes == copy.stat().st_size > 0
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert files(copy.parent) == {"ledger.db", "ledger.db-wal", "ledger.db-shm", "backup.db"}
    moved = copy.parent / "elsewhere" / "moved.db"  # it needs no file beside it
    moved.parent.mkdir()
    shutil.move(copy, moved)
    connection = open_database(moved)
    assert (
        connection.execute("SELECT * FROM movements").fetchall()
        == world.connection.execute("SELECT * FROM movements").fetchall()
    )
    connection.close()


def test_a_backup_neither_waits_for_a_writer_nor_holds_one_up(world: World, copy: pathlib.Path) -> None:
    writer = open_database(world.path)
    with immediate(writer):
        Ledger(writer).open_account("user:late", "user")
        assert backup(world.connection, copy).transfers == 0
        Ledger(writer).transfer("t", "adjustments", "user:late", 5, "gift")
    writer.close()
    assert world.credit("user:late") == 5
    connection = open_database(copy)
    assert connection.execute("SELECT count(*) FROM accounts WHERE name = 'user:late'").fetchone() == (0,)
    connection.close()


def test_a_backup_replaces_no_file(world: World, copy: pathlib.Path) -> None:
    copy.write_text("precious")
    with pytest.raises(StorageError, match=r"backup\.db: a file of that name exists"):
        backup(world.connection, copy)
    assert copy.read_text() == "precious"


def test_B10_a_backup_that_cannot_be_written_is_an_error(world: World, tmp_path: pathlib.Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        backup(world.connection, tmp_path / "nowhere" / "backup.db")
    with pytest.raises(StorageError, match="Not a directory"):
        backup(world.connection, world.path / "backup.db")


def test_B10_a_backup_that_the_disk_has_no_room_for_leaves_nothing(world: World, copy: pathlib.Path) -> None:
    code = f"""
        import resource, signal
        from diffusionz.payments.backup import backup
        from diffusionz.payments.database import open_database
        connection = open_database({str(world.path)!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            backup(connection, {str(copy)!r})
        except Exception as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.startswith(f"StorageError {copy}: "), (done.stdout, done.stderr)
    assert not [name for name in files(copy.parent) if "backup" in name]


def test_B9_a_damaged_ledger_gives_no_backup(world: World, copy: pathlib.Path) -> None:
    world.pay(world.issue(), 7)
    world.settle()
    world.connection.execute("UPDATE accounts SET credits_posted = 8 WHERE name = 'user:a'")
    with pytest.raises(StorageError, match=r"not sound.*the journal replayed gives the balances"):
        backup(world.connection, copy)
    assert not [name for name in files(copy.parent) if "backup" in name]


def test_B17_what_came_since_is_found_and_nothing_is_credited_twice(world: World, copy: pathlib.Path) -> None:
    """Before the backup: tokens and SOL, and a sweep. After it: both again, swept again, and one that just arrived."""
    address, later = world.issue(), world.issue()
    world.pay(address, 100)
    world.devnet.transfer_sol(world.eve, address, 10**6)
    world.settle()
    world.sweep()
    world.pay(address, 11)
    world.settle()
    backup(world.connection, copy)
    world.pay(later, 20)
    world.devnet.transfer_sol(world.eve, later, 10**6)
    world.settle()
    world.sweep()
    world.settle()
    world.pay(later, 3)
    world.devnet.finalize()  # nobody has seen this one
    before = world.credit()

    restored = bring_back(world, copy)
    assert world.credit() == before + 3 == 134 + 2 * 3 * 10**6
    assert restored.found == 2 + 2 + 1 + 1  # deposits, their sweeps, 11 swept, and the 3
    assert restored.unexplained == () and world.alarms() == set()
    for _ in range(2):
        world.settle()
        world.run(world.watcher.reconcile())
    world.sweep()
    assert world.credit() == before + 3
    assert world.run(audit(world.watcher, thorough=True)).clean
    world.check()
    assert world.devnet.token_balance(world.mint, world.treasury) == 134


def test_B17_a_sweep_that_was_open_in_the_backup_is_resolved(world: World, copy: pathlib.Path) -> None:
    world.pay(world.issue(), 100)
    world.settle()
    world.run(world.sweeper.step())
    backup(world.connection, copy)
    world.devnet.finalize()
    world.run(world.sweeper.resolve())
    bring_back(world, copy)
    assert world.statuses() == ["open"]
    world.sweep()
    assert world.statuses() == ["landed"] and world.credit() == 100
    assert world.run(audit(world.watcher)).clean


def test_B17_an_address_that_was_given_out_since_goes_to_nobody_else(world: World, copy: pathlib.Path) -> None:
    backup(world.connection, copy)
    alices = world.issue("user:a")

    def refill(addresses: Addresses) -> None:
        addresses.add(derive_pool(world.seeds[1], NETWORK, 40, 5))

    world.connection.close()
    new_world = functools.partial(restore, copy, world.path, network=NETWORK, refill=refill)
    restored = world.run(new_world(lambda connection: world.new_watcher(deposits=world.new_deposits(connection))))
    world.open()
    assert restored.retired == 40
    assert alices not in {world.issue("user:b") for _ in range(3)}
    world.pay(alices, 9)
    world.settle()
    assert (world.credit("user:a"), world.credit("user:b"), world.credit("adjustments")) == (0, 0, 9)
    assert world.run(audit(world.watcher)).clean


def test_B17_without_the_signer_nobody_is_given_an_address(world: World, copy: pathlib.Path) -> None:
    backup(world.connection, copy)
    bring_back(world, copy)
    with pytest.raises(AddressError, match="the pool of deposit addresses is empty"):
        world.issue("user:b")


def spend(world: World, id: str, amount: int) -> None:
    ledger = world.ledger
    assert ledger.hold(f"{id}:hold", "user:a", "revenue:first_party", amount, int(world.clock()) + 60, "tts").accepted
    assert ledger.post(f"{id}:post", f"{id}:hold").accepted


def test_B17_spent_credit_that_is_back_is_counted(world: World, copy: pathlib.Path) -> None:
    world.pay(world.issue(), 100)
    world.settle()
    spend(world, "before", 10)
    backup(world.connection, copy)
    spend(world, "one", 30)
    spend(world, "two", 25)
    world.ledger.refund("two:refund", "two:post", 5)
    world.ledger.transfer("sorry", "adjustments", "user:b", 4, "goodwill")
    restored = bring_back(world, copy)
    assert restored.tail is not None
    assert (restored.tail.charged, restored.tail.adjustments) == (50, ("sorry",))
    assert restored.tail.transfers == 6
    assert restored.at_risk == world.credit() == 90


def test_B17_without_the_lost_database_what_may_be_spent_is_bounded(world: World, copy: pathlib.Path) -> None:
    """By what users have, deposits that were found included: they cannot have spent more than they had."""
    address = world.issue()
    world.pay(address, 100)
    world.settle()
    backup(world.connection, copy)
    world.pay(address, 50)
    world.settle()
    spend(world, "all", 150)
    world.connection.close()
    for path in world.path.parent.glob("ledger.db*"):
        path.unlink()
    restored = bring_back(world, copy)
    assert (restored.tail, restored.replaced, restored.at_risk) == (None, None, 150)


def test_B17_what_was_used_up_or_revoked_since_stays_so(world: World, copy: pathlib.Path) -> None:
    identity = Identity(world.ledger, domain="localhost", clock=world.clock)
    keys = Keys(world.connection, bytes(32))
    leaked, kept = keys.create("user:a"), keys.create("user:a")
    challenge = identity.challenge(str(world.eve.pubkey()), "127.0.0.1")
    signature = bytes(world.eve.sign_message(challenge.text.encode()))
    backup(world.connection, copy)
    identity.sign_in(challenge.address, challenge.nonce, signature)
    keys.revoke("user:a", leaked.key.id)

    restored = bring_back(world, copy)
    assert restored.tail is not None and restored.tail.revoked == (leaked.key.id,)
    keys = Keys(world.connection, bytes(32))
    assert keys.authenticate(kept.secret).id == kept.key.id
    with pytest.raises(IdentityError):
        keys.authenticate(leaked.secret)
    with pytest.raises(IdentityError, match="unknown, used or expired"):
        Identity(world.ledger, domain="localhost", clock=world.clock).sign_in(
            challenge.address, challenge.nonce, signature
        )


def test_the_replaced_database_is_kept(world: World, copy: pathlib.Path) -> None:
    backup(world.connection, copy)
    world.pay(world.issue(), 100)
    world.settle()
    restored = bring_back(world, copy)
    assert restored.replaced is not None and restored.replaced.startswith(f"{world.path}.replaced-2")
    connection = open_database(restored.replaced)
    assert Ledger(connection).balance("user:a").posted == 100
    connection.close()
    assert bring_back(world, copy).replaced not in (None, restored.replaced)  # also within the same second


def test_a_database_in_use_is_not_replaced(world: World, copy: pathlib.Path) -> None:
    backup(world.connection, copy)
    other = open_database(world.path)
    with pytest.raises(StorageError, match="is in use; stop the server"):
        bring_back(world, copy)
    other.close()
    bring_back(world, copy)


def test_a_database_in_use_by_another_process_is_not_replaced(world: World, copy: pathlib.Path) -> None:
    backup(world.connection, copy)
    code = "import sys; from diffusionz.payments.database import open_database\n"
    code += f"c = open_database({str(world.path)!r}); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with pytest.raises(StorageError, match="is in use"):
            bring_back(world, copy)
        other.kill()
    bring_back(world, copy)


def test_a_damaged_database_is_replaced_with_all_its_files(world: World, copy: pathlib.Path) -> None:
    world.pay(world.issue(), 100)
    world.settle()
    backup(world.connection, copy)
    world.connection.close()
    world.path.write_bytes(b"damaged" * 1000)
    wal = world.path.with_name("ledger.db-wal")
    wal.write_bytes(b"not a log")
    restored = bring_back(world, copy)
    assert restored.tail is None and world.credit() == 100
    assert pathlib.Path(f"{restored.replaced}-wal").read_bytes() == b"not a log"
    assert world.run(audit(world.watcher)).clean


def assert_untouched(world: World) -> None:
    assert world.credit() == 100
    assert not [name for name in files(world.path.parent) if "partial" in name or "replaced" in name]


@pytest.fixture
def paid(world: World, copy: pathlib.Path) -> World:
    """Of which there is a backup from before the first deposit."""
    backup(world.connection, copy)
    world.pay(world.issue(), 100)
    world.settle()
    return world


@pytest.mark.parametrize(
    "method", ["getGenesisHash", "getMultipleAccounts", "getSignaturesForAddress", "getTransaction"]
)
def test_a_chain_that_does_not_answer_leaves_all_as_it_was(paid: World, copy: pathlib.Path, method: str) -> None:
    with paid.devnet.fault(faults.timeout, method), pytest.raises(ChainError):
        bring_back(paid, copy)
    assert_untouched(paid)


@pytest.mark.parametrize("after", [False, True])
def test_a_restore_that_is_killed_leaves_all_as_it_was(paid: World, copy: pathlib.Path, after: bool) -> None:
    for at in (1, 2, 3, 5, 20):
        with pytest.raises(Killed):
            bring_back(paid, copy, Deadly(paid.chain, at, after=after))
        assert_untouched(paid)


def test_B17_a_restore_that_is_killed_with_signal_9_can_be_done_again(paid: World, copy: pathlib.Path) -> None:
    """In the middle of reading the chain, in a process of its own."""
    paid.connection.close()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        chain = Deadly(paid.chain, 5, after=True, kill=lambda: os.kill(os.getpid(), signal.SIGKILL))
        bring_back(paid, copy, chain)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    paid.open()
    assert paid.credit() == 100
    bring_back(paid, copy)
    # Its address was given out after the backup: somebody has to say whose it is.
    assert (paid.credit(), paid.credit("adjustments")) == (0, 100)
    assert paid.run(audit(paid.watcher)).clean


@pytest.mark.parametrize("change", [{"genesis_hash": "1" * 32}, {"decimals": 9}])
def test_a_backup_of_another_token_or_cluster_is_refused(paid: World, copy: pathlib.Path, change: Any) -> None:
    with pytest.raises(ConfigurationError, match="this database was made for"):
        bring_back(paid, copy, **change)
    assert_untouched(paid)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "is not a database of payments"),
        (b"some text, certainly longer than the sixteen bytes of the header", "file is not a database"),
    ],
)
def test_what_is_no_backup_is_refused(paid: World, copy: pathlib.Path, content: bytes | None, message: str) -> None:
    copy.unlink()
    if content is not None:
        copy.write_bytes(content)
    with pytest.raises(StorageError, match=message):
        bring_back(paid, copy)
    assert_untouched(paid)


def test_B9_a_backup_that_somebody_changed_is_refused(paid: World, copy: pathlib.Path) -> None:
    connection = open_database(copy)
    connection.execute("UPDATE accounts SET credits_posted = 10 WHERE name = 'user:a'")
    connection.close()
    with pytest.raises(StorageError, match=r"not sound.*debits equal credits"):
        bring_back(paid, copy)
    assert_untouched(paid)
