"""Browsers that signed in: a random token each, until it is closed or SESSION_S have passed.

The database has the tokens' digests alone; whoever reads it is nobody's browser.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable

from diffusionz.payments.database import Connection, immediate

SESSION_S = 12 * 3600
TOKEN_BYTES = 32

MIGRATIONS = [
    (
        "001_sessions",
        """
        CREATE TABLE sessions (
            digest BLOB PRIMARY KEY,                    -- SHA-256 of the token
            account TEXT NOT NULL REFERENCES accounts (name),
            expires_at INTEGER NOT NULL                 -- seconds since 1970
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX sessions_by_expiry ON sessions (expires_at);
        """,
    )
]


class Sessions:
    """The sessions in the database."""

    def __init__(self, connection: Connection, *, clock: Callable[[], float] = time.time) -> None:
        self._connection = connection
        self._clock = clock

    def open(self, account: str) -> str:
        """The token of a new session of the account, which has just signed in. Raises StorageError."""
        token, now = secrets.token_urlsafe(TOKEN_BYTES), int(self._clock())
        with immediate(self._connection):
            self._connection.execute("DELETE FROM sessions WHERE expires_at <= ?", (now,))
            self._connection.execute(
                "INSERT INTO sessions (digest, account, expires_at) VALUES (?, ?, ?)",
                (_digest(token), account, now + SESSION_S),
            )
        return token

    def account(self, token: str) -> str | None:
        """The account whose open session it is; None for any other text."""
        row = self._connection.execute(
            "SELECT account FROM sessions WHERE digest = ? AND expires_at > ?", (_digest(token), int(self._clock()))
        ).fetchone()
        return None if row is None else str(row[0])

    def close(self, token: str) -> None:
        """From now on the token opens nothing. Doing it again changes nothing. Raises StorageError."""
        with immediate(self._connection):
            self._connection.execute("DELETE FROM sessions WHERE digest = ?", (_digest(token),))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
