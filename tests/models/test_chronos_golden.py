"""Goal: with the released weights the engine gives the numbers that AWS published.

The numbers stand in the outputs of the notebook deploy-chronos-to-amazon-sagemaker of chronos-forecasting's repository,
made with amazon/chronos-2 and rounded to two decimals. The weights are not part of this project: the test runs where
DIFFUSIONZ_CHRONOS2_PATH names their folder.
"""

import os

import numpy as np
import pytest

from tests.models.chronos_cases import COVARIATE, TARGET
from tests.models.chronos_ours import Engine, Request

PATH = os.environ.get("DIFFUSIONZ_CHRONOS2_PATH")
pytestmark = pytest.mark.skipif(
    not PATH, reason="DIFFUSIONZ_CHRONOS2_PATH does not name the folder of amazon/chronos-2"
)


def rows(*values):
    return [np.array(row, np.float32) for row in values]


SEASON = [0, 4, 5, 1.5, -3, -5, -3, 1.5, 5, 4, 0, -4, -5, -1.5, 3, 5, 3, -1.5, -5, -4]
SALES = [1, 2, 3, 2, 0.5, 2, 3, 2, 1]
NAN = np.nan
# feat_2 has the categories A and B. Upstream gives each the mean of the targets where it holds, smoothed by one target
# mean (sum + mean) / (count + 1).
MEAN = np.mean(SALES)
LETTERS = {
    "A": (sum(SALES[i] for i in (0, 4, 5, 6, 7)) + MEAN) / 6,
    "B": (sum(SALES[i] for i in (1, 2, 3, 8)) + MEAN) / 5,
}
CASES = {
    "one series": (
        Request(rows(SEASON), 10, levels=(0.1, 0.5, 0.9)),
        {
            (0, 0.1): [-1.68, 2.86, 4.01, 1.01, -3.77, -6.22, -5.39, -1.77, 2.6, 3.62],
            (0, 0.5): [-0.36, 4.02, 5.3, 2.45, -2.48, -5.14, -4.33, 0.06, 4.42, 5.14],
            (0, 0.9): [1.02, 5.02, 6.32, 3.82, -0.85, -3.92, -2.93, 1.83, 5.63, 6.44],
        },
    ),
    "three variates": (
        Request(
            rows([1, 2, 3, 2, 1, 2, 3, 4], [5, 4, 3, 4, 5, 4, 3, 2], [2, 2.5, 3, 2.5, 2, 2.5, 3, 3.5]), 4,
            levels=(0.1, 0.5), group_ids=[0, 0, 0],
        ),
        {
            (0, 0.5): [3.66, 3.54, 3.5, 3.42], (1, 0.5): [2.01, 2.07, 2.2, 2.25], (2, 0.5): [3.33, 3.27, 3.25, 3.21],
            (0, 0.1): [1.98, 1.52, 1.16, 0.88], (1, 0.1): [0.84, 0.21, 0.03, -0.27],
            (2, 0.1): [2.49, 2.26, 2.08, 1.94],
        },
    ),
    "covariates": (
        Request(
            rows(SALES, [10 * x for x in SALES], [3 * x for x in SALES], [LETTERS[c] for c in "ABBBAAAAB"]), 3,
            levels=(0.1, 0.5, 0.9), group_ids=[0] * 4, row_kinds=[TARGET, COVARIATE, COVARIATE, COVARIATE],
            future=np.array([[NAN] * 3, [NAN] * 3, [2.5, 2.2, 3.3], [LETTERS[c] for c in "BAA"]], np.float32),
        ),
        {(0, 0.1): [0.35, 0.58, 0.17], (0, 0.5): [1.73, 2.09, 1.74], (0, 0.9): [3.11, 3.79, 3.52]},
    ),
    "two series": (
        Request(rows(SALES, [5.4, 3, 3, 2, 1.5, 2, -1]), 5, levels=(0.5,)),
        {(0, 0.5): [1.69, 1.94, 1.65, 1.54, 1.84], (1, 0.5): [-1.2, -1.41, -1.27, -1.37, -1.3]},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return Engine(PATH)


@pytest.mark.parametrize("name", CASES)
def test_published_forecasts(engine, name):
    request, published = CASES[name]
    forecast = engine.forecast(request)
    for (target, level), values in published.items():
        ours = forecast.quantiles[target, forecast.levels.tolist().index(level)]
        np.testing.assert_allclose(ours, values, atol=0.0051, err_msg=f"target {target}, level {level}")
