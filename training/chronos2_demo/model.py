"""The training forward of Chronos-2: upstream's weights and arithmetic, written for whole batches with few kernels.

Upstream attends over a masked batch x batch matrix in its group attention; here the rows of a batch are `U` series that
stand alone (for which group attention is o(v(x))) followed by `G` blocks of eight rows, and group attention is eight by
eight. All parameters live in one flat buffer, so that the optimizer, the average and the exchange of gradients each
touch one tensor. `tests/models/test_chronos_training.py` compares this forward with `chronos-forecasting`.

Matrix products run in `compute` (bfloat16 in training); residual stream, norms, softmax, embedding and head in float32.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUANTILES = [0.01, *(round(0.05 * k, 2) for k in range(1, 20)), 0.99]
PATCH = 16
BLOCK = 8  # rows of a block of the batch within which groups are formed


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model; names as in upstream's config.json."""

    d_model: int = 256
    d_kv: int = 64
    num_heads: int = 4
    d_ff: int = 1024
    num_layers: int = 6
    context_length: int = 1024  # values; also the time encoding's scale
    max_output_patches: int = 8
    rope_theta: float = 10000.0
    epsilon: float = 1e-6

    def to_json(self) -> dict[str, Any]:
        """Upstream's config.json."""
        return {
            "architectures": ["Chronos2Model"],
            "chronos_pipeline_class": "Chronos2Pipeline",
            "model_type": "t5",
            "d_model": self.d_model,
            "d_kv": self.d_kv,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "d_ff": self.d_ff,
            "feed_forward_proj": "relu",
            "dense_act_fn": "relu",
            "is_gated_act": False,
            "dropout_rate": 0.1,
            "layer_norm_epsilon": self.epsilon,
            "rope_theta": self.rope_theta,
            "initializer_factor": 0.05,
            "vocab_size": 2,
            "pad_token_id": 0,
            "reg_token_id": 1,
            "torch_dtype": "float32",
            "chronos_config": {
                "context_length": self.context_length,
                "input_patch_size": PATCH,
                "input_patch_stride": PATCH,
                "output_patch_size": PATCH,
                "max_output_patches": self.max_output_patches,
                "quantiles": QUANTILES,
                "time_encoding_scale": self.context_length,
                "use_arcsinh": True,
                "use_reg_token": True,
            },
        }

    @staticmethod
    def from_json(folder: Path) -> Config:
        read = json.loads((folder / "config.json").read_text())
        names = ("d_model", "d_kv", "num_heads", "d_ff", "num_layers", "rope_theta")
        chronos = {k: read["chronos_config"][k] for k in ("context_length", "max_output_patches")}
        return Config(**{k: read[k] for k in names}, **chronos, epsilon=read["layer_norm_epsilon"])


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Upstream's keys with their shapes. Attention first, then wi, then wo: each kind is contiguous in the buffer."""
    inner, d = c.num_heads * c.d_kv, c.d_model
    out: dict[str, tuple[int, ...]] = {}
    block = "encoder.block.{}.layer.{}."
    for i in range(c.num_layers):
        for sub in (0, 1):
            for name in "qkvo":
                key = block.format(i, sub) + f"self_attention.{name}.weight"
                out[key] = (d, inner) if name == "o" else (inner, d)
    for i in range(c.num_layers):
        out[block.format(i, 2) + "mlp.wi.weight"] = (c.d_ff, d)
    for i in range(c.num_layers):
        out[block.format(i, 2) + "mlp.wo.weight"] = (d, c.d_ff)
    for name, inputs, outputs in (
        ("input_patch_embedding", 3 * PATCH, d),
        ("output_patch_embedding", d, PATCH * len(QUANTILES)),
    ):
        for layer, rows, columns in (
            ("hidden_layer", c.d_ff, inputs),
            ("output_layer", outputs, c.d_ff),
            ("residual_layer", outputs, inputs),
        ):
            out[f"{name}.{layer}.weight"] = (rows, columns)
            out[f"{name}.{layer}.bias"] = (rows,)
    out["shared.weight"] = (2, d)
    for i in range(c.num_layers):
        for sub in (0, 1, 2):
            out[block.format(i, sub) + "layer_norm.weight"] = (d,)
    out["encoder.final_layer_norm.weight"] = (d,)
    return out


class Weights:
    """All parameters in one flat float32 buffer, their gradients in another; `p[key]` are views by upstream's keys."""

    def __init__(self, config: Config, device: torch.device | str):
        self.config, self.shapes = config, shapes(config)
        size = sum(torch.Size(s).numel() for s in self.shapes.values())
        self.flat = torch.zeros(size, device=device)
        self.gradient = torch.zeros(size, device=device)
        self.p: dict[str, Tensor] = {}
        for key, view, gradient in zip(self.shapes, self.views(self.flat), self.views(self.gradient), strict=True):
            self.p[key] = view.detach().requires_grad_()
            self.p[key].grad = gradient

    def views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([torch.Size(s).numel() for s in self.shapes.values()])
        return [part.view(s) for part, s in zip(parts, self.shapes.values(), strict=True)]

    @torch.no_grad()
    def initialise(self) -> None:
        """Unit norms; fan-in normal matrices; q smaller by sqrt(d_kv), since the attention is unscaled; residual
        outputs smaller with depth. (Upstream's own factor of 0.05 leaves a model that is nearly zero.)"""
        c = self.config
        for key, value in self.p.items():
            if "layer_norm" in key:
                value.fill_(1.0)
            elif key.endswith("bias"):
                value.zero_()
            elif key == "shared.weight":
                value.normal_()
            else:
                std = value.shape[1] ** -0.5
                if key.endswith("q.weight"):
                    std *= c.d_kv**-0.5
                if key.endswith(("o.weight", "wo.weight")):
                    std *= (3 * c.num_layers) ** -0.5
                if key == "output_patch_embedding.output_layer.weight":
                    std *= 0.1
                value.normal_(0.0, std)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        if set(state) != set(self.p):
            raise ValueError(f"the checkpoint's keys differ: {sorted(set(state) ^ set(self.p))[:4]} ...")
        for key, value in self.p.items():
            value.copy_(state[key])

    def state(self, flat: Tensor | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """A copy of the parameters (or of another flat buffer of theirs, such as an average) on the CPU."""
        source = self.flat if flat is None else flat
        return {
            key: view.detach().to("cpu", dtype, copy=True).contiguous()
            for key, view in zip(self.shapes, self.views(source), strict=True)
        }


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))


def rope_tables(c: Config, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    frequency = c.rope_theta ** (-torch.arange(0, c.d_kv, 2, device=device, dtype=torch.float32) / c.d_kv)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def encoder_block(
    x: Tensor,
    w: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    time_bias: Tensor,
    group_bias: Tensor,
    alone: int,
    heads: int,
    epsilon: float,
    compute: torch.dtype,
) -> Tensor:
    """One encoder block on x [rows, S, d]; the first `alone` rows are their own groups.

    time_bias [rows, 1, 1, S] and group_bias [G, S, 1, 8, 8] are added to the scores (0 or a large negative number).
    """
    rows, length, _ = x.shape
    ln0, q0, k0, v0, o0, ln1, q1, k1, v1, o1, ln2, wi, wo = w
    y = norm(x, ln0, epsilon).to(compute)
    q, k, v = F.linear(y, torch.cat((q0, k0, v0)).to(compute)).view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    bias = time_bias.to(compute).expand(rows, heads, length, length)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    x = x + F.linear(y.transpose(1, 2).reshape(rows, length, -1), o0.to(compute)).float()

    y = norm(x, ln1, epsilon).to(compute)
    v = F.linear(y, v1.to(compute))
    if rows > alone:
        qk = F.linear(y[alone:], torch.cat((q1, k1)).to(compute)).view(
            -1, BLOCK, length, 2, heads, q1.shape[0] // heads
        )
        q, k = qk.permute(3, 0, 2, 4, 1, 5)  # [G, S, heads, 8, d_kv] each
        vg = v[alone:].view(-1, BLOCK, length, heads, q1.shape[0] // heads).permute(0, 2, 3, 1, 4)
        share = ((q @ k.transpose(-1, -2)).float() + group_bias).softmax(-1).to(compute)
        mixed = (share @ vg).permute(0, 3, 1, 2, 4).reshape(rows - alone, length, -1)
        v = torch.cat((v[:alone], mixed))
    x = x + F.linear(v, o1.to(compute)).float()

    y = norm(x, ln2, epsilon).to(compute)
    return x + F.linear(F.linear(y, wi.to(compute)).relu(), wo.to(compute)).float()


def residual_block(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    def linear(layer: str, y: Tensor) -> Tensor:
        return F.linear(y, p[f"{name}.{layer}.weight"], p[f"{name}.{layer}.bias"])

    return linear("output_layer", linear("hidden_layer", x).relu()) + linear("residual_layer", x)


class Net:
    """The forward pass over `Weights`. `block` may be a compiled `encoder_block`."""

    def __init__(self, weights: Weights, compute: torch.dtype = torch.bfloat16, block: Any = encoder_block):
        self.weights, self.c, self.compute, self.block = weights, weights.config, compute, block
        self.layers = []
        for i in range(self.c.num_layers):
            at = f"encoder.block.{i}.layer."
            keys = []
            for sub in (0, 1):
                keys.append(f"{at}{sub}.layer_norm.weight")
                keys += [f"{at}{sub}.self_attention.{name}.weight" for name in "qkvo"]
            keys += [f"{at}2.layer_norm.weight", f"{at}2.mlp.wi.weight", f"{at}2.mlp.wo.weight"]
            self.layers.append([weights.p[k] for k in keys])
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, features: Tensor, reg: Tensor, attended: Tensor, groups: Tensor, heads_at: int = 8) -> Tensor:
        """Quantiles of the arcsinh-normalised series at the last `heads_at` tokens: [rows, heads_at, 21, 16].

        features [rows, S, 48] (time, values, mask); reg [S] bool, where the REG token stands; attended [rows, S] bool;
        groups [G, 8] int, the group of each of the last 8 G rows (equal numbers within a block attend to one another).
        """
        p, c = self.weights.p, self.c
        rows, length = attended.shape
        if length not in self.tables:
            self.tables[length] = rope_tables(c, length, features.device)
        cos, sin = self.tables[length]
        alone = rows - groups.numel()
        lowest = -3e4  # far below any score, and within float16's and bfloat16's range
        time_bias = (~attended)[:, None, None, :] * lowest
        allowed = (groups[:, :, None] == groups[:, None, :])[:, None] & attended[alone:].view(
            -1, BLOCK, length
        ).transpose(1, 2)[:, :, None, :]
        group_bias = (~allowed)[:, :, None] * lowest
        x = residual_block(features, p, "input_patch_embedding")
        x = torch.where(reg[:, None], p["shared.weight"][1], x)
        for w in self.layers:
            x = self.block(x, w, cos, sin, time_bias, group_bias, alone, c.num_heads, c.epsilon, self.compute)
        x = norm(x[:, -heads_at:], p["encoder.final_layer_norm.weight"], c.epsilon)
        return residual_block(x, p, "output_patch_embedding").view(rows, heads_at, len(QUANTILES), PATCH)


def quantile_loss(predicted: Tensor, target: Tensor, weight: Tensor, levels: Tensor) -> Tensor:
    """Upstream's loss, 2 |(y - p)(1[y <= p] - q)|, weighted per value and averaged over quantiles.

    predicted [rows, M, 21, 16], target and weight [rows, M, 16], levels [21]; returns the weighted sum over all values.
    """
    y = target[:, :, None]
    loss = 2 * ((y - predicted) * ((y <= predicted).float() - levels[:, None])).abs()
    return (loss.mean(2) * weight).sum()
