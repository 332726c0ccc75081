"""The ledger as the server's event loop uses it: every method is awaited, and none blocks the loop.

    async with Credits(settings) as credits:
        key = await credits.authenticate(secret)
        hold = await credits.hold(key, key.account, "zimage", 1, call_id, request_hash, ttl_s=120)
        ...                                             # the work
        await credits.post(hold.call_id)                # or credits.void(hold.call_id, "engine_error")

A commit waits for the disk, and a locked ledger until its lock is free, so the database has one thread of its own with
one connection. What is asked is done there in turn; holds and posts that wait in line share a transaction, and are
answered when it is on the disk. A request that is cancelled while it waits is done all the same, but for a hold, which
is voided. Deposits, rates and the end of forgotten holds are the Keeper's.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self, TypeVar

from diffusionz.payments.charges import Charges, Failure, Hold
from diffusionz.payments.database import Connection, immediate, snapshot
from diffusionz.payments.deposits import SOL
from diffusionz.payments.errors import AmountError, ConflictError, RateError, StorageError
from diffusionz.payments.identity import Challenge, Identity, SignedIn
from diffusionz.payments.keys import Key, Keys, NewKey
from diffusionz.payments.notices import Notices
from diffusionz.payments.presence import Presence
from diffusionz.payments.prices import PriceBook, format_usd
from diffusionz.payments.rates import SOL_DECIMALS, usd
from diffusionz.payments.sessions import Sessions
from diffusionz.payments.settings import Settings
from diffusionz.payments.shop import Shop, assemble, open_connection

T = TypeVar("T")

logger = logging.getLogger(__name__)

# How long a request waits for a locked ledger, from when it was asked: those that queue up wait beside each other.
BUSY_TIMEOUT_S = 2.0
# How long the end of a call is tried again: what was delivered has to be paid.
RESOLVE_S = 10.0
RETRY_S = 0.05  # doubles each time, up to a second
BATCH_MAX = 32  # requests that share a transaction; what else is asked waits for all of them
PRICING_S = 1.0  # how old an answer of `pricing` may be


class Credits:
    """The account side of a server. `open` before the first use, `close` after the last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._thread = _Thread(self._together, self._wait_until)
        self._connection: Connection
        self._pricing: tuple[float, dict[str, Any]] = (0.0, {})

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Opens the database, which has to be there. The first one there gives back what is held for calls of servers
        that were killed. Raises ConfigurationError, StorageError."""
        self._thread.start()
        try:
            await self._thread.run(self._open)
        except BaseException:
            await self._thread.close(self._close)
            raise

    async def close(self) -> None:
        """Ends when everything that was asked before is done."""
        await self._thread.close(self._close)

    # Calls.

    async def authenticate(self, secret: str) -> Key:
        """Raises IdentityError."""
        return await self._run(lambda: self._keys.authenticate(secret))

    async def hold(
        self, key: Key | None, account: str, service: str, units: int, call_id: str, request_hash: str, ttl_s: int
    ) -> Hold:
        """Reserves what a call costs (charges.hold), and counts it against the key's limit of the day: both or neither.

        Without a key the account's owner asks, and nothing but the balance is the limit. Raises what charges.hold
        raises, IdentityError when the key is not for the service or its limit is reached, and StorageError.
        """
        if key is not None and key.account != account:
            raise ConflictError(f"the key {key.shown} is not {account}'s")
        made = False

        def work() -> Hold:
            nonlocal made
            with immediate(self._connection):
                if key is not None:
                    self._keys.check_service(key, service)
                hold = self._charges.hold(account, service, units, call_id, request_hash, ttl_s)
                if key is not None and hold.created:
                    self._keys.spend(key, call_id, hold.tokens)
            made = hold.created
            return hold

        try:
            return await self._run(work, joint=True)
        except asyncio.CancelledError:
            # Nobody will ever know of this hold; after it in the queue, so that it is there if it is to be.
            with contextlib.suppress(StorageError):  # it is closed: the hold expires
                self._thread.send(_Request(lambda: self._void(call_id, "the client left") if made else None))
            raise

    async def post(self, call_id: str, units: int | None = None) -> Hold:
        """Charges what was delivered (charges.post). A ledger that cannot be written is tried for RESOLVE_S.

        Raises what charges.post raises, and StorageError: then nothing is charged.
        """
        return await self._persistently(lambda: self._post(call_id, units))

    async def void(self, call_id: str, reason: str = "") -> Hold:
        """Gives back all that is held (charges.void), tried as long as `post`. Raises what charges.void raises, and
        StorageError: then the hold stays until it expires."""
        return await self._persistently(lambda: self._void(call_id, reason))

    async def refund(self, call_id: str, failure: Failure) -> Hold:
        """Gives back what was charged (charges.refund), to the key's limit too, tried as long as `post`."""

        def work() -> Hold:
            with immediate(self._connection):
                return self._settled(self._charges.refund(call_id, failure))

        return await self._persistently(work)

    async def find(self, call_id: str) -> Hold | None:
        """The call, whoever's it is: compare `account` before you show it. Raises IdentifierError."""
        return await self._run(lambda: self._charges.find(call_id))

    # What people see of their account. Amounts are base units, times seconds since 1970.

    async def balance(self, account: str) -> dict[str, Any]:
        """posted, held and available, their worth at the all-time high (usd, None without a trusted rate), and what is
        on its way: arriving (not final), waiting (final, and not credited yet). Raises NotFoundError."""

        def work() -> dict[str, Any]:
            with snapshot(self._connection):
                balance = self._shop.ledger.balance(account)
                arriving = self._shop.deposits.arriving(account)
                waiting = self._shop.deposits.waiting(account)
                worth = None
                with contextlib.suppress(RateError):
                    rate = self._shop.rates.token_rate("ath", time.time())
                    worth = format_usd(rate.micro_usd(balance.available))
            return {
                "account": account,
                "posted": balance.posted,
                "held": balance.held,
                "available": balance.available,
                "decimals": self.settings.token_decimals,
                "symbol": self.settings.token_symbol,
                "usd": worth,
                "arriving": [self._amount(mint, amount) for mint, amount in arriving],
                "waiting": [
                    self._amount(row.mint, row.amount) | {"reason": row.reason, "signature": row.signature}
                    for row in waiting
                ],
            }

        return await self._run(work)

    async def history(self, account: str, limit: int = 100, before: int | None = None) -> list[dict[str, Any]]:
        """Newest first; see Ledger.history. Raises NotFoundError, AmountError."""

        def work() -> list[dict[str, Any]]:
            return [
                {
                    "seq": line.seq,
                    "id": line.id,
                    "kind": line.kind,
                    "code": line.code,
                    "counterparty": line.counterparty,
                    "amount": line.amount,
                    "posted": line.posted,
                    "held": line.held,
                    "note": line.note,
                    "created_at": line.created_at,
                }
                for line in self._shop.ledger.history(account, limit, before)
            ]

        return await self._run(work)

    async def pricing(self) -> dict[str, Any]:
        """What is for sale: in USD, and in base units at this moment's rate, for `per` units; or why there is no
        price in tokens. rates: USD for a token that the prices were turned with."""
        made_at, pricing = self._pricing
        if time.monotonic() - made_at > PRICING_S or not pricing:
            pricing = await self._run(self._price_list)
            if all(service["why"] is None for service in pricing["services"]):  # else a rate may be there any moment
                self._pricing = time.monotonic(), pricing
        return pricing

    # Signing in.

    async def challenge(self, address: str, client: str) -> Challenge:
        """See Identity.challenge. Raises IdentityError, LimitError; ConfigurationError where no domain is set."""
        return await self._run(lambda: self._identity().challenge(address, client))

    async def sign_in(self, address: str, nonce: str, signature: str | bytes) -> SignedIn:
        """See Identity.sign_in. Raises IdentityError."""
        return await self._run(lambda: self._identity().sign_in(address, nonce, signature))

    async def open_session(self, account: str) -> str:
        """The token of a browser that signed in. See Sessions.open."""
        return await self._run(lambda: self._sessions.open(account))

    async def session(self, token: str) -> str | None:
        """The account that the token's browser signed in to, while it is."""
        return await self._run(lambda: self._sessions.account(token))

    async def close_session(self, token: str) -> None:
        """See Sessions.close."""
        await self._run(lambda: self._sessions.close(token))

    async def link_challenge(self, account: str, address: str, client: str) -> Challenge:
        """See Identity.link_challenge. Raises IdentityError, LimitError."""
        return await self._run(lambda: self._identity().link_challenge(account, address, client))

    async def link(self, address: str, nonce: str, signature: str | bytes) -> SignedIn:
        """See Identity.link. Raises IdentityError, ConflictError."""
        return await self._run(lambda: self._identity().link(address, nonce, signature))

    async def wallets(self, account: str) -> list[str]:
        """The addresses that may sign in to the account; none where nobody can sign in."""
        return await self._run(lambda: self._signing.wallets(account) if self._signing else [])

    # Deposits.

    async def deposit_address(self, account: str) -> dict[str, Any]:
        """Where the account's owner may send tokens and SOL, and what was credited so far. The same address until a
        deposit to it is final. Raises NotFoundError, AddressError when the pool is empty."""

        def work() -> dict[str, Any]:
            addresses = self._shop.addresses
            unused = addresses.unused(account)  # mostly there; and requests are done one after the other
            address = unused[0] if unused else addresses.issue(account)
            settings = self.settings
            return {
                "address": address,
                "network": settings.network,
                "mint": settings.mint,
                "decimals": settings.token_decimals,
                "symbol": settings.token_symbol,
                "currencies": [
                    {"currency": settings.token_symbol, "decimals": settings.token_decimals, "mint": settings.mint},
                    {"currency": SOL, "decimals": SOL_DECIMALS, "mint": None},
                ],
                "arriving": [self._amount(mint, n) for mint, n in self._shop.deposits.arriving(account)],
                "deposits": [
                    {
                        "tokens": credit.tokens,
                        "currency": self._currency(credit.currency),
                        "rate": credit.rate,
                        "signature": credit.signature,
                        "created_at": credit.at,
                    }
                    for credit in self._shop.deposits.credits(account)
                ],
            }

        return await self._run(work)

    # Keys and e-mails.

    async def keys(self, account: str) -> list[Key]:
        """All of the account's keys, revoked ones too."""
        return await self._run(lambda: self._keys.list(account))

    async def create_key(
        self, account: str, name: str = "", services: Iterable[str] | None = None, daily_limit: int | None = None
    ) -> NewKey:
        """See Keys.create; services have to be for sale. Raises NotFoundError, IdentifierError, AmountError,
        IdentityError."""

        def work() -> NewKey:
            wanted = None if services is None else list(services)
            for service in wanted or ():
                self._book.service(service)
            return self._keys.create(account, name=name, services=wanted, daily_limit=daily_limit)

        return await self._run(work)

    async def revoke_key(self, account: str, id: str) -> Key:
        """Raises NotFoundError."""
        return await self._run(lambda: self._keys.revoke(account, id))

    async def set_daily_limit(self, account: str, id: str, daily_limit: int | None) -> Key:
        """Raises NotFoundError, AmountError."""
        return await self._run(lambda: self._keys.set_daily_limit(account, id, daily_limit))

    async def subscribe(self, account: str, email: str, low_balance: int | None = None) -> None:
        """See Notices.subscribe. Raises ConfigurationError where no e-mail is sent, IdentifierError, AmountError."""
        self.settings.require("smtp_host")
        await self._run(lambda: self._notices.subscribe(account, email, low_balance=low_balance))

    async def unsubscribe(self, account: str) -> None:
        await self._run(lambda: self._notices.unsubscribe(account))

    # Inside; all of it in the thread.

    def _open(self) -> None:
        connection = open_connection(self.settings, busy_timeout_s=BUSY_TIMEOUT_S)
        presence = Presence(self.settings.database)
        try:
            self._keys = Keys.from_settings(self.settings, connection)
            self._sessions = Sessions(connection)
            self._shop: Shop = assemble(self.settings, connection)
            self._book = PriceBook(self.settings.prices, self._shop.rates)
            self._charges = Charges(self._shop.ledger, self._book)
            self._notices = Notices.from_settings(self.settings, connection)
            self._signing = Identity.from_settings(self.settings, self._shop.ledger) if self.settings.domain else None
            self._connection = connection
            presence.enter(if_alone=self._void_abandoned)
        except BaseException:
            connection.close()
            raise
        self._presence = presence
        self._waits_ms = round(BUSY_TIMEOUT_S * 1000)

    def _close(self) -> None:
        if hasattr(self, "_presence"):
            self._presence.leave()
            self._connection.close()

    def _void_abandoned(self) -> None:
        """Gives back what is held for calls that nobody works on any more, since their server was killed."""
        if not (abandoned := self._charges.open_calls()):
            return  # mostly, and then a locked ledger can be opened all the same
        with immediate(self._connection):
            for hold in abandoned:
                self._void(hold.call_id, "the server ended before it was done")
        logger.warning("%d calls had been cut off: what was held for them is given back", len(abandoned))

    def _identity(self) -> Identity:
        self.settings.require("domain")
        assert self._signing is not None
        return self._signing

    def _post(self, call_id: str, units: int | None) -> Hold:
        with immediate(self._connection):
            hold = self._settled(self._charges.post(call_id, units))
        if self.settings.smtp_host is not None:
            self._notices.balance_is(hold.account, self._shop.ledger.balance(hold.account).available)
        return hold

    def _void(self, call_id: str, reason: str) -> Hold:
        with immediate(self._connection):
            return self._settled(self._charges.void(call_id, reason))

    def _settled(self, hold: Hold) -> Hold:
        """Counts against the limit of the key that the call was made with, if it was, what it has cost in the end."""
        self._keys.settle(hold.account, hold.call_id, hold.charged if hold.state == "posted" else 0)
        return hold

    def _price_list(self) -> dict[str, Any]:
        now = time.time()
        rates: dict[str, str | None] = {"ath": None, "market": None}
        services = []
        for service in self._book.services.values():
            tokens, why = None, None
            try:
                quote = self._book.quote(service.name, now=now)
                tokens, rates[service.kind] = quote.tokens, usd(quote.rate.pico_usd)
            except (RateError, AmountError) as error:
                why = str(error)
            services.append(
                {
                    "name": service.name,
                    "usd": format_usd(service.micro_usd),
                    "unit": service.unit,
                    "per": service.per,
                    "first_party": service.first_party,
                    "tokens": tokens,
                    "why": why,
                }
            )
        token = {
            "symbol": self.settings.token_symbol,
            "mint": self.settings.mint,
            "decimals": self.settings.token_decimals,
            "network": self.settings.network,
        }
        return {"services": services, "rates": rates, "token": token}

    def _amount(self, mint: str, amount: int) -> dict[str, Any]:
        decimals = SOL_DECIMALS if mint == SOL else self.settings.token_decimals
        return {"currency": self._currency(mint), "amount": amount, "decimals": decimals}

    def _currency(self, mint: str) -> str:
        return SOL if mint == SOL else self.settings.token_symbol

    # Between the loop and the thread.

    async def _run(self, work: Callable[[], T], *, joint: bool = False) -> T:
        """Does the work in the thread, where it waits for a locked ledger until BUSY_TIMEOUT_S after now. joint: it is
        one transaction, and may share it with others."""
        return await self._thread.run(work, joint=joint, deadline=time.monotonic() + BUSY_TIMEOUT_S)

    async def _persistently(self, work: Callable[[], T]) -> T:
        """Does the work, a transaction, again after a StorageError until RESOLVE_S have passed."""
        deadline, pause = time.monotonic() + RESOLVE_S, RETRY_S
        while True:
            try:
                return await self._run(work, joint=True)
            except StorageError:
                if time.monotonic() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _wait_until(self, deadline: float) -> None:
        """For the lock. Behind a locked ledger a queue builds up, whose requests have waited already."""
        left_ms = max(round((deadline - time.monotonic()) * 1000), 0)
        if abs(left_ms - self._waits_ms) > 20:
            self._connection.execute(f"PRAGMA busy_timeout = {left_ms}")
            self._waits_ms = left_ms

    def _together(self, works: list[Callable[[], Any]]) -> list[_Outcome]:
        """Does all in one transaction, each in a savepoint of its own: so many share the wait for the disk. What one
        raises undoes that one. Raises StorageError when nothing was written for any."""
        outcomes = []
        with immediate(self._connection):
            for work in works:
                outcomes.append(outcome := _attempt(work))
                if isinstance(outcome.failure, StorageError):
                    raise outcome.failure
                if not self._connection.in_transaction:  # SQLite has rolled all of it back, as when the disk is full
                    raise StorageError("the ledger's transaction was rolled back")
        return outcomes


class _Outcome(NamedTuple):
    result: Any = None
    failure: BaseException | None = None


class _Request(NamedTuple):
    """Work for the thread; joint works may share a transaction. Without a future nobody learns what comes of it."""

    work: Callable[[], Any]
    future: asyncio.Future[Any] | None = None
    joint: bool = False
    deadline: float = math.inf


def _attempt(work: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(work())
    except BaseException as error:  # a panic in solders is no Exception
        return _Outcome(failure=error)


class _Thread:
    """Does what the loop's tasks ask, one after the other, in a thread of its own.

    The way there and back costs half of a ThreadPoolExecutor's: no lock and no object for other threads to wait at, and
    one wake-up of the loop for all results that are there when it comes. What is joint and waits in line is done
    together.
    """

    def __init__(
        self, together: Callable[[list[Callable[[], Any]]], list[_Outcome]], wait_until: Callable[[float], None]
    ) -> None:
        self._together, self._wait_until = together, wait_until
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._results: collections.deque[tuple[asyncio.Future[Any], _Outcome]] = collections.deque()
        self._awake = False  # the loop was told, and has not come yet
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, name="diffusionz-credits", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T], *, joint: bool = False, deadline: float = math.inf) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self.send(_Request(work, future, joint, deadline))
        return await future

    def send(self, request: _Request) -> None:
        """Raises StorageError after `close`."""
        if self._closed:
            raise StorageError("the ledger is closed")
        self._requests.put(request)

    async def close(self, last: Callable[[], object]) -> None:
        """Does `last` after everything that was asked before; whatever is asked later raises StorageError."""
        if self._closed or self._thread is None:
            return
        done: asyncio.Future[None] = self._loop.create_future()
        self.send(_Request(last, done))
        self._closed = True
        self._requests.put(None)
        await done

    def _serve(self) -> None:
        following: list[_Request | None] = []  # at most one, taken from the queue and not for the last batch
        while (request := following.pop() if following else self._requests.get()) is not None:
            batch = [request]
            while request.joint and len(batch) < BATCH_MAX and not following:
                try:
                    further = self._requests.get_nowait()
                except queue.Empty:
                    break
                if further is not None and further.joint:
                    batch.append(further)
                else:
                    following.append(further)
            self._do(batch)
            del request, batch  # not kept until the next one comes

    def _do(self, batch: list[_Request]) -> None:
        try:
            if batch[0].deadline < math.inf:
                self._wait_until(batch[0].deadline)
            works = [request.work for request in batch]
            outcomes = self._together(works) if len(batch) > 1 else [_attempt(works[0])]
        except BaseException as error:
            outcomes = [_Outcome(failure=error)] * len(batch)
        self._results.extend(
            (request.future, outcome) for request, outcome in zip(batch, outcomes, strict=True) if request.future
        )
        if self._results and not self._awake:
            self._awake = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._awake = False  # first, so that what comes from now on wakes the loop again
        while self._results:
            future, outcome = self._results.popleft()
            if future.cancelled():
                continue
            if outcome.failure is not None:
                future.set_exception(outcome.failure)
            else:
                future.set_result(outcome.result)
