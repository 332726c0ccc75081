"""A Solana cluster on a laptop, without a network: real programs, and a clock, forks and faults under control."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import httpx2
import uvicorn
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Commitment
from solders.address_lookup_table_account import ID as ADDRESS_LOOKUP_TABLE_ID
from solders.address_lookup_table_account import AddressLookupTableAccount, derive_lookup_table_address
from solders.compute_budget import set_compute_unit_limit
from solders.hash import Hash
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import ID as SYSTEM_PROGRAM_ID
from solders.system_program import CreateAccountParams, TransferParams, create_account, transfer
from solders.transaction import VersionedTransaction
from spl.token import instructions as spl
from spl.token import models
from spl.token.constants import TOKEN_PROGRAM_ID

from diffusionz.payments import tokens
from diffusionz.payments.chain import transaction_error
from diffusionz.payments.devnet import http, mints
from diffusionz.payments.devnet.cluster import Cluster, Record, Refused
from diffusionz.payments.devnet.faults import Fault, Installed
from diffusionz.payments.devnet.rpc import Rpc

# 2026-01-01T00:00:00Z
GENESIS_TIME = 1_767_225_600


class Devnet:
    """A cluster, its faucet and its RPC node. One thread only: LiteSVM must be used where it was made.

    Nothing happens by itself. Transactions land in the newest slot; `advance(n)` makes n more, after which what landed
    is confirmed (1 slot later) and finalized (32 slots later). The same seed and calls give the same chain, byte for
    byte: keys, blockhashes, signatures and times.

        devnet = Devnet(seed=7)
        payer = devnet.keypair("payer")
        devnet.airdrop(payer.pubkey(), 10**9)
        mint = devnet.create_mint(decimals=6)
        devnet.mint_to(mint, payer.pubkey(), 5_000_000)
        signature = devnet.transfer(mint, payer, receiver, 1_000_000)
        devnet.finalize()
        async with devnet.client() as client:        # the solana package's AsyncClient, in process
            await client.get_transaction(signature, max_supported_transaction_version=0)

    Every method that sends raises ValueError if the transaction fails, unless it says otherwise.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        confirmed_lag: int = 1,
        finalized_lag: int = 32,
        slot_seconds: float = 0.4,
        first_slot: int = 1000,
        genesis_time: int = GENESIS_TIME,
        strict_cursors: bool = False,
    ) -> None:
        """Lags are in slots, `genesis_time` in Unix seconds. `strict_cursors`: a listing's unknown `before` or `until`
        is an error, as since Agave 4, and not passed over in silence, as before."""
        self.cluster = Cluster(
            seed,
            confirmed_lag=confirmed_lag,
            finalized_lag=finalized_lag,
            slot_seconds=slot_seconds,
            first_slot=first_slot,
            genesis_time=genesis_time,
        )
        self.rpc = Rpc(self.cluster, self.airdrop, self._controls(), strict_cursors=strict_cursors)
        self._finalized_lag = finalized_lag
        self._slot_seconds = slot_seconds
        self._sent = 0

    def _controls(self) -> dict[str, Callable[..., Any]]:
        """What a program elsewhere may ask of a devnet that is served, as JSON-RPC methods of those names."""

        def key(text: str) -> Pubkey:
            return Pubkey.from_string(text)

        return {
            "devnet_createMint": lambda decimals, name: str(self.create_mint(decimals, name=name)),
            "devnet_mintTo": lambda mint, owner, amount: str(self.mint_to(key(mint), key(owner), amount)),
            "devnet_advance": lambda slots: self.advance(slots),
            "devnet_drop": lambda signature: [
                str(lost.signatures[0]) for lost in self.drop(Signature.from_string(signature))
            ],
        }

    # Time and forks --------------------------------------------------------------------------------------------------

    @property
    def slot(self) -> int:
        """The newest slot."""
        return self.cluster.slot

    @property
    def time(self) -> int:
        """The newest block's time in Unix seconds."""
        return self.cluster.block_time(self.cluster.slot)

    @property
    def genesis_hash(self) -> Hash:
        """The cluster's name to its clients; another for every seed."""
        return self.cluster.genesis_hash

    def advance(self, slots: int = 1) -> int:
        """Makes so many blocks; returns the newest slot."""
        return self.cluster.advance(slots)

    def finalize(self) -> int:
        """Advances until everything that has landed is finalized; returns the newest slot."""
        return self.cluster.advance(self._finalized_lag)

    def skip(self, slots: int) -> int:
        """Lets so many slots pass without a block, then makes one; returns its slot."""
        return self.cluster.skip(slots)

    def drop(self, signature: Signature) -> list[VersionedTransaction]:
        """A fork that loses `signature`; see Cluster.drop."""
        return self.cluster.drop(signature)

    # Wallets and tokens ----------------------------------------------------------------------------------------------

    def keypair(self, name: str) -> Keypair:
        """The key of that name, the same for the same seed."""
        return self.cluster.keypair(name)

    def airdrop(self, address: Pubkey, lamports: int) -> Signature:
        """Sends lamports from the faucet."""
        return self.transfer_sol(self.cluster.faucet, address, lamports)

    def transfer_sol(self, sender: Keypair, address: Pubkey, lamports: int) -> Signature:
        """Sends lamports. A new address needs 890,880 of them, the rent of an account without data."""
        return self.send(
            [transfer(TransferParams(from_pubkey=sender.pubkey(), to_pubkey=address, lamports=lamports))], sender
        )

    def create_mint(
        self,
        decimals: int = 6,
        *,
        name: str = "mint",
        program: Pubkey = TOKEN_PROGRAM_ID,
        authority: Pubkey | None = None,
        freeze_authority: Pubkey | None = None,
        extensions: Sequence[mints.Extension] = (),
    ) -> Pubkey:
        """A new mint at the address of `keypair(name)`. The authority is the faucet, which `mint_to` needs.

        Extensions are Token-2022's; see mints.py.
        """
        mint = self.keypair(name)
        if extensions and program == TOKEN_PROGRAM_ID:
            raise ValueError("extensions need program=TOKEN_2022_PROGRAM_ID; SPL-Token has none")
        payer = self.cluster.faucet.pubkey()
        authority = payer if authority is None else authority
        size = mints.size(extensions)
        rent = self.cluster.rent_exempt_minimum(size)
        create = CreateAccountParams(
            from_pubkey=payer, to_pubkey=mint.pubkey(), lamports=rent, space=size, owner=program
        )
        initialize = models.InitializeMint2Params(
            decimals=decimals,
            program_id=program,
            mint=mint.pubkey(),
            mint_authority=authority,
            freeze_authority=freeze_authority,
        )
        prepare = [extension.instruction(mint.pubkey()) for extension in extensions]
        self.send([create_account(create), *prepare, spl.initialize_mint2(initialize)], self.cluster.faucet, mint)
        return mint.pubkey()

    def token_address(self, mint: Pubkey, owner: Pubkey) -> Pubkey:
        """The owner's associated token account, whether or not it exists."""
        return spl.get_associated_token_address(owner, mint, self.program_of(mint))

    def program_of(self, mint: Pubkey) -> Pubkey:
        """The token program that owns the mint."""
        account = self.cluster.account(mint)
        if account is None or tokens.parse_mint(account.owner, account.data) is None:
            raise ValueError(f"{mint} is not a mint")
        return account.owner

    def create_token_account(self, mint: Pubkey, owner: Pubkey, payer: Keypair | None = None) -> Signature:
        """Makes the owner's associated token account, if it is not there yet. The faucet pays if no `payer` does."""
        payer = payer or self.cluster.faucet
        return self.send([self.create_instruction(mint, owner, payer.pubkey())], payer)

    def mint_to(self, mint: Pubkey, owner: Pubkey, amount: int) -> Signature:
        """Mints base units into the owner's associated token account, made if need be."""
        authority = self.cluster.faucet.pubkey()
        params = models.MintToParams(
            program_id=self.program_of(mint),
            mint=mint,
            dest=self.token_address(mint, owner),
            mint_authority=authority,
            amount=amount,
            signers=[],
        )
        return self.send([self.create_instruction(mint, owner, authority), spl.mint_to(params)], self.cluster.faucet)

    def transfer(self, mint: Pubkey, sender: Keypair, owner: Pubkey, amount: int) -> Signature:
        """Sends base units to the owner's associated token account, which the sender pays for if it is new."""
        return self.send(
            [
                self.create_instruction(mint, owner, sender.pubkey()),
                self.transfer_instruction(mint, sender.pubkey(), self.token_address(mint, owner), amount),
            ],
            sender,
        )

    def create_instruction(self, mint: Pubkey, owner: Pubkey, payer: Pubkey) -> Instruction:
        """Makes the owner's associated token account, if it is not there yet."""
        return spl.create_idempotent_associated_token_account(payer, owner, mint, self.program_of(mint))

    def transfer_instruction(self, mint: Pubkey, sender: Pubkey, to: Pubkey, amount: int) -> Instruction:
        """transferChecked from the sender's associated token account to the token account `to`."""
        params = models.TransferCheckedParams(
            program_id=self.program_of(mint),
            source=self.token_address(mint, sender),
            mint=mint,
            dest=to,
            owner=sender,
            amount=amount,
            decimals=self.cluster.decimals(mint) or 0,
            signers=[],
        )
        return spl.transfer_checked(params)

    def balance(self, address: Pubkey) -> int:
        """Lamports now."""
        account = self.cluster.account(address)
        return account.lamports if account else 0

    def token_balance(self, mint: Pubkey, owner: Pubkey) -> int:
        """Base units in the owner's associated token account now; 0 if there is none."""
        account = self.cluster.account(self.token_address(mint, owner))
        held = account and tokens.parse_account(account.owner, account.data)
        return held.amount if held else 0

    # Transactions ----------------------------------------------------------------------------------------------------

    def build(
        self,
        instructions: Sequence[Instruction],
        *signers: Keypair,
        lookup_tables: Sequence[AddressLookupTableAccount] = (),
    ) -> VersionedTransaction:
        """A signed version 0 transaction with the newest confirmed blockhash; the first signer pays.

        No two are the same, and accounts that `lookup_tables` hold are named through them.
        """
        self._sent += 1
        # A unit limit that no other has makes equal payments in one slot different transactions.
        unique = set_compute_unit_limit(400_000 + self._sent % 1_000_000)
        blockhash = self.cluster.blockhash(self.cluster.slot_at("confirmed"))
        message = MessageV0.try_compile(signers[0].pubkey(), [unique, *instructions], list(lookup_tables), blockhash)
        return VersionedTransaction(message, list(signers))

    def send(self, instructions: Sequence[Instruction], *signers: Keypair) -> Signature:
        """Builds the transaction and lands it in the newest slot. Raises ValueError if it fails."""
        record = self.land(self.build(instructions, *signers))
        if record.error is not None:
            raise ValueError(f"the transaction failed: {transaction_error(record.error)}; its log: {record.logs}")
        return record.signature

    def create_lookup_table(self, addresses: Sequence[Pubkey]) -> AddressLookupTableAccount:
        """A lookup table of these addresses; at most 30. It may be used from the next slot on."""
        owner = self.cluster.faucet
        recent = self.cluster.slot - 1
        table, bump = derive_lookup_table_address(owner.pubkey(), recent)
        metas = [
            AccountMeta(table, False, True),
            AccountMeta(owner.pubkey(), True, False),
            AccountMeta(owner.pubkey(), True, True),
            AccountMeta(SYSTEM_PROGRAM_ID, False, False),
        ]
        # The program's instructions 0, create, and 2, extend, in bincode.
        create = (0).to_bytes(4, "little") + recent.to_bytes(8, "little") + bytes([bump])
        listed = b"".join(bytes(address) for address in addresses)
        extend = (2).to_bytes(4, "little") + len(addresses).to_bytes(8, "little") + listed
        program = ADDRESS_LOOKUP_TABLE_ID
        self.send([Instruction(program, create, metas), Instruction(program, extend, metas)], owner)
        return AddressLookupTableAccount(table, list(addresses))

    def land(self, transaction: VersionedTransaction) -> Record:
        """Lands the transaction in the newest slot, where it may fail (see the record's `error`).

        Raises ValueError if no leader would take it: signature, blockhash, duplicate, fee.
        """
        outcome = self.cluster.execute(transaction)
        if isinstance(outcome, Refused):
            raise ValueError(f"the transaction cannot land: {transaction_error(outcome.error)}")
        return outcome

    # Clients and faults ----------------------------------------------------------------------------------------------

    def client(self, commitment: str = "finalized") -> AsyncClient:
        """The solana package's client, with this node behind it instead of a socket."""
        client = AsyncClient("http://devnet.invalid", Commitment(commitment), max_transport_retries=0)
        client._provider.session = httpx2.AsyncClient(transport=http.Transport(self.rpc))
        return client

    @contextlib.contextmanager
    def fault(self, fault: Fault, *methods: str, times: int | None = None) -> Iterator[Installed]:
        """The fault is in place inside the `with`, for these methods (none: all) and so many calls (None: all)."""
        installed = self.install(fault, *methods, times=times)
        try:
            yield installed
        finally:
            self.remove(installed)

    def install(self, fault: Fault, *methods: str, times: int | None = None) -> Installed:
        """Puts a fault in place until `remove`."""
        installed = Installed(fault, frozenset(methods), times)
        self.rpc.installed.append(installed)
        return installed

    def remove(self, installed: Installed) -> None:
        self.rpc.installed.remove(installed)

    @contextlib.asynccontextmanager
    async def serving(self, host: str = "127.0.0.1", port: int = 0, *, ticking: bool = False) -> AsyncIterator[str]:
        """Serves JSON-RPC over HTTP inside the `async with`; gives the URL. Port 0 takes a free one.

        `ticking` makes a slot every `slot_seconds` of real time.
        """
        with socket.create_server((host, port)) as listener:
            config = uvicorn.Config(
                http.application(self.rpc), log_level="warning", lifespan="off", access_log=False, ws="none",
                timeout_graceful_shutdown=1,
            )  # fmt: skip
            server = _Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            tick = asyncio.create_task(self._tick()) if ticking else None
            try:
                while not server.started:
                    if serving.done():
                        await serving
                        raise RuntimeError("the devnet's server stopped before it started")
                    await asyncio.sleep(0.005)
                yield f"http://{host}:{listener.getsockname()[1]}"
            finally:
                if tick is not None:
                    tick.cancel()
                server.should_exit = True
                await serving

    async def serve(self, host: str = "127.0.0.1", port: int = 8899) -> None:
        """Serves JSON-RPC over HTTP in real time, until cancelled."""
        async with self.serving(host, port, ticking=True):
            await asyncio.Event().wait()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._slot_seconds)
            self.advance(1)


class _Server(uvicorn.Server):
    """Leaves Ctrl-C to the program that it runs in."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()
