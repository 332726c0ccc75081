"""Previews: as many as asked for and when, of the right picture, ever closer to it, and the picture does not notice."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy
import pytest

from diffusionz import ArgumentError, Cancelled, Image, Preview, ZImage
from diffusionz.progress import read_progress, take_preview
from tests.python.interrupt import STOPPED_S

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def demo(demo_model: pathlib.Path) -> Iterator[ZImage]:
    with ZImage(demo_model, device="cpu") as model:
        yield model


def due(steps: int, count: int) -> list[int]:
    """The steps after which the header says that previews are made."""
    count = min(count, steps - 1)
    return [k * steps // (count + 1) for k in range(1, count + 1)]


def watch(model: ZImage, count: int, images: int = 1, **fields: Any) -> tuple[list[Preview], list[bytes]]:
    """(every preview, every picture) of a call, whose task is polled without pause."""
    from diffusionz._ffi import check, ffi, lib

    prompt = ffi.new("char[]", PROMPT.encode())
    requests, results = ffi.new("DiffusionZRequest[]", images), ffi.new("DiffusionZResult[]", images)
    for i in range(images):
        lib.diffusionz_request_init(ffi.addressof(requests[i]))
        requests[i].prompt, requests[i].seed, requests[i].format = prompt, i, lib.DIFFUSIONZ_FORMAT_RGB
        for name, value in ({"width": 64, "height": 32} | fields).items():
            setattr(requests[i], name, value)
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    check(lib.diffusionz_task_keep_previews(task, count))
    statuses: list[int] = []
    thread = threading.Thread(
        target=lambda: statuses.append(lib.diffusionz_generate_batch(model._context, requests, images, task, results))
    )
    thread.start()
    seen = []
    while True:
        over = not thread.is_alive()
        preview = take_preview(task, 0)
        if preview is not None:
            seen.append(preview)
        elif over:
            break
    thread.join()
    assert statuses == [lib.DIFFUSIONZ_OK]
    pictures = [bytes(ffi.buffer(result.image_data, result.image_len)) for result in results]
    for result in results:
        lib.diffusionz_free_result(ffi.addressof(result))
    return seen, pictures


def every_preview(
    model: ZImage, count: int, images: int = 1, **fields: Any
) -> tuple[dict[tuple[int, int], Preview], list[bytes]]:
    """({(image, preview): it} of each that is made, every picture). A poller that is kept waiting misses some; the same
    call makes the same ones, so it is made until each was seen."""
    found: dict[tuple[int, int], Preview] = {}
    for _ in range(30):
        seen, pictures = watch(model, count, images, **fields)
        found |= {(preview.image, preview.preview): preview for preview in seen}
        if len(found) == images * count:
            return dict(sorted(found.items())), pictures
    raise AssertionError(f"of {images} pictures with {count} previews each there were {sorted(found)}")


# --- When, and of what ---


@pytest.mark.parametrize(
    ("steps", "count"),
    [(1, 3), (2, 1), (2, 5), (3, 1), (4, 3), (8, 1), (8, 2), (8, 3), (8, 7), (8, 8), (8, 999), (9, 4), (50, 3)],
)
def test_previews_come_when_the_header_says(engine: ZImage, steps: int, count: int) -> None:
    expected = due(steps, count)
    assert expected == sorted(set(expected))
    assert all(0 < step < steps for step in expected)
    seen, _ = watch(engine, count, num_steps=steps)
    for preview in seen:  # a poller that was kept waiting misses some, but never the last
        assert (preview.image, preview.preview_count, preview.step_count) == (0, len(expected), steps)
        assert preview.step == expected[preview.preview]
        assert preview.picture.pixels.shape == (16, 32, 3)
    assert [preview.preview for preview in seen] == sorted({preview.preview for preview in seen})
    assert [preview.step for preview in seen][-1:] == expected[-1:]


def test_spread_evenly() -> None:
    assert [due(8, count) for count in range(8)] == [
        [], [4], [2, 5], [2, 4, 6], [1, 3, 4, 6], [1, 2, 4, 5, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]
    ]  # fmt: skip


def test_image_to_image_counts_the_steps_that_run(engine: ZImage) -> None:
    from diffusionz._ffi import ffi

    start = ffi.new("uint8_t[]", 64 * 32 * 3)
    seen, _ = watch(engine, 2, num_steps=8, init_image=start, strength=0.5)
    assert (seen[-1].step, seen[-1].step_count, seen[-1].preview_count) == (due(4, 2)[-1], 4, 2)


def test_every_picture_of_a_batch_has_its_own(demo: ZImage) -> None:
    seen, together = every_preview(demo, 2, images=3, num_steps=4, width=128, height=128)
    assert list(seen) == [(image, preview) for image in range(3) for preview in range(2)]
    for preview in seen.values():
        assert preview.picture.seed == preview.image
        assert preview.step == due(4, 2)[preview.preview]
    alone = [watch(demo, 0, num_steps=4, width=128, height=128, seed=i) for i in range(3)]
    assert [picture for _, (picture,) in alone] == together
    assert all(not previews for previews, _ in alone)


def test_several_engines_share_the_task(tiny_model: pathlib.Path) -> None:
    with ZImage(tiny_model, device=["cpu", "cpu"]) as two, ZImage(tiny_model, device="cpu") as one:
        seen, pictures = watch(two, 3, images=6, num_steps=8)
        assert pictures == watch(one, 0, images=6, num_steps=8)[1]
    assert seen
    for preview in seen:
        assert 0 <= preview.image < 6
        assert preview.step == due(8, 3)[preview.preview]


# --- What they look like, and what they change ---


def psnr(a: Any, b: Any) -> float:
    return float(-10 * numpy.log10(((a.astype(float) - b) ** 2).mean() / 255**2))


def test_previews_come_ever_closer_to_the_picture(demo: ZImage) -> None:
    """Against the picture at their own size, after all seven of eight steps: a way that is followed backwards, or to
    another sigma, would show. Guidance may change the scene after the first steps."""
    for seed, guidance in ((0, 0.0), (1, 0.0), (2, 3.0)):
        seen, (picture,) = every_preview(
            demo, 7, num_steps=8, width=256, height=256, seed=seed, guidance_scale=guidance
        )
        whole = numpy.frombuffer(picture, numpy.uint8).reshape(128, 2, 128, 2, 3).mean((1, 3))
        likeness = [psnr(preview.picture.pixels, whole) for preview in seen.values()]
        print([f"{value:.1f}" for value in likeness])
        assert likeness[-1] > likeness[0] + 3
        assert likeness[-1] > 20
        assert all(b > a - 0.5 for a, b in itertools.pairwise(likeness[2:] if guidance else likeness))


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "cfg_normalization": 1.0}, {"init_image": True}], ids=str)
def test_the_picture_is_the_same_with_previews(demo: ZImage, options: dict[str, Any]) -> None:
    if "init_image" in options:
        options = {"init_image": numpy.full((128, 128, 3), 90, numpy.uint8)}
    size = {"width": 128, "height": 128, "steps": 6, "seed": 3, "progress": False}
    seen: list[Preview] = []
    plain = demo.generate(PROMPT, **size, **options)
    watched = demo.generate(PROMPT, **size, **options, previews=5, on_preview=seen.append)
    assert seen
    assert (watched.pixels == plain.pixels).all()
    assert watched.png == plain.png


@pytest.mark.parametrize(("width", "height"), [(16, 16), (48, 16), (80, 112)])
def test_every_size_has_previews(engine: ZImage, width: int, height: int) -> None:
    """Also those whose half is of an odd number of latents."""
    seen, _ = watch(engine, 1, num_steps=2, width=width, height=height)
    assert seen[0].picture.pixels.shape == (height // 2, width // 2, 3)


# --- Python's side ---


def test_on_preview_gets_pictures(demo: ZImage) -> None:
    seen: list[Preview] = []
    image = demo.generate(PROMPT, width=64, height=48, steps=4, seed=9, previews=2, on_preview=seen.append)
    last = seen[-1]
    assert last[:-1] == (0, 1, 2, 2, 4)
    assert isinstance(last.picture, Image)
    assert (last.picture.width, last.picture.height, last.picture.seed) == (32, 24, image.seed)
    assert last.picture.webp[8:12] == b"WEBP"
    assert last.picture.png.startswith(b"\x89PNG")
    assert (last.picture.timings, last.picture.metadata) == ({}, {})
    copy = last.picture.pixels.copy()
    demo.generate(PROMPT, width=64, height=48, steps=1, seed=9)
    assert (last.picture.pixels == copy).all()


def test_a_batch_in_python(engine: ZImage) -> None:
    seen: list[Preview] = []
    engine.generate_batch("x", count=2, seed=5, width=32, height=32, steps=4, previews=1, on_preview=seen.append)
    assert (seen[-1].image, seen[-1].picture.seed) == (1, 6)


@pytest.mark.parametrize("previews", [-1, 1000, 2**40])
def test_wrong_counts(engine: ZImage, previews: int) -> None:
    with pytest.raises(ArgumentError, match=f"previews is {previews}"):
        engine.generate("x", width=32, height=32, steps=1, previews=previews, on_preview=print)


def test_previews_that_nobody_sees(engine: ZImage) -> None:
    with pytest.raises(ArgumentError, match="on_preview"):
        engine.generate("x", width=32, height=32, steps=1, previews=1)
    engine.generate("x", width=32, height=32, steps=1, on_preview=print)  # none were asked for


def test_what_on_preview_raises_stops_the_call_and_is_raised(engine: ZImage) -> None:
    def stop(_: Preview) -> None:
        raise Cancelled

    start = time.monotonic()
    with pytest.raises(Cancelled):
        engine.generate("x", width=512, height=512, steps=1000, previews=900, on_preview=stop, progress=False)
    assert time.monotonic() - start < STOPPED_S  # all of it takes a minute


def test_a_cancelled_call_gives_none_any_more(engine: ZImage) -> None:
    from diffusionz._ffi import ffi, lib

    prompt = ffi.new("char[]", b"x")
    request, result = ffi.new("DiffusionZRequest *"), ffi.new("DiffusionZResult *")
    lib.diffusionz_request_init(request)
    request.prompt, request.width, request.height, request.num_steps = prompt, 512, 512, 1000
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    lib.diffusionz_task_keep_previews(task, 999)
    thread = threading.Thread(target=lambda: lib.diffusionz_generate_batch(engine._context, request, 1, task, result))
    thread.start()
    while take_preview(task, 0) is None:
        time.sleep(0.001)
    lib.diffusionz_task_cancel(task)
    thread.join()
    assert result.error_code == lib.DIFFUSIONZ_E_CANCELLED
    lib.diffusionz_free_result(result)
    done = read_progress(task).step
    assert 1 <= done < 1000
    last = take_preview(task, 0)  # that was made while it was cancelled
    assert last is None or last.step <= done
    assert take_preview(task, 0) is None


def test_a_preview_that_does_not_fit_is_left_out(tiny_model: pathlib.Path) -> None:
    """In a process whose address space leaves room for the steps, but not for decoding: all steps are done, without a
    preview, and what fails is the picture's own decoding. How much room that is depends on the machine, so several are
    tried; in none of them is it anything but out of memory."""
    code = """
import resource, sys
from diffusionz import OutOfMemoryError, ZImage
model = ZImage(sys.argv[1], device="cpu", threads=1)
model.generate("x", width=32, height=32, steps=2, previews=1, on_preview=lambda _: None, progress=False)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]) * 2**20, hard))
steps = []
try:
    model.generate("x", width=1024, height=1024, steps=3, previews=2, on_preview=lambda p: print("preview", p.step),
                   on_progress=lambda now: steps.append(now.step), progress=False)
except OutOfMemoryError:
    print("out of memory")
print(steps[-1] if steps else 0)
"""
    # Threads with arenas of their own would take some of that room, or leave some.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    seen = []
    for room_mib in (60, 80, 70, 90, 100, 110):
        command = [sys.executable, "-c", code, str(tiny_model), str(room_mib)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.splitlines())
        if seen[-1] == ["out of memory", "3"]:
            return
    pytest.fail(f"no room let the steps be done without a preview: {seen}")
