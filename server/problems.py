"""What can go wrong, as one table, and how it is answered: RFC 9457's problem+json with OpenAI's `error` beside it.

    raise Problem("insufficient-credit", "1 image costs 50 tokens, 3 are there", available=3, needed=50)

Every refusal of the server is a `Problem`; errors of the engine and of the ledger become one in `problem_of`.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import orjson
from starlette.responses import Response

import diffusionz

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of problem: its HTTP status, its title, and what its user can do about it."""

    status: int
    title: str
    advice: str


KINDS = {
    "invalid-request": Kind(
        400, "The request is not valid", "error.param names the field, detail says what is allowed."
    ),
    "unauthorized": Kind(401, "No valid API key", "Send Authorization: Bearer KEY, or sign in."),
    "insufficient-credit": Kind(
        402, "Not enough credit", "Deposit tokens, at deposit_url; needed and available say how many."
    ),
    "forbidden": Kind(
        403, "Not allowed", "The key is for other services, its daily limit is reached, or it is another account's."
    ),
    "not-found": Kind(404, "There is no such thing", "Check the address; another account's jobs are not shown."),
    "method-not-allowed": Kind(405, "This method is not allowed here", "The Allow header names those that are."),
    "not-acceptable": Kind(
        406, "Nothing acceptable to answer with", "Ask for application/json, image/webp or image/png."
    ),
    "conflict": Kind(409, "Not possible as things are", "detail says what the job is doing, or has done."),
    "gone": Kind(
        410, "The result is no longer kept", "Results are kept for a while; ask again with another Idempotency-Key."
    ),
    "too-large": Kind(413, "The request is too large", "/api/limits says how large it may be."),
    "unsupported-media-type": Kind(415, "Not a type of body that is read here", "Send Content-Type: application/json."),
    "idempotency-mismatch": Kind(
        422, "The Idempotency-Key belongs to another request", "Choose a new key for a new request."
    ),
    "queue-full": Kind(429, "Too many jobs are waiting", "Wait for Retry-After seconds, then ask again."),
    "rate-limited": Kind(429, "Asked for too often", "Wait for Retry-After seconds, then ask again."),
    "internal": Kind(500, "A defect in the server", "Nothing was charged. Please report the request id."),
    "engine-error": Kind(500, "The engine failed", "Nothing was charged."),
    "provider-error": Kind(502, "The provider failed", "Nothing was charged."),
    "out-of-memory": Kind(503, "Out of memory", "Nothing was charged. Ask for less, or later."),
    "model-unavailable": Kind(503, "The model cannot be loaded", "Nothing was charged. The operator's log says why."),
    "ledger-unavailable": Kind(
        503, "Credit cannot be booked now", "Nothing was charged. Ask again after Retry-After seconds."
    ),
    "rate-unavailable": Kind(
        503, "There is no trusted price now", "Nothing was charged. Ask again after Retry-After seconds."
    ),
    "draining": Kind(503, "The server is about to stop", "Nothing was charged. Ask again after Retry-After seconds."),
    "timeout": Kind(503, "It took too long", "Nothing was charged. Ask for less, or later."),
    "cancelled": Kind(409, "The job was cancelled", "Nothing was charged."),
    "provider-timeout": Kind(504, "The provider did not answer in time", "Nothing was charged."),
}


class Problem(Exception):
    """A refusal or a failure, of a type in KINDS. `detail` is for the user; `members` are added to the answer."""

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}
        self.members = members

    @property
    def status(self) -> int:
        return KINDS[self.kind].status

    def body(self, instance: str | None = None) -> dict[str, Any]:
        """The JSON of the answer; `instance` is the request's or the job's id."""
        kind = KINDS[self.kind]
        body = {"type": f"/problems/{self.kind}", "title": kind.title, "status": kind.status, "detail": self.detail}
        if instance is not None:
            body["instance"] = instance
        if self.retry_after_s is not None:
            body["retry_after_s"] = self._seconds()
        error = {"message": self.detail, "type": self.kind, "code": self.kind, "param": self.param}
        return body | self.members | {"error": error}

    def response(self, instance: str | None = None) -> Response:
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self._seconds())
        if self.kind == "unauthorized":
            headers["www-authenticate"] = "Bearer"
        return Response(orjson.dumps(self.body(instance)), self.status, headers, media_type="application/problem+json")

    def _seconds(self) -> int:
        return max(1, round(self.retry_after_s or 0))


def invalid(detail: str, param: str | None = None) -> Problem:
    """A request that is not valid; `param` is the field that is to blame."""
    return Problem("invalid-request", detail, param=param)


def problem_of(error: BaseException, request_id: str | None = None) -> Problem:
    """The problem that an exception is to the user. What nobody expected is logged with its traceback."""
    if isinstance(error, Problem):
        return error
    for known, kind in _ENGINE:
        if isinstance(error, known):
            if kind == "out-of-memory":  # the allocator's words are the operator's to read
                logger.warning("out of memory: %s", error)
                return Problem(kind, "there is not enough memory for this now; ask for less, or later", retry_after_s=5)
            return Problem(kind, str(error))
    if payment := _payment_problem(error):
        return payment
    about = {"request_id": request_id} if request_id else {}
    logger.error("unexpected %s", type(error).__name__, exc_info=error, extra={"fields": about})
    return Problem("internal", "something went wrong that should not; nothing was charged")


# Which problem an error of the engine is.
_ENGINE: tuple[tuple[type[BaseException], str], ...] = (
    (diffusionz.ArgumentError, "invalid-request"),
    (diffusionz.ImageError, "invalid-request"),
    (diffusionz.OutOfMemoryError, "out-of-memory"),
    (diffusionz.ModelError, "model-unavailable"),
    (diffusionz.LoraError, "model-unavailable"),
    (diffusionz.Cancelled, "cancelled"),
    (diffusionz.DiffusionzError, "engine-error"),
    (MemoryError, "out-of-memory"),
)


def _payment_problem(error: BaseException) -> Problem | None:
    try:
        from diffusionz.payments import errors
    except ImportError:  # the extra is not installed: none of its errors can have been raised
        return None
    text = str(error)
    match error:
        case errors.BalanceError():
            return Problem(
                "insufficient-credit", text, available=error.available, needed=error.needed, deposit_url="/api/deposit"
            )
        case errors.LimitError():
            return Problem("rate-limited", text, retry_after_s=error.retry_after_s)
        case errors.RateError():
            return Problem("rate-unavailable", text, retry_after_s=30)
        case errors.StorageError() | errors.ExpiredError():
            logger.error("the ledger: %s", text)
            return Problem("ledger-unavailable", "credit cannot be booked at this moment", retry_after_s=5)
        case errors.IdentityError():
            return Problem("forbidden", text)
        case errors.NotFoundError():
            return Problem("not-found", text)
        case errors.ConflictError():
            return Problem("conflict", text)
        case errors.AddressError():
            return Problem("ledger-unavailable", text, retry_after_s=60)
        case errors.AmountError() | errors.IdentifierError():
            return Problem("invalid-request", text)
        case errors.ChainError():
            return Problem("ledger-unavailable", "the chain does not answer", retry_after_s=10)
    return None
