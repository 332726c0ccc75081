"""What the settings say, put together: the parts that share a database, for the command line and for a server.

    with opened(settings) as shop:                       # the ledger's file has to be there
        async with shop.chain() as chain, shop.rates_client() as rates:
            watcher = shop.watcher(chain)
            await watcher.start()
            await rates.refresh()
            await watcher.scan()

`create` makes a new folder with keys, settings and an empty ledger.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import httpx2
from solders.keypair import Keypair
from spl.token.constants import TOKEN_2022_PROGRAM_ID, TOKEN_PROGRAM_ID

from diffusionz.payments import settings as configuration
from diffusionz.payments.addresses import Addresses, Seed, derive_pool, parse_address
from diffusionz.payments.chain import GENESIS_HASHES, TIMEOUT_S, Chain
from diffusionz.payments.database import Connection, open_database
from diffusionz.payments.deposits import Deposits, Pins
from diffusionz.payments.errors import AmountError, ChainError, ConfigurationError
from diffusionz.payments.ledger import AMOUNT_MAX, Ledger
from diffusionz.payments.rates import LAMPORTS, SOL_DECIMALS, Rates
from diffusionz.payments.settings import Settings
from diffusionz.payments.sweeper import Sweeper
from diffusionz.payments.watcher import Watcher

CONFIG = "payments.toml"
DEVNET_URL = "http://127.0.0.1:8899"
DEVNET_DECIMALS = 6
FINALITY_SLOTS = 32
PROGRAMS = {"spl-token": str(TOKEN_PROGRAM_ID), "token-2022": str(TOKEN_2022_PROGRAM_ID)}


class Shop(NamedTuple):
    """The parts that share a database."""

    settings: Settings
    connection: Connection
    ledger: Ledger
    rates: Rates
    addresses: Addresses
    deposits: Deposits

    def watcher(self, chain: Chain, **options: Any) -> Watcher:
        return Watcher(chain, self.deposits, **options)

    def sweeper(self, chain: Chain, seed: Seed, gas: Keypair, **options: Any) -> Sweeper:
        return Sweeper(chain, self.deposits, {seed.version: seed}, gas, **options)

    def newest(self, account: str) -> int:
        """The seq of the account's last line."""
        lines = self.ledger.history(account, limit=1)
        return lines[0].seq if lines else 0

    def chain(self, first: int = 0) -> contextlib.AbstractAsyncContextManager[Chain]:
        """See `connected`."""
        return connected(self.settings, first)

    @contextlib.asynccontextmanager
    async def rates_client(self) -> AsyncIterator[Rates]:
        """The rates, with the sources that are configured. A node is asked only by sources that need its slot."""

        async def slot() -> int:
            async with self.chain() as chain:
                return (await chain.tip("processed")).slot

        async with httpx2.AsyncClient() as client:
            yield Rates.from_settings(self.settings, self.connection, client=client, slot=slot)


def assemble(
    settings: Settings, connection: Connection, *, on_credit: Callable[[str, int], None] = lambda user, tokens: None
) -> Shop:
    """The parts over an open database; `on_credit` is that of Deposits. Raises ConfigurationError, also when the
    database was made for another token or cluster."""
    settings.require("mint", "treasury")
    if settings.network not in GENESIS_HASHES:
        settings.require("genesis_hash")
    ledger = Ledger(connection)
    rates = Rates.from_settings(settings, connection)

    def sol_to_tokens(lamports: int, now: float) -> tuple[int, str]:
        conversion = rates.convert_sol(lamports, now)
        return conversion.tokens, str(conversion)

    pins = Pins(
        settings.genesis_hash or GENESIS_HASHES[settings.network],
        str(settings.mint),
        PROGRAMS[settings.token_program],
        settings.token_decimals,
    )
    treasury = str(settings.treasury)
    deposits = Deposits(connection, ledger, pins, sol_to_tokens, treasury=treasury, on_credit=on_credit)
    return Shop(settings, connection, ledger, rates, Addresses(connection, settings.network), deposits)


def open_connection(settings: Settings, *, busy_timeout_s: float = 10.0) -> Connection:
    """The database, which has to be there, for none is made by mistake. Raises ConfigurationError, StorageError."""
    if not os.path.exists(settings.database):
        raise ConfigurationError(f"database: there is no {settings.database}; `diffusionz wallet create` makes one")
    return open_database(settings.database, busy_timeout_s=busy_timeout_s)


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Shop]:
    """The parts, over a connection of this thread's. Raises ConfigurationError, StorageError."""
    with contextlib.closing(open_connection(settings)) as connection:
        yield assemble(settings, connection)


@contextlib.asynccontextmanager
async def connected(settings: Settings, first: int = 0) -> AsyncIterator[Chain]:
    """The first node that answers, beginning with number `first` of the URLs (modulo how many there are).

    Raises ChainError when none does.
    """
    settings.require("rpc_urls")
    first %= len(settings.rpc_urls)
    urls = settings.rpc_urls[first:] + settings.rpc_urls[:first]
    for last, url in ((url == urls[-1], url) for url in urls):
        async with Chain.connect(url) as chain:
            try:
                await chain.genesis_hash()
            except ChainError:
                if last:
                    raise
                continue
            yield chain
            return


def seed_of(settings: Settings) -> Seed:
    """Raises ConfigurationError, SeedError."""
    settings.require("seed_file")
    return Seed.load(str(settings.seed_file))


def gas_of(settings: Settings) -> Keypair:
    """Raises ConfigurationError."""
    text = settings.secret("gas_key_file")
    try:
        return Keypair.from_json(text.decode())
    except Exception:  # whose message may have some of the key
        raise ConfigurationError(
            f"gas_key_file: {settings.gas_key_file} is not a wallet; it must be a JSON list of 64 bytes"
        ) from None


def refill(addresses: Addresses, seed: Seed, count: int) -> int:
    """Adds the next addresses of the seed to the pool; returns how many."""
    (first,) = addresses.connection.execute(
        "SELECT coalesce(max(position) + 1, 0) FROM deposit_addresses WHERE network = ? AND version = ?",
        (addresses.network, seed.version),
    ).fetchone()
    return addresses.add(derive_pool(seed, addresses.network, first, count))


# --- A new one ---


async def create(
    folder: str | os.PathLike[str],
    *,
    rpc_url: str = DEVNET_URL,
    mint: str | None = None,
    treasury: str | None = None,
    addresses: int = 1000,
) -> dict[str, Any]:
    """Makes a new folder with payments.toml, an empty ledger and its keys, and says what is in it; or makes nothing.

    On a dev chain the mint and the treasury are new ones if none are given. Raises OSError when the folder exists,
    AddressError, ChainError, and ConfigurationError.
    """
    path = pathlib.Path(folder).absolute()
    path.mkdir(mode=0o700, parents=True)
    try:
        return await _fill(path, rpc_url, mint, treasury, addresses)
    except BaseException:
        shutil.rmtree(path)  # which was empty before
        raise


async def _fill(
    folder: pathlib.Path, url: str, mint: str | None, treasury: str | None, addresses: int
) -> dict[str, Any]:
    async with Chain.connect(url) as chain:
        genesis_hash = await chain.genesis_hash()
        network = next((name for name, hash in GENESIS_HASHES.items() if hash == genesis_hash), "localnet")
        if network != "localnet" and not (mint and treasury):
            raise ConfigurationError(f"{network} needs --mint and --treasury")
        mint = mint or await _new_mint(url)
        treasury = treasury or str(Keypair().pubkey())
        token = await chain.mint(parse_address(mint))
        gas = Keypair()

        lines: dict[str, Any] = {
            "database": str(folder / "payments.db"),
            "network": network,
            "rpc_urls": [url],
            "mint": mint,
            "token_program": next(name for name, program in PROGRAMS.items() if program == str(token.program)),
            "token_decimals": token.decimals,
            "treasury": str(parse_address(treasury)),
            "seed_file": str(folder / "master.seed"),
            "gas_key_file": str(folder / "gas.json"),
            "pepper_file": str(folder / "pepper"),
        }
        if network == "localnet":
            # Of no market; so that SOL is credited and calls have a price.
            lines |= {"genesis_hash": genesis_hash, "domain": "localhost"}
            lines |= {"rates_token_sources": ["fixed"], "rates_fixed_token": "0.01", "rates_first_high": "0.02"}
            lines |= {"rates_sol_sources": ["fixed"], "rates_fixed_sol": "150"}
            lines |= {"rates_min_sources": 1, "rates_market_min_samples": 1}
        # A JSON string, number or list of them is TOML too.
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        _write_private(folder / CONFIG, text)
        _write_private(folder / "gas.json", gas.to_json() + "\n")
        configuration.create_secret(folder / "pepper")
        seed = Seed.create(folder / "master.seed")
        settings = configuration.load(folder / CONFIG, environ={})
        with contextlib.closing(open_database(settings.database)) as connection:
            shop = assemble(settings, connection)
            shop.addresses.add(derive_pool(seed, network, 0, addresses))
            await shop.watcher(chain).start()
        if network == "localnet":
            await call(url, "requestAirdrop", str(gas.pubkey()), LAMPORTS)
    return {
        "folder": str(folder), "network": network, "genesis_hash": genesis_hash, "mint": mint, "treasury": treasury,
        "gas": str(gas.pubkey()), "addresses": addresses,
    }  # fmt: skip


def _write_private(path: pathlib.Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


# --- The dev chain's own methods ---


async def faucet(settings: Settings, address: str, *, tokens: int = 0, lamports: int = 0) -> dict[str, Any]:
    """Sends newly minted base units, and lamports of the chain's own purse, to a wallet or a deposit address.

    On a dev chain only. Raises ConfigurationError, AddressError, ChainError.
    """
    if settings.network != "localnet":
        raise ConfigurationError(f"the settings are of {settings.network}; there is a faucet on dev chains alone")
    settings.require("rpc_urls", "mint")
    address, url = str(parse_address(address)), settings.rpc_urls[0]
    sent: dict[str, Any] = {"address": address}
    if lamports:
        sent |= {"lamports": lamports, "sol_signature": await call(url, "requestAirdrop", address, lamports)}
    if tokens:
        signature = await call(url, "devnet_mintTo", settings.mint, address, tokens)
        sent |= {"tokens": tokens, "token_signature": signature}
    return sent


async def _new_mint(url: str) -> str:
    """Makes a token on a dev chain, finally. Raises ConfigurationError when the node is none."""
    try:
        mint: str = await call(url, "devnet_createMint", DEVNET_DECIMALS, f"token {secrets.token_hex(8)}")
        await call(url, "devnet_advance", FINALITY_SLOTS)
    except ChainError as error:
        raise ConfigurationError(
            f"the cluster is no dev chain that makes tokens: give --mint and --treasury ({error})"
        ) from None
    return mint


async def call(url: str, method: str, *params: object) -> Any:
    """A JSON-RPC method that the client of Solana has no name for. Raises ChainError."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
    try:
        async with httpx2.AsyncClient(timeout=TIMEOUT_S) as client:
            answer = (await client.post(url, json=request)).json()
    except (httpx2.HTTPError, ValueError) as error:
        raise ChainError(f"{method}: the node does not answer: {type(error).__name__}") from None
    if "result" not in answer:
        raise ChainError(f"{method}: {answer.get('error', {}).get('message', 'no result')}", retryable=False)
    return answer["result"]


def base_units(amount: Decimal, decimals: int, what: str) -> int:
    """A number of whole tokens (or SOL) as base units, exact. Raises AmountError."""
    scaled = amount.scaleb(decimals) if amount.is_finite() else amount
    if not scaled.is_finite() or scaled != int(scaled) or not 0 <= scaled <= AMOUNT_MAX:
        raise AmountError(f"{what} is {amount}; it may have {decimals} decimals, and 2^63-1 base units")
    return int(scaled)


__all__ = [
    "CONFIG", "DEVNET_URL", "LAMPORTS", "SOL_DECIMALS", "Shop", "assemble", "base_units", "call", "connected", "create",
    "faucet", "gas_of", "open_connection", "opened", "refill", "seed_of",
]  # fmt: skip
