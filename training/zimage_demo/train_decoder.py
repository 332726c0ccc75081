"""Phase 1b: the VAE's decoder alone, on latents of the finished encoder.

The latents stay what they are, so this can run beside phases 2 and 3.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import Average, LossLog, Run, load_state, optimizer, save_state, set_rate
from data import encode_pictures, training_rows
from models import SEED, vae, write_json
from scenes import render
from train_vae import differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=7, help="time budget, compilation included")
    parser.add_argument("--batch", type=int, default=24, help="pictures a step and process")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--pool", type=int, default=40960, help="distinct scenes a process")
    parser.add_argument("--noise", type=float, default=0.12, help="most noise on the latents, in their deviations")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--seed", type=int, default=SEED + 300)
    args = parser.parse_args()

    rows = training_rows(args.seed, args.pool, args.workers)
    run = Run(args.minutes, args.seed)
    cuda = run.device.type == "cuda"
    codec = vae().to(run.device, memory_format=torch.channels_last)
    load_state(args.work, "vae", {"vae": codec})
    stats = json.loads((args.work / "vae.json").read_text())
    codec.encoder.requires_grad_(False)
    decoder = torch.compile(codec.decoder, dynamic=False) if cuda else codec.decoder
    draw = torch.compile(render, dynamic=False) if cuda else render
    # Each process has its own order of the same scenes.
    latents = encode_pictures(rows, codec, run.device, 128 if cuda else 4).to(torch.bfloat16)
    rows = rows[: len(latents)].to(run.device)
    parameters = list(codec.decoder.parameters())
    opt = optimizer([codec.decoder], args.rate, decay=1e-4)
    mean = Average([codec.decoder], 0.999)
    log = LossLog(args.work, "decoder", run, args.batch * run.world, every=200)
    deviation = 1 / stats["scaling_factor"]

    def save(step: int) -> None:
        mean.swap()
        error = []
        with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):
            for i in range(0, min(512, len(rows)), args.batch):
                found = codec.decoder(latents[i : i + args.batch].float()).float().clamp(-1, 1)
                error.append(((found - render(rows[i : i + args.batch])) / 2).pow(2).mean((1, 2, 3)))
        stats["psnr_decoder"] = round(float(-10 * torch.log10(torch.cat(error)).mean()), 2)
        stats["steps_decoder"] = step
        write_json(args.work / "vae.json", stats)
        save_state(args.work, "vae", {"vae": codec})
        run.say(f"decoder: {step} steps, {stats['psnr_decoder']} dB")
        mean.swap()

    step = 0
    while (progress := run.progress()) < 1:
        set_rate(opt, args.rate, step, progress, warm=200, end=0.005)
        at = torch.randint(len(rows), (args.batch,), device=run.device)
        picture = draw(rows[at]).to(memory_format=torch.channels_last)
        z = latents[at].float()
        level = torch.rand(len(z), 1, 1, 1, device=z.device) * args.noise * deviation
        z = (z + level * torch.randn_like(z)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(run.device.type, torch.bfloat16):
            found = decoder(z).float()
        loss = (found - picture).abs().mean()
        loss = loss + sum((a - b).abs().mean() for a, b in zip(differences(found), differences(picture), strict=True))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        run.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        mean.update()
        step += 1
        log.add(step, loss)
        if run.rank == 0 and step % 4000 == 0:
            save(step)
    if run.rank == 0:
        save(step)
    run.finish()


if __name__ == "__main__":
    main()
