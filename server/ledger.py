"""The ledger of a server that sells its calls: credit, what keeps it going, and on a dev chain the faucet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from diffusionz.payments.keeper import Keeper
from diffusionz.server.credits import Credits
from diffusionz.server.till import Till

if TYPE_CHECKING:
    from diffusionz.payments.devshop import Faucet
    from diffusionz.payments.settings import Settings


class Ledger:
    """`settings` are the payments' own. Raises ConfigurationError for those that cannot work."""

    def __init__(self, settings: Settings, faucet: Faucet | None = None) -> None:
        self.settings = settings
        self.credits = Credits(settings)
        self.till = Till(self.credits)
        # On a dev chain somebody sits and waits for the faucet.
        self.keeper = Keeper(settings, scan_interval_s=0.5 if faucet else 2.0)
        self.faucet = faucet

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open for the time of the block. Raises ConfigurationError, StorageError."""
        async with self.credits:
            self.keeper.start()
            try:
                yield
            finally:
                await asyncio.to_thread(self.keeper.stop)
