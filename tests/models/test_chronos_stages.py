"""Goal: every stage of a pass computes what upstream computes, so that a failure says where.

Method: chronos_probe gives the engine's patches, embedding, hidden states after each layer, norm and head; hooks give
upstream's. A row's tokens are found again by their positions: upstream pads the batch, the engine leaves missing
patches out. Bounds: parity.BOUNDS.
"""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import chronos_reference as reference
from tests.models import parity
from tests.models.chronos_cases import cases


def plan_of(model, name, request, tensors):
    """The request's first pass in chronos_probe's fields; what it reads goes to `tensors`."""
    length = request.context_length or model.context_length
    ids = request.group_ids or list(range(len(request.rows)))
    rows, futures = ([f"{name}, {part} {i}" for i in range(len(ids))] for part in ("row", "future"))
    tensors |= {key: torch.from_numpy(row[-length:].copy()) for key, row in zip(rows, request.rows, strict=True)}
    if request.future is None:
        futures = [""] * len(ids)
    else:
        tensors |= {key: torch.from_numpy(row.copy()) for key, row in zip(futures, request.future, strict=True)}
    starts = [i for i, group in enumerate(ids) if i == 0 or ids[i - 1] != group]
    groups = [[start, end - start] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    patches = -(-request.horizon // model.patch)
    return {"rows": rows, "futures": futures, "groups": groups, "output_patches": patches, "out": name}


def run_passes(probe, scratch, model, requests):
    """{name: {stage: tensor}} of the engine's first pass over each request, whose rows stand by groups."""
    tensors = {}
    passes = [plan_of(model, name, request, tensors) for name, request in requests.items()]
    files = {part: str(scratch / f"{part[:-1]}.safetensors") for part in ("inputs", "outputs")}
    save_file(tensors, files["inputs"])
    (scratch / "plan.json").write_text(json.dumps({"model": str(model.folder), "passes": passes} | files))
    command = [probe("chronos_probe"), scratch / "plan.json"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = load_file(files["outputs"])
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in outputs.items() if key.startswith(f"{name}.")}
        for name in requests
    }


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


@pytest.fixture(scope="module")
def passes(chronos_model, probe, tmp_path_factory):
    """{name: (the request, our stages)}."""
    every = cases(chronos_model)
    requests = {name: by_groups(every[name]) for name in NAMES}
    ours = run_passes(probe, tmp_path_factory.mktemp("passes"), chronos_model, requests)
    return {name: (request, ours[name]) for name, request in requests.items()}


def test_every_stage_is_upstreams(chronos_model, passes):
    register = chronos_model.pipe.model.chronos_config.use_reg_token
    for name, (request, ours) in passes.items():
        expected = reference.layers(chronos_model.pipe, request)

        def compare(stage, one, other, bound="hidden", name=name):
            parity.assert_parity(bound, one, other, (chronos_model.name, name, stage))

        np.testing.assert_allclose(ours["loc"], expected["loc"], rtol=1e-5, atol=1e-6 * expected["scale"].max().item())
        np.testing.assert_allclose(ours["scale"], expected["scale"], rtol=1e-5)

        # A token's row, and its column in upstream's padded batch.
        counts = ours["row_begin"].long().diff()
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        padding = ours["patches"].long().max() - ours["patches"].long()
        columns = ours["positions"].long() + padding[rows]
        blocks = [f"block {i}" for i in range(len(chronos_model.pipe.model.encoder.block))]
        for stage in ("embedding", *blocks, "norm"):
            compare(stage, ours[stage], expected[stage][rows, columns])
        outputs = expected["head"].shape[1]
        compare("outputs", ours["outputs"], expected["norm"][:, -outputs:].flatten(0, 1))
        compare("head", ours["head"], expected["head"].flatten(0, 1))

        # The features have no token for the register.
        last = expected["norm"].shape[1] - outputs - 1 if register else -1
        patch = columns != last
        columns = columns[patch] - register * (columns[patch] > last).long()
        compare("features", ours["features"][patch], expected["features"][rows[patch], columns], "patches")


def test_no_token_exists_for_a_patch_without_an_observation(chronos_model, passes):
    request, ours = passes["a group with holes"]
    others = chronos_model.pipe.model.chronos_config.use_reg_token + -(-request.horizon // chronos_model.patch)
    context, _ = reference.batch_of(chronos_model.pipe, request)
    _, observed, _ = chronos_model.pipe.model._prepare_patched_context(context)
    assert (ours["row_begin"].long().diff() - others).tolist() == observed.sum(1).tolist()
    assert not observed.all()
