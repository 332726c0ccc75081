"""The processes that do the work: torch and its memory are theirs, not the driver's.

    python -m tests.bench.workers write FOLDER SHAPE.json      draws a random checkpoint, and inputs.safetensors in it
    python -m tests.bench.workers serve diffusers|ZImage|chronos-forecasting|Chronos2 FOLDER

A server reads one job a line from stdin, {"work": ..., "save": FILE.npy or null, ...}, does it, and writes its seconds.
"""

import json
import os
import pathlib
import sys
import time


def write(folder: pathlib.Path, shape_file: pathlib.Path) -> None:
    wanted = json.loads(shape_file.read_text())
    if wanted.get("family") == "chronos2":
        from tests.models.random_chronos import Shape as ChronosShape
        from tests.models.random_chronos import write_model as write_chronos

        write_chronos(ChronosShape(**wanted["shape"]), folder)
        return
    import torch
    from safetensors.torch import save_file

    from tests.models.random_models import Shape, write_model

    write_model(Shape(seed=1, **wanted["shape"]), folder)
    generator = torch.Generator().manual_seed(2)
    inputs = {name: torch.randn(*size, generator=generator) for name, size in wanted["inputs"].items()}
    save_file(inputs, folder / "inputs.safetensors")


def serve_diffusers(folder: pathlib.Path):
    import torch
    from safetensors.torch import load_file

    from tests.models import reference
    from tests.models.random_models import load_pipeline

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    pipe = load_pipeline(folder)
    inputs = load_file(folder / "inputs.safetensors") if (folder / "inputs.safetensors").exists() else {}

    def run(job):
        if job["work"] == "picture":
            return reference.pictures(pipe, job)[0].numpy()
        if job["work"] == "transformer":
            return reference.transformer(pipe, inputs[job["latents"]], inputs[job["features"]], job["time"]).numpy()
        if job["work"] == "decode":
            return reference.decode(pipe, inputs[job["latents"]]).numpy()
        raise ValueError(job)

    return run


def serve_zimage(folder: pathlib.Path):
    from diffusionz import ZImage

    model = ZImage(folder, device="cpu", threads=int(os.environ["OMP_NUM_THREADS"]))

    def run(job):
        options = {name: job[name] for name in ("width", "height", "steps", "seed")}
        return model.generate(job["prompt"], **options).pixels

    return run


def serve_chronos_forecasting(folder: pathlib.Path):
    import torch
    from chronos import Chronos2Pipeline

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    pipe = Chronos2Pipeline.from_pretrained(folder)

    def run(job):
        quantiles, _ = pipe.predict_quantiles(
            made_series(job), prediction_length=job["prediction_length"], quantile_levels=job["levels"]
        )
        return torch.cat(quantiles).transpose(1, 2).numpy()

    return run


def serve_chronos2(folder: pathlib.Path):
    from diffusionz import Chronos2

    model = Chronos2(folder, device="cpu", threads=int(os.environ["OMP_NUM_THREADS"]))

    def run(job):
        return model.forecast(made_series(job), job["prediction_length"], job["levels"]).quantiles

    return run


def made_series(job: dict) -> list:
    """The rows of a job: waves with noise, all of one length or of every length up to it."""
    import numpy

    generator = numpy.random.default_rng(job["rows"])
    rows = []
    for row in range(job["rows"]):
        steps = job["steps"] if not job.get("ragged") else 1 + row * 7919 % job["steps"]
        time_index = numpy.arange(steps, dtype=numpy.float32)
        wave = numpy.sin(time_index * (0.05 + row % 17 / 20)) * 10 + 100 + row % 5 * time_index / 50
        rows.append((wave + generator.normal(size=steps)).astype(numpy.float32))
    return rows


def serve(run) -> None:
    jobs, answers = sys.stdin, sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    print("ready", file=answers, flush=True)
    for line in jobs:
        job = json.loads(line)
        begin = time.perf_counter()
        out = run(job)
        seconds = time.perf_counter() - begin
        if job.get("save"):
            import numpy

            numpy.save(job["save"], out)
        print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
    else:
        make = {
            "diffusers": serve_diffusers, "ZImage": serve_zimage,
            "chronos-forecasting": serve_chronos_forecasting, "Chronos2": serve_chronos2,
        }[sys.argv[2]]  # fmt: skip
        serve(make(pathlib.Path(sys.argv[3])))
