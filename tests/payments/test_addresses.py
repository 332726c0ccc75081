"""Seeds, the keys derived from them, and the pool that addresses are given out of."""

from __future__ import annotations

import copy
import hashlib
import hmac
import os
import pathlib
import pickle
import stat
import subprocess
import sys

import pytest
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from spl.token.instructions import get_associated_token_address

from diffusionz.payments.addresses import (
    Addresses,
    DerivedAddress,
    Seed,
    checked_keypair,
    derive_pool,
    parse_address,
    read_pool,
    write_pool,
)
from diffusionz.payments.database import Connection, IntegrityError, open_database
from diffusionz.payments.errors import AddressError, ConflictError, NotFoundError, SeedError
from diffusionz.payments.ledger import Ledger

SECRET = bytes(range(32))

# Of SECRET. They must never change: money lies at addresses like these.
GOLDEN = [
    (1, "mainnet", 0, "2PyAh6VgX6NHdH4xvJFHXthEES9eQD1Gu65ZfHy2kxMj"),
    (1, "mainnet", 1, "3emGAo2UiDxYH31gEcpCrPvhFXVktPkMBkJrMSZnyTfm"),
    (1, "devnet", 0, "5iM8vBKh2fNUk9ASCNGJ5o1UQgjSzYoymmwM1gc1bNx5"),
    (2, "mainnet", 0, "MPQSayZtPpxDjX1MupjqUKH4Q9zqenHFkrcSvNSWtD1"),
    (1, "mainnet", 9223372036854775807, "BvGBVBid1Hn1pcjJEEDhGvQVrPVfkSXUbMfsFhFSSiJZ"),
    (255, "a", 4294967296, "2p2CbVF776wsnPk1WmWu74zRZLESE47Shh7WjhMp7ZE7"),
]


@pytest.fixture
def addresses(connection: Connection, ledger: Ledger) -> Addresses:
    """With ten in the pool."""
    addresses = Addresses(connection, "mainnet")
    addresses.add(derive_pool(Seed(SECRET), "mainnet", 0, 10))
    return addresses


@pytest.mark.parametrize(("version", "network", "position", "address"), GOLDEN)
def test_A27_golden_vectors(version: int, network: str, position: int, address: str) -> None:
    assert str(Seed(SECRET, version).keypair(network, position).pubkey()) == address


@pytest.mark.parametrize(("version", "network", "position", "address"), GOLDEN)
def test_derivation_is_rfc_5869_and_rfc_8032(version: int, network: str, position: int, address: str) -> None:
    """Written out with the standard library, so that the addresses can be recovered without this package."""
    info = bytes([version]) + len(network).to_bytes(2, "big") + network.encode() + position.to_bytes(8, "big")
    key = hmac.digest(b"diffusionz-deposit-v1", SECRET, hashlib.sha256)
    private = hmac.digest(key, info + b"\x01", hashlib.sha256)
    assert str(Keypair.from_seed(private).pubkey()) == address


def test_no_two_derivations_meet() -> None:
    """The length comes first, so that no pair of name and position reads like another."""
    seeds = [Seed(SECRET, version) for version in (1, 2, 49)]
    keys = {
        str(seed.keypair(network, position).pubkey())
        for seed in seeds
        for network in ("a", "a1", "a11", "a1-1", "1")
        for position in (0, 1, 11, 49, 256, 2**62)
    }
    assert len(keys) == 3 * 5 * 6


@pytest.mark.parametrize("network", ["", "Mainnet", "a b", "a" * 33, "é", None, b"mainnet"])
def test_bad_networks(network: object) -> None:
    with pytest.raises(AddressError, match="network is"):
        Seed(SECRET).keypair(network, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("position", [-1, 2**63, True, 1.0, "1", None])
def test_bad_positions(position: object) -> None:
    with pytest.raises(AddressError, match="position is"):
        Seed(SECRET).keypair("mainnet", position)  # type: ignore[arg-type]


@pytest.mark.parametrize(("secret", "version"), [(b"", 1), (bytes(31), 1), (bytes(33), 1), ("0" * 32, 1)])
def test_bad_secrets(secret: object, version: int) -> None:
    with pytest.raises(SeedError, match="32 bytes"):
        Seed(secret, version)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [0, 256, True, "1"])
def test_bad_versions(version: object) -> None:
    with pytest.raises(SeedError, match="version is"):
        Seed(SECRET, version)  # type: ignore[arg-type]


def test_a_seed_file_is_its_owners_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "master.seed"
    umask = os.umask(0)
    try:
        seed = Seed.create(path, version=3)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = Seed.load(path)
    assert (loaded.version, loaded.keypair("mainnet", 0)) == (3, seed.keypair("mainnet", 0))
    with pytest.raises(SeedError, match="File exists"):
        Seed.create(path)
    assert Seed.load(path).keypair("mainnet", 0) == seed.keypair("mainnet", 0)
    assert Seed.create(tmp_path / "other.seed").keypair("mainnet", 0) != seed.keypair("mainnet", 0)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o644, 0o666, 0o601, 0o700, 0o4600])
def test_B15_loose_permissions_are_refused(tmp_path: pathlib.Path, mode: int) -> None:
    path = tmp_path / "master.seed"
    Seed.create(path)
    path.chmod(mode)
    with pytest.raises(SeedError, match=f"its mode is {mode:04o}; a seed's must be 0600"):
        Seed.load(path)
    path.chmod(0o400)
    Seed.load(path)


def test_what_is_no_seed_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "master.seed"
    with pytest.raises(SeedError, match="No such file"):
        Seed.load(path)
    with pytest.raises(SeedError, match="regular file"):
        Seed.load(tmp_path)
    with pytest.raises(SeedError, match="No such file"):
        Seed.create(tmp_path / "missing" / "master.seed")
    Seed.create(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(SeedError, match="not a link"):
        Seed.load(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(SeedError, match="regular file"):
        Seed.load(tmp_path / "pipe")


@pytest.mark.parametrize(
    "content",
    [b"", b"a" * 64, bytes(200), *(b"diffusionz-seed 1 " + rest for rest in (
        b"a" * 63, b"a" * 65, b"A" * 64, b"a" * 64 + b"\n\n", b"a" * 64 + b"\nmore"))],
)  # fmt: skip
def test_B15_a_damaged_seed_file_is_refused_without_showing_it(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "master.seed"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SeedError, match="is not a seed") as caught:
        Seed.load(path)
    assert "aaaa" not in str(caught.value) and caught.value.__cause__ is None


def test_B15_a_seed_shows_itself_nowhere() -> None:
    seed = Seed(SECRET)
    for text in (repr(seed), str(seed), f"{seed}", f"{[seed]}", f"{ ({1: seed}) }"):
        assert "redacted" in text
        assert SECRET.hex() not in text and repr(SECRET)[2:-1] not in text
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            copying(seed)
    assert not hasattr(seed, "__dict__")


def test_B15_a_process_with_a_seed_leaves_no_core_dump() -> None:
    code = (
        "import resource; from diffusionz.payments.addresses import Seed; Seed(bytes(32)); "
        "print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(0, 0)"


def test_the_pool_travels_as_public_keys(tmp_path: pathlib.Path, connection: Connection) -> None:
    path = tmp_path / "pool.csv"
    pool = list(derive_pool(Seed(SECRET), "mainnet", 5, 3))
    write_pool(path, pool)
    assert read_pool(path) == pool
    assert SECRET.hex() not in path.read_text()
    addresses = Addresses(connection, "mainnet")
    assert (addresses.add(pool), addresses.add(read_pool(path)), addresses.free()) == (3, 0, 3)
    assert addresses.derivation(pool[1].address) == pool[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "first line"), ("network,version,index,address\n", "first line"),
     ("network,version,position,address\nmainnet,1,x,abc\n", "line 2"),
     ("network,version,position,address\nmainnet,1,1\n", "line 2")],
)  # fmt: skip
def test_what_is_no_pool(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "pool.csv"
    path.write_text(text)
    with pytest.raises(AddressError, match=message):
        read_pool(path)
    with pytest.raises(AddressError, match="No such file"):
        read_pool(tmp_path / "missing.csv")


def test_a_pool_is_added_whole_or_not_at_all(addresses: Addresses) -> None:
    fresh = list(derive_pool(Seed(SECRET), "mainnet", 20, 3))
    swapped = [fresh[0], fresh[1]._replace(address=fresh[2].address), fresh[2]]
    foreign = [fresh[0], *derive_pool(Seed(SECRET), "devnet", 0, 1)]
    known = [fresh[0], next(derive_pool(Seed(SECRET), "mainnet", 3, 1))._replace(position=30)]
    for pool, error in ((swapped, ConflictError), (foreign, AddressError), (known, ConflictError)):
        with pytest.raises(error):
            addresses.add(pool)
        assert addresses.free() == 10
    for bad in (fresh[0]._replace(version=0), fresh[0]._replace(position=-1), fresh[0]._replace(position=2**63)):
        with pytest.raises(AddressError, match="out of range"):
            addresses.add([bad])


@pytest.mark.parametrize(
    "text",
    ["", "abc", "0" * 32, "1" * 31, "1" * 45, "l" * 44, "2PyAh6VgX6NHdH4xvJFHXthEES9eQD1Gu65ZfHy2kxMj ",
     "2PyAh6VgX6NHdH4xvJFHXthEES9eQD1Gu65ZfHy2kxMjj", None, 5, b"2PyAh6VgX6NHdH4xvJFHXthEES9eQD1Gu65ZfHy2kxMj"],
)  # fmt: skip
def test_what_is_no_address(text: object) -> None:
    with pytest.raises(AddressError):
        parse_address(text)


def test_a_program_derived_address_is_nobodys() -> None:
    mint = Pubkey.from_string(GOLDEN[0][3])
    with pytest.raises(AddressError, match="no private key"):
        parse_address(str(get_associated_token_address(mint, mint)))


def test_addresses_are_bound_for_ever(addresses: Addresses, connection: Connection) -> None:
    first, second = addresses.issue("user:a"), addresses.issue("user:b")
    assert [first, second] == [GOLDEN[0][3], GOLDEN[1][3]]
    assert addresses.unused("user:a") == [first]
    for statement in (
        "UPDATE deposit_addresses SET account = 'user:b' WHERE address = ?",
        "UPDATE deposit_addresses SET account = NULL, assigned_at = NULL WHERE address = ?",
        "UPDATE deposit_addresses SET position = 99 WHERE address = ?",
        "UPDATE deposit_addresses SET network = 'devnet' WHERE address = ?",
        "DELETE FROM deposit_addresses WHERE address = ?",
    ):
        with pytest.raises(IntegrityError):
            connection.execute(statement, (first,))


def test_an_address_is_on_the_disk_before_it_is_shown(addresses: Addresses, ledger_path: pathlib.Path) -> None:
    shown = addresses.issue("user:a")
    other = open_database(ledger_path)
    assert Addresses(other, "mainnet").unused("user:a") == [shown]
    other.close()


def test_B13_an_account_has_few_open_addresses(addresses: Addresses, connection: Connection) -> None:
    issued = [addresses.issue("user:a") for _ in range(3)]
    with pytest.raises(AddressError, match="user:a has 3 unused deposit addresses; at most 3"):
        addresses.issue("user:a")
    assert addresses.unused("user:a") == issued
    addresses.issue("user:b")  # is not concerned
    connection.execute("UPDATE deposit_addresses SET used_at = 1 WHERE address = ?", (issued[1],))
    assert addresses.issue("user:a") not in issued
    assert addresses.free() == 5


def test_nothing_is_issued_to_nobody_or_from_an_empty_pool(addresses: Addresses, connection: Connection) -> None:
    for account in ("user:nobody", "adjustments", ""):
        with pytest.raises(NotFoundError, match="no user's account"):
            addresses.issue(account)
    devnet = Addresses(connection, "devnet")
    with pytest.raises(AddressError, match="pool of deposit addresses is empty"):
        devnet.issue("user:a")
    with pytest.raises(NotFoundError, match="is not a deposit address"):
        addresses.derivation("x")
    with pytest.raises(AddressError, match="network is"):
        Addresses(connection, "Main Net")


def test_the_newest_seed_is_given_out_first(addresses: Addresses) -> None:
    """After a rotation nobody is given an address of the old seed any more."""
    addresses.add(derive_pool(Seed(SECRET, 2), "mainnet", 0, 1))
    assert addresses.issue("user:a") == GOLDEN[3][3]
    assert addresses.issue("user:a") == GOLDEN[0][3]


def test_A27_a_key_is_checked_before_it_signs() -> None:
    good = DerivedAddress("mainnet", 1, 0, GOLDEN[0][3])
    seeds = {1: Seed(SECRET), 2: Seed(SECRET, 2)}
    assert str(checked_keypair(seeds, good).pubkey()) == good.address
    for other in (
        good._replace(version=2), good._replace(position=1), good._replace(network="devnet"),
        good._replace(address=GOLDEN[1][3]),
    ):  # fmt: skip
        with pytest.raises(SeedError, match="derives another key"):
            checked_keypair(seeds, other)
    with pytest.raises(SeedError, match="needs the seed of version 1; given: 2"):
        checked_keypair({2: seeds[2]}, good)
    with pytest.raises(SeedError, match="derives another key"):
        checked_keypair({1: Seed(bytes(32))}, good)
