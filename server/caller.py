"""Who calls: an account of the ledger, by its key or by the cookie of a browser that signed in; or anybody, where
nothing costs anything."""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import TYPE_CHECKING

from starlette.requests import Request

from diffusionz.server.problems import Problem

if TYPE_CHECKING:
    from diffusionz.payments.keys import Key
    from diffusionz.server.credits import Credits

COOKIE = "diffusionz_session"


@dataclasses.dataclass(frozen=True)
class Caller:
    """An account, and the key that spoke for it; None: the browser of its owner, or a server without credit."""

    account: str
    key: Key | None = None


ANYBODY = Caller("anybody")


class Callers:
    """Tells who makes a request."""

    def __init__(self, credits: Credits | None) -> None:
        self._credits = credits

    async def caller(self, request: Request) -> Caller:
        """Raises Problem, when it is nobody."""
        if self._credits is None:
            return ANYBODY
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if secret:
            if scheme.lower() != "bearer":
                raise Problem("unauthorized", f"the Authorization is {scheme[:20]!r}; it must be Bearer KEY")
            return await self.of_key(secret.strip())
        owner = await self.owner(request)
        if owner is None:
            raise Problem("unauthorized", "no API key: send Authorization: Bearer KEY, or sign in at /account")
        return owner

    async def of_key(self, secret: str) -> Caller:
        from diffusionz.payments.errors import IdentityError

        assert self._credits is not None
        try:
            key = await self._credits.authenticate(secret)
        except IdentityError as error:
            raise Problem("unauthorized", str(error)) from None
        return Caller(key.account, key)

    async def owner(self, request: Request) -> Caller | None:
        """The account whose owner signed in with this browser, by its cookie. Raises Problem when another site asks."""
        cookie = request.cookies.get(COOKIE)
        if cookie is None or self._credits is None:
            return None
        account = await self._credits.session(cookie)
        if account is None:
            return None
        if request.method not in ("GET", "HEAD") and not _same_origin(request):
            raise Problem("forbidden", "a browser's cookie is good for requests of this site's own pages alone")
        return Caller(account)


def _same_origin(request: Request) -> bool:
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin", "")
    return origin.partition("://")[2] == request.headers.get("host")


def is_loopback(request: Request) -> bool:
    """Whether the request comes from this machine itself, and not through a proxy on it."""
    if any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip")):
        return False
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return request.client is not None and request.client.host == ""  # a Unix socket
