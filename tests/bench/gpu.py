"""Where a GPU's time goes: what `diffusionz bench --gpu` has no place for, and the results that are kept.

On the machine with the GPU (SCRATCH holds the random models, which are written when they are not there):

    python -m tests.bench.gpu table OUT.json --scratch SCRATCH [--peers] [--only zimage,chronos2] [--limit SECONDS]
    python -m tests.bench.gpu profile OUT.json --scratch SCRATCH     where the milliseconds of a step go, by kernel
    python -m tests.bench.gpu ablation OUT.json --scratch SCRATCH    each kernel replaced by its reference, alone
    python -m tests.bench.gpu devices OUT.json --scratch SCRATCH     a batch on all devices beside one of them
    python -m tests.bench.gpu accuracy OUT.json WINDOWS.npz          MASE and WQL of a precision, the bundled model
    python -m tests.bench.gpu quality OUT.json                       pictures of a precision, the bundled model
    python -m tests.bench.gpu webp OUT.json FILE...                  lossy WebP of pictures, by their names

In the repository, with its history:

    python -m tests.bench.gpu keep OUT.json...                       rows to results/<gpu>.csv, <gpu>-profile.csv
"""

import argparse
import csv
import dataclasses
import datetime
import json
import os
import pathlib
import re
import sys
import time

from tests.bench import record

ROOT = record.ROOT
SIDES = (1024, 512)
KERNEL_CALL = re.compile(r'kernel_disabled\("(\w+)"\)')
CPU_ONLY = {"linear", "invariant_linear"}  # names that choose how the CPU multiplies
PROFILE_COLUMNS = [
    "date", "commit", "machine", "versions", "work", "kind", "kernel", "launches", "ms", "share", "rate", "floor_ms",
]  # fmt: skip


def ensure_model(scratch: pathlib.Path, family: str) -> str:
    """The folder of a model of random weights at full size."""
    from diffusionz.bench import random_models

    zimage = family == "zimage"
    folder = scratch / ("full" if zimage else "chronos2")
    if not (folder / "complete").exists():
        (random_models.write_zimage if zimage else random_models.write_chronos)(str(folder))
        (folder / "complete").touch()
    return str(folder)


def save(path: str, kind: str, device: str = "cuda:0", **values) -> None:
    from diffusionz.bench import gpu

    pathlib.Path(path).write_text(json.dumps({"kind": kind, "about": gpu.about(device)} | values, indent=1))


# --- The table ---


def table(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    from diffusionz.bench import gpu
    from diffusionz.bench.table import as_table

    rows = []
    for family, parts in gpu.parts_of(args.only.split(",")).items():
        limit = None if args.limit is None else args.limit - (time.monotonic() - begin)
        options = gpu.Options(
            only=parts,
            model=ensure_model(args.scratch, family),
            peers=args.peers,
            limit=limit,
            scratch=str(args.scratch),
        )
        rows += gpu.run(options, lambda text: print(text, flush=True))
        print(as_table(rows), flush=True)
        save(args.out, "table", rows=[dataclasses.asdict(row) for row in rows])


# --- The profile ---

KINDS = [  # the first that matches
    ("attention", r"fmha|flash|sdpa|attention|softmax"),
    ("convolution", r"fprop|conv|implicit|upsample|winograd"),
    ("matrix product", r"gemm|nvjet|cutlass|wgmma|xmma|gemv|split_?k|cublas|few_rows_linear"),
    ("between products", r"diffusionz"),
    ("copy, fill", r"memcpy|memset|copy"),
]


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "ATen")


def short(kernel: str) -> str:
    """A kernel's name without namespaces, return type and arguments, at most 90 characters."""
    name = re.sub(r"\(anonymous namespace\)::|^void |at::native::|diffusionz::kernels::|c10::|std::", "", kernel)
    return name.split("(")[0][:90]


def kernels_of(call) -> dict[str, tuple[int, float]]:
    """kernel -> (launches, ms) of one call."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profiled.key_averages():
        if event.self_device_time_total > 0:
            launches, ms = found.get(event.key, (0, 0.0))
            found[event.key] = (launches + event.count, ms + event.self_device_time_total / 1e3)
    return found


def step_flops(side: int) -> tuple[float, float]:
    """(of the matrix products, of the attention) in one transformer step with 64 tokens of caption."""
    from diffusionz.bench.random_models import TRANSFORMER

    dim, layers, refiners = TRANSFORMER["dim"], TRANSFORMER["n_layers"], TRANSFORMER["n_refiner_layers"]
    picture = (side // 16) ** 2
    tokens = picture + 64
    per_token = 2 * (4 * dim * dim + 3 * dim * (dim // 3 * 8))
    products = per_token * (layers * tokens + refiners * picture)
    attention = 4 * dim * (layers * tokens**2 + refiners * picture**2)
    return products, attention


def between_bytes(side: int) -> float:
    """What the passes between a step's products must move: in each block norm, rotary embedding in place, residual,
    norm, SiLU gate and residual, all in bfloat16, each input read once and each output written once."""
    from diffusionz.bench.random_models import TRANSFORMER

    dim = TRANSFORMER["dim"]
    tokens = (TRANSFORMER["n_layers"] * ((side // 16) ** 2 + 64)) + TRANSFORMER["n_refiner_layers"] * (side // 16) ** 2
    return 2 * tokens * ((2 + 4 + 3 + 2 + 3) * dim + 3 * (dim // 3 * 8))


def library_rates() -> dict[str, float]:
    """What the library reaches here: TFLOP/s of bfloat16 and FP8 products and of attention, GB/s of a copy."""
    import torch
    import torch.nn.functional as functional

    from diffusionz.bench.peers import event_ms

    def median(call) -> float:
        return record.percentile(event_ms(call, runs=15), 0.5)

    rates, work, times = {}, 0.0, {"bf16": 0.0, "fp8": 0.0}
    for inputs, outputs in ((3840, 11520), (3840, 3840), (3840, 20480), (10240, 3840)):
        x = torch.randn(4160, inputs, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        work += 2 * 4160 * inputs * outputs
        times["bf16"] += median(lambda x=x, w=w: functional.linear(x, w))
        if torch.cuda.get_device_capability() >= (8, 9):
            x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
            sx, sw = torch.ones(4160, 1, device="cuda"), torch.ones(1, outputs, device="cuda")
            times["fp8"] += median(
                lambda a=x8, b=w8, c=sx, d=sw: torch._scaled_mm(
                    a, b.t(), c, d, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            )
    rates |= {name: work / ms / 1e9 for name, ms in times.items() if ms}
    q, k, v = (torch.randn(1, 30, 4160, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        rates["attention"] = 4 * 4160**2 * 3840 / median(lambda: functional.scaled_dot_product_attention(q, k, v)) / 1e9
    x = torch.empty(2**30, device="cuda", dtype=torch.int8).random_()
    y = torch.empty_like(x)
    rates["copy"] = 2 * x.numel() / median(lambda: y.copy_(x)) / 1e6
    return rates


def profile(args: argparse.Namespace) -> None:
    import torch  # noqa: F401  before the library, so that both have one LibTorch, whose profiler sees all

    from diffusionz import ZImage
    from diffusionz._errors import DiffusionzError
    from diffusionz.bench.work import PROMPT, prompt

    folder = ensure_model(args.scratch, "zimage")
    rates = library_rates()
    print({name: round(value) for name, value in rates.items()}, flush=True)
    rows = []
    for precision in args.precisions.split(","):
        try:
            model = ZImage(folder, device="cuda:0", precision=precision)
        except DiffusionzError as error:
            print(f"{precision}: {error}", flush=True)
            continue
        with model:
            for side in SIDES:

                def draw(steps: int, text: str = PROMPT, side: int = side, model=model) -> dict[str, float]:
                    return model.generate(text, width=side, height=side, steps=steps, seed=1).timings

                for i in range(4):
                    draw(2, prompt(i))
                draw(1)
                wall = draw(8)["denoise"] / 8
                few, many = kernels_of(lambda: draw(1)), kernels_of(lambda: draw(5))
                step = {}
                for name, (launches, ms) in many.items():
                    before = few.get(name, (0, 0.0))
                    if launches > before[0]:
                        step[name] = ((launches - before[0]) / 4, (ms - before[1]) / 4)
                # A new prompt runs the text encoder, a known one does not. One step's share is taken out again.
                rest = {
                    name: (n - step.get(name, (0, 0))[0], ms - step.get(name, (0, 0))[1])
                    for name, (n, ms) in few.items()
                }
                new = kernels_of(lambda side=side: draw(1, prompt(side)))
                text = {
                    name: (n - few.get(name, (0, 0))[0], ms - few.get(name, (0, 0))[1]) for name, (n, ms) in new.items()
                }
                products, attention = step_flops(side)
                floors = {
                    "matrix product": (products / 1e9, rates["fp8" if precision == "fp8" else "bf16"], "TFLOP/s"),
                    "attention": (attention / 1e9, rates["attention"], "TFLOP/s"),
                    "between products": (between_bytes(side) / 1e6, rates["copy"], "GB/s"),
                }
                rows += listing(f"step {side}x{side}, {precision}", step, wall, floors)
                rows += listing(f"VAE decode and caption refiner {side}x{side}, {precision}", rest, None, {})
                if side == SIDES[0]:
                    rows += listing(f"text encoder 64 tokens, {precision}", text, None, {})
            save(args.out, "profile", rows=rows, rates=rates)


def listing(work: str, kernels: dict[str, tuple[float, float]], wall: float | None, floors: dict) -> list[dict]:
    """The rows of one piece of work, printed too: first a line a kind, then the kernels that matter."""
    kernels = {name: (n, ms) for name, (n, ms) in kernels.items() if n > 0.2 and ms > 0}
    total = sum(ms for _, ms in kernels.values())
    if not kernels:
        return []
    print(f"{work}: {total:.3f} ms of kernels, {sum(n for n, _ in kernels.values()):.0f} launches", end="")
    print(f", {wall:.3f} ms in all" if wall else "", flush=True)
    kinds: dict[str, tuple[float, float]] = {}
    for name, (n, ms) in kernels.items():
        before = kinds.get(kind_of(name), (0.0, 0.0))
        kinds[kind_of(name)] = (before[0] + n, before[1] + ms)
    if wall:
        kinds["between kernels"] = (0, max(wall - total, 0.0))
    rows = []

    def add(kind: str, kernel: str, n: float, ms: float, rate: str = "", floor: str = "") -> None:
        share = f"{ms / (wall or total):.4f}"
        rows.append(
            {"work": work, "kind": kind, "kernel": kernel, "launches": f"{n:.0f}", "ms": f"{ms:.4g}", "share": share,
             "rate": rate, "floor_ms": floor}
        )  # fmt: skip
        print(
            f"  {ms:8.3f} ms {float(share):6.1%} {n:5.0f}x  {kind + ': ' + kernel if kernel else kind} {rate} {floor}"
        )

    for kind, (n, ms) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        if kind in floors:
            work_done, rate, unit = floors[kind]
            add(kind, "", n, ms, f"{work_done / ms:.0f} {unit}", f"{work_done / rate:.4g}")
        else:
            add(kind, "", n, ms)
    for name, (n, ms) in sorted(kernels.items(), key=lambda item: -item[1][1])[:24]:
        if ms > 0.002 * total:
            add(kind_of(name), short(name), n, ms)
    return rows


# --- The ablation ---


def kernel_names() -> list[str]:
    """What DIFFUSIONZ_DISABLE_KERNELS understands on a GPU, read off the sources."""
    names = {
        name for path in (ROOT / "diffusionz" / "src").rglob("*.cc") for name in KERNEL_CALL.findall(path.read_text())
    }
    return sorted(names - CPU_ONLY)


def thin_model(scratch: pathlib.Path) -> str:
    """Full width, few blocks: what a kernel costs in a block, in a process that starts in seconds."""
    from diffusionz.bench import random_models

    folder = scratch / "thin"
    if not (folder / "complete").exists():
        random_models.write_zimage(
            str(folder),
            random_models.TRANSFORMER | {"n_layers": 6, "n_refiner_layers": 1},
            random_models.TEXT_ENCODER | {"num_hidden_layers": 4, "vocab_size": 1024},
        )
        (folder / "complete").touch()
    return str(folder)


def measure_works(folders: dict[str, str], runs: int) -> dict[str, list[float]]:
    """The work that kernels are left out of -> ms. Models are opened afresh: what a graph has recorded stays in it."""
    from diffusionz import Chronos2, ZImage
    from diffusionz._errors import DiffusionzError
    from diffusionz.bench import gpu

    found: dict[str, list[float]] = {}

    def keep(rows, works: set[str]) -> None:
        found.update({f"{row.work} {row.size}, {row.precision}": row.ours for row in rows if row.work in works})

    for precision in ("bfloat16", "fp8"):
        try:
            with ZImage(folders["zimage"], device="cuda:0", precision=precision) as model:
                rows = gpu.picture_rows(model, precision, runs=runs)
        except DiffusionzError as error:
            print(f"{precision}: {error}", file=sys.stderr)
            continue
        keep(rows, {"step", "VAE decode", "text encoder"} if precision == "bfloat16" else {"step"})
    with Chronos2(folders["chronos2"], device="cuda:0", precision="float16") as model:
        keep(gpu.forecast_rows(model, "float16", runs=8 * runs, many=448), {"forecast"})
    return found


def ablation(args: argparse.Namespace) -> None:
    """In one process: which kernels are off is asked when work is recorded."""
    from diffusionz._errors import DiffusionzError

    folders = {"zimage": thin_model(args.scratch), "chronos2": ensure_model(args.scratch, "chronos2")}

    def measured(disabled: str) -> dict[str, list[float]]:
        os.environ["DIFFUSIONZ_DISABLE_KERNELS"] = disabled
        try:
            return measure_works(folders, runs=3)
        except DiffusionzError as error:
            print(f"without {disabled or 'nothing'}: {error}", flush=True)
            return {}
        finally:
            del os.environ["DIFFUSIONZ_DISABLE_KERNELS"]

    measured("")  # what a process measures first is slower
    everything = measured("")
    names = [name for name in kernel_names() if not args.kernels or name in args.kernels.split(",")]
    rows = []
    for name in names:
        line = []
        for work, values in measured(name).items():
            if work not in everything:
                continue
            rows.append({"kernel": name, "work": work, "with": everything[work], "without": values})
            ratio = record.percentile(values, 0.5) / record.percentile(everything[work], 0.5)
            if not 0.98 < ratio < 1.02:
                line.append(f"{work} {ratio:.2f}x")
        print(f"without {name}: " + ("; ".join(line) or "within 2 %"), flush=True)
        save(args.out, "ablation", rows=rows)
    print("with all: " + "; ".join(f"{work} {record.percentile(v, 0.5):.3g}" for work, v in everything.items()))


# --- Several devices ---


def devices(args: argparse.Namespace) -> None:
    """A batch on one device and on all of them, the same pictures."""
    from diffusionz import ZImage
    from diffusionz._ffi import lib
    from diffusionz.bench import gpu
    from diffusionz.bench.table import Row, as_table
    from diffusionz.bench.work import STEPS, prompt

    count = lib.diffusionz_device_count()
    if count < 2:
        sys.exit("there is one device here: nothing to spread a batch over")
    folder, side, pictures = ensure_model(args.scratch, "zimage"), 1024, 8 * count
    names, rows = [f"cuda:{i}" for i in range(count)], []
    prompts, size = [prompt(n) for n in range(pictures)], {"width": side, "height": side}
    for precision in args.precisions.split(","):
        rates, drawn = [], []
        for used in (names[:1], names):
            images: list = []
            with ZImage(folder, device=used, precision=precision) as model:

                def draw(i: int, model=model, images=images) -> None:
                    images[:] = model.generate_batch(prompts, **size, steps=STEPS, seed=i, progress=False)

                rates.append([pictures / ms * 1e3 for ms in gpu.times_ms(draw, runs=3, warm_ups=1)])
            drawn.append(images)
        for one, several in zip(*drawn, strict=True):
            assert (one.pixels == several.pixels).all(), "several devices draw another picture than one"
        alone, together = rates
        work, name = f"batch of {pictures} pictures on {count} devices", "one of the devices"
        rows.append(Row(work, f"{side}x{side}", precision, "pictures/s", together, None, alone, name))
        print(as_table(rows), flush=True)
    save(args.out, "table", rows=[dataclasses.asdict(row) for row in rows], several=count)


# --- Accuracy ---


def accuracy(args: argparse.Namespace) -> None:
    """The windows are those of tests/bench/forecast_quality.py, exported."""
    from diffusionz import Chronos2
    from diffusionz._errors import DiffusionzError
    from tests.bench import forecast_metrics
    from tests.bench.forecast_quality import _by_schema

    windows = forecast_metrics.load(args.windows)
    naive = forecast_metrics.score(windows, forecast_metrics.seasonal_naive(windows))
    rows: list[dict] = []
    for precision in ("float32", "tf32", "float16", "bfloat16"):
        try:
            engine = Chronos2(args.model, device=args.device, precision=precision)
        except DiffusionzError as error:
            print(f"{precision}: {error}", flush=True)
            continue
        with engine:
            forecasts: list = [None] * len(windows)
            for indices in _by_schema(windows, covariates=False):
                horizon = len(windows[indices[0]].future)
                found = engine.forecast([windows[i].history for i in indices], horizon, list(forecast_metrics.LEVELS))
                for i, quantiles in zip(indices, found.quantiles, strict=True):
                    forecasts[i] = quantiles
        summary = forecast_metrics.summary(forecast_metrics.score(windows, forecasts), naive)
        rows.append({"precision": precision, "mase": summary.mase, "wql": summary.wql, "windows": len(windows)})
        change = [rows[-1][name] / rows[0][name] - 1 for name in ("mase", "wql")]
        print(f"{precision:10s} MASE {summary.mase:.5f} ({change[0]:+.4%})  WQL {summary.wql:.5f} ({change[1]:+.4%})")
    save(args.out, "accuracy", args.device, rows=rows)


def quality(args: argparse.Namespace) -> None:
    from diffusionz._errors import DiffusionzError
    from diffusionz.bench import quality as measures

    result: dict = {}
    try:
        result["rows"] = measures.compare_pictures(
            args.model,
            args.precision,
            args.device,
            args.pictures,
            None,
            args.sheet,
            lambda text: print(text, flush=True),
        )
        print(measures.pictures_table(result["rows"]))
        print(measures.gate_table(measures.gate(result["rows"], args.precision)))
        result["layers"] = measures.compare_layers(args.model, args.precision, args.device, None, lambda text: None)
        print(measures.layers_table(result["layers"]))
    except DiffusionzError as error:
        print(error)
    save(args.out, "quality", args.device, **result)


# --- WebP ---


def webp(args: argparse.Namespace) -> None:
    """A picture's encoding, apart from its drawing: how long it takes depends on what there is to see."""
    from diffusionz.bench import gpu
    from diffusionz.bench.table import Row, as_table
    from diffusionz.image import Image, to_rgb

    rows = []
    for file in args.files:
        pixels, width, height = to_rgb(file)
        picture = Image(bytearray(pixels), width, height, seed=0, timings={}, metadata_json="")
        times = gpu.times_ms(lambda _, picture=picture: picture.encode(quality=90), runs=20, warm_ups=3)
        name = f"{pathlib.Path(file).stem.replace('-', ' ')}, {len(picture.encode(quality=90)) / 1e3:.0f} kB"
        rows.append(Row(f"WebP of a picture: {name}", f"{width}x{height}", "quality 90", "ms", times))
    print(as_table(rows), flush=True)
    save(args.out, "table", rows=[dataclasses.asdict(row) for row in rows])


# --- Keeping ---


def keep(args: argparse.Namespace) -> None:
    from diffusionz.bench import gpu
    from diffusionz.bench.table import Row, write_csv

    peers = [json.loads(line) for line in pathlib.Path(args.peers).read_text().splitlines()] if args.peers else []
    for path in args.files:
        found = json.loads(pathlib.Path(path).read_text())
        about = found["about"] | {"commit": args.commit or record.commit()}
        if "several" in found:
            about["machine"] += f"-x{found['several']}"
        file = record.RESULTS / f"{about['machine']}.csv"
        rows: list[Row] = []
        if found["kind"] == "table":
            rows = [Row(**row) for row in found["rows"]]
            for peer in peers:
                gpu.offer(rows, peer)
        elif found["kind"] == "ablation":
            for row in found["rows"]:
                work, precision = row["work"].rsplit(", ", 1)
                size = "full size" if work.startswith("forecast") else THIN
                name = f"without {row['kernel']}"
                rows.append(Row(f"ablation: {work}", size, precision, "ms", row["with"], None, row["without"], name))
        elif found["kind"] == "accuracy":
            truth = found["rows"][0]
            for row in found["rows"][1:]:
                for metric in ("mase", "wql"):
                    change = 100 * abs(row[metric] / truth[metric] - 1)
                    work, size = f"{metric.upper()} off float32's, demo model", f"{row['windows']} windows"
                    rows.append(Row(work, size, row["precision"], "%", [change], 0.1))
        elif found["kind"] == "quality":
            for row in found["rows"]:
                units = {"off_mean": "/255", "ssim_mean": "SSIM", "psnr_mean": "dB", "psnr_worst": "dB, worst"}
                for metric, unit in (units | {"distance_mean": "distance", "judged_alike": "judged alike"}).items():
                    rows.append(
                        Row(f"pictures beside {row['reference']}'s, demo model", "256x256, 8 steps", row["precision"],
                            unit, [row[metric]])
                    )  # fmt: skip
        elif found["kind"] == "profile":
            keep_profile(record.RESULTS / f"{about['machine']}-profile.csv", found, about)
        if rows:
            write_csv(str(file), rows, about)
        print(f"{path}: {len(rows) or len(found['rows'])} rows")


THIN = "full width, 6 of 30 blocks"


def keep_profile(path: pathlib.Path, found: dict, about: dict[str, str]) -> None:
    """The last profile: work that was profiled again replaces what was there."""
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            fresh = {row["work"] for row in found["rows"]}
            rows = [row for row in csv.DictReader(file) if row["work"] not in fresh]
    head = {"date": datetime.date.today().isoformat()} | {
        name: about[name] for name in ("commit", "machine", "versions")
    }
    rows += [head | row for row in found["rows"]]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, PROFILE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def command(name: str, run) -> argparse.ArgumentParser:
        one = commands.add_parser(name)
        one.set_defaults(run=run)
        return one

    for name, run in (("table", table), ("profile", profile), ("ablation", ablation), ("devices", devices)):
        one = command(name, run)
        one.add_argument("out")
        one.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("/tmp/diffusionz-bench"))
        one.add_argument("--only", default="zimage,chronos2", help="table: families")
        one.add_argument("--peers", action="store_true", help="table: measure them too")
        one.add_argument("--limit", type=float, help="table: seconds after which nothing more is begun")
        one.add_argument("--precisions", default="bfloat16,fp8", help="profile, devices")
        one.add_argument("--kernels", default="", help="ablation: names; default: all")
    one = command("accuracy", accuracy)
    one.add_argument("out")
    one.add_argument("windows")
    one.add_argument("--model", default="demo")
    one.add_argument("--device", default="cuda:0")
    one = command("quality", quality)
    one.add_argument("out")
    one.add_argument("--model", default="demo")
    one.add_argument("--device", default="cuda:0")
    one.add_argument("--precision", default="fp8")
    one.add_argument("--pictures", type=int, default=16)
    one.add_argument("--sheet")
    one = command("webp", webp)
    one.add_argument("out")
    one.add_argument("files", nargs="+")
    one = command("keep", keep)
    one.add_argument("files", nargs="+")
    one.add_argument("--peers", help="lines that diffusionz.bench.peers printed on the same machine, when it ran alone")
    one.add_argument("--commit", help="where the figures were made from another commit than this one")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
