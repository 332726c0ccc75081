"""Goal: on a CUDA device memory is a budget: it is told, it can be bounded, and running out of it is an error.

Method: the bundled model under limits that its weights and a picture's work exceed. A limit holds for a whole process,
so each runs in one of its own.
"""

import json
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PICTURE = {"width": 256, "height": 256, "steps": 4, "seed": 7}


def run(program: str, *arguments: str) -> dict:
    """What a program prints as JSON in its last line."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


DRAW = """
import hashlib, json, sys
from diffusionz import ZImage
model = ZImage(sys.argv[1], device="cuda", **json.loads(sys.argv[2]))
picture = json.loads(sys.argv[3])
def draw(prompt, **more):
    return hashlib.sha256(model.generate(prompt, **picture, **more).pixels).hexdigest()
drawn = [draw("a red circle"), draw("a green square"), draw("a red circle"), draw("a red circle", guidance=2.0)]
image = model.generate("a red circle", **picture)
drawn.append(draw("a blue circle", init_image=image))
print(json.dumps({"drawn": drawn, "memory": model.memory}))
"""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_under_a_limit_the_pictures_are_the_same(demo_model, precision):
    free = run(DRAW, str(demo_model), json.dumps({"precision": precision, "cuda_graphs": False}), json.dumps(PICTURE))
    limited = {"precision": precision, "max_vram": "1.5GiB"}
    bound = run(DRAW, str(demo_model), json.dumps(limited), json.dumps(PICTURE))
    assert bound["drawn"] == free["drawn"]
    # The text encoder and the VAE are not among the weights that stay.
    assert bound["memory"]["weights_bytes"] < free["memory"]["weights_bytes"]
    assert bound["memory"]["device_held_bytes"] <= 1.5 * 2**30


def test_a_model_that_cannot_be_had_in_so_little_says_what_it_needs(demo_model):
    program = """
import json, sys, diffusionz
try:
    diffusionz.ZImage(sys.argv[1], device="cuda", max_vram="100MB")
except diffusionz.OutOfMemoryError as error:
    print(json.dumps(str(error)))
"""
    message = run(program, str(demo_model))
    assert "max_vram_bytes is 100000000" in message
    assert "MiB at least" in message


def test_out_of_memory_is_an_error_and_the_model_goes_on(demo_model):
    program = """
import hashlib, json, sys, diffusionz
model = diffusionz.ZImage(sys.argv[1], device="cuda", max_vram="512MiB")
picture = json.loads(sys.argv[2])
def draw():
    return hashlib.sha256(model.generate("a red circle", **picture).pixels).hexdigest()
before, messages = draw(), []
for _ in range(3):
    try:
        model.generate("x", width=2048, height=2048, steps=1)
    except diffusionz.OutOfMemoryError as error:
        messages.append(str(error))
held = model.memory["device_held_bytes"]
print(json.dumps({"before": before, "after": draw(), "messages": messages, "held": held}))
"""
    result = run(program, str(demo_model), json.dumps(PICTURE))
    assert len(result["messages"]) == 3
    for message in result["messages"]:
        assert "out of memory" in message and "wanted" in message and "free" in message and "max_vram_bytes" in message
    assert result["after"] == result["before"]
    assert result["held"] < 400 * 2**20  # what the failed call worked in was given back


def test_memory_counts_what_is_on_the_device(demo_model):
    from diffusionz import ZImage

    with ZImage(demo_model, device="cuda") as model:
        memory = model.memory
        assert 0 < memory["weights_bytes"] <= memory["device_bytes"] <= memory["device_held_bytes"]
        assert memory["device_bytes"] <= memory["device_peak_bytes"]
        model.generate("a red circle", **PICTURE)
        assert model.memory["device_peak_bytes"] >= memory["device_peak_bytes"]


def test_two_engines_of_one_device_draw_what_one_draws(demo_model):
    from diffusionz import ZImage

    prompts = ["a red circle", "a green square", "a blue circle"]
    with ZImage(demo_model, device="cuda") as one, ZImage(demo_model, device=["cuda:0", "cuda:0"]) as two:
        assert two.device == "cuda:0,cuda:0"
        alone = one.generate_batch(prompts, count=2, **PICTURE)
        spread = two.generate_batch(prompts, count=2, **PICTURE)
    for a, b in zip(alone, spread, strict=True):
        assert (a.pixels == b.pixels).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_devices_draw_what_one_draws(demo_model):
    from diffusionz import ZImage

    with ZImage(demo_model, device="cuda:0") as one, ZImage(demo_model, device="cuda:0,cuda:1") as two:
        alone = one.generate_batch("a red circle", count=6, **PICTURE)
        spread = two.generate_batch("a red circle", count=6, **PICTURE)
    for a, b in zip(alone, spread, strict=True):
        assert (a.pixels == b.pixels).all()


def test_fp8_wants_a_device_that_has_it(demo_model):
    import diffusionz

    major, minor = torch.cuda.get_device_capability()
    if (major, minor) >= (8, 9):
        with diffusionz.ZImage(demo_model, device="cuda", precision="fp8") as model:
            assert model.precision == "fp8"
            assert model.generate("a red circle", **PICTURE).pixels.std() > 1
    else:
        with pytest.raises(diffusionz.DeviceError, match=f"FP8.*8.9.*{major}.{minor}"):
            diffusionz.ZImage(demo_model, device="cuda", precision="fp8")
