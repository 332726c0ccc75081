"""`ZImage` on several devices: two engines on the CPU, which share one model, stand for two GPUs."""

from __future__ import annotations

import gc
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from diffusionz import Cancelled, LoraError, Progress, ZImage
from tests.python.interrupt import STOPPED_S

SMALL: dict[str, Any] = {"width": 48, "height": 32, "steps": 2, "progress": False}
LONG = SMALL | {"width": 256, "height": 256, "steps": 1000}  # ten seconds of one thread


@pytest.fixture(scope="module")
def pair(tiny_model: pathlib.Path) -> Iterator[ZImage]:
    with ZImage(tiny_model, device=["cpu", "cpu"], threads=1) as model:
        yield model


def test_a_batch_is_in_order_and_byte_for_byte_that_of_one_device(engine: ZImage, pair: ZImage) -> None:
    prompts = [f"picture {i}" for i in range(9)]
    alone, spread = (model.generate_batch(prompts, seed=5, **SMALL) for model in (engine, pair))
    assert [image.seed for image in spread] == list(range(5, 14))
    for one, other in zip(alone, spread, strict=True):
        assert (one.pixels == other.pixels).all()
        assert one.metadata == other.metadata
    assert len({image.pixels.tobytes() for image in spread}) == 9


def test_one_picture_and_the_names_of_the_devices(engine: ZImage, pair: ZImage) -> None:
    assert (engine.generate("x", seed=1, **SMALL).pixels == pair.generate("x", seed=1, **SMALL).pixels).all()
    assert pair.device == "cpu,cpu"
    with ZImage(engine.path, device="cpu,cpu") as other:
        assert other.device == "cpu,cpu"


def test_engines_of_one_model_share_its_weights(tiny_model: pathlib.Path, engine: ZImage, pair: ZImage) -> None:
    gc.collect()  # what others left unclosed goes now, not in between
    before = pair.memory
    assert before["weights_bytes"] == engine.memory["weights_bytes"]
    assert before["device_bytes"] == before["device_peak_bytes"] == before["device_held_bytes"] == 0  # the CPU's
    with ZImage(tiny_model, device="cpu") as third:
        # Two engines are one context.
        assert pair.memory["shared_by"] == before["shared_by"] + 1
        assert third.memory["weights_bytes"] == before["weights_bytes"]


def test_both_draw_at_once(pair: ZImage) -> None:
    """Steps of two pictures are counted while neither is finished."""
    seen: list[tuple[int, int]] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.image, progress.step))

    def stop_when_seen(progress: Progress) -> None:
        if progress.image == 0 and progress.step > steps:
            raise Cancelled

    pair.generate_batch("x", count=2, seed=1, **(SMALL | {"steps": 150}), on_progress=watch)
    assert seen[-1] == (2, 300)
    steps = 300
    with pytest.raises(Cancelled):
        pair.generate_batch("x", count=2, seed=1, **(LONG | {"steps": steps}), on_progress=stop_when_seen)


def test_a_batch_that_is_stopped_stops_on_both(pair: ZImage) -> None:
    def stop(progress: Progress) -> None:
        if progress.step > 4:
            raise Cancelled("enough")

    start = time.monotonic()
    with pytest.raises(Cancelled):
        pair.generate_batch("x", count=8, seed=1, **LONG, on_progress=stop)
    assert time.monotonic() - start < STOPPED_S
    assert pair.generate("x", seed=1, **SMALL).pixels.size  # and the model goes on


def test_calls_that_queue_go_to_whichever_is_free(engine: ZImage, pair: ZImage) -> None:
    expected = [engine.generate("x", seed=seed, **SMALL).pixels.tobytes() for seed in range(6)]
    drawn: dict[int, bytes] = {}

    def draw(seed: int) -> None:
        drawn[seed] = pair.generate("x", seed=seed, **SMALL).pixels.tobytes()

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [drawn[seed] for seed in range(6)] == expected


def test_an_adapter_is_every_engines_and_an_error_the_calls(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import torch
    from safetensors.torch import save_file

    name, rows = "layers.0.attention.to_q", 64
    with ZImage(tiny_model, device="cpu") as one, ZImage(tiny_model, device="cpu,cpu") as two:
        width = one.info["transformer"]["dim"]
        rows = width
        generator = torch.Generator().manual_seed(1)
        file = tmp_path / "lora.safetensors"
        save_file(
            {
                f"{name}.lora_A.weight": torch.randn(4, width, generator=generator),
                f"{name}.lora_B.weight": torch.randn(rows, 4, generator=generator),
            },
            file,
        )
        plain = two.generate_batch("x", count=4, seed=1, **SMALL)
        for model in (one, two):
            model.load_lora(file, 2.0)
        alone, spread = (model.generate_batch("x", count=4, seed=1, **SMALL) for model in (one, two))
        for a, b, c in zip(alone, spread, plain, strict=True):
            assert (a.pixels == b.pixels).all()
            assert (b.pixels != c.pixels).any()
        assert two.memory["lora_bytes"] == 2 * one.memory["lora_bytes"] > 0
        two.unload_lora()
        for a, b in zip(two.generate_batch("x", count=4, seed=1, **SMALL), plain, strict=True):
            assert (a.pixels == b.pixels).all()
        with pytest.raises(LoraError, match="nowhere"):
            two.generate_batch("x", count=4, seed=1, lora=tmp_path / "nowhere.safetensors", **SMALL)
        with pytest.raises(LoraError, match="nowhere"):
            two.load_lora(tmp_path / "nowhere.safetensors")
        assert (two.generate("x", seed=1, **SMALL).pixels == plain[0].pixels).all()
