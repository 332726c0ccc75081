"""Goal: the ledger answers every request with the first refusal that applies, and writes only what it accepts.

Method: a table is worked through from top to bottom on one ledger. A request that is not `created` must leave every
row as it was; after each one all invariants must hold. Every answer that the ledger knows occurs in the table. Then
what attackers of such ledgers try, with the numbers of the attack checklist, and what keeps the journal as it is.
"""

from __future__ import annotations

import decimal
import fractions
import math
import shutil
import threading

import numpy
import pytest

from diffusionz.payments import ledger as module
from diffusionz.payments.database import IntegrityError, immediate, open_database
from diffusionz.payments.errors import (
    AmountError,
    ConflictError,
    ExpiredError,
    IdentifierError,
    NotFoundError,
    PaymentsError,
)
from diffusionz.payments.ledger import AMOUNT_MAX, Balance, Ledger, Result, Sums, replay, require

NOW = 1_800_000_000
T, A, B, OURS, PROXIED, FIX = "chain:token", "user:a", "user:b", "revenue:first_party", "revenue:proxied", "adjustments"

# fmt: off
TABLE = [
    ("open_account", (A, "user"), "created"),
    ("open_account", (A, "user"), "exists"),
    ("open_account", (B, "user"), "created"),

    # Transfers: refusals by descending precedence. Each row also breaks every rung below the one that answers.
    ("transfer", ("d1", "user:x", "user:x", AMOUNT_MAX, "c"), "accounts_must_be_different"),
    ("transfer", ("d1", "user:x", "user:y", AMOUNT_MAX, "c"), "debit_account_not_found"),
    ("transfer", ("d1", A, "user:y", AMOUNT_MAX, "c"), "credit_account_not_found"),
    ("transfer", ("d1", A, B, 1, "c"), "exceeds_credits"),
    ("transfer", ("d1", T, A, 1000, "deposit"), "created"),

    # The id is looked at first: whatever else is wrong, the first difference is named.
    ("transfer", ("d1", T, A, 1000, "deposit"), "exists"),
    ("hold", ("d1", "user:x", "user:x", 1, NOW - 1, "c", "n"), "exists_with_different_kind"),
    ("post", ("d1", "d1", 1), "exists_with_different_kind"),
    ("void", ("d1", "d1"), "exists_with_different_kind"),
    ("refund", ("d1", "d1"), "exists_with_different_kind"),
    ("transfer", ("d1", "user:x", "user:x", 1, "c", "n"), "exists_with_different_debit"),
    ("transfer", ("d1", T, "user:x", 1, "c", "n"), "exists_with_different_credit"),
    ("transfer", ("d1", T, A, 1, "c", "n"), "exists_with_different_amount"),
    ("transfer", ("d1", T, A, 1000, "c", "n"), "exists_with_different_code"),
    ("transfer", ("d1", T, A, 1000, "deposit", "n"), "exists_with_different_note"),

    # Numbers stay within 63 bits on both sides, of what is posted and held together.
    ("transfer", ("big", T, B, AMOUNT_MAX - 999, "c"), "overflows_debits"),
    ("transfer", ("big", FIX, A, AMOUNT_MAX - 999, "c"), "overflows_credits"),
    ("transfer", ("big", A, B, AMOUNT_MAX - 999, "c"), "exceeds_credits"),
    ("transfer", ("big", T, B, AMOUNT_MAX - 1000, "c"), "created"),
    ("transfer", ("one", T, A, 1, "c"), "overflows_debits"),

    # Holds.
    ("hold", ("h1", "user:x", "user:x", AMOUNT_MAX, NOW, "zimage"), "accounts_must_be_different"),
    ("hold", ("h1", "user:x", "user:y", AMOUNT_MAX, NOW, "zimage"), "debit_account_not_found"),
    ("hold", ("h1", A, "user:y", AMOUNT_MAX, NOW, "zimage"), "credit_account_not_found"),
    ("hold", ("h1", A, OURS, AMOUNT_MAX, NOW, "zimage"), "expiry_must_be_in_the_future"),
    ("hold", ("h1", T, OURS, 1, NOW + 60, "zimage"), "overflows_debits"),
    ("hold", ("h1", A, OURS, 1001, NOW + 60, "zimage"), "exceeds_credits"),
    ("hold", ("h1", A, OURS, 600, NOW + 60, "zimage"), "created"),
    ("hold", ("h1", A, OURS, 600, NOW + 60, "zimage"), "exists"),
    ("hold", ("h1", A, OURS, 600, NOW + 61, "zimage"), "exists_with_different_expiry"),
    ("transfer", ("h1", A, OURS, 600, "zimage"), "exists_with_different_kind"),
    # What is held is spent, for transfers as for holds.
    ("hold", ("h2", A, OURS, 401, NOW + 60, "zimage"), "exceeds_credits"),
    ("transfer", ("t2", A, B, 401, "gift"), "exceeds_credits"),
    ("hold", ("h2", A, OURS, 400, NOW + 60, "zimage"), "created"),
    ("hold", ("h3", A, OURS, 1, NOW + 60, "zimage"), "exceeds_credits"),
    ("hold", ("big2", FIX, OURS, AMOUNT_MAX - 999, NOW + 60, "c"), "overflows_credits"),

    # Posts and voids.
    ("post", ("p1", "nothing", 601), "hold_not_found"),
    ("void", ("p1", "nothing"), "hold_not_found"),
    ("post", ("p1", "d1", 1001), "not_a_hold"),
    ("void", ("p1", "d1"), "not_a_hold"),
    ("post", ("p1", "h1", 601), "exceeds_held_amount"),
    ("post", ("p1", "h1", 250), "created"),
    ("post", ("p1", "h1", 250), "exists"),
    ("post", ("p1", "h1"), "exists_with_different_amount"),
    ("post", ("p1", "h2", 250), "exists_with_different_reference"),
    ("post", ("p1", "nothing", 250), "exists_with_different_reference"),
    ("post", ("p1", "h1", 250, "n"), "exists_with_different_note"),
    ("void", ("p1", "h1"), "exists_with_different_kind"),
    ("post", ("p2", "h1", 601), "hold_already_posted"),
    ("void", ("p2", "h1"), "hold_already_posted"),
    ("post", ("p2", "p1", 1), "not_a_hold"),
    ("void", ("v1", "h2"), "created"),
    ("void", ("v1", "h2"), "exists"),
    ("void", ("v1", "h1"), "exists_with_different_reference"),
    ("void", ("v2", "h2"), "hold_already_voided"),
    ("post", ("p2", "h2", 401), "hold_already_voided"),

    # Expiry: at the second of expires_at it is too late, whether or not anyone has called `expire`.
    ("hold", ("h3", A, OURS, 750, NOW + 60, "zimage"), "created"),
    ("hold", ("h4", B, OURS, 9, NOW + 60, "zimage"), "created"),
    ("clock", NOW + 59.999),
    ("post", ("p4", "h4"), "created"),
    ("hold", ("h5", B, OURS, 9, NOW + 60, "zimage"), "created"),
    ("clock", NOW + 60),
    ("post", ("p3", "h3", 751), "hold_expired"),
    ("void", ("v3", "h3"), "hold_expired"),
    ("post", ("p4", "h4"), "exists"),
    ("hold", ("h6", A, OURS, 1, NOW + 120, "zimage"), "exceeds_credits"),
    ("expire", (), 2),
    ("expire", (), 0),
    ("post", ("p3", "h3", 1), "hold_expired"),
    ("void", ("v3", "h3"), "hold_expired"),
    ("hold", ("h6", A, OURS, 750, NOW + 120, "zimage"), "created"),
    ("void", ("v6", "h6"), "created"),

    # Refunds.
    ("refund", ("r1", "nothing", 251), "post_not_found"),
    ("refund", ("r1", "h1", 251), "not_a_post"),
    ("refund", ("r1", "d1", 251), "not_a_post"),
    ("refund", ("r1", "v1", 251), "not_a_post"),
    ("refund", ("r1", "p1", 251), "exceeds_posted_amount"),
    ("refund", ("r1", "p1"), "created"),
    ("refund", ("r1", "p1"), "exists"),
    ("refund", ("r1", "p1", 250), "exists"),
    ("refund", ("r1", "p1", 249), "exists_with_different_amount"),
    ("refund", ("r1", "p4"), "exists_with_different_reference"),
    ("refund", ("r1", "p1", 250, "n"), "exists_with_different_note"),
    ("refund", ("r2", "p1", 251), "already_refunded"),
    ("refund", ("r2", "r1", 1), "not_a_post"),
    ("transfer", ("drain", OURS, FIX, AMOUNT_MAX - 250, "c"), "created"),
    ("refund", ("r2", "p4", 9), "overflows_debits"),
    ("hold", ("h7", B, PROXIED, 5, NOW + 120, "tts"), "created"),
    ("post", ("p7", "h7"), "created"),
    ("transfer", ("fill", FIX, B, 1000, "c"), "created"),
    ("refund", ("r7", "p7", 1), "overflows_credits"),
]
# fmt: on


def state(ledger):
    return list(ledger.journal()), ledger.accounts(), ledger.connection.execute("SELECT * FROM open_holds").fetchall()


def unsound(ledger):
    return [invariant for invariant in ledger.check() if not invariant.holds]


def test_every_refusal_in_the_order_of_the_ladder(connection, clock):
    ledger = Ledger(connection, clock)
    for number, (verb, *arguments) in enumerate(TABLE):
        about = f"row {number}: {verb} {arguments}"
        if verb == "clock":
            (clock.now,) = arguments
            continue
        before = state(ledger)
        answer = getattr(ledger, verb)(*arguments[0])
        expected = arguments[1] if verb == "expire" else Result[arguments[1]]
        assert answer == expected, about
        assert (state(ledger) != before) == (answer in (Result.created, 2)), about
        assert not unsound(ledger), about


def test_the_table_has_every_answer():
    assert {row[-1] for row in TABLE if row[0] not in ("clock", "expire")} == {result.name for result in Result}


def test_a_hold_posts_in_part_and_the_rest_comes_back(ledger, clock):
    ledger.transfer("d", T, A, 5000, "deposit")
    ledger.hold("h", A, OURS, 300, NOW + 60, "zimage")
    assert ledger.balance(A) == Balance(posted=5000, held=300) and ledger.balance(A).available == 4700
    ledger.post("p", "h", 250)
    assert ledger.balance(A) == Balance(posted=4750, held=0)
    assert ledger.balance(OURS) == Balance(posted=250, held=0)
    assert ledger.balance(T) == Balance(posted=-5000, held=0)


# --- Bad input ---

NOT_AMOUNTS = [
    0, -1, 2**63, 2**64, 10**5000, True, False, 1.0, 1e3, math.nan, math.inf, "1", " 10 ", "1e3", "", b"1", None, [1],
    decimal.Decimal(1), fractions.Fraction(1), numpy.int64(1), complex(1),
]  # fmt: skip
NOT_IDS = ["", "a" * 65, "a b", "a\n", "é", "a/b", "\0", "a;--", "expiry:1", 1, None, b"a", True, ["a"]]
NOT_NOTES = ["a" * 201, "a\nb", "\r", "\0", "\x1b[31m", "\u202e", 1, None, b"a"]


@pytest.mark.parametrize(
    "amount", NOT_AMOUNTS, ids=lambda amount: repr(amount)[:20] if amount != 10**5000 else "10^5000"
)
def test_B2_amounts_that_are_not_whole_numbers_of_base_units(ledger, amount):
    ledger.transfer("d", T, A, 1000, "deposit")
    ledger.hold("h", A, OURS, 100, NOW + 60, "zimage")
    ledger.hold("h2", A, OURS, 100, NOW + 60, "zimage")
    ledger.post("p", "h")
    before = state(ledger)
    requests = [
        lambda: ledger.transfer("x", T, A, amount, "deposit"),
        lambda: ledger.hold("x", A, OURS, amount, NOW + 60, "zimage"),
    ]
    if amount is not None:  # which means "all of it" there
        requests += [lambda: ledger.post("x", "h2", amount), lambda: ledger.refund("x", "p", amount)]
    for request in requests:
        with pytest.raises(AmountError, match=r"amount .*: it must be an int from 1 to 9223372036854775807"):
            request()
    assert state(ledger) == before


@pytest.mark.parametrize("id", NOT_IDS, ids=repr)
def test_ids_names_and_codes_are_spelled_as_allowed(ledger, id):
    requests = [
        lambda: ledger.transfer(id, T, A, 1, "c"),
        lambda: ledger.hold(id, A, OURS, 1, NOW + 60, "c"),
        lambda: ledger.post(id, "h"),
        lambda: ledger.void(id, "h"),
        lambda: ledger.refund(id, "p"),
    ]
    if id != "expiry:1":
        requests += [
            lambda: ledger.transfer("x", id, A, 1, "c"),
            lambda: ledger.transfer("x", T, id, 1, "c"),
            lambda: ledger.transfer("x", T, A, 1, id),
            lambda: ledger.post("x", id),
            lambda: ledger.void("x", id),
            lambda: ledger.refund("x", id),
            lambda: ledger.balance(id),
            lambda: ledger.history(id),
            lambda: ledger.open_account(id, "user"),
        ]
    for request in requests:
        with pytest.raises(IdentifierError):
            request()
    assert not list(ledger.journal())


@pytest.mark.parametrize("note", NOT_NOTES, ids=repr)
def test_notes_are_one_printable_line(ledger, note):
    for request in (
        lambda: ledger.transfer("x", T, A, 1, "c", note),
        lambda: ledger.hold("x", A, OURS, 1, NOW + 60, "c", note),
        lambda: ledger.post("x", "h", 1, note),
        lambda: ledger.void("x", "h", note),
        lambda: ledger.refund("x", "p", 1, note),
    ):
        with pytest.raises(IdentifierError, match=r"note .*: it must be a line of at most 200 printable characters"):
            request()


@pytest.mark.parametrize(
    "name, kind",
    [("user:x", "chain"), ("chain:x", "user"), ("user", "bank"), ("bank:x", "bank"), ("users:x", "user"), ("x", "x")],
)
def test_an_account_is_of_the_kind_that_its_name_says(ledger, name, kind):
    with pytest.raises(IdentifierError, match="a name begins with its kind, one of user, chain, revenue, adjustments"):
        ledger.open_account(name, kind)


@pytest.mark.parametrize("expires_at", [NOW + 60.0, True, "1800000060", None, -1, 2**63])
def test_a_time_of_expiry_is_whole_seconds(ledger, expires_at):
    with pytest.raises(AmountError, match="expires_at"):
        ledger.hold("h", A, OURS, 1, expires_at, "c")


def test_missing_accounts(ledger):
    for request in (lambda: ledger.balance("user:x"), lambda: ledger.history("user:x")):
        with pytest.raises(NotFoundError, match="no account 'user:x'"):
            request()


def test_a_refusal_raises_what_it_means_when_asked_to():
    meaning = {
        "hold_not_found": NotFoundError, "hold_expired": ExpiredError, "exceeds_held_amount": AmountError,
        "overflows_credits": AmountError, "already_refunded": ConflictError, "hold_already_voided": ConflictError,
        "exists_with_different_amount": ConflictError,
    }  # fmt: skip
    for name, error in meaning.items():
        with pytest.raises(error, match=f"call 7: {Result[name].value}"):
            require(Result[name], "call 7")
    for result in Result:
        if result.accepted:
            require(result, "call 7")
        else:
            with pytest.raises(PaymentsError):
                require(result, "call 7")


# --- Attacks ---


def test_B1_threads_with_balance_for_k_calls_run_exactly_k(ledger, ledger_path):
    ledger.transfer("d", T, A, 7 * 100 + 99, "deposit")
    answers, start = [], threading.Barrier(6)

    def work(worker):
        connection = open_database(ledger_path, busy_timeout_s=120.0)
        try:
            mine = Ledger(connection, ledger.clock)
            start.wait()
            answers.extend(mine.hold(f"h{worker}-{i}", A, OURS, 100, NOW + 60, "zimage") for i in range(10))
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.name for answer in answers) == ["created"] * 7 + ["exceeds_credits"] * 53
    assert ledger.balance(A) == Balance(posted=799, held=700) and not unsound(ledger)


def test_B2_a_hold_is_resolved_once_whatever_the_ids(ledger):
    ledger.transfer("d", T, A, 1000, "deposit")
    for first, second in [("post", "post"), ("post", "void"), ("void", "post"), ("void", "void")]:
        hold = f"{first}-{second}"
        ledger.hold(hold, A, OURS, 100, NOW + 60, "zimage")
        assert getattr(ledger, first)(f"{hold}:1", hold) is Result.created
        before = state(ledger)
        for _ in range(3):
            refusal = getattr(ledger, second)(f"{hold}:2", hold)
            assert refusal is (Result.hold_already_posted if first == "post" else Result.hold_already_voided)
        assert state(ledger) == before
    assert ledger.balance(A) == Balance(posted=800, held=0)


def test_B3_post_and_expiry_are_compared_with_one_clock_inside_the_transaction(ledger, clock):
    ledger.transfer("d", T, A, 1000, "deposit")
    for tenths in range(-20, 21):
        hold = f"h{tenths + 20}"
        clock.now = NOW
        assert ledger.hold(hold, A, OURS, 10, NOW + 10, "zimage") is Result.created
        clock.now = NOW + 10 + tenths / 10
        in_time = tenths < 0
        assert ledger.post(f"{hold}:post", hold) is (Result.created if in_time else Result.hold_expired)
        assert ledger.expire() == (not in_time)
        assert ledger.post(f"{hold}:again", hold) is (Result.hold_already_posted if in_time else Result.hold_expired)
    assert ledger.balance(A) == Balance(posted=800, held=0) and not unsound(ledger)


def test_B4_a_refund_returns_to_whom_it_came_from_and_at_most_once(ledger):
    ledger.transfer("d", T, A, 1000, "deposit")
    ledger.hold("h", A, PROXIED, 300, NOW + 60, "tts")
    assert ledger.refund("r", "h") is Result.not_a_post  # held, not charged
    ledger.post("p", "h", 200)
    assert ledger.refund("r", "p", 201) is Result.exceeds_posted_amount
    assert ledger.refund("r", "p") is Result.created
    assert ledger.refund("another", "p", 1) is Result.already_refunded
    assert ledger.refund("r", "p") is Result.exists
    assert ledger.balance(A) == Balance(posted=1000, held=0)
    assert ledger.balance(PROXIED) == ledger.balance(B) == ledger.balance(OURS) == Balance(0, 0)


def test_B5_an_id_is_one_request_whoever_asks(ledger):
    ledger.transfer("d:a", T, A, 100, "deposit")
    ledger.transfer("d:b", T, B, 100, "deposit")
    assert ledger.hold("h", A, OURS, 10, NOW + 60, "zimage") is Result.created
    assert ledger.hold("h", A, OURS, 10, NOW + 60, "zimage") is Result.exists
    assert ledger.hold("h", A, OURS, 11, NOW + 60, "zimage") is Result.exists_with_different_amount
    assert ledger.hold("h", B, OURS, 10, NOW + 60, "zimage") is Result.exists_with_different_debit
    assert ledger.balance(A).held == 10 and ledger.balance(B).held == 0


def test_B6_a_reply_that_was_lost_is_repeated_without_a_second_charge(ledger):
    ledger.transfer("d", T, A, 100, "deposit")
    for _ in range(3):
        assert ledger.hold("h", A, OURS, 10, NOW + 60, "zimage").accepted
        assert ledger.post("p", "h").accepted
    assert ledger.balance(A) == Balance(posted=90, held=0) and len(list(ledger.journal())) == 3


def test_a_refused_request_may_be_repeated_when_the_reason_is_gone(ledger):
    assert ledger.hold("h", A, OURS, 10, NOW + 60, "zimage") is Result.exceeds_credits
    ledger.transfer("d", T, A, 10, "deposit")
    assert ledger.hold("h", A, OURS, 10, NOW + 60, "zimage") is Result.created


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE transfers SET amount = 1",
        "UPDATE transfers SET note = 'x' WHERE seq = 1",
        "DELETE FROM transfers",
        "DELETE FROM transfers WHERE seq = (SELECT max(seq) FROM transfers)",
        "INSERT OR REPLACE INTO transfers SELECT seq, id, kind, debit, credit, 1, refers_to, expires_at, code, note,"
        " created_at FROM transfers WHERE seq = 1",
        "INSERT INTO transfers SELECT NULL, 'z', kind, debit, credit, amount, refers_to, expires_at, code, note,"
        " created_at FROM transfers WHERE kind = 'post'",  # a second resolution
        "INSERT INTO transfers VALUES (NULL, 'z', 'transfer', 'user:a', 'user:a', 1, NULL, NULL, 'c', '', 0)",
        "INSERT INTO transfers VALUES (NULL, 'z', 'transfer', 'user:a', 'user:x', 1, NULL, NULL, 'c', '', 0)",
        "INSERT INTO transfers VALUES (NULL, 'z', 'transfer', 'user:a', 'user:b', 0, NULL, NULL, 'c', '', 0)",
        "INSERT INTO transfers VALUES (NULL, 'z', 'transfer', 'user:a', 'user:b', 1.5, NULL, NULL, 'c', '', 0)",
        "INSERT INTO transfers VALUES (NULL, 'z', 'hold', 'user:a', 'user:b', 1, NULL, NULL, 'c', '', 0)",
        "UPDATE accounts SET debits_posted = debits_posted + 10000 WHERE name = 'user:a'",
        "UPDATE accounts SET debits_pending = -1 WHERE name = 'user:a'",
        "UPDATE accounts SET credits_posted = 1.5 WHERE name = 'user:a'",
        "UPDATE accounts SET credits_posted = 'many' WHERE name = 'user:a'",
        "UPDATE accounts SET kind = 'chain' WHERE name = 'user:a'",
        "INSERT INTO accounts (name, kind) VALUES ('user:c', 'chain')",
        "INSERT INTO accounts (name, kind) VALUES ('users', 'user')",
    ],
)
def test_B9_the_schema_refuses_what_the_ledger_would_not_write(ledger, attack):
    ledger.transfer("d", T, A, 1000, "deposit")
    ledger.hold("h", A, OURS, 100, NOW + 60, "zimage")
    ledger.post("p", "h")
    before = state(ledger)
    with pytest.raises(IntegrityError), immediate(ledger.connection):
        ledger.connection.execute(attack)
    assert state(ledger) == before


@pytest.mark.parametrize(
    "damage, named",
    [
        ("UPDATE accounts SET credits_posted = credits_posted + 1 WHERE name = 'user:a'",
         {"debits equal credits", "the journal replayed gives the balances"}),
        ("UPDATE accounts SET credits_posted = credits_posted + 1, debits_posted = debits_posted + 1"
         " WHERE name = 'user:a'", {"the journal replayed gives the balances"}),
        ("UPDATE transfers SET amount = amount + 1 WHERE id = 'd'", {"the journal replayed gives the balances"}),
        ("UPDATE transfers SET amount = 101 WHERE id = 'p'",
         {"the journal replayed gives the balances",
          "every post, void and expiry resolves a hold of the same accounts, within its amount and time"}),
        ("UPDATE transfers SET created_at = 1800000060 WHERE id = 'p'",
         {"every post, void and expiry resolves a hold of the same accounts, within its amount and time"}),
        ("UPDATE transfers SET amount = 101 WHERE id = 'r'",
         {"the journal replayed gives the balances", "every refund takes back a post, within its amount"}),
        ("DELETE FROM transfers WHERE id = 'd'",
         {"the journal has no gap", "the journal replayed gives the balances"}),
        ("UPDATE transfers SET refers_to = (SELECT refers_to FROM transfers WHERE id = 'p') WHERE id = 'r'",
         {"every refund takes back a post, within its amount", "nothing is resolved or refunded twice"}),
        ("UPDATE transfers SET refers_to = 99 WHERE id = 'r'",
         {"every refund takes back a post, within its amount", "every reference leads somewhere"}),
        ("DELETE FROM open_holds", {"the open holds are those that nothing resolves"}),
        ("INSERT INTO open_holds VALUES (5, 1)", {"the open holds are those that nothing resolves"}),
        ("UPDATE accounts SET debits_pending = 1001, credits_pending = 1001 WHERE name = 'user:a'",
         {"no user is overdrawn", "the journal replayed gives the balances", "debits equal credits"}),
    ],
)  # fmt: skip
def test_B9_check_names_every_damage(ledger, damage, named):
    """Somebody with the file and no scruples: the guards are taken off first."""
    ledger.transfer("d", T, A, 1000, "deposit")
    ledger.hold("h", A, OURS, 100, NOW + 60, "zimage")
    ledger.hold("open", A, OURS, 7, NOW + 60, "zimage")
    ledger.post("p", "h")
    ledger.refund("r", "p")
    assert not unsound(ledger)
    for guard in ("transfers_are_not_updated", "transfers_are_not_deleted"):
        ledger.connection.execute(f"DROP TRIGGER {guard}")
    ledger.connection.execute("DROP INDEX one_resolution")
    ledger.connection.execute("PRAGMA foreign_keys = OFF")
    ledger.connection.execute("PRAGMA ignore_check_constraints = ON")
    ledger.connection.execute(damage)
    ledger.connection.execute("PRAGMA ignore_check_constraints = OFF")
    found = {invariant.name for invariant in unsound(ledger)}
    assert named <= found, found
    assert found - named <= {"the file is sound"}  # integrity_check reads the CHECKs too


def test_B9_check_finds_damaged_pages(ledger, ledger_path):
    for i in range(200):
        ledger.transfer(f"d{i}", T, A, 1, "deposit", "n" * 100)
    ledger.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger.connection.close()
    # An entry of the index of ids, on the page that holds it alone: the row is there, and cannot be found.
    content = bytearray(ledger_path.read_bytes())
    spot = [i for i in range(len(content)) if content.startswith(b"d123", i)]
    assert len(spot) == 2  # the row and the index
    for at in spot[1:]:
        content[at : at + 4] = b"d999"
    ledger_path.write_bytes(content)
    connection = open_database(ledger_path)
    try:
        assert "the file is sound" in {invariant.name for invariant in unsound(Ledger(connection))}
    finally:
        connection.close()


def test_replay_of_the_journal_is_the_balances_and_needs_nothing_else(ledger, clock):
    assert replay(ledger.journal()) == {}
    ledger.transfer("d", T, A, 1000, "deposit")
    ledger.hold("h1", A, OURS, 300, NOW + 60, "zimage")
    ledger.hold("h2", A, PROXIED, 200, NOW + 10, "tts")
    ledger.post("p1", "h1", 250)
    ledger.refund("r1", "p1", 50)
    ledger.hold("h3", A, PROXIED, 5, NOW + 10, "tts")
    ledger.hold("h4", A, PROXIED, 6, NOW + 90, "tts")
    ledger.void("v3", "h3")
    clock.now = NOW + 10
    ledger.expire()
    moved = {name: sums for name, sums in ledger.accounts().items() if sums != Sums()}
    assert replay(ledger.journal()) == moved
    assert moved[A] == Sums(debits_pending=6, debits_posted=250, credits_pending=0, credits_posted=1050)


def test_B17_a_restored_backup_credits_what_it_does_not_know_yet_once(ledger, ledger_path, tmp_path):
    """The deposits come again from the chain; those of before the backup are in it."""
    deposits = [(f"deposit:{i}", T, A, 100 + i, "deposit") for i in range(10)]
    for deposit in deposits[:6]:
        ledger.transfer(*deposit)
    ledger.connection.execute("VACUUM INTO ?", (str(tmp_path / "backup.db"),))
    for deposit in deposits[6:]:
        ledger.transfer(*deposit)
    ledger.hold("h", A, OURS, 500, NOW + 60, "zimage")
    ledger.post("p", "h")
    shutil.copy(tmp_path / "backup.db", tmp_path / "restored.db")
    connection = open_database(tmp_path / "restored.db")
    try:
        restored = Ledger(connection, ledger.clock)
        assert not unsound(restored)
        answers = [restored.transfer(*deposit) for _ in range(2) for deposit in deposits]
        assert answers == [Result.exists] * 6 + [Result.created] * 4 + [Result.exists] * 10
        assert restored.balance(A) == Balance(posted=sum(100 + i for i in range(10)), held=0)  # what was spent is back
        assert not unsound(restored)
    finally:
        connection.close()


# --- Expiry and restart ---


def test_a_restart_leaves_no_hold_behind(ledger, ledger_path, clock):
    ledger.transfer("d", T, A, 5000, "deposit")
    for i in range(50):
        ledger.hold(f"h{i}", A, OURS, 100, NOW + 1 + i % 7, "zimage")
    ledger.connection.close()
    clock.now = NOW + 4.5
    connection = open_database(ledger_path)
    try:
        restarted = Ledger(connection, clock)
        assert restarted.expire(batch=3) == sum(1 + i % 7 <= 4 for i in range(50))
        assert restarted.balance(A).held == 100 * sum(1 + i % 7 > 4 for i in range(50))
        clock.now = NOW + 7
        restarted.expire()
        assert restarted.balance(A) == Balance(posted=5000, held=0)
        assert connection.execute("SELECT count(*) FROM open_holds").fetchone() == (0,)
        assert not unsound(restarted)
    finally:
        connection.close()


def test_expiry_does_not_look_through_the_journal(ledger):
    """Its work is that of the holds that are due, in an index; however many transfers there were."""
    query = "SELECT hold FROM open_holds WHERE expires_at <= 5 ORDER BY expires_at, hold LIMIT 9"
    plan = [row[3] for row in ledger.connection.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert plan == ["SEARCH open_holds USING PRIMARY KEY (expires_at<?)"]


# --- History ---


def test_history_is_a_view_over_the_transfers(ledger, clock):
    assert ("view",) in ledger.connection.execute("SELECT type FROM sqlite_schema WHERE name = 'history'").fetchall()
    ledger.transfer("d", T, A, 1000, "deposit", "signature 5x")
    ledger.hold("h", A, OURS, 300, NOW + 60, "zimage")
    ledger.post("p", "h", 250, "1 image")
    ledger.refund("r", "p", note="the engine failed")
    ledger.hold("h2", A, OURS, 40, NOW + 60, "zimage")
    ledger.void("v", "h2")
    ledger.hold("h3", A, OURS, 30, NOW + 1, "zimage")
    clock.now += 1
    ledger.expire()
    ledger.transfer("g", A, B, 5, "gift")
    lines = [
        (line.kind, line.code, line.amount, line.posted, line.held, line.counterparty) for line in ledger.history(A)
    ]
    assert lines == [
        ("transfer", "gift", 5, -5, 0, B),
        ("expiry", "zimage", 30, 0, -30, OURS),
        ("hold", "zimage", 30, 0, 30, OURS),
        ("void", "zimage", 40, 0, -40, OURS),
        ("hold", "zimage", 40, 0, 40, OURS),
        ("refund", "zimage", 250, 250, 0, OURS),
        ("post", "zimage", 250, -250, -300, OURS),
        ("hold", "zimage", 300, 0, 300, OURS),
        ("transfer", "deposit", 1000, 1000, 0, T),
    ]
    for account in (A, B, OURS, T):
        lines = ledger.history(account)
        assert sum(line.posted for line in lines) == ledger.balance(account).posted
        assert sum(line.held for line in lines) == ledger.balance(account).held
    assert ledger.history(A)[-1].note == "signature 5x" and ledger.history(B)[0].counterparty == A


def test_history_comes_in_pages(ledger):
    for i in range(25):
        ledger.transfer(f"d{i}", T, (A, B)[i % 2], 1, "deposit")
    seen, before = [], None
    while page := ledger.history(A, limit=4, before=before):
        assert len(page) <= 4
        seen += [line.id for line in page]
        before = page[-1].seq
    assert seen == [f"d{i}" for i in range(24, -1, -2)]
    for limit in (0, 1001, 1.0, True, "9", None):
        with pytest.raises(AmountError, match="limit"):
            ledger.history(A, limit=limit)


def test_history_reads_the_lines_that_it_returns(ledger):
    """An account's page is found by index, newest first, not sorted out of the whole journal."""
    plan = " / ".join(
        row[3]
        for row in ledger.connection.execute(
            f"EXPLAIN QUERY PLAN SELECT {module.LINE_COLUMNS} FROM history WHERE account = 'user:a' AND seq < 9"
            " ORDER BY seq DESC LIMIT 5"
        )
    )
    assert "SCAN" not in plan and "TEMP B-TREE" not in plan, plan
    assert "transfers_by_debit (debit=? AND rowid<?)" in plan and "transfers_by_credit (credit=? AND rowid<?)" in plan


def test_every_table_is_strict(connection):
    tables = {
        name: strict for _, name, kind, _, _, strict in connection.execute("PRAGMA table_list") if kind == "table"
    }
    ours = {"accounts", "transfers", "open_holds", "calls"}
    assert ours <= set(tables) and all(tables[name] for name in ours)
