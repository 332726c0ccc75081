"""Goal: a forecast is upstream's, for every kind of request that the ABI takes.

Method: random checkpoints are written to disk; chronos-forecasting and the engine read the same files and get the same
rows. The error of a row is its largest difference over the row's largest distance from its mean. Bound:
parity.BOUNDS["forecast"].
"""

import numpy as np
import pytest
import torch

from tests.models import chronos_reference as reference
from tests.models import parity
from tests.models.chronos_cases import cases, many, series, some_missing
from tests.models.chronos_ours import Request


def assert_forecasts(model, request, note, engine=None, stage="forecast"):
    expected, loc = reference.forecast(model.pipe, request)
    ours = torch.from_numpy((engine or model.engine).forecast(request).quantiles)
    assert ours.shape == expected.shape
    for row, (one, other) in enumerate(zip(ours.double(), expected.double(), strict=True)):
        parity.assert_parity(stage, one - loc[row], other - loc[row], (model.name, note, f"target {row}"))


def test_every_kind_of_request_gives_the_same_forecast(chronos_model):
    for name, request in cases(chronos_model).items():
        assert_forecasts(chronos_model, request, name)


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
    """Of variation 1. The numbers cannot be nearer than the input's own rounding, which is what the bound is."""
    model, row = random_chronos("released"), series(200, 3, 0, 1)
    shifted = (row.astype(np.float64) + level).astype(np.float32)
    expected, loc = reference.forecast(model.pipe, Request([shifted], 40))
    ours = torch.from_numpy(model.engine.forecast(Request([shifted], 40)).quantiles)
    spread = (expected - loc[:, None, None]).abs().max()
    rounding = np.spacing(np.float32(abs(level)))
    error = (ours.double() - expected.double()).abs().max()
    assert error <= parity.BOUNDS["forecast"] * spread + 8 * rounding * spread, (error, spread, rounding)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e20, 1e-20])
def test_a_constant_is_forecast_at_its_level(chronos_model, value):
    """Upstream's mean of equal numbers is off by a rounding, which its scale then makes the variation of the row: its
    forecast is near the constant. Here it is as near."""
    row = np.full(77, value, np.float32)
    expected, _ = reference.forecast(chronos_model.pipe, Request([row], 20))
    ours = chronos_model.engine.forecast(Request([row], 20)).quantiles
    z = chronos_model.engine.forecast(Request([np.zeros(77, np.float32)], 20)).quantiles
    np.testing.assert_allclose(ours, np.float32(value) + z, rtol=1e-6, atol=1e-9)
    bound = 1e-4 * abs(value) + 2e-5 * float(np.abs(z).max()) / 1e-5
    assert (torch.from_numpy(ours) - expected).abs().max() <= bound
