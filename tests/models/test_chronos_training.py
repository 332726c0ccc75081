"""Goal: what training/chronos2_demo trains is Chronos-2, on the tasks that it says, and what it exports is that model.

Method: its batches go through its own forward and through chronos-forecasting's model with the same weights; its series
and tasks are checked for what would spoil a training without stopping it.
"""

import importlib
import json
import pathlib
import sys
import types

import numpy as np
import pytest
import torch

TRAINING = pathlib.Path(__file__).resolve().parents[2] / "training" / "chronos2_demo"
MODULES = ("model", "generators", "tasks", "evaluate", "export")


@pytest.fixture(scope="module")
def training():
    """The scripts' modules, whose short names are given back afterwards."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(TRAINING))
    try:
        yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(TRAINING))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def weights(training):
    torch.manual_seed(1)
    made = training.model.Weights(training.model.Config(num_layers=2), "cpu")
    made.initialise()
    return made


@pytest.fixture(scope="module")
def tasks(training):
    torch.manual_seed(2)
    walks = torch.randn(128, training.generators.LENGTH).cumsum(1)  # never constant: no scale that rounding decides
    bank = training.generators.standardise(walks)
    return training.tasks.Tasks(bank, 1024, training.tasks.Options())


@pytest.fixture(scope="module", params=[(16, 5), (32, 48), (72, 200)], ids=lambda param: f"{param[0]} tokens")
def batch(training, tasks, request):
    tokens, shortest = request.param
    torch.manual_seed(tokens)
    return tasks.draw(training.tasks.Bucket(tokens, 12, 6, shortest, 2))


def raw(batch):
    """Context and future covariates, as chronos-forecasting is given them, read back from a batch's features: already
    normalised values, which upstream will normalise once more."""
    n = int(batch.reg.int().argmax())
    values, mask = batch.features[..., 16:32].sinh(), batch.features[..., 32:] > 0
    values = torch.where(mask, values, torch.nan)
    return values[:, :n].flatten(1), values[:, n + 1 :].flatten(1), n


def test_the_training_forward_and_loss_are_upstreams(training, weights, batch):
    from chronos.chronos2.config import Chronos2CoreConfig
    from chronos.chronos2.model import Chronos2Model

    model, tasks = training.model, training.tasks
    upstream = Chronos2Model(Chronos2CoreConfig(**weights.config.to_json())).eval()
    upstream.load_state_dict(weights.state())

    context, covariates, n = raw(batch)
    patches = len(batch.reg) - 1 - n
    assert context.isnan().any() and batch.groups.unique().numel() > 1  # padding, and more than one kind of group
    time, reg = tasks.token_times(len(batch.reg), patches, context.device)
    x = torch.cat((context, torch.zeros(len(context), 16), covariates), 1)
    known = ~x.isnan() & (time >= 0)
    seen = ~x.isnan() & (time < 0) & ~reg.repeat_interleave(16)
    features, attended, _, scale = tasks.model_input(x.nan_to_num(0.0), seen, known, time, reg, 1024)
    assert torch.equal(attended, batch.attended)
    alone = len(x) - batch.groups.numel()
    blocks = torch.arange(len(batch.groups))[:, None] * 8
    group_ids = torch.cat((torch.arange(alone), 1000 + (blocks + batch.groups).flatten()))
    target = torch.where(batch.weight > 0, batch.target, torch.nan).flatten(1)[:, -16 * patches :]
    loc = context.nanmean(1, keepdim=True).nan_to_num(0.0)
    with torch.no_grad():
        found = upstream(
            context=context,
            group_ids=group_ids,
            future_covariates=covariates,
            num_output_patches=patches,
            future_target=target.sinh() * scale + loc,  # so that upstream's normalisation gives back `target`
        )
        ours = model.Net(weights, torch.float32)(features, reg, attended, batch.groups, patches)
        levels = torch.tensor(model.QUANTILES)
        expected = target.unflatten(1, (patches, 16))
        loss = model.quantile_loss(ours, expected.nan_to_num(0.0), (~expected.isnan()).float(), levels)
    normal = torch.asinh((found.quantile_preds - loc[:, None]) / scale[:, None])
    ours = ours.permute(0, 2, 1, 3).flatten(2)
    assert (ours - normal).abs().max() < 2e-5
    assert float(loss) * len(levels) / target.numel() == pytest.approx(float(found.loss), rel=1e-5)


def test_nothing_that_is_to_be_forecast_can_be_seen(batch):
    given = batch.features[..., 32:] > 0
    given[:, batch.reg] = False  # that token's features are replaced by an embedding
    last = given[:, -8:]
    assert not (last & (batch.weight > 0)).any()
    assert (last & (batch.weight == 0)).any()  # known covariates
    hidden = torch.where(given, 0.0, batch.features[..., 16:32])
    hidden[:, batch.reg] = 0
    assert not hidden.any()
    assert batch.features.isfinite().all() and batch.target.isfinite().all()
    assert (batch.weight.sum((1, 2)) > 0).float().mean() > 0.5


def test_series_are_finite_standardised_and_all_different(training):
    torch.manual_seed(3)
    families = training.generators.Families("cpu", kernels=2)
    assert set(families.families) == set(training.generators.MIXTURE)
    for name in families.families:
        x = families.make(name, 16)
        assert x.shape == (16, training.generators.LENGTH) and x.isfinite().all(), name
        alive = x.abs().amax(1) > 0
        assert alive.sum() >= 12, name
        torch.testing.assert_close(x[alive].mean(1), torch.zeros(int(alive.sum())), atol=0.05, rtol=0, msg=name)
        assert len(x[alive].unique(dim=0)) == alive.sum(), name


@pytest.mark.parametrize("period", [4, 7, 12, 24, 168])
def test_seasons_come_back_after_their_period(training, period):
    torch.manual_seed(period)
    x = training.generators.season(training.generators.Source("cpu"), 64, torch.full((64,), float(period)))
    x = training.generators.standardise(x)
    again = (x[:, period:] * x[:, :-period]).mean(1)
    assert again.median() > 0.95
    assert (x[:, period // 2 :] * x[:, : -(period // 2)]).mean(1).median() < 0.7


def test_an_exported_folder_is_upstreams_and_widened_around_the_median(training, weights, tmp_path):
    from chronos import Chronos2Pipeline
    from safetensors.torch import save_file

    save_file(weights.state(), tmp_path / "weights.safetensors")
    history = torch.randn(1, 200).cumsum(1)
    found = []
    for factor in (1.0, 1.5):
        folder = tmp_path / str(factor)
        training.export.export(tmp_path / "weights.safetensors", folder, factor)
        assert training.export.check(folder) < 1e-3  # random weights forecast hundreds of deviations
        assert json.loads((folder / "config.json").read_text())["chronos_config"]["time_encoding_scale"] == 1024
        quantiles = Chronos2Pipeline.from_pretrained(folder, device_map="cpu").predict([history[0]], 16)[0][0]
        found.append(np.arcsinh(((quantiles - history.mean()) / history.std(correction=0)).numpy()))
    plain, wide = (q - q[10] for q in found)
    np.testing.assert_allclose(wide, 1.5 * plain, atol=5e-3)  # float16 weights
    np.testing.assert_allclose(found[0][10], found[1][10], atol=5e-3)
