"""Signing in with a wallet: real keys, every envelope that wallets sign, and everything that must open no account."""

from __future__ import annotations

import dataclasses
import random
import re
import threading
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from solders.keypair import Keypair
from solders.message import Message, MessageV0, from_bytes_versioned
from solders.pubkey import Pubkey

from diffusionz.payments.database import Connection, IntegrityError, immediate, open_database
from diffusionz.payments.errors import ConfigurationError, ConflictError, IdentityError, LimitError
from diffusionz.payments.identity import TTL_S, Challenge, Identity
from diffusionz.payments.ledger import Ledger

CLIENT = "203.0.113.9"
ANN, BOB = Keypair.from_seed(bytes([1] * 32)), Keypair.from_seed(bytes([2] * 32))


@pytest.fixture
def identity(ledger: Ledger, clock: Any) -> Identity:
    return Identity(ledger, domain="example.org", clock=clock)


def address_of(keypair: Keypair) -> str:
    return str(keypair.pubkey())


def signed_in(identity: Identity, keypair: Keypair = ANN, client: str = CLIENT) -> Any:
    challenge = identity.challenge(address_of(keypair), client)
    return identity.sign_in(challenge.address, challenge.nonce, sign(keypair, challenge))


def sign(keypair: Keypair, challenge: Challenge) -> str:
    return str(keypair.sign_message(challenge.text.encode()))


def test_a_wallet_signs_in_to_one_account_for_ever(identity: Identity, ledger: Ledger) -> None:
    first = signed_in(identity)
    assert first.new
    assert re.fullmatch("user:[0-9a-f]{24}", first.account)
    assert ledger.balance(first.account).available == 0
    again = signed_in(identity)
    assert (again.account, again.new) == (first.account, False)
    assert signed_in(identity, BOB).account != first.account
    assert identity.wallets(first.account) == [address_of(ANN)]


def test_the_text_is_what_wallets_show(identity: Identity, clock: Any) -> None:
    clock.now = 1_800_000_000.7
    challenge = identity.challenge(address_of(ANN), CLIENT)
    assert challenge.text == (
        "example.org wants you to sign in with your Solana account:\n"
        "AKnL4NNf3DGWZJS6cPknBuEGnVsV4A4m5tgebLHaRSZ9\n"
        "\n"
        "Sign in. This is no transaction and costs nothing.\n"
        "\n"
        "URI: https://example.org\n"
        "Version: 1\n"
        "Chain ID: mainnet\n"
        f"Nonce: {challenge.nonce}\n"
        "Issued At: 2027-01-15T08:00:00Z\n"
        "Expiration Time: 2027-01-15T08:05:00Z"
    )
    assert re.fullmatch("[A-Za-z0-9]{22}", challenge.nonce)
    fields = challenge.sign_in_input()
    assert {f"{value}" for value in fields.values()} <= set(re.split(r"\n|: | wants", challenge.text))
    assert set(fields) == {
        "domain", "address", "statement", "uri", "version", "chainId", "nonce", "issuedAt", "expirationTime",
    }  # fmt: skip


def test_no_nonce_comes_twice(ledger: Ledger, clock: Any) -> None:
    identity = Identity(ledger, domain="example.org", clock=clock, client_limit=500)
    nonces = {identity.challenge(address_of(ANN), CLIENT).nonce for _ in range(300)}
    assert len(nonces) == 300


# Envelopes of hardware wallets, written from https://docs.anza.xyz/proposals/off-chain-message-signing.
def envelopes(text: str, key: bytes) -> dict[str, bytes]:
    message = text.encode()
    size = bytes([len(message) & 0xFF, len(message) >> 8])
    domain = b"\xffsolana offchain"
    return {
        "plain": message,
        "sdk, UTF-8": domain + bytes([0, 1]) + size + message,
        "sdk, ASCII": domain + bytes([0, 0]) + size + message,
        "version 0, UTF-8": domain + bytes([0]) + bytes(32) + bytes([1, 1]) + key + size + message,
        "version 0, ASCII": domain + bytes([0]) + bytes(32) + bytes([0, 1]) + key + size + message,
        "version 1": domain + bytes([1, 1]) + key + message,
    }


@pytest.mark.parametrize("form", envelopes("", b""))
def test_every_envelope_is_accepted(identity: Identity, form: str) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    message = envelopes(challenge.text, bytes(ANN.pubkey()))[form]
    assert identity.sign_in(challenge.address, challenge.nonce, bytes(ANN.sign_message(message))).new


@pytest.mark.parametrize("form", envelopes("", b""))
def test_what_is_signed_is_no_transaction(identity: Identity, form: str) -> None:
    """Nobody can lay a challenge before a wallet that is a transfer in disguise, nor use the signature for one."""
    message = envelopes(identity.challenge(address_of(ANN), CLIENT).text, bytes(ANN.pubkey()))[form]
    for parse in (Message.from_bytes, MessageV0.from_bytes, from_bytes_versioned):
        with pytest.raises(ValueError):
            parse(message)


def test_B11_an_envelope_for_another_signer_or_domain_is_refused(identity: Identity) -> None:
    for change in (
        lambda text: envelopes(text, bytes(BOB.pubkey()))["version 0, UTF-8"],
        lambda text: envelopes(text, bytes(BOB.pubkey()))["version 1"],
        lambda text: envelopes(text, bytes(ANN.pubkey()))["version 0, UTF-8"].replace(bytes(32), b"x" * 32, 1),
        lambda text: envelopes(text, bytes(ANN.pubkey()))["version 1"].replace(b"offchain\x01", b"offchain\x02", 1),
        lambda text: b"\x00" + text.encode(),
    ):
        challenge = identity.challenge(address_of(ANN), CLIENT)
        with pytest.raises(IdentityError, match="the signature is not"):
            identity.sign_in(challenge.address, challenge.nonce, bytes(ANN.sign_message(change(challenge.text))))


def test_B11_a_nonce_is_good_once(identity: Identity) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    signature = sign(ANN, challenge)
    identity.sign_in(challenge.address, challenge.nonce, signature)
    with pytest.raises(IdentityError, match="the challenge is unknown, used or expired"):
        identity.sign_in(challenge.address, challenge.nonce, signature)


def test_B11_a_wrong_signature_uses_the_nonce_up(identity: Identity) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    with pytest.raises(IdentityError, match="the signature is not"):
        identity.sign_in(challenge.address, challenge.nonce, sign(BOB, challenge))
    with pytest.raises(IdentityError, match="unknown, used or expired"):
        identity.sign_in(challenge.address, challenge.nonce, sign(ANN, challenge))


def test_B11_one_of_many_at_once_gets_in(identity: Identity, ledger_path: Any, clock: Any) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    signature, outcomes = sign(ANN, challenge), []
    gate = threading.Barrier(8)

    def attempt() -> None:
        connection = open_database(ledger_path, busy_timeout_s=120.0)
        mine = Identity(Ledger(connection, clock), domain="example.org", clock=clock)
        gate.wait()
        try:
            outcomes.append(mine.sign_in(challenge.address, challenge.nonce, signature).account)
        except IdentityError as error:
            outcomes.append(str(error))
        connection.close()

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome.startswith("user:") for outcome in outcomes) == 1, outcomes


def test_B11_a_challenge_expires(identity: Identity, clock: Any) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    clock.now += TTL_S - 1
    late = identity.challenge(address_of(ANN), CLIENT)
    assert identity.sign_in(challenge.address, challenge.nonce, sign(ANN, challenge)).new
    clock.now += TTL_S
    with pytest.raises(IdentityError, match="unknown, used or expired"):
        identity.sign_in(late.address, late.nonce, sign(ANN, late))


def test_B11_another_domains_challenge_is_refused(identity: Identity, ledger: Ledger, clock: Any) -> None:
    other = Identity(ledger, domain="evil.example", clock=clock)
    challenge = other.challenge(address_of(ANN), CLIENT)
    with pytest.raises(IdentityError, match="another address, domain or purpose"):
        identity.sign_in(challenge.address, challenge.nonce, sign(ANN, challenge))


def test_B11_another_addresss_challenge_is_refused(identity: Identity) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    with pytest.raises(IdentityError, match="another address, domain or purpose"):
        identity.sign_in(address_of(BOB), challenge.nonce, sign(BOB, challenge))


@pytest.mark.parametrize(
    "field", ["domain", "uri", "statement", "nonce", "chain", "issued_at", "expires_at", "address"]
)
def test_B11_a_signature_of_other_words_is_refused(identity: Identity, field: str) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    value = getattr(challenge, field)
    changed = dataclasses.replace(challenge, **{field: value + 1 if isinstance(value, int) else value + "x"})
    with pytest.raises(IdentityError, match="the signature is not"):
        identity.sign_in(challenge.address, challenge.nonce, sign(ANN, changed))


@pytest.mark.parametrize(
    "change",
    [lambda t: t.replace("\n", "\r\n"), lambda t: t + "\n", lambda t: " " + t, lambda t: t.replace("o", "\u043e", 1)],
)
def test_B11_line_ends_and_lookalikes_are_other_words(identity: Identity, change: Any) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    signature = ANN.sign_message(change(challenge.text).encode())
    with pytest.raises(IdentityError, match="the signature is not"):
        identity.sign_in(challenge.address, challenge.nonce, str(signature))


# The points of order 1, 2, 4 and 8, and their encodings that are not reduced: with R the identity and S zero, such a
# "key" has signed everything, says a verifier that does not look for them.
P = 2**255 - 19
ORDER_8 = (
    0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD83D3D706A17C7,
    0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
)
SMALL_ORDER = [
    (y | sign << 255).to_bytes(32, "little")
    for y in (0, 1, P - 1, P, P + 1, *ORDER_8)
    for sign in (0, 1)
]  # fmt: skip


@pytest.mark.parametrize("key", SMALL_ORDER, ids=lambda key: key[::-1].hex()[:8])
def test_B11_keys_that_anybody_can_sign_for_are_refused(identity: Identity, key: bytes) -> None:
    address = str(Pubkey(key))
    for r in [bytes([1]) + bytes(31), *SMALL_ORDER]:
        challenge = identity.challenge(address, f"client {r.hex()}")
        with pytest.raises(IdentityError, match="the signature is not"):
            identity.sign_in(address, challenge.nonce, r + bytes(32))


def test_the_forgery_is_one_for_a_verifier_that_does_not_look() -> None:
    """What the test above defends against is real: this library takes the signature."""
    forged = bytes([1]) + bytes(63)
    fooled = 0
    for key in SMALL_ORDER:
        for text in (b"anything", b"something else", b"1", b"2", b"3", b"4", b"5", b"6"):
            try:
                Ed25519PublicKey.from_public_bytes(key).verify(forged, text)
                fooled += 1
            except Exception:
                continue
    assert fooled >= 8


def test_B11_a_signature_has_one_form(identity: Identity) -> None:
    """S and S + L are the same to the curve; only the reduced one is a signature."""
    challenge = identity.challenge(address_of(ANN), CLIENT)
    signature = bytes(ANN.sign_message(challenge.text.encode()))
    order = 2**252 + 27742317777372353535851937790883648493
    other = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    with pytest.raises(IdentityError, match="the signature is not"):
        identity.sign_in(challenge.address, challenge.nonce, other)


@pytest.mark.parametrize(
    "address",
    [
        "", "1", "x" * 44, address_of(ANN) + " ", " " + address_of(ANN), "0x" + "ab" * 20,
        "é" * 40, "1" * 33, "1" * 1000, None, 5, b"1" * 32, address_of(ANN) + "\n",
        str(Pubkey.find_program_address([b"x"], Pubkey.default())[0]),
    ],
)  # fmt: skip
def test_what_is_no_wallets_address_is_refused(identity: Identity, address: Any) -> None:
    with pytest.raises(IdentityError, match=r"it must be 32 bytes in base58|only a key on the curve can sign"):
        identity.challenge(address, CLIENT)


@pytest.mark.parametrize(
    "signature", ["", "1" * 87, "0" * 88, b"", bytes(63), bytes(65), None, 7, "é" * 64, "1" * 5000]
)
def test_what_is_no_signature_is_refused_before_the_nonce_is_used(identity: Identity, signature: Any) -> None:
    challenge = identity.challenge(address_of(ANN), CLIENT)
    with pytest.raises(IdentityError, match="the signature must be 64 bytes, or those in base58"):
        identity.sign_in(challenge.address, challenge.nonce, signature)
    assert identity.sign_in(challenge.address, challenge.nonce, sign(ANN, challenge)).new


@pytest.mark.parametrize("nonce", ["", "x" * 22, None, 5, "' OR 1=1 --", "x" * 10**6])
def test_an_unknown_nonce_is_refused(identity: Identity, nonce: Any) -> None:
    identity.challenge(address_of(ANN), CLIENT)
    with pytest.raises(IdentityError, match="unknown, used or expired"):
        identity.sign_in(address_of(ANN), nonce, bytes(64))


# Linking.


def test_a_second_wallet_opens_the_same_account(identity: Identity) -> None:
    account = signed_in(identity, ANN).account
    challenge = identity.link_challenge(account, address_of(BOB), CLIENT)
    assert f"Link this wallet to the account {account}." in challenge.text
    assert identity.link(challenge.address, challenge.nonce, sign(BOB, challenge)).account == account
    assert signed_in(identity, BOB).account == account
    assert set(identity.wallets(account)) == {address_of(ANN), address_of(BOB)}


def test_B11_a_wallet_of_another_account_is_not_linked(identity: Identity, connection: Connection) -> None:
    ann, bob = signed_in(identity, ANN).account, signed_in(identity, BOB).account
    challenge = identity.link_challenge(ann, address_of(BOB), CLIENT)
    with pytest.raises(ConflictError, match="belongs to another account"):
        identity.link(challenge.address, challenge.nonce, sign(BOB, challenge))
    assert signed_in(identity, BOB).account == bob
    with pytest.raises(IntegrityError, match="a wallet stays"), immediate(connection):
        connection.execute("UPDATE wallets SET account = ?", (ann,))


def test_B11_a_session_is_not_fixed_by_a_challenge_for_something_else(identity: Identity) -> None:
    """Signing "link to the account of mallory" does not sign in, and signing in does not link."""
    mallory = signed_in(identity, BOB).account
    link = identity.link_challenge(mallory, address_of(ANN), CLIENT)
    with pytest.raises(IdentityError, match="another address, domain or purpose"):
        identity.sign_in(link.address, link.nonce, sign(ANN, link))
    enter = identity.challenge(address_of(ANN), CLIENT)
    with pytest.raises(IdentityError, match="another address, domain or purpose"):
        identity.link(enter.address, enter.nonce, sign(ANN, enter))
    assert identity.wallets(mallory) == [address_of(BOB)]


# Limits.


def test_B11_B13_a_flood_of_challenges_stops_at_the_client(ledger: Ledger, clock: Any, connection: Connection) -> None:
    identity = Identity(ledger, domain="example.org", clock=clock, client_limit=5)
    for _ in range(5):
        signed_in(identity, ANN, CLIENT)  # that they were used does not make room
    with pytest.raises(LimitError, match="5 challenges were asked for from here within 300 s; at most 5") as caught:
        identity.challenge(address_of(ANN), CLIENT)
    assert caught.value.retry_after_s == TTL_S
    signed_in(identity, ANN, "203.0.113.10")  # nobody else is locked out, not even of the same wallet
    clock.now += TTL_S
    signed_in(identity, ANN, CLIENT)
    assert connection.execute("SELECT count(*) FROM challenges").fetchone() == (1,)  # the old rows are gone


def test_B13_a_customer_of_ipv6_is_one_client(ledger: Ledger, clock: Any) -> None:
    identity = Identity(ledger, domain="example.org", clock=clock, client_limit=3)
    rng = random.Random(0)
    for client in ("2001:db8:1:2::1", f"2001:db8:1:2:{rng.getrandbits(16):x}::7", "2001:db8:1:2:ffff:ffff:ffff:ffff"):
        identity.challenge(address_of(ANN), client)
    with pytest.raises(LimitError):
        identity.challenge(address_of(ANN), "2001:db8:1:2:3:4:5:6")
    identity.challenge(address_of(ANN), "2001:db8:1:3::1")
    for client in ("198.51.100.1", "::ffff:198.51.100.1", "::ffff:c633:6401"):
        identity.challenge(address_of(ANN), client)
    with pytest.raises(LimitError):
        identity.challenge(address_of(ANN), "198.51.100.1")


def test_B11_all_clients_together_are_limited(ledger: Ledger, clock: Any) -> None:
    identity = Identity(ledger, domain="example.org", clock=clock, open_limit=20)
    for i in range(20):
        identity.challenge(address_of(ANN), f"198.51.100.{i}")
    with pytest.raises(LimitError, match="20 challenges were asked for in all"):
        identity.challenge(address_of(ANN), "198.51.100.99")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "https://example.org"}, "domain is 'https://example.org'; it must be a host"),
        ({"domain": "exämple.org"}, "domain is"),
        ({"domain": "example.org\nevil"}, "domain is"),
        ({"domain": ""}, "domain is"),
        ({"domain": "example.org", "uri": "javascript:alert(1)"}, "uri is"),
        ({"domain": "example.org", "uri": "https://example.org/\nNonce: x"}, "uri is"),
        ({"domain": "example.org", "statement": "a\r\nb"}, "statement is 'a.*it must be one line"),
        ({"domain": "example.org", "statement": "caf\u00e9"}, "statement is"),
        ({"domain": "example.org", "statement": ""}, "statement is"),
        ({"domain": "example.org", "chain": "ethereum"}, "chain is 'ethereum'; it must be one of mainnet"),
    ],
)
def test_B11_a_text_that_could_be_read_two_ways_cannot_be_configured(
    ledger: Ledger, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Identity(ledger, **options)
