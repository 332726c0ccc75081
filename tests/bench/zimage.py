"""Z-Image beside diffusers on this machine: the same files, the same number of threads, one after the other in turn.

    python -m tests.bench.zimage all --record        every claim; rows go to tests/bench/results/<machine>.csv
    python -m tests.bench.zimage picture --model demo
    python -m tests.bench.zimage all --quick         tiny sizes, one repeat: whether the benchmarks still work

Before anything is timed both sides do the work once, and the results must agree as the parity tests demand: wrong work
is not timed. Needs the installed package and build/tests/stage_probe (make build), and for the claims at full width
12 GB of memory and 4 GB in --scratch.
"""

import json
import pathlib
import sys

import numpy

from tests.bench.harness import Bench, run_claims, run_measured
from tests.bench.record import ROOT, Comparison

PROMPT = "a red circle on a blue background"
PIXELS_BOUND = 2 / 255
STAGE_BOUND = 1e-5  # of the largest value

FULL_TRANSFORMER = {
    "dim": 3840, "n_heads": 30, "n_layers": 1, "n_refiner_layers": 2, "axes_dims": [32, 48, 48], "cap_feat_dim": 2560
}  # fmt: skip
# One layer, which Z-Image does not even run: the width is what the transformer needs.
NARROW_ENCODER = {"hidden_size": 2560, "num_hidden_layers": 1, "intermediate_size": 64}
FLUX_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}


def random_model(bench: Bench, name: str, inputs: dict[str, list[int]], **shape: dict) -> pathlib.Path:
    return bench.write(name, {"shape": shape, "inputs": inputs})


def tiny(bench: Bench) -> pathlib.Path:
    """The model of every claim when it is only asked whether the benchmark works."""
    inputs = {"latents": [1, 16, 8, 8], "features": [20, 32], "latents64": [1, 16, 8, 8]}
    folder = bench.scratch / "tiny"
    return folder if folder.exists() else random_model(bench, "tiny", inputs)


def picture_model(bench: Bench) -> tuple[pathlib.Path, str]:
    """(the folder of the model to draw pictures with, its name)."""
    if bench.args.quick:
        return tiny(bench), "tiny"
    from diffusionz.hub import locate

    return pathlib.Path(locate(bench.args.model, "zimage")), pathlib.Path(bench.args.model).name


def probe(bench: Bench, model: pathlib.Path, stages: list[dict]) -> dict[str, numpy.ndarray]:
    """stage_probe's outputs, and its "peak_mib"."""
    from safetensors.numpy import load_file

    plan, out = bench.scratch / "plan.json", bench.scratch / "out.safetensors"
    inputs = str(model / "inputs.safetensors")
    plan.write_text(json.dumps({"model": str(model), "inputs": inputs, "outputs": str(out), "stages": stages}))
    _, peak_mib = run_measured([ROOT / "build" / "tests" / "stage_probe", plan], bench.environment)
    return load_file(out) | {"peak_mib": numpy.array(peak_mib)}


def check_pixels(ours: numpy.ndarray, peer: numpy.ndarray) -> None:
    error = numpy.abs(ours.astype(int) - peer.astype(int)).max() / 255
    if ours.shape != peer.shape or error > PIXELS_BOUND:
        raise SystemExit(f"not timed: the pictures differ by {error * 255:.0f}/255")
    print(f"parity: pictures within {error * 255:.0f}/255", flush=True)


def check_stage(stage: str, ours: numpy.ndarray, peer: numpy.ndarray) -> None:
    error = numpy.abs(ours - peer).max() / numpy.abs(peer).max()
    if ours.shape != peer.shape or not error <= STAGE_BOUND:
        raise SystemExit(f"not timed: {stage} differs by {error:.1e} of the largest value")
    print(f"parity: {stage} within {error:.1e} of the largest value", flush=True)


# --- The claims -----------------------------------------------------------------------------------------------------


def picture(bench: Bench) -> None:
    """A whole picture by a process that has the model loaded and has drawn before."""
    side, steps = (64, 2) if bench.args.quick else (256, 8)
    model, name = picture_model(bench)
    job = {"work": "picture", "prompt": PROMPT, "width": side, "height": side, "steps": steps, "seed": 7}
    ours, peer = bench.server("ZImage", model), bench.server("diffusers", model)
    check_pixels(ours.result(job, bench.scratch), peer.result(job, bench.scratch))
    seconds = [(ours.run(job), peer.run(job)) for _ in range(bench.args.repeats or 15)]
    size = f"{side}x{side}, {steps} steps"
    bench.report(Comparison(f"picture, warm, {name}", size, *zip(*seconds, strict=True), goal=0.8))


def transformer(bench: Bench) -> None:
    """One call at full width, cut to one main layer: 256 tokens of a picture of 256x256 and 32 of a caption. diffusers
    embeds and refines the caption in every call, we do once a prompt: one row does as diffusers does, one as we do."""
    if bench.args.quick:
        model, size = tiny(bench), "tiny"
    else:
        inputs = {"latents": [1, 16, 32, 32], "features": [32, 2560]}
        shape = {"transformer": FULL_TRANSFORMER, "text_encoder": NARROW_ENCODER}
        model = random_model(bench, "transformer", inputs, **shape)
        size = "dim 3840, blocks 1+2+2, 256x256, 32 caption tokens"
    work = {"latents": "latents", "features": "features", "time": 0.5}
    rounds, calls = (1, 1) if bench.args.quick else (bench.args.repeats or 5, 3)
    peer, job = bench.server("diffusers", model), {"work": "transformer"} | work
    ours = probe(bench, model, [work | {"stage": "transformer", "out": "out"}])
    check_stage("one transformer call", ours["out"], peer.result(job, bench.scratch))
    memory = [float(ours["peak_mib"])], [peer.peak_mib()]  # of a process that loads the model and calls it once
    refined, once, theirs = [], [], []
    for _ in range(rounds):
        stage = work | {"stage": "time", "repeats": calls}
        timed = probe(bench, model, [stage | {"refine": True, "out": "refined"}, stage | {"out": "once"}])
        refined += timed["refined"].tolist()
        once += timed["once"].tolist()
        theirs += [peer.run(job) for _ in range(calls)]
    bench.report(Comparison("transformer call, caption refined in it", size, refined, theirs, goal=0.85))
    bench.report(Comparison("transformer call, caption refined once", size, once, theirs, goal=0.85))
    bench.report(Comparison("peak memory of a process, one transformer call", size, *memory, goal=0.7, unit="MiB"))


def decode(bench: Bench) -> None:
    """The VAE's decoder in Flux' size."""
    sides = [64] if bench.args.quick else [256, 512]
    inputs = {f"latents{side}": [1, 16, side // 8, side // 8] for side in sides}
    model = tiny(bench) if bench.args.quick else random_model(bench, "vae", inputs, vae=FLUX_VAE)
    peer = bench.server("diffusers", model)
    for side in sides:
        work = {"latents": f"latents{side}"}
        job = {"work": "decode"} | work
        ours = probe(bench, model, [{"stage": "decode", "out": "out"} | work])["out"]
        check_stage(f"decode {side}x{side}", ours, peer.result(job, bench.scratch))
        rounds, calls = (1, 1) if bench.args.quick else (bench.args.repeats or 3, 2)
        mine, theirs = [], []
        for _ in range(rounds):
            stage = {"stage": "time_decode", "repeats": calls, "out": "seconds"} | work
            mine += probe(bench, model, [stage])["seconds"].tolist()
            theirs += [peer.run(job) for _ in range(calls)]
        bench.report(Comparison("VAE decode", f"{side}x{side}", mine, theirs, goal=0.85))


DIFFUSERS_SCRIPT = f"""
import sys, torch
from diffusers import ZImagePipeline
model, out, side, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pipe = ZImagePipeline.from_pretrained(model, dtype=torch.float32)
generator = torch.Generator("cpu").manual_seed(7)
options = {{"num_inference_steps": steps, "guidance_scale": 0.0, "generator": generator}}
pipe({PROMPT!r}, width=side, height=side, **options).images[0].save(out)
"""


def cli(bench: Bench) -> None:
    """From the start of a process to the written file: the command line beside the shortest diffusers script. And the
    most memory that either process held."""
    from PIL import Image

    side, steps = (64, 2) if bench.args.quick else (256, 8)
    model, name = picture_model(bench)
    files = bench.scratch / "ours.png", bench.scratch / "peer.png"
    program = pathlib.Path(sys.executable).with_name("diffusionz")
    ours = [
        program, "generate", PROMPT, "-o", files[0], "--model", model, "--width", side, "--height", side,
        "--steps", steps, "--seed", 7, "--device", "cpu", "--quiet",
    ]  # fmt: skip
    peer = [sys.executable, "-c", DIFFUSERS_SCRIPT, model, files[1], side, steps]
    # The first runs also read the files into the page cache, for both.
    measured = [(run_measured(ours, bench.environment), run_measured(peer, bench.environment))]
    check_pixels(*(numpy.array(Image.open(file)) for file in files))
    if not bench.args.quick:
        measured = [
            (run_measured(ours, bench.environment), run_measured(peer, bench.environment))
            for _ in range(bench.args.repeats or 7)
        ]
    size = f"{side}x{side}, {steps} steps"
    works = [("process start to file", 0.35, "s"), ("peak memory of a process", 0.7, "MiB")]
    for i, (work, goal, unit) in enumerate(works):
        values = [(a[i], b[i]) for a, b in measured]
        bench.report(Comparison(f"{work}, {name}", size, *zip(*values, strict=True), goal=goal, unit=unit))


CLAIMS = {"picture": picture, "transformer": transformer, "decode": decode, "cli": cli}


def main(argv: list[str] | None = None) -> list[Comparison]:
    return run_claims(CLAIMS, __doc__, "tests.bench.zimage", argv)


if __name__ == "__main__":
    main()
