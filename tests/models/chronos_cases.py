"""Requests of every kind that the forecasting ABI takes, scaled to a model's sizes."""

import numpy as np

from tests.models.chronos_ours import Request

TARGET, COVARIATE = 0, 1
DECILES = tuple(round(0.1 * i, 1) for i in range(1, 10))


def series(length, seed=0, level=None, scale=None):
    """A seasonal walk, float32 [length]; level and scale are drawn where they are not given."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0, 5) if level is None else level
    scale = rng.lognormal(0, 1) if scale is None else scale
    season = np.sin(2 * np.pi * np.arange(length) / rng.integers(5, 30) + rng.uniform(0, 6))
    walk = np.cumsum(rng.normal(0, 0.2, length)) + season + rng.normal(0, 0.2, length)
    return (level + scale * walk).astype(np.float32)


def many(*lengths, seed=0):
    return [series(length, seed + i) for i, length in enumerate(lengths)]


def missing(row, *where):
    """A copy of the row with NaN at each of `where` (indices, slices)."""
    row = row.copy()
    for part in where:
        row[part] = np.nan
    return row


def known(rows, horizon, of, seed=50):
    """Future values of some rows: [rows, horizon], NaN for the others."""
    future = np.full((rows, horizon), np.nan, np.float32)
    for i in of:
        future[i] = series(horizon, seed + i)
    return future


def some_missing(values, fraction, seed=0):
    values = values.copy()
    values[np.random.default_rng(seed).random(values.shape) < fraction] = np.nan
    return values


def cases(model):
    """{name: Request}. `model` is a RandomChronos."""
    p, c, horizon = model.patch, model.context_length, model.horizon
    usual = min(c, 9 * p + 5)  # steps of history
    h = min(horizon, 2 * p + 3)
    long = horizon + p + 1  # two passes
    row = series(usual, 3)
    blocks = missing(row, 2, slice(p, 2 * p + 3), slice(usual // 2, usual // 2 + 2 * p), -1)
    mixed_lengths = [usual, 3, usual - p, p + 1, usual // 2]
    requests = {
        # Lengths and horizons
        **{f"a row of {n}": Request([series(n, n)], h) for n in (1, 2, p - 1, p, p + 1, c - 1, c)},
        "a row that is cut": Request([series(c + 3 * p + 1, 9)], h),
        "a horizon of 1": Request([row], 1),
        "a horizon of one pass": Request([row], horizon),
        "rows of many lengths": Request(many(*mixed_lengths, 1, c, c + 40), h),
        "a context cut short": Request(many(usual, 5), h, context_length=max(1, min(c, usual) - p - 3)),
        "a context of one step": Request(many(usual, 5), h, context_length=1),
        # Missing values
        "points and blocks missing": Request([blocks, series(usual - 3, 4)], h),
        "the beginning missing": Request([missing(row, slice(0, 2 * p + 1))], h),
        "the end missing": Request([missing(row, slice(usual - 2 * p - 1, usual))], h),
        "all but one missing": Request([missing(row, slice(0, 7), slice(8, usual))], h),
        # Groups
        "groups of neighbours": Request(many(*mixed_lengths), h, group_ids=[7, 7, -3, -3, 5]),
        "groups interleaved": Request(many(*mixed_lengths, usual), h, group_ids=[1, 0, 1, 0, 2, 1]),
        "all together": Request(many(*mixed_lengths), h, group_ids=[0] * 5),
        "a group with holes": Request(
            [blocks, missing(row, slice(0, usual - 4)), series(p, 5), some_missing(series(usual, 6), 0.5)], h,
            group_ids=[4] * 4,
        ),
        # Covariates
        "past covariates": Request(
            many(usual, usual, usual), h, group_ids=[0] * 3, row_kinds=[TARGET, COVARIATE, COVARIATE]
        ),
        "known covariates": Request(
            many(usual, usual, 20, 20), h, group_ids=[0, 0, 1, 1], row_kinds=[TARGET, COVARIATE, COVARIATE, TARGET],
            future=known(4, h, [1, 2]),
        ),
        "covariates known in part": Request(
            many(usual, usual, usual), h, group_ids=[0] * 3, row_kinds=[COVARIATE, TARGET, COVARIATE],
            future=some_missing(known(3, h, [0, 2]), 0.4),
        ),
        "a target known in part": Request(many(usual, 9), h, future=some_missing(known(2, h, [0]), 0.5)),
        "a covariate without a past": Request(
            [row, np.full(usual, np.nan, np.float32)], h, group_ids=[0, 0], row_kinds=[TARGET, COVARIATE],
            future=known(2, h, [1]),
        ),
        "a covariate of zeros and ones": Request(
            [row, (np.arange(usual) % 7 == 0).astype(np.float32)], h, group_ids=[0, 0], row_kinds=[TARGET, COVARIATE],
            future=np.stack([np.full(h, np.nan), np.arange(h) % 7 == 3]).astype(np.float32),
        ),
        # Levels
        "one level": Request([row], h, levels=(0.5,)),
        "levels of the model and between": Request([row, blocks], h, levels=(0.1, 0.123, 0.5, 0.77, 0.9)),
        "levels beyond the outermost": Request([row], h, levels=(0.001, 0.3, 0.999)),
        # Values
        "a constant": Request([np.full(usual, 3, np.float32), np.zeros(usual, np.float32)], h),
        "one value and a gap": Request([missing(np.full(usual, -8, np.float32), slice(3, usual - 1))], h),
        "large and small values": Request([series(usual, i, 0, 10.0**e) for i, e in enumerate((15, 6, -6, -15))], h),
        "one spike": Request([np.where(np.arange(usual) == 5, 1e6, row).astype(np.float32)], h),
        # Unrolling
        "two passes": Request(many(usual, 5, p + 1), long),
        "two passes of a full context": Request([series(c, 11)], long),
        "two passes of a group with covariates": Request(
            many(usual, usual, 20, usual), long, levels=DECILES, group_ids=[0, 0, 1, 0],
            row_kinds=[TARGET, COVARIATE, TARGET, COVARIATE], future=some_missing(known(4, long, [1]), 0.1),
        ),
        "two passes, a target known in part": Request(
            many(usual, 30), long, group_ids=[3, 3], future=some_missing(known(2, long, [0, 1]), 0.7)
        ),
    }  # fmt: skip
    if horizon <= 100:
        requests["five passes"] = Request(
            many(usual, 9, usual), 4 * horizon + 1, group_ids=[0, 1, 0], row_kinds=[TARGET, TARGET, COVARIATE],
            future=known(3, 4 * horizon + 1, [2]),
        )  # fmt: skip
    return requests
