"""Synthetic series, made in batches on the GPU: no real series is read.

Each family is a function of a number of rows that returns [rows, LENGTH] float32. Eight consecutive rows of a family
share their seasonal periods (and, in `causal_graphs`, drive one another), so that blocks of eight can serve as related
variates. Families with a recursion over time keep time as the first axis and are captured as a CUDA graph once.

Sources of the ideas: Chronos-2 (arXiv 2510.15821, section 4: TSI, TCM, KernelSynth, ETS, AR as base generators) and
Chronos (arXiv 2403.07815: KernelSynth). Distributions and weights are our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LENGTH = 1280  # values of a row: a context of 1024, a horizon of 128 and room to choose where they lie
BURN_IN = 160  # steps that recursions run before the first value that is kept
BLOCK = 8

# (share, shorter period, longer period), as series with calendars have them: months, quarters, weekdays, hours, half
# hours, quarter hours, weeks of the year. 0: none. A share of random periods is added in `periods`.
CALENDARS = [
    (26, 12, 0),
    (11, 4, 0),
    (9, 7, 0),
    (7, 24, 0),
    (8, 24, 168),
    (4, 48, 336),
    (2, 48, 0),
    (2, 96, 672),
    (5, 52.18, 0),
    (4, 7, 365.25),
    (3, 365.25, 0),
    (1.5, 7, 30.44),
    (1.5, 5, 0),
    (1, 6, 0),
    (1, 10, 0),
    (1, 2, 0),
    (1, 3, 0),
    (1, 60, 0),
    (1, 144, 1008),
    (1, 30.44, 0),
    (1, 12, 132),
    (1, 5, 260),
]
BINS = 64  # of a seasonal template


class Source:
    """Draws random tensors on one device."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, device=self.device) * (high - low) + low

    def log_uniform(self, *shape: int, low: float, high: float) -> Tensor:
        return (self.uniform(*shape) * math.log(high / low) + math.log(low)).exp()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def chance(self, *shape: int, p: float) -> Tensor:
        return torch.rand(shape, device=self.device) < p

    def pick(self, count: int, weights: list[float]) -> Tensor:
        return torch.multinomial(
            torch.tensor(weights, device=self.device, dtype=torch.float32), count, replacement=True
        )

    def choice(self, count: int, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self.device)[torch.randint(len(values), (count,), device=self.device)]


def per_block(x: Tensor) -> Tensor:
    return x.repeat_interleave(BLOCK, 0)


def standardise(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9)


def periods(s: Source, rows: int, none: float) -> tuple[Tensor, Tensor]:
    """Shorter and longer period of each row, equal within blocks; 0 where there is none."""
    blocks = rows // BLOCK
    table = torch.tensor(CALENDARS, device=s.device)
    kind = s.pick(blocks, [c[0] for c in CALENDARS])
    short, long = table[kind, 1], table[kind, 2]
    own = s.log_uniform(blocks, low=2.5, high=300.0)
    own = torch.where(s.chance(blocks, p=0.5), own.round(), own)
    random = s.chance(blocks, p=0.14)
    short, long = torch.where(random, own, short), torch.where(random & s.chance(blocks, p=0.7), 0.0, long)
    empty = s.chance(blocks, p=none)
    short, long = torch.where(empty, 0.0, short), torch.where(empty, 0.0, long)
    return per_block(short), per_block(long)


def coloured(s: Source, rows: int, exponent: Tensor, length: int = LENGTH) -> Tensor:
    """Noise whose power falls as frequency^-exponent (rows of it), standardised."""
    n = 2 * length
    spectrum = torch.fft.rfft(s.normal(rows, n))
    frequency = torch.arange(spectrum.shape[1], device=s.device, dtype=torch.float32).clamp_min(0.5)
    return standardise(torch.fft.irfft(spectrum * frequency ** (-0.5 * exponent[:, None]), n)[:, :length])


def autoregressive(s: Source, rows: int, phi: Tensor, length: int = LENGTH) -> Tensor:
    """AR(1) noise of unit variance with the given coefficients in (-1, 1)."""
    n = 2 * length
    response = torch.fft.rfft(phi[:, None] ** torch.arange(length, device=s.device), n)
    x = torch.fft.irfft(torch.fft.rfft(s.normal(rows, n)) * response, n)[:, length:]
    return x * (1 - phi.square()).sqrt()[:, None]


def wander(s: Source, rows: int) -> Tensor:
    """A slow path of unit scale: random knots, a random number of them, joined smoothly."""
    knots = 80
    x = s.normal(rows, knots)
    position = s.log_uniform(rows, 1, low=1.5, high=70.0) * torch.linspace(0, 1, LENGTH, device=s.device)
    low = position.floor().long()
    share = position - low
    share = share * share * (3 - 2 * share)
    return x.gather(1, low) * (1 - share) + x.gather(1, low + 1) * share


def innovations(s: Source, rows: int, length: int = LENGTH) -> Tensor:
    """White noise of about unit scale: Gaussian, Student t, Laplace, uniform, skewed, or of changing volatility."""
    x = s.normal(rows, length)
    kind = s.pick(rows, [6, 1.5, 1, 0.5, 0.5, 1.5])[:, None]
    u = s.uniform(rows, length, low=1e-6, high=1 - 1e-6)
    freedom = s.uniform(rows, 1, low=2.5, high=6.0)
    # Bailey's polar method: t = normal's angle with the radius sqrt(nu (u^(-2/nu) - 1))
    student = (freedom * (u ** (-2 / freedom) - 1)).sqrt() * torch.cos(2 * math.pi * s.uniform(rows, length))
    student = student / (freedom / (freedom - 2)).sqrt()
    laplace = -(u - 0.5).sign() * torch.log1p(-2 * (u - 0.5).abs()) / math.sqrt(2)
    volatility = autoregressive(s, rows, 1 - s.log_uniform(rows, low=0.004, high=0.3), length)
    volatility = (s.uniform(rows, 1, low=0.3, high=0.9) * volatility - 0.3).exp()
    for index, other in enumerate((student, laplace, (u - 0.5) * math.sqrt(12), -torch.log(u) - 1, x * volatility), 1):
        x = torch.where(kind == index, other, x)
    return x


def templates(s: Source, rows: int, bins: Tensor) -> Tensor:
    """Shapes of one season [rows, BINS], of which the first `bins` are used; about unit scale."""
    bins = bins[:, None].clamp(2, BINS)
    position = torch.arange(BINS, device=s.device)[None]
    phase = position / bins
    harmonics = torch.zeros(rows, BINS, device=s.device)
    decay = s.uniform(rows, 1, low=0.3, high=3.0)
    for k in range(1, 9):
        weight = s.normal(rows, 1) * k**-decay
        harmonics += weight * torch.cos(2 * math.pi * (k * phase + s.uniform(rows, 1))) * (2 * k <= bins)
    each = s.normal(rows, BINS)
    smooth = each + each.roll(1, 1) + 0.5 * each.roll(2, 1)
    sine = torch.cos(2 * math.pi * (phase + s.uniform(rows, 1)))
    spikes = (2.0 * s.normal(rows, BINS)).exp()
    days = s.uniform(rows, 1, low=0.1, high=0.5)
    workweek = ((phase + s.uniform(rows, 1)) % 1 > days).float() + 0.15 * each
    daylight = (sine - s.uniform(rows, 1, low=-0.5, high=0.5)).clamp_min(0) ** s.uniform(rows, 1, low=0.6, high=2.0)
    kind = s.pick(rows, [5, 2.5, 1, 1.5, 0.6, 0.8, 0.7])[:, None]
    out = harmonics
    for index, other in enumerate((each, smooth, sine, spikes, workweek, daylight), 1):
        out = torch.where(kind == index, other, out)
    used = position < bins
    mean = (out * used).sum(1, keepdim=True) / bins
    scale = (((out - mean) * used).square().sum(1, keepdim=True) / bins).sqrt().clamp_min(1e-3)
    return (out - mean) / scale


def look_up(table: Tensor, phase: Tensor, bins: Tensor, smooth: Tensor) -> Tensor:
    """Template values at phases [rows, LENGTH] (seasons, any real number): stepwise, or linear between bins."""
    at = (phase % 1.0) * bins[:, None]
    low = at.floor().long().clamp(0, BINS - 1)
    here = table.gather(1, low)
    after = table.gather(1, torch.where(low + 1 >= bins[:, None], 0, low + 1).long())
    return torch.where(smooth[:, None], here + (after - here) * (at - low), here)


def season(s: Source, rows: int, period: Tensor) -> Tensor:
    """Seasonal component of unit scale, with a fixed or slowly changing shape and strength; 0 where period is 0."""
    real = period.clamp_min(2.0)
    bins = torch.where(real <= BINS, real.round(), torch.full_like(real, BINS))
    # A whole number of steps needs no interpolation; long periods are smooth, except weeks of daily steps.
    weekly = (real == 168) | (real == 336) | (real == 672) | (real == 1008)
    stepped = weekly & s.chance(rows, p=0.75)
    bins = torch.where(stepped, 7.0, bins)
    smooth = (real != real.round()) | (real > BINS) & ~stepped
    time = torch.arange(LENGTH, device=s.device)[None]
    # Half a step off the bins' edges, so that rounding cannot move a whole-numbered phase across one.
    phase = (time + (real[:, None] * s.uniform(rows, 1)).floor() + 0.5) / real[:, None]
    first = templates(s, rows, bins)
    x = look_up(first, phase, bins, smooth)
    changing = s.chance(rows, p=0.3)
    other = look_up(first + s.log_uniform(rows, 1, low=0.1, high=1.5) * templates(s, rows, bins), phase, bins, smooth)
    share = torch.sigmoid(2 * wander(s, rows))
    x = torch.where(changing[:, None], x * (1 - share) + other * share, x)
    strength = (s.log_uniform(rows, 1, low=0.05, high=0.7) * wander(s, rows)).exp()
    x = torch.where(s.chance(rows, 1, p=0.35), x * strength, x)
    return x * (period > 0)[:, None]


def trend(s: Source, rows: int) -> Tensor:
    """Standardised trends: lines, curves, bends, random walks with and without drift, slow cycles, level shifts."""
    t = torch.linspace(0, 1, LENGTH, device=s.device)[None]
    sign = torch.where(s.chance(rows, 1, p=0.7), 1.0, -1.0)
    kind = s.pick(rows, [1, 2, 1, 2, 2.5, 1.5, 1, 1, 1.5, 1.5, 2, 1])[:, None]
    breaks = s.chance(rows, LENGTH, p=3.0 / LENGTH) | s.chance(rows, LENGTH, p=0.01) & s.chance(rows, 1, p=0.3)
    jumps = s.normal(rows, LENGTH) * breaks
    steps = s.normal(rows, LENGTH)
    walk = steps.cumsum(1)
    slopes = autoregressive(s, rows, 1 - s.log_uniform(rows, low=0.001, high=0.2))
    x = torch.zeros(rows, LENGTH, device=s.device)
    others = (
        sign * t,
        sign * (s.uniform(rows, 1, low=0.5, high=4.0) * t).exp(),
        (s.normal(rows, 1) + 2 * jumps.cumsum(1)).cumsum(1),
        walk + s.normal(rows, 1) * 1.5 * t * LENGTH**0.5,
        slopes.cumsum(1) + s.normal(rows, 1) * t * LENGTH,
        sign * torch.sigmoid((t - s.uniform(rows, 1)) * s.log_uniform(rows, 1, low=4.0, high=60.0)),
        -sign * (-t * s.log_uniform(rows, 1, low=1.0, high=50.0)).exp(),
        wander(s, rows),
        jumps.cumsum(1),
        coloured(s, rows, s.uniform(rows, low=1.0, high=3.0)),
        sign * (t + 0.02) ** s.log_uniform(rows, 1, low=0.3, high=3.0),
    )
    for index, other in enumerate(others, 1):
        x = torch.where(kind == index, standardise(other), x)
    return x


def finish(s: Source, x: Tensor, p: float = 1.0) -> Tensor:
    """What measured series often are: positive, cut at a floor or a ceiling, whole numbers, with a few outliers."""
    rows = x.shape[0]
    x = standardise(x)
    floor = torch.where(s.chance(rows, 1, p=0.05 * p), s.uniform(rows, 1, low=-1.2, high=0.5), -1e6)
    ceiling = torch.where(s.chance(rows, 1, p=0.02 * p), s.uniform(rows, 1, low=0.3, high=1.5), 1e6)
    x = torch.minimum(torch.maximum(x, floor), ceiling)
    step = s.log_uniform(rows, 1, low=0.02, high=1.0)
    x = torch.where(s.chance(rows, 1, p=0.08 * p), (x / step).round() * step, x)
    spikes = s.chance(*x.shape, p=0.006) * s.normal(*x.shape) * s.log_uniform(rows, 1, low=1.0, high=8.0)
    return torch.where(s.chance(rows, 1, p=0.06 * p), x + spikes, x)


def structural(s: Source, rows: int, none: float = 0.18) -> Tensor:
    """Trend, one or two seasons and noise, added or multiplied, of very different relative strength (after TSI)."""
    short, long = periods(s, rows, none)
    one, two = season(s, rows, short), season(s, rows, long)
    # Days of a week can have profiles of different height, not only different levels.
    coupled = (long > 0) & s.chance(rows, p=0.5)
    one = torch.where(coupled[:, None], one * (s.uniform(rows, 1, low=0.1, high=0.6) * two).exp(), one)
    seasonal = one + two * s.log_uniform(rows, 1, low=0.1, high=3.0)
    lines = trend(s, rows) + torch.where(s.chance(rows, 1, p=0.35), trend(s, rows), 0.0)
    lines = lines * s.log_uniform(rows, 1, low=0.2, high=40.0)
    white = innovations(s, rows)
    phi = torch.where(s.chance(rows, p=0.8), s.uniform(rows, low=0.2, high=0.97), s.uniform(rows, low=-0.6, high=0.2))
    noise = torch.where(s.chance(rows, 1, p=0.45), autoregressive(s, rows, phi), white)
    noise = torch.where(s.chance(rows, 1, p=0.1), coloured(s, rows, s.uniform(rows, low=0.2, high=1.5)), noise)
    noise = noise + torch.where(s.chance(rows, 1, p=0.3), white * s.uniform(rows, 1), 0.0)
    # Noisier in some parts of the season than in others.
    uneven = s.chance(rows, 1, p=0.12) & (short > 0)[:, None]
    noise = torch.where(uneven, noise * (0.6 * season(s, rows, short)).exp(), noise)
    noise = noise * s.log_uniform(rows, 1, low=0.015, high=1.5)
    plain = seasonal + lines + noise
    # Percentages of a level: a log-linear series with a moderate range.
    wide = s.log_uniform(rows, 1, low=0.08, high=1.1)
    product = (standardise(plain) * wide).exp()
    scaled = standardise(lines) * s.uniform(rows, 1, low=0.1, high=0.4) + 1.3
    level = scaled * (1 + s.log_uniform(rows, 1, low=0.02, high=0.5) * (seasonal + noise))
    kind = s.pick(rows, [5, 4, 2])[:, None]
    x = torch.where(kind == 1, product, torch.where(kind == 2, level, plain))
    return finish(s, x)


def cycles(s: Source, rows: int) -> Tensor:
    """Cycles without a clock: random length and height, steep rise and slow fall or the reverse (sunspots, lynx)."""
    period = per_block(s.log_uniform(rows // BLOCK, low=5.0, high=250.0))
    speed = (s.log_uniform(rows, 1, low=0.02, high=0.5) * wander(s, rows)).exp() / period[:, None]
    phase = speed.cumsum(1) + s.uniform(rows, 1)
    bins = torch.full((rows,), float(BINS), device=s.device)
    x = look_up(templates(s, rows, bins), phase, bins, s.chance(rows, p=1.0))
    height = autoregressive(s, rows, (-1 / (period * s.log_uniform(rows, low=0.3, high=10.0))).exp())
    x = x * (s.log_uniform(rows, 1, low=0.05, high=0.8) * height).exp()
    x = x + s.log_uniform(rows, 1, low=0.005, high=0.6) * innovations(s, rows)
    x = torch.where(s.chance(rows, 1, p=0.4), (s.uniform(rows, 1, low=0.3, high=1.5) * x).exp(), x)
    return finish(s, x)


def prices(s: Source, rows: int) -> Tensor:
    """Prices: random walks of the logarithm with volatility that clusters, jumps and a little momentum."""
    shocks = (
        innovations(s, rows)
        * (s.uniform(rows, 1) * autoregressive(s, rows, s.uniform(rows, low=0.9, high=0.995))).exp()
    )
    common = per_block(shocks[::BLOCK])
    beta = torch.where(s.chance(rows, 1, p=0.5), s.uniform(rows, 1), 0.0)
    shocks = beta * common + (1 - beta) * shocks
    momentum = torch.where(s.chance(rows, 1, p=0.3), s.uniform(rows, 1, low=-0.3, high=0.4), 0.0)
    shocks = shocks + momentum * shocks.roll(1, 1) + s.normal(rows, 1) * 0.04
    walk = shocks.cumsum(1) * s.log_uniform(rows, 1, low=0.002, high=0.08)
    x = torch.where(s.chance(rows, 1, p=0.75), walk.clamp(-8, 8).exp(), walk)
    return torch.where(s.chance(rows, 1, p=0.12), shocks, x)


def counts(s: Source, rows: int) -> Tensor:
    """Whole numbers: Poisson and overdispersed counts with seasons and trends, and demand that is mostly zero."""
    short, long = periods(s, rows, 0.3)
    shape = season(s, rows, short) * s.log_uniform(rows, 1, low=0.1, high=1.0) + 0.3 * season(s, rows, long)
    rate = (shape + 0.5 * trend(s, rows) * s.uniform(rows, 1)).clamp(-6, 4).exp()
    rate = rate * s.log_uniform(rows, 1, low=0.1, high=60.0)
    spread = s.log_uniform(rows, 1, low=0.3, high=20.0)
    mixed = torch._standard_gamma(spread.expand(rows, LENGTH).contiguous()) / spread * rate
    x = torch.poisson(torch.where(s.chance(rows, 1, p=0.5), mixed, rate).clamp_max(1e4))
    p = s.log_uniform(rows, 1, low=0.04, high=0.8)
    p = (p * (0.7 * season(s, rows, short)).exp()).clamp(0, 1)
    size = (s.uniform(rows, 1, low=0.0, high=0.8) * s.normal(rows, LENGTH)).exp() * s.log_uniform(
        rows, 1, low=1.0, high=20.0
    )
    size = torch.where(s.chance(rows, 1, p=0.6), size.ceil(), size)
    demand = size * (s.uniform(rows, LENGTH) < p)
    return torch.where(s.chance(rows, 1, p=0.35), demand, x)


def signals(s: Source, rows: int) -> Tensor:
    """Machine-like series: square waves, saws, pulses at random distances, modulated sines, almost no noise."""
    period = per_block(s.log_uniform(rows // BLOCK, low=4.0, high=200.0))
    period = torch.where(s.chance(rows, p=0.7), period.round(), period)[:, None]
    time = torch.arange(LENGTH, device=s.device)[None]
    phase = (time / period + s.uniform(rows, 1)) % 1
    duty = s.uniform(rows, 1, low=0.05, high=0.9)
    saw = torch.where(phase < duty, phase / duty, (1 - phase) / (1 - duty))
    events = s.chance(rows, LENGTH, p=0.03).float()
    decay = s.uniform(rows, low=0.3, high=0.97)
    n = 2 * LENGTH
    response = torch.fft.rfft(decay[:, None] ** torch.arange(LENGTH, device=s.device), n)
    pulses = torch.fft.irfft(torch.fft.rfft(events * s.normal(rows, LENGTH).abs(), n) * response, n)[:, :LENGTH]
    slow = torch.sin(2 * math.pi * time / (period * s.log_uniform(rows, 1, low=3.0, high=30.0)))
    sine = torch.sin(2 * math.pi * phase)
    kind = s.pick(rows, [1, 1, 1, 1, 1])[:, None]
    x = (phase < duty).float()
    for index, other in enumerate((saw, pulses, sine * (1 + s.uniform(rows, 1) * slow), sine + slow), 1):
        x = torch.where(kind == index, other, x)
    x = x + torch.where(s.chance(rows, 1, p=0.4), trend(s, rows), 0.0) * s.log_uniform(rows, 1, low=0.1, high=3.0)
    noise = torch.where(s.chance(rows, 1, p=0.6), s.log_uniform(rows, 1, low=0.002, high=0.3), 0.0)
    return x + noise * s.normal(rows, LENGTH)


class Recursion:
    """A recursion over time, step by step in torch; on a GPU captured once as a CUDA graph and replayed."""

    def __init__(self, steps: Callable[[dict[str, Tensor], Tensor], None]):
        self.steps = steps
        self.graph: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.out = torch.empty(0)

    def __call__(self, inputs: dict[str, Tensor], time: int, rows: int) -> Tensor:
        """Returns [rows, LENGTH]; `steps` fills its last argument, [time, rows], from the inputs."""
        device = next(iter(inputs.values())).device
        if device.type != "cuda":
            out = torch.zeros(time, rows, device=device)
            self.steps(inputs, out)
            return out[-LENGTH:].t().contiguous()
        if self.graph is None or self.out.shape != (time, rows):
            self.inputs = {k: v.clone() for k, v in inputs.items()}
            self.out = torch.zeros(time, rows, device=device)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.steps(self.inputs, self.out)
        for k, v in inputs.items():
            self.inputs[k].copy_(v)
        self.graph.replay()
        return self.out[-LENGTH:].t().contiguous()


def smoothing_steps(p: dict[str, Tensor], out: Tensor) -> None:
    level, slope = p["level"], p["slope"]
    seasons = p["seasons"].clone()  # [longest + time, rows], the first `longest` filled with the template
    flat, rows = seasons.view(-1), seasons.shape[1]
    longest = seasons.shape[0] - out.shape[0]
    at = p["before"]
    for t in range(out.shape[0]):
        index = at + t * rows
        old = flat[index]
        base = level + slope
        error = p["noise"][t]
        torch.add(base + old, error, out=out[t])
        level = base + p["alpha"] * error
        slope = p["phi"] * slope + p["beta"] * error
        torch.add(old, p["gamma"] * error, out=seasons[longest + t])


def autoregression_steps(p: dict[str, Tensor], out: Tensor) -> None:
    padded = p["start"].clone()  # [longest + time, rows]
    flat, rows = padded.view(-1), padded.shape[1]
    longest = padded.shape[0] - out.shape[0]
    for t in range(out.shape[0]):
        past = flat[p["before"] + t * rows]  # [lags, rows]
        past = torch.where(p["bounded"], torch.tanh(past), past)
        a = torch.where(p["regime"][t], p["a"], p["b"])
        torch.add((past * a).sum(0), p["noise"][t], out=padded[longest + t])
    out.copy_(padded[longest:])


def causal_steps(p: dict[str, Tensor], out: Tensor) -> None:
    padded = p["start"].clone()
    flat, rows = padded.view(-1), padded.shape[1]
    longest = padded.shape[0] - out.shape[0]
    for t in range(out.shape[0]):
        past = flat[p["before"] + t * rows]  # [edges, rows]
        bent = torch.where(p["kind"] == 1, torch.tanh(past), past)
        bent = torch.where(p["kind"] == 2, past.clamp_min(0), bent)
        bent = torch.where(p["kind"] == 3, torch.sin(2 * past), bent)
        torch.add((bent * p["weight"]).sum(0), p["noise"][t], out=padded[longest + t])
    out.copy_(padded[longest:])


class Families:
    """All generators on one device. `families` names them; `make(name, rows)` returns standardised, finite rows."""

    LONGEST = 400  # the longest lag of a recursion

    def __init__(self, device: torch.device | str, kernels: int = 1024, jitter: float = 1e-6):
        self.s = Source(device)
        self.smoothing, self.autoregression, self.causal = (
            Recursion(smoothing_steps),
            Recursion(autoregression_steps),
            Recursion(causal_steps),
        )
        self.kernels, self.jitter = kernels, jitter
        self.factors: Tensor | None = None
        self.families: dict[str, Callable[[int], Tensor]] = {
            "structural": lambda rows: structural(self.s, rows),
            "smoothing": self.smoothed,
            "arima": self.arima,
            "causal": self.causal_graphs,
            "kernels": self.kernel_synth,
            "cycles": lambda rows: cycles(self.s, rows),
            "prices": lambda rows: prices(self.s, rows),
            "counts": lambda rows: counts(self.s, rows),
            "signals": lambda rows: signals(self.s, rows),
        }

    def make(self, name: str, rows: int) -> Tensor:
        x = self.families[name](rows)
        x = torch.where(x.abs() < 1e6, x, torch.nan)
        broken = x.isnan().any(1, keepdim=True)
        return torch.where(broken, 0.0, standardise(x)).clamp(-100, 100)

    def _lag_index(self, lag: Tensor, source: Tensor, rows: int) -> Tensor:
        """Flat index into [LONGEST + time, rows] of the value `lag` steps before time 0 in row `source`."""
        return (self.LONGEST - lag.long()) * rows + source

    def smoothed(self, rows: int) -> Tensor:
        """Exponential smoothing as a data model: level, damped slope and season, each taking its share of the noise."""
        s, time = self.s, LENGTH + BURN_IN
        short, long = periods(s, rows, 0.35)
        period = torch.where((long > 0) & (long <= self.LONGEST) & s.chance(rows, p=0.5), long, short)
        period = period.round()
        lag = torch.where(period > 0, period, 1.0).clamp(1, self.LONGEST)
        bins = lag.clamp(2, BINS)
        table = templates(s, rows, bins)
        clock = torch.arange(self.LONGEST, device=s.device)[None]
        start = look_up(table, (clock + 0.5) / lag[:, None], bins, lag > BINS) * (period > 0)[:, None]
        scale = s.log_uniform(rows, low=0.02, high=1.5)
        noise = innovations(s, rows, time) * scale[:, None]
        gentle = s.chance(rows, p=0.5)
        alpha = torch.where(gentle, s.log_uniform(rows, low=0.01, high=0.5), s.uniform(rows, low=0.2, high=1.2))
        beta = torch.where(s.chance(rows, p=0.5), s.log_uniform(rows, low=0.0005, high=0.15) * alpha, 0.0)
        gamma = torch.where(
            s.chance(rows, p=0.6), s.log_uniform(rows, low=0.003, high=0.4) * (1 - alpha).clamp_min(0.05), 0.0
        )
        phi = torch.where(s.chance(rows, p=0.5), 1.0, s.uniform(rows, low=0.85, high=0.999))
        slope = torch.where(s.chance(rows, p=0.5), s.normal(rows) * s.log_uniform(rows, low=0.001, high=0.1), 0.0)
        seasons = torch.zeros(self.LONGEST + time, rows, device=s.device)
        seasons[: self.LONGEST] = start.t()
        inputs = {
            "level": torch.zeros(rows, device=s.device),
            "slope": torch.where(phi == 1, slope, slope * 5),
            "seasons": seasons,
            "before": self._lag_index(lag, torch.arange(rows, device=s.device), rows),
            "noise": noise.t().contiguous(),
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma * (period > 0),
            "phi": phi,
        }
        x = self.smoothing(inputs, time, rows)
        wide = s.log_uniform(rows, 1, low=0.08, high=1.1)
        x = torch.where(s.chance(rows, 1, p=0.45), (standardise(x) * wide).exp(), x)
        return finish(s, x, 0.6)

    def arima(self, rows: int) -> Tensor:
        """Seasonal autoregressions (1 - f1 B - f2 B^2)(1 - F B^P), plain, integrated, switching regimes or bounded."""
        s, time = self.s, LENGTH + BURN_IN
        short, _ = periods(s, rows, 0.35)
        period = short.round().clamp(0, self.LONGEST - 2)
        own = torch.arange(rows, device=s.device)

        def coefficients() -> Tensor:
            first = torch.where(
                s.chance(rows, p=0.7), s.uniform(rows, low=0.0, high=0.98), s.uniform(rows, low=-0.8, high=0.8)
            )
            second = torch.where(s.chance(rows, p=0.5), s.uniform(rows, low=-0.9, high=0.7), 0.0)
            f1, f2 = first * (1 - second), second  # from partial autocorrelations: always stationary
            f = torch.where(
                s.chance(rows, p=0.7), 1 - s.log_uniform(rows, low=0.004, high=0.6), s.uniform(rows, high=0.6)
            )
            f = f * (period > 0)
            return torch.stack((f1, f2, f, -f1 * f, -f2 * f))

        a = coefficients()
        switching = s.chance(rows, p=0.2)
        b = torch.where(switching, coefficients(), a)
        lag = period.clamp_min(1)
        lags = torch.stack((torch.ones_like(lag), torch.full_like(lag, 2), lag, lag + 1, lag + 2))
        flips = s.uniform(rows, time) < s.log_uniform(rows, 1, low=0.002, high=0.05)
        regime = flips.long().cumsum(1) % 2 == 0
        noise = innovations(s, rows, time)
        quiet = torch.where(switching[:, None] & regime, s.log_uniform(rows, 1, low=0.3, high=1.0), 1.0)
        shift = torch.where(switching[:, None] & regime, s.normal(rows, 1), 0.0)
        shift = shift * s.chance(rows, 1, p=0.5)
        start = torch.zeros(self.LONGEST + time, rows, device=s.device)
        bins = lag.clamp(2, BINS)
        clock = torch.arange(self.LONGEST, device=s.device)[None]
        table = templates(s, rows, bins) * s.log_uniform(rows, 1, low=0.3, high=30.0)
        start[: self.LONGEST] = (
            look_up(table, (clock + 0.5) / lag[:, None], bins, lag > BINS) * (period > 0)[:, None]
        ).t()
        inputs = {
            "start": start,
            "before": self._lag_index(lags, own, rows),
            "a": a,
            "b": b,
            "regime": regime.t().contiguous(),
            "bounded": s.chance(rows, p=0.08),
            "noise": (noise * quiet + shift).t().contiguous(),
        }
        x = self.autoregression(inputs, time, rows)
        drift = s.normal(rows, 1) * s.log_uniform(rows, 1, low=0.005, high=0.5) * s.chance(rows, 1, p=0.6)
        summed = (standardise(x) + drift).cumsum(1)
        x = torch.where(s.chance(rows, 1, p=0.35), summed, x)
        wide = s.log_uniform(rows, 1, low=0.08, high=1.1)
        x = torch.where(s.chance(rows, 1, p=0.3), (standardise(x) * wide).exp(), x)
        return finish(s, x, 0.6)

    def causal_graphs(self, rows: int) -> Tensor:
        """Eight variables that drive one another through lagged, partly non-linear edges (after TCM)."""
        s, time, edges = self.s, LENGTH + BURN_IN, 4
        lag = s.log_uniform(edges, rows, low=1.0, high=25.0).floor()
        block = torch.arange(rows, device=s.device) // BLOCK * BLOCK
        source = block + torch.randint(BLOCK, (edges, rows), device=s.device)
        lag[0], source[0] = 1.0, torch.arange(rows, device=s.device)
        weight = s.normal(edges, rows) * s.chance(edges, rows, p=0.6)
        weight[0] = s.normal(rows).abs() * 1.5
        weight = weight / weight.abs().sum(0).clamp_min(1e-6) * s.uniform(rows, low=0.3, high=0.985)
        kind = s.pick(edges * rows, [5, 2, 1, 1]).view(edges, rows)
        noise = innovations(s, rows, time) * s.log_uniform(rows, 1, low=0.2, high=3.0)
        # Some variables are driven from outside by a clock.
        period, _ = periods(s, rows, 0.5)
        clock = torch.cat((season(s, rows, period),) * 2, 1)[:, :time] * s.log_uniform(rows, 1, low=0.3, high=5.0)
        noise = noise + clock * s.chance(rows, 1, p=0.4)
        inputs = {
            "start": torch.zeros(self.LONGEST + time, rows, device=s.device),
            "before": self._lag_index(lag, source, rows),
            "weight": weight,
            "kind": kind,
            "noise": noise.t().contiguous(),
        }
        x = self.causal(inputs, time, rows)
        x = torch.where(s.chance(rows, 1, p=0.2), standardise(x).cumsum(1), x)
        return finish(s, x, 0.3)

    def covariance(self) -> Tensor:
        """One random composition of kernels over LENGTH points, as KernelSynth draws them; float64."""
        s = self.s
        x = torch.linspace(0, 1, LENGTH, device=s.device, dtype=torch.float64)
        gap = (x[:, None] - x[None]).abs()
        bank = [24, 48, 96, 168, 336, 7, 14, 30, 60, 365, 4, 26, 52, 6, 12, 12, 24, 10]
        total: Tensor | None = None
        for _ in range(int(torch.randint(1, 6, ()))):
            kind = int(torch.multinomial(torch.tensor([6.0, 2.0, 3.0, 3.0, 1.0, 1.0]), 1))
            size = float([0.1, 1.0, 10.0][int(torch.randint(3, ()))])
            if kind == 0:
                period = bank[int(torch.randint(len(bank), ()))] / LENGTH
                k = (-2 * torch.sin(math.pi * gap / period).square()).exp()
            elif kind == 1:
                k = x[:, None] * x[None] + size**2 * (size < 10)
            elif kind == 2:
                k = (-0.5 * (gap / (0.3 * size if size < 10 else 0.01)).square()).exp()
            elif kind == 3:
                k = (1 + gap.square() / (2 * size * 0.05**2)) ** -size
            elif kind == 4:
                k = torch.eye(LENGTH, device=s.device, dtype=torch.float64) * min(size, 1.0)
            else:
                k = torch.ones_like(gap)
            total = k if total is None else (total + k if torch.rand(()) < 0.5 else total * k)
        assert total is not None
        return total / total.diagonal().mean()

    def factorise(self, count: int) -> Tensor:
        """Cholesky factors [count, LENGTH, LENGTH] float32 of random covariances."""
        out = []
        for begin in range(0, count, 16):
            k = torch.stack([self.covariance() for _ in range(min(16, count - begin))])
            k.diagonal(dim1=1, dim2=2).add_(self.jitter)
            factor, bad = torch.linalg.cholesky_ex(k)
            out.append(torch.where((bad == 0)[:, None, None], factor, 0.0).float())
        return torch.cat(out)

    def kernel_synth(self, rows: int) -> Tensor:
        """Draws from Gaussian processes whose kernels are random compositions; a few kernels are new at every call."""
        if self.factors is None:
            self.factors = self.factorise(self.kernels)
        else:
            fresh = max(1, self.kernels // 64)
            at = torch.randperm(self.kernels)[:fresh].to(self.s.device)
            self.factors[at] = self.factorise(fresh)
        each = -(-rows // (self.kernels * BLOCK)) * BLOCK
        z = self.s.normal(self.kernels, LENGTH, each)
        x = (self.factors @ z).transpose(1, 2).reshape(-1, LENGTH)[:rows]
        return finish(self.s, x, 0.5)


# Shares of the bank's slots
MIXTURE = {
    "structural": 16,
    "smoothing": 6,
    "arima": 5,
    "causal": 3,
    "kernels": 2,
    "cycles": 2,
    "prices": 2,
    "counts": 2,
    "signals": 1,
}


class Bank:
    """Series in GPU memory, replaced slot by slot while training draws from all of them."""

    def __init__(self, families: Families, slot_rows: int, mixture: dict[str, int] | None = None):
        self.families, self.slot_rows = families, slot_rows
        self.slots = [name for name, count in (mixture or MIXTURE).items() for _ in range(count)]
        self.x = torch.zeros(len(self.slots) * slot_rows, LENGTH, device=families.s.device)
        # Visits the families in turn rather than one family's slots after another's.
        self.order = sorted(range(len(self.slots)), key=lambda i: (i * 0.618034) % 1)
        self.turn = 0

    def fill(self) -> None:
        for _ in self.slots:
            self.refresh()

    def refresh(self) -> str:
        """Replace the oldest slot; returns its family."""
        slot = self.order[self.turn % len(self.order)]
        self.turn += 1
        self.x[slot * self.slot_rows : (slot + 1) * self.slot_rows] = self.families.make(
            self.slots[slot], self.slot_rows
        )
        return self.slots[slot]
