"""Goal: a forecast is upstream's, for every kind of request that the ABI takes.

Method: random checkpoints are written to disk; chronos-forecasting and the engine read the same files and get the same
rows. The error of a row is its largest difference over the forecast's largest distance from the mean of the row. Bound:
parity.BOUNDS["forecast"].
"""

import numpy as np
import pytest
import torch

from tests.models import chronos_reference as reference
from tests.models import parity
from tests.models.chronos_cases import cases, many, series, some_missing
from tests.models.chronos_ours import Request


def assert_forecasts(model, request, note, stage="forecast"):
    expected, centres = reference.forecast(model.pipe, request)
    ours = torch.from_numpy(model.engine.forecast(request).quantiles)
    parity.assert_forecasts(ours, expected, centres, (model.name, note), stage)


def test_every_kind_of_request_gives_the_same_forecast(chronos_model):
    for name, request in cases(chronos_model).items():
        assert_forecasts(chronos_model, request, name)


def test_but_for_the_rounding_of_upstreams_means_they_are_nearer_still(chronos_model, monkeypatch):
    monkeypatch.setattr(type(chronos_model.pipe.model.instance_norm), "forward", reference.scale_in_float64)
    for name, request in cases(chronos_model).items():
        assert_forecasts(chronos_model, request, name, "forecast, float64 means")


@pytest.mark.parametrize("length", [8192, 9000])
def test_the_longest_context_gives_the_same_forecast(random_chronos, length):
    request = Request([series(length, 1), some_missing(series(length, 2), 0.3)], 40)
    assert_forecasts(random_chronos("released"), request, f"{length} steps")


@pytest.mark.parametrize("horizon", [1, 17, 1024, 2000])
def test_horizons_give_the_same_forecast(random_chronos, horizon):
    request = Request(many(300, 40, 90), horizon, group_ids=[0, 1, 0])
    assert_forecasts(random_chronos("released"), request, f"{horizon} steps")


def test_a_large_batch_of_groups_gives_the_same_forecast(random_chronos):
    """Upstream masks a matrix of all rows by all rows; the engine attends within each group."""
    rng = np.random.default_rng(5)
    lengths, groups = rng.integers(1, 200, 60), rng.integers(0, 15, 60)
    request = Request(many(*lengths), 40, group_ids=groups.tolist())
    assert_forecasts(random_chronos("released"), request, "60 rows in 15 groups")
    assert_forecasts(random_chronos("released"), Request(many(*lengths), 40, group_ids=[-9] * 60), "60 rows together")


# --- Where float32 itself is the limit ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1e3, 1e5, -1e6])
def test_a_level_far_above_the_variation_costs_no_more_than_its_rounding(random_chronos, level):
    """Of variation 1. Upstream's mean is off by some roundings of the level, which the scaled values then are too, so
    that is how near the forecasts can be."""
    model, row = random_chronos("released"), series(200, 3, 0, 1)
    request = Request([(row.astype(np.float64) + level).astype(np.float32)], 40)
    expected, loc = reference.forecast(model.pipe, request)
    ours = torch.from_numpy(model.engine.forecast(request).quantiles)
    distance = (expected - loc[:, None, None]).abs().max().item()
    error = (ours.double() - expected.double()).abs().max().item() / distance
    bound = parity.BOUNDS["forecast"] + 8 * float(np.spacing(np.float32(abs(level))))
    assert error <= bound, f"{error:.1e}; the bound is {bound:.1e}"


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_the_unit_of_the_values_changes_their_unit_alone(chronos_model, factor):
    """Where upstream's float32 squares over- or underflow."""
    row = series(60, 3, 2, 1)
    plain = chronos_model.engine.forecast(Request([row], 20)).quantiles.astype(np.float64)
    scaled = chronos_model.engine.forecast(Request([(row * factor).astype(np.float32)], 20)).quantiles
    ours = torch.from_numpy(scaled.astype(np.float64) / factor)
    parity.assert_forecasts(ours, torch.from_numpy(plain), torch.tensor([row.mean()]), factor)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e20, 1e-20])
def test_a_constant_is_forecast_at_its_level(chronos_model, value):
    """With upstream's scale of a constant row, 1e-5, as a row of zeros. Upstream's own mean of equal numbers can be off
    by a rounding, which its scale then takes for the variation of the row."""
    steps = chronos_model.patch  # past one pass the history is not constant any more
    constant = Request([np.full(77, value, np.float32)], steps)
    ours = chronos_model.engine.forecast(constant).quantiles
    zeros = chronos_model.engine.forecast(Request([np.zeros(77, np.float32)], steps)).quantiles
    np.testing.assert_allclose(ours, np.float32(value) + zeros, rtol=2e-7, atol=1e-12)
    expected, _ = reference.forecast(chronos_model.pipe, constant)
    assert np.abs(ours - expected.numpy()).max() <= 2 * np.abs(zeros).max() + 1e-5 * abs(value)
