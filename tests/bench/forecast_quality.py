"""How good forecasts of real series are: each forecaster on the same windows, relative to seasonal naive.

    python -m tests.bench.forecast_quality export FILE.npz --split dev       windows that forecast_metrics.load reads
    python -m tests.bench.forecast_quality score --forecaster diffusionz --model demo --split dev [--covariates]
    python -m tests.bench.forecast_quality score --forecaster upstream --model FOLDER --split dev
    python -m tests.bench.forecast_quality baselines                         slow: AutoETS and AutoARIMA, always kept

The sets are those of real_series.py, the metrics those of forecast_metrics.py. A forecaster is given the history of the
target alone; --covariates adds what else a set has. --record keeps the scores in results/forecast-quality.csv, one row
a set in place of the forecaster's earlier ones; `data` there is the checksum of the set's windows.
"""

import argparse
import csv
import datetime
import importlib.metadata
import pathlib
import time
import warnings
from collections.abc import Callable

import numpy as np

from tests.bench import forecast_metrics, real_series, record
from tests.bench.forecast_metrics import LEVELS, Score, Window

KEPT = record.RESULTS / "forecast-quality.csv"
COLUMNS = [
    "date", "forecaster", "versions", "settings", "split", "set", "data", "windows", "mase", "wql", "coverage",
    "crossing",
]  # fmt: skip

Forecaster = Callable[[list[Window]], list[np.ndarray]]  # [levels, horizon] at LEVELS for each window

# What the statistical forecasters do, so that they end in minutes on two cores. Missing values are interpolated, which
# they need; where a fit fails or its forecast is not finite, seasonal naive stands in.
ETS_HISTORY = 1000  # observations, as fev gives them
ARIMA_HISTORY = 500
ARIMA_SEASON = 24  # observations; longer ones are left to seasonal naive: a fit takes minutes


INTERVALS = [20, 40, 60, 80]  # percent: with the centre, statsforecast's way to say LEVELS


def statistical(windows: list[Window], fit: Callable[[Window, np.ndarray], dict[str, np.ndarray]]) -> list[np.ndarray]:
    """`fit` returns what a statsforecast model's `forecast` does at INTERVALS."""
    forecasts = []
    for window, naive in zip(windows, forecast_metrics.seasonal_naive(windows), strict=True):
        history = window.history.astype(np.float64)
        at, observed = np.arange(len(history)), ~np.isnan(history)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = fit(window, np.interp(at, at[observed], history[observed]))
        except Exception as error:  # whatever a fit raises on a hard series
            print(f"{window.series_set}: {type(error).__name__}: {error}; seasonal naive instead", flush=True)
            forecasts.append(naive)
            continue
        below = [found[f"lo-{level}"] for level in reversed(INTERVALS)]
        forecast = np.stack([*below, found["mean"], *(found[f"hi-{level}"] for level in INTERVALS)])
        if not np.isfinite(forecast).all():
            print(f"{window.series_set}: not finite; seasonal naive instead", flush=True)
        forecasts.append(forecast if np.isfinite(forecast).all() else naive)
    return forecasts


def auto_ets(windows: list[Window]) -> list[np.ndarray]:
    from statsforecast.models import AutoETS

    def fit(window: Window, history: np.ndarray) -> dict[str, np.ndarray]:
        model = AutoETS(season_length=window.season)  # without a season where it is longer than 24
        return model.forecast(history[-ETS_HISTORY:], len(window.future), level=INTERVALS)

    return statistical(windows, fit)


def auto_arima(windows: list[Window]) -> list[np.ndarray]:
    from statsforecast.models import AutoARIMA, SeasonalNaive

    def fit(window: Window, history: np.ndarray) -> dict[str, np.ndarray]:
        model = SeasonalNaive(season_length=window.season)
        if window.season <= ARIMA_SEASON:
            model = AutoARIMA(season_length=window.season, approximation=True)
        return model.forecast(history[-ARIMA_HISTORY:], len(window.future), level=INTERVALS)

    return statistical(windows, fit)


SETTINGS = {
    "auto-ets": f"last {ETS_HISTORY} observations",
    "auto-arima": f"approximation, last {ARIMA_HISTORY} observations, seasonal naive for seasons over {ARIMA_SEASON}",
}


PACKAGES = {
    "auto-ets": "statsforecast",
    "auto-arima": "statsforecast",
    "upstream": "chronos-forecasting",
    "diffusionz": "diffusionz",
}


def _by_schema(windows: list[Window], covariates: bool) -> list[list[int]]:
    """Indices of the windows that can go into one call."""
    calls: dict[tuple, list[int]] = {}
    for index, window in enumerate(windows):
        schema = (tuple(window.past_covariates), tuple(window.future_covariates)) if covariates else ()
        calls.setdefault((len(window.future), *schema), []).append(index)
    return list(calls.values())


def _input(window: Window, covariates: bool):
    if not covariates or not window.past_covariates:
        return window.history
    return {
        "target": window.history,
        "past_covariates": window.past_covariates,
        "future_covariates": window.future_covariates,
    }


def upstream(model: str, covariates: bool) -> Forecaster:
    """chronos-forecasting's pipeline on a checkpoint's folder."""
    from chronos import Chronos2Pipeline

    pipeline = Chronos2Pipeline.from_pretrained(model, device_map="cpu")

    def forecast(windows: list[Window]) -> list[np.ndarray]:
        forecasts: list[np.ndarray] = [np.zeros(0)] * len(windows)
        for indices in _by_schema(windows, covariates):
            quantiles, _ = pipeline.predict_quantiles(
                [_input(windows[index], covariates) for index in indices],
                prediction_length=len(windows[indices[0]].future),
                quantile_levels=list(LEVELS),
                batch_size=32,
            )
            for index, found in zip(indices, quantiles, strict=True):
                forecasts[index] = found[0].T.numpy()
        return forecasts

    return forecast


def diffusionz(model: str, covariates: bool) -> Forecaster:
    """This project's engine, on the CPU, on a bundled model's name or a folder."""
    from diffusionz import Chronos2

    engine = Chronos2(model, device="cpu")

    def forecast(windows: list[Window]) -> list[np.ndarray]:
        forecasts: list[np.ndarray] = [np.zeros(0)] * len(windows)
        for indices in _by_schema(windows, covariates):
            found = engine.forecast(
                [_input(windows[index], covariates) for index in indices],
                prediction_length=len(windows[indices[0]].future),
                quantile_levels=list(LEVELS),
            )
            for index, quantiles in zip(indices, found.quantiles, strict=True):
                forecasts[index] = quantiles
        return forecasts

    return forecast


def kept(forecaster: str, split: str) -> dict[str, tuple[str, Score]]:
    """The recorded (checksum of the windows, score) of each set."""
    with KEPT.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["forecaster"] == forecaster]
    metrics = ("mase", "wql", "coverage", "crossing")
    return {
        row["set"]: (row["data"], Score(int(row["windows"]), *(float(row[metric]) for metric in metrics)))
        for row in rows
        if split in (row["split"], "all")
    }


def keep(forecaster: str, split: str, scores: dict[str, Score], windows: list[Window], settings: str) -> None:
    rows = []
    if KEPT.exists():
        with KEPT.open(newline="") as file:
            rows = list(csv.DictReader(file))
    splits = {one.name: one.split for one in real_series.SETS}
    rows = [row for row in rows if row["forecaster"] != forecaster or split not in (row["split"], "all")]
    package = PACKAGES.get(forecaster.split("+")[0])
    for name, one in scores.items():
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "forecaster": forecaster,
                "versions": f"{package}-{importlib.metadata.version(package)}" if package else "",
                "settings": settings,
                "split": splits[name],
                "set": name,
                "data": forecast_metrics.checksum([window for window in windows if window.series_set == name]),
                "windows": str(one.windows),
                "mase": f"{one.mase:.5g}",
                "wql": f"{one.wql:.5g}",
                "coverage": f"{one.coverage:.4f}",
                "crossing": f"{one.crossing:.4f}",
            }
        )
    with KEPT.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(scores: dict[str, Score], naive: dict[str, Score]) -> None:
    for name, one in scores.items():
        print(
            f"{name:28s} MASE {one.mase:7.3f} ({one.mase / naive[name].mase:.2f})  WQL {one.wql:7.4f}"
            f" ({one.wql / naive[name].wql:.2f})  coverage {one.coverage:.2f}  {one.windows} windows"
        )
    print(forecast_metrics.summary(scores, naive))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.forecast_quality", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write the windows for another machine")
    export.add_argument("file", type=pathlib.Path)
    scoring = commands.add_parser("score", help="score a model")
    scoring.add_argument("--forecaster", choices=["upstream", "diffusionz"], required=True)
    scoring.add_argument("--model", default="demo", help="a folder, for diffusionz also a bundled model's name")
    scoring.add_argument("--covariates", action="store_true", help="give them to the forecaster, too")
    scoring.add_argument("--record", action="store_true", help=f"keep the scores in {KEPT.name}")
    baselines = commands.add_parser("baselines", help="score the statistical forecasters, and keep the scores")
    for command in (export, scoring, baselines):
        command.add_argument("--split", choices=["dev", "test", "all"], default="all")
    options = parser.parse_args()

    windows = real_series.windows(options.split)
    if options.command == "export":
        forecast_metrics.save(windows, options.file)
        print(f"{len(windows)} windows of {len(real_series.chosen(options.split))} sets in {options.file}")
        return
    naive = forecast_metrics.score(windows, forecast_metrics.seasonal_naive(windows))
    if options.command == "baselines":
        keep("seasonal-naive", options.split, naive, windows, "")
        for name, forecaster in (("auto-ets", auto_ets), ("auto-arima", auto_arima)):
            begin = time.process_time()
            scores = forecast_metrics.score(windows, forecaster(windows))
            keep(name, options.split, scores, windows, SETTINGS[name])
            report(scores, naive)
            print(f"{name}: {time.process_time() - begin:.0f} s of CPU time")
        return
    open_model = {"upstream": upstream, "diffusionz": diffusionz}[options.forecaster]
    scores = forecast_metrics.score(windows, open_model(options.model, options.covariates)(windows))
    report(scores, naive)
    if options.record:
        name = options.forecaster + ("+covariates" if options.covariates else "")
        keep(name, options.split, scores, windows, pathlib.Path(options.model).name)


if __name__ == "__main__":
    main()
