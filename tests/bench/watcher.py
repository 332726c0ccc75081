"""The watcher's cost with 10,000 deposit addresses: seconds of work and requests to the node for each scan.

    python -m tests.bench.watcher all           every claim
    python -m tests.bench.watcher idle
        --record                                appends rows to results/<machine>.csv
        --quick                                 tiny, to see that everything runs

idle      a scan when nothing has happened, and each address was given out long ago: what a quiet shop pays every 2 s
hot       the same when every address was given out this week: each is in every scan
deposits  a scan that finds and credits 100 deposits of tokens, each to another address

A tenth of the addresses hold tokens and SOL. The dev chain answers in the same process, and its work is in the times;
the network of a real node is not, which is what the number of requests is for: they are made one after the other. The
peer is the goal: the 2 s from one scan to the next, and for deposits the 30 s in which they are to be credited.
--threads and --model mean nothing here.
"""

from __future__ import annotations

import asyncio
import pathlib
import time

from solders.pubkey import Pubkey
from spl.token.constants import TOKEN_PROGRAM_ID

from diffusionz.payments.addresses import Addresses, Seed, derive_pool
from diffusionz.payments.chain import Chain
from diffusionz.payments.database import Connection, immediate, open_database
from diffusionz.payments.deposits import Deposits, Pins
from diffusionz.payments.devnet import Devnet
from diffusionz.payments.ledger import Ledger
from diffusionz.payments.watcher import Watcher
from tests.bench.harness import Bench, run_claims
from tests.bench.record import Comparison

ADDRESSES, QUICK_ADDRESSES = 10_000, 150
HOLDERS = 10  # every so many addresses one that holds something
FOUND = 100  # deposits
SCAN_S = 2.0  # the watcher's interval_s
CREDITED_S = 30.0  # after finality
LONG_AGO_S = 30 * 86_400
NETWORK = "localnet"


class Shop:
    """A chain, and a database whose addresses were given out `age_s` seconds ago."""

    def __init__(self, path: pathlib.Path, addresses: int, age_s: float) -> None:
        self.devnet = Devnet(seed=1)
        self.devnet.advance(int((age_s + 3600) / 0.4))
        self.buyer = self.devnet.keypair("buyer")
        self.devnet.airdrop(self.buyer.pubkey(), 10**13)
        self.mint = self.devnet.create_mint()
        self.devnet.mint_to(self.mint, self.buyer.pubkey(), 10**15)
        self.connection: Connection = open_database(path)
        ledger = Ledger(self.connection, self.clock)
        pool = Addresses(self.connection, NETWORK, clock=lambda: self.clock() - age_s)
        pool.add(derive_pool(Seed(bytes(range(32))), NETWORK, 0, addresses))
        self.addresses = []
        with immediate(self.connection):
            for number in range(addresses):
                ledger.open_account(f"user:{number}", "user")
                self.addresses.append(Pubkey.from_string(pool.issue(f"user:{number}")))
        pins = Pins(str(self.devnet.genesis_hash), str(self.mint), str(TOKEN_PROGRAM_ID), 6)
        self.deposits = Deposits(
            self.connection, ledger, pins, lambda lamports, now: (lamports, "1 to 1"),
            treasury=str(self.devnet.keypair("treasury").pubkey()), clock=self.clock,
        )  # fmt: skip
        self.ledger = ledger
        for address in self.addresses[::HOLDERS]:
            self.pay(address, 1000)
            self.devnet.transfer_sol(self.buyer, address, 10**6)
        self.devnet.finalize()
        self.chain = Chain(self.devnet.client())
        self.watcher = Watcher(self.chain, self.deposits, interval_s=SCAN_S, clock=self.clock)

    def clock(self) -> float:
        return float(self.devnet.time)

    def pay(self, address: Pubkey, amount: int) -> None:
        self.devnet.transfer(self.mint, self.buyer, address, amount)

    async def settle(self) -> None:
        """Until all that was paid so far is credited."""
        holders = len(self.addresses[::HOLDERS])
        while self.watcher.deposits.connection.execute("SELECT count(*) FROM credited").fetchone()[0] < 2 * holders:
            await self.watcher.scan()
            self.devnet.advance(5)
        await self.watcher.scan()
        self.expect(holders * (1000 + 10**6))

    def expect(self, credited: int) -> None:
        accounts = self.ledger.accounts()
        found = sum(sums.credits_posted for name, sums in accounts.items() if name.startswith("user:"))
        if found != credited:
            raise SystemExit(f"parity: {found} base units are credited, {credited} were paid: not timed")

    async def scan(self) -> tuple[float, int]:
        """Seconds and requests of one."""
        self.devnet.advance(int(SCAN_S / 0.4))
        before, begin = len(self.devnet.rpc.calls), time.perf_counter()
        await self.watcher.scan()
        return time.perf_counter() - begin, len(self.devnet.rpc.calls) - before

    async def close(self) -> None:
        await self.chain.close()
        self.connection.close()


def quiet(bench: Bench, name: str, age_s: float) -> None:
    asyncio.run(_quiet(bench, name, age_s))


async def _quiet(bench: Bench, name: str, age_s: float) -> None:
    addresses = QUICK_ADDRESSES if bench.args.quick else ADDRESSES
    shop = Shop(bench.scratch / f"{name}.db", addresses, age_s)
    await shop.settle()
    # What was paid makes an address hot for a week; the shop is then as its addresses are.
    shop.devnet.advance(int(8 * 86_400 / 0.4) if age_s else 1)
    await shop.scan()
    scans = [await shop.scan() for _ in range(bench.args.repeats or 20)]
    requests = sum(count for _, count in scans) / len(scans)
    print(f"parity: all that was paid is credited; {requests:.1f} requests a scan of {addresses} addresses", flush=True)
    size = f"{addresses} addresses, {requests:.0f} requests"
    times = [seconds for seconds, _ in scans]
    bench.report(Comparison(f"watcher-{name}", size, times, [SCAN_S], goal=1.0, peer_name="the goal"))
    await shop.close()


async def _deposits(bench: Bench) -> None:
    addresses = QUICK_ADDRESSES if bench.args.quick else ADDRESSES
    shop = Shop(bench.scratch / "deposits.db", addresses, 0.0)
    await shop.settle()
    paid = len(shop.addresses[::HOLDERS]) * (1000 + 10**6)
    times, requests = [], 0
    for _ in range(bench.args.repeats or 10):
        for address in shop.addresses[1 : FOUND + 1]:
            shop.pay(address, 7)
        shop.devnet.finalize()
        seconds, count = await shop.scan()
        paid += 7 * FOUND
        shop.expect(paid)  # in this scan, and not later
        times.append(seconds)
        requests += count
    requests //= len(times)
    print(f"parity: {FOUND} deposits are credited in one scan, of {requests} requests", flush=True)
    size = f"{FOUND} deposits, {addresses} addresses, {requests} requests"
    bench.report(Comparison("watcher-deposits", size, times, [CREDITED_S], goal=1.0, peer_name="the goal"))
    await shop.close()


CLAIMS = {
    "idle": lambda bench: quiet(bench, "idle", LONG_AGO_S),
    "hot": lambda bench: quiet(bench, "hot", 0.0),
    "deposits": lambda bench: asyncio.run(_deposits(bench)),
}


def main(argv: list[str] | None = None) -> list[Comparison]:
    return run_claims(CLAIMS, __doc__, "tests.bench.watcher", argv)


if __name__ == "__main__":
    main()
