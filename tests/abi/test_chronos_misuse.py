"""Every wrong use of chronos_c_api.h gets its documented status, and a message that names what was wrong and what is
allowed. Nothing crashes, and the context goes on.

The calls are made through the binding's raw layer, which adds nothing to them.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from diffusionz._ffi import ffi, lib, text
from tests.abi.damage import BROKEN_JSON, DAMAGES, edit, header_of, link_copy, replace, weights_of, with_header
from tests.models.chronos_ours import ChronosError, E, Engine, Request, last_error

NULL = ffi.NULL
NAN, INF = math.nan, math.inf
ROW = np.arange(40, dtype=np.float32)


@pytest.fixture(scope="module")
def engine(tiny_chronos: pathlib.Path) -> Engine:
    return Engine(tiny_chronos)


@pytest.fixture(scope="module")
def right(engine: Engine) -> Request:
    """A request that is fine."""
    future = np.full((4, 8), NAN, np.float32)
    future[1] = 1
    return Request([ROW, ROW[:7], ROW[3:], ROW], 8, levels=(0.1, 0.5), group_ids=[0, 0, 5, 5], row_kinds=[0, 1, 0, 0],
                   future=future)  # fmt: skip


Change = Callable[[Any], Any]


def ask(
    engine: Engine, request: Request, change: Change = lambda native: None, call: str = "forecast"
) -> tuple[int, str]:
    """(status, message) of a request of which `change` changed something. What the caller passed out is empty on
    failure, and a right request goes through after it."""
    native, _kept = request.native()
    keep = change(native)
    out = ffi.new({"forecast": "ChronosForecast *", "embed": "ChronosEmbedding *"}[call])
    ffi.memmove(out, b"\xff" * ffi.sizeof(out[0]), ffi.sizeof(out[0]))  # it need not come in empty
    status = getattr(lib, f"chronos_{call}")(engine.ctx, native, NULL, out)
    del keep
    message = last_error()
    if status:
        assert bytes(ffi.buffer(out)) == bytes(ffi.sizeof(out[0]))
        assert engine.forecast(Request([ROW], 3)).quantiles.shape == (1, 21, 3)
    getattr(lib, f"chronos_free_{ {'forecast': 'forecast', 'embed': 'embedding'}[call] }")(out)
    return status, message


def test_the_right_use_forecasts(engine: Engine, right: Request) -> None:
    assert ask(engine, right) == (lib.DIFFUSIONZ_OK, "")
    assert ask(engine, right, call="embed") == (lib.DIFFUSIONZ_OK, "")


def field(name: str, value: Any) -> Change:
    return lambda native: setattr(native, name, value)


def pointed(name: str, kind: str, *values: Any) -> Change:
    """Points a field at other values."""

    def change(native: Any) -> Any:
        array = ffi.new(f"{kind}[]", list(values))
        setattr(native, name, array)
        return array

    return change


def value(name: str, index: int, new: Any) -> Change:
    """Overwrites one value that a field points at, in a copy."""

    def change(native: Any) -> Any:
        counts = {
            "context": int(native.context_offsets[native.row_count]), "context_offsets": native.row_count + 1,
            "row_kinds": native.row_count, "future": native.row_count * native.prediction_length,
            "quantile_levels": native.level_count,
        }  # fmt: skip
        kinds = {"context": "float", "context_offsets": "int64_t", "row_kinds": "int32_t", "future": "float",
                 "quantile_levels": "double"}  # fmt: skip
        copy = [getattr(native, name)[i] for i in range(counts[name])]
        copy[index] = new
        return pointed(name, kinds[name], *copy)(native)

    return change


# In all of them the message names what is wrong, and what is allowed.
OF_ROWS: dict[str, tuple[Change, list[str]]] = {
    "row_count 0": (field("row_count", 0), ["row_count", "0", "1"]),
    "row_count -1": (field("row_count", -1), ["row_count", "-1"]),
    "row_count 2^40": (field("row_count", 2**40), ["row_count", str(2**40)]),
    "row_count -2^63": (field("row_count", -(2**63)), ["row_count"]),
    "no context": (field("context", NULL), ["context", "NULL"]),
    "no offsets": (field("context_offsets", NULL), ["context_offsets", "NULL"]),
    "offsets from 1": (value("context_offsets", 0, 1), ["context_offsets[0]", "1", "0"]),
    "an empty row": (value("context_offsets", 2, 40), ["row 1", "40 to 40", "at least one"]),
    "descending offsets": (value("context_offsets", 2, 30), ["row 1", "30"]),
    "offset -2^63": (value("context_offsets", 4, -(2**63)), ["row 3"]),
    "offset 2^63-1, then less": (value("context_offsets", 1, 2**63 - 1), ["row 1"]),
    "infinity": (value("context", 42, INF), ["row 1", "infinite", "2", "NaN"]),
    "minus infinity": (value("context", 39, -INF), ["row 0", "infinite", "39"]),
    "context_length -1": (field("context_length", -1), ["context_length", "-1", "8192"]),
    "context_length 8193": (field("context_length", 8193), ["context_length", "8193", "8192"]),
    "struct_size 0": (field("struct_size", 0), ["struct_size", "0"]),
    "struct_size less": (field("struct_size", 80), ["struct_size", "80"]),
    "struct_size more": (field("struct_size", 2**32 - 1), ["struct_size", str(2**32 - 1)]),
}
OF_FORECASTS: dict[str, tuple[Change, list[str]]] = {
    "reserved": (field("reserved", 1), ["reserved", "1", "0"]),
    "prediction_length 0": (field("prediction_length", 0), ["prediction_length", "0", "1048576"]),
    "prediction_length -5": (field("prediction_length", -5), ["prediction_length", "-5", "1"]),
    "prediction_length 2^20+1": (field("prediction_length", 2**20 + 1), ["prediction_length", "1048577", "1048576"]),
    "prediction_length 2^63-1": (field("prediction_length", 2**63 - 1), ["prediction_length"]),
    "level_count -1": (field("level_count", -1), ["level_count", "-1"]),
    "level_count 2^31-1": (field("level_count", 2**31 - 1), ["level_count", str(2**31 - 1)]),
    "no levels": (field("quantile_levels", NULL), ["quantile_levels", "NULL"]),
    "level 0": (value("quantile_levels", 0, 0.0), ["quantile_levels[0]", "0", "1"]),
    "level 1": (value("quantile_levels", 1, 1.0), ["quantile_levels[1]", "1"]),
    "level -0.5": (value("quantile_levels", 0, -0.5), ["quantile_levels[0]", "-0.5"]),
    "level nan": (value("quantile_levels", 0, NAN), ["quantile_levels[0]", "nan"]),
    "level 90": (value("quantile_levels", 1, 90.0), ["quantile_levels[1]", "90"]),
    "levels descend": (value("quantile_levels", 0, 0.7), ["quantile_levels[1]", "0.5", "0.7", "ascend"]),
    "a level twice": (value("quantile_levels", 0, 0.5), ["quantile_levels[1]", "0.5", "ascend"]),
    "row kind 2": (value("row_kinds", 3, 2), ["row_kinds[3]", "2", "1"]),
    "row kind -1": (value("row_kinds", 0, -1), ["row_kinds[0]", "-1"]),
    "covariates alone": (pointed("row_kinds", "int32_t", 1, 1, 1, 1), ["covariates", "target"]),
    "monotone 2": (field("monotone", 2), ["monotone", "2", "0 or 1"]),
    "constrain_ohlc -1": (field("constrain_ohlc", -1), ["constrain_ohlc", "-1", "0 or 1"]),
    "OHLC of three targets": (field("constrain_ohlc", 1), ["constrain_ohlc", "3", "four"]),
    "infinity in the future": (value("future", 9, -INF), ["future", "row 1", "infinite"]),
    "a target of nothing": (pointed("context", "float", *[NAN] * 40, *range(84)), ["row 0", "NaN"]),
    "a target of nothing in what is read": (
        lambda native: (
            field("context_length", 3)(native), pointed("context", "float", *range(121), NAN, NAN, NAN)(native)
        ),
        ["row 3", "NaN", "3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_ROWS | OF_FORECASTS)
def test_a_bad_request_is_an_argument_error_that_names_it(engine: Engine, right: Request, case: str) -> None:
    change, named = (OF_ROWS | OF_FORECASTS)[case]
    status, message = ask(engine, right, change)
    assert status == E["ARGUMENT"], message
    for part in named:
        assert part in message, message
    assert "\n" not in message


@pytest.mark.parametrize("case", OF_ROWS)
def test_embedding_refuses_bad_rows(engine: Engine, right: Request, case: str) -> None:
    change, named = OF_ROWS[case]
    status, message = ask(engine, right, change, call="embed")
    assert status == E["ARGUMENT"], message
    for part in named:
        assert part in message, message


def test_embedding_reads_rows_alone(engine: Engine, right: Request) -> None:
    """What only a forecast reads may be anything, other memory too."""
    nowhere = ffi.cast("void *", 16)
    for name in ("row_kinds", "future", "quantile_levels"):
        assert ask(engine, right, field(name, nowhere), call="embed")[0] == lib.DIFFUSIONZ_OK, name
    assert ask(engine, right, field("prediction_length", -1), call="embed")[0] == lib.DIFFUSIONZ_OK
    # Nor need a row have a value.
    unknown = Request([np.full(20, NAN, np.float32)], 1)
    embedding = engine.embed(unknown)
    assert (embedding.loc, embedding.scale) == (0, 1)


def test_a_million_levels_of_one_step(engine: Engine) -> None:
    """However many levels there may be, more are refused, and what is allowed works."""
    allowed = 1000
    levels = tuple((np.arange(allowed) + 0.5) / allowed)
    assert engine.forecast(Request([ROW], 1, levels=levels)).quantiles.shape == (1, allowed, 1)
    status, message = ask(engine, Request([ROW], 1, levels=(*levels, 0.99999)))
    assert (status, str(allowed) in message) == (E["ARGUMENT"], True)


def test_null_where_something_is_needed(engine: Engine, tiny_chronos: pathlib.Path) -> None:
    native, _kept = Request([ROW], 3).native()
    options, out = ffi.new("ChronosInitOptions *"), ffi.new("ChronosContext **")
    lib.chronos_init_options_init(options)
    memory = ffi.new("DiffusionZMemoryInfo *", {"struct_size": ffi.sizeof("DiffusionZMemoryInfo")})
    forecast, embedding = ffi.new("ChronosForecast *"), ffi.new("ChronosEmbedding *")
    path = os.fsencode(tiny_chronos)
    calls: dict[str, Callable[[], int]] = {
        "init path": lambda: lib.chronos_init_with_options(NULL, options, out),
        "init options": lambda: lib.chronos_init_with_options(path, NULL, out),
        "init out": lambda: lib.chronos_init_with_options(path, options, NULL),
        "memory ctx": lambda: lib.chronos_memory_info(NULL, memory),
        "memory info": lambda: lib.chronos_memory_info(engine.ctx, NULL),
        "forecast ctx": lambda: lib.chronos_forecast(NULL, native, NULL, forecast),
        "forecast request": lambda: lib.chronos_forecast(engine.ctx, NULL, NULL, forecast),
        "forecast out": lambda: lib.chronos_forecast(engine.ctx, native, NULL, NULL),
        "embed ctx": lambda: lib.chronos_embed(NULL, native, NULL, embedding),
        "embed request": lambda: lib.chronos_embed(engine.ctx, NULL, NULL, embedding),
        "embed out": lambda: lib.chronos_embed(engine.ctx, native, NULL, NULL),
    }
    for name, call in calls.items():
        assert call() == E["ARGUMENT"], name
        assert "NULL" in last_error(), name
    assert lib.chronos_init(NULL, -1) == NULL
    assert "NULL" in last_error()
    assert lib.chronos_model_info(NULL) == NULL


def test_null_is_fine_where_the_header_says_so() -> None:
    lib.chronos_free(NULL)
    lib.chronos_free_forecast(NULL)
    lib.chronos_free_embedding(NULL)
    lib.chronos_init_options_init(NULL)
    lib.chronos_request_init(NULL)
    for kind, free in (
        ("ChronosForecast *", lib.chronos_free_forecast),
        ("ChronosEmbedding *", lib.chronos_free_embedding),
    ):
        empty = ffi.new(kind)
        free(empty)
        free(empty)


def test_a_forecast_is_freed_once_however_often_it_is_freed(engine: Engine) -> None:
    native, _kept = Request([ROW], 3).native()
    out = ffi.new("ChronosForecast *")
    assert lib.chronos_forecast(engine.ctx, native, NULL, out) == lib.DIFFUSIONZ_OK
    lib.chronos_free_forecast(out)
    assert bytes(ffi.buffer(out)) == bytes(ffi.sizeof(out[0]))
    lib.chronos_free_forecast(out)


@pytest.mark.parametrize(
    ("name", "new"),
    [("struct_size", 0), ("struct_size", 999), ("precision", 3), ("precision", 6), ("precision", -1),
     ("num_threads", -1), ("working_memory_bytes", -1), ("working_memory_bytes", -(2**63))],
)  # fmt: skip
def test_bad_options(tiny_chronos: pathlib.Path, name: str, new: int) -> None:
    with pytest.raises(ChronosError) as caught:
        Engine(tiny_chronos, **{name: new})
    assert caught.value.status == E["ARGUMENT"]
    assert name in caught.value.message
    assert str(new) in caught.value.message


def test_a_precision_that_the_device_has_not(tiny_chronos: pathlib.Path) -> None:
    with pytest.raises(ChronosError, match=r"TF32 \(5\).*cpu") as caught:
        Engine(tiny_chronos, precision=lib.DIFFUSIONZ_PRECISION_TF32)
    assert caught.value.status == E["DEVICE"]


def test_devices_that_are_not_there(tiny_chronos: pathlib.Path) -> None:
    for device_id in (-2, 999, 2**31 - 1, -(2**31)):
        with pytest.raises(ChronosError, match=str(device_id)) as caught:
            Engine(tiny_chronos, device_id=device_id)
        assert caught.value.status == E["DEVICE"]


@pytest.mark.parametrize("size", [0, 23, 32, 56])
def test_bad_struct_size_of_an_output(engine: Engine, size: int) -> None:
    info = ffi.new("DiffusionZMemoryInfo *", {"struct_size": size})
    assert lib.chronos_memory_info(engine.ctx, info) == E["ARGUMENT"]
    assert "struct_size" in last_error()


def test_memory_info(engine: Engine) -> None:
    info = ffi.new("DiffusionZMemoryInfo *", {"struct_size": ffi.sizeof("DiffusionZMemoryInfo")})
    assert lib.chronos_memory_info(engine.ctx, info) == lib.DIFFUSIONZ_OK
    assert info.shared_by >= 1
    assert info.weights_bytes > 4 * engine.info["parameters"] / 2


# --- Tasks ---


def new_task() -> Any:
    return ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)


def progress_of(task: Any) -> Any:
    progress = ffi.new("DiffusionZProgress *", {"struct_size": ffi.sizeof("DiffusionZProgress")})
    assert lib.diffusionz_task_progress(task, progress) == lib.DIFFUSIONZ_OK
    return progress


def test_a_task_serves_one_call_and_counts_its_rows(engine: Engine, right: Request) -> None:
    task = new_task()
    engine.forecast(right, task)
    progress = progress_of(task)
    assert (progress.stage, progress.step, progress.step_count) == (lib.DIFFUSIONZ_STAGE_DONE, 4, 4)
    with pytest.raises(ChronosError, match="task") as caught:
        engine.forecast(right, task)
    assert caught.value.status == E["ARGUMENT"]
    lib.diffusionz_task_cancel(task)  # quiet: its call is over


def test_a_refused_request_leaves_the_task_to_the_next(engine: Engine, right: Request) -> None:
    task = new_task()
    with pytest.raises(ChronosError):
        engine.forecast(Request([ROW], 0), task)
    engine.forecast(right, task)


@pytest.mark.parametrize("call", ["forecast", "embed"])
def test_a_task_cancelled_before_its_call_ends_that_call(engine: Engine, right: Request, call: str) -> None:
    task = new_task()
    lib.diffusionz_task_cancel(task)
    with pytest.raises(ChronosError) as caught:
        getattr(engine, call)(right, task)
    assert caught.value.status == E["CANCELLED"]
    assert ask(engine, right) == (lib.DIFFUSIONZ_OK, "")


@pytest.mark.parametrize("call", ["forecast", "embed"])
def test_cancelling_stops_a_call_that_runs(tiny_chronos: pathlib.Path, call: str) -> None:
    """Rows of minutes of work, stopped from another thread after the first of them."""
    engine, task, seen = Engine(tiny_chronos, working_memory_bytes=1 << 22), new_task(), []
    request = Request([np.sin(np.arange(4096, dtype=np.float32))] * 2_000, 900)

    def stop() -> None:
        while progress_of(task).step == 0:
            pass
        lib.diffusionz_task_cancel(task)
        seen.append(progress_of(task).step)

    watcher = threading.Thread(target=stop)
    watcher.start()
    with pytest.raises(ChronosError) as caught:
        getattr(engine, call)(request, task)
    watcher.join()
    assert caught.value.status == E["CANCELLED"]
    progress = progress_of(task)
    assert progress.step_count == 2_000
    assert 0 < seen[0] <= progress.step < seen[0] + 100  # no more than the chunk that ran
    assert engine.forecast(Request([ROW], 3)).quantiles.shape == (1, 21, 3)


def test_progress_counts_rows_up(tiny_chronos: pathlib.Path) -> None:
    engine, task, steps = Engine(tiny_chronos, working_memory_bytes=1 << 20), new_task(), []
    request = Request([np.sin(np.arange(500, dtype=np.float32))] * 300, 20)
    engine.forecast(request, task)
    assert progress_of(task).step == 300
    assert progress_of(task).forecast_ms > 0

    task, many = new_task(), Request(request.rows * 100, 20)  # of whose chunks a few are awaited

    def forecast() -> None:
        with pytest.raises(ChronosError, match="cancelled"):
            engine.forecast(many, task)

    thread = threading.Thread(target=forecast)
    thread.start()
    while len(set(steps)) < 6 and thread.is_alive():
        steps.append(progress_of(task).step)
    lib.diffusionz_task_cancel(task)
    thread.join()
    assert len(set(steps)) == 6 and steps == sorted(steps)


# --- Damaged models ---


@pytest.fixture
def broken(tiny_chronos: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the model whose files a test replaces."""
    return link_copy(tiny_chronos, tmp_path)


def load_fails(path: pathlib.Path, *named: str) -> None:
    """Loading is an E_MODEL whose message holds each of `named`."""
    with pytest.raises(ChronosError) as caught:
        Engine(path)
    assert caught.value.status == E["MODEL"], caught.value
    for part in named:
        assert part in caught.value.message


def test_what_is_no_model(tmp_path: pathlib.Path) -> None:
    load_fails(tmp_path / "nowhere", "nowhere")
    load_fails(tmp_path, str(tmp_path))
    (tmp_path / "file").write_text("not a model")
    load_fails(tmp_path / "file")
    load_fails(pathlib.Path("/dev/null"))
    with pytest.raises(ChronosError):
        Engine("")


def test_each_family_names_the_others_models(tiny_model: pathlib.Path, tiny_chronos: pathlib.Path) -> None:
    load_fails(tiny_model, str(tiny_model), "diffusionz_init")
    assert lib.diffusionz_init(os.fsencode(tiny_chronos), -1) == NULL
    assert str(tiny_chronos) in last_error()
    assert "chronos_init" in last_error()


@pytest.mark.parametrize("data", [*BROKEN_JSON, b"{}"], ids=repr)
def test_damaged_json(broken: pathlib.Path, data: bytes) -> None:
    replace(broken / "config.json", data)
    load_fails(broken, "config.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_lying_weights(broken: pathlib.Path, damage: str) -> None:
    path = weights_of(broken)
    replace(path, DAMAGES[damage](path.read_bytes()))
    load_fails(broken)


def test_missing_weights(broken: pathlib.Path) -> None:
    weights_of(broken).unlink()
    load_fails(broken, "safetensors")


def names_of(folder: pathlib.Path) -> list[str]:
    return [name for name in header_of(weights_of(folder).read_bytes())[0] if name != "__metadata__"]


def test_a_missing_tensor_is_named(tiny_chronos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for i, name in enumerate(names_of(tiny_chronos)):
        folder = link_copy(tiny_chronos, tmp_path / str(i))
        path = weights_of(folder)
        header, tensors = header_of(path.read_bytes())
        del header[name]
        replace(path, with_header(header, tensors))
        load_fails(folder, name)


def test_a_tensor_of_another_shape_is_named(tiny_chronos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for i, name in enumerate(names_of(tiny_chronos)):
        folder = link_copy(tiny_chronos, tmp_path / str(i))
        path = weights_of(folder)
        header, tensors = header_of(path.read_bytes())
        header[name]["shape"] = [1, *header[name]["shape"]]
        replace(path, with_header(header, tensors))
        load_fails(folder, name)


@pytest.mark.parametrize("dtype", ["I32", "U8", "BOOL"])
def test_a_tensor_of_no_floating_point_is_named(broken: pathlib.Path, dtype: str) -> None:
    path = weights_of(broken)
    header, tensors = header_of(path.read_bytes())
    entry = header["encoder.final_layer_norm.weight"]
    entry["dtype"] = dtype
    if dtype != "I32":
        entry["data_offsets"][1] = entry["data_offsets"][0] + entry["shape"][0]
    replace(path, with_header(header, tensors))
    load_fails(broken)


CORE = {
    "architectures": [["ChronosBoltModelForForecasting"], ["T5ForConditionalGeneration"]],
    "d_model": [0, -64, 10**9, 65, "large", 64.5, None],
    "d_kv": [0, 31, 10**6, 64],
    "num_heads": [0, 3, 10**9],
    "num_layers": [0, 3, 10**9],
    "d_ff": [0, 127, -1],
    "layer_norm_epsilon": [-1, "small"],
    "rope_theta": [0, "far"],
    "feed_forward_proj": ["gated-gelu", "relu6", 7],
    "chronos_config": [None, [], "x", {}],
}
FORECASTING = {
    "context_length": [0, -1, 10**12, "long", None],
    "input_patch_size": [0, 15, 8],
    "input_patch_stride": [8, 0, 17],
    "output_patch_size": [8, 0, None],
    "max_output_patches": [0, -1, 10**9],
    "time_encoding_scale": [0, -8192],
    "use_reg_token": ["yes", 2],
    "use_arcsinh": ["yes"],
    "quantiles": [[], None, [0.5], [0.1, "b"], 0.5, [0.5, 0.1], [0.1, 0.1], [0, 0.5], [0.5, 1.0], [0.1] * 21],
}


def id_of(case: Any) -> str:
    return json.dumps(case)[:60]


@pytest.mark.parametrize(("name", "new"), [(name, new) for name, news in CORE.items() for new in news], ids=id_of)
def test_another_architecture(broken: pathlib.Path, name: str, new: Any) -> None:
    edit(broken / "config.json", **{name: new})
    load_fails(broken)


@pytest.mark.parametrize(
    ("name", "new"), [(name, new) for name, news in FORECASTING.items() for new in news], ids=id_of
)
def test_another_forecasting_config(broken: pathlib.Path, name: str, new: Any) -> None:
    config = json.loads((broken / "config.json").read_text())["chronos_config"]
    edit(broken / "config.json", chronos_config=config | {name: new})
    load_fails(broken)


# --- Hostile text ---


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The file with bytes flipped, cut out, doubled, and numbers replaced."""
    rng = random.Random(seed)
    numbers = [
        b"-1",
        b"0",
        b"1e308",
        b"99999999999999999999",
        b"0.5",
        b"null",
        b"[]",
        b'""',
        b"{}",
        b"true",
        b"4294967296",
    ]
    for _ in range(count):
        bent = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at, length = rng.randrange(len(bent)), rng.randint(1, 12)
            kind = rng.randrange(5)
            if kind == 0:
                bent[at] = rng.randrange(256)
            elif kind == 1:
                del bent[at : at + length]
            elif kind == 2:
                bent[at:at] = bent[at : at + length]
            elif kind == 3:
                bent[at : at + length] = rng.choice(numbers)
            else:
                digits = [i for i, byte in enumerate(bent) if chr(byte).isdigit()]
                if digits:
                    place = rng.choice(digits)
                    bent[place : place + 1] = rng.choice(numbers)
            if not bent:
                break
        yield bytes(bent)


def test_a_mutated_config_loads_or_is_refused(broken: pathlib.Path) -> None:
    """Whatever is in it: a model or an error, never a crash, nor gigabytes for a word of a file."""
    path = broken / "config.json"
    data = path.read_bytes()
    outcomes: dict[int, int] = {}
    replace(path, data)
    for bent in mutations(data, 1500, seed=1):
        path.write_bytes(bent)
        context = lib.chronos_init(os.fsencode(broken), -1)
        status = 0 if context else E["MODEL"]
        if context:
            lib.chronos_free(context)
        else:
            assert last_error()
        outcomes[status] = outcomes.get(status, 0) + 1
    assert min(outcomes.get(0, 0), outcomes.get(E["MODEL"], 0)) > 50, outcomes


def test_a_mutated_adapter_config_loads_or_is_refused(tiny_chronos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {
        "base_model_name_or_path": str(tiny_chronos), "peft_type": "LORA", "r": 2, "lora_alpha": 16,
        "use_rslora": False, "alpha_pattern": {"self_attention.o": 3}, "rank_pattern": {},
        "target_modules": ["self_attention.q"],
    }  # fmt: skip
    text_of = json.dumps(config).encode()
    name = "base_model.model.encoder.block.0.layer.0.self_attention.q"
    entries, tensors = {}, b""
    for part, shape in (("lora_A", (2, 64)), ("lora_B", (64, 2))):
        values = np.full(shape, 0.01, np.float32).tobytes()
        offsets = [len(tensors), len(tensors) + len(values)]
        entries[f"{name}.{part}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        tensors += values
    (adapter / "adapter_model.safetensors").write_bytes(with_header(entries, tensors))
    (adapter / "adapter_config.json").write_bytes(text_of)
    Engine(adapter)
    loaded = 0
    for bent in mutations(text_of, 1000, seed=2):
        (adapter / "adapter_config.json").write_bytes(bent)
        context = lib.chronos_init(os.fsencode(adapter), -1)
        if context:
            lib.chronos_free(context)
            loaded += 1
        else:
            assert last_error()
    assert 50 < loaded < 950


def test_loading_again_after_all_that(tiny_chronos: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(tiny_chronos, tmp_path / "model")
    assert Engine(tmp_path / "model").forecast(Request([ROW], 3)).quantiles.shape == (1, 21, 3)
    assert text(lib.diffusionz_last_error()) == ""
