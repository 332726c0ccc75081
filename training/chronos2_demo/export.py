"""Write a checkpoint as a folder that chronos-forecasting opens: config.json and model.safetensors (float16).

    python export.py final.safetensors ../../py/diffusionz/models/chronos2-demo [--widen 1.08] [--check]

--widen moves every quantile away from the median by a factor, in the space of normalised values: a change of the head's
last weights alone. It corrects intervals that are too narrow for series unlike the synthetic ones. --check opens the
folder with chronos-forecasting and compares its quantiles with the training forward's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from model import PATCH, QUANTILES, Config, Net, Weights
from safetensors.torch import load_file, save_file

LIMIT = 16 << 20  # bytes


def widen(weights: Weights, factor: float) -> None:
    """Quantiles q become median + factor (q - median)."""
    middle = QUANTILES.index(0.5)
    for layer in ("output_layer", "residual_layer"):
        for kind in ("weight", "bias"):
            value = weights.p[f"output_patch_embedding.{layer}.{kind}"].detach()
            value = value.view(len(QUANTILES), PATCH, -1)  # the head's outputs are ordered by quantile, then by step
            value.copy_(torch.lerp(value[middle : middle + 1], value, factor))


def export(checkpoint: Path, folder: Path, factor: float = 1.0) -> Path:
    """Returns the weights' file. Raises ValueError for weights that float16 cannot hold, or that are too large."""
    state = load_file(checkpoint)
    layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.block"))
    config = Config(num_layers=layers)
    weights = Weights(config, "cpu")
    weights.load(state)
    widen(weights, factor)
    half = weights.state(dtype=torch.float16)
    for key, value in half.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} has a weight of {float(state[key].abs().max()):.3g}, float16 ends at 65504")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    file = folder / "model.safetensors"
    save_file(dict(sorted(half.items())), file, metadata={"format": "pt"})
    if file.stat().st_size > LIMIT:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, at most {LIMIT} are allowed")
    return file


@torch.no_grad()
def check(folder: Path) -> float:
    """Largest difference of upstream's quantiles from the training forward's on random walks, in deviations of them."""
    from chronos import Chronos2Pipeline
    from tasks import model_input, token_times

    pipeline = Chronos2Pipeline.from_pretrained(folder, device_map="cpu")
    if pipeline.model.dtype != torch.float32:
        raise ValueError(f"chronos-forecasting opened the weights as {pipeline.model.dtype}, expected float32")
    config = Config.from_json(folder)
    weights = Weights(config, "cpu")
    weights.load(load_file(folder / "model.safetensors"))
    torch.manual_seed(1)
    context, patches = 320, 3
    history = torch.randn(6, context).cumsum(1)
    upstream = torch.stack(pipeline.predict([h for h in history], prediction_length=patches * 16))[:, 0]
    time, reg = token_times(context // 16 + 1 + patches, patches, history.device)
    x = torch.zeros(len(history), len(time))
    x[:, :context] = history
    seen = (torch.arange(len(time)) < context).expand_as(x)
    features, attended, _, scale = model_input(x, seen, torch.zeros_like(seen), time, reg, config.context_length)
    groups = torch.zeros(0, 8, dtype=torch.long)
    z = Net(weights, torch.float32)(features, reg, attended, groups, patches)
    loc = history.mean(1)[:, None, None]
    ours = torch.sinh(z.permute(0, 2, 1, 3).reshape(len(x), len(QUANTILES), -1)) * scale[:, None] + loc
    return float(((ours - upstream).abs() / scale[:, None]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--widen", type=float, default=1.0)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    file = export(options.checkpoint, options.folder, options.widen)
    print(f"{file}: {file.stat().st_size} bytes")
    if options.check:
        print(f"chronos-forecasting differs by at most {check(options.folder):.1e} deviations of the series")


if __name__ == "__main__":
    main()
