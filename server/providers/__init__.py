"""Services that run elsewhere, for whoever has a key there. Without one they are not there: not priced, not listed.

    async with providers.opened(settings, prices) as services: ...

The key is in the environment alone (FAL_KEY). Where calls are sold it suffices. A server that gives its work away also
needs `[providers.fal]` in its settings, so that a key which happens to be in somebody's environment pays for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from diffusionz import ArgumentError
from diffusionz.server.providers.breaker import Breaker
from diffusionz.server.providers.fal import Fal, FalSettings
from diffusionz.server.providers.flux_image import FluxImage
from diffusionz.server.providers.ltx_video import LtxVideo
from diffusionz.server.providers.remote import Remote
from diffusionz.server.providers.web import origin_of
from diffusionz.server.settings import Settings, is_loopback_host

logger = logging.getLogger(__name__)

KEY = "FAL_KEY"


@contextlib.asynccontextmanager
async def opened(
    settings: Settings, prices: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
) -> AsyncIterator[list[Remote]]:
    """The services elsewhere that this server has. prices: what is for sale, where calls cost something. Raises
    ArgumentError for settings that cannot work."""
    if not isinstance(settings.providers, Mapping):
        raise ArgumentError("providers must be a table, such as [providers.fal]")
    if unknown := sorted(set(settings.providers) - {"fal"}):
        raise ArgumentError(f"providers.{unknown[0]} is no provider; there is fal")
    fal = fal_settings(settings.providers.get("fal", {}))
    key = environ.get(KEY, "").strip()
    asked = "fal" in settings.providers
    if not key and asked:
        logger.warning("providers.fal is off: %s is not in the environment", KEY)
    if not key or not (asked or settings.mode == "payments"):
        yield []
        return
    if not re.fullmatch(r"[!-~]{1,512}", key):
        raise ArgumentError(f"{KEY} has characters that are in no key")
    provider = Fal(fal, key, loopback=is_loopback_host(urlsplit(fal.base_url).hostname or ""))
    try:
        services = []
        for name in fal.services:
            if prices is None or name in prices:
                services.append(_service(name, provider, fal, settings))
        for service in services:
            if prices is not None and prices[service.name].unit != service.unit:
                unit = prices[service.name].unit
                raise ArgumentError(f"prices.{service.name}.unit is {unit!r}; the service counts {service.unit!r}")
        yield services
    finally:
        await provider.close()


def _service(name: str, provider: Fal, fal: FalSettings, settings: Settings) -> Remote:
    # A breaker each: that one model fails says nothing of the others.
    breaker = Breaker(name, fal.failures, fal.pause_s)
    if name == "flux_image":
        return FluxImage(provider, settings.limits, breaker, model=fal.flux_image, file_bytes=fal.image_bytes)
    return LtxVideo(
        provider, settings.limits, breaker, model=fal.ltx_video, model_from_image=fal.ltx_video_from_image,
        longest_s=fal.ltx_video_s, file_bytes=fal.video_bytes,
    )  # fmt: skip


def fal_settings(values: Any) -> FalSettings:
    """Of `[providers.fal]`. Raises ArgumentError."""
    where = "providers.fal"
    if not isinstance(values, Mapping):
        raise ArgumentError(f"{where} is {values!r}; it must be a table")
    default = FalSettings()
    known = {field.name for field in dataclasses.fields(FalSettings)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            # A value is not shown: who looks for the key's place may have put it here.
            raise ArgumentError(f"{where}.{name} is no setting; {hint}; the key is in {KEY} alone")
        given[name] = _checked(f"{where}.{name}", value, getattr(default, name))
    made = FalSettings(**given)
    if unknown := [name for name in made.services if name not in default.services]:
        raise ArgumentError(f"{where}.services has {unknown[0]!r}; there are {', '.join(default.services)}")
    for name in ("flux_image", "ltx_video", "ltx_video_from_image"):
        if not re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9._-]*[A-Za-z0-9]){1,5}", getattr(made, name)):
            raise ArgumentError(
                f"{where}.{name} is {getattr(made, name)!r}; it must be a model such as fal-ai/flux/schnell"
            )
    for host in made.media_hosts:
        if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", host):
            raise ArgumentError(f"{where}.media_hosts has {host!r}; it must be a name such as fal.media")
    parts = urlsplit(made.base_url)
    loopback = is_loopback_host(parts.hostname or "")
    if origin_of(made.base_url) is None or (parts.scheme != "https" and not loopback) or parts.query or parts.fragment:
        raise ArgumentError(f"{where}.base_url must be https://HOST, or http:// on this machine")
    return made


def _checked(where: str, value: Any, default: Any) -> Any:
    """A setting of the type that its default has."""
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise ArgumentError(f"{where} is {value!r}; it must be a list of strings")
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise ArgumentError(f"{where} is {value!r}; it must be a string")
    allowed = (int, float) if isinstance(default, float) else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or value <= 0:
        kind = "number" if isinstance(default, float) else "whole number"
        raise ArgumentError(f"{where} is {value!r}; it must be a {kind} above 0")
    return value
