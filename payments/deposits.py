"""What finalized transactions did to our addresses, and the ledger's entries for it.

    deposits = Deposits(connection, ledger, pins, sol_to_tokens)
    deposits.watch()                  # the addresses that were given out since
    deposits.record(transaction)      # evidence and double entry, in one transaction; again: nothing
    deposits.credit_waiting()         # SOL that came while there was no rate

The evidence is a table of movements: by how much a finalized transaction changed the balance of one of our accounts. It
is read off the balances before and after, never off instructions: so inner transfers, several transfers and fees that a
token takes are all right. A movement's key is (signature, account, mint), and it is never changed. From it follows what
must be true of the chain: the balance of each account is the sum of its movements, in other words

    on the chain + swept + lost = credited + waiting

Tokens are credited as they are. SOL is credited as tokens, at the rate of the moment of crediting; its lamports are in
the movements only, since the ledger's one unit is the token: chain:sol is what was given for SOL, wherever it lies now.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from solders.account import Account
from solders.pubkey import Pubkey
from spl.token.instructions import get_associated_token_address

from diffusionz.payments import tokens
from diffusionz.payments.chain import Chain, Transaction
from diffusionz.payments.database import Connection, immediate
from diffusionz.payments.errors import AmountError, ConfigurationError, RateError
from diffusionz.payments.ledger import AMOUNT_MAX, Ledger, Result

logger = logging.getLogger(__name__)

SOL = "SOL"  # in the place of a mint
TREASURY = "chain:treasury"  # the ledger's account for tokens that were swept

MIGRATIONS = [
    (
        "deposits",
        f"""
        -- What this database was made for. Another token or cluster needs another database.
        CREATE TABLE pins (
            one           INTEGER PRIMARY KEY CHECK (one = 1),
            genesis_hash  TEXT NOT NULL,
            mint          TEXT NOT NULL,
            token_program TEXT NOT NULL,
            decimals      INTEGER NOT NULL CHECK (decimals BETWEEN 0 AND 255)
        ) STRICT;
        CREATE TRIGGER pins_are_not_changed BEFORE UPDATE ON pins
            BEGIN SELECT RAISE (ABORT, 'another token or cluster needs another database'); END;

        -- What we watch on the chain: each address that was given out (mint '{SOL}'), and its associated token account.
        -- balance is the sum of the movements; listed_to the slot up to which the history was read; moved_at when the
        -- address was given out, or the last movement recorded.
        CREATE TABLE chain_accounts (
            account    TEXT PRIMARY KEY,
            address    TEXT NOT NULL REFERENCES deposit_addresses (address),
            mint       TEXT NOT NULL,
            balance    INTEGER NOT NULL DEFAULT 0,
            listed_to  INTEGER NOT NULL DEFAULT 0,
            moved_at   INTEGER NOT NULL,
            UNIQUE (address, mint)
        ) STRICT;
        CREATE INDEX chain_accounts_with_balance ON chain_accounts (balance) WHERE balance <> 0;

        CREATE TABLE movements (
            id          INTEGER PRIMARY KEY,
            signature   TEXT NOT NULL,
            account     TEXT NOT NULL REFERENCES chain_accounts (account),
            mint        TEXT NOT NULL,
            kind        TEXT NOT NULL CHECK (kind IN ('deposit', 'sweep', 'loss')),
            delta       INTEGER NOT NULL CHECK (delta <> 0 AND (delta > 0) = (kind = 'deposit')),
            slot        INTEGER NOT NULL,
            block_time  INTEGER,
            recorded_at INTEGER NOT NULL,
            UNIQUE (signature, account, mint)
        ) STRICT;
        CREATE INDEX movements_by_account ON movements (account, slot);
        CREATE TRIGGER movements_change_balances AFTER INSERT ON movements BEGIN
            UPDATE chain_accounts SET balance = balance + NEW.delta, moved_at = NEW.recorded_at
            WHERE account = NEW.account AND mint = NEW.mint;
        END;
        CREATE TRIGGER movements_are_not_updated BEFORE UPDATE ON movements
            BEGIN SELECT RAISE (ABORT, 'movements are never changed'); END;
        CREATE TRIGGER movements_are_not_deleted BEFORE DELETE ON movements
            BEGIN SELECT RAISE (ABORT, 'movements are never deleted'); END;

        -- transfer is the ledger's id; one credit is of one deposit of tokens, or of several of SOL.
        CREATE TABLE credits (
            transfer TEXT PRIMARY KEY REFERENCES transfers (id),
            rate     TEXT NOT NULL
        ) STRICT;
        CREATE TABLE credited (
            movement INTEGER PRIMARY KEY REFERENCES movements (id),
            transfer TEXT NOT NULL REFERENCES credits (transfer)
        ) STRICT;
        CREATE TRIGGER credits_are_not_updated BEFORE UPDATE ON credits
            BEGIN SELECT RAISE (ABORT, 'credits are never changed'); END;
        CREATE TRIGGER credits_are_not_deleted BEFORE DELETE ON credits
            BEGIN SELECT RAISE (ABORT, 'credits are never deleted'); END;
        CREATE TRIGGER credited_is_not_updated BEFORE UPDATE ON credited
            BEGIN SELECT RAISE (ABORT, 'a deposit is credited once'); END;
        CREATE TRIGGER credited_is_not_deleted BEFORE DELETE ON credited
            BEGIN SELECT RAISE (ABORT, 'a deposit is credited once'); END;

        -- Deposits that are recorded and not credited yet, and why.
        CREATE TABLE waiting (
            movement INTEGER PRIMARY KEY REFERENCES movements (id),
            reason   TEXT NOT NULL
        ) STRICT;

        -- Only to show: what has arrived and is not final. Nobody can spend it. Such amounts are u64, as text: INTEGER
        -- cannot hold them all.
        CREATE TABLE arriving (
            account TEXT PRIMARY KEY REFERENCES chain_accounts (account),
            amount  TEXT NOT NULL
        ) STRICT;

        -- Token accounts of our addresses beside the associated one.
        CREATE TABLE strays (
            account TEXT PRIMARY KEY,
            address TEXT NOT NULL REFERENCES deposit_addresses (address),
            amount  TEXT NOT NULL,
            seen_at INTEGER NOT NULL
        ) STRICT;

        CREATE TABLE alarms (
            id         INTEGER PRIMARY KEY,
            kind       TEXT NOT NULL,
            subject    TEXT NOT NULL,
            detail     TEXT NOT NULL,
            raised_at  INTEGER NOT NULL,
            cleared_at INTEGER
        ) STRICT;
        CREATE UNIQUE INDEX one_open_alarm ON alarms (kind, subject) WHERE cleared_at IS NULL;
        """,
    ),
]

# (lamports, now in seconds since 1970) -> (base units of the token, what the rate rests on). Raises RateError when no
# rate can be trusted, AmountError when the result is beyond the ledger.
SolToTokens = Callable[[int, float], tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Pins:
    """The cluster and the token that deposits are of. All base58."""

    genesis_hash: str
    mint: str
    token_program: str
    decimals: int


class Movement(NamedTuple):
    """A balance of ours that a finalized transaction changed. In base units of the token, or lamports (mint "SOL")."""

    signature: str
    account: str
    mint: str
    kind: str
    delta: int


class Change(NamedTuple):
    """What a transaction does to an account of ours, of which `balance` is recorded."""

    account: str
    address: str
    mint: str
    balance: int
    delta: int


class Waiting(NamedTuple):
    """A deposit that is not credited yet. amount in base units, or lamports (mint "SOL")."""

    signature: str
    account: str
    mint: str
    amount: int
    user: str
    reason: str


class Credit(NamedTuple):
    """What was credited to a user: tokens in base units, for a deposit of "token" or "SOL" at a rate, in words.
    signature is that of the deposit, or of the last of several; at in seconds since 1970."""

    tokens: int
    currency: str
    rate: str
    signature: str
    at: int


class Deposits:
    """The evidence and its double entries in one database. Any number of processes may record the same chain."""

    def __init__(
        self,
        connection: Connection,
        ledger: Ledger,
        pins: Pins,
        sol_to_tokens: SolToTokens,
        *,
        treasury: str,
        on_credit: Callable[[str, int], None] = lambda user, tokens: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`treasury` is the wallet that sweeps pay to. `on_credit` is called with the ledger's account and the base
        units of each credit, in its transaction: what it writes there is written if the credit is.

        Raises ConfigurationError for what is no address, and if the database was made for another token or cluster:
        what it has is of that token.
        """
        self.connection = connection
        self.ledger = ledger
        self.pins = pins
        self.sol_to_tokens = sol_to_tokens
        self.mint = _key("mint", pins.mint)
        self.token_program = _key("token_program", pins.token_program)
        _key("treasury", treasury)
        self.treasury = treasury
        self.treasury_tokens = self.token_account(treasury)
        self.on_credit = on_credit
        self.clock = clock
        wanted = (pins.genesis_hash, pins.mint, pins.token_program, pins.decimals)
        with immediate(connection):
            connection.execute("INSERT INTO pins VALUES (1, ?, ?, ?, ?) ON CONFLICT DO NOTHING", wanted)
            found = connection.execute("SELECT genesis_hash, mint, token_program, decimals FROM pins").fetchone()
            for name, value, pinned in zip(Pins.__dataclass_fields__, wanted, found, strict=True):
                if value != pinned:
                    raise ConfigurationError(
                        f"{name} is {value!r}, but this database was made for {pinned!r}; use a new database"
                    )
            if connection.execute("SELECT 1 FROM deposit_addresses WHERE address = ?", (treasury,)).fetchone():
                raise ConfigurationError(f"treasury is {treasury}, which is a deposit address")
            ledger.open_account(TREASURY, "chain")

    def token_account(self, owner: str) -> str:
        """The canonical associated token account of `owner` for the pinned mint and program."""
        return str(get_associated_token_address(Pubkey.from_string(owner), self.mint, self.token_program))

    def token_state(self, owner: str, state: Account) -> tokens.TokenAccount | None:
        """What an account of the chain holds, if it is `owner`'s and of the pinned mint and program."""
        if state.owner != self.token_program:
            return None
        account = tokens.parse_account(state.owner, state.data)
        if account is None or account.mint != self.mint or str(account.owner) != owner:
            return None
        return account

    def watch(self) -> int:
        """Begins to watch what was given out since the last time; returns how many addresses that were."""
        new = self.connection.execute(
            "SELECT address, assigned_at FROM deposit_addresses AS a WHERE account IS NOT NULL"
            " AND NOT EXISTS (SELECT 1 FROM chain_accounts AS c WHERE c.address = a.address)"
        ).fetchall()
        if new:
            rows = [(address, address, SOL, assigned_at) for address, assigned_at in new]
            rows += [(self.token_account(address), address, self.pins.mint, at) for address, at in new]
            with immediate(self.connection):
                self.connection.executemany(
                    "INSERT OR IGNORE INTO chain_accounts (account, address, mint, moved_at) VALUES (?, ?, ?, ?)", rows
                )
        return len(new)

    def record(self, transaction: Transaction) -> list[Movement]:
        """Writes what a finalized transaction changed, credits what it brought, and returns what was new of it.

        The caller answers for its being final. A failed transaction changed nothing of ours.
        """
        if transaction.error is not None:
            return []
        signature, now = str(transaction.signature), int(self.clock())
        recorded = []
        with immediate(self.connection):
            changes = self._changes(transaction)
            taken: Counter[str] = Counter()
            for change in changes:
                taken[change.mint] += max(-change.delta, 0)
            for account, address, mint, balance, delta in changes:
                if self.knows(signature, account):
                    continue
                if max(abs(delta), abs(balance + delta)) > AMOUNT_MAX:
                    self.alarm("beyond the ledger's range", account, f"{delta} of {mint} in {signature}")
                    continue
                kind = "deposit" if delta > 0 else self._kind_of_debit(transaction, mint, taken[mint])
                (id,) = self.connection.execute(
                    "INSERT INTO movements (signature, account, mint, kind, delta, slot, block_time, recorded_at)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                    (signature, account, mint, kind, delta, transaction.slot, transaction.block_time, now),
                ).fetchone()
                movement = Movement(signature, account, mint, kind, delta)
                if kind == "deposit":
                    self._receive(id, movement, address)
                else:
                    self._give_up(movement)
                recorded.append(movement)
        return recorded

    def knows(self, signature: str, account: str) -> bool:
        """Whether a movement of this account by this transaction is recorded."""
        found = self.connection.execute(
            "SELECT 1 FROM movements WHERE signature = ? AND account = ?", (signature, account)
        ).fetchone()
        return found is not None

    def balance_at(self, account: str, slot: int) -> int:
        """The sum of the account's movements up to `slot`: what the chain must say of that slot."""
        (balance,) = self.connection.execute(
            "SELECT coalesce(sum(delta), 0) FROM movements WHERE account = ? AND slot <= ?", (account, slot)
        ).fetchone()
        return int(balance)

    def credit_waiting(self) -> int:
        """Tries again to credit what is recorded and waits; returns how many deposits no longer do."""
        before = self.waiting()
        for user in dict.fromkeys(row.user for row in before):
            self._credit(user)
        return len(before) - len(self.waiting())

    def waiting(self, user: str | None = None) -> list[Waiting]:
        """The deposits that are recorded and not credited, oldest first; of one of the ledger's accounts, or all."""
        return [Waiting(*row[1:]) for row in self._waiting(user)]

    def credits(self, user: str, limit: int = 20) -> list[Credit]:
        """What was credited to one of the ledger's accounts for its deposits, newest first."""
        rows = self.connection.execute(
            "SELECT t.amount, iif(t.debit = 'chain:sol', ?, 'token'), c.rate, t.note, t.created_at FROM transfers AS t"
            " JOIN credits AS c ON c.transfer = t.id WHERE t.credit = ? ORDER BY t.seq DESC LIMIT ?",
            (SOL, user, limit),
        )
        return [Credit(*row) for row in rows]

    def show_arriving(self, balances: Iterable[tuple[str, int]]) -> None:
        """Replaces what is shown as arriving in each of these accounts of the chain: what its balance there, which need
        not be final, is beyond what is recorded."""
        found = list(balances)
        if any(self._beyond(account, balance) != self._shown(account) for account, balance in found):
            with immediate(self.connection):
                for account, balance in found:
                    self._show(account, self._beyond(account, balance))

    def arriving(self, user: str) -> list[tuple[str, int]]:
        """(mint, amount) of what has arrived at the addresses of one of the ledger's accounts and is not final."""
        rows = self.connection.execute(
            "SELECT c.mint, r.amount FROM arriving AS r JOIN chain_accounts AS c USING (account)"
            " JOIN deposit_addresses AS a ON a.address = c.address WHERE a.account = ? ORDER BY a.assigned_at, c.mint",
            (user,),
        )
        return [(mint, int(amount)) for mint, amount in rows]

    def note_stray(self, address: str, account: str, amount: int) -> None:
        """Tells the operator of tokens of an address that are not in the account that is credited."""
        with immediate(self.connection):
            self.connection.execute(
                "INSERT OR REPLACE INTO strays VALUES (?, ?, ?, ?)", (account, address, str(amount), int(self.clock()))
            )
            self.alarm("stray tokens", account, f"{amount} base units, owned by {address}")

    def alarm(self, kind: str, subject: str, detail: str) -> None:
        """Tells the operator, once until it is cleared."""
        with immediate(self.connection):
            raised = self.connection.execute(
                "INSERT INTO alarms (kind, subject, detail, raised_at) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (kind, subject, detail, int(self.clock())),
            )
        if raised.rowcount:
            logger.error("%s: %s: %s", kind, subject, detail)

    def clear_alarm(self, kind: str, subject: str) -> None:
        """Notes that it is over."""
        condition = "kind = ? AND subject = ? AND cleared_at IS NULL"
        if self.connection.execute(f"SELECT 1 FROM alarms WHERE {condition}", (kind, subject)).fetchone():
            with immediate(self.connection):
                self.connection.execute(
                    f"UPDATE alarms SET cleared_at = ? WHERE {condition}", (int(self.clock()), kind, subject)
                )

    def alarms(self) -> list[tuple[str, str, str]]:
        """(kind, subject, detail) of the alarms that are not cleared, oldest first."""
        return self.connection.execute(
            "SELECT kind, subject, detail FROM alarms WHERE cleared_at IS NULL ORDER BY id"
        ).fetchall()

    def _changes(self, transaction: Transaction) -> list[Change]:
        """What the transaction did to each of our accounts."""
        keys = [str(key) for key in transaction.keys]
        places = ", ".join("?" * len(keys))
        ours = self.connection.execute(
            f"SELECT account, address, mint, balance FROM chain_accounts WHERE account IN ({places}) ORDER BY rowid",
            keys,
        ).fetchall()
        changes = []
        for account, address, mint, balance in ours:
            if delta := self._delta(transaction, account, address, mint):
                changes.append(Change(account, address, mint, balance, delta))
        return changes

    def _delta(self, transaction: Transaction, account: str, owner: str, mint: str) -> int:
        """By how much the account's balance changed: if in tokens, of the pinned mint and program and `owner` only."""
        key = Pubkey.from_string(account)
        if mint == SOL:
            return transaction.lamports_delta(key)
        wallet = Pubkey.from_string(owner)
        return transaction.token_delta(key, mint=self.mint, owner=wallet, program=self.token_program)

    def _kind_of_debit(self, transaction: Transaction, mint: str, taken: int) -> str:
        """A sweep if the sweeper wrote it down, or if the treasury gained all that was taken, as in a sweep that a
        restored backup has forgotten. Whatever else takes from us is a loss."""
        destination = self.treasury if mint == SOL else self.treasury_tokens
        written = self.connection.execute(
            "SELECT 1 FROM sweeps WHERE signature = ?", (str(transaction.signature),)
        ).fetchone()
        gained = self._delta(transaction, destination, self.treasury, mint)
        return "sweep" if written or gained >= taken else "loss"

    def _beyond(self, account: str, balance: int) -> int:
        """What `balance` is beyond the account's recorded one, at least 0."""
        row = self.connection.execute("SELECT balance FROM chain_accounts WHERE account = ?", (account,)).fetchone()
        return max(balance - int(row[0]), 0)

    def _shown(self, account: str) -> int:
        """What is shown as arriving in the account."""
        row = self.connection.execute("SELECT amount FROM arriving WHERE account = ?", (account,)).fetchone()
        return int(row[0]) if row else 0

    def _show(self, account: str, amount: int) -> None:
        if amount > 0:
            self.connection.execute("INSERT OR REPLACE INTO arriving VALUES (?, ?)", (account, str(amount)))
        else:
            self.connection.execute("DELETE FROM arriving WHERE account = ?", (account,))

    def _receive(self, movement_id: int, movement: Movement, address: str) -> None:
        # In the transaction that credits it: nobody sees a deposit twice, in the balance and on its way.
        self._show(movement.account, self._shown(movement.account) - movement.delta)
        self.connection.execute("INSERT INTO waiting VALUES (?, 'new')", (movement_id,))
        (user,) = self.connection.execute(
            "UPDATE deposit_addresses SET used_at = coalesce(used_at, ?) WHERE address = ? RETURNING account",
            (int(self.clock()), address),
        ).fetchone()
        self._credit(user)

    def _give_up(self, movement: Movement) -> None:
        """The ledger's side of what left an account: tokens in the treasury, or lost. No user's account changes."""
        if movement.kind == "loss":
            detail = f"{-movement.delta} of {movement.mint} left in {movement.signature}, which is no sweep"
            self.alarm("loss", movement.account, detail)
        if movement.mint != SOL:
            debit = TREASURY if movement.kind == "sweep" else "adjustments"
            result = self.ledger.transfer(
                transfer_id(movement.kind, [movement]), debit, "chain:token", -movement.delta, movement.kind,
                movement.signature,
            )  # fmt: skip
            if not result.accepted:
                self.alarm("refused by the ledger", movement.account, f"{movement}: {result.value}")

    def _waiting(self, user: str | None) -> list[tuple[int, str, str, str, int, str, str]]:
        return self.connection.execute(
            # CROSS: from the few that wait to their movements. Left to itself, SQLite reads all movements.
            "SELECT m.id, m.signature, m.account, m.mint, m.delta, a.account, w.reason FROM waiting AS w"
            " CROSS JOIN movements AS m ON m.id = w.movement JOIN chain_accounts AS c ON c.account = m.account"
            " JOIN deposit_addresses AS a ON a.address = c.address"
            " WHERE a.account = coalesce(?, a.account) ORDER BY m.id",
            (user,),
        ).fetchall()

    def _credit(self, user: str) -> None:
        """Credits what waits for this account of the ledger: tokens one by one, SOL together, so that dust adds up."""
        with immediate(self.connection):
            rows = self._waiting(user)
            for row in rows:
                if row[3] != SOL:
                    self._credit_group(user, [row], "chain:token", row[4], "1 to 1")
            if sol := [row for row in rows if row[3] == SOL]:
                try:
                    tokens, rate = self.sol_to_tokens(sum(row[4] for row in sol), self.clock())
                except (RateError, AmountError) as error:
                    self._wait(sol, f"waits for a rate: {error}")
                    return
                if tokens < 1:
                    self._wait(sol, "is worth less than one base unit of the token")
                else:
                    self._credit_group(user, sol, "chain:sol", tokens, rate)

    def _credit_group(
        self, user: str, rows: list[tuple[int, str, str, str, int, str, str]], debit: str, tokens: int, rate: str
    ) -> None:
        id = transfer_id("deposit", [Movement(row[1], row[2], row[3], "deposit", row[4]) for row in rows])
        if tokens > AMOUNT_MAX:
            result = Result.overflows_credits
        else:
            result = self.ledger.transfer(id, debit, user, tokens, "deposit", rows[-1][1])
        if not result.accepted:
            self._wait(rows, f"refused by the ledger: {result.value}")
            self.alarm("refused by the ledger", id, f"{tokens} base units for {user}: {result.value}")
            return
        self.connection.execute("INSERT INTO credits VALUES (?, ?)", (id, rate))
        for row in rows:
            self.connection.execute("INSERT INTO credited VALUES (?, ?)", (row[0], id))
            self.connection.execute("DELETE FROM waiting WHERE movement = ?", (row[0],))
        self.on_credit(user, tokens)

    def _wait(self, rows: list[tuple[int, str, str, str, int, str, str]], reason: str) -> None:
        for row in rows:
            self.connection.execute("UPDATE waiting SET reason = ? WHERE movement = ?", (reason, row[0]))


async def require_cluster(chain: Chain, pins: Pins) -> None:
    """Raises ConfigurationError when the node belongs to another cluster."""
    genesis_hash = await chain.genesis_hash()
    if genesis_hash != pins.genesis_hash:
        raise ConfigurationError(f"genesis_hash: the cluster's is {genesis_hash}, expected {pins.genesis_hash}")


def _key(name: str, text: str) -> Pubkey:
    try:
        return Pubkey.from_string(text)
    except ValueError:
        raise ConfigurationError(f"{name} is {text!r}; it must be 32 bytes in base58") from None


def transfer_id(kind: str, movements: list[Movement]) -> str:
    """The ledger's id for these movements: of their keys, so that the same evidence has the same id in any database."""
    keys = "\n".join(sorted(f"{m.signature} {m.account} {m.mint}" for m in movements))
    return f"{kind}:{hashlib.sha256(keys.encode()).hexdigest()[:48]}"
