"""Goal: bfloat16 on the CPU is no worse than upstream's bfloat16.

Method: the truth is upstream in float32. Forecasts are computed in bfloat16 by both; our error against the truth may be
at most parity.LOW_PRECISION_RATIO times upstream's own. Errors are root mean squares, in units of each row's scale.
"""

import numpy as np
import pytest
import torch

from tests.models import chronos_reference as reference
from tests.models import parity
from tests.models.chronos_cases import known, many
from tests.models.chronos_ours import Engine, Request

# Levels far above the variation: where scaling in low precision would be seen.
ROWS = [row + np.float32(1000) for row in many(200, 180, 33, 250, 16, 240)]
REQUESTS = {
    "alone": Request(ROWS, 40),
    "groups": Request(ROWS, 40, group_ids=[0, 0, 1, 1, 0, 2], future=known(6, 40, [1, 3])),
}


@pytest.mark.parametrize("name", ["released", "wide"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_forecasts_in_bfloat16_err_at_most_twice_as_much_as_upstreams(random_chronos, name, request_name):
    model, request = random_chronos(name), REQUESTS[request_name]
    truth, loc = reference.forecast(model.pipe, request)
    theirs, _ = reference.forecast(reference.load_pipeline(model.folder, torch.bfloat16), request)
    engine = Engine(model.folder, precision=Engine.BFLOAT16)
    assert engine.info["precision"] == "bfloat16"
    ours = torch.from_numpy(engine.forecast(request).quantiles)
    spread = (truth - loc[:, None, None]).abs().amax(dim=(1, 2), keepdim=True)

    def rms(values):
        return ((values - truth) / spread).double().square().mean().sqrt().item()

    ratio = rms(ours) / rms(theirs)
    parity.worst["bfloat16 forecast, ratio"] = max(ratio, parity.worst.get("bfloat16 forecast, ratio", 0.0))
    assert 1e-3 < rms(theirs) < 0.5  # a reference that is suspiciously good or bad would make the ratio mean nothing
    assert 0 < ratio <= parity.LOW_PRECISION_RATIO, f"{rms(ours):.2e}, upstream {rms(theirs):.2e}"


def test_scaling_is_float32_in_every_precision(random_chronos):
    """A level of 1000 has 8 bits of a bfloat16 used up: with it the season would be gone."""
    model = random_chronos("wide")
    low = Engine(model.folder, precision=Engine.BFLOAT16)
    full, half = (engine.embed(Request(ROWS, 1)) for engine in (model.engine, low))
    assert np.array_equal(full.loc, half.loc)
    assert np.array_equal(full.scale, half.scale)
