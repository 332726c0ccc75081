"""Write the model folder in the diffusers layout from the checkpoints: bfloat16 weights, configurations, tokenizer."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from common import load_state
from models import text_encoder, transformer, vae, write_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--state", choices=("flow", "student"), default="student")
    parser.add_argument("folder", type=Path, help="model folder to write")
    args = parser.parse_args()
    text, flow, codec = text_encoder(), transformer(), vae()
    load_state(args.work, args.state, {"text": text, "flow": flow})
    load_state(args.work, "vae", {"vae": codec})
    stats = json.loads((args.work / "vae.json").read_text())
    args.folder.mkdir(parents=True, exist_ok=True)
    write_model(args.folder, text, flow, codec, stats["scaling_factor"], stats["shift_factor"])
    if args.tokenizer.resolve() != (args.folder / "tokenizer").resolve():
        shutil.copytree(args.tokenizer, args.folder / "tokenizer", dirs_exist_ok=True)
    size = sum(f.stat().st_size for f in args.folder.rglob("*") if f.is_file())
    print(f"{args.folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
