"""Goal: a forecast is scored by what fev and statsforecast mean by the same words, and only on fair windows.

Method: scores of windows small enough to count by hand; our seasonal naive beside statsforecast's on the real windows.
"""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.bench import forecast_metrics, forecast_quality, real_series
from tests.bench.forecast_metrics import LEVELS, Window


def window(history, future, season=1, name="set", **covariates):
    return Window(name, season, np.array(history, np.float32), np.array(future, np.float32), **covariates)


def flat(*values):
    """The same number at every level."""
    return np.tile(np.array(values, np.float64), (len(LEVELS), 1))


def test_the_metrics_are_those_counted_by_hand():
    # Seasonal differences 2, 4, 6: scale 4. Errors 3 and 1; a third value was not observed.
    found = forecast_metrics.score([window([0, 2, 6, 12], [10, 20, np.nan])], [flat(13, 19, 0)])["set"]
    assert found.mase == pytest.approx((3 + 1) / 2 / 4)
    # Above the truth a level costs 2 (1 - level) of the error, below it 2 level: 1 on average over nine levels.
    assert found.wql == pytest.approx((3 + 1) / 2 / 15)
    assert found.coverage == 0 and found.crossing == 0

    spread = np.arange(1.0, 10.0)[:, None]
    found = forecast_metrics.score([window([0, 1, 0], [9])], [spread])["set"]
    losses = [2 * level * (9 - value) for level, value in zip(LEVELS, range(1, 10), strict=True)]
    assert found.wql == pytest.approx(np.mean(losses) / 9) and found.mase == 4 and found.coverage == 1
    assert forecast_metrics.score([window([0, 1, 0], [9])], [spread[::-1]])["set"].crossing == 1


def test_windows_of_a_set_are_pooled_and_sets_weigh_the_same():
    windows = [window([0, 1], [1], name="a"), window([0, 1], [3], name="a"), window([0, 1], [1], name="b")]
    scores = forecast_metrics.score(windows, [flat(2), flat(4), flat(5)])
    assert scores["a"].mase == 1 and scores["a"].wql == pytest.approx(0.5) and scores["b"].mase == 4
    naive = forecast_metrics.score(windows, [flat(3), flat(5), flat(3)])
    found = forecast_metrics.summary(scores, naive)
    assert found.mase == pytest.approx((1 / 2 * 4 / 2) ** 0.5) and found.sets == 2
    exploded = forecast_metrics.score(windows, [flat(1e9), flat(1e9), flat(3)])
    assert forecast_metrics.summary(exploded, naive).wql == pytest.approx(10)  # one set counts at most a hundredfold


def test_a_history_without_change_says_nothing_of_scale():
    windows = [window([5, 5, 5], [6]), window([0, 1, 2], [4])]
    assert forecast_metrics.score(windows, [flat(5), flat(2)])["set"].mase == 2


@pytest.mark.parametrize("forecast", [flat(1, 2), flat(np.nan), flat(np.inf), np.zeros((3, 1))])
def test_a_forecast_that_leaves_something_out_is_refused(forecast):
    with pytest.raises(ValueError, match="set: a forecast of shape"):
        forecast_metrics.score([window([0, 1], [1])], [forecast])
    with pytest.raises(ValueError, match="0 forecasts for 1 windows"):
        forecast_metrics.score([window([0, 1], [1])], [])


def test_seasonal_naive_is_statsforecasts():
    from statsforecast.models import SeasonalNaive

    windows = [one for one in real_series.windows("dev") if not np.isnan(one.history).any()]
    assert {one.season for one in windows} >= {1, 4, 7, 12, 48}

    def fit(one, history):
        return SeasonalNaive(one.season).forecast(history, len(one.future), level=forecast_quality.INTERVALS)

    theirs = forecast_quality.statistical(windows, fit)
    for ours, wanted in zip(forecast_metrics.seasonal_naive(windows), theirs, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def test_seasonal_naive_goes_back_over_missing_values():
    history = [1, 2, 3, 11, 12, 13, 21, np.nan, 23]
    found = forecast_metrics.seasonal_naive([window(history, [0] * 4, season=3)])[0]
    assert found[LEVELS.index(0.5)].tolist() == [21, 12, 23, 21]
    assert np.isfinite(found).all()


def test_windows_come_back_from_a_file_as_they_were(tmp_path):
    windows = [one for one in real_series.windows("all") if one.series_set in ("seatbelts", "lynx", "melbourne-sydney")]
    forecast_metrics.save(windows, tmp_path / "windows.npz")
    back = forecast_metrics.load(tmp_path / "windows.npz")
    assert forecast_metrics.checksum(back) == forecast_metrics.checksum(windows)
    for one, other in zip(windows, back, strict=True):
        assert list(one.past_covariates) == list(other.past_covariates)
        assert list(one.future_covariates) == list(other.future_covariates)
    changed = windows[0].history.copy()
    changed[0] += 1
    assert forecast_metrics.checksum([window(changed, windows[0].future)]) != forecast_metrics.checksum(windows[:1])


def test_the_sets_are_many_varied_and_apart():
    names = [one.name for one in real_series.SETS]
    assert len(names) == len(set(names))
    for split, least in (("dev", 12), ("test", 22)):
        chosen = real_series.chosen(split)
        assert len(chosen) >= least
        assert {one.frequency for one in chosen} >= set(real_series.SEASONS)
    cut = {split: real_series.windows(split) for split in ("dev", "test")}
    futures = {split: {one.future.tobytes() for one in windows} for split, windows in cut.items()}
    assert not futures["dev"] & futures["test"]
    for one in cut["dev"] + cut["test"]:
        assert max(2 * one.season, len(one.future)) <= len(one.history) <= real_series.MAX_HISTORY
        assert len(one.future) <= 128 and np.isfinite(one.history).any() and np.isfinite(one.future).any()
        for name, values in one.past_covariates.items():
            assert len(values) == len(one.history), name
        for name, values in one.future_covariates.items():
            assert name in one.past_covariates and len(values) == len(one.future)
