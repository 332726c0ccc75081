"""`diffusionz bench --quality`: what a precision costs, measured on a given model.

Pictures of the same prompts and seeds are drawn in float32, bfloat16 and the precision in question, and compared pixel
by pixel: what matters to an owner of weights is whether the precision is further from float32 than bfloat16 is, which
everyone uses. A precision that draws another picture than float32 does may still draw a good one: look at the sheet.

PSNR = 10 log10(255^2 / mean square difference), dB. SSIM: Wang et al. 2004, on luma, Gaussian window of 11 pixels and
deviation 1.5. Distance: of the kind of LPIPS (Zhang et al. 2018), by the bundled classifier of shapes and colours: the
mean square difference of its four layers' features, each pixel's scaled to unit length; its weights are not tuned to
what people see, so it is to be compared with itself only. Judged alike: of the crops that the classifier is sure about
in float32's picture, those to which it gives the same colour and shape in the other.

GATE says how much of that a precision may cost.

Forecasts are scored by MASE and WQL, as fev defines them, on the airline series and on synthetic ones, and compared
with float32's scores.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffusionz._errors import ArgumentError
from diffusionz.bench.gpu import check_picture

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Picture = NDArray[numpy.uint8]

PROMPTS = (
    "a red circle on a blue background",
    "a green square above a yellow triangle on a white background",
    "a purple star left of an orange circle",
    "three small blue squares in a row on a gray background",
    "a large white ring on a black background",
    "a pink heart below a brown square",
    "a yellow cross on a gradient from green to blue",
    "a small red triangle inside a cyan circle",
)
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a measure of a precision beside float32 has to reach: at least `least`, or at most `most`."""

    measure: str
    label: str
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


# The quality gate. The measure is the loss that everyone takes with a file: lossy WebP at quality 90 changes the
# bundled model's 16 pictures by 40.9 dB in the mean and 35.9 at worst, SSIM 0.9989, distance 1.4e-3, and 1/255 in the
# mean; bfloat16 by 52.9 and 40.1 dB, 0.9995, 2.0e-4. A precision may double a file's squared error in the mean, and in
# the worst picture, where it may move an edge, which no file does, be off by 28 dB; what is in the picture stays.
GATE = (
    Bound("psnr_mean", "PSNR, mean, dB", least=37.9),
    Bound("psnr_worst", "PSNR, worst, dB", least=28.0),
    Bound("ssim_mean", "SSIM, mean", least=0.99),
    Bound("distance_mean", "distance, mean", most=0.005),
    Bound("judged_alike", "judged alike", least=0.98),
)


# --- Pictures ---


def compare_pictures(
    model: str, precision: str, device: str, count: int, side: int | None, sheet: str | None, say: Say
) -> list[dict[str, Any]]:
    """One dictionary a pair of precisions: "precision", "reference", means over `count` pictures. `sheet`: a file to
    write, with a row a picture: in float32, bfloat16 and `precision`, and the last one's difference from float32, by 8.
    """
    from diffusionz.zimage import ZImage

    drawn: dict[str, list[Picture]] = {}
    for name in reversed(_beside(precision)):  # one that the device has not is refused before anything is drawn
        with ZImage(model, device=device, precision=name) as engine:
            drawn[name] = [
                engine.generate(PROMPTS[i % len(PROMPTS)], width=side, height=side, seed=100 + i, progress=False).pixels
                for i in range(count)
            ]
        for picture in drawn[name]:
            check_picture(picture)
        say(f"{count} pictures in {name}")
    judge = _Judge()
    pairs = dict.fromkeys((("bfloat16", "float32"), (precision, "float32"), (precision, "bfloat16")))
    rows = [{"precision": a, "reference": b} | _compared(drawn[a], drawn[b], judge) for a, b in pairs if a != b]
    if sheet is not None:
        _write_sheet(sheet, drawn, precision)
    return rows


def _beside(precision: str) -> list[str]:
    """The precisions that are compared, float32 first."""
    return list(dict.fromkeys(("float32", "bfloat16", precision)))


def _compared(ours: Sequence[Picture], truth: Sequence[Picture], judge: _Judge) -> dict[str, float]:
    import numpy

    pairs = list(zip(ours, truth, strict=True))
    noise = [psnr(a, b) for a, b in pairs]
    off = [numpy.abs(a.astype(int) - b.astype(int)) for a, b in pairs]
    return {
        "psnr_mean": float(numpy.mean(noise)),
        "psnr_worst": min(noise),
        "ssim_mean": float(numpy.mean([ssim(a, b) for a, b in pairs])),
        "distance_mean": float(numpy.mean([judge.distance(a, b) for a, b in pairs])),
        "judged_alike": judge.alike(pairs),
        "off_mean": float(numpy.mean([one.mean() for one in off])),
        "off_most": float(max(one.max() for one in off)),
    }


def psnr(a: Picture, b: Picture) -> float:
    """dB; 99 for equal pictures."""
    import numpy

    square = float(((a.astype(numpy.float64) - b) ** 2).mean())
    return min(99.0, 10 * float(numpy.log10(255**2 / square))) if square else 99.0


def ssim(a: Picture, b: Picture) -> float:
    """1 for equal pictures."""
    import numpy

    window = numpy.exp(-0.5 * (numpy.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def smooth(plane: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
        for axis in (0, 1):
            views = numpy.lib.stride_tricks.sliding_window_view(plane, len(window), axis)
            plane = views @ window
        return plane

    x, y = (picture @ numpy.array([0.299, 0.587, 0.114]) for picture in (a, b))
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y, both = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2, smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    like = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(like.mean())


class _Judge:
    """The bundled classifier of shapes and colours (training/zimage_demo/classifier.py)."""

    def __init__(self) -> None:
        import torch

        from diffusionz.hub import locate

        path = os.path.join(locate("demo", "zimage"), "classifier", "model.safetensors")
        with open(path, "rb") as file:
            data = file.read()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])

        def layer(name: str) -> list[torch.Tensor]:
            parts = []
            for part in (f"{name}.weight", f"{name}.bias"):
                begin, end = header[part]["data_offsets"]
                values = torch.frombuffer(bytearray(data[start + begin : start + end]), dtype=torch.float32)
                parts.append(values.view(header[part]["shape"]))
            return parts

        self._convs = [layer(f"convs.{i}") for i in range(4)]
        self._heads = [layer(name) for name in ("colour", "shape")]

    def _features(self, pictures: Any) -> list[Any]:
        """After each convolution, of pictures [n, 3, height, width] in -1..1."""
        import torch.nn.functional as functional

        found = []
        for weight, bias in self._convs:
            pictures = functional.relu(functional.conv2d(pictures, weight, bias, stride=2, padding=1))
            found.append(pictures)
        return found

    @staticmethod
    def _scaled(picture: Picture) -> Any:
        import torch

        return torch.from_numpy(picture.copy()).permute(2, 0, 1).float()[None] / 127.5 - 1

    def distance(self, a: Picture, b: Picture) -> float:
        def unit(picture: Picture) -> list[Any]:
            return [x / (x.norm(dim=1, keepdim=True) + 1e-6) for x in self._features(self._scaled(picture))]

        return float(sum(((x - y) ** 2).sum(1).mean() for x, y in zip(unit(a), unit(b), strict=True)))

    def _labels(self, picture: Picture) -> tuple[Any, Any]:
        """Colour and shape [crops, 2] of crops half as wide as the picture, and how sure the less sure one is."""
        import torch
        import torch.nn.functional as functional

        crop, step = 64, 16
        small = functional.interpolate(self._scaled(picture), size=(2 * crop, 2 * crop), mode="area")
        crops = small[0].unfold(1, crop, step).unfold(2, crop, step).permute(1, 2, 0, 3, 4).reshape(-1, 3, crop, crop)
        flat = self._features(crops)[-1].flatten(1)
        sure, labels = zip(*((flat @ w.t() + b).softmax(1).max(1) for w, b in self._heads), strict=True)
        return torch.stack(labels, 1), torch.stack(sure, 1).amin(1)

    def alike(self, pairs: Sequence[tuple[Picture, Picture]], sure: float = 0.9) -> float:
        """The share of crops that get the labels of the second picture's, of those that are sure there; 1 for none."""
        same = total = 0
        for ours, truth in pairs:
            labels, certainty = self._labels(truth)
            counted = certainty >= sure
            same += int((self._labels(ours)[0] == labels).all(1)[counted].sum())
            total += int(counted.sum())
        return same / total if total else 1.0


def _write_sheet(path: str, drawn: dict[str, list[Picture]], precision: str) -> None:
    import numpy

    from diffusionz.image import Image

    rows = []
    for i, truth in enumerate(drawn["float32"]):
        pictures = [drawn[name][i] for name in _beside(precision)]
        off = numpy.abs(drawn[precision][i].astype(int) - truth.astype(int)) * 8
        rows.append(numpy.concatenate([*pictures, off.clip(0, 255).astype(numpy.uint8)], 1))
    sheet = numpy.ascontiguousarray(numpy.concatenate(rows))
    height, width, _ = sheet.shape
    Image(bytearray(sheet.tobytes()), width, height, seed=0, timings={}, metadata_json="{}").save(path)


def pictures_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'':34s}PSNR mean  worst    SSIM    distance  judged alike  mean difference  most",
        *(
            f"{row['precision'] + ' beside ' + row['reference']:34s}"
            f"{row['psnr_mean']:6.1f} dB {row['psnr_worst']:6.1f}  {row['ssim_mean']:6.4f}"
            f"  {row['distance_mean']:10.2e}  {row['judged_alike']:12.4f}  {row['off_mean']:10.3f}/255"
            f"  {row['off_most']:5.0f}/255"
            for row in rows
        ),
    ]
    of_float32 = {row["precision"]: row for row in rows if row["reference"] == "float32"}
    for name, row in of_float32.items():
        if name != "bfloat16":
            share = row["off_mean"] / of_float32["bfloat16"]["off_mean"]
            lines.append(f"{name} is {share:.2f} times as far from float32 as bfloat16 is (mean difference)")
    return "\n".join(lines)


def gate(rows: Sequence[dict[str, Any]], precision: str) -> list[dict[str, Any]]:
    """One dictionary a bound of GATE: "measure", "label", "value", "bound", "passed"; none for float32."""
    beside = [row for row in rows if (row["precision"], row["reference"]) == (precision, "float32")]
    return [
        {"measure": bound.measure, "label": bound.label, "value": row[bound.measure]}
        | {"bound": f"<= {bound.most:g}" if bound.least is None else f">= {bound.least:g}"}
        | {"passed": bound.holds(row[bound.measure])}
        for row in beside
        for bound in GATE
    ]


def gate_table(checks: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{check['label']:20s}{check['value']:10.4g}  {check['bound']:10s}{'pass' if check['passed'] else 'FAIL'}"
        for check in checks
    ]
    return "\n".join([*lines, "the quality gate: " + ("passed" if all(c["passed"] for c in checks) else "FAILED")])


def compare_layers(model: str, precision: str, device: str, side: int | None, say: Say) -> list[dict[str, Any]]:
    """One dictionary a place between the transformer's blocks: "place", and for bfloat16 and `precision` the distance
    of the numbers there from float32's, ||x - y|| / ||y||, in the first step of a picture. What a block adds is the
    rise over the place before."""
    import tempfile

    import numpy

    from diffusionz.zimage import ZImage

    def trace(name: str) -> dict[str, NDArray[numpy.float32]]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["DIFFUSIONZ_TRACE"] = folder  # read when a model is opened
            try:
                with ZImage(model, device=device, precision=name) as engine:
                    engine.generate(PROMPTS[0], width=side, height=side, steps=1, seed=100, progress=False)
            finally:
                del os.environ["DIFFUSIONZ_TRACE"]
            say(f"one step in {name}, block by block")
            return {file[4:-4]: numpy.load(os.path.join(folder, file)) for file in sorted(os.listdir(folder))}

    truth = trace("float32")
    others = {name: trace(name) for name in dict.fromkeys(("bfloat16", precision)) if name != "float32"}

    def distance(x: NDArray[numpy.float32], y: NDArray[numpy.float32]) -> float:
        return float(numpy.linalg.norm(x.ravel().astype(numpy.float64) - y.ravel()) / numpy.linalg.norm(y.ravel()))

    return [
        {"place": place} | {name: distance(found[place], values) for name, found in others.items()}
        for place, values in truth.items()
    ]


def layers_table(rows: Sequence[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "place"]
    lines = [f"{'after':28s}" + "".join(f"{name:>12s}" for name in names)]
    lines += [f"{row['place']:28s}" + "".join(f"{row[name]:12.2e}" for name in names) for row in rows]
    return "\n".join([*lines, "distance from float32: ||x - y|| / ||y||"])


# --- Forecasts ---


def compare_forecasts(model: str, precision: str, device: str, say: Say) -> list[dict[str, Any]]:
    """One dictionary a precision: "precision", "mase", "wql", and their relative change from float32's."""
    from diffusionz.chronos2 import Chronos2

    histories, futures, season = windows()
    scores: dict[str, tuple[float, float]] = {}
    for name in reversed(_beside(precision)):
        with Chronos2(model, device=device, precision=name) as engine:
            found = engine.forecast(histories, futures.shape[1], LEVELS).quantiles
        scores[name] = score(histories, futures, found, season)
        say(f"{len(histories)} forecasts in {name}")

    def row(name: str) -> dict[str, Any]:
        (mase, wql), (true_mase, true_wql) = scores[name], scores["float32"]
        changes = {"mase_change": mase / true_mase - 1, "wql_change": wql / true_wql - 1}
        return {"precision": name, "mase": mase, "wql": wql} | changes

    return [row(name) for name in _beside(precision)]


def windows() -> tuple[list[NDArray[numpy.float32]], NDArray[numpy.float32], int]:
    """(histories, futures [windows, 12], the season): ends of the airline series, and 48 synthetic ones."""
    import csv

    import numpy

    from diffusionz import datasets

    season, horizon = 12, 12
    with open(datasets.path("airline"), newline="") as file:
        airline = numpy.array([float(row["passengers"]) for row in csv.DictReader(file)], numpy.float32)
    pairs = [(airline[:end], airline[end : end + horizon]) for end in range(48, len(airline) - horizon + 1, 8)]
    generator = numpy.random.default_rng(3)
    step = numpy.arange(240 + horizon)
    for i in range(48):
        wave = numpy.sin(2 * numpy.pi * (step / season + i / 48)) * generator.uniform(1, 10)
        walk = generator.standard_normal(len(step)).cumsum() * generator.uniform(0, 1)
        values = (50 + generator.uniform(-0.1, 0.1) * step + wave + walk + generator.standard_normal(len(step))).astype(
            numpy.float32
        )
        pairs.append((values[:-horizon], values[-horizon:]))
    return [history for history, _ in pairs], numpy.stack([future for _, future in pairs]), season


def score(
    histories: Sequence[NDArray[numpy.float32]],
    futures: NDArray[numpy.float32],
    found: NDArray[numpy.float32],
    season: int,
) -> tuple[float, float]:
    """(MASE, WQL) of forecasts [windows, levels, horizon] at LEVELS."""
    import numpy

    if not numpy.isfinite(found).all():
        raise ArgumentError("a forecast is not finite")
    naive = numpy.array([numpy.abs(history[season:] - history[:-season]).mean() for history in histories])
    off = numpy.abs(futures - found[:, LEVELS.index(0.5)]).mean(1)
    under = futures[:, None] - found.astype(numpy.float64)
    level = numpy.array(LEVELS)[:, None]
    loss = 2 * numpy.maximum(level * under, (level - 1) * under)
    return float((off / naive).mean()), float(loss.mean() / numpy.abs(futures).mean())


def forecasts_table(rows: Sequence[dict[str, Any]]) -> str:
    return "\n".join(
        f"{row['precision']:10s}  MASE {row['mase']:.5f} ({row['mase_change']:+.3%})  WQL {row['wql']:.6f}"
        f" ({row['wql_change']:+.3%})"
        for row in rows
    )
