"""A shop on a dev chain of its own, for `diffusionz serve --dev`: no network, and nothing is worth anything.

    async with dev_shop(domain="127.0.0.1:8000") as (settings, faucet):
        ...                                                  # a Keeper and a server with these settings
        await faucet(address, tokens=Decimal(250), sol=Decimal("0.5"))

The chain is in this process's memory, in a thread with a loop of its own, and ends with the block. So does what was
sold: without a folder to keep it in, the shop's is a temporary one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import secrets
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

from diffusionz.payments import shop
from diffusionz.payments.background import Background
from diffusionz.payments.devnet import Devnet
from diffusionz.payments.errors import AmountError, ChainError
from diffusionz.payments.settings import Settings, load

# Few and long, since each slot costs some work: final after 2.5 s.
SLOT_S, FINALIZED_LAG = 0.25, 10


@dataclasses.dataclass(frozen=True)
class Faucet:
    """Sends tokens and SOL out of nothing to any address of the dev chain: a deposit address, a browser's wallet."""

    settings: Settings

    async def __call__(
        self, address: str, tokens: Decimal | int | None = None, sol: Decimal | int | None = None
    ) -> dict[str, Any]:
        """Whole tokens and SOL. Returns what was sent, in base units, with the signatures.

        Raises AddressError, AmountError, ChainError.
        """
        amounts = {"tokens": Decimal(tokens or 0), "sol": Decimal(sol or 0)}
        if not any(amounts.values()):
            raise AmountError("nothing to send: say how many tokens, how many SOL, or both")
        return await shop.faucet(
            self.settings,
            address,
            tokens=shop.base_units(amounts["tokens"], self.settings.token_decimals, "tokens"),
            lamports=shop.base_units(amounts["sol"], shop.SOL_DECIMALS, "sol"),
        )


@contextlib.asynccontextmanager
async def dev_shop(
    folder: str | os.PathLike[str] | None = None, *, domain: str = "localhost", uri: str | None = None
) -> AsyncIterator[tuple[Settings, Faucet]]:
    """The settings of a new shop in `folder` (None: a temporary one), and the faucet of its chain.

    domain: where people sign in, as their browsers name it, with the port; uri: the page's address, http://domain if
    none is given. Raises OSError when the folder exists.
    """
    devnet = _Devnet()
    with contextlib.ExitStack() as stack:
        if folder is None:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="diffusionz-dev-"))
            folder = pathlib.Path(temporary) / "shop"
        url = await asyncio.to_thread(devnet.start)
        try:
            # In the chain's loop, since it writes to the disk.
            await asyncio.wrap_future(devnet.background.call(shop.create(folder, rpc_url=url, addresses=1000)))
            settings = load(pathlib.Path(folder) / shop.CONFIG, environ={})
            settings = dataclasses.replace(settings, domain=domain, sign_in_uri=uri or f"http://{domain}")
            yield settings, Faucet(settings)
        finally:
            await asyncio.to_thread(devnet.background.stop)


class _Devnet:
    """A devnet that ticks in real time in its own thread; LiteSVM may be used by one only."""

    def __init__(self) -> None:
        self.background = Background("diffusionz-devnet", self._serve)
        self._url: str | None = None
        self._serving = threading.Event()

    def start(self) -> str:
        """Its URL, once it answers. Raises ChainError when it does not come up."""
        self.background.start()
        while not self._serving.wait(0.1):
            if not self.background.alive:
                raise ChainError("the dev chain could not be started", retryable=False)
        assert self._url is not None
        return self._url

    async def _serve(self) -> None:
        devnet = Devnet(
            secrets.randbits(64), slot_seconds=SLOT_S, finalized_lag=FINALIZED_LAG, genesis_time=int(time.time()),
            strict_cursors=True,
        )  # fmt: skip
        async with devnet.serving(ticking=True) as url:
            self._url = url
            self._serving.set()
            await asyncio.Event().wait()
