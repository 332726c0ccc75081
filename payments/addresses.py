"""One-time deposit addresses: derived by the signer, handed out by the web process, which never holds the seed.

    # In the signer, which alone reads the seed:
    seed = Seed.create("master.seed")
    write_pool("pool.csv", derive_pool(seed, network="mainnet", first=0, count=10_000))
    # In the web process:
    addresses = Addresses(connection, network="mainnet")
    addresses.add(read_pool("pool.csv"))
    addresses.issue("user:alice")     # the pair is on the disk before anybody sees the address

Ed25519 keys have no public derivation, so whoever could derive an address could also spend from it: a list of public
keys is what the web process gets. A deposit is credited to the account that its address was bound to, never to one that
is inferred from the sender or from a memo.
"""

from __future__ import annotations

import csv
import os
import re
import resource
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, NoReturn

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from diffusionz.payments.database import Connection, immediate
from diffusionz.payments.errors import AddressError, ConflictError, NotFoundError, SeedError

# Separates these keys from whatever else might ever be derived from the same seed.
SALT = b"diffusionz-deposit-v1"
SEED_BYTES = 32
SEED_LINE = re.compile(rb"diffusionz-seed ([0-9]{1,3}) ([0-9a-f]{64})\n?")
NETWORK = re.compile(r"[a-z0-9-]{1,32}")
POSITION_MAX = 2**63 - 1  # what SQLite stores; HKDF's info has room for 2^64

MIGRATIONS = [
    (
        "deposit addresses",
        """
        CREATE TABLE deposit_addresses (
            address TEXT PRIMARY KEY,
            network TEXT NOT NULL,
            version INTEGER NOT NULL CHECK (version BETWEEN 1 AND 255),
            position INTEGER NOT NULL CHECK (position >= 0),
            account TEXT REFERENCES accounts (name),
            assigned_at INTEGER,
            used_at INTEGER,
            UNIQUE (network, version, position),
            CHECK ((account IS NULL) = (assigned_at IS NULL))
        ) STRICT;
        CREATE INDEX free_addresses ON deposit_addresses (network, version DESC, position) WHERE account IS NULL;
        CREATE INDEX open_addresses ON deposit_addresses (account) WHERE used_at IS NULL;
        CREATE TRIGGER deposit_addresses_are_kept BEFORE DELETE ON deposit_addresses
        BEGIN SELECT RAISE (ABORT, 'a deposit address is watched for ever'); END;
        CREATE TRIGGER deposit_addresses_are_bound_once BEFORE UPDATE ON deposit_addresses
        WHEN OLD.address IS NOT NEW.address OR OLD.network IS NOT NEW.network OR OLD.version IS NOT NEW.version
            OR OLD.position IS NOT NEW.position OR (OLD.account IS NOT NULL AND OLD.account IS NOT NEW.account)
        BEGIN SELECT RAISE (ABORT, 'a deposit address is bound to one account, once'); END;
        """,
    ),
]


class DerivedAddress(NamedTuple):
    """A public key and what it was derived from: the network's name, the seed's version, and the position."""

    network: str
    version: int
    position: int
    address: str


class Seed:
    """32 secret bytes, and the version byte that tells a rotated seed from its predecessors.

    It never appears in a repr, an error, a pickle or a core dump.
    """

    __slots__ = ("_secret", "version")

    def __init__(self, secret: bytes, version: int = 1) -> None:
        if not isinstance(secret, bytes) or len(secret) != SEED_BYTES:
            raise SeedError(f"a seed must be {SEED_BYTES} bytes")
        if type(version) is not int or not 1 <= version <= 255:
            raise SeedError(f"version is {version!r}; a seed's version must be an integer from 1 to 255")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._secret = secret
        self.version = version

    @classmethod
    def create(cls, path: str | os.PathLike[str], version: int = 1) -> Seed:
        """Writes a new random seed to `path`, readable by its owner alone. Never replaces a file. Raises SeedError."""
        seed = cls(os.urandom(SEED_BYTES), version)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SeedError(f"{os.fspath(path)}: {error.strerror}") from None
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # whatever the umask
            file.write(b"diffusionz-seed %d %s\n" % (version, seed._secret.hex().encode()))
            file.flush()
            os.fsync(descriptor)
        return seed

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Seed:
        """Reads what `create` wrote. Raises SeedError, also when anybody but its owner may read the file."""
        name = os.fspath(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise SeedError(f"{name}: {error.strerror}; a seed must be a regular file, not a link") from None
        try:
            # Of the open file, so that nobody can exchange it between the look and the reading.
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SeedError(f"{name}: a seed must be a regular file")
            if status.st_uid != os.geteuid():
                raise SeedError(f"{name}: belongs to user {status.st_uid}; a seed must belong to the user who reads it")
            mode = stat.S_IMODE(status.st_mode)
            if mode not in (0o600, 0o400):
                raise SeedError(f"{name}: its mode is {mode:04o}; a seed's must be 0600 or 0400 (chmod 600 {name})")
            match = SEED_LINE.fullmatch(os.read(descriptor, 128))
        finally:
            os.close(descriptor)
        if not match:
            raise SeedError(f'{name}: is not a seed; it must be one line, "diffusionz-seed VERSION 64-HEX-DIGITS"')
        return cls(bytes.fromhex(match[2].decode()), int(match[1]))

    def keypair(self, network: str, position: int) -> Keypair:
        """The key at `position`: Ed25519 (RFC 8032) from HKDF-SHA256 (RFC 5869) of the seed.

        The info is the version byte, the network's name after its length in two bytes, and the position in eight, all
        big-endian. The same name of a network and version never meet another pair: the length comes first.
        Raises AddressError for a name or a position that is not allowed.
        """
        if not isinstance(network, str) or not NETWORK.fullmatch(network):
            raise AddressError(f"network is {network!r}; it must be 1 to 32 characters of a-z, 0-9 and -")
        if type(position) is not int or not 0 <= position <= POSITION_MAX:
            raise AddressError(f"position is {position!r}; it must be an integer from 0 to {POSITION_MAX}")
        name = network.encode()
        info = bytes([self.version]) + len(name).to_bytes(2, "big") + name + position.to_bytes(8, "big")
        return Keypair.from_seed(HKDF(algorithm=SHA256(), length=32, salt=SALT, info=info).derive(self._secret))

    def __repr__(self) -> str:
        return f"Seed(version={self.version}, redacted)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a seed cannot be pickled or copied")


def derive_pool(seed: Seed, network: str, first: int, count: int) -> Iterator[DerivedAddress]:
    """The public keys at first, first + 1, ..., first + count - 1."""
    for position in range(first, first + count):
        yield DerivedAddress(network, seed.version, position, str(seed.keypair(network, position).pubkey()))


def write_pool(path: str | os.PathLike[str], pool: Iterable[DerivedAddress]) -> None:
    """Writes public keys as CSV, for `read_pool` on another machine."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(DerivedAddress._fields)
        writer.writerows(pool)


def read_pool(path: str | os.PathLike[str]) -> list[DerivedAddress]:
    """Reads what `write_pool` wrote. Raises AddressError that names the line."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise AddressError(f"{os.fspath(path)}: {error}") from None
    if not rows or tuple(rows[0]) != DerivedAddress._fields:
        raise AddressError(f"{os.fspath(path)}: the first line must be {','.join(DerivedAddress._fields)}")
    pool = []
    for line, row in enumerate(rows[1:], 2):
        try:
            network, version, position, address = row
            pool.append(DerivedAddress(network, int(version), int(position), address))
        except ValueError:
            raise AddressError(f"{os.fspath(path)}, line {line}: {row!r} is not {DerivedAddress._fields}") from None
    return pool


def parse_address(text: object) -> Pubkey:
    """A public key from base58. Raises AddressError for what is not 32 bytes, or what no private key belongs to."""
    try:
        if not isinstance(text, str) or len(text) > 44:
            raise ValueError
        key = Pubkey.from_string(text)
    except ValueError:
        raise AddressError(f"{str(text)[:64]!r} is not an address; it must be 32 bytes in base58") from None
    if not key.is_on_curve():
        raise AddressError(f"{text} is not on the curve: no private key belongs to it")
    return key


def checked_keypair(seeds: Mapping[int, Seed], address: DerivedAddress) -> Keypair:
    """The key of a stored address, derived again. Raises SeedError when it is not the stored address's key: then the
    seed, the network or the database is not the one that the address came from, and nothing may be signed."""
    seed = seeds.get(address.version)
    if seed is None:
        known = ", ".join(map(str, sorted(seeds))) or "none"
        raise SeedError(f"{address.address} needs the seed of version {address.version}; given: {known}")
    keypair = seed.keypair(address.network, address.position)
    if str(keypair.pubkey()) != address.address:
        raise SeedError(
            f"the seed of version {address.version} derives another key at {address.position} of "
            f"{address.network!r} than the stored {address.address}"
        )
    return keypair


class Addresses:
    """The pool of public keys, and which account each was given to.

    `max_open` bounds how many addresses an account may have that nothing was ever deposited to.
    """

    def __init__(
        self, connection: Connection, network: str, *, max_open: int = 3, clock: Callable[[], float] = time.time
    ) -> None:
        if not NETWORK.fullmatch(network):
            raise AddressError(f"network is {network!r}; it must be 1 to 32 characters of a-z, 0-9 and -")
        self.connection = connection
        self.network = network
        self.max_open = max_open
        self.clock = clock

    def add(self, pool: Iterable[DerivedAddress]) -> int:
        """Adds public keys to the pool, all or none; those that it has already are skipped. Returns how many are new.

        Raises AddressError for an address of another network or one that is malformed, ConflictError for one that
        contradicts the pool.
        """
        added = 0
        with immediate(self.connection):
            for entry in pool:
                if entry.network != self.network:
                    raise AddressError(f"{entry.address} is of network {entry.network!r}, not of {self.network!r}")
                if not 1 <= entry.version <= 255 or not 0 <= entry.position <= POSITION_MAX:
                    raise AddressError(
                        f"{entry.address}: version {entry.version} or position {entry.position} out of range"
                    )
                address = str(parse_address(entry.address))
                row = self.connection.execute(
                    "SELECT network, version, position, address FROM deposit_addresses"
                    " WHERE address = ? OR (network, version, position) = (?, ?, ?)",
                    (address, entry.network, entry.version, entry.position),
                ).fetchone()
                if row is None:
                    self.connection.execute(
                        "INSERT INTO deposit_addresses (network, version, position, address) VALUES (?, ?, ?, ?)",
                        (*entry[:3], address),
                    )
                    added += 1
                elif DerivedAddress(*row) != entry:
                    raise ConflictError(f"{entry} contradicts the pool, which has {DerivedAddress(*row)}")
        return added

    def issue(self, account: str) -> str:
        """Binds the pool's next address to `account`, for ever, and returns it.

        Raises NotFoundError when the ledger has no such account of a user, AddressError when the account has max_open
        unused addresses or the pool is empty.
        """
        with immediate(self.connection):
            if not self.connection.execute(
                "SELECT 1 FROM accounts WHERE name = ? AND kind = 'user'", (account,)
            ).fetchone():
                raise NotFoundError(f"there is no user's account {account!r}")
            unused = len(self.unused(account))
            if unused >= self.max_open:
                raise AddressError(
                    f"{account} has {unused} unused deposit addresses; at most {self.max_open} may be open"
                )
            row = self.connection.execute(
                "UPDATE deposit_addresses SET account = ?, assigned_at = ? WHERE address = (SELECT address FROM"
                " deposit_addresses WHERE account IS NULL AND network = ? ORDER BY version DESC, position LIMIT 1)"
                " RETURNING address",
                (account, int(self.clock()), self.network),
            ).fetchone()
            if row is None:
                raise AddressError("the pool of deposit addresses is empty; derive more in the signer and add them")
        return str(row[0])

    def retire_free(self) -> int:
        """Gives the rest of the pool to the ledger's account "adjustments"; returns how many addresses those were.

        For a database that was restored from a backup: some of them may have been issued since it was made, and must
        never be issued to somebody else. They are watched like all others, and an operator moves on what still comes.
        """
        with immediate(self.connection):
            retired = self.connection.execute(
                "UPDATE deposit_addresses SET account = 'adjustments', assigned_at = ?"
                " WHERE account IS NULL AND network = ?",
                (int(self.clock()), self.network),
            )
        return int(retired.rowcount)

    def unused(self, account: str) -> list[str]:
        """The account's addresses that nothing was deposited to, oldest first."""
        rows = self.connection.execute(
            "SELECT address FROM deposit_addresses WHERE account = ? AND network = ? AND used_at IS NULL"
            " ORDER BY assigned_at, position",
            (account, self.network),
        )
        return [address for (address,) in rows]

    def free(self) -> int:
        """How many addresses the pool has left to give."""
        (count,) = self.connection.execute(
            "SELECT count(*) FROM deposit_addresses WHERE account IS NULL AND network = ?", (self.network,)
        ).fetchone()
        return int(count)

    def derivation(self, address: str) -> DerivedAddress:
        """What an address of the pool was derived from. Raises NotFoundError."""
        row = self.connection.execute(
            "SELECT network, version, position, address FROM deposit_addresses WHERE address = ?", (address,)
        ).fetchone()
        if row is None:
            raise NotFoundError(f"{address} is not a deposit address")
        return DerivedAddress(*row)
