"""API keys: what is kept of them, what they open, what they may spend, and where they must never be seen."""

from __future__ import annotations

import logging
import pathlib
import re
import threading
import time
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusionz.payments import keys as keys_module
from diffusionz.payments.database import Connection, IntegrityError, immediate, open_database
from diffusionz.payments.errors import (
    AmountError,
    ConfigurationError,
    IdentifierError,
    IdentityError,
    NotFoundError,
    PaymentsError,
)
from diffusionz.payments.keys import KEYS_MAX, Keys, RedactKeys, redact
from diffusionz.payments.ledger import Ledger

PEPPER = bytes(range(32))
DAY = 86_400


@pytest.fixture
def keys(ledger: Ledger, clock: Any) -> Keys:
    return Keys(ledger.connection, PEPPER, clock=clock)


def test_a_key_opens_its_account(keys: Keys, clock: Any) -> None:
    new = keys.create("user:a", name="laptop", services=["zimage", "tts", "tts"], daily_limit=7)
    assert re.fullmatch("cutedsl_[0-9A-Za-z]{49}", new.secret)
    key = keys.authenticate(new.secret)
    assert (key.account, key.name, key.services, key.daily_limit) == ("user:a", "laptop", ("tts", "zimage"), 7)
    assert key.shown == f"{new.secret[:16]}…"
    assert keys.authenticate(keys.create("user:b").secret).account == "user:b"


def test_two_hundred_and_fifty_six_bits(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest number fits, the smallest is as long."""
    asked = []
    monkeypatch.setattr(keys_module.secrets, "randbits", lambda n: asked.append(n) or 2**n - 1)
    top = keys.create("user:a").secret
    monkeypatch.setattr(keys_module.secrets, "randbits", lambda n: 1)
    assert len(keys.create("user:a").secret) == len(top) == 57
    assert asked == [256]
    value = 0
    for letter in top[8:51]:
        value = value * 62 + "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz".index(letter)
    assert value == 2**256 - 1


def test_B12_the_database_has_no_key(keys: Keys, ledger_path: pathlib.Path, connection: Connection) -> None:
    secret = keys.create("user:a").secret
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = ledger_path.read_bytes()
    body = secret.removeprefix("cutedsl_").encode()
    assert body[:8] in content  # how lists name it
    for start in range(len(body) - 9):
        assert body[start : start + 10] not in content
    # Another pepper's keys are no keys here: the database alone lets nobody try one.
    with pytest.raises(IdentityError):
        Keys(connection, bytes(32)).authenticate(secret)


@given(position=st.integers(8, 56), letter=st.sampled_from("0123456789ABCXYZabcxyz"))
def test_B12_a_mistyped_key_is_refused_without_a_look_up(position: int, letter: str) -> None:
    body = "A" * 43
    secret = "cutedsl_" + body + keys_module._checksum(body)
    changed = secret[:position] + letter + secret[position + 1 :]
    looked_up: list[str] = []

    class Recorder(Keys):
        def _find(self, condition: str, value: str | bytes) -> None:
            looked_up.append(condition)

    with pytest.raises(IdentityError, match="the API key is not valid"):
        Recorder(None, PEPPER).authenticate(changed)  # type: ignore[arg-type]
    assert bool(looked_up) == (changed == secret)


def test_B12_nothing_tells_a_wrong_key_from_a_revoked_one(keys: Keys) -> None:
    new = keys.create("user:a")
    keys.revoke("user:a", new.key.id)
    said = set()
    body = "B" * 43
    unknown = "cutedsl_" + body + keys_module._checksum(body)
    prefix = new.secret[:51] + "000000"
    for secret in (new.secret, unknown, prefix, new.secret[:20], "", "cutedsl_", "x", None, 5, b"x", new.secret + "\n"):
        with pytest.raises(IdentityError) as caught:
            keys.authenticate(secret)  # type: ignore[arg-type]
        said.add(str(caught.value))
    assert len(said) == 1
    assert new.secret not in said.pop()


def test_B12_a_revoked_keys_open_call_is_still_resolved(keys: Keys, clock: Any) -> None:
    new = keys.create("user:a", daily_limit=100)
    keys.spend(new.key, "call-1", 60)
    revoked = keys.revoke("user:a", new.key.id)
    assert revoked.revoked_at == int(clock())
    with pytest.raises(IdentityError):
        keys.authenticate(new.secret)
    with pytest.raises(IdentityError, match="is revoked"):
        keys.spend(new.key, "call-2", 1)  # it was authenticated a moment before
    keys.settle(new.key.account, "call-1", 25)
    assert keys.spent(new.key.id, int(clock()) // DAY) == 25
    clock.now += 10
    assert keys.revoke("user:a", new.key.id).revoked_at == revoked.revoked_at


def test_B12_another_accounts_key_is_not_there(keys: Keys) -> None:
    new = keys.create("user:a")
    with pytest.raises(NotFoundError):
        keys.revoke("user:b", new.key.id)
    with pytest.raises(NotFoundError):
        keys.set_daily_limit("user:b", new.key.id, 5)
    assert keys.list("user:b") == []
    assert keys.list("user:a") == [new.key]


def test_a_key_is_never_deleted_nor_moved_nor_revived(keys: Keys, connection: Connection) -> None:
    new = keys.create("user:a")
    keys.revoke("user:a", new.key.id)
    for statement in (
        "DELETE FROM api_keys",
        "UPDATE api_keys SET revoked_at = NULL",
        "UPDATE api_keys SET account = 'user:b'",
        "UPDATE api_keys SET digest = zeroblob(32)",
    ):
        with pytest.raises(IntegrityError), immediate(connection):
            connection.execute(statement)


def test_last_used_is_known_to_the_minute(keys: Keys, clock: Any) -> None:
    new = keys.create("user:a")
    assert new.key.used_at is None
    keys.authenticate(new.secret)
    start = int(clock())
    clock.now += 59
    assert keys.authenticate(new.secret).used_at == start
    clock.now += 1
    keys.authenticate(new.secret)
    assert keys.list("user:a")[0].used_at == start + 60


def test_a_ledger_that_cannot_be_written_is_read_all_the_same(keys: Keys, ledger_path: pathlib.Path) -> None:
    new = keys.create("user:a")
    other = open_database(ledger_path)
    try:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert keys.authenticate(new.secret).account == "user:a"
        assert time.monotonic() - began < 8  # nor is the lock waited for, which would be for 10 s
        other.execute("ROLLBACK")
    finally:
        other.close()
    assert keys.list("user:a")[0].used_at is None
    keys.authenticate(new.secret)
    assert keys.list("user:a")[0].used_at is not None


def test_a_key_for_some_services_is_for_no_others(keys: Keys) -> None:
    some, every = keys.create("user:a", services=["zimage"]).key, keys.create("user:a").key
    keys.check_service(some, "zimage")
    keys.check_service(every, "lora_training")
    for service in ("tts", "zimag", "zimage ", "zimage,tts", ""):
        with pytest.raises(IdentityError, match="is for zimage; not for"):
            keys.check_service(some, service)


# Limits.


def test_B13_a_days_limit_is_a_limit(keys: Keys, clock: Any) -> None:
    clock.now = 1_800_000_000 // DAY * DAY + DAY - 10
    key = keys.create("user:a", daily_limit=100).key
    keys.spend(key, "call-1", 60)
    keys.spend(key, "call-1", 60)  # the same call, sent again
    keys.spend(key, "call-2", 40)
    with pytest.raises(IdentityError, match="may spend 100 base units a day; 100 are spent, the call costs 1"):
        keys.spend(key, "call-3", 1)
    keys.settle(key.account, "call-2", 15)
    keys.settle(key.account, "call-1", 10**9)  # never more than was counted
    keys.spend(key, "call-3", 25)
    clock.now += 10  # the next day, UTC
    keys.spend(key, "call-4", 100)
    with pytest.raises(IdentityError, match="100 are spent"):
        keys.spend(key, "call-5", 1)
    keys.settle(key.account, "call-4", 0)
    keys.spend(key, "call-5", 100)


def test_limits_may_be_zero_absent_and_changed(keys: Keys) -> None:
    zero, free = keys.create("user:a", daily_limit=0).key, keys.create("user:a").key
    with pytest.raises(IdentityError, match="may spend 0 base units"):
        keys.spend(zero, "call-1", 1)
    keys.spend(free, "call-2", 2**63 - 1)
    keys.set_daily_limit("user:a", zero.id, 10)
    keys.spend(zero, "call-1", 10)  # the key at hand is the old one, the limit is the database's
    keys.set_daily_limit("user:a", zero.id, None)
    keys.spend(zero, "call-3", 2**63 - 1)


def test_a_hold_that_fails_counts_nothing(keys: Keys, connection: Connection, clock: Any) -> None:
    key = keys.create("user:a", daily_limit=100).key
    with pytest.raises(RuntimeError), immediate(connection):
        keys.spend(key, "call-1", 60)
        raise RuntimeError("the ledger refused")
    assert keys.spent(key.id, int(clock()) // DAY) == 0


def test_B1_B13_many_at_once_pass_a_limit_not_by_one(keys: Keys, ledger_path: pathlib.Path, clock: Any) -> None:
    key = keys.create("user:a", daily_limit=100).key
    passed: list[int] = []
    gate = threading.Barrier(8)

    def spend(worker: int) -> None:
        connection = open_database(ledger_path, busy_timeout_s=120.0)
        mine = Keys(connection, PEPPER, clock=clock)
        gate.wait()
        for call in range(5):
            try:
                mine.spend(key, f"call-{worker}-{call}", 9)
                passed.append(9)
            except IdentityError:
                pass
        connection.close()

    threads = [threading.Thread(target=spend, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 11
    assert keys.spent(key.id, int(clock()) // DAY) == 99


def test_an_account_has_so_many_keys(keys: Keys) -> None:
    first = keys.create("user:a")
    for _ in range(KEYS_MAX - 1):
        keys.create("user:a")
    with pytest.raises(IdentityError, match=f"the account has {KEYS_MAX} keys; revoke one first"):
        keys.create("user:a")
    keys.revoke("user:a", first.key.id)
    keys.create("user:a")
    keys.create("user:b")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"account": "user:nobody"}, NotFoundError),
        ({"name": "x" * 65}, IdentifierError),
        ({"name": "a\nb"}, IdentifierError),
        ({"name": "\x1b[2J"}, IdentifierError),
        ({"services": []}, IdentifierError),
        ({"services": "zimage"}, IdentifierError),
        ({"services": ["Z image"]}, IdentifierError),
        ({"daily_limit": -1}, AmountError),
        ({"daily_limit": 1.0}, AmountError),
        ({"daily_limit": True}, AmountError),
        ({"daily_limit": "5"}, AmountError),
        ({"daily_limit": float("nan")}, AmountError),
        ({"daily_limit": 2**63}, AmountError),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(
    keys: Keys, connection: Connection, options: dict[str, Any], error: type[PaymentsError]
) -> None:
    with pytest.raises(error):
        keys.create(**{"account": "user:a", **options})
    assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (0,)


def test_a_short_pepper_is_refused(connection: Connection) -> None:
    with pytest.raises(ConfigurationError, match="the pepper has 31 bytes; it must have 32 or more"):
        Keys(connection, bytes(31))


# Where a key must never be seen.


def test_B12_no_repr_and_no_error_has_the_secret(keys: Keys) -> None:
    new = keys.create("user:a", daily_limit=1)
    shown = [repr(new), str(new), repr(new.key), repr(keys), repr(vars(new.key)), repr(keys.list("user:a"))]
    try:
        keys.spend(new.key, "call-1", 5)
    except IdentityError as error:
        shown += [str(error), "".join(traceback.format_exception(error))]
    for text in shown:
        assert new.secret[20:40] not in text
        assert PEPPER.hex() not in text
        assert repr(PEPPER) not in text


@pytest.mark.parametrize(
    "log",
    [
        lambda logger, secret: logger.info("GET /?key=%s HTTP/1.1", secret),
        lambda logger, secret: logger.info("Authorization: Bearer " + secret),
        lambda logger, secret: logger.info({"key": secret}),
        lambda logger, secret: logger.info("%(key)s", {"key": secret}),
        lambda logger, secret: logger.info("two: %s,%s", secret, secret),
        lambda logger, secret: logger.info("%s %s", secret),
        lambda logger, secret: logger.info(f"%d {secret}", "x"),
        lambda logger, secret: logger.error("failed", exc_info=ValueError(f"bad header {secret}")),
        lambda logger, secret: logger.info("stack", extra={}, stack_info=True),
    ],
)
def test_B12_no_key_passes_a_log(keys: Keys, log: Any, tmp_path: pathlib.Path) -> None:
    secret = keys.create("user:a").secret
    logger = logging.Logger("without parents")
    handler = logging.FileHandler(tmp_path / "log")
    handler.addFilter(RedactKeys())
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        log(logger, secret)
    finally:
        logger.removeHandler(handler)
        handler.close()
    text = (tmp_path / "log").read_text()
    assert text
    assert secret[8:24] not in text


def test_redaction_leaves_the_rest() -> None:
    assert redact("a cutedsl_ b") == "a cutedsl_ b"
    assert redact(f"a=cutedsl_{'x' * 49}&b=1 cutedsl_{'y' * 16}") == "a=cutedsl_[redacted]&b=1 cutedsl_[redacted]"
