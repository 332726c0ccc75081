"""Training data, made here: packed scenes with token ids of several captions each, and their latents on the device."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import torch
from models import CHAT
from scenes import SCENE_WIDTH, caption, pack, render, sample_scene, sample_training_scene
from tokenizers import Tokenizer

LONGEST = 64  # tokens, the chat form included; longer captions are worded again
WORDINGS = 4  # captions of each scene


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode_captions(tokenizer: Tokenizer, captions: list[str], width: int = LONGEST) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n, width] int16 (zeros after the end) and lengths [n] of captions in the chat form."""
    ids = np.zeros((len(captions), width), np.int16)
    lengths = np.zeros(len(captions), np.int64)
    for i, found in enumerate(
        tokenizer.encode_batch_fast([CHAT.format(c) for c in captions], add_special_tokens=False)
    ):
        lengths[i] = len(found.ids)
        if lengths[i] <= width:
            ids[i, : lengths[i]] = found.ids
    return ids, lengths


def make_scenes(job: tuple[int, int, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed scenes [n, 29], ids [n, WORDINGS, 64] and lengths [n, WORDINGS] for one seed."""
    seed, count, tokenizer_file = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = random.Random(seed)
    scenes = [sample_training_scene(rng) for _ in range(count)]
    ids, lengths = encode_captions(tokenizer, [caption(rng, s) for s in scenes for _ in range(WORDINGS)])
    for i in np.nonzero(lengths > LONGEST)[0]:
        while lengths[i] > LONGEST:
            one, length = encode_captions(tokenizer, [caption(rng, scenes[i // WORDINGS]).lower()])
            ids[i], lengths[i] = one[0], length[0]
    rows = np.stack([pack(s) for s in scenes])
    return rows, ids.reshape(count, WORDINGS, LONGEST), lengths.reshape(count, WORDINGS)


def make_scenes_in_parallel(
    seed: int, count: int, tokenizer: Path, workers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `make_scenes`, by `workers` processes; call it before CUDA starts."""
    part = max(1, min(2048, count // workers))
    jobs = [(seed * 100003 + i, part, str(tokenizer / "tokenizer.json")) for i in range(-(-count // part))]
    if workers == 1:
        found = [make_scenes(j) for j in jobs]
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            found = pool.map(make_scenes, jobs, chunksize=1)
    rows, ids, lengths = (torch.from_numpy(np.concatenate(parts)[:count]) for parts in zip(*found, strict=True))
    return rows, ids, lengths


def training_rows(seed: int, count: int, workers: int, held_out: bool = False) -> torch.Tensor:
    """Packed scenes only [n, 29]; with `held_out`, scenes of every pair and relation."""
    part = max(1, min(2048, count // workers))
    jobs = [(seed * 100003 + i, part, held_out) for i in range(-(-count // part))]
    if workers == 1:
        found = [_rows(j) for j in jobs]
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            found = pool.map(_rows, jobs, chunksize=1)
    rows = torch.from_numpy(np.concatenate(found)[:count])
    assert rows.shape[1] == SCENE_WIDTH
    return rows


def _rows(job: tuple[int, int, bool]) -> np.ndarray:
    seed, count, held_out = job
    rng, sample = random.Random(seed), sample_scene if held_out else sample_training_scene
    return np.stack([pack(sample(rng)) for _ in range(count)])


def encode_pictures(rows: torch.Tensor, codec, device: torch.device, batch: int) -> torch.Tensor:
    """The encoder's means [m, 16, 32, 32] of packed scenes [n, 29]; m is n less what does not fill a last batch."""
    draw = torch.compile(render, dynamic=False) if device.type == "cuda" else render
    parts = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for i in range(0, len(rows) - len(rows) % batch, batch):
            pictures = draw(rows[i : i + batch].to(device)).to(memory_format=torch.channels_last)
            parts.append(codec.encoder(pictures).chunk(2, 1)[0].to(torch.bfloat16).contiguous())
    return torch.cat(parts)


class Latents:
    """Encoded scenes and their captions on the device; batches hold captions of at most 32, or of 33 to 64 tokens."""

    def __init__(self, rows, ids, lengths, codec, scaling: float, shift: float, device, batch: int = 128):
        self.device = device
        means = encode_pictures(rows, codec, device, batch).float()
        self.latents = ((means - shift) * scaling).to(torch.bfloat16)
        n = len(self.latents)
        self.ids, self.lengths = ids[:n].flatten(0, 1).to(device), lengths[:n].flatten().to(device)
        self.short = torch.nonzero(self.lengths <= 32).flatten()
        self.long = torch.nonzero(self.lengths > 32).flatten()

    def captions(self, batch: int, long: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random ids [b, 32 or 64], their lengths [b] and the indices of their scenes [b]."""
        pool, width = (self.long, 64) if long else (self.short, 32)
        at = pool[torch.randint(len(pool), (batch,), device=self.device)]
        return self.ids[at, :width].long(), self.lengths[at], at // WORDINGS

    def batch(self, batch: int, long: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents [b, 16, 32, 32] in float32, ids and lengths."""
        ids, lengths, scenes = self.captions(batch, long)
        return self.latents[scenes].float(), ids, lengths
