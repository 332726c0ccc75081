"""`diffusionz bench --gpu`: whole calls through the C ABI on one GPU, warm, medians, beside the peers and the goals.

A picture is timed from the prompt to its pixels on the host, each of another prompt; a stage by the times that the call
itself reports (the device has finished a stage when the next begins); a forecast from host array to host array. Work is
checked before it is timed: a picture must not be of one colour, a forecast must be finite and near float32's, and where
the peers run, near theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusionz._errors import ArgumentError, DiffusionzError
from diffusionz.bench.table import Row, percentile
from diffusionz.bench.work import HISTORY, HORIZON, PROMPT, SEED, STEPS, STREAM_ROWS, prompt, series

PARTS = {"zimage": ("pictures", "webp", "load"), "chronos2": ("forecasts",)}  # of each family, as they are measured
FAMILIES = tuple(PARTS)
SIDES = (1024, 512)  # pixels
ZIMAGE_PRECISIONS = ("bfloat16", "fp8")
CHRONOS_PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
_CLOSE = 0.05  # of the values' deviation: forecasts of any precision beside float32's
_ALIKE = 0.9  # correlation of the pixels of ours and the peer's picture in bfloat16

# (work, size, precision) -> median on one H100; the figures of the project's own aims.
GOALS = {
    ("picture", "1024x1024", "bfloat16"): 760.0,
    ("picture", "1024x1024", "fp8"): 520.0,
    ("picture", "512x512", "bfloat16"): 200.0,
    ("picture", "512x512", "fp8"): 145.0,
    ("step", "1024x1024", "bfloat16"): 88.0,
    ("step", "1024x1024", "fp8"): 59.0,
    ("step", "512x512", "bfloat16"): 23.0,
    ("step", "512x512", "fp8"): 15.0,
    ("VAE decode", "1024x1024", "bfloat16"): 28.0,
    ("text encoder", "64 tokens", "bfloat16"): 6.0,
    ("WebP, added to a further picture of a batch", "1024x1024", "bfloat16"): 5.0,
    ("WebP, added to a picture alone", "1024x1024", "bfloat16"): 40.0,
    ("process start to first picture", "1024x1024", "bfloat16"): 15.0,
    ("model load", "all weights", "bfloat16"): 12.0,
} | {
    key: goal
    for precision in CHRONOS_PRECISIONS[1:]
    for key, goal in {
        ("forecast", f"1 x {HISTORY} -> {HORIZON}", precision): 0.45,
        ("forecast", f"448 x {HISTORY} -> {HORIZON}", precision): 10.0,
        ("forecast, streamed", f"{STREAM_ROWS} x {HISTORY} -> {HORIZON}", precision): 40000.0,
    }.items()
}

Say = Callable[[str], None]


class Wrong(DiffusionzError):
    """The work is not what it should be: it is not timed."""


@dataclasses.dataclass
class Options:
    device: str = "cuda:0"
    only: Sequence[str] = FAMILIES  # families, or parts of them
    model: str | None = None  # a folder of either family; None draws random ones
    peers: bool = False
    scratch: str | None = None
    limit: float | None = None  # seconds after which nothing more is begun


def parts_of(only: Sequence[str]) -> dict[str, list[str]]:
    """family -> its parts that `only` names, itself or by the family. Raises ArgumentError."""
    known = [*PARTS, *(part for parts in PARTS.values() for part in parts)]
    for name in only:
        if name not in known:
            raise ArgumentError(f'--only has "{name}"; it must be of {", ".join(known)}')
    wanted = {family: [part for part in parts if {family, part} & set(only)] for family, parts in PARTS.items()}
    return {family: parts for family, parts in wanted.items() if parts}


class _Clock:
    """Of a run that may last so many seconds; it says what goes on, and what there is no time for."""

    def __init__(self, limit: float | None, say: Say) -> None:
        self.end, self.say = None if limit is None else time.monotonic() + limit, say

    def left(self) -> float | None:
        return None if self.end is None else max(self.end - time.monotonic(), 0.0)

    def tell(self, rows: Sequence[Row]) -> list[Row]:
        """Says what was measured at once: a run that is ended from outside has said what it had."""
        for row in rows:
            self.say(f"{row.work}, {row.size}, {row.precision}: {percentile(row.ours, 0.5):.4g} {row.unit}")
        return list(rows)

    def has_time_for(self, what: str) -> bool:
        if self.left() == 0:
            self.say(f"{what}: not measured, the time is over")
        return self.left() != 0


def run(options: Options, say: Say) -> list[Row]:
    """Every row. `say` is told what goes on."""
    rows: list[Row] = []
    clock = _Clock(options.limit, say)
    with tempfile.TemporaryDirectory(prefix="diffusionz-bench-", dir=options.scratch) as scratch:
        for family, parts in parts_of(options.only).items():
            if not clock.has_time_for(family):
                continue
            with _model(family, options.model, scratch, say) as folder:
                if folder is None:
                    continue
                measure = _zimage if family == "zimage" else _chronos
                measured, results = measure(folder, options.device, parts, clock)
                for row in measured if _is_released(family, folder) else ():  # the goals are of those sizes
                    row.goal = GOALS.get((row.work, row.size, row.precision))
                if options.peers and clock.has_time_for(f"{family}'s peer"):
                    _peers(family, folder, scratch, measured, results, clock)
                rows += measured
    return rows


def about(device: str) -> dict[str, str]:
    """The machine and the versions, as the columns of a result are called."""
    import importlib.metadata
    import importlib.util
    import platform

    from diffusionz._context import _device_id
    from diffusionz._ffi import check, ffi, lib, text

    info = ffi.new("DiffusionZDeviceInfo *", {"struct_size": ffi.sizeof("DiffusionZDeviceInfo")})
    check(lib.diffusionz_device_info(_device_id(device), info))
    name = text(info.name)
    names = {
        "torch": "torch",
        "diffusers": "diffusers",
        "chronos-forecasting": "chronos",
        "transformers": "transformers",
    }
    versions = [f"python-{platform.python_version()}", f"diffusionz-{text(lib.diffusionz_version())}"]
    for package, module in names.items():
        if importlib.util.find_spec(module):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions.append(f"{package}-{importlib.metadata.version(package)}")
    return {"machine": _short(name), "cpu": name, "versions": " ".join(versions)}


def _short(name: str) -> str:
    """ "nvidia-h100" for "NVIDIA H100 80GB HBM3"."""
    words = [
        word for word in re.findall(r"[a-z0-9]+", name.lower()) if not re.fullmatch(r"\d+gb|hbm\d.*|pcie|sxm\d", word)
    ]
    return "-".join(words)


@contextlib.contextmanager
def _model(family: str, model: str | None, scratch: str, say: Say) -> Iterator[str | None]:
    """The folder of the model to measure; None when `model` is of the other family."""
    import shutil

    from diffusionz.bench import random_models
    from diffusionz.hub import locate

    if model is not None:
        folder = locate(model, family)
        yield folder if is_forecaster(folder) == (family == "chronos2") else None
        return
    folder = os.path.join(scratch, family)
    begin = time.perf_counter()
    (random_models.write_zimage if family == "zimage" else random_models.write_chronos)(folder)
    say(f"{family}: random weights of the released model's size, written in {time.perf_counter() - begin:.1f} s")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def is_forecaster(folder: str) -> bool:
    """Whether a model's folder is one of Chronos-2."""
    return "chronos_config" in _config(folder)


def _is_released(family: str, folder: str) -> bool:
    """Whether a model is of the released models' size."""
    from diffusionz.bench import random_models

    zimage = family == "zimage"
    released = random_models.TRANSFORMER if zimage else random_models.CHRONOS
    config = _config(os.path.join(folder, "transformer") if zimage else folder)
    return all(
        config.get(key) == released[key] for key in (("dim", "n_layers") if zimage else ("d_model", "num_layers"))
    )


def _config(folder: str) -> dict[str, Any]:
    """A component's config.json; {} when it has none."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return dict(json.load(file))
    except OSError:
        return {}


def times_ms(call: Callable[[int], object], runs: int, warm_ups: int) -> list[float]:
    """Of `call(i)`, whose i goes on counting."""
    for i in range(warm_ups):
        call(i)
    values = []
    for i in range(warm_ups, warm_ups + runs):
        begin = time.perf_counter()
        call(i)
        values.append((time.perf_counter() - begin) * 1e3)
    return values


# --- Z-Image ---


def _zimage(folder: str, device: str, parts: Sequence[str], clock: _Clock) -> tuple[list[Row], Any]:
    rows: list[Row] = []
    first: Any = None
    for precision in ZIMAGE_PRECISIONS:
        if not clock.has_time_for(f"zimage, {precision}"):
            break
        begin = time.perf_counter()
        try:
            model = _open_zimage(folder, device, precision)
        except DiffusionzError as error:
            clock.say(f"zimage, {precision}: {error}")
            continue
        load = time.perf_counter() - begin
        with model:
            picture = model.generate(PROMPT, width=512, height=512, steps=STEPS, seed=SEED).pixels
            check_picture(picture)
            first = picture if first is None else first
            if "load" in parts:
                rows += clock.tell([Row("model load", "all weights", precision, "s", [load])])
            if "pictures" in parts:
                rows += clock.tell(picture_rows(model, precision))
            if "webp" in parts and precision == ZIMAGE_PRECISIONS[0] and clock.has_time_for("webp"):
                rows += clock.tell(webp_rows(model, precision))
    for precision in dict.fromkeys(row.precision for row in rows if "load" in parts):
        if not clock.has_time_for(f"zimage, {precision}, process start to first picture"):
            break
        command = [sys.executable, "-m", "diffusionz", "generate", PROMPT, "-q", "--model", folder, "--device", device]
        sizes = ["--width", "1024", "--height", "1024", "--precision", precision]
        with tempfile.TemporaryDirectory() as out:
            begin = time.perf_counter()
            subprocess.run([*command, *sizes, "-o", os.path.join(out, "first.webp")], check=True)
            seconds = time.perf_counter() - begin
        rows += clock.tell([Row("process start to first picture", "1024x1024", precision, "s", [seconds])])
    return rows, first


def _open_zimage(folder: str, device: str, precision: str) -> Any:
    from diffusionz.zimage import ZImage

    return ZImage(folder, device=device, precision=precision)


def check_picture(pixels: Any) -> None:
    """Raises Wrong when a picture shows nothing: NaN becomes one colour, and so does what ran off the scale."""
    if float(pixels.std()) < 2:
        raise Wrong(f"not timed: the picture is of one colour (its pixels deviate by {float(pixels.std()):.2f}/255)")


def picture_rows(model: Any, precision: str, sides: Sequence[int] = SIDES, runs: int = 7) -> list[Row]:
    """Whole pictures and their stages."""
    rows = []
    prompts = itertools.count()  # a known one would not be encoded
    for side in sides:
        timings: list[dict[str, float]] = []

        def draw(i: int, side: int = side, timings: list[dict[str, float]] = timings) -> None:
            picture = model.generate(prompt(next(prompts)), width=side, height=side, steps=STEPS, seed=i)
            timings.append(picture.timings)

        whole = times_ms(draw, runs, warm_ups=3)
        del timings[:3]
        size = f"{side}x{side}"
        rows += [
            Row("picture", size, precision, "ms", whole),
            Row("step", size, precision, "ms", [one["denoise"] / STEPS for one in timings]),
            Row("VAE decode", size, precision, "ms", [one["decode"] for one in timings]),
        ]
        if side == sides[0]:
            rows.append(Row("text encoder", "64 tokens", precision, "ms", [one["text"] for one in timings]))
    return rows


def webp_rows(model: Any, precision: str, side: int = 1024, count: int = 4, rounds: int = 5) -> list[Row]:
    """What encoding adds to a picture alone, and to each further picture of a batch, where the next one's drawing may
    hide it; two steps are enough for that. Random weights draw noise, which takes longest."""
    from diffusionz._ffi import ffi, lib
    from diffusionz.zimage import _Requests

    def milliseconds(format: int, pictures: int) -> float:
        requests = _Requests(pictures)
        requests.fill(width=side, height=side, num_steps=2, format=format, seed=SEED)
        requests.fill(prompt=requests.string("prompt", PROMPT))
        begin = time.perf_counter()
        requests.draw(model._alive(), ffi.NULL)
        return (time.perf_counter() - begin) * 1e3

    def added(pictures: int) -> float:
        webp, rgb = (milliseconds(f, pictures) for f in (lib.DIFFUSIONZ_FORMAT_WEBP, lib.DIFFUSIONZ_FORMAT_RGB))
        return webp - rgb

    added(count)  # warms up
    batches = [(added(2 * count) - added(count)) / count for _ in range(rounds)]
    alone = [added(1) for _ in range(rounds)]
    work = {"a picture alone": alone, "a further picture of a batch": batches}
    return [Row(f"WebP, added to {name}", f"{side}x{side}", precision, "ms", values) for name, values in work.items()]


# --- Chronos-2 ---


def _chronos(folder: str, device: str, parts: Sequence[str], clock: _Clock) -> tuple[list[Row], Any]:
    import numpy

    from diffusionz.chronos2 import Chronos2

    rows: list[Row] = []
    truth: Any = None
    for precision in CHRONOS_PRECISIONS:
        if not clock.has_time_for(f"chronos2, {precision}"):
            break
        try:
            model = Chronos2(folder, device=device, precision=precision)
        except DiffusionzError as error:
            clock.say(f"chronos2, {precision}: {error}")
            continue
        with model:
            found = model.forecast(series(448), HORIZON, None).quantiles
            if not numpy.isfinite(found).all():
                raise Wrong(f"not timed: a forecast in {precision} is not finite")
            truth = found if truth is None else truth
            error_share = float(numpy.abs(found - truth).mean() / truth.std())
            if error_share > _CLOSE:
                raise Wrong(f"not timed: forecasts in {precision} are {error_share:.1%} of their deviation off")
            clock.say(f"chronos2, {precision}: {error_share:.1e} of the forecasts' deviation from float32's")
            if "forecasts" in parts:
                rows += clock.tell(forecast_rows(model, precision))
    return rows, truth


def forecast_rows(
    model: Any, precision: str, counts: Sequence[int] = (1, 448), many: int = STREAM_ROWS, runs: int = 50
) -> list[Row]:
    """From a host array to a host array: by the C ABI, and for one row by Python's method as well."""
    from diffusionz._ffi import check, ffi, lib
    from diffusionz._series import to_rows
    from diffusionz.chronos2 import _Request

    def forecast(count: int) -> Callable[[int], None]:
        rows, _ = to_rows(series(count), HORIZON, HISTORY)
        request = _Request(rows, HORIZON, model.info["quantile_levels"])
        context, out = model._alive(), ffi.new("ChronosForecast *")

        def call(_: int, kept: Any = (rows, request)) -> None:
            check(lib.chronos_forecast(context, request.struct, ffi.NULL, out))
            lib.chronos_free_forecast(out)

        return call

    results = []
    for count in counts:
        values = times_ms(forecast(count), runs if count == 1 else max(runs // 4, 1), warm_ups=5)
        results.append(Row("forecast", f"{count} x {HISTORY} -> {HORIZON}", precision, "ms", values))
    one = series(1)
    by_python = times_ms(lambda _: model.forecast(one, HORIZON, None), runs, warm_ups=5)
    results.append(Row("forecast, by Python", f"1 x {HISTORY} -> {HORIZON}", precision, "ms", by_python))
    if precision not in ("float32", "tf32"):  # those are not what one would take for so many rows
        rates = [many / ms * 1e3 for ms in times_ms(forecast(many), 2, warm_ups=1)]
        results.append(Row("forecast, streamed", f"{many} x {HISTORY} -> {HORIZON}", precision, "rows/s", rates))
    return results


# --- Peers ---


def offer(rows: list[Row], found: dict[str, Any]) -> None:
    """Sets what a peer did beside what we did in the same work."""
    work = {"decode": "VAE decode", "text": "text encoder", "stream": "forecast, streamed"}.get(
        found["work"], found["work"]
    )
    for row in rows:
        if row.work == work and re.split("[ x]", row.size)[0] == str(found["size"]):
            row.offer(found["name"], found["values"])


def _peers(family: str, folder: str, scratch: str, rows: list[Row], ours: Any, clock: _Clock) -> None:
    """Measures the peer in a process of its own, and sets its best times beside ours, whatever its precision: what a
    peer does not have, it cannot be beaten in. When the time is over the process ends, and what it said stays."""
    import importlib.util
    import threading

    import numpy

    say = clock.say
    package = {"zimage": "diffusers", "chronos2": "chronos"}[family]
    if importlib.util.find_spec(package) is None:
        say(f"{family}: no peer, {package} is not installed")
        return
    command = [sys.executable, "-W", "ignore", "-m", "diffusionz.bench.peers", family, folder, scratch]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        left = clock.left()
        timer = None if left is None else threading.Timer(left, process.kill)
        if timer is not None:
            timer.start()
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            found = json.loads(line)
            if "note" in found:
                say(f"{family}: {found['note']}")
                continue
            say(f"{found['name']}: {found['work']} {found['size']}: {percentile(found['values'], 0.5):.4g}")
            offer(rows, found)
        failed = process.wait() != 0
        if timer is not None:
            timer.cancel()
        if failed and clock.has_time_for(f"the rest of {family}'s peer"):
            errors.seek(0)
            say(f"{family}: the peer failed: {' '.join(errors.read()[-600:].split())}")
    kept = os.path.join(scratch, {"zimage": "picture.npy", "chronos2": "forecast.npy"}[family])
    if ours is None or not os.path.exists(kept):
        return
    theirs = numpy.load(kept)
    if family == "zimage":
        alike = float(numpy.corrcoef(theirs.ravel().astype(float), ours.ravel().astype(float))[0, 1])
        off = float(numpy.abs(theirs.astype(int) - ours.astype(int)).mean())
        say(f"parity: our picture and the peer's differ by {off:.2f}/255 in the mean, correlation {alike:.4f}")
        if alike < _ALIKE:
            raise Wrong(f"the times mean nothing: our picture and {package}'s correlate by {alike:.3f} only")
    else:
        off = float(numpy.abs(theirs.reshape(ours.shape) - ours).max() / numpy.abs(theirs).max())
        say(f"parity: our forecasts and the peer's differ by {off:.1e} of the largest value")
        if not off <= 1e-3:
            raise Wrong(f"the times mean nothing: our forecasts differ from {package}'s by {off:.1e}")
