"""Goal: what comes back is what was asked for: levels, order, sorted quantiles, consistent OHLC, embeddings."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import chronos_reference as reference
from tests.models import parity
from tests.models.chronos_cases import COVARIATE, TARGET, cases, known, many, series
from tests.models.chronos_ours import Engine, Request


@pytest.fixture(scope="module")
def model(random_chronos):
    return random_chronos("released")


def test_the_levels_asked_for_come_back_with_the_place_of_the_median(chronos_model):
    engine, native = chronos_model.engine, chronos_model.pipe.quantiles
    request = Request(many(30, 20), 5)
    for levels, median in ((None, native.index(0.5)), ((0.5,), 0), ((0.1, 0.9), -1), ((0.1, 0.3, 0.5, 0.6), 2)):
        got = engine.forecast(dataclasses.replace(request, levels=levels))
        assert got.levels.tolist() == (native if levels is None else list(levels))
        assert got.median_index == median
        assert got.quantiles.shape == (2, len(got.levels), 5)
    # By its value, not by its bits: 0.1 + 0.4 - 0.05 * 6 ...
    almost = engine.forecast(dataclasses.replace(request, levels=(0.1, 0.5 + 1e-12)))
    assert almost.median_index == 1
    exact = engine.forecast(dataclasses.replace(request, levels=(0.5,)))
    np.testing.assert_allclose(almost.quantiles[:, 1], exact.quantiles[:, 0], rtol=1e-6)


def test_a_level_of_the_model_has_the_bits_of_the_model(model):
    rows = Request(many(100, 60), 40)
    every = model.engine.forecast(rows).quantiles
    for i, level in enumerate(model.pipe.quantiles):
        assert np.array_equal(
            model.engine.forecast(dataclasses.replace(rows, levels=(level,))).quantiles[:, 0], every[:, i]
        )


def test_monotone_sorts_each_steps_quantiles(model):
    request = Request(many(100, 60, 17), 40)
    plain = model.engine.forecast(request).quantiles
    assert (np.diff(plain, axis=1) < 0).any()  # a random model's quantiles cross
    sorted_ = model.engine.forecast(dataclasses.replace(request, monotone=1)).quantiles
    assert np.array_equal(sorted_, np.sort(plain, axis=1))
    for levels in ((0.1, 0.5, 0.9), (0.001, 0.123, 0.456, 0.999)):
        some = model.engine.forecast(dataclasses.replace(request, monotone=1, levels=levels)).quantiles
        assert (np.diff(some, axis=1) >= 0).all()


@pytest.mark.parametrize("monotone", [0, 1])
def test_high_and_low_bound_the_four(model, monotone):
    """Fours of targets, a covariate between them."""
    kinds = [TARGET, TARGET, COVARIATE, TARGET, TARGET, TARGET, TARGET, TARGET, TARGET]
    request = Request(many(*[80] * 9), 30, group_ids=[0, 0, 0, 0, 0, 1, 2, 1, 1], row_kinds=kinds, monotone=monotone)
    plain = model.engine.forecast(request).quantiles
    bounded = model.engine.forecast(dataclasses.replace(request, constrain_ohlc=1)).quantiles
    for four in (0, 4):
        open_, high, low, close = bounded[four : four + 4]
        before = plain[four : four + 4]
        assert np.array_equal(open_, before[0])
        assert np.array_equal(close, before[3])
        assert np.array_equal(high, before.max(axis=0))
        assert np.array_equal(low, before.min(axis=0))
    assert not np.array_equal(plain, bounded)
    if monotone:
        assert (np.diff(bounded, axis=1) >= 0).all()


def test_covariates_inform_their_group_and_nothing_comes_back_for_them(model):
    rows = many(50, 50, 50, 50)
    future = known(4, 20, [1, 3])
    request = Request(rows, 20, group_ids=[0, 0, 1, 1], row_kinds=[TARGET, COVARIATE, TARGET, COVARIATE], future=future)
    targets = model.engine.forecast(request).quantiles
    assert targets.shape[0] == 2
    # Being a target changes what comes back, not what is computed.
    every = model.engine.forecast(dataclasses.replace(request, row_kinds=None)).quantiles
    assert np.array_equal(every[[0, 2]], targets)
    alone = model.engine.forecast(Request([rows[0], rows[2]], 20)).quantiles
    assert not np.allclose(alone, targets, rtol=1e-2)


def test_nothing_that_was_passed_in_is_changed(chronos_model):
    for name, request in cases(chronos_model).items():
        copies = [row.copy() for row in request.rows]
        future = None if request.future is None else request.future.copy()
        chronos_model.engine.forecast(request)
        for row, copy in zip(request.rows, copies, strict=True):
            assert np.array_equal(row, copy, equal_nan=True), name
        if future is not None:
            assert np.array_equal(request.future, future, equal_nan=True), name


# --- Embeddings -----------------------------------------------------------------------------------------------------


def test_embeddings_are_upstreams(chronos_model):
    """Of patches with an observation: upstream's values for the others depend on what else is in the batch."""
    compared = ("rows of many lengths", "groups interleaved", "a group with holes", "all but one missing", "a row of 1",
                "a row that is cut", "a context cut short", "points and blocks missing")  # fmt: skip
    requests = cases(chronos_model)
    for name in compared:
        expected, present, loc, scale = reference.embed(chronos_model.pipe, requests[name])
        ours = chronos_model.engine.embed(requests[name])
        for row, tokens in enumerate(ours.tokens):
            # Upstream's rows are padded to the longest.
            theirs, has = expected[row, -len(tokens) :], present[row, -len(tokens) :].numpy()
            assert not present[row, : -len(tokens)].any()
            assert np.isnan(tokens[~has]).all()
            parity.assert_parity("embedding", torch.from_numpy(tokens[has]), theirs[has], (chronos_model.name, name))
        np.testing.assert_allclose(ours.loc, loc, rtol=1e-5, atol=1e-6 * scale.max().item())
        np.testing.assert_allclose(ours.scale, scale, rtol=1e-5)


def test_a_row_has_a_token_for_each_patch_of_its_own_history(model):
    lengths = (1, 16, 17, 100, 9000)
    embedding = model.engine.embed(Request(many(*lengths), 1))
    # The register token and a future patch come on top.
    assert [len(tokens) for tokens in embedding.tokens] == [3, 3, 4, 9, 514]
    assert {tokens.shape[1] for tokens in embedding.tokens} == {64}


# --- Numbers that are not finite ------------------------------------------------------------------------------------


def test_a_level_that_is_not_finite_spoils_no_other(model, tmp_path):
    """A damaged checkpoint: NaN for the first step of each patch at some levels."""
    shutil.copytree(model.folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors, bad = load_file(file), [0, 4, 5, 20]
    bias = tensors["output_patch_embedding.output_layer.bias"]
    bias.unflatten(0, (len(model.pipe.quantiles), model.patch))[bad, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    damaged, request = Engine(tmp_path / "model"), Request(many(100, 33), 16)
    right, ours = (engine.forecast(request).quantiles for engine in (model.engine, damaged))
    nan = np.zeros(ours.shape, bool)
    nan[:, bad, 0] = True
    assert np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours[~nan], right[~nan])
    for horizon in (40, 1100):
        damaged.forecast(Request(many(100, 33), horizon, monotone=1))  # sorts them, and ends


def test_the_largest_values_give_infinity_rather_than_nan(model):
    row = series(60, 3, 0, 1)
    row *= np.float32(3e38) / np.abs(row).max()
    quantiles = model.engine.forecast(Request([row], 40)).quantiles
    assert np.isinf(quantiles).any() and not np.isnan(quantiles).any()
    model.engine.forecast(Request([row], 1100, monotone=1))


def test_a_group_of_covariates_alone_changes_nothing(model):
    rows = many(50, 50, 40, 40)
    with_them = Request(rows, 20, group_ids=[0, 1, 0, 1], row_kinds=[TARGET, COVARIATE, TARGET, COVARIATE])
    without = Request(rows[::2], 20, group_ids=[0, 0])
    ours, others = (model.engine.forecast(request).quantiles for request in (with_them, without))
    assert np.array_equal(ours, others)
