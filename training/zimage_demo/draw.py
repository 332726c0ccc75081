"""Draw the entries of a prompts file, with diffusers or with diffusionz, as <id>.png and as one contact sheet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image


def sheet(pictures: list[Image.Image], columns: int, side: int) -> Image.Image:
    rows = -(-len(pictures) // columns)
    made = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 4) + 4), "white")
    for i, picture in enumerate(pictures):
        at = (4 + i % columns * (side + 4), 4 + i // columns * (side + 4))
        made.paste(picture.resize((side, side), Image.Resampling.LANCZOS), at)
    return made


def draw_with_diffusers(entries: list[dict], args: argparse.Namespace) -> list[Image.Image]:
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(args.model, torch_dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for i in range(0, len(entries), args.batch):
        part = entries[i : i + args.batch]
        # The noise comes from the CPU's generator, as the engine draws it.
        noise = [torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(e["seed"])) for e in part]
        pictures += pipe(
            [e["prompt"] for e in part],
            height=256,
            width=256,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            latents=torch.cat(noise),
        ).images
    return pictures


def draw_with_diffusionz(entries: list[dict], args: argparse.Namespace) -> list[Image.Image]:
    from diffusionz import ZImage

    with ZImage(args.model, device=args.device) as model:
        drawn = (model.generate(e["prompt"], steps=args.steps, seed=e["seed"], guidance=args.guidance) for e in entries)
        return [Image.fromarray(picture.pixels) for picture in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--engine", choices=("diffusers", "diffusionz"), default="diffusers")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).with_name("prompts.json"))
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    parser.add_argument("--sheet", type=Path, help="file for the contact sheet")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--side", type=int, default=256, help="pixels of one picture on the sheet")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--limit", type=int, help="only that many of the entries, spread over the file")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    entries = json.loads(args.prompts.read_text())
    if args.limit and args.limit < len(entries):
        entries = [entries[i * len(entries) // args.limit] for i in range(args.limit)]
    pictures = (draw_with_diffusers if args.engine == "diffusers" else draw_with_diffusionz)(entries, args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for i, (e, picture) in enumerate(zip(entries, pictures, strict=True)):
            picture.save(args.out / f"{e.get('id', i)}.png")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures, args.columns, args.side).save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
