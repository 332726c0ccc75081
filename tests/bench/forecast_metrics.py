"""Windows of real series, how a forecast of them is scored, and the naive forecast that scores are relative to.

Needs numpy alone, so that a checkpoint can be scored where nothing else is installed:

    windows = load("windows.npz")                       # written by python -m tests.bench.forecast_quality export
    scores = score(windows, [forecast(window.history, len(window.future)) for window in windows])
    print(summary(scores, relative_to=score(windows, seasonal_naive(windows))))

Metrics as fev defines them (autogluon/fev, src/fev/metrics.py), over all windows of a set together:
MASE = mean |y - median| / mean |difference of one season within the window's history|, left out where that is 0;
WQL = mean quantile loss / mean |y| with loss 2 |(y - q) (1[y <= q] - level)|. A missing y is left out of both.
"""

import dataclasses
import hashlib
import pathlib
import statistics
from collections.abc import Sequence

import numpy as np

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RATIO_BOUNDS = (1e-2, 100.0)  # of one set's share in the geometric mean, as in fev


@dataclasses.dataclass(frozen=True)
class Window:
    """What a forecaster is given, and what came after it. Float32, NaN where nothing was observed."""

    series_set: str
    season: int  # observations
    history: np.ndarray  # [observations], the oldest first
    future: np.ndarray  # [horizon]
    past_covariates: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [observations] each
    future_covariates: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [horizon]; in past ones too


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one forecaster on one set."""

    windows: int
    mase: float
    wql: float
    coverage: float  # share of the observations within the levels 0.1 and 0.9
    crossing: float  # share of neighbouring levels in the wrong order


def seasonal_naive(windows: Sequence[Window]) -> list[np.ndarray]:
    """The last season again, with normal errors of the history's seasonal differences that grow with the square root
    of the seasons ahead: the forecast and the prediction intervals of statsforecast's SeasonalNaive. Where the last
    value of a place in the season is missing, the one before it stands in."""
    normal = np.array([statistics.NormalDist().inv_cdf(level) for level in LEVELS])[:, None]
    forecasts = []
    for window in windows:
        season, horizon = window.season, len(window.future)
        history = window.history.astype(np.float64)
        padded = np.concatenate([np.full(-len(history) % season, np.nan), history]).reshape(-1, season)
        last = np.full(season, history[~np.isnan(history)][-1])
        for values in padded:
            last = np.where(np.isnan(values), last, values)
        differences = history[season:] - history[:-season]
        sigma = np.sqrt(np.nanmean(differences**2))
        ahead = np.arange(horizon)
        forecasts.append(last[ahead % season] + normal * sigma * np.sqrt(ahead // season + 1))
    return forecasts


def score(windows: Sequence[Window], forecasts: Sequence[np.ndarray]) -> dict[str, Score]:
    """Of each set, in the order of the windows. A forecast is [levels, horizon] at LEVELS.

    Raises ValueError for a forecast of another shape or with a value that is not finite: nobody gets better by
    leaving something out.
    """
    if len(windows) != len(forecasts):
        raise ValueError(f"{len(forecasts)} forecasts for {len(windows)} windows")
    members: dict[str, list[tuple[Window, np.ndarray]]] = {}
    for window, forecast in zip(windows, forecasts, strict=True):
        forecast = np.asarray(forecast, np.float64)
        wanted = (len(LEVELS), len(window.future))
        if forecast.shape != wanted or not np.isfinite(forecast).all():
            raise ValueError(f"{window.series_set}: a forecast of shape {forecast.shape}, not finite or not {wanted}")
        members.setdefault(window.series_set, []).append((window, forecast))
    return {name: _score_set(pairs) for name, pairs in members.items()}


def _score_set(pairs: list[tuple[Window, np.ndarray]]) -> Score:
    levels = np.array(LEVELS)[:, None]
    scaled, losses, sizes, within, crossed = [], [], [], [], []
    for window, forecast in pairs:
        y = window.future.astype(np.float64)
        observed = ~np.isnan(y)
        y, forecast = y[observed], forecast[:, observed]
        history = window.history.astype(np.float64)
        scale = np.nanmean(np.abs(history[window.season :] - history[: -window.season]))
        if scale > 0:
            scaled.append(np.abs(y - forecast[LEVELS.index(0.5)]) / scale)
        losses.append(2 * np.abs((y - forecast) * ((y <= forecast) - levels)).ravel())
        sizes.append(np.abs(y))
        within.append((forecast[0] <= y) & (y <= forecast[-1]))
        crossed.append(np.diff(forecast, axis=0).ravel() < 0)
    return Score(
        windows=len(pairs),
        mase=float(np.concatenate(scaled).mean()),
        wql=float(np.concatenate(losses).mean() / np.concatenate(sizes).mean()),
        coverage=float(np.concatenate(within).mean()),
        crossing=float(np.concatenate(crossed).mean()),
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of one forecaster on all sets, each set with the same weight."""

    sets: int
    mase: float  # geometric mean of the ratios to the other forecaster
    wql: float
    coverage: float  # mean
    crossing: float

    def __str__(self) -> str:
        return (
            f"MASE {self.mase:.3f} and WQL {self.wql:.3f} of seasonal naive's, the 80% interval covers"
            f" {self.coverage:.1%}, {self.crossing:.2%} of the quantiles cross; {self.sets} sets"
        )


def summary(scores: dict[str, Score], relative_to: dict[str, Score]) -> Summary:
    """Raises KeyError when the other forecaster lacks a set."""

    def relative(metric: str) -> float:
        ratios = [getattr(one, metric) / getattr(relative_to[name], metric) for name, one in scores.items()]
        return float(np.exp(np.mean(np.log(np.clip(ratios, *RATIO_BOUNDS)))))

    return Summary(
        sets=len(scores),
        mase=relative("mase"),
        wql=relative("wql"),
        coverage=float(np.mean([one.coverage for one in scores.values()])),
        crossing=float(np.mean([one.crossing for one in scores.values()])),
    )


def checksum(windows: Sequence[Window]) -> str:
    """Of the numbers in the windows: scores with different checksums are not comparable."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.series_set} {window.season} {len(window.history)} {len(window.future)}".encode())
        covariates = [*window.past_covariates.values(), *window.future_covariates.values()]
        for values in (window.history, window.future, *covariates):
            digest.update(np.where(np.isnan(values), np.float32(np.inf), values).astype("<f4").tobytes())
    return digest.hexdigest()[:12]


def save(windows: Sequence[Window], path: pathlib.Path | str) -> None:
    """All windows in one .npz without pickled objects: names, lengths, and the values one after the other."""
    covariates = [(index, name) for index, window in enumerate(windows) for name in window.past_covariates]

    def joined(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float32), *arrays]).astype(np.float32)

    np.savez_compressed(
        path,
        series_set=np.array([window.series_set for window in windows]),
        season=np.array([window.season for window in windows]),
        observations=np.array([len(window.history) for window in windows]),
        horizon=np.array([len(window.future) for window in windows]),
        history=joined([window.history for window in windows]),
        future=joined([window.future for window in windows]),
        covariate_window=np.array([index for index, _ in covariates], np.int64),
        covariate_name=np.array([name for _, name in covariates], np.str_),
        covariate_known=np.array([name in windows[index].future_covariates for index, name in covariates], np.bool_),
        covariate_past=joined([windows[index].past_covariates[name] for index, name in covariates]),
        covariate_future=joined(
            [known[name] for index, name in covariates if name in (known := windows[index].future_covariates)]
        ),
    )


def load(path: pathlib.Path | str) -> list[Window]:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
    histories = np.split(stored["history"], np.cumsum(stored["observations"])[:-1])
    futures = np.split(stored["future"], np.cumsum(stored["horizon"])[:-1])
    windows = [
        Window(str(name), int(season), history, future)
        for name, season, history, future in zip(
            stored["series_set"], stored["season"], histories, futures, strict=True
        )
    ]
    past_at = future_at = 0
    for index, name, known in zip(
        stored["covariate_window"], stored["covariate_name"], stored["covariate_known"], strict=True
    ):
        window = windows[index]
        past_end = past_at + len(window.history)
        window.past_covariates[str(name)] = stored["covariate_past"][past_at:past_end]
        past_at = past_end
        if known:
            future_end = future_at + len(window.future)
            window.future_covariates[str(name)] = stored["covariate_future"][future_at:future_end]
            future_at = future_end
    return windows
