"""Phase 1: the VAE, on pictures drawn on the device.

L1 on pixels and on their differences (edges), a light pull of the latents to a unit normal, and noise on the latents
before they are decoded, so that the decoder also forgives what a few-step sampler leaves over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Average, LossLog, Run, has_state, load_state, optimizer, save_state, set_rate
from data import training_rows
from models import SEED, vae, write_json
from scenes import render


def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=3.5, help="time budget, compilation included")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step and process")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--pool", type=int, default=65536, help="distinct scenes")
    parser.add_argument("--kl", type=float, default=2e-4, help="weight of the pull to a unit normal")
    parser.add_argument("--noise", type=float, default=0.15, help="most noise on the latents, in their deviations")
    parser.add_argument("--size", type=int, default=256, help="pixels (smaller only to try the script)")
    parser.add_argument("--workers", type=int, default=7)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()

    rows = training_rows(args.seed, args.pool, args.workers)
    run = Run(args.minutes, args.seed)
    cuda = run.device.type == "cuda"
    codec = vae().to(run.device, memory_format=torch.channels_last)
    if has_state(args.work, "vae"):
        load_state(args.work, "vae", {"vae": codec})
        run.say("resumed")
    run.broadcast(codec)
    rows = rows.to(run.device)
    encoder, decoder, draw = codec.encoder, codec.decoder, render
    if cuda:
        encoder, decoder = (torch.compile(m, dynamic=False) for m in (encoder, decoder))
        draw = torch.compile(render, dynamic=False)
    parameters = list(codec.parameters())
    opt = optimizer([codec], args.rate, decay=1e-4)
    mean = Average([codec], 0.998)
    log = LossLog(args.work, "vae", run, args.batch * run.world)

    step = 0
    while (progress := run.progress()) < 1:
        set_rate(opt, args.rate, step, progress, warm=100, end=0.01)
        at = torch.randint(len(rows), (args.batch,), device=run.device)
        picture = draw(rows[at], args.size).to(memory_format=torch.channels_last)
        with torch.autocast(run.device.type, torch.bfloat16):
            middle, logvar = encoder(picture).float().chunk(2, 1)
            logvar = logvar.clamp(-20, 10)
            z = middle + torch.exp(0.5 * logvar) * torch.randn_like(middle)
            level = torch.rand(len(z), 1, 1, 1, device=z.device) * args.noise
            z = z + level * middle.detach().std() * torch.randn_like(z)
            found = decoder(z).float()
        l1 = (found - picture).abs().mean()
        edges = sum((a - b).abs().mean() for a, b in zip(differences(found), differences(picture), strict=True))
        kl = 0.5 * (middle**2 + logvar.exp() - 1 - logvar).mean()
        loss = l1 + edges + args.kl * kl
        opt.zero_grad(set_to_none=True)
        loss.backward()
        run.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        mean.update()
        step += 1
        log.add(step, loss)
        if step % 500 == 0:
            run.say(f"  l1 {float(l1):.4f} edges {float(edges):.4f} kl {float(kl):.3f}")

    mean.swap()
    if run.rank == 0:
        means, error, noisy = [], [], []
        with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):
            for i in range(4 if not cuda else 16):
                picture = draw(rows[i * args.batch : (i + 1) * args.batch], args.size).contiguous(
                    memory_format=torch.channels_last
                )
                z = codec.encoder(picture)[:, :16].float()
                means.append(z)
                error.append(((codec.decoder(z).float().clamp(-1, 1) - picture) / 2).pow(2).mean((1, 2, 3)))
                z = z + 0.1 * z.std() * torch.randn_like(z)
                noisy.append(((codec.decoder(z).float().clamp(-1, 1) - picture) / 2).pow(2).mean((1, 2, 3)))
        z = torch.cat(means)
        psnr, noisy_psnr = (float(-10 * torch.log10(torch.cat(e)).mean()) for e in (error, noisy))
        stats = {
            "scaling_factor": round(float(1 / z.std()), 4),
            "shift_factor": round(float(z.mean()), 4),
            "psnr": round(psnr, 2),
            "psnr_noisy_latents": round(noisy_psnr, 2),
            "steps": step,
            "channel_deviations": [round(float(v), 3) for v in z.std((0, 2, 3))],
        }
        write_json(args.work / "vae.json", stats)
        save_state(args.work, "vae", {"vae": codec})
        run.say(str(stats))
    run.finish()


if __name__ == "__main__":
    main()
