"""Random models, the reference beside them, and the program that runs the engine's stages alone."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # for `from tests.models import ...`

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other projects' deprecations are not this one's errors
    from tests.models.random_models import Shape, load_pipeline, write_model
from tests.models import parity

# Widths, depths and head counts that differ in what can go wrong.
SHAPES = {
    # 16 numbers a head; the caption narrower than the model
    "small": Shape(seed=1),
    # wider than the 256 of the time embedding; more of everything; one key-value head in the text encoder
    "wide": Shape(
        seed=2,
        transformer={"dim": 288, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 9, "axes_dims": (8, 12, 12)},
        text_encoder={"hidden_size": 64, "num_hidden_layers": 5, "num_key_value_heads": 1, "intermediate_size": 160},
        vae={"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 32},
    ),
    # every switch of the configs that the released models leave alone
    "unusual": Shape(
        seed=3,
        transformer={
            "dim": 96, "n_layers": 1, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3, "axes_dims": (16, 8, 8),
            "axes_lens": (700, 24, 40), "qk_norm": False, "rope_theta": 100.0, "t_scale": 500.0, "norm_eps": 1e-3,
            "in_channels": 8,
        },
        text_encoder={
            "attention_bias": True, "num_hidden_layers": 2, "num_attention_heads": 2, "rms_norm_eps": 1e-4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        vae={
            "latent_channels": 8, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": False,
            "block_out_channels": (8, 16, 24), "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3, "scaling_factor": 0.7, "shift_factor": -0.2,
        },
        scheduler={"use_dynamic_shifting": True},
    ),
}  # fmt: skip


class RandomModel:
    """A checkpoint on disk, the reference that reads it, and the engine's stages on it."""

    def __init__(self, name: str, folder: pathlib.Path, stage_probe: pathlib.Path) -> None:
        self.name, self.folder, self.stage_probe = name, folder, stage_probe
        self.pipe = load_pipeline(folder)

    def run(
        self,
        stages: list[dict],
        inputs: dict[str, torch.Tensor] | None = None,
        precision: str = "float32",
        folder: pathlib.Path | None = None,
    ):
        """The outputs of the stages, by their "out"; see tests/probe/stage_probe.cc."""
        return run_stages(self.stage_probe, folder or self.folder, stages, inputs, precision)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Tiny products gain nothing from a second thread, and on a busy machine threads that wait for each other cost
    tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session", params=SHAPES)
def model(request, random_model) -> RandomModel:
    """Each of the random models in turn."""
    return random_model(request.param)


@pytest.fixture(scope="session")
def random_model(probe, tmp_path_factory):
    """random_model(name): one of SHAPES, drawn once a session."""
    drawn: dict[str, RandomModel] = {}

    def draw(name: str) -> RandomModel:
        if name not in drawn:
            folder = write_model(SHAPES[name], tmp_path_factory.mktemp("models") / name)
            drawn[name] = RandomModel(name, folder, probe("stage_probe"))
        return drawn[name]

    return draw


def pytest_terminal_summary(terminalreporter):
    if parity.worst:
        terminalreporter.write_line("largest differences from the reference:")
        for stage, error in parity.worst.items():
            terminalreporter.write_line(f"  {stage:12} {error:.1e}")
