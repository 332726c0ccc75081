"""Goal: a call costs what was agreed when it was held, once, and nothing when it did not serve.

Method: the real price table, real rates from a fixed source, a real ledger. The token is worth a tenth of a cent and
has 6 decimals, so an image at 1 USD is 1000 tokens, 1_000_000_000 base units; its all-time high is double.
"""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from diffusionz.payments.charges import Charges, Failure, call_id_of
from diffusionz.payments.database import IntegrityError, immediate
from diffusionz.payments.errors import (
    AmountError,
    BalanceError,
    ConflictError,
    ExpiredError,
    IdentifierError,
    NotFoundError,
    RateError,
    StorageError,
)
from diffusionz.payments.ledger import Balance, Result
from diffusionz.payments.prices import SERVICES, PriceBook, Service
from diffusionz.payments.rates import FixedSource, RateRules, Rates

A, B, OURS, PROXIED = "user:a", "user:b", "revenue:first_party", "revenue:proxied"
MARKET, HIGH = 10**9, 2 * 10**9  # pico-USD a token
IMAGE = 500_000_000  # base units: 1 USD at the high
HASH = "f" * 64


@pytest.fixture
def source():
    return FixedSource(MARKET)


@pytest.fixture
def rates(connection, clock, source):
    rules = RateRules(min_sources=1)
    rates = Rates(connection, rules, decimals=6, token_sources=[source], first_high=HIGH, clock=clock)
    refresh(rates, clock)
    return rates


def refresh(rates, clock, times=3):
    for _ in range(times):
        clock.now += 1
        asyncio.run(rates.refresh())


@pytest.fixture
def charges(ledger, rates):
    """a and b have 10 images' worth each."""
    for user in (A, B):
        ledger.transfer(f"d:{user}", "chain:token", user, 10 * IMAGE, "deposit")
    return Charges(ledger, PriceBook(SERVICES, rates))


def sound(charges):
    return all(invariant.holds for invariant in charges.ledger.check())


def test_a_call_is_held_then_posted(charges):
    hold = charges.hold(A, "zimage", 2, "c1", HASH, 60)
    assert (hold.service, hold.units, hold.usd_micro, hold.tokens) == ("zimage", 2, 2_000_000, 2 * IMAGE)
    assert (hold.state, hold.charged, hold.created, hold.rate.pico_usd) == ("held", 0, True, HIGH)
    assert charges.ledger.balance(A) == Balance(posted=10 * IMAGE, held=2 * IMAGE)
    done = charges.post("c1")
    assert done == dataclasses.replace(hold, state="posted", charged=2 * IMAGE, created=False)
    assert charges.ledger.balance(A) == Balance(posted=8 * IMAGE, held=0)
    assert charges.ledger.balance(OURS).posted == 2 * IMAGE
    line = charges.ledger.history(A, limit=1)[0]
    assert (line.code, line.note, line.posted) == ("zimage", "2 image", -2 * IMAGE) and sound(charges)


def test_only_what_was_delivered_is_charged(charges):
    """Three blocks of 100 characters are held, two are begun."""
    hold = charges.hold(A, "tts", 250, "c1", HASH, 60)
    assert hold.tokens == 3 * IMAGE // 10
    assert charges.post("c1", 101).charged == 2 * IMAGE // 10
    assert charges.post("c1", 101).charged == 2 * IMAGE // 10  # again
    with pytest.raises(ConflictError, match="the id belongs to a request"):
        charges.post("c1", 102)  # the same price, and not the same claim
    assert charges.ledger.balance(A) == Balance(posted=10 * IMAGE - 2 * IMAGE // 10, held=0)


@pytest.mark.parametrize("units", [0, -1, 251, 1.0, "1", True, 2**63])
def test_B2_units_that_were_not_held_cannot_be_posted(charges, units):
    charges.hold(A, "tts", 250, "c1", HASH, 60)
    with pytest.raises(AmountError, match="from 1 to 250"):
        charges.post("c1", units)
    assert charges.find("c1").state == "held"


def test_a_failed_call_is_voided(charges):
    charges.hold(A, "zimage", 1, "c1", HASH, 60)
    for _ in range(2):
        assert charges.void("c1", "engine_error").state == "voided"
    with pytest.raises(ConflictError, match="the hold was voided before"):
        charges.post("c1")
    assert charges.ledger.balance(A) == Balance(posted=10 * IMAGE, held=0)
    charges.hold(A, "zimage", 1, "c2", HASH, 60)
    charges.post("c2")
    with pytest.raises(ConflictError, match="the hold was posted before"):
        charges.void("c2")


def test_B1_the_last_call_that_the_balance_covers(charges):
    for i in range(10):
        charges.hold(A, "zimage", 1, f"c{i}", HASH, 60)
    with pytest.raises(BalanceError, match=f"1 image of zimage cost {IMAGE} base units, user:a has 0") as error:
        charges.hold(A, "zimage", 1, "c10", HASH, 60)
    assert (error.value.available, error.value.needed) == (0, IMAGE)
    assert charges.find("c10") is None and charges.ledger.find("call:c10:hold") is None
    charges.void("c3")
    assert charges.hold(A, "zimage", 1, "c10", HASH, 60).created  # a refusal does not use the id up


def test_B3_a_result_that_comes_after_the_hold_is_not_charged(charges, clock):
    hold = charges.hold(A, "zimage", 1, "c1", HASH, 60)
    assert hold.expires_at == clock.now + 60
    clock.now = hold.expires_at
    assert charges.find("c1").state == "expired"  # before anybody has come by
    for _ in range(2):
        with pytest.raises(ExpiredError, match="the hold has expired"):
            charges.post("c1")
        assert charges.void("c1").state == "expired"
        charges.ledger.expire()
    assert charges.ledger.balance(A) == Balance(posted=10 * IMAGE, held=0)
    assert charges.hold(A, "zimage", 1, "c1", HASH, 60).created is False  # the id stays that call's


def test_B4_only_our_failures_are_refunded_once_and_exactly(charges):
    charges.hold(A, "tts", 250, "c1", HASH, 60)
    with pytest.raises(ConflictError, match="it is held, so there is no charge to give back"):
        charges.refund("c1", Failure.engine_error)
    charges.post("c1", 150)
    for failure in Failure:
        if not failure.ours:
            with pytest.raises(ConflictError, match="only our own failures are refunded"):
                charges.refund("c1", failure)
    assert charges.find("c1").state == "posted"
    for failure in (Failure.result_lost, Failure.result_lost, Failure.out_of_memory):
        assert charges.refund("c1", failure).state == "refunded"
    assert charges.ledger.balance(A) == Balance(posted=10 * IMAGE, held=0)
    assert charges.ledger.balance(B) == Balance(posted=10 * IMAGE, held=0)
    assert charges.ledger.balance(OURS) == Balance(0, 0)
    assert len([line for line in charges.ledger.history(A) if line.kind == "refund"]) == 1 and sound(charges)


@pytest.mark.parametrize("end", ["void", "expire", "never held"])
def test_B4_what_was_never_charged_is_not_refunded(charges, clock, end):
    if end != "never held":
        charges.hold(A, "zimage", 1, "c1", HASH, 60)
        charges.void("c1") if end == "void" else charges.ledger.expire(clock.now + 60)
    with pytest.raises(NotFoundError if end == "never held" else ConflictError):
        charges.refund("c1", Failure.engine_error)
    assert charges.ledger.balance(A) == Balance(posted=10 * IMAGE, held=0)


@pytest.mark.parametrize(
    "service, units, error",
    [
        ("zimage", 0, AmountError),
        ("zimage", -1, AmountError),
        ("zimage", True, AmountError),
        ("zimage", 1.0, AmountError),
        ("zimage", "1", AmountError),
        ("zimage", 2**63, AmountError),
        ("zimage", 10**9, BalanceError),
        ("nothing", 1, NotFoundError),
        (None, 1, NotFoundError),
        (["zimage"], 1, NotFoundError),
    ],
)
def test_B4_a_wrong_request_is_refused_before_it_holds_anything(charges, service, units, error):
    with pytest.raises(error):
        charges.hold(A, service, units, "c1", HASH, 60)
    assert charges.find("c1") is None and charges.ledger.balance(A).held == 0


@pytest.mark.parametrize(
    "account, call_id, request_hash, ttl_s",
    [
        (OURS, "c", HASH, 60), ("chain:token", "c", HASH, 60), ("", "c", HASH, 60), (A, "", HASH, 60),
        (A, "c:hold", HASH, 60), (A, "c" * 49, HASH, 60), (A, "c", "", 60), (A, "c", "f" * 65, 60), (A, "c", HASH, 0),
        (A, "c", HASH, 86_401), (A, "c", HASH, 1.5), (A, "c", HASH, None), ("user:nobody", "c", HASH, 60),
    ],
)  # fmt: skip
def test_a_call_that_is_misspelled(charges, account, call_id, request_hash, ttl_s):
    with pytest.raises((IdentifierError, AmountError, NotFoundError)):
        charges.hold(account, "zimage", 1, call_id, request_hash, ttl_s)
    assert charges.ledger.connection.execute("SELECT count(*) FROM calls").fetchone() == (0,)


def test_B5_a_call_id_is_one_request(charges):
    first = charges.hold(A, "zimage", 1, "c1", HASH, 60)
    again = charges.hold(A, "zimage", 1, "c1", HASH, 30)
    assert first.created and again == dataclasses.replace(first, created=False)
    for other in [
        (A, "zimage", 1, "c1", "e" * 64),
        (A, "zimage", 2, "c1", HASH),
        (A, "chronos2", 1, "c1", HASH),
        (B, "zimage", 1, "c1", HASH),
    ]:
        with pytest.raises(ConflictError, match="it was made before, with another request") as error:
            charges.hold(*other, 60)
        assert A not in str(error.value)
    assert charges.ledger.balance(A).held == IMAGE and charges.ledger.balance(B).held == 0


def test_B5_two_accounts_may_choose_the_same_key():
    assert call_id_of(A, "order-1") == call_id_of(A, "order-1") != call_id_of(B, "order-1")
    assert call_id_of("user:a", "b") != call_id_of("user:ab", "") and len(call_id_of(A, "\x00 é" * 100)) == 48


def test_B6_a_request_that_comes_again_after_its_post_is_not_charged_or_run_again(charges):
    charges.hold(A, "zimage", 1, "c1", HASH, 60)
    charges.post("c1")
    again = charges.hold(A, "zimage", 1, "c1", HASH, 60)
    assert not again.created and again.state == "posted" and again.charged == IMAGE
    assert charges.post("c1").charged == IMAGE
    assert charges.ledger.balance(A) == Balance(posted=9 * IMAGE, held=0)


def test_B7_price_and_rate_are_those_of_the_hold(charges, rates, source, clock):
    own = charges.hold(A, "tts", 250, "c1", HASH, 3600)
    proxied = charges.hold(A, "flux_image", 2, "c2", HASH, 3600)
    dearer = {name: dataclasses.replace(service, micro_usd=service.micro_usd * 3) for name, service in SERVICES.items()}
    charges.book = PriceBook(dearer | {"tts": Service("tts", 7, per=9, first_party=False)}, rates)
    source.pico_usd = MARKET * 3 // 2
    clock.now += 600
    refresh(rates, clock)
    assert rates.token_rate("market", clock.now).pico_usd == MARKET * 3 // 2
    assert charges.hold(A, "tts", 250, "c1", HASH, 3600) == dataclasses.replace(own, created=False)
    assert charges.post("c1", 200).charged == 2 * IMAGE // 10
    assert charges.post("c2").charged == proxied.tokens == 80_000_000
    assert charges.hold(A, "flux_image", 2, "c3", HASH, 3600).tokens == 160_000_000  # 3 times the price, 1.5 the rate


def test_B7_without_a_rate_that_can_be_trusted_there_is_no_hold(charges, clock):
    charges.hold(A, "flux_image", 1, "c1", HASH, 86_400)
    clock.now += 3600
    with pytest.raises(RateError, match="the newest rate is 3600 s old"):
        charges.hold(A, "flux_image", 1, "c2", HASH, 60)
    assert charges.find("c2") is None
    assert charges.post("c1").state == "posted"  # its rate is known


def test_B8_credit_has_no_value_in_usd_that_could_be_carried_between_services(charges):
    """First-party work costs tokens at the high, proxied work at the market, whatever the tokens were bought for."""
    own = charges.hold(A, "caption", 1, "c1", HASH, 60)
    proxied = charges.hold(A, "flux_image", 1, "c2", HASH, 60)
    assert (own.rate.kind, own.tokens) == ("ath", 25_000_000)
    assert (proxied.rate.kind, proxied.tokens) == ("market", 40_000_000)
    charges.post("c1"), charges.post("c2")
    charges.refund("c1", Failure.engine_error)
    assert charges.ledger.balance(OURS).posted == 0 and charges.ledger.balance(PROXIED).posted == 40_000_000


def test_B8_every_call_costs_at_least_a_base_unit_and_is_rounded_up(ledger, connection, clock):
    source = FixedSource(3 * 10**18)  # a token worth 3 million USD, without decimals
    rates = Rates(connection, RateRules(min_sources=1), decimals=0, token_sources=[source], clock=clock)
    refresh(rates, clock)
    ledger.transfer("d", "chain:token", A, 100, "deposit")
    charges = Charges(ledger, PriceBook({"tick": Service("tick", 1, first_party=False)}, rates))
    for i in range(100):
        charges.hold(A, "tick", 1 + i, f"c{i}", HASH, 60)
        assert charges.post(f"c{i}", 1).charged == 1
    with pytest.raises(BalanceError):
        charges.hold(A, "tick", 1, "c100", HASH, 60)
    assert ledger.balance(A) == Balance(0, 0)


def test_B9_what_a_hold_was_reckoned_with_is_never_changed(charges):
    charges.hold(A, "zimage", 1, "c1", HASH, 60)
    for attack in ("UPDATE calls SET micro_usd = 1", "DELETE FROM calls"):
        with pytest.raises(IntegrityError, match="calls are never"), immediate(charges.ledger.connection):
            charges.ledger.connection.execute(attack)


def test_B10_no_hold_no_call_when_the_database_cannot_be_written(charges):
    charges.ledger.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError):
        charges.hold(A, "zimage", 1, "c1", HASH, 60)
    charges.ledger.connection.execute("PRAGMA query_only = OFF")
    assert charges.find("c1") is None and charges.ledger.balance(A).held == 0


def test_a_hold_that_is_part_of_more_falls_with_it(charges):
    """As when a key's spend limit is counted in the same transaction, and refuses."""
    with pytest.raises(ZeroDivisionError), immediate(charges.ledger.connection):
        assert charges.hold(A, "zimage", 1, "c1", HASH, 60).created
        raise ZeroDivisionError
    assert charges.find("c1") is None and charges.ledger.balance(A) == Balance(10 * IMAGE, 0)


def test_a_call_that_nobody_made(charges):
    for request in (charges.post, charges.void):
        with pytest.raises(NotFoundError, match="there is no call 'c1'"):
            request("c1")
    assert charges.find("c1") is None
    assert charges.ledger.transfer("d:user:a", "chain:token", A, 10 * IMAGE, "deposit") is Result.exists
