"""What a server's answers become as exceptions: one class a type of problem, in one table.

DiffusionzError
├── ConnectionFailed (also a ConnectionError)     no answer: nobody there, or the line broke more often than is retried
├── WaitTimeout      (also a TimeoutError)        the given time was over
├── Cancelled                                     the job was cancelled
└── ApiError                                      the server refused or failed, and said so
    ├── InvalidRequest (also a ValueError)        400; `param` names the field
    │   └── MethodNotAllowed, NotAcceptable, TooLarge, UnsupportedMediaType
    ├── Unauthorized                              401: no key, or none that is known
    ├── InsufficientCredit                        402: `available`, `needed`, `deposit_url`
    ├── Forbidden, NotFound, Conflict, Gone       403, 404, 409, 410
    ├── IdempotencyMismatch                       422
    ├── TooManyRequests                           429
    │   └── QueueFull, RateLimited
    ├── ServerError                               5xx; nothing was charged
    │   ├── InternalServerError, EngineError, ProviderError, ProviderTimeout
    │   └── Unavailable                           503
    │       └── Draining, JobTimeout, LedgerUnavailable, ModelUnavailable, RateUnavailable, ServerOutOfMemory
    └── UnexpectedAnswer                          what came is not what a diffusionz server says
"""

from __future__ import annotations

from typing import Any

from diffusionz._errors import Cancelled, DiffusionzError


class ConnectionFailed(DiffusionzError, ConnectionError):
    """The server did not answer, however often it was asked."""

    idempotency_key: str | None = None
    """Of a call that may have arrived all the same: a call with this key gets its answer, and does not pay twice."""
    job_id: str | None = None
    """Of a job that was being waited for, and may go on: `client.job(job_id)`."""

    def __str__(self) -> str:
        text = super().__str__()
        if self.idempotency_key is not None:
            text += (
                f". The call may have arrived: made again with idempotency_key={self.idempotency_key!r} "
                "it gets that one's answer, and pays once"
            )
        return text


class WaitTimeout(DiffusionzError, TimeoutError):
    """The `timeout` of the call was over. A call's job is cancelled, and costs nothing; a `Job` that is waited for
    goes on."""

    job_id: str | None = None


class ApiError(DiffusionzError):
    """The server refused, or failed, and said why."""

    status: int
    """HTTP's; of a failed job, the one that its problem has."""
    type: str
    """"invalid-request"; "" when the answer named none."""
    title: str
    detail: str
    """The server's sentence."""
    param: str | None
    """The field that is wrong."""
    request_id: str | None
    """What to tell the operator; it is in the server's log."""
    retry_after: float | None
    """Seconds after which asking again makes sense."""
    job_id: str | None
    """Of a job that failed."""
    problem: dict[str, Any]
    """The whole answer, parsed."""

    hint = ""
    """What to do about it, added to the message."""

    def __init__(
        self,
        detail: str = "",
        *,
        status: int = 0,
        type: str = "",
        title: str = "",
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        job_id: str | None = None,
        problem: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.type = type
        self.title = title
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        self.job_id = job_id
        self.problem = problem or {}

    def _advice(self) -> str:
        return self.hint

    def __str__(self) -> str:
        text = self.detail or self.title or "the server gave no reason"
        if self.param and self.param not in text:
            text = f"{self.param}: {text}"
        if advice := self._advice():
            text = f"{text.rstrip('.')}. {advice}"
        where = [f"{self.status} {self.type}".strip()] if self.status else []
        where += [f"request {self.request_id}"] if self.request_id else []
        return f"{text} [{', '.join(where)}]" if where else text


class InvalidRequest(ApiError, ValueError):
    """A field is wrong; `param` names it."""


class MethodNotAllowed(InvalidRequest):
    """The address knows no such method."""

    hint = "Are the client and the server of one version?"


class NotAcceptable(InvalidRequest):
    """The server has no answer of the kind asked for."""


class TooLarge(InvalidRequest):
    """The request is too large."""

    hint = "GET /api/limits says how large it may be."


class UnsupportedMediaType(InvalidRequest):
    """The server does not read this kind of body."""

    hint = "Are the client and the server of one version?"


class Unauthorized(ApiError):
    """No key, or none that the server knows."""

    hint = "Give api_key=, or set DIFFUSIONZ_API_KEY."


class InsufficientCredit(ApiError):
    """The balance is too low. Nothing ran and nothing was charged."""

    @property
    def available(self) -> int | None:
        """Base units of the token that are there."""
        return self._number("available")

    @property
    def needed(self) -> int | None:
        """Base units that the call costs."""
        return self._number("needed")

    @property
    def deposit_url(self) -> str | None:
        """Where the address to deposit to is."""
        url = self.problem.get("deposit_url")
        return url if isinstance(url, str) else None

    def _number(self, name: str) -> int | None:
        value = self.problem.get(name)
        return value if isinstance(value, int) else None

    def _advice(self) -> str:
        return f"Deposit more: {self.deposit_url}" if self.deposit_url else "Deposit more."


class Forbidden(ApiError):
    """The key is not for this service, its daily limit is reached, or the wallet is another's."""


class NotFound(ApiError):
    """There is no such thing, or it is another account's."""


class Conflict(ApiError):
    """Not possible as things are: the job is not done, or its key's result is no longer kept."""


class Gone(ApiError):
    """The result was kept for its time and is gone."""


class IdempotencyMismatch(ApiError):
    """The Idempotency-Key came before, with another request."""

    hint = "Choose a new idempotency_key for a new request."


class TooManyRequests(ApiError):
    """The server has enough to do, and went on saying so as often as it was asked."""

    def _advice(self) -> str:
        return f"Ask again in {self.retry_after:g} seconds." if self.retry_after else "Ask again later."


class QueueFull(TooManyRequests):
    """Too many jobs wait."""


class RateLimited(TooManyRequests):
    """The caller asked too often."""


class ServerError(ApiError):
    """The server failed. Nothing was charged."""


class InternalServerError(ServerError):
    """A defect in the server."""

    hint = "Please report it with its request id."


class EngineError(ServerError):
    """The engine failed."""


class ProviderError(ServerError):
    """The provider of a service that runs elsewhere failed."""


class ProviderTimeout(ServerError):
    """The provider of a service that runs elsewhere did not answer in time."""


class Unavailable(ServerError):
    """Not now: the server, or what it stands on, is not there at this moment."""

    def _advice(self) -> str:
        return f"Ask again in {self.retry_after:g} seconds." if self.retry_after else self.hint


class Draining(Unavailable):
    """The server is about to stop."""


class JobTimeout(Unavailable):
    """The job took longer than the server lets one take."""

    hint = "Ask for less, or later."


class LedgerUnavailable(Unavailable):
    """Credit cannot be booked at this moment."""


class ModelUnavailable(Unavailable):
    """The model cannot be loaded."""


class RateUnavailable(Unavailable):
    """There is no trusted price at this moment."""


class ServerOutOfMemory(Unavailable):
    """The server's device has no memory left for this."""

    hint = "Ask for less, or later."


class UnexpectedAnswer(ApiError):
    """What came is not what a diffusionz server says: another program's page, or an answer that was cut off."""

    hint = "Is base_url (DIFFUSIONZ_URL) a diffusionz server?"


BY_TYPE: dict[str, type[ApiError]] = {
    "invalid-request": InvalidRequest,
    "unauthorized": Unauthorized,
    "insufficient-credit": InsufficientCredit,
    "forbidden": Forbidden,
    "not-found": NotFound,
    "method-not-allowed": MethodNotAllowed,
    "not-acceptable": NotAcceptable,
    "conflict": Conflict,
    "gone": Gone,
    "too-large": TooLarge,
    "unsupported-media-type": UnsupportedMediaType,
    "idempotency-mismatch": IdempotencyMismatch,
    "queue-full": QueueFull,
    "rate-limited": RateLimited,
    "internal": InternalServerError,
    "engine-error": EngineError,
    "provider-error": ProviderError,
    "provider-timeout": ProviderTimeout,
    "out-of-memory": ServerOutOfMemory,
    "model-unavailable": ModelUnavailable,
    "ledger-unavailable": LedgerUnavailable,
    "rate-unavailable": RateUnavailable,
    "draining": Draining,
    "timeout": JobTimeout,
}

# Of a type that is not in the table, or of a gateway's answer, which has none.
BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    402: InsufficientCredit,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    406: NotAcceptable,
    409: Conflict,
    410: Gone,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: InvalidRequest,
    429: TooManyRequests,
    503: Unavailable,
}

# Users meet all of these in diffusionz.client; tracebacks should say so too.
PUBLIC = (
    ConnectionFailed,
    WaitTimeout,
    ApiError,
    TooManyRequests,
    ServerError,
    Unavailable,
    UnexpectedAnswer,
    *BY_TYPE.values(),
)
for _class in PUBLIC:
    _class.__module__ = "diffusionz.client"


def error_of(
    problem: dict[str, Any],
    *,
    status: int | None = None,
    request_id: str | None = None,
    retry_after: float | None = None,
    job_id: str | None = None,
) -> DiffusionzError:
    """The exception for a problem of the server, or for what else came with a status that says that it failed."""
    error = problem.get("error") if isinstance(problem.get("error"), dict) else {}
    assert isinstance(error, dict)
    kind = _text(problem.get("type")).rpartition("/")[2] or _text(error.get("type"))
    detail = _text(problem.get("detail")) or _text(error.get("message"))
    if kind == "cancelled":
        return Cancelled(detail or "the job was cancelled; nothing was charged")
    if status is None:
        status = problem["status"] if isinstance(problem.get("status"), int) else 500
    if retry_after is None and isinstance(problem.get("retry_after_s"), (int, float)):
        retry_after = float(problem["retry_after_s"])
    of_status = BY_STATUS.get(status, ServerError if status >= 500 else ApiError)
    return BY_TYPE.get(kind, of_status)(
        detail,
        status=status,
        type=kind,
        title=_text(problem.get("title")),
        param=_text(error.get("param")) or None,
        request_id=request_id or _text(problem.get("instance")) or None,
        retry_after=retry_after,
        job_id=job_id,
        problem=problem,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
