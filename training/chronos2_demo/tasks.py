"""Forecasting tasks cut from a bank of series: contexts of any length, groups, covariates, gaps; the model's input.

Everything here is a fixed sequence of tensor operations without a look at their values, so that one training step,
drawing its own tasks, can be captured as a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from model import BLOCK, PATCH
from torch import Tensor

MAX_PATCHES = 8  # of the horizon
# How many of a thousand batches forecast 1, 2, ... 8 patches
HORIZONS = (280, 200, 140, 90, 70, 60, 70, 90)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Tasks of one sequence length: `tokens` = patches of context + REG + patches of horizon."""

    tokens: int
    alone: int  # series that stand alone
    blocks: int  # blocks of eight rows, within which groups are formed
    shortest: int  # values of context
    strides: int  # the coarsest step at which series are read (1: every value)
    near: float = 1.0  # over 1: shorter horizons than HORIZONS says


BUCKETS = (Bucket(16, 1024, 32, 5, 4, 1.8), Bucket(32, 512, 32, 48, 2), Bucket(72, 320, 16, 200, 1))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the tasks contain; the ablations switch parts off."""

    multivariate: bool = True
    missing: bool = True
    growth: bool = True  # steady slopes and growth by percentages at the window's scale
    breaks: bool = True  # what went on for long changes, before or after the forecast begins
    weigh: bool = True  # predictable series count as much as noisy ones


@dataclasses.dataclass
class Batch:
    """Input of the model (see `Net`) and what it should forecast."""

    features: Tensor  # [rows, S, 48]
    reg: Tensor  # [S] bool
    attended: Tensor  # [rows, S] bool
    groups: Tensor  # [G, 8]
    target: Tensor  # [rows, 8, 16] normalised values at the last eight tokens
    weight: Tensor  # [rows, 8, 16] their weights in the loss; 0 where there is none


def token_times(tokens: int, patches: Tensor | int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Times [S * 16] of the values of all tokens (context below 0, forecast from 0 on; REG's are meaningless) and where
    REG stands [S], for a horizon of `patches` patches."""
    token = torch.arange(tokens, device=device)
    n = tokens - 1 - patches
    begin = torch.where(token < n, token - n, token - n - 1) * PATCH
    return (begin[:, None] + torch.arange(PATCH, device=device)).view(-1), token == n


def model_input(
    x: Tensor, seen: Tensor, known: Tensor, time: Tensor, reg: Tensor, scale_of_time: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [rows, S, 48], attended tokens [rows, S], normalised values [rows, S * 16] and scales [rows, 1].

    x [rows, S * 16]: values at `time`; seen: those of the context that are observed; known: those of the horizon that
    are given (known covariates). Normalised as upstream does: mean and deviation of the observed context, arcsinh.
    """
    rows, tokens = x.shape[0], reg.shape[0]
    count = seen.sum(1, keepdim=True)
    clean = torch.where(seen, x, 0.0)
    loc = clean.sum(1, keepdim=True) / count.clamp_min(1)
    scale = (torch.where(seen, x - loc, 0.0).square().sum(1, keepdim=True) / count.clamp_min(1)).sqrt()
    scale = torch.where(count == 0, 1.0, torch.where(scale == 0, 1e-5, scale))
    z = torch.asinh((x - loc) / scale)
    given = seen | known
    values = torch.where(given, z, 0.0)
    times = (time.float() / scale_of_time).expand(rows, -1)
    features = torch.stack((times, values, given.float()), 1).view(rows, 3, tokens, PATCH).permute(0, 2, 1, 3)
    future = (time >= 0).view(tokens, PATCH)[:, 0]
    attended = seen.view(rows, tokens, PATCH).any(-1) | future | reg
    return features.reshape(rows, tokens, 3 * PATCH), attended, z, scale


class Tasks:
    """Draws batches from a bank tensor [N, length]."""

    def __init__(self, bank: Tensor, context_length: int, options: Options):
        self.bank, self.context_length, self.options = bank, context_length, options
        device = bank.device
        self.horizon_steps = (torch.tensor(HORIZONS, device=device).cumsum(0) / sum(HORIZONS)).contiguous()
        # Lags at which a simple forecast may repeat the past
        self.lags = (1, 2, 4, 7, 12, 24, 48, 52, 168)
        self.group_sizes = torch.tensor([8, 8, 5, 4, 4, 3, 3, 2, 2, 2], device=device)
        self.member = torch.arange(BLOCK, device=device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, device=self.bank.device) * (high - low) + low

    def chance(self, *shape: int, p: float) -> Tensor:
        return torch.rand(shape, device=self.bank.device) < p

    def windows(self, b: Bucket, time: Tensor, horizon: Tensor, longest: Tensor) -> tuple[Tensor, Tensor]:
        """Windows [rows, S * 16] of random series and their context lengths [rows, 1]."""
        device, length = self.bank.device, self.bank.shape[1]
        grouped = b.blocks * BLOCK
        blocks = torch.randint(self.bank.shape[0] // BLOCK, (b.blocks, 1), device=device) * BLOCK + self.member
        row = torch.cat((torch.randint(self.bank.shape[0], (b.alone,), device=device), blocks.view(-1)))[:, None]

        def both(x: Tensor) -> Tensor:  # the rows of a block share what was drawn for them
            return torch.cat((x[: b.alone], x[b.alone : b.alone + b.blocks].repeat_interleave(BLOCK, 0)))

        draws = b.alone + b.blocks
        share = self.uniform(draws, 1)
        shortest = (0.35 * horizon).clamp_min(b.shortest)
        context = shortest * (longest / shortest) ** share
        full = self.chance(draws, 1, p=0.25)
        context = torch.where(full, longest, context).floor()
        reach = ((length - 1) / (context + horizon)).floor().clamp(1, b.strides)
        stride = 1 + ((reach) * self.uniform(draws, 1)).floor().clamp_max(reach - 1) * self.chance(draws, 1, p=0.2)
        room = (length - 1 - stride * (context + horizon)).clamp_min(0)
        end = stride * context + (room * self.uniform(draws, 1)).floor()
        context, stride, end = both(context), both(stride), both(end)
        at = (end + stride * time).clamp(0, length - 1).long()
        x = self.bank[row, at]
        # Mixtures of two series, for those that stand alone; turned upside down now and then.
        other = torch.randint(self.bank.shape[0], (b.alone, 1), device=device)
        second = self.bank[other, at[: b.alone]]
        share = torch.where(self.chance(b.alone, 1, p=0.12), self.uniform(b.alone, 1), 1.0)
        x = torch.cat((x[: b.alone] * share + second * (1 - share), x[b.alone :]))
        flip = torch.where(self.chance(b.alone + grouped, 1, p=0.12), -1.0, 1.0)
        x = x * flip
        inside = ((time >= -context) & (time < horizon)).float()
        if self.options.growth:
            x = self.grown(x, inside, time / (context + horizon))
        return self.broken(x, inside, time, context, horizon) if self.options.breaks else x, context

    def moments(self, x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [rows, 1] of the windows' used part."""
        count = inside.sum(1, keepdim=True)
        mean = (x * inside).sum(1, keepdim=True) / count
        return mean, (((x - mean) * inside).square().sum(1, keepdim=True) / count).sqrt()

    def grown(self, x: Tensor, inside: Tensor, share: Tensor) -> Tensor:
        """Some windows get a steady slope, mostly upwards, and some become log-linear at the window's own scale:
        growth by percentages, with seasons that grow along. (Over the length of a bank's row that would overflow.)"""
        rows = x.shape[0]
        _, deviation = self.moments(x, inside)
        slope = torch.randn(rows, 1, device=x.device).abs() * torch.where(self.chance(rows, 1, p=0.75), 2.5, -2.5)
        x = x + torch.where(self.chance(rows, 1, p=0.22), slope * deviation, 0.0) * share
        mean, deviation = self.moments(x, inside)
        wide = torch.exp(self.uniform(rows, 1, low=math.log(0.15), high=math.log(1.3)))
        product = (wide * ((x - mean) / deviation.clamp_min(1e-6)).clamp(-5, 5)).exp()
        return torch.where(self.chance(rows, 1, p=0.22), product, x)

    def broken(self, x: Tensor, inside: Tensor, time: Tensor, context: Tensor, horizon: Tensor) -> Tensor:
        """Some windows change their level, slope or strength at a random time, or leave their level for a while."""
        rows = x.shape[0]
        mean, deviation = self.moments(x, inside)
        at = torch.where(
            self.chance(rows, 1, p=0.35), horizon * self.uniform(rows, 1), -context * self.uniform(rows, 1)
        )
        since = (time - at).clamp_min(0)
        after = time >= at
        which = self.uniform(rows, 1)
        size = torch.randn(rows, 1, device=x.device) * deviation
        ended = time >= at + context * self.uniform(rows, 1, low=0.02, high=0.4)
        strength = torch.exp(0.2 + 0.5 * torch.randn(rows, 1, device=x.device))
        out = torch.where((which < 0.06) & after, x + size, x)
        out = torch.where((which > 0.06) & (which < 0.12), x + 3 * size * since / (context + horizon), out)
        out = torch.where((which > 0.12) & (which < 0.15) & after & ~ended, x + 1.5 * size, out)
        return torch.where((which > 0.15) & (which < 0.20) & after, mean + (x - mean) * strength, out)

    def relate(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Relations among the rows of blocks x [G, 8, W]: returns values, groups [G, 8] and known covariates [G, 8].

        Kinds: as they come; mixed at the same time; leads and lags of the group's first row; a common path with own
        deviations; a first row that covariates drive, at once, late or in bent form.
        """
        g, device = x.shape[0], x.device
        size = self.group_sizes[torch.randint(len(self.group_sizes), (g, 1), device=device)]
        groups = self.member // size
        first = groups * size  # the first member of each row's group
        same = (groups[:, :, None] == groups[:, None, :]).float()
        mean = x.mean(-1, keepdim=True)
        x = (x - mean) / (x - mean).square().mean(-1, keepdim=True).sqrt().clamp_min(1e-4)
        kind = torch.randint(6, (g, 1, 1), device=device)
        strength = self.uniform(g, 1, 1, low=0.2, high=0.95)

        q = torch.randn(g, BLOCK, BLOCK, device=device) * same / size[:, :, None].sqrt()
        mixed = (1 - strength) * x + strength * (q @ x)

        index = first[:, :, None].expand(-1, -1, x.shape[-1])
        parent = x.gather(1, index)
        late = (self.uniform(g, BLOCK, 1, low=0.0, high=24.99).floor() * self.chance(g, BLOCK, 1, p=0.8)).long()
        steps = torch.arange(x.shape[-1], device=device)
        led = parent.gather(2, (steps - late).clamp_min(0))
        led = torch.where(self.chance(g, BLOCK, 1, p=0.2), torch.tanh(1.5 * led), led)
        own = self.uniform(g, BLOCK, 1, low=0.02, high=0.7)
        lagged = torch.where((self.member == first)[:, :, None], x, self.sign(g) * led + own * x)

        tied = self.sign(g) * self.uniform(g, BLOCK, 1, low=0.3, high=2.0) * parent + own * x

        # Events known ahead: rare ones, weekly ones, long ones.
        rare = self.chance(g, BLOCK, x.shape[-1], p=0.04)
        week = self.uniform(g, BLOCK, 1, low=5, high=31).floor()
        weekly = (time + (week * self.uniform(g, BLOCK, 1)).floor()) % week < 1
        spell = torch.sin((time / week / 3 + self.uniform(g, BLOCK, 1)) * 2 * math.pi) > 0.6
        which = self.uniform(g, BLOCK, 1)
        events = torch.where(which < 0.5, rare, torch.where(which < 0.75, weekly, spell)).float()
        cause = torch.where(self.chance(g, BLOCK, 1, p=0.35), events, x)
        effect = cause.gather(2, (steps - (late * self.chance(g, BLOCK, 1, p=0.25)).clamp_max(6)).clamp_min(0))
        bend = self.uniform(g, BLOCK, 1)
        effect = torch.where(bend < 0.12, effect.square(), effect)
        effect = torch.where((bend > 0.12) & (bend < 0.2), effect.clamp_min(0), effect)
        effect = torch.where((bend > 0.2) & (bend < 0.28), effect.abs(), effect)
        effect = effect * torch.randn(g, BLOCK, 1, device=device) * self.uniform(g, BLOCK, 1, high=2.0)
        is_first = self.member == first
        total = (same - torch.diag_embed(is_first.float()).clamp_min(0)) * is_first[:, :, None].float()
        driven = torch.where(
            is_first[:, :, None], x * self.uniform(g, BLOCK, 1, low=0.1, high=1.0) + total @ effect, cause
        )

        out = x
        for number, other in ((1, mixed), (2, lagged), (3, tied), (4, driven), (5, driven)):
            out = torch.where(kind == number, other, out)
        causes = (kind[:, :, 0] >= 4) & ~is_first & self.chance(g, BLOCK, p=0.85)
        others = self.chance(g, BLOCK, p=0.3) & self.chance(g, 1, p=0.3) & ~is_first
        return out, groups, causes | others

    def sign(self, g: int) -> Tensor:
        return torch.where(self.chance(g, BLOCK, 1, p=0.75), 1.0, -1.0)

    def gaps(self, seen: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Which values are missing: single ones, stretches, every so many, all until some time."""
        rows = seen.shape[0]
        single = self.uniform(*seen.shape) < self.uniform(rows, 1, high=0.4)
        begin, long = -context * self.uniform(rows, 1), context * self.uniform(rows, 1, high=0.3)
        stretch = (time >= begin) & (time < begin + long)
        week = self.uniform(rows, 1, low=3, high=15).floor()
        regular = (time + (week * self.uniform(rows, 1)).floor()) % week < (
            week * self.uniform(rows, 1, high=0.5)
        ).floor()
        leading = time < -context * self.uniform(rows, 1)
        which = self.uniform(rows, 1)
        missing = single & (which < 0.07) | stretch & (which > 0.05) & (which < 0.11)
        return missing | regular & (which > 0.11) & (which < 0.14) | leading & (which > 0.14) & (which < 0.17)

    def draw(self, b: Bucket) -> Batch:
        device = self.bank.device
        patches = (torch.rand((), device=device) ** b.near > self.horizon_steps).sum().clamp_max(MAX_PATCHES - 1) + 1
        time, reg = token_times(b.tokens, patches, device)
        longest = ((b.tokens - 1 - patches) * PATCH).clamp_max(self.context_length)
        x, context = self.windows(b, time, patches * PATCH, longest)
        rows = x.shape[0]
        grouped = x[b.alone :].view(b.blocks, BLOCK, -1)
        covariate = torch.zeros(rows, dtype=torch.bool, device=device)
        groups = self.member.expand(b.blocks, -1)
        if self.options.multivariate:
            grouped, groups, known = self.relate(grouped, time)
            covariate = torch.cat((covariate[: b.alone], known.view(-1)))
        x = torch.cat((x[: b.alone], grouped.reshape(b.blocks * BLOCK, -1)))

        past = (time < 0) & ~reg.repeat_interleave(PATCH)
        seen = past & (time >= -context)
        if self.options.missing:
            missing = self.gaps(seen, time, context)
            # A context of which nothing is left is no task.
            missing = missing & ((seen & ~missing).sum(1, keepdim=True) >= 4)
        else:
            missing = torch.zeros_like(seen)
        seen = seen & ~missing
        future = (time >= 0).expand(rows, -1)
        known = future & covariate[:, None]
        features, attended, z, scale = model_input(x, seen, known, time, reg, self.context_length)

        # What deviates by less than rounding is constant, and nothing can be learnt about its future's size.
        level = torch.where(seen, x, 0.0).abs().amax(1, keepdim=True)
        usable = scale > 1e-4 * level.clamp_min(1e-2)
        weight = (future & ~known & ~missing & usable).float()
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1.0)
        if self.options.weigh:
            weight = weight * self.predictability(z, seen)
        last = MAX_PATCHES * PATCH
        z, weight = z[:, -last:].clamp(-9, 9), weight[:, -last:]
        shape = (rows, MAX_PATCHES, PATCH)
        return Batch(features, reg, attended, groups, z.reshape(shape), weight.reshape(shape))

    def predictability(self, z: Tensor, seen: Tensor) -> Tensor:
        """Weights [rows, 1] that grow as the context repeats itself at some lag: benchmarks divide a series' error by
        that of a seasonal repetition. A function of the context alone, so it leaves the quantiles where they are."""
        best = torch.ones(z.shape[0], 1, device=z.device)
        for lag in self.lags:
            pair = seen[:, lag:] & seen[:, :-lag]
            count = pair.sum(1, keepdim=True)
            error = torch.where(pair, (z[:, lag:] - z[:, :-lag]).abs(), 0.0).sum(1, keepdim=True) / count.clamp_min(1)
            best = torch.where(count >= 4, torch.minimum(best, error), best)
        return (0.35 / (best + 0.05)).sqrt()
