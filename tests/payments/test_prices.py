"""The price table, what a call costs in USD and in tokens, and what a configuration may change of it."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusionz.payments.database import Connection
from diffusionz.payments.errors import AmountError, ConfigurationError, NotFoundError
from diffusionz.payments.prices import MICRO, SERVICES, UNITS_MAX, PriceBook, Service, parse_usd, with_changes
from diffusionz.payments.rates import PICO, Observation, Rate, RateRules, Rates

NOW = 1_800_000_000
CENT = PICO // 100


@pytest.fixture
def book(connection: Connection) -> PriceBook:
    """The default table; a token is worth 1 cent on the market and was worth 4 at its best."""
    rates = Rates(connection, RateRules(min_sources=1), decimals=6, first_high=4 * CENT)
    for i in range(5):
        rates.record("token", {"test": Observation(CENT, NOW - i)}, NOW - i)
    return PriceBook(SERVICES, rates)


# The source's table: https://cutedsl.cc/blog, "The numbers" and "Pricing model".
@pytest.mark.parametrize(
    ("service", "units", "usd", "first_party"),
    [
        ("zimage", 1, "1.00", True),
        ("chronos2", 1, "0.50", True),
        ("flux_image", 1, "0.04", False),
        ("ltx_video", 1, "0.30", False),
        ("tts", 100, "0.10", True),
        ("stt", 60, "0.20", True),
        ("gemma4", 1, "0.05", True),
        ("caption", 1, "0.05", True),
        ("lora_training", 1, "50.00", True),
    ],
)
def test_prices_are_the_published_ones(book: PriceBook, service: str, units: int, usd: str, first_party: bool) -> None:
    assert book.price(service, units) == Fraction(usd) * MICRO
    assert book.price(service, 3 * units) == 3 * Fraction(usd) * MICRO
    assert book.service(service).first_party is first_party
    assert len(book.services) == 9


@pytest.mark.parametrize(
    ("service", "units", "blocks"), [("tts", 1, 1), ("tts", 101, 2), ("tts", 250, 3), ("stt", 59, 1), ("stt", 61, 2)]
)
def test_begun_blocks_count_whole(book: PriceBook, service: str, units: int, blocks: int) -> None:
    assert book.price(service, units) == blocks * book.service(service).micro_usd


@pytest.mark.parametrize("units", [0, -1, True, 1.0, "1", None, float("nan"), UNITS_MAX + 1, 2**63])
def test_units_that_are_no_count_are_refused(book: PriceBook, units: Any) -> None:
    with pytest.raises(AmountError, match="whole number from 1"):
        book.price("zimage", units)


@pytest.mark.parametrize("service", ["zimages", "", None, 3, "ZIMAGE", ["zimage"]])
def test_an_unknown_service_is_refused_with_the_known_ones(book: PriceBook, service: Any) -> None:
    with pytest.raises(NotFoundError, match="not for sale; the services are: caption, chronos2"):
        book.price(service)


def test_first_party_is_priced_at_the_high_and_proxied_at_the_market(book: PriceBook) -> None:
    zimage, flux = book.quote("zimage", now=NOW), book.quote("flux_image", now=NOW)
    assert (zimage.usd_micro, zimage.tokens, zimage.rate.kind) == (1_000_000, 25_000_000, "ath")
    assert (flux.usd_micro, flux.tokens, flux.rate.kind) == (40_000, 4_000_000, "market")


def test_B8_credit_buys_proxied_services_at_the_market_only(book: PriceBook) -> None:
    """A dollar's worth of tokens at the market, four at the high, buys one dollar of what we pay a dollar for."""
    dollar_of_tokens = 100_000_000
    for service in book.services.values():
        quote = book.quote(service.name, service.per, now=NOW)
        bought = Fraction(dollar_of_tokens, quote.tokens) * quote.usd_micro
        assert bought == (4 if service.first_party else 1) * MICRO


@given(
    micro_usd=st.integers(1, 10**15),
    pico_usd=st.integers(1, 2**63 - 1),
    decimals=st.integers(0, 9),
    parts=st.integers(1, 50),
)
def test_B8_rounding_is_never_in_the_callers_favour(micro_usd: int, pico_usd: int, decimals: int, parts: int) -> None:
    rate = Rate(pico_usd, decimals, "market", NOW, 1)
    exact = Fraction(micro_usd, MICRO) / Fraction(pico_usd, PICO) * 10**decimals
    if exact > 2**63 - 1:
        with pytest.raises(AmountError, match="the ledger holds up to"):
            rate.base_units(micro_usd)
        return
    tokens = rate.base_units(micro_usd)
    assert exact <= tokens < exact + 1
    assert tokens >= 1
    assert rate.micro_usd(tokens) >= micro_usd
    assert rate.micro_usd(tokens - 1) < micro_usd or (tokens - 1) == exact
    assert parts * rate.base_units(-(-micro_usd // parts)) >= tokens  # a call cut into pieces is no cheaper
    assert rate.micro_usd_per_token == Fraction(pico_usd, 10**6)


def test_B8_a_million_calls_below_a_base_unit_are_not_free() -> None:
    rate = Rate(PICO, 0, "market", NOW, 1)  # a token without decimals, worth a dollar
    assert sum(rate.base_units(1) for _ in range(1000)) == 1000


def test_B7_a_quote_stays_what_it_was(book: PriceBook) -> None:
    quote = book.quote("flux_image", now=NOW)
    for i in range(10):
        book.rates.record("token", {"test": Observation(2 * CENT, NOW + 400 + i)}, NOW + 400 + i)
    assert book.quote("flux_image", now=NOW + 410).tokens == quote.tokens // 2
    assert quote.tokens == 4_000_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        quote.tokens = 1  # type: ignore[misc]


def test_a_configuration_changes_adds_and_removes() -> None:
    table = with_changes(
        {
            "zimage": {"usd": "1.2"},
            "tts": {"per": 1000},
            "flux_image": False,
            "upscale": {"usd": "0.000001", "first_party": False, "unit": "image", "per": 2},
        }
    )
    assert table["zimage"] == Service("zimage", 1_200_000, "image")
    assert table["tts"] == Service("tts", 100_000, "character", per=1000)
    assert "flux_image" not in table
    assert table["upscale"] == Service("upscale", 1, "image", per=2, first_party=False)
    assert table["gemma4"] is SERVICES["gemma4"]
    assert "upscale" not in SERVICES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zimage": {"usd": 1.2}}, r"prices.zimage.usd is 1.2; it must be USD as a string"),
        ({"zimage": {"usd": 1}}, r"prices.zimage.usd is 1; it must be USD as a string"),
        ({"zimage": {"usd": "-1"}}, r"prices.zimage.usd is '-1'"),
        ({"zimage": {"usd": "1e3"}}, r"prices.zimage.usd is '1e3'"),
        ({"zimage": {"usd": " 1 "}}, r"prices.zimage.usd is ' 1 '"),
        ({"zimage": {"usd": "nan"}}, r"prices.zimage.usd is 'nan'"),
        ({"zimage": {"usd": "0.0000001"}}, r"with up to 6 decimals"),
        ({"zimage": {"usd": "0.00"}}, r"it must be above zero"),
        ({"zimage": {"usd": "1000"}}, r"prices.zimage.micro_usd is 1000000000"),
        ({"zimage": {"usd": "\u0661"}}, r"prices.zimage.usd is '\u0661'"),
        ({"zimage": {"dollars": "1"}}, r"prices.zimage.dollars is not a setting; allowed are: first_party, per"),
        ({"zimage": "1"}, r"prices.zimage is '1'; it must be a table, or false"),
        ({"zimage": True}, r"prices.zimage is True"),
        ({"zimage": {"per": 0}}, r"prices.zimage.per is 0"),
        ({"zimage": {"per": True}}, r"prices.zimage.per is True"),
        ({"zimage": {"first_party": 1}}, r"prices.zimage.first_party is 1; it must be true or false"),
        ({"zimage": {"unit": "Image!"}}, r"prices.zimage.unit is 'Image!'"),
        ({"upscale": {"usd": "1"}}, r"prices.upscale is new; it must also say first_party"),
        ({"Up scale": {"usd": "1", "first_party": True}}, r"'Up scale' is no name of a service"),
    ],
)
def test_a_wrong_configuration_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        with_changes(changes)


@given(st.integers(1, 10**9 * MICRO - 1))
def test_usd_is_read_exactly(micro_usd: int) -> None:
    text = f"{micro_usd // MICRO}.{micro_usd % MICRO:06d}"
    assert parse_usd(text, "it") == micro_usd
    assert parse_usd(text, "it", scale=PICO) == micro_usd * 10**6
