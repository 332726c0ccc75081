"""Draws random Chronos-2 checkpoints in upstream's format: small models of real structure, for tests and benchmarks.

Upstream's initialization scales every weight by 0.05, norms included: its random models are all but linear, and their
attention uniform. These are drawn anew, so that every weight and every path shows in the forecasts. Upstream itself is
not needed to write one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib

import torch
from huggingface_hub import save_torch_state_dict

from tests.models.chronos_ours import Engine

NATIVE_LEVELS = [0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99]  # amazon/chronos-2's


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes: `core` goes to config.json, `forecasting` to its chronos_config; None leaves a key out."""

    seed: int
    core: dict = dataclasses.field(default_factory=dict)
    forecasting: dict = dataclasses.field(default_factory=dict)


# Widths, depths and switches that differ in what can go wrong.
SHAPES = {
    # amazon/chronos-2's chronos_config, and its proportions
    "released": Shape(seed=1),
    # wider and deeper; the time encoding's scale is the context length; a horizon that unrolls early
    "wide": Shape(
        seed=2,
        core={"d_model": 192, "d_kv": 64, "num_heads": 3, "num_layers": 4, "d_ff": 384},
        forecasting={
            "context_length": 256, "max_output_patches": 4, "time_encoding_scale": None,
            "quantiles": [round(0.1 * i, 1) for i in range(1, 10)],
        },
    ),
    # every switch that the released models leave alone; heads that do not add up to the width; the context length is no
    # multiple of the patch; no level of the unrolling is the model's
    "unusual": Shape(
        seed=3,
        core={
            "d_model": 32, "d_kv": 16, "num_heads": 3, "num_layers": 3, "d_ff": 80, "rope_theta": 300.0,
            "layer_norm_epsilon": 1e-3,
        },
        forecasting={
            "context_length": 100, "input_patch_size": 8, "input_patch_stride": 8, "output_patch_size": 8,
            "max_output_patches": 5, "time_encoding_scale": 64, "use_reg_token": False, "use_arcsinh": False,
            "quantiles": [0.02, 0.15, 0.25, 0.5, 0.55, 0.97],
        },
    ),
    # the least of everything; one level
    "least": Shape(
        seed=4,
        core={"d_model": 16, "d_kv": 2, "num_heads": 1, "num_layers": 1, "d_ff": 4},
        forecasting={"context_length": 64, "max_output_patches": 1, "quantiles": [0.5]},
    ),
}  # fmt: skip


def configs(shape: Shape) -> dict:
    """config.json."""
    core = {
        "d_model": 64, "d_kv": 32, "num_heads": 2, "num_layers": 2, "d_ff": 128, "dropout_rate": 0.1,
        "feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6, "rope_theta": 10000.0,
    } | shape.core  # fmt: skip
    forecasting = {
        "context_length": 8192, "input_patch_size": 16, "input_patch_stride": 16, "output_patch_size": 16,
        "max_output_patches": 64, "time_encoding_scale": 8192, "use_reg_token": True, "use_arcsinh": True,
        "quantiles": NATIVE_LEVELS,
    } | shape.forecasting  # fmt: skip
    present = {key: value for key, value in forecasting.items() if value is not None}
    of_transformers = {
        "architectures": ["Chronos2Model"], "chronos_pipeline_class": "Chronos2Pipeline", "model_type": "t5",
        "torch_dtype": "float32", "dense_act_fn": "relu", "is_gated_act": False, "pad_token_id": 0,
        "vocab_size": 2 if present["use_reg_token"] else 1,
    }  # fmt: skip
    return core | {"chronos_config": present} | of_transformers


def draw_weights(shape: Shape) -> dict[str, torch.Tensor]:
    """Products keep a normal input's scale, norms and biases are off their neutral values, attention has its peaks."""
    config = configs(shape)
    forecasting = config["chronos_config"]
    width, inner, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    generator = torch.Generator().manual_seed(shape.seed)
    weights: dict[str, torch.Tensor] = {}

    def product(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * gain / math.sqrt(columns)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)

    def residual_block(name: str, inputs: int, outputs: int) -> None:
        for layer, rows, columns in (
            ("hidden_layer", hidden, inputs), ("output_layer", outputs, hidden), ("residual_layer", outputs, inputs)
        ):  # fmt: skip
            product(f"{name}.{layer}", rows, columns)
            weights[f"{name}.{layer}.bias"] = 0.2 * torch.randn(rows, generator=generator)

    weights["shared.weight"] = torch.randn(config["vocab_size"], width, generator=generator)
    residual_block("input_patch_embedding", 3 * forecasting["input_patch_size"], width)
    for block in range(config["num_layers"]):
        for i in range(2):
            layer = f"encoder.block.{block}.layer.{i}"
            norm(f"{layer}.layer_norm")
            # The scores are not divided by anything: here they get a deviation of 2.
            product(f"{layer}.self_attention.q", inner, width, gain=2 / math.sqrt(config["d_kv"]))
            product(f"{layer}.self_attention.k", inner, width)
            product(f"{layer}.self_attention.v", inner, width)
            product(f"{layer}.self_attention.o", width, inner)
        norm(f"encoder.block.{block}.layer.2.layer_norm")
        product(f"encoder.block.{block}.layer.2.mlp.wi", hidden, width)
        product(f"encoder.block.{block}.layer.2.mlp.wo", width, hidden)
    norm("encoder.final_layer_norm")
    residual_block("output_patch_embedding", width, len(forecasting["quantiles"]) * forecasting["output_patch_size"])
    return weights


def write_model(
    shape: Shape, folder: pathlib.Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
) -> pathlib.Path:
    weights = {name: tensor.to(dtype) for name, tensor in draw_weights(shape).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(configs(shape), indent=2))
    return folder


class RandomChronos:
    """A checkpoint on disk, the reference that reads it, and the engine on it."""

    def __init__(self, name: str, folder: pathlib.Path) -> None:
        self.name, self.folder = name, folder
        config = json.loads((folder / "config.json").read_text())["chronos_config"]
        self.patch: int = config["input_patch_size"]  # steps
        self.context_length: int = config["context_length"]  # steps
        self.horizon: int = config["max_output_patches"] * self.patch  # steps of one pass

    @functools.cached_property
    def pipe(self):
        from tests.models import chronos_reference as reference

        return reference.load_pipeline(self.folder)

    @functools.cached_property
    def engine(self) -> Engine:
        return Engine(self.folder)
