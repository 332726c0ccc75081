"""Goal: what is fused around a transformer block's products computes what its formula says, at any size.

Method: the formula in float64 is the truth; the error may be twice that of PyTorch's own operations in the same
precision. Memory is poisoned before, results must repeat bit for bit, and a graph's replay must give the same bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.conftest import ROOT
from tests.kernels.conftest import MODULE, assert_as_exact, assert_repeats, poison, relative_error

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-5
FP8 = torch.float8_e4m3fn
Tensor = torch.Tensor

# (batch, tokens, width): Z-Image's, narrower ones, and ones that vectors of 16 bytes do not tile.
SHAPES = [
    (1, 4128, 3840), (1, 1056, 3840), (1, 64, 3840), (1, 64, 2560), (2, 33, 256), (3, 700, 768), (1, 1, 8), (2, 5, 1),
    (1, 3, 33), (2, 600, 100), (1, 7, 3841), (1, 513, 8192), (1, 2, 8190), (1, 3, 16384), (2, 2, 20000),
]  # fmt: skip


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def factor(batch: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[batch, 1, width] out of the middle of something larger, as a block's modulation is."""
    return draw(batch, 3, 4, width, dtype=dtype, seed=seed).select(1, 1).narrow(1, 2, 1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def fp8_reference(x: Tensor) -> Tensor:
    """Rows through FP8 and back, in float64."""
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    return (x / scale).float().to(FP8).double() * scale


def assert_forms(forms: Any, reference: Tensor, truth: Tensor, form: str) -> None:
    """A result in the forms asked for: FP8 loses what rounding to FP8 loses, and no more."""
    plain, fp8, row_scales = forms
    assert (plain is None) == (form == "fp8") and (fp8 is None) == (row_scales is None) == (form == "plain")
    if plain is not None:
        assert_as_exact(plain, reference, truth)
    if fp8 is not None:
        assert fp8.dtype == FP8 and row_scales.dtype == torch.float32 and row_scales.shape == (*truth.shape[:-1], 1)
        rounding = torch.finfo(reference.dtype).eps
        largest = truth.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(row_scales.double(), largest / 448, rtol=8 * rounding, atol=0)
        limit = max(relative_error(fp8_reference(numbers), truth) for numbers in (truth, reference))
        assert relative_error(fp8.double() * row_scales.double(), truth) <= 1.05 * limit + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(ops, shape, dtype):
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    poison(x.nbytes)
    assert_as_exact(ops.rms_norm(x, weight, EPS), rms(x, weight), rms(x.double(), weight.double()))


def test_rms_norm_of_rows_that_lie_apart(ops):
    qkv = draw(2, 65, 3 * 4 * 128, dtype=torch.bfloat16)
    weight = draw(128, dtype=torch.bfloat16, seed=1)
    for x in (
        qkv.narrow(2, 512, 512).unflatten(-1, (4, 128)),
        qkv.narrow(1, 3, 60)[..., 5:133],
        qkv.narrow(1, 3, 60).narrow(2, 512, 512).unflatten(-1, (4, 128)),  # no two strides walk its rows
        qkv[0, 0, :128],
        qkv.transpose(0, 1)[..., :128],
        qkv[..., : 2 * 128 : 2],
        qkv[:, :0, :128],
    ):
        result = ops.rms_norm(x, weight, EPS)
        assert result.is_contiguous() or result.numel() == 0
        if x.numel():
            assert_as_exact(result, rms(x, weight), rms(x.double(), weight.double()))


@pytest.mark.parametrize("form", ["plain", "fp8", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_modulated_norm(ops, shape, dtype, form):
    batch, _, width = shape
    x, weight = draw(*shape, dtype=dtype), draw(width, dtype=dtype, seed=1)
    for scale in (factor(batch, width, dtype, 2), factor(1, width, dtype, 3), None):
        poison(x.nbytes)
        forms = ops.modulated_norm(x, weight, EPS, scale, form)
        reference, truth = rms(x, weight), rms(x.double(), weight.double())
        if scale is not None:
            reference, truth = reference * scale, truth * scale.double()
        assert_forms(forms, reference, truth, form)


def residual_reference(x, y, weight, gate, next_weight, next_scale):
    value = y if weight is None else rms(y, weight)
    total = x + (value if gate is None else value * gate)
    if next_weight is None:
        return total, None
    normed = rms(total, next_weight)
    return total, normed if next_scale is None else normed * next_scale


@pytest.mark.parametrize("form", ["plain", "fp8", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual(ops, shape, dtype, form):
    batch, tokens, width = shape
    # The rows that are kept of a longer residual stream.
    x, y = draw(batch, tokens + 2, width, dtype=dtype).narrow(1, 0, tokens), draw(*shape, dtype=dtype, seed=1)
    weight, next_weight = (draw(width, dtype=dtype, seed=seed) for seed in (2, 3))
    gate, next_scale = (factor(batch, width, dtype, seed) for seed in (4, 5))
    for given in (
        (weight, gate, next_weight, next_scale),  # a modulated block
        (weight, None, next_weight, None),  # one that is not
        (weight, gate, None, None),  # the last
        (None, None, next_weight, None),  # the text encoder's
        (None, gate, None, None),
    ):
        poison(2 * x.nbytes)
        total, *forms = ops.gated_residual(x, y, given[0], EPS, *given[1:], form)
        wide = residual_reference(x.double(), y.double(), *(None if part is None else part.double() for part in given))
        reference = residual_reference(x, y, *given)
        assert_as_exact(total, reference[0], wide[0])
        if given[2] is None:
            assert forms == [None, None, None]
        else:
            assert_forms(forms, reference[1], wide[1], form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_modulated_layer_norm(ops, shape, dtype):
    # A mean that is far over the deviation: a variance without the mean taken off first would lose its digits.
    x = (draw(*shape, dtype=torch.float32) + 30).to(dtype)
    scale = factor(shape[0], shape[-1], dtype, 1)

    def norm(x, scale):
        return functional.layer_norm(x, (shape[-1],), None, None, EPS) * scale

    poison(x.nbytes)
    result = ops.modulated_layer_norm(x, EPS, scale)
    if shape[-1] == 1:
        assert torch.count_nonzero(result) == 0
        return
    assert_as_exact(result, norm(x, scale), norm(x.double(), scale.double()))


def rotary(qkv, q_weight, k_weight, table, heads, kv_heads, interleaved):
    """The formula, in the precision of its arguments."""
    d = 2 * table.shape[-1]
    parts = []
    for begin, count, weight in ((0, heads, q_weight), (heads, kv_heads, k_weight)):
        x = qkv[..., begin * d : (begin + count) * d].unflatten(-1, (count, d))
        x = x if weight is None else rms(x, weight)
        wide = x if x.dtype == torch.float64 else x.float()
        cos, sin = (part.to(wide.dtype).unsqueeze(1) for part in (table.real, table.imag))
        a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if interleaved else -2)
        parts.append(turned.flatten(-2).to(x.dtype).flatten(-2))
    return torch.cat([*parts, qkv[..., (heads + kv_heads) * d :]], -1)


def angles(tokens: int, pairs: int) -> Tensor:
    positions, frequencies = torch.arange(tokens, device="cuda"), torch.arange(pairs, device="cuda")
    turned = torch.outer(positions.double(), 256.0 ** (-frequencies.double() / pairs)).float()
    return torch.polar(torch.ones_like(turned), turned)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",  # batch, tokens, heads, kv_heads, head_dim
    [(1, 4128, 30, 30, 128), (1, 64, 32, 8, 128), (2, 33, 3, 1, 64), (1, 5, 2, 2, 32), (2, 7, 5, 5, 96),
     (1, 3, 1, 1, 16), (1, 9, 17, 3, 48), (1, 4, 2, 1, 6), (1, 3, 2, 2, 512), (1, 3, 2, 2, 1024)],
)  # fmt: skip
def test_qk_norm_rope(ops, shape, dtype, interleaved):
    batch, tokens, heads, kv_heads, d = shape
    qkv = draw(batch, tokens, (heads + 2 * kv_heads) * d, dtype=dtype)
    table = angles(tokens, d // 2)
    weights = draw(d, dtype=dtype, seed=1), draw(d, dtype=dtype, seed=2)
    for q_weight, k_weight in (weights, (None, None), (weights[0], None)):
        result = qkv.clone()
        ops.qk_norm_rope(result, q_weight, k_weight, EPS, table, heads, kv_heads, interleaved)
        wide = [None if weight is None else weight.double() for weight in (q_weight, k_weight)]
        truth = rotary(qkv.double(), *wide, table.to(torch.complex128), heads, kv_heads, interleaved)
        rotated = (heads + kv_heads) * d
        assert torch.equal(result[..., rotated:], qkv[..., rotated:])
        reference = rotary(qkv, q_weight, k_weight, table, heads, kv_heads, interleaved)
        assert_as_exact(result[..., :rotated], reference[..., :rotated], truth[..., :rotated])


@pytest.mark.parametrize("form", ["plain", "fp8", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 4128, 10240), (1, 1056, 10240), (1, 64, 9728), (2, 3, 1), (1, 5, 33), (2, 700, 40), (1, 600, 8191),
     (3, 16384), (3, 20000)],
)  # fmt: skip
def test_silu_gate(ops, shape, dtype, form):
    *rows, width = shape
    x = draw(*rows, 2 * width, dtype=dtype) * 3
    if width > 8:
        x.flatten()[:2] = torch.tensor([-120.0, 80.0])  # e^120 is no number of float32

    def gate(x):
        a, b = x.chunk(2, -1)
        return functional.silu(a) * b

    poison(x.nbytes)
    assert_forms(ops.silu_gate(x, form), gate(x), gate(x.double()), form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_rows(ops, shape, dtype):
    x = draw(*shape, dtype=dtype)
    poison(x.nbytes)
    assert_forms(ops.quantize_rows(x, "fp8"), x, x.double(), "fp8")
    assert ops.quantize_rows(x, "both")[0].data_ptr() == x.data_ptr()


def test_rows_that_are_hard_to_scale(ops):
    x = torch.ones(6, 64, device="cuda")
    x[0] = 0
    x[1] *= 1e-37
    x[2, 5] = float("nan")
    x[3] *= 3e38
    x[4, 7] = -1e6
    _, fp8, row_scales = ops.quantize_rows(x, "fp8")
    numbers = fp8.float() * row_scales
    assert row_scales[0] == 1 and torch.count_nonzero(numbers[0]) == 0
    assert numbers[1].isfinite().all() and numbers[1].abs().max() <= 1e-30
    assert numbers[2].isnan().sum() == 1 and numbers[2, 5].isnan() and numbers[2, 6] == 1
    assert ((numbers[3] / 3e38 - 1).abs() < 1e-6).all()
    assert abs(numbers[4, 7].item() + 1e6) < 1
    assert (numbers[5] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 16, 128, 128, 2), (2, 16, 64, 96, 2), (3, 5, 6, 10, 1), (2, 3, 9, 6, 3), (1, 1, 2, 2, 2)]
)
def test_patches(ops, shape, dtype):
    batch, channels, height, width, patch = shape
    latents = draw(batch, channels, height, width, dtype=torch.float32)
    rows, columns = height // patch, width // patch
    expected = functional.pixel_unshuffle(latents, patch).unflatten(1, (channels, patch * patch))
    expected = expected.permute(0, 3, 4, 2, 1).reshape(batch, rows * columns, -1).to(dtype)
    poison(latents.nbytes)
    tokens = ops.patchify(latents, patch, dtype)
    assert torch.equal(tokens, expected)
    assert torch.equal(ops.patchify(latents[:1].expand(3, -1, -1, -1), patch, dtype), expected[:1].expand(3, -1, -1))
    poison(latents.nbytes)
    assert torch.equal(ops.unpatchify(tokens, patch, rows, columns), latents.to(dtype).float())

    # The step is the same operations as ATen's, so it gives the same bits.
    with_prompt, without = (draw(*tokens.shape, dtype=dtype, seed=seed) for seed in (1, 2))
    delta = torch.tensor([0.1234567], device="cuda")
    p, n = (ops.unpatchify(x, patch, rows, columns) for x in (with_prompt, without))
    stepped = latents.clone()
    ops.euler_step(stepped, with_prompt, None, 0.0, patch, delta)
    assert torch.equal(stepped, latents + p * delta)
    stepped = latents.clone()
    ops.euler_step(stepped, with_prompt, without, 3.3, patch, delta)
    assert torch.equal(stepped, latents + (p + (p - n) * 3.3) * delta)


def calls(ops: Any) -> dict[str, Callable[[], Any]]:
    """Each operation at a size of its own, as a function without arguments."""
    bf16 = torch.bfloat16
    x, y = (draw(2, 130, 3840, dtype=bf16, seed=seed) for seed in (1, 2))
    weight, scale = draw(3840, dtype=bf16, seed=3), draw(2, 1, 3840, dtype=bf16, seed=4)
    odd = draw(1, 37, 333, dtype=bf16, seed=5)
    wide = draw(70, 20480, dtype=bf16, seed=6)
    qkv, table, head = draw(1, 65, 12 * 128, dtype=bf16, seed=7), angles(65, 64), draw(128, dtype=bf16, seed=8)
    latents, delta = draw(1, 16, 64, 64, dtype=torch.float32, seed=9), torch.tensor([0.1], device="cuda")
    tokens = draw(1, 1024, 64, dtype=bf16, seed=10)

    def rotated(interleaved: bool) -> Tensor:
        copy = qkv.clone()
        ops.qk_norm_rope(copy, head, head, EPS, table, 4, 4, interleaved)
        return copy

    def stepped() -> Tensor:
        copy = latents.clone()
        ops.euler_step(copy, tokens, tokens, 2.0, 2, delta)
        return copy

    return {
        "rms_norm": lambda: (ops.rms_norm(x, weight, EPS), ops.rms_norm(odd, odd[0, 0], EPS)),
        "modulated_norm": lambda: ops.modulated_norm(x, weight, EPS, scale, "both"),
        "gated_residual": lambda: ops.gated_residual(x, y, weight, EPS, scale, weight, scale, "both"),
        "modulated_layer_norm": lambda: (ops.modulated_layer_norm(x, EPS, scale),),
        "qk_norm_rope": lambda: (rotated(True), rotated(False)),
        "silu_gate": lambda: [
            part for part in (*ops.silu_gate(wide, "plain"), *ops.silu_gate(wide, "both")) if part is not None
        ],
        "quantize_rows": lambda: ops.quantize_rows(x, "fp8")[1:],
        "patchify": lambda: (ops.patchify(latents, 2, bf16), ops.unpatchify(tokens, 2, 32, 32), stepped()),
    }


OPERATIONS = [
    "rms_norm", "modulated_norm", "gated_residual", "modulated_layer_norm", "qk_norm_rope", "silu_gate",
    "quantize_rows", "patchify",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_repeat_bit_for_bit(ops, name):
    assert_repeats(calls(ops)[name])


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_graph_replays_the_same_bits(ops, name):
    run = calls(ops)[name]
    expected = [part.clone() for part in run()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for part in results:
        part.view(torch.uint8).fill_(0xFF)
    graph.replay()
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(expected, results, strict=True))


@pytest.fixture(scope="module")
def with_and_without_kernels(ops, tmp_path_factory) -> list[dict[str, Any]]:
    """Of a process with our kernels and of one without: each operation's results, and whether a kernel of ours ran."""
    code = (
        "import sys, torch\n"
        "from torch.profiler import ProfilerActivity, profile\n"
        "from tests.kernels.test_elementwise import calls\n"
        f"torch.ops.load_library({str(MODULE)!r})\n"
        "saved = {}\n"
        "for name, run in calls(torch.ops.diffusionz).items():\n"
        "    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:\n"
        "        results = run()\n"
        "        torch.cuda.synchronize()\n"
        "    used = any('diffusionz::kernels' in event.name for event in seen.events())\n"
        "    saved[name] = [part.cpu() for part in results], used\n"
        "torch.save(saved, sys.argv[1])\n"
    )
    folder = tmp_path_factory.mktemp("kernels")
    saved = []
    for disabled in ("", ",".join(OPERATIONS)):
        path = folder / f"results{len(saved)}"
        environment = os.environ | {"DIFFUSIONZ_DISABLE_KERNELS": disabled}
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        saved.append(torch.load(path))
    return saved


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_disabled_kernel_leaves_the_work_to_aten(with_and_without_kernels, name):
    (ours, used), (reference, used_without) = (saved[name] for saved in with_and_without_kernels)
    assert used and not used_without
    for a, b in zip(ours, reference, strict=True):
        assert relative_error(a, b.double()) < (5e-2 if a.dtype == FP8 else 1e-2)


@pytest.mark.parametrize(
    "name", ["modulated_norm", "gated_residual", "qk_norm_rope", "silu_gate", "quantize_rows", "patchify"]
)
def test_more_numbers_than_32_bits_count(ops, name):
    """2^31 numbers and a bit more: the last ones are right, and so are those where an index would wrap."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of device memory")
    bf16 = torch.bfloat16

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape, device="cuda", dtype=bf16).normal_(generator=torch.Generator("cuda").manual_seed(1))

    def some(rows: int, width: int) -> Tensor:
        near = (2**31 // width, 2**32 // width)
        picked = [0, 1, *(row + i for row in near for i in (-1, 0, 1)), rows - 2, rows - 1]
        return torch.tensor([row for row in picked if row < rows], device="cuda")

    width = 4096
    rows = 2**31 // width + 3
    if name == "modulated_norm":
        x, weight = normal(1, rows, width), normal(width)
        plain, fp8, row_scales = ops.modulated_norm(x, weight, EPS, None, "both")
        at = some(rows, width)
        truth = rms(x[0, at].double(), weight.double())
        assert_forms((plain[0, at], fp8[0, at], row_scales[0, at]), rms(x[0, at], weight), truth, "both")
    elif name == "gated_residual":
        x, weight = normal(1, rows, width), normal(width)
        y = x.flip(1)
        total, plain, *_ = ops.gated_residual(x, y, weight, EPS, None, weight, None, "plain")
        at = some(rows, width)
        reference = residual_reference(x[0, at], y[0, at], weight, None, weight, None)
        truth = residual_reference(x[0, at].double(), y[0, at].double(), weight.double(), None, weight.double(), None)
        assert_as_exact(total[0, at], reference[0], truth[0])
        assert_as_exact(plain[0, at], reference[1], truth[1])
    elif name == "qk_norm_rope":
        qkv, weight, table = normal(1, rows, width), normal(128), angles(rows, 64)
        at = some(rows, width)
        before = qkv[:, at].clone()
        ops.qk_norm_rope(qkv, weight, weight, EPS, table, 16, 8, True)
        truth = rotary(before.double(), weight.double(), weight.double(), table[at].to(torch.complex128), 16, 8, True)
        assert_as_exact(qkv[:, at], rotary(before, weight, weight, table[at], 16, 8, True), truth)
    elif name == "silu_gate":
        x = normal(2 * rows, width)
        at = some(2 * rows, width)
        a, b = x[at].chunk(2, -1)
        truth = functional.silu(a.double()) * b.double()
        for form in ("plain", "both"):
            forms = [None if part is None else part[at] for part in ops.silu_gate(x, form)]
            assert_forms(forms, functional.silu(a) * b, truth, form)
    elif name == "quantize_rows":
        x = normal(rows, width)
        at = some(rows, width)
        _, fp8, row_scales = ops.quantize_rows(x, "fp8")
        assert_forms((None, fp8[at], row_scales[at]), x[at], x[at].double(), "fp8")
    else:
        batch = 2**31 // (16 * 256 * 256) + 1
        tokens = normal(batch, 128 * 128, 64)
        latents = ops.unpatchify(tokens, 2, 128, 128)
        assert torch.equal(latents[-1:], ops.unpatchify(tokens[-1:].contiguous(), 2, 128, 128))
        ops.euler_step(latents, tokens, None, 0.0, 2, torch.ones(1, device="cuda"))
        assert torch.equal(ops.patchify(latents, 2, bf16)[-2:], tokens[-2:] * 2)
    torch.cuda.empty_cache()
