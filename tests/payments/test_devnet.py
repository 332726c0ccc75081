"""The devnet against what real nodes do: the unmodified client, real programs, time, forks and the listing's quirks.

What a node answers is Agave's (rpc/src/rpc.rs, ledger/src/blockstore.rs); the programs' limits are their own.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Commitment
from solana.rpc.core import RPCException
from solana.rpc.models import TokenAccountOpts, TxOpts
from solders.address_lookup_table_account import AddressLookupTableAccount
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import CreateAccountParams, TransferParams, create_account, transfer
from solders.token.state import Mint as SoldersMint
from solders.token.state import TokenAccount as SoldersTokenAccount
from solders.transaction import VersionedTransaction
from spl.memo.constants import MEMO_PROGRAM_ID
from spl.token import instructions as spl
from spl.token import models
from spl.token.constants import TOKEN_2022_PROGRAM_ID, TOKEN_PROGRAM_ID

from diffusionz.payments import tokens
from diffusionz.payments.devnet import Devnet, mints
from diffusionz.payments.devnet.parsed import base58, from_base58
from tests.payments.world import port_of_ones_own

SOL = 10**9
RENT = 890_880  # of an account without data


class Market:
    """A devnet with a mint, a payer who holds SOL and tokens, and a receiver without accounts. All finalized."""

    def __init__(self, seed: int = 7, **settings: Any) -> None:
        self.devnet = Devnet(seed, **settings)
        self.payer = self.devnet.keypair("payer")
        self.receiver = self.devnet.keypair("receiver")
        self.devnet.airdrop(self.payer.pubkey(), 100 * SOL)
        self.mint = self.devnet.create_mint(6)
        self.devnet.mint_to(self.mint, self.payer.pubkey(), 1_000_000_000)
        self.account = self.devnet.token_address(self.mint, self.receiver.pubkey())
        self.devnet.finalize()

    def pay(self, amount: int) -> Signature:
        return self.devnet.transfer(self.mint, self.payer, self.receiver.pubkey(), amount)

    def overspend(self) -> VersionedTransaction:
        """Fails in the token program: the payer has not so much."""
        pay = self.devnet.transfer_instruction(self.mint, self.payer.pubkey(), self.account, 10**15)
        return self.devnet.build([pay], self.payer)

    def ask(self, method: str, *params: Any) -> Any:
        """One JSON-RPC request as raw JSON: the result, or the error object."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
        status, body = self.devnet.rpc.reply(json.dumps(request).encode())
        assert status == 200
        answer = json.loads(body)
        assert answer["id"] == 1
        return answer["result"] if "result" in answer else answer["error"]

    def listing(self, address: Pubkey, **config: Any) -> list[str]:
        return [entry["signature"] for entry in self.ask("getSignaturesForAddress", str(address), config)]


@pytest.fixture
def market() -> Market:
    return Market()


def in_process(devnet: Devnet, use: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with devnet.client() as client:
            return await use(client)

    return asyncio.run(run())


def over_http(devnet: Devnet, use: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with devnet.serving() as url, AsyncClient(url) as client:
            return await use(client)

    return asyncio.run(run())


# The unmodified client -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connect", [in_process, over_http])
def test_the_solana_client_reads_everything(market: Market, connect: Callable[..., Any]) -> None:
    devnet, payer, receiver = market.devnet, market.payer, market.receiver.pubkey()
    signature = market.pay(2_500_000)
    devnet.finalize()

    async def use(client: AsyncClient) -> None:
        assert await client.is_connected()
        assert (await client.get_genesis_hash()).value == devnet.genesis_hash
        assert (await client.get_version()).value.solana_core
        assert (await client.get_slot()).value == devnet.slot - 32
        assert (await client.get_block_height()).value == devnet.slot - 32 - 40
        assert (await client.get_epoch_info("processed")).value.absolute_slot == devnet.slot
        assert (await client.get_block_time(devnet.slot - 32)).value == 1_767_225_600 + int(32 * 0.4)
        assert (await client.get_balance(payer.pubkey())).value == devnet.balance(payer.pubkey())
        assert (await client.get_token_account_balance(market.account)).value.ui_amount_string == "2.5"
        assert (await client.get_token_supply(market.mint)).value.amount == "1000000000"
        assert (await client.get_minimum_balance_for_rent_exemption(0)).value == RENT
        assert (await client.get_recent_prioritization_fees()).value
        latest = (await client.get_latest_blockhash()).value
        assert latest.blockhash == devnet.cluster.blockhash(devnet.slot - 32)
        one = (await client.get_account_info(market.mint)).value
        several = (await client.get_multiple_accounts([market.mint, receiver, market.account])).value
        assert several[0] == one and several[1] is None
        parsed = (await client.get_account_info_json_parsed(market.account)).value
        assert parsed.data.parsed["info"]["tokenAmount"]["amount"] == "2500000"
        owned = (await client.get_token_accounts_by_owner(receiver, TokenAccountOpts(mint=market.mint))).value
        assert [entry.pubkey for entry in owned] == [market.account]
        listed = (await client.get_signatures_for_address(market.account)).value
        assert [(entry.signature, entry.err, str(entry.confirmation_status)) for entry in listed] == [
            (signature, None, "TransactionConfirmationStatus.Finalized")
        ]
        status = (await client.get_signature_statuses([signature, Signature.default()])).value
        assert status[0].slot == listed[0].slot and status[1] is None
        message = devnet.build([], payer).message
        assert (await client.get_fee_for_message(message, Commitment.CONFIRMED)).value == 5000
        for encoding in ("json", "jsonParsed", "base64", "base58"):
            found = (await client.get_transaction(signature, encoding, max_supported_transaction_version=0)).value
            meta = found.transaction.meta
            assert [(b.owner, b.mint, b.ui_token_amount.amount) for b in meta.pre_token_balances] == [
                (payer.pubkey(), market.mint, "1000000000")
            ]
            after = {b.owner: b.ui_token_amount.amount for b in meta.post_token_balances}
            assert after == {payer.pubkey(): "997500000", receiver: "2500000"}
            assert meta.fee == 5000 and meta.err is None and sum(meta.pre_balances) - 5000 == sum(meta.post_balances)

    connect(devnet, use)


@pytest.mark.parametrize("connect", [in_process, over_http])
def test_the_solana_client_sends_and_asks_for_sol(market: Market, connect: Callable[..., Any]) -> None:
    devnet, receiver = market.devnet, market.receiver.pubkey()

    async def use(client: AsyncClient) -> None:
        dropped = (await client.request_airdrop(receiver, 3 * SOL)).value
        payment = devnet.build([devnet.create_instruction(market.mint, receiver, market.payer.pubkey())], market.payer)
        sent = (await client.send_transaction(payment, TxOpts(preflight_commitment=Commitment.CONFIRMED))).value
        assert sent == payment.signatures[0]
        simulated = (await client.simulate_transaction(market.overspend(), commitment=Commitment.CONFIRMED)).value
        assert "Custom(1" in str(simulated.err).replace(" ", "").replace("\n", "") and simulated.logs
        devnet.advance()
        statuses = (await client.get_signature_statuses([dropped, sent])).value
        assert [str(s.confirmation_status).rpartition(".")[2] for s in statuses] == ["Confirmed"] * 2

    connect(devnet, use)
    assert devnet.balance(receiver) == 3 * SOL
    assert devnet.cluster.account(market.account) is not None


def test_time_passes_by_itself_when_served_ticking() -> None:
    devnet = Devnet(slot_seconds=0.005)

    async def run() -> None:
        async with devnet.serving(ticking=True) as url, AsyncClient(url) as client:
            address = Keypair().pubkey()
            signature = (await client.request_airdrop(address, SOL)).value
            await client.confirm_transaction(signature, Commitment.FINALIZED, sleep_seconds=0.02)
            assert (await client.get_balance(address)).value == SOL

    asyncio.run(run())


def test_a_port_in_use_is_an_error_that_says_so() -> None:
    async def run() -> None:
        async with Devnet().serving() as url:
            with pytest.raises(OSError, match="in use"):
                async with Devnet().serving(port=int(url.rpartition(":")[2])):
                    pass

    asyncio.run(run())


# Determinism ---------------------------------------------------------------------------------------------------------


def told(market: Market) -> list[Any]:
    """A short history, and all that the node tells of it."""
    first = market.pay(5)
    market.devnet.advance(3)
    second = market.pay(6)
    market.devnet.drop(second)
    market.devnet.land(market.overspend())
    market.devnet.finalize()
    account, config = str(market.account), {"encoding": "jsonParsed", "maxSupportedTransactionVersion": 0}
    listed = market.listing(market.account)
    return [
        listed,
        [market.ask("getTransaction", signature, config) for signature in listed],
        market.ask("getAccountInfo", account, {"encoding": "base64"}),
        market.ask("getLatestBlockhash"),
        market.ask("getGenesisHash"),
        str(first),
    ]


def test_a_seed_gives_one_chain_byte_for_byte() -> None:
    assert told(Market(3)) == told(Market(3))
    other, same = told(Market(4)), told(Market(3))
    assert all(a != b for a, b in zip(other, same, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"seed": 2**64}, {"confirmed_lag": -1}, {"confirmed_lag": 33}, {"first_slot": 10}],
)
def test_a_devnet_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Devnet(**wrong)


# Commitment ----------------------------------------------------------------------------------------------------------


def test_every_read_is_of_the_state_at_its_commitment(market: Market) -> None:
    signature = str(market.pay(9))
    account, owner, mint = str(market.account), str(market.receiver.pubkey()), str(market.mint)
    versioned = {"maxSupportedTransactionVersion": 0}

    def seen(commitment: str) -> tuple[bool, ...]:
        at = {"commitment": commitment}
        told = [
            market.ask("getBalance", account, at)["value"] > 0,
            market.ask("getAccountInfo", account, at)["value"] is not None,
            market.ask("getMultipleAccounts", [account], at)["value"][0] is not None,
            "value" in market.ask("getTokenAccountBalance", account, at),
            market.ask("getTokenAccountsByOwner", owner, {"mint": mint}, at)["value"] != [],
        ]
        if commitment != "processed":
            told.append(market.ask("getTransaction", signature, at | versioned) is not None)
            told.append(market.listing(market.account, **at) == [signature])
        assert len(set(told)) == 1, told
        return told[0]

    def status() -> str:
        return str(market.ask("getSignatureStatuses", [signature])["value"][0]["confirmationStatus"])

    assert [seen(c) for c in ("processed", "confirmed", "finalized")] == [True, False, False]
    assert status() == "processed"
    market.devnet.advance()
    assert [seen(c) for c in ("processed", "confirmed", "finalized")] == [True, True, False]
    assert status() == "confirmed"
    market.devnet.advance(30)
    assert [seen(c) for c in ("processed", "confirmed", "finalized")] == [True, True, False]
    market.devnet.advance()
    assert [seen(c) for c in ("processed", "confirmed", "finalized")] == [True, True, True]
    assert status() == "finalized"


def test_a_balance_can_be_read_at_each_of_many_versions(market: Market) -> None:
    """A change a slot: finalized reads lag behind by 32 of them, never by more or fewer."""
    market.pay(1)
    for paid in range(2, 60):
        market.devnet.advance()
        market.pay(1)
        if paid > 33:
            at = {"commitment": "finalized"}
            assert market.ask("getTokenAccountBalance", str(market.account), at)["value"]["amount"] == str(paid - 32)


def test_history_and_listings_refuse_processed(market: Market) -> None:
    for method in ("getTransaction", "getSignaturesForAddress"):
        key = str(Signature.default()) if method == "getTransaction" else str(market.account)
        error = market.ask(method, key, {"commitment": "processed"})
        assert error == {"code": -32602, "message": "Method does not support commitment below `confirmed`"}


def test_min_context_slot_refuses_what_is_not_reached(market: Market) -> None:
    ahead = market.devnet.slot - 32 + 1
    error = market.ask("getBalance", str(market.mint), {"minContextSlot": ahead})
    message = "Minimum context slot has not been reached"
    assert error == {"code": -32016, "message": message, "data": {"contextSlot": ahead - 1}}
    assert market.ask("getBalance", str(market.mint), {"minContextSlot": ahead - 1})["context"]["slot"] == ahead - 1


# Blockhashes ---------------------------------------------------------------------------------------------------------


def test_a_blockhash_expires_after_150_blocks(market: Market) -> None:
    devnet = market.devnet
    slot = devnet.slot
    latest = market.ask("getLatestBlockhash", {"commitment": "processed"})["value"]
    last = latest["lastValidBlockHeight"]
    assert last == devnet.cluster.height(slot) + 150 and devnet.cluster.height(slot) == slot - 40
    devnet.advance()  # what is built now has the blockhash of `slot`
    in_time, too_late = devnet.build([], market.payer), devnet.build([], market.payer)
    assert str(in_time.message.recent_blockhash) == latest["blockhash"]
    devnet.advance(149)
    assert market.ask("isBlockhashValid", latest["blockhash"], {"commitment": "processed"})["value"] is True
    assert devnet.cluster.height(devnet.slot) == last
    assert devnet.land(in_time).error is None
    devnet.advance()
    assert market.ask("isBlockhashValid", latest["blockhash"], {"commitment": "processed"})["value"] is False
    with pytest.raises(ValueError, match="BlockhashNotFound"):
        devnet.land(too_late)
    # A bank that is a block behind still takes it in its trial run; no leader does.
    raw = base64.b64encode(bytes(too_late)).decode()
    options = {"encoding": "base64", "preflightCommitment": "confirmed"}
    assert market.ask("sendTransaction", raw, options) == str(too_late.signatures[0])
    assert market.ask("getSignatureStatuses", [str(too_late.signatures[0])])["value"] == [None]


def test_skipped_slots_have_no_height(market: Market) -> None:
    cluster = market.devnet.cluster
    height = cluster.height(market.devnet.slot)
    transaction = market.devnet.build([], market.payer)
    market.devnet.skip(400)
    assert cluster.height(market.devnet.slot) == height + 1
    assert market.devnet.land(transaction).error is None  # 401 slots old, 2 blocks old
    assert cluster.slot_at("confirmed") == market.devnet.slot - 401


def test_the_trial_run_is_on_the_bank_of_the_preflight_commitment(market: Market) -> None:
    transaction = market.devnet.build([], market.payer)  # with a blockhash that is confirmed, not finalized
    raw = base64.b64encode(bytes(transaction)).decode()
    error = market.ask("sendTransaction", raw, {"encoding": "base64"})
    assert error["code"] == -32002 and error["message"] == "Transaction simulation failed: Blockhash not found"
    assert error["data"]["err"] == "BlockhashNotFound"
    sent = market.ask("sendTransaction", raw, {"encoding": "base64", "preflightCommitment": "confirmed"})
    assert sent == str(transaction.signatures[0])
    again = market.ask("sendTransaction", raw, {"encoding": "base64", "preflightCommitment": "confirmed"})
    assert again["data"]["err"] == "AlreadyProcessed"
    assert market.ask("sendTransaction", raw, {"encoding": "base64", "skipPreflight": True}) == sent
    assert sum(record.signature == transaction.signatures[0] for record in market.devnet.cluster.records) == 1


# Transactions --------------------------------------------------------------------------------------------------------


def test_a_failed_transaction_lands_pays_its_fee_and_is_listed(market: Market) -> None:
    market.pay(5)
    before = market.devnet.balance(market.payer.pubkey())
    failed = market.overspend()
    raw, options = base64.b64encode(bytes(failed)).decode(), {"encoding": "base64", "preflightCommitment": "confirmed"}
    refused = market.ask("sendTransaction", raw, options)
    assert refused["code"] == -32002 and refused["data"]["err"] == {"InstructionError": [1, {"Custom": 1}]}
    assert refused["message"].endswith("Error processing Instruction 1: custom program error: 0x1")
    assert market.devnet.balance(market.payer.pubkey()) == before
    assert market.ask("sendTransaction", raw, options | {"skipPreflight": True}) == str(failed.signatures[0])
    assert market.devnet.balance(market.payer.pubkey()) == before - 5000
    market.devnet.finalize()
    listed = market.ask("getSignaturesForAddress", str(market.account))
    assert [entry["err"] for entry in listed] == [{"InstructionError": [1, {"Custom": 1}]}, None]
    config = {"encoding": "base64", "maxSupportedTransactionVersion": 0}
    meta = market.ask("getTransaction", str(failed.signatures[0]), config)["meta"]
    assert meta["err"] == meta["status"]["Err"] == {"InstructionError": [1, {"Custom": 1}]}
    assert meta["preTokenBalances"] == meta["postTokenBalances"] != []


def test_what_no_leader_takes_leaves_no_trace(market: Market) -> None:
    devnet, payer = market.devnet, market.payer
    pauper = devnet.keypair("pauper")
    dust = transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=pauper.pubkey(), lamports=RENT - 1))
    with pytest.raises(ValueError, match="AccountNotFound"):
        devnet.land(devnet.build([], pauper))
    signed = devnet.build([dust], payer)
    forged = VersionedTransaction.populate(signed.message, [Signature.default()])
    with pytest.raises(ValueError, match="SignatureFailure"):
        devnet.land(forged)
    landed = len(devnet.cluster.records)
    raw = base64.b64encode(bytes(forged)).decode()
    error = market.ask("sendTransaction", raw, {"encoding": "base64"})
    assert error == {"code": -32003, "message": "Transaction signature verification failure"}
    market.ask("sendTransaction", raw, {"encoding": "base64", "skipPreflight": True})
    assert len(devnet.cluster.records) == landed
    # Dust below the rent is taken, fails, and costs the fee.
    with pytest.raises(ValueError, match="InsufficientFundsForRent"):
        devnet.send([dust], payer)
    assert devnet.cluster.account(pauper.pubkey()) is None


def test_a_transaction_that_is_no_transaction_is_refused(market: Market) -> None:
    def send(raw: bytes, encoding: str = "base64") -> Any:
        text = base64.b64encode(raw).decode() if encoding == "base64" else base58(raw)
        return market.ask("sendTransaction", text, {"encoding": encoding})

    assert "too large" in send(b"\1" + bytes(1300))["message"]
    assert "failed to deserialize" in send(b"\1\2\3")["message"]
    assert market.ask("sendTransaction", "not base64!", {"encoding": "base64"})["code"] == -32602
    assert market.ask("sendTransaction", "0OIl", {"encoding": "base58"})["code"] == -32602
    assert market.ask("sendTransaction", "", {"encoding": "hex"})["code"] == -32602
    market.devnet.finalize()
    signed = market.devnet.build([], market.payer)
    market.devnet.finalize()
    assert send(bytes(signed), "base58") == str(signed.signatures[0])


def test_legacy_and_versioned_transactions(market: Market) -> None:
    devnet, payer = market.devnet, market.payer
    versioned = devnet.send([], payer)
    blockhash = devnet.cluster.blockhash(devnet.slot)
    old = VersionedTransaction(Message.new_with_blockhash([], payer.pubkey(), blockhash), [payer])
    devnet.land(old)
    devnet.finalize()
    assert market.ask("getTransaction", str(versioned))["code"] == -32015
    found = market.ask("getTransaction", str(old.signatures[0]))
    assert found["version"] == "legacy" and "addressTableLookups" not in found["transaction"]["message"]

    async def without_the_version(client: AsyncClient) -> None:
        with pytest.raises(RPCException, match="maxSupportedTransactionVersion"):
            await client.get_transaction(versioned)

    in_process(devnet, without_the_version)


def test_lookup_tables_name_accounts_that_the_message_does_not(market: Market) -> None:
    devnet = market.devnet
    market.pay(1)
    table = devnet.create_lookup_table([market.account, market.mint])
    devnet.advance()
    pay = devnet.transfer_instruction(market.mint, market.payer.pubkey(), market.account, 77)
    transaction = devnet.build([pay], market.payer, lookup_tables=[table])
    assert market.account not in transaction.message.account_keys
    record = devnet.land(transaction)
    devnet.finalize()
    config = {"encoding": "json", "maxSupportedTransactionVersion": 0}
    found = market.ask("getTransaction", str(record.signature), config)
    assert found["meta"]["loadedAddresses"] == {"writable": [str(market.account)], "readonly": [str(market.mint)]}
    assert found["version"] == 0 and found["transaction"]["message"]["addressTableLookups"][0]["writableIndexes"] == [0]
    own = len(found["transaction"]["message"]["accountKeys"])
    held = {b["accountIndex"]: b["uiTokenAmount"]["amount"] for b in found["meta"]["postTokenBalances"]}
    assert held[own] == "78" and len(found["meta"]["postBalances"]) == own + 2
    assert market.listing(market.account)[0] == str(record.signature)
    keys = market.ask("getTransaction", str(record.signature), config | {"encoding": "jsonParsed"})["transaction"]
    assert keys["message"]["accountKeys"][own] == {
        "pubkey": str(market.account), "signer": False, "writable": True, "source": "lookupTable",
    }  # fmt: skip


def test_a_lookup_table_that_is_none_or_is_too_short_is_refused(market: Market) -> None:
    devnet = market.devnet
    market.pay(1)
    short = devnet.create_lookup_table([market.mint])
    devnet.advance()
    pay = devnet.transfer_instruction(market.mint, market.payer.pubkey(), market.account, 77)
    tables = {
        "InvalidAddressLookupTableOwner": AddressLookupTableAccount(market.mint, [market.account]),
        "AddressLookupTableNotFound": AddressLookupTableAccount(Keypair().pubkey(), [market.account]),
        "InvalidAddressLookupTableIndex": AddressLookupTableAccount(short.key, [market.mint, market.account]),
    }
    for error, table in tables.items():
        with pytest.raises(ValueError, match=error):
            devnet.land(devnet.build([pay], market.payer, lookup_tables=[table]))


def test_memos_inner_instructions_and_names(market: Market) -> None:
    devnet, payer = market.devnet, market.payer
    memo = Instruction(MEMO_PROGRAM_ID, "grüße".encode(), [AccountMeta(payer.pubkey(), True, False)])
    create = devnet.create_instruction(market.mint, market.receiver.pubkey(), payer.pubkey())
    pay = devnet.transfer_instruction(market.mint, payer.pubkey(), market.account, 5)
    signature = str(devnet.send([memo, create, pay], payer))
    devnet.finalize()
    assert market.ask("getSignaturesForAddress", str(market.account))[0]["memo"] == "[7] grüße"
    config = {"encoding": "jsonParsed", "maxSupportedTransactionVersion": 0}
    found = market.ask("getTransaction", signature, config)
    names = [
        i["parsed"] if i.get("program") == "spl-memo" else i.get("parsed", {}).get("type")
        for i in found["transaction"]["message"]["instructions"]
    ]
    assert names == [None, "grüße", "createIdempotent", "transferChecked"]
    [inner] = found["meta"]["innerInstructions"]
    assert inner["index"] == 2 and all(i["stackHeight"] == 2 for i in inner["instructions"])
    assert any("Program log" in line for line in found["meta"]["logMessages"])


# Tokens --------------------------------------------------------------------------------------------------------------


def test_token_2022_withholds_its_fee(market: Market) -> None:
    devnet, payer, receiver = market.devnet, market.payer, market.receiver.pubkey()
    fee = mints.transfer_fee(500, 10**12, payer.pubkey())
    mint = devnet.create_mint(6, name="fee", program=TOKEN_2022_PROGRAM_ID, extensions=[fee])
    devnet.mint_to(mint, payer.pubkey(), 10_000_000)
    devnet.transfer(mint, payer, receiver, 1_000_000)
    assert devnet.token_balance(mint, receiver) == 950_000
    assert devnet.token_balance(mint, payer.pubkey()) == 9_000_000
    account = devnet.cluster.account(devnet.token_address(mint, receiver))
    assert account is not None
    held = tokens.parse_account(account.owner, account.data)
    assert held is not None and set(held.extensions) == {"immutable_owner", "transfer_fee_amount"}


def everything(authority: Pubkey) -> list[mints.Extension]:
    return [
        mints.transfer_fee(1, 1, authority),
        mints.close_authority(authority),
        mints.default_frozen(),
        mints.non_transferable(),
        mints.interest_bearing(-5, authority),
        mints.permanent_delegate(authority),
        mints.transfer_hook(authority),
        mints.metadata_pointer(authority),
        mints.pausable(authority),
    ]


def test_the_program_takes_every_extension_and_they_are_read_back(market: Market) -> None:
    authority = market.payer.pubkey()
    extensions = everything(authority)
    mint = market.devnet.create_mint(
        9, name="all", program=TOKEN_2022_PROGRAM_ID, freeze_authority=authority, extensions=extensions
    )
    account = market.devnet.cluster.account(mint)
    assert account is not None
    read = tokens.parse_mint(account.owner, account.data)
    assert read is not None
    assert read.extensions == tuple(extension.name for extension in extensions)
    assert (read.decimals, read.supply, read.freeze_authority) == (9, 0, authority)
    with pytest.raises(ValueError, match="TOKEN_2022"):
        market.devnet.create_mint(6, name="classic", extensions=extensions)


def test_token_accounts_are_read_as_solders_reads_them(market: Market) -> None:
    market.pay(123_456)
    account, mint = market.devnet.cluster.account(market.account), market.devnet.cluster.account(market.mint)
    assert account is not None and mint is not None
    theirs, ours = SoldersTokenAccount.from_bytes(account.data), tokens.parse_account(account.owner, account.data)
    assert ours is not None
    assert (ours.mint, ours.owner, ours.amount) == (theirs.mint, theirs.owner, theirs.amount)
    their_mint, our_mint = SoldersMint.from_bytes(mint.data), tokens.parse_mint(mint.owner, mint.data)
    assert our_mint is not None
    assert (our_mint.decimals, our_mint.supply, our_mint.mint_authority, our_mint.freeze_authority) == (
        their_mint.decimals, their_mint.supply, their_mint.mint_authority, their_mint.freeze_authority,
    )  # fmt: skip
    # Neither is the other, nobody else's account is either, and an account being set up is none yet.
    assert tokens.parse_mint(account.owner, account.data) is None
    assert tokens.parse_account(mint.owner, mint.data) is None
    assert tokens.parse_account(Pubkey.default(), account.data) is None
    assert tokens.parse_account(TOKEN_PROGRAM_ID, bytes(165)) is None
    assert tokens.parse_mint(TOKEN_PROGRAM_ID, bytes(82)) is None


def test_an_account_whose_owner_looks_like_a_mint_is_none(market: Market) -> None:
    """Where a mint says that it is initialized, an account has a byte of its owner, which anybody may choose."""
    mint = market.devnet.create_mint(6, name="new", program=TOKEN_2022_PROGRAM_ID)
    owner = Pubkey(bytes([1] * 32))
    market.devnet.create_token_account(mint, owner)
    account = market.devnet.cluster.account(market.devnet.token_address(mint, owner))
    assert account is not None and account.data[45] == 1
    assert tokens.parse_mint(account.owner, account.data) is None
    held = tokens.parse_account(account.owner, account.data)
    assert held is not None and (held.owner, held.extensions) == (owner, ("immutable_owner",))


@given(st.sampled_from([TOKEN_PROGRAM_ID, TOKEN_2022_PROGRAM_ID, Pubkey.default()]), st.binary(max_size=400))
@settings(max_examples=200)
def test_no_bytes_break_the_token_parsers(program: Pubkey, data: bytes) -> None:
    for size in (0, 82, 165, 166, 400):
        padded = (data + bytes(400))[:size]
        tokens.parse_account(program, padded)
        tokens.parse_mint(program, padded)


def test_every_token_account_of_an_owner_is_found(market: Market) -> None:
    devnet, payer, owner = market.devnet, market.payer, market.receiver.pubkey()
    market.pay(1)
    other = devnet.keypair("auxiliary")
    params = CreateAccountParams(
        from_pubkey=payer.pubkey(), to_pubkey=other.pubkey(), lamports=2_039_280, space=165, owner=TOKEN_PROGRAM_ID
    )
    initialize = models.InitializeAccount3Params(
        program_id=TOKEN_PROGRAM_ID, account=other.pubkey(), mint=market.mint, owner=owner
    )
    devnet.send([create_account(params), spl.initialize_account3(initialize)], payer, other)
    devnet.finalize()
    for wanted in ({"mint": str(market.mint)}, {"programId": str(TOKEN_PROGRAM_ID)}):
        found = market.ask("getTokenAccountsByOwner", str(owner), wanted, {"encoding": "jsonParsed"})["value"]
        assert {entry["pubkey"] for entry in found} == {str(market.account), str(other.pubkey())}
    none = market.ask("getTokenAccountsByOwner", str(owner), {"programId": str(TOKEN_2022_PROGRAM_ID)})
    assert none["value"] == []
    unknown = market.ask("getTokenAccountsByOwner", str(owner), {"mint": str(Keypair().pubkey())})
    assert unknown["message"] == "Invalid param: could not find mint"


@given(st.binary(max_size=80))
def test_base58_is_the_one_of_addresses(data: bytes) -> None:
    assert from_base58(base58(data)) == data
    padded = (data + bytes(32))[:32]
    assert base58(padded) == str(Pubkey.from_bytes(padded))


# Listings ------------------------------------------------------------------------------------------------------------


def test_a_listing_pages_as_nodes_do(market: Market) -> None:
    paid = []
    for n in range(6):
        paid.append(str(market.pay(n + 1)))
        if n % 2:
            market.devnet.advance()  # two a slot
    elsewhere = str(market.devnet.airdrop(Keypair().pubkey(), SOL))
    paid.append(str(market.pay(7)))
    market.devnet.finalize()
    newest_first = paid[::-1]
    account = market.account
    assert market.listing(account) == newest_first
    assert market.listing(account, limit=2) == newest_first[:2]
    assert market.listing(account, before=newest_first[1], limit=3) == newest_first[2:5]
    assert market.listing(account, until=newest_first[4]) == newest_first[:4]
    assert market.listing(account, before=newest_first[1], until=newest_first[4]) == newest_first[2:4]
    # The neighbour in the same slot is told apart.
    assert market.listing(account, until=paid[0])[-1] == paid[1]
    # Neither need name the address.
    assert market.listing(account, until=elsewhere) == newest_first[:1]
    assert market.listing(account, before=elsewhere) == newest_first[1:]
    # An unknown `until` limits nothing; an unknown `before` lists nothing.
    assert market.listing(account, until=str(Signature.default())) == newest_first
    assert market.listing(account, before=str(Signature.default())) == []
    # A transfer into an existing token account does not name its owner: only the one that made it does.
    assert market.listing(market.receiver.pubkey()) == paid[::-1]
    for limit in (0, 1001):
        error = market.ask("getSignaturesForAddress", str(account), {"limit": limit})
        assert error == {"code": -32602, "message": "Invalid limit; max 1000"}


def test_since_agave_4_an_unknown_cursor_is_an_error() -> None:
    market = Market(strict_cursors=True)
    paid = str(market.pay(1))
    market.devnet.finalize()
    unknown = str(Signature.default())
    for name in ("before", "until"):
        error = market.ask("getSignaturesForAddress", str(market.account), {name: unknown})
        assert error == {"code": -32020, "message": f"Transaction {unknown} not found"}
        assert market.listing(market.account, **{name: paid}) == []


def test_until_that_is_not_yet_finalized_is_unknown_to_a_finalized_listing(market: Market) -> None:
    first = str(market.pay(1))
    market.devnet.finalize()
    second = str(market.pay(2))
    assert market.listing(market.account, until=second) == [first]
    assert market.listing(market.account, before=second) == []


def test_more_than_a_page_is_read_with_before(market: Market) -> None:
    address = market.receiver.pubkey()
    for _ in range(1005):
        market.devnet.airdrop(address, RENT)
    market.devnet.finalize()
    page = market.listing(address)
    rest = market.listing(address, before=page[-1])
    assert (len(page), len(rest)) == (1000, 5)
    assert len({*page, *rest}) == 1005


def test_statuses_leave_the_cache_but_not_the_history(market: Market) -> None:
    signature = str(market.pay(1))
    market.devnet.advance(32 + 300)
    assert market.ask("getSignatureStatuses", [signature])["value"][0] is not None
    market.devnet.advance()
    assert market.ask("getSignatureStatuses", [signature])["value"] == [None]
    found = market.ask("getSignatureStatuses", [signature], {"searchTransactionHistory": True})["value"][0]
    assert found["confirmationStatus"] == "finalized" and found["confirmations"] is None


# Forks ---------------------------------------------------------------------------------------------------------------


def test_a_dropped_transaction_is_gone_everywhere_and_may_land_again(market: Market) -> None:
    kept = market.pay(3)
    market.devnet.advance()
    lost = market.pay(4)
    market.devnet.advance()
    lamports = market.devnet.balance(market.payer.pubkey())
    [transaction] = market.devnet.drop(lost)
    confirmed = {"commitment": "confirmed"}
    assert market.devnet.token_balance(market.mint, market.receiver.pubkey()) == 3
    assert market.ask("getTokenAccountBalance", str(market.account), confirmed)["value"]["amount"] == "3"
    assert market.listing(market.account, **confirmed) == [str(kept)]
    assert market.ask("getSignatureStatuses", [str(lost)])["value"] == [None]
    assert market.ask("getTransaction", str(lost), confirmed | {"maxSupportedTransactionVersion": 0}) is None
    assert market.devnet.balance(market.payer.pubkey()) == lamports + 5000
    market.devnet.land(transaction)
    market.devnet.finalize()
    assert market.listing(market.account) == [str(lost), str(kept)]
    assert market.devnet.token_balance(market.mint, market.receiver.pubkey()) == 7


def test_a_fork_undoes_the_making_of_an_account(market: Market) -> None:
    market.devnet.drop(market.pay(3))
    assert market.devnet.cluster.account(market.account) is None
    assert market.ask("getAccountInfo", str(market.account), {"commitment": "processed"})["value"] is None
    market.pay(8)
    market.devnet.finalize()
    assert market.ask("getTokenAccountBalance", str(market.account))["value"]["amount"] == "8"


def test_a_fork_keeps_the_others_but_not_those_built_on_its_abandoned_blocks(market: Market) -> None:
    devnet = market.devnet
    lost = market.pay(1)
    sibling = market.pay(10)  # in the abandoned block too, but with an older blockhash
    abandoned = devnet.cluster.blockhash(devnet.slot)
    devnet.advance()
    child = market.pay(100)  # with the abandoned block's blockhash
    gone = [transaction.signatures[0] for transaction in devnet.drop(lost)]
    assert gone == [lost, child]
    assert devnet.token_balance(market.mint, market.receiver.pubkey()) == 10
    assert not devnet.cluster.knows_blockhash(abandoned, devnet.slot)
    assert market.ask("isBlockhashValid", str(abandoned), {"commitment": "processed"})["value"] is False
    devnet.finalize()
    assert market.listing(market.account) == [str(sibling)]


def test_what_is_final_cannot_be_dropped(market: Market) -> None:
    signature = market.pay(1)
    market.devnet.finalize()
    with pytest.raises(ValueError, match="finalized"):
        market.devnet.drop(signature)
    with pytest.raises(ValueError, match="not landed"):
        market.devnet.drop(Signature.default())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pay"), st.integers(1, 5)),
        st.tuples(st.just("advance"), st.integers(1, 12)),
        st.tuples(st.just("skip"), st.integers(1, 3)),
        st.tuples(st.just("drop"), st.integers(0, 50)),
        st.tuples(st.just("again"), st.integers(0, 50)),
    ),
    min_size=5,
    max_size=40,
)


@given(STEPS)
@settings(max_examples=60)
def test_whatever_happens_finalized_history_only_grows_and_explains_the_balance(steps: list[tuple[str, int]]) -> None:
    market = Market()
    devnet = market.devnet
    amounts: dict[str, int] = {}
    gone: list[VersionedTransaction] = []
    final: list[str] = []

    def explain(commitment: str) -> list[str]:
        """The listing, whose payments must be the balance at the same commitment."""
        listed = market.listing(market.account, commitment=commitment)[::-1]
        balance = market.ask("getTokenAccountBalance", str(market.account), {"commitment": commitment})
        told = int(balance["value"]["amount"]) if "value" in balance else 0
        assert told == sum(amounts[signature] for signature in listed)
        return listed

    for step, number in steps:
        if step == "pay":
            amounts[str(market.pay(number))] = number
        elif step == "advance":
            devnet.advance(number)
        elif step == "skip":
            devnet.skip(number)
        elif step == "drop":
            open_ones = [r for r in devnet.cluster.records if r.slot > devnet.cluster.slot_at("finalized")]
            if open_ones:
                gone += devnet.drop(open_ones[number % len(open_ones)].signature)
        elif gone:
            devnet.cluster.execute(gone.pop(number % len(gone)))
        now = explain("finalized")
        assert now[: len(final)] == final
        final = now
        explain("confirmed")
    devnet.finalize()
    assert devnet.token_balance(market.mint, market.receiver.pubkey()) == sum(amounts[s] for s in explain("finalized"))
    lamports = sum(devnet.balance(address) for address in devnet.cluster.touched())
    fees = sum(record.fee for record in devnet.cluster.records)
    assert lamports == 500_000_000 * SOL - fees


# Controls ------------------------------------------------------------------------------------------------------------


def test_a_served_devnet_is_controlled_by_its_own_methods(market: Market) -> None:
    mint = market.ask("devnet_createMint", 9, "other")
    assert mint == str(market.devnet.keypair("other").pubkey())
    owner = market.receiver.pubkey()
    signature = market.ask("devnet_mintTo", mint, str(owner), 12)
    assert market.devnet.token_balance(Pubkey.from_string(mint), owner) == 12
    assert market.ask("devnet_drop", signature) == [signature]
    assert market.devnet.token_balance(Pubkey.from_string(mint), owner) == 0
    slot = market.devnet.slot
    assert market.ask("devnet_advance", 5) == slot + 5
    for method, params in {
        "devnet_advance": [0], "devnet_drop": [str(Signature.default())], "devnet_mintTo": ["x", "y", 1],
        "devnet_createMint": [6],
    }.items():  # fmt: skip
        assert market.ask(method, *params)["code"] == -32602


def test_serving_ends_when_it_is_cancelled_and_leaves_the_port() -> None:
    async def run() -> None:
        with port_of_ones_own() as port:
            for _ in range(2):
                serving = asyncio.create_task(Devnet(slot_seconds=0.01).serve(port=port))
                async with AsyncClient(f"http://127.0.0.1:{port}", max_transport_retries=200) as client:
                    while not await client.is_connected():
                        await asyncio.sleep(0.01)
                    first = (await client.get_slot()).value
                    while (await client.get_slot()).value == first:
                        await asyncio.sleep(0.01)
                serving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await serving

    asyncio.run(asyncio.wait_for(run(), 120))


# Bad requests --------------------------------------------------------------------------------------------------------


def test_limits_on_many(market: Market) -> None:
    keys = [str(market.mint)] * 101
    assert market.ask("getMultipleAccounts", keys)["message"] == "Too many inputs provided; max 100"
    assert len(market.ask("getMultipleAccounts", keys[:100])["value"]) == 100
    signatures = [str(Signature.default())] * 257
    assert market.ask("getSignatureStatuses", signatures)["message"] == "Too many inputs provided; max 256"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700), (b"{", -32700), (b"[]", -32600), (b"1", -32600), (b"{}", -32600), (b'"getSlot"', -32600),
        (b'{"jsonrpc":"1.0","id":1,"method":"getSlot"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"getMoney"}', -32601),
        (b'{"jsonrpc":"2.0","id":1,"method":"getBalance"}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"getBalance","params":{"a":1}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"getBalance","params":["x"]}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"getSlot","params":[{"commitment":"sure"}]}', -32602),
    ],
)  # fmt: skip
def test_a_bad_request_is_an_error_object(market: Market, body: bytes, code: int) -> None:
    status, answer = market.devnet.rpc.reply(body)
    assert status == 200 and json.loads(answer)["error"]["code"] == code


def test_a_batch_is_answered_in_order(market: Market) -> None:
    batch = [{"jsonrpc": "2.0", "id": n, "method": method} for n, method in enumerate(("getSlot", "no", "getHealth"))]
    _, body = market.devnet.rpc.reply(json.dumps(batch).encode())
    first, second, third = json.loads(body)
    assert (first["id"], second["id"], third["result"]) == (0, 1, "ok")
    assert second["error"]["code"] == -32601


_devnet_for_anything = Market()
_NAMES = st.sampled_from(sorted(name for name in _devnet_for_anything.devnet.rpc._methods if "_" not in name))
_STRINGS = st.sampled_from(["", "base64", "jsonParsed", "finalized", str(Pubkey.default()), str(Signature.default())])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2**64) | st.floats(allow_nan=False) | _STRINGS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["encoding", "commitment", "limit", "mint", "dataSlice", "minContextSlot", "before", "offset"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@given(_NAMES, st.lists(_JSON, max_size=3))
@settings(max_examples=400)
def test_no_parameters_break_the_node(method: str, params: list[Any]) -> None:
    answer = _devnet_for_anything.ask(method, *params)
    if isinstance(answer, dict) and "code" in answer:
        assert answer["code"] in (-32602, -32600, -32603, -32016, -32004, -32015)


def test_health_and_other_methods_over_http() -> None:
    import httpx2

    async def run() -> None:
        async with Devnet().serving() as url, httpx2.AsyncClient() as client:
            assert (await client.get(url + "/health")).text == "ok"
            assert (await client.get(url)).status_code == 405

    asyncio.run(run())
