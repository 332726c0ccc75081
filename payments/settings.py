"""How payments are set up: one Settings, read from a TOML file and the environment.

    settings = load("payments.toml")

Every key of the file can be given as DIFFUSIONZ_PAYMENTS_<KEY> instead, which wins; lists with commas, the table of
prices as TOML ('{zimage = {usd = "1.20"}}'). DIFFUSIONZ_PAYMENTS_CONFIG names the file. Nothing unknown is passed over:
a misspelt limit is no limit.

Secrets are never settings: a setting names a file that only its owner may read.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import re
import secrets as random
import stat
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import tomllib
from solders.pubkey import Pubkey

from diffusionz.payments.errors import ConfigurationError
from diffusionz.payments.identity import CHAINS
from diffusionz.payments.prices import Service, parse_usd, with_changes
from diffusionz.payments.rates import PICO, PYTH_SOL_USD, RATE_MAX, RateRules

PREFIX = "DIFFUSIONZ_PAYMENTS_"
PATH_VARIABLE = PREFIX + "CONFIG"
TOKEN_PROGRAMS = ("spl-token", "token-2022")
TOKEN_SOURCES = ("jupiter", "file", "fixed")
SOL_SOURCES = ("pyth", "jupiter", "file", "fixed")

# A check takes what the file or the environment says and returns what Settings holds, or raises Invalid(allowed).
Check = Callable[[Any], Any]


class Invalid(Exception):
    """What a value must be."""


def _text(pattern: str, allowed: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise Invalid(allowed)
        return value

    return check


def _one_of(*names: str) -> Check:
    return _text("|".join(map(re.escape, names)), f"one of {', '.join(names)}")


def _whole(smallest: int, largest: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
            value = int(value)
        if type(value) is not int or not smallest <= value <= largest:
            raise Invalid(f"a whole number from {smallest} to {largest}")
        return value

    return check


def _list_of(check_one: Check, allowed: str) -> Check:
    def check(value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        try:
            if not isinstance(value, list) or len(set(value)) < len(value):
                raise Invalid
            return tuple(check_one(one) for one in value)
        except (Invalid, TypeError):
            raise Invalid(allowed) from None

    return check


def _usd(value: Any) -> int:
    try:
        pico = parse_usd(value, "it", scale=PICO)
    except ConfigurationError:
        pico = RATE_MAX + 1
    if pico > RATE_MAX:
        raise Invalid('USD as a string such as "0.0012", up to 9000000')
    return pico


def _address(value: Any) -> str:
    try:
        if isinstance(value, str) and str(Pubkey.from_string(value)) == value:
            return value
    except ValueError:
        pass
    raise Invalid("an address: 32 bytes in base58")


def _prices(value: Any) -> Mapping[str, Service]:
    if isinstance(value, str):
        try:
            value = tomllib.loads(f"prices = {value}")["prices"]
        except tomllib.TOMLDecodeError:
            value = None
    if not isinstance(value, Mapping):
        raise Invalid("a table of services, such as {zimage = {usd = '1.20'}, ltx_video = false}")
    return MappingProxyType(with_changes(value))


_PATH = _text(r"[^\0]{1,4096}", "a path")
_URL = _text(r"https?://[!-~]{1,2000}", "a URL that begins with https:// or http://")


def _setting(check: Check, default: Any = None, *, secret: bool = False) -> Any:
    """A field; its default is what a file would say. `secret`: the value is shown nowhere."""

    def make_default() -> Any:
        return None if default is None else check(default)

    return dataclasses.field(default_factory=make_default, metadata={"check": check, "secret": secret}, repr=not secret)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. None: not set; whoever needs it says so (`require`)."""

    database: str = _setting(_PATH, "payments.db")

    # The chain and the token.
    network: str = _setting(_one_of(*CHAINS), "mainnet")
    genesis_hash: str | None = _setting(_address)  # of a localnet; the others' are known
    # Providers put their key into the URL.
    rpc_urls: tuple[str, ...] = _setting(
        _list_of(_URL, "a list of URLs that begin with https:// or http://"), [], secret=True
    )
    mint: str | None = _setting(_address)
    token_program: str = _setting(_one_of(*TOKEN_PROGRAMS), "spl-token")
    token_decimals: int = _setting(_whole(0, 18), 6)
    token_symbol: str = _setting(_text("[A-Za-z0-9$]{1,16}", "up to 16 letters and digits"), "CUTEDSL")
    treasury: str | None = _setting(_address)  # where sweeps go: an address whose key is nowhere here

    # Files that only their owner may read.
    seed_file: str | None = _setting(_PATH)  # the sweeper's alone
    gas_key_file: str | None = _setting(_PATH)  # the wallet that pays the fees of sweeps
    pepper_file: str | None = _setting(_PATH)  # for API keys

    # Signing in.
    domain: str | None = _setting(_text(r"[a-z0-9.-]{1,253}(:[0-9]{1,5})?", "a host, such as example.org"))
    sign_in_uri: str | None = _setting(_URL)
    sign_in_statement: str | None = _setting(_text("[ -~]{1,300}", "one line of up to 300 ASCII characters"))

    # What things cost.
    prices: Mapping[str, Service] = _setting(_prices, {})
    rates_token_sources: tuple[str, ...] = _setting(
        _list_of(_one_of(*TOKEN_SOURCES), f"a list of {', '.join(TOKEN_SOURCES)}"), []
    )
    rates_sol_sources: tuple[str, ...] = _setting(
        _list_of(_one_of(*SOL_SOURCES), f"a list of {', '.join(SOL_SOURCES)}"), []
    )
    rates_fixed_token: int | None = _setting(_usd)  # pico-USD for a whole token, from USD as a string
    rates_fixed_sol: int | None = _setting(_usd)
    rates_token_file: str | None = _setting(_PATH)
    rates_sol_file: str | None = _setting(_PATH)
    rates_first_high: int | None = _setting(_usd)  # the token's all-time high before the first start
    rates_interval_s: int = _setting(_whole(1, 3600), 30)
    jupiter_url: str = _setting(_URL, "https://api.jup.ag/price/v3")
    jupiter_key_file: str | None = _setting(_PATH)
    pyth_url: str = _setting(_URL, "https://hermes.pyth.network")
    pyth_sol_feed: str = _setting(_text("(0x)?[0-9a-fA-F]{64}", "a feed's id: 64 hexadecimal digits"), PYTH_SOL_USD)
    rates: RateRules = dataclasses.field(default=RateRules(), metadata={"rules": True})  # from the keys rates_<rule>

    # E-mail; without smtp_host nobody is written to.
    smtp_host: str | None = _setting(_text("[A-Za-z0-9.:-]{1,253}", "a host"))
    smtp_port: int = _setting(_whole(1, 65535), 587)
    smtp_security: str = _setting(_one_of("starttls", "tls", "none"), "starttls")
    smtp_user: str | None = _setting(_text("[!-~]{1,254}", "a user's name"))
    smtp_password_file: str | None = _setting(_PATH)
    mail_from: str | None = _setting(_text(r"[!-?A-~]{1,64}@[A-Za-z0-9.-]{1,190}", "an e-mail address"))

    def __post_init__(self) -> None:
        together = {
            "smtp_host": ("mail_from",),
            "smtp_user": ("smtp_password_file",),
            "smtp_password_file": ("smtp_user",),
        }
        for key, needed in together.items():
            for other in needed:
                if getattr(self, key) is not None and getattr(self, other) is None:
                    raise ConfigurationError(f"{key} is set and {other} is not; they go together")
        if self.smtp_user is not None and self.smtp_security == "none":
            raise ConfigurationError(
                'smtp_security is "none" and smtp_user is set; a password is not sent in the clear'
            )
        for asset in ("token", "sol"):
            sources: tuple[str, ...] = getattr(self, f"rates_{asset}_sources")
            for source, key in (("fixed", f"rates_fixed_{asset}"), ("file", f"rates_{asset}_file")):
                if source in sources and getattr(self, key) is None:
                    raise ConfigurationError(f'rates_{asset}_sources has "{source}" and {key} is not set')
            if "jupiter" in sources and asset == "token" and self.mint is None:
                raise ConfigurationError('rates_token_sources has "jupiter" and mint is not set')
            if sources and len(sources) < self.rates.min_sources:
                raise ConfigurationError(
                    f"rates_min_sources is {self.rates.min_sources} and rates_{asset}_sources has {len(sources)}; "
                    "add a source, or lower rates_min_sources to trust so few"
                )

    def require(self, *keys: str) -> None:
        """Raises ConfigurationError when one of the keys is not set."""
        for key in keys:
            if getattr(self, key) in (None, ()):
                raise ConfigurationError(
                    f"{key} is not set; put it into the configuration file or {PREFIX}{key.upper()}"
                )

    def secret(self, key: str) -> bytes:
        """What the file has that the setting `key` names: read_secret. Raises ConfigurationError."""
        self.require(key)
        return read_secret(getattr(self, key), key)


_FIELDS = {field.name: field for field in dataclasses.fields(Settings) if "check" in field.metadata}
_RULES = {f"rates_{field.name}": field.name for field in dataclasses.fields(RateRules)}
KEYS = (*_FIELDS, *_RULES)


def load(path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a TOML file (None: the one that DIFFUSIONZ_PAYMENTS_CONFIG names, if any) and the environment.

    Raises ConfigurationError: which key, where it stands, its value, what is allowed.
    """
    path = path or environ.get(PATH_VARIABLE)
    given: dict[str, tuple[str, Any]] = {}  # key -> (where it stands, value)
    if path is not None:
        for key, value in _read_toml(pathlib.Path(path)).items():
            given[key] = (f"{key} in {path}", value)
    for variable, value in sorted(environ.items()):
        if variable.startswith(PREFIX) and variable != PATH_VARIABLE:
            given[variable.removeprefix(PREFIX).lower()] = (variable, value)
    values: dict[str, Any] = {}
    rules: dict[str, int] = {}
    for key, (where, value) in given.items():
        if key in _RULES:
            rules[_RULES[key]] = _checked(_whole(0, 10**9), where, value)
        elif key in _FIELDS:
            metadata = _FIELDS[key].metadata
            values[key] = _checked(metadata["check"], where, value, metadata["secret"])
        else:
            close = difflib.get_close_matches(key, KEYS, 1)
            meant = f"; did you mean {close[0]}?" if close else f"; known are: {', '.join(sorted(KEYS))}"
            raise ConfigurationError(f"{where} is not a setting{meant}")
    if rules:
        values["rates"] = RateRules(**rules)
    return Settings(**values)


def _checked(check: Check, where: str, value: Any, secret: bool = False) -> Any:
    try:
        return check(value)
    except Invalid as allowed:
        shown = "not valid" if secret else repr(value)[:200]
        raise ConfigurationError(f"{where} is {shown}; it must be {allowed}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _read_toml(path: pathlib.Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None


SECRET_MAX = 4096  # bytes


def read_secret(path: str | os.PathLike[str], what: str) -> bytes:
    """The content of a secret's file, without the line's end. Raises ConfigurationError, whose message has none of it.

    The file must be the process's own user's or root's, and closed to everybody else (mode 0600 or 0400).
    """

    def refuse(why: str) -> NoReturn:
        raise ConfigurationError(f"{what}: {os.fspath(path)} {why}")

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        refuse(f"cannot be read: {error.strerror}")
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            refuse("is not a file")
        if status.st_mode & 0o077:
            refuse(f"has mode {status.st_mode & 0o777:04o}, so others may use it; chmod 600")
        if status.st_uid not in (os.geteuid(), 0):
            refuse(f"belongs to the user {status.st_uid}; it must be this process's or root's")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(SECRET_MAX + 1).rstrip(b"\r\n")
    finally:
        os.close(descriptor)
    if not 1 <= len(content) <= SECRET_MAX:
        refuse(f"has {len(content)} bytes or more; it must have from 1 to {SECRET_MAX}" if content else "is empty")
    return content


def create_secret(path: str | os.PathLike[str]) -> None:
    """A new file, mode 0600, with 256 random bits in hexadecimal. Raises ConfigurationError when there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{os.fspath(path)} cannot be made: {error.strerror}") from None
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(random.token_hex(32) + "\n")
        file.flush()
        os.fsync(descriptor)
