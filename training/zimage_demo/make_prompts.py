"""Write prompts.json: 200 prompts, each with a (colour, shape) pair or a relation that training never shows."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from models import SEED, write_json
from scenes import caption, is_held_out, sample_scene

COUNTS = {"single": 45, "pair": 135, "triple": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("prompts.json"))
    args = parser.parse_args()
    rng = random.Random(SEED + 1)
    prompts = []
    for structure, count in COUNTS.items():
        made = 0
        while made < count:
            scene = sample_scene(rng, structure)
            if not is_held_out(scene) or (structure == "triple" and scene.relation is None):
                continue
            made += 1
            text = caption(rng, scene)
            prompts.append({"id": len(prompts), "prompt": text, "seed": 1000 + len(prompts), **expected(scene)})
    write_json(args.out, prompts)


def expected(scene) -> dict:
    """What a right picture shows, in plain values."""
    ground = scene.background
    return {
        "objects": [{"colour": t.colour, "shape": t.shape, "place": t.place, "size": t.size} for t in scene.things],
        "relation": scene.relation,
        "background": {"kind": ground.kind, "colours": list(ground.colours)} if ground.said else None,
    }


if __name__ == "__main__":
    main()
