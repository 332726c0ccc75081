"""What the training phases share: processes, time budgets, averaged weights, checkpoints and the loss log."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

SHARD = 15 << 20  # bytes; a checkpoint is split so that no file passes 16 MiB


class Run:
    """One training process: its device, rank and time budget. `torchrun` starts several; without it there is one.

    The environment variable STOP_AT (seconds since 1970) shortens the budget, for commands that may run only so long.
    """

    def __init__(self, minutes: float, seed: int, device: str | None = None):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() if device is None else device == "cuda"
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        torch.manual_seed(seed * 1000 + self.rank)
        self.seconds = minutes * 60
        self.asked, self.share = 0, 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count the budget from here on (after data and compilation are ready, say)."""
        self.begin = time.monotonic()
        if "STOP_AT" in os.environ:
            self.seconds = min(self.seconds, max(1.0, float(os.environ["STOP_AT"]) - time.time()))

    def progress(self) -> float:
        """Share of the time budget that is spent, the same in all processes (which agree on it every eighth call)."""
        share = (time.monotonic() - self.begin) / self.seconds
        if self.world == 1:
            return share
        if self.asked % 8 == 0:
            agreed = torch.tensor(share, device=self.device)
            dist.broadcast(agreed, 0)
            self.share = float(agreed)
        self.asked += 1
        return self.share

    def broadcast(self, module: torch.nn.Module) -> None:
        if self.world > 1:
            for p in module.parameters():
                dist.broadcast(p.data, 0)

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        if self.world > 1:
            grads = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            flat /= self.world
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def finish(self) -> None:
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
            dist.destroy_process_group()


class Average:
    """Exponential moving average of parameters, with a shorter memory at the start."""

    def __init__(self, modules: list[torch.nn.Module], decay: float):
        self.live = [p for m in modules for p in m.parameters()]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.count = decay, 0

    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    def swap(self) -> None:
        """Exchange averaged and live weights (call twice to return)."""
        for p, m in zip(self.live, self.mean, strict=True):
            p.data, m.data = m.data, p.data


def optimizer(modules: list[torch.nn.Module], rate: float, decay: float = 0.01) -> torch.optim.AdamW:
    matrices = [p for m in modules for p in m.parameters() if p.ndim > 1]
    others = [p for m in modules for p in m.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), fused=matrices[0].is_cuda)


def set_rate(opt: torch.optim.Optimizer, base: float, step: int, progress: float, warm: int, end: float) -> None:
    """Linear warm-up over `warm` steps, then a cosine from the base rate to `end` times it over the time budget."""
    fall = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    for group in opt.param_groups:
        group["lr"] = base * min(1.0, (step + 1) / warm) * fall


def save_state(folder: Path, name: str, modules: dict[str, torch.nn.Module]) -> None:
    """Write `name-0.safetensors`, ... : the modules' weights in half precision, each key led by its module's name."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for part, module in modules.items():
        for key, value in module.state_dict().items():
            value = value.detach().to(torch.float16).cpu().contiguous()
            if size + value.nbytes > SHARD:
                shards.append({})
                size = 0
            shards[-1][f"{part}.{key}"] = value
            size += value.nbytes
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"{name}-{i}.safetensors")


def has_state(folder: Path, name: str) -> bool:
    return (folder / f"{name}-0.safetensors").exists()


def load_state(folder: Path, name: str, modules: dict[str, torch.nn.Module]) -> None:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob(f"{name}-*.safetensors")):
        state.update(load_file(file))
    for part, module in modules.items():
        own = {k.removeprefix(part + "."): v.float() for k, v in state.items() if k.startswith(part + ".")}
        module.load_state_dict(own)


class LossLog:
    """Appends `phase,step,images,minutes,loss,...` lines to `losses.csv`; averages over `every` steps."""

    def __init__(self, folder: Path, phase: str, run: Run, images_per_step: int, every: int = 50):
        self.file, self.phase, self.run, self.images, self.every = (
            folder / "losses.csv",
            phase,
            run,
            images_per_step,
            every,
        )
        self.total, self.count, self.begin = None, 0, time.monotonic()
        if run.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.file.exists():
                self.file.write_text("phase,step,images,minutes,loss\n")

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Count the loss after `step` steps; the value is read back only every so many steps."""
        loss = loss.detach()
        self.total = loss if self.total is None else self.total + loss
        self.count += 1
        if self.count == self.every or step in (1, 10):
            if self.run.rank == 0:
                minutes = (time.monotonic() - self.begin) / 60
                line = f"{self.phase},{step},{step * self.images},{minutes:.3f},{float(self.total) / self.count:.6f}"
                with self.file.open("a") as out:
                    out.write(line + "\n")
                if step <= 10 or step % (self.every * 5) == 0:
                    print(line, flush=True)
            self.total, self.count = None, 0
