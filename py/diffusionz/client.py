"""A server of diffusionz, from Python: pictures, forecasts, jobs and the account.

    from diffusionz import Client

    cutedsl = Client("https://cutedsl.cc", api_key="cutedsl_...")     # or DIFFUSIONZ_URL and DIFFUSIONZ_API_KEY
    forecast = cutedsl.chronos2(values=[112, 118, 132, 129, 121, 135], prediction_length=3)
    print(forecast.summary, forecast.trend)
    cutedsl.zimage(prompt=f"line chart showing {forecast.summary}").save("chart.webp")

`AsyncClient` is the same with `await` and `async for`, under asyncio or trio.

Every call that spends is a job of the server, with an Idempotency-Key of its own: it is sent again when the line breaks
and is paid once. Ctrl-C, a cancelled task, a `timeout` that is over and an exception out of a callback cancel the job,
which then costs nothing.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast, overload

from diffusionz import _client_core as core
from diffusionz._client_core import Event as Event
from diffusionz._client_core import JobPreview as JobPreview
from diffusionz._client_core import JobProgress as JobProgress
from diffusionz._client_core import Prediction as Prediction
from diffusionz._client_errors import ApiError as ApiError
from diffusionz._client_errors import Conflict as Conflict
from diffusionz._client_errors import ConnectionFailed as ConnectionFailed
from diffusionz._client_errors import Draining as Draining
from diffusionz._client_errors import EngineError as EngineError
from diffusionz._client_errors import Forbidden as Forbidden
from diffusionz._client_errors import Gone as Gone
from diffusionz._client_errors import IdempotencyMismatch as IdempotencyMismatch
from diffusionz._client_errors import InsufficientCredit as InsufficientCredit
from diffusionz._client_errors import InternalServerError as InternalServerError
from diffusionz._client_errors import InvalidRequest as InvalidRequest
from diffusionz._client_errors import JobTimeout as JobTimeout
from diffusionz._client_errors import LedgerUnavailable as LedgerUnavailable
from diffusionz._client_errors import MethodNotAllowed as MethodNotAllowed
from diffusionz._client_errors import ModelUnavailable as ModelUnavailable
from diffusionz._client_errors import NotAcceptable as NotAcceptable
from diffusionz._client_errors import NotFound as NotFound
from diffusionz._client_errors import ProviderError as ProviderError
from diffusionz._client_errors import ProviderTimeout as ProviderTimeout
from diffusionz._client_errors import QueueFull as QueueFull
from diffusionz._client_errors import RateLimited as RateLimited
from diffusionz._client_errors import RateUnavailable as RateUnavailable
from diffusionz._client_errors import ServerError as ServerError
from diffusionz._client_errors import ServerOutOfMemory as ServerOutOfMemory
from diffusionz._client_errors import TooLarge as TooLarge
from diffusionz._client_errors import TooManyRequests as TooManyRequests
from diffusionz._client_errors import Unauthorized as Unauthorized
from diffusionz._client_errors import Unavailable as Unavailable
from diffusionz._client_errors import UnexpectedAnswer as UnexpectedAnswer
from diffusionz._client_errors import UnsupportedMediaType as UnsupportedMediaType
from diffusionz._client_errors import WaitTimeout as WaitTimeout
from diffusionz._errors import ArgumentError
from diffusionz._errors import Cancelled as Cancelled

if TYPE_CHECKING:
    import types

    import httpx2
    import numpy
    from numpy.typing import NDArray
    from typing_extensions import Self, Unpack

    Path = str | os.PathLike[str]

T = TypeVar("T")

CONNECTIONS = 256  # at once; further requests wait for one
KEPT_S = 4.0  # an idle connection; servers close theirs after 5 seconds, and a request must not meet that

MIME_TYPES = {".webp": "image/webp", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


class CallOptions(TypedDict, total=False):
    """What each call of a service takes beside the service's own fields. None is as good as not given."""

    timeout: float | None
    """Seconds for all of it, the queue too; then the job is cancelled. None: as long as the server lets a job take."""
    idempotency_key: str | None
    """Calls with the same key and the same fields are one call: they get one answer and pay once. One is made
    without."""
    on_progress: Callable[[JobProgress], object] | None
    """Called as the job moves on; with AsyncClient it may be a coroutine function."""


class ImageFields(CallOptions, total=False):
    """The fields of a picture. Those that are not given are as the server and the model have them."""

    width: int | None
    """Multiples of 16; the model's own without. Likewise `height`."""
    height: int | None
    steps: int | None
    """8."""
    seed: int | None
    """Picture i has seed + i; a random one without."""
    guidance: float | None
    """Classifier-free guidance; 0, which is off."""
    negative_prompt: str | None
    """What to keep away from; used with guidance."""
    image: object
    """A picture to start from: a path, the bytes of a PNG or WebP file, a data: URL, an `Image`, a `Picture`, or a PIL
    picture."""
    strength: float | None
    """With `image`: the share of the steps that run."""
    format: Literal["webp", "png"] | None
    quality: int | None
    """Of lossy WebP; 90."""
    partial_images: int | None
    """Previews; 3 when on_preview is given."""
    model: str | None
    """A name that `models` lists; the server's default without."""
    keep_alive: float | str | None
    """How long the model stays loaded afterwards: seconds, "10m", 0, or -1 for ever."""
    on_preview: Callable[[JobPreview], object] | None
    """Called with pictures on their way; with AsyncClient it may be a coroutine function."""


class ForecastFields(CallOptions, total=False):
    """The fields of a forecast beside its series."""

    quantile_levels: Any
    """[0.1, 0.5, 0.9]; ascending, each over 0 and under 1."""
    context_length: int | None
    """Steps of history to read."""
    monotone: bool | None
    """Sort each step's quantiles, so that they never cross."""
    constrain_ohlc: bool | None
    """Four series are open, high, low and close: high is the highest, low the lowest. They are the targets of
    `chronos2`, and each four series of `chronos2_batch`."""
    returns: bool | None
    """Forecast log returns, give prices."""
    model: str | None
    """A name that `models` lists; the server's default without."""
    keep_alive: float | str | None
    """How long the model stays loaded afterwards: seconds, "10m", 0, or -1 for ever."""


class CovariateFields(ForecastFields, total=False):
    past_covariates: Any
    """{name: numbers}, each as long as the series."""
    future_covariates: Any
    """{name: numbers} of the steps to forecast; their past is in past_covariates."""


# --- Pictures ---


class _Picture:
    url: str
    """Where the server keeps it for a while: an hour, unless set otherwise. Whoever has the URL can see it."""
    seed: int | None
    """The seed that drew it, also when none was given; None for a service that has none."""
    width: int | None
    """Pixels."""
    height: int | None
    """Pixels."""
    content_type: str
    """"image/webp", "image/png", or what a provider made."""
    job_id: str
    cost: dict[str, Any] | None
    """{"usd", "tokens", "charged"} of the whole call; None where nothing costs anything."""
    timings_ms: dict[str, float]
    """Of the whole call: "queue", "run", "total"."""

    def __init__(self, config: core.Config, entry: dict[str, Any], job: dict[str, Any]) -> None:
        import base64

        self.url = config.absolute(entry.get("url") or "")
        self.seed, self.width, self.height = entry.get("seed"), entry.get("width"), entry.get("height")
        path = urllib.parse.urlsplit(self.url).path
        self.content_type = entry.get("content_type") or MIME_TYPES.get(os.path.splitext(path)[1].lower(), "")
        self.job_id = str(job.get("id", ""))
        self.cost = job.get("cost")
        self.timings_ms = job.get("timings_ms") or {}
        encoded = entry.get("b64_json")
        self._content: bytes | None = base64.b64decode(encoded, validate=True) if encoded else None
        if self._content is None and not self.url:
            raise KeyError("url")

    def _write(self, path: Path, content: bytes) -> None:
        from diffusionz.image import FORMATS, write_atomically

        extension = os.path.splitext(os.fspath(path))[1].lower()
        readable = self.content_type in ("image/webp", "image/png")
        if MIME_TYPES.get(extension, "") == self.content_type:
            write_atomically(path, content)
        elif readable and extension in FORMATS:
            core.save_as(path, content)
        else:
            names = FORMATS if readable else [name for name, kind in MIME_TYPES.items() if kind == self.content_type]
            advice = f"it must end in {' or '.join(names)}" if names else "write its bytes, `content`, yourself"
            kind = self.content_type or "of no known type"
            raise ArgumentError(f'"{os.fspath(path)}" ends in "{extension}", but the picture is {kind}; {advice}')

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.width}x{self.height}, seed {self.seed}: {self.url}>"


class Picture(_Picture):
    """A picture that a server has drawn."""

    def __init__(self, client: Client, entry: dict[str, Any], job: dict[str, Any]) -> None:
        super().__init__(client._config, entry, job)
        self._client = client

    @property
    def content(self) -> bytes:
        """The bytes of the file. They are fetched when first asked for. Raises Gone or NotFound when the server keeps
        it no more, ApiError, ConnectionFailed."""
        if self._content is None:
            self._content = self._client._download(self.url)
        return self._content

    @property
    def pixels(self) -> NDArray[numpy.uint8]:
        """uint8 [height, width, 3]. The engine decodes it, which reads WebP and PNG. Raises ImageError, and what
        `content` raises."""
        return core.decoded(self.content)

    def save(self, path: Path) -> None:
        """Writes the file to `path`. WebP and PNG become each other when the extension says so, which takes the engine.

        The file appears whole or not at all. Raises ArgumentError for another extension, OSError, and what `content`
        raises.
        """
        self._write(path, self.content)

    def _repr_html_(self) -> str:
        import base64
        import html

        data = base64.b64encode(self.content).decode()
        return f'<img src="data:{html.escape(self.content_type)};base64,{data}">'


class AsyncPicture(_Picture):
    """A picture that a server has drawn, for `AsyncClient`."""

    def __init__(self, client: AsyncClient, entry: dict[str, Any], job: dict[str, Any]) -> None:
        super().__init__(client._config, entry, job)
        self._client = client

    async def read(self) -> bytes:
        """The bytes of the file; see `Picture.content`."""
        if self._content is None:
            self._content = await self._client._download(self.url)
        return self._content

    async def pixels(self) -> NDArray[numpy.uint8]:
        """See `Picture.pixels`."""
        return core.decoded(await self.read())

    async def save(self, path: Path) -> None:
        """See `Picture.save`."""
        self._write(path, await self.read())


# --- Jobs ---


class _Job:
    def __init__(self, config: core.Config, state: dict[str, Any], many: bool | None) -> None:
        self._config = config
        self._state = state
        self._many = many

    @property
    def id(self) -> str:
        return str(self._state["id"])

    @property
    def service(self) -> str:
        return str(self._state.get("service", ""))

    @property
    def status(self) -> str:
        """One of "queued", "running", "completed", "failed", "cancelled", as far as is known here; `refresh` asks."""
        return str(self._state.get("status", ""))

    @property
    def done(self) -> bool:
        """Whether it has ended, as far as is known here."""
        return self.status in core.ENDED

    @property
    def progress(self) -> JobProgress:
        """How far it is, as far as is known here."""
        fields = self._state.get("progress")
        position = self._state.get("queue_position")
        return core.progress_of(
            fields if isinstance(fields, dict) else {"stage": self.status}, position if isinstance(position, int) else 0
        )

    @property
    def problem(self) -> dict[str, Any] | None:
        """Why it failed; `result` raises it."""
        return self._state.get("problem")

    @property
    def cost(self) -> dict[str, Any] | None:
        """{"usd", "tokens", "charged"}; None where nothing costs anything."""
        return self._state.get("cost")

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds: "queue", "run", "total"."""
        return self._state.get("timings_ms") or {}

    @property
    def created_at(self) -> float:
        """Seconds since 1970."""
        return float(self._state.get("created_at", 0.0))

    def _see(self, event: Event) -> None:
        """Keeps what an event says."""
        if event.type.removeprefix("job.") in core.ENDED:
            self._state = event.data
        elif event.type == "job.queued":
            self._state |= {"status": "queued", "queue_position": event.data.get("queue_position", 0)}
        elif event.type == "job.progress":
            progress = {name: event.data.get(name) for name in ("stage", "step", "step_count")}
            self._state |= {"status": "running", "queue_position": 0, "progress": progress}

    def _wait(
        self,
        on_progress: Callable[[JobProgress], object] | None,
        on_preview: Callable[[JobPreview], object] | None,
        timeout: float | None,
    ) -> core.Flow[None]:
        self._state = yield from core.wait(
            self._config, self._state, core.Deadline(timeout), on_progress, on_preview, cancel_late=False
        )

    def _result(self, picture: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Any:
        core.raise_for(self._state)
        return core.result_of(self._state, picture, self._many)

    def _cancel(self) -> core.Flow[None]:
        yield from core.ask(self._config, "POST", f"{core.job_path(self.id)}/cancel")
        self._state = yield from core.ask(self._config, "GET", core.job_path(self.id))

    def _refresh(self) -> core.Flow[None]:
        self._state = yield from core.ask(self._config, "GET", core.job_path(self.id))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {self.service} {self.status}>"


class Job(_Job):
    """Work that a server was asked for. `Client.submit` makes it."""

    def __init__(self, client: Client, state: dict[str, Any], many: bool | None = None) -> None:
        super().__init__(client._config, state, many)
        self._client = client

    def refresh(self) -> Job:
        """Asks the server how it stands. Raises NotFound when it is kept no more, ApiError, ConnectionFailed."""
        self._client._run(self._refresh())
        return self

    def wait(
        self,
        on_progress: Callable[[JobProgress], object] | None = None,
        on_preview: Callable[[JobPreview], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> Job:
        """Returns itself when it has ended, however it ended: `job.wait().result()`.

        Previews are there when it was submitted with `partial_images`. Ctrl-C and what a callback raises cancel the
        job; when `timeout` is over, it goes on. Raises WaitTimeout, NotFound when it is kept no more, ApiError,
        ConnectionFailed.
        """
        self._client._run(self._wait(on_progress, on_preview, timeout))
        return self

    def events(self) -> Iterator[Event]:
        """What happens to it, from now to its end. Leaving the loop leaves the job alone. Raises NotFound when it is
        kept no more, ApiError, ConnectionFailed."""
        return self._client._iterate(core.watch(self._config, self._state, self._see))

    def cancel(self) -> Job:
        """Stops it within a step; it then costs nothing. Quiet when it has ended. Raises as `refresh`."""
        self._client._run(self._cancel())
        return self

    def result(self, *, timeout: float | None = None) -> Any:
        """What it delivered, waited for if need be: a `Picture` (a list of them when `n` was given), a `Prediction`
        (a list for a batch), or the JSON of another service.

        Raises Cancelled, what it failed with (an ApiError), and what `wait` raises.
        """
        if not self.done:
            self.wait(timeout=timeout)
        return self._result(self._client._picture)


class AsyncJob(_Job):
    """Work that a server was asked for. `AsyncClient.submit` makes it."""

    def __init__(self, client: AsyncClient, state: dict[str, Any], many: bool | None = None) -> None:
        super().__init__(client._config, state, many)
        self._client = client

    async def refresh(self) -> AsyncJob:
        """See `Job.refresh`."""
        await self._client._run(self._refresh())
        return self

    async def wait(
        self,
        on_progress: Callable[[JobProgress], object] | None = None,
        on_preview: Callable[[JobPreview], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncJob:
        """See `Job.wait`. A task that is cancelled while it waits cancels the job."""
        await self._client._run(self._wait(on_progress, on_preview, timeout))
        return self

    def events(self) -> AsyncIterator[Event]:
        """See `Job.events`."""
        return self._client._iterate(core.watch(self._config, self._state, self._see))

    async def cancel(self) -> AsyncJob:
        """See `Job.cancel`."""
        await self._client._run(self._cancel())
        return self

    async def result(self, *, timeout: float | None = None) -> Any:
        """See `Job.result`."""
        if not self.done:
            await self.wait(timeout=timeout)
        return self._result(self._client._picture)


# --- Clients ---


class _Client:
    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        max_retries: int = 5,
    ) -> None:
        """
        Parameters:
            base_url: of the server; None for DIFFUSIONZ_URL, else http://127.0.0.1:8100.
            api_key: None for DIFFUSIONZ_API_KEY, else none, which is enough where nothing costs anything. It is sent to
                this server alone.
            timeout: seconds that the server may be silent. A call as a whole has a `timeout` of its own.
            max_retries: how often a request is sent again when no answer came, or 429, 502, 503 or 504, with growing
                pauses, or after the time that the server asks for.

        Raises ArgumentError.
        """
        from importlib.metadata import PackageNotFoundError, version

        try:
            agent = f"diffusionz/{version('diffusionz')}"
        except PackageNotFoundError:  # the folder is used as it is
            agent = "diffusionz"
        self._config = core.Config(base_url, api_key, timeout, max_retries, agent)

    @property
    def base_url(self) -> str:
        return self._config.base_url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"  # never with the key


class Client(_Client):
    """A server of diffusionz. Threads may share one. It is a context manager, or `close` ends its connections.

    Every method raises ApiError, or the class below it that says what is wrong (see `diffusionz.client`), and
    ConnectionFailed; those that call a service also ArgumentError for values that cannot be sent, and WaitTimeout when
    their `timeout` is over.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        max_retries: int = 5,
    ) -> None:
        super().__init__(base_url, api_key, timeout=timeout, max_retries=max_retries)
        import httpx2

        self._http = httpx2.Client(limits=_limits())

    __init__.__doc__ = _Client.__init__.__doc__

    # --- Services ---

    @overload
    def zimage(self, prompt: str, *, n: None = None, **fields: Unpack[ImageFields]) -> Picture: ...
    @overload
    def zimage(self, prompt: str, *, n: int, **fields: Unpack[ImageFields]) -> list[Picture]: ...
    def zimage(self, prompt: str, *, n: int | None = None, **fields: Any) -> Picture | list[Picture]:
        """Draws a picture; with `n`, that many, as a list.

        `fields` are those of `ImageFields`: width, height, steps, seed, guidance, negative_prompt, image, strength,
        format, quality, partial_images, model, keep_alive; on_progress, on_preview, timeout, idempotency_key.

        Raises InvalidRequest, InsufficientCredit, and whatever else calls raise.
        """
        call = core.image_call(prompt, n, core.given("zimage", fields, ImageFields.__optional_keys__))
        return cast("Picture | list[Picture]", self._call(call))

    def chronos2(
        self, values: Any, prediction_length: int = 16, *, trend: bool = True, **fields: Unpack[CovariateFields]
    ) -> Prediction:
        """Forecasts a series, or several of one length that inform each other.

        `values` are numbers, oldest first, in a list, an array or a column of a frame; NaN and None are missing.
        `trend` asks for `Prediction.trend`, which takes a second pass of the model. `fields` are those of
        `CovariateFields`: quantile_levels, past_covariates, future_covariates, context_length, monotone,
        constrain_ohlc, returns, model, keep_alive; on_progress, timeout, idempotency_key.

        Raises InvalidRequest, InsufficientCredit, and whatever else calls raise.
        """
        known = core.given("chronos2", fields, CovariateFields.__optional_keys__)
        return cast(Prediction, self._call(core.forecast_call(values, prediction_length, trend, known)))

    def chronos2_batch(
        self, series: Any, prediction_length: int = 16, *, trend: bool = False, **fields: Unpack[ForecastFields]
    ) -> list[Prediction]:
        """Forecasts many series, each for itself, in one call; their lengths may differ.

        With `constrain_ohlc`, each four are the open, high, low and close of one candle. Each series is a forecast to
        pay. `fields` are those of `ForecastFields`. See `chronos2`.
        """
        known = core.given("chronos2_batch", fields, ForecastFields.__optional_keys__)
        return cast("list[Prediction]", self._call(core.batch_call(series, prediction_length, trend, known)))

    def service(self, service: str, /, **fields: Any) -> Any:
        """Calls any service of `pricing` by its name, with its own fields and those of `CallOptions`. Returns the
        result as the service's JSON has it; pictures as `Picture`."""
        return self._call(core.service_call(service, core.given("service", fields, fields)))

    # --- Jobs ---

    def submit(self, service: str, /, **fields: Any) -> Job:
        """Asks for a service and returns at once. `fields` are the service's own, and idempotency_key."""
        call = core.service_call(service, core.given("submit", fields, fields))
        _no_callbacks(call)
        state, _ = self._run(core.submit(self._config, call, core.Deadline(call.timeout)))
        return Job(self, state, call.many)

    def job(self, id: str) -> Job:
        """A job by its id. Raises NotFound when there is none, or when it is another account's."""
        return Job(self, self._run(core.ask(self._config, "GET", core.job_path(id))))

    def jobs(self) -> list[Job]:
        """The caller's latest jobs, newest first."""
        return [Job(self, state) for state in core.list_in(self._run(core.ask(self._config, "GET", "/api/jobs")))]

    # --- Account ---

    def pricing(self) -> dict[str, Any]:
        """What each service costs in USD and in tokens, at this moment's rate."""
        return self._run(core.ask(self._config, "GET", "/api/pricing"))

    def balance(self, wallet: str | None = None) -> dict[str, Any]:
        """What the account has; `wallet` must be one of its own. Raises Unauthorized, Forbidden."""
        return self._run(core.ask(self._config, "GET", "/api/balance", query={"wallet": wallet}))

    def billing_history(self, wallet: str | None = None) -> Iterator[dict[str, Any]]:
        """The lines of the account, newest first, asked for page by page as they are read."""
        return self._iterate(core.pages(self._config, "/api/billing-history", {"wallet": wallet}))

    def deposit(self) -> dict[str, Any]:
        """The address to deposit to, the token, and what is arriving."""
        return self._run(core.ask(self._config, "GET", "/api/deposit"))

    # --- Models ---

    def models(self) -> list[dict[str, Any]]:
        """The models that can be asked for; "id" is the name."""
        return core.list_in(self._run(core.ask(self._config, "GET", "/v1/models")))

    def ps(self) -> list[dict[str, Any]]:
        """The models that are loaded: "name", "size_vram", "running", "expires_at" and so on."""
        return core.list_in(self._run(core.ask(self._config, "GET", "/api/ps")))

    def load(self, model: str, keep_alive: float | str | None = None) -> dict[str, Any]:
        """Loads a model and returns when it is there; the operator may. Raises Forbidden, ModelUnavailable."""
        return self._run(core.load(self._config, model, keep_alive))

    def unload(self, model: str) -> dict[str, Any]:
        """Lets a model go once nothing runs on it; the operator may. Raises Forbidden, NotFound."""
        return self._run(core.ask(self._config, "POST", "/api/unload", {"model": model}))

    def close(self) -> None:
        """Ends the connections. Jobs that were submitted go on."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        where: types.TracebackType | None = None,
    ) -> None:
        self.close()

    # --- Doing what flows yield ---

    def _call(self, call: core.Call) -> Any:
        return core.result_of(self._run(core.carry(self._config, call)), self._picture, call.many)

    def _picture(self, entry: dict[str, Any], job: dict[str, Any]) -> Picture:
        return Picture(self, entry, job)

    def _download(self, url: str) -> bytes:
        return self._run(core.download(self._config, url)).body

    def _run(self, flow: core.Flow[T]) -> T:
        line = _Line(self._http)
        try:
            effect = flow.send(None)
            while True:
                try:
                    answer = line.do(effect)
                except BaseException as error:  # the flow cancels its job, and raises it again
                    effect = flow.throw(error)
                else:
                    effect = flow.send(answer)
        except StopIteration as end:
            return cast(T, end.value)
        finally:
            line.hang_up()

    def _iterate(self, flow: core.Flow[None]) -> Iterator[Any]:
        line = _Line(self._http)
        try:
            effect = flow.send(None)
            while True:
                if isinstance(effect, core.Emit):
                    yield effect.item
                    effect = flow.send(None)
                else:
                    effect = flow.send(line.do(effect))
        except StopIteration:
            return
        finally:
            flow.close()
            line.hang_up()


class AsyncClient(_Client):
    """A server of diffusionz, for asyncio and trio: `Client` with `await` and `async for`.

    Its methods take and raise what those of `Client` do. It is an asynchronous context manager, or `aclose` ends its
    connections. A task that is cancelled in a call cancels its job.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        max_retries: int = 5,
    ) -> None:
        super().__init__(base_url, api_key, timeout=timeout, max_retries=max_retries)
        import httpx2

        self._http = httpx2.AsyncClient(limits=_limits())

    __init__.__doc__ = _Client.__init__.__doc__

    # --- Services ---

    @overload
    async def zimage(self, prompt: str, *, n: None = None, **fields: Unpack[ImageFields]) -> AsyncPicture: ...
    @overload
    async def zimage(self, prompt: str, *, n: int, **fields: Unpack[ImageFields]) -> list[AsyncPicture]: ...
    async def zimage(self, prompt: str, *, n: int | None = None, **fields: Any) -> AsyncPicture | list[AsyncPicture]:
        """See `Client.zimage`."""
        known = core.given("zimage", await _read_pictures(fields), ImageFields.__optional_keys__)
        return cast("AsyncPicture | list[AsyncPicture]", await self._call(core.image_call(prompt, n, known)))

    async def chronos2(
        self, values: Any, prediction_length: int = 16, *, trend: bool = True, **fields: Unpack[CovariateFields]
    ) -> Prediction:
        """See `Client.chronos2`."""
        known = core.given("chronos2", fields, CovariateFields.__optional_keys__)
        return cast(Prediction, await self._call(core.forecast_call(values, prediction_length, trend, known)))

    async def chronos2_batch(
        self, series: Any, prediction_length: int = 16, *, trend: bool = False, **fields: Unpack[ForecastFields]
    ) -> list[Prediction]:
        """See `Client.chronos2_batch`."""
        known = core.given("chronos2_batch", fields, ForecastFields.__optional_keys__)
        return cast("list[Prediction]", await self._call(core.batch_call(series, prediction_length, trend, known)))

    async def service(self, service: str, /, **fields: Any) -> Any:
        """See `Client.service`."""
        fields = await _read_pictures(fields)
        return await self._call(core.service_call(service, core.given("service", fields, fields)))

    # --- Jobs ---

    async def submit(self, service: str, /, **fields: Any) -> AsyncJob:
        """See `Client.submit`."""
        fields = await _read_pictures(fields)
        call = core.service_call(service, core.given("submit", fields, fields))
        _no_callbacks(call)
        state, _ = await self._run(core.submit(self._config, call, core.Deadline(call.timeout)))
        return AsyncJob(self, state, call.many)

    async def job(self, id: str) -> AsyncJob:
        """See `Client.job`."""
        return AsyncJob(self, await self._run(core.ask(self._config, "GET", core.job_path(id))))

    async def jobs(self) -> list[AsyncJob]:
        """See `Client.jobs`."""
        answer = await self._run(core.ask(self._config, "GET", "/api/jobs"))
        return [AsyncJob(self, state) for state in core.list_in(answer)]

    # --- Account ---

    async def pricing(self) -> dict[str, Any]:
        """See `Client.pricing`."""
        return await self._run(core.ask(self._config, "GET", "/api/pricing"))

    async def balance(self, wallet: str | None = None) -> dict[str, Any]:
        """See `Client.balance`."""
        return await self._run(core.ask(self._config, "GET", "/api/balance", query={"wallet": wallet}))

    def billing_history(self, wallet: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """See `Client.billing_history`."""
        return self._iterate(core.pages(self._config, "/api/billing-history", {"wallet": wallet}))

    async def deposit(self) -> dict[str, Any]:
        """See `Client.deposit`."""
        return await self._run(core.ask(self._config, "GET", "/api/deposit"))

    # --- Models ---

    async def models(self) -> list[dict[str, Any]]:
        """See `Client.models`."""
        return core.list_in(await self._run(core.ask(self._config, "GET", "/v1/models")))

    async def ps(self) -> list[dict[str, Any]]:
        """See `Client.ps`."""
        return core.list_in(await self._run(core.ask(self._config, "GET", "/api/ps")))

    async def load(self, model: str, keep_alive: float | str | None = None) -> dict[str, Any]:
        """See `Client.load`."""
        return await self._run(core.load(self._config, model, keep_alive))

    async def unload(self, model: str) -> dict[str, Any]:
        """See `Client.unload`."""
        return await self._run(core.ask(self._config, "POST", "/api/unload", {"model": model}))

    async def aclose(self) -> None:
        """See `Client.close`."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        where: types.TracebackType | None = None,
    ) -> None:
        await self.aclose()

    # --- Doing what flows yield ---

    async def _call(self, call: core.Call) -> Any:
        return core.result_of(await self._run(core.carry(self._config, call)), self._picture, call.many)

    def _picture(self, entry: dict[str, Any], job: dict[str, Any]) -> AsyncPicture:
        return AsyncPicture(self, entry, job)

    async def _download(self, url: str) -> bytes:
        return (await self._run(core.download(self._config, url))).body

    async def _run(self, flow: core.Flow[T]) -> T:
        line = _AsyncLine(self._http)
        try:
            effect = flow.send(None)
            while True:
                try:
                    answer = await line.do(effect)
                except BaseException as error:  # the flow cancels its job, and raises it again
                    effect = flow.throw(error)
                else:
                    effect = flow.send(answer)
        except StopIteration as end:
            return cast(T, end.value)
        finally:
            await line.hang_up()

    async def _iterate(self, flow: core.Flow[None]) -> AsyncIterator[Any]:
        line = _AsyncLine(self._http)
        try:
            effect = flow.send(None)
            while True:
                if isinstance(effect, core.Emit):
                    yield effect.item
                    effect = flow.send(None)
                else:
                    effect = flow.send(await line.do(effect))
        except StopIteration:
            return
        finally:
            flow.close()
            await line.hang_up()


# --- The wire ---


class _Line:
    """Does the effects of one flow. An answer that is open is closed by the next request, or at the end."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http
        self._open: httpx2.Response | None = None

    def do(self, effect: core.Effect) -> Any:
        if isinstance(effect, core.Request):
            return self._send(effect)
        if isinstance(effect, core.Read):
            return self._read(effect.reply)
        if isinstance(effect, core.Sleep):
            import time

            time.sleep(effect.seconds)
        elif isinstance(effect, core.Tell):
            effect.function(effect.argument)
        return None

    def hang_up(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _send(self, request: core.Request) -> core.Reply | core.Failure:
        import httpx2

        self.hang_up()
        prepared = _prepared(self._http, request)
        try:
            response = self._http.send(prepared, stream=True)
            if request.stream and _is_stream(response):
                self._open = response
                return core.Reply(response.status_code, response.headers, stream=response.iter_bytes())
            try:
                return core.Reply(response.status_code, response.headers, response.read())
            finally:
                response.close()
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return _failure(error)

    def _read(self, reply: core.Reply) -> bytes | core.Failure:
        import httpx2

        try:
            return cast(bytes, next(reply.stream, b""))
        except httpx2.HTTPError as error:
            return _failure(error)


class _AsyncLine:
    """`_Line`, awaited."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self._open: httpx2.Response | None = None

    async def do(self, effect: core.Effect) -> Any:
        if isinstance(effect, core.Request):
            if not effect.shielded:
                return await self._send(effect)
            import anyio

            with anyio.CancelScope(shield=True):
                return await self._send(effect)
        if isinstance(effect, core.Read):
            return await self._read(effect.reply)
        if isinstance(effect, core.Sleep):
            import anyio

            await anyio.sleep(effect.seconds)
        elif isinstance(effect, core.Tell):
            answer = effect.function(effect.argument)
            if hasattr(answer, "__await__"):
                await answer
        return None

    async def hang_up(self) -> None:
        if self._open is not None:
            import anyio

            response, self._open = self._open, None
            with anyio.CancelScope(shield=True):
                await response.aclose()

    async def _send(self, request: core.Request) -> core.Reply | core.Failure:
        import httpx2

        await self.hang_up()
        prepared = _prepared(self._http, request)
        try:
            response = await self._http.send(prepared, stream=True)
            if request.stream and _is_stream(response):
                self._open = response
                return core.Reply(response.status_code, response.headers, stream=response.aiter_bytes())
            try:
                return core.Reply(response.status_code, response.headers, await response.aread())
            finally:
                await response.aclose()
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return _failure(error)

    async def _read(self, reply: core.Reply) -> bytes | core.Failure:
        import httpx2

        try:
            return cast(bytes, await anext(reply.stream, b""))
        except httpx2.HTTPError as error:
            return _failure(error)


def _limits() -> httpx2.Limits:
    import httpx2

    return httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=20, keepalive_expiry=KEPT_S)


def _prepared(http: httpx2.Client | httpx2.AsyncClient, request: core.Request) -> httpx2.Request:
    import httpx2

    seconds = httpx2.Timeout(request.timeout, connect=min(core.CONNECT_S, request.timeout), pool=None)
    return http.build_request(
        request.method, request.url, headers=request.headers, content=request.body, timeout=seconds
    )


def _is_stream(response: httpx2.Response) -> bool:
    kind = response.headers.get("content-type", "")
    return response.status_code == 200 and kind.partition(";")[0].strip().lower() == "text/event-stream"


def _failure(error: Exception) -> core.Failure:
    """In words alone: the exception holds the request, and that the key."""
    import httpx2

    reason = str(error).strip().rstrip(".") or type(error).__name__
    unsent = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol)
    if isinstance(error, httpx2.TimeoutException):
        reason = "it could not be reached in time" if isinstance(error, unsent) else "it was silent for too long"
    return core.Failure(reason, sent=not isinstance(error, (*unsent, httpx2.InvalidURL)))


def _no_callbacks(call: core.Call) -> None:
    if call.on_progress is not None or call.on_preview is not None:
        raise ArgumentError("submit() returns at once; on_progress and on_preview are parameters of the job's wait()")


async def _read_pictures(fields: dict[str, Any]) -> dict[str, Any]:
    """With an `AsyncPicture` as its bytes."""
    image = fields.get("image")
    return fields | {"image": await image.read()} if isinstance(image, AsyncPicture) else fields
