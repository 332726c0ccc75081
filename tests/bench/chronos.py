"""Chronos-2 beside chronos-forecasting on this machine: the same files, the same threads, one after the other in turn.

    python -m tests.bench.chronos all --record       every claim; rows go to tests/bench/results/<machine>.csv
    python -m tests.bench.chronos released           the released model's size with random weights
    python -m tests.bench.chronos all --quick        tiny sizes, one repeat: whether the benchmarks still work

Before anything is timed both sides do the work once, and the results must agree: wrong work is not timed.
Needs the installed package, and for the released size 3 GB of memory and 0.5 GB in --scratch.
"""

import pathlib
import sys

import numpy

from tests.bench.harness import Bench, run_claims, run_measured
from tests.bench.record import Comparison

FORECAST_BOUND = 1e-4  # of the largest value
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
PEER = "chronos-forecasting"

# amazon/chronos-2: 119,477,664 parameters.
RELEASED = {"core": {"d_model": 768, "d_kv": 64, "num_heads": 12, "num_layers": 12, "d_ff": 3072}}
TINY = {"core": {}}


def check_forecast(ours: numpy.ndarray, peer: numpy.ndarray) -> None:
    error = numpy.abs(ours - peer).max() / numpy.abs(peer).max()
    if ours.shape != peer.shape or not error <= FORECAST_BOUND:
        raise SystemExit(f"not timed: the forecasts differ by {error:.1e} of the largest value")
    print(f"parity: forecasts within {error:.1e} of the largest value", flush=True)


def random_model(bench: Bench, name: str, shape: dict) -> pathlib.Path:
    return bench.write(name, {"family": "chronos2", "shape": {"seed": 1} | shape})


def demo(bench: Bench) -> tuple[pathlib.Path, str]:
    """(the folder of the model of --model, its name)."""
    if bench.args.quick:
        folder = bench.scratch / "tiny"
        return (folder if folder.exists() else random_model(bench, "tiny", TINY)), "tiny"
    from diffusionz.hub import locate

    return pathlib.Path(locate(bench.args.model, "chronos2")), pathlib.Path(bench.args.model).name


# --- The claims -----------------------------------------------------------------------------------------------------


def forecasts(bench: Bench, model: pathlib.Path, name: str, repeats: dict[int, int]) -> None:
    """Warm calls of so many rows: 768 steps of history, 16 ahead, 9 levels."""
    steps = 48 if bench.args.quick else 768
    ours, peer = bench.server("Chronos2", model), bench.server(PEER, model)
    for rows, rounds in repeats.items():
        job = {"rows": rows, "steps": steps, "prediction_length": 16, "levels": LEVELS}
        check_forecast(ours.result(job, bench.scratch), peer.result(job, bench.scratch))
        seconds = [(ours.run(job), peer.run(job)) for _ in range(bench.args.repeats or rounds)]
        goal = 0.6 if rows == 1 else 0.75
        size = f"{rows} x {steps} -> 16"
        bench.report(
            Comparison(f"forecast, warm, {name}", size, *zip(*seconds, strict=True), goal=goal, peer_name=PEER)
        )


def released(bench: Bench) -> None:
    """The size of amazon/chronos-2, random weights; and the memory of a process that loads it and forecasts."""
    model = random_model(bench, "released", TINY if bench.args.quick else RELEASED)
    forecasts(bench, model, "random weights, tiny" if bench.args.quick else "random weights, 120 M", {1: 15, 32: 5})
    ours, peer = bench.server("Chronos2", model).peak_mib(), bench.server(PEER, model).peak_mib()
    bench.report(
        Comparison(
            "peak memory of a process, random weights, 120 M", "32 x 768 -> 16", [ours], [peer], 0.9, "MiB", PEER
        )
    )


def bundled(bench: Bench) -> None:
    """The bundled model."""
    model, name = demo(bench)
    forecasts(bench, model, name, {1: 25, 32: 9})


def growth(bench: Bench) -> None:
    """Ten times the rows, of every length to 256 steps: the time of a row, and what the process holds beside the series
    and the forecasts, should stay as they are."""
    model, name = demo(bench)
    few, steps = (20, 32) if bench.args.quick else (5000, 256)
    seconds, extra = [], []
    for rows in (few, 10 * few):
        job = {"rows": rows, "steps": steps, "ragged": True, "prediction_length": 16, "levels": LEVELS}
        worker = bench.server("Chronos2", model)
        seconds.append([worker.run(job) / rows * 1e3 for _ in range(bench.args.repeats or 3)])
        # The series as the caller and the call hold them (float32, a list and one array), and the result.
        held = rows * (2 * 4 * steps / 2 + 16 * len(LEVELS) * 4) / 2**20
        extra.append([worker.peak_mib() - held])
        bench.close_server("Chronos2", model)
    size = f"{10 * few} rows beside {few}, to {steps} steps -> 16"
    peer = f"{few} rows"
    bench.report(Comparison(f"time of a row, {name}", size, seconds[1], seconds[0], 1.1, "ms", peer))
    bench.report(Comparison(f"memory beside series and forecasts, {name}", size, extra[1], extra[0], 1.25, "MiB", peer))


UPSTREAM_SCRIPT = """
import sys, pandas, torch
from chronos import Chronos2Pipeline
model, series, out = sys.argv[1:]
pipe = Chronos2Pipeline.from_pretrained(model)
frame = pandas.read_csv(series, parse_dates=["month"]).assign(item_id="a")
levels = [0.1, 0.5, 0.9]
pipe.predict_df(
    frame, timestamp_column="month", target="passengers", prediction_length=12, quantile_levels=levels
).to_csv(out, index=False)
"""


def cli(bench: Bench) -> None:
    """From the start of a process to the written file: the command line beside the shortest upstream script."""
    import pandas

    model, name = demo(bench)
    series, files = bench.scratch / "series.csv", (bench.scratch / "ours.csv", bench.scratch / "peer.csv")
    months = pandas.date_range("1949-01-01", periods=144, freq="MS")
    values = 100 + numpy.arange(144) * 2.5 + 40 * numpy.sin(numpy.arange(144) * numpy.pi / 6)
    pandas.DataFrame({"month": months, "passengers": values}).to_csv(series, index=False)
    program = pathlib.Path(sys.executable).with_name("diffusionz")
    ours = [
        program, "forecast", series, "-o", files[0], "--model", model, "--horizon", 12, "--target", "passengers",
        "--timestamp", "month", "--quantiles", "0.1,0.5,0.9", "--device", "cpu",
    ]  # fmt: skip
    peer = [sys.executable, "-c", UPSTREAM_SCRIPT, model, series, files[1]]
    measured = [(run_measured(ours, bench.environment), run_measured(peer, bench.environment))]  # warms the page cache
    check_forecast(*(pandas.read_csv(file)[["0.1", "0.5", "0.9"]].to_numpy() for file in files))
    if not bench.args.quick:
        measured = [
            (run_measured(ours, bench.environment), run_measured(peer, bench.environment))
            for _ in range(bench.args.repeats or 7)
        ]
    for i, (work, goal, unit) in enumerate(
        [("process start to file", 0.35, "s"), ("peak memory of a process", 0.7, "MiB")]
    ):
        values = [(a[i], b[i]) for a, b in measured]
        bench.report(
            Comparison(f"{work}, forecast, {name}", "144 months -> 12", *zip(*values, strict=True), goal, unit, PEER)
        )


CLAIMS = {"released": released, "bundled": bundled, "growth": growth, "cli": cli}


def main(argv: list[str] | None = None) -> list[Comparison]:
    return run_claims(CLAIMS, __doc__, "tests.bench.chronos", argv)


if __name__ == "__main__":
    main()
