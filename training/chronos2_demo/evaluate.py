"""Forecasts of real windows by the training forward, scored as tests/bench/forecast_quality.py does.

python -m tests.bench.forecast_quality export dev.npz --split dev    (from the repository's root)
python evaluate.py dev.npz a.safetensors b.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from model import PATCH, QUANTILES, Config, Net, Weights
from safetensors.torch import load_file
from tasks import MAX_PATCHES, model_input, token_times

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.bench import forecast_metrics
from tests.bench.forecast_metrics import LEVELS, Window


@torch.no_grad()
def forecast(net: Net, windows: Sequence[Window], batch: int = 256) -> list[np.ndarray]:
    """Quantiles [levels, horizon] at LEVELS of each window's history, every series alone. Horizons up to 128."""
    device, longest = net.weights.flat.device, net.c.context_length
    at = [QUANTILES.index(level) for level in LEVELS]
    out: list[np.ndarray] = [np.zeros(0)] * len(windows)
    order = sorted(range(len(windows)), key=lambda i: (-(-len(windows[i].future) // PATCH), len(windows[i].history)))
    while order:
        patches = -(-len(windows[order[0]].future) // PATCH)
        if patches > MAX_PATCHES:
            raise ValueError(
                f"a horizon of {len(windows[order[0]].future)}; this forward goes to {MAX_PATCHES * PATCH}"
            )
        some = [i for i in order[:batch] if -(-len(windows[i].future) // PATCH) == patches]
        order = order[len(some) :]
        context = -(-min(longest, max(len(windows[i].history) for i in some)) // PATCH)
        time, reg = token_times(context + 1 + patches, patches, device)
        x = np.full((len(some), len(time)), np.nan, np.float32)
        for row, i in enumerate(some):
            history = windows[i].history[-longest:]
            x[row, context * PATCH - len(history) : context * PATCH] = history
        values = torch.from_numpy(x).to(device)
        seen = ~values.isnan()
        known = torch.zeros_like(seen)
        values = values.nan_to_num(0.0)
        features, attended, _, scale = model_input(values, seen, known, time, reg, longest)
        count = seen.sum(1, keepdim=True).clamp_min(1)
        loc = torch.where(seen, values, 0.0).sum(1, keepdim=True) / count
        groups = torch.zeros(0, 8, dtype=torch.long, device=device)
        z = net(features, reg, attended, groups, patches)  # [rows, patches, 21, 16]
        y = (
            torch.sinh(z[:, :, at].permute(0, 2, 1, 3).reshape(len(some), len(LEVELS), -1)) * scale[:, None]
            + loc[:, None]
        )
        for row, i in enumerate(some):
            out[i] = y[row, :, : len(windows[i].future)].cpu().numpy()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("windows", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--sets", action="store_true", help="also each set")
    options = parser.parse_args()
    windows = forecast_metrics.load(options.windows)
    naive = forecast_metrics.score(windows, forecast_metrics.seasonal_naive(windows))
    for file in options.checkpoints:
        state = load_file(file)
        layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.block"))
        weights = Weights(Config(num_layers=layers), "cpu")
        weights.load(state)
        scores = forecast_metrics.score(windows, forecast(Net(weights, torch.float32), windows))
        if options.sets:
            for name, one in scores.items():
                mase, wql = one.mase / naive[name].mase, one.wql / naive[name].wql
                print(f"  {name:28s} MASE {mase:.2f} WQL {wql:.2f} covers {one.coverage:.2f}")
        print(f"{file.stem:16s} {forecast_metrics.summary(scores, naive)}")


if __name__ == "__main__":
    main()
