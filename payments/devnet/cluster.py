"""One cluster in one process: LiteSVM runs the transactions, this file gives them slots, blocks, forks and a history.

LiteSVM has the real programs and the real rules of fees and rent, but one state without time. Here every account keeps
its versions by slot, so that a read at a commitment sees the state of that commitment's slot, as on a real node.

Unlike on mainnet, a transaction that names a program that does not exist is not taken, where it would land for its fee;
durable nonces are unknown; and trial runs are always on the newest state.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from solders.account import Account
from solders.address_lookup_table_account import ID as ADDRESS_LOOKUP_TABLE_ID
from solders.address_lookup_table_account import AddressLookupTable
from solders.hash import Hash
from solders.keypair import Keypair
from solders.litesvm import LiteSVM
from solders.message import MessageV0, VersionedMessage
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import (
    FailedTransactionMetadata,
    InnerInstruction,
    TransactionMetadata,
)
from solders.transaction_status import TransactionConfirmationStatus, TransactionErrorFieldless, TransactionErrorType

from diffusionz.payments import tokens

# A transaction is taken while its blockhash is at most so many blocks old (solana-sdk: MAX_PROCESSING_AGE).
MAX_BLOCKHASH_AGE = 150

# The largest transaction in bytes (PACKET_DATA_SIZE).
MAX_TRANSACTION_SIZE = 1232

# Versions of accounts are kept for so many slots behind the tip, for nodes that lag.
_KEPT_SLOTS = 512

# So many slots went by without a block before the first one: nobody shall take a slot for a block's height.
_SKIPPED_FIRST = 40

FAUCET_LAMPORTS = 500_000_000 * 10**9

Commitment = str
COMMITMENTS = ("processed", "confirmed", "finalized")


@dataclass(frozen=True, slots=True)
class TokenState:
    """A token account's balance before or after a transaction."""

    index: int
    mint: Pubkey
    owner: Pubkey
    program: Pubkey
    amount: int
    decimals: int


@dataclass(slots=True)
class Record:
    """A transaction that landed: what getTransaction tells of it. Balances are in the order of `keys`."""

    signature: Signature
    slot: int
    block_time: int
    transaction: VersionedTransaction
    keys: list[Pubkey]
    loaded_writable: list[Pubkey]
    loaded_readonly: list[Pubkey]
    error: TransactionErrorType | None
    fee: int
    logs: list[str]
    inner: list[list[InnerInstruction]]
    compute_units: int
    pre_lamports: list[int]
    post_lamports: list[int]
    pre_tokens: list[TokenState]
    post_tokens: list[TokenState]
    before: dict[Pubkey, Account | None] = field(repr=False)
    message_hash: Hash = field(repr=False)
    index: int = 0

    @property
    def position(self) -> tuple[int, int]:
        """Its place on the chain: slot, and place within the block."""
        return self.slot, self.index


@dataclass(frozen=True, slots=True)
class Simulation:
    """What simulateTransaction tells."""

    error: TransactionErrorType | None
    logs: list[str]
    compute_units: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A transaction that no leader would include: it pays no fee and leaves no trace."""

    error: TransactionErrorType


def is_writable(message: VersionedMessage, index: int, loaded_writable: int) -> bool:
    """Whether the message asks to write to its key `index`, counting those of lookup tables last, writable first."""
    header, own = message.header, len(message.account_keys)
    if index >= own:
        return index < own + loaded_writable
    signers = header.num_required_signatures
    if index < signers:
        return index < signers - header.num_readonly_signed_accounts
    return index < own - header.num_readonly_unsigned_accounts


class Cluster:
    """The chain. Nothing moves by itself: `advance` makes slots, `execute` puts a transaction into the newest one."""

    def __init__(
        self,
        seed: int,
        *,
        confirmed_lag: int,
        finalized_lag: int,
        slot_seconds: float,
        first_slot: int,
        genesis_time: int,
    ) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be 0 to 2^64-1")
        if not 0 <= confirmed_lag <= finalized_lag:
            raise ValueError(f"lags are {confirmed_lag} and {finalized_lag} slots; finalizing takes the longer")
        if first_slot < _SKIPPED_FIRST + 3 * MAX_BLOCKHASH_AGE:
            raise ValueError(f"first_slot is {first_slot}; at least {_SKIPPED_FIRST + 3 * MAX_BLOCKHASH_AGE}")
        self._seed = seed.to_bytes(8, "big")
        self._lags = {"processed": 0, "confirmed": confirmed_lag, "finalized": finalized_lag}
        self._slot_seconds = slot_seconds
        self._first_slot = first_slot
        self._genesis_time = genesis_time
        self.genesis_hash = Hash.hash(b"genesis" + self._seed)

        # Signatures, blockhashes and duplicates are judged here: LiteSVM knows only its latest blockhash.
        svm = LiteSVM().with_sigverify(False).with_blockhash_check(False).with_transaction_history(0)
        self._svm: LiteSVM = svm
        self.faucet = self.keypair("faucet")
        svm.set_account(self.faucet.pubkey(), Account(FAUCET_LAMPORTS, b"", Pubkey.default(), False, 0))

        self.records: list[Record] = []
        self._by_signature: dict[Signature, Record] = {}
        self._by_address: dict[Pubkey, list[Record]] = {}
        self._messages: set[Hash] = set()
        self._versions: dict[Pubkey, list[tuple[int, Account | None]]] = {}
        self._undoable = 0  # the first record that is not finalized
        self._skipped = list(range(1, _SKIPPED_FIRST + 1))
        # (first slot, number) of each fork that won, in the order of both.
        self._forks = [(0, 0)]
        self._fork_count = 0
        self._slot_of_hash: dict[Hash, int] = {}
        self.slot = first_slot
        self._remember_blockhashes(first_slot - MAX_BLOCKHASH_AGE)
        self._set_clock(first_slot)

    # Time ------------------------------------------------------------------------------------------------------------

    def advance(self, slots: int = 1) -> int:
        """Makes `slots` new blocks; returns the newest slot."""
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        oldest_new = max(self.slot + 1, self.slot + slots - MAX_BLOCKHASH_AGE)
        self.slot += slots
        self._remember_blockhashes(oldest_new)
        self._set_clock(self.slot)
        finalized = self.slot_at("finalized")
        while self._undoable < len(self.records) and self.records[self._undoable].slot <= finalized:
            self.records[self._undoable].before.clear()
            self._undoable += 1
        return self.slot

    def skip(self, slots: int) -> int:
        """Lets `slots` leaders miss their slots: time passes, and no block is made until the one after; returns it."""
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        self._skipped.extend(range(self.slot + 1, self.slot + slots + 1))
        self.slot += slots
        return self.advance(1)

    def slot_at(self, commitment: Commitment, behind: int = 0) -> int:
        """The newest block's slot of that commitment, as seen by a node that is `behind` slots late."""
        slot = self.slot - self._lags[commitment] - behind
        while self._is_skipped(slot):
            slot -= 1
        return slot

    def height(self, slot: int) -> int:
        """How many blocks precede the block of `slot`."""
        return slot - bisect.bisect_right(self._skipped, slot)

    def block_time(self, slot: int) -> int:
        """Unix seconds."""
        return self._genesis_time + int((slot - self._first_slot) * self._slot_seconds)

    def blockhash(self, slot: int) -> Hash:
        fork = self._forks[bisect.bisect_right(self._forks, slot, key=lambda entry: entry[0]) - 1][1]
        return Hash.hash(b"block" + self._seed + fork.to_bytes(8, "big") + slot.to_bytes(8, "big"))

    def last_valid_height(self, slot: int) -> int:
        """The last block height at which a transaction with the blockhash of `slot` may land."""
        return self.height(slot) + MAX_BLOCKHASH_AGE

    def knows_blockhash(self, blockhash: Hash, slot: int) -> bool:
        """Whether the bank of `slot` takes transactions that name `blockhash`."""
        made = self._slot_of_hash.get(blockhash)
        return made is not None and made <= slot and self.height(slot) <= self.last_valid_height(made)

    def commitment_of(self, slot: int, behind: int = 0) -> TransactionConfirmationStatus:
        if slot <= self.slot_at("finalized", behind):
            return TransactionConfirmationStatus.Finalized
        if slot <= self.slot_at("confirmed", behind):
            return TransactionConfirmationStatus.Confirmed
        return TransactionConfirmationStatus.Processed

    # State -----------------------------------------------------------------------------------------------------------

    def keypair(self, name: str) -> Keypair:
        """The same key for the same seed and name, always."""
        return Keypair.from_seed(hashlib.sha256(b"key" + self._seed + name.encode()).digest())

    def account(self, address: Pubkey, slot: int | None = None) -> Account | None:
        """The account as it was after `slot` (None: now); None if it does not exist."""
        versions = self._versions.get(address)
        if versions is None or slot is None or slot >= versions[-1][0]:
            return self._now(address)
        return next((account for made, account in reversed(versions) if made <= slot), versions[0][1])

    def touched(self) -> list[Pubkey]:
        """Every address that a transaction has changed, in a fixed order."""
        return sorted(self._versions, key=bytes)

    def rent_exempt_minimum(self, size: int) -> int:
        return self._svm.minimum_balance_for_rent_exemption(size)

    def record(self, signature: Signature) -> Record | None:
        return self._by_signature.get(signature)

    def records_of(self, address: Pubkey) -> Sequence[Record]:
        """The transactions that name `address`, failed ones too, oldest first."""
        return self._by_address.get(address, ())

    def decimals(self, mint: Pubkey) -> int | None:
        account = self._now(mint)
        parsed = account and tokens.parse_mint(account.owner, account.data)
        if mint == tokens.NATIVE_MINT:
            return 9
        return parsed.decimals if parsed else None

    # Transactions ----------------------------------------------------------------------------------------------------

    def execute(self, transaction: VersionedTransaction) -> Record | Refused:
        """Puts the transaction into the newest slot, where it succeeds or fails, if a leader would take it at all."""
        refusal = self._refusal(transaction, self.slot)
        if refusal is not None:
            return Refused(refusal)
        message = transaction.message
        keys, writable, readonly = self._keys(transaction)
        before = {key: self._now(key) for i, key in enumerate(keys) if is_writable(message, i, len(writable))}
        pre_lamports, pre_tokens = self._lamports(keys), self._tokens(transaction, keys)
        outcome = self._svm.send_transaction(transaction)
        failed = isinstance(outcome, FailedTransactionMetadata)
        meta: TransactionMetadata = outcome.meta() if isinstance(outcome, FailedTransactionMetadata) else outcome
        error = outcome.err() if isinstance(outcome, FailedTransactionMetadata) else None
        post_lamports = self._lamports(keys)
        if failed and post_lamports[0] == pre_lamports[0]:  # it could not even be loaded
            assert error is not None
            return Refused(error)
        record = Record(
            signature=transaction.signatures[0],
            slot=self.slot,
            block_time=self.block_time(self.slot),
            transaction=transaction,
            keys=keys,
            loaded_writable=writable,
            loaded_readonly=readonly,
            error=error,
            fee=meta.fee(),
            logs=meta.logs(),
            inner=meta.inner_instructions(),
            compute_units=meta.compute_units_consumed(),
            pre_lamports=pre_lamports,
            post_lamports=post_lamports,
            pre_tokens=pre_tokens,
            post_tokens=self._tokens(transaction, keys),
            before=before,
            message_hash=message.hash(),
        )
        self._append(record)
        return record

    def simulate(
        self, transaction: VersionedTransaction, slot: int, *, verify: bool, check_blockhash: bool
    ) -> Simulation:
        """What the transaction would do to the newest state, if its blockhash pleases the bank of `slot`."""
        refusal = self._refusal(transaction, slot, verify=verify, check_blockhash=check_blockhash)
        if refusal is not None:
            return Simulation(refusal, [], 0)
        outcome = self._svm.simulate_transaction(transaction)
        error = outcome.err() if isinstance(outcome, FailedTransactionMetadata) else None
        return Simulation(error, outcome.meta().logs(), outcome.meta().compute_units_consumed())

    def drop(self, signature: Signature) -> list[VersionedTransaction]:
        """A fork: the block with `signature` and all later ones are abandoned, and the winning fork lacks `signature`.

        The other transactions of the abandoned blocks land again on the winning fork, in order and in the same slots,
        if they still can: not if their blockhash was of an abandoned block. Returns those that are gone, `signature`'s
        first; the same bytes may land again later. Raises ValueError if it is unknown or finalized.
        """
        dropped = self._by_signature.get(signature)
        if dropped is None:
            raise ValueError(f"{signature} has not landed")
        if dropped.slot <= self.slot_at("finalized"):
            raise ValueError(f"{signature} of slot {dropped.slot} is finalized")
        first = bisect.bisect_left(self.records, dropped.slot, key=lambda record: record.slot)
        abandoned = self.records[first:]
        del self.records[first:]
        for record in reversed(abandoned):
            self._forget(record)
        tip = self.slot
        self._slot_of_hash = {known: slot for known, slot in self._slot_of_hash.items() if slot < dropped.slot}
        self._fork_count += 1
        self._forks = [entry for entry in self._forks if entry[0] < dropped.slot]
        self._forks.append((dropped.slot, self._fork_count))
        gone = [dropped.transaction]
        for record in abandoned:
            if record is dropped:
                continue
            self.slot = record.slot
            self._set_clock(record.slot)
            if isinstance(self.execute(record.transaction), Refused):
                gone.append(record.transaction)
        self.slot = tip
        self._remember_blockhashes(max(dropped.slot, tip - MAX_BLOCKHASH_AGE))
        self._set_clock(tip)
        return gone

    # Inside ----------------------------------------------------------------------------------------------------------

    def _refusal(
        self, transaction: VersionedTransaction, slot: int, *, verify: bool = True, check_blockhash: bool = True
    ) -> TransactionErrorType | None:
        if verify and not all(transaction.verify_with_results()):
            return TransactionErrorFieldless.SignatureFailure
        if check_blockhash and not self.knows_blockhash(transaction.message.recent_blockhash, slot):
            return TransactionErrorFieldless.BlockhashNotFound
        if transaction.message.hash() in self._messages:
            return TransactionErrorFieldless.AlreadyProcessed
        return None

    def _now(self, address: Pubkey) -> Account | None:
        account = self._svm.get_account(address)
        return account if account is not None and account.lamports else None

    def _keys(self, transaction: VersionedTransaction) -> tuple[list[Pubkey], list[Pubkey], list[Pubkey]]:
        """All keys as getTransaction counts them, and those of lookup tables: the writable, the read-only."""
        message = transaction.message
        writable: list[Pubkey] = []
        readonly: list[Pubkey] = []
        for lookup in message.address_table_lookups if isinstance(message, MessageV0) else ():
            listed = self._listed(lookup.account_key)
            writable += [listed[i] for i in bytes(lookup.writable_indexes) if i < len(listed)]
            readonly += [listed[i] for i in bytes(lookup.readonly_indexes) if i < len(listed)]
        return [*message.account_keys, *writable, *readonly], writable, readonly

    def _listed(self, table: Pubkey) -> list[Pubkey]:
        """The table's addresses; none of what is no table, which LiteSVM then refuses with its proper error."""
        account = self._now(table)
        if account is None or account.owner != ADDRESS_LOOKUP_TABLE_ID:
            return []
        try:
            return AddressLookupTable.deserialize(account.data).addresses
        except ValueError:
            return []

    def _lamports(self, keys: list[Pubkey]) -> list[int]:
        return [self._svm.get_balance(key) or 0 for key in keys]

    def _tokens(self, transaction: VersionedTransaction, keys: list[Pubkey]) -> list[TokenState]:
        programs = {keys[instruction.program_id_index] for instruction in transaction.message.instructions}
        states = []
        for index, key in enumerate(keys):
            account = None if key in programs else self._now(key)
            parsed = account and tokens.parse_account(account.owner, account.data)
            if account is None or not parsed:
                continue
            decimals = self.decimals(parsed.mint)
            if decimals is not None:
                states.append(TokenState(index, parsed.mint, parsed.owner, account.owner, parsed.amount, decimals))
        return states

    def _append(self, record: Record) -> None:
        if self.records and self.records[-1].slot == record.slot:
            record.index = self.records[-1].index + 1
        self.records.append(record)
        self._by_signature[record.signature] = record
        self._messages.add(record.message_hash)
        for key in dict.fromkeys(record.keys):
            self._by_address.setdefault(key, []).append(record)
        for key, before in record.before.items():
            after = self._now(key)
            if after == before:
                continue
            versions = self._versions.setdefault(key, [(-1, before)])
            if versions[-1][0] == record.slot:
                versions.pop()
            versions.append((record.slot, after))
            while len(versions) > 2 and versions[1][0] < self.slot - _KEPT_SLOTS:
                del versions[0]

    def _forget(self, record: Record) -> None:
        del self._by_signature[record.signature]
        self._messages.discard(record.message_hash)
        for key in dict.fromkeys(record.keys):
            of_address = self._by_address[key]
            of_address.pop()
            if not of_address:
                del self._by_address[key]
        for key, before in record.before.items():
            if before is not None or self._now(key) is not None:
                self._svm.set_account(key, before or Account(0, b"", Pubkey.default(), False, 0))
            versions = self._versions.get(key, [])
            if versions and versions[-1][0] >= record.slot:
                versions.pop()
            if len(versions) == 1 and versions[0][0] == -1:
                del self._versions[key]

    def _is_skipped(self, slot: int) -> bool:
        at = bisect.bisect_left(self._skipped, slot)
        return at < len(self._skipped) and self._skipped[at] == slot

    def _remember_blockhashes(self, first: int) -> None:
        for slot in range(first, self.slot + 1):
            if not self._is_skipped(slot):
                self._slot_of_hash[self.blockhash(slot)] = slot
        while len(self._slot_of_hash) > 2 * MAX_BLOCKHASH_AGE:
            del self._slot_of_hash[next(iter(self._slot_of_hash))]

    def _set_clock(self, slot: int) -> None:
        clock = self._svm.get_clock()
        clock.slot = slot
        clock.unix_timestamp = self.block_time(slot)
        self._svm.set_clock(clock)
        parent = max(slot - 1, 0)
        self._svm.set_slot_hashes([(parent, self.blockhash(parent))])
