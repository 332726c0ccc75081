"""The page for people: `/`, `/forecast`, `/account`, `/docs`, `/problems/{type}`, and the files that they load.

    app = Starlette(routes=[*page.routes(page.Context(version="0.3.0", limits=limits, free=True)), ...])

Nothing here knows a request's user: a page is the same bytes for everybody, rendered and compressed once, and the
script in it asks the API for what is the user's. So a page costs as much as a constant answer does.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.resources
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from diffusionz.server.limits import Limits
from diffusionz.server.page.samples import samples
from diffusionz.server.problems import KINDS, Problem

# Everything comes from here. No script or style is written into a page, so nothing that gets into one can run; the
# pictures of a job in progress come as data: URLs, those that a visitor chooses as blob: ones.
CSP = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "cross-origin-opener-policy": "same-origin-allow-popups",  # wallets that open a window answer to it
    "vary": "accept-encoding",
}

FOLDER = pathlib.Path(__file__).parent
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_ORIGIN = re.compile(r"https?://([a-z0-9.-]{1,253}|\[[0-9a-f:]+\])(:[0-9]{1,5})?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Context:
    """What the pages say of the server.

    free: no accounts, nothing costs. dev: a chain of our own, with the wallet and the faucet that come with it.
    models: name and family ("zimage" or "chronos2") of each, its family's default first; width and height of a picture.
    services: name, unit, per, usd of each, as /api/pricing has them. token: symbol and decimals.
    """

    version: str
    limits: Limits
    free: bool = False
    dev: bool = False
    models: Sequence[Mapping[str, Any]] = ()
    services: Sequence[Mapping[str, Any]] = ()
    token: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Content:
    """Bytes that are sent as they are, or compressed."""

    def __init__(self, content: bytes, media_type: str) -> None:
        self.content, self.media_type = content, media_type
        self.gzip = gzip.compress(content, 9, mtime=0)
        self.etag = hashlib.blake2b(content, digest_size=12).hexdigest()

    def response(self, request: Request, *, cache: str = "no-cache", status: int = 200) -> Response:
        """The answer to `request`; 304 when it has this content already."""
        compressed = "gzip" in request.headers.get("accept-encoding", "")
        etag = f'"{self.etag}{"-gz" if compressed else ""}"'
        headers = HEADERS | {"etag": etag, "cache-control": cache}
        if status == 200 and request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        if compressed:
            headers["content-encoding"] = "gzip"
        return Response(self.gzip if compressed else self.content, status, headers, self.media_type)


class Pages:
    """The pages of one context."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.static = _static_files()
        # One name for all files together, as they import each other by relative names.
        self.digest = hashlib.blake2b(
            b"".join(name.encode() + file.content for name, file in sorted(self.static.items())), digest_size=8
        ).hexdigest()
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        families: dict[str, list[Mapping[str, Any]]] = {"zimage": [], "chronos2": []}
        for model in context.models:
            families.setdefault(model["family"], []).append(model)
        environment.globals.update(
            {field.name: getattr(context, field.name) for field in dataclasses.fields(context)},
            static=f"/static/{self.digest}",
            painters=families["zimage"],
            forecasters=families["chronos2"],
            problems=KINDS,
        )
        self._templates = environment
        self.draw = self.render("draw.html", here="/")
        self.forecast = self.render("forecast.html", here="/forecast")
        self.account = self.render("account.html", here="/account")
        self.problems = {
            type: self.render("problem.html", here="", type=type, kind=kind) for type, kind in KINDS.items()
        }
        # A visitor chooses the Host that the samples name, so how many are kept is bounded.
        self.docs = functools.lru_cache(maxsize=16)(self._docs)

    def render(self, template: str, **values: Any) -> Content:
        text = self._templates.get_template(template).render(values)
        return Content(text.encode(), "text/html; charset=utf-8")

    def _docs(self, origin: str) -> Content:
        return self.render("docs.html", here="/docs", samples=samples(origin, keyed=not self.context.free))


def routes(context: Context) -> list[BaseRoute]:
    pages = Pages(context)

    async def docs(request: Request) -> Response:
        origin = str(request.base_url).rstrip("/")
        # The samples are for a shell: a Host that is none must not come into one.
        return pages.docs(origin if _ORIGIN.fullmatch(origin) else "http://127.0.0.1:8000").response(request)

    async def problem(request: Request) -> Response:
        type = request.path_params["type"]
        if type not in pages.problems:
            raise Problem("not-found", "there is no such type of problem; /docs#errors lists them")
        return pages.problems[type].response(request)

    async def static(request: Request) -> Response:
        file = pages.static.get(request.path_params["name"])
        if file is None:
            raise Problem("not-found", "there is no such file")
        # A page of an earlier version gets today's file, for this once.
        current = request.path_params["digest"] == pages.digest
        return file.response(request, cache="public, max-age=31536000, immutable" if current else "no-cache")

    async def icon(request: Request) -> Response:
        return pages.static["icon.svg"].response(request)

    def page(path: str, content: Content) -> Route:
        async def answer(request: Request) -> Response:
            return content.response(request)

        return Route(path, answer, name=f"page:{path}", include_in_schema=False)

    return [
        page("/", pages.draw),
        page("/forecast", pages.forecast),
        page("/account", pages.account),
        Route("/docs", docs, include_in_schema=False),
        Route("/problems/{type}", problem, include_in_schema=False),
        Route("/static/{digest}/{name}", static, include_in_schema=False),
        Route("/favicon.ico", icon, include_in_schema=False),
    ]


def _static_files() -> dict[str, Content]:
    files = {path.name: path.read_bytes() for path in (FOLDER / "static").iterdir() if path.suffix in TYPES}
    files["airline.csv"] = (importlib.resources.files("diffusionz") / "data" / "airline.csv").read_bytes()
    return {name: Content(content, TYPES[pathlib.Path(name).suffix]) for name, content in files.items()}
