"""Finds what was deposited: asks the cluster for the balances of our accounts, and for the history of those that differ
from what is recorded.

    watcher = Watcher(chain, deposits)
    await watcher.start()        # the right cluster, and a token that keeps its promises
    await watcher.run()          # for ever; or `await watcher.scan()` by hand

A hundred balances are one request, so looking costs little; the history, with its thousands of entries that anybody can
add for a cent, is read only where a balance says that something is missing. Only what is final is credited. No answer
is trusted to be complete: an account is left alone when its recorded movements add up to its balance, and not before.
Recording is idempotent, so lists may overlap, repeat, and be read by several watchers.

Addresses are watched for ever. Those that are new, saw a deposit lately or hold something are looked at in every scan;
the others take turns, each once in `rotation_s`; the first scan looks at all.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from solders.account import Account
from solders.pubkey import Pubkey
from solders.signature import Signature

from diffusionz.payments import tokens
from diffusionz.payments.chain import MAX_ACCOUNTS, Chain, Listed, Transaction
from diffusionz.payments.database import immediate
from diffusionz.payments.deposits import SOL, Deposits, require_cluster
from diffusionz.payments.errors import ChainError, ConfigurationError
from diffusionz.payments.ledger import AMOUNT_MAX

logger = logging.getLogger(__name__)

# What Token-2022 may add to a mint and leave a deposit as good as plain SPL-Token's: names and pointers to them.
HARMLESS_EXTENSIONS = frozenset(
    {"metadata_pointer", "token_metadata", "group_pointer", "token_group", "group_member_pointer", "token_group_member"}
)
UNEXPLAINED = "unexplained balance"  # the alarm
STRAYS_A_SCAN = 100  # accounts; each is a request
PATIENCE = 3  # failures in a row, before a scan gives up, or a history is read from the top again
DOUBT_S = 10.0  # for a listing that lags behind the balances, before the whole history is read
WHOLE_INTERVAL_S = 600.0  # between readings of a whole history that does not explain the balance


@dataclass(frozen=True, slots=True)
class Watched:
    """An account of the chain that is watched. mint is "SOL" for an address itself."""

    account: str
    address: str
    mint: str
    balance: int
    listed_to: int


@dataclass(slots=True)
class Listing:
    """The history of an account while it is read, newest first, down to the slot `floor`, over several scans if it is
    long. It has to explain `balance`, which the account had at `slot`."""

    slot: int
    balance: int
    floor: int
    whole: bool
    before: Signature | None = None
    newest: int = 0


@dataclass(slots=True)
class Scan:
    """What a scan did: accounts looked at, movements recorded, accounts that do not add up, errors by account."""

    looked_at: int = 0
    recorded: int = 0
    unexplained: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Watcher:
    """Credits deposits. It holds no key, and writes nothing to the chain."""

    def __init__(
        self,
        chain: Chain,
        deposits: Deposits,
        *,
        interval_s: float = 2.0,
        hot_s: float = 7 * 86400.0,
        rotation_s: float = 3600.0,
        overlap_slots: int = 150,
        budget: int = 100,
        extensions: frozenset[str] = HARMLESS_EXTENSIONS,
        allow_freeze: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`interval_s`: between scans. `hot_s`: how long after its last event an address is in every scan.
        `overlap_slots`: how far behind the newest known entry a history is read again. `budget`: how many transactions
        of one account a scan fetches before it goes on with the others. `extensions`, `allow_freeze`: what the mint may
        have; whoever can freeze or seize deposits can take back what we have credited."""
        self.chain = chain
        self.deposits = deposits
        self.interval_s = interval_s
        self.hot_s = hot_s
        self.rotation_s = rotation_s
        self.overlap_slots = overlap_slots
        self.budget = budget
        self.extensions = extensions
        self.allow_freeze = allow_freeze
        self.clock = clock
        self.last_success: float | None = None
        self.failures = 0
        self._listings: dict[str, Listing] = {}
        self._doubts: dict[str, float] = {}  # accounts that do not add up, and when to read their whole history
        self._trouble: Counter[str] = Counter()  # scans in a row that could not read the account's history
        self._scanned_at: float | None = None
        self._rotation = 0.0  # accounts, in their order, that had their turn

    async def start(self) -> None:
        """Raises ConfigurationError when the cluster or the token is not what the database was made for, or when the
        token lets somebody take deposits back; ChainError when the cluster does not answer."""
        pins = self.deposits.pins
        await require_cluster(self.chain, pins)
        state = (await self.chain.accounts([self.deposits.mint])).values[0]
        mint = None if state is None else tokens.parse_mint(state.owner, state.data)
        if state is None or mint is None:
            raise ConfigurationError(f"mint: {pins.mint} is not a token's mint on this cluster")
        if state.owner != self.deposits.token_program:
            raise ConfigurationError(
                f"token_program: {pins.mint} belongs to {state.owner}, expected {pins.token_program}"
            )
        if mint.decimals != pins.decimals:
            raise ConfigurationError(f"decimals: {pins.mint} has {mint.decimals}, expected {pins.decimals}")
        if mint.supply > AMOUNT_MAX:
            raise ConfigurationError(
                f"mint: {pins.mint} has a supply of {mint.supply}; at most {AMOUNT_MAX} can be booked"
            )
        if mint.freeze_authority is not None and not self.allow_freeze:
            raise ConfigurationError(f"mint: {mint.freeze_authority} can freeze accounts of {pins.mint}")
        if refused := sorted(set(mint.extensions) - self.extensions):
            allowed = ", ".join(sorted(self.extensions)) or "none"
            raise ConfigurationError(f"mint: {pins.mint} has the extensions {', '.join(refused)}; allowed: {allowed}")

    async def run(self) -> None:
        """Scans for ever. Whatever goes wrong in a scan, nothing is lost: the next one starts from what is recorded."""
        while True:
            try:
                await self.scan()
                self.failures = 0
                self.last_success = self.clock()
            except (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException as error:  # a panic in solders is no Exception
                self.failures += 1
                logger.warning("the scan failed, %d in a row: %s: %s", self.failures, type(error).__name__, error)
            await asyncio.sleep(self.interval_s * 2 ** min(self.failures, 3))

    async def scan(self) -> Scan:
        """Looks at the addresses that are due, and records what is new. An account whose history cannot be read is in
        the result's `failed`, and the others are done. Raises ChainError when balances cannot be read, or three
        histories in a row."""
        self.deposits.watch()
        self.deposits.credit_waiting()
        turn = self._turn()
        rows = self._hot() + self._unfinished() + turn if self._scanned_at is not None else self._accounts()
        self._scanned_at = self.clock()
        scan = Scan()
        await self._look(rows, scan)
        await self._show_arriving()
        await self._find_strays(turn[:STRAYS_A_SCAN])
        return scan

    async def reconcile(self) -> Scan:
        """Reads the whole history of every address there is, whatever its balance: two requests an account or more.

        For a database that was restored from a backup. What came and went since is in no balance.
        """
        self.deposits.watch()
        self.deposits.credit_waiting()
        rows = self._accounts()
        scan = Scan()
        await self._look(rows, scan, thorough=True)
        while self._listings and not scan.failed:
            unread = [row for row in self._accounts() if row.account in self._listings]
            await self._look(unread, scan, thorough=True)
        await self._find_strays(rows)
        return scan

    def _turn(self) -> list[Watched]:
        """The accounts whose turn it is: of all, the share that the time since the last scan is of rotation_s."""
        if self._scanned_at is None:
            return []
        (count,) = self.deposits.connection.execute("SELECT count(*) FROM chain_accounts").fetchone()
        first = math.floor(self._rotation)
        self._rotation += count * min((self.clock() - self._scanned_at) / self.rotation_s, 1.0)
        last = math.floor(self._rotation)
        if last >= count:
            self._rotation = 0.0
        return self._accounts(limit=last - first, skip=first)

    def _hot(self) -> list[Watched]:
        return self._accounts("moved_at >= ? OR balance <> 0", (int(self.clock() - self.hot_s),))

    def _unfinished(self) -> list[Watched]:
        """Those whose history is being read, or did not explain the balance. A long one would else take many turns."""
        accounts = (*self._listings, *self._doubts)[:1000]  # SQLite takes no more than 32,766 values at once
        return self._accounts(f"account IN ({', '.join('?' * len(accounts))})", accounts)

    def _accounts(
        self, condition: str = "1", values: tuple[int | str, ...] = (), limit: int = -1, skip: int = 0
    ) -> list[Watched]:
        rows = self.deposits.connection.execute(
            f"SELECT account, address, mint, balance, listed_to FROM chain_accounts WHERE {condition}"
            " ORDER BY rowid LIMIT ? OFFSET ?",
            (*values, limit, skip),
        )
        return [Watched(*row) for row in rows]

    async def _look(self, rows: list[Watched], scan: Scan, thorough: bool = False) -> None:
        """Compares balances, and catches up with the accounts whose balance is another than what is recorded."""
        # Those in trouble come last, so that they stop nobody else.
        rows = sorted({row.account: row for row in rows}.values(), key=lambda row: self._trouble[row.account])
        scan.looked_at += len(rows)
        alarmed = {subject for kind, subject, _ in self.deposits.alarms() if kind == UNEXPLAINED}
        # A node that is behind what was read before would take us back in time.
        (newest,) = self.deposits.connection.execute(
            "SELECT coalesce(max(listed_to), 0) FROM chain_accounts"
        ).fetchone()
        failed_in_a_row = 0
        for some in _batched(rows, MAX_ACCOUNTS):  # one request, so that one slot holds for all of it
            keys = [Pubkey.from_string(row.account) for row in some]
            accounts = await self.chain.accounts(keys, min_context_slot=newest)
            for row, state in zip(some, accounts.values, strict=True):
                balance = self._balance(row, state)
                if balance == row.balance and row.account not in self._listings and not thorough:
                    if row.account in alarmed or row.account in self._doubts:
                        self._explained(row)
                    continue
                try:
                    await self._catch_up(row, balance, accounts.slot, scan, thorough)
                    self._trouble.pop(row.account, None)
                    failed_in_a_row = 0
                except ChainError as error:
                    logger.warning("the history of %s cannot be read: %s", row.account, error)
                    scan.failed[row.account] = str(error)
                    failed_in_a_row += 1
                    self._trouble[row.account] += 1
                    if self._trouble[row.account] % PATIENCE == 0:
                        del self._listings[row.account]  # another node may not know where we stopped: from the top
                    if failed_in_a_row == PATIENCE:
                        raise

    def _balance(self, row: Watched, state: Account | None) -> int:
        """What the chain says that the account holds for us: base units, or lamports."""
        if state is None:
            return 0
        if row.mint == SOL:
            return state.lamports
        account = self.deposits.token_state(row.address, state)
        if account is None:
            return 0
        if account.frozen:
            self.deposits.alarm("frozen", row.account, f"{account.amount} base units cannot be moved")
        return account.amount

    async def _catch_up(self, row: Watched, balance: int, slot: int, scan: Scan, thorough: bool) -> None:
        """Reads the account's history down to where it is known. What that does not explain may be a listing that lags;
        after a while the history is read to its beginning, and if that is no help either, the operator is told."""
        listing = self._listings.get(row.account)
        if listing is None:
            if not thorough and self.deposits.balance_at(row.account, slot) == balance:  # somebody else was faster
                self._explained(row)
                return
            whole = thorough or self.clock() >= self._doubts.get(row.account, math.inf)
            floor = 0 if whole else max(row.listed_to - self.overlap_slots, 0)
            listing = self._listings[row.account] = Listing(slot, balance, floor, whole)
        if not await self._read_history(row, listing, scan):
            return  # the next scan goes on
        del self._listings[row.account]
        with immediate(self.deposits.connection):
            self.deposits.connection.execute(
                "UPDATE chain_accounts SET listed_to = max(listed_to, ?) WHERE account = ?",
                (listing.newest, row.account),
            )
        recorded = self.deposits.balance_at(row.account, listing.slot)
        if recorded == listing.balance:
            self._explained(row)
            return
        scan.unexplained.append(row.account)
        self._doubts.setdefault(row.account, self.clock() + DOUBT_S)
        if listing.whole:
            self._doubts[row.account] = self.clock() + WHOLE_INTERVAL_S
            detail = f"{row.mint}: the chain has {listing.balance} at slot {listing.slot}, recorded are {recorded}"
            self.deposits.alarm(UNEXPLAINED, row.account, detail)

    def _explained(self, row: Watched) -> None:
        self._doubts.pop(row.account, None)
        self.deposits.clear_alarm(UNEXPLAINED, row.account)

    async def _read_history(self, row: Watched, listing: Listing, scan: Scan) -> bool:
        """Records what the history has, from where the listing stopped to its floor. False: the budget ran out."""
        budget = self.budget
        while True:
            page = await self.chain.signatures(
                Pubkey.from_string(row.account), before=listing.before, min_context_slot=listing.slot
            )
            if not page:
                return True
            if any(entry.signature == listing.before for entry in page):
                raise ChainError(f"the node begins the history of {row.account} again after {listing.before}")
            for entry in page:
                if entry.slot < listing.floor:
                    return True
                if entry.error is None and not self.deposits.knows(str(entry.signature), row.account):
                    if budget == 0:
                        return False
                    budget -= 1
                    scan.recorded += len(self.deposits.record(await self._transaction(entry, row.account)))
                listing.before = entry.signature
                listing.newest = max(listing.newest, entry.slot)

    async def _transaction(self, entry: Listed, account: str) -> Transaction:
        """The transaction of an entry of the account's history. Raises ChainError if the node has another, or none."""
        transaction = await self.chain.transaction(entry.signature)
        if transaction.slot != entry.slot or Pubkey.from_string(account) not in transaction.keys:
            raise ChainError(f"the node lists {entry.signature} for {account}, slot {entry.slot}, and gives another")
        return transaction

    async def _show_arriving(self) -> None:
        """What is confirmed and not final, for people to see."""
        hot = self._hot()
        accounts = await self.chain.accounts([Pubkey.from_string(row.account) for row in hot], commitment="confirmed")
        self.deposits.show_arriving(
            (row.account, self._balance(row, state)) for row, state in zip(hot, accounts.values, strict=True)
        )

    async def _find_strays(self, rows: list[Watched]) -> None:
        """Reports token accounts of our addresses beside the one that is credited."""
        for row in rows:
            if row.mint == SOL:
                continue
            found = await self.chain.token_accounts(Pubkey.from_string(row.address), self.deposits.mint)
            for account, state in found.items():
                if str(account) != row.account and state.amount:
                    self.deposits.note_stray(row.address, str(account), state.amount)


def _batched(rows: list[Watched], size: int) -> Iterator[list[Watched]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
