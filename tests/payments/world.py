"""A dev chain, a database, and the parts that move deposits, as one object for tests; and what must be true of it.

What the chain really did to our accounts is read from the cluster's own records, not through the code under test.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import socket
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.signature import Signature
from spl.token.constants import TOKEN_PROGRAM_ID

from diffusionz.payments import tokens
from diffusionz.payments.addresses import Addresses, Seed, derive_pool
from diffusionz.payments.chain import Chain
from diffusionz.payments.database import Connection, open_database
from diffusionz.payments.deposits import SOL, Deposits, Pins
from diffusionz.payments.devnet import Devnet, Record
from diffusionz.payments.devnet.mints import Extension
from diffusionz.payments.errors import RateError
from diffusionz.payments.ledger import Ledger
from diffusionz.payments.sweeper import Sweeper
from diffusionz.payments.watcher import HARMLESS_EXTENSIONS, Watcher

T = TypeVar("T")
SECRET = bytes(range(32))
NETWORK = "localnet"


@contextlib.contextmanager
def port_of_ones_own() -> Iterator[int]:
    """A port that refuses inside the `with` until the test listens on it: no other program is given it meanwhile."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a listener, who sets it too, may come
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class World:
    """Eve, who holds all there is of the token, sends it to the users' addresses; `scan` and `sweep` do the rest.

    `rate` is base units a lamport; None means that there is no rate now.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        decimals: int = 6,
        program: Pubkey = TOKEN_PROGRAM_ID,
        extensions: Sequence[Extension] = (),
        freeze_authority: bool = False,
        supply: int = 10**15,
    ) -> None:
        self.path = path
        self.runner = asyncio.Runner()
        self.devnet = Devnet(seed=5)
        self.eve, self.gas = self.devnet.keypair("eve"), self.devnet.keypair("gas")
        self.treasury = self.devnet.keypair("treasury").pubkey()
        self.devnet.airdrop(self.eve.pubkey(), 10**13)
        self.devnet.airdrop(self.gas.pubkey(), 10**9)
        self.mint = self.devnet.create_mint(
            decimals,
            program=program,
            extensions=extensions,
            freeze_authority=self.eve.pubkey() if freeze_authority else None,
        )
        self.devnet.mint_to(self.mint, self.eve.pubkey(), supply)
        self.devnet.finalize()
        self.pins = Pins(str(self.devnet.genesis_hash), str(self.mint), str(program), decimals)
        self.seeds = {1: Seed(SECRET)}
        self.rate: int | None = 3
        self.chain = Chain(self.devnet.client())
        self.extensions = HARMLESS_EXTENSIONS | {extension.name for extension in extensions}
        self.open()
        self.addresses.add(derive_pool(self.seeds[1], NETWORK, 0, 40))
        for user in ("user:a", "user:b"):
            self.ledger.open_account(user, "user")

    def open(self) -> None:
        """Opens the database, as a process does that has just started: nothing of the last one is remembered."""
        self.connection: Connection = open_database(self.path)
        self.ledger = Ledger(self.connection, self.clock)
        self.addresses = Addresses(self.connection, NETWORK, clock=self.clock)
        self.deposits = self.new_deposits(self.connection)
        self.watcher = self.new_watcher()
        self.sweeper = self.new_sweeper()

    def new_deposits(self, connection: Connection, **changes: Any) -> Deposits:
        pins = Pins(**{name: getattr(self.pins, name) for name in Pins.__dataclass_fields__} | changes)
        ledger = Ledger(connection, self.clock)
        return Deposits(connection, ledger, pins, self.sol_to_tokens, treasury=str(self.treasury), clock=self.clock)

    def new_watcher(self, chain: Any = None, deposits: Deposits | None = None, **options: Any) -> Watcher:
        options = {"interval_s": 0.0, "extensions": self.extensions, "clock": self.clock} | options
        return Watcher(chain or self.chain, deposits or self.deposits, **options)

    def new_sweeper(self, chain: Any = None, deposits: Deposits | None = None, **options: Any) -> Sweeper:
        options = {"interval_s": 0.0, "clock": self.clock} | options
        return Sweeper(chain or self.chain, deposits or self.deposits, self.seeds, self.gas, **options)

    def clock(self) -> float:
        return float(self.devnet.time)

    def sol_to_tokens(self, lamports: int, now: float) -> tuple[int, str]:
        if self.rate is None:
            raise RateError("no source answers")
        return lamports * self.rate, f"{self.rate} at {now:.0f}"

    def close(self) -> None:
        self.run(self.chain.close())
        self.connection.close()
        self.runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    # What happens

    def issue(self, user: str = "user:a") -> Pubkey:
        return Pubkey.from_string(self.addresses.issue(user))

    def pay(self, address: Pubkey, amount: int) -> Signature:
        """Eve sends tokens, as a wallet does: it makes the token account if need be."""
        return self.devnet.transfer(self.mint, self.eve, address, amount)

    def send(self, instructions: Sequence[Instruction], *signers: Keypair) -> Record:
        """Lands a transaction of eve's, which may fail."""
        return self.devnet.land(self.devnet.build(instructions, self.eve, *signers))

    def pay_instruction(self, address: Pubkey, amount: int) -> Instruction:
        return self.devnet.transfer_instruction(self.mint, self.eve.pubkey(), self.token_account(address), amount)

    def token_account(self, address: Pubkey) -> Pubkey:
        return self.devnet.token_address(self.mint, address)

    def scan(self) -> Any:
        return self.run(self.watcher.scan())

    def settle(self) -> Any:
        """Everything that has landed becomes final, and is seen."""
        self.devnet.finalize()
        return self.scan()

    def sweep(self) -> None:
        """Plans, sends and resolves until nothing is open."""
        self.run(self.sweeper.step())
        self.devnet.finalize()
        self.run(self.sweeper.resolve())

    def expire(self) -> None:
        """Lets every blockhash expire that is known now, finally."""
        self.devnet.advance(200)

    # What is true

    def credit(self, user: str = "user:a") -> int:
        return self.ledger.balance(user).posted

    def movements(self) -> list[tuple[str, str, int]]:
        """(kind, mint, delta), in the order in which they were recorded."""
        return self.connection.execute("SELECT kind, mint, delta FROM movements ORDER BY id").fetchall()

    def statuses(self) -> list[str]:
        return [status for (status,) in self.connection.execute("SELECT status FROM sweeps ORDER BY id")]

    def alarms(self) -> set[str]:
        return {kind for kind, _, _ in self.deposits.alarms()}

    def held(self, account: str, mint: str, address: str) -> int:
        """What the chain has in the account, finally."""
        slot = self.devnet.cluster.slot_at("finalized")
        state = self.devnet.cluster.account(Pubkey.from_string(account), slot)
        if state is None:
            return 0
        if mint == SOL:
            return state.lamports
        found = tokens.parse_account(state.owner, state.data)
        return found.amount if found and str(found.mint) == mint and str(found.owner) == address else 0

    def true_movements(self) -> Counter[tuple[str, str, str, int]]:
        """(signature, account, mint, delta) of every final change of our accounts, as the cluster recorded it."""
        watched = self.connection.execute("SELECT account, address, mint FROM chain_accounts").fetchall()
        final = self.devnet.cluster.slot_at("finalized")
        found: Counter[tuple[str, str, str, int]] = Counter()
        for account, address, mint in watched:
            for record in self.devnet.cluster.records_of(Pubkey.from_string(account)):
                index = record.keys.index(Pubkey.from_string(account))
                if record.slot > final or record.error is not None:
                    continue
                if mint == SOL:
                    delta = record.post_lamports[index] - record.pre_lamports[index]
                else:
                    post, pre = (
                        sum(
                            t.amount
                            for t in states
                            if (t.index, str(t.mint), str(t.owner)) == (index, mint, address)
                            and str(t.program) == self.pins.token_program
                        )
                        for states in (record.post_tokens, record.pre_tokens)
                    )
                    delta = post - pre
                if delta:
                    found[str(record.signature), account, mint, delta] += 1
        return found

    def check(self) -> None:
        """The invariants, after everything that is final was seen."""
        assert [line for line in self.ledger.check() if not line.holds] == []
        recorded = Counter(self.connection.execute("SELECT signature, account, mint, delta FROM movements").fetchall())
        assert recorded == self.true_movements()
        for account, address, mint, balance in self.connection.execute(
            "SELECT account, address, mint, balance FROM chain_accounts"
        ).fetchall():
            assert self.held(account, mint, address) == balance, (account, mint)
        sums = {
            (kind, mint): total
            for kind, mint, total in self.connection.execute(
                "SELECT kind, mint = 'SOL', sum(delta) FROM movements GROUP BY 1, 2"
            )
        }
        waiting = {True: 0, False: 0}
        for row in self.deposits.waiting():
            waiting[row.mint == SOL] += row.amount
        deposited = sums.get(("deposit", 0), 0)
        swept, lost = -sums.get(("sweep", 0), 0), -sums.get(("loss", 0), 0)
        assert -self.ledger.balance("chain:token").posted == deposited - waiting[False] - swept - lost
        assert -self.ledger.balance("chain:treasury").posted == swept
        credited = sum(
            amount
            for (amount,) in self.connection.execute(
                "SELECT t.amount FROM transfers AS t JOIN credits AS c ON c.transfer = t.id"
            )
        )
        from_sol = -self.ledger.balance("chain:sol").posted
        assert credited == deposited - waiting[False] + from_sol
        (uncredited,) = self.connection.execute(
            "SELECT count(*) FROM movements AS m WHERE kind = 'deposit'"
            " AND (EXISTS (SELECT 1 FROM credited WHERE movement = m.id)) ="
            " (EXISTS (SELECT 1 FROM waiting WHERE movement = m.id))"
        ).fetchone()
        assert uncredited == 0


class Yielding:
    """A chain whose calls let the other tasks run, before the request and after the answer."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._chain, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0)
            answer = await method(*args, **kwargs)
            await asyncio.sleep(0)
            return answer

        return call


class Killed(BaseException):
    """The process is gone."""


class Deadly:
    """A chain whose n-th call kills the caller: before the node hears of it, or before the answer arrives."""

    def __init__(self, chain: Chain, at: int, *, after: bool, kill: Any = None) -> None:
        self._chain, self._left, self._after = chain, at, after
        self._kill = kill
        self.killed = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._chain, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                self._die()
            answer = await method(*args, **kwargs)
            if self._left == 0:
                self._die()
            return answer

        return call

    def _die(self) -> None:
        self.killed = True
        if self._kill:
            self._kill()
        raise Killed
