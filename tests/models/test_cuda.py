"""Goal: on a CUDA device each precision draws the right picture, and makes the right forecast.

Method: the truth is the float32 picture of the CPU, whose parity with diffusers the other tests show. On CUDA ours and
diffusers' pictures in the same precision are compared with it: ours may be off by at most twice what diffusers is.
Forecasts are compared with the CPU's: in float32 as the CPU's are with upstream's, in bfloat16 by the CPU's own error.
"""

import warnings

import numpy
import pytest
import torch

from tests.models import parity
from tests.models.chronos_cases import cases, many
from tests.models.chronos_ours import Engine, Request

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PROMPT, SIZE, STEPS, SEED = "a red circle on a blue background", 256, 8, 7


def picture(demo_model, device, precision):
    from diffusionz import ZImage

    with ZImage(demo_model, device=device, precision=precision) as model:
        assert model.info["device"].startswith(device)
        return torch.from_numpy(model.generate(PROMPT, width=SIZE, height=SIZE, steps=STEPS, seed=SEED).pixels)


@pytest.fixture(scope="module")
def truth(demo_model):
    return picture(demo_model, "cpu", "float32")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_picture_is_as_near_to_float32_as_the_reference_is(demo_model, truth, precision):
    from diffusers import ZImagePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = ZImagePipeline.from_pretrained(demo_model, torch_dtype=getattr(torch, precision)).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    size = {"width": SIZE, "height": SIZE}
    drawn = pipe(PROMPT, **size, num_inference_steps=STEPS, guidance_scale=0.0, generator=generator, output_type="np")
    reference = drawn.images[0]
    reference_error = (torch.from_numpy(reference) * 255 - truth).abs().mean().item()
    error = (picture(demo_model, "cuda", precision).float() - truth).abs().mean().item()
    device = torch.cuda.get_device_name()
    print(f"{precision} on {device}: mean error {error:.3f}/255, the reference's {reference_error:.3f}/255")
    # Half a step of 8-bit rounding is not an error of the precision.
    assert error <= parity.LOW_PRECISION_RATIO * reference_error + 0.5


def test_calls_on_cuda_repeat_bit_for_bit(demo_model):
    first, second = (picture(demo_model, "cuda", "bfloat16") for _ in range(2))
    assert torch.equal(first, second)


def test_a_device_that_is_not_there_is_refused(demo_model):
    import diffusionz

    with pytest.raises(diffusionz.DeviceError, match="device_id is 99"):
        diffusionz.ZImage(demo_model, device="cuda:99")


# --- Forecasts ------------------------------------------------------------------------------------------------------


def errors(ours, truth):
    """[targets, levels, horizon] in units of each target's spread of forecasts, beyond the last place of float32: a
    row of one value has a spread of some hundred such places."""
    spread = truth.max(axis=(1, 2), keepdims=True) - truth.min(axis=(1, 2), keepdims=True)
    difference = abs(ours.astype("float64") - truth) - numpy.spacing(abs(truth))
    return difference.clip(0) / spread.clip(1e-30)


def test_forecasts_on_cuda_are_the_cpus(chronos_model):
    cuda = Engine(chronos_model.folder, device_id=0, precision=Engine.FLOAT32)
    assert cuda.info["device"].startswith("cuda")
    for name, request in cases(chronos_model).items():
        truth = chronos_model.engine.forecast(request).quantiles
        error = abs(errors(cuda.forecast(request).quantiles, truth)).max()
        parity.worst["forecast, CUDA"] = max(error, parity.worst.get("forecast, CUDA", 0.0))
        assert error <= parity.BOUNDS["forecast"], (chronos_model.name, name, error)


@pytest.mark.parametrize("name", ["released", "wide"])
def test_forecasts_in_bfloat16_on_cuda_err_as_on_the_cpu(random_chronos, name):
    model = random_chronos(name)
    request = Request(many(200, 180, 33, 250, 16, 240), 40, group_ids=[0, 0, 1, 1, 0, 2])
    truth = model.engine.forecast(request).quantiles

    def rms(device):
        ours = Engine(model.folder, device_id=device, precision=Engine.BFLOAT16).forecast(request).quantiles
        return (errors(ours, truth) ** 2).mean() ** 0.5

    cpu, cuda = rms(-1), rms(0)
    assert 1e-4 < cuda <= parity.LOW_PRECISION_RATIO * cpu


def test_forecasts_on_cuda_repeat_bit_for_bit(random_chronos):
    model = random_chronos("released")
    cuda = Engine(model.folder, device_id=0)
    for name, request in cases(model).items():
        first, second = (cuda.forecast(request).quantiles for _ in range(2))
        assert (first == second).all(), name


def test_chunks_on_cuda_change_rounding_alone(random_chronos):
    model = random_chronos("released")
    request = Request(many(*range(1, 300, 3)), 40, group_ids=[i // 3 for i in range(100)])
    options = {"device_id": 0, "precision": Engine.FLOAT32}
    large = Engine(model.folder, **options).forecast(request).quantiles
    small = Engine(model.folder, working_memory_bytes=1 << 20, **options).forecast(request).quantiles
    assert abs(errors(small, large)).max() <= parity.BOUNDS["forecast"]


def test_embeddings_on_cuda_are_the_cpus(random_chronos):
    model = random_chronos("released")
    request = cases(model)["a group with holes"]
    truth = model.engine.embed(request)
    ours = Engine(model.folder, device_id=0, precision=Engine.FLOAT32).embed(request)
    for one, other in zip(ours.tokens, truth.tokens, strict=True):
        assert (torch.from_numpy(one).isnan() == torch.from_numpy(other).isnan()).all()
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), atol=1e-4, rtol=1e-4, equal_nan=True)
