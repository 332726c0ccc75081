"""What this package asks of a Solana node, with every way to fail turned into a ChainError.

A thin layer over the solana package's AsyncClient, which reports failures in five ways: SolanaRpcException (HTTP, also
429), RPCException (an error in the body), SerdeJSONError (a reply of another shape), pyo3's PanicException (not even an
Exception: an error body that solders cannot read), and an int in the place of the result (an error code that it does
not know, such as 429). A caller who sees a ChainError has learnt nothing about the chain, and keeps its place.

URLs of nodes often hold an API key. No message, repr or log line from here shows more of the URL than its host.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httpx2
from solana.exceptions import SolanaRpcException
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Commitment
from solana.rpc.core import RPCException
from solana.rpc.models import TokenAccountOpts, TxOpts
from solders.account import Account
from solders.hash import Hash
from solders.pubkey import Pubkey
from solders.rpc import errors as rpc_errors
from solders.rpc import responses
from solders.signature import Signature
from solders.transaction import VersionedTransaction
from solders.transaction_status import (
    TransactionConfirmationStatus,
    TransactionErrorType,
    TransactionStatus,
    UiTransactionTokenBalance,
)

from diffusionz.payments import tokens
from diffusionz.payments.errors import ChainError, ConfigurationError, CursorError, TransactionError

GENESIS_HASHES = {
    "mainnet": "5eykt4UsFv8P8NJdTREpY1vzqKqZKvdpKuc147dw2N9d",
    "testnet": "4uhcVJyU9pJkvQyS88uRDiswHXSCkY3zQawwpjk2NsNY",
    "devnet": "EtWTRABZaYq6iMfeYKouRu166VU2xqa1wcaWoxPkrZBG",
}

TIMEOUT_S = 20.0  # that a node's answer is waited for

# The node's limits on one request.
MAX_SIGNATURES_LISTED = 1000
MAX_ACCOUNTS = 100
MAX_STATUSES = 256

# Errors that the same request meets again and again, by the name solders gives them. All others may pass.
_LASTING = (
    rpc_errors.InvalidParamsMessage,
    rpc_errors.InvalidRequestMessage,
    rpc_errors.MethodNotFoundMessage,
    rpc_errors.ParseErrorMessage,
    rpc_errors.UnsupportedTransactionVersionMessage,
)

_RANKS = {"processed": 0, "confirmed": 1, "finalized": 2}

# Of getSignaturesForAddress since Agave 4; solders knows no class for it.
_FILTER_TRANSACTION_NOT_FOUND = -32020

T = TypeVar("T")
Q = TypeVar("Q")


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry of a listing. `error` is not None for a transaction that failed; times are Unix seconds."""

    signature: Signature
    slot: int
    error: str | None
    block_time: int | None


@dataclass(frozen=True, slots=True)
class TokenBalance:
    """A token account's balance in base units. Very old transactions do not tell `owner` and `program`."""

    account: Pubkey
    mint: Pubkey
    owner: Pubkey | None
    program: Pubkey | None
    amount: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """A landed transaction. `error` is not None if it failed: then only its fee was paid.

    `keys` are all of its accounts, those of lookup tables included; lamports are in their order. keys[0] paid the fee.
    """

    signature: Signature
    slot: int
    block_time: int | None
    error: str | None
    fee: int
    keys: tuple[Pubkey, ...]
    signers: tuple[Pubkey, ...]
    pre_lamports: tuple[int, ...]
    post_lamports: tuple[int, ...]
    pre_tokens: tuple[TokenBalance, ...]
    post_tokens: tuple[TokenBalance, ...]

    def lamports_delta(self, address: Pubkey) -> int:
        """By how much the address's lamports changed; 0 if the transaction does not name it."""
        return sum(
            post - pre
            for key, pre, post in zip(self.keys, self.pre_lamports, self.post_lamports, strict=True)
            if key == address
        )

    def token_delta(self, account: Pubkey, *, mint: Pubkey, owner: Pubkey, program: Pubkey) -> int:
        """By how much the token account's balance changed, counting only what has that mint, owner and program."""
        pinned = (account, mint, owner, program)

        def held(balances: Iterable[TokenBalance]) -> int:
            return sum(b.amount for b in balances if (b.account, b.mint, b.owner, b.program) == pinned)

        return held(self.post_tokens) - held(self.pre_tokens)


@dataclass(frozen=True, slots=True)
class Accounts:
    """Accounts in the order asked for, None where there is none, as of `slot` or later."""

    slot: int
    values: list[Account | None]


@dataclass(frozen=True, slots=True)
class Status:
    """How far a transaction has come: "processed", "confirmed" or "finalized"; `error` is not None if it failed."""

    slot: int
    commitment: str
    error: str | None


@dataclass(frozen=True, slots=True)
class Statuses:
    """Statuses in the order asked for, None where the node does not know the signature, as of `slot` or later."""

    slot: int
    values: list[Status | None]


@dataclass(frozen=True, slots=True)
class Blockhash:
    """A recent blockhash. No transaction with it lands in a block higher than `last_valid_block_height`."""

    blockhash: Hash
    last_valid_block_height: int
    slot: int


@dataclass(frozen=True, slots=True)
class Tip:
    """The newest block of some commitment."""

    slot: int
    block_height: int


class Chain:
    """A node of a Solana cluster. Every method raises ChainError and nothing else when the node fails.

    Reads are of finalized state unless told otherwise. With `genesis_hash` the first call makes sure that the node
    belongs to that cluster; a node of another one is a ChainError that is not retryable.
    """

    def __init__(
        self,
        client: AsyncClient,
        *,
        genesis_hash: str | None = None,
        timeout_seconds: float = TIMEOUT_S,
        name: str = "node",
    ) -> None:
        self._client = client
        self._expected_genesis = genesis_hash
        self._genesis_checked = genesis_hash is None
        self._timeout_seconds = timeout_seconds
        self._name = name

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        genesis_hash: str | None = None,
        timeout_seconds: float = TIMEOUT_S,
        requests_per_second: float = 0,
    ) -> Chain:
        """A Chain over HTTP. 0 requests per second means no limit. Raises ConfigurationError for a bad URL."""
        try:
            parts = urlsplit(url)
            host = parts.netloc.rpartition("@")[2]
        except ValueError:
            parts, host = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigurationError("the node's URL (not shown: it may hold a key) must be http(s)://HOST...")
        _keep_out_of_logs(parts.hostname or "")
        # HTTP/2 would have its header coder log the path, where a key may be.
        client = AsyncClient(
            url, Commitment.FINALIZED, timeout=timeout_seconds, rate_limit=requests_per_second, http2=False
        )
        return cls(client, genesis_hash=genesis_hash, timeout_seconds=2 * timeout_seconds, name=host)

    def __repr__(self) -> str:
        return f"Chain({self._name!r})"

    async def __aenter__(self) -> Chain:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.close()

    # History ---------------------------------------------------------------------------------------------------------

    async def signatures(
        self,
        address: Pubkey,
        *,
        until: Signature | None = None,
        before: Signature | None = None,
        limit: int = MAX_SIGNATURES_LISTED,
        min_context_slot: int | None = None,
        commitment: str = "finalized",
    ) -> list[Listed]:
        """One page of the transactions that name the address, newest first, failed ones too.

        Older than `before`, newer than `until`. When the node does not know one of them, Agave 4 and later raise
        CursorError; before that an unknown `until` gave the newest page, an unknown `before` an empty one. At most
        1000; commitment "confirmed" or "finalized". With `min_context_slot` a node that has not come so far is an
        error.
        """
        found = await self._call(
            "getSignaturesForAddress",
            lambda: self._client.get_signatures_for_address(
                address, before, until, limit, Commitment(commitment), min_context_slot
            ),
            responses.GetSignaturesForAddressResp,
            lambda reply: [
                (
                    entry.confirmation_status,
                    Listed(entry.signature, entry.slot, _text(entry.err), entry.block_time),
                )
                for entry in reply.value
            ],
        )
        # Some nodes do not tell the status; one that tells a lesser one is not taken at its word.
        wanted = _RANKS[commitment]
        return [listed for level, listed in found if level is None or _RANKS[_level(level)] >= wanted]

    async def transaction(self, signature: Signature, *, commitment: str = "finalized") -> Transaction:
        """The landed transaction. One that the node does not have is an error: it may have it later."""
        return await self._call(
            "getTransaction",
            lambda: self._client.get_transaction(
                signature, "base64", Commitment(commitment), max_supported_transaction_version=0
            ),
            responses.GetTransactionResp,
            lambda reply: _transaction(signature, reply),
        )

    async def statuses(self, signatures: Sequence[Signature], *, min_context_slot: int = 0) -> Statuses:
        """How far each of the transactions has come, however long ago it was."""

        async def some(part: list[Signature]) -> tuple[int, list[Status | None]]:
            return await self._call(
                "getSignatureStatuses",
                lambda: self._client.get_signature_statuses(part, search_transaction_history=True),
                responses.GetSignatureStatusesResp,
                lambda reply: _in_context(reply, min_context_slot, [_status(one) for one in reply.value], len(part)),
            )

        slot, values = await _in_parts(some, signatures, MAX_STATUSES, min_context_slot)
        return Statuses(slot, values)

    # State -----------------------------------------------------------------------------------------------------------

    async def accounts(
        self, addresses: Sequence[Pubkey], *, min_context_slot: int = 0, commitment: str = "finalized"
    ) -> Accounts:
        """The accounts at these addresses, a hundred a request, so that they may be of different slots."""

        async def some(part: list[Pubkey]) -> tuple[int, list[Account | None]]:
            return await self._call(
                "getMultipleAccounts",
                lambda: self._client.get_multiple_accounts(part, Commitment(commitment)),
                responses.GetMultipleAccountsResp,
                lambda reply: _in_context(reply, min_context_slot, reply.value, len(part)),
            )

        slot, values = await _in_parts(some, addresses, MAX_ACCOUNTS, min_context_slot)
        return Accounts(slot, values)

    async def mint(self, address: Pubkey) -> tokens.Mint:
        """The mint: its decimals, program, authorities and extensions."""
        account = (await self.accounts([address])).values[0]
        if account is None:
            raise ChainError(f"{address} does not exist on this cluster; it must be a token's mint")
        mint = tokens.parse_mint(account.owner, account.data)
        if mint is None:
            raise ChainError(f"{address} is not a token's mint; it belongs to {account.owner}", retryable=False)
        return mint

    async def token_accounts(self, owner: Pubkey, mint: Pubkey) -> dict[Pubkey, tokens.TokenAccount]:
        """All token accounts of the owner for the mint, by address: the associated one and any others."""

        def read(reply: responses.GetTokenAccountsByOwnerResp) -> dict[Pubkey, tokens.TokenAccount]:
            found = {}
            for entry in reply.value:
                held = tokens.parse_account(entry.account.owner, entry.account.data)
                if held is None or held.owner != owner or held.mint != mint:
                    raise ValueError("an account of another owner or mint")
                found[entry.pubkey] = held
            return found

        return await self._call(
            "getTokenAccountsByOwner",
            lambda: self._client.get_token_accounts_by_owner(owner, TokenAccountOpts(mint=mint), Commitment.FINALIZED),
            responses.GetTokenAccountsByOwnerResp,
            read,
        )

    async def genesis_hash(self) -> str:
        """Which cluster this is."""
        return await self._call(
            "getGenesisHash",
            self._client.get_genesis_hash,
            responses.GetGenesisHashResp,
            lambda reply: str(reply.value),
            check_genesis=False,
        )

    async def tip(self, commitment: str = "finalized") -> Tip:
        """The newest block's slot and height."""
        return await self._call(
            "getEpochInfo",
            lambda: self._client.get_epoch_info(Commitment(commitment)),
            responses.GetEpochInfoResp,
            lambda reply: Tip(reply.value.absolute_slot, reply.value.block_height),
        )

    async def block_height(self, commitment: str = "finalized") -> int:
        """How many blocks precede the newest one. Less than the slot: leaders miss slots."""
        return (await self.tip(commitment)).block_height

    # Sending ---------------------------------------------------------------------------------------------------------

    async def latest_blockhash(self, commitment: str = "confirmed") -> Blockhash:
        """The blockhash to sign with. Confirmed ones do not vanish in forks, and `send` is tried on the same bank."""
        return await self._call(
            "getLatestBlockhash",
            lambda: self._client.get_latest_blockhash(Commitment(commitment)),
            responses.GetLatestBlockhashResp,
            lambda reply: Blockhash(reply.value.blockhash, reply.value.last_valid_block_height, reply.context.slot),
        )

    async def send(self, transaction: VersionedTransaction, *, skip_preflight: bool = False) -> Signature:
        """Hands the signed transaction to the node; returns its signature. That is no promise that it lands.

        Sending the same bytes again is harmless, so that a lost reply is answered by sending them again. One that has
        landed already returns too. Raises TransactionError if the node's trial run of it fails; with the reason
        "BlockhashNotFound" it is retryable, for it is also what a node that lags says.
        """
        signature = transaction.signatures[0]
        options = TxOpts(skip_preflight=skip_preflight, preflight_commitment=Commitment.CONFIRMED)
        try:
            answered = await self._call(
                "sendTransaction",
                lambda: self._client.send_transaction(transaction, options),
                responses.SendTransactionResp,
                lambda reply: reply.value,
            )
        except TransactionError as error:
            if error.reason == "AlreadyProcessed":
                return signature
            raise
        if answered != signature:
            raise ChainError(f"sendTransaction: {self._name} answered with another signature")
        return signature

    async def airdrop(self, address: Pubkey, lamports: int) -> Signature:
        """Asks for lamports from the faucet of a cluster for tests."""
        return await self._call(
            "requestAirdrop",
            lambda: self._client.request_airdrop(address, lamports),
            responses.RequestAirdropResp,
            lambda reply: reply.value,
        )

    # Inside ----------------------------------------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        request: Callable[[], Awaitable[Any]],
        kind: type,
        read: Callable[[Any], T],
        *,
        check_genesis: bool = True,
    ) -> T:
        if check_genesis and not self._genesis_checked:
            await self._check_genesis()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                reply = await request()
            if not isinstance(reply, kind):
                raise _Unexpected(reply)
            return read(reply)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as caught:  # pyo3's PanicException is no Exception
            failure = _explain(f"{method} at {self._name}", caught)
        # Raised out here, so that what was caught, which may show the URL, does not hang on to it.
        raise failure

    async def _check_genesis(self) -> None:
        found = await self.genesis_hash()
        if found != self._expected_genesis:
            raise ChainError(
                f"{self._name} is of another cluster: its genesis hash is {found}; expected {self._expected_genesis}",
                retryable=False,
            )
        self._genesis_checked = True


class _Unexpected(Exception):
    """The client returned something else than a reply, such as an error code that it does not know."""

    def __init__(self, reply: object) -> None:
        super().__init__()
        self.reply = reply


class _Behind(Exception):
    """The node answered from a slot before the one asked for."""


def _explain(where: str, caught: BaseException) -> ChainError:
    """The ChainError for what the client raised. Nothing of a reply is quoted but Solana's own error names."""
    if isinstance(caught, ChainError):
        return caught
    if isinstance(caught, RPCException):
        return _explain_rpc(where, caught.args[0] if caught.args else None)
    if isinstance(caught, SolanaRpcException):
        cause = caught.__cause__
        if isinstance(cause, httpx2.HTTPStatusError):
            return ChainError(f"{where}: HTTP {cause.response.status_code}")
        return ChainError(f"{where}: {type(cause).__name__}")
    if isinstance(caught, _Unexpected):
        if caught.reply == _FILTER_TRANSACTION_NOT_FOUND:
            return CursorError(f"{where}: the node does not know the transaction that the listing starts or ends at")
        what = f"error {caught.reply}" if isinstance(caught.reply, int) else "a reply of another kind"
        return ChainError(f"{where}: {what}")
    if isinstance(caught, _Behind):
        return ChainError(f"{where}: the node is behind: {caught}")
    if isinstance(caught, TimeoutError):
        return ChainError(f"{where}: no reply in time")
    return ChainError(f"{where}: the reply cannot be read ({type(caught).__name__})")


def _explain_rpc(where: str, error: object) -> ChainError:
    if isinstance(error, rpc_errors.SendTransactionPreflightFailureMessage):
        reason = _text(error.data.err) or "unknown"
        retryable = reason in ("BlockhashNotFound", "unknown")
        return TransactionError(f"{where}: the transaction would fail: {reason}", reason=reason, retryable=retryable)
    if "SignatureVerificationFailure" in str(error):
        reason = "SignatureFailure"
        return TransactionError(f"{where}: a signature is missing or wrong", reason=reason, retryable=False)
    name = str(error).rpartition(".")[2] if "Fieldless" in type(error).__name__ else type(error).__name__
    return ChainError(f"{where}: {name.removesuffix('Message')}", retryable=not isinstance(error, _LASTING))


def transaction_error(error: TransactionErrorType | None) -> Any:
    """A TransactionError as nodes write it in JSON, such as {"InstructionError": [0, {"Custom": 1}]} or a string."""
    if error is None:
        return None
    # Alone, solders writes it without the outer name; inside a status it writes it whole.
    whole = TransactionStatus(0, None, error, error, TransactionConfirmationStatus.Processed).to_json()
    return json.loads(whole)["err"]


def _text(error: TransactionErrorType | None) -> str | None:
    value = transaction_error(error)
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _level(status: TransactionConfirmationStatus) -> str:
    return str(status).rpartition(".")[2].lower()


def _present(value: T | None) -> T:
    if value is None:
        raise ValueError("a field is missing")
    return value


def _sized(values: list[T], count: int) -> list[T]:
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count}")
    return values


def _in_context(reply: Any, min_context_slot: int, values: list[T], count: int) -> tuple[int, list[T]]:
    slot = cast(int, reply.context.slot)
    if slot < min_context_slot:
        raise _Behind(f"slot {slot}; at least {min_context_slot} is needed")
    return slot, _sized(values, count)


async def _in_parts(
    ask: Callable[[list[Q]], Awaitable[tuple[int, list[T]]]], items: Sequence[Q], size: int, min_context_slot: int
) -> tuple[int, list[T]]:
    """What `ask` gives for all items, so many a time; the slot is the least of them."""
    slots: list[int] = []
    values: list[T] = []
    for start in range(0, len(items), size):
        slot, some = await ask(list(items[start : start + size]))
        slots.append(slot)
        values += some
    return min(slots, default=min_context_slot), values


def _status(status: TransactionStatus | None) -> Status | None:
    if status is None:
        return None
    return Status(status.slot, _level(_present(status.confirmation_status)), _text(status.err))


def _transaction(signature: Signature, reply: responses.GetTransactionResp) -> Transaction:
    """Raises ValueError for a reply that contradicts itself, ChainError for one about something else."""
    if reply.value is None:
        raise ChainError(f"getTransaction: the node does not have {signature}")
    encoded = reply.value.transaction
    transaction, meta = encoded.transaction, encoded.meta
    if not isinstance(transaction, VersionedTransaction) or meta is None:
        raise ValueError("no transaction, or nothing about it")
    if transaction.signatures[0] != signature or not all(transaction.verify_with_results()):
        raise ChainError(f"getTransaction: the node answered with another transaction than {signature}")
    message = transaction.message
    loaded = meta.loaded_addresses
    keys = (*message.account_keys, *(loaded.writable if loaded else ()), *(loaded.readonly if loaded else ()))

    def balances(listed: list[UiTransactionTokenBalance] | None) -> tuple[TokenBalance, ...]:
        return tuple(
            TokenBalance(keys[b.account_index], b.mint, b.owner, b.program_id, _units(b.ui_token_amount.amount))
            for b in _present(listed)
        )

    return Transaction(
        signature=signature,
        slot=reply.value.slot,
        block_time=reply.value.block_time,
        error=_text(meta.err),
        fee=meta.fee,
        keys=keys,
        signers=tuple(message.account_keys[: message.header.num_required_signatures]),
        pre_lamports=tuple(_sized(meta.pre_balances, len(keys))),
        post_lamports=tuple(_sized(meta.post_balances, len(keys))),
        pre_tokens=balances(meta.pre_token_balances),
        post_tokens=balances(meta.post_token_balances),
    )


def _units(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 2**64:
        raise ValueError("an amount that is no u64")
    return int(text)


# Logs ----------------------------------------------------------------------------------------------------------------

_hosts: set[str] = set()


def _keep_out_of_logs(host: str) -> None:
    """httpx2 logs the URL of every request; of this host's, nothing but the host shall be seen."""
    _hosts.add(host)
    logger = logging.getLogger("httpx2")
    if _shorten not in logger.filters:
        logger.addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(
            f"{arg.scheme}://{arg.host}/..." if isinstance(arg, httpx2.URL) and arg.host in _hosts else arg
            for arg in record.args
        )
    return True
