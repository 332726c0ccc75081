"""Moves what was deposited to the treasury. The only process that holds the seed.

    sweeper = Sweeper(chain, deposits, {1: Seed.load("master.seed")}, gas=keypair)
    await sweeper.run()          # for ever; or `await sweeper.step()` by hand

A sweep is signed and written down before it is sent, with its signature and the height at which its blockhash expires.
From then on the chain alone says what became of it: it landed, it failed, or it can no longer land. Only then are its
accounts free for another sweep. So a crash or a lost reply costs nothing: the same bytes are sent again, and the same
transaction cannot land twice.

A small wallet, `gas`, pays the fees: deposit addresses need no SOL. Several accounts share a transaction; an emptied
token account is closed, and its rent goes to the treasury. Tokens are swept only when all that lies there is credited;
when they are seen to have left, the ledger's chain:token gives them to chain:treasury.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from solders.account import Account
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import TransferParams, transfer
from solders.transaction import VersionedTransaction
from spl.token.instructions import (
    close_account,
    create_idempotent_associated_token_account,
    harvest_withheld_tokens_to_mint,
    transfer_checked,
)
from spl.token.models import CloseAccountParams, HarvestWithheldTokensToMintParams, TransferCheckedParams

from diffusionz.payments.addresses import DerivedAddress, Seed, checked_keypair
from diffusionz.payments.chain import Chain
from diffusionz.payments.database import IntegrityError, immediate
from diffusionz.payments.deposits import SOL, Deposits, require_cluster
from diffusionz.payments.errors import ChainError, ConfigurationError, SeedError

logger = logging.getLogger(__name__)

TRANSACTION_MAX = 1232  # bytes
# Lamports that `gas` must have: fees of many transactions, and the rent of the treasury's token account.
GAS_MIN = 5_000_000
RETRY_S = 60.0  # after a sweep of an account did not land; doubles each time
RETRY_MAX_S = 3600.0

MIGRATIONS = [
    (
        "sweeps",
        """
        -- raw is the signed transaction: public as soon as it is sent, and good for nothing else.
        CREATE TABLE sweeps (
            id                INTEGER PRIMARY KEY,
            signature         TEXT NOT NULL UNIQUE,
            raw               BLOB NOT NULL,
            last_valid_height INTEGER NOT NULL,
            status            TEXT NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'landed', 'failed', 'expired')),
            created_at        INTEGER NOT NULL,
            resolved_at       INTEGER,
            CHECK ((status = 'open') = (resolved_at IS NULL))
        ) STRICT;
        CREATE INDEX open_sweeps ON sweeps (id) WHERE status = 'open';
        CREATE TRIGGER sweeps_are_resolved_once BEFORE UPDATE ON sweeps WHEN OLD.status <> 'open'
            BEGIN SELECT RAISE (ABORT, 'a sweep is resolved once'); END;

        -- open: 1 until the sweep is resolved, then NULL. An account is in one open sweep at most.
        CREATE TABLE sweep_parts (
            sweep   INTEGER NOT NULL REFERENCES sweeps (id),
            account TEXT NOT NULL REFERENCES chain_accounts (account),
            amount  INTEGER NOT NULL CHECK (amount > 0),
            open    INTEGER DEFAULT 1 CHECK (open = 1),
            PRIMARY KEY (sweep, account)
        ) STRICT;
        CREATE UNIQUE INDEX one_open_sweep ON sweep_parts (account) WHERE open = 1;
        CREATE INDEX sweep_parts_by_account ON sweep_parts (account, sweep);
        """,
    ),
]


@dataclass(frozen=True, slots=True)
class Part:
    """An account to be emptied: `amount` in base units, or lamports (mint "SOL"). `withheld`: the token's program keeps
    fees in the account, which have to leave it before it can be closed."""

    account: str
    address: DerivedAddress
    mint: str
    amount: int
    alone: bool
    withheld: bool = False


class Sweeper:
    """Signs with deposit keys, and only ever to pay the treasury that `deposits` was made with."""

    def __init__(
        self,
        chain: Chain,
        deposits: Deposits,
        seeds: Mapping[int, Seed],
        gas: Keypair,
        *,
        interval_s: float = 10.0,
        min_lamports: int = 100_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`seeds` by version. `gas` pays fees, and once the rent of the treasury's token account. `min_lamports`: less
        SOL than that stays where it is, since moving it costs 5,000. Raises ConfigurationError."""
        if str(gas.pubkey()) == deposits.treasury:
            raise ConfigurationError("treasury and gas are the same wallet; the treasury's key must not be here")
        self.chain = chain
        self.deposits = deposits
        self.connection = deposits.connection
        self.seeds = seeds
        self.gas = gas
        self.interval_s = interval_s
        self.min_lamports = min_lamports
        self.clock = clock
        self._treasury_exists = False

    async def start(self) -> None:
        """Raises ConfigurationError when the cluster is another one, ChainError when it does not answer."""
        await require_cluster(self.chain, self.deposits.pins)

    async def run(self) -> None:
        """Sweeps for ever. Raises SeedError: with a seed that is not the addresses' own, nothing may be signed."""
        while True:
            try:
                await self.step()
            except (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit, SeedError):
                raise
            except BaseException as error:  # a panic in solders is no Exception
                logger.warning("the sweep failed: %s: %s", type(error).__name__, error)
            await asyncio.sleep(self.interval_s)

    async def step(self) -> None:
        """Resolves what was sent, then signs, writes down and sends what can be swept now. Raises ChainError."""
        await self.resolve()
        for batch in self._batches(await self._plan()):
            await self._send_new(batch)

    async def resolve(self) -> None:
        """Asks what became of each open sweep; sends again what can still land."""
        sweeps = self.connection.execute(
            "SELECT id, signature, raw, last_valid_height FROM sweeps WHERE status = 'open' ORDER BY id"
        ).fetchall()
        if not sweeps:
            return
        # The height first: what had not landed by then, in a final block, and expired at it, never will.
        tip = await self.chain.tip()
        signatures = [Signature.from_string(signature) for _, signature, _, _ in sweeps]
        statuses = await self.chain.statuses(signatures, min_context_slot=tip.slot)
        for (id, signature, raw, last_valid_height), status in zip(sweeps, statuses.values, strict=True):
            if status is None:
                if tip.block_height > last_valid_height:
                    self._close(id, "expired")
                else:
                    await self._send(VersionedTransaction.from_bytes(raw))
            elif status.commitment == "finalized" and status.error is not None:
                self._close(id, "failed")
            elif status.commitment == "finalized":
                await self._land(id, Signature.from_string(signature))

    async def _land(self, id: int, signature: Signature) -> None:
        try:
            transaction = await self.chain.transaction(signature)
        except ChainError as error:  # nodes know the status before they know the rest
            logger.info("sweep %d has landed and cannot be read yet: %s", id, error)
            return
        with immediate(self.connection):
            self.deposits.record(transaction)
            self._close(id, "landed")

    def _close(self, id: int, status: str) -> None:
        with immediate(self.connection):
            # Another sweeper may have been faster.
            changed = self.connection.execute(
                "UPDATE sweeps SET status = ?, resolved_at = ? WHERE id = ? AND status = 'open'",
                (status, int(self.clock()), id),
            )
            self.connection.execute("UPDATE sweep_parts SET open = NULL WHERE sweep = ?", (id,))
        if changed.rowcount:
            logger.info("sweep %d %s", id, status)

    async def _plan(self) -> list[Part]:
        """What can be swept now: all of it credited, nothing else on its way, and not tried in vain a moment ago."""
        rows = self.connection.execute(
            "SELECT c.account, c.mint, c.balance, a.network, a.version, a.position, a.address FROM chain_accounts AS c"
            " JOIN deposit_addresses AS a USING (address)"
            " WHERE c.balance > 0 AND (c.mint <> ? OR c.balance >= ?)"
            " AND NOT EXISTS (SELECT 1 FROM sweep_parts AS p WHERE p.account = c.account AND p.open = 1)"
            " AND NOT EXISTS (SELECT 1 FROM waiting AS w JOIN movements AS m ON m.id = w.movement"
            "                 WHERE m.account = c.account AND c.mint <> ?)"
            " ORDER BY c.rowid",
            (SOL, self.min_lamports, SOL),
        ).fetchall()
        due = []
        for account, mint, balance, *derivation in rows:
            failures, last = self._failures(account)
            if self.clock() >= last + min(RETRY_S * 2 ** (failures - 1), RETRY_MAX_S) or failures == 0:
                due.append(Part(account, DerivedAddress(*derivation), mint, balance, alone=failures > 0))
        if not due:
            return []
        accounts = [part.account for part in due]
        # Confirmed, so that a deposit that is on its way is seen: closing its account would fail.
        keys = [Pubkey.from_string(key) for key in (self.deposits.treasury_tokens, *accounts)]
        gas_state, treasury_state, *states = (
            await self.chain.accounts([self.gas.pubkey(), *keys], commitment="confirmed")
        ).values
        if not self._has_gas(gas_state):
            return []
        self._treasury_exists = treasury_state is not None
        parts = []
        for part, state in zip(due, states, strict=True):
            if state is None:
                continue
            if part.mint == SOL:
                if state.lamports == part.amount:
                    parts.append(part)
                continue
            account = self.deposits.token_state(part.address.address, state)
            if account is not None and account.amount == part.amount and not account.frozen:
                parts.append(replace(part, withheld="transfer_fee_amount" in account.extensions))
        return parts

    def _has_gas(self, state: Account | None) -> bool:
        gas = str(self.gas.pubkey())
        lamports = 0 if state is None else state.lamports
        if lamports >= GAS_MIN:
            self.deposits.clear_alarm("gas is low", gas)
            return True
        self.deposits.alarm("gas is low", gas, f"{lamports} lamports; sweeping needs {GAS_MIN}")
        return False

    def _failures(self, account: str) -> tuple[int, int]:
        """How many sweeps of the account in a row did not land, and when the last of them was given up."""
        rows = self.connection.execute(
            "SELECT s.status, s.resolved_at FROM sweep_parts AS p JOIN sweeps AS s ON s.id = p.sweep"
            " WHERE p.account = ? ORDER BY p.sweep DESC LIMIT 8",
            (account,),
        ).fetchall()
        failed = list(itertools.takewhile(lambda row: row[0] != "landed", rows))
        return len(failed), failed[0][1] if failed else 0

    def _batches(self, parts: list[Part]) -> list[list[Part]]:
        """Parts that share a transaction: of one mint, as many as fit. A part that failed before spoils no others."""
        batches: list[list[Part]] = []
        open_batch: dict[str, list[Part]] = {}
        for part in parts:
            batch = open_batch.get(part.mint)
            if batch is not None and not part.alone and self._size([*batch, part]) <= TRANSACTION_MAX:
                batch.append(part)
                continue
            batches.append([part])
            if not part.alone:
                open_batch[part.mint] = batches[-1]
        return batches

    def _size(self, batch: list[Part]) -> int:
        message = self._message(batch, Hash.default())
        unsigned = [Signature.default()] * message.header.num_required_signatures
        return len(bytes(VersionedTransaction.populate(message, unsigned)))

    def _message(self, batch: list[Part], blockhash: Hash) -> MessageV0:
        mint, program = self.deposits.mint, self.deposits.token_program
        treasury = Pubkey.from_string(self.deposits.treasury)
        destination = Pubkey.from_string(self.deposits.treasury_tokens)
        instructions: list[Instruction] = []
        if batch[0].mint != SOL and not self._treasury_exists:
            instructions.append(
                create_idempotent_associated_token_account(self.gas.pubkey(), treasury, mint, token_program_id=program)
            )
        for part in batch:
            account, owner = Pubkey.from_string(part.account), Pubkey.from_string(part.address.address)
            if part.mint == SOL:
                instructions.append(
                    transfer(TransferParams(from_pubkey=owner, to_pubkey=treasury, lamports=part.amount))
                )
                continue
            instructions.append(
                transfer_checked(
                    TransferCheckedParams(
                        program_id=program, source=account, mint=mint, dest=destination, owner=owner,
                        amount=part.amount, decimals=self.deposits.pins.decimals,
                    )
                )
            )  # fmt: skip
            if part.withheld:
                instructions.append(
                    harvest_withheld_tokens_to_mint(
                        HarvestWithheldTokensToMintParams(program_id=program, mint=mint, sources=[account])
                    )
                )
            instructions.append(
                close_account(CloseAccountParams(program_id=program, account=account, dest=treasury, owner=owner))
            )
        return MessageV0.try_compile(self.gas.pubkey(), instructions, [], blockhash)

    async def _send_new(self, batch: list[Part]) -> None:
        """Signs a sweep, writes it down, and only then sends it."""
        recent = await self.chain.latest_blockhash()
        try:
            keys = [checked_keypair(self.seeds, part.address) for part in batch]
        except SeedError as error:
            self.deposits.alarm("wrong seed", batch[0].address.address, str(error))
            raise
        transaction = VersionedTransaction(self._message(batch, recent.blockhash), [self.gas, *keys])
        signature = str(transaction.signatures[0])
        try:
            with immediate(self.connection):
                (id,) = self.connection.execute(
                    "INSERT INTO sweeps (signature, raw, last_valid_height, created_at) VALUES (?, ?, ?, ?)"
                    " RETURNING id",
                    (signature, bytes(transaction), recent.last_valid_block_height, int(self.clock())),
                ).fetchone()
                for part in batch:
                    self.connection.execute(
                        "INSERT INTO sweep_parts (sweep, account, amount) VALUES (?, ?, ?)",
                        (id, part.account, part.amount),
                    )
        except IntegrityError:
            return  # another sweeper has one of these accounts in an open sweep
        await self._send(transaction)

    async def _send(self, transaction: VersionedTransaction) -> None:
        """Whatever the answer is, or if there is none: `resolve` finds out what became of it."""
        try:
            await self.chain.send(transaction)
        except ChainError as error:
            logger.info("sending %s: %s", transaction.signatures[0], error)
