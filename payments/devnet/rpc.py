"""The JSON-RPC methods of a Solana node, over one Cluster.

Names, parameters, limits, error codes and messages follow Agave's RPC (rpc/src/rpc.rs, rpc_client_api custom_error.rs)
as far as the `solana` package's AsyncClient and this package need them. Not here: subscriptions, blocks, stakes and
validators.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from typing import Any

from solders.account import Account
from solders.hash import Hash, ParseHashError
from solders.message import MessageV0, from_bytes_versioned
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction
from solders.transaction_status import TransactionErrorFieldless, TransactionErrorType
from spl.token.constants import TOKEN_2022_PROGRAM_ID

from diffusionz.payments import tokens
from diffusionz.payments.chain import transaction_error
from diffusionz.payments.devnet import parsed
from diffusionz.payments.devnet.cluster import (
    COMMITMENTS,
    MAX_TRANSACTION_SIZE,
    Cluster,
    Record,
    TokenState,
    is_writable,
)
from diffusionz.payments.devnet.faults import Call, HttpError, Installed, RawReply, RpcError

MAX_SIGNATURES_LISTED = 1000
MAX_ACCOUNTS = 100
MAX_STATUSES = 256

# Statuses are kept in memory for so many slots after finality; older ones need searchTransactionHistory.
_STATUS_CACHE_SLOTS = 300

_LAMPORTS_A_SIGNATURE = 5000

Json = Any


class Rpc:
    """Answers requests. `behind` is how many slots late this node is; `installed` are its faults; `controls` are
    methods that no real node has."""

    def __init__(
        self,
        cluster: Cluster,
        faucet: Callable[[Pubkey, int], Signature],
        controls: Mapping[str, Callable[..., Json]],
        *,
        strict_cursors: bool,
    ) -> None:
        self.cluster = cluster
        self.strict_cursors = strict_cursors
        self.behind = 0
        self.installed: list[Installed] = []
        self.calls: list[str] = []
        self._faucet = faucet
        self._methods: dict[str, Callable[[list[Any]], Json]] = {
            "getHealth": lambda params: "ok",
            "getVersion": lambda params: {"solana-core": "3.0.0", "feature-set": 0},
            "getGenesisHash": lambda params: str(cluster.genesis_hash),
            "getSlot": lambda params: self._slot(_config(params, 0)),
            "getBlockHeight": lambda params: cluster.height(self._slot(_config(params, 0))),
            "getBlockTime": self._block_time,
            "getEpochInfo": self._epoch_info,
            "getTransactionCount": lambda params: len(cluster.records),
            "getLatestBlockhash": self._latest_blockhash,
            "isBlockhashValid": self._is_blockhash_valid,
            "getFeeForMessage": self._fee_for_message,
            "getRecentPrioritizationFees": lambda params: [{"slot": self._tip(), "prioritizationFee": 0}],
            "getMinimumBalanceForRentExemption": lambda params: cluster.rent_exempt_minimum(_integer(params, 0)),
            "getBalance": self._balance,
            "getAccountInfo": self._account_info,
            "getMultipleAccounts": self._multiple_accounts,
            "getTokenAccountBalance": self._token_account_balance,
            "getTokenSupply": self._token_supply,
            "getTokenAccountsByOwner": self._token_accounts_by_owner,
            "getSignaturesForAddress": self._signatures_for_address,
            "getSignatureStatuses": self._signature_statuses,
            "getTransaction": self._transaction,
            "sendTransaction": self._send_transaction,
            "simulateTransaction": self._simulate_transaction,
            "requestAirdrop": self._request_airdrop,
        }
        for name, control in controls.items():
            self._methods[name] = _control(control)

    def reply(self, body: bytes) -> tuple[int, bytes]:
        """The HTTP status and body for a request's body. Raises ConnectionLost when a fault swallows the reply."""
        try:
            request = json.loads(body)
        except ValueError:
            return 200, _dump(_failure(None, RpcError(-32700, "Parse error")))
        try:
            if isinstance(request, list):
                answers = [self._answer(one) for one in request]
                return 200, _dump(answers if answers else _failure(None, RpcError(-32600, "Invalid request")))
            return 200, _dump(self._answer(request))
        except HttpError as error:
            return error.status, b'{"jsonrpc":"2.0","error":{"code":%d,"message":"HTTP %d"},"id":null}' % (
                error.status,
                error.status,
            )
        except RawReply as raw:
            return 200, raw.body

    def _answer(self, request: Json) -> Json:
        named = isinstance(request, dict) and isinstance(request.get("method"), str)
        if not named or request.get("jsonrpc") != "2.0":
            return _failure(None, RpcError(-32600, "Invalid request"))
        params = request.get("params")
        params = [] if params is None else params
        try:
            if not isinstance(params, list):
                raise RpcError(-32602, "`params` should be an array")
            return {"jsonrpc": "2.0", "result": self.call(request["method"], params), "id": request.get("id")}
        except RpcError as error:
            return _failure(request.get("id"), error)

    def call(self, method: str, params: list[Any]) -> Json:
        """One method's result, through the faults that concern it."""
        self.calls.append(method)
        run = self._methods.get(method)
        if run is None:
            raise RpcError(-32601, "Method not found")
        call = Call(self, method, params)
        faults = [installed for installed in self.installed if installed.concerns(method)]

        def proceed(depth: int) -> Json:
            if depth == len(faults):
                return run(call.params)
            faults[depth].take()
            return faults[depth].fault(call, lambda: proceed(depth + 1))

        return proceed(0)

    # Slots -----------------------------------------------------------------------------------------------------------

    def _tip(self, commitment: str = "processed") -> int:
        return self.cluster.slot_at(commitment, self.behind)

    def _slot(self, config: dict[str, Any], default: str = "finalized") -> int:
        """The slot that the request's commitment means; refuses one below its minContextSlot."""
        slot = self._tip(_commitment(config, default))
        wanted = _field(config, "minContextSlot", int)
        if wanted is not None and slot < wanted:
            raise RpcError(-32016, "Minimum context slot has not been reached", {"contextSlot": slot})
        return slot

    @staticmethod
    def _context(slot: int, value: Json) -> Json:
        return {"context": {"slot": slot, "apiVersion": "3.0.0"}, "value": value}

    def _block_time(self, params: list[Any]) -> Json:
        slot = _integer(params, 0)
        if slot > self._tip("confirmed"):
            raise RpcError(-32004, f"Block not available for slot {slot}")
        return self.cluster.block_time(slot)

    def _epoch_info(self, params: list[Any]) -> Json:
        slot = self._slot(_config(params, 0))
        return {
            "absoluteSlot": slot,
            "blockHeight": self.cluster.height(slot),
            "epoch": slot // 432_000,
            "slotIndex": slot % 432_000,
            "slotsInEpoch": 432_000,
            "transactionCount": len(self.cluster.records),
        }

    def _latest_blockhash(self, params: list[Any]) -> Json:
        slot = self._slot(_config(params, 0))
        return self._context(
            slot,
            {
                "blockhash": str(self.cluster.blockhash(slot)),
                "lastValidBlockHeight": self.cluster.last_valid_height(slot),
            },
        )

    def _is_blockhash_valid(self, params: list[Any]) -> Json:
        slot = self._slot(_config(params, 1))
        try:
            blockhash = Hash.from_string(_string(params, 0))
        except ParseHashError:
            raise RpcError(-32602, "Invalid param: Invalid") from None
        return self._context(slot, self.cluster.knows_blockhash(blockhash, slot))

    def _fee_for_message(self, params: list[Any]) -> Json:
        slot = self._slot(_config(params, 1))
        try:
            message = from_bytes_versioned(base64.b64decode(_string(params, 0), validate=True))
        except ValueError:
            raise RpcError(-32602, "invalid base64 encoding") from None
        if not self.cluster.knows_blockhash(message.recent_blockhash, slot):
            return self._context(slot, None)
        return self._context(slot, _LAMPORTS_A_SIGNATURE * message.header.num_required_signatures)

    # Accounts --------------------------------------------------------------------------------------------------------

    def _balance(self, params: list[Any]) -> Json:
        slot = self._slot(_config(params, 1))
        account = self.cluster.account(_pubkey(params, 0), slot)
        return self._context(slot, account.lamports if account else 0)

    def _account_info(self, params: list[Any]) -> Json:
        config = _config(params, 1)
        slot = self._slot(config)
        return self._context(slot, self._render_account(self.cluster.account(_pubkey(params, 0), slot), config))

    def _multiple_accounts(self, params: list[Any]) -> Json:
        config = _config(params, 1)
        addresses = _list(params, 0)
        if len(addresses) > MAX_ACCOUNTS:
            raise RpcError(-32602, f"Too many inputs provided; max {MAX_ACCOUNTS}")
        slot = self._slot(config)
        keys = [_pubkey(addresses, i) for i in range(len(addresses))]
        return self._context(slot, [self._render_account(self.cluster.account(key, slot), config) for key in keys])

    def _token_account_balance(self, params: list[Any]) -> Json:
        slot = self._slot(_config(params, 1))
        account = self.cluster.account(_pubkey(params, 0), slot)
        if account is None:
            raise RpcError(-32602, "Invalid param: could not find account")
        held = tokens.parse_account(account.owner, account.data)
        if held is None:
            raise RpcError(-32602, "Invalid param: not a Token account")
        return self._context(slot, parsed.amount(held.amount, self.cluster.decimals(held.mint) or 0))

    def _token_supply(self, params: list[Any]) -> Json:
        slot = self._slot(_config(params, 1))
        account = self.cluster.account(_pubkey(params, 0), slot)
        if account is None:
            raise RpcError(-32602, "Invalid param: could not find account")
        mint = tokens.parse_mint(account.owner, account.data)
        if mint is None:
            raise RpcError(-32602, "Invalid param: not a Token mint")
        return self._context(slot, parsed.amount(mint.supply, mint.decimals))

    def _token_accounts_by_owner(self, params: list[Any]) -> Json:
        owner, wanted, config = _pubkey(params, 0), _config(params, 1), _config(params, 2)
        slot = self._slot(config)
        if "mint" in wanted:
            mint_account = self.cluster.account(_parse_pubkey(wanted["mint"]), slot)
            if mint_account is None:
                raise RpcError(-32602, "Invalid param: could not find mint")
        found = []
        for address in self.cluster.touched():
            account = self.cluster.account(address, slot)
            held = account and tokens.parse_account(account.owner, account.data)
            if not account or not held or held.owner != owner:
                continue
            if wanted.get("mint") == str(held.mint) or wanted.get("programId") == str(account.owner):
                found.append({"pubkey": str(address), "account": self._render_account(account, config)})
        return self._context(slot, found)

    def _render_account(self, account: Account | None, config: dict[str, Any]) -> Json:
        if account is None:
            return None
        data = bytes(account.data)
        rendered: Json
        encoding = _field(config, "encoding", str) or "base64"
        window = _field(config, "dataSlice", dict)
        shown = data
        if window is not None:
            offset, length = (_param([window.get(name)], 0, int, "usize") for name in ("offset", "length"))
            shown = data[offset : offset + length]
        parsed_data = self._parsed_data(account) if encoding == "jsonParsed" else None
        if parsed_data is not None:
            rendered = parsed_data
        elif encoding == "base58":
            if len(shown) > 128:
                message = "Encoded binary (base 58) data should be less than 128 bytes, please use Base64 encoding."
                raise RpcError(-32600, message)
            rendered = [parsed.base58(shown), "base58"]
        else:
            rendered = [base64.b64encode(shown).decode(), "base64"]
        return {
            "lamports": account.lamports,
            "owner": str(account.owner),
            "data": rendered,
            "executable": account.executable,
            "rentEpoch": 2**64 - 1,
            "space": len(data),
        }

    def _parsed_data(self, account: Account) -> Json:
        name = "spl-token-2022" if account.owner == TOKEN_2022_PROGRAM_ID else "spl-token"
        held = tokens.parse_account(account.owner, account.data)
        if held is not None:
            info = {
                "isNative": held.mint == tokens.NATIVE_MINT,
                "mint": str(held.mint),
                "owner": str(held.owner),
                "state": "frozen" if held.frozen else "initialized",
                "tokenAmount": parsed.amount(held.amount, self.cluster.decimals(held.mint) or 0),
            }
            return {"program": name, "space": len(account.data), "parsed": {"type": "account", "info": info}}
        mint = tokens.parse_mint(account.owner, account.data)
        if mint is not None:
            info = {
                "decimals": mint.decimals,
                "supply": str(mint.supply),
                "isInitialized": True,
                "mintAuthority": mint.mint_authority and str(mint.mint_authority),
                "freezeAuthority": mint.freeze_authority and str(mint.freeze_authority),
            }
            return {"program": name, "space": len(account.data), "parsed": {"type": "mint", "info": info}}
        return None

    # History ---------------------------------------------------------------------------------------------------------

    def _signatures_for_address(self, params: list[Any]) -> Json:
        """Newest first. As on real nodes: failed transactions are listed; `before` and `until` need not name the
        address. Of unknown ones, `until` does not limit and `before` lists nothing; with strict_cursors, as since
        Agave 4 (agave pull request 7937), either is an error."""
        address, config = _pubkey(params, 0), _config(params, 1)
        limit = _field(config, "limit", int)
        limit = MAX_SIGNATURES_LISTED if limit is None else limit
        if not 1 <= limit <= MAX_SIGNATURES_LISTED:
            raise RpcError(-32602, f"Invalid limit; max {MAX_SIGNATURES_LISTED}")
        newest = self._slot(_above_processed(config))
        before, until = (self._known(config.get(name), newest) for name in ("before", "until"))
        for name, found in (("before", before), ("until", until)):
            if config.get(name) is not None and found is None:
                if self.strict_cursors:
                    raise RpcError(-32020, f"Transaction {config[name]} not found")
                if name == "before":
                    return []
        listed: list[Json] = []
        for record in reversed(self.cluster.records_of(address)):
            if until is not None and record.position <= until.position:
                break
            if len(listed) == limit:
                break
            if record.slot > newest or (before is not None and record.position >= before.position):
                continue
            listed.append(
                {
                    "signature": str(record.signature),
                    "slot": record.slot,
                    "err": transaction_error(record.error),
                    "memo": parsed.memo(record),
                    "blockTime": record.block_time,
                    "confirmationStatus": self._status_name(record.slot),
                    "transactionIndex": record.index,
                }
            )
        return listed

    def _known(self, text: Any, newest: int) -> Record | None:
        """The landed transaction of that signature, if it is not newer than the slot."""
        if text is None:
            return None
        record = self.cluster.record(_parse_signature(text))
        return record if record is not None and record.slot <= newest else None

    def _signature_statuses(self, params: list[Any]) -> Json:
        wanted = _list(params, 0)
        if len(wanted) > MAX_STATUSES:
            raise RpcError(-32602, f"Too many inputs provided; max {MAX_STATUSES}")
        search = _config(params, 1).get("searchTransactionHistory") is True
        tip, finalized = self._tip(), self._tip("finalized")
        statuses: list[Json] = []
        for text in wanted:
            record = self._known(text, tip)
            if record is None or (not search and record.slot < finalized - _STATUS_CACHE_SLOTS):
                statuses.append(None)
                continue
            error = transaction_error(record.error)
            statuses.append(
                {
                    "slot": record.slot,
                    "confirmations": None if record.slot <= finalized else tip - record.slot,
                    "err": error,
                    "status": {"Ok": None} if error is None else {"Err": error},
                    "confirmationStatus": self._status_name(record.slot),
                }
            )
        return self._context(tip, statuses)

    def _transaction(self, params: list[Any]) -> Json:
        signature = _parse_signature(_string(params, 0))
        alone = len(params) > 1 and isinstance(params[1], str)  # an older form: the encoding without a map
        config = {"encoding": params[1]} if alone else _config(params, 1)
        newest = self._slot(_above_processed(config))
        record = self.cluster.record(signature)
        if record is None or record.slot > newest:
            return None
        versioned = isinstance(record.transaction.message, MessageV0)
        if versioned and config.get("maxSupportedTransactionVersion") is None:
            raise RpcError(
                -32015,
                "Transaction version (0) is not supported by the requesting client. Please try the request again with "
                'the following configuration parameter: "maxSupportedTransactionVersion": 0',
            )
        return self._render_transaction(record, _field(config, "encoding", str) or "json")

    def _status_name(self, slot: int) -> str:
        return next(name for name in reversed(COMMITMENTS) if slot <= self._tip(name))

    def _render_transaction(self, record: Record, encoding: str) -> Json:
        transaction, message = record.transaction, record.transaction.message
        error = transaction_error(record.error)
        own = len(message.account_keys)
        top = [
            parsed.Instruction(i.program_id_index, list(bytes(i.accounts)), bytes(i.data), 1)
            for i in message.instructions
        ]
        inner = [
            (
                index,
                [
                    parsed.Instruction(
                        i.instruction().program_id_index,
                        list(bytes(i.instruction().accounts)),
                        bytes(i.instruction().data),
                        i.stack_height(),
                    )
                    for i in group
                ],
            )
            for index, group in enumerate(record.inner)
            if group
        ]

        def write(instruction: parsed.Instruction) -> Json:
            if encoding == "jsonParsed":
                return parsed.render(instruction, record.keys)
            return instruction.compiled()

        if encoding == "base64":
            rendered: Json = [base64.b64encode(bytes(transaction)).decode(), "base64"]
        elif encoding == "base58":
            rendered = [parsed.base58(bytes(transaction)), "base58"]
        else:
            body: dict[str, Json] = {"recentBlockhash": str(message.recent_blockhash)}
            if encoding == "jsonParsed":
                body["accountKeys"] = [
                    {
                        "pubkey": str(key),
                        "signer": i < message.header.num_required_signatures,
                        "writable": is_writable(message, i, len(record.loaded_writable)),
                        "source": "transaction" if i < own else "lookupTable",
                    }
                    for i, key in enumerate(record.keys)
                ]
            else:
                body["accountKeys"] = [str(key) for key in message.account_keys]
                body["header"] = {
                    "numRequiredSignatures": message.header.num_required_signatures,
                    "numReadonlySignedAccounts": message.header.num_readonly_signed_accounts,
                    "numReadonlyUnsignedAccounts": message.header.num_readonly_unsigned_accounts,
                }
            body["instructions"] = [write(instruction) for instruction in top]
            if isinstance(message, MessageV0):
                body["addressTableLookups"] = [
                    {
                        "accountKey": str(lookup.account_key),
                        "writableIndexes": list(bytes(lookup.writable_indexes)),
                        "readonlyIndexes": list(bytes(lookup.readonly_indexes)),
                    }
                    for lookup in message.address_table_lookups
                ]
            rendered = {"signatures": [str(one) for one in transaction.signatures], "message": body}
        meta = {
            "err": error,
            "status": {"Ok": None} if error is None else {"Err": error},
            "fee": record.fee,
            "preBalances": record.pre_lamports,
            "postBalances": record.post_lamports,
            "innerInstructions": [{"index": at, "instructions": [write(i) for i in group]} for at, group in inner],
            "logMessages": record.logs,
            "preTokenBalances": [_token_balance(state) for state in record.pre_tokens],
            "postTokenBalances": [_token_balance(state) for state in record.post_tokens],
            "rewards": [],
            "computeUnitsConsumed": record.compute_units,
        }
        if encoding != "jsonParsed":
            meta["loadedAddresses"] = {
                "writable": [str(key) for key in record.loaded_writable],
                "readonly": [str(key) for key in record.loaded_readonly],
            }
        return {
            "slot": record.slot,
            "blockTime": record.block_time,
            "transaction": rendered,
            "meta": meta,
            "version": 0 if isinstance(message, MessageV0) else "legacy",
        }

    # Sending ---------------------------------------------------------------------------------------------------------

    def _send_transaction(self, params: list[Any]) -> Json:
        config = _config(params, 1)
        transaction = _decode_transaction(_string(params, 0), _field(config, "encoding", str) or "base58")
        if not config.get("skipPreflight"):
            if not all(transaction.verify_with_results()):
                raise RpcError(-32003, "Transaction signature verification failure")
            bank = self._slot({**config, "commitment": config.get("preflightCommitment")})
            found = self.cluster.simulate(transaction, bank, verify=False, check_blockhash=True)
            if found.error is not None:
                data = {
                    "accounts": None,
                    "err": transaction_error(found.error),
                    "innerInstructions": None,
                    "logs": found.logs,
                    "returnData": None,
                    "unitsConsumed": found.compute_units,
                }
                raise RpcError(-32002, f"Transaction simulation failed: {_describe(found.error)}", data)
        # The reply is the signature, whether or not a leader takes the transaction.
        self.cluster.execute(transaction)
        return str(transaction.signatures[0])

    def _simulate_transaction(self, params: list[Any]) -> Json:
        config = _config(params, 1)
        transaction = _decode_transaction(_string(params, 0), _field(config, "encoding", str) or "base58")
        verify, replace = config.get("sigVerify") is True, config.get("replaceRecentBlockhash") is True
        if verify and replace:
            raise RpcError(-32602, "sigVerify may not be used with replaceRecentBlockhash")
        slot = self._slot(config)
        found = self.cluster.simulate(transaction, slot, verify=verify, check_blockhash=not replace)
        value = {
            "err": transaction_error(found.error),
            "logs": found.logs,
            "accounts": None,
            "unitsConsumed": found.compute_units,
            "returnData": None,
            "innerInstructions": None,
        }
        return self._context(slot, value)

    def _request_airdrop(self, params: list[Any]) -> Json:
        try:
            return str(self._faucet(_pubkey(params, 0), _integer(params, 1)))
        except ValueError:
            raise RpcError(-32603, "Internal error") from None


def _control(run: Callable[..., Json]) -> Callable[[list[Any]], Json]:
    def method(params: list[Any]) -> Json:
        try:
            return run(*params)
        except (TypeError, ValueError) as error:
            raise RpcError(-32602, f"Invalid params: {error}") from None

    return method


# Parameters ----------------------------------------------------------------------------------------------------------


def _param(params: list[Any], index: int, kind: type, name: str) -> Any:
    if len(params) <= index:
        raise RpcError(-32602, f"`params` should have at least {index + 1} argument(s)")
    if not isinstance(params[index], kind) or isinstance(params[index], bool):
        raise RpcError(-32602, f"Invalid params: invalid type, expected {name}.")
    return params[index]


def _string(params: list[Any], index: int) -> str:
    text: str = _param(params, index, str, "a string")
    return text


def _integer(params: list[Any], index: int) -> int:
    number: int = _param(params, index, int, "u64")
    if not 0 <= number < 2**64:
        raise RpcError(-32602, "Invalid params: invalid value, expected u64.")
    return number


def _list(params: list[Any], index: int) -> list[Any]:
    items: list[Any] = _param(params, index, list, "a sequence")
    return items


def _config(params: list[Any], index: int) -> dict[str, Any]:
    if len(params) <= index or params[index] is None:
        return {}
    config: dict[str, Any] = _param(params, index, dict, "a map")
    return config


def _field(config: dict[str, Any], name: str, kind: type) -> Any:
    """The field, or None if it is missing or null."""
    value = config.get(name)
    return None if value is None else _param([value], 0, kind, kind.__name__)


def _pubkey(params: list[Any], index: int) -> Pubkey:
    return _parse_pubkey(_string(params, index))


def _parse_pubkey(text: Any) -> Pubkey:
    try:
        return Pubkey.from_string(text)
    except (TypeError, ValueError):
        raise RpcError(-32602, "Invalid param: Invalid") from None


def _parse_signature(text: Any) -> Signature:
    try:
        return Signature.from_string(text)
    except (TypeError, ValueError):
        raise RpcError(-32602, "Invalid param: Invalid") from None


def _commitment(config: dict[str, Any], default: str = "finalized") -> str:
    commitment = _field(config, "commitment", str) or default
    if commitment not in COMMITMENTS:
        raise RpcError(-32602, f"Invalid params: unknown variant `{commitment}`, expected one of {COMMITMENTS}.")
    return str(commitment)


def _above_processed(config: dict[str, Any]) -> dict[str, Any]:
    if _commitment(config) == "processed":
        raise RpcError(-32602, "Method does not support commitment below `confirmed`")
    return config


def _decode_transaction(text: str, encoding: str) -> VersionedTransaction:
    try:
        if encoding == "base64":
            raw = base64.b64decode(text, validate=True)
        elif encoding == "base58":
            raw = parsed.from_base58(text)
        else:
            raise RpcError(-32602, f"unsupported encoding: {encoding}. Supported encodings: base58, base64")
    except (binascii.Error, ValueError):
        raise RpcError(-32602, f"invalid {encoding} encoding") from None
    if len(raw) > MAX_TRANSACTION_SIZE:
        raise RpcError(-32602, f"decoded transaction too large: {len(raw)} bytes (max: {MAX_TRANSACTION_SIZE} bytes)")
    try:
        transaction = VersionedTransaction.from_bytes(raw)
        transaction.sanitize()
    except Exception as error:
        raise RpcError(-32602, f"failed to deserialize transaction: {error}") from None
    return transaction


def _describe(error: TransactionErrorType) -> str:
    """As a node words it."""
    rendered = transaction_error(error)
    if error == TransactionErrorFieldless.BlockhashNotFound:
        return "Blockhash not found"
    if error == TransactionErrorFieldless.AlreadyProcessed:
        return "This transaction has already been processed"
    if isinstance(rendered, dict) and "InstructionError" in rendered:
        index, cause = rendered["InstructionError"]
        if isinstance(cause, dict) and "Custom" in cause:
            cause = f"custom program error: {cause['Custom']:#x}"
        return f"Error processing Instruction {index}: {cause}"
    return json.dumps(rendered)


def _token_balance(state: TokenState) -> Json:
    return {
        "accountIndex": state.index,
        "mint": str(state.mint),
        "owner": str(state.owner),
        "programId": str(state.program),
        "uiTokenAmount": parsed.amount(state.amount, state.decimals),
    }


def _failure(request_id: Any, error: RpcError) -> Json:
    return {"jsonrpc": "2.0", "error": error.body, "id": request_id}


def _dump(answer: Json) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()
