"""How far the engine may be from the reference, and the comparison that says so."""

import torch

# Largest difference over the largest value of the reference. Both sides compute in float32 and differ only in the order
# of sums: a product of n terms then differs by some sqrt(n) * 6e-8, and the depth adds up. The bounds stand a few times
# above the worst that was seen, and a tenth more in one row of one weight is still over them.
BOUNDS = {
    "sigmas": 0.0,  # bit for bit: the model's output follows every bit of its time
    "features": 3e-6,
    "transformer": 1e-5,
    "latents": 2e-5,  # each step feeds its error to the next
    "decode": 1e-5,
    "encode": 1e-5,
    "pixels": 2 / 255,  # end to end; of the full range, at every pixel
    "patches": 5e-5,  # Chronos-2's features
    "hidden": 5e-5,  # and after each layer; upstream's means are off by roundings of the level
    "forecast": 1e-4,  # Chronos-2 end to end, as assert_forecasts measures
    "embedding": 5e-5,
    "forecast, float64 means": 3e-5,  # the same with upstream's scaling in float64
    "shortcut": 1e-5,  # the same with and without a shortcut
}
# Low precision is judged by its error against float32: at most this many times the reference's own error in it.
LOW_PRECISION_RATIO = 2.0

worst: dict[str, float] = {}  # of this run, printed at its end


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} is not {tuple(reference.shape)}"
    assert torch.isfinite(ours).all() and torch.isfinite(reference).all()
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def assert_parity(stage: str, ours: torch.Tensor, reference: torch.Tensor, note: object = "") -> None:
    error = relative_error(ours, reference)
    worst[stage] = max(error, worst.get(stage, 0.0))
    assert error <= BOUNDS[stage], f"{stage} {note}: {error:.2e} of the largest value; the bound is {BOUNDS[stage]:.0e}"


def assert_forecasts(
    ours: torch.Tensor, reference: torch.Tensor, centres: torch.Tensor, note: object = "", stage: str = "forecast"
) -> None:
    """[targets, levels, steps], and the mean of each target's history: errors are relative to the largest distance from
    it. Two roundings of a value are no difference: they are all that a forecast of a constant is made of."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} is not {tuple(reference.shape)}"
    for i, (one, other) in enumerate(zip(ours.double(), reference.double(), strict=True)):
        assert torch.isfinite(one).all() and torch.isfinite(other).all()
        rounding = 2 * torch.finfo(torch.float32).eps * other.abs().max()
        difference = ((one - other).abs().max() - rounding).clamp(min=0)
        distance = (other - centres[i]).abs().max()
        error = 0.0 if difference == 0 else (difference / distance).item()
        worst[stage] = max(error, worst.get(stage, 0.0))
        assert error <= BOUNDS[stage], f"{stage} {note}, target {i}: {error:.2e}; the bound is {BOUNDS[stage]:.0e}"


def assert_same_pixels(ours: torch.Tensor, reference: torch.Tensor, note: object = "") -> None:
    """uint8 pictures."""
    assert ours.dtype == reference.dtype == torch.uint8
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} is not {tuple(reference.shape)}"
    error = (ours.int() - reference.int()).abs().max().item() / 255
    worst["pixels"] = max(error, worst.get("pixels", 0.0))
    assert error <= BOUNDS["pixels"], f"pixels {note}: {error * 255:.0f}/255; the bound is 2/255"
