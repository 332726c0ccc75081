"""What goes on beside a server that sells calls: rates, deposits, sweeps, e-mails, and the end of forgotten holds.

    keeper = Keeper(settings)
    keeper.start()           # returns at once, whether or not a node can be reached
    keeper.status()          # {"watcher": Status(running=True, last_success=..., failures=0, last_error=None), ...}
    keeper.stop()

All of it is in a thread with a loop and a database connection of its own: a scan's writes wait for the disk, and must
not stall the server's loop. Each task is on its own: what it raises is logged, and it begins again after a while, with
the next of the configured nodes if it needs one. Nothing is lost meanwhile, for each goes on from what is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import traceback
from collections.abc import Awaitable, Callable
from time import time
from typing import TYPE_CHECKING, TypeVar

from diffusionz.payments.background import Background
from diffusionz.payments.errors import PaymentsError
from diffusionz.payments.notices import Notices
from diffusionz.payments.settings import Settings
from diffusionz.payments.shop import Shop, assemble, gas_of, open_connection, seed_of
from diffusionz.payments.watcher import Watcher

if TYPE_CHECKING:
    from solders.keypair import Keypair

    from diffusionz.payments.addresses import Seed

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A locked database is waited for no longer than this, so that `stop` is quick. What fails is tried again anyway.
BUSY_TIMEOUT_S = 1.0


@dataclasses.dataclass
class Status:
    """How a task does. running: it is at work, and its last step was taken. failures: in a row. last_success: when its
    last step was done, in seconds since 1970. last_error: what went wrong last, however long ago."""

    running: bool = False
    last_success: float | None = None
    failures: int = 0
    last_error: str | None = None


class Keeper:
    """The tasks: "holds" and "watcher", "rates" where sources are configured, "sweeper" where the seed and the gas
    wallet are, "notices" where e-mail is. Intervals are between the ends and the beginnings of steps."""

    def __init__(
        self,
        settings: Settings,
        *,
        scan_interval_s: float = 2.0,
        sweep_interval_s: float = 10.0,
        expiry_interval_s: float = 5.0,
        mail_interval_s: float = 15.0,
        backoff_s: float = 1.0,
        backoff_max_s: float = 30.0,
    ) -> None:
        self.settings = settings
        self._scan_interval_s = scan_interval_s
        self._sweep_interval_s = sweep_interval_s
        self._expiry_interval_s = expiry_interval_s
        self._mail_interval_s = mail_interval_s
        self._backoff_s, self._backoff_max_s = backoff_s, backoff_max_s
        self._background = Background("diffusionz-keeper", self._keep)
        self._tasks: dict[str, Callable[[Shop], Awaitable[None]]] = {"holds": self._expire_holds}
        self._status: dict[str, Status] = {}
        self._signer: tuple[Seed, Keypair] | None = None
        self._watcher: Watcher | None = None
        self._notices: Notices | None = None

    def start(self) -> None:
        """Raises ConfigurationError and SeedError for settings that cannot work, whatever the chain says."""
        settings = self.settings
        settings.require("rpc_urls", "mint", "treasury")
        if settings.rates_token_sources or settings.rates_sol_sources:
            self._tasks["rates"] = self._refresh_rates
        self._tasks["watcher"] = self._watch
        if settings.seed_file and settings.gas_key_file:
            self._signer = seed_of(settings), gas_of(settings)
            self._tasks["sweeper"] = self._sweep
        if settings.smtp_host:
            settings.require("mail_from")
            self._tasks["notices"] = self._send_notices
        self._status = {name: Status() for name in self._tasks}
        self._background.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Ends all tasks where they are; whether they ended in time."""
        ended = self._background.stop(timeout_s)
        if not ended:
            logger.error("the keeper's thread has not ended after %g s", timeout_s)
        return ended

    def status(self) -> dict[str, Status]:
        """Of each task, at this moment; from any thread."""
        alive = self._background.alive
        return {
            name: dataclasses.replace(status, running=status.running and alive) for name, status in self._status.items()
        }

    def asked_for_rates(self) -> bool:
        """Whether the sources have been asked once, whatever they said: before that a new ledger has no price."""
        status = self._status.get("rates")
        return status is None or status.last_success is not None or status.failures > 0

    # Supervision: all of this runs in the thread.

    async def _keep(self) -> None:
        with contextlib.ExitStack() as stack:
            shop = await self._until_done("holds", lambda: self._open(stack))
            async with asyncio.TaskGroup() as group:
                for name, session in self._tasks.items():
                    group.create_task(self._until_done(name, functools.partial(session, shop)), name=name)

    async def _open(self, stack: contextlib.ExitStack) -> Shop:
        connection = open_connection(self.settings, busy_timeout_s=BUSY_TIMEOUT_S)
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            self._notices = notices = Notices.from_settings(self.settings, connection)

            def credited(user: str, tokens: int) -> None:
                notices.deposited(user, tokens)
                notices.balance_is(user, shop.ledger.balance(user).available)

            shop = assemble(self.settings, connection, on_credit=credited)
            stack.push(undo.pop_all())
        return shop

    async def _until_done(self, name: str, work: Callable[[], Awaitable[T]]) -> T:
        """Does the work as often as it takes, with longer and longer pauses."""
        status = self._status[name]
        while True:
            try:
                return await work()
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException as error:  # a panic in solders is no Exception
                task = asyncio.current_task()
                if task and task.cancelling():  # by `stop`, and not by something within that went astray
                    raise
                status.running = False
                self._failed(name, _said(error))
            await asyncio.sleep(min(self._backoff_s * 2 ** min(status.failures - 1, 10), self._backoff_max_s))

    async def _repeat(self, name: str, step: Callable[[], Awaitable[str | None]], interval_s: float) -> None:
        """Takes the step for ever. What it returns went wrong and needs no other beginning; what it raises does."""
        status = self._status[name]
        while True:
            wrong = await step()
            status.running = True
            if wrong:
                self._failed(name, wrong)
            else:
                status.failures, status.last_success = 0, time()
            await asyncio.sleep(interval_s)

    def _failed(self, name: str, what: str) -> None:
        status = self._status[name]
        status.failures += 1
        status.last_error = what
        logger.warning("%s: %d failures in a row: %s", name, status.failures, what)

    # The tasks. Each is a session that ends by raising alone.

    async def _expire_holds(self, shop: Shop) -> None:
        async def step() -> None:
            if expired := shop.ledger.expire():
                logger.info("%d holds expired", expired)

        await self._repeat("holds", step, self._expiry_interval_s)

    async def _refresh_rates(self, shop: Shop) -> None:
        async with shop.rates_client() as rates:

            async def step() -> str | None:
                samples = await rates.refresh()
                wrong = [f"{s.asset}: rate {s.state}: {s.why}" for s in samples.values() if s.state != "accepted"]
                return "; ".join(wrong)

            await self._repeat("rates", step, self.settings.rates_interval_s)

    async def _watch(self, shop: Shop) -> None:
        async with shop.chain(self._status["watcher"].failures) as chain:
            # One watcher for all sessions: it remembers which accounts it looked at and which gave trouble.
            watcher = self._watcher = self._watcher or shop.watcher(chain)
            watcher.chain = chain
            await watcher.start()

            async def step() -> str | None:
                scan = await watcher.scan()
                return "; ".join(f"{account}: {why}" for account, why in list(scan.failed.items())[:3])

            await self._repeat("watcher", step, self._scan_interval_s)

    async def _sweep(self, shop: Shop) -> None:
        assert self._signer is not None
        async with shop.chain(self._status["sweeper"].failures) as chain:
            sweeper = shop.sweeper(chain, *self._signer)
            await sweeper.start()

            async def step() -> None:
                await sweeper.step()

            await self._repeat("sweeper", step, self._sweep_interval_s)

    async def _send_notices(self, shop: Shop) -> None:
        notices = self._notices
        assert notices is not None

        async def step() -> None:
            await notices.send_due()

        await self._repeat("notices", step, self._mail_interval_s)


def _said(error: BaseException) -> str:
    """What may be logged of an error: our own say what they may, of others the message may hold a URL with a key."""
    if isinstance(error, PaymentsError):
        return str(error)
    where = traceback.extract_tb(error.__traceback__)[-1:]
    return type(error).__name__ + "".join(f" at {frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in where)
