"""Users, a chain, crashes, clocks and rate feeds, all from one seed; after each step every invariant is looked at.

    python -m tests.payments.simulation --steps 100000 --seed 1

Goal: whatever happens, in whatever order, no money appears, disappears, or is owed below zero. Method, after that of
FoundationDB and TigerBeetle: one `random.Random(seed)` chooses every step, the parts under test are the real ones on a
real database and a real (dev) chain, and what must be true is reckoned a second time, from what the chain and the users
did.

The watchers, sweepers and the reader of rates are tasks that stop before and after each of their awaits; what else
happens goes in between. A crash is one of two things, at an await or between two statements of SQL: a process is gone
(its connection closes with whatever transaction was open), or the machine is (all of them are, and what goes on is a
copy of the files as they lay there).

With `--processes` the watcher and the sweeper are processes of the system instead, which ask the chain over HTTP, and
SIGKILL ends them at any moment; then the seed alone does not tell the course.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from decimal import Decimal
from typing import Any, TypeVar

from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import TransferParams, transfer
from solders.transaction import VersionedTransaction
from spl.token import instructions as spl
from spl.token.constants import TOKEN_PROGRAM_ID
from spl.token.models import AuthorityType, SetAuthorityParams

from diffusionz.payments import tokens
from diffusionz.payments.addresses import Addresses, Seed, derive_pool
from diffusionz.payments.chain import Chain
from diffusionz.payments.charges import Charges, Failure, Hold
from diffusionz.payments.database import Connection, immediate, open_database
from diffusionz.payments.deposits import SOL, Deposits, Pins
from diffusionz.payments.devnet import Devnet, Record
from diffusionz.payments.devnet import faults as failing
from diffusionz.payments.devnet.faults import Installed
from diffusionz.payments.errors import (
    AddressError,
    AmountError,
    BalanceError,
    ChainError,
    ConflictError,
    ExpiredError,
    IdentityError,
    NotFoundError,
    PaymentsError,
    RateError,
)
from diffusionz.payments.identity import Identity
from diffusionz.payments.keys import Keys, NewKey
from diffusionz.payments.ledger import Ledger, Result, Sums
from diffusionz.payments.prices import SERVICES, PriceBook, Service
from diffusionz.payments.rates import Observation, RateRules, Rates
from diffusionz.payments.sweeper import Sweeper
from diffusionz.payments.watcher import UNEXPLAINED, Watcher
from tests.payments.world import NETWORK, SECRET, Killed

T = TypeVar("T")
ROOT = pathlib.Path(__file__).parents[2]
DECIMALS = 6
POOL = 600
USERS_MAX = 40
CALM = {UNEXPLAINED, "gas is low", "stray tokens"}  # the alarms that what happens here can raise


# Processes that can die ----------------------------------------------------------------------------------------------


class Fuse:
    """Counts what a process does, and ends it when `left` is used up."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.blown = False

    def burn(self) -> None:
        if self.left is not None and not self.blown:
            self.left -= 1
            self.blown = self.left < 0
        if self.blown:
            raise Killed


class Mortal:
    """A connection whose process may die before and after each statement. The dead roll nothing back."""

    def __init__(self, connection: Connection, fuse: Fuse) -> None:
        self._connection, self._fuse = connection, fuse

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction and not self._fuse.blown

    def execute(self, *arguments: Any) -> Any:
        self._fuse.burn()
        answer = self._connection.execute(*arguments)
        self._fuse.burn()
        return answer

    def executemany(self, *arguments: Any) -> Any:
        self._fuse.burn()
        answer = self._connection.executemany(*arguments)
        self._fuse.burn()
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class Process:
    """A connection, what works on it, and the coroutine that it is in the middle of."""

    def __init__(self, world: Simulation, name: str) -> None:
        self.world, self.name = world, name
        self.task: asyncio.Task[Any] | None = None
        self.boot()

    def boot(self) -> None:
        """Starts it anew: nothing of its memory is left."""
        world = self.world
        self.fuse = Fuse()
        self._file = open_database(world.path, busy_timeout_s=0.2)
        self._file.execute("PRAGMA synchronous = OFF")  # nobody pulls the plug here
        self.connection: Any = Mortal(self._file, self.fuse)
        self.ledger = Ledger(self.connection, world.clock)
        self.rates = Rates(
            self.connection, world.rules, decimals=DECIMALS, clock=world.clock, first_high=world.market.first_high,
            token_sources=[Feed(world, self, "token", i) for i in range(3)],
            sol_sources=[Feed(world, self, "sol", i) for i in range(3)],
        )  # fmt: skip
        self.charges = Charges(self.ledger, PriceBook(SERVICES, self.rates))
        self.identity = Identity(self.ledger, domain="example.org", clock=world.clock)
        self.keys = Keys(self.connection, bytes(32), clock=world.clock)
        self.addresses = Addresses(self.connection, NETWORK, max_open=4, clock=world.clock)
        self.deposits = Deposits(
            self.connection, self.ledger, world.pins, self._sol_to_tokens, treasury=str(world.treasury),
            clock=world.clock,
        )  # fmt: skip
        chain: Any = Paused(world.chain, self)
        self.watcher = Watcher(
            chain, self.deposits, interval_s=2.0, hot_s=3600.0, rotation_s=600.0, budget=6, clock=world.clock
        )
        self.sweeper = Sweeper(chain, self.deposits, world.seeds, world.gas, clock=world.clock)

    def _sol_to_tokens(self, lamports: int, now: float) -> tuple[int, str]:
        conversion = self.rates.convert_sol(lamports, now)
        return conversion.tokens, str(conversion)

    async def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begins the coroutine and lets it come to its first await."""
        self._stopped = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(work)
        self.task.add_done_callback(self._ended)
        await self._stopped

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # so that asyncio does not complain of what nobody asks the dead about
        if task is self.task and not self._stopped.done():
            self._stopped.set_result(None)

    async def step(self) -> None:
        """Lets the coroutine come to its next await."""
        self._stopped = asyncio.get_running_loop().create_future()
        self._go.set_result(None)
        await self._stopped

    async def pause(self, fuse: Fuse) -> None:
        """Here something else may happen: time passes, others work, the process dies."""
        fuse.burn()
        self._go = asyncio.get_running_loop().create_future()
        self._stopped.set_result(None)
        await self._go
        fuse.burn()

    def end(self) -> None:
        """kill -9."""
        self.fuse.blown = True
        self._file.close()
        if self.task is not None:
            self.task.cancel()  # and whatever it does about that is done by a dead process
        self.task = None


class Paused:
    """The chain as a process sees it: it waits before each call and after it."""

    def __init__(self, chain: Chain, process: Process) -> None:
        self._chain, self._process, self._fuse = chain, process, process.fuse

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._chain, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._process.pause(self._fuse)
            answer = await method(*args, **kwargs)
            await self._process.pause(self._fuse)
            return answer

        return call


# What things are worth -----------------------------------------------------------------------------------------------


class Market:
    """The true prices in pico-USD, and what the feeds make of them.

    The truth wanders between 0.75 and 1.4 times its base; the base may triple, or fall to a third. Those who lie
    together say twenty times as much, or a twentieth: never what could be true.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.base = {"token": 10**9, "sol": 150 * 10**12}
        self.price = dict(self.base)
        self.lie = {"token": 20.0, "sol": 20.0}
        self.manners = {asset: ["honest"] * 3 for asset in self.base}
        self.past: dict[str, collections.deque[tuple[int, int]]] = {asset: collections.deque() for asset in self.base}
        self.first_high = 3 * 10**9 // 2
        self.highest = self.first_high

    def move(self, now: int) -> None:
        for asset, base in self.base.items():
            price = int(self.price[asset] * self.chance.uniform(0.98, 1.02))
            self.price[asset] = min(max(price, base * 75 // 100), base * 140 // 100)
            past = self.past[asset]
            past.append((now, self.price[asset]))
            while len(past) > 1 and past[1][0] < now - 900:
                past.popleft()
        self.highest = max(self.highest, self.price["token"])

    def possible(self, asset: str, rate: int) -> bool:
        """Whether an honest source could have said so in the last minutes."""
        known = [price for _, price in self.past[asset]]
        return min(known) * 89 // 100 <= rate <= max(known) * 111 // 100

    def behave(self) -> None:
        """Some feeds change their manners."""
        manners = ["honest", "honest", "honest", "late", "stale", "missing", "broken", "thin", "liar", "future"]
        for asset, feeds in self.manners.items():
            feeds[self.chance.randrange(3)] = self.chance.choice(manners)
            if self.chance.random() < 0.15:
                feeds[:2] = ["liar", "liar"]
            self.lie[asset] = self.chance.choice([20.0, 300.0, 0.05, 0.001])


class Feed:
    """One source of a rate. The first of each asset takes its time."""

    def __init__(self, world: Simulation, process: Process, asset: str, number: int) -> None:
        self.name = f"feed {number}"
        self._world, self._process, self._fuse = world, process, process.fuse
        self._asset, self._number = asset, number

    async def read(self, now: float) -> Observation:
        if self._asset == "token" and self._number == 0:
            await self._process.pause(self._fuse)
        market, at = self._world.market, self._world.devnet.time
        price, manner = market.price[self._asset], market.manners[self._asset][self._number]
        said = int(price * (1 + (self._number - 1) * 0.03))
        if manner == "missing":
            raise RateError("no price")
        if manner == "broken":
            raise KeyError("usdPrice")
        if manner == "stale":
            return Observation(said * 3, at - 1000)
        if manner == "late":
            return Observation(said, at - 60)
        if manner == "future":
            return Observation(said * 3, at + 1000)
        if manner == "thin":
            return Observation(said * 7, at, 100)
        if manner == "liar":
            return Observation(int(price * market.lie[self._asset]), at)
        return Observation(said, at, 10**6)


# What must be true ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """A call as its user knows it."""

    id: str
    user: str
    service: Service
    units: int
    hash: str
    key: NewKey
    tokens: int = 0
    rate: int = 0
    expires_at: int = 0
    resolved: str = ""  # posted, voided, expired, refunded
    charged: int = 0
    posted_units: int = 0


@dataclasses.dataclass
class Entry:
    """What the auditor remembers of a hold or a post."""

    kind: str
    debit: str
    credit: str
    amount: int
    expires_at: int | None
    taken: bool = False


class Auditor:
    """Reads what is new in the database and on the chain after each step, and adds it up by itself."""

    def __init__(self, world: Simulation) -> None:
        self.world = world
        self.sums: dict[str, Sums] = collections.defaultdict(Sums)
        self.entries: dict[int, Entry] = {}
        self.seen = collections.Counter[str]()  # the last row of each table
        self.truth: dict[tuple[str, str], tuple[str, int, int]] = {}  # (signature, account): mint, delta, slot
        self.recorded: set[tuple[str, str]] = set()
        self.balances: dict[str, int] = collections.defaultdict(int)
        self.uncredited: dict[int, tuple[str, str, int]] = {}  # movement: account, mint, delta
        self.totals = collections.Counter[str]()
        self.evidence: dict[str, list[tuple[int, int, str, int | None]]] = {"token": [], "sol": []}
        self.highs: list[tuple[int, int, int]] = []  # id, at, high
        self._finalized = 0
        self.open()

    def open(self) -> None:
        self.connection = open_database(self.world.path)

    def close(self) -> None:
        self.connection.close()

    def new(self, table: str, columns: str, key: str = "id") -> Iterator[tuple[Any, ...]]:
        """The table's rows that were not there before; the first column is its key."""
        for row in self.connection.execute(
            f"SELECT {key}, {columns} FROM {table} WHERE {key} > ? ORDER BY {key}", (self.seen[table],)
        ).fetchall():
            assert row[0] == self.seen[table] + 1, f"{table} has a gap before {row[0]}"
            self.seen[table] = row[0]
            yield row

    def look(self) -> None:
        """Everything that can be told at any moment."""
        self.read_chain()
        self.connection.execute("BEGIN")
        try:
            self.read_rates()
            deposits = self.read_journal()
            self.read_movements()
            self.read_credits(deposits)
            self.compare_balances()
        finally:
            self.connection.execute("ROLLBACK")

    def read_chain(self) -> None:
        """What became final, from the cluster's own records."""
        cluster, ours = self.world.devnet.cluster, self.world.ours
        final = cluster.slot_at("finalized")
        while self._finalized < len(cluster.records) and cluster.records[self._finalized].slot <= final:
            record = cluster.records[self._finalized]
            self._finalized += 1
            if record.error is None:
                for index, key in enumerate(record.keys):
                    if key in ours:
                        self.note_truth(record, index, str(key), *ours[key])

    def note_truth(self, record: Record, index: int, account: str, address: str, mint: str) -> None:
        if mint == SOL:
            delta = record.post_lamports[index] - record.pre_lamports[index]
        else:
            delta = sum(
                sign * state.amount
                for sign, states in ((1, record.post_tokens), (-1, record.pre_tokens))
                for state in states
                if (state.index, str(state.mint), str(state.owner), state.program)
                == (index, mint, address, TOKEN_PROGRAM_ID)
            )
        if delta:
            self.truth[str(record.signature), account] = (mint, delta, record.slot)

    def read_journal(self) -> dict[str, tuple[str, str, int]]:
        """Replays what is new; returns the new credits of deposits: their debit, credit and amount by id."""
        deposits = {}
        for seq, id, kind, debit, credit, amount, refers_to, expires_at, code, created_at in self.new(
            "transfers", "id, kind, debit, credit, amount, refers_to, expires_at, code, created_at", "seq"
        ):
            assert amount > 0 and debit != credit
            pending = posted = 0
            if kind == "transfer":
                posted = amount
                if code == "deposit":
                    deposits[id] = (debit, credit, amount)
                else:
                    assert (code, debit, credit) == ("sweep", "chain:treasury", "chain:token"), id
                    self.totals["journal sweeps"] += amount
            elif kind == "hold":
                pending = amount
            else:
                about = self.entries[refers_to]
                assert not about.taken, f"{id} takes {refers_to} a second time"
                about.taken = True
                assert about.kind == ("post" if kind == "refund" else "hold") and amount <= about.amount, id
                sides = (credit, debit) if kind == "refund" else (debit, credit)
                assert sides == (about.debit, about.credit), id
                if kind == "refund":
                    posted = amount
                else:
                    pending, posted = -about.amount, amount if kind == "post" else 0
                    assert (kind == "expiry") == (created_at >= about.expires_at), id
            if kind in ("hold", "post"):
                self.entries[seq] = Entry(kind, debit, credit, amount, expires_at)
            self.sums[debit].debits_pending += pending
            self.sums[debit].debits_posted += posted
            self.sums[credit].credits_pending += pending
            self.sums[credit].credits_posted += posted
        return deposits

    def read_movements(self) -> None:
        for id, signature, account, mint, kind, delta, slot in self.new(
            "movements", "signature, account, mint, kind, delta, slot"
        ):
            key = (signature, account)
            assert key not in self.recorded, f"{key} is recorded twice"
            assert self.truth.get(key) == (mint, delta, slot), f"{kind} {delta} of {key}: {self.truth.get(key)} is true"
            assert kind == ("deposit" if delta > 0 else "sweep"), f"{kind} {delta} of {key}"
            self.recorded.add(key)
            self.balances[account] += delta
            assert self.balances[account] >= 0, account
            self.totals[f"{kind} {'SOL' if mint == SOL else 'tokens'}"] += delta
            if kind == "deposit":
                self.uncredited[id] = (account, mint, delta)

    def read_credits(self, deposits: dict[str, tuple[str, str, int]]) -> None:
        """Each deposit is credited once or waits; each credit is of deposits, to whom the address was given."""
        groups: dict[str, list[tuple[str, str, int]]] = collections.defaultdict(list)
        if self.uncredited:
            places = ", ".join("?" * len(self.uncredited))
            for movement, id in self.connection.execute(
                f"SELECT movement, transfer FROM credited WHERE movement IN ({places})", list(self.uncredited)
            ).fetchall():
                groups[id].append(self.uncredited.pop(movement))
        assert groups.keys() == deposits.keys(), "credits and deposits are not the same"
        waiting = {movement for (movement,) in self.connection.execute("SELECT movement FROM waiting")}
        assert waiting == self.uncredited.keys(), f"waiting are {waiting}, not credited {self.uncredited.keys()}"
        for id, group in groups.items():
            debit, user, amount = deposits[id]
            assert {self.world.owners[self.world.ours[Pubkey.from_string(account)][0]] for account, _, _ in group} == {
                user
            }, id
            (mint,) = {mint for _, mint, _ in group}
            if mint == SOL:
                lamports = sum(delta for _, _, delta in group)
                sol, token = self.rates_of(id)
                assert (debit, amount) == ("chain:sol", lamports * sol * 10**DECIMALS // (10**9 * token)), id
                self.totals["credited for SOL"] += amount
            else:
                assert (debit, amount) == ("chain:token", sum(delta for _, _, delta in group)) and len(group) == 1, id
                self.totals["credited tokens"] += amount
            self.world.accounts[user].posted += amount

    def rates_of(self, id: str) -> tuple[int, int]:
        """The rates of SOL and the token that a credit says it was reckoned with."""
        (text,) = self.connection.execute("SELECT rate FROM credits WHERE transfer = ?", (id,)).fetchone()
        sol, token = (int(Decimal(usd) * 10**12) for usd in re.findall(r"at ([0-9.]+) USD", text))
        assert self.world.market.possible("sol", sol) and self.world.market.possible("token", token), text
        return sol, token

    def compare_balances(self) -> None:
        """Kept sums are those of the journal, debits are credits, and users have what they think, never less than 0."""
        kept = {
            name: Sums(*sums)
            for name, *sums in self.connection.execute(
                "SELECT name, debits_pending, debits_posted, credits_pending, credits_posted FROM accounts"
            )
        }
        nothing = Sums()
        posted = pending = 0
        for name, sums in kept.items():
            assert sums == self.sums.get(name, nothing), f"{name} has {sums}, its journal {self.sums[name]}"
            posted += sums.debits_posted - sums.credits_posted
            pending += sums.debits_pending - sums.credits_pending
        assert posted == pending == 0, "debits are not credits"
        assert self.sums.keys() <= kept.keys()
        for user, account in self.world.accounts.items():
            sums = kept[user]
            assert sums.debits_pending + sums.debits_posted <= sums.credits_posted, f"{user} owes"
            found = (sums.credits_posted - sums.debits_posted, sums.debits_pending)
            assert found == (account.posted, account.held), f"{user} has {found}, knows of {account}"
        chain, totals = kept["chain:token"], self.totals
        assert chain.debits_posted == totals["credited tokens"] and chain.credits_posted == -totals["sweep tokens"]
        assert totals["journal sweeps"] == -totals["sweep tokens"] == kept["chain:treasury"].debits_posted
        assert kept["chain:sol"].debits_posted == totals["credited for SOL"]

    def read_rates(self) -> None:
        market = self.world.market
        for id, asset, at, state, rate in self.new("rate_evidence", "asset, at, state, rate"):
            assert state != "accepted" or market.possible(asset, rate), f"{asset} at {rate} was accepted"
            self.evidence[asset].append((id, at, state, rate))
            del self.evidence[asset][:-2000]
        for id, at, high, reason in self.new("rate_highs", "at, high, reason"):
            if self.highs:
                assert high >= self.highs[-1][2], "the high fell"
                then = max((high for _, made, high in self.highs if made <= max(at - 86_400, 0)), default=0)
                assert reason == "approved" or high <= max(self.highs[-1][2], then * 125 // 100), "the high jumped"
                assert high <= market.highest * 111 // 100, "the high was never true"
            self.highs.append((id, at, high))

    def rate(self, asset: str, kind: str) -> int | None:
        """What the evidence amounts to now, or None: the rules of rates.py, told once more."""
        rules, now = self.world.rules, self.world.clock()
        counted = [row for row in self.evidence[asset] if row[2] == "accepted" or row[0] in self.world.approved]
        since = max((row[0] for row in counted if row[0] in self.world.approved), default=0)
        if not counted:
            return None
        age = now - counted[-1][1]
        if age < -rules.clock_skew_s or age > (rules.high_max_age_s if kind == "ath" else rules.max_age_s):
            return None
        if kind == "ath":
            return self.highs[-1][2]
        window = [row[3] for row in counted if int(now) - rules.market_window_s < row[1] <= now and row[0] >= since]
        return statistics.median_low(window) if len(window) >= rules.market_min_samples else None  # type: ignore

    def look_at_all(self, settled: bool) -> None:
        """The whole journal, and of each account what the chain says. Settled: all that is final has been seen."""
        self.look()
        world = self.world
        assert [line for line in world.web.ledger.check() if not line.holds] == []
        kept = dict(self.connection.execute("SELECT account, balance FROM chain_accounts").fetchall())
        for account, balance in kept.items():
            assert balance == self.balances[account], f"{account} has {balance}, its movements {self.balances[account]}"
        alarms = {kind for kind, _, _ in world.web.deposits.alarms()}
        assert alarms <= CALM, f"alarms: {alarms}"
        if not settled:
            return
        assert UNEXPLAINED not in alarms
        expected = {key for key in self.truth if world.issued(key[1])}
        assert expected == self.recorded, f"not recorded: {[(k, self.truth[k]) for k in expected - self.recorded][:5]}"
        assert not self.uncredited, f"final and not credited: {self.uncredited}"
        for account, balance in kept.items():
            assert balance == world.held(account), f"{account}: the chain has {world.held(account)}, we {balance}"
        treasury = world.held(str(world.token_account(world.treasury)), str(world.treasury), str(world.mint))
        assert treasury == -self.totals["sweep tokens"], f"the treasury has {treasury}, swept are {self.totals}"


@dataclasses.dataclass
class Account:
    """What a user knows of his credit, in base units."""

    posted: int = 0
    held: int = 0


# What happens --------------------------------------------------------------------------------------------------------


class Simulation:
    def __init__(self, seed: int, folder: pathlib.Path, *, calm_every: int = 500) -> None:
        self.seed, self.folder, self.calm_every = seed, folder, calm_every
        self.chance = random.Random(seed)
        self.rules = RateRules()
        self.skew = 0.0
        self.steps = self.crashes = self.machine_crashes = self.calls = 0
        self.happened = collections.Counter[str]()
        self.log: collections.deque[str] = collections.deque(maxlen=40)
        self.machine = 0

        self.devnet = Devnet(seed=seed)
        self.eve, self.gas = self.devnet.keypair("eve"), self.devnet.keypair("gas")
        self.treasury = self.devnet.keypair("treasury").pubkey()
        self.devnet.airdrop(self.eve.pubkey(), 10**16)
        self.devnet.airdrop(self.gas.pubkey(), 10**8)
        self.mint = self.devnet.create_mint(DECIMALS)
        self.fake = self.devnet.create_mint(DECIMALS, name="fake")
        for mint in (self.mint, self.fake):
            self.devnet.mint_to(mint, self.eve.pubkey(), 8 * 10**18)
        self.devnet.finalize()
        self.chain = Chain(self.devnet.client())
        self.pins = Pins(str(self.devnet.genesis_hash), str(self.mint), str(TOKEN_PROGRAM_ID), DECIMALS)
        self.seeds = {1: Seed(SECRET)}
        self.market = Market(self.chance)
        self.market.move(self.devnet.time)
        self.pool = [entry.address for entry in derive_pool(self.seeds[1], NETWORK, 0, POOL)]
        self.ours: dict[Pubkey, tuple[str, str]] = {}  # account on the chain: address, mint
        for address in self.pool:
            key = Pubkey.from_string(address)
            self.ours[key] = (address, SOL)
            self.ours[self.token_account(key)] = (address, str(self.mint))

        self.approved: set[int] = set()
        self.accounts: dict[str, Account] = {}
        self.wallets: list[Keypair] = []
        self.users: list[str] = []
        self.api_keys: dict[str, NewKey] = {}
        self.limits: dict[str, int | None] = {}
        self.spent: dict[str, dict[str, tuple[int, int]]] = collections.defaultdict(dict)  # key: call: day, tokens
        self.owners: dict[str, str] = {}  # address: user
        self.open_calls: list[Call] = []
        self.all_calls: list[Call] = []
        self.limbo: list[VersionedTransaction] = []
        self.installed: list[Installed] = []
        self.refreshed = 0.0
        self.labour: asyncio.subprocess.Process | None = None
        self.url = ""

        self.path = folder / "0" / "ledger.db"
        self.path.parent.mkdir()
        self.web = Process(self, "web")
        self.web.addresses.add(derive_pool(self.seeds[1], NETWORK, 0, POOL))
        self.workers = [Process(self, name) for name in ("watcher", "watcher 2", "sweeper", "sweeper 2", "rates")]
        self.auditor = Auditor(self)

    def clock(self) -> float:
        return self.devnet.time + self.skew

    def token_account(self, owner: Pubkey) -> Pubkey:
        return spl.get_associated_token_address(owner, self.mint, TOKEN_PROGRAM_ID)

    def issued(self, account: str) -> bool:
        return self.ours[Pubkey.from_string(account)][0] in self.owners

    def held(self, account: str, address: str = "", mint: str = "") -> int:
        """What the chain has in an account of ours, finally; or in that of another address."""
        key = Pubkey.from_string(account)
        address, mint = (address, mint) if mint else self.ours[key]
        state = self.devnet.cluster.account(key, self.devnet.cluster.slot_at("finalized"))
        if state is None:
            return 0
        if mint == SOL:
            return state.lamports
        held = tokens.parse_account(state.owner, state.data)
        return held.amount if held and (str(held.mint), str(held.owner)) == (mint, address) else 0

    # The course of it

    async def run(self, steps: int) -> None:
        """So many steps, each looked at; then everything settles."""
        try:
            for _ in range(3):
                self.sign_up()
                self.issue()
            await self.calm()
            kinds, weights = zip(*self.things(), strict=True)
            for self.steps in range(1, steps + 1):
                happens = self.chance.choices(kinds, weights)[0]
                self.happened[happens.__name__] += 1
                self.log.append(f"{self.steps} {happens.__name__}")
                if asyncio.iscoroutinefunction(happens):
                    await happens()
                else:
                    happens()
                self.auditor.look()
                if self.steps % self.calm_every == 0:
                    await self.calm()
            await self.calm()
            scan = await self.finish(self.workers[0], self.workers[0].watcher.reconcile())
            assert not (scan.failed or scan.unexplained or scan.recorded), scan
            self.auditor.look_at_all(settled=True)
        except BaseException as error:
            command = f"python -m tests.payments.simulation --seed {self.seed} --steps {steps}"
            if self.calm_every != CALM_EVERY:
                command += f" --calm-every {self.calm_every}"
            if self.labour is not None:
                command += " --processes"
            error.add_note(f"seed {self.seed}, step {self.steps}: {command}")
            error.add_note("before it: " + "; ".join(self.log))
            raise
        finally:
            await self.close()

    def things(self) -> list[tuple[Callable[[], Any], float]]:
        return [
            (self.work, 42), (self.time_passes, 14), (self.call, 12), (self.resolve, 9), (self.refund, 3),
            (self.replay, 3), (self.misuse, 1), (self.expire, 1.5), (self.deposit, 5), (self.deposit_sol, 3),
            (self.spam, 1.5), (self.attack, 1.5), (self.fork, 1), (self.land_again, 0.7), (self.change_faults, 1.2),
            (self.change_feeds, 1), (self.change_clock, 0.4), (self.kill, 0.8), (self.issue, 1), (self.sign_up, 0.4),
            (self.change_key, 0.3), (self.operate, 0.5), (self.hours_pass, 0.05), (self.price_breaks, 0.05),
        ]  # fmt: skip

    async def close(self) -> None:
        for process in (self.web, *self.workers):
            process.end()
        self.auditor.close()
        await self.chain.close()

    def note(self, text: str) -> None:
        self.log.append(f"  {text}")

    # Crashes

    def kill(self) -> None:
        """A process is gone at an await; or will be at a statement that it comes to."""
        process = self.chance.choice(self.workers)
        if self.chance.random() < 0.4:
            self.bury(process)
        else:
            process.fuse.left = self.chance.randrange(60)
            self.note(f"{process.name} dies after {process.fuse.left} statements")

    def bury(self, process: Process) -> None:
        """The process is gone, with what its connection had not committed; or the machine is, with all of them."""
        self.note(f"{process.name} is killed")
        self.crashes += 1
        if self.chance.random() < 0.8:
            process.end()
            process.boot()
            return
        self.note("the machine crashes")
        self.machine_crashes += 1
        old, new = self.path.parent, self.folder / str(self.machine_crashes)
        new.mkdir()
        for suffix in ("", "-wal"):  # nobody has the time to close them
            if (file := old / f"ledger.db{suffix}").exists():
                shutil.copy(file, new)
        everyone = (self.web, *self.workers)
        for one in everyone:
            one.end()
        self.auditor.close()
        shutil.rmtree(old)
        self.path = new / "ledger.db"
        for one in everyone:
            one.boot()
        self.auditor.open()

    def ask(self, request: Callable[[Process], T], instead: Callable[[Process], T] | None = None) -> T:
        """The web process's answer. If it dies over it the request is sent again, as clients do; or the client leaves,
        and `instead` is asked, which tells what became of it."""
        if self.chance.random() < 0.06:
            self.web.fuse.left = self.chance.randrange(30)
        while True:
            try:
                return request(self.web)
            except Killed:
                self.bury(self.web)
                if instead is not None and self.chance.random() < 0.3:
                    self.note("the client does not come back")
                    return instead(self.web)
            finally:
                self.web.fuse.left = None

    # What goes on in the background

    async def work(self) -> None:
        """One of the workers comes to its next await."""
        _, _, sweeper, second_sweeper, rates = self.workers
        process = self.chance.choices(self.workers, [10, 2, 4, 1, 4])[0]
        if self.labour is not None and process is not rates:
            await self.work_in_a_process("sweep" if process in (sweeper, second_sweeper) else "scan")
            return
        if self.chance.random() < 0.02:
            process.fuse.left = self.chance.randrange(12)
        if process.task is None:
            if process is rates:
                if self.clock() - self.refreshed < 25 and self.chance.random() < 0.95:
                    return
                self.refreshed = self.clock()
                self.market.move(self.devnet.time)
                begins = process.rates.refresh()
            elif process in (sweeper, second_sweeper):
                begins = process.sweeper.step()
            elif self.chance.random() < 0.01:
                begins = process.watcher.reconcile()
            else:
                begins = process.watcher.scan()
            await process.start(begins)
        else:
            await process.step()
        self.note(process.name)
        self.gather(process)

    def gather(self, process: Process) -> None:
        """Takes what a coroutine came to, if it came to its end."""
        if process.task is None or not process.task.done():
            return
        task, process.task = process.task, None
        try:
            task.result()
        except ChainError as error:
            self.note(f"{process.name}: {error}")
        except Killed:
            self.bury(process)

    async def work_in_a_process(self, what: str) -> None:
        """A process is started for one scan or one step of the sweeper, and may be killed before it has done it."""
        assert self.labour is not None and self.labour.stdin is not None and self.labour.stdout is not None
        job = [what, self.clock(), str(self.path), self.url, *dataclasses.astuple(self.pins), str(self.treasury)]
        self.labour.stdin.write(json.dumps([*job, self.gas.to_json()]).encode() + b"\n")
        pid = int(await self.labour.stdout.readline())
        if self.chance.random() < 0.3:
            await asyncio.sleep(self.chance.uniform(0.0, 0.12))
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        status = int(await self.labour.stdout.readline())
        assert status in (0, -signal.SIGKILL), f"{what} left with {status}"
        self.happened[f"{what} in a process" + (", killed" if status else "")] += 1
        self.crashes += status != 0

    async def finish(self, process: Process, work: Coroutine[Any, Any, Any]) -> Any:
        """All of a coroutine, with nothing in between."""
        await process.start(work)
        task = process.task
        assert task is not None
        while not task.done():
            await process.step()
        process.task = None
        return task.result()

    async def calm(self) -> None:
        """All is well for a while: then all that is final is credited within 30 s, and what was sent is resolved."""
        self.note("calm")
        for installed in self.installed:
            self.devnet.remove(installed)
        self.installed.clear()
        self.skew = 0.0
        self.market.manners = {asset: ["honest"] * 3 for asset in self.market.manners}
        watcher, _, sweeper, _, rates = self.workers
        for process in self.workers:
            process.fuse.left = None
            while process.task is not None:
                await process.step()
                self.gather(process)
        for _ in range(12):  # the clock was put right; a rate needs three samples, approved by an operator if need be
            self.devnet.advance(62)
            self.market.move(self.devnet.time)
            await self.finish(rates, rates.rates.refresh())
            self.approve()
        self.auditor.look()
        assert self.expected_rate("token", "market") and self.expected_rate("sol", "market"), "no rate in calm weather"
        final = self.devnet.finalize()
        hot = {account for (account,) in self.auditor.connection.execute(
            "SELECT account FROM chain_accounts WHERE moved_at >= ? OR balance <> 0", (self.clock() - 3600,)
        )}  # fmt: skip
        for _ in range(14):
            scan = await self.finish(watcher, watcher.watcher.scan())
            assert not scan.failed, scan.failed
            self.devnet.advance(5)
            self.auditor.look()
            late = [
                key for key, (_, _, slot) in self.auditor.truth.items()
                if slot <= final - 32 and key[1] in hot and key not in self.auditor.recorded
            ]  # fmt: skip
            if not late:
                break
        assert not late, f"final for 28 s and not credited: {late[:5]}"
        for _ in range(3):
            await self.finish(sweeper, sweeper.sweeper.step())
            self.devnet.advance(200)
        await self.finish(sweeper, sweeper.sweeper.resolve())
        for _ in range(9):  # 720 s: every address has its turn
            self.devnet.advance(200)
            await self.finish(rates, rates.rates.refresh())
            scan = await self.finish(watcher, watcher.watcher.scan())
            assert not scan.failed, scan.failed
        open_sweeps = self.auditor.connection.execute("SELECT count(*) FROM sweeps WHERE status = 'open'").fetchone()
        assert open_sweeps == (0,), f"{open_sweeps[0]} sweeps are open after their blockhash expired"
        self.auditor.look_at_all(settled=True)

    # What users do

    def sign_up(self) -> None:
        """A wallet signs in, for the first time or again, and makes a key."""
        if len(self.users) < 3 or (len(self.users) < USERS_MAX and self.chance.random() < 0.7):
            number = len(self.wallets)
            self.wallets.append(self.devnet.keypair(f"wallet {number}"))
        else:
            number = self.chance.randrange(len(self.wallets))
        wallet = self.wallets[number]
        address, client = str(wallet.pubkey()), f"10.0.{self.steps >> 8 & 255}.{self.steps & 255}"
        nonces = []

        def sign_in(web: Process) -> str:
            challenge = web.identity.challenge(address, client)
            nonces.append((challenge.nonce, str(wallet.sign_message(challenge.text.encode()))))
            return web.identity.sign_in(address, *nonces[-1]).account

        user = self.ask(sign_in)
        if number < len(self.users):
            assert user == self.users[number]
        else:
            assert user not in self.accounts
            self.users.append(user)
            self.accounts[user] = Account()
            self.new_key(user)
        self.refused(IdentityError, lambda web: web.identity.sign_in(address, *nonces[-1]))

    def refused(self, error: type[PaymentsError], request: Callable[[Process], Any]) -> None:
        try:
            answer = self.ask(request)
        except error:
            return
        raise AssertionError(f"{answer} and not {error.__name__}")

    def new_key(self, user: str) -> None:
        limit = self.chance.choice([None, 10**7, 10**9, 10**11])
        self.api_keys[user] = self.ask(lambda web: web.keys.create(user, daily_limit=limit))
        self.limits[self.api_keys[user].key.id] = limit

    def change_key(self) -> None:
        """An old key is revoked and opens nothing any more."""
        user = self.chance.choice(self.users)
        old = self.api_keys[user]
        self.ask(lambda web: web.keys.revoke(user, old.key.id))
        self.refused(IdentityError, lambda web: web.keys.authenticate(old.secret))
        self.new_key(user)

    def issue(self) -> None:
        user = self.chance.choice(self.users)
        before = set(self.owners)
        try:
            self.ask(lambda web: web.addresses.issue(user))
        except AddressError:  # he has enough that are unused; or the first of two requests, of which he saw no answer
            pass
        for address, owner in self.web.connection.execute(
            "SELECT address, account FROM deposit_addresses WHERE account IS NOT NULL ORDER BY assigned_at, position"
        ).fetchall():
            if address not in before:
                assert owner == user
                self.owners[address] = owner

    def expected_rate(self, asset: str, kind: str) -> int | None:
        return self.auditor.rate(asset, kind)

    def call(self) -> None:
        """A user asks for something that costs: reserved first, at the rate of the moment, or refused."""
        user = self.chance.choice(self.users)
        service = self.chance.choice(list(SERVICES.values()))
        units = self.chance.choice([1, 1, 1, 2, 59, 60, 61, 250])
        self.calls += 1
        call = Call(f"c{self.calls}", user, service, units, f"h{self.calls}", self.api_keys[user])
        rate = self.expected_rate("token", service.kind)
        usd_micro = -(-units // service.per) * service.micro_usd
        price = None if rate is None else -(-usd_micro * 10**6 * 10**DECIMALS // rate)
        account, ttl = self.accounts[user], self.chance.choice([1, 5, 30, 120, 3600])
        day, limit = int(self.clock()) // 86_400, self.limits[call.key.key.id]
        spent = sum(tokens for on, tokens in self.spent[call.key.key.id].values() if on == day)
        expected: type[PaymentsError] | None = None
        if price is None:
            expected = RateError
        elif price > account.posted - account.held:
            expected = BalanceError
        elif limit is not None and spent + price > limit:
            expected = IdentityError
        try:
            hold = self.ask(lambda web: self.reserve(web, call, ttl), lambda web: web.charges.find(call.id))
        except (RateError, BalanceError, IdentityError) as error:
            assert type(error) is expected, f"{error}; expected {expected} at {price}"
            self.happened[f"refused: {type(error).__name__}"] += 1
            return
        if hold is None:  # the process died before, and the client has left
            return
        assert expected is None, f"{hold} and not {expected}"
        assert (hold.tokens, hold.rate.pico_usd, hold.state) == (price, rate, "held"), f"{hold}, {price} at {rate}"
        if service.first_party:
            assert hold.rate.pico_usd == self.auditor.highs[-1][2]
        else:
            assert self.market.possible("token", hold.rate.pico_usd), hold
        call.tokens, call.rate, call.expires_at = hold.tokens, hold.rate.pico_usd, hold.expires_at
        account.held += call.tokens
        if limit is not None:
            self.spent[call.key.key.id][call.id] = (day, call.tokens)
        self.open_calls.append(call)
        self.all_calls.append(call)

    @staticmethod
    def reserve(web: Process, call: Call, ttl: int) -> Hold:
        """What a server does: the key, and then the hold and the key's limit together."""
        key = web.keys.authenticate(call.key.secret)
        with immediate(web.connection):
            hold = web.charges.hold(call.user, call.service.name, call.units, call.id, call.hash, ttl)
            web.keys.spend(key, call.id, hold.tokens)
        return hold

    def resolve(self) -> None:
        """A call ends: it is charged, or given back; or it is never heard of again, and its hold expires."""
        if not self.open_calls:
            return
        call = self.chance.choice(self.open_calls)
        if self.chance.random() < 0.7:
            self.post(call, self.chance.choice([call.units, self.chance.randint(1, call.units)]))
        else:
            self.void(call)

    def late(self, call: Call) -> bool:
        return not call.resolved and call.expires_at <= self.clock()

    def post(self, call: Call, units: int) -> None:
        def post(web: Process) -> Hold:
            with immediate(web.connection):
                hold = web.charges.post(call.id, units)
                web.keys.settle(call.key.key.account, call.id, hold.charged)
                return hold

        usd_micro = -(-units // call.service.per) * call.service.micro_usd
        amount = -(-usd_micro * 10**6 * 10**DECIMALS // call.rate)
        if self.late(call) or call.resolved == "expired":
            self.refused(ExpiredError, post)
        elif call.resolved in ("posted", "refunded") and units == call.posted_units:
            assert self.ask(post).charged == call.charged
        elif call.resolved:
            self.refused(ConflictError, post)
        else:
            hold = self.ask(post)
            assert (hold.state, hold.charged) == ("posted", amount), hold
            call.charged, call.posted_units = amount, units
            self.close_call(call, "posted", amount)

    def void(self, call: Call) -> None:
        def void(web: Process) -> Hold:
            with immediate(web.connection):
                hold = web.charges.void(call.id, "engine_error")
                web.keys.settle(call.key.key.account, call.id, 0)
                return hold

        if call.resolved in ("posted", "refunded"):
            self.refused(ConflictError, void)
            return
        state, late = self.ask(void).state, self.late(call)
        assert state == (call.resolved or ("expired" if late else "voided"))
        self.settle(call, 0)
        if not late and not call.resolved:
            self.close_call(call, "voided", 0)

    def settle(self, call: Call, tokens: int) -> None:
        spent = self.spent[call.key.key.id]
        if call.id in spent:
            day, before = spent[call.id]
            spent[call.id] = (day, min(before, tokens))

    def close_call(self, call: Call, how: str, charged: int) -> None:
        call.resolved = how
        self.open_calls.remove(call)
        self.accounts[call.user].held -= call.tokens
        self.accounts[call.user].posted -= charged
        if how == "posted":
            self.settle(call, charged)

    def refund(self) -> None:
        if not self.all_calls:
            return
        call = self.chance.choice(self.all_calls[-200:])
        failure = self.chance.choice(list(Failure))
        if not failure.ours or call.resolved not in ("posted", "refunded"):
            self.refused(ConflictError, lambda web: web.charges.refund(call.id, failure))
            return
        assert self.ask(lambda web: web.charges.refund(call.id, failure)).state == "refunded"
        if call.resolved == "posted":
            call.resolved = "refunded"
            self.accounts[call.user].posted += call.charged

    def replay(self) -> None:
        """Something that was asked before is asked again: the same answer, and nothing moves."""
        if not self.all_calls:
            return
        call = self.chance.choice(self.all_calls)
        what = self.chance.randrange(5)
        if what == 0:
            hold = self.ask(lambda web: web.charges.hold(*self.request(call), ttl_s=7))
            state = call.resolved or ("expired" if self.late(call) else "held")
            assert (hold.created, hold.tokens, hold.state, hold.charged) == (False, call.tokens, state, call.charged)
        elif what == 1:
            user, service, units, id, hash = self.request(call)
            other_user = self.chance.choice([other for other in self.users if other != user])
            other = self.chance.choice(
                [
                    (user, service, units + 1, id, hash),
                    (user, service, units, id, "x"),
                    (other_user, *self.request(call)[1:]),
                ]
            )
            self.refused(ConflictError, lambda web: web.charges.hold(*other, ttl_s=7))
        elif what == 2:
            self.post(call, call.posted_units or call.units)
        elif what == 3:
            self.post(call, self.chance.randint(1, call.units))
        else:
            self.void(call)

    @staticmethod
    def request(call: Call) -> tuple[str, str, int, str, str]:
        return call.user, call.service.name, call.units, call.id, call.hash

    def misuse(self) -> None:
        """Requests that nobody should make."""
        first, second = self.chance.sample(self.users, 2)
        too_much = self.accounts[first].posted - self.accounts[first].held + 1
        id = f"misuse-{self.steps}"
        answers = [
            self.ask(lambda web: web.ledger.transfer(id, first, second, too_much, "theft")),
            self.ask(lambda web: web.ledger.hold(id, first, "revenue:proxied", too_much, 2**40, "theft")),
            self.ask(lambda web: web.ledger.transfer(id, first, first, 1, "theft")),
            self.ask(lambda web: web.ledger.transfer(id, "user:nobody", second, 1, "theft")),
            self.ask(lambda web: web.ledger.refund(id, id)),
        ]
        assert answers == [
            Result.exceeds_credits, Result.exceeds_credits, Result.accounts_must_be_different,
            Result.debit_account_not_found, Result.post_not_found,
        ]  # fmt: skip
        self.refused(NotFoundError, lambda web: web.charges.post(id))
        for amount in (0, -1, 2**63, True, 1.0, "1"):
            wrong: Any = amount
            self.refused(AmountError, lambda web, wrong=wrong: web.ledger.transfer(id, first, second, wrong, "theft"))

    def expire(self) -> None:
        now = int(self.clock())
        due = [call for call in self.open_calls if call.expires_at <= now]
        batch = self.chance.choice([1, 3, 1000])
        crashes = self.crashes
        count = self.ask(lambda web: web.ledger.expire(batch=batch))
        assert count == len(due) or (crashes < self.crashes and count <= len(due))
        for call in due:
            self.close_call(call, "expired", 0)

    # What happens on the chain

    def amount(self, most: int) -> int:
        """From 1 to `most`, small ones as likely as large ones."""
        return int(most ** self.chance.random())

    def some_address(self) -> Pubkey:
        """One that was given out, mostly; or one that may be later."""
        known = list(self.owners)
        if known and self.chance.random() < 0.97:
            recent = known[-10:] if self.chance.random() < 0.7 else known
            return Pubkey.from_string(self.chance.choice(recent))
        return Pubkey.from_string(self.pool[min(len(known) + self.chance.randrange(3), POOL - 1)])

    def send(self, *instructions: Instruction) -> Record:
        """Eve's transaction lands, and may fail."""
        return self.devnet.land(self.devnet.build(instructions, self.eve))

    def pay(self, address: Pubkey, amount: int, mint: Pubkey | None = None) -> list[Instruction]:
        mint, eve = mint or self.mint, self.eve.pubkey()
        account = self.devnet.token_address(mint, address)
        return [
            self.devnet.create_instruction(mint, address, eve),
            self.devnet.transfer_instruction(mint, eve, account, amount),
        ]

    def deposit(self) -> None:
        """Tokens for one address, or several at once."""
        instructions: list[Instruction] = []
        for _ in range(self.chance.choice([1, 1, 1, 2, 3])):
            instructions += self.pay(self.some_address(), self.amount(5 * 10**10))
        assert self.send(*instructions).error is None

    def deposit_sol(self) -> None:
        """What is too little for a new account to keep fails on the chain."""
        lamports = self.amount(10**8)
        eve, address = self.eve.pubkey(), self.some_address()
        self.send(transfer(TransferParams(from_pubkey=eve, to_pubkey=address, lamports=lamports)))

    def spam(self) -> None:
        """Entries in a history that move nothing."""
        address = self.some_address()
        for _ in range(self.chance.choice([1, 3, 10])):
            self.send(*self.pay(address, 0))

    def attack(self) -> None:
        """What looks like a deposit and is none."""
        address = self.some_address()
        kind = self.chance.randrange(4)
        if kind == 0:  # fails at the end
            failed = self.send(*self.pay(address, 10**9), *self.pay(address, 8 * 10**18))
            assert failed.error is not None
        elif kind == 1:
            self.send(*self.pay(address, 10**9, self.fake))
        elif kind == 2:  # her account becomes ours, and is not the one that is credited
            thief = self.devnet.keypair(f"stray {self.steps}")
            self.devnet.mint_to(self.mint, thief.pubkey(), 10**6)
            changed = spl.set_authority(
                SetAuthorityParams(
                    program_id=TOKEN_PROGRAM_ID, account=self.token_account(thief.pubkey()),
                    authority=AuthorityType.ACCOUNT_OWNER, current_authority=thief.pubkey(), signers=[],
                    new_authority=address,
                )
            )  # fmt: skip
            assert self.devnet.land(self.devnet.build([changed], self.eve, thief)).error is None
        else:  # to herself, and the account that is credited is merely mentioned
            pays = self.devnet.transfer_instruction(
                self.mint, self.eve.pubkey(), self.token_account(self.eve.pubkey()), 10**9
            )
            mention = AccountMeta(self.token_account(address), False, False)
            self.send(Instruction(pays.program_id, pays.data, [*pays.accounts, mention]))

    def fork(self) -> None:
        """A recent transaction, and whatever came after it and needs it, is gone; some of it comes again."""
        final = self.devnet.cluster.slot_at("finalized")
        recent = [record for record in self.devnet.cluster.records[-60:] if record.slot > final]
        if recent:
            dropped = self.chance.choice(recent).signature
            self.limbo += self.devnet.drop(Signature.from_string(str(dropped)))

    def land_again(self) -> None:
        if self.limbo:
            self.devnet.cluster.execute(self.limbo.pop(self.chance.randrange(len(self.limbo))))

    def time_passes(self) -> None:
        if self.chance.random() < 0.05:
            self.devnet.skip(self.chance.randint(1, 20))
        else:
            self.devnet.advance(self.chance.choice([1, 2, 5, 10, 40]))

    def hours_pass(self) -> None:
        self.devnet.advance(self.chance.randint(1, 30) * 9000)
        self.market.move(self.devnet.time)

    def change_clock(self) -> None:
        """Ours is not the chain's, and is put right from time to time."""
        self.skew = self.chance.choice([0.0, 0.5, -0.5, 3.0, -3.0, 20.0, -20.0, 90.0])

    def change_faults(self) -> None:
        """The node gets a fault, or loses one."""
        if self.installed and self.chance.random() < 0.6:
            self.devnet.remove(self.installed.pop(self.chance.randrange(len(self.installed))))
            return
        signatures = [record.signature for record in self.devnet.cluster.records[-20:]]
        some = self.chance.sample(signatures, 3)
        listings, everything = ["getSignaturesForAddress"], list[str]()
        fault, methods = self.chance.choice(
            [
                (failing.too_many_requests, everything), (failing.too_many_requests_in_body, everything),
                (failing.unavailable, everything), (failing.unhealthy, everything), (failing.timeout, everything),
                (failing.lost_reply, everything), (failing.lost_reply, ["sendTransaction"]),
                (failing.null, everything), (failing.null, ["getTransaction"]), (failing.garbage, everything),
                (failing.html, everything), (failing.cut_off, everything),
                (failing.lagging(self.chance.choice([1, 10, 100])), everything), (failing.missing(*some), listings),
                (failing.repeating, listings), (failing.swapped(some[0]), ["getTransaction"]),
            ]
        )  # fmt: skip
        times = self.chance.choice([1, 2, 5, 20])
        self.note(f"{getattr(fault, '__qualname__', fault)} of {methods or 'all'}, {times} times")
        self.installed.append(self.devnet.install(fault, *methods, times=times))

    # The market and the operator

    def change_feeds(self) -> None:
        self.market.behave()

    def price_breaks(self) -> None:
        """A price triples or falls to a third: true, and still for an operator to say. One at a time."""
        asset = self.chance.choice(["token", "sol"])
        market, evidence = self.market, self.auditor.evidence[asset]
        base = market.base[asset]
        counted = [rate for id, at, state, rate in evidence if state == "accepted" and at > self.clock() - 22_000]
        if all(base * 70 // 100 <= (rate or 0) <= base * 150 // 100 for rate in counted):
            smallest = {"token": 10**8, "sol": 10**13}[asset]
            up = base < smallest * 10 or (base < smallest * 1000 and self.chance.random() < 0.5)
            market.base[asset] = base * 3 if up else base // 3
            market.price[asset] = market.base[asset]
            market.move(self.devnet.time)

    def operate(self) -> None:
        """The operator approves what is true, and fills the wallet that pays fees."""
        self.approve()
        if self.devnet.balance(self.gas.pubkey()) < 5 * 10**7:
            self.devnet.airdrop(self.gas.pubkey(), 10**8)

    def approve(self) -> None:
        for waiting in self.web.rates.quarantined():
            if waiting.id.startswith("high:"):
                true = waiting.rate <= self.market.highest * 111 // 100
            else:
                now = self.market.price[waiting.asset]
                true = now * 89 // 100 <= waiting.rate <= now * 111 // 100
            if true:
                try:
                    self.ask(lambda web, id=waiting.id: web.rates.approve(id, "olga", self.clock()))
                except ConflictError:  # what was approved a moment ago decides this one too; or the process died after
                    pass
                if waiting.id.startswith("sample:"):
                    approved = {id for (id,) in self.web.connection.execute("SELECT evidence_id FROM rate_approvals")}
                    self.approved |= approved


CALM_EVERY = 2500


async def simulate(seed: int, steps: int, folder: pathlib.Path, calm_every: int = CALM_EVERY) -> Simulation:
    """Raises AssertionError, with the seed and what came before, when something is not as it must be."""
    simulation = Simulation(seed, folder, calm_every=calm_every)
    await simulation.run(steps)
    return simulation


async def simulate_with_processes(seed: int, steps: int, folder: pathlib.Path, calm_every: int) -> Simulation:
    """The same with true processes, and true SIGKILLs."""
    simulation = Simulation(seed, folder, calm_every=calm_every)
    simulation.labour = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.payments.simulation", "--labour",
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with simulation.devnet.serving() as simulation.url:
            await simulation.run(steps)
    finally:
        simulation.labour.stdin.close()  # type: ignore[union-attr]
        await simulation.labour.wait()
    return simulation


def labour() -> None:
    """Forks a process for each job that comes in: its number goes out, and later how it ended."""
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            asyncio.run(do_job(*json.loads(line)))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


async def do_job(
    what: str, now: float, path: str, url: str, genesis: str, mint: str, program: str, decimals: int, treasury: str,
    gas: str,
) -> None:  # fmt: skip
    connection = open_database(path)
    ledger, rates = Ledger(connection, lambda: now), Rates(connection, RateRules(), decimals=decimals)

    def sol_to_tokens(lamports: int, now: float) -> tuple[int, str]:
        conversion = rates.convert_sol(lamports, now)
        return conversion.tokens, str(conversion)

    deposits = Deposits(
        connection, ledger, Pins(genesis, mint, program, decimals), sol_to_tokens, treasury=treasury, clock=lambda: now
    )
    async with Chain.connect(url) as chain:
        with contextlib.suppress(ChainError):
            if what == "scan":
                await Watcher(chain, deposits, clock=lambda: now).scan()
            else:
                await Sweeper(chain, deposits, {1: Seed(SECRET)}, Keypair.from_json(gas), clock=lambda: now).step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calm-every", type=int, default=CALM_EVERY, help="steps between the times when all settles")
    parser.add_argument("--processes", action="store_true", help="true processes and true SIGKILLs; not repeatable")
    parser.add_argument("--labour", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.labour:
        labour()
        return
    logging.disable(logging.CRITICAL)
    started = time.monotonic()
    course = simulate_with_processes if options.processes else simulate
    with tempfile.TemporaryDirectory(prefix="payments-simulation-") as folder:
        world = asyncio.run(course(options.seed, options.steps, pathlib.Path(folder), options.calm_every))
    audited = world.auditor
    print(
        f"seed {options.seed}: {options.steps} steps in {time.monotonic() - started:.0f} s; {world.crashes} crashes, "
        f"{world.machine_crashes} of the machine; {len(world.users)} users, {len(world.owners)} addresses, "
        f"{world.calls} calls, {audited.seen['transfers']} transfers, {audited.seen['movements']} movements on the "
        f"chain of {len(audited.truth)}"
    )
    for what, count in sorted(world.happened.items()):
        print(f"  {what}: {count}")


if __name__ == "__main__":
    main()
