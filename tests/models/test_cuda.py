"""Goal: on a CUDA device each precision draws the right picture.

Method: the truth is the float32 picture of the CPU, whose parity with diffusers the other tests show. On CUDA ours and
diffusers' pictures in the same precision are compared with it: ours may be off by at most twice what diffusers is.
"""

import warnings

import pytest
import torch

from tests.models import parity

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
