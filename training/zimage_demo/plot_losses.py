"""Draw losses.csv as losses.svg: one panel for each phase, the loss on a logarithmic axis over the pictures shown."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP = 330, 190, 52, 34
TITLES = {
    "vae": "VAE: L1, edges and KL",
    "decoder": "decoder alone: L1 and edges",
    "flow": "flow matching: squared error",
    "distill": "eight steps: squared error",
}


def read(file: Path) -> dict[str, list[tuple[float, float, bool]]]:
    """For each phase (thousands of pictures, loss, first of a resumed part); the count runs on when resumed."""
    found: dict[str, list[tuple[float, float, bool]]] = {}
    with file.open() as lines:
        offset, last = {}, {}
        for row in csv.DictReader(lines):
            phase, images = row["phase"], int(row["images"])
            resumed = images < last.get(phase, 0)
            if resumed:
                offset[phase] = offset.get(phase, 0) + last[phase]
            last[phase] = images
            at = (offset.get(phase, 0) + images) / 1000
            found.setdefault(phase, []).append((at, float(row["loss"]), resumed))
    return found


def panel(phase: str, points: list[tuple[float, float, bool]], x0: float, y0: float) -> list[str]:
    points = [p for p in points if p[1] > 0]
    most = max(p[0] for p in points)
    low, high = (math.log10(f(p[1] for p in points)) for f in (min, max))
    low, high = math.floor(low * 2) / 2, math.ceil(high * 2) / 2
    w, h = WIDTH - LEFT - 14, HEIGHT - TOP - 30

    def place(x: float, y: float) -> tuple[float, float]:
        return x0 + LEFT + w * x / most, y0 + TOP + h * (high - math.log10(y)) / (high - low)

    out = [f'<text x="{x0 + LEFT}" y="{y0 + 20}" font-weight="bold">{TITLES.get(phase, phase)}</text>']
    for i in range(int((high - low) * 2) + 1):
        value = 10 ** (low + i / 2)
        y = place(0, value)[1]
        out.append(f'<path d="M{x0 + LEFT:.0f} {y:.1f}h{w}" stroke="#ddd"/>')
        out.append(f'<text x="{x0 + LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    for part in (0.25, 0.5, 0.75, 1):
        x = place(most * part, 10**low)[0]
        out.append(f'<text x="{x:.0f}" y="{y0 + HEIGHT - 14}" text-anchor="middle">{most * part:.0f}k</text>')
    line = ""
    for x, y, resumed in points:
        px, py = place(x, y)
        line += f"{'M' if resumed or not line else 'L'}{px:.1f} {py:.1f}"
    out.append(f'<path d="{line}" fill="none" stroke="#2850dc" stroke-width="1.5"/>')
    return out


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=here / "losses.csv")
    parser.add_argument("--out", type=Path, default=here / "losses.svg")
    args = parser.parse_args()
    phases = read(args.csv)
    rows = -(-len(phases) // 2)
    body = []
    for i, (phase, points) in enumerate(phases.items()):
        body += panel(phase, points, i % 2 * WIDTH, i // 2 * HEIGHT)
    size = f'width="{2 * WIDTH}" height="{rows * HEIGHT}"'
    args.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect {size} fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
