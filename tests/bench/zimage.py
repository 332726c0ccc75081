"""Z-Image beside diffusers on this machine: the same files, the same number of threads, one after the other in turn.

    python -m tests.bench.zimage all --record        every claim; rows go to tests/bench/results/<machine>.csv
    python -m tests.bench.zimage picture --model demo
    python -m tests.bench.zimage all --quick         tiny sizes, one repeat: whether the benchmarks still work

Before anything is timed both sides do the work once, and the results must agree as the parity tests demand: wrong work
is not timed. Needs the installed package and build/tests/stage_probe (make build), and for the claims at full width
12 GB of memory and 4 GB in --scratch.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy

from tests.bench.record import ROOT, Comparison, about, keep

PROMPT = "a red circle on a blue background"
PIXELS_BOUND = 2 / 255
STAGE_BOUND = 1e-5  # of the largest value

FULL_TRANSFORMER = {
    "dim": 3840, "n_heads": 30, "n_layers": 1, "n_refiner_layers": 2, "axes_dims": [32, 48, 48], "cap_feat_dim": 2560
}  # fmt: skip
# One layer, which Z-Image does not even run: the width is what the transformer needs.
NARROW_ENCODER = {"hidden_size": 2560, "num_hidden_layers": 1, "intermediate_size": 64}
FLUX_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}


class Bench:
    def __init__(self, args: argparse.Namespace, scratch: pathlib.Path) -> None:
        self.args, self.scratch = args, scratch
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        self.comparisons: list[Comparison] = []
        self.servers: dict[tuple[str, pathlib.Path], Server] = {}

    def report(self, comparison: Comparison) -> None:
        self.comparisons.append(comparison)
        print(comparison.line(), flush=True)
        if self.args.record:
            keep(comparison, self.args.threads)

    def random_model(self, name: str, inputs: dict[str, list[int]], **shape: dict) -> pathlib.Path:
        """Draws a checkpoint in a process of its own: this one stays small."""
        (self.scratch / f"{name}.json").write_text(json.dumps({"shape": shape, "inputs": inputs}))
        command = [
            sys.executable,
            "-m",
            "tests.bench.workers",
            "write",
            self.scratch / name,
            self.scratch / f"{name}.json",
        ]
        subprocess.run(command, cwd=ROOT, env=self.environment, check=True, capture_output=True)
        return self.scratch / name

    def tiny(self) -> pathlib.Path:
        """The model of every claim when it is only asked whether the benchmark works."""
        inputs = {"latents": [1, 16, 8, 8], "features": [20, 32], "latents64": [1, 16, 8, 8]}
        folder = self.scratch / "tiny"
        return folder if folder.exists() else self.random_model("tiny", inputs)

    def picture_model(self) -> tuple[pathlib.Path, str]:
        """(the folder of the model to draw pictures with, its name)."""
        if self.args.quick:
            return self.tiny(), "tiny"
        from diffusionz.hub import locate

        return pathlib.Path(locate(self.args.model)), pathlib.Path(self.args.model).name

    def server(self, side: str, model: pathlib.Path) -> "Server":
        if (side, model) not in self.servers:
            self.servers[side, model] = Server(side, model, self.environment)
        return self.servers[side, model]

    def release(self) -> None:
        """Ends the servers and removes what was drawn."""
        for server in self.servers.values():
            server.close()
        self.servers.clear()
        for path in self.scratch.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def probe(self, model: pathlib.Path, stages: list[dict]) -> dict[str, numpy.ndarray]:
        """stage_probe's outputs, and its "peak_mib"."""
        from safetensors.numpy import load_file

        plan, out = self.scratch / "plan.json", self.scratch / "out.safetensors"
        inputs = str(model / "inputs.safetensors")
        plan.write_text(json.dumps({"model": str(model), "inputs": inputs, "outputs": str(out), "stages": stages}))
        _, peak_mib = run_measured([ROOT / "build" / "tests" / "stage_probe", plan], self.environment)
        return load_file(out) | {"peak_mib": numpy.array(peak_mib)}


class Server:
    """One process of workers.py."""

    def __init__(self, side: str, model: pathlib.Path, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.bench.workers", "serve", side, model]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} left with {self.process.wait()}")
        return line.strip()

    def run(self, job: dict) -> float:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def result(self, job: dict, scratch: pathlib.Path) -> numpy.ndarray:
        self.run(job | {"save": str(scratch / "result.npy")})
        return numpy.load(scratch / "result.npy")

    def peak_mib(self) -> float:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def run_measured(command: list[object], environment: dict[str, str]) -> tuple[float, float]:
    """(seconds from the start to the end of a process, its peak memory in MiB). This process has no torch in it: a
    child's peak counts what its parent held when it was started."""
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command[0]} left with {process.returncode}: {errors.read()[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


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
    model, name = bench.picture_model()
    job = {"work": "picture", "prompt": PROMPT, "width": side, "height": side, "steps": steps, "seed": 7}
    ours, peer = bench.server("diffusionz", model), bench.server("diffusers", model)
    check_pixels(ours.result(job, bench.scratch), peer.result(job, bench.scratch))
    seconds = [(ours.run(job), peer.run(job)) for _ in range(bench.args.repeats or 15)]
    size = f"{side}x{side}, {steps} steps"
    bench.report(Comparison(f"picture, warm, {name}", size, *zip(*seconds, strict=True), goal=0.8))


def transformer(bench: Bench) -> None:
    """One call at full width, cut to one main layer: 256 tokens of a picture of 256x256 and 32 of a caption. diffusers
    embeds and refines the caption in every call, we do once a prompt: one row does as diffusers does, one as we do."""
    if bench.args.quick:
        model, size = bench.tiny(), "tiny"
    else:
        inputs = {"latents": [1, 16, 32, 32], "features": [32, 2560]}
        shape = {"transformer": FULL_TRANSFORMER, "text_encoder": NARROW_ENCODER}
        model = bench.random_model("transformer", inputs, **shape)
        size = "dim 3840, blocks 1+2+2, 256x256, 32 caption tokens"
    work = {"latents": "latents", "features": "features", "time": 0.5}
    rounds, calls = (1, 1) if bench.args.quick else (bench.args.repeats or 5, 3)
    peer, job = bench.server("diffusers", model), {"work": "transformer"} | work
    ours = bench.probe(model, [work | {"stage": "transformer", "out": "out"}])
    check_stage("one transformer call", ours["out"], peer.result(job, bench.scratch))
    memory = [float(ours["peak_mib"])], [peer.peak_mib()]  # of a process that loads the model and calls it once
    refined, once, theirs = [], [], []
    for _ in range(rounds):
        stage = work | {"stage": "time", "repeats": calls}
        timed = bench.probe(model, [stage | {"refine": True, "out": "refined"}, stage | {"out": "once"}])
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
    model = bench.tiny() if bench.args.quick else bench.random_model("vae", inputs, vae=FLUX_VAE)
    peer = bench.server("diffusers", model)
    for side in sides:
        work = {"latents": f"latents{side}"}
        job = {"work": "decode"} | work
        ours = bench.probe(model, [{"stage": "decode", "out": "out"} | work])["out"]
        check_stage(f"decode {side}x{side}", ours, peer.result(job, bench.scratch))
        rounds, calls = (1, 1) if bench.args.quick else (bench.args.repeats or 3, 2)
        mine, theirs = [], []
        for _ in range(rounds):
            stage = {"stage": "time_decode", "repeats": calls, "out": "seconds"} | work
            mine += bench.probe(model, [stage])["seconds"].tolist()
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
    model, name = bench.picture_model()
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
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.zimage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "claims", nargs="+", metavar="CLAIM", choices=["all", *CLAIMS], help=f"all, {', '.join(CLAIMS)}"
    )
    parser.add_argument("--model", default="demo", help="for picture and cli: a folder or a bundled model's name")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--repeats", type=int, help="rounds of a claim; default: enough for its spread")
    parser.add_argument("--quick", action="store_true", help="tiny random models, one repeat")
    parser.add_argument("--record", action="store_true", help="append rows to tests/bench/results/")
    parser.add_argument("--scratch", help="where full-width checkpoints are written for the while; default: /tmp")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 1
    print(about(args.threads), flush=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        bench = Bench(args, pathlib.Path(scratch))
        try:
            for name in CLAIMS if "all" in args.claims else args.claims:
                CLAIMS[name](bench)
                if not args.quick:  # there every claim uses the same small model
                    bench.release()
        finally:
            bench.release()
    return bench.comparisons


if __name__ == "__main__":
    main()
