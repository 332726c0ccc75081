"""Train the forecasting model on series made while it trains.

    python train.py --out FOLDER --name base --minutes 9                       one GPU
    python -m torch.distributed.run --standalone --nproc-per-node 2 train.py ...
    python train.py --out FOLDER --name final --resume FOLDER/base.safetensors --minutes 9 --fall 0.6

Writes NAME.safetensors (averaged weights in half precision, upstream's keys) and NAME.csv every few minutes and at the
end. A run that resumes starts from such a file with a fresh optimizer and a short warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from evaluate import forecast
from generators import MIXTURE, Bank, Families
from model import QUANTILES, Config, Net, Weights, encoder_block, quantile_loss
from safetensors.torch import load_file, save_file
from tasks import BUCKETS, Options, Tasks
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.bench import forecast_metrics  # needs numpy alone

BETAS, EPSILON, CLIP = (0.9, 0.98), 1e-8, 1.0


def orthogonal(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack [n, rows, columns], by Muon's five Newton-Schulz steps."""
    tall = g.shape[1] > g.shape[2]
    x = (g.transpose(1, 2) if tall else g).to(torch.bfloat16 if g.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Optimizer:
    """AdamW on the flat buffer; with `muon`, the encoder's matrices take Muon's orthogonal steps instead. Also keeps
    the average of the weights. A fixed sequence of operations, so that it can be captured; `rate` is set outside."""

    def __init__(self, weights: Weights, decay: float, average: float, muon: bool, world: int):
        self.w, self.decay, self.average, self.world = weights, decay, average, world
        flat = weights.flat
        self.first, self.second = torch.zeros_like(flat), torch.zeros_like(flat)
        self.mean = flat.clone()
        self.rate, self.count = torch.zeros((), device=flat.device), torch.zeros((), device=flat.device)
        self.decayed = torch.cat([
            torch.full((p.numel(),), float(p.ndim > 1), device=flat.device) for p in weights.p.values()
        ])  # fmt: skip
        self.norm = torch.zeros((), device=flat.device)
        # Stacks of equally shaped matrices at the buffer's start: (offset, count, rows, columns)
        c = weights.config
        inner = c.num_heads * c.d_kv
        self.stacks: list[tuple[int, int, int, int]] = []
        if muon:
            if inner != c.d_model:
                raise ValueError(f"muon needs num_heads * d_kv ({inner}) equal to d_model ({c.d_model})")
            at = 0
            for count, rows, columns in (
                (8 * c.num_layers, inner, inner),
                (c.num_layers, c.d_ff, c.d_model),
                (c.num_layers, c.d_model, c.d_ff),
            ):
                self.stacks.append((at, count, rows, columns))
                at += count * rows * columns
            # q's scale is smaller by sqrt(d_kv), since the attention is unscaled: so are its steps, half as much
            self.gain = torch.ones(8 * c.num_layers, 1, 1, device=flat.device)
            self.gain[::4] = c.d_kv**-0.25

    @torch.no_grad()
    def step(self) -> None:
        g, flat = self.w.gradient, self.w.flat
        if self.world > 1:
            g.mul_(1 / self.world)
        self.norm.copy_(g.norm())
        g.mul_((CLIP / (self.norm + 1e-6)).clamp_max(1.0))
        self.count += 1
        self.first.lerp_(g, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        update = (self.first / (1 - BETAS[0] ** self.count)) / (
            (self.second / (1 - BETAS[1] ** self.count)).sqrt() + EPSILON
        )
        for at, count, rows, columns in self.stacks:
            part = slice(at, at + count * rows * columns)
            nesterov = torch.lerp(g[part], self.first[part], 0.95).view(count, rows, columns)
            o = orthogonal(nesterov) * 0.2 * max(rows, columns) ** 0.5  # root mean square as Adam's steps have
            if at == 0:
                o = o * self.gain
            update[part] = o.view(-1)
        flat.addcmul_(flat, self.decayed * (-self.decay * self.rate))
        flat.sub_(update * self.rate)
        keep = torch.minimum((1 + self.count) / (10 + self.count), torch.full_like(self.count, self.average))
        self.mean.lerp_(flat, 1 - keep)


class Captured:
    """A function without arguments, on a GPU captured as a CUDA graph after three ordinary calls."""

    def __init__(self, function: Any, device: torch.device):
        self.function, self.graph = function, None
        if device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                function()

    def __call__(self) -> None:
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()


class Judge:
    """Scores the averaged weights on windows of real series, each alone, to watch a run and to compare recipes."""

    def __init__(self, file: Path, config: Config, device: torch.device):
        self.windows = forecast_metrics.load(file)
        self.naive = forecast_metrics.score(self.windows, forecast_metrics.seasonal_naive(self.windows))
        self.weights = Weights(config, device)
        self.net = Net(self.weights, torch.float32)

    @torch.no_grad()
    def __call__(self, flat: Tensor) -> forecast_metrics.Summary:
        self.weights.flat.copy_(flat)
        scores = forecast_metrics.score(self.windows, forecast(self.net, self.windows))
        return forecast_metrics.summary(scores, self.naive)


def rate_at(progress: float, step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, a plateau, then linearly to zero over the last `fall` of the time budget."""
    falling = 1.0 if options.fall == 0 else min(1.0, (1 - progress) / options.fall)
    return options.rate * min(1.0, (step + 1) / options.warm) * max(falling, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of training, starts and compilation included")
    parser.add_argument("--resume", type=Path, help="weights to go on from")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--warm", type=int, default=400, help="steps of warm-up")
    parser.add_argument("--fall", type=float, default=0.3, help="share of the time in which the rate falls to zero")
    parser.add_argument("--decay", type=float, default=0.02, help="weight decay, times the rate")
    parser.add_argument("--average", type=float, default=0.999, help="memory of the averaged weights")
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--layers", type=int, default=Config.num_layers)
    parser.add_argument("--without", nargs="*", default=[], help="families of series, or parts of the tasks (Options)")
    parser.add_argument("--refresh", type=int, default=20, help="steps between two renewals of a slot of the bank")
    parser.add_argument("--slot", type=int, default=16384, help="rows renewed at once")
    parser.add_argument("--kernels", type=int, default=1024)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual batch")
    parser.add_argument("--windows", type=Path, help="real series to watch (forecast_quality export)")
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--steps", type=int, default=1 << 30, help="at most; the schedule then goes by them")
    options = parser.parse_args()
    begin = time.time()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    seconds = options.minutes * 60

    def say(text: str) -> None:
        if rank == 0:
            print(f"[{options.name} {time.time() - begin:6.1f} s] {text}", flush=True)

    config = Config(num_layers=options.layers)
    torch.manual_seed(options.seed)
    weights = Weights(config, device)
    if options.resume:
        weights.load(load_file(options.resume))
    else:
        weights.initialise()
    torch.manual_seed(options.seed + 1 + rank + 1000 * bool(options.resume))

    parts = [f.name for f in dataclasses.fields(Options)]
    unknown = set(options.without) - {*parts, *MIXTURE}
    if unknown:
        parser.error(f"--without {' '.join(sorted(unknown))}: allowed are {', '.join([*parts, *MIXTURE])}")
    tasked = {name: name not in options.without for name in parts}
    mixture = {name: count for name, count in MIXTURE.items() if name not in options.without}
    bank = Bank(Families(device, kernels=options.kernels), options.slot, mixture)
    tasks = Tasks(bank.x, config.context_length, Options(**tasked))
    bank.fill()
    if device.type == "cuda":
        torch.cuda.synchronize()
    say(f"bank of {len(bank.x)} series filled")

    buckets = [
        dataclasses.replace(b, alone=max(8, int(b.alone * options.share)), blocks=max(1, int(b.blocks * options.share)))
        for b in BUCKETS
    ]
    rows = sum(b.alone + 8 * b.blocks for b in buckets)
    compute, block = torch.float32, encoder_block
    if device.type == "cuda":
        compute, block = torch.bfloat16, torch.compile(encoder_block, dynamic=False)
    net = Net(weights, compute, block)
    levels = torch.tensor(QUANTILES, device=device)
    optimizer = Optimizer(weights, options.decay, options.average, options.muon, world)
    total = torch.zeros((), device=device)

    def gradients() -> None:
        weights.gradient.zero_()
        for bucket in buckets:
            b = tasks.draw(bucket)
            predicted = net(b.features, b.reg, b.attended, b.groups)
            loss = quantile_loss(predicted, b.target, b.weight, levels) / rows
            loss.backward()
            total.add_(loss.detach())

    step_gradients = Captured(gradients, device)
    say("forward and backward captured")
    step_update = Captured(optimizer.step, device)  # at rate 0: nothing moves but the moments
    for moment in (optimizer.first, optimizer.second, optimizer.count, total):
        moment.zero_()
    optimizer.mean.copy_(weights.flat)
    judge = Judge(options.windows, config, device) if options.windows and rank == 0 else None
    log = options.out / f"{options.name}.csv"
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        log.write_text("step,rows,minutes,loss,rate,dev_mase,dev_wql,dev_coverage\n")

    def save() -> None:
        if rank == 0:
            save_file(weights.state(optimizer.mean, torch.float16), options.out / f"{options.name}.safetensors")

    step, progress, reported, saved, last = 0, 0.0, time.time(), time.time(), 0
    stop = torch.zeros((), device=device)
    while progress < 1:
        optimizer.rate.fill_(rate_at(progress, step, options))
        step_gradients()
        if world > 1:
            dist.all_reduce(weights.gradient)
        step_update()
        step += 1
        if step % options.refresh == 0:
            bank.refresh()
        if step % 20 == 0:
            # All processes go by the first one's clock; reading it also keeps the queue of launches short.
            stop.fill_(max((time.time() - begin) / seconds, step / options.steps))
            if world > 1:
                dist.broadcast(stop, 0)
            progress = float(stop)
        if rank == 0 and (time.time() - reported > 30 or progress >= 1 or step in (20, 200)) and step % 20 == 0:
            reported = time.time()
            loss = float(total) / (step - last)
            found = judge(optimizer.mean) if judge and (step > 200 or progress >= 1) else None
            scores = f"{found.mase:.4f},{found.wql:.4f},{found.coverage:.4f}" if found else ",,"
            minutes = (time.time() - begin) / 60
            with log.open("a") as file:
                rate = rate_at(progress, step, options)
                file.write(f"{step},{step * rows * world},{minutes:.2f},{loss:.5f},{rate:.2e},{scores}\n")
            say(f"step {step} loss {loss:.4f} norm {float(optimizer.norm):.2f} dev {scores}")
            total.zero_()
            last = step
            if time.time() - saved > 110:
                saved = time.time()
                save()
    save()
    say(f"{step} steps of {rows * world} rows")
    if world > 1:
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
