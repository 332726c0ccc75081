"""Prepaid credit, from a wallet to a paid forecast, on one machine and without a network.

    python examples/payments/demo.py [FOLDER]

The token programs are Solana's own, run by LiteSVM; the forecasts are the bundled Chronos-2's. FOLDER, which must not
exist yet, keeps the ledger and its keys; without it they are removed at the end. The exit status is 1 if the audit
finds anything. Needs `pip install 'diffusionz[payments]'`.
"""

import asyncio
import datetime
import hashlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

from solders.keypair import Keypair
from solders.pubkey import Pubkey

from diffusionz import Chronos2, DiffusionzError
from diffusionz.payments.addresses import Addresses, Seed, derive_pool
from diffusionz.payments.audit import audit
from diffusionz.payments.chain import Chain
from diffusionz.payments.charges import Charges, Failure, call_id_of
from diffusionz.payments.database import immediate, open_database
from diffusionz.payments.deposits import Deposits, Pins
from diffusionz.payments.devnet import Devnet
from diffusionz.payments.identity import Identity
from diffusionz.payments.keys import Keys
from diffusionz.payments.ledger import Ledger
from diffusionz.payments.prices import SERVICES, PriceBook, parse_usd
from diffusionz.payments.rates import PICO, FixedSource, RateRules, Rates
from diffusionz.payments.settings import create_secret, read_secret
from diffusionz.payments.sweeper import Sweeper
from diffusionz.payments.watcher import Watcher

DECIMALS = 6
TOKEN = 10**DECIMALS  # base units
SOL = 10**9  # lamports
SERIES = [float(10 + 5 * (month % 12) + month) for month in range(48)]  # what the forecasts go on from


async def demo(folder: pathlib.Path) -> bool:
    """Returns whether the audit is clean, and alice has what she should have."""
    # A cluster of one node, with a token of its own, of which alice has some. The gas wallet will pay for sweeps; of
    # the treasury nobody here has the key.
    devnet = Devnet(seed=2026, genesis_time=int(time.time()))
    alice, gas, treasury = devnet.keypair("alice"), devnet.keypair("gas"), Keypair().pubkey()
    for wallet in (alice, gas):
        devnet.airdrop(wallet.pubkey(), SOL)
    mint = devnet.create_mint(DECIMALS)
    devnet.mint_to(mint, alice.pubkey(), 1_000 * TOKEN)
    devnet.finalize()

    # What a server keeps. The token is worth one cent today and was worth two at its best: services of our own are sold
    # at that all-time high.
    connection = open_database(folder / "payments.db")
    ledger = Ledger(connection)
    rates = Rates(
        connection,
        RateRules(min_sources=1, market_min_samples=1),
        decimals=DECIMALS,
        token_sources=[FixedSource(parse_usd("0.01", "token", scale=PICO))],
        sol_sources=[FixedSource(parse_usd("150", "SOL", scale=PICO))],
        first_high=parse_usd("0.02", "first high", scale=PICO),
    )
    await rates.refresh()

    def sol_to_tokens(lamports: int, now: float) -> tuple[int, str]:
        conversion = rates.convert_sol(lamports, now)
        return conversion.tokens, str(conversion)

    seed = Seed.create(folder / "master.seed")  # in production on another machine, with the sweeper
    addresses = Addresses(connection, "localnet")
    addresses.add(derive_pool(seed, "localnet", 0, 100))
    pins = Pins(str(devnet.genesis_hash), str(mint), str(devnet.program_of(mint)), DECIMALS)
    deposits = Deposits(connection, ledger, pins, sol_to_tokens, treasury=str(treasury))

    async with devnet.serving() as url, Chain.connect(url, genesis_hash=pins.genesis_hash) as chain:
        watcher = Watcher(chain, deposits)
        sweeper = Sweeper(chain, deposits, {seed.version: seed}, gas)
        await watcher.start()
        print(f"dev chain at {url}, token {mint}")

        # Alice's wallet signs a text, which costs nothing. The account is hers, and so is the API key that she makes.
        identity = Identity(ledger, domain="localhost", chain="localnet")
        challenge = identity.challenge(str(alice.pubkey()), client="127.0.0.1")
        signature = bytes(alice.sign_message(challenge.text.encode()))
        account = identity.sign_in(challenge.address, challenge.nonce, signature).account
        create_secret(folder / "pepper")
        keys = Keys(connection, read_secret(folder / "pepper", "pepper"))
        new_key = keys.create(account, services=["chronos2"])
        print(f"{challenge.address} signed in as {account}, with the API key {new_key.key.shown}")

        # A deposit is shown as soon as it has landed, and credited when it is final: 32 slots later, some 13 seconds on
        # mainnet. Here the clock is ours.
        address = addresses.issue(account)
        receiver = Pubkey.from_string(address)
        devnet.transfer(mint, alice, receiver, 250 * TOKEN)
        devnet.transfer_sol(alice, receiver, SOL // 50)
        print(f"\nalice sends 250 tokens and 0.02 SOL to {address}")
        devnet.advance()
        await watcher.scan()
        arriving = len(deposits.arriving(account))
        print(f"  landed: {arriving} deposits are arriving, her balance is {tokens(ledger.balance(account).available)}")
        devnet.finalize()
        await watcher.scan()
        print(f"  final:  her balance is {tokens(ledger.balance(account).available)} tokens")

        # A call's price is held before the work and charged after it. A call that fails gives it back: while it is
        # held, all of it; when it was charged already and the result got lost on its way, as a refund.
        book = PriceBook(SERVICES, rates)
        charges = Charges(ledger, book)

        def begin(idempotency_key: str) -> str:
            key = keys.authenticate(new_key.secret)
            keys.check_service(key, "chronos2")
            call = call_id_of(key.account, idempotency_key)
            request_hash = hashlib.sha256(repr(SERIES).encode()).hexdigest()
            with immediate(connection):
                hold = charges.hold(key.account, "chronos2", 1, call, request_hash, ttl_s=60)
                keys.spend(key, call, hold.tokens)
            print(f"\n{idempotency_key}: {hold.usd_micro / 1e6:.2f} USD are {tokens(hold.tokens)} tokens, {hold.state}")
            return call

        model = Chronos2("demo", device="cpu")
        call = begin("call 1")
        print(f"  after {SERIES[-4:]} come {forecast(model)}")
        print(f"  it is {charges.post(call).state}")

        call = begin("call 2")
        forecast(model)
        print(f"  it is {charges.post(call).state}; but the connection breaks before the result is through")
        print(f"  it is {charges.refund(call, Failure.result_lost).state}")

        call = begin("call 3")
        model.close()  # the engine is shut down under it
        try:
            forecast(model)
        except DiffusionzError as error:
            print(f"  it failed: {error}")
            print(f"  it is {charges.void(call, 'engine_error').state}")

        # Everything goes from the one-time addresses to the treasury, and so does the rent of the emptied account.
        await sweeper.step()
        devnet.finalize()
        await sweeper.resolve()
        swept, lamports = devnet.token_balance(mint, treasury), devnet.balance(treasury)
        print(f"\nswept: the treasury has {tokens(swept)} tokens and {lamports / SOL:.4f} SOL")

        # The journal is replayed, every price reckoned again, and the chain asked for every balance and transaction.
        report = await audit(watcher, thorough=True)

    print("\naudit:")
    for about, lines in report.invariants.items():
        for line in lines:
            print(f"  {'ok  ' if line.holds else 'FAIL'}  {about}: {line.name}; {line.detail}")

    # The history is a view of the journal: there is no second table that could say something else.
    print(f"\nthe history of {account}:")
    rows, balance = [], 0
    for entry in reversed(ledger.history(account)):
        balance += entry.posted
        at = datetime.datetime.fromtimestamp(entry.created_at, datetime.UTC).strftime("%H:%M:%S")
        posted, held = (f"{change / TOKEN:+,.2f}" if change else "" for change in (entry.posted, entry.held))
        rows.append((at, entry.kind, entry.code, posted, held, tokens(balance), entry.note[:32]))
    print_table(("UTC", "kind", "code", "posted", "held", "balance", "note"), rows)

    paid = book.quote("chronos2", now=time.time()).tokens  # the one call of three that was served
    connection.close()
    return report.clean and balance == 250 * TOKEN + 300 * TOKEN - paid and swept == 250 * TOKEN


def forecast(model: Chronos2) -> list[float]:
    """The paid work: the next four steps."""
    return [round(float(value), 1) for value in model.forecast(SERIES, 4).mean[0]]


def tokens(base_units: int) -> str:
    return f"{base_units / TOKEN:,.2f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        if str(folder) != temporary:
            try:
                folder.mkdir(mode=0o700, parents=True)
            except OSError as error:
                print(f"{folder}: {error.strerror}", file=sys.stderr)
                return 1
        return 0 if asyncio.run(demo(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
