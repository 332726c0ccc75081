"""`diffusionz bench`: quality on the CPU, what is said without a GPU, and the random models that it times.

The times of a GPU are tested where there is one (tests/bench/test_gpu.py)."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys

import numpy
import pytest

from diffusionz.bench import quality, random_models
from diffusionz.bench.gpu import Wrong, check_picture, forecast_rows, picture_rows, webp_rows
from diffusionz.bench.table import COLUMNS, Row, as_table, write_csv

PROGRAM = str(pathlib.Path(sys.executable).with_name("diffusionz"))


def bench(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "bench", *arguments],
        cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip


# --- Quality ---


def test_pictures_in_bfloat16_are_near_those_in_float32(tmp_path: pathlib.Path) -> None:
    done = bench(
        "--quality", "--device", "cpu", "--pictures", "2", "--size", "128", "-o", "sheet.png", "--layers", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    (row,) = about["rows"]
    assert (row["precision"], row["reference"]) == ("bfloat16", "float32")
    assert 30 < row["psnr_worst"] <= row["psnr_mean"] < 80
    assert 0.98 < row["ssim_mean"] < 1 and 0 < row["distance_mean"] < 1e-2
    assert 0 < row["off_mean"] < row["off_most"]
    assert row["judged_alike"] > 0.9 and {check["measure"] for check in about["gate"]} <= set(row)
    # Bfloat16 has 8 bits: no place is exact, and none is far off. 10 layers and 2 refiners lie between.
    layers = [layer["bfloat16"] for layer in about["layers"]]
    assert len(layers) >= 10 and all(1e-5 < error < 0.1 for error in layers)
    from diffusionz.image import _decode

    assert _decode((tmp_path / "sheet.png").read_bytes())[1:] == (3 * 128, 2 * 128)


def test_forecasts_in_bfloat16_score_as_in_float32(tmp_path: pathlib.Path) -> None:
    done = bench("--quality", "--device", "cpu", "--model", "chronos2-demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("float32") and "(+0.000%)" in first
    assert second.startswith("bfloat16") and "(+0.000%)" not in second


@pytest.mark.parametrize("model, precision", [("zimage-demo", "fp8"), ("chronos2-demo", "tf32")])
def test_a_precision_that_the_device_has_not_is_refused_at_once(
    tmp_path: pathlib.Path, model: str, precision: str
) -> None:
    done = bench("--quality", "--device", "cpu", "--precision", precision, "--model", model, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1, "nothing is drawn or forecast before"
    assert precision.upper() in done.stderr


def test_measures_of_pictures() -> None:
    """Against their definitions, and SSIM against a window by window computation."""
    generator = numpy.random.default_rng(1)
    a = generator.integers(0, 256, (24, 20, 3), numpy.uint8)
    b = numpy.clip(a.astype(int) + generator.integers(-9, 10, a.shape), 0, 255).astype(numpy.uint8)
    square = ((a.astype(float) - b) ** 2).mean()
    assert quality.psnr(a, b) == pytest.approx(20 * math.log10(255) - 10 * math.log10(square))
    assert quality.psnr(a, a) == 99 and quality.ssim(a, a) == pytest.approx(1)

    weights = numpy.outer(*[numpy.exp(-(numpy.arange(-5, 6) ** 2) / 4.5)] * 2)
    weights /= weights.sum()
    x, y = (picture @ numpy.array([0.299, 0.587, 0.114]) for picture in (a, b))
    values = []
    for i in range(24 - 10):
        for j in range(20 - 10):
            u, v = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mu, mv = (weights * u).sum(), (weights * v).sum()
            su, sv, both = (
                (weights * (p - mp) * (q - mq)).sum()
                for p, mp, q, mq in ((u, mu, u, mu), (v, mv, v, mv), (u, mu, v, mv))
            )
            values.append(
                (2 * mu * mv + 6.5025) * (2 * both + 58.5225) / ((mu**2 + mv**2 + 6.5025) * (su + sv + 58.5225))
            )
    assert quality.ssim(a, b) == pytest.approx(numpy.mean(values))

    judge = quality._Judge()
    assert judge.distance(a, a) == 0 and 0 < judge.distance(a, b) < judge.distance(a, 255 - a)
    scenes = {colour: numpy.full((256, 256, 3), 255, numpy.uint8) for colour in ("red", "blue")}
    for scene, colour in zip(scenes.values(), ((220, 40, 40), (40, 80, 220)), strict=True):
        scene[64:192, 64:192] = colour  # a square
    red, blue = scenes["red"], scenes["blue"]
    assert judge.alike([(red, red)]) == 1 and judge.alike([(blue, red)]) < 0.7


def test_a_part_and_a_limit_of_the_gpus_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusionz._errors import ArgumentError
    from diffusionz.bench import gpu
    from diffusionz.hub import locate

    assert gpu.parts_of(["webp"]) == {"zimage": ["webp"]}
    assert gpu.parts_of(["chronos2", "load"]) == {"zimage": ["load"], "chronos2": ["forecasts"]}
    with pytest.raises(ArgumentError, match="pictures"):
        gpu.parts_of(["picture"])
    row = Row("step", "512x512", "fp8", "ms", [14.0])
    asked: list[list[str]] = []

    def measure(folder: str, device: str, parts: list[str], clock: gpu._Clock) -> tuple[list[Row], None]:
        asked.append(parts)
        return clock.tell([row]), None

    monkeypatch.setattr(gpu, "_zimage", measure)
    said: list[str] = []
    options = {"only": ["webp", "forecasts"], "model": locate("demo", "zimage")}
    assert gpu.run(gpu.Options(**options, limit=100), said.append) == [row] and asked == [["webp"]]
    assert said == ["step, 512x512, fp8: 14 ms"]
    assert gpu.run(gpu.Options(**options, limit=0), said.append) == [] and "the time is over" in said[-1]


def test_the_gate_names_what_fails() -> None:
    good = {"psnr_mean": 50.0, "psnr_worst": 40.0, "ssim_mean": 0.999, "distance_mean": 1e-4, "judged_alike": 1.0}
    rows = [good | {"precision": "fp8", "reference": "float32"}, good | {"precision": "fp8", "reference": "bfloat16"}]
    checks = quality.gate(rows, "fp8")
    assert len(checks) == len(quality.GATE) and all(check["passed"] for check in checks)
    assert quality.gate_table(checks).endswith("the quality gate: passed")
    rows[0]["psnr_worst"] = 12.0
    checks = quality.gate(rows, "fp8")
    assert [check["measure"] for check in checks if not check["passed"]] == ["psnr_worst"]
    assert "FAIL" in quality.gate_table(checks) and quality.gate(rows, "float32") == []


def test_scores_of_forecasts_are_those_of_their_definitions() -> None:
    history = numpy.array([1.0, 3.0, 2.0, 5.0, 4.0, 7.0], numpy.float32)
    future = numpy.array([[6.0, 9.0]], numpy.float32)
    found = numpy.full((1, 9, 2), 5.0, numpy.float32)
    mase, wql = quality.score([history], future, found, season=2)
    assert mase == pytest.approx(((6 - 5) + (9 - 5)) / 2 / ((1 + 2 + 2 + 2) / 4))
    # Every level forecasts 5, below the truth: the loss is 2 * level * (y - 5), of mean level 0.5.
    assert wql == pytest.approx(0.5 * 2 * 2.5 / 7.5)


# --- Without a GPU ---


def test_without_a_gpu_it_says_so(tmp_path: pathlib.Path) -> None:
    from diffusionz._ffi import lib

    if lib.diffusionz_device_count():
        pytest.skip("there is a GPU")
    done = bench("--gpu", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "--gpu --quality"),
        (["--gpu", "--quality"], "not allowed"),
        (["--gpu", "--only", "zimage,sdxl"], "sdxl"),
        (["--gpu", "--device", "cpu"], "cpu"),
        (["--quality", "--precision", "float8"], "float8"),
        (["--quality", "--pictures", "0"], "--pictures is 0"),
        (["--quality", "-o", "sheet.jpg"], ".jpg"),
        (["--quality", "--model", "chronos2-demo", "-o", "sheet.png"], "forecasts"),
    ],
)
def test_wrong_use_is_one_line(tmp_path: pathlib.Path, arguments: list[str], named: str) -> None:
    done = bench(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and named in done.stderr


# --- What is timed, at sizes that a CPU has the time for ---


@pytest.fixture(scope="module")
def small_zimage(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("random") / "zimage"
    random_models.write_zimage(
        str(folder),
        random_models.TRANSFORMER | {"dim": 192, "n_layers": 2, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 128,
                                     "axes_dims": [16, 24, 24], "n_refiner_layers": 1},
        random_models.TEXT_ENCODER | {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
                                      "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
                                      "vocab_size": 1024},
        random_models.VAE | {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def small_chronos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("random") / "chronos2"
    random_models.write_chronos(
        str(folder), random_models.CHRONOS | {"d_model": 64, "num_heads": 2, "d_kv": 32, "num_layers": 2, "d_ff": 128}
    )
    return folder


def test_the_random_models_have_the_names_and_shapes_of_the_released_ones() -> None:
    import torch
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        found = {
            "transformer": ZImageTransformer2DModel.from_config(random_models.TRANSFORMER),
            "vae": AutoencoderKL.from_config(random_models.VAE),
            "text_encoder": Qwen3Model(Qwen3Config(**random_models.TEXT_ENCODER)),
        }
    for shapes, name in (
        (random_models.transformer_shapes(random_models.TRANSFORMER), "transformer"),
        (random_models.vae_shapes(random_models.VAE), "vae"),
        (random_models.text_encoder_shapes(random_models.TEXT_ENCODER), "text_encoder"),
    ):
        theirs = {key: tuple(value.shape) for key, value in found[name].state_dict().items()}
        assert {key.removeprefix("model."): shape for key, shape in shapes.items()} == theirs


def test_a_random_chronos_is_read_by_upstream(small_chronos: pathlib.Path) -> None:
    from chronos import Chronos2Pipeline
    from safetensors.numpy import load_file

    pipe = Chronos2Pipeline.from_pretrained(small_chronos)
    theirs = {name: tuple(value.shape) for name, value in pipe.model.state_dict().items()}
    shapes = {name: value.shape for name, value in load_file(small_chronos / "model.safetensors").items()}
    assert {name: shape for name, shape in theirs.items() if name in shapes} == shapes
    # What is not in the file is tied to what is, or computed.
    assert all("embed_tokens" in name or "inv_freq" in name for name in theirs.keys() - shapes.keys())


def test_random_weights_are_normal_and_of_their_scale(small_zimage: pathlib.Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(small_zimage / "transformer" / "diffusion_pytorch_model.safetensors")
    w2 = weights["layers.0.feed_forward.w2.weight"].float()
    assert w2.std().item() == pytest.approx(512**-0.5, rel=0.02) and abs(w2.mean().item()) < 1e-3
    assert (w2[0] - w2[1]).abs().max() > 0.01
    assert weights["layers.0.ffn_norm1.weight"].float().mean().item() == pytest.approx(1, abs=0.03)
    assert (weights["layers.0.feed_forward.w1.weight"] != weights["layers.1.feed_forward.w1.weight"]).any()


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(OSError, match="does not fit"):
        random_models.write_chronos(str(tmp_path / "model"))
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_rows_of_pictures(small_zimage: pathlib.Path) -> None:
    from diffusionz import ZImage

    with ZImage(small_zimage, device="cpu") as model:
        check_picture(model.generate("x", width=64, height=64, steps=2, seed=1).pixels)
        rows = picture_rows(model, "float32", sides=(64,), runs=5) + webp_rows(model, "float32", 64, 2, 1)
    times = {row.work: row.ours for row in rows}
    assert list(times) == [
        "picture", "step", "VAE decode", "text encoder", "WebP, added to a picture alone",
        "WebP, added to a further picture of a batch",
    ]  # fmt: skip
    shares = []
    for i in range(5):
        stages = 8 * times["step"][i] + times["VAE decode"][i] + times["text encoder"][i]
        shares.append(stages / times["picture"][i])
        assert min(times[name][i] for name in list(times)[:4]) > 0  # the text encoder ran: each prompt is new
    # Between the stages a busy machine may do something else; not each time.
    assert 0.5 < max(shares) <= 1


def test_rows_of_forecasts(small_chronos: pathlib.Path) -> None:
    from diffusionz import Chronos2

    with Chronos2(small_chronos, device="cpu", precision="bfloat16") as model:
        rows = forecast_rows(model, "bfloat16", counts=(1, 3), many=20, runs=4)
    assert [(row.work, row.size.split(" x ")[0], len(row.ours), row.unit) for row in rows] == [
        ("forecast", "1", 4, "ms"), ("forecast", "3", 1, "ms"), ("forecast, by Python", "1", 4, "ms"),
        ("forecast, streamed", "20", 2, "rows/s"),
    ]  # fmt: skip


def test_a_picture_of_one_colour_is_not_timed() -> None:
    with pytest.raises(Wrong, match="one colour"):
        check_picture(numpy.full((8, 8, 3), 127, numpy.uint8))


# --- The table ---


def test_the_table_and_its_file(tmp_path: pathlib.Path) -> None:
    time_row = Row("picture", "512x512", "fp8", "ms", [3.0, 1.0, 2.0], goal=2.5)
    rate_row = Row("forecast, streamed", "9 x 768 -> 16", "tf32", "rows/s", [10.0], goal=2.5)
    for name, values in (("slow", [9.0]), ("fast", [4.0]), ("slower", [5.0])):
        time_row.offer(name, values)
        rate_row.offer(name, values)
    assert (time_row.peer_name, time_row.ratio, time_row.reached) == ("fast", 0.5, True)
    assert (rate_row.peer_name, rate_row.reached) == ("slow", True)  # of a rate the highest is the best
    assert Row("x", "", "", "ms", [3.0], goal=2.5).reached is False and Row("x", "", "", "ms", [3.0]).reached is None

    table = as_table([time_row, rate_row, Row("x", "y", "z", "s", [1.0])])
    assert "reached" in table and "<= 2.5" in table and ">= 2.5" in table and "0.50x" in table
    for _ in range(2):
        write_csv(str(tmp_path / "runs.csv"), [time_row], {"machine": "m", "cpu": "c", "versions": "v"})
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 3
    assert (
        lines[1].split(",", 3)[3].startswith('c,,v,"picture, fp8, peer fast",512x512,ms,3,1.2,2,2.8,4,4,4,0.500,2.5 ms')
    )
