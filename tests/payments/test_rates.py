"""Rates: how sources are judged, what one trade can and cannot do to them, the high, the quarantine, the evidence; and
the sources over HTTP, against a server that answers in the shapes that their documentation shows."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import pathlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionz.payments import rates as rates_module
from diffusionz.payments.database import Connection, IntegrityError, immediate, open_database
from diffusionz.payments.errors import (
    AmountError,
    ChainError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    RateError,
)
from diffusionz.payments.rates import (
    PICO,
    PYTH_SOL_USD,
    RATE_MAX,
    SOL_MINT,
    FileSource,
    FixedSource,
    JupiterSource,
    Observation,
    PythSource,
    RateRules,
    Rates,
    usd,
)

NOW = 83_334 * 21_600  # where one of the long windows begins
CENT = PICO // 100
MINT = "CuteDSL11111111111111111111111111111111111"
RULES = RateRules(min_sources=1)
HOUR, DAY = 3600, 86_400


@pytest.fixture
def rates(connection: Connection) -> Rates:
    connection.execute("PRAGMA synchronous = OFF")  # thousands of samples; no test here pulls the plug
    return Rates(connection, RULES, decimals=6, first_high=4 * CENT)


def feed(rates: Rates, rate: int, start: int, end: int, step: int = 60, asset: Any = "token") -> list[str]:
    """One agreeing observation every `step` seconds in [start, end); the states."""
    return [rates.record(asset, {"test": Observation(rate, at)}, at).state for at in range(start, end, step)]


def high(rates: Rates, now: int) -> int:
    return rates.token_rate("ath", now).pico_usd


def market(rates: Rates, now: int) -> int:
    return rates.token_rate("market", now).pico_usd


# How sources are judged.


def test_the_market_is_the_median_of_the_last_minutes(rates: Rates) -> None:
    for i, cents in enumerate([5, 4, 6, 5, 7]):
        rates.record("token", {"test": Observation(cents * CENT, NOW + 60 * i)}, NOW + 60 * i)
    assert market(rates, NOW + 240) == 5 * CENT
    assert market(rates, NOW + 240 + 61) == 5 * CENT  # the first two have left the window
    rate = rates.token_rate("market", NOW + 240)
    assert (rate.at, rate.kind, rate.decimals) == (NOW + 240, "market", 6)
    assert rate.evidence == 5


def test_few_samples_are_no_rate(rates: Rates) -> None:
    feed(rates, CENT, NOW, NOW + 120)
    with pytest.raises(RateError, match="token: 2 samples in the last 300 s; a rate needs 3"):
        rates.token_rate("market", NOW + 120)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"a": 100, "b": 104, "c": 108}, 104),
        ({"a": 100, "b": 104}, 100),
        ({"a": 100, "b": 104, "c": 250}, 100),  # one of three is alone
        ({"a": 100, "b": 104, "c": 99, "d": 1}, 100),
        ({"a": 100, "b": 130}, "the sources differ by more than 10 %"),  # nobody knows which is right
        ({"a": 100, "b": 100, "c": 200, "d": 200}, "the sources differ"),
        ({"a": 100}, "1 of the sources agree, a rate needs 2"),
        ({"a": 100, "b": "HTTP 500"}, "1 of the sources agree, a rate needs 2; b: HTTP 500"),
        ({"a": "HTTP 500", "b": "no answer"}, "a: HTTP 500; b: no answer"),
        ({}, "no source is configured"),
    ],
)
def test_B7_sources_have_to_agree(connection: Connection, said: dict[str, Any], expected: int | str) -> None:
    rates = Rates(connection, RateRules(min_sources=2), decimals=6)
    answers = {name: a if isinstance(a, str) else Observation(a * CENT, NOW) for name, a in said.items()}
    sample = rates.record("token", answers, NOW)
    if isinstance(expected, int):
        assert (sample.state, sample.rate) == ("accepted", expected * CENT)
    else:
        assert (sample.state, sample.rate) == ("refused", None)
        assert expected in sample.why


@pytest.mark.parametrize(
    ("observation", "why"),
    [
        (Observation(0, NOW), "0 pico-USD is no price"),
        (Observation(-1, NOW), "-1 pico-USD is no price"),
        (Observation(RATE_MAX + 1, NOW), "is no price from 1 to"),
        (Observation(True, NOW), "True pico-USD is no price"),
        (Observation(1.5, NOW), "1.5 pico-USD is no price"),  # type: ignore[arg-type]
        (Observation(CENT, NOW - 121), "its price is 121 s old, at most 120 s are trusted"),
        (Observation(CENT, NOW + 6), "its price is 6 s in the future"),
        (Observation(CENT, NOW, 24_999), "24999 USD of liquidity, 25000 are needed"),
    ],
)
def test_B7_stale_zero_negative_huge_and_thin_prices_are_refused(
    rates: Rates, observation: Observation, why: str
) -> None:
    sample = rates.record("token", {"test": observation}, NOW)
    assert sample.state == "refused"
    assert why in sample.why
    with pytest.raises(RateError, match="there is no rate yet; test: "):
        rates.token_rate("market", NOW)


def test_the_limits_themselves_are_accepted(rates: Rates) -> None:
    for i, observation in enumerate(
        [Observation(CENT, NOW - 120), Observation(CENT, NOW + 5), Observation(CENT, NOW, 25_000)]
    ):
        assert rates.record("token", {"test": observation}, NOW).state == "accepted", i


def test_B7_a_stale_rate_prices_nothing(rates: Rates) -> None:
    feed(rates, CENT, NOW, NOW + 300)
    newest = NOW + 240
    assert market(rates, newest + 120) == CENT
    with pytest.raises(RateError, match="token: the newest rate is 121 s old, at most 120 s are trusted"):
        rates.token_rate("market", newest + 121)
    rates.record("token", {"test": "it answers with HTTP 503"}, newest + 121)
    with pytest.raises(RateError, match=r"are trusted; test: it answers with HTTP 503$"):
        rates.token_rate("market", newest + 121)
    # The high is older by nature, and does not change while a feed is away for a moment.
    assert high(rates, newest + DAY) == 4 * CENT
    with pytest.raises(RateError, match="at most 86400 s are trusted"):
        rates.token_rate("ath", newest + DAY + 1)


def test_B7_a_clock_that_goes_back_prices_nothing_until_there_is_a_new_rate(rates: Rates) -> None:
    feed(rates, CENT, NOW, NOW + 300)
    feed(rates, 2 * CENT, NOW + HOUR, NOW + HOUR + 300)  # recorded while the clock was an hour ahead
    with pytest.raises(RateError, match="token: the newest rate is 3540 s in the future; the clock went back"):
        rates.token_rate("market", NOW + 300)
    feed(rates, CENT, NOW + 300, NOW + 600)
    assert market(rates, NOW + 600) == CENT


def test_an_asset_of_its_own(rates: Rates) -> None:
    feed(rates, CENT, NOW, NOW + 300)
    with pytest.raises(RateError, match="sol: there is no rate yet"):
        rates.sol_rate(NOW + 300)
    feed(rates, 150 * PICO, NOW, NOW + 300, asset="sol")
    assert rates.sol_rate(NOW + 300).pico_usd == 150 * PICO
    assert rates.sol_rate(NOW + 300).decimals == 9
    assert market(rates, NOW + 300) == CENT


def test_a_deposit_of_sol_is_rounded_down(rates: Rates) -> None:
    feed(rates, 3 * CENT, NOW, NOW + 300)
    feed(rates, 150 * PICO + 1, NOW, NOW + 300, asset="sol")
    conversion = rates.convert_sol(1_000_000_000, NOW + 300)
    assert conversion.tokens == int(Fraction(150 * PICO + 1, 3 * CENT) * 10**6) == 5_000_000_000
    assert str(conversion) == "SOL at 150.000000000001 USD (rate 10), token at 0.03 USD (rate 5)"
    assert rates.convert_sol(1, NOW + 300).tokens == 5
    for lamports in (0, -1, True, 1.0, "1", 2**63):
        with pytest.raises(AmountError, match="lamports; it must be a whole number"):
            rates.convert_sol(lamports, NOW + 300)  # type: ignore[arg-type]
    with pytest.raises(AmountError, match="the ledger holds up to"):
        rates.convert_sol(2**63 - 1, NOW + 300)


# What one trade can and cannot do.


@settings(max_examples=10)
@given(spike=st.integers(1, RATE_MAX), position=st.integers(1, 359), seed=st.integers(0, 10**6))
def test_B7_one_sample_moves_the_market_within_the_others_and_the_high_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, spike: int, position: int, seed: int
) -> None:
    """For six hours of samples between 3 and 4 cents, one of which says anything at all."""
    connection = open_database(tmp_path_factory.mktemp("rates") / "l.db")
    try:
        connection.execute("PRAGMA synchronous = OFF")
        rates = Rates(connection, RULES, decimals=6, first_high=4 * CENT)
        rng = random.Random(seed)
        for minute in range(361):
            at = NOW + 60 * minute
            rate = spike if minute == position else rng.randint(3 * CENT, 4 * CENT)
            rates.record("token", {"test": Observation(rate, at)}, at)
            if minute > 5:
                assert 3 * CENT <= market(rates, at) <= 4 * CENT
        assert high(rates, at) == 4 * CENT
    finally:
        connection.close()


def test_B7_a_jump_is_quarantined_and_prices_are_refused_until_it_goes_back(rates: Rates) -> None:
    feed(rates, CENT, NOW, NOW + HOUR)
    # The pool is pushed to a thousand times the price and held there.
    assert set(feed(rates, 1000 * CENT, NOW + HOUR, NOW + 2 * HOUR)) == {"quarantined"}
    with pytest.raises(
        RateError, match=r"10 USD after 0\.01: more than 100 % away at once \(sample:120 waits for approval\)"
    ):
        rates.token_rate("market", NOW + 2 * HOUR)
    assert high(rates, NOW + 2 * HOUR) == 4 * CENT
    assert set(feed(rates, CENT, NOW + 2 * HOUR, NOW + 3 * HOUR)) == {"accepted"}
    assert market(rates, NOW + 3 * HOUR) == CENT
    assert rates.quarantined() == []
    with pytest.raises(ConflictError, match="sample:120 waits for nothing"):
        rates.approve("sample:120", "ann", NOW + 3 * HOUR)


@pytest.mark.parametrize("factor", [Fraction(1, 3), Fraction(3)])
def test_an_operator_lets_a_jump_count(rates: Rates, factor: Fraction) -> None:
    feed(rates, CENT, NOW, NOW + HOUR)
    moved = int(CENT * factor)
    feed(rates, moved, NOW + HOUR, NOW + HOUR + 300)
    waiting = rates.quarantined()
    assert [w.id for w in waiting] == [f"sample:{n}" for n in (65, 64, 63, 62, 61)]
    assert (waiting[0].asset, waiting[0].rate, waiting[0].reference) == ("token", moved, CENT)
    rates.approve("sample:65", "ann", NOW + HOUR + 300)
    assert rates.quarantined() == []
    with pytest.raises(RateError, match="1 samples"):  # what came before the approval is another price
        rates.token_rate("market", NOW + HOUR + 300)
    assert set(feed(rates, moved, NOW + HOUR + 300, NOW + HOUR + 600)) == {"accepted"}
    assert market(rates, NOW + HOUR + 600) == moved
    # The old price is now the jump.
    assert feed(rates, CENT, NOW + HOUR + 600, NOW + HOUR + 601) == ["quarantined"]


def test_after_an_approval_the_market_forgets_what_was_before(rates: Rates) -> None:
    """Though it is still within the window: a rate between two prices is neither."""
    feed(rates, CENT, NOW, NOW + 300)
    feed(rates, 3 * CENT, NOW + 300, NOW + 301)
    rates.approve("sample:6", "ann", NOW + 301)
    with pytest.raises(RateError, match="1 samples in the last 300 s"):
        rates.token_rate("market", NOW + 301)
    feed(rates, 3 * CENT, NOW + 310, NOW + 330, step=10)
    assert market(rates, NOW + 330) == 3 * CENT


@pytest.mark.parametrize("id", ["sample:99", "high:1", "", "sample:", "sample:-1", "sample:1e0", "x:1", "sample:²"])
def test_what_is_not_in_quarantine_cannot_be_approved(rates: Rates, id: str) -> None:
    feed(rates, CENT, NOW, NOW + 60)
    with pytest.raises((NotFoundError, ConflictError)):
        rates.approve(id, "ann", NOW)
    with pytest.raises(ConfigurationError, match="operator is ''; it must be a name"):
        rates.approve(id, "", NOW)


def test_a_first_sample_far_above_the_high_is_a_jump_and_one_far_below_is_not(connection: Connection) -> None:
    rates = Rates(connection, RULES, decimals=6, first_high=4 * CENT)
    assert feed(rates, 8 * CENT + 1, NOW, NOW + 1) == ["quarantined"]
    assert feed(rates, CENT // 1000, NOW + 60, NOW + 61) == ["accepted"]


def test_after_a_week_of_silence_a_jump_is_still_one(rates: Rates) -> None:
    feed(rates, CENT, NOW, NOW + 300)
    assert feed(rates, 3 * CENT, NOW + 7 * DAY, NOW + 7 * DAY + 1) == ["quarantined"]
    assert feed(rates, 2 * CENT, NOW + 7 * DAY + 60, NOW + 7 * DAY + 61) == ["accepted"]


# The high.


def test_the_high_is_unknown_until_somebody_says_it(connection: Connection) -> None:
    rates = Rates(connection, RULES, decimals=6)
    feed(rates, CENT, NOW, NOW + 2 * 21_600, step=100)
    assert market(rates, NOW + 2 * 21_600 - 60) == CENT
    with pytest.raises(RateError, match="no all-time high is known; set rates_first_high"):
        rates.token_rate("ath", NOW + 2 * 21_600)
    rates = Rates(connection, RULES, decimals=6, first_high=3 * CENT)
    assert high(rates, NOW + 2 * 21_600) == 3 * CENT
    assert high(Rates(connection, RULES, decimals=6, first_high=9 * CENT), NOW + 2 * 21_600) == 3 * CENT  # once


def test_the_high_follows_a_long_windows_median_and_never_falls(rates: Rates) -> None:
    feed(rates, 5 * CENT - 1, NOW, NOW + 21_600)
    assert high(rates, NOW + 21_599) == 4 * CENT  # the window is not over
    feed(rates, 2 * CENT + CENT // 2, NOW + 21_600, NOW + 2 * 21_600 + 60)
    assert high(rates, NOW + 2 * 21_600) == 5 * CENT - 1
    feed(rates, 2 * CENT, NOW + 2 * 21_600 + 60, NOW + 6 * 21_600)
    assert high(rates, NOW + 6 * 21_600) == 5 * CENT - 1


def test_a_window_with_few_samples_raises_nothing(rates: Rates) -> None:
    feed(rates, 5 * CENT, NOW, NOW + 19 * 60)
    feed(rates, 5 * CENT, NOW + 21_600, NOW + 21_601)
    assert high(rates, NOW + 21_600) == 4 * CENT
    feed(rates, 5 * CENT, NOW + 21_660, NOW + 21_600 + 20 * 60)
    feed(rates, 5 * CENT, NOW + 2 * 21_600, NOW + 2 * 21_600 + 1)
    assert high(rates, NOW + 2 * 21_600) == 5 * CENT


def test_B7_a_pump_that_is_held_raises_the_high_by_a_quarter_a_day(connection: Connection) -> None:
    rates = Rates(connection, RULES, decimals=6, first_high=CENT)
    feed(rates, CENT, NOW, NOW + 21_600, step=600)
    days = []
    for window in range(1, 21):
        feed(rates, 2 * CENT, NOW + window * 21_600, NOW + (window + 1) * 21_600, step=600)
        days.append(high(rates, NOW + (window + 1) * 21_600 - 1))
    # Four windows a day; the high of a day before, and 25 %.
    expected = [CENT] + [CENT * 5 // 4] * 4 + [CENT * 25 // 16] * 4 + [CENT * 125 // 64] * 4 + [2 * CENT] * 7
    assert days == expected


def test_an_operator_raises_the_high_to_a_windows_median(rates: Rates) -> None:
    feed(rates, 8 * CENT, NOW, NOW + 21_660)
    assert high(rates, NOW + 21_660) == 5 * CENT
    (waiting,) = rates.quarantined()
    assert (waiting.rate, waiting.reference) == (8 * CENT, 5 * CENT)
    rates.approve(waiting.id, "ann", NOW + 21_700)
    assert high(rates, NOW + 21_700) == 8 * CENT
    assert rates.quarantined() == []
    with pytest.raises(ConflictError):
        rates.approve(waiting.id, "ann", NOW + 21_700)


@pytest.mark.parametrize("seed", range(3))
def test_B7_whatever_the_feed_does_the_high_never_falls_and_never_outgrows_its_cap(
    connection: Connection, rates: Rates, seed: int
) -> None:
    """Forty days of a feed that walks, leaps, lies, falls silent and comes back."""
    rng = random.Random(seed)
    honest, at, seen = 3 * CENT, NOW, [(NOW - 2 * DAY, 4 * CENT)]
    for _ in range(40 * 24 * 4):
        at += rng.choice([600, 900, 1200, rng.choice([60, 4 * HOUR])])
        honest = max(1, int(honest * rng.uniform(0.9, 1.13)))
        rate = honest if rng.random() < 0.7 else int(honest * rng.choice([0.01, 0.6, 1.5, 1.9, 1000]))
        rates.record("token", {"test": Observation(max(1, min(rate, RATE_MAX)), at)}, at)
        now_high = connection.execute("SELECT high FROM rate_highs ORDER BY id DESC LIMIT 1").fetchone()[0]
        day_before = [h for t, h in seen if t <= at - DAY][-1]
        assert now_high == seen[-1][1] or seen[-1][1] < now_high <= day_before * 5 // 4
        seen.append((at, now_high))
    assert seen[-1][1] > 5 * CENT  # it did move, for more than a day


# The evidence.


@pytest.mark.parametrize("table", ["rate_evidence", "rate_approvals", "rate_highs"])
@pytest.mark.parametrize(
    "statement", ["UPDATE {} SET at = 0", "DELETE FROM {}", "INSERT OR REPLACE INTO {} SELECT * FROM {}"]
)
def test_B9_evidence_is_append_only(rates: Rates, connection: Connection, table: str, statement: str) -> None:
    feed(rates, CENT, NOW, NOW + 300)
    feed(rates, 5 * CENT, NOW + 300, NOW + 360)
    rates.approve("sample:6", "ann", NOW + 360)
    before = connection.execute(f"SELECT * FROM {table}").fetchall()
    assert before
    with pytest.raises(IntegrityError), immediate(connection):
        connection.execute(statement.format(table, table))
    assert connection.execute(f"SELECT * FROM {table}").fetchall() == before


def test_the_database_itself_refuses_a_lower_high(rates: Rates, connection: Connection) -> None:
    with pytest.raises(IntegrityError, match="the high never falls"), immediate(connection):
        connection.execute("INSERT INTO rate_highs (at, high, reason) VALUES (1, 1, 'first')")


def test_evidence_says_who_said_what(rates: Rates, connection: Connection) -> None:
    rates.record("token", {"a": Observation(CENT, NOW - 3, 30_000), "b": "it answers with HTTP 429"}, NOW)
    detail = json.loads(connection.execute("SELECT detail FROM rate_evidence").fetchone()[0])
    assert detail == {
        "why": "",
        "reference": 4 * CENT,
        "sources": {
            "a": {"pico_usd": CENT, "at": NOW - 3, "liquidity_usd": 30_000},
            "b": {"refused": "it answers with HTTP 429"},
        },
    }


def test_reading_a_rate_costs_the_same_whatever_was_recorded(rates: Rates, connection: Connection) -> None:
    """Counted in SQLite's instructions: the ledger reads a rate for every call."""

    def instructions(now: int) -> int:
        steps: list[int] = []
        connection.set_progress_handler(lambda: steps.append(1), 10)
        try:
            rates.token_rate("market", now)
            rates.token_rate("ath", now)
            rates.quarantined()
        finally:
            connection.set_progress_handler(None, 0)
        return len(steps)

    feed(rates, CENT, NOW, NOW + 300)
    few = instructions(NOW + 300)
    with immediate(connection):
        connection.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
            " INSERT INTO rate_evidence (asset, at, state, rate, detail)"
            " SELECT iif(i % 2, 'token', 'sol'), ? - i, iif(i % 7, 'accepted', 'quarantined'), ?, ? FROM n",
            (NOW - 7 * 21_600, CENT, json.dumps({"why": ""})),
        )
    feed(rates, CENT, NOW + 300, NOW + 600)
    assert instructions(NOW + 600) < 2 * few


def test_rules_and_setup_that_make_no_sense_are_refused(connection: Connection) -> None:
    with pytest.raises(ConfigurationError, match="rates_min_sources is 0; it must be a whole number from 1"):
        RateRules(min_sources=0)
    with pytest.raises(ConfigurationError, match=r"rates_jump_percent is 1\.5"):
        RateRules(jump_percent=1.5)  # type: ignore[arg-type]
    for decimals in (-1, 19, True, 6.0):
        with pytest.raises(ConfigurationError, match="decimals"):
            Rates(connection, RULES, decimals=decimals)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="token_sources are fixed, fixed; one source is one voice"):
        Rates(connection, RULES, decimals=6, token_sources=[FixedSource(1), FixedSource(2)])
    with pytest.raises(ValueError, match='it must be "market" or "ath"'):
        Rates(connection, RULES, decimals=6).token_rate("spot", NOW)  # type: ignore[arg-type]


def test_usd_is_shown_exactly() -> None:
    assert [usd(n) for n in (1, PICO, 1_200_000_000, 10 * PICO, 0)] == ["0.000000000001", "1", "0.0012", "10", "0"]


# The sources, over a socket.

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Api(http.server.ThreadingHTTPServer):
    """Answers each path with what the test put there, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.answers: dict[str, tuple[int, bytes] | Answer] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        server: Api

        def do_GET(self) -> None:
            self.server.asked.append((self.path, dict(self.headers)))
            answer = self.server.answers.get(self.path.partition("?")[0], (404, b"{}"))
            if callable(answer):
                return answer(self)
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_: object) -> None:
            pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def jupiter_answer(**changes: Any) -> bytes:
    """As https://dev.jup.ag/docs/price shows it; `usdPrice` as the digits of a JSON number."""
    price = {
        "createdAt": "2024-06-05T08:55:25.527Z",
        "liquidity": 621679.67,
        "usdPrice": "0.0123456789012345678",
        "blockId": 348004023,
        "decimals": 6,
        "priceChange24h": 1.29,
    } | changes
    text = json.dumps({MINT: {key: value for key, value in price.items() if value is not None}})
    return text.replace(f'"{price["usdPrice"]}"', str(price["usdPrice"])).encode()


def read_jupiter(api: Api, slot: int | Exception = 348004100, **options: Any) -> Observation:
    async def current_slot() -> int:
        if isinstance(slot, Exception):
            raise slot
        return slot

    async def read() -> Observation:
        async with httpx2.AsyncClient() as client:
            url = api.url + "/price/v3"
            return await JupiterSource(client, MINT, decimals=6, slot=current_slot, url=url, **options).read(NOW)

    return asyncio.run(read())


def test_jupiter_is_read_exactly(api: Api) -> None:
    api.answers["/price/v3"] = (200, jupiter_answer())
    observation = read_jupiter(api, api_key="the-key")
    assert observation == Observation(12_345_678_901, NOW - 30, 621_679)  # 77 slots of 400 ms
    ((path, headers),) = api.asked
    assert path == f"/price/v3?ids={MINT}"
    assert headers["x-api-key"] == "the-key"
    read_jupiter(api)
    assert "x-api-key" not in api.asked[1][1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"{}"), "it has no reliable price for the mint"),
        ((200, json.dumps({MINT: None}).encode()), "it has no reliable price"),
        ((200, json.dumps({MINT: 3}).encode()), "its answer is not a price"),
        ((200, b"[]"), "it has no reliable price"),
        ((200, b"<html>"), "its answer is not JSON"),
        ((200, b""), "its answer is not JSON"),
        ((200, b"\xff\xfe"), "its answer is not JSON"),
        ((200, b"[" * 100_000), "its answer is not JSON"),
        ((200, b" " * 300_000), "its answer is longer than 262144 bytes"),
        ((200, jupiter_answer(usdPrice="NaN")), "its answer is not JSON"),
        ((200, jupiter_answer(usdPrice="-Infinity")), "its answer is not JSON"),
        ((200, jupiter_answer(usdPrice=None)), "usdPrice is None; it must be a number from 0"),
        ((200, jupiter_answer(usdPrice="-0.5")), r"usdPrice is Decimal\('-0.5'\)"),
        ((200, jupiter_answer(usdPrice="1e999999999")), "usdPrice is"),
        ((200, jupiter_answer(usdPrice=True)), "usdPrice is True"),
        ((200, jupiter_answer(usdPrice=7).replace(b": 7,", b': "7",')), "usdPrice is '7'"),
        ((200, jupiter_answer(blockId=None)), "blockId is None; the price's age is unknown"),
        ((200, jupiter_answer(liquidity=None)), "liquidity is None"),
        ((200, jupiter_answer(decimals=9)), "it says the mint has 9 decimals, expected 6"),
        ((401, b"{}"), "it answers with HTTP 401"),
        ((429, b"{}"), "it answers with HTTP 429"),
        ((302, b"{}"), "it answers with HTTP 302"),
        ((503, jupiter_answer()), "it answers with HTTP 503"),
    ],
)
def test_B7_what_jupiter_does_not_say_is_not_guessed(api: Api, answer: tuple[int, bytes], message: str) -> None:
    api.answers["/price/v3"] = answer
    with pytest.raises(RateError, match=message):
        read_jupiter(api)


def test_B7_a_price_of_almost_nothing_is_zero_and_refused(api: Api, rates: Rates) -> None:
    api.answers["/price/v3"] = (200, jupiter_answer(usdPrice="1e-999999999"))
    observation = read_jupiter(api)
    assert observation.pico_usd == 0
    assert "0 pico-USD is no price" in rates.record("token", {"jupiter": observation}, NOW).why


def test_B7_jupiters_old_block_is_an_old_price(api: Api, rates: Rates) -> None:
    api.answers["/price/v3"] = (200, jupiter_answer())
    old = read_jupiter(api, slot=348004023 + 1000)
    assert "its price is 400 s old" in rates.record("token", {"jupiter": old}, NOW).why
    future = read_jupiter(api, slot=348004023 - 1000)
    assert "its price is 400 s in the future" in rates.record("token", {"jupiter": future}, NOW).why
    with pytest.raises(ChainError):
        read_jupiter(api, slot=ChainError("the cluster does not answer"))


def pyth_answer(
    expo: Any = -8, conf: Any = "7500000", price: Any = "14748123456", at: Any = NOW - 2, **more: Any
) -> bytes:
    """As https://docs.pyth.network/api-reference shows it for Hermes."""
    quote = {"price": price, "conf": conf, "expo": expo, "publish_time": at}
    update = {
        "id": PYTH_SOL_USD,
        "price": quote,
        "ema_price": {"price": "14700000000", "conf": "8000000", "expo": -8, "publish_time": NOW - 2},
        "metadata": {"slot": 85480034, "proof_available_time": NOW, "prev_publish_time": NOW - 3},
    } | more
    return json.dumps({"binary": {"encoding": "hex", "data": ["504e41550100"]}, "parsed": [update]}).encode()


def read_pyth(api: Api, feed: str = PYTH_SOL_USD) -> Observation:
    async def read() -> Observation:
        async with httpx2.AsyncClient() as client:
            return await PythSource(client, feed, url=api.url).read(NOW)

    return asyncio.run(read())


def test_pyth_is_read_exactly(api: Api) -> None:
    api.answers["/v2/updates/price/latest"] = (200, pyth_answer())
    assert read_pyth(api) == Observation(147_481_234_560_000, NOW - 2)
    assert read_pyth(api, "0x" + PYTH_SOL_USD.upper()) == Observation(147_481_234_560_000, NOW - 2)
    assert api.asked[0][0] == f"/v2/updates/price/latest?ids%5B%5D={PYTH_SOL_USD}&parsed=true"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (pyth_answer(conf="200000000"), "with a confidence of 200000000; it must be above 0 and within 1 %"),
        (pyth_answer(price="0"), "0 with a confidence"),
        (pyth_answer(price="0", conf="0"), "0 with a confidence of 0"),
        (pyth_answer(price="-5"), "-5 with a confidence"),
        (pyth_answer(price="-5", conf="-5"), "-5 with a confidence"),
        (pyth_answer(price=14748123456), "its answer is not a price"),
        (pyth_answer(price="1e3"), "its answer is not a price"),
        (pyth_answer(price="9" * 40), "its answer is not a price"),
        (pyth_answer(expo=-10_000_000), "expo is -10000000"),
        (pyth_answer(expo=100), "expo is 100"),
        (pyth_answer(expo="-8"), "expo is '-8'"),
        (pyth_answer(at=1.5), r"publish_time Decimal\('1.5'\)"),
        (pyth_answer(id="00"), "it answers for the feed '00'"),
        (b'{"parsed": []}', "its answer is not a price"),
        (b'{"parsed": null}', "its answer is not a price"),
        (b"[]", "its answer is not a price"),
    ],
)
def test_B7_what_pyth_does_not_say_is_not_guessed(api: Api, answer: bytes, message: str) -> None:
    api.answers["/v2/updates/price/latest"] = (200, answer)
    with pytest.raises(RateError, match=message):
        read_pyth(api)


def test_a_source_that_drips_is_given_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes before a read would time out."""
    monkeypatch.setattr(rates_module, "TIMEOUT_S", 0.5)

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "200000")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    api.answers["/price/v3"] = drip
    before = time.monotonic()
    with pytest.raises(RateError, match=r"no answer within 0\.5 s"):
        read_jupiter(api)
    assert time.monotonic() - before < 60


def test_a_source_that_cannot_be_reached_says_so_without_its_key(api: Api) -> None:
    api.server_close()
    with pytest.raises(RateError, match="it cannot be reached: ConnectError") as caught:
        read_jupiter(api, api_key="the-key")
    assert "the-key" not in repr(caught.value)


def test_a_file_is_a_source(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rate.json"
    source = FileSource(path)

    def read() -> Observation:
        return asyncio.run(source.read(NOW))

    with pytest.raises(RateError, match="No such file"):
        read()
    path.write_text('{"usd": "0.0012", "at": 1800014390}')
    assert read() == Observation(1_200_000_000, NOW - 10)
    for text, message in [
        ('{"usd": 0.0012, "at": 1800014390}', "it must be USD as a string"),
        ('{"usd": "0", "at": 1800014390}', "above zero"),
        ('{"usd": "0.0012", "at": "now"}', "must hold"),
        ('{"usd": "0.0012"}', "must hold"),
        ("[]", "must hold"),
        ("", "not JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(RateError, match=message):
            read()
    path.write_text('{"usd": "0.0012", "at": 1800014390}')
    os.chmod(path, 0o666)
    with pytest.raises(RateError, match=r"may be written by others \(mode 666\); chmod go-w"):
        read()


class Broken:
    name = "broken"

    async def read(self, now: float) -> Observation:
        raise KeyError("a defect")


def test_refresh_asks_all_sources_and_survives_their_defects(
    api: Api, connection: Connection, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    api.answers["/v2/updates/price/latest"] = (200, pyth_answer())
    clock.now = NOW

    async def refresh() -> dict[Any, Any]:
        async with httpx2.AsyncClient() as client:
            rates = Rates(
                connection,
                RateRules(min_sources=2, market_min_samples=1),
                decimals=6,
                token_sources=[FixedSource(CENT), Broken()],
                sol_sources=[PythSource(client, url=api.url), FixedSource(147 * PICO)],
                clock=clock,
            )
            samples = await rates.refresh()
            assert rates.sol_rate(NOW).pico_usd == 147 * PICO  # the lower of two that agree
            return samples

    samples = asyncio.run(refresh())
    assert samples["sol"].state == "accepted"
    assert samples["token"].state == "refused"
    assert "broken: failed with KeyError" in samples["token"].why
    assert "broken failed" in caplog.text


def test_run_goes_on_when_the_database_cannot_be_written(
    connection: Connection, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates(connection, RULES, decimals=6, token_sources=[FixedSource(CENT)], clock=clock)
    calls: list[int] = []
    record = rates.record

    def flaky(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            from diffusionz.payments.errors import StorageError

            raise StorageError("disk full")
        return record(*arguments)

    monkeypatch.setattr(rates, "record", flaky)

    async def run() -> None:
        task = asyncio.create_task(rates.run(0.001))
        while len(calls) < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert market(rates, int(clock())) == CENT


def test_two_processes_may_record_at_once(ledger_path: pathlib.Path, rates: Rates) -> None:
    """Each thread has its own connection, as two processes have."""

    def record(start: int) -> None:
        connection = open_database(ledger_path, busy_timeout_s=120.0)
        feed(Rates(connection, RULES, decimals=6), CENT, start, start + 1200, step=60)
        connection.close()

    threads = [threading.Thread(target=record, args=(NOW + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    connection = open_database(ledger_path)
    assert connection.execute("SELECT count(*), count(DISTINCT id) FROM rate_evidence").fetchone() == (80, 80)
    connection.close()


def test_sol_is_the_wrapped_mint() -> None:
    from diffusionz.payments.tokens import NATIVE_MINT

    assert str(NATIVE_MINT) == SOL_MINT
