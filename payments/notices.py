"""E-mails about an account: a deposit came, the balance runs low. Nothing is charged or topped up by itself.

    notices = Notices(connection, mail, decimals=6)
    notices.subscribe(account, "ann@example.org", low_balance=5_000_000)
    notices.deposited(account, 12_000_000)      # a line in the database; never raises, never waits for a server
    notices.balance_is(account, available)
    await notices.send_due()                    # `run` does it for ever

Deposits of some minutes come in one e-mail. A low balance is told when it is crossed, at most once a day. Mail is best
effort: what cannot be sent is tried again for some hours, then given up, and no call and no deposit notices.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.message
import email.utils
import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from diffusionz.payments.database import Connection, immediate
from diffusionz.payments.errors import AmountError, ConfigurationError, IdentifierError, NotFoundError, PaymentsError

if TYPE_CHECKING:
    from diffusionz.payments.settings import Settings

logger = logging.getLogger(__name__)

COLLECT_S = 60  # a deposit's e-mail waits this long for more deposits
DEPOSIT_EVERY_S = 600
LOW_EVERY_S = 86_400
TIMEOUT_S = 20.0  # of one e-mail, with the connection
LEASE_S = 120  # a sender that died in the middle of an e-mail is replaced after this
TRIES_MAX = 8  # the last after some two hours
AMOUNT_MAX = 2**63 - 1

_EMAIL = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,188}[A-Za-z0-9])?")

MIGRATIONS = [
    (
        "001_notices",
        """
        CREATE TABLE notice_subscriptions (
            account TEXT PRIMARY KEY REFERENCES accounts (name),
            email TEXT NOT NULL,
            low_balance INTEGER CHECK (low_balance > 0),    -- base units; NULL: no notice
            is_low INTEGER NOT NULL DEFAULT 0
        ) STRICT, WITHOUT ROWID;
        CREATE TABLE notices (
            id INTEGER PRIMARY KEY,
            account TEXT NOT NULL REFERENCES accounts (name),
            kind TEXT NOT NULL CHECK (kind IN ('deposit', 'low_balance')),
            tokens INTEGER NOT NULL,                        -- deposited in all, or what is left; base units
            count INTEGER NOT NULL DEFAULT 1,               -- of deposits
            state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'sending', 'sent', 'given_up')),
            created_at INTEGER NOT NULL,                    -- seconds since 1970
            due_at INTEGER NOT NULL,
            tries INTEGER NOT NULL DEFAULT 0
        ) STRICT;
        CREATE UNIQUE INDEX notices_waiting ON notices (account, kind) WHERE state = 'waiting';
        CREATE INDEX notices_due ON notices (due_at) WHERE state IN ('waiting', 'sending');
        CREATE INDEX notices_by_account ON notices (account, kind, created_at);
        """,
    )
]


@dataclasses.dataclass(frozen=True)
class Mail:
    """The server that takes e-mails, and whom they are from."""

    host: str
    port: int
    sender: str
    security: Literal["starttls", "tls", "none"] = "starttls"
    user: str | None = None
    password: str | None = dataclasses.field(default=None, repr=False)


class Notices:
    """The subscriptions and what waits to be sent. mail None: nothing is written down, nothing is sent.

    decimals, symbol: the token's, for amounts that people read. site: where they may deposit more.
    """

    def __init__(
        self,
        connection: Connection,
        mail: Mail | None,
        *,
        decimals: int,
        symbol: str = "CUTEDSL",
        site: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        if mail is not None:
            try:
                import aiosmtplib  # noqa: F401
            except ImportError:
                raise ConfigurationError(
                    "smtp_host is set, and e-mails need aiosmtplib: pip install aiosmtplib"
                ) from None
        self._connection = connection
        self._mail = mail
        self._decimals, self._symbol, self._site = decimals, symbol, site
        self._clock = clock

    @classmethod
    def from_settings(cls, settings: Settings, connection: Connection) -> Notices:
        """Raises ConfigurationError."""
        mail = None
        if settings.smtp_host is not None:
            password = settings.secret("smtp_password_file").decode() if settings.smtp_user else None
            assert settings.mail_from is not None
            security: Literal["starttls", "tls", "none"] = settings.smtp_security  # type: ignore[assignment]
            mail = Mail(
                settings.smtp_host, settings.smtp_port, settings.mail_from, security, settings.smtp_user, password
            )
        site = settings.sign_in_uri or (f"https://{settings.domain}" if settings.domain else "")
        return cls(connection, mail, decimals=settings.token_decimals, symbol=settings.token_symbol, site=site)

    def subscribe(self, account: str, email: str, *, low_balance: int | None = None) -> None:
        """From now on the account's owner is told of deposits, and when less than low_balance base units are left.

        Raises IdentifierError, AmountError, NotFoundError.
        """
        if not isinstance(email, str) or not _EMAIL.fullmatch(email):
            raise IdentifierError(f"e-mail address is {str(email)[:80]!r}; it must look like ann@example.org")
        if low_balance is not None and (type(low_balance) is not int or not 1 <= low_balance <= AMOUNT_MAX):
            raise AmountError(f"low_balance is {low_balance!r}; it must be a whole number from 1 to {AMOUNT_MAX}")
        with immediate(self._connection):
            if not self._connection.execute("SELECT 1 FROM accounts WHERE name = ?", (account,)).fetchone():
                raise NotFoundError(f"there is no account {account!r}")
            self._connection.execute(
                "INSERT INTO notice_subscriptions (account, email, low_balance) VALUES (?, ?, ?)"
                " ON CONFLICT (account) DO UPDATE SET email = excluded.email, low_balance = excluded.low_balance",
                (account, email, low_balance),
            )

    def unsubscribe(self, account: str) -> None:
        """Forgets the account's address; what waits is not sent."""
        with immediate(self._connection):
            self._connection.execute("DELETE FROM notice_subscriptions WHERE account = ?", (account,))

    def deposited(self, account: str, tokens: int) -> None:
        """Notes a deposit of base units. Call it after the deposit is committed."""
        if self._mail is not None:
            self._note(self._note_deposit, account, tokens)

    def balance_is(self, account: str, available: int) -> None:
        """Notes how many base units are left, after a call or a deposit. Call it after that is committed."""
        if self._mail is not None:
            self._note(self._note_balance, account, available)

    def _note(self, write: Callable[[str, int, int], None], account: str, tokens: int) -> None:
        try:
            with immediate(self._connection):
                write(account, tokens, int(self._clock()))
        except Exception:
            logger.exception("a notice to %s was lost", account)

    def _note_deposit(self, account: str, tokens: int, now: int) -> None:
        if not self._connection.execute("SELECT 1 FROM notice_subscriptions WHERE account = ?", (account,)).fetchone():
            return
        (last,) = self._connection.execute(
            "SELECT coalesce(max(created_at), 0) FROM notices WHERE account = ? AND kind = 'deposit'"
            " AND state <> 'waiting'",
            (account,),
        ).fetchone()
        self._connection.execute(
            "INSERT INTO notices (account, kind, tokens, created_at, due_at) VALUES (?, 'deposit', ?, ?, ?)"
            " ON CONFLICT (account, kind) WHERE state = 'waiting'"
            " DO UPDATE SET tokens = tokens + excluded.tokens, count = count + 1",
            (account, tokens, now, max(now + COLLECT_S, last + DEPOSIT_EVERY_S)),
        )

    def _note_balance(self, account: str, available: int, now: int) -> None:
        row = self._connection.execute(
            "SELECT low_balance, is_low FROM notice_subscriptions WHERE account = ?", (account,)
        ).fetchone()
        if row is None or row[0] is None:
            return
        low = available < row[0]
        if low != bool(row[1]):
            self._connection.execute(
                "UPDATE notice_subscriptions SET is_low = ? WHERE account = ?", (int(low), account)
            )
        (last,) = self._connection.execute(
            "SELECT coalesce(max(created_at), 0) FROM notices WHERE account = ? AND kind = 'low_balance'", (account,)
        ).fetchone()
        if low and not row[1] and now - last >= LOW_EVERY_S:
            self._connection.execute(
                "INSERT INTO notices (account, kind, tokens, created_at, due_at) VALUES (?, 'low_balance', ?, ?, ?)"
                " ON CONFLICT (account, kind) WHERE state = 'waiting' DO UPDATE SET tokens = excluded.tokens",
                (account, available, now, now),
            )

    # Sending.

    async def send_due(self) -> int:
        """Sends what is due, one e-mail after another; how many were. Never raises for what a server does."""
        sent = 0
        while self._mail is not None and (notice := self._take()) is not None:
            id, kind, tokens, count, tries, address = notice
            try:
                await self._send(self._mail, self._message(self._mail, kind, tokens, count, address))
            except Exception as error:
                # The address is personal, and so may be what the server said of it: neither is logged.
                refused = _is_permanent(error)
                final = refused or tries >= TRIES_MAX
                logger.warning("notice %d: %s%s", id, type(error).__name__, ", given up" if final else "")
                self._resolve(id, "given_up" if final else "sending", int(self._clock()) + 30 * 2**tries)
            else:
                self._resolve(id, "sent", 0)
                sent += 1
        return sent

    async def run(self, interval_s: float = 15.0) -> None:
        """Sends for ever."""
        while True:
            try:
                await self.send_due()
            except PaymentsError as error:
                logger.error("notices cannot be read: %s", error)
            await asyncio.sleep(interval_s)

    def _take(self) -> tuple[int, str, int, int, int, str] | None:
        """The next due notice, kept from other senders for LEASE_S."""
        now = int(self._clock())
        with immediate(self._connection):
            self._connection.execute(
                "UPDATE notices SET state = 'given_up' WHERE state IN ('waiting', 'sending')"
                " AND account NOT IN (SELECT account FROM notice_subscriptions)"
            )
            row = self._connection.execute(
                "UPDATE notices SET state = 'sending', due_at = ?, tries = tries + 1 WHERE id ="
                " (SELECT id FROM notices WHERE state IN ('waiting', 'sending') AND due_at <= ? ORDER BY due_at, id"
                " LIMIT 1) RETURNING id, kind, tokens, count, tries, account",
                (now + LEASE_S, now),
            ).fetchone()
            if row is None:
                return None
            (address,) = self._connection.execute(
                "SELECT email FROM notice_subscriptions WHERE account = ?", (row[5],)
            ).fetchone()
        return (*row[:5], address)

    def _resolve(self, id: int, state: str, due_at: int) -> None:
        with immediate(self._connection):
            self._connection.execute("UPDATE notices SET state = ?, due_at = ? WHERE id = ?", (state, due_at, id))

    def _message(self, mail: Mail, kind: str, tokens: int, count: int, address: str) -> email.message.EmailMessage:
        amount = f"{format_tokens(tokens, self._decimals)} {self._symbol}"
        if kind == "deposit":
            subject = f"{amount} arrived"
            text = f"{'A deposit' if count == 1 else f'{count} deposits'} of {amount} arrived and can be spent."
        else:
            subject = f"{amount} left"
            text = f"Your balance is down to {amount}. Nothing is charged by itself; to go on, deposit more."
        message = email.message.EmailMessage()
        message["From"], message["To"], message["Subject"] = mail.sender, address, subject
        message["Date"] = email.utils.formatdate(self._clock())
        message["Message-ID"] = email.utils.make_msgid(domain=mail.sender.rpartition("@")[2])
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(f"{text}\n{self._site}\n" if self._site else f"{text}\n")
        return message

    async def _send(self, mail: Mail, message: email.message.EmailMessage) -> None:
        import aiosmtplib

        async with asyncio.timeout(TIMEOUT_S):
            await aiosmtplib.send(
                message,
                hostname=mail.host,
                port=mail.port,
                username=mail.user,
                password=mail.password,
                use_tls=mail.security == "tls",
                start_tls=mail.security == "starttls",
                timeout=TIMEOUT_S,
            )


def _is_permanent(error: Exception) -> bool:
    """Whether the server refused the message or its reader for good: codes from 500."""
    import aiosmtplib

    if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
        return all(recipient.code >= 500 for recipient in error.recipients)
    if isinstance(error, aiosmtplib.SMTPAuthenticationError):
        return False  # the operator's mistake, not the reader's
    return isinstance(error, aiosmtplib.SMTPResponseException) and error.code >= 500


def format_tokens(tokens: int, decimals: int) -> str:
    """Base units as a decimal number of whole tokens, exact: (1_500_000, 6) -> "1.5"."""
    whole, fraction = divmod(tokens, 10**decimals)
    return f"{whole}.{fraction:0{decimals}d}".rstrip("0").rstrip(".") if decimals else str(whole)
