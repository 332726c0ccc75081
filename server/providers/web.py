"""HTTP to a provider: bounded in size and time, to known hosts alone, with retries where they are safe."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2
import orjson

import diffusionz

TRIES = 4
BACKOFF_S = 0.2  # before the second try; it doubles
BACKOFF_MAX_S = 3.0
REDIRECTS = 3
JSON_BYTES = 2 * 2**20
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that may be others at the next try

# Nothing of the request had left when these were raised.
_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class Unanswered(Exception):
    """No whole answer came, or one that must not be read. `timeout`: it took too long. `sent`: the request may have
    arrived, so that asking again may be asking twice."""

    def __init__(self, what: str, *, timeout: bool = False, sent: bool = True) -> None:
        super().__init__(what)
        self.timeout = timeout
        self.sent = sent


class TooLarge(Unanswered):
    """More came than is taken."""


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Raises Unanswered for what is no JSON object."""
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            raise Unanswered("answered something that is not JSON") from None
        if not isinstance(value, dict):
            raise Unanswered("answered JSON that is no object")
        return value

    @property
    def retry_after_s(self) -> float | None:
        text = self.headers.get("retry-after", "")
        return float(text) if text.isascii() and text.isdecimal() and len(text) < 6 else None


class Web:
    """A client for one provider.

    Keys are given to each request rather than to the client: files come from other hosts, which must not see them.
    No redirect is followed with a key, and none to a host that is not `allowed`.
    """

    def __init__(self, *, connect_s: float, connections: int, proxies: bool) -> None:
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=connect_s, pool=connect_s),  # the rest is bounded by `exchange`
            # Idle connections are let go before the other side closes them: a request that is sent into a closed one
            # cannot be told from one that arrived, and would not be tried again.
            limits=httpx2.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=4
            ),
            follow_redirects=False,
            trust_env=proxies,
            headers={"user-agent": f"diffusionz/{diffusionz.__version__}", "accept-encoding": "identity"},
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def exchange(
        self,
        method: str,
        url: str,
        *,
        seconds: float,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        most_bytes: int = JSON_BYTES,
    ) -> Answer:
        """One request and its whole answer, within `seconds` however slowly it drips. Raises Unanswered."""
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream(method, url, headers=dict(headers or {}), content=content) as response,
            ):
                return Answer(response.status_code, response.headers, await _body(response, most_bytes))
        except TimeoutError:
            raise Unanswered(f"did not answer within {seconds:g} seconds", timeout=True) from None
        except _UNSENT as error:
            slow = isinstance(error, httpx2.TimeoutException)
            raise Unanswered("cannot be reached", timeout=slow, sent=False) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError):
            # httpx's own message may name the URL, and its exception holds the request with the key.
            raise Unanswered("broke the connection off") from None

    async def submit(self, url: str, *, seconds: float, headers: Mapping[str, str], content: bytes) -> Answer:
        """A POST that starts work, and money. It is tried again only while no connection came about, so that it
        arrives once at most. Raises Unanswered."""
        for attempt in range(TRIES):
            try:
                return await self.exchange("POST", url, seconds=seconds, headers=headers, content=content)
            except Unanswered as error:
                if error.sent or attempt == TRIES - 1:
                    raise
            await asyncio.sleep(_backoff_s(attempt))
        raise AssertionError("unreachable")

    async def repeat(
        self,
        method: str,
        url: str,
        *,
        seconds: float,
        headers: Mapping[str, str] | None = None,
        passing: frozenset[int] = PASSING,
        most_bytes: int = JSON_BYTES,
    ) -> Answer:
        """A request that may be repeated, until it is answered with a status that is not `passing`. Returns the last
        answer. Raises Unanswered."""
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            pause_s = _backoff_s(attempt)
            try:
                answer = await self.exchange(method, url, seconds=seconds, headers=headers, most_bytes=most_bytes)
                if answer.status not in passing or last:
                    return answer
                pause_s = max(pause_s, min(answer.retry_after_s or 0, BACKOFF_MAX_S))
            except TooLarge:
                raise  # it would come again
            except Unanswered:
                if last:
                    raise
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    async def download(self, url: str, allowed: Hosts, *, seconds: float, most_bytes: int) -> Answer:
        """A file, over redirects to allowed hosts. Raises Unanswered."""
        async with _within(seconds):
            for _ in range(REDIRECTS + 1):
                if not allowed.has(url):
                    raise Unanswered("names a file at an address that is not among its own")
                answer = await self.repeat("GET", url, seconds=seconds, most_bytes=most_bytes)
                if answer.status not in (301, 302, 303, 307, 308):
                    return answer
                url = urljoin(url, answer.headers.get("location", ""))
        raise Unanswered("redirects without end")


class Hosts:
    """Where files may be fetched from: https at the names of a list and those below them, at the usual port. Who
    answers has to prove the name with its certificate, so that a name which leads into a private network fails.

    With `origin`, for a provider on this machine: at that scheme, host and port, and nowhere else.
    """

    def __init__(self, names: tuple[str, ...], origin: str | None = None) -> None:
        self._names = names
        self._origin = origin

    def has(self, url: str) -> bool:
        if self._origin is not None:
            return origin_of(url) == self._origin
        origin = origin_of(url)
        if origin is None or not origin.startswith("https://") or not origin.endswith(":443"):
            return False
        host = origin[len("https://") : -len(":443")]
        return any(host == name or host.endswith("." + name) for name in self._names)


def origin_of(url: str) -> str | None:
    """scheme://host:port of a URL; None for one that is not plain HTTP, or hides something."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or not url.isascii():
        return None
    if any(character in url for character in "\\ \t\r\n"):  # read differently by different readers
        return None
    return f"{parts.scheme}://{parts.hostname.rstrip('.')}:{port or {'http': 80, 'https': 443}[parts.scheme]}"


async def _body(response: httpx2.Response, most_bytes: int) -> bytes:
    """The body as it came; a compressed one, which was not asked for, could grow beyond all limits."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Unanswered("sends a compressed body, which was not asked for")
    length = response.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and int(length) > most_bytes:
        raise TooLarge(f"sends more than {most_bytes} bytes")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > most_bytes:
            raise TooLarge(f"sends more than {most_bytes} bytes")
    return bytes(body)


@contextlib.asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """asyncio.timeout that raises Unanswered."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unanswered(f"did not send a file within {seconds:g} seconds", timeout=True) from None


def _backoff_s(attempt: int) -> float:
    # Jittered: those who failed together must not come back together.
    return min(BACKOFF_S * 2.0**attempt, BACKOFF_MAX_S) * random.uniform(0.5, 1.5)
