"""What a token and a SOL are worth in USD: measured, judged, kept as evidence, and refused when in doubt.

    rates = Rates(connection, rules, token_sources=[JupiterSource(...), FileSource(...)], sol_sources=[...], decimals=6)
    await rates.refresh()                       # asks every source; appends one row of evidence for each asset
    rates.token_rate("market", now)             # Rate, or RateError; reads the database, never the network

A sample is the median of the sources that agree. The market's rate is the median of the last minutes' samples. The
all-time high is the highest median of a long window; it grows by at most a percentage a day. A sample far from the
last hours' median, or a high beyond its daily growth, is quarantined: it counts for nothing until an operator approves
it. A price on a thin pool is what the last swap says, so one trade must never set a rate, least of all a high that is
kept for ever.

Rates are whole pico-USD (1e-12 USD) for one whole token or SOL. No float touches them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import pathlib
import stat
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Protocol

import httpx2

from diffusionz.payments.database import Connection, immediate
from diffusionz.payments.errors import (
    AmountError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    PaymentsError,
    RateError,
)
from diffusionz.payments.prices import MICRO, parse_usd

if TYPE_CHECKING:
    from diffusionz.payments.settings import Settings

logger = logging.getLogger(__name__)

PICO = 10**12  # pico-USD in a USD
RATE_MAX = 2**63 - 1  # 9.2 million USD for one token
AMOUNT_MAX = 2**63 - 1
LAMPORTS = 10**9  # in a SOL
SOL_DECIMALS = 9
SOL_MINT = "So11111111111111111111111111111111111111112"
PYTH_SOL_USD = "ef0d8b6fda2ceba41da15d4095d1da392a0d2f8ed0c6c7bc0f4cfac8c280b56d"
DAY_S = 86_400

Asset = Literal["token", "sol"]
Kind = Literal["market", "ath"]

MIGRATIONS = [
    (
        "001_rates",
        """
        CREATE TABLE rate_evidence (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            asset TEXT NOT NULL CHECK (asset IN ('token', 'sol')),
            at INTEGER NOT NULL,                        -- seconds since 1970
            state TEXT NOT NULL CHECK (state IN ('accepted', 'quarantined', 'refused')),
            rate INTEGER CHECK (rate > 0),              -- pico-USD for a whole token or SOL
            detail TEXT NOT NULL CHECK (json_valid(detail)),
            CHECK ((state = 'refused') = (rate IS NULL))
        ) STRICT;
        CREATE INDEX rate_evidence_by_time ON rate_evidence (asset, at);
        CREATE INDEX rate_evidence_accepted ON rate_evidence (asset) WHERE state = 'accepted';
        CREATE INDEX rate_evidence_quarantined ON rate_evidence (asset) WHERE state = 'quarantined';
        CREATE TABLE rate_approvals (
            evidence_id INTEGER PRIMARY KEY REFERENCES rate_evidence (id),
            at INTEGER NOT NULL,
            operator TEXT NOT NULL CHECK (operator <> '')
        ) STRICT;
        CREATE VIEW rate_counted AS SELECT * FROM rate_evidence
            WHERE state = 'accepted' OR id IN (SELECT evidence_id FROM rate_approvals);
        CREATE TABLE rate_highs (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            at INTEGER NOT NULL,
            high INTEGER NOT NULL CHECK (high > 0),     -- the token's high from then on, in pico-USD
            reason TEXT NOT NULL CHECK (reason IN ('first', 'window', 'approved')),
            window_end INTEGER UNIQUE,                  -- the judged window's, for reason 'window'
            samples INTEGER,
            candidate INTEGER CHECK (candidate > 0),    -- the window's median; NULL when it had too few samples
            approves INTEGER UNIQUE REFERENCES rate_highs (id),
            operator TEXT CHECK (operator <> ''),
            CHECK ((reason = 'window') = (window_end IS NOT NULL)),
            CHECK ((reason = 'approved') = (approves IS NOT NULL AND operator IS NOT NULL))
        ) STRICT;
        CREATE TRIGGER rate_evidence_kept BEFORE UPDATE ON rate_evidence
            BEGIN SELECT RAISE(ABORT, 'rate_evidence is append-only'); END;
        CREATE TRIGGER rate_evidence_stays BEFORE DELETE ON rate_evidence
            BEGIN SELECT RAISE(ABORT, 'rate_evidence is append-only'); END;
        CREATE TRIGGER rate_approvals_kept BEFORE UPDATE ON rate_approvals
            BEGIN SELECT RAISE(ABORT, 'rate_approvals is append-only'); END;
        CREATE TRIGGER rate_approvals_stay BEFORE DELETE ON rate_approvals
            BEGIN SELECT RAISE(ABORT, 'rate_approvals is append-only'); END;
        CREATE TRIGGER rate_highs_kept BEFORE UPDATE ON rate_highs
            BEGIN SELECT RAISE(ABORT, 'rate_highs is append-only'); END;
        CREATE TRIGGER rate_highs_stay BEFORE DELETE ON rate_highs
            BEGIN SELECT RAISE(ABORT, 'rate_highs is append-only'); END;
        CREATE TRIGGER rate_highs_never_fall BEFORE INSERT ON rate_highs
            WHEN NEW.high < (SELECT max(high) FROM rate_highs)
            BEGIN SELECT RAISE(ABORT, 'the high never falls'); END;
        """,
    )
]


@dataclasses.dataclass(frozen=True)
class RateRules:
    """When a rate is trusted. Every limit is inclusive."""

    min_sources: int = 2  # that agree, for a sample
    agreement_percent: int = 10  # how far a source may be from the sources' median
    max_age_s: int = 120  # of an observation, and of the newest sample
    clock_skew_s: int = 5  # how far an observation may lie in the future
    min_liquidity_usd: int = 25_000  # for sources that report it
    market_window_s: int = 300
    market_min_samples: int = 3
    jump_percent: int = 100  # a sample above 1 + this times the long window's median, or below the inverse: quarantine
    high_window_s: int = 21_600  # the long window
    high_min_samples: int = 20
    high_growth_percent: int = 25  # of the high, in 24 hours
    high_max_age_s: int = DAY_S  # of the newest sample: how long the high is trusted without a market

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            smallest = 0 if field.name in ("clock_skew_s", "min_liquidity_usd") else 1
            if type(value) is not int or not smallest <= value <= 10**9:
                raise ConfigurationError(
                    f"rates_{field.name} is {value!r}; it must be a whole number from {smallest} to 1000000000"
                )


@dataclasses.dataclass(frozen=True)
class Rate:
    """What a token (or a SOL) is worth: pico_usd for a whole one of 10**decimals base units."""

    pico_usd: int
    decimals: int
    kind: Kind
    at: int  # seconds since 1970, of the newest evidence
    evidence: int  # the row in rate_evidence ("market") or rate_highs ("ath")

    @property
    def micro_usd_per_token(self) -> Fraction:
        return Fraction(self.pico_usd, PICO // MICRO)

    def base_units(self, micro_usd: int) -> int:
        """What micro_usd cost in base units, rounded up. Raises AmountError beyond 2^63-1."""
        if type(micro_usd) is not int or micro_usd < 1:
            raise AmountError(f"a price of {micro_usd!r} micro-USD; it must be a whole number from 1")
        scale: int = 10**self.decimals
        units = -(-micro_usd * (PICO // MICRO) * scale // self.pico_usd)
        if units > AMOUNT_MAX:
            raise AmountError(
                f"{micro_usd} micro-USD are {units} base units at {usd(self.pico_usd)} USD a token; "
                f"the ledger holds up to {AMOUNT_MAX}"
            )
        return units

    def micro_usd(self, base_units: int) -> int:
        """What base_units are worth in micro-USD, rounded down."""
        scale: int = 10**self.decimals
        return base_units * self.pico_usd // ((PICO // MICRO) * scale)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A deposit of SOL as tokens, and the two rates that it was turned with."""

    lamports: int
    tokens: int  # base units
    sol_rate: Rate
    token_rate: Rate

    def __str__(self) -> str:
        """The rates and where their evidence is, for a ledger's note."""
        sol, token = self.sol_rate, self.token_rate
        return (
            f"SOL at {usd(sol.pico_usd)} USD (rate {sol.evidence}), "
            f"token at {usd(token.pico_usd)} USD (rate {token.evidence})"
        )


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one source says: pico_usd for a whole token or SOL at a time; liquidity None where it has no such notion."""

    pico_usd: int
    at: int
    liquidity_usd: int | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One row of evidence. rate is None when it was refused; why says what spoke against it."""

    evidence: int
    asset: Asset
    at: int
    state: Literal["accepted", "quarantined", "refused"]
    rate: int | None
    why: str


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """What waits for an operator: `Rates.approve(id, operator, now)`. Rates are in pico-USD."""

    id: str  # "sample:17" or "high:4"
    asset: Asset
    at: int
    rate: int
    reference: int  # what it was judged against


class Source(Protocol):
    """A price of one asset. `read` raises PaymentsError when it has none that can be trusted."""

    name: str

    async def read(self, now: float) -> Observation: ...


class Rates:
    """The evidence in the database, and what it amounts to.

    decimals: of the token. first_high: the token's high, in pico-USD, before any evidence; without one, first-party
    prices are refused. It is written once: from then on the database knows.
    """

    def __init__(
        self,
        connection: Connection,
        rules: RateRules,
        *,
        decimals: int,
        token_sources: Sequence[Source] = (),
        sol_sources: Sequence[Source] = (),
        first_high: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if type(decimals) is not int or not 0 <= decimals <= 18:
            raise ConfigurationError(f"the token's decimals are {decimals!r}; they must be from 0 to 18")
        self.rules = rules
        self.decimals = decimals
        self._connection = connection
        self._clock = clock
        self._sources: dict[Asset, tuple[Source, ...]] = {"token": tuple(token_sources), "sol": tuple(sol_sources)}
        for asset, sources in self._sources.items():
            names = [source.name for source in sources]
            if len(set(names)) < len(names):
                raise ConfigurationError(f"{asset}_sources are {', '.join(names)}; one source is one voice")
        if first_high is not None:
            if type(first_high) is not int or not 1 <= first_high <= RATE_MAX:
                raise ConfigurationError(f"first_high is {first_high!r} pico-USD; it must be from 1 to {RATE_MAX}")
            with immediate(connection):
                connection.execute(
                    "INSERT INTO rate_highs (at, high, reason) SELECT 0, ?, 'first'"
                    " WHERE NOT EXISTS (SELECT 1 FROM rate_highs)",
                    (first_high,),
                )

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        connection: Connection,
        *,
        client: httpx2.AsyncClient | None = None,
        slot: Callable[[], Awaitable[int]] | None = None,
    ) -> Rates:
        """The sources that are configured. client and slot: for those over HTTP, and what JupiterSource asks.

        Without a client there are no sources: such Rates only read what another process records. Raises
        ConfigurationError.
        """

        def source(asset: Asset, name: str) -> Source:
            if name == "fixed":
                return FixedSource(getattr(settings, f"rates_fixed_{asset}"))
            if name == "file":
                return FileSource(getattr(settings, f"rates_{asset}_file"))
            assert client is not None
            if name == "pyth":
                return PythSource(client, settings.pyth_sol_feed, url=settings.pyth_url)
            if slot is None:
                raise ConfigurationError(f'rates_{asset}_sources has "jupiter", which needs a cluster: set rpc_urls')
            return JupiterSource(
                client,
                SOL_MINT if asset == "sol" else str(settings.mint),
                decimals=SOL_DECIMALS if asset == "sol" else settings.token_decimals,
                slot=slot,
                url=settings.jupiter_url,
                api_key=settings.secret("jupiter_key_file").decode() if settings.jupiter_key_file else None,
            )

        asked = client is not None
        return cls(
            connection,
            settings.rates,
            decimals=settings.token_decimals,
            token_sources=[source("token", name) for name in settings.rates_token_sources if asked],
            sol_sources=[source("sol", name) for name in settings.rates_sol_sources if asked],
            first_high=settings.rates_first_high,
        )

    # Reading: what prices are made of.

    def token_rate(self, kind: Kind, now: float) -> Rate:
        """The token's rate: "market" for proxied services and deposits, "ath" for first-party services.

        Raises RateError when it is unknown, stale, or in quarantine.
        """
        if kind == "market":
            return self._market("token", now)
        if kind == "ath":
            return self._high(now)
        raise ValueError(f'kind is {kind!r}; it must be "market" or "ath"')

    def sol_rate(self, now: float) -> Rate:
        """SOL's rate on the market. Raises RateError."""
        return self._market("sol", now)

    def convert_sol(self, lamports: int, now: float) -> Conversion:
        """What a deposit of lamports is worth in base units of the token, rounded down; may be 0.

        Raises RateError, AmountError.
        """
        if type(lamports) is not int or not 1 <= lamports <= AMOUNT_MAX:
            raise AmountError(f"{lamports!r} lamports; it must be a whole number from 1 to {AMOUNT_MAX}")
        sol, token = self.sol_rate(now), self.token_rate("market", now)
        tokens = lamports * sol.pico_usd * 10**self.decimals // (LAMPORTS * token.pico_usd)
        if tokens > AMOUNT_MAX:
            raise AmountError(f"{lamports} lamports are {tokens} base units; the ledger holds up to {AMOUNT_MAX}")
        return Conversion(lamports, tokens, sol, token)

    def _market(self, asset: Asset, now: float) -> Rate:
        newest = self._newest(asset, now, self.rules.max_age_s)
        window = self._counted(asset, int(now) - self.rules.market_window_s, int(now), self._approved(asset))
        if len(window) < self.rules.market_min_samples:
            raise RateError(
                f"{asset}: {len(window)} samples in the last {self.rules.market_window_s} s; "
                f"a rate needs {self.rules.market_min_samples}"
            )
        decimals = SOL_DECIMALS if asset == "sol" else self.decimals
        return Rate(statistics.median_low(window), decimals, "market", newest.at, newest.evidence)

    def _high(self, now: float) -> Rate:
        row = self._connection.execute("SELECT id, high FROM rate_highs ORDER BY id DESC LIMIT 1").fetchone()
        if row is None:
            raise RateError("token: no all-time high is known; set rates_first_high to the token's past high")
        # Without a market the high may have passed unseen; for some hours that is no reason to stop selling.
        newest = self._newest("token", now, self.rules.high_max_age_s)
        return Rate(row[1], self.decimals, "ath", newest.at, row[0])

    def _newest(self, asset: Asset, now: float, max_age_s: int) -> Sample:
        """The accepted sample that was recorded last. Raises RateError when it is missing, too old, or of the future.

        By the order of recording, not by time: after a clock was put right, what it recorded before does not count.
        """
        evidence = self._last_counted(asset)
        newest = self._sample(evidence) if evidence else None
        if newest is not None and newest.at > now + self.rules.clock_skew_s:
            raise RateError(f"{asset}: the newest rate is {newest.at - int(now)} s in the future; the clock went back")
        if newest is None or now - newest.at > max_age_s:
            age = "there is no rate yet" if newest is None else f"the newest rate is {int(now) - newest.at} s old"
            allowed = "" if newest is None else f", at most {max_age_s} s are trusted"
            raise RateError(f"{asset}: {age}{allowed}{self._last_refusal(asset, newest)}")
        return newest

    def _last_refusal(self, asset: Asset, newest: Sample | None) -> str:
        """Why the latest attempt brought nothing, as the end of a message."""
        row = self._connection.execute(
            "SELECT id FROM rate_evidence WHERE asset = ? ORDER BY id DESC LIMIT 1", (asset,)
        ).fetchone()
        if row is None or (newest is not None and row[0] <= newest.evidence):
            return ""
        last = self._sample(row[0])
        waits = f" (sample:{last.evidence} waits for approval)" if last.state == "quarantined" else ""
        return f"; {last.why}{waits}"

    def _sample(self, evidence: int) -> Sample:
        asset, at, state, rate, detail = self._connection.execute(
            "SELECT asset, at, state, rate, detail FROM rate_evidence WHERE id = ?", (evidence,)
        ).fetchone()
        return Sample(evidence, asset, at, state, rate, json.loads(detail)["why"])

    def _approved(self, asset: Asset) -> int:
        """The last sample that an operator let count, or 0: what came before it says nothing about what follows."""
        approved = self._connection.execute(
            "SELECT id FROM rate_approvals CROSS JOIN rate_evidence ON id = evidence_id WHERE asset = ?"
            " ORDER BY evidence_id DESC LIMIT 1",
            (asset,),
        ).fetchone()
        return approved[0] if approved else 0

    def _last_counted(self, asset: Asset) -> int:
        """The last sample that counts, or 0."""
        accepted = self._connection.execute(
            "SELECT id FROM rate_evidence WHERE asset = ? AND state = 'accepted' ORDER BY id DESC LIMIT 1", (asset,)
        ).fetchone()
        return max(accepted[0] if accepted else 0, self._approved(asset))

    def _counted(self, asset: Asset, after: int, until: int, since_id: int = 0) -> list[int]:
        """The rates of the samples that count with after < at <= until."""
        rows = self._connection.execute(
            "SELECT rate FROM rate_counted WHERE asset = ? AND at > ? AND at <= ? AND id >= ?",
            (asset, after, until, since_id),
        )
        return [rate for (rate,) in rows]

    # Measuring.

    async def refresh(self) -> dict[Asset, Sample]:
        """Asks all sources at once and appends what they say. A source that fails is a voice less, never an error."""
        now = self._clock()
        asked = [(asset, source) for asset, sources in self._sources.items() for source in sources]
        answers = await asyncio.gather(*(_ask(source, now) for _, source in asked))
        samples = {}
        for asset, sources in self._sources.items():
            if sources:
                said = {source.name: a for (of, source), a in zip(asked, answers, strict=True) if of == asset}
                samples[asset] = self.record(asset, said, now)
        return samples

    async def run(self, interval_s: float = 30.0) -> None:
        """Refreshes for ever. What goes wrong is logged; prices are refused meanwhile."""
        while True:
            try:
                for sample in (await self.refresh()).values():
                    if sample.state != "accepted":
                        logger.warning("%s: rate %s: %s", sample.asset, sample.state, sample.why)
            except PaymentsError as error:
                logger.error("rates cannot be recorded: %s", error)
            await asyncio.sleep(interval_s)

    def record(self, asset: Asset, said: Mapping[str, Observation | str], now: float) -> Sample:
        """Judges what each source said (an Observation, or why it has none), appends it, and raises the high.

        One transaction; raises StorageError.
        """
        at = int(now)
        with immediate(self._connection):
            rate, why, voices = self._agreed(said, at)
            reference = None
            state = "accepted" if rate is not None else "refused"
            if rate is not None:
                reference, jump = self._jump(asset, rate, at)
                if jump:
                    state, why = "quarantined", jump
            detail = json.dumps({"why": why, "reference": reference, "sources": voices})
            cursor = self._connection.execute(
                "INSERT INTO rate_evidence (asset, at, state, rate, detail) VALUES (?, ?, ?, ?, ?)",
                (asset, at, state, rate, detail),
            )
            if asset == "token":
                self._judge_windows(at)
        return self._sample(int(cursor.lastrowid or 0))

    def _agreed(
        self, said: Mapping[str, Observation | str], at: int
    ) -> tuple[int | None, str, dict[str, dict[str, Any]]]:
        """(the sources' common rate or None, why not, what each said)."""
        voices: dict[str, dict[str, Any]] = {}
        heard: dict[str, int] = {}
        for name, answer in said.items():
            refusal = answer if isinstance(answer, str) else self._refusal(answer, at)
            voices[name] = {} if isinstance(answer, str) else dataclasses.asdict(answer)
            if refusal:
                voices[name]["refused"] = refusal
            elif isinstance(answer, Observation):
                heard[name] = answer.pico_usd
        refusals = "; ".join(f"{name}: {voice['refused']}" for name, voice in voices.items() if "refused" in voice)
        if not heard:
            return None, refusals or "no source is configured", voices
        middle = statistics.median_low(heard.values())
        within = self.rules.agreement_percent
        agreeing = [rate for rate in heard.values() if abs(rate - middle) * 100 <= middle * within]
        # A minority that agrees with itself is no agreement.
        if len(agreeing) * 2 <= len(heard):
            told = ", ".join(f"{name} says {usd(rate)} USD" for name, rate in heard.items())
            return None, f"the sources differ by more than {within} %: {told}", voices
        if len(agreeing) < self.rules.min_sources:
            why = f"{len(agreeing)} of the sources agree, a rate needs {self.rules.min_sources}"
            return None, f"{why}; {refusals}" if refusals else why, voices
        return statistics.median_low(agreeing), "", voices

    def _refusal(self, observation: Observation, at: int) -> str:
        """What speaks against an observation by itself; empty: nothing."""
        rules = self.rules
        if type(observation.pico_usd) is not int or not 1 <= observation.pico_usd <= RATE_MAX:
            return f"{observation.pico_usd!r} pico-USD is no price from 1 to {RATE_MAX}"
        if observation.at > at + rules.clock_skew_s:
            return f"its price is {observation.at - at} s in the future"
        if at - observation.at > rules.max_age_s:
            return f"its price is {at - observation.at} s old, at most {rules.max_age_s} s are trusted"
        if observation.liquidity_usd is not None and observation.liquidity_usd < rules.min_liquidity_usd:
            return f"{observation.liquidity_usd} USD of liquidity, {rules.min_liquidity_usd} are needed"
        return ""

    def _jump(self, asset: Asset, rate: int, at: int) -> tuple[int | None, str]:
        """(what the rate is judged against, why it is a jump or "").

        That is the median of the long window, since the last approval; then the newest sample that counts, then the
        token's high, of which only a rise beyond it can be told.
        """
        counted = self._counted(asset, at - self.rules.high_window_s, at, self._approved(asset))
        falls = True
        if not counted:
            latest = self._connection.execute(
                "SELECT rate FROM rate_evidence WHERE id = ?", (self._last_counted(asset),)
            ).fetchone()
            if latest is None and asset == "token":
                latest = self._connection.execute("SELECT max(high) FROM rate_highs").fetchone()
                falls = False
            if latest is None or latest[0] is None:
                return None, ""
            counted = [latest[0]]
        reference = statistics.median_low(counted)
        most = 100 + self.rules.jump_percent
        if rate * 100 > reference * most or (falls and rate * most < reference * 100):
            return reference, (
                f"{usd(rate)} USD after {usd(reference)}: more than {self.rules.jump_percent} % away at once"
            )
        return reference, ""

    def _judge_windows(self, at: int) -> None:
        """Raises the high to the medians of the long windows that have ended, as far as its daily growth allows."""
        width = self.rules.high_window_s
        known = self._connection.execute("SELECT max(window_end), max(high) FROM rate_highs").fetchone()
        if known[1] is None:
            return
        since = known[0] or 0
        ends = [
            row[0]
            for row in self._connection.execute(
                "SELECT DISTINCT (at / :width + 1) * :width FROM rate_evidence WHERE asset = 'token'"
                " AND at >= :since AND (at / :width + 1) * :width <= :at ORDER BY 1",
                {"width": width, "since": since, "at": at},
            )
        ]
        for end in ends:
            high = self._connection.execute("SELECT max(high) FROM rate_highs").fetchone()[0]
            samples = self._counted("token", max(end - width, since) - 1, end - 1)
            candidate = statistics.median_low(samples) if len(samples) >= self.rules.high_min_samples else None
            if candidate is not None:
                high = max(high, min(candidate, self._allowed(at)))
            self._connection.execute(
                "INSERT INTO rate_highs (at, high, reason, window_end, samples, candidate)"
                " VALUES (?, ?, 'window', ?, ?, ?)",
                (at, high, end, len(samples), candidate),
            )
            if candidate is not None and candidate > high:
                logger.warning("the high is held at %s USD; a window's median was %s", usd(high), usd(candidate))

    def _allowed(self, at: int) -> int:
        """How far the high may rise by itself: a percentage above what it was 24 hours ago."""
        (then,) = self._connection.execute(
            "SELECT max(high) FROM rate_highs WHERE at <= ?", (max(at - DAY_S, 0),)
        ).fetchone()
        return int(then) * (100 + self.rules.high_growth_percent) // 100

    # What waits for an operator.

    def quarantined(self) -> list[Quarantined]:
        """The samples since the last that counted, and the medians of windows above the high; newest first."""
        waiting = []
        for asset in self._sources:
            samples = self._connection.execute(
                "SELECT id, at, rate, json_extract(detail, '$.reference') FROM rate_evidence"
                " WHERE asset = ? AND state = 'quarantined' AND id > ? ORDER BY id DESC",
                (asset, self._last_counted(asset)),
            )
            waiting += [Quarantined(f"sample:{id}", asset, at, rate, known) for id, at, rate, known in samples]
        highs = self._connection.execute(
            "SELECT id, at, candidate, high FROM rate_highs WHERE candidate > (SELECT max(high) FROM rate_highs)"
            " ORDER BY id DESC"
        )
        return waiting + [Quarantined(f"high:{id}", "token", at, rate, high) for id, at, rate, high in highs]

    def approve(self, id: str, operator: str, now: float) -> None:
        """Lets a quarantined sample count, and what follows be judged against it; or raises the high to a median.

        The operator's name is kept with the evidence. Raises NotFoundError, and ConflictError for what no longer waits:
        it was approved, or the rate has come back, or the high has passed it.
        """
        if not operator or not operator.isprintable():
            raise ConfigurationError(f"operator is {operator!r}; it must be a name")
        with immediate(self._connection):
            if id not in {waiting.id for waiting in self.quarantined()}:
                table, _, number = id.partition(":")
                table = {"sample": "rate_evidence", "high": "rate_highs"}.get(table, "")
                if table and number.isascii() and number.isdigit():
                    found = self._connection.execute(f"SELECT 1 FROM {table} WHERE id = ?", (int(number),)).fetchone()
                    if found:
                        raise ConflictError(f"{id} waits for nothing: see the quarantine for what does")
                raise NotFoundError(f"{id!r} is not in quarantine")
            kind, _, number = id.partition(":")
            if kind == "sample":
                self._connection.execute(
                    "INSERT INTO rate_approvals (evidence_id, at, operator) VALUES (?, ?, ?)",
                    (int(number), int(now), operator),
                )
            else:
                self._connection.execute(
                    "INSERT INTO rate_highs (at, high, reason, approves, operator)"
                    " SELECT ?, candidate, 'approved', id, ? FROM rate_highs WHERE id = ?",
                    (int(now), operator, int(number)),
                )


async def _ask(source: Source, now: float) -> Observation | str:
    """What the source says, or why it says nothing."""
    try:
        return await source.read(now)
    except PaymentsError as error:
        return str(error)
    except Exception as error:  # a defect of one source must not stop the others
        logger.exception("%s failed", source.name)
        return f"failed with {type(error).__name__}"


# The sources.


class FixedSource:
    """An operator's word: always the same rate, always fresh. For tests, demos and tokens without a market."""

    name = "fixed"

    def __init__(self, pico_usd: int) -> None:
        self.pico_usd = pico_usd

    async def read(self, now: float) -> Observation:
        return Observation(self.pico_usd, int(now))


class FileSource:
    """A JSON file that another program keeps: {"usd": "0.0012", "at": 1790000000}, at in seconds since 1970.

    Replace it whole (write beside it, then rename). A file that others than its owner may write is refused.
    """

    name = "file"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)

    async def read(self, now: float) -> Observation:
        try:
            with self.path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                if mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise RateError(f"{self.path} may be written by others (mode {mode:03o}); chmod go-w")
                content = _parse(file.read(4096))
        except OSError as error:
            raise RateError(f"{self.path}: {error.strerror}") from None
        if not isinstance(content, dict) or set(content) != {"usd", "at"} or type(content["at"]) is not int:
            raise RateError(f'{self.path} must hold {{"usd": "0.0012", "at": SECONDS}}')
        try:
            return Observation(parse_usd(content["usd"], "usd", scale=PICO), content["at"])
        except ConfigurationError as error:
            raise RateError(f"{self.path}: {error}") from None


class JupiterSource:
    """Jupiter's Price API v3, of one mint: the last swap's price, after Jupiter's own filters.

    Its answer has the block of the price and no time, so `slot` asks the cluster for the current one. An answer
    without a price, block, liquidity or with other decimals is refused. https://dev.jup.ag/docs/price
    """

    name = "jupiter"
    SLOT_MS = 400  # nominal; where slots are shorter the price is younger than it seems

    def __init__(
        self,
        client: httpx2.AsyncClient,
        mint: str,
        *,
        decimals: int,
        slot: Callable[[], Awaitable[int]],
        url: str = "https://api.jup.ag/price/v3",
        api_key: str | None = None,
    ) -> None:
        self.mint = mint
        self._client = client
        self._decimals = decimals
        self._slot = slot
        self._url = url
        self._headers = {"x-api-key": api_key} if api_key else {}

    async def read(self, now: float) -> Observation:
        answer = await _get(self._client, self._url, {"ids": self.mint}, self._headers)
        price = answer.get(self.mint) if isinstance(answer, dict) else None
        if price is None:
            raise RateError("it has no reliable price for the mint")
        if not isinstance(price, dict):
            raise RateError("its answer is not a price")
        if (decimals := price.get("decimals")) != self._decimals:
            raise RateError(f"it says the mint has {decimals!r} decimals, expected {self._decimals}")
        block = price.get("blockId")
        if type(block) is not int:
            raise RateError(f"blockId is {block!r}; the price's age is unknown")
        age_ms = (await self._slot() - block) * self.SLOT_MS
        return Observation(
            _pico(price.get("usdPrice"), "usdPrice"),
            int(now) - age_ms // 1000,
            int(_number(price.get("liquidity"), "liquidity")),
        )


class PythSource:
    """Pyth's price of one feed, from a Hermes server. There are feeds for SOL and large tokens only.

    A price whose confidence interval is wider than max_confidence_percent is refused.
    https://docs.pyth.network/price-feeds/core/api-instances-and-providers/hermes
    """

    name = "pyth"

    def __init__(
        self,
        client: httpx2.AsyncClient,
        feed: str = PYTH_SOL_USD,
        *,
        url: str = "https://hermes.pyth.network",
        max_confidence_percent: int = 1,
    ) -> None:
        self.feed = feed.removeprefix("0x").lower()
        self._client = client
        self._url = url.rstrip("/") + "/v2/updates/price/latest"
        self._max_confidence_percent = max_confidence_percent

    async def read(self, now: float) -> Observation:
        answer = await _get(self._client, self._url, {"ids[]": self.feed, "parsed": "true"}, {})
        try:
            (update,) = answer["parsed"]
            if update["id"] != self.feed:
                raise RateError(f"it answers for the feed {update['id']!r}")
            price = update["price"]
            mantissa, confidence = (int(_digits(price[key])) for key in ("price", "conf"))
            exponent, at = price["expo"], price["publish_time"]
        except (TypeError, KeyError, ValueError):
            raise RateError("its answer is not a price") from None
        if type(exponent) is not int or not -30 <= exponent <= 12 or type(at) is not int:
            raise RateError(f"expo is {exponent!r} and publish_time {at!r}; they must be whole numbers")
        if mantissa <= 0 or confidence * 100 > mantissa * self._max_confidence_percent:
            raise RateError(
                f"{mantissa} with a confidence of {confidence}; it must be above 0 and within "
                f"{self._max_confidence_percent} %"
            )
        return Observation(int(mantissa * PICO * Fraction(10) ** exponent), at)


ANSWER_MAX = 256 * 1024  # bytes of a source's answer
TIMEOUT_S = 10.0


async def _get(client: httpx2.AsyncClient, url: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Any:
    """The JSON at the URL, numbers as int and Decimal. Raises RateError; its message has no header and no query."""
    try:
        async with asyncio.timeout(TIMEOUT_S), client.stream("GET", url, params=query, headers=headers) as response:
            if response.status_code != 200:
                raise RateError(f"it answers with HTTP {response.status_code}")
            body = b""
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > ANSWER_MAX:
                    raise RateError(f"its answer is longer than {ANSWER_MAX} bytes")
    except TimeoutError:
        raise RateError(f"no answer within {TIMEOUT_S:g} s") from None
    except httpx2.HTTPError as error:
        raise RateError(f"it cannot be reached: {type(error).__name__}") from None
    return _parse(body)


def _parse(text: bytes) -> Any:
    """JSON with exact numbers; NaN and Infinity are refused. Raises RateError."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_float=Decimal, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise RateError("its answer is not JSON") from None


def _number(value: object, key: str) -> Decimal | int:
    """A finite number that is not negative and of a size that can be computed with. Raises RateError."""
    if type(value) not in (int, Decimal) or not 0 <= value < 10**30:  # type: ignore[operator]
        raise RateError(f"{key} is {value!r}; it must be a number from 0")
    return value  # type: ignore[return-value]


_EXACT = Context(prec=60, rounding=ROUND_FLOOR)


def _pico(value: object, key: str) -> int:
    """USD as pico-USD, rounded down."""
    return int(_EXACT.multiply(Decimal(_number(value, key)), Decimal(PICO)))


def _digits(value: object) -> str:
    """A string of an integer of up to 19 digits, as int64 are written. Raises ValueError."""
    if not isinstance(value, str) or not value.removeprefix("-").isdigit() or not value.isascii() or len(value) > 20:
        raise ValueError(value)
    return value


def usd(pico_usd: int) -> str:
    """pico-USD as a decimal number of USD, exact: 1_200_000_000 -> "0.0012"."""
    whole, fraction = divmod(pico_usd, PICO)
    return f"{whole}.{fraction:012d}".rstrip("0").rstrip(".")
