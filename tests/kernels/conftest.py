"""What the tests of kernels share: the module of torch operations and the measures of error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

MODULE = ROOT / "build" / "tests" / "kernel_ops.so"


@pytest.fixture(scope="session")
def ops() -> Any:
    """torch.ops.diffusionz: the operations of src/ops on a CUDA device, as tests/kernels/*_binding.cc expose them."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert MODULE.is_file(), f"{MODULE} is not built: configure with -DDIFFUSIONZ_TESTS=ON where torch has CUDA"
    torch.ops.load_library(str(MODULE))
    return torch.ops.diffusionz


@pytest.fixture(scope="session")
def hopper(ops: Any) -> None:
    """For tests of kernels that are Hopper's alone."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """||result - truth|| / ||truth||, NaN as infinity."""
    error = ((result.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()
    return error if error == error else float("inf")


def assert_as_exact(result: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, ratio: float = 2.0) -> None:
    """`result` is as near to `truth`, which is float64, as `reference` is, PyTorch's own in the same precision: within
    `ratio` in the norm, and at the worst number by that and one rounding of the largest number."""
    assert result.shape == truth.shape and result.dtype == reference.dtype
    ours, theirs = relative_error(result, truth), relative_error(reference, truth)
    rounding = torch.finfo(result.dtype).eps
    # Of few numbers PyTorch's may by chance be exact.
    chance = rounding if truth.numel() < 1024 else 1e-3 * rounding
    assert ours <= ratio * theirs + chance, f"error {ours:.3e}, the reference's {theirs:.3e}"
    worst, worst_reference = ((numbers.double() - truth).abs().max().item() for numbers in (result, reference))
    allowed = ratio * worst_reference + rounding * truth.abs().max().item()
    assert worst <= allowed, f"worst error {worst:.3e}, the reference's {worst_reference:.3e}"


def assert_repeats(run: Callable[[], Any], times: int = 200) -> None:
    """`run` gives the same bytes every time, in memory that held something else before."""

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        return [tensor for part in value for tensor in tensors(part)]

    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    first = [raw(tensor).clone() for tensor in tensors(run())]
    size = sum(tensor.numel() for tensor in first)
    for i in range(times):
        poison(size, i)
        again = [raw(tensor) for tensor in tensors(run())]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"run {i} differs from the first"


def poison(nbytes: int, salt: int = 0) -> None:
    """Fills memory that the next allocations take with NaN in every type: who leaves an output unwritten is seen."""
    pieces = [torch.full((max(nbytes, 1),), 0xFF - salt % 2, dtype=torch.uint8, device="cuda") for _ in range(3)]
    del pieces
