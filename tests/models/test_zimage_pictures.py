"""Goal: a whole picture is the reference's, within 2/255 at every pixel, whatever is asked for.

Method: the Python package and diffusers draw the same requests from the same files. Another test checks that what was
asked for matters: two pictures that agree because both ignore the prompt would prove nothing.
"""

import pytest
import torch

from tests.models import parity, reference
from tests.models.cases import LONG, PROMPTS, REQUESTS, SHORT, complete
from tests.models.ours import draw
from tests.models.reference import random_picture

# Of a picture, in units of the model's multiple: one token; 35; 32, no padding; tall, 48.
SIZES = [(1, 1), (5, 7), (4, 8), (12, 4)]


def sized(model, height, width):
    return height * model.multiple, width * model.multiple


def differ(a, b):
    return ((a.int() - b.int()).abs() > 8).float().mean().item()


def test_every_request_draws_the_references_picture(model):
    size = sized(model, 5, 7)
    picture = random_picture(*size)
    for name, request in REQUESTS.items():
        request = complete(request, size)
        (expected,) = reference.pictures(model.pipe, request, picture)
        parity.assert_same_pixels(draw(model.engine, request, picture), expected, (model.name, name))


def test_every_size_draws_the_references_picture(model):
    for height, width in SIZES:
        request = complete({"prompt": LONG}, sized(model, height, width))
        (expected,) = reference.pictures(model.pipe, request)
        parity.assert_same_pixels(draw(model.engine, request), expected, (model.name, height, width))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_draws_the_references_picture(random_model, prompt):
    model = random_model("small")
    request = complete({"prompt": PROMPTS[prompt], "guidance_scale": 1.0, "steps": 3}, (48, 64))
    (expected,) = reference.pictures(model.pipe, request)
    parity.assert_same_pixels(draw(model.engine, request), expected, prompt)


def test_what_is_asked_for_matters(random_model):
    model = random_model("small")
    picture = random_picture(48, 64)
    base = {
        "prompt": SHORT, "guidance_scale": 2.0, "negative_prompt": LONG, "image": "picture", "strength": 0.3, "steps": 7
    }  # fmt: skip
    first = draw(model.engine, complete(base, (48, 64)), picture)
    changes = [
        {"prompt": LONG}, {"guidance_scale": 0.0}, {"negative_prompt": SHORT}, {"seed": 8}, {"steps": 5},
        {"strength": 0.9}, {"cfg_normalization": 0.8}, {"cfg_truncation": 0.6},
    ]  # fmt: skip
    for change in changes:
        other = draw(model.engine, complete(base | change, (48, 64)), picture)
        assert differ(first, other) > 0.05, change
    assert differ(first, draw(model.engine, complete(base, (48, 64)), random_picture(48, 64, seed=9))) > 0.05


def test_a_batch_is_its_pictures_and_the_references_batch(random_model):
    """Picture i has the seed `seed + i`; the reference takes a generator for each."""
    model = random_model("wide")
    prompts, seeds = [SHORT, SHORT, LONG, LONG], [40, 41, 42, 43]
    request = complete({"guidance_scale": 1.5, "steps": 3}, (48, 64))
    batch = model.engine.generate_batch([SHORT, LONG], count=2, seed=40, guidance=1.5, steps=3, height=48, width=64)
    expected = reference.pictures(model.pipe, request | {"prompt": list(prompts), "seed": seeds})
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        pixels = torch.from_numpy(batch[i].pixels.copy())
        assert batch[i].seed == seed
        assert torch.equal(pixels, draw(model.engine, request | {"prompt": prompt, "seed": seed})), i
        parity.assert_same_pixels(pixels, expected[i], i)


def test_the_same_request_draws_the_same_bits(random_model):
    model = random_model("wide")
    request = complete({"prompt": LONG, "guidance_scale": 2.0}, (48, 80))
    first = draw(model.engine, request)
    draw(model.engine, complete({"prompt": SHORT}, (16, 16)))  # another size in between
    assert torch.equal(first, draw(model.engine, request))


def test_with_two_threads_it_is_the_references_picture_too(random_model):
    model = random_model("wide")
    request = complete({"prompt": LONG, "steps": 2}, (48, 80))
    (expected,) = reference.pictures(model.pipe, request)
    from diffusionz import ZImage

    with ZImage(model.folder, device="cpu", threads=2) as engine:
        parity.assert_same_pixels(draw(engine, request), expected)
    with ZImage(model.folder, device="cpu", threads=1):
        pass  # the number is the process's
