"""Sign-In With Solana: who holds a wallet's key owns the account that the wallet belongs to.

    challenge = identity.challenge(address, client="203.0.113.9")
    ... the wallet shows challenge.text and signs it ...
    signed_in = identity.sign_in(address, challenge.nonce, signature)       # signed_in.account == "user:..."

The text is EIP-4361's layout as wallets know it (https://github.com/phantom/sign-in-with-solana). What was signed is
never taken from the client: the text is built again from the row that the nonce names, which is good once, for five
minutes, for one address and one domain.

An address is public: alone it opens nothing. There is no function here that tells an account for an address.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import re
import secrets
import string
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from solders.pubkey import Pubkey
from solders.signature import Signature

from diffusionz.payments.database import Connection, immediate
from diffusionz.payments.errors import ConfigurationError, ConflictError, IdentityError, LimitError
from diffusionz.payments.ledger import Ledger

if TYPE_CHECKING:
    from diffusionz.payments.settings import Settings

TTL_S = 300
NONCE_LENGTH = 22  # of 62 letters and digits: 131 bits
_ALPHABET = string.ascii_letters + string.digits

# Hardware wallets sign a text only in an envelope that no transaction can look like.
_ENVELOPE = b"\xffsolana offchain"

STATEMENT = "Sign in. This is no transaction and costs nothing."
CHAINS = ("mainnet", "devnet", "testnet", "localnet")

MIGRATIONS = [
    (
        "001_identity",
        """
        CREATE TABLE challenges (
            nonce TEXT PRIMARY KEY,
            address TEXT NOT NULL,
            domain TEXT NOT NULL,
            uri TEXT NOT NULL,
            chain TEXT NOT NULL,
            statement TEXT NOT NULL,
            account TEXT REFERENCES accounts (name),    -- to link the wallet to; NULL: to sign in
            client TEXT NOT NULL,
            issued_at INTEGER NOT NULL,                 -- seconds since 1970
            expires_at INTEGER NOT NULL,
            used_at INTEGER
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX challenges_by_client ON challenges (client);
        CREATE INDEX challenges_by_expiry ON challenges (expires_at);
        CREATE TABLE wallets (
            address TEXT PRIMARY KEY,
            account TEXT NOT NULL REFERENCES accounts (name),
            linked_at INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID;
        CREATE INDEX wallets_by_account ON wallets (account);
        CREATE TRIGGER wallets_stay BEFORE UPDATE ON wallets
            BEGIN SELECT RAISE(ABORT, 'a wallet stays with its account'); END;
        """,
    )
]


@dataclasses.dataclass(frozen=True)
class Challenge:
    """What a wallet is asked to sign: `text`, or `sign_in_input` for wallets that write it themselves."""

    address: str
    domain: str
    uri: str
    chain: str
    statement: str
    nonce: str
    issued_at: int  # seconds since 1970
    expires_at: int

    @property
    def text(self) -> str:
        return (
            f"{self.domain} wants you to sign in with your Solana account:\n{self.address}\n\n{self.statement}\n\n"
            f"URI: {self.uri}\nVersion: 1\nChain ID: {self.chain}\nNonce: {self.nonce}\n"
            f"Issued At: {_iso(self.issued_at)}\nExpiration Time: {_iso(self.expires_at)}"
        )

    def sign_in_input(self) -> dict[str, str]:
        """For a wallet's `solana:signIn`, which builds the same text from it."""
        return {
            "domain": self.domain,
            "address": self.address,
            "statement": self.statement,
            "uri": self.uri,
            "version": "1",
            "chainId": self.chain,
            "nonce": self.nonce,
            "issuedAt": _iso(self.issued_at),
            "expirationTime": _iso(self.expires_at),
        }


@dataclasses.dataclass(frozen=True)
class SignedIn:
    """The account that the wallet belongs to, in the ledger's spelling; new: it was opened just now."""

    account: str
    address: str
    new: bool


class Identity:
    """Challenges and wallets of one domain.

    client_limit: challenges that one client may ask for within TTL_S; open_limit: challenges of all clients.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        domain: str,
        uri: str | None = None,
        statement: str = STATEMENT,
        chain: str = "mainnet",
        client_limit: int = 30,
        open_limit: int = 50_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?(:[0-9]{1,5})?", domain):
            raise ConfigurationError(
                f'domain is {domain!r}; it must be a host such as "example.org" or "127.0.0.1:8080"'
            )
        uri = f"https://{domain}" if uri is None else uri
        if not re.fullmatch(r"https?://[!-~]{1,500}", uri):
            raise ConfigurationError(f"uri is {uri!r}; it must begin with https:// or http://, in ASCII without spaces")
        if not re.fullmatch(r"[ -~]{1,300}", statement):
            raise ConfigurationError(f"statement is {statement!r}; it must be one line of up to 300 ASCII characters")
        if chain not in CHAINS:
            raise ConfigurationError(f"chain is {chain!r}; it must be one of {', '.join(CHAINS)}")
        self.domain, self.uri, self.statement, self.chain = domain, uri, statement, chain
        self._ledger = ledger
        self._connection: Connection = ledger.connection
        self._client_limit, self._open_limit = client_limit, open_limit
        self._clock = clock

    @classmethod
    def from_settings(cls, settings: Settings, ledger: Ledger) -> Identity:
        """Raises ConfigurationError."""
        settings.require("domain")
        assert settings.domain is not None
        return cls(
            ledger,
            domain=settings.domain,
            uri=settings.sign_in_uri,
            statement=settings.sign_in_statement or STATEMENT,
            chain=settings.network,
        )

    def challenge(self, address: str, client: str) -> Challenge:
        """A text for the wallet to sign in with.

        client: the peer's IP address as the server saw it, never as a header claims. Raises IdentityError for what is
        no wallet's address, LimitError when the client, or all clients together, asked for too many.
        """
        return self._issue(address, client, self.statement, None)

    def link_challenge(self, account: str, address: str, client: str) -> Challenge:
        """A text for another wallet to sign, so that it belongs to `account`, whose owner asks. Raises as above."""
        return self._issue(address, client, f"Link this wallet to the account {account}.", account)

    def sign_in(self, address: str, nonce: str, signature: str | bytes) -> SignedIn:
        """Opens the wallet's account; at the first time, a new one.

        signature: 64 bytes, or base58. The nonce is used up whatever comes of it; so call this outside `immediate`.
        Raises IdentityError when the nonce is not a challenge's for this address, or the signature is not the wallet's.
        """
        self._verify(address, nonce, signature, linking=False)
        with immediate(self._connection):
            found = self._connection.execute("SELECT account FROM wallets WHERE address = ?", (address,)).fetchone()
            account = found[0] if found else "user:" + secrets.token_hex(12)
            if not found:
                self._ledger.open_account(account, "user")
                self._link(address, account)
        return SignedIn(account, address, new=not found)

    def link(self, address: str, nonce: str, signature: str | bytes) -> SignedIn:
        """Lets the wallet sign in to the account that the challenge named.

        Raises IdentityError as above, ConflictError when the wallet already belongs to another account.
        """
        account = self._verify(address, nonce, signature, linking=True)
        assert account is not None
        with immediate(self._connection):
            found = self._connection.execute("SELECT account FROM wallets WHERE address = ?", (address,)).fetchone()
            if found and found[0] != account:
                raise ConflictError(f"the wallet {address} belongs to another account")
            if not found:
                self._link(address, account)
        return SignedIn(account, address, new=False)

    def wallets(self, account: str) -> list[str]:
        """The addresses that may sign in to the account, in the order in which they were linked."""
        rows = self._connection.execute(
            "SELECT address FROM wallets WHERE account = ? ORDER BY linked_at, address", (account,)
        )
        return [address for (address,) in rows]

    def _link(self, address: str, account: str) -> None:
        self._connection.execute(
            "INSERT INTO wallets (address, account, linked_at) VALUES (?, ?, ?)", (address, account, int(self._clock()))
        )

    def _issue(self, address: str, client: str, statement: str, account: str | None) -> Challenge:
        _check_address(address)
        now = int(self._clock())
        client = _network(client)
        nonce = "".join(secrets.choice(_ALPHABET) for _ in range(NONCE_LENGTH))
        challenge = Challenge(address, self.domain, self.uri, self.chain, statement, nonce, now, now + TTL_S)
        with immediate(self._connection):
            self._connection.execute("DELETE FROM challenges WHERE expires_at <= ?", (now,))
            for limit, condition, values in (
                (self._client_limit, "WHERE client = ?", (client,)),
                (self._open_limit, "", ()),
            ):
                (count,) = self._connection.execute(f"SELECT count(*) FROM challenges {condition}", values).fetchone()
                if count >= limit:
                    who = "from here" if condition else "in all"
                    raise LimitError(
                        f"{count} challenges were asked for {who} within {TTL_S} s; at most {limit} are given",
                        retry_after_s=TTL_S,
                    )
            self._connection.execute(
                "INSERT INTO challenges (nonce, address, domain, uri, chain, statement, account, client, issued_at,"
                " expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (nonce, address, self.domain, self.uri, self.chain, statement, account, client, now, now + TTL_S),
            )
        return challenge

    def _verify(self, address: str, nonce: str, signature: str | bytes, *, linking: bool) -> str | None:
        """Uses the nonce up and returns its row's account. Raises IdentityError."""
        key = _check_address(address)
        parsed = _check_signature(signature)
        now = int(self._clock())
        with immediate(self._connection):
            # A used row stays until it expires: it counts against its client's limit.
            row = self._connection.execute(
                "UPDATE challenges SET used_at = ? WHERE nonce = ? AND used_at IS NULL AND expires_at > ?"
                " RETURNING address, domain, uri, chain, statement, nonce, issued_at, expires_at, account",
                (now, str(nonce), now),
            ).fetchone()
        if row is None:
            raise IdentityError("the challenge is unknown, used or expired; ask for a new one")
        challenge, account = Challenge(*row[:8]), row[8]
        if challenge.address != address or challenge.domain != self.domain or (account is not None) is not linking:
            raise IdentityError("the challenge was given for another address, domain or purpose; ask for a new one")
        # solders refuses keys of small order, for which anyone can make a signature of any text; OpenSSL does not.
        if not any(parsed.verify(key, message) for message in _signable(challenge.text, key)):
            raise IdentityError(f"the signature is not {address}'s of this challenge; ask for a new one")
        return None if account is None else str(account)


def _signable(text: str, key: Pubkey) -> Iterator[bytes]:
    """The bytes that wallets sign for a text: itself, or in one of the envelopes of hardware wallets.

    The envelopes, by the age of the wallet's firmware: the Solana SDK's short header, the specification's header
    version 0 with an empty application domain and one signer, and its version 1. In the first two a byte says how the
    text may be shown: 0 as ASCII, 1 as UTF-8. https://docs.anza.xyz/proposals/off-chain-message-signing
    """
    message = text.encode("ascii")
    length = len(message).to_bytes(2, "little")
    yield message
    for form in (b"\x00", b"\x01"):
        yield _ENVELOPE + b"\x00" + form + length + message
        yield _ENVELOPE + b"\x00" + bytes(32) + form + b"\x01" + bytes(key) + length + message
    yield _ENVELOPE + b"\x01" + b"\x01" + bytes(key) + message


def _check_address(address: object) -> Pubkey:
    """The key of a wallet's address. Raises IdentityError."""
    try:
        if not isinstance(address, str):
            raise ValueError
        key = Pubkey.from_string(address)
    except ValueError:
        raise IdentityError(f"address is {str(address)[:50]!r}; it must be 32 bytes in base58") from None
    if str(key) != address or not key.is_on_curve():
        raise IdentityError(f"{address} is no wallet's address; only a key on the curve can sign")
    return key


def _check_signature(signature: object) -> Signature:
    try:
        if isinstance(signature, str):
            return Signature.from_string(signature)
        if isinstance(signature, bytes):
            return Signature.from_bytes(signature)
    except ValueError:
        pass
    raise IdentityError("the signature must be 64 bytes, or those in base58")


def _network(client: str) -> str:
    """What a limit counts: an IPv4 address, or the /64 that one customer of IPv6 has to himself."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client[:64]  # a socket without an address
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
        address = address.ipv4_mapped
    return str(address)


def _iso(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
