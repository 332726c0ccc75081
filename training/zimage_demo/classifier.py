"""A small convolutional judge: the colour and the shape of the object in the middle of a 64 x 64 crop.

It is trained on fresh renders only, never on the generator's pictures, so that it can judge them, and on all pairs of
colour and shape, those held out from the generator included: a judge must know what it is asked about.
Four convolutions (3 x 3, stride 2, ReLU; the first on the crop in -1..1), then two linear layers on the flattened
4 x 4 x 64 features (channel first): 19 colours and 9 shapes.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data import training_rows
from models import SEED, write_json
from safetensors.torch import load_file, save_file
from scenes import COLOUR_NAMES, COLOURS, SHAPES, render
from torch import nn

CROP = 64
CHANNELS = (16, 32, 64, 64)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, *CHANNELS)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        features = CHANNELS[-1] * (CROP >> len(CHANNELS)) ** 2
        self.colour, self.shape = nn.Linear(features, len(COLOUR_NAMES)), nn.Linear(features, len(SHAPES))

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, 19] and [n, 9] of crops [n, 3, 64, 64] in -1..1."""
        for conv in self.convs:
            crops = F.relu(conv(crops))
        flat = crops.flatten(1)
        return self.colour(flat), self.shape(flat)


def save(model: Classifier, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "crop": CROP,
        "channels": CHANNELS,
        "kernel": 3,
        "stride": 2,
        "padding": 1,
        "activation": "relu",
        "input_range": [-1, 1],
        "colours": {k: list(v) for k, v in COLOURS.items()},
        "shapes": SHAPES,
    }
    write_json(folder / "config.json", config)


def load(folder: Path) -> Classifier:
    model = Classifier()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def crops_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Crops [n, 3, 64, 64] around one object of each scene, a little blurred and noised; colours and shapes [n]."""
    n, device = len(rows), rows.device
    slots = rows[:, 8:].view(n, 3, 7)
    pick = torch.multinomial((slots[..., 0] >= 0).float(), 1)
    thing = slots[torch.arange(n, device=device), pick[:, 0]]
    palette = torch.tensor(list(COLOURS.values()), device=device) / 255
    colour = torch.cdist(thing[:, 1:4], palette).argmin(1)
    side = 2 * thing[:, 6] * torch.empty(n, device=device).uniform_(0.95, 1.7)
    centre = thing[:, 4:6] + (torch.rand(n, 2, device=device) - 0.5) * 0.35 * thing[:, 6:]
    window = torch.cat((centre - side[:, None] / 2, side[:, None]), 1)
    crops = render(rows, CROP, window)
    blurred = F.interpolate(F.avg_pool2d(crops, 2), size=CROP, mode="bilinear")
    crops = torch.lerp(crops, blurred, torch.rand(n, 1, 1, 1, device=device))
    crops = crops + 0.08 * torch.rand(n, 1, 1, 1, device=device) * torch.randn_like(crops)
    crops = crops + 0.06 * (torch.rand(n, 3, 1, 1, device=device) - 0.5)
    return crops, colour, thing[:, 0].long()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the judge on fresh renders.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for its weights and configuration; weights there are continued"
    )
    parser.add_argument("--minutes", type=float, default=0.6)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--pool", type=int, default=65536, help="distinct scenes")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--seed", type=int, default=SEED + 900)
    args = parser.parse_args()

    rows = training_rows(args.seed, args.pool, args.workers, held_out=True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = rows.to(device)
    model = (load(args.out) if (args.out / "model.safetensors").exists() else Classifier()).to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=1e-3)
    begin, step = time.monotonic(), 0
    test = len(rows) // 16  # the last rows are kept for the test below

    def accuracy() -> tuple[float, float]:
        right = torch.zeros(2)
        with torch.no_grad():
            for part in rows[-test:].split(512):
                crops, colour, shape = crops_of(part)
                found = model(crops)
                right += torch.tensor(
                    [float((f.argmax(1) == y).sum()) for f, y in zip(found, (colour, shape), strict=True)]
                )
        return tuple((right / test).tolist())

    while (share := (time.monotonic() - begin) / (60 * args.minutes)) < 1:
        for group in opt.param_groups:
            group["lr"] = args.rate * (1 - share) + 1e-5
        crops, colour, shape = crops_of(rows[torch.randint(len(rows) - test, (args.batch,), device=device)])
        found = model(crops)
        loss = F.cross_entropy(found[0], colour) + F.cross_entropy(found[1], shape)
        opt.zero_grad()
        loss.backward()
        opt.step()
        step += 1
    print(f"classifier: {step} steps, colour and shape right on unseen crops: {accuracy()}")
    save(model, args.out)


if __name__ == "__main__":
    main()
