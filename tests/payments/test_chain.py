"""Chain over a devnet that fails in every known way: the caller learns the truth or gets a ChainError, never else."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from solana.rpc.async_api import AsyncClient
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction
from spl.token.constants import TOKEN_2022_PROGRAM_ID, TOKEN_PROGRAM_ID

from diffusionz.payments.chain import GENESIS_HASHES, Chain, Listed
from diffusionz.payments.devnet import Devnet, faults, mints
from diffusionz.payments.errors import ChainError, ConfigurationError, CursorError, TransactionError

SOL = 10**9


class Scene:
    """A devnet on which `payer` has sent `receiver` 250 base units of `mint`, finalized, and a Chain that watches."""

    def __init__(self, **settings: Any) -> None:
        self.devnet = Devnet(seed=11, **settings)
        self.payer = self.devnet.keypair("payer")
        self.receiver = self.devnet.keypair("receiver").pubkey()
        self.devnet.airdrop(self.payer.pubkey(), 10 * SOL)
        self.mint = self.devnet.create_mint(6)
        self.devnet.mint_to(self.mint, self.payer.pubkey(), 1_000_000)
        self.deposit = self.pay(250)
        self.account = self.devnet.token_address(self.mint, self.receiver)
        self.devnet.finalize()
        self.chain = self.connect()

    def connect(self, genesis_hash: str | None = None) -> Chain:
        return Chain(self.devnet.client(), genesis_hash=genesis_hash or str(self.devnet.genesis_hash))

    def pay(self, amount: int) -> Signature:
        return self.devnet.transfer(self.mint, self.payer, self.receiver, amount)

    def payment(self, amount: int) -> VersionedTransaction:
        pay = self.devnet.transfer_instruction(self.mint, self.payer.pubkey(), self.account, amount)
        return self.devnet.build([pay], self.payer)

    @property
    def held(self) -> int:
        return self.devnet.token_balance(self.mint, self.receiver)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def failure(call: Awaitable[Any]) -> ChainError:
    """The ChainError that the call raises; nothing else will do, not even a BaseException."""

    async def run() -> ChainError:
        try:
            found = await call
        except ChainError as error:
            return error
        raise AssertionError(f"no error but {found!r}")

    return asyncio.run(run())


def answer(call: Awaitable[Any]) -> Any:
    async def run() -> Any:
        return await call

    return asyncio.run(run())


# The truth -----------------------------------------------------------------------------------------------------------


def test_a_transaction_tells_its_deltas_by_pinned_account(scene: Scene) -> None:
    found = answer(scene.chain.transaction(scene.deposit))
    pins = {"mint": scene.mint, "owner": scene.receiver, "program": TOKEN_PROGRAM_ID}
    assert found.token_delta(scene.account, **pins) == 250
    source = scene.devnet.token_address(scene.mint, scene.payer.pubkey())
    assert found.token_delta(source, **pins | {"owner": scene.payer.pubkey()}) == -250
    wrong: dict[str, Pubkey] = {"mint": scene.account, "owner": scene.payer.pubkey(), "program": TOKEN_2022_PROGRAM_ID}
    for name, other in wrong.items():
        assert found.token_delta(scene.account, **pins | {name: other}) == 0
    assert found.token_delta(scene.receiver, **pins) == 0
    assert found.lamports_delta(scene.account) == 2_039_280
    assert found.lamports_delta(scene.payer.pubkey()) == -2_039_280 - 5000
    assert found.lamports_delta(Pubkey.default()) == 0
    assert (found.error, found.fee, found.signers) == (None, 5000, (scene.payer.pubkey(),))
    assert found.slot == scene.devnet.slot - 32 and found.block_time == 1_767_225_600


def test_accounts_of_lookup_tables_are_among_the_keys(scene: Scene) -> None:
    devnet = scene.devnet
    table = devnet.create_lookup_table([scene.account, scene.mint])
    devnet.advance()
    pay = devnet.transfer_instruction(scene.mint, scene.payer.pubkey(), scene.account, 7)
    record = devnet.land(devnet.build([pay], scene.payer, lookup_tables=[table]))
    devnet.finalize()
    found = answer(scene.chain.transaction(record.signature))
    assert found.keys == tuple(record.keys) and found.keys[-2:] == (scene.account, scene.mint)
    pins = {"mint": scene.mint, "owner": scene.receiver, "program": TOKEN_PROGRAM_ID}
    assert found.token_delta(scene.account, **pins) == 7


def test_a_failed_transaction_says_so_in_every_answer(scene: Scene) -> None:
    record = scene.devnet.land(scene.payment(10**12))
    scene.devnet.finalize()
    error = '{"InstructionError": [1, {"Custom": 1}]}'
    newest = answer(scene.chain.signatures(scene.account))[0]
    assert newest == Listed(record.signature, record.slot, error, record.block_time)
    found = answer(scene.chain.transaction(record.signature))
    assert found.error == error
    pins = {"mint": scene.mint, "owner": scene.receiver, "program": TOKEN_PROGRAM_ID}
    assert found.token_delta(scene.account, **pins) == 0
    assert answer(scene.chain.statuses([record.signature])).values[0].error == error


def test_statuses_follow_a_transaction(scene: Scene) -> None:
    signature = scene.pay(1)
    seen = []
    for slots in (1, 30, 1):
        seen.append(answer(scene.chain.statuses([signature, Signature.default()])))
        scene.devnet.advance(slots)
    seen.append(answer(scene.chain.statuses([signature])))
    assert [statuses.values[0].commitment for statuses in seen] == ["processed", "confirmed", "confirmed", "finalized"]
    assert seen[0].values[1] is None and seen[3].slot == scene.devnet.slot
    scene.devnet.advance(1000)  # out of the node's cache
    assert answer(scene.chain.statuses([signature])).values[0].commitment == "finalized"


def test_many_accounts_and_statuses_are_asked_for_in_parts(scene: Scene) -> None:
    addresses = [scene.account, *(Pubkey(bytes([n % 256, n // 256] + [9] * 30)) for n in range(248)), scene.mint]
    scene.devnet.rpc.calls.clear()
    found = answer(scene.chain.accounts(addresses))
    assert len(found.values) == 250 and found.slot == scene.devnet.slot - 32
    assert [at for at, account in enumerate(found.values) if account is not None] == [0, 249]
    assert scene.devnet.rpc.calls.count("getMultipleAccounts") == 3
    signatures = [Signature.default()] * 300 + [scene.deposit]
    statuses = answer(scene.chain.statuses(signatures))
    assert [at for at, status in enumerate(statuses.values) if status is not None] == [300]
    assert scene.devnet.rpc.calls.count("getSignatureStatuses") == 2
    assert answer(scene.chain.accounts([])).values == [] and answer(scene.chain.statuses([])).values == []


def test_a_mint_tells_its_program_and_extensions(scene: Scene) -> None:
    devnet, freezer = scene.devnet, scene.receiver
    extensions = [mints.transfer_fee(100, 5), mints.permanent_delegate(freezer)]
    newer = devnet.create_mint(
        9, name="newer", program=TOKEN_2022_PROGRAM_ID, freeze_authority=freezer, extensions=extensions
    )
    devnet.finalize()
    classic, found = answer(scene.chain.mint(scene.mint)), answer(scene.chain.mint(newer))
    assert (classic.program, classic.decimals, classic.supply, classic.extensions) == (TOKEN_PROGRAM_ID, 6, 10**6, ())
    assert classic.freeze_authority is None
    assert (found.program, found.decimals) == (TOKEN_2022_PROGRAM_ID, 9)
    assert found.extensions == ("transfer_fee_config", "permanent_delegate") and found.freeze_authority == freezer
    assert not failure(scene.chain.mint(scene.account)).retryable  # a token account
    assert failure(scene.chain.mint(Pubkey.default())).retryable is False  # the system program
    assert failure(scene.chain.mint(Pubkey(bytes([8] * 32)))).retryable  # a node that lags may not have it yet


def test_slots_heights_and_small_questions(scene: Scene) -> None:
    tip = answer(scene.chain.tip())
    assert (tip.slot, tip.block_height) == (scene.devnet.slot - 32, scene.devnet.slot - 32 - 40)
    assert answer(scene.chain.block_height("processed")) == scene.devnet.slot - 40
    latest = answer(scene.chain.latest_blockhash())
    assert latest.slot == scene.devnet.slot - 1 and latest.last_valid_block_height == latest.slot - 40 + 150
    [(address, held)] = answer(scene.chain.token_accounts(scene.receiver, scene.mint)).items()
    assert (address, held.amount, held.owner) == (scene.account, 250, scene.receiver)


def test_a_page_of_signatures_has_the_bounds_asked_for(scene: Scene) -> None:
    paid = [scene.deposit, *(scene.pay(n) for n in range(1, 5))]
    scene.devnet.finalize()

    def page(**bounds: Any) -> list[int]:
        return [paid.index(listed.signature) for listed in answer(scene.chain.signatures(scene.account, **bounds))]

    assert page() == [4, 3, 2, 1, 0]
    assert page(limit=2) == [4, 3]
    assert page(before=paid[3], until=paid[0]) == [2, 1]
    assert page(until=Signature.default()) == [4, 3, 2, 1, 0]


def test_a_cursor_that_the_node_does_not_know_is_told_apart() -> None:
    """As since Agave 4. The listing without it goes on, so that whoever keeps a cursor can begin again."""
    scene = Scene(strict_cursors=True)
    for name in ("before", "until"):
        error = failure(scene.chain.signatures(scene.account, **{name: Signature.default()}))
        assert isinstance(error, CursorError) and error.retryable
    assert len(answer(scene.chain.signatures(scene.account))) == 1


# A18: every way to fail ----------------------------------------------------------------------------------------------

FAULTS = [
    faults.too_many_requests, faults.too_many_requests_in_body, faults.unavailable, faults.unhealthy,
    faults.unreadable_error, faults.timeout, faults.null, faults.garbage, faults.html, faults.cut_off,
]  # fmt: skip

CALLS: dict[str, Callable[[Scene], Awaitable[Any]]] = {
    "signatures": lambda s: s.chain.signatures(s.account),
    "transaction": lambda s: s.chain.transaction(s.deposit),
    "statuses": lambda s: s.chain.statuses([s.deposit]),
    "accounts": lambda s: s.chain.accounts([s.account]),
    "mint": lambda s: s.chain.mint(s.mint),
    "token_accounts": lambda s: s.chain.token_accounts(s.receiver, s.mint),
    "genesis_hash": lambda s: s.chain.genesis_hash(),
    "tip": lambda s: s.chain.tip(),
    "block_height": lambda s: s.chain.block_height(),
    "latest_blockhash": lambda s: s.chain.latest_blockhash(),
    "send": lambda s: s.chain.send(s.payment(1)),
    "airdrop": lambda s: s.chain.airdrop(s.receiver, SOL),
}


def test_the_table_of_calls_is_whole() -> None:
    public = {name for name in vars(Chain) if not name.startswith("_")}
    assert set(CALLS) == public - {"connect", "close"}


@pytest.mark.parametrize("name", CALLS)
def test_A18_every_failure_is_a_retryable_chain_error_and_the_next_call_is_served(scene: Scene, name: str) -> None:
    for fault in FAULTS:
        scene.devnet.finalize()
        with scene.devnet.fault(fault) as installed:
            error = failure(CALLS[name](scene))
        assert installed.hits == 1, fault
        assert error.retryable, (fault, error)
        assert error.__cause__ is None and error.__context__ is None
        scene.devnet.advance()
        answer(CALLS[name](scene))


def test_A18_the_panic_is_no_exception_and_the_int_no_error_for_the_bare_client(scene: Scene) -> None:
    """What the wrapper is for: should solana mend either, this says so."""

    async def bare() -> None:
        async with scene.devnet.client() as client:
            with scene.devnet.fault(faults.unreadable_error):
                try:
                    await client.get_balance(scene.receiver)
                except Exception:
                    raise AssertionError("an ordinary exception now") from None
                except BaseException as panic:
                    assert type(panic).__name__ == "PanicException"
            with scene.devnet.fault(faults.too_many_requests_in_body):
                assert await client.get_balance(scene.receiver) == 429

    asyncio.run(bare())


def test_A18_a_loop_around_it_survives_all_of_them_in_a_row(scene: Scene) -> None:
    async def poll() -> list[str]:
        seen: list[str] = []
        for fault in [*FAULTS, None]:
            installed = scene.devnet.install(fault) if fault else None
            try:
                seen += [str(listed.signature) for listed in await scene.chain.signatures(scene.account)]
            except ChainError:
                pass
            finally:
                if installed:
                    scene.devnet.remove(installed)
        return seen

    async def supervised() -> list[str]:
        return await asyncio.create_task(poll())

    assert asyncio.run(supervised()) == [str(scene.deposit)]


@pytest.mark.parametrize(
    ("code", "retryable"),
    [(-32004, True), (-32007, True), (-32010, True), (-32011, True), (-32014, True), (-32603, True), (-32099, True),
     (503, True), (-32602, False), (-32601, False), (-32600, False), (-32015, False)],
)  # fmt: skip
def test_A18_error_codes_are_judged_by_whether_they_pass(scene: Scene, code: int, retryable: bool) -> None:
    def refuse(call: faults.Call, proceed: faults.Proceed) -> Any:
        raise faults.RpcError(code, "no")

    with scene.devnet.fault(refuse, "getMultipleAccounts"):
        assert failure(scene.chain.accounts([scene.mint])).retryable is retryable


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("getTransaction", lambda r: r["meta"]["preBalances"].pop()),
        ("getTransaction", lambda r: r["meta"]["postBalances"].append(5)),
        ("getTransaction", lambda r: r["meta"]["postTokenBalances"][0].update(accountIndex=200)),
        ("getTransaction", lambda r: r["meta"]["postTokenBalances"][0]["uiTokenAmount"].update(amount="-5")),
        ("getTransaction", lambda r: r["meta"]["postTokenBalances"][0]["uiTokenAmount"].update(amount="1e3")),
        ("getTransaction", lambda r: r["meta"]["postTokenBalances"][0]["uiTokenAmount"].update(amount="٣")),
        ("getTransaction", lambda r: r["meta"]["postTokenBalances"][0]["uiTokenAmount"].update(amount=str(2**64))),
        ("getTransaction", lambda r: r["meta"].update(postTokenBalances=None)),
        ("getTransaction", lambda r: r.update(meta=None)),
        ("getMultipleAccounts", lambda r: r["value"].pop()),
        ("getMultipleAccounts", lambda r: r["value"].append(None)),
        ("getSignatureStatuses", lambda r: r["value"].clear()),
        ("getSignatureStatuses", lambda r: r["value"][0].update(confirmationStatus=None)),
        ("getTokenAccountsByOwner", lambda r: r["value"][0]["account"].update(owner=str(Pubkey.default()))),
    ],
)
def test_A18_a_reply_that_contradicts_itself_is_an_error(
    scene: Scene, method: str, change: Callable[[Any], None]
) -> None:
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "getTransaction": lambda: scene.chain.transaction(scene.deposit),
        "getMultipleAccounts": lambda: scene.chain.accounts([scene.account, scene.mint]),
        "getSignatureStatuses": lambda: scene.chain.statuses([scene.deposit]),
        "getTokenAccountsByOwner": lambda: scene.chain.token_accounts(scene.receiver, scene.mint),
    }
    with scene.devnet.fault(faults.altered(change), method):
        assert failure(calls[method]()).retryable
    answer(calls[method]())


def test_A18_no_reply_is_not_waited_for_beyond_the_limit(scene: Scene) -> None:
    class Silent(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            await asyncio.Event().wait()
            raise AssertionError

    client = AsyncClient("http://silent.invalid")
    client._provider.session = httpx2.AsyncClient(transport=Silent())
    error = failure(Chain(client, timeout_seconds=0.05).tip())
    assert error.retryable and "no reply in time" in str(error)


def test_cancelling_is_not_an_error_of_the_chain(scene: Scene) -> None:
    class Slow(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            await asyncio.sleep(60)
            raise AssertionError

    async def run() -> None:
        client = AsyncClient("http://slow.invalid")
        client._provider.session = httpx2.AsyncClient(transport=Slow())
        task = asyncio.create_task(Chain(client).tip())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


# A19: lies -----------------------------------------------------------------------------------------------------------


def test_A19_an_answer_about_another_transaction_is_not_taken(scene: Scene) -> None:
    other = scene.pay(10**5)
    scene.devnet.finalize()
    with scene.devnet.fault(faults.swapped(other), "getTransaction"):
        error = failure(scene.chain.transaction(scene.deposit))
    assert error.retryable and "another transaction" in str(error)


def test_A19_a_transaction_under_a_foreign_signature_is_not_taken(scene: Scene) -> None:
    """The signature asked for, glued onto another transaction's message."""
    import base64

    other = scene.devnet.cluster.record(scene.pay(10**5))
    assert other is not None
    scene.devnet.finalize()
    glued = VersionedTransaction.populate(other.transaction.message, [scene.deposit])

    def change(result: Any) -> None:
        result["transaction"] = [base64.b64encode(bytes(glued)).decode(), "base64"]

    with scene.devnet.fault(faults.altered(change), "getTransaction"):
        assert "another transaction" in str(failure(scene.chain.transaction(scene.deposit)))


def test_A19_a_node_of_another_cluster_is_never_asked_for_more(scene: Scene) -> None:
    chain = scene.connect(GENESIS_HASHES["mainnet"])
    for _ in range(2):
        scene.devnet.rpc.calls.clear()
        error = failure(chain.signatures(scene.account))
        assert not error.retryable and GENESIS_HASHES["mainnet"] in str(error)
        assert scene.devnet.rpc.calls == ["getGenesisHash"]
    with scene.devnet.fault(faults.other_genesis, "getGenesisHash"):
        assert not failure(scene.connect().send(scene.payment(1))).retryable
    assert "sendTransaction" not in scene.devnet.rpc.calls


def test_A19_the_genesis_hash_is_asked_for_once_and_again_after_a_failure(scene: Scene) -> None:
    chain = scene.connect()
    scene.devnet.rpc.calls.clear()
    with scene.devnet.fault(faults.too_many_requests, "getGenesisHash"):
        assert failure(chain.tip()).retryable
    answer(chain.tip())
    answer(chain.tip())
    assert scene.devnet.rpc.calls == ["getGenesisHash", "getGenesisHash", "getEpochInfo", "getEpochInfo"]


def test_A19_a_lagging_node_is_told_from_a_current_one(scene: Scene) -> None:
    reached = scene.devnet.slot - 32
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: scene.chain.signatures(scene.account, min_context_slot=reached),
        lambda: scene.chain.accounts([scene.account], min_context_slot=reached),
        lambda: scene.chain.statuses([scene.deposit], min_context_slot=reached),
    ]
    for call in calls:
        answer(call())
    with scene.devnet.fault(faults.lagging(40)):
        for call in calls:
            assert failure(call()).retryable
        # Without a slot to hold it to, its old answers are believable: no deposit, no account, no status.
        assert answer(scene.chain.signatures(scene.account)) == []
        assert answer(scene.chain.accounts([scene.account])).values == [None]
        assert answer(scene.chain.statuses([scene.deposit])).values == [None]


def test_A19_a_listing_that_repeats_or_misses_is_passed_on_as_it_is(scene: Scene) -> None:
    """Chain cannot know better: its callers key by signature and reconcile balances."""
    second = scene.pay(1)
    scene.devnet.finalize()

    def listed() -> list[Signature]:
        return [entry.signature for entry in answer(scene.chain.signatures(scene.account))]

    with scene.devnet.fault(faults.repeating, "getSignaturesForAddress"):
        assert listed() == [second, second, scene.deposit, scene.deposit]
    with scene.devnet.fault(faults.missing(second), "getSignaturesForAddress"):
        assert listed() == [scene.deposit]


def test_A19_what_a_listing_itself_calls_unfinished_is_not_finalized(scene: Scene) -> None:
    def unfinished(result: Any) -> None:
        result[0]["confirmationStatus"] = "confirmed"

    with scene.devnet.fault(faults.altered(unfinished), "getSignaturesForAddress"):
        assert answer(scene.chain.signatures(scene.account)) == []
        assert len(answer(scene.chain.signatures(scene.account, commitment="confirmed"))) == 1

    def untold(result: Any) -> None:
        result[0]["confirmationStatus"] = None

    with scene.devnet.fault(faults.altered(untold), "getSignaturesForAddress"):
        assert len(answer(scene.chain.signatures(scene.account))) == 1


# Sending -------------------------------------------------------------------------------------------------------------


def test_a_sent_transaction_lands_once_however_often_it_is_sent(scene: Scene) -> None:
    payment = scene.payment(40)
    with scene.devnet.fault(faults.lost_reply, "sendTransaction", times=1):
        assert failure(scene.chain.send(payment)).retryable
    assert answer(scene.chain.send(payment)) == payment.signatures[0]
    assert answer(scene.chain.send(payment, skip_preflight=True)) == payment.signatures[0]
    assert scene.held == 290


def test_a_transaction_that_would_fail_is_refused_for_good(scene: Scene) -> None:
    error = failure(scene.chain.send(scene.payment(10**12)))
    assert isinstance(error, TransactionError) and not error.retryable
    assert error.reason == '{"InstructionError": [1, {"Custom": 1}]}'
    assert scene.held == 250


def test_an_expired_or_unknown_blockhash_is_what_a_lagging_node_says_too(scene: Scene) -> None:
    payment = scene.payment(1)
    with scene.devnet.fault(faults.lagging(3), "sendTransaction"):
        error = failure(scene.chain.send(payment))
    assert isinstance(error, TransactionError) and error.retryable and error.reason == "BlockhashNotFound"
    answer(scene.chain.send(payment))
    assert scene.held == 251


def test_a_missing_signature_is_refused_for_good(scene: Scene) -> None:
    forged = VersionedTransaction.populate(scene.payment(1).message, [Signature.default()])
    error = failure(scene.chain.send(forged))
    assert isinstance(error, TransactionError) and not error.retryable and error.reason == "SignatureFailure"


def test_a_node_that_answers_with_another_signature_is_not_believed(scene: Scene) -> None:
    def other(call: faults.Call, proceed: faults.Proceed) -> Any:
        return str(scene.deposit)

    with scene.devnet.fault(other, "sendTransaction"):
        assert failure(scene.chain.send(scene.payment(1))).retryable


# Secrets -------------------------------------------------------------------------------------------------------------

SECRET = "k3y-0f-the-n0de"


@asynccontextmanager
async def answering(status: int, body: bytes) -> AsyncIterator[int]:
    """A port where every request gets this reply."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in asked.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))  # closing on what is unread resets the connection
        head = f"HTTP/1.1 {status} Some\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("form", ["http://127.0.0.1:{port}/{key}/", "http://127.0.0.1:{port}/?api-key={key}",
                                  "http://{key}:{key}@127.0.0.1:{port}/"])  # fmt: skip
@pytest.mark.parametrize("reply", [None, (200, b"{}"), (429, b""), (404, SECRET.encode()), (302, b"")])
def test_the_key_in_a_url_is_in_no_message_trace_or_log(form: str, reply: tuple[int, bytes] | None) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)

    async def run(port: int) -> str:
        async with Chain.connect(form.format(port=port, key=SECRET)) as chain:
            try:
                await chain.tip()
            except ChainError:
                return traceback.format_exc() + repr(chain)
        raise AssertionError

    async def served(status: int, body: bytes) -> str:
        async with answering(status, body) as port:
            return await run(port)

    try:
        told = asyncio.run(run(closed_port()) if reply is None else served(*reply))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert "getEpochInfo at 127.0.0.1" in told
    if reply is not None:
        assert "HTTP Request: POST http://127.0.0.1/..." in log.getvalue()  # the log was on
    assert SECRET not in told and SECRET not in log.getvalue()


@pytest.mark.parametrize("url", ["", SECRET, f"ftp://host/{SECRET}", f"http:///{SECRET}", f"http://[::1/{SECRET}"])
def test_a_bad_url_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Chain.connect(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


# Over HTTP -----------------------------------------------------------------------------------------------------------


def test_over_http_the_failures_are_the_same(scene: Scene) -> None:
    """The transport of the other tests leaves out the socket; nothing else."""

    async def run() -> None:
        async with scene.devnet.serving() as url:
            async with Chain.connect(url, genesis_hash=str(scene.devnet.genesis_hash)) as chain:
                assert [entry.signature for entry in await chain.signatures(scene.account)] == [scene.deposit]
                assert (await chain.transaction(scene.deposit)).fee == 5000
                for fault in (*FAULTS, faults.lost_reply):
                    with scene.devnet.fault(fault, "getEpochInfo"):
                        with pytest.raises(ChainError) as caught:
                            await chain.tip()
                        assert caught.value.retryable
                payment = scene.payment(5)
                with scene.devnet.fault(faults.lost_reply, "sendTransaction"):
                    with pytest.raises(ChainError):
                        await chain.send(payment)
                assert await chain.send(payment) == payment.signatures[0]

    asyncio.run(run())
    assert scene.held == 255


def test_the_errors_of_transactions_are_written_as_nodes_write_them() -> None:
    from solders.transaction_status import (
        InstructionErrorCustom,
        InstructionErrorFieldless,
        TransactionErrorDuplicateInstruction,
        TransactionErrorFieldless,
        TransactionErrorInstructionError,
        TransactionErrorInsufficientFundsForRent,
    )

    from diffusionz.payments.chain import transaction_error

    table = [
        (None, "null"),
        (TransactionErrorFieldless.BlockhashNotFound, '"BlockhashNotFound"'),
        (TransactionErrorInstructionError(2, InstructionErrorCustom(17)), '{"InstructionError": [2, {"Custom": 17}]}'),
        (
            TransactionErrorInstructionError(0, InstructionErrorFieldless.InvalidAccountData),
            '{"InstructionError": [0, "InvalidAccountData"]}',
        ),
        (TransactionErrorInsufficientFundsForRent(1), '{"InsufficientFundsForRent": {"account_index": 1}}'),
        (TransactionErrorDuplicateInstruction(3), '{"DuplicateInstruction": 3}'),
    ]
    for error, text in table:
        assert json.dumps(transaction_error(error)) == text
