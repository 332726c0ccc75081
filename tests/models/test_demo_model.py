"""Goal: the bundled model draws what it is asked, through the engine as it does in diffusers.

Method: the 200 prompts of training/zimage_demo/prompts.json, whose combinations no training picture had, are drawn in
eight steps without guidance and judged by training/zimage_demo/evaluate.py: a small classifier trained apart, and pixel
statistics.
"""

import json
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from tests.models import parity

TRAINING = pathlib.Path(__file__).resolve().parents[2] / "training" / "zimage_demo"
GOALS = {"colour": 95, "shape": 90, "relation": 80}  # percent
SAID = "a green star left of a yellow circle on a dark blue background"


@pytest.fixture(scope="module")
def engine(demo_model):
    from diffusionz import ZImage

    with ZImage(demo_model, device="cpu") as model:
        yield model


def test_it_fits_into_the_package(demo_model):
    sizes = [path.stat().st_size for path in demo_model.rglob("*") if path.is_file()]
    assert sum(sizes) <= 24e6
    assert max(sizes) < 16 * 2**20


def test_diffusers_loads_it_unchanged_and_draws_the_same(demo_model, engine):
    from diffusers import ZImagePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = ZImagePipeline.from_pretrained(demo_model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    size = {"width": 256, "height": 256}
    reference = pipe(SAID, **size, num_inference_steps=8, guidance_scale=0.0, generator=generator).images[0]
    ours = engine.generate(SAID, **size, steps=8, seed=3)
    parity.assert_same_pixels(torch.from_numpy(ours.pixels.copy()), torch.from_numpy(np.array(reference)))


def test_it_draws_prompts_that_it_never_saw(engine, tmp_path):
    for entry in json.loads((TRAINING / "prompts.json").read_text()):
        picture = engine.generate(entry["prompt"], width=256, height=256, steps=8, seed=entry["seed"])
        picture.save(tmp_path / f"{entry['id']}.png")
    classifier = pathlib.Path(engine.path) / "classifier"
    judge = [sys.executable, TRAINING / "evaluate.py", tmp_path, "--wrong", "--classifier", classifier]
    done = subprocess.run(judge, capture_output=True, text=True, check=True)
    right = json.loads(done.stdout.splitlines()[-1])
    print(right)
    assert right["missing"] == 0
    for part, goal in GOALS.items():
        assert right[part] >= goal, done.stdout
