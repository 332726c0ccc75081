"""Goal: the operations of the autoencoder, and attention, compute what their formulas say, at any size.

Method: the formula in float64 is the truth; the error may be twice that of PyTorch's own operations in the same
precision. Results must repeat bit for bit in memory that held something else, and a graph's replay must give the same
bits. The whole decoder is compared with its own reference path, float32 on the CPU.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from tests.kernels.conftest import assert_as_exact, assert_repeats, poison, relative_error

Tensor = torch.Tensor
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(sum(shape))
    x = (torch.randn(*shape, generator=generator, device="cuda") * scale + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def replayed(run: Callable[[], Any]) -> Any:
    """The result of `run` captured in a graph, written a second time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = run()
        graph.replay()
        graph.replay()
        stream.synchronize()
    return result


def norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return functional.silu(functional.group_norm(x, groups, weight, bias, EPS))


# batch, channels, height, width, groups: the decoder's, ones that vectors of 16 bytes do not tile, one pixel.
NORMS = [
    (1, 512, 64, 64, 32), (1, 128, 256, 200, 32), (2, 256, 37, 21, 32), (1, 72, 33, 35, 9), (2, 66, 5, 7, 11),
    (3, 96, 1, 1, 8), (1, 2056, 3, 3, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORMS)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_group_norm(ops: Any, shape: tuple[int, ...], dtype: torch.dtype, mean: float) -> None:
    batch, channels, height, width, groups = shape
    x = draw(batch, channels, height, width, dtype=dtype, mean=mean)
    weight, bias = draw(channels, dtype=dtype), draw(channels + 1, dtype=dtype)[1:].clone()
    poison(x.numel() * 8)
    y = ops.group_norm(x, weight, bias, groups, EPS, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    truth = norm(x.double(), weight.double(), bias.double(), groups)
    assert_as_exact(y, norm(x, weight, bias, groups), truth)
    plain = ops.group_norm(x, weight, bias, groups, EPS, False)
    truth = functional.group_norm(x.double(), groups, weight.double(), bias.double(), EPS)
    assert_as_exact(plain, functional.group_norm(x, groups, weight, bias, EPS), truth)


def test_group_norm_repeats(ops: Any) -> None:
    x, weight, bias = draw(1, 256, 128, 120), draw(256), draw(256)
    run = lambda: ops.group_norm(x, weight, bias, 32, EPS, True)  # noqa: E731
    assert_repeats(run)
    assert torch.equal(replayed(run), run())


def test_group_norm_of_more_than_two_to_the_31_numbers(ops: Any) -> None:
    x = torch.empty(1, 256, 4100, 2052, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x.normal_()
    weight, bias = draw(256), draw(256)
    y = ops.group_norm(x, weight, bias, 32, EPS, True)
    for group in (0, 31):  # a group is a picture of its own
        part = slice(8 * group, 8 * group + 8)
        truth = norm(x[:, part].double(), weight[part].double(), bias[part].double(), 1)
        assert relative_error(y[:, part], truth) < 4e-3


# batch, in, height, width, out, kernel: the decoder's, sides that 16 does not divide, channels that tiles do not.
CONVS = [
    (1, 512, 64, 64, 512, 3), (1, 128, 128, 96, 128, 3), (1, 16, 32, 32, 512, 3), (2, 256, 50, 38, 128, 3),
    (1, 64, 130, 90, 72, 3), (1, 8, 3, 5, 8, 3), (1, 40, 17, 16, 136, 3), (1, 512, 40, 40, 256, 1),
    (2, 256, 33, 20, 128, 1), (1, 3, 32, 32, 128, 3), (1, 128, 32, 32, 3, 3),
]  # fmt: skip


@pytest.mark.parametrize("shape", CONVS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv2d(ops: Any, shape: tuple[int, ...], with_residual: bool) -> None:
    batch, channels, height, width, out, kernel = shape
    x, weight = (
        draw(batch, channels, height, width),
        draw(out, channels, kernel, kernel, scale=(channels * kernel**2) ** -0.5),
    )
    bias = draw(out)
    residual = draw(batch, out, height, width) if with_residual else None
    groups = 8 if out % 8 == 0 else 1
    norm_weight, norm_bias = draw(out), draw(out)

    def reference(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *norms: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = functional.conv2d(x, weight, bias, padding=kernel // 2)
        y = y if residual is None else y + residual
        return y, norm(y, *norms, groups)

    inputs = (x, weight, bias, residual, norm_weight, norm_bias)
    truth = reference(*(tensor if tensor is None else tensor.double() for tensor in inputs))
    poison(batch * out * height * width * 4)
    y, normed, _ = ops.conv2d_group_norm(*inputs, groups, EPS)
    theirs = reference(*inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_exact(y, theirs[0], truth[0])
    assert_as_exact(normed, theirs[1], truth[1])
    assert torch.equal(ops.conv2d(x, weight, bias, residual), y)


# batch, in, in of the shortcut, height, width, out.
@pytest.mark.parametrize(
    "shape", [(1, 128, 256, 64, 48, 128), (2, 256, 512, 19, 33, 256), (1, 64, 8, 16, 16, 72), (1, 64, 3, 16, 16, 64)]
)
def test_conv2d_with_shortcut(ops: Any, shape: tuple[int, ...]) -> None:
    batch, channels, shortcut_channels, height, width, out = shape
    x, weight, bias = (
        draw(batch, channels, height, width),
        draw(out, channels, 3, 3, scale=(9 * channels) ** -0.5),
        draw(out),
    )
    shortcut_x = draw(batch, shortcut_channels, height, width)
    shortcut_weight = draw(out, shortcut_channels, 1, 1, scale=shortcut_channels**-0.5)
    inputs = (x, weight, bias, shortcut_x, shortcut_weight, draw(out + 1)[1:].clone())

    def reference(x: Tensor, weight: Tensor, bias: Tensor, *shortcut: Tensor) -> Tensor:
        return functional.conv2d(x, weight, bias, padding=1) + functional.conv2d(*shortcut)

    truth = reference(*(tensor.double() for tensor in inputs))
    poison(batch * out * height * width * 4)
    run = lambda: ops.conv2d_with_shortcut(*inputs)  # noqa: E731
    assert_as_exact(run(), reference(*inputs), truth)
    assert_repeats(run)


@pytest.mark.usefixtures("hopper")
def test_conv2d_leaves_the_moments_on_hopper(ops: Any) -> None:
    x, weight, bias = draw(1, 64, 32, 32), draw(64, 64, 3, 3), draw(64)
    assert ops.conv2d_group_norm(x, weight, bias, None, bias, bias, 32, EPS)[2]


def test_conv2d_carries_what_is_not_a_number(ops: Any) -> None:
    x, weight, bias = draw(1, 64, 20, 20), draw(64, 64, 3, 3, scale=0.05), draw(64)
    x[0, 5, 19, 19] = float("nan")
    y, normed, _ = ops.conv2d_group_norm(x, weight, bias, None, bias, bias, 32, EPS)
    assert y.isnan()[0, :, 18:, 18:].all() and not y.isnan()[0, :, :18].any()
    assert normed.isnan().all()


@pytest.mark.parametrize("shape", [(1, 256, 64, 48, 3), (1, 512, 32, 32, 3), (1, 128, 64, 64, 1)])
def test_conv2d_repeats(ops: Any, shape: tuple[int, ...]) -> None:
    batch, channels, height, width, kernel = shape
    x, weight, bias = draw(batch, channels, height, width), draw(128, channels, kernel, kernel, scale=0.02), draw(128)
    residual = draw(batch, 128, height, width)
    run = lambda: ops.conv2d_group_norm(x, weight, bias, residual, bias, bias, 32, EPS)[:2]  # noqa: E731
    assert_repeats(run)
    assert all(torch.equal(a, b) for a, b in zip(replayed(run), run(), strict=True))


def test_conv2d_of_more_than_two_to_the_31_numbers(ops: Any) -> None:
    x = torch.empty(1, 128, 4112, 4096, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x.normal_()
    weight, bias = draw(128, 128, 3, 3, scale=0.03), draw(128)
    y = ops.conv2d(x, weight, bias, None)
    truth = functional.conv2d(x[:, :, -40:].double(), weight.double(), bias.double(), padding=1)[:, :, 1:]
    assert relative_error(y[:, :, -39:], truth) < 4e-3


@pytest.mark.parametrize("shape", [(1, 512, 32, 32, 512), (2, 256, 25, 19, 256), (1, 64, 3, 2, 64)])
def test_upsample_conv2d(ops: Any, shape: tuple[int, ...]) -> None:
    batch, channels, height, width, out = shape
    inputs = (
        draw(batch, channels, height, width),
        draw(out, channels, 3, 3, scale=(channels * 9) ** -0.5),
        draw(out),
        draw(out),
        draw(out),
    )

    def reference(x: Tensor, weight: Tensor, bias: Tensor, *norms: Tensor) -> tuple[Tensor, Tensor]:
        y = functional.conv2d(functional.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
        return y, norm(y, *norms, 32)

    truth = reference(*(tensor.double() for tensor in inputs))
    poison(batch * out * height * width * 16)
    run = lambda: ops.upsample_conv2d_group_norm(*inputs, 32, EPS)  # noqa: E731
    for ours, theirs, exact in zip(run(), reference(*inputs), truth, strict=True):
        assert_as_exact(ours, theirs, exact)
    assert_repeats(run, 50)


# batch, channels, height, width, out: the decoder's, ones that the kernel takes, ones that it leaves to the reference.
OUTPUTS = [
    (1, 128, 64, 96, 3), (2, 128, 37, 21, 3), (1, 64, 1, 1, 1), (1, 32, 16, 33, 2), (1, 96, 5, 70, 3),
    (1, 256, 16, 16, 3), (1, 128, 16, 16, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", OUTPUTS)
def test_norm_conv2d(ops: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, channels, height, width, out = shape
    x, weight = (
        draw(batch, channels, height, width, dtype=dtype),
        draw(out, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5),
    )
    inputs = (
        x,
        draw(channels, dtype=dtype),
        draw(channels + 1, dtype=dtype)[1:].clone(),
        weight,
        draw(out, dtype=dtype),
    )

    def reference(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv2d(norm(x, norm_weight, norm_bias, 32), weight, bias, padding=1)

    truth = reference(*(tensor.double() for tensor in inputs))
    run = lambda pixels: ops.norm_conv2d(*inputs[:3], 32, EPS, *inputs[3:], pixels)  # noqa: E731
    poison(batch * out * height * width * 4)
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert_as_exact(run(False), reference(*inputs), truth)
        pixels = run(True)
        assert pixels.shape == (batch, height, width, out) and pixels.dtype == torch.uint8
        exact = ((truth.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1) * 255).round()
        off = (pixels.double() - exact).abs()
        limit = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 4}[dtype]
        assert off.max() <= limit and off.mean() < 0.3, (off.max(), off.mean())
        assert_repeats(lambda: run(True), 50)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


# batch, tokens, heads, heads of keys, width, causal: the transformer's, the text encoder's, the VAE's, odd ones.
ATTENTIONS = [
    (1, 1056, 30, 30, 128, False), (2, 1057, 4, 4, 128, False), (1, 64, 32, 8, 128, True), (3, 33, 8, 2, 64, True),
    (1, 1, 4, 4, 128, True), (1, 5, 4, 2, 256, False), (1, 1024, 1, 1, 512, False), (2, 333, 2, 1, 512, False),
    (1, 200, 2, 2, 384, True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTIONS)
def test_attention(ops: Any, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    batch, tokens, heads, kv_heads, width, causal = shape
    # Parts of one product, as the callers have them.
    parts = (
        draw(batch, tokens, (heads + 2 * kv_heads) * width, dtype=dtype)
        .unflatten(-1, (-1, width))
        .split([heads, kv_heads, kv_heads], 2)
    )
    truth = attend(*(part.double() for part in parts), causal)
    run = lambda: ops.attention(*parts, causal)  # noqa: E731
    poison(batch * tokens * heads * width * 4)
    y = run()
    assert y.is_contiguous()
    assert_as_exact(y, attend(*parts, causal), truth)
    assert_repeats(run, 50)
    assert torch.equal(replayed(run), y)


# batch, queries, keys, heads, heads of keys: Z-Image's at 1024x1024, its last layer's, and none that tiles divide.
OWN_ATTENTIONS = [
    (1, 4160, 4160, 30, 30), (1, 4096, 4160, 30, 30), (2, 1057, 1057, 4, 2), (1, 1, 1, 2, 2), (3, 191, 33, 3, 1),
    (1, 193, 81, 2, 2), (1, 400, 160, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", OWN_ATTENTIONS)
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.usefixtures("hopper")
def test_attention_sm90(ops: Any, shape: tuple[int, ...], spread: float) -> None:
    batch, queries, keys, heads, kv_heads = shape
    tokens = max(queries, keys)
    parts = (
        draw(batch, tokens, (heads + 2 * kv_heads) * 128).unflatten(-1, (-1, 128)).split([heads, kv_heads, kv_heads], 2)
    )
    q, k, v = parts[0][:, :queries].mul(spread), parts[1][:, :keys], parts[2][:, :keys]
    q = q if spread != 1.0 else parts[0][:, :queries]  # strided, as the callers have it
    truth = attend(*(part.double() for part in (q, k, v)), False)
    poison(batch * queries * heads * 128 * 4)
    run = lambda: ops.attention_sm90(q, k, v)  # noqa: E731
    y = run()
    assert_as_exact(y, attend(q, k, v, False), truth)
    assert_repeats(run)
    assert torch.equal(replayed(run), y)


@pytest.mark.usefixtures("hopper")
def test_attention_sm90_carries_what_is_not_a_number(ops: Any) -> None:
    q, k, v = draw(1, 300, 3, 2, 128).unbind(2)
    q[0, 7, 1, 3], k[0, 299, 0, 0] = float("nan"), float("nan")
    nan = ops.attention_sm90(q, k, v).unflatten(-1, (2, 128)).isnan()
    assert nan[0, :, 0].all() and nan[0, 7, 1].all() and nan[0, :, 1].sum() == 128


@pytest.mark.usefixtures("hopper")
def test_attention_sm90_of_more_than_two_to_the_31_numbers(ops: Any) -> None:
    tokens, heads = 512, 30
    batch = 2**31 // (tokens * heads * 128) + 3  # in the result; q, k and v together are three times that
    x = torch.empty(batch, tokens, 3 * heads * 128, device="cuda", dtype=torch.bfloat16).normal_()
    q, k, v = x.unflatten(-1, (-1, 128)).split([heads] * 3, 2)
    y = ops.attention_sm90(q, k, v)
    assert torch.equal(y[-2:], ops.attention_sm90(*(part[-2:].clone() for part in (q, k, v))))


def random_vae(file: pathlib.Path, channels: tuple[int, ...], latents: int) -> None:
    """An autoencoder with these channels, from the pixels' end, in diffusers' names."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}

    def conv(name: str, out: int, width: int, kernel: int) -> None:
        tensors[f"{name}.weight"] = (
            torch.randn(out, width, kernel, kernel, generator=generator) * (width * kernel**2) ** -0.5
        )
        tensors[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def resnet(name: str, width: int, out: int) -> None:
        norm(f"{name}.norm1", width)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv1", out, width, 3)
        conv(f"{name}.conv2", out, out, 3)
        if width != out:
            conv(f"{name}.conv_shortcut", out, width, 1)

    def middle(half: str, width: int) -> None:
        for i in range(2):
            resnet(f"{half}.mid_block.resnets.{i}", width, width)
        norm(f"{half}.mid_block.attentions.0.group_norm", width)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            name = f"{half}.mid_block.attentions.0.{name}"
            tensors[f"{name}.weight"] = torch.randn(width, width, generator=generator) * width**-0.5
            tensors[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    width = channels[-1]
    conv("decoder.conv_in", width, latents, 3)
    middle("decoder", width)
    for i, out in enumerate(reversed(channels)):
        for j in range(3):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", width, out)
            width = out
        if i + 1 < len(channels):
            conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3)
    norm("decoder.conv_norm_out", width)
    conv("decoder.conv_out", 3, width, 3)

    conv("encoder.conv_in", width, 3, 3)
    for i, out in enumerate(channels):
        for j in range(2):
            resnet(f"encoder.down_blocks.{i}.resnets.{j}", width, out)
            width = out
        if i + 1 < len(channels):
            conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width, 3)
    middle("encoder", width)
    norm("encoder.conv_norm_out", width)
    conv("encoder.conv_out", 2 * latents, width, 3)
    save_file(tensors, file)


@pytest.mark.parametrize("channels", [(32, 64, 64), (128, 128, 256, 512)])
@pytest.mark.parametrize("size", [(1, 16, 16), (2, 10, 14)])
def test_the_decoder_gives_the_picture_of_the_reference_path(
    ops: Any, channels: tuple[int, ...], size: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "vae.safetensors"
    random_vae(file, channels, 16)
    batch, height, width = size
    latents = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(1))
    reference = ops.vae_decode(str(file), latents, torch.float32, False)
    assert reference.device.type == "cpu"
    # bfloat16 carries 8 bits through some thirty layers.
    for dtype, limit in [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)]:
        with torch.backends.cudnn.flags(allow_tf32=False):
            assert (
                relative_error(ops.vae_decode(str(file), latents.cuda(), dtype, False).cpu(), reference.double())
                < limit
            )
    ours = ops.vae_decode(str(file), latents.cuda(), torch.bfloat16, True).cpu()
    expected = ops.vae_decode(str(file), latents, torch.float32, True)
    assert (
        ours.shape == expected.shape == (batch, height * 2 ** (len(channels) - 1), width * 2 ** (len(channels) - 1), 3)
    )
    assert (ours.double() - expected.double()).abs().mean() < 2.5


def test_the_encoder_gives_the_latents_of_the_reference_path(ops: Any, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "vae.safetensors"
    random_vae(file, (128, 128, 256, 512), 16)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (72, 104, 3), dtype=torch.uint8, generator=generator)
    noise = torch.randn(1, 16, 9, 13, generator=generator)
    reference = ops.vae_encode(str(file), pixels, noise, torch.float32).double()
    with torch.backends.cudnn.flags(allow_tf32=False):
        for dtype, limit in [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)]:
            ours = ops.vae_encode(str(file), pixels.cuda(), noise.cuda(), dtype)
            assert relative_error(ours.cpu(), reference) < limit
