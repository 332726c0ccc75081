"""What a call costs: the table of services in USD, and a call's price in tokens at the rate of the moment.

    book = PriceBook(SERVICES, rates)
    book.price("tts", 250)               # 300_000 micro-USD: three blocks of 100 characters
    book.quote("zimage", 1, now=now)     # Quote(..., usd_micro=1_000_000, tokens=..., rate=Rate(...))

Money is whole: micro-USD (1e-6 USD) and base units of the token. Whatever has to be rounded is rounded up, so that
many small calls never add up to a free one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from diffusionz.payments.errors import AmountError, ConfigurationError, NotFoundError

if TYPE_CHECKING:
    from diffusionz.payments.rates import Rate, Rates

MICRO = 10**6  # micro-USD in a USD

UNITS_MAX = 10**9  # of one call; with MICRO_USD_MAX the price stays well below 2^63
MICRO_USD_MAX = 10**9 - 1  # of one block of units: 999.999999 USD

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclasses.dataclass(frozen=True)
class Service:
    """One line of the price table: micro_usd for each block of `per` units that a call begins."""

    name: str
    micro_usd: int
    unit: str = "call"
    per: int = 1
    first_party: bool = True  # priced at the token's all-time high; a proxied service at the market's rate

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(f"prices: {self.name!r} is no name of a service; it must match {_NAME.pattern}")
        for key, largest in (("micro_usd", MICRO_USD_MAX), ("per", UNITS_MAX)):
            value = getattr(self, key)
            if type(value) is not int or not 1 <= value <= largest:
                raise ConfigurationError(f"prices.{self.name}.{key} is {value!r}; it must be from 1 to {largest}")
        if not isinstance(self.unit, str) or not _NAME.fullmatch(self.unit):
            raise ConfigurationError(f"prices.{self.name}.unit is {self.unit!r}; it must match {_NAME.pattern}")
        if type(self.first_party) is not bool:
            raise ConfigurationError(
                f"prices.{self.name}.first_party is {self.first_party!r}; it must be true or false"
            )

    @property
    def kind(self) -> Literal["ath", "market"]:
        """The rate that its price is turned into tokens at: "ath" or "market"."""
        return "ath" if self.first_party else "market"


SERVICES: Mapping[str, Service] = MappingProxyType(
    {
        service.name: service
        for service in (
            Service("zimage", 1_000_000, "image"),
            Service("chronos2", 500_000, "forecast"),
            Service("flux_image", 40_000, "image", first_party=False),
            Service("ltx_video", 300_000, "video", first_party=False),
            Service("tts", 100_000, "character", per=100),
            Service("stt", 200_000, "second", per=60),
            Service("gemma4", 50_000, "request"),
            Service("caption", 50_000, "image"),
            Service("lora_training", 50_000_000, "job"),
        )
    }
)


@dataclasses.dataclass(frozen=True)
class Quote:
    """A call's price, frozen: `tokens` base units for usd_micro at `rate`."""

    service: str
    units: int
    usd_micro: int
    tokens: int
    rate: Rate


class PriceBook:
    """The services that are for sale, and the rates that turn their prices into tokens."""

    def __init__(self, services: Mapping[str, Service], rates: Rates) -> None:
        self.services = MappingProxyType(dict(services))
        self.rates = rates

    def service(self, name: str) -> Service:
        """Raises NotFoundError for a service that is not for sale."""
        try:
            return self.services[name]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self.services)) or "none"
            raise NotFoundError(f"{name!r} is not for sale; the services are: {known}") from None

    def price(self, service: str, units: int = 1) -> int:
        """What `units` (images, characters, seconds: Service.unit) cost, in micro-USD; begun blocks count whole.

        Raises NotFoundError, AmountError.
        """
        entry = self.service(service)
        if type(units) is not int or not 1 <= units <= UNITS_MAX:
            raise AmountError(f"{service}: {units!r} {entry.unit}s; it must be a whole number from 1 to {UNITS_MAX}")
        return -(-units // entry.per) * entry.micro_usd

    def quote(self, service: str, units: int = 1, *, now: float) -> Quote:
        """The price in tokens at the rate of `now` (seconds since 1970).

        Raises NotFoundError, AmountError, and RateError when no rate can be trusted.
        """
        usd_micro = self.price(service, units)
        rate = self.rates.token_rate(self.service(service).kind, now)
        return Quote(service, units, usd_micro, rate.base_units(usd_micro), rate)


def parse_usd(value: object, what: str, *, scale: int = MICRO) -> int:
    """A decimal string such as "0.04" as the exact number of 1/scale USD; scale is a power of ten.

    A number of the configuration's language would pass through a binary float and lose its last digits.
    Raises ConfigurationError naming `what`.
    """
    digits = len(str(scale)) - 1
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9]{{1,9}}(\.[0-9]{{1,{digits}}})?", value):
        raise ConfigurationError(
            f'{what} is {value!r}; it must be USD as a string such as "0.04", with up to {digits} decimals'
        )
    whole, _, fraction = value.partition(".")
    amount = int(whole) * scale + int(fraction.ljust(digits, "0"))
    if amount == 0:
        raise ConfigurationError(f"{what} is {value!r}; it must be above zero")
    return amount


def format_usd(micro_usd: int) -> str:
    """Micro-USD as a decimal number of USD, exact, with cents: "0.04", "1.2345"."""
    whole, fraction = divmod(micro_usd, MICRO)
    cents, rest = divmod(fraction, 10**4)
    return f"{whole}.{cents:02d}" + (f"{rest:04d}".rstrip("0") if rest else "")


def with_changes(changes: Mapping[str, object], services: Iterable[Service] = SERVICES.values()) -> dict[str, Service]:
    """The price table with a configuration's changes: name -> {usd, unit, per, first_party}, or name -> false.

    What a known service's entry leaves out stays; a new service has to say usd and first_party. Raises
    ConfigurationError naming the key.
    """
    table = {service.name: service for service in services}
    allowed = {"usd", "unit", "per", "first_party"}
    for name, change in changes.items():
        if change is False:
            table.pop(name, None)
            continue
        if not isinstance(change, Mapping):
            raise ConfigurationError(f"prices.{name} is {change!r}; it must be a table, or false: not for sale")
        if unknown := sorted(set(change) - allowed):
            raise ConfigurationError(
                f"prices.{name}.{unknown[0]} is not a setting; allowed are: {', '.join(sorted(allowed))}"
            )
        fields = {key: value for key, value in change.items() if key != "usd"}
        if "usd" in change:
            fields["micro_usd"] = parse_usd(change["usd"], f"prices.{name}.usd")
        if name in table:
            table[name] = dataclasses.replace(table[name], **fields)
        elif missing := {"usd", "first_party"} - set(change):
            raise ConfigurationError(f"prices.{name} is new; it must also say {' and '.join(sorted(missing))}")
        else:
            table[name] = Service(name, **fields)
    return table
