"""Goal: the kernels of a Chronos-2 pass compute what their formulas say, whatever the lengths, gaps and company.

Method: the formula in float64 is the truth; the error may be twice that of PyTorch's own operations in the same
precision. Memory is poisoned before, results must repeat bit for bit, and a row's result must not depend on other rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.kernels.conftest import assert_as_exact, assert_repeats, poison

HALVES = [torch.float16, torch.bfloat16]
EPS = 1e-6
Tensor = torch.Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def like(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


# --- Attention ------------------------------------------------------------------------------------------------------


def rotary(positions: int, head_dim: int = 64) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, device="cuda") / head_dim
    angles = torch.outer(torch.arange(positions, device="cuda").float(), 10000.0**-exponents)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, valid: Tensor, cos: Tensor, sin: Tensor, wide: Any
) -> Tensor:
    """By PyTorch's operations, the rotation in the dtype `wide`."""
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    cos, sin = cos.to(wide), sin.to(wide)
    q = rotated(q.to(wide), cos[keys - queries : keys], sin[keys - queries : keys]).to(q.dtype)
    k = rotated(k.to(wide), cos[:keys], sin[:keys]).to(k.dtype)
    mask = valid.bool()[:, None, None].expand(-1, heads, queries, -1)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return y.transpose(1, 2).flatten(2)


def drawn_rows(rows: int, keys: int, queries: int, heads: int, dtype: torch.dtype, seed: int = 0):
    qkv = (0.6 * draw(rows, keys, 3 * heads * 64, seed=seed)).to(dtype)
    q, k, v = qkv.chunk(3, 2)
    valid = (torch.rand(rows, keys, device="cuda") > 0.2).to(torch.uint8)
    valid[:, -1] = 1
    return q[:, keys - queries :], k, v, valid


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "keys", "queries", "heads"),
    [
        (448, 50, 50, 12), (1, 50, 50, 12), (5, 50, 1, 12), (3, 133, 133, 3), (2, 577, 64, 12), (2, 64, 64, 1),
        (4, 65, 3, 2), (1, 1, 1, 1),
    ],
)  # fmt: skip
def test_row_attention(ops, rows, keys, queries, heads, dtype):
    q, k, v, valid = drawn_rows(rows, keys, queries, heads, dtype)
    cos, sin = rotary(keys)
    poison(q.nbytes)
    result = ops.row_attention(q, k, v, heads, valid, cos, sin)
    truth = attention(q.double(), k.double(), v.double(), heads, valid, cos, sin, torch.float64)
    assert_as_exact(result, attention(q, k, v, heads, valid, cos, sin, torch.float32), truth)
    last = ops.row_attention(q[-1:], k[-1:], v[-1:], heads, valid[-1:], cos, sin)
    assert torch.equal(last[0], result[-1])


def test_row_attention_does_not_read_what_is_masked(ops):
    q, k, v, valid = drawn_rows(3, 70, 70, 2, torch.float16)
    cos, sin = rotary(70)
    first = ops.row_attention(q, k, v, 2, valid, cos, sin)
    for x in (k, v):
        x[valid == 0] = 60000.0
    again = ops.row_attention(q, k, v, 2, valid, cos, sin)
    assert torch.equal(first[valid == 1], again[valid == 1])


def test_row_attention_repeats(ops):
    q, k, v, valid = drawn_rows(7, 133, 133, 12, torch.float16)
    cos, sin = rotary(133)
    assert_repeats(lambda: ops.row_attention(q, k, v, 12, valid, cos, sin))


def test_row_attention_beyond_two_to_the_31(ops):
    rows = 2**31 // (50 * 2304) + 100
    q, k, v, valid = drawn_rows(rows, 50, 50, 12, torch.float16)
    cos, sin = rotary(50)
    result = ops.row_attention(q, k, v, 12, valid, cos, sin)
    alone = ops.row_attention(q[-3:], k[-3:], v[-3:], 12, valid[-3:], cos, sin)
    assert torch.equal(result[-3:], alone)


@pytest.mark.parametrize("dtype", HALVES)
def test_segment_attention(ops, dtype):
    heads, segments = 3, [(0, 5, 0, 5), (5, 1, 5, 1), (6, 130, 6, 130), (136, 2, 140, 64), (138, 66, 204, 100)]
    q, kv = draw(204, heads * 64), draw(304, 2 * heads * 64)
    k, v = (0.6 * kv).chunk(2, 1)
    result = ops.segment_attention(q, k, v, heads, torch.tensor(segments), like(dtype))
    truth, reference = torch.empty(204, heads * 64, device="cuda").double(), torch.empty_like(q)
    for first_query, queries, first_key, keys in segments:
        parts = q[first_query:][:queries], k[first_key:][:keys], v[first_key:][:keys]
        for out, kind in ((truth, torch.float64), (reference, dtype)):
            one, two, three = (x.to(dtype).to(kind).unflatten(1, (heads, 64)).transpose(0, 1)[None] for x in parts)
            y = functional.scaled_dot_product_attention(one, two, three, scale=1.0)
            out[first_query : first_query + queries] = y[0].transpose(0, 1).flatten(1).to(out.dtype)
    assert_as_exact(result.to(dtype), reference.to(dtype), truth)


# --- Norm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [0, 1, 2])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    "shape", [(22400, 768), (50, 768), (1, 4), (3, 16), (7, 1024), (5, 1028), (2, 6144), (33, 500)]
)
def test_residual_norm(ops, shape, dtype, added):
    x = 30 * draw(*shape)
    more = [draw(*shape, dtype=dtype, seed=i) for i in range(1, added + 1)]
    pair = [*more, None, None][:2]
    total = sum(more, x)
    truth = functional.rms_norm(sum((one.double() for one in more), x.double()), shape[1:], eps=EPS)
    reference = functional.rms_norm(total, shape[1:], eps=EPS).to(dtype)
    for keep in (False, True):
        poison(x.nbytes)
        own = x.clone()
        assert_as_exact(ops.residual_norm(own, *pair, keep, EPS, like(dtype)), reference, truth)
        assert torch.equal(own, total if keep else x)


def test_residual_norm_of_rows_that_lie_apart_and_beyond_two_to_the_31(ops):
    def norm(x: Tensor) -> Tensor:
        return ops.residual_norm(x, None, None, False, EPS, like(torch.float16))

    x = draw(64, 3 * 768)[:, 768:1536]
    assert torch.equal(norm(x), norm(x.contiguous()))
    assert_repeats(lambda: norm(x))
    large = torch.empty(2**31 // 768 + 5, 768, device="cuda").fill_(3.0)
    large[-3:] = draw(3, 768)
    assert torch.equal(norm(large)[-3:], norm(large[-3:].clone()))


# --- Products of few rows ---------------------------------------------------------------------------------------------


def few_rows_weight(ops, columns: int, depth: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = (draw(columns, depth, seed=seed) / depth**0.5).to(dtype)
    assert ops.takes_few_rows(weight)
    return weight


def normed_product(x: Tensor, weight: Tensor, relu: bool = False) -> Tensor:
    """The norm in x's precision, rounded to the weight's."""
    y = functional.rms_norm(x, x.shape[1:], eps=EPS).to(weight.dtype) @ weight.T
    return y.relu() if relu else y


def stream_rows(rows: int, width: int) -> Tensor:
    """Rows of all sizes, and one of nothing."""
    x = draw(rows, width) * 10.0 ** torch.linspace(-4, 4, rows, device="cuda")[:, None]
    x[rows // 3] = 0.0
    return x


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(50, 2304, 768), (50, 3072, 768), (1, 768, 768), (64, 768, 3072), (130, 576, 192), (7, 64, 64), (51, 128, 512)],
)
def test_few_rows_product(ops, rows, columns, depth, dtype, relu):
    x, weight = stream_rows(rows, depth), few_rows_weight(ops, columns, depth, dtype)
    poison(rows * columns * 2)
    result = ops.few_rows_product(x, weight, relu, EPS)
    assert_as_exact(result, normed_product(x, weight, relu), normed_product(x.double(), weight.double(), relu))
    assert torch.equal(ops.few_rows_product(x[-1:], weight, relu, EPS)[0], result[-1])


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "width", "inner", "hidden"),
    [(50, 768, 768, 3072), (100, 768, 768, 3072), (3, 192, 192, 384), (9, 256, 64, 1024)],
)
def test_few_rows_layer(ops, monkeypatch, rows, width, inner, hidden, dtype):
    sizes = [(width, inner), (width, width), (hidden, width), (width, hidden)]
    out, own, up, down = (few_rows_weight(ops, *size, dtype, seed=i) for i, size in enumerate(sizes))
    x, mixed = stream_rows(rows, width), draw(rows, inner, dtype=dtype)

    def layer(x: Tensor, mixed: Tensor, *weights: Tensor) -> list[Tensor]:
        out, own, up, down = weights
        first = x + mixed @ out.T
        second = first + normed_product(first, own)
        third = second + normed_product(second, up, relu=True) @ down.T
        return [first, second, third, normed_product(third, up)]

    run = lambda: ops.few_rows_layer(x, mixed, out, own, up, down, EPS)  # noqa: E731
    references = layer(x, mixed, out, own, up, down)
    truths = layer(*(part.double() for part in (x, mixed, out, own, up, down)))

    def check(results: list[Tensor]) -> None:
        for result, reference, truth in zip(results, references, truths, strict=True):
            size = truth.norm(dim=1, keepdim=True).clamp_min(1e-30)  # each row has its own, and an error of its own
            ours, theirs = ((part.double() / size).to(part.dtype) for part in (result, reference))
            assert_as_exact(ours, theirs, truth / size)

    poison(x.nbytes)
    results = run()
    check(results)
    assert_repeats(run)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        replayed = run()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(results, replayed, strict=True))
    monkeypatch.setenv("DIFFUSIONZ_DISABLE_KERNELS", "few_rows_linear")
    check(run())


@pytest.mark.usefixtures("hopper")
def test_few_rows_products_carry_what_is_not_a_number(ops):
    x, weight = draw(50, 768), few_rows_weight(ops, 768, 768, torch.float16)
    x[7, 3], x[9, 0] = torch.nan, torch.inf
    wrong = ops.few_rows_product(x, weight, False, EPS).isnan()
    assert wrong[7].all() and wrong[9].all() and wrong.sum() == 2 * 768


# --- From values to features, and from outputs to quantiles ---------------------------------------------------------


def series(rows: int, steps: int) -> Tensor:
    """Rows of all kinds: at large levels, with gaps, constant, of nothing, of one value."""
    x = draw(rows, steps).cumsum(1) * 10.0 ** torch.randint(-3, 4, (rows, 1), device="cuda")
    x += 1e5 * draw(rows, 1, seed=1).round()
    x[0::7, : steps // 2] = torch.nan
    x[1::7][torch.rand_like(x[1::7]) < 0.3] = torch.nan
    x[2::7] = 5.0
    x[3::7] = torch.nan
    x[4::7, :-1] = torch.nan
    return x


def standardised(context: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(arcsinh of the standardised values, loc, scale) in float64; loc and scale rounded to float32, as kept."""
    count = context.isnan().logical_not().sum(1, keepdim=True)
    wide = context.double()
    loc = torch.where(count > 0, wide.nansum(1, keepdim=True) / count, 0.0).float()
    scale = torch.where(count > 0, ((wide - loc).square().nansum(1, keepdim=True) / count).sqrt(), 1.0).float()
    scale[scale == 0] = 1e-5
    return ((values.double() - loc) / scale).asinh(), loc[:, 0], scale[:, 0]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    ("rows", "steps", "horizon", "patch", "register"),
    [(448, 768, 16, 16, True), (20, 8192, 64, 16, True), (30, 64, 24, 8, False), (9, 6, 3, 3, True)],
)  # fmt: skip
def test_series_tokens(ops, rows, steps, horizon, patch, register, dtype):
    context, future = series(rows, steps), draw(rows, horizon)
    future[::2, horizon // 2 :] = torch.nan
    poison(rows * (steps + horizon) * 16)
    features, valid, loc, scale = ops.series_tokens(context, future, patch, register, True, 512.0, like(dtype))
    z, true_loc, true_scale = standardised(context, torch.cat([context, future], 1))
    # The order of a float64 sum is free; its rounding to float32 then may be one place off.
    torch.testing.assert_close(loc, true_loc, rtol=2**-23, atol=0)
    torch.testing.assert_close(scale, true_scale, rtol=2**-23, atol=0)

    tokens = (steps + horizon) // patch + register
    features = features.view(rows, tokens, -1).double()
    third, ones = 3 * patch, 1 if dtype == torch.float32 else 2
    value = features[..., :third]
    if dtype != torch.float32:
        assert torch.equal(value, features[..., 2 * third : 3 * third])  # the high part, for both parts of the weight
        value = value + features[..., third : 2 * third]
    rest = features[..., third * (1 if ones == 1 else 3) :]
    is_register = torch.zeros(tokens, dtype=torch.bool, device="cuda")
    if register:
        is_register[steps // patch] = True
    assert (value[:, is_register] == 0).all()
    for mark, columns in ((~is_register, rest[..., :ones]), (is_register, rest[..., ones : 2 * ones])):
        assert torch.equal(columns, mark.double()[None, :, None].expand_as(columns))
    assert (rest[..., 2 * ones :] == 0).all()

    value = value[:, ~is_register]
    time, numbers, observed = (value[..., i * patch : (i + 1) * patch].flatten(1) for i in range(3))
    known = z.isnan().logical_not()
    assert torch.equal(observed, known.double())
    steps_from_now = torch.arange(-steps, horizon, device="cuda").double() / 512
    exact = {torch.float32: 2**-22, torch.float16: 2**-20, torch.bfloat16: 2**-15}[dtype]
    torch.testing.assert_close(time, steps_from_now.expand_as(time), rtol=exact, atol=2**-24)
    torch.testing.assert_close(numbers[known], z[known], rtol=exact, atol=2**-22)
    assert (numbers[~known] == 0).all()
    context_valid = context.view(rows, -1, patch).isnan().logical_not().any(2)
    assert torch.equal(valid[:, : steps // patch].bool(), context_valid)
    assert (valid[:, steps // patch :] == 1).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_weight_of_series_tokens(ops, dtype):
    """One product gives what a layer on float32 features gives, its bias, and the register's embedding."""
    weight, bias, register = draw(96, 48, seed=1) / 7, draw(96, seed=2), draw(96, seed=3)
    context, future = series(30, 160), draw(30, 32)
    features, *_ = ops.series_tokens(context, future, 16, True, True, 512.0, like(dtype))
    plain, *_ = ops.series_tokens(context, future, 16, True, True, 512.0, like(torch.float32))
    truth = plain[:, :48].double() @ weight.double().T + bias
    truth.view(30, -1, 96)[:, 10] = register.double()
    own = ops.series_weight(weight, bias, register, like(dtype))
    result = features.double() @ own.double().T
    exact = {torch.float32: 2**-23, torch.float16: 2**-19, torch.bfloat16: 2**-14}[dtype]
    assert (result - truth).abs().max() <= exact * truth.abs().max()


def test_series_tokens_repeat(ops):
    context, future = series(50, 768), draw(50, 16)
    assert_repeats(lambda: ops.series_tokens(context, future, 16, True, True, 8192.0, like(torch.float16)))


def test_series_tokens_beyond_two_to_the_31(ops):
    rows = 2**31 // (50 * 160) + 50
    context, future = torch.randn(rows, 768, device="cuda"), torch.full((rows, 16), torch.nan, device="cuda")
    features, valid, loc, scale = ops.series_tokens(context, future, 16, True, True, 8192.0, like(torch.float16))
    few = ops.series_tokens(context[-3:].clone(), future[-3:].clone(), 16, True, True, 8192.0, like(torch.float16))
    for all_rows, some in zip((features.view(rows, -1), valid, loc, scale), few, strict=True):
        assert torch.equal(all_rows[-3:], some.view(3, *all_rows.shape[1:]))


@pytest.mark.parametrize("arcsinh", [True, False])
@pytest.mark.parametrize("shape", [(448, 1, 21, 16), (3, 64, 21, 16), (2, 5, 6, 8), (1, 1, 1, 1)])
def test_series_quantiles(ops, shape, arcsinh):
    z, loc, scale = 3 * draw(*shape), 100 * draw(shape[0]), draw(shape[0], seed=1).abs()
    poison(z.nbytes)

    def quantiles(z, loc, scale):
        z = z.sinh() if arcsinh else z
        return z.transpose(1, 2).flatten(2) * scale[:, None, None] + loc[:, None, None]

    truth = quantiles(z.double(), loc.double(), scale.double())
    assert_as_exact(ops.series_quantiles(z, loc, scale, arcsinh), quantiles(z, loc, scale), truth)
    assert_repeats(lambda: ops.series_quantiles(z, loc, scale, arcsinh), times=20)
