"""Goal: the GPU's tables say what was measured, on a machine without one as far as that can be known there.

Method: counts of work against diffusers' own layers, names of kernels against the sources, kept rows read back. Where
there is a CUDA device, everything runs once at small sizes; its times mean nothing.
"""

import csv
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import gpu, gpu_plot, record  # noqa: E402

ABOUT = {"machine": "nvidia-test", "cpu": "NVIDIA Test", "versions": "v"}


def test_the_flops_of_a_step_are_those_of_its_layers():
    """torch counts what a block of diffusers' transformer multiplies."""
    import torch
    from diffusers import ZImageTransformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    from diffusionz.bench.random_models import TRANSFORMER

    with torch.device("meta"):
        block = ZImageTransformer2DModel.from_config(TRANSFORMER | {"n_layers": 1}).layers[0]
        hidden = torch.empty(1, 1024 + 64, 3840)
        with FlopCounterMode(display=False) as counter:
            for linear in (block.attention.to_q, block.attention.to_k, block.attention.to_v, block.attention.to_out[0]):
                linear(hidden)
            block.feed_forward(hidden)
    products, attention = gpu.step_flops(512)
    assert products == pytest.approx(counter.get_total_flops() * (30 + 2 * 1024 / 1088))
    assert attention == 4 * 3840 * (30 * 1088**2 + 2 * 1024**2)


def test_every_kernel_that_can_be_switched_off_is_ablated():
    names = gpu.kernel_names()
    assert {"rms_norm", "silu_gate", "graphs"} <= set(names) and not gpu.CPU_ONLY & set(names)


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "matrix product"),
        ("void diffusionz::kernels::gemm_kernel<1, 2>(CUtensorMap_st)", "matrix product"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("void diffusionz::kernels::(anonymous namespace)::silu_gate_kernel<float>(float*)", "between products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >(int)", "ATen"),
        ("Memcpy DtoH (Device -> Pinned)", "copy, fill"),
    ],
)
def test_kernels_are_sorted_by_what_they_do(kernel, kind):
    assert gpu.kind_of(kernel) == kind


def test_a_listing_adds_up(capsys):
    kernels = {"nvjet_a": (60.0, 6.0), "nvjet_b": (60.0, 3.0), "void at::x<1>(int)": (10.0, 0.5)}
    rows = gpu.listing("step", kernels, 10.0, {"matrix product": (4.5, 0.75, "TFLOP/s")})
    capsys.readouterr()
    kinds = {row["kind"]: row for row in rows if not row["kernel"]}
    assert kinds["matrix product"]["ms"] == "9" and kinds["matrix product"]["launches"] == "120"
    assert float(kinds["matrix product"]["floor_ms"]) == 6 and kinds["between kernels"]["ms"] == "0.5"
    assert sum(float(row["share"]) for row in kinds.values()) == pytest.approx(1)
    assert {row["kernel"] for row in rows} == {"", "nvjet_a", "nvjet_b", "at::x<1>"}


def test_rows_are_kept_and_plotted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    step = {"work": "step", "size": "512x512", "precision": "fp8", "unit": "ms", "ours": [14.0], "goal": 15.0}
    table = [step | {"peer": [40.0], "peer_name": "a, b"}, step | {"ours": [13.0]}]
    found = [
        {"kind": "table", "rows": table},
        {
            "kind": "ablation",
            "rows": [{"kernel": "gemm", "work": "step 512x512, fp8", "with": [1.0], "without": [2.0]}],
        },
        {
            "kind": "accuracy",
            "rows": [
                {"precision": p, "mase": 0.7 + len(p) / 1e3, "wql": 0.6, "windows": 9} for p in ("float32", "tf32")
            ],
        },
        {"kind": "profile", "rows": [dict.fromkeys(gpu.PROFILE_COLUMNS[4:], "1")]},
    ]
    paths = []
    for i, one in enumerate(found):
        paths.append(str(tmp_path / f"{i}.json"))
        pathlib.Path(paths[-1]).write_text(json.dumps({"about": ABOUT} | one))
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["gpu", "keep", *paths, "--commit", "abc"])
        gpu.main()
    capsys.readouterr()
    with (tmp_path / "nvidia-test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 1 + 2) and {row["commit"] for row in rows} == {"abc"}
    mase, wql = rows[-2:]
    assert float(mase["ours_p50"]) == pytest.approx(100 * 0.003 / 0.707, rel=1e-3) and mase["goal"] == "0.1 %"
    assert float(wql["ours_p50"]) == 0
    assert rows[2]["ratio"] == "0.500" and "without gemm" in rows[2]["work"]
    with (tmp_path / "nvidia-test-profile.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1  # the last replaces the one before
    last = gpu_plot.last_rows(tmp_path / "nvidia-test.csv")["step", "512x512", "fp8"]
    assert (last["ours_p50"], last["peer_p50"], last["goal"]) == ("13", "40", "15 ms")
    gpu_plot.plot({("step", "512x512", "fp8"): last}, tmp_path / "plot.webp")
    assert (tmp_path / "plot.webp").stat().st_size > 1000


def test_everything_runs_on_a_gpu(tmp_path):
    from diffusionz._ffi import lib

    if not lib.diffusionz_device_count():
        pytest.skip("no CUDA device")
    from diffusionz.bench import gpu as bench
    from diffusionz.hub import locate

    rows = []
    for family in bench.FAMILIES:
        options = bench.Options(only=[family], model=locate("demo", family))
        rows += bench.run(options, print)
    assert {row.work for row in rows} >= {"picture", "step", "forecast", "process start to first picture"}
    assert all(row.goal is None for row in rows)  # the demo models are not of the sizes that the goals are of
    from diffusionz import ZImage

    with ZImage("demo", device="cuda:0") as model:
        model.generate("x", width=64, height=64, steps=1, seed=1)
        kernels = gpu.kernels_of(lambda: model.generate("x", width=64, height=64, steps=2, seed=1))
    assert sum(launches for launches, _ in kernels.values()) > 50
