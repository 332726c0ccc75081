"""The audit: clean when all is well, and every invariant fails when what it watches over is forged."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Iterator

import pytest

from diffusionz.payments import audit as audits
from diffusionz.payments.audit import Report, audit, audit_records
from diffusionz.payments.chain import Chain
from diffusionz.payments.charges import Charges, Failure
from diffusionz.payments.devnet import Devnet, faults
from diffusionz.payments.errors import ChainError
from diffusionz.payments.prices import SERVICES, PriceBook
from diffusionz.payments.rates import PICO, FixedSource, RateRules, Rates
from tests.payments.world import World

TOKENS = "mint <> 'SOL'"
THE_HOLD = "seq = (SELECT hold FROM open_holds)"

# Each breaks what the second names, with the triggers and CHECKs that would refuse it out of the way.
FORGERIES = [
    ("UPDATE accounts SET credits_posted = credits_posted + 1 WHERE name = 'user:a'", "debits equal credits"),
    (
        "UPDATE accounts SET credits_posted = credits_posted + 1 WHERE name = 'user:a'",
        "the journal replayed gives the balances",
    ),
    ("UPDATE accounts SET debits_posted = credits_posted + 1 WHERE name = 'user:a'", "no user is overdrawn"),
    ("DELETE FROM transfers WHERE seq = 2", "the journal has no gap"),
    ("DELETE FROM open_holds", "the open holds are those that nothing resolves"),
    (
        "UPDATE transfers SET amount = amount + 10000000 WHERE kind = 'refund'",
        "every refund takes back a post, within its amount",
    ),
    ("DELETE FROM transfers WHERE id = 'call:one:hold'", "every call has its hold"),
    (
        "UPDATE accounts SET credits_posted = credits_posted + 1 WHERE name = 'revenue:first_party'",
        "revenue is what was charged, less refunds and what was moved on",
    ),
    (
        f"UPDATE transfers SET expires_at = 1 WHERE {THE_HOLD}; UPDATE open_holds SET expires_at = 1",
        "no hold is open long after its time",
    ),
    (
        "UPDATE calls SET pico_usd = pico_usd * 2 WHERE call_id = 'one'",
        "every call was held at its frozen price and rate",
    ),
    ("UPDATE calls SET first_party = 0 WHERE call_id = 'one'", "every call was held at its frozen price and rate"),
    ("UPDATE calls SET units = 2 WHERE call_id = 'one'", "every call was held at its frozen price and rate"),
    ("UPDATE chain_accounts SET balance = balance + 1", "each balance is the sum of its account's movements"),
    ("DELETE FROM credited", "every deposit is credited once, or waits"),
    ("INSERT INTO waiting SELECT movement, 'again' FROM credited", "every deposit is credited once, or waits"),
    (
        "UPDATE deposit_addresses SET account = 'user:b' WHERE account = 'user:a'",
        "every credit goes to the account that its address was given to",
    ),
    (f"UPDATE movements SET delta = delta + 1 WHERE kind = 'deposit' AND {TOKENS}", "tokens are credited one to one"),
    (
        "INSERT INTO transfers SELECT NULL, 'made up', kind, debit, credit, amount, refers_to, expires_at, code, note,"
        " created_at FROM transfers WHERE code = 'deposit' LIMIT 1",
        "nothing is credited without a deposit",
    ),
    (
        "UPDATE transfers SET debit = 'revenue:proxied' WHERE code = 'deposit'",
        "no user is credited but by a deposit, a refund or an adjustment",
    ),
    (
        "UPDATE sweeps SET status = 'open', resolved_at = NULL",
        "an account is in one open sweep at most, and no sweep is open for long",
    ),
    (
        "UPDATE sweeps SET status = 'open', resolved_at = NULL, created_at = 1; UPDATE sweep_parts SET open = 1",
        "an account is in one open sweep at most, and no sweep is open for long",
    ),
    ("UPDATE transfers SET amount = amount - 1 WHERE code = 'sweep'", "every sweep and loss is in the ledger"),
    (
        f"UPDATE movements SET delta = delta - 1 WHERE kind = 'sweep' AND {TOKENS}",
        "at addresses + swept + lost = credited + waiting",
    ),
    ("INSERT INTO alarms VALUES (NULL, 'loss', 'x', 'y', 1, NULL)", "no alarm is raised"),
]  # fmt: skip


@pytest.fixture
def world(tmp_path: pathlib.Path) -> Iterator[World]:
    """With deposits, a sweep, and calls that were posted, refunded, voided and are still held."""
    world = World(tmp_path / "ledger.db")
    address = world.issue()
    world.pay(address, 900_000_000)
    world.devnet.transfer_sol(world.eve, address, 10**8)
    world.settle()
    world.sweep()
    world.pay(address, 5_000_000)
    world.settle()
    rates = Rates(
        world.connection,
        RateRules(min_sources=1, market_min_samples=1),
        decimals=6,
        token_sources=[FixedSource(PICO // 100)],
        first_high=PICO // 50,
        clock=world.clock,
    )
    asyncio.run(rates.refresh())
    charges = Charges(world.ledger, PriceBook(SERVICES, rates))
    for call_id, service in (("one", "chronos2"), ("two", "flux_image"), ("three", "tts"), ("four", "tts")):
        charges.hold("user:a", service, 1, call_id, "hash", ttl_s=60)
    charges.post("one")
    charges.post("two")
    charges.refund("two", Failure.engine_error)
    charges.void("three")
    yield world
    world.close()


def run(world: World, **options: bool) -> Report:
    return world.run(audit(world.watcher, **options))


def failed(report: Report) -> set[str]:
    return {line.name for line in report.failed}


def forge(world: World, statements: str) -> None:
    """As somebody does who has the file, and knows SQL."""
    connection = world.connection
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("PRAGMA ignore_check_constraints = ON")
    for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements.split("; "):
        assert connection.execute(statement).rowcount > 0, statement


def test_a_sound_ledger_is_clean_offline_and_online(world: World) -> None:
    offline = audit_records(world.ledger)
    assert offline.clean and failed(offline) == set() and "chain" not in offline.invariants
    online = run(world, thorough=True)
    assert online.clean and {*online.invariants} == {"ledger", "calls", "deposits", "chain"}
    assert online.figures["treasury_on_chain"] == online.figures["sweep_tokens"] == 900_000_000
    assert online.figures["owed_to_users"] + online.figures["revenue"] == 905_000_000 + 10**8 * 3
    assert online.figures["revenue"] == 25_000_000 and online.figures["held_of_users"] == 5_000_000
    assert online.figures["at_addresses_tokens"] == 5_000_000


@pytest.mark.parametrize(("statements", "name"), FORGERIES, ids=range(len(FORGERIES)))
def test_B9_a_forged_database_fails_the_audit(world: World, statements: str, name: str) -> None:
    assert audit_records(world.ledger).clean
    forge(world, statements)
    assert name in failed(audit_records(world.ledger))


def test_every_invariant_of_calls_and_deposits_is_seen_to_fail(world: World) -> None:
    report = audit_records(world.ledger)
    names = {line.name for about in ("calls", "deposits") for line in report.invariants[about]}
    assert names == {name for _, name in FORGERIES} - {line.name for line in report.invariants["ledger"]}
    assert len(names) == len(audits.CALLS) + len(audits.DEPOSITS) + 4


def test_what_the_ledger_lets_an_operator_do_is_no_deposit(world: World) -> None:
    """Credit from nothing balances, and needs no forgery; only the evidence is missing."""
    assert world.ledger.transfer("gift", "chain:token", "user:b", 5, "deposit").accepted
    assert failed(audit_records(world.ledger)) == {
        "nothing is credited without a deposit",
        "at addresses + swept + lost = credited + waiting",
    }


def test_an_adjustment_is_allowed(world: World) -> None:
    assert world.ledger.transfer("sorry", "adjustments", "user:b", 5, "goodwill").accepted
    report = audit_records(world.ledger)
    assert report.clean and report.figures["adjustments"] == -5


def test_what_is_new_on_the_chain_is_recorded_first(world: World) -> None:
    """Also at an address that nobody looked at for long."""
    address = world.issue("user:b")
    world.watcher.deposits.watch()
    world.connection.execute("UPDATE chain_accounts SET moved_at = 0")
    world.pay(address, 7)
    world.devnet.finalize()
    assert run(world).clean
    assert world.credit("user:b") == 7


def test_a_balance_that_the_chain_does_not_have_is_found(world: World) -> None:
    forge(world, f"UPDATE chain_accounts SET balance = balance + 1 WHERE balance > 0 AND {TOKENS}; "
                 f"UPDATE movements SET delta = delta + 1 WHERE kind = 'deposit' AND delta = 5000000")  # fmt: skip
    report = run(world)
    assert "every balance on the chain is the recorded one" in failed(report)
    (line,) = (line for line in report.failed if line.name.startswith("every balance"))
    assert "has 5000000, recorded are 5000001" in line.detail


def test_evidence_that_the_chain_does_not_have_is_found_by_the_thorough_audit(world: World) -> None:
    """Two deposits whose amounts were swapped: every sum is right."""
    forge(world, f"UPDATE movements SET delta = 905000000 - delta WHERE kind = 'deposit' AND {TOKENS}")
    confirmed = "the chain confirms every recorded movement"
    assert confirmed not in failed(run(world))
    assert confirmed in failed(run(world, thorough=True))


def test_another_cluster_is_told(world: World) -> None:
    other = Chain(Devnet(seed=6).client())
    report = world.run(audit(world.new_watcher(other)))
    assert failed(report) == {"the cluster and the token are the database's own"}
    world.run(other.close())


def test_a_cluster_that_does_not_answer_is_no_verdict(world: World) -> None:
    with world.devnet.fault(faults.timeout), pytest.raises(ChainError):
        run(world)
