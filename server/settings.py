"""How the server is set up: one Settings, of the command line and, for what is long, a TOML file.

settings = load("server.toml", free=True, port=8100)

[models.zimage-turbo]
family = "zimage"
model = "Tongyi-MAI/Z-Image-Turbo"
precision = "fp8"

[limits]
steps = 20
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Any

import tomllib

from diffusionz import ArgumentError
from diffusionz._context import byte_count
from diffusionz.server.limits import Limits
from diffusionz.server.models import FAMILIES, Spec, parse_keep_alive
from diffusionz.server.problems import Problem

PORT = 8100
_OPTIONS = {
    "zimage": {"device", "precision", "max_vram", "cuda_graphs", "threads"},
    "chronos2": {"device", "precision", "threads", "lora", "working_memory_bytes"},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times in seconds."""

    host: str = "127.0.0.1"
    port: int = PORT
    free: bool = False
    """Nothing costs anything, and nobody is asked who he is."""
    free_for_all: bool = False
    """The same for other machines' callers, too."""
    dev: bool = False
    """A chain and a ledger of its own, with a faucet; in `dev_folder`, or a temporary one."""
    payments: str | None = None
    """The ledger's settings, payments.toml."""
    models: tuple[Spec, ...] = (
        Spec("zimage-demo", "zimage", "zimage-demo"),
        Spec("chronos2-demo", "chronos2", "chronos2-demo"),
    )
    preload: tuple[str, ...] = ()
    keep_alive: float | str = 240
    """How long a model stays loaded after its last use."""
    memory_budget: int | str | None = None
    """Of all models' weights: bytes, or "8GB". None: no limit."""
    admin_token: str | None = dataclasses.field(default=None, repr=False)
    """Opens /metrics, /api/load and /api/unload from elsewhere."""
    public_url: str | None = None
    """Where the outside reaches the server, when that is not where it listens: behind a proxy."""
    trusted_proxies: str | None = None
    """Addresses whose X-Forwarded-For is believed, with commas."""
    drain_s: float = 30.0
    """For running jobs, when the server is asked to stop."""
    access_log: bool = False
    log_format: str = "json"
    limits: Limits = dataclasses.field(default_factory=Limits)
    providers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def mode(self) -> str:
        """Who pays: "free", "dev" or "payments"."""
        return next(name for name in ("free", "dev", "payments") if getattr(self, name))

    @property
    def https(self) -> bool:
        return (self.public_url or "").startswith("https://")

    @property
    def device_count(self) -> int:
        """How many pictures can be drawn at once: the devices of the model that has most."""
        return max(
            [len(str(spec.options.get("device", "")).split(",")) for spec in self.models if spec.family == "zimage"],
            default=1,
        )

    def __post_init__(self) -> None:
        """Raises ArgumentError."""
        if not 0 <= self.port <= 65535:
            raise ArgumentError(f"port is {self.port}; it must be 0..65535")
        modes = [name for name in ("free", "dev", "payments") if getattr(self, name)]
        if self.free_for_all and not self.free:
            raise ArgumentError("free_for_all is said without free")
        if len(modes) > 1:
            raise ArgumentError(f"{' and '.join(modes)} exclude each other: choose who pays")
        if not modes:
            raise ArgumentError(
                "who pays is not said: --payments payments.toml sells calls, --free gives them away to this machine, "
                "--dev tries everything on a chain of its own"
            )
        if ((self.free and not self.free_for_all) or self.dev) and not is_loopback_host(self.host):
            raise ArgumentError(
                f"host is {self.host}, which other machines reach, and a --{modes[0]} server gives its work away"
                + ("; say --free-for-all if that is meant" if self.free else "")
            )
        if self.public_url is not None and not re.fullmatch(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?", self.public_url):
            raise ArgumentError(f"public_url is {self.public_url!r}; it must be https://HOST or http://HOST:PORT")
        if not self.models:
            raise ArgumentError("no models are given")
        names = [spec.name for spec in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ArgumentError(f"two models are called {name!r}")
        for name in self.preload:
            if name not in names:
                raise ArgumentError(f"preload has {name!r}; the models are: {', '.join(names)}")
        byte_count("memory_budget", self.memory_budget)
        try:
            parse_keep_alive(self.keep_alive)
        except Problem as problem:
            raise ArgumentError(str(problem)) from None


def load(path: str | None = None, **given: Any) -> Settings:
    """The settings of a file, where there is one, and what is given beside it, which wins; None is not given. Raises
    ArgumentError, OSError."""
    values: dict[str, Any] = {}
    if path is not None:
        with open(path, "rb") as file:
            try:
                values = tomllib.load(file)
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ArgumentError(f"{path}: {error}") from None
    known = {field.name for field in dataclasses.fields(Settings)}
    for key in values:
        if key not in known:
            raise ArgumentError(f"{path}: {_unknown(key, known)}")
    if "limits" in values:
        values["limits"] = _limits(values["limits"], path)
    if "models" in values:
        values["models"] = tuple(_spec(name, about, path) for name, about in values["models"].items())
    for key in ("preload",):
        if key in values:
            values[key] = tuple(values[key])
    values |= {key: value for key, value in given.items() if value is not None}
    values.setdefault("admin_token", os.environ.get("DIFFUSIONZ_ADMIN_TOKEN"))
    for field in dataclasses.fields(Settings):
        if field.name in values and field.type in ("int", "bool", "str", "float"):
            allowed = {"int": int, "bool": bool, "str": str, "float": (int, float)}[field.type]
            if not isinstance(values[field.name], allowed) or (
                field.type == "int" and isinstance(values[field.name], bool)
            ):  # type: ignore[arg-type]
                raise ArgumentError(f"{field.name} is {values[field.name]!r}; it must be a {field.type}")
    return Settings(**values)


def is_loopback_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _limits(values: Any, path: str | None) -> Limits:
    if not isinstance(values, Mapping):
        raise ArgumentError(f"{path}: limits is {values!r}; it must be a table")
    known = {field.name for field in dataclasses.fields(Limits)}
    for key, value in values.items():
        if key not in known:
            raise ArgumentError(f"{path}: limits: {_unknown(key, known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ArgumentError(f"{path}: limits.{key} is {value!r}; it must be a number above 0")
    return Limits(**values)


def _spec(name: str, about: Any, path: str | None) -> Spec:
    if not isinstance(about, Mapping) or about.get("family") not in FAMILIES or not isinstance(about.get("model"), str):
        raise ArgumentError(
            f"{path}: models.{name} must say family ({' or '.join(FAMILIES)}) and model (a folder, a name, a hub id)"
        )
    options = {key: value for key, value in about.items() if key not in ("family", "model")}
    for key in options:
        if key not in _OPTIONS[about["family"]]:
            raise ArgumentError(f"{path}: models.{name}: {_unknown(key, _OPTIONS[about['family']])}")
    return Spec(name, about["family"], about["model"], options)


def _unknown(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"{key!r} is no setting" + (
        f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(known))}"
    )
