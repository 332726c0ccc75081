"""`ZImage`: pictures, seeds, progress, stopping, LoRA arguments, life and death."""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import numpy
import pytest

from diffusionz import (
    ArgumentError,
    Cancelled,
    DeviceError,
    DiffusionzError,
    Image,
    LoraError,
    ModelError,
    Progress,
    ZImage,
)
from tests.python.interrupt import STOPPED_S, check_ctrl_c

SMALL: dict[str, Any] = {"width": 48, "height": 32, "steps": 2, "progress": False}
# Most of a minute of work, in steps of a twentieth of a second: what is stopped ends long before STOPPED_S.
LONG: dict[str, Any] = {"width": 512, "height": 512, "steps": 1000, "progress": False}


def test_a_picture(engine: ZImage) -> None:
    image = engine.generate("a red circle on a blue background", seed=7, **SMALL)
    assert isinstance(image, Image)
    assert (image.width, image.height, image.seed) == (48, 32, 7)
    assert image.pixels.shape == (32, 48, 3)
    assert image.pixels.dtype == numpy.uint8
    assert repr(image) == "<Image 48x32, seed 7>"
    assert sorted(image.timings) == ["decode", "denoise", "queue", "text", "total"]
    assert all(value >= 0 for value in image.timings.values())
    assert image.timings["total"] >= image.timings["denoise"] > 0
    metadata = image.metadata
    assert metadata["prompt"] == "a red circle on a blue background"
    assert (metadata["width"], metadata["height"], metadata["steps"], metadata["seed"]) == (48, 32, 2, 7)


def test_a_seed_draws_the_same_picture_and_another_seed_another(engine: ZImage) -> None:
    first, again, other = (engine.generate("x", seed=seed, **SMALL) for seed in (1, 1, 2))
    assert (first.pixels == again.pixels).all()
    assert (first.pixels != other.pixels).any()


def test_a_random_seed_is_reported_and_draws_the_picture_again(engine: ZImage) -> None:
    image, other = engine.generate("x", **SMALL), engine.generate("x", **SMALL)
    assert image.seed != other.seed
    assert (engine.generate("x", seed=image.seed, **SMALL).pixels == image.pixels).all()


def test_picture_i_of_a_batch_has_the_seed_plus_i(engine: ZImage) -> None:
    batch = engine.generate_batch("x", count=3, seed=5, **SMALL)
    assert [image.seed for image in batch] == [5, 6, 7]
    for image in batch:
        assert (image.pixels == engine.generate("x", seed=image.seed, **SMALL).pixels).all()


def test_a_batch_of_prompts(engine: ZImage) -> None:
    batch = engine.generate_batch(["a", "b"], count=2, seed=0, **SMALL)
    assert [image.metadata["prompt"] for image in batch] == ["a", "a", "b", "b"]
    assert (batch[2].pixels == engine.generate("b", seed=2, **SMALL).pixels).all()


def test_the_default_size_is_what_the_model_was_made_for(engine: ZImage) -> None:
    image = engine.generate("x", steps=1, seed=0, progress=False)
    assert (image.width, image.height) == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"width": 17}, ArgumentError, "17"),
        ({"width": 0}, ArgumentError, "0"),
        ({"height": 10**12}, ArgumentError, "1000000000000"),
        ({"steps": 0}, ArgumentError, "0"),
        ({"steps": 2.5}, TypeError, "float"),
        ({"guidance": float("nan")}, ArgumentError, "guidance"),
        ({"seed": 2**63}, ArgumentError, "seed"),
        ({"seed": "7"}, TypeError, "str"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt"),
        ({"lora": "nowhere.safetensors"}, LoraError, "nowhere"),
        ({"lora": ("nowhere.safetensors", float("inf"))}, ArgumentError, "lora_weight"),
        ({"init_image": "nowhere.png"}, FileNotFoundError, "nowhere"),
        ({"init_image": b"no picture"}, DiffusionzError, ""),
        ({"init_image": numpy.zeros((32, 48), numpy.uint8)}, ArgumentError, "[32, 48]"),
        ({"init_image": numpy.zeros((32, 48, 3), numpy.float32)}, ArgumentError, "float32"),
        ({"init_image": numpy.zeros((16, 16, 3), numpy.uint8)}, ArgumentError, "16x16"),
        ({"init_image": numpy.zeros((32, 48, 3), numpy.uint8), "strength": 0.0}, ArgumentError, "strength"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments(engine: ZImage, arguments: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error) as raised:
        engine.generate("x", **(SMALL | arguments))
    assert named in str(raised.value)


@pytest.mark.parametrize("prompt", ["a\0b", "\ud800"], ids=ascii)
def test_wrong_prompts(engine: ZImage, prompt: str) -> None:
    with pytest.raises(ArgumentError, match="prompt"):
        engine.generate(prompt, **SMALL)


def test_wrong_batches(engine: ZImage) -> None:
    for prompts, count in (([], 1), ("x", 0), ("x", 1025), (["x"] * 513, 2)):
        with pytest.raises(ArgumentError, match="1024"):
            engine.generate_batch(prompts, count=count, **SMALL)
    with pytest.raises(ArgumentError, match="seed"):
        engine.generate_batch("x", count=2, seed=2**63 - 1, **SMALL)
    with pytest.raises(TypeError, match="prompt must be a str"):
        engine.generate(3, **SMALL)  # type: ignore[arg-type]


def test_wrong_models(tmp_path: pathlib.Path) -> None:
    for model, named in (
        (tmp_path, str(tmp_path)),
        (tmp_path / "x", "x"),
        ("nothing", "demo"),
        ("a/b", "diffusionz pull"),
    ):
        with pytest.raises(ModelError) as raised:
            ZImage(model, device="cpu")
        assert named in str(raised.value)
    with pytest.raises(ArgumentError):
        ZImage("", device="cpu")


def test_wrong_devices_and_precisions(tiny_model: pathlib.Path) -> None:
    for device in ("gpu", "cuda:", "cuda:-1", "cuda:x", "", "cuda:99999999999"):
        with pytest.raises(ArgumentError, match="device"):
            ZImage(tiny_model, device=device)
    with pytest.raises(DeviceError, match="99"):
        ZImage(tiny_model, device="cuda:99")
    for precision in ("int4", "tf32", "float16"):
        with pytest.raises(ArgumentError, match=f'"{precision}".*bfloat16, fp8'):
            ZImage(tiny_model, precision=precision)
    with pytest.raises(DeviceError, match=r"FP8.*8\.9"):
        ZImage(tiny_model, device="cpu", precision="fp8")
    for max_vram in ("", "8 apples", "-1", "0", 0, -5, "GB", "8GBs", "nan", "inf", 2**63):
        with pytest.raises(ArgumentError, match="max_vram"):
            ZImage(tiny_model, device="cpu", max_vram=max_vram)
    for devices in ([], "cpu,", "cpu,gpu", ["cpu", "gpu"], 0):
        with pytest.raises(ArgumentError, match="device"):
            ZImage(tiny_model, device=devices)


def test_sizes_are_read_as_people_write_them() -> None:
    from diffusionz._context import byte_count

    for text, count in (("8GB", 8 * 10**9), ("7.5 GiB", 15 << 29), ("500mb", 5 * 10**8), ("1e9", 10**9), (123, 123),
                        ("64KiB", 1 << 16), ("2B", 2), (None, 0)):  # fmt: skip
        assert byte_count("max_vram", text) == count


# --- Image to image ---


def test_every_kind_of_start_image(engine: ZImage, tmp_path: pathlib.Path) -> None:
    start = engine.generate("x", seed=1, **SMALL)
    start.save(tmp_path / "start.png")
    start.save(tmp_path / "start.webp", lossless=True)

    class Foreign:  # like a PIL picture
        __array_interface__ = start.pixels.__array_interface__

    kinds = [
        start, start.pixels, start.pixels[:, ::-1][:, ::-1], Foreign(),
        tmp_path / "start.png", str(tmp_path / "start.webp"), (tmp_path / "start.png").read_bytes(),
    ]  # fmt: skip
    drawn = [
        engine.generate("y", init_image=kind, strength=0.5, steps=2, seed=2, progress=False).pixels for kind in kinds
    ]
    assert drawn[0].shape == (32, 48, 3)  # the start image's own size
    for other in drawn[1:]:
        assert (other == drawn[0]).all()
    assert (drawn[0] != engine.generate("y", seed=2, **SMALL).pixels).any()


# --- Progress and stopping ---


def test_progress_grows_and_ends_with_done(engine: ZImage) -> None:
    seen: list[Progress] = []
    engine.generate_batch("x", count=2, on_progress=seen.append, width=128, height=128, steps=4, progress=False)
    last = seen[-1]
    assert (last.stage, last.step, last.step_count, last.image, last.image_count) == ("done", 8, 8, 2, 2)
    assert last.denoise_ms > 0
    assert [moment.step for moment in seen] == sorted(moment.step for moment in seen)
    assert all(moment.step <= (moment.step_count or 8) for moment in seen)


def test_what_on_progress_raises_stops_the_call_and_is_raised(engine: ZImage) -> None:
    class Enough(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step >= 1:
            raise Enough

    start = time.monotonic()
    with pytest.raises(Enough):
        engine.generate("x", **LONG, on_progress=stop)
    assert time.monotonic() - start < STOPPED_S

    def cancel(_: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        engine.generate("x", **LONG, on_progress=cancel)
    engine.generate("x", **SMALL)


def test_control_c_stops_within_a_step(tiny_model: pathlib.Path) -> None:
    check_ctrl_c(
        f"from diffusionz import ZImage; model = ZImage({str(tiny_model)!r}, device='cpu')",
        f"model.generate('x', **{LONG}, on_progress=say)",
        "model.generate('x', width=32, height=32, steps=1, progress=False)",
    )


def test_other_python_threads_run_while_it_draws(engine: ZImage) -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.005):
            ticks.append(time.monotonic())

    def stop_when_seen(progress: Progress) -> None:
        if len(ticks) > 5:
            raise Cancelled

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        with pytest.raises(Cancelled):  # and not at the end of a call that let nobody else run
            engine.generate("x", **LONG, on_progress=stop_when_seen)
    finally:
        done.set()
        thread.join()


def test_many_threads_on_one_model(engine: ZImage) -> None:
    """Each gets its own picture, or its own error."""
    expected = [engine.generate("x", seed=seed, **SMALL).pixels for seed in range(4)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        for _ in range(3):
            if (engine.generate("x", seed=seed, **SMALL).pixels != expected[seed]).any():
                wrong.append(f"picture {seed}")
            try:
                engine.generate("x", **(SMALL | {"width": 10001 + seed}))
            except ArgumentError as error:
                if str(10001 + seed) not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- Life ---


def test_repr_says_model_device_precision_memory(engine: ZImage) -> None:
    text = repr(engine)
    assert engine.model in text
    assert "cpu" in text
    assert "float32" in text
    assert "MiB" in text
    assert engine.memory["weights_bytes"] > 0


def test_contexts_of_one_model_share_its_weights(engine: ZImage, tiny_model: pathlib.Path) -> None:
    gc.collect()  # what others left unclosed goes now, not in between
    before = engine.memory["shared_by"]
    with ZImage(tiny_model, device="cpu") as other:
        assert engine.memory["shared_by"] == before + 1
        assert other.memory["weights_bytes"] == engine.memory["weights_bytes"]
    assert engine.memory["shared_by"] == before


def test_a_closed_model_says_so(tiny_model: pathlib.Path) -> None:
    with ZImage(tiny_model, device="cpu") as model:
        pass
    model.close()
    assert "closed" in repr(model)
    for call in (
        lambda: model.generate("x"),
        lambda: model.unload_lora(),
        lambda: model.load_lora("x"),
        lambda: model.memory,
    ):
        with pytest.raises(ArgumentError, match="closed"):
            call()


def test_closing_while_it_draws_lets_it_finish(tiny_model: pathlib.Path) -> None:
    model = ZImage(tiny_model, device="cpu")
    drawn: list[Image] = []
    drawing = threading.Event()

    def draw() -> None:
        size = {"width": 512, "height": 512, "steps": 8, "progress": False}
        drawn.append(model.generate("x", **size, on_progress=lambda now: now.step and drawing.set()))

    thread = threading.Thread(target=draw)
    thread.start()
    assert drawing.wait(120)
    model.close()
    thread.join()
    assert drawn[0].pixels.shape == (512, 512, 3)


def test_an_error_does_not_keep_the_model_alive(tiny_model: pathlib.Path) -> None:
    gc.disable()  # counting references must suffice
    try:
        model = ZImage(tiny_model, device="cpu")
        context = weakref.ref(model._context)
        with pytest.raises(ArgumentError):
            model.generate("x", width=17)
        del model
        assert context() is None
    finally:
        gc.enable()


def test_pixels_outlive_the_model(tiny_model: pathlib.Path) -> None:
    with ZImage(tiny_model, device="cpu") as model:
        image = model.generate("x", seed=1, **SMALL)
        pixels = image.pixels
        copy = pixels.copy()
    del image, model
    gc.collect()
    assert (pixels == copy).all()


def test_the_readme_runs(tmp_path: pathlib.Path) -> None:
    """Its first Python block, as it stands, in an empty folder."""
    readme = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text()
    code = readme.split("```python\n", 1)[1].split("```", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
