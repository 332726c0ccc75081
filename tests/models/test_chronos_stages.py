"""Goal: every stage of a pass computes what upstream computes, so that a failure says where.

Method: chronos_probe gives the engine's patches, embedding, hidden states after each layer, norm and head; hooks give
upstream's. A row's tokens are found again by their positions: upstream pads the batch, the engine leaves missing
patches out. Bounds: parity.BOUNDS.
"""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import chronos_reference as reference
from tests.models import parity
from tests.models.chronos_cases import cases


@pytest.fixture(scope="module")
def run_pass(probe, tmp_path_factory):
    """run_pass(model, request): the stages of the engine's first pass over the rows, which stand by groups."""

    def run(model, request, precision="float32"):
        scratch = tmp_path_factory.mktemp("pass")
        length = request.context_length or model.context_length
        tensors = {f"row {i}": torch.from_numpy(row[-length:].copy()) for i, row in enumerate(request.rows)}
        if request.future is not None:
            tensors |= {f"future {i}": torch.from_numpy(row.copy()) for i, row in enumerate(request.future)}
        save_file(tensors, scratch / "in.safetensors")
        ids = request.group_ids or list(range(len(request.rows)))
        starts = [i for i, group in enumerate(ids) if i == 0 or ids[i - 1] != group]
        plan = {
            "model": str(model.folder), "precision": precision, "inputs": str(scratch / "in.safetensors"),
            "outputs": str(scratch / "out.safetensors"),
            "passes": [{
                "rows": [f"row {i}" for i in range(len(ids))],
                "futures": [f"future {i}" if request.future is not None else "" for i in range(len(ids))],
                "groups": [[start, end - start] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)],
                "output_patches": -(-request.horizon // model.patch), "out": "pass",
            }],
        }  # fmt: skip
        (scratch / "plan.json").write_text(json.dumps(plan))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command: list[pathlib.Path] = [probe("chronos_probe"), scratch / "plan.json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {name.removeprefix("pass."): tensor for name, tensor in load_file(scratch / "out.safetensors").items()}

    return run


def by_groups(request):
    """The request with the rows of a group side by side, and those alone last."""
    ids = request.group_ids or list(range(len(request.rows)))
    return request.select(sorted(range(len(ids)), key=lambda row: (ids.count(ids[row]) == 1, ids.index(ids[row]))))


NAMES = (
    "a row of 1",
    "rows of many lengths",
    "a row that is cut",
    "points and blocks missing",
    "groups interleaved",
    "a group with holes",
    "known covariates",
    "covariates known in part",
    "a covariate without a past",
    "large and small values",
    "one spike",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_is_upstreams(chronos_model, run_pass, name):
    request = by_groups(cases(chronos_model)[name])
    expected = reference.layers(chronos_model.pipe, request)
    ours = run_pass(chronos_model, request)
    np.testing.assert_allclose(ours["loc"], expected["loc"], rtol=1e-5, atol=1e-6 * expected["scale"].max().item())
    np.testing.assert_allclose(ours["scale"], expected["scale"], rtol=1e-5)

    begin = ours["row_begin"].long().tolist()
    outputs = expected["head"].shape[1]
    # A token's row, and its column in upstream's padded batch.
    counts = torch.tensor(begin).diff()
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    padding = ours["patches"].long().max() - ours["patches"].long()
    columns = ours["positions"].long() + padding[rows]
    stages = ["embedding", *(f"block {i}" for i in range(len(chronos_model.pipe.model.encoder.block))), "norm"]
    for stage in stages:
        note = (chronos_model.name, name, stage)
        parity.assert_parity("hidden", ours[stage], expected[stage][rows, columns], note)
    parity.assert_parity("hidden", ours["outputs"], expected["norm"][:, -outputs:].flatten(0, 1), "outputs")
    parity.assert_parity("hidden", ours["head"], expected["head"].flatten(0, 1), "head")

    # The features have no token for the register.
    register = chronos_model.pipe.model.chronos_config.use_reg_token
    last = expected["norm"].shape[1] - outputs - 1 if register else -1
    patch = columns != last
    columns = columns[patch] - register * (columns[patch] > last).long()
    parity.assert_parity("patches", ours["features"][patch], expected["features"][rows[patch], columns], name)


def test_no_token_exists_for_a_patch_without_an_observation(chronos_model, run_pass):
    request = cases(chronos_model)["a group with holes"]
    ours = run_pass(chronos_model, request)
    others = chronos_model.pipe.model.chronos_config.use_reg_token + -(-request.horizon // chronos_model.patch)
    begin = ours["row_begin"].long().tolist()
    context, _ = reference.batch_of(chronos_model.pipe, request)
    _, observed, _ = chronos_model.pipe.model._prepare_patched_context(context)
    assert (torch.tensor(begin).diff() - others).tolist() == observed.sum(1).tolist()
    assert not observed.all()
