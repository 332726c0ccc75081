"""`Chronos2`: every kind of input beside upstream's pipeline, what is refused, progress, stopping, life and death."""

from __future__ import annotations

import contextlib
import decimal
import gc
import itertools
import pathlib
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy
import pandas
import polars
import pytest
import torch

import diffusionz
from diffusionz import (
    ArgumentError,
    Cancelled,
    Chronos2,
    DeviceError,
    Forecast,
    LoraError,
    ModelError,
    Progress,
)
from tests.models import chronos_reference, parity
from tests.models.test_chronos_lora import save_adapter
from tests.python.interrupt import STOPPED_S, check_ctrl_c

HORIZON = 24


@pytest.fixture(scope="module")
def model(tiny_chronos: pathlib.Path) -> Iterator[Chronos2]:
    with Chronos2(tiny_chronos, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def upstream(tiny_chronos: pathlib.Path) -> Any:
    return chronos_reference.load_pipeline(tiny_chronos)


def walk(*shape: int, seed: int = 0) -> numpy.ndarray:
    """A random walk along the last axis, with some values missing."""
    rng = numpy.random.default_rng(seed)
    values = rng.normal(size=shape).cumsum(axis=-1)
    values[rng.random(shape) < 0.1] = numpy.nan
    values[..., 0] = 1.0
    return values


def with_covariates(targets: int, *lengths: int) -> list[dict[str, Any]]:
    """Past-only and known-future covariates, numbers and categories, missing and never seen ones among them."""
    rng = numpy.random.default_rng(targets)
    entries = []
    for i, length in enumerate(lengths):
        weather = rng.choice(["sun", "rain", "snow"], length).astype(object)
        weather[::7] = numpy.nan
        coming = rng.choice(["sun", "rain", "hail"], HORIZON).astype(object)
        coming[3] = numpy.nan
        price = rng.normal(size=HORIZON)
        price[5] = numpy.nan
        entries.append(
            {
                "target": walk(targets, length, seed=i) if targets > 1 else walk(length, seed=i),
                "past_covariates": {
                    "visitors": rng.integers(0, 100, length),
                    "price": walk(length, seed=50 + i),
                    "weather": weather,
                    "holiday": rng.random(length) < 0.2,
                    "plan": walk(length, seed=70 + i),
                    "shelf": rng.choice(["a", "b"], length),
                },
                "future_covariates": {
                    "price": price,
                    "weather": coming,
                    "holiday": rng.random(HORIZON) < 0.2,
                    "plan": None,  # known in advance, but not here
                },
            }
        )
    return entries


def as_upstream(inputs: Any) -> Any:
    """What upstream takes in place of `inputs`."""
    if isinstance(inputs, dict):
        return [inputs]
    if isinstance(inputs, numpy.ndarray) and inputs.ndim < 3:
        return list(inputs) if inputs.ndim == 2 else [inputs]
    return inputs


def assert_parity(forecast: Forecast, upstream: Any, inputs: Any, horizon: int, levels: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantiles, mean = upstream.predict_quantiles(
            as_upstream(inputs), prediction_length=horizon, quantile_levels=list(levels), **options
        )
    expected = torch.cat(quantiles).transpose(1, 2)
    targets = [entry["target"] if isinstance(entry, dict) else entry for entry in as_upstream(inputs)]
    length = options.get("context_length")
    rows = [row[-length:] if length else row for target in targets for row in numpy.atleast_2d(target)]
    centres = torch.tensor([numpy.nanmean(row) for row in rows])
    parity.assert_forecasts(torch.from_numpy(forecast.quantiles), expected, centres)
    parity.assert_forecasts(torch.from_numpy(forecast.mean)[:, None], torch.cat(mean)[:, None], centres)


LEVELS = (0.1, 0.5, 0.9)
INPUTS: dict[str, Any] = {
    "one series": walk(100),
    "one value": numpy.array([3.0]),
    "a constant": numpy.full(40, 7.0),
    "several series": walk(5, 70),
    "several multivariate series": walk(3, 2, 50),
    "different lengths": [walk(n, seed=n) for n in (1, 15, 16, 17, 300)],
    "series and multivariate series": [walk(30), walk(3, 80), walk(1, 9)],
    "a dict": with_covariates(1, 60)[0],
    "dicts, one target": with_covariates(1, 60, 33, 90),
    "dicts, two targets": with_covariates(2, 60, 33, 90),
    "dicts without covariates": [{"target": walk(20)}, {"target": walk(40)}],
}


@pytest.mark.parametrize("name", INPUTS)
def test_every_kind_of_input_gives_upstreams_forecast(model: Chronos2, upstream: Any, name: str) -> None:
    inputs = INPUTS[name]
    forecast = model.forecast(inputs, HORIZON, LEVELS)
    assert forecast.quantiles.dtype == numpy.float32
    assert forecast.levels == list(LEVELS)
    assert_parity(forecast, upstream, inputs, HORIZON, LEVELS)


@pytest.mark.parametrize("horizon", [1, 17, 1024, 1100])
def test_horizons(model: Chronos2, upstream: Any, horizon: int) -> None:
    inputs = [walk(200), walk(2, 90)]
    forecast = model.forecast(inputs, horizon)
    assert forecast.quantiles.shape == (3, 9, horizon)
    assert_parity(forecast, upstream, inputs, horizon, forecast.levels)


def test_a_known_future_of_a_long_horizon(model: Chronos2, upstream: Any) -> None:
    inputs = {
        "target": walk(80),
        "past_covariates": {"x": walk(80, seed=1)},
        "future_covariates": {"x": walk(1100, seed=2)},
    }
    assert_parity(model.forecast(inputs, 1100, LEVELS), upstream, inputs, 1100, LEVELS)


def test_the_default_horizon_is_one_pass(model: Chronos2) -> None:
    assert model.forecast([1.0, 2.0]).horizon == model.info["prediction_length"] == 1024


@pytest.mark.parametrize("levels", [(0.5,), (0.01, 0.99), (0.001, 0.123, 0.5, 0.77), (0.3,)])
def test_levels(model: Chronos2, upstream: Any, levels: tuple[float, ...]) -> None:
    inputs = walk(2, 64)
    forecast = model.forecast(inputs, HORIZON, levels)
    assert forecast.quantiles.shape == (2, len(levels), HORIZON)
    assert_parity(forecast, upstream, inputs, HORIZON, levels)


def test_the_models_own_levels(model: Chronos2) -> None:
    forecast = model.forecast(walk(64), HORIZON, None)
    assert forecast.levels == pytest.approx(model.info["quantile_levels"])
    assert forecast.quantiles.shape == (1, 21, HORIZON)


@pytest.mark.parametrize("length", [1, 16, 50, 8192, 100_000])
def test_context_lengths(model: Chronos2, upstream: Any, length: int) -> None:
    inputs = with_covariates(1, 200, 40)
    for entry in inputs:
        entry["target"][-1] = 1.0  # which may be all that is read
    forecast = model.forecast(inputs, HORIZON, LEVELS, context_length=length)
    assert_parity(forecast, upstream, inputs, HORIZON, LEVELS, context_length=length)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_cross_learning_in_upstreams_batches(model: Chronos2, upstream: Any, batch_size: int) -> None:
    inputs = [walk(2, 40), walk(70), walk(33), walk(3, 90), walk(20), walk(25)]
    forecast = model.forecast(inputs, HORIZON, LEVELS, cross_learning=True, batch_size=batch_size)
    assert_parity(forecast, upstream, inputs, HORIZON, LEVELS, cross_learning=True, batch_size=batch_size)


def test_group_ids_let_entries_inform_each_other(model: Chronos2) -> None:
    rows = walk(4, 60)
    together = model.forecast(rows[None], HORIZON).quantiles
    apart = model.forecast(rows, HORIZON).quantiles
    assert (model.forecast(rows, HORIZON, group_ids=[7, 7, 7, 7]).quantiles == together).all()
    assert (model.forecast(rows, HORIZON, group_ids=[5, -1, 3, 9]).quantiles == apart).all()
    pairs = model.forecast(rows, HORIZON, group_ids=numpy.array([1, 2, 1, 2])).quantiles
    assert (pairs[::2] == model.forecast(rows[None, ::2], HORIZON).quantiles).all()
    assert (pairs[1::2] == model.forecast(rows[None, 1::2], HORIZON).quantiles).all()
    assert (together != apart).any()


def test_entries_do_not_depend_on_each_other(model: Chronos2) -> None:
    entries = [walk(30), walk(3, 80), walk(1, 9)]
    together = model.forecast(entries, HORIZON).quantiles
    for entry, rows in zip(entries, (slice(0, 1), slice(1, 4), slice(4, 5)), strict=True):
        assert (model.forecast([entry], HORIZON).quantiles == together[rows]).all()


def test_a_level_does_not_depend_on_the_others(model: Chronos2) -> None:
    series = walk(90)
    for monotone in (False, True):
        every = model.forecast(series, HORIZON, None, monotone=monotone)
        one = model.forecast(series, HORIZON, [0.2], monotone=monotone)
        assert (one.quantiles[:, 0] == every.quantile(0.2)).all()
        assert (one.mean == every.mean).all()


def test_monotone_quantiles_never_cross(model: Chronos2) -> None:
    series = walk(3, 90)
    assert (numpy.diff(model.forecast(series, HORIZON).quantiles, axis=1) < 0).any()
    forecast = model.forecast(series, HORIZON, monotone=True)
    assert (numpy.diff(forecast.quantiles, axis=1) >= 0).all()


def test_constrained_candles(model: Chronos2) -> None:
    candles = walk(2, 4, 50)
    free, bound = (model.forecast(candles, HORIZON, constrain_ohlc=constrain) for constrain in (False, True))
    free, bound = (forecast.quantiles.reshape(2, 4, 9, HORIZON) for forecast in (free, bound))
    assert (bound[:, 1] == free.max(axis=1)).all()
    assert (bound[:, 2] == free.min(axis=1)).all()
    assert (bound[:, [0, 3]] == free[:, [0, 3]]).all()
    with pytest.raises(ArgumentError, match=r"inputs\[1\] has 3 targets"):
        model.forecast([walk(4, 9), walk(3, 9)], HORIZON, constrain_ohlc=True)


def test_an_adapter(model: Chronos2, tiny_chronos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    adapter = save_adapter(tiny_chronos, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upstream = chronos_reference.Chronos2Pipeline.from_pretrained(adapter)
    series = walk(100)
    for adapted in (Chronos2(tiny_chronos, device="cpu", lora=adapter), Chronos2(adapter, device="cpu")):
        forecast = adapted.forecast(series, HORIZON)
        assert_parity(forecast, upstream, series, HORIZON, forecast.levels)
        assert (forecast.quantiles != model.forecast(series, HORIZON).quantiles).any()


# --- Frames ---


def frame(freq: str = "D", lengths: tuple[int, ...] = (60, 33, 90), targets: int = 1) -> tuple[Any, Any]:
    """(df, future_df) with covariates, in no order."""
    past, future = [], []
    for i, (name, length) in enumerate(zip(("b", "a", "c"), lengths, strict=True)):
        rng = numpy.random.default_rng(i)
        times = pandas.date_range("2024-01-31", periods=length + HORIZON, freq=freq)
        whole = pandas.DataFrame({"item_id": name, "timestamp": times})
        for j in range(targets):
            whole[f"target{j or ''}"] = walk(len(times), seed=10 * i + j)
        whole["visitors"] = rng.integers(0, 50, len(times))
        whole["weather"] = rng.choice(["sun", "rain", None], len(times))
        whole["open"] = rng.random(len(times)) < 0.7
        whole["price"] = rng.normal(size=len(times))
        past.append(whole[:length])
        future.append(whole[length:][["timestamp", "price", "item_id", "weather"]])
    return tuple(pandas.concat(part).sample(frac=1, random_state=3) for part in (past, future))


def assert_same_frames(ours: Any, expected: Any) -> None:
    assert list(ours.columns) == list(expected.columns)
    assert (ours.dtypes == expected.dtypes).all()
    numbers = [column for column in expected.columns if expected[column].dtype == numpy.float32]
    others = [column for column in expected.columns if column not in numbers]
    pandas.testing.assert_frame_equal(ours[others], expected[others])
    assert len(numbers) > 1
    scale = expected[numbers].abs().to_numpy().max()
    assert numpy.abs(ours[numbers].to_numpy() - expected[numbers].to_numpy()).max() <= 1e-4 * scale


@pytest.mark.parametrize("freq", ["D", "h", "15min", "MS", "ME", "W-WED", "B", "QE", "2D", "YS"])
def test_a_frame_is_upstreams_frame(model: Chronos2, upstream: Any, freq: str) -> None:
    df, future = frame(freq)
    for future_df in (None, future):
        ours = model.forecast_df(df, future_df=future_df, prediction_length=HORIZON)
        assert_same_frames(ours, upstream.predict_df(df, future_df=future_df, prediction_length=HORIZON))


def test_several_targets_and_other_names(model: Chronos2, upstream: Any) -> None:
    df, future = frame(targets=2)
    names = {"item_id": "shop", "timestamp": "day"}
    options: dict[str, Any] = {
        "id_column": "shop", "timestamp_column": "day", "target": ["target1", "target"],
        "prediction_length": HORIZON, "quantile_levels": [0.05, 0.5, 0.77], "context_length": 30,
    }  # fmt: skip
    df, future = df.rename(columns=names), future.rename(columns=names)
    ours = model.forecast_df(df, future_df=future, **options)
    assert_same_frames(ours, upstream.predict_df(df, future_df=future, **options))


def test_a_frame_with_cross_learning_and_a_given_frequency(model: Chronos2, upstream: Any) -> None:
    df, _ = frame(lengths=(2, 33, 1))
    options: dict[str, Any] = {"prediction_length": 5, "cross_learning": True, "batch_size": 3, "freq": "W"}
    assert_same_frames(model.forecast_df(df, **options), upstream.predict_df(df, **options))


def test_pandas_own_types_of_columns(model: Chronos2) -> None:
    df, _ = frame()
    df = df.reset_index(drop=True)
    expected = model.forecast_df(df, prediction_length=HORIZON)
    changed = df.astype({"visitors": "Int64", "target": "Float64", "weather": "category", "open": "boolean"})
    pandas.testing.assert_frame_equal(model.forecast_df(changed, prediction_length=HORIZON), expected)
    texts = df.assign(timestamp=df["timestamp"].dt.strftime("%Y-%m-%d"))
    pandas.testing.assert_frame_equal(model.forecast_df(texts, prediction_length=HORIZON), expected)


def test_time_zones(model: Chronos2) -> None:
    df, _ = frame("h")
    there = df.assign(timestamp=df["timestamp"].dt.tz_localize("Europe/Berlin"))
    result = model.forecast_df(there, prediction_length=3)
    assert str(result["timestamp"].dt.tz) == "Europe/Berlin"
    plain = model.forecast_df(df, prediction_length=3)
    assert (result["timestamp"].dt.tz_localize(None) == plain["timestamp"]).all()
    there = polars.DataFrame({"t": there[there["item_id"] == "a"]["timestamp"].tolist(), "v": range(33)})
    there = there.sort("t")
    result = model.forecast_df(there, id_column=None, timestamp_column="t", target="v", prediction_length=2)
    assert result.schema["t"].time_zone == there.schema["t"].time_zone
    assert result["t"][0] > there["t"][-1]


def test_polars_in_and_out(model: Chronos2) -> None:
    df, future = frame()
    expected = model.forecast_df(df, future_df=future, prediction_length=HORIZON)
    ours = model.forecast_df(polars.from_pandas(df), future_df=polars.from_pandas(future), prediction_length=HORIZON)
    assert isinstance(ours, polars.DataFrame)
    assert ours.schema["timestamp"] == polars.from_pandas(df).schema["timestamp"]
    assert ours.columns == list(expected.columns)
    for column in ours.columns:
        assert ours[column].to_list() == expected[column].tolist()
    days = polars.from_pandas(df).with_columns(polars.col("timestamp").cast(polars.Date)).lazy()
    ours = model.forecast_df(days, prediction_length=HORIZON)
    assert ours.schema["timestamp"] == polars.Date


def test_polars_without_pyarrow(tiny_chronos: pathlib.Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import polars, datetime; from diffusionz import Chronos2\n"
        "times = [datetime.datetime(2024, 1, day) for day in range(1, 9)]\n"
        "df = polars.DataFrame({'item_id': ['a'] * 8, 'timestamp': times, 'target': [1, 2, None, 4, 5, 6, 7, 8]})\n"
        f"print(Chronos2({str(tiny_chronos)!r}, device='cpu').forecast_df(df, prediction_length=2).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 13)", done.stderr


def test_frames_without_ids_or_times(model: Chronos2) -> None:
    values = walk(50)
    expected = model.forecast(values, 4)
    result = model.forecast_df(
        pandas.DataFrame({"target": values}), id_column=None, timestamp_column=None, prediction_length=4
    )
    assert list(result.columns)[:3] == ["step", "target_name", "predictions"]
    assert result["step"].tolist() == [1, 2, 3, 4]
    assert (result["predictions"].to_numpy() == expected.mean[0]).all()
    for years in (range(1950, 2000), numpy.linspace(1950, 1975, 50, endpoint=False)):
        df = pandas.DataFrame({"year": years, "target": values})
        result = model.forecast_df(df, id_column=None, timestamp_column="year", prediction_length=4)
        step = years[1] - years[0]
        assert result["year"].tolist() == pytest.approx([years[-1] + step * i for i in range(1, 5)])


DATES = ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05"]


def changed(**columns: Any) -> Any:
    """Five days of one series, with other columns."""
    times = pandas.date_range("2024-01-01", periods=5)
    return pandas.DataFrame({"item_id": "a", "timestamp": times, "target": [1.0, 2, 3, 4, 5]} | columns)


@pytest.mark.parametrize(
    ("df", "options", "named"),
    [
        (changed(timestamp=[*DATES[:4], "2024-01-09"]), {}, ["'a'", "irregular", "2024-01-04", "2024-01-09", "freq"]),
        (changed(timestamp=[*DATES[:4], "2024-01-04"]), {}, ["two rows at 2024-01-04", "'a'"]),
        (changed(timestamp=[*DATES[:4], None]), {}, ["timestamp", "row 4"]),
        (changed(timestamp=[*DATES[:4], "yesterday"]), {}, ["timestamp", "no date", "yesterday"]),
        (changed(timestamp=[1, 2, 3, 4, 9]), {}, ["'a'", "irregular", "4", "9"]),
        (changed()[:2], {}, ["3 timestamps", "freq"]),
        (changed(item_id=list("aabbb")).assign(timestamp=[*DATES[:2], *DATES[:2], "2024-01-04"]), {}, ["'b'"]),
        (changed(), {"freq": "often"}, ["'often'", '"D"']),
        (changed(), {"freq": 7.0}, ["7.0"]),
        (
            changed(timestamp=pandas.DatetimeIndex(DATES).as_unit("ns")),
            {"freq": "YS", "prediction_length": 999},
            ["999"],
        ),
        (changed(), {"timestamp_column": None, "id_column": None, "freq": "D"}, ["freq", "timestamp_column"]),
        (changed(item_id=["a", "a", None, "b", "b"]), {"freq": "D"}, ["item_id", "row 2"]),
        (changed(), {"id_column": "shop"}, ["'shop'", "'item_id'"]),
        (changed(), {"timestamp_column": "when"}, ["'when'"]),
        (changed(), {"target": "close"}, ["'close'", "'target'"]),
        (changed(), {"target": []}, ["target is empty"]),
        (changed(), {"target": ["target", "target"]}, ["'target'", "twice"]),
        (changed(target=list("abcde")), {}, ["'target'", "numbers"]),
        (changed(target=[1, 2, numpy.inf, 4, 5]), {}, ["'target'", "inf"]),
        (changed(target=[numpy.nan] * 5), {}, ["'a'", "missing"]),
        (changed()[:0], {}, ["no rows"]),
        (changed(x=1.0), {"future_df": changed(x=1.0)}, ["target"]),
        (changed(), {"future_df": changed(x=1.0).drop(columns="target")}, ["'x'"]),
        (changed(x=1.0), {"future_df": changed(x=1.0)[["item_id", "x"]]}, ["'timestamp'"]),
        (changed(x=1.0), {"future_df": changed(x=1.0).drop(columns="target")}, ["2024-01-01", "2024-01-06", "'a'"]),
        (changed(x=1.0), {"future_df": changed(x=1.0).drop(columns="target")[:2]}, ["2 rows", "'a'", "5"]),
        (changed(x=1.0), {"future_df": changed(x=1.0, item_id="z").drop(columns="target")}, ["'z'"]),
    ],
)
def test_wrong_frames(model: Chronos2, df: Any, options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ArgumentError) as raised:
        model.forecast_df(df, **({"prediction_length": 5} | options))
    for part in named:
        assert part in str(raised.value), raised.value


def test_series_of_different_frequencies(model: Chronos2) -> None:
    daily, hourly = (pandas.date_range("2024-01-01", periods=5, freq=freq) for freq in ("D", "h"))
    df = pandas.DataFrame({"item_id": list("aaaaabbbbb"), "timestamp": daily.append(hourly), "target": 1.0})
    with pytest.raises(ArgumentError, match="'a' steps by D and series 'b' by h"):
        model.forecast_df(df, prediction_length=2)


def test_what_is_no_frame(model: Chronos2) -> None:
    with pytest.raises(TypeError, match="list"):
        model.forecast_df([1, 2, 3])
    with pytest.raises(TypeError, match="forecast_df"):
        model.forecast(changed())


# --- Embeddings ---


def test_embeddings_are_upstreams(model: Chronos2, upstream: Any) -> None:
    inputs = [numpy.nan_to_num(walk(*shape)) for shape in ((100,), (3, 50), (1,), (2, 16))]
    ours = model.embed(inputs)
    for i, entry in enumerate(inputs):  # one at a time: upstream pads the short ones with empty patches
        (values,), ((loc, scale),) = upstream.embed([torch.from_numpy(entry)])
        assert ours.values[i].shape == tuple(values.shape)
        parity.assert_parity("embedding", torch.from_numpy(ours.values[i]), values)
        numpy.testing.assert_allclose(ours.loc[i], loc[:, 0], rtol=1e-5, atol=1e-6)
        numpy.testing.assert_allclose(ours.scale[i], scale[:, 0], rtol=1e-5, atol=1e-6)


def test_embeddings_of_targets_with_covariates(model: Chronos2) -> None:
    target, covariate = numpy.nan_to_num(walk(2, 40))
    alone, informed = (model.embed({"target": target} | more) for more in ({}, {"past_covariates": {"x": covariate}}))
    both = model.embed(numpy.stack([target, covariate])[None])
    assert informed.values[0].shape == alone.values[0].shape == (1, 5, 64)
    assert (informed.values[0] == both.values[0][:1]).all()
    assert (informed.values[0] != alone.values[0]).any()
    cut = model.embed({"target": target}, context_length=16)
    assert cut.values[0].shape == (1, 3, 64)


# --- Kinds of numbers ---


def test_every_kind_of_number(model: Chronos2) -> None:
    numbers = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 9]
    expected = model.forecast(numpy.array(numbers, numpy.float32), 4).quantiles
    for kind in (
        numbers, tuple(numbers), iter(numbers), numpy.array(numbers), numpy.array(numbers, numpy.uint8),
        numpy.array(numbers, numpy.float16), numpy.array(numbers, object), [decimal.Decimal(n) for n in numbers],
        [numpy.float64(n) for n in numbers], torch.tensor(numbers), torch.tensor(numbers, dtype=torch.bfloat16),
        torch.tensor(numbers, dtype=torch.float64, requires_grad=True), pandas.Series(numbers),
        pandas.Series(numbers, dtype="Int64"), pandas.Series(numbers, dtype="Float32"), polars.Series(numbers),
        numpy.array(numbers)[::-1][::-1], [numbers], [torch.tensor(numbers)], numpy.array([numbers]),
        [polars.Series(numbers)], numpy.array([[numbers]]), {"target": numbers}, [{"target": [numbers]}],
    ):  # fmt: skip
        assert (model.forecast(kind, 4).quantiles == expected).all(), kind


def test_every_kind_of_missing_value(model: Chronos2) -> None:
    nan = numpy.nan
    expected = model.forecast([1.0, nan, 0.0, 1.0, nan], 4).quantiles
    masked = numpy.ma.masked_array([1, 2, 0, 1, 2], [False, True, False, False, True])
    for kind in (
        [1, None, 0, 1, None], [1, pandas.NA, 0, 1, pandas.NA],
        [True, None, False, True, nan], numpy.array([1, None, 0, 1, nan], object), masked,
        pandas.Series([1, None, 0, 1, None], dtype="Int64"),
        pandas.Series([True, None, False, True, None], dtype="boolean"),
        polars.Series([1, None, 0, 1, None]), [[1, None, 0, 1, None]], {"target": [1, None, 0, 1, None]},
    ):  # fmt: skip
        assert (model.forecast(kind, 4).quantiles == expected).all(), kind


def test_an_array_of_arrays(model: Chronos2) -> None:
    entries = numpy.empty(2, object)
    entries[:] = [walk(20), walk(30)]
    assert (model.forecast(entries, 4).quantiles == model.forecast(list(entries), 4).quantiles).all()


def test_a_covariate_with_none_is_one_of_numbers(model: Chronos2) -> None:
    target = walk(6)
    expected, ours = (
        model.forecast({"target": target, "past_covariates": {"x": x}}, 4).quantiles
        for x in ([1.0, 2.0, numpy.nan, 4.0, 5.0, 7.0], [1, 2, None, 4, 5, 7])
    )
    assert (ours == expected).all()
    ours = model.forecast({"target": target, "past_covariates": {"x": [1, 2, pandas.NA, 4, 5, 7]}}, 4).quantiles
    assert (ours == expected).all()


def test_the_callers_array_is_copied(model: Chronos2) -> None:
    values = walk(2, 40).astype(numpy.float32)
    forecast = model.forecast(values, 4)
    before = forecast.summary()
    values[:] = 1e6
    assert forecast.summary() == before


# --- What is refused ---


def covariates(past: Any = None, future: Any = None, **entry: Any) -> dict[str, Any]:
    return {"target": [1.0, 2.0, 3.0], "past_covariates": past, "future_covariates": future} | entry


@pytest.mark.parametrize(
    ("inputs", "options", "error", "named"),
    [
        ([], {}, ArgumentError, ["inputs is empty"]),
        ([[]], {}, ArgumentError, ["inputs has the shape [0]"]),
        (numpy.zeros((2, 0)), {}, ArgumentError, ["[2, 0]"]),
        ([walk(5), []], {}, ArgumentError, ["inputs[1]", "[0]"]),
        (numpy.zeros((1, 1, 1, 1)), {}, ArgumentError, ["4 dimensions"]),
        ([numpy.zeros((1, 1, 1)), walk(3)], {}, ArgumentError, ["inputs[0]", "[1, 1, 1]"]),
        ([float("nan")] * 3, {}, ArgumentError, ["inputs", "missing"]),
        ([walk(5), [float("nan")] * 3], {}, ArgumentError, ["inputs[1]", "missing"]),
        ([1.0, *[float("nan")] * 9], {"context_length": 5}, ArgumentError, ["missing"]),
        ([1.0, float("inf")], {}, ArgumentError, ["inputs[1] is inf", "finite"]),
        ([walk(3), [[1.0, 2.0], [3.0, -numpy.inf]]], {}, ArgumentError, ["inputs[1][1, 1] is -inf"]),
        ([1.0, 1e300], {}, ArgumentError, ["1e+300", "3.4e+38"]),
        ([1.0, "2"], {}, TypeError, ["inputs[0] is 1.0", "numbers"]),
        (["1", "2"], {}, TypeError, ["inputs[0] is '1'", "numbers"]),
        ("123", {}, TypeError, ["str"]),
        (5, {}, TypeError, ["int"]),
        (None, {}, TypeError, ["NoneType"]),
        ([1j, 2], {}, TypeError, ["complex"]),
        (numpy.array(["2024-01-01"], "datetime64[D]"), {}, TypeError, ["datetime64"]),
        ([[1.0, 2.0], [[1.0], [2.0, 3.0]]], {}, ArgumentError, ["inputs[1]", "different lengths"]),
        ([object(), object()], {}, TypeError, ["numbers"]),
        ([1.0], {"prediction_length": 0}, ArgumentError, ["prediction_length is 0"]),
        ([1.0], {"prediction_length": -3}, ArgumentError, ["-3"]),
        ([1.0], {"prediction_length": 2**21}, ArgumentError, ["2097152"]),
        ([1.0], {"prediction_length": 10**30}, ArgumentError, ["64 bits"]),
        ([1.0], {"prediction_length": 2.5}, TypeError, ["float"]),
        ([1.0], {"context_length": 0}, ArgumentError, ["context_length is 0"]),
        ([1.0], {"quantile_levels": []}, ArgumentError, ["empty"]),
        ([1.0], {"quantile_levels": [0.5, 0.1]}, ArgumentError, ["0.1 after 0.5"]),
        ([1.0], {"quantile_levels": [0.5, 0.5]}, ArgumentError, ["0.5 after 0.5"]),
        ([1.0], {"quantile_levels": [0.0, 0.5]}, ArgumentError, ["0"]),
        ([1.0], {"quantile_levels": [0.5, 1.0]}, ArgumentError, ["1"]),
        ([1.0], {"quantile_levels": [float("nan")]}, ArgumentError, ["nan"]),
        ([1.0], {"quantile_levels": ["high"]}, TypeError, ["high"]),
        ([1.0], {"quantile_levels": 0.5}, TypeError, ["0.5"]),
        (walk(3, 9), {"group_ids": [1, 2]}, ArgumentError, ["[2]", "3 integers"]),
        (walk(3, 9), {"group_ids": [1.0, 2.0, 3.0]}, ArgumentError, ["float64"]),
        (walk(3, 9), {"group_ids": [1, 2, 3], "cross_learning": True}, ArgumentError, ["exclude"]),
        (walk(3, 9), {"batch_size": 2.5, "cross_learning": True}, TypeError, ["float"]),
        (walk(3, 9), {"batch_size": 0, "cross_learning": True}, ArgumentError, ["batch_size is 0"]),
        ([0.0, 1.0, 2.0], {"returns": True}, ArgumentError, ["over 0"]),
        ([1.0], {"returns": True}, ArgumentError, ["two prices"]),
        ([1.0, 2.0, None], {"returns": True}, ArgumentError, ["last price"]),
        ([1.0, None, 2.0], {"returns": True}, ArgumentError, ["missing"]),
        ([{"target": [1.0]}, [1.0]], {}, TypeError, ["inputs[1] is a list"]),
        ({"targets": [1.0]}, {}, ArgumentError, ["'targets'", "past_covariates"]),
        ({"past_covariates": {}}, {}, ArgumentError, ['no "target"']),
        ({"target": numpy.zeros((1, 1, 1))}, {}, ArgumentError, ["[1, 1, 1]"]),
        (covariates({"x": [[1], [2, 3], [4]]}), {}, ArgumentError, ["'x'", "lengths"]),
        (covariates({"x": [{}, {}, {}]}), {}, TypeError, ["'x'", "neither"]),
        (covariates({1: [1, 2, 3], "x": [1, 2, 3]}), {}, TypeError, ["past_covariates", "1"]),
        (covariates({"x": []}), {}, ArgumentError, ["'x'", "no values"]),
        (covariates({"x": [1, 2]}), {}, ArgumentError, ["'x'", "[2]", "[3]"]),
        (covariates({"x": [[1, 2, 3]]}), {}, ArgumentError, ["'x'", "[1, 3]"]),
        (covariates([1, 2, 3]), {}, TypeError, ["past_covariates", "dict"]),
        (covariates({"x": [1, 2, 3]}, {"x": [1, 2, 3]}), {}, ArgumentError, ["'x'", "[3]", "[2]", "horizon"]),
        (covariates({"x": [1, 2, 3]}, {"y": [1, 2]}), {}, ArgumentError, ["'y'", "'x'"]),
        (covariates({"x": [1, 2, numpy.inf]}), {}, ArgumentError, ["'x'", "inf"]),
        (covariates({"x": [1, 2, 3]}, {"x": [1, numpy.inf]}), {}, ArgumentError, ["'x'", "inf"]),
        (covariates({"x": [1, 2, 3]}, {"x": ["a", "b"]}), {}, TypeError, ["'x'"]),
        ([covariates({"x": [1, 2, 3]}), covariates({"y": [1, 2, 3]})], {}, ArgumentError, ["inputs[1]", "['y']"]),
        ([covariates(), covariates(target=[[1.0], [2.0]])], {}, ArgumentError, ["inputs[1]", "targets"]),
        ([covariates({"x": [1, 2, 3]}, {"x": [1, 2]}), covariates({"x": [1, 2, 3]})], {}, ArgumentError, ["inputs[1]"]),
    ],
)  # fmt: skip
def test_wrong_inputs(
    model: Chronos2, inputs: Any, options: dict[str, Any], error: type[Exception], named: list[str]
) -> None:
    with pytest.raises(error) as raised:
        model.forecast(inputs, **({"prediction_length": 2} | options))
    assert type(raised.value) is error
    for part in named:
        assert part in str(raised.value), raised.value


def test_wrong_embeddings(model: Chronos2) -> None:
    with pytest.raises(ArgumentError, match="future_covariates"):
        model.embed(covariates({"x": [1, 2, 3]}, {"x": [1, 2]}))
    with pytest.raises(ArgumentError, match="missing"):
        model.embed([float("nan")])


def test_wrong_models(tmp_path: pathlib.Path, tiny_chronos: pathlib.Path, tiny_model: pathlib.Path) -> None:
    for name, named in (
        (tmp_path, str(tmp_path)), (tmp_path / "x", "x"), ("nothing", "nothing"), ("a/b", "diffusionz pull"),
        (tiny_model, str(tiny_model)), ("zimage-demo", "zimage-demo"),
    ):  # fmt: skip
        with pytest.raises(ModelError) as raised:
            Chronos2(name, device="cpu")
        assert named in str(raised.value)
    with pytest.raises(ModelError, match=str(tiny_chronos)):
        diffusionz.ZImage(tiny_chronos, device="cpu")
    for options, error in (
        ({"device": "gpu"}, ArgumentError), ({"device": 0}, ArgumentError),
        ({"device": "cuda:99"}, DeviceError), ({"precision": "fp8"}, ArgumentError),
        ({"precision": "tf32"}, DeviceError),
        ({"threads": -1}, ArgumentError), ({"threads": 1.5}, TypeError), ({"working_memory_bytes": -1}, ArgumentError),
        ({"lora": tmp_path / "nowhere"}, LoraError),
    ):  # fmt: skip
        with pytest.raises(error):
            Chronos2(tiny_chronos, **({"device": "cpu"} | options))


# --- Progress and stopping ---


def test_progress_counts_rows(model: Chronos2) -> None:
    seen: list[Progress] = []
    model.forecast(walk(300, 400), 64, on_progress=seen.append, progress=False)
    last = seen[-1]
    assert (last.stage, last.step, last.step_count) == ("done", 300, 300)
    assert last.forecast_ms > 0
    assert [moment.step for moment in seen] == sorted(moment.step for moment in seen)
    assert all(moment.stage in ("idle", "queued", "forecast", "done") for moment in seen)


def test_what_on_progress_raises_stops_the_call(model: Chronos2) -> None:
    class Enough(Exception):
        pass

    rows = numpy.tile(walk(2000), (20_000, 1))  # most of a minute of work
    for error in (Enough, Cancelled):
        raised: list[float] = []

        def stop(progress: Progress, error: type[Exception] = error, raised: list[float] = raised) -> None:
            if progress.step:
                raised.append(time.monotonic())
                raise error

        with pytest.raises(error):
            model.forecast(rows, 64, on_progress=stop, progress=False)
        assert time.monotonic() - raised[0] < STOPPED_S
    model.forecast([1.0, 2.0], 4)


def test_control_c_stops(tiny_chronos: pathlib.Path) -> None:
    check_ctrl_c(
        "import numpy; from diffusionz import Chronos2\n"
        f"model = Chronos2({str(tiny_chronos)!r}, device='cpu')\n"
        "rows = numpy.random.default_rng(0).normal(size=(20000, 2000)).astype('float32')",
        "model.forecast(rows, 64, on_progress=say, progress=False)",
        "model.forecast([1.0, 2.0], 4)",
    )


def test_many_threads_on_one_model(model: Chronos2) -> None:
    series = [walk(50 + i, seed=i) for i in range(4)]
    expected = [model.forecast(one, HORIZON).quantiles for one in series]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(10):
            if (model.forecast(series[i], HORIZON).quantiles != expected[i]).any():
                wrong.append(f"series {i}")
            try:
                model.forecast(series[i], 2**20 + 1 + i)
            except ArgumentError as error:
                if str(2**20 + 1 + i) not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- Life ---


def test_repr_and_info(model: Chronos2) -> None:
    assert "Chronos2" in repr(model)
    assert "cpu, float32" in repr(model)
    assert (model.device, model.precision) == ("cpu", "float32")
    assert model.info["context_length"] == 8192
    assert model.memory["weights_bytes"] > 0


def test_a_closed_model_says_so(tiny_chronos: pathlib.Path) -> None:
    with Chronos2(tiny_chronos, device="cpu") as model:
        forecast = model.forecast(walk(40), 4)
    for call in (
        lambda: model.forecast([1.0]),
        lambda: model.embed([1.0]),
        lambda: model.forecast_df(changed()),
        lambda: forecast.trend,
        lambda: model.memory,
    ):
        with pytest.raises(ArgumentError, match="closed"):
            call()
    assert "closed" in repr(model)


def test_a_forecast_outlives_the_model(tiny_chronos: pathlib.Path) -> None:
    with Chronos2(tiny_chronos, device="cpu") as model:
        quantiles = model.forecast(walk(40), HORIZON).quantiles
        values = model.embed(walk(40)).values[0]
        copies = quantiles.copy(), values.copy()
    del model
    gc.collect()
    assert (quantiles == copies[0]).all()
    assert numpy.array_equal(values, copies[1], equal_nan=True)


def test_results_are_freed(model: Chronos2) -> None:
    """Forty forecasts of 8 MiB, of which none is kept, or even returned."""

    def at_the_end(progress: Progress) -> None:
        if progress.stage == "done":
            raise Cancelled

    psutil = pytest.importorskip("psutil")
    rows = walk(100, 20)
    process = psutil.Process()
    for i in itertools.count():
        with pytest.raises(Cancelled) if i % 2 else contextlib.nullcontext():
            model.forecast(rows, 1024, None, on_progress=at_the_end if i % 2 else None, progress=False)
        if i == 10:
            before = process.memory_info().rss
        if i == 50:
            break
    assert process.memory_info().rss - before < 100 * 2**20


def test_an_error_does_not_keep_the_model_alive(tiny_chronos: pathlib.Path) -> None:
    gc.disable()  # counting references must suffice
    try:
        model = Chronos2(tiny_chronos, device="cpu")
        context = weakref.ref(model._context)
        with pytest.raises(ArgumentError):
            model.forecast([1.0], 2**21)
        del model
        assert context() is None
    finally:
        gc.enable()


def test_forecasting_imports_neither_torch_nor_pandas(tiny_chronos: pathlib.Path) -> None:
    code = (
        "import sys; from diffusionz import Chronos2\n"
        f"forecast = Chronos2({str(tiny_chronos)!r}, device='cpu').forecast([[1, 2, 3.0]], 4)\n"
        "forecast.quantiles, forecast.summary(), forecast.trend\n"
        "print([name for name in ('torch', 'pandas', 'matplotlib', 'polars') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
