"""Phase 3: eight steps without guidance.

The teacher (phase 2's weights with guidance) walks every one of the eight steps in small ones; the student learns to
make each step at once. First along the teacher's own paths, then along the student's, so that it also learns to mend
what it does itself.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path

import torch
from batched import Batched
from common import Average, LossLog, Run, has_state, load_state, optimizer, save_state, set_rate
from data import Latents, encode_captions, make_scenes_in_parallel, tokenizer_of
from models import SEED, SHIFT, STEPS, text_encoder, transformer


def shifted(u: torch.Tensor) -> torch.Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def step_sigmas(device: torch.device) -> torch.Tensor:
    """The scheduler's noise levels [STEPS + 1] from 1 to 0 for STEPS steps."""
    u = torch.linspace(1.0, 1 / STEPS, STEPS, device=device)
    return torch.cat((shifted(u), torch.zeros(1, device=device)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.5, help="time budget from the first round on")
    parser.add_argument("--paths", type=int, default=4096, help="paths a round and process")
    parser.add_argument("--batch", type=int, default=1024, help="paths walked, and pairs learned, at a time")
    parser.add_argument("--substeps", type=int, default=3, help="the teacher's steps in each of the eight")
    parser.add_argument("--guidance", type=float, default=0.8, help="w in c + w (c - u)")
    parser.add_argument("--epochs", type=int, default=2, help="times that each pair is learned")
    parser.add_argument(
        "--own", type=float, default=0.35, help="share of the time after which the student's paths are used"
    )
    parser.add_argument("--rate", type=float, default=4e-4, help="learning rate")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--scenes", type=int, default=65536, help="scenes a process whose captions are used")
    parser.add_argument(
        "--compile-only", action="store_true", help="fill the compiler's cache and end (beside phase 2)"
    )
    parser.add_argument("--seed", type=int, default=SEED + 500)
    args = parser.parse_args()

    rank = int(os.environ.get("RANK", 0))
    _, ids, lengths = make_scenes_in_parallel(args.seed + rank, args.scenes, args.tokenizer, args.workers)
    run = Run(args.minutes, args.seed)
    device, cuda = run.device, run.device.type == "cuda"
    pool = Latents.__new__(Latents)  # captions alone: no picture is needed here
    pool.device = device
    pool.ids, pool.lengths = ids.flatten(0, 1).to(device), lengths.flatten().to(device)
    pool.short, pool.long = (torch.nonzero(m).flatten() for m in (pool.lengths <= 32, pool.lengths > 32))
    teacher = {"text": text_encoder().to(device), "flow": transformer().to(device)}
    student = {"text": text_encoder().to(device), "flow": transformer().to(device)}
    load_state(args.work, "flow", teacher)
    resumed = has_state(args.work, "student")
    load_state(args.work, "student" if resumed else "flow", student)
    dtype = torch.bfloat16 if cuda else torch.float32
    guide = Batched(teacher["text"], teacher["flow"], device, dtype, compiled=cuda)
    fast = Batched(student["text"], student["flow"], device, dtype, compiled=cuda)
    fast.image_block, fast.text_block = guide.image_block, guide.text_block
    parameters = [p for m in student.values() for p in m.parameters()]
    opt = optimizer(list(student.values()), args.rate, decay=0.0)
    mean = Average(list(student.values()), 0.995)
    log = LossLog(args.work, "distill", run, args.batch * run.world, every=20)
    empty_ids, empty_length = encode_captions(tokenizer_of(args.tokenizer), [""])
    empty_ids = torch.from_numpy(empty_ids).to(device).long()
    sigmas = step_sigmas(device)

    @torch.no_grad()
    def walk(long: bool, own: bool) -> tuple[torch.Tensor, ...]:
        """Walk some paths: latents [8, b, ...], the velocities that the teacher's steps amount to, and captions."""
        b = args.batch
        ids, lengths, _ = pool.captions(b, long)
        both = torch.cat((ids, empty_ids[:, : ids.shape[1]].expand(b, -1)))
        caption = guide.caption(both, torch.cat((lengths, lengths.new_full((b,), int(empty_length[0])))))
        own_caption = fast.caption(ids, lengths) if own else None
        x = torch.randn(b, 16, 32, 32, device=device)
        starts, targets = [], []
        for i in range(STEPS):
            y = x
            u = torch.linspace(1 - i / STEPS, 1 - (i + 1) / STEPS, args.substeps + 1, device=device)
            inner = shifted(u)
            for a, c in itertools.pairwise(inner):
                v, v_empty = guide.velocity(torch.cat((y, y)), a.expand(2 * b), caption).chunk(2)
                y = y + (c - a) * (v + args.guidance * (v - v_empty))
            starts.append(x.to(torch.bfloat16))
            targets.append(((y - x) / (sigmas[i + 1] - sigmas[i])).to(torch.bfloat16))
            if own:
                x = x + (sigmas[i + 1] - sigmas[i]) * fast.velocity(x, sigmas[i].expand(b), own_caption)
            else:
                x = y
        return torch.stack(starts), torch.stack(targets), ids, lengths

    def learn(starts: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, at: torch.Tensor):
        """One step on the pairs `at` (step number times paths plus path)."""
        i, j = at // len(ids), at % len(ids)
        found = fast.velocity(starts[i, j].float(), sigmas[i], fast.caption(ids[j], lengths[j]))
        loss = (found - targets[i, j].float()).square().mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        run.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 0.5)
        opt.step()
        mean.update()
        return loss

    if args.compile_only:
        for long in (False, True):
            learn(*walk(long, own=True), torch.arange(args.batch, device=device))
        run.finish()
        return

    step, rounds = 0, 0
    run.restart_clock()
    while (progress := run.progress()) < 1:
        long = rounds % 6 == 3
        own = progress > args.own
        mean.swap()  # the student's own paths are those of its averaged weights, which are the result
        walked = [walk(long, own) for _ in range(max(1, args.paths // args.batch // (2 if long else 1)))]
        mean.swap()
        starts, targets = (torch.cat([w[i] for w in walked], 1) for i in (0, 1))
        ids, lengths = (torch.cat([w[i] for w in walked]) for i in (2, 3))
        if rounds == 0:
            run.restart_clock()
        for _ in range(args.epochs):
            for at in torch.randperm(STEPS * len(ids), device=device).split(args.batch):
                if len(at) == args.batch:
                    set_rate(opt, args.rate, step, run.progress(), warm=50, end=0.02)
                    loss = learn(starts, targets, ids, lengths, at)
                    step += 1
                    log.add(step, loss)
        rounds += 1
        if rounds == 2:
            run.say(f"two rounds: {time.monotonic() - run.begin:.0f} s")
        if run.rank == 0 and rounds % 3 == 0:
            mean.swap()
            save_state(args.work, "student", student)
            mean.swap()
    mean.swap()
    if run.rank == 0:
        save_state(args.work, "student", student)
        run.say(f"{rounds} rounds, {step} steps")
    run.finish()


if __name__ == "__main__":
    main()
