"""Notices: what is written down when, and e-mails through a real SMTP server that behaves and one that does not."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email
import email.message
import email.policy
import itertools
import logging
import pathlib
import ssl
import sys
import time
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from diffusionz.payments import notices as notices_module
from diffusionz.payments.database import Connection, open_database
from diffusionz.payments.errors import AmountError, ConfigurationError, IdentifierError, NotFoundError
from diffusionz.payments.ledger import Ledger
from diffusionz.payments.notices import COLLECT_S, DEPOSIT_EVERY_S, LOW_EVERY_S, TRIES_MAX, Mail, Notices, format_tokens

ANN = "ann@example.org"


class Smtp:
    """An SMTP server on loopback that keeps what it takes. `refuse`: command -> what to answer instead of yes."""

    def __init__(self) -> None:
        self.messages: list[tuple[list[str], email.message.EmailMessage]] = []
        self.refuse: dict[str, bytes | None] = {}  # None: never answer
        self.extensions: list[bytes] = []
        self.commands: list[str] = []
        self.tls: ssl.SSLContext | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def answer(command: str, usual: bytes) -> bool:
            reply = self.refuse.get(command, usual)
            if reply is None:
                await asyncio.sleep(60)
            writer.write((reply or b"") + b"\r\n")
            await writer.drain()
            return reply == usual

        try:
            recipients: list[str] = []
            await answer("CONNECT", b"220 loopback")
            while line := await reader.readline():
                verb, _, rest = line.decode().strip().partition(" ")
                self.commands.append(verb.upper())
                match verb.upper():
                    case "EHLO":
                        lines = [b"loopback", *self.extensions]
                        usual = b"\r\n".join(
                            (b"250 " if i == len(lines) - 1 else b"250-") + one for i, one in enumerate(lines)
                        )
                        await answer("EHLO", usual)
                    case "RCPT":
                        if await answer("RCPT", b"250 ok"):
                            recipients.append(rest.partition("<")[2].partition(">")[0])
                    case "DATA":
                        if await answer("DATA", b"354 go on"):
                            data = await reader.readuntil(b"\r\n.\r\n")
                            message = email.message_from_bytes(data[:-3], policy=email.policy.default)
                            if await answer("END", b"250 taken"):
                                self.messages.append((recipients, message))  # type: ignore[arg-type]
                            recipients = []
                    case "STARTTLS":
                        await answer("STARTTLS", b"220 go on")
                        assert self.tls is not None
                        await writer.start_tls(self.tls)
                    case "AUTH":
                        await answer("AUTH", b"235 welcome")
                    case "QUIT":
                        await answer("QUIT", b"221 bye")
                        break
                    case other:
                        await answer(other, b"250 ok")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture
def smtp() -> Smtp:
    return Smtp()


@pytest.fixture
def notices(ledger: Ledger, clock: Any) -> Notices:
    made = Notices(
        ledger.connection,
        Mail("127.0.0.1", 1, "noreply@example.org", "none"),
        decimals=6,
        site="https://example.org",
        clock=clock,
    )
    made.subscribe("user:a", ANN, low_balance=5_000_000)
    return made


def deliver(smtp: Smtp, notices: Notices) -> int:
    """notices.send_due() while the server runs."""

    async def main() -> int:
        mail = notices._mail
        assert mail is not None
        tls = smtp.tls if mail.security == "tls" else None
        server = await asyncio.start_server(smtp.serve, "127.0.0.1", 0, ssl=tls)
        notices._mail = dataclasses.replace(mail, port=server.sockets[0].getsockname()[1])
        try:
            return await notices.send_due()
        finally:
            server.close()

    return asyncio.run(main())


def states(connection: Connection) -> list[str]:
    return [state for (state,) in connection.execute("SELECT state FROM notices ORDER BY id")]


def test_a_deposit_is_told(smtp: Smtp, notices: Notices, clock: Any, connection: Connection) -> None:
    notices.deposited("user:a", 12_500_000)
    assert deliver(smtp, notices) == 0  # it waits for more
    clock.now += COLLECT_S
    assert deliver(smtp, notices) == 1
    ((recipients, message),) = smtp.messages
    assert recipients == [ANN]
    assert (message["From"], message["To"]) == ("noreply@example.org", ANN)
    assert message["Subject"] == "12.5 CUTEDSL arrived"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Message-ID"].endswith("@example.org>")
    assert message.get_content().splitlines() == [
        "A deposit of 12.5 CUTEDSL arrived and can be spent.",
        "https://example.org",
    ]
    assert deliver(smtp, notices) == 0
    assert states(connection) == ["sent"]


def test_deposits_of_some_minutes_come_in_one_e_mail(smtp: Smtp, notices: Notices, clock: Any) -> None:
    for _ in range(3):
        notices.deposited("user:a", 1_000_000)
        clock.now += 10
    clock.now += COLLECT_S
    assert deliver(smtp, notices) == 1
    for _ in range(100):
        notices.deposited("user:a", 1)
    clock.now += COLLECT_S
    assert deliver(smtp, notices) == 0
    clock.now += DEPOSIT_EVERY_S
    assert deliver(smtp, notices) == 1
    assert [message["Subject"] for _, message in smtp.messages] == ["3 CUTEDSL arrived", "0.0001 CUTEDSL arrived"]
    assert "3 deposits of 3 CUTEDSL" in smtp.messages[0][1].get_content()


def test_a_low_balance_is_told_when_it_is_crossed_and_once_a_day(smtp: Smtp, notices: Notices, clock: Any) -> None:
    def told(*balances: int) -> int:
        for balance in balances:
            notices.balance_is("user:a", balance)
        return deliver(smtp, notices)

    assert told(9_000_000, 5_000_000) == 0
    assert told(4_999_999) == 1
    assert told(4_000_000, 3_000_000, 0) == 0
    assert told(9_000_000, 4_000_000) == 0  # crossed again, the same day
    clock.now += LOW_EVERY_S
    assert told(3_000_000) == 0  # it has been low all the time
    assert told(9_000_000, 1_000_000) == 1
    assert smtp.messages[0][1]["Subject"] == "4.999999 CUTEDSL left"
    assert "Nothing is charged by itself" in smtp.messages[0][1].get_content()


def test_who_did_not_ask_is_not_written_to(smtp: Smtp, notices: Notices, clock: Any, connection: Connection) -> None:
    notices.deposited("user:b", 1)
    notices.balance_is("user:b", 0)
    notices.subscribe("user:b", "bob@example.org")  # without a limit
    notices.balance_is("user:b", 0)
    assert states(connection) == []
    notices.deposited("user:b", 1)
    notices.unsubscribe("user:b")
    clock.now += COLLECT_S
    assert deliver(smtp, notices) == 0
    assert states(connection) == ["given_up"]


def test_without_a_server_nothing_is_written_down(ledger: Ledger, connection: Connection) -> None:
    notices = Notices(connection, None, decimals=6)
    notices.subscribe("user:a", ANN, low_balance=5)
    notices.deposited("user:a", 1)
    notices.balance_is("user:a", 1)
    assert states(connection) == []
    assert asyncio.run(notices.send_due()) == 0


@pytest.mark.parametrize(
    ("refuse", "state"),
    [
        ({"RCPT": b"550 no such user"}, "given_up"),
        ({"DATA": b"554 spam"}, "given_up"),
        ({"END": b"552 too much"}, "given_up"),
        ({"RCPT": b"451 later"}, "sending"),
        ({"END": b"451 later"}, "sending"),
        ({"CONNECT": b"421 busy"}, "sending"),
        ({"CONNECT": b"\xff\xfe garbage"}, "sending"),
        ({"MAIL": b""}, "sending"),
        ({"CONNECT": None}, "sending"),
        ({"END": None}, "sending"),
    ],
)
def test_a_server_that_refuses_or_hangs(
    smtp: Smtp,
    notices: Notices,
    clock: Any,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refuse: dict[str, bytes | None],
    state: str,
) -> None:
    notices.balance_is("user:a", 1)
    smtp.refuse = refuse
    with monkeypatch.context() as patch:
        if None in refuse.values():  # the others answer, however late
            patch.setattr(notices_module, "TIMEOUT_S", 0.5)
        before = time.monotonic()
        assert deliver(smtp, notices) == 0
        assert time.monotonic() - before < 40  # the server hangs for 60 s
    assert states(connection) == [state]
    assert ANN not in caplog.text
    smtp.refuse = {}
    clock.now += 60
    assert deliver(smtp, notices) == (state == "sending")


def test_a_server_that_is_away_is_tried_again_and_then_no_more(
    notices: Notices, clock: Any, connection: Connection
) -> None:
    """Port 1 of loopback refuses."""
    notices.balance_is("user:a", 1)
    tried_at = []
    for _ in range(10_000):
        before = connection.execute("SELECT tries FROM notices").fetchone()[0]
        asyncio.run(notices.send_due())
        tries, state = connection.execute("SELECT tries, state FROM notices").fetchone()
        if tries > before:
            tried_at.append(clock.now)
        if state == "given_up":
            break
        clock.now = connection.execute("SELECT due_at FROM notices").fetchone()[0]
    waits = [later - earlier for earlier, later in itertools.pairwise(tried_at)]
    assert waits == [60, 120, 240, 480, 960, 1920, 3840]
    assert len(tried_at) == TRIES_MAX


def test_a_notice_whose_sender_died_is_sent_by_another(smtp: Smtp, notices: Notices, clock: Any) -> None:
    notices.balance_is("user:a", 1)
    assert notices._take() is not None  # and then the process is killed
    assert deliver(smtp, notices) == 0
    clock.now += notices_module.LEASE_S
    assert deliver(smtp, notices) == 1


def test_a_password_is_never_sent_in_the_clear(smtp: Smtp, ledger: Ledger, clock: Any) -> None:
    """A server, or somebody between, that does not offer STARTTLS gets neither password nor e-mail."""
    mail = Mail("127.0.0.1", 1, "noreply@example.org", "starttls", "me", "the-password")
    notices = Notices(ledger.connection, mail, decimals=6, clock=clock)
    notices.subscribe("user:a", ANN, low_balance=5)
    notices.balance_is("user:a", 1)
    smtp.extensions = [b"AUTH PLAIN LOGIN"]
    assert deliver(smtp, notices) == 0
    assert not {"AUTH", "MAIL", "DATA"} & set(smtp.commands)
    assert "the-password" not in repr(mail)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A key and its own certificate for localhost, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


@pytest.mark.parametrize("security", ["tls", "starttls"])
@pytest.mark.parametrize("known", [True, False])
def test_a_server_is_who_its_certificate_says(
    smtp: Smtp,
    ledger: Ledger,
    clock: Any,
    certificate: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    security: Any,
    known: bool,
) -> None:
    smtp.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    smtp.tls.load_cert_chain(certificate)
    smtp.extensions = [b"STARTTLS", b"AUTH PLAIN"]
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    mail = Mail("localhost", 1, "noreply@example.org", security, "me", "the-password")
    notices = Notices(ledger.connection, mail, decimals=6, clock=clock)
    notices.subscribe("user:a", ANN, low_balance=5)
    notices.balance_is("user:a", 1)
    assert deliver(smtp, notices) == known
    assert len(smtp.messages) == known
    assert ("AUTH" in smtp.commands) is known


def test_a_call_never_fails_nor_waits_for_a_notice(
    notices: Notices, ledger_path: pathlib.Path, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    connection.execute("PRAGMA busy_timeout = 50")
    other = open_database(ledger_path)
    other.execute("BEGIN IMMEDIATE")  # somebody holds the database
    try:
        before = time.monotonic()
        notices.deposited("user:a", 5)
        notices.balance_is("user:a", 5)
        assert time.monotonic() - before < 15  # not for twice the 10 s that others wait
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert caplog.text.count("a notice to user:a was lost") == 2
    notices.deposited("user:a", "five")  # type: ignore[arg-type]
    notices.deposited("user:a", 2**63)
    assert states(connection) == []
    notices.deposited("user:a", 2**63 - 1)
    notices.deposited("user:a", 2**63 - 1)  # the sum is too large: the first stays
    assert connection.execute("SELECT tokens, count FROM notices").fetchall() == [(2**63 - 1, 1)]


def test_B14_a_notice_moves_no_money(
    smtp: Smtp, notices: Notices, ledger: Ledger, clock: Any, connection: Connection
) -> None:
    notices.deposited("user:a", 10**9)
    notices.balance_is("user:a", 10**9)
    clock.now += COLLECT_S
    assert deliver(smtp, notices) == 1
    assert ledger.balance("user:a").available == 0
    assert connection.execute("SELECT count(*) FROM transfers").fetchone() == (0,)


@pytest.mark.parametrize(
    "address",
    ["", "ann", "ann@", "@example.org", "a b@example.org", "ann@example.org\r\nBcc: all@example.org", "ann@a,b@c",
     "<ann@example.org>", "ann@example.org, bob@example.org", "änn@example.org", "a" * 65 + "@example.org",
     "ann@-example.org", None, 5],
)  # fmt: skip
def test_what_is_no_address_is_refused(notices: Notices, address: Any) -> None:
    with pytest.raises(IdentifierError, match=r"it must look like ann@example\.org"):
        notices.subscribe("user:a", address)


def test_a_subscription_that_makes_no_sense_is_refused(notices: Notices) -> None:
    for limit in (0, -1, 1.5, True, "5", 2**63):
        with pytest.raises(AmountError, match="low_balance"):
            notices.subscribe("user:a", ANN, low_balance=limit)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match="there is no account 'user:nobody'"):
        notices.subscribe("user:nobody", ANN)


def test_a_missing_library_is_told_at_the_start(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiosmtplib", None)
    Notices(connection, None, decimals=6)
    with pytest.raises(ConfigurationError, match="pip install aiosmtplib"):
        Notices(connection, Mail("127.0.0.1", 25, "noreply@example.org"), decimals=6)


def test_run_survives_a_database_that_is_away(
    notices: Notices, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusionz.payments.errors import StorageError

    rounds: list[int] = []

    async def failing() -> int:
        rounds.append(1)
        raise StorageError("database is locked")

    monkeypatch.setattr(notices, "send_due", failing)

    async def main() -> None:
        task = asyncio.create_task(notices.run(0.001))
        while len(rounds) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "database is locked" in caplog.text


def test_amounts_are_exact() -> None:
    assert [format_tokens(n, 6) for n in (1, 1_500_000, 10_000_000, 0, 2**63 - 1)] == [
        "0.000001", "1.5", "10", "0", "9223372036854.775807",
    ]  # fmt: skip
    assert format_tokens(10, 0) == "10"
