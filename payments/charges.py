"""What a server charges for its calls: a hold before the work, a post after it, a void when there is nothing to post.

    charges = Charges(ledger, book)
    hold = charges.hold("user:alice", "tts", 250, call_id_of("user:alice", key), request_hash, ttl_s=120)
    if hold.created:                          # else the same request came before: hold.state says how it ended
        ...                                   # the work
        charges.post(hold.call_id, units=180) # what was delivered; or charges.void(hold.call_id, "engine_error")

The price and the rate are those of the hold, whatever they become before the post. No work without a hold: when
`hold` raises, nothing is reserved and nothing must run.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
import re
from typing import Literal

from diffusionz.payments.database import immediate
from diffusionz.payments.errors import BalanceError, ConflictError, IdentifierError, NotFoundError
from diffusionz.payments.ledger import (
    Ledger,
    Result,
    Transfer,
    check_identifier,
    check_integer,
    is_user,
    require,
    shown,
)
from diffusionz.payments.prices import PriceBook, Service
from diffusionz.payments.rates import Rate

TTL_MAX_S = 86_400
CALL_ID = re.compile(r"[A-Za-z0-9_-]{1,48}")

MIGRATIONS = [
    (
        "calls",
        """
        -- What the hold "call:<call_id>:hold" was reckoned with: the price of each begun `per` units, and the rate.
        CREATE TABLE calls (
            call_id       TEXT PRIMARY KEY,
            request_hash  TEXT NOT NULL,
            units         INTEGER NOT NULL CHECK (units >= 1),
            usd_micro     INTEGER NOT NULL CHECK (usd_micro >= 1),
            micro_usd     INTEGER NOT NULL CHECK (micro_usd >= 1),
            unit          TEXT NOT NULL,
            per           INTEGER NOT NULL CHECK (per >= 1),
            first_party   INTEGER NOT NULL CHECK (first_party IN (0, 1)),
            pico_usd      INTEGER NOT NULL CHECK (pico_usd >= 1),
            decimals      INTEGER NOT NULL CHECK (decimals >= 0),
            rate_at       INTEGER NOT NULL,
            rate_evidence INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID;
        CREATE TRIGGER calls_are_not_updated BEFORE UPDATE ON calls
            BEGIN SELECT RAISE (ABORT, 'calls are never changed'); END;
        CREATE TRIGGER calls_are_not_deleted BEFORE DELETE ON calls
            BEGIN SELECT RAISE (ABORT, 'calls are never deleted'); END;
        """,
    ),
]


class Failure(enum.Enum):
    """Why a call that was posted did not serve its user. The first four are ours, and refunded."""

    engine_error = "the engine failed"
    out_of_memory = "the machine ran out of memory"
    deadline_missed = "the result came too late by our fault"
    result_lost = "the result was lost or damaged before it reached the user"
    invalid_request = "the request could not be served"
    client_gone = "the client left before the result"
    client_changed_mind = "the client did not want the result"

    @property
    def ours(self) -> bool:
        return self in OURS


OURS = {Failure.engine_error, Failure.out_of_memory, Failure.deadline_missed, Failure.result_lost}


State = Literal["held", "posted", "refunded", "voided", "expired"]


@dataclasses.dataclass(frozen=True)
class Hold:
    """A call with its price, frozen, and how far it has come. Tokens are base units, times seconds since 1970.

    charged: the tokens that were posted. created: by this very request; only who sees True runs the work.
    """

    call_id: str
    request_hash: str
    account: str
    price: Service
    units: int
    usd_micro: int
    tokens: int
    rate: Rate
    expires_at: int
    state: State
    charged: int
    created: bool

    @property
    def service(self) -> str:
        return self.price.name


class Charges:
    """Calls of users, priced by `book` and paid in `ledger`."""

    def __init__(self, ledger: Ledger, book: PriceBook) -> None:
        self.ledger = ledger
        self.book = book

    def hold(self, account: str, service: str, units: int, call_id: str, request_hash: str, ttl_s: int) -> Hold:
        """Reserves what at most `units` of a service cost now, for ttl_s seconds (1 to TTL_MAX_S).

        call_id (see call_id_of) names the call: asked again with the same account, service, units and request_hash it
        returns the first answer, at its price. Raises BalanceError, RateError, NotFoundError for a service or an
        account, ConflictError when the call_id is that of another request, AmountError, IdentifierError.
        """
        check_identifier("account", account)
        if not is_user(account):
            raise IdentifierError(f"account {account!r}: only user accounts are charged")
        check_call_id(call_id)
        check_identifier("request_hash", request_hash)
        check_integer("units", units, 1)
        check_integer("ttl_s", ttl_s, 1, TTL_MAX_S)
        with immediate(self.ledger.connection):
            if known := self.find(call_id):
                before = (known.account, known.service, known.units, known.request_hash)
                if before != (account, service, units, request_hash):
                    raise ConflictError(f"call {call_id!r}: it was made before, with another request")
                return known
            now = self.ledger.clock()
            price, quote = self.book.service(service), self.book.quote(service, units, now=now)
            result = self.ledger.hold(
                f"call:{call_id}:hold", account, f"revenue:{'first_party' if price.first_party else 'proxied'}",
                quote.tokens, math.ceil(now) + ttl_s, service, f"{units} {price.unit}",
            )  # fmt: skip
            if result is Result.exceeds_credits:
                available = self.ledger.balance(account).available
                raise BalanceError(
                    f"{units} {price.unit} of {service} cost {quote.tokens} base units, {account} has {available}",
                    available=available,
                    needed=quote.tokens,
                )
            require(result, f"call {call_id!r} of {account}")
            self.ledger.connection.execute(
                "INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    call_id, request_hash, units, quote.usd_micro, price.micro_usd, price.unit, price.per,
                    price.first_party, quote.rate.pico_usd, quote.rate.decimals, quote.rate.at, quote.rate.evidence,
                ),
            )  # fmt: skip
            return dataclasses.replace(self._known(call_id), created=True)

    def post(self, call_id: str, units: int | None = None) -> Hold:
        """Charges what was delivered, at most what is held (None: all of it), at the hold's price and rate.

        Raises ExpiredError when the hold's time has passed: nothing is charged, and nothing is to be delivered.
        Raises ConflictError when the call was posted with other units, or voided; AmountError, NotFoundError.
        """
        with immediate(self.ledger.connection):
            hold = self._known(call_id)
            if units is None:
                units = hold.units
            check_integer("units", units, 1, hold.units)
            usd_micro = PriceBook({hold.service: hold.price}, self.book.rates).price(hold.service, units)
            amount = hold.rate.base_units(usd_micro)
            note = f"{units} {hold.price.unit}"
            require(self.ledger.post(f"call:{call_id}:post", f"call:{call_id}:hold", amount, note), f"call {call_id!r}")
            return self._known(call_id)

    def void(self, call_id: str, reason: str = "") -> Hold:
        """Gives back all that is held; when it has expired, nothing is left to do. Raises ConflictError when the call
        was posted, NotFoundError, IdentifierError for a reason that is not a short line."""
        with immediate(self.ledger.connection):
            if self._known(call_id).state not in ("voided", "expired"):
                result = self.ledger.void(f"call:{call_id}:void", f"call:{call_id}:hold", reason)
                require(result, f"call {call_id!r}")
            return self._known(call_id)

    def refund(self, call_id: str, failure: Failure) -> Hold:
        """Gives back exactly what was charged, when the failure is ours; once, however often it is asked.

        Raises ConflictError for a call that was not charged or a failure of the client's, NotFoundError.
        """
        with immediate(self.ledger.connection):
            hold = self._known(call_id)
            if not failure.ours:
                raise ConflictError(f"call {call_id!r}: {failure.value}; only our own failures are refunded")
            if hold.state not in ("posted", "refunded"):
                raise ConflictError(f"call {call_id!r}: it is {hold.state}, so there is no charge to give back")
            if hold.state == "posted":
                result = self.ledger.refund(f"call:{call_id}:refund", f"call:{call_id}:post", note=failure.value)
                require(result, f"call {call_id!r}")
            return self._known(call_id)

    def find(self, call_id: str) -> Hold | None:
        """The call, if it was ever held. It does not ask whose it is: compare `account` before you show it."""
        check_call_id(call_id)
        row = self.ledger.connection.execute("SELECT * FROM calls WHERE call_id = ?", (call_id,)).fetchone()
        if row is None:
            return None
        _, request_hash, units, usd_micro, micro_usd, unit, per, first_party, pico_usd, decimals, at, evidence = row
        held = self.ledger.find(f"call:{call_id}:hold")
        assert held and held.expires_at, "a call and its hold are written together"
        price = Service(held.code, micro_usd, unit, per, bool(first_party))
        rate = Rate(pico_usd, decimals, price.kind, at, evidence)
        state, charged = self._state(held)
        return Hold(
            call_id, request_hash, held.debit, price, units, usd_micro, held.amount, rate, held.expires_at, state,
            charged, created=False,
        )  # fmt: skip

    def open_calls(self) -> list[Hold]:
        """The calls that are held and not resolved, oldest first."""
        rows = self.ledger.connection.execute(
            "SELECT t.id FROM open_holds AS o JOIN transfers AS t ON t.seq = o.hold"
            " WHERE t.id GLOB 'call:*:hold' ORDER BY t.seq"
        ).fetchall()
        return [self._known(id.removeprefix("call:").removesuffix(":hold")) for (id,) in rows]

    def _state(self, held: Transfer) -> tuple[State, int]:
        """How far the hold has come, and what was charged."""
        resolved = self.ledger.resolution(held)
        if resolved is None:
            # The ledger posts nothing at expires_at, even when nobody has called `expire` yet.
            late = held.expires_at is not None and held.expires_at <= self.ledger.clock()
            return ("expired" if late else "held"), 0
        if resolved.kind == "post":
            return ("refunded" if self.ledger.resolution(resolved) else "posted"), resolved.amount
        return ("voided" if resolved.kind == "void" else "expired"), 0

    def _known(self, call_id: str) -> Hold:
        hold = self.find(call_id)
        if hold is None:
            raise NotFoundError(f"there is no call {call_id!r}")
        return hold


def call_id_of(account: str, idempotency_key: str) -> str:
    """The call_id for a key that the client chose: two accounts may choose the same one."""
    check_identifier("account", account)
    return hashlib.sha256(f"{account}\n{idempotency_key}".encode()).hexdigest()[:48]


def check_call_id(value: object) -> None:
    """Raises IdentifierError for what is not 1 to 48 of A-Z, a-z, 0-9, '_' and '-'."""
    if not isinstance(value, str) or not CALL_ID.fullmatch(value):
        raise IdentifierError(f"call_id {shown(value)}: it must be 1 to 48 of A-Z, a-z, 0-9, '_' and '-'")
