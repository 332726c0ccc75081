"""Goal: our matrix products compute what the library's do, and Linear and gated_linear what their formulas say.

Method: the products of the numbers that the factors hold, in float64, are the truth; the error may be twice that of
PyTorch's own product of the same factors. Every tile is tried, at sizes that none divides. Memory is poisoned before,
and results must repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.kernels.conftest import assert_as_exact, assert_repeats, poison, relative_error

Tensor = torch.Tensor

# (rows, columns, depth), one row, one tile's corner, odd rows, many tiles, a long depth, Z-Image's at 512x512.
SIZES = [
    (1, 16, 16), (7, 32, 64), (77, 272, 80), (129, 528, 144), (531, 1040, 512), (1056, 2064, 256), (2111, 3840, 272),
    (65, 144, 10240), (1056, 3840, 3840),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def exact_sums(hopper: None) -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def draw(rows: int, columns: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator, device="cuda") * scale).bfloat16()


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    _, fp8, scales = torch.ops.diffusionz.quantize_rows(x, "fp8")
    return fp8, scales


def gate(y: Tensor) -> Tensor:
    a, b = y.chunk(2, -1)
    return functional.silu(a) * b


def own_gemm(ops: Any, x: Tensor, weight: Tensor, fp8: bool, gated: bool, tile: int) -> Tensor:
    if not fp8:
        return ops.gemm(x, weight, None, None, gated, tile)
    (x8, x_scales), (w8, w_scales) = quantized(x), quantized(weight)
    poison(4 * x.shape[0] * weight.shape[0])
    return ops.gemm(x8, w8, x_scales, w_scales, gated, tile)


def truth_and_library(x: Tensor, weight: Tensor, fp8: bool, gated: bool) -> tuple[Tensor, Tensor]:
    if fp8:
        (x8, x_scales), (w8, w_scales) = quantized(x), quantized(weight)
        truth = (x8.double() * x_scales) @ (w8.double() * w_scales).t()
        library = torch._scaled_mm(x8, w8.t(), x_scales, w_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    else:
        truth, library = x.double() @ weight.double().t(), functional.linear(x, weight)
    return (gate(truth), gate(library)) if gated else (truth, library)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_tile_is_as_exact_as_the_library(ops: Any, size: tuple[int, int, int], fp8: bool, gated: bool) -> None:
    rows, columns, depth = size
    x, weight = draw(rows, depth, 1), draw(columns, depth, 2, 2 * depth**-0.5)
    truth, library = truth_and_library(x, weight, fp8, gated)
    for tile in range(ops.gemm_tiles()):
        poison(4 * rows * columns)
        assert_as_exact(own_gemm(ops, x, weight, fp8, gated, tile), library, truth)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_tiles_do_not_change_a_bit(ops: Any, fp8: bool) -> None:
    x, weight = draw(531, 768, 3), draw(1040, 768, 4)
    for gated in (False, True):
        results = [own_gemm(ops, x, weight, fp8, gated, tile) for tile in range(ops.gemm_tiles())]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_repeats_bit_for_bit(ops: Any, fp8: bool) -> None:
    x, weight = draw(1056, 3840, 5), draw(3840, 3840, 6, 0.02)
    (x8, x_scales), (w8, w_scales) = quantized(x), quantized(weight)
    for gated in (False, True):
        for tile in range(ops.gemm_tiles()):
            if fp8:
                assert_repeats(lambda g=gated, t=tile: ops.gemm(x8, w8, x_scales, w_scales, g, t))
            else:
                assert_repeats(lambda g=gated, t=tile: ops.gemm(x, weight, None, None, g, t))


def test_results_of_more_than_two_to_the_31_numbers(ops: Any) -> None:
    rows, columns = 262_177, 8208  # 2.15e9
    x, weight = draw(rows, 64, 7), draw(columns, 64, 8)
    for tile in range(ops.gemm_tiles()):
        poison(2 * rows * columns)
        y = ops.gemm(x, weight, None, None, False, tile)
        for part in (slice(0, 512), slice(rows // 2, rows // 2 + 512), slice(rows - 512, rows)):
            assert_as_exact(y[part], functional.linear(x[part], weight), x[part].double() @ weight.double().t())
        assert not y.isnan().any()
        del y


@pytest.mark.parametrize("rows", [1, 33, 1056, 1120, 4128, 4192])
@pytest.mark.parametrize("columns, depth", [(11520, 3840), (3840, 3840), (3840, 10240)])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_linear(ops: Any, rows: int, columns: int, depth: int, fp8: bool) -> None:
    """Linear at Z-Image's sizes, with whatever product it takes; an adapter adds its correction."""
    x, weight = draw(rows, depth, 9), draw(columns, depth, 10, 0.02)
    down, up = draw(16, depth, 11, 0.02), draw(64, 16, 12, 0.2)
    truth, library = truth_and_library(x, weight, fp8, False)
    result = ops.linear(x[None], None, None, weight, None, fp8, None, None)[0]
    assert_as_exact(result, library, truth)
    if fp8:
        x8, scales = quantized(x)
        assert torch.equal(ops.linear(None, x8, scales, weight, None, True, None, None), result)
    adapted = ops.linear(x, None, None, weight, None, fp8, down, up)
    correction = 0.5 * (x.double() @ down.double().t()) @ up.double().t()
    truth[:, 8:72] += correction
    library[:, 8:72] += 0.5 * functional.linear(functional.linear(x, down), up)
    assert_as_exact(adapted, library, truth)
    assert torch.equal(adapted[:, 72:], result[:, 72:])


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_linear_with_a_bias_and_sizes_that_no_kernel_takes(ops: Any, fp8: bool) -> None:
    for columns, depth in ((384, 256), (72, 56), (5, 3)):
        x, weight, bias = draw(33, depth, 13), draw(columns, depth, 14), draw(1, columns, 15)[0]
        truth, _ = truth_and_library(x, weight, False, False)
        if fp8:
            (x8, x_scales), (w8, w_scales) = quantized(x), quantized(weight)
            truth = (x8.double() * x_scales) @ (w8.double() * w_scales).t()
        result = ops.linear(x, None, None, weight, bias, fp8, None, None)
        assert relative_error(result, truth + bias.double()) < 5e-3


@pytest.mark.parametrize("rows", [33, 1056, 4128])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_gated_linear(ops: Any, rows: int, fp8: bool) -> None:
    """At Z-Image's size; with an adapter its correction comes before the gate."""
    x, weight = draw(rows, 3840, 16), draw(20480, 3840, 17, 0.02)
    down, up = draw(16, 3840, 18, 0.02), draw(64, 16, 19, 0.2)
    truth, library = truth_and_library(x, weight, fp8, True)
    (plain,) = ops.gated_linear(x, weight, fp8, False, None, None)
    assert_as_exact(plain, library, truth)
    both, y8, scales = ops.gated_linear(x[None], weight, fp8, True, None, None)
    assert torch.equal(both[0], plain)
    assert relative_error((y8.float() * scales)[0], plain.double()) < 0.04
    del truth, library

    truth, library = truth_and_library(x, weight, fp8, False)
    truth[:, 8:72] += 0.5 * (x.double() @ down.double().t()) @ up.double().t()
    library[:, 8:72] += 0.5 * functional.linear(functional.linear(x, down), up)
    (adapted,) = ops.gated_linear(x, weight, fp8, False, down, up)
    assert_as_exact(adapted, gate(library), gate(truth))
