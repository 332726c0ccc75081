"""Judge pictures of shapes against what their prompts ask for, whichever engine drew them.

The pictures are `<id>.png` (any digits that read as the id: `7.png`, `007.png`) for the entries of prompts.json. The
background is taken from the picture's rim (one colour, or the line between two); whatever stands off it is an object.
An object's colour counts as right where both the nearest palette name to its median pixel and the classifier say so,
its shape where the classifier says so, a relation where the centres of the objects stand so.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import classifier
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scenes import COLOUR_NAMES, COLOURS, PLACES, SHAPES

RIM = 3  # pixels
OFF = 40.0  # distance in 0..442 from which a pixel is no background
LEAST = 0.005  # share of the picture; smaller parts are no objects (they count as specks)
PALETTE = np.array(list(COLOURS.values()), float)


@dataclass
class Found:
    """One object of a picture: centre as fractions, names by the classifier and by the pixels, share of the picture."""

    x: float
    y: float
    share: float
    colour: str
    pixel_colour: str
    shape: str


def nearest_name(rgb: np.ndarray) -> str:
    return COLOUR_NAMES[int(np.linalg.norm(PALETTE - rgb, axis=1).argmin())]


def background(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two colours [3] between which the rim of the picture [h, w, 3] lies; equal where it is plain."""
    p = picture.astype(float)
    rim = np.concatenate(
        [p[:RIM].reshape(-1, 3), p[-RIM:].reshape(-1, 3), p[:, :RIM].reshape(-1, 3), p[:, -RIM:].reshape(-1, 3)]
    )
    middle = np.median(rim, 0)
    if np.percentile(np.linalg.norm(rim - middle, axis=1), 95) < 20:
        return middle, middle
    centre = rim.mean(0)
    axis = np.linalg.svd(rim - centre, full_matrices=False)[2][0]
    along = (rim - centre) @ axis
    low, high = np.percentile(along, (4, 96))
    return np.median(rim[along <= low], 0), np.median(rim[along >= high], 0)


def standing_off(picture: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mask [h, w] of the pixels farther than OFF from the line between two colours."""
    p = picture.astype(float)
    line = b - a
    t = np.clip((p - a) @ line / max(line @ line, 1e-9), 0, 1)
    return np.linalg.norm(p - (a + t[..., None] * line), axis=-1) > OFF


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts of a mask [h, w], largest first, as masks."""
    m = torch.from_numpy(mask).float()[None, None]
    labels = (torch.arange(1, mask.size + 1, dtype=torch.float32).view_as(m)) * m
    while True:
        spread = labels
        for _ in range(8):
            spread = F.max_pool2d(spread, 3, 1, 1) * m
        if torch.equal(spread, labels):
            break
        labels = spread
    names, counts = torch.unique(labels[labels > 0], return_counts=True)
    order = counts.argsort(descending=True)
    return [(labels[0, 0] == names[i]).numpy() for i in order]


def look(picture: np.ndarray, judge: classifier.Classifier) -> tuple[list[Found], float, tuple[np.ndarray, np.ndarray]]:
    """Objects of a picture [h, w, 3] uint8, the share of specks, and the background's two colours."""
    a, b = background(picture)
    height, width = picture.shape[:2]
    parts = components(standing_off(picture, a, b))
    large = [p for p in parts if p.mean() >= LEAST]
    specks = float(sum(p.mean() for p in parts if p.mean() < LEAST))
    found = []
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1).float()[None] / 127.5 - 1
    for part in large[:6]:
        ys, xs = np.nonzero(part)
        x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
        cx, cy, half = (x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) * 0.6
        steps = (torch.arange(classifier.CROP) + 0.5) / classifier.CROP * 2 - 1
        gx, gy = (cx + half * steps) / width * 2 - 1, (cy + half * steps) / height * 2 - 1
        grid = torch.stack(torch.meshgrid(gy, gx, indexing="ij")[::-1], -1)[None].float()
        crop = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
        with torch.no_grad():
            colour, shape = (int(f.argmax()) for f in judge(crop))
        inner = -F.max_pool2d(-torch.from_numpy(part).float()[None, None], 5, 1, 2)[0, 0].numpy() > 0.5
        pixels = picture[inner if inner.sum() >= 20 else part]
        found.append(
            Found(
                float(xs.mean() / width),
                float(ys.mean() / height),
                float(part.mean()),
                COLOUR_NAMES[colour],
                nearest_name(np.median(pixels, 0)),
                SHAPES[shape],
            )
        )
    return found, specks, (a, b)


def match(found: list[Found], objects: list[dict]) -> list[Found | None]:
    """The assignment of found objects to the expected ones with the most right names; positions play no part."""
    best, best_score = [None] * len(objects), -1.0
    options = found + [None] * len(objects)
    for chosen in set(itertools.permutations(range(len(options)), len(objects))):
        picks = [options[i] for i in chosen]
        score = sum(
            (p.colour == o["colour"]) + (p.pixel_colour == o["colour"]) + 1.5 * (p.shape == o["shape"]) + 0.1
            for p, o in zip(picks, objects, strict=True)
            if p is not None
        )
        if score > best_score:
            best, best_score = picks, score
    return best


def relation_right(relation: str, picks: list[Found | None]) -> bool:
    if any(p is None for p in picks):
        return False
    xs, ys = [p.x for p in picks], [p.y for p in picks]
    if relation in ("row", "column"):
        along = xs if relation == "row" else ys
        across = ys if relation == "row" else xs
        return all(b - a > 0.1 for a, b in itertools.pairwise(along)) and max(across) - min(across) < 0.25
    dx, dy = xs[1] - xs[0], ys[1] - ys[0]
    if relation == "beside":
        return abs(dx) > abs(dy)
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    sign = 1 if relation in ("left", "above") else -1
    return sign * along > 0.1 and abs(across) < abs(along)


def place_right(place: str, found: Found | None) -> bool:
    if found is None:
        return False
    return min(PLACES, key=lambda p: (PLACES[p][0] - found.x) ** 2 + (PLACES[p][1] - found.y) ** 2) == place


def judge_picture(picture: np.ndarray, entry: dict, judge: classifier.Classifier) -> dict:
    """One record of rights and wrongs for a picture and its entry of prompts.json."""
    found, specks, (a, b) = look(picture, judge)
    objects = entry["objects"]
    picks = match(found[:4], objects)
    record = {
        "id": entry["id"],
        "prompt": entry["prompt"],
        "count_right": len(found) == len(objects),
        "colours_right": [
            p is not None and p.colour == o["colour"] and p.pixel_colour == o["colour"]
            for p, o in zip(picks, objects, strict=True)
        ],
        "shapes_right": [p is not None and p.shape == o["shape"] for p, o in zip(picks, objects, strict=True)],
        "specks": round(specks, 5),
        "found": [vars(f) for f in found],
    }
    if entry["relation"]:
        record["relation_right"] = relation_right(entry["relation"], picks)
    places = [place_right(o["place"], p) for o, p in zip(objects, picks, strict=True) if o.get("place")]
    if places:
        record["place_right"] = all(places)
    if entry.get("background"):
        names = {nearest_name(a), nearest_name(b)}
        record["background_right"] = names == set(entry["background"]["colours"])
    return record


def percent(values: list[bool]) -> float | None:
    return round(100 * sum(values) / len(values), 1) if values else None


def summary(records: list[dict]) -> dict:
    """Percentages over all objects (colour, shape) and over all pictures that have such a part (the rest)."""

    def picked(key: str) -> list[bool]:
        return [r[key] for r in records if key in r]

    return {
        "pictures": len(records),
        "colour": percent([v for r in records for v in r["colours_right"]]),
        "shape": percent([v for r in records for v in r["shapes_right"]]),
        "relation": percent(picked("relation_right")),
        "place": percent(picked("place_right")),
        "background": percent(picked("background_right")),
        "count": percent(picked("count_right")),
        "all": percent(
            [
                r["count_right"]
                and all(r["colours_right"] + r["shapes_right"])
                and all(r.get(k, True) for k in ("relation_right", "place_right", "background_right"))
                for r in records
            ]
        ),
    }


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pictures", type=Path, help="folder of <id>.png")
    parser.add_argument("--prompts", type=Path, default=here / "prompts.json")
    parser.add_argument(
        "--classifier", type=Path, default=here.parents[1] / "py/diffusionz/models/zimage-demo/classifier"
    )
    parser.add_argument("--out", type=Path, help="write every record and the summary as JSON here")
    parser.add_argument("--wrong", action="store_true", help="list the pictures that are not all right")
    args = parser.parse_args()
    torch.set_num_threads(1)
    judge = classifier.load(args.classifier)
    entries = {e["id"]: e for e in json.loads(args.prompts.read_text())}
    files = {int(f.stem): f for f in args.pictures.glob("*.png") if f.stem.isdigit()}
    records = []
    for at in sorted(files.keys() & entries.keys()):
        with Image.open(files[at]) as image:
            records.append(judge_picture(np.asarray(image.convert("RGB")), entries[at], judge))
    if not records:
        raise SystemExit(f"{args.pictures}: no picture <id>.png of {args.prompts}")
    result = summary(records)
    result["missing"] = len(entries) - len(records)
    if args.wrong:
        for r in records:
            parts = {k: r[k] for k in r if k.endswith("_right")}
            if not all(all(v) if isinstance(v, list) else v for v in parts.values()):
                wrong = [k.split("_")[0] for k, v in parts.items() if not (all(v) if isinstance(v, list) else v)]
                seen = ", ".join(f"{f['pixel_colour']}/{f['colour']} {f['shape']}" for f in r["found"])
                print(f"{r['id']:3d} {'+'.join(wrong)}: {r['prompt']!r} -> {seen}")
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps({"summary": result, "pictures": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
