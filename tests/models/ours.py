"""The engine's side: its stages alone through stage_probe, and whole pictures through the Python package."""

import functools
import json
import os
import pathlib
import subprocess
import tempfile

import torch
from safetensors.torch import load_file, save_file

from tests.models.random_models import load_pipeline


def run_stages(probe, folder, stages, inputs=None, precision="float32"):
    with tempfile.TemporaryDirectory() as scratch:
        plan = {"model": str(folder), "precision": precision, "stages": stages, "outputs": f"{scratch}/out.safetensors"}
        if inputs:
            plan["inputs"] = f"{scratch}/in.safetensors"
            save_file({name: tensor.float().contiguous() for name, tensor in inputs.items()}, plan["inputs"])
        pathlib.Path(scratch, "plan.json").write_text(json.dumps(plan))
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [str(probe), f"{scratch}/plan.json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return load_file(plan["outputs"])


class RandomModel:
    """A checkpoint on disk, the reference that reads it, and the engine on it, whole and by its stages."""

    def __init__(self, name: str, folder: pathlib.Path, stage_probe: pathlib.Path) -> None:
        self.name, self.folder, self.stage_probe = name, folder, stage_probe
        self.pipe = load_pipeline(folder)
        self.multiple = self.pipe.vae_scale_factor * 2  # of a picture's sides

    @functools.cached_property
    def engine(self):
        from diffusionz import ZImage

        return ZImage(self.folder, device="cpu")

    def run(self, stages, inputs=None, precision="float32", folder=None):
        """The outputs of the stages, by their "out"; see tests/probe/stage_probe.cc."""
        return run_stages(self.stage_probe, folder or self.folder, stages, inputs, precision)


def draw(engine, request, picture=None):
    """The engine's picture of a request with stage_probe's fields: uint8 [height, width, 3]."""
    names = {"steps", "width", "height", "seed", "negative_prompt", "strength", "cfg_normalization", "cfg_truncation"}
    options = {name: request[name] for name in names & request.keys()}
    if "image" in request:
        options["init_image"] = picture.byte().numpy()
    image = engine.generate(request["prompt"], guidance=request.get("guidance_scale", 0.0), **options)
    return torch.from_numpy(image.pixels.copy())
