"""Phase 2: text encoder and transformer together, by flow matching on the VAE's latents."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from batched import Batched
from common import Average, LossLog, Run, has_state, load_state, optimizer, save_state, set_rate
from data import Latents, encode_captions, make_scenes_in_parallel, tokenizer_of
from models import SEED, SHIFT, text_encoder, transformer, vae


def prepare(text, flow) -> None:
    """Starting weights: every block of the transformer begins as the identity."""
    with torch.no_grad():
        for name, p in text.named_parameters():
            if "embed_tokens" in name:
                p.normal_(std=0.3)
            elif p.ndim > 1:
                p.normal_(std=0.03 if "o_proj" in name or "down_proj" in name else 0.06)
        for name, p in flow.named_parameters():
            if "adaLN_modulation" in name or "all_final_layer" in name:
                p.zero_()


def draw_sigmas(n: int, device: torch.device) -> torch.Tensor:
    """Noise levels [n] in 0..1: half logit-normal, half uniform, then shifted as the scheduler shifts its steps."""
    u = torch.rand(n, device=device)
    u[: n // 2] = torch.sigmoid(torch.randn(n // 2, device=device))
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="time budget from the first step on")
    parser.add_argument("--batch", type=int, default=512, help="pictures a step and process")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate")
    parser.add_argument("--end", type=float, default=1.0, help="the last rate over the first (1: to be resumed)")
    parser.add_argument("--pool", type=int, default=131072, help="distinct scenes a process")
    parser.add_argument("--decay", type=float, default=0.999, help="memory of the averaged weights")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--seed", type=int, default=SEED, help="use another one when resuming: fresh scenes")
    args = parser.parse_args()

    begin = time.monotonic()
    rank = int(os.environ.get("RANK", 0))
    data = make_scenes_in_parallel(args.seed + rank, args.pool, args.tokenizer, args.workers)
    run = Run(args.minutes, args.seed)
    cuda = run.device.type == "cuda"
    run.say(f"scenes after {time.monotonic() - begin:.0f} s")
    codec = vae().to(run.device, memory_format=torch.channels_last)
    load_state(args.work, "vae", {"vae": codec})
    stats = json.loads((args.work / "vae.json").read_text())
    pool = Latents(*data, codec, stats["scaling_factor"], stats["shift_factor"], run.device, 128 if cuda else 8)
    run.say(
        f"{len(pool.latents)} latents after {time.monotonic() - begin:.0f} s, "
        f"deviation {float(pool.latents[:999].float().std()):.3f}"
    )
    long_every = max(2, round((len(pool.short) + len(pool.long)) / max(1, len(pool.long))))

    text, flow = text_encoder().to(run.device), transformer().to(run.device)
    prepare(text, flow)
    modules = {"text": text, "flow": flow}
    if has_state(args.work, "flow"):
        load_state(args.work, "flow", modules)
        run.say("resumed")
    for m in modules.values():
        run.broadcast(m)
    fast = Batched(text, flow, run.device, torch.bfloat16 if cuda else torch.float32, compiled=cuda)
    # Qwen3's last layer and its final norm are never used, so they get no gradients.
    parameters = [*text.parameters(), *flow.parameters()]
    opt = optimizer([text, flow], args.rate)
    mean = Average([text, flow], args.decay)
    log = LossLog(args.work, "flow", run, args.batch * run.world)
    ids, lengths = encode_captions(tokenizer_of(args.tokenizer), [""])
    nothing, nothing_length = torch.from_numpy(ids).to(run.device).long(), int(lengths[0])

    step = 0
    run.restart_clock()
    while (progress := run.progress()) < 1:
        if step == 12:
            run.restart_clock()  # both kinds of batches are compiled now
            run.say(f"first steps after {time.monotonic() - begin:.0f} s; every {long_every}th batch has long captions")
        set_rate(opt, args.rate, step, progress, warm=200, end=args.end)
        x, ids, lengths = pool.batch(args.batch, long=step == 6 or (step > 12 and step % long_every == 0))
        # Every tenth caption is empty, for the teacher's guidance in phase 3.
        empty = torch.rand(args.batch, device=run.device) < 0.1
        ids = torch.where(empty[:, None], nothing[:, : ids.shape[1]], ids)
        lengths = torch.where(empty, nothing_length, lengths)
        sigma = draw_sigmas(args.batch, run.device)
        noise = torch.randn_like(x)
        mixed = torch.lerp(x, noise, sigma.view(-1, 1, 1, 1))
        found = fast.velocity(mixed, sigma, fast.caption(ids, lengths))
        loss = (found - (noise - x)).square().mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        run.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        opt.step()
        mean.update()
        step += 1
        log.add(step, loss)
        if step == 112:
            seconds = time.monotonic() - run.begin
            run.say(f"{100 * args.batch * run.world / seconds:.0f} pictures a second")
        if run.rank == 0 and step % 1000 == 0:
            mean.swap()
            save_state(args.work, "flow", modules)
            mean.swap()
    mean.swap()
    if run.rank == 0:
        save_state(args.work, "flow", modules)
        run.say(f"{step} steps")
    run.finish()


if __name__ == "__main__":
    main()
