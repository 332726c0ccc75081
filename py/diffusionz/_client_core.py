"""What the client says to a server and makes of its answers, without a socket: `Client` and `AsyncClient` do what is
yielded here, each in its way.

A flow is a generator. It yields what shall be done next (an `Effect`) and is sent what came of it: for a `Request` a
`Reply` or a `Failure`, for a `Read` the next bytes, b"" at the end, or a `Failure`. What interrupts a caller, as Ctrl-C
does, is thrown into the flow, so that it can cancel its job before it goes on its way.
"""

from __future__ import annotations

import base64
import codecs
import dataclasses
import email.utils
import json
import math
import os
import random
import re
import time
import urllib.parse
import uuid
from collections.abc import Callable, Collection, Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from diffusionz._client_errors import (
    ApiError,
    Conflict,
    ConnectionFailed,
    Gone,
    NotFound,
    UnexpectedAnswer,
    WaitTimeout,
    error_of,
)
from diffusionz._errors import ArgumentError, Cancelled, DiffusionzError

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy
    from numpy.typing import NDArray

T = TypeVar("T")

URL = "http://127.0.0.1:8100"
ENDED = ("completed", "failed", "cancelled")

CONNECT_S = 10.0
BACKOFF_S = 0.25  # before the first retry; doubles up to BACKOFF_MAX_S
BACKOFF_MAX_S = 8.0
RETRY_AFTER_MAX_S = 60.0  # who is told to wait longer than this raises the error, which says how long
POLL_S = 0.1  # between two looks at a job when its events do not come; grows up to POLL_MAX_S
POLL_MAX_S = 2.0
SILENCE_S = 15.0  # without a byte on a stream of events, where a comment comes every 10 seconds
FRUITLESS = 3  # event streams in a row that broke without a new event; then the job is polled
GOODBYE_S = 3.0  # what an interrupted caller waits at most for its job to be cancelled
PREVIEWS = 3  # of a picture, when on_preview is given and partial_images is not
LOAD_S = 600.0  # without a byte, while a model is loaded
REDIRECTS = 5
PAGE = 100  # lines of the billing history that are asked for at once

# Not now, but perhaps in a moment. Other answers will not change by asking again.
RETRIED = (429, 502, 503, 504)
# The answer of a gateway that cannot say whether the request arrived.
DOUBTFUL = (502, 504)


# --- What a flow yields ---


@dataclasses.dataclass(frozen=True)
class Request:
    """Its body is bytes, so that it can be sent again."""

    method: str
    url: str
    headers: dict[str, str] = dataclasses.field(repr=False)  # the key is there
    body: bytes | None = dataclasses.field(default=None, repr=False)
    timeout: float = 30.0
    """Seconds that the server may be silent."""
    stream: bool = False
    """Whether an answer of events is left open, for `Read`."""
    shielded: bool = False
    """Whether it is sent even by a task that is being cancelled."""


@dataclasses.dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str] = dataclasses.field(repr=False)
    body: bytes = b""
    stream: Any = None
    """What the driver reads an open answer from; None when `body` is all of it."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """No answer, or half of one."""

    reason: str
    sent: bool = True
    """Whether the request may have arrived."""


@dataclasses.dataclass(frozen=True)
class Read:
    reply: Reply


@dataclasses.dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclasses.dataclass(frozen=True)
class Tell:
    """Calls a function of the user, and awaits it if that is what it wants."""

    function: Callable[[Any], object]
    argument: Any


@dataclasses.dataclass(frozen=True)
class Emit:
    """Hands something to who iterates over the flow."""

    item: Any


Effect: TypeAlias = "Request | Read | Sleep | Tell | Emit"
Flow: TypeAlias = "Generator[Effect, Any, T]"


# --- What users see ---


class JobProgress(NamedTuple):
    """How far a job is."""

    stage: str
    """"queued", "running", or a stage of the engine: "text", "denoise", "decode", "forecast"."""
    step: int
    step_count: int
    """0 until it is known."""
    queue_position: int
    """Jobs that come first; 0 when it runs."""


class JobPreview(NamedTuple):
    """A picture on its way."""

    content: bytes
    """A file: WebP or PNG."""
    picture: int
    """Which picture of the job it is of, from 0."""
    number: int
    """Which preview of the picture it is."""
    step: int
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to a job."""

    type: str
    """"job.queued", "job.progress", "image_generation.partial_image", "image_generation.completed", and last one of
    "job.completed", "job.failed", "job.cancelled"."""
    data: dict[str, Any] = dataclasses.field(repr=False)

    @property
    def progress(self) -> JobProgress | None:
        """Of "job.queued" and "job.progress"."""
        if self.type == "job.queued":
            return JobProgress("queued", 0, 0, _whole(self.data.get("queue_position")))
        if self.type == "job.progress":
            return progress_of(self.data)
        return None

    @property
    def preview(self) -> JobPreview | None:
        """Of "image_generation.partial_image"."""
        if self.type != "image_generation.partial_image":
            return None
        try:
            content = base64.b64decode(self.data["b64_json"], validate=True)
        except (KeyError, TypeError, ValueError):
            return None
        numbers = (_whole(self.data.get(name)) for name in ("index", "partial_image_index", "step", "width", "height"))
        return JobPreview(content, *numbers)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a Chronos-2 expects, as plain lists."""

    mean: list[Any] = dataclasses.field(repr=False)
    """[prediction_length] numbers: the median. Of several targets, a list of such lists."""
    quantiles: dict[str, list[Any]] = dataclasses.field(repr=False)
    """Level, as "0.1" -> numbers, shaped as `mean`."""
    prediction_length: int
    summary: str
    """A sentence: "70,465 now, 71,020 expected after 7 steps (+0.8%), 80% between 66,900 and 75,300"."""
    trend: str | list[str] | None
    """"up", "down", "flat" or "anomaly" (`Forecast.trend` says when); of several targets a list; None when it was not
    asked for."""
    job_id: str = ""
    cost: dict[str, Any] | None = None
    """{"usd", "tokens", "charged"} of the whole call; None where nothing costs anything."""
    timings_ms: dict[str, float] = dataclasses.field(default_factory=dict, repr=False)
    """Of the whole call: "queue", "run", "total"."""

    def quantile(self, level: float) -> list[Any]:
        """Numbers of one level. Raises ArgumentError for one that was not asked for."""
        for there, values in self.quantiles.items():
            if abs(float(there) - level) < 1e-9:
                return values
        raise ArgumentError(f"the level {level:g} was not asked for; there are {', '.join(self.quantiles)}")


# --- Whom to talk to, and how ---


class Config:
    """Where the server is, and what is said to it in every request."""

    def __init__(
        self, base_url: str | None, api_key: str | None, timeout: float, max_retries: int, agent: str = "diffusionz"
    ) -> None:
        if base_url is None:
            base_url = os.environ.get("DIFFUSIONZ_URL") or URL
        if api_key is None:
            api_key = os.environ.get("DIFFUSIONZ_API_KEY") or None
        if "@" in base_url:  # and with it perhaps a password, which is not to be shown
            raise ArgumentError("base_url holds a user name; a server is asked with api_key")
        self.base_url = base_url.rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.base_url)
            self._origin = _origin(self.base_url)
        except ValueError as error:
            raise ArgumentError(f"base_url is {base_url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ArgumentError(f"base_url is {base_url!r}; it must be like {URL} or https://HOST")
        if api_key is not None:
            api_key = api_key.strip()
            if not re.fullmatch(r"[!-~]+", api_key):
                raise ArgumentError("api_key is empty, or has characters that no key has")
        if not timeout > 0:
            raise ArgumentError(f"timeout is {timeout}; it must be over 0 seconds")
        if max_retries < 0:
            raise ArgumentError(f"max_retries is {max_retries}; it must be 0 or more")
        self.timeout = float(timeout)
        self.max_retries = max_retries
        self._headers = {"Accept": "application/json", "User-Agent": agent}
        self._key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def request(
        self,
        method: str,
        where: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        stream: bool = False,
        shielded: bool = False,
    ) -> Request:
        """A request of a path of the server, or of a whole URL. The key goes to the server alone."""
        url = self.absolute(where)
        try:
            ours = _origin(url) == self._origin
        except ValueError:
            url = ""
        if not url.startswith(("http://", "https://")):
            raise UnexpectedAnswer(f"the server named a URL that cannot be asked: {where!r}")
        said = self._headers | (self._key if ours else {}) | dict(headers or {})
        if body is not None:
            said["Content-Type"] = "application/json"
        return Request(method, url, said, body, timeout or self.timeout, stream, shielded)

    def absolute(self, where: str) -> str:
        """A path of the server as a URL. One below a path of a proxy stays there."""
        return self.base_url + where if where.startswith("/") and not where.startswith("//") else where

    def redirected(self, request: Request, reply: Reply, elsewhere: bool) -> Request:
        """The request that an answer of 3xx asks for. Another host is asked when `elsewhere`, and not told the key."""
        try:
            url = urllib.parse.urljoin(request.url, reply.headers.get("location") or "")
            ours = _origin(url) == self._origin
            followed = url.startswith(("http://", "https://")) and (
                ours or (elsewhere and not (request.url.startswith("https:") and url.startswith("http:")))
            )
        except ValueError:
            followed, url = False, "a URL that is none"
        if not followed or (request.method != "GET" and reply.status not in (307, 308)):
            raise UnexpectedAnswer(
                f"{request.method} {request.url} was redirected to {url}, which is not followed; "
                "if the server has moved, give its new base_url",
                status=reply.status,
            )
        headers = {name: value for name, value in request.headers.items() if name not in self._key}
        return dataclasses.replace(request, url=url, headers=headers | (self._key if ours else {}))

    def pause(self, attempt: int, reply: Reply | None = None) -> float | None:
        """Seconds to wait before retry number `attempt`, from 0; None when the server wants more than is waited for."""
        asked = None if reply is None else retry_after(reply.headers)
        if asked is not None:
            if asked > RETRY_AFTER_MAX_S:
                return None
            # Those who were told the same do not come back in the same moment.
            return asked + random.uniform(0, min(1.0, 0.1 + 0.1 * asked))
        return min(BACKOFF_MAX_S, BACKOFF_S * 2.0**attempt) * random.uniform(0.5, 1.0)


class Deadline:
    """When a call has to be over."""

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and not timeout > 0:
            raise ArgumentError(f"timeout is {timeout}; it must be over 0 seconds")
        self._timeout = timeout
        self._at = float("inf") if timeout is None else time.monotonic() + timeout

    @property
    def left(self) -> float:
        return self._at - time.monotonic()

    def bound(self, seconds: float) -> float:
        """At most `seconds`, at most what is left, and enough for a try."""
        return max(0.05, min(seconds, self.left))

    def check(self, job_id: str | None = None) -> None:
        if self.left <= 0:
            self.over(job_id)

    def over(self, job_id: str | None = None) -> NoReturn:
        what = f"job {job_id}" if job_id else "the call"
        error = WaitTimeout(f"{what} was not done within {self._timeout:g} seconds")
        error.job_id = job_id
        raise error


@dataclasses.dataclass
class Trace:
    """What is known of a request that spends, when it is interrupted or answered."""

    in_flight: bool = False
    """Sent, and not answered: it may have arrived."""
    lost: bool = False
    """An earlier try of it may have arrived."""


def send(
    config: Config,
    request: Request,
    deadline: Deadline | None = None,
    *,
    trace: Trace | None = None,
    elsewhere: bool = False,
) -> Flow[Reply]:
    """Sends, again and again while that may help, and gives the last answer. Raises ConnectionFailed, WaitTimeout."""
    deadline, trace = deadline or Deadline(None), trace or Trace()
    attempt = redirects = 0
    while True:
        deadline.check()
        trace.in_flight = True
        answer = yield dataclasses.replace(request, timeout=deadline.bound(request.timeout))
        if isinstance(answer, Reply):
            trace.in_flight = answer.status in DOUBTFUL
            if answer.status in (301, 302, 303, 307, 308):
                redirects += 1
                if redirects > REDIRECTS:
                    raise UnexpectedAnswer(f"{request.url}: redirected {REDIRECTS} times", status=answer.status)
                request = config.redirected(request, answer, elsewhere)
                continue
            if answer.status not in RETRIED:
                return answer
        else:
            trace.in_flight = answer.sent
        pause = config.pause(attempt, answer if isinstance(answer, Reply) else None)
        if attempt >= config.max_retries or pause is None or pause >= deadline.left:
            if isinstance(answer, Reply):
                return answer
            if attempt < config.max_retries:
                deadline.over()
            raise ConnectionFailed(
                f"no answer from {_place(request.url)}: {answer.reason}. "
                "Is a server running there (diffusionz serve)? base_url= and DIFFUSIONZ_URL say where to look"
            )
        trace.lost = trace.lost or trace.in_flight
        attempt += 1
        yield Sleep(pause)


def ask(
    config: Config,
    method: str,
    path: str,
    fields: dict[str, Any] | None = None,
    *,
    query: Mapping[str, Any] | None = None,
    deadline: Deadline | None = None,
    timeout: float | None = None,
) -> Flow[dict[str, Any]]:
    """The JSON object that the server answers. Raises what its problem is, ConnectionFailed, WaitTimeout."""
    given = {name: str(value) for name, value in (query or {}).items() if value is not None}
    where = f"{path}?{urllib.parse.urlencode(given)}" if given else path
    body = None if fields is None else encode(fields)
    reply = yield from send(config, config.request(method, where, body=body, timeout=timeout), deadline)
    return object_of(config, reply)


def object_of(config: Config, reply: Reply) -> dict[str, Any]:
    """The JSON object of an answer. Raises the error that it is."""
    try:
        value = json.loads(reply.body)
    except (ValueError, RecursionError):
        value = None
    if reply.status >= 400:
        raise refused(config, reply, value)
    if not isinstance(value, dict) or not 200 <= reply.status < 300:
        raise UnexpectedAnswer(
            f"the answer is not the JSON that was expected: {_excerpt(reply.body)}",
            status=reply.status,
            request_id=reply.headers.get("x-request-id"),
        )
    return value


def refused(config: Config, reply: Reply, problem: Any = None) -> DiffusionzError:
    """The error that an answer of 4xx or 5xx is."""
    if not isinstance(problem, dict):  # of a gateway, or of another program
        problem = {"detail": f"the answer was {reply.status}: {_excerpt(reply.body)}"}
    if isinstance(problem.get("deposit_url"), str):
        problem["deposit_url"] = config.absolute(problem["deposit_url"])
    return error_of(
        problem,
        status=reply.status,
        request_id=reply.headers.get("x-request-id"),
        retry_after=retry_after(reply.headers),
    )


def download(config: Config, url: str) -> Flow[Reply]:
    """A file of the server, or of the provider that made it. Raises what the server's problem is, ConnectionFailed."""
    request = config.request("GET", url, headers={"Accept": "image/*, */*"})
    reply = yield from send(config, request, elsewhere=True)
    if reply.status != 200:
        raise refused(config, reply, _json_or_none(reply.body))
    return reply


def pages(config: Config, path: str, query: Mapping[str, Any]) -> Flow[None]:
    """Emits the lines of a list that comes in pages, newest first."""
    before: Any = None
    while True:
        answer = yield from ask(config, "GET", path, query={**query, "limit": PAGE, "before": before})
        lines = list_in(answer)
        for line in lines:
            yield Emit(line)
        last = before
        before = answer.get("next_before")
        if before is None or before == last:
            return


def load(config: Config, model: str, keep_alive: float | str | None) -> Flow[dict[str, Any]]:
    fields: dict[str, Any] = {"model": model}
    if keep_alive is not None:
        fields["keep_alive"] = keep_alive
    return (yield from ask(config, "POST", "/api/load", fields, timeout=max(config.timeout, LOAD_S)))


def list_in(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The list that an answer is made of, whatever its name."""
    lists = [value for value in answer.values() if isinstance(value, list)]
    if len(lists) != 1 or not all(isinstance(item, dict) for item in lists[0]):
        raise UnexpectedAnswer(f"the answer is not the list that was expected: {_excerpt(encode(answer))}")
    return lists[0]


# --- Jobs ---


@dataclasses.dataclass(frozen=True)
class Call:
    """A job that is asked for."""

    service: str
    fields: dict[str, Any]
    key: str
    timeout: float | None = None
    on_progress: Callable[[JobProgress], object] | None = None
    on_preview: Callable[[JobPreview], object] | None = None

    @property
    def many(self) -> bool | None:
        """Whether its pictures are a list; None: when there are several."""
        return None if self.service != "zimage" else "n" in self.fields

    @property
    def body(self) -> bytes:
        return encode({"service": self.service, **self.fields})


def renewed(key: str) -> str:
    """The next key of a call, always the same one: who repeats the call with `key` comes to the same job again."""
    head, mark, count = key.rpartition("~")
    return f"{head}~{int(count) + 1}" if mark and count.isdecimal() else f"{key}~1"


def submit(config: Config, call: Call, deadline: Deadline) -> Flow[tuple[dict[str, Any], str]]:
    """(the job as the server shows it, the key that it has). Interrupted, it cancels what may have arrived. Raises
    ApiError, ConnectionFailed, WaitTimeout."""
    body, key, trace = call.body, call.key, Trace()
    try:
        while True:
            request = config.request("POST", "/api/jobs", body=body, headers={"Idempotency-Key": key})
            reply = yield from send(config, request, deadline, trace=trace)
            # A try that seemed lost had arrived, and its job was lost in turn: the server says that nothing was
            # charged for it, or that it was given back.
            if reply.status != 409 or not trace.lost:
                break
            key, trace.lost = renewed(key), False
        job = object_of(config, reply)
        if not isinstance(job.get("id"), str) or job.get("status") is None:
            raise UnexpectedAnswer(f"the answer is not a job: {_excerpt(reply.body)}", status=reply.status)
        return job, key
    except ConnectionFailed as error:
        error.idempotency_key = key if trace.in_flight or trace.lost else None
        raise
    except (GeneratorExit, ApiError):
        raise
    except BaseException:
        if trace.in_flight:
            yield from _abandon(config, body, key)
        raise


def _abandon(config: Config, body: bytes, key: str) -> Flow[None]:
    """Cancels a job whose id never came: asking for it once more, with its key, tells it."""
    request = config.request(
        "POST", "/api/jobs", body=body, headers={"Idempotency-Key": key}, timeout=GOODBYE_S, shielded=True
    )
    reply = yield request
    if isinstance(reply, Reply) and reply.status < 300:
        job = _json_or_none(reply.body)
        if isinstance(job, dict) and isinstance(job.get("id"), str):
            yield from stop(config, job["id"])


def stop(config: Config, job_id: str) -> Flow[None]:
    """Cancels a job with one short try, for who has no time left."""
    path = f"{job_path(job_id)}/cancel"
    yield config.request("POST", path, timeout=GOODBYE_S, shielded=True)


def carry(config: Config, call: Call) -> Flow[dict[str, Any]]:
    """A job from its order to its end, as one call; gives the job, completed. Interrupted or out of time, it cancels
    the job. Raises what the job's problem is, ConnectionFailed, WaitTimeout."""
    deadline = Deadline(call.timeout)
    attempt = restarts = 0
    forgotten = False
    while True:
        try:
            job, key = yield from submit(config, call, deadline)
        except Conflict:
            if not forgotten:
                raise
            job, key = yield from submit(config, dataclasses.replace(call, key=renewed(call.key)), deadline)
        call = dataclasses.replace(call, key=key)
        try:
            job = yield from wait(config, job, deadline, call.on_progress, call.on_preview)
        except ConnectionFailed as error:
            error.idempotency_key = key
            raise
        except (NotFound, Gone):
            # The server was started anew, and knows the job no more. Asked with the same key it runs it once more, or
            # says that the key is used up, and that nothing was charged.
            if restarts >= config.max_retries:
                raise
            restarts += 1
            forgotten = True
            continue
        problem = job.get("problem")
        if job["status"] == "failed" and isinstance(problem, dict) and attempt < config.max_retries:
            # It failed, cost nothing, and the server says when it may go better.
            seconds = problem.get("retry_after_s")
            if isinstance(seconds, (int, float)) and 0 <= seconds <= RETRY_AFTER_MAX_S and seconds < deadline.left:
                yield Sleep(max(float(seconds), config.pause(attempt) or 0.0))
                attempt += 1
                call = dataclasses.replace(call, key=renewed(key))
                continue
        raise_for(job)
        return job


def wait(
    config: Config,
    job: dict[str, Any],
    deadline: Deadline,
    on_progress: Callable[[JobProgress], object] | None,
    on_preview: Callable[[JobPreview], object] | None,
    *,
    cancel_late: bool = True,
) -> Flow[dict[str, Any]]:
    """The job when it has ended, however. Interrupted, also by what a callback raises, it cancels the job; out of time
    too, when `cancel_late`. Raises ApiError, ConnectionFailed, WaitTimeout."""

    def emit(event: Event) -> Flow[None]:
        if on_progress is not None and (progress := event.progress) is not None:
            yield Tell(on_progress, progress)
        if on_preview is not None and (preview := event.preview) is not None:
            yield Tell(on_preview, preview)

    try:
        return (yield from follow(config, job, emit, deadline))
    except ConnectionFailed as error:
        error.job_id = job["id"]
        raise
    except (GeneratorExit, ApiError):
        raise
    except BaseException as error:
        if isinstance(error, WaitTimeout):
            error.job_id = job["id"]
        if cancel_late or not isinstance(error, WaitTimeout):
            yield from stop(config, job["id"])
        raise


def watch(config: Config, job: dict[str, Any], see: Callable[[Event], None]) -> Flow[None]:
    """Emits the job's events."""

    def emit(event: Event) -> Flow[None]:
        see(event)
        yield Emit(event)

    yield from follow(config, job, emit, Deadline(None))


def follow(
    config: Config, job: dict[str, Any], emit: Callable[[Event], Flow[None]], deadline: Deadline
) -> Flow[dict[str, Any]]:
    """Emits a job's events up to its end, and gives it as it ended.

    The events are streamed. When the line breaks, the job itself is looked at, which is what finds out about a server
    that is gone, and the stream is opened anew: what it tells again is not emitted again. Streams that bring nothing,
    as behind a proxy that holds them back, or that are refused, make way for looking at the job every now and then.
    """
    job_id: str = job["id"]
    path = job_path(job_id)
    if job.get("status") in ENDED and (job["status"] != "completed" or job.get("result") is not None):
        yield from emit(Event(f"job.{job['status']}", job))
        return job
    seen: set[int] = set()
    last_id: str | None = None
    fruitless = 0
    pause = POLL_S
    while True:
        deadline.check(job_id)
        if fruitless < FRUITLESS:
            patience = deadline.bound(min(config.timeout, SILENCE_S))
            began, silent = time.monotonic(), True
            headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"} | (
                {} if last_id is None else {"Last-Event-ID": last_id}
            )
            reply = yield config.request("GET", f"{path}/events", headers=headers, timeout=patience, stream=True)
            fruitless += 1
            if isinstance(reply, Reply) and reply.stream is None:
                if reply.status in (401, 403, 404, 410):
                    raise refused(config, reply, _json_or_none(reply.body))
                fruitless = FRUITLESS
            elif isinstance(reply, Reply):
                parser = EventParser()
                while isinstance(chunk := (yield Read(reply)), bytes) and chunk:
                    for name, data, id in parser.feed(chunk):
                        last_id, silent = id, False
                        if (mark := hash((name, data))) in seen:
                            continue
                        seen.add(mark)
                        fruitless = 0
                        fields = _json_or_none(data)
                        if not isinstance(fields, dict):
                            continue  # what is not understood is not told; the job's end is looked up below
                        ended = name.removeprefix("job.")
                        if ended in ENDED:
                            if fields.get("status") != ended or fields.get("id") != job_id:
                                break
                            yield from emit(Event(name, fields))
                            yield Read(reply)  # to the stream's end, so that the line can be used again
                            return fields
                        yield from emit(Event(name, fields))
                    deadline.check(job_id)
                    if deadline.left < patience / 2:
                        fruitless -= fruitless > 0
                        break  # and open it anew, to wait no longer than there is time
            if silent and time.monotonic() - began > 0.9 * SILENCE_S:
                fruitless = FRUITLESS
        now = yield from ask(config, "GET", path, deadline=deadline)
        status = now.get("status")
        if status in ENDED and fruitless:  # else the stream, opened anew, tells what else happened before the end
            yield from emit(Event(f"job.{status}", now))
            return now
        if fruitless >= FRUITLESS:
            event = _standing(now)
            if (mark := hash(event.progress)) not in seen:
                seen.add(mark)
                pause = POLL_S
                yield from emit(event)
            yield Sleep(deadline.bound(pause))
            pause = min(POLL_MAX_S, pause * 1.5)


def _standing(job: dict[str, Any]) -> Event:
    """The event that says what a job that was looked at is doing."""
    if job.get("status") == "queued":
        return Event("job.queued", {"id": job.get("id"), "queue_position": job.get("queue_position", 0)})
    progress = job.get("progress")
    return Event("job.progress", {"id": job.get("id"), **(progress if isinstance(progress, dict) else {})})


def raise_for(job: dict[str, Any]) -> None:
    """Raises what a job that has ended failed with."""
    job_id = str(job.get("id"))
    if job.get("status") == "cancelled":
        raise Cancelled(f"job {job_id} was cancelled; nothing was charged")
    if job.get("status") == "failed":
        problem = job.get("problem")
        raise error_of(problem if isinstance(problem, dict) else {"detail": "the job failed"}, job_id=job_id)


def job_path(job_id: str) -> str:
    return f"/api/jobs/{urllib.parse.quote(job_id, safe='')}"


class EventParser:
    """Server-sent events out of bytes that come in any pieces."""

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun: list[str] = []  # pieces of a line that has not ended; one event can be megabytes long
        self._after_cr = False
        self._first = True
        self._type = ""
        self._data: list[str] = []
        self._id: str | None = None

    def feed(self, chunk: bytes) -> list[tuple[str, str, str | None]]:
        """(type, data, last id) of the events that `chunk` completes."""
        text = self._text.decode(chunk)
        if text and self._first:
            text, self._first = text.removeprefix("\ufeff"), False
        if self._after_cr and text:  # the rest of a line end that was cut in two
            text = text.removeprefix("\n")
            self._after_cr = False
        events = []
        *lines, rest = re.split(r"\r\n|\r|\n", text)
        for line in lines:
            self._begun.append(line)
            if (event := self._line("".join(self._begun))) is not None:
                events.append(event)
            self._begun.clear()
        if rest:
            self._begun.append(rest)
        elif text.endswith("\r"):
            self._after_cr = True
        return events

    def _line(self, line: str) -> tuple[str, str, str | None] | None:
        if not line:
            event = (self._type or "message", "\n".join(self._data), self._id) if self._data else None
            self._type, self._data = "", []
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._type = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        return None


# --- Results ---


def result_of(job: dict[str, Any], picture: Callable[[dict[str, Any], dict[str, Any]], Any], many: bool | None) -> Any:
    """What a completed job delivered: pictures, made by `picture(entry, job)`, predictions, or the JSON as it is.

    `many`: whether pictures are a list; None for when there are several. Raises UnexpectedAnswer.
    """
    result: Any = job.get("result")
    try:
        if isinstance(result, dict) and isinstance(result.get("images"), list):
            pictures = [picture(entry, job) for entry in result["images"]]
            return pictures if (len(pictures) != 1 if many is None else many) else pictures[0]
        if job.get("service") == "chronos2":
            if isinstance(result, dict) and "results" in result:
                return [_prediction(entry, job) for entry in result["results"]]
            return _prediction(result, job)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UnexpectedAnswer(f"the result of job {job.get('id')} lacks something: {error!r}") from None
    return result


def _prediction(entry: dict[str, Any], job: dict[str, Any]) -> Prediction:
    quantiles: dict[str, list[Any]] = entry["quantiles"]
    mean: list[Any] = entry["mean"]
    if not isinstance(mean, list) or not all(isinstance(values, list) for values in quantiles.values()):
        raise TypeError("mean and quantiles must be lists")
    several = bool(mean) and isinstance(mean[0], list)
    return Prediction(
        mean,
        quantiles,
        entry.get("prediction_length") or len(mean[0] if several else mean),
        str(entry.get("summary", "")),
        entry.get("trend"),
        str(job.get("id", "")),
        job.get("cost"),
        job.get("timings_ms") or {},
    )


def progress_of(fields: Mapping[str, Any], queue_position: int = 0) -> JobProgress:
    stage = str(fields.get("stage") or "running")
    return JobProgress(stage, _whole(fields.get("step")), _whole(fields.get("step_count")), queue_position)


# --- Arguments ---


def encode(fields: dict[str, Any]) -> bytes:
    """JSON. Raises ArgumentError for what cannot be said in it."""
    try:
        return json.dumps(fields, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:  # UnicodeEncodeError, of half a surrogate pair, is a ValueError
        raise ArgumentError(f"a field cannot be sent as JSON: {error}") from None


def given(function: str, fields: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The fields that were given. Raises TypeError, as a call with an unknown parameter does."""
    for name in fields:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return {name: value for name, value in fields.items() if value is not None}


def call_of(service: str, fields: dict[str, Any]) -> Call:
    """The call of fields among which are the client's own: timeout, idempotency_key and the callbacks."""
    if not service or not isinstance(service, str):
        raise ArgumentError(f"service is {service!r}; pricing() lists those that there are")
    key = fields.pop("idempotency_key", None)
    if key is None:
        key = str(uuid.uuid4())
    elif not isinstance(key, str) or not re.fullmatch(r"[!-~]{1,200}", key):
        raise ArgumentError("idempotency_key must be 1 to 200 visible ASCII characters")
    timeout = fields.pop("timeout", None)
    on_progress, on_preview = fields.pop("on_progress", None), fields.pop("on_preview", None)
    if on_preview is not None and service == "zimage":
        fields.setdefault("partial_images", PREVIEWS)
    return Call(service, fields, key, timeout, on_progress, on_preview)


def image_call(prompt: str, n: int | None, fields: dict[str, Any]) -> Call:
    if "image" in fields:
        fields["image"] = picture_text(fields["image"])
    if n is not None:
        fields["n"] = n
    return call_of("zimage", {"prompt": prompt, **fields})


def forecast_call(values: Any, prediction_length: int, trend: bool, fields: dict[str, Any]) -> Call:
    fields = _forecast_fields(fields) | {"prediction_length": prediction_length, "trend": trend}
    return call_of("chronos2", {"values": numbers("values", values, nested=True)} | fields)


def batch_call(series: Any, prediction_length: int, trend: bool, fields: dict[str, Any]) -> Call:
    fields = _forecast_fields(fields) | {"prediction_length": prediction_length, "trend": trend}
    return call_of("chronos2", {"series": _series(series)} | fields)


def service_call(service: str, fields: dict[str, Any]) -> Call:
    """Of any service. What is known of our own services' fields is made ready for JSON."""
    image = fields.get("image")
    if image is not None and (service == "zimage" or not isinstance(image, str)):
        fields["image"] = picture_text(image)
    if service == "chronos2":
        fields = _forecast_fields(fields)
        if "values" in fields:
            fields["values"] = numbers("values", fields["values"], nested=True)
        if "series" in fields:
            fields["series"] = _series(fields["series"])
    return call_of(service, fields)


def _series(series: Any) -> list[list[Any]]:
    return [numbers(f"series[{i}]", values) for i, values in enumerate(_iterable("series", series))]


def _forecast_fields(fields: dict[str, Any]) -> dict[str, Any]:
    for name in ("past_covariates", "future_covariates"):
        if name in fields:
            if not isinstance(fields[name], Mapping):
                raise ArgumentError(f"{name} must be a dict of names and their numbers")
            fields[name] = {key: numbers(f"{name}[{key!r}]", values) for key, values in fields[name].items()}
    if "quantile_levels" in fields:
        fields["quantile_levels"] = numbers("quantile_levels", fields["quantile_levels"])
    return fields


def numbers(name: str, values: Any, *, nested: bool = False) -> list[Any]:
    """A list of numbers, None for NaN and for what else stands for missing, of whatever holds numbers: a list, an
    array, a column of a frame. `nested`: it may also be several such. Raises ArgumentError."""
    out: list[Any] = []
    for i, value in enumerate(_iterable(name, values)):
        if isinstance(value, float):
            out.append(value if value - value == 0 else _number(name, i, value))
        elif value is None:
            out.append(None)
        elif isinstance(value, int):
            out.append(int(value))
        elif nested and not isinstance(value, (str, bytes)) and hasattr(value, "__iter__") and _has_length(value):
            out.append(numbers(f"{name}[{i}]", value))
        else:
            out.append(_number(name, i, value))
    return out


def _iterable(name: str, values: Any) -> Any:
    if isinstance(values, (str, bytes, Mapping)) or hasattr(values, "columns") or not hasattr(values, "__iter__"):
        kind = type(values).__name__
        advice = "; take its columns, as frame['close']" if hasattr(values, "columns") else ""
        raise ArgumentError(f"{name} is a {kind}; it must be numbers in a list, an array or a column{advice}")
    for method in ("tolist", "to_list"):  # of numpy, pandas and torch; of polars. A list of floats is faster to look at
        if callable(convert := getattr(values, method, None)):
            values = convert()
            if not isinstance(values, list):
                raise ArgumentError(f"{name} is a single number; it must be a list of them")
            break
    return values


def _has_length(value: Any) -> bool:
    try:
        len(value)
    except TypeError:  # an array of no dimension
        return False
    return True


def _number(name: str, i: int, value: Any) -> float | None:
    """Of numpy's, decimal's and other numbers, and pandas' NA and NaT."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{name}[{i}] is {value!r:.80}; it must be a number, or None for missing") from None
    if math.isinf(number):
        raise ArgumentError(f"{name}[{i}] is {number}; it must be finite, or None for missing")
    return None if math.isnan(number) else number


def picture_text(image: Any) -> str:
    """A picture to start from, as it is sent: a data: URL as it is; base64 of a file, of bytes, of an `Image` or a
    `Picture`, of a PIL picture. Raises ArgumentError, OSError."""
    if isinstance(image, str) and image.startswith("data:"):
        return image
    if isinstance(image, (bytes, bytearray, memoryview)):
        content = bytes(image)
    elif isinstance(image, (str, os.PathLike)):
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            raise ArgumentError("image is a URL; give the Picture, or the file's bytes")
        with open(image, "rb") as file:
            content = file.read()
    elif isinstance(getattr(image, "content", None), bytes):
        content = image.content
    elif isinstance(getattr(image, "png", None), bytes):
        content = image.png
    elif callable(getattr(image, "save", None)) and hasattr(image, "mode"):
        import io

        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
    else:
        raise ArgumentError(
            f"image is a {type(image).__name__}; it must be a path, the bytes of a PNG or WebP file, a data: URL, "
            "an Image, a Picture or a PIL picture"
        )
    return base64.b64encode(content).decode()


def decoded(content: bytes) -> NDArray[numpy.uint8]:
    """uint8 [height, width, 3] of a file's bytes. Needs the engine. Raises ImageError."""
    import numpy

    from diffusionz.image import to_rgb

    rgb, width, height = to_rgb(content)
    return numpy.frombuffer(rgb, numpy.uint8).reshape(height, width, 3)


def save_as(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a WebP or PNG file's picture in the format of `path`, with the parameters that are in the file. Needs the
    engine. Raises ArgumentError, ImageError, OSError."""
    from diffusionz.image import Image, read_metadata, to_rgb

    rgb, width, height = to_rgb(content)
    about = json.dumps(read_metadata(content))
    Image(bytearray(rgb), width, height, seed=0, timings={}, metadata_json=about).save(path)


# --- Small ---


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After, which is a number of them or a date."""
    value = (headers.get("retry-after") or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    then = _date(value)
    if then is None:
        return None
    now = _date(headers.get("date") or "")  # the server's clock, which the date is of
    return max(0.0, then - (time.time() if now is None else now))


def _date(value: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _place(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _excerpt(body: bytes) -> str:
    text = body[:2000].decode("utf-8", "replace").strip()
    if re.match(r"(?i)<(!doctype|html)", text):
        title = re.search(r"(?is)<title>(.{1,80}?)</title>", text)
        return "a web page" + (f" ({title[1].strip()})" if title else "")
    text = " ".join(text.split())
    return (text[:160] + "..." if len(text) > 160 else text) or "nothing"


def _json_or_none(body: bytes | str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
