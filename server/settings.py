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
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import tomllib

from diffusionz import ArgumentError, DiffusionzError
from diffusionz._context import byte_count
from diffusionz.server.limits import Limits
from diffusionz.server.models import FAMILIES, Spec, parse_keep_alive
from diffusionz.server.problems import Problem

PORT = 8100
_OPTIONS = {
    "zimage": {"device": "str", "precision": "str", "max_vram": "int | str", "cuda_graphs": "bool", "threads": "int"},
    "chronos2": {"device": "str", "precision": "str", "threads": "int", "lora": "str", "working_memory_bytes": "int"},
}
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "str": (str,), "float": (float, int)}


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
        """Raises ArgumentError; DiffusionzError for what is not in this version."""
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
        for spec in self.models:
            precision, known = spec.options.get("precision", "auto"), FAMILIES[spec.family]._PRECISIONS
            if precision == "nvfp4":
                raise DiffusionzError(no_nvfp4())
            if precision not in known:
                raise ArgumentError(f"{spec.name}: precision is {precision!r}; it must be one of {', '.join(known)}")
        byte_count("memory_budget", self.memory_budget)
        if not 0 <= self.drain_s <= 86400:
            raise ArgumentError(f"drain_s is {self.drain_s:g}; it must be 0..86400 seconds")
        if self.log_format not in ("json", "text"):
            raise ArgumentError(f"log_format is {self.log_format!r}; it must be json or text")
        try:
            parse_keep_alive(self.keep_alive)
        except Problem as problem:
            raise ArgumentError(str(problem)) from None


def load(path: str | None = None, defaults: Mapping[str, Any] | None = None, **given: Any) -> Settings:
    """The settings of a file, where there is one, and what is given beside it, which wins; None is not given.
    defaults: for what neither says. Raises ArgumentError, DiffusionzError, OSError."""
    values: dict[str, Any] = {}
    if path is not None:
        with open(path, "rb") as file:
            try:
                values = tomllib.load(file)
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ArgumentError(f"{path}: {error}") from None
    fields = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
    for key, value in values.items():
        if key not in fields:
            raise ArgumentError(f"{path}: {_unknown(key, set(fields))}")
        if not _is(value, fields[key]):
            raise ArgumentError(f"{path}: {key} is {value!r}; it must be {_said(fields[key])}")
    if "limits" in values:
        values["limits"] = _limits(values["limits"], path)
    if "models" in values:
        if not isinstance(values["models"], Mapping):
            raise ArgumentError(f"{path}: models must be tables, such as [models.zimage-turbo]")
        values["models"] = tuple(_spec(name, about, path) for name, about in values["models"].items())
    if "preload" in values:
        if not isinstance(values["preload"], list) or not all(isinstance(name, str) for name in values["preload"]):
            raise ArgumentError(f"{path}: preload is {values['preload']!r}; it must be a list of models' names")
        values["preload"] = tuple(values["preload"])
    given = {key: value for key, value in given.items() if value is not None}
    if any(name in given for name in ("free", "dev", "payments")):  # who pays is one choice
        for name in ("free", "free_for_all", "dev", "payments"):
            values.pop(name, None)
    values = {**(defaults or {}), **values, **given}
    values.setdefault("admin_token", os.environ.get("DIFFUSIONZ_ADMIN_TOKEN"))
    return Settings(**values)


def _is(value: Any, kinds: str) -> bool:
    """Whether a file's value is of a type, such as "int | str | None"; true of types that are looked at elsewhere."""
    names = [name for name in kinds.split(" | ") if name != "None"]
    if not _TYPES.keys() >= set(names):
        return True
    if isinstance(value, bool):  # which is an int to Python
        return "bool" in names
    return any(isinstance(value, _TYPES[name]) for name in names)


def _said(kinds: str) -> str:
    words = {"int": "a whole number", "bool": "true or false", "str": "a string", "float": "a number"}
    return " or ".join(words[name] for name in kinds.split(" | ") if name != "None")


def no_nvfp4() -> str:
    """What to say to who asks for it."""
    from diffusionz.describe import describe_library

    gpus = [device for device in describe_library()["devices"] if device["device"] != "cpu"]
    have = ", ".join(f"{gpu['name']} ({gpu['compute_capability'] / 10:.1f})" for gpu in gpus) or "no GPU"
    return (
        "NVFP4 is not in this version yet, and needs a GPU of compute capability 10.0 or later; this machine has "
        f"{have}. Use --precision fp8 (8.9 or later), or leave --precision away"
    )


def is_loopback_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _limits(values: Any, path: str | None) -> Limits:
    if not isinstance(values, Mapping):
        raise ArgumentError(f"{path}: limits is {values!r}; it must be a table")
    known = {field.name: str(field.type) for field in dataclasses.fields(Limits)}
    for key, value in values.items():
        if key not in known:
            raise ArgumentError(f"{path}: limits: {_unknown(key, set(known))}")
        if not _is(value, known[key]) or not 0 < value < math.inf:
            raise ArgumentError(f"{path}: limits.{key} is {value!r}; it must be {_said(known[key])} above 0")
    return Limits(**values)


def _spec(name: str, about: Any, path: str | None) -> Spec:
    if not isinstance(about, Mapping) or about.get("family") not in FAMILIES or not isinstance(about.get("model"), str):
        raise ArgumentError(
            f"{path}: models.{name} must say family ({' or '.join(FAMILIES)}) and model (a folder, a name, a hub id)"
        )
    options = {key: value for key, value in about.items() if key not in ("family", "model")}
    known = _OPTIONS[about["family"]]
    for key, value in options.items():
        if key not in known:
            raise ArgumentError(f"{path}: models.{name}: {_unknown(key, set(known))}")
        if not _is(value, known[key]):
            raise ArgumentError(f"{path}: models.{name}: {key} is {value!r}; it must be {_said(known[key])}")
    return Spec(name, about["family"], about["model"], options)


def _unknown(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"{key!r} is no setting" + (
        f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(known))}"
    )
