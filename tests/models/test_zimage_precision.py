"""Goal: bfloat16 on the CPU is no worse than the reference's bfloat16.

Method: the truth is the reference in float32. Each stage, and whole pictures, are computed in bfloat16 by both; our
error against the truth may be at most parity.LOW_PRECISION_RATIO times the reference's own. An error is a root mean
square over many values: the largest single one is luck.
"""

import copy

import pytest
import torch

from tests.models import parity, reference
from tests.models.cases import LONG, SHORT, complete
from tests.models.ours import draw
from tests.models.reference import normal, random_picture


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("wide")


@pytest.fixture(scope="module")
def low(model):
    """The reference in bfloat16."""
    parts = {name: part for name, part in model.pipe.components.items() if isinstance(part, torch.nn.Module)}
    pipe = type(model.pipe)(**model.pipe.components | {name: copy.deepcopy(part) for name, part in parts.items()})
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.bfloat16)


def rms(error):
    return error.double().square().mean().sqrt().item()


def assert_no_worse(stage, ours, theirs, truth):
    our_error, their_error = rms(ours - truth), rms(theirs - truth)
    ratio = our_error / their_error
    parity.worst[f"bfloat16 {stage}, ratio"] = max(ratio, parity.worst.get(f"bfloat16 {stage}, ratio", 0.0))
    # A reference that is suspiciously good or bad would make the ratio mean nothing.
    assert 1e-4 < their_error / rms(truth) < 0.5, f"{stage}: the reference's error is {their_error / rms(truth):.1e}"
    assert ratio <= parity.LOW_PRECISION_RATIO, f"{stage}: {our_error:.2e}, the reference {their_error:.2e}"


def test_every_stage_in_bfloat16_errs_at_most_twice_as_much_as_the_reference(model, low):
    latents, caption = normal(2, 16, 10, 14), 2 * normal(40, 64, seed=1)
    picture, noise = random_picture(80, 112), normal(1, 16, 10, 14, seed=2)
    inputs = {"latents": latents, "caption": caption, "picture": picture, "noise": noise}
    stages = [
        {"stage": "features", "prompt": LONG, "out": "features"},
        {"stage": "transformer", "latents": "latents", "features": "caption", "time": 0.3, "out": "transformer"},
        {"stage": "decode", "latents": "latents", "out": "decode"},
        {"stage": "encode", "image": "picture", "noise": "noise", "out": "encode"},
    ]
    ours = model.run(stages, inputs, precision="bfloat16")
    low_latents, low_caption = latents.bfloat16(), caption.bfloat16()
    theirs = {
        "features": reference.features(low, LONG),
        "transformer": reference.transformer(low, low_latents, low_caption, 0.3),
        "decode": reference.decode(low, low_latents),
        "encode": reference.encode(low, picture, noise),
    }
    truth = {
        "features": reference.features(model.pipe, LONG),
        "transformer": reference.transformer(model.pipe, latents, caption, 0.3),
        "decode": reference.decode(model.pipe, latents),
        "encode": reference.encode(model.pipe, picture, noise),
    }
    for stage in truth:
        assert_no_worse(stage, ours[stage], theirs[stage].float(), truth[stage])


REQUESTS = {
    "plain": {"prompt": LONG, "steps": 8},
    "guided": {"prompt": SHORT, "guidance_scale": 2.0, "negative_prompt": LONG, "cfg_normalization": 1.0},
}


def test_pictures_in_bfloat16_err_at_most_twice_as_much_as_the_references(model, low):
    from diffusionz import ZImage

    with ZImage(model.folder, device="cpu", precision="bfloat16") as engine:
        assert engine.precision == "bfloat16"
        for name, request in REQUESTS.items():
            request = complete(request, (80, 112))
            truth, theirs = (reference.pictures(pipe, request)[0].float() for pipe in (model.pipe, low))
            assert_no_worse(f"picture, {name}", draw(engine, request).float(), theirs, truth)
            # The first noise is the same bits in any precision.
            ours = model.run([{"stage": "latents", "request": request, "out": "steps"}], precision="bfloat16")["steps"]
            generator = torch.Generator("cpu").manual_seed(request["seed"])
            assert torch.equal(ours[:1], torch.randn(1, 16, 10, 14, generator=generator))
            truth, theirs = (reference.latents(pipe, request) for pipe in (model.pipe, low))
            assert_no_worse(f"latents, {name}", ours[1:], theirs, truth)
