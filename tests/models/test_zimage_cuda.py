"""Goal: what makes drawing fast on a CUDA device, recorded steps, adapters in fixed buffers, FP8 products, changes no
picture beyond its precision.

Method: bitwise where the arithmetic is the same (a graph and the launches that it recorded, a model before and after
an adapter); beside the CPU's float32 picture where it is not; FP8 beside diffusers with the factors of every such
product rounded to FP8 in the same way: ours may err twice as much.
"""

import contextlib
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

from tests.models import parity
from tests.models.test_zimage_lora import ATTENTION, save_adapter

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PROMPT, SIZE, STEPS, SEED = "a red circle on a blue background", 256, 8, 7
REQUESTS = {
    "plain": {},
    "guided": {"guidance": 2.0},
    "guided, another length": {"guidance": 2.0, "negative_prompt": "green " * 40},
    "bounded guidance": {"guidance": 4.0, "cfg_normalization": 1.0, "cfg_truncation": 0.5},
    "wide": {"width": 320, "height": 208},
}


def draw(model, **options):
    options = {"width": SIZE, "height": SIZE, "steps": STEPS, "seed": SEED} | options
    return model.generate(PROMPT, **options).pixels.astype("int16")


def open_model(folder, device, precision):
    from diffusionz import ZImage

    return ZImage(folder, device=device, precision=precision)


@pytest.fixture(scope="module")
def cuda_bf16(demo_model):
    with open_model(demo_model, "cuda", "bfloat16") as model:
        yield model


@pytest.fixture(scope="module")
def cuda_f32(demo_model):
    with open_model(demo_model, "cuda", "float32") as model:
        yield model


@pytest.fixture(scope="module")
def cpu_f32(demo_model):
    with open_model(demo_model, "cpu", "float32") as model:
        yield model


@pytest.mark.parametrize("name", REQUESTS)
def test_float32_draws_the_cpus_picture(cuda_f32, cpu_f32, name):
    difference = abs(draw(cuda_f32, **REQUESTS[name]) - draw(cpu_f32, **REQUESTS[name]))
    assert difference.max() <= 255 * parity.BOUNDS["pixels"], difference.max()


CHILD = """
import sys, numpy
from tests.models.test_zimage_cuda import REQUESTS, draw, open_model
with open_model(sys.argv[1], "cuda", sys.argv[3]) as model:
    numpy.savez(sys.argv[2], *[draw(model, **options) for options in REQUESTS.values() for _ in range(3)])
"""


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_a_graph_draws_what_its_launches_draw(demo_model, tmp_path, precision):
    drawn = {}
    for disabled in ("", "graphs"):
        file = tmp_path / f"{disabled or 'all'}.npz"
        environment = os.environ | {"DIFFUSIONZ_DISABLE_KERNELS": disabled}
        command = [sys.executable, "-c", CHILD, demo_model, file, precision]
        subprocess.run(command, env=environment, check=True, cwd=parity.__file__.rsplit("/tests/", 1)[0])
        drawn[disabled] = list(numpy.load(file).values())
    for eager, recorded in zip(drawn["graphs"], drawn[""], strict=True):
        assert (eager == recorded).all()


def test_each_call_may_come_from_another_thread(demo_model):
    """Libraries' handles are a thread's: what one thread ran first, another records, and a third replays. Called as a
    program would call the library: the package's own threads are kept between calls."""
    from diffusionz._ffi import ffi, lib
    from diffusionz.zimage import _Requests

    pictures = []

    def call(model) -> None:
        requests = _Requests(2)
        requests.fill(width=SIZE, height=SIZE, num_steps=2, format=lib.DIFFUSIONZ_FORMAT_RGB, seed=SEED)
        for i, prompt in enumerate((PROMPT, f"{PROMPT}, {len(pictures)}")):  # a known prompt would not be encoded
            requests.structs[i].prompt = requests.string("prompt", prompt)
        pictures.append(requests.draw(model._alive(), ffi.NULL)[0][0])

    with open_model(demo_model, "cuda", "bfloat16") as model, contextlib.ExitStack() as threads:
        for _ in range(4):  # all alive to the end: handles of one that has ended would go to the next
            threads.enter_context(ThreadPoolExecutor(1)).submit(call, model).result()
    assert all(picture == pictures[0] for picture in pictures)


def test_graphs_keep_requests_apart(cuda_bf16):
    """Each picture again after all others, whose graphs share memory."""
    first = {name: draw(cuda_bf16, **options) for name, options in REQUESTS.items()}
    for _ in range(2):
        for name, options in REQUESTS.items():
            assert (draw(cuda_bf16, **options) == first[name]).all(), name


def test_previews_are_the_cpus_and_leave_the_picture_as_it_is(cuda_f32, cuda_bf16, cpu_f32):
    """Made by launches, by a graph that is recorded, and by its replays. The last one is still there after the call."""
    expected = []
    draw(cpu_f32, previews=3, on_preview=expected.append)
    for model in (cuda_f32, cuda_bf16):
        plain = draw(model)
        for count in (3, 3, 7, 3):
            seen = []
            assert (draw(model, previews=count, on_preview=seen.append) == plain).all()
            assert seen[-1].step == count * STEPS // (count + 1)
        if model is cuda_f32:
            pictures = (preview[-1].picture.pixels.astype("int16") for preview in (seen, expected))
            assert abs(next(pictures) - next(pictures)).max() <= 255 * parity.BOUNDS["pixels"]


def test_adapters_come_and_go(demo_model, cuda_f32, cpu_f32, tmp_path):
    """Three adapters of two shapes, weights, two at once, and none again."""
    files = [
        save_adapter(demo_model, tmp_path / "all", seed=1),
        save_adapter(demo_model, tmp_path / "another", seed=2),
        save_adapter(demo_model, tmp_path / "attention", seed=3, r=20, lora_alpha=20, target_modules=ATTENTION),
    ]
    plain = draw(cuda_f32)
    for loras in ([(0, 0.2)], [(1, 0.2)], [(1, 0.1)], [(2, 0.2)], [(0, 0.1), (2, 0.1)], [(0, 0.2)]):
        pictures = []
        for model in (cuda_f32, cpu_f32):
            for index, weight in loras:
                model.load_lora(files[index], weight)
            pictures.append(draw(model))
            model.unload_lora()
        assert abs(pictures[0] - pictures[1]).max() <= 255 * parity.BOUNDS["pixels"], loras
        assert (pictures[0] != plain).any(), loras
    assert (draw(cuda_f32) == plain).all()


def quantized(x):
    """x rounded to e4m3 with one scale a row, as float32."""
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    scale = torch.where(scale == 0, 1.0, scale)
    return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale


def test_fp8_errs_as_rounding_its_factors_does(demo_model, cpu_f32):
    from diffusers import ZImagePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = ZImagePipeline.from_pretrained(demo_model, torch_dtype=torch.bfloat16).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    for block in (*pipe.transformer.noise_refiner, *pipe.transformer.layers):
        for name, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear) and "adaLN" not in name:
                linear.weight.data = quantized(linear.weight.data).to(torch.bfloat16)
                linear.register_forward_pre_hook(lambda _, inputs: (quantized(inputs[0]).to(torch.bfloat16),))
    truth = draw(cpu_f32)
    size = {"width": SIZE, "height": SIZE, "num_inference_steps": STEPS}
    generator = torch.Generator("cpu").manual_seed(SEED)
    reference = pipe(PROMPT, **size, guidance_scale=0.0, generator=generator, output_type="np").images[0] * 255
    with open_model(demo_model, "cuda", "fp8") as model:
        ours = draw(model)
    error, reference_error = abs(ours - truth).mean(), abs(reference - truth).mean()
    print(f"fp8: mean error {error:.3f}/255, diffusers with its factors rounded {reference_error:.3f}/255")
    # Half a step of 8-bit rounding is not an error of the precision.
    assert error <= parity.LOW_PRECISION_RATIO * reference_error + 0.5
