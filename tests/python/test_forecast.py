"""`Forecast`: numbers, frames, words and pictures; prices from returns; the series and the example that ship."""

from __future__ import annotations

import math
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy
import pandas
import PIL.Image
import pytest

from diffusionz import ArgumentError, Chronos2, Forecast, datasets
from diffusionz._series import Names, to_rows
from diffusionz.forecast import Labels
from diffusionz.returns import to_prices

ROOT = pathlib.Path(__file__).resolve().parents[2]
HORIZON = 12


@pytest.fixture(scope="module")
def demo() -> Iterator[Chronos2]:
    with Chronos2("demo", device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def airline() -> Any:
    return pandas.read_csv(datasets.path("airline"))


def made(
    histories: list[list[float]],
    quantiles: Any,
    levels: tuple[float, ...] = (0.1, 0.5, 0.9),
    labels: Labels | None = None,
) -> Forecast:
    """A forecast of chosen numbers: quantiles [series, levels, horizon]."""
    values = numpy.asarray(quantiles, numpy.float32)
    rows, names = to_rows(histories, values.shape[2], 8192)
    return Forecast(
        values, list(levels), list(range(len(levels))), rows, labels or Labels(names),
        lambda: numpy.zeros(len(values), bool),
    )  # fmt: skip


# --- Numbers ---


def test_quantiles_levels_mean(demo: Chronos2) -> None:
    series = numpy.sin(numpy.arange(100) / 3)
    forecast = demo.forecast([series, series[::-1]], HORIZON, [0.05, 0.5, 0.95])
    assert forecast.quantiles.shape == (2, 3, HORIZON)
    assert forecast.quantiles.dtype == numpy.float32
    assert forecast.levels == [0.05, 0.5, 0.95]
    assert forecast.horizon == HORIZON
    assert (forecast.mean == forecast.quantiles[:, 1]).all()
    assert (forecast.quantile(0.95) == forecast.quantiles[:, 2]).all()
    assert (forecast.quantile(1 - 0.05) == forecast.quantiles[:, 2]).all()
    with pytest.raises(ArgumentError, match=r"0\.1 was not asked for; there are 0\.05, 0\.5, 0\.95"):
        forecast.quantile(0.1)
    assert repr(forecast) == "<Forecast of 2 series, 12 steps, 3 levels>"
    assert (forecast.history(1) == series[::-1].astype(numpy.float32)).all()


def test_levels_that_were_not_asked_for_are_not_shown(demo: Chronos2) -> None:
    forecast = demo.forecast([1.0, 2.0, 4.0], HORIZON, [0.3])
    assert forecast.quantiles.shape == (1, 1, HORIZON)
    assert list(forecast.to_frame().columns) == ["item_id", "step", "target_name", "predictions", "0.3"]
    assert "80% between" in forecast.summary()
    assert forecast.mean.shape == (1, HORIZON)


def test_series_by_number_slice_and_name(demo: Chronos2) -> None:
    times = pandas.date_range("2024-01-01", periods=20)
    df = pandas.concat(
        pandas.DataFrame(
            {"item_id": name, "timestamp": times, "low": numpy.arange(20.0) + i, "high": numpy.arange(20.0) * i}
        )
        for i, name in enumerate(("x", "y", "z"))
    )
    forecast = demo.forecast_df(df, target=["high", "low"], prediction_length=HORIZON, to_frame=False)
    assert len(forecast) == 6
    assert forecast.item_ids == ["x", "x", "y", "y", "z", "z"]
    assert forecast.target_names == ["high", "low"] * 3
    assert forecast.names() == ["x, high", "x, low", "y, high", "y, low", "z, high", "z, low"]
    assert demo.forecast(numpy.ones((1, 2, 9)), 2).names() == ["target_0", "target_1"]
    assert demo.forecast(numpy.ones((2, 9)), 2).names() == ["series 0", "series 1"]
    assert demo.forecast(numpy.ones(9), 2).names() == [""]
    for i, one in enumerate(forecast):
        assert len(one) == 1
        assert (one.quantiles[0] == forecast.quantiles[i]).all()
        assert one.names() == [forecast.names()[i]]
        assert (one.history(0) == forecast.history(i)).all()
        assert isinstance(one.trend, str)
    assert (forecast[-1].quantiles == forecast.quantiles[5:]).all()
    assert (forecast[1:4].quantiles == forecast.quantiles[1:4]).all()
    assert (forecast["y"].quantiles == forecast.quantiles[2:4]).all()
    assert (forecast["low"].quantiles == forecast.quantiles[1::2]).all()
    assert forecast["low"]["z"].summary() == forecast[5].summary()
    whole = forecast.to_frame()
    pandas.testing.assert_frame_equal(
        forecast["low"].to_frame(), whole[whole["target_name"] == "low"].reset_index(drop=True)
    )
    assert forecast.trend == [one.trend for one in forecast]
    for wrong, error in ((6, IndexError), ("w", KeyError)):
        with pytest.raises(error):
            forecast[wrong]


def test_a_frame_of_arrays(demo: Chronos2) -> None:
    forecast = demo.forecast([numpy.arange(9.0), numpy.ones((2, 9))], 3, [0.1, 0.5])
    frame = forecast.to_frame()
    assert list(frame.columns) == ["item_id", "step", "target_name", "predictions", "0.1", "0.5"]
    assert frame["item_id"].tolist() == [0] * 3 + [1] * 6
    assert frame["step"].tolist() == [1, 2, 3] * 3
    assert frame["target_name"].tolist() == ["target"] * 3 + ["target_0"] * 3 + ["target_1"] * 3
    assert (frame["predictions"].to_numpy() == forecast.mean.ravel()).all()
    assert (frame["0.1"].to_numpy() == forecast.quantiles[:, 0].ravel()).all()


# --- In words ---


def test_a_sentence() -> None:
    labels = Labels(Names(1), targets=["close"])
    rising = numpy.linspace([[66_900.0], [70_465.0], [75_300.0]], [[66_900], [71_020], [75_300]], 7, axis=1)[..., 0]
    assert made([[70_000, 70_465]], rising[None], labels=labels).summary() == (
        "close: 70,465 now, 71,020 expected after 7 steps (+0.8%), 80% between 66,900 and 75,300"
    )
    one = made([[0.5, 1.0, numpy.nan]], [[[0.911], [0.95], [1.02]]])
    assert one.summary() == "1.000 now, 0.950 expected after 1 step (-5.0%), 80% between 0.911 and 1.020"
    below_zero = made([[-3.0]], [[[-8.0], [-6.0], [-4.0]]])
    assert below_zero.summary() == "-3.00 now, -6.00 expected after 1 step, 80% between -8.00 and -4.00"
    flat = made([[5.0]], [[[5.0], [5.0], [5.0]]])
    assert flat.summary() == "5.00 now, 5.00 expected after 1 step (+0.0%), 80% between 5.00 and 5.00"
    vast = made([[1e20]], [[[1e20], [3e38], [3.4e38]]])
    assert vast.summary().startswith("1e+20 now, 3e+38 expected after 1 step (+")
    tiny = made([[1e-9]], [[[1e-9], [2e-9], [3e-9]]])
    assert tiny.summary() == "1e-09 now, 2e-09 expected after 1 step (+100.0%), 80% between 1e-09 and 3e-09"


@pytest.mark.parametrize(
    ("freq", "after"),
    [("D", "3 days"), ("h", "3 hours"), ("15min", "45 minutes"), ("MS", "3 months"), ("QE", "3 quarters"),
     ("W", "3 weeks"), ("B", "3 business days"), ("YS", "3 years"), ("2h", "6 hours")],
)  # fmt: skip
def test_a_sentence_tells_the_time(demo: Chronos2, freq: str, after: str) -> None:
    times = pandas.date_range("2024-01-01", periods=30, freq=freq)
    df = pandas.DataFrame({"timestamp": times, "v": numpy.arange(30.0)})
    forecast = demo.forecast_df(df, id_column=None, target="v", prediction_length=3, to_frame=False)
    assert f"expected after {after} " in forecast.summary()
    assert forecast.summary().startswith("v: 29")


def test_up_down_flat() -> None:
    now = [[1.0, 2.0, numpy.nan]]
    for low, median, high, word in ((2.1, 3, 4, "up"), (0, 1, 1.9, "down"), (1.9, 3, 4, "flat"), (2, 2, 2, "flat")):
        first = [[9.0], [9.0], [9.0]]  # of the steps, the last counts
        assert made(now, [numpy.hstack([first, [[low], [median], [high]]])]).trend == word


def test_an_anomaly_is_what_the_model_did_not_expect(demo: Chronos2) -> None:
    rng = numpy.random.default_rng(0)
    usual = 10 + numpy.sin(numpy.arange(200) * math.tau / 24) + 0.1 * rng.normal(size=200)
    odd = usual.copy()
    odd[-1] += 3
    for series in (odd, 1e6 * odd, numpy.append(numpy.full(50, 7.0), 8.0)):
        assert demo.forecast(series, HORIZON).trend == "anomaly"
    earlier, ended, alone = odd.copy(), numpy.append(usual, numpy.nan), numpy.array([3.0])
    earlier[-1], earlier[-2] = usual[-1], odd[-1]
    for series in (usual, ended, alone, numpy.full(50, 7.0), numpy.append(numpy.full(9, numpy.nan), 1.0)):
        assert demo.forecast(series, HORIZON).trend != "anomaly"


def test_few_of_the_usual_are_anomalies(demo: Chronos2) -> None:
    """The interval is meant to hold 98 in 100."""
    rng = numpy.random.default_rng(1)
    count, length = 300, 150
    steps = numpy.arange(length)
    periods, phases = rng.uniform(6, 40, (count, 1)), rng.uniform(0, math.tau, (count, 1))
    series = numpy.sin(math.tau * steps / periods + phases) + rng.uniform(0.05, 1, (count, 1)) * rng.normal(
        size=(count, length)
    )
    words = demo.forecast(series, 1).trend
    assert words.count("anomaly") <= 0.06 * count


def test_the_step_before_is_what_would_have_been_forecast(demo: Chronos2) -> None:
    """With covariates, whose known future includes the latest step, and series of any length."""
    rng = numpy.random.default_rng(2)
    entries = [
        {
            "target": rng.normal(size=(2, length)),
            "past_covariates": {"a": rng.normal(size=length), "b": rng.normal(size=length)},
            "future_covariates": {"b": rng.normal(size=HORIZON)},
        }
        for length in (40, 1, 17)
    ]
    rows, _ = to_rows(entries, HORIZON, 8192)
    before, cut = rows.one_step_back()
    assert cut.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    for i in (0, 2):
        entry = entries[i]
        cut_entry = {
            "target": entry["target"][:, :-1],
            "past_covariates": {name: values[:-1] for name, values in entry["past_covariates"].items()},
            "future_covariates": {"b": entry["past_covariates"]["b"][-1:]},
        }
        expected, _ = to_rows(cut_entry, 1, 8192)
        assert expected.future is not None
        assert before.future is not None
        for row in range(4):
            assert (before.row(4 * i + row) == expected.row(row)).all()
            assert numpy.array_equal(before.future[4 * i + row], expected.future[row], equal_nan=True)
    assert (before.row(4) == rows.row(4)).all()


# --- Prices from returns ---


def test_prices_are_exact_for_independent_normal_returns() -> None:
    levels = [0.05, 0.1, 0.5, 0.8, 0.99]
    scores = numpy.array([statistics.NormalDist().inv_cdf(level) for level in levels])
    drifts, sigmas = numpy.array([0.01, -0.02, 0.03, 0.0]), numpy.array([0.02, 0.05, 0.01, 0.03])
    returns = (drifts + scores[:, None] * sigmas)[None].astype(numpy.float32)
    prices = to_prices(returns, levels, numpy.array([200.0], numpy.float32), constrain_ohlc=False)
    exact = 200 * numpy.exp(numpy.cumsum(drifts) + scores[:, None] * numpy.sqrt(numpy.cumsum(sigmas**2)))
    numpy.testing.assert_allclose(prices[0], exact, rtol=1e-5)


def test_prices_from_returns(demo: Chronos2) -> None:
    rng = numpy.random.default_rng(3)
    prices = 100 * numpy.exp(0.02 * rng.normal(size=(2, 80)).cumsum(axis=1))
    prices[0, 30:33] = numpy.nan
    forecast = demo.forecast(prices, HORIZON, returns=True)
    of_returns = demo.forecast(numpy.diff(numpy.log(prices.astype(numpy.float32).astype(float)), axis=1), HORIZON)
    expected = to_prices(
        of_returns.quantiles, forecast.levels, prices[:, -1].astype(numpy.float32), constrain_ohlc=False
    )
    numpy.testing.assert_allclose(forecast.quantiles, expected, rtol=1e-4)
    assert (numpy.diff(forecast.quantiles, axis=1) >= 0).all() == (numpy.diff(of_returns.quantiles, axis=1) >= 0).all()
    assert numpy.array_equal(forecast.history(0), prices[0].astype(numpy.float32), equal_nan=True)
    spread = forecast.quantile(0.9) - forecast.quantile(0.1)
    assert (spread[:, -1] > spread[:, 0]).all()
    assert isinstance(forecast.trend, list)


def test_returns_with_covariates_and_candles(demo: Chronos2) -> None:
    rng = numpy.random.default_rng(4)
    prices = 50 * numpy.exp(0.03 * rng.normal(size=(4, 60)).cumsum(axis=1))
    past, future = rng.normal(size=60), rng.normal(size=HORIZON)
    entry = {"target": prices, "past_covariates": {"x": past}, "future_covariates": {"x": future}}
    of_returns = demo.forecast(
        {
            "target": numpy.diff(numpy.log(prices.astype(numpy.float32).astype(float)), axis=1),
            "past_covariates": {"x": past[1:]},
            "future_covariates": {"x": future},
        },
        HORIZON,
    )
    forecast = demo.forecast(entry, HORIZON, returns=True, constrain_ohlc=True)
    expected = to_prices(
        of_returns.quantiles, forecast.levels, prices[:, -1].astype(numpy.float32), constrain_ohlc=True
    )
    numpy.testing.assert_allclose(forecast.quantiles, expected, rtol=1e-4)
    assert (forecast.quantiles[1] == forecast.quantiles.max(axis=0)).all()
    assert (forecast.quantiles[2] == forecast.quantiles.min(axis=0)).all()
    # The history that is read is as long as without returns.
    short = demo.forecast(prices[:, -17:], HORIZON, returns=True).quantiles
    assert (demo.forecast(prices, HORIZON, returns=True, context_length=16).quantiles == short).all()


# --- Pictures ---


def lines(panel: Any) -> dict[str, numpy.ndarray]:
    return {line.get_label(): line.get_ydata() for line in panel.get_lines()}


def test_a_picture_shows_the_numbers(demo: Chronos2, airline: Any, tmp_path: pathlib.Path) -> None:
    forecast = demo.forecast_df(
        airline,
        id_column=None,
        timestamp_column="month",
        target="passengers",
        prediction_length=HORIZON,
        to_frame=False,
    )
    figure = forecast.plot(tmp_path / "out.png")
    (panel,) = figure.axes
    drawn = lines(panel)
    assert drawn["history"].tolist() == airline["passengers"][-48:].tolist()
    assert drawn["median"].tolist() == [432, *forecast.mean[0].tolist()]
    assert panel.get_lines()[1].get_xdata()[-1] == numpy.datetime64("1961-12-01")
    widest, inner = panel.collections
    low, high = (forecast.quantile(level)[0] for level in (0.1, 0.9))
    heights = widest.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (low.min(), high.max())
    assert (widest.get_label(), inner.get_label()) == ("80% interval", "40% interval")
    assert panel.get_title(loc="left") == "passengers"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "history", "median", "80% interval", "40% interval",
    ]  # fmt: skip
    with PIL.Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (1200, 600)
        colors = {color for _, color in picture.convert("RGB").getcolors(100_000)}
        assert {(27, 106, 201), (61, 61, 61), (212, 227, 246), (169, 200, 237)} <= colors


def test_the_same_forecast_writes_the_same_bytes(demo: Chronos2, tmp_path: pathlib.Path) -> None:
    series = numpy.random.default_rng(5).normal(size=(3, 60)).cumsum(axis=1)
    for extension in ("png", "svg", "pdf"):
        written = []
        for i in range(2):
            demo.forecast(series, HORIZON).plot(tmp_path / f"{i}.{extension}")
            written.append((tmp_path / f"{i}.{extension}").read_bytes())
        assert written[0] == written[1], extension
        assert len(written[0]) > 1000


def test_many_series_and_own_axes(demo: Chronos2, tmp_path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    forecast = demo.forecast(numpy.random.default_rng(6).normal(size=(25, 40)), 3)
    assert len(forecast[:24].plot().axes) == 24
    with pytest.raises(ArgumentError, match="25 series"):
        forecast.plot()
    axes = Figure().subplots(1, 2)
    assert forecast[:2].plot(ax=axes, history=7) is axes[0].figure
    assert len(lines(axes[0])["history"]) == 7
    assert forecast[3].plot(ax=axes[0]) is axes[0].figure
    for wrong, named in (({"ax": axes}, "2 axes"), ({"history": 0}, "history is 0"), ({"path": "x.jpg"}, ".png")):
        with pytest.raises(ArgumentError, match=named):
            forecast[0].plot(**wrong)
    with pytest.raises(FileNotFoundError):
        forecast[0].plot(tmp_path / "nowhere" / "out.png")


def test_pictures_of_what_is_odd(demo: Chronos2, tmp_path: pathlib.Path) -> None:
    nan = numpy.nan
    for i, series in enumerate(([1.0], [nan, 1.0, nan, nan, 2.0, nan], [0.0] * 50, [1e30, -1e30, 1e30])):
        demo.forecast(series, 5, [0.3]).plot(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 1000


def test_drawing_needs_no_display(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys; from diffusionz import Chronos2\n"
        "Chronos2('demo', device='cpu').forecast([1, 2, 3.0], 4).plot('out.png')\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert (tmp_path / "out.png").is_file()


# --- What ships ---


def test_the_series_of_the_package(airline: Any) -> None:
    assert datasets.names() == ["airline"]
    assert airline["month"].tolist()[:: len(airline) - 1] == ["1949-01-01", "1960-12-01"]
    assert len(airline) == 144
    assert airline["passengers"].sum() == 40363
    with pytest.raises(ArgumentError, match="airline"):
        datasets.path("airlines")
    for name in datasets.names():
        assert f"\n{name}: " in str(datasets.__doc__)


def test_the_bundled_model_beats_last_years_months(demo: Chronos2, airline: Any) -> None:
    """On a real series that it has not seen: three years, each forecast from those before it."""
    passengers = airline["passengers"].to_numpy(float)
    ours, naive = 0.0, 0.0
    for end in (108, 120, 132):
        actual = passengers[end : end + 12]
        ours += numpy.abs(demo.forecast(passengers[:end], 12).mean[0] - actual).mean()
        naive += numpy.abs(passengers[end - 12 : end] - actual).mean()
    assert ours < 0.9 * naive


def test_the_example_runs_and_its_pictures_are_reproducible(demo: Chronos2, tmp_path: pathlib.Path) -> None:
    example = ROOT / "examples" / "python" / "bitcoin_ohlc.py"
    for folder in ("first", "second"):
        done = subprocess.run([sys.executable, str(example), folder], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "close: 70,465 now, " in done.stdout
        assert "80% between" in done.stdout
    written = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert written == ["bitcoin_close.png", "bitcoin_ohlc.csv", "bitcoin_ohlc.png", "bitcoin_returns.png"]
    for name in written:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    # The numbers are those of the same four series as arrays.
    candles = pandas.read_csv(ROOT / "examples" / "data" / "btc_ohlc.csv").dropna()
    names = ["open", "high", "low", "close"]
    expected = demo.forecast([candles[names].to_numpy().T], 7, constrain_ohlc=True)
    frame = pandas.read_csv(tmp_path / "first" / "bitcoin_ohlc.csv")
    assert frame["date"].tolist() == [f"2026-03-{day}" for day in range(15, 22)] * 4
    assert frame["target_name"].tolist() == [name for name in names for _ in range(7)]
    numpy.testing.assert_allclose(frame["predictions"], expected.mean.ravel(), rtol=1e-6)
    numpy.testing.assert_allclose(frame["0.9"], expected.quantile(0.9).ravel(), rtol=1e-6)
