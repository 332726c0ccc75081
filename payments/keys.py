"""API keys: what a program shows with every call, made once by the owner of an account.

    new = keys.create(account, services=["zimage"], daily_limit=5_000_000)
    new.secret                          # "cutedsl_...": shown once, kept nowhere
    key = keys.authenticate(secret)     # Key, or IdentityError
    keys.check_service(key, "zimage")
    with immediate(connection):
        keys.spend(key, call_id, tokens)        # IdentityError beyond the day's limit
        ... hold the same tokens in the ledger ...

A key is cutedsl_ + 43 letters and digits (256 bits) + 6 that check them, so that a mistyped key needs no look-up and a
leaked one is found by scanners of secrets. The database has HMAC-SHA256(pepper, key): whoever reads it has no key, and
without the pepper's file cannot even try one.
"""

from __future__ import annotations

import binascii
import contextlib
import dataclasses
import hashlib
import hmac
import json
import logging
import re
import secrets
import string
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffusionz.payments.database import Connection, immediate, without_waiting
from diffusionz.payments.errors import (
    AmountError,
    ConfigurationError,
    IdentifierError,
    IdentityError,
    NotFoundError,
    StorageError,
)

if TYPE_CHECKING:
    from diffusionz.payments.settings import Settings

PREFIX = "cutedsl_"
BITS = 256
SHOWN = 8  # characters of the secret that name a key in lists; 208 bits stay unknown
PEPPER_BYTES = 32  # at least
KEYS_MAX = 50  # of an account, not revoked
DAY_S = 86_400
TOUCH_S = 60  # how exact "last used" is: a write for every call would cost more than the call's hold
AMOUNT_MAX = 2**63 - 1

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_BODY, _CHECK = 43, 6  # 62**43 > 2**256, 62**6 > 2**32
_KEY = re.compile(rf"{PREFIX}([0-9A-Za-z]{{{_BODY}}})([0-9A-Za-z]{{{_CHECK}}})")
_ANY_KEY = re.compile(rf"({PREFIX})[0-9A-Za-z]{{16,}}")

MIGRATIONS = [
    (
        "001_keys",
        """
        CREATE TABLE api_keys (
            id TEXT PRIMARY KEY,                        -- the secret's first letters, without the prefix
            digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32),
            account TEXT NOT NULL REFERENCES accounts (name),
            name TEXT NOT NULL,
            services TEXT CHECK (json_valid(services)), -- a list; NULL: all
            daily_limit INTEGER CHECK (daily_limit >= 0),  -- base units of the token; NULL: none
            created_at INTEGER NOT NULL,                -- seconds since 1970
            used_at INTEGER,
            revoked_at INTEGER
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX api_keys_by_account ON api_keys (account);
        CREATE TABLE key_spending (
            key TEXT NOT NULL REFERENCES api_keys (id),
            call_id TEXT NOT NULL,
            day INTEGER NOT NULL,                       -- days since 1970, UTC
            tokens INTEGER NOT NULL CHECK (tokens >= 0),
            PRIMARY KEY (key, call_id)
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX key_spending_by_day ON key_spending (key, day, tokens);
        CREATE TRIGGER api_keys_stay BEFORE DELETE ON api_keys
            BEGIN SELECT RAISE(ABORT, 'a key is revoked, never deleted'); END;
        CREATE TRIGGER api_keys_revoked_for_ever BEFORE UPDATE ON api_keys
            WHEN OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS NOT OLD.revoked_at
            OR NEW.digest IS NOT OLD.digest OR NEW.account IS NOT OLD.account
            BEGIN SELECT RAISE(ABORT, 'a key keeps its secret and its account, and stays revoked'); END;
        """,
    )
]


@dataclasses.dataclass(frozen=True)
class Key:
    """What is known of a key; never its secret. Times are in seconds since 1970, limits in base units of the token."""

    id: str
    account: str
    name: str
    services: tuple[str, ...] | None  # None: all
    daily_limit: int | None  # None: the account's balance is the limit
    created_at: int
    used_at: int | None  # to the minute, as long as the ledger could be written
    revoked_at: int | None

    @property
    def shown(self) -> str:
        """How lists name it."""
        return f"{PREFIX}{self.id}…"


@dataclasses.dataclass(frozen=True)
class NewKey:
    """A key that was just made; the only place that ever has the secret."""

    key: Key
    secret: str = dataclasses.field(repr=False)


class Keys:
    """The keys in the database. pepper: PEPPER_BYTES or more that only the servers have."""

    def __init__(self, connection: Connection, pepper: bytes, *, clock: Callable[[], float] = time.time) -> None:
        if len(pepper) < PEPPER_BYTES:
            raise ConfigurationError(f"the pepper has {len(pepper)} bytes; it must have {PEPPER_BYTES} or more")
        self._connection = connection
        self._pepper = pepper
        self._clock = clock

    @classmethod
    def from_settings(cls, settings: Settings, connection: Connection) -> Keys:
        """Raises ConfigurationError."""
        return cls(connection, settings.secret("pepper_file"))

    def create(
        self, account: str, *, name: str = "", services: Sequence[str] | None = None, daily_limit: int | None = None
    ) -> NewKey:
        """A new key of the account, for all services or some, with or without a limit a day (UTC).

        Raises IdentifierError, AmountError, NotFoundError for an account that the ledger has not, IdentityError when
        the account has KEYS_MAX keys.
        """
        if len(name) > 64 or (name and not name.isprintable()):
            raise IdentifierError(f"a key's name is {name[:80]!r}; it must be up to 64 printable characters")
        if services is not None and (
            isinstance(services, str)
            or not services
            or not all(re.fullmatch(r"[a-z][a-z0-9_]{0,31}", s) for s in services)
        ):
            raise IdentifierError(f"services are {services!r}; they must be a list of names, or None for all")
        if daily_limit is not None and (type(daily_limit) is not int or not 0 <= daily_limit <= AMOUNT_MAX):
            raise AmountError(f"daily_limit is {daily_limit!r}; it must be a whole number from 0 to {AMOUNT_MAX}")
        body = _base62(secrets.randbits(BITS), _BODY)
        secret = PREFIX + body + _checksum(body)
        with immediate(self._connection):
            if not self._connection.execute("SELECT 1 FROM accounts WHERE name = ?", (account,)).fetchone():
                raise NotFoundError(f"there is no account {account!r}")
            (count,) = self._connection.execute(
                "SELECT count(*) FROM api_keys WHERE account = ? AND revoked_at IS NULL", (account,)
            ).fetchone()
            if count >= KEYS_MAX:
                raise IdentityError(f"the account has {count} keys; revoke one first, at most {KEYS_MAX} are allowed")
            self._connection.execute(
                "INSERT INTO api_keys (id, digest, account, name, services, daily_limit, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    body[:SHOWN],
                    self._digest(secret),
                    account,
                    name,
                    None if services is None else json.dumps(sorted(set(services))),
                    daily_limit,
                    int(self._clock()),
                ),
            )
        return NewKey(self._key("id = ?", body[:SHOWN]), secret)

    def authenticate(self, secret: str) -> Key:
        """The key of a secret. Raises IdentityError, in the same words whether there was never such a key or it is
        revoked: nobody learns which."""
        match = _KEY.fullmatch(secret) if isinstance(secret, str) else None
        # An index finds the digest, in a time that tells something of the digest and nothing of the secret.
        key = None
        if match and hmac.compare_digest(_checksum(match[1]), match[2]):
            key = self._find("digest = ? AND revoked_at IS NULL", self._digest(secret))
        if key is None:
            raise IdentityError("the API key is not valid; it must be one that was made here and is not revoked")
        now = int(self._clock())
        if key.used_at is None or now - key.used_at >= TOUCH_S:
            # Worth neither a wait nor a failure: a ledger that cannot be written is read all the same.
            with contextlib.suppress(StorageError), without_waiting(self._connection), immediate(self._connection):
                self._connection.execute("UPDATE api_keys SET used_at = ? WHERE id = ?", (now, key.id))
        return key

    def check_service(self, key: Key, service: str) -> None:
        """Raises IdentityError when the key is not for the service."""
        if key.services is not None and service not in key.services:
            raise IdentityError(f"the key {key.shown} is for {', '.join(key.services)}; not for {service[:40]!r}")

    def spend(self, key: Key, call_id: str, tokens: int) -> None:
        """Counts a call's base units against the key's limit of the day; a call counts once, however often it is sent.

        In the same transaction as the ledger's hold, so that both or none are there. Raises IdentityError when the
        limit would be passed, or the key was revoked meanwhile.
        """
        day = int(self._clock()) // DAY_S
        with immediate(self._connection):
            current = self._key("id = ?", key.id)  # the limit may have been changed since the key was shown
            if current.revoked_at is not None:
                raise IdentityError(f"the key {key.shown} is revoked")
            if current.daily_limit is None or self._spent_by(key.id, call_id) is not None:
                return
            spent = self.spent(key.id, day)
            if spent + tokens > current.daily_limit:
                raise IdentityError(
                    f"the key {key.shown} may spend {current.daily_limit} base units a day; {spent} are spent, "
                    f"the call costs {tokens}"
                )
            self._connection.execute(
                "INSERT INTO key_spending (key, call_id, day, tokens) VALUES (?, ?, ?, ?)",
                (key.id, call_id, day, tokens),
            )

    def settle(self, account: str, call_id: str, tokens: int) -> None:
        """What the call cost in the end, 0 when it was voided, whichever of the account's keys it was made with; never
        more than was counted before."""
        with immediate(self._connection):
            self._connection.execute(
                "UPDATE key_spending SET tokens = min(tokens, ?) WHERE call_id = ?"
                " AND key IN (SELECT id FROM api_keys WHERE account = ?)",
                (tokens, call_id, account),
            )

    def spent(self, id: str, day: int) -> int:
        """Base units that count against the key's limit on a day (days since 1970, UTC)."""
        (spent,) = self._connection.execute(
            "SELECT coalesce(sum(tokens), 0) FROM key_spending WHERE key = ? AND day = ?", (id, day)
        ).fetchone()
        return int(spent)

    def set_daily_limit(self, account: str, id: str, daily_limit: int | None) -> Key:
        """Raises AmountError, and NotFoundError when the account has no such key."""
        if daily_limit is not None and (type(daily_limit) is not int or not 0 <= daily_limit <= AMOUNT_MAX):
            raise AmountError(f"daily_limit is {daily_limit!r}; it must be a whole number from 0 to {AMOUNT_MAX}")
        return self._change(account, id, "daily_limit = ?", daily_limit)

    def revoke(self, account: str, id: str) -> Key:
        """From now on the key opens nothing; calls that it began are still resolved. Doing it again changes nothing.

        Raises NotFoundError when the account has no such key.
        """
        return self._change(account, id, "revoked_at = coalesce(revoked_at, ?)", int(self._clock()))

    def list(self, account: str) -> list[Key]:
        """The account's keys, revoked ones too, oldest first."""
        rows = self._connection.execute(f"{_SELECT} WHERE account = ? ORDER BY created_at, id", (account,))
        return [_key(row) for row in rows]

    def _change(self, account: str, id: str, change: str, value: int | None) -> Key:
        with immediate(self._connection):
            changed = self._connection.execute(
                f"UPDATE api_keys SET {change} WHERE id = ? AND account = ?", (value, id, account)
            )
            if changed.rowcount == 0:
                raise NotFoundError(f"{account} has no key {id[:SHOWN]!r}")
        return self._key("id = ?", id)

    def _spent_by(self, id: str, call_id: str) -> int | None:
        row = self._connection.execute(
            "SELECT tokens FROM key_spending WHERE key = ? AND call_id = ?", (id, call_id)
        ).fetchone()
        return None if row is None else int(row[0])

    def _find(self, condition: str, value: str | bytes) -> Key | None:
        row = self._connection.execute(f"{_SELECT} WHERE {condition}", (value,)).fetchone()
        return None if row is None else _key(row)

    def _key(self, condition: str, value: str) -> Key:
        key = self._find(condition, value)
        assert key is not None
        return key

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._pepper, secret.encode("ascii"), hashlib.sha256)


_SELECT = "SELECT id, account, name, services, daily_limit, created_at, used_at, revoked_at FROM api_keys"


def _key(row: tuple[object, ...]) -> Key:
    id, account, name, services, *rest = row
    return Key(id, account, name, None if services is None else tuple(json.loads(services)), *rest)  # type: ignore


def redact(text: str) -> str:
    """The text with every API key in it made unusable, for logs and messages."""
    return _ANY_KEY.sub(r"\1[redacted]", text)


class RedactKeys(logging.Filter):
    """For a log's handler: no API key passes, wherever in a record it is.

    handler.addFilter(RedactKeys())
    """

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # the arguments do not fit the format; logging says so by itself, with both in clear
            message = f"{record.msg} (its arguments do not fit)"
        record.msg, record.args = redact(message), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True


def _checksum(body: str) -> str:
    return _base62(binascii.crc32(body.encode("ascii")), _CHECK)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
