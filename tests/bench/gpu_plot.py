"""docs/gpu.webp: the rows that were kept last of a GPU, each beside the best peer and the goal.

python -m tests.bench.gpu_plot [MACHINE]
"""

import csv
import io
import pathlib
import sys

from tests.bench import record

# Read on white and on dark pages alike.
INK, OURS, PEER, GOAL = "#768390", "#2f81f7", "#db8b0b", "#3fb950"
SHOWN = [  # work, size, precisions, label
    ("picture", "1024x1024", ("bfloat16", "fp8"), "picture 1024², 8 steps"),
    ("picture", "512x512", ("bfloat16", "fp8"), "picture 512², 8 steps"),
    ("step", "1024x1024", ("bfloat16", "fp8"), "transformer step 1024²"),
    ("step", "512x512", ("bfloat16", "fp8"), "transformer step 512²"),
    ("VAE decode", "1024x1024", ("bfloat16",), "VAE decode 1024²"),
    ("text encoder", "64 tokens", ("bfloat16",), "text encoder, 64 tokens"),
    ("forecast", "1 x 768 -> 16", ("float16",), "forecast, 1 row of 768"),
    ("forecast", "448 x 768 -> 16", ("float16",), "forecast, 448 rows"),
]

Key = tuple[str, str, str]


def last_rows(path: pathlib.Path) -> dict[Key, dict[str, str]]:
    """(work, size, precision) -> the row kept last. One without a peer shows the peer that was measured last."""
    rows: dict[Key, dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            work, _, precision = row["work"].split(", peer ")[0].rpartition(", ")
            key = (work, row["size"], precision)
            if not row["peer_p50"] and key in rows:
                row["peer_p50"] = rows[key]["peer_p50"]
            rows[key] = row
    return rows


def plot(rows: dict[Key, dict[str, str]], out: pathlib.Path) -> None:
    import matplotlib
    from PIL import Image

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    shown = [
        (f"{label}, {precision}", rows[work, size, precision])
        for work, size, precisions, label in SHOWN
        for precision in precisions
        if (work, size, precision) in rows
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(shown) + 1))
    least, most = 0.25, 8.0
    for y, (_, row) in enumerate(shown):
        goal, ours = float(row["goal"].split()[0]), float(row["ours_p50"])
        axes.barh(y, ours / goal - least, left=least, height=0.6, color=OURS, zorder=2)
        axes.text(least * 1.04, y, f"{ours:.3g} ms", va="center", color="white", fontsize=9, weight="bold", zorder=4)
        if row["peer_p50"]:
            peer = float(row["peer_p50"])
            most = max(most, peer / goal)
            axes.plot(peer / goal, y, "D", color=PEER, markersize=7, zorder=3)
            axes.text(peer / goal * 1.08, y, f"{peer:.3g} ms", va="center", color=INK, fontsize=9)
    goal_line = axes.axvline(1, color=GOAL, linewidth=2, zorder=3)
    axes.set_yticks(range(len(shown)), [label for label, _ in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(least, 2 * most)
    ticks = {0.25: "¼", 0.5: "½"} | {tick: str(tick) for tick in (1, 2, 4, 8, 16, 32, 64) if tick <= most}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlabel("time by the goal's")
    handles = [
        (pyplot.Rectangle((0, 0), 1, 1, color=OURS), "diffusionz"),
        (pyplot.Line2D([], [], color=PEER, marker="D", linestyle=""), "peer"),
        (goal_line, "goal"),
    ]
    legend = axes.legend(*zip(*handles, strict=True), frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    axes.tick_params(colors=INK)
    for text in [*legend.get_texts(), axes.xaxis.label]:
        text.set_color(INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160, transparent=True, bbox_inches="tight")
    Image.open(data).save(out, lossless=True)


if __name__ == "__main__":
    machine = sys.argv[1] if len(sys.argv) > 1 else "nvidia-h100"
    plot(last_rows(record.RESULTS / f"{machine}.csv"), record.ROOT / "docs" / "gpu.webp")
