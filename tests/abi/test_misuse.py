"""Every wrong use of the C ABI gets its documented status, and a message that names what was wrong. Nothing crashes.

The calls are made through the binding's raw layer, which adds nothing to them.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from diffusionz._ffi import ffi, lib, text
from tests.abi.damage import BROKEN_JSON, DAMAGES, edit, header_of, link_copy, replace, weights_of, with_header

NULL = ffi.NULL
E = {name.removeprefix("DIFFUSIONZ_E_"): getattr(lib, name) for name in dir(lib) if name.startswith("DIFFUSIONZ_E_")}


def last_error() -> str:
    return text(lib.diffusionz_last_error())


@pytest.fixture(scope="module")
def ctx(tiny_model: pathlib.Path) -> Iterator[Any]:
    context = lib.diffusionz_init(os.fsencode(tiny_model), -1)
    assert context, last_error()
    yield context
    lib.diffusionz_free(context)


def draw(ctx: Any, **fields: Any) -> tuple[int, str]:
    """(status, message) of a small picture with some fields changed, by both entry points where both have them."""
    keep = []
    request = ffi.new("DiffusionZRequest *")
    lib.diffusionz_request_init(request)
    params = ffi.new("DiffusionZParams *")
    common = {"prompt": b"x", "width": 16, "height": 16, "num_steps": 1}
    for name, value in (common | fields).items():
        if isinstance(value, bytes):
            value = ffi.new("char[]", value)
            keep.append(value)
        setattr(request, name, value)
        if hasattr(params, name):
            setattr(params, name, value)
    result = ffi.new("DiffusionZResult *")
    status = lib.diffusionz_generate_batch(ctx, request, 1, NULL, result)
    message = text(result.error_msg)
    assert (result.error_code, result.image_data == NULL) == (status, status != 0)
    assert message == last_error()
    lib.diffusionz_free_result(result)
    if all(hasattr(params, name) for name in fields):
        result[0] = lib.diffusionz_generate(ctx, params)
        assert (result.error_code, text(result.error_msg)) == (status, message)
        lib.diffusionz_free_result(result)
    return status, message


def test_the_right_use_draws(ctx: Any) -> None:
    assert draw(ctx) == (lib.DIFFUSIONZ_OK, "")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": NULL}, "prompt"),
        ({"prompt": b"\xff\xfe"}, "UTF-8"),
        ({"prompt": b"\xed\xa0\x80"}, "UTF-8"),  # a surrogate
        ({"prompt": b"\xc0\x80"}, "UTF-8"),  # an overlong NUL
        ({"prompt": b"cut \xe2\x82"}, "UTF-8"),
        ({"negative_prompt": b"\xff", "guidance_scale": 1.0}, "UTF-8"),
        ({"width": 0}, "0"),
        ({"width": 17}, "17"),
        ({"width": -16}, "-16"),
        ({"width": 1_000_000_000}, "1000000000"),
        ({"width": 2**31 - 1}, "2147483647"),
        ({"width": -(2**31)}, "-2147483648"),
        ({"height": 0}, "0"),
        ({"height": 17}, "17"),
        ({"height": 1_000_000_000}, "1000000000"),
        ({"num_steps": 0}, "0"),
        ({"num_steps": -1}, "-1"),
        ({"num_steps": 1001}, "1001"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "-1"),
        ({"guidance_scale": 1000.5}, "from 0 to 1000"),
        ({"cfg_normalization": math.nan}, "cfg_normalization"),
        ({"cfg_normalization": -1.0}, "cfg_normalization"),
        ({"cfg_truncation": math.nan}, "cfg_truncation"),
        ({"lora_path": b"/x.safetensors", "lora_weight": math.nan}, "lora_weight"),
        ({"lora_path": b"/x.safetensors", "lora_weight": math.inf}, "lora_weight"),
        ({"init_image": ffi.new("uint8_t[]", 16 * 16 * 3), "strength": 0.0}, "strength"),
        ({"init_image": ffi.new("uint8_t[]", 16 * 16 * 3), "strength": 1.5}, "strength"),
        ({"init_image": ffi.new("uint8_t[]", 16 * 16 * 3), "strength": math.nan}, "strength"),
        ({"format": 4}, "4"),
        ({"format": -1}, "-1"),
        ({"quality": 101}, "101"),
        ({"quality": -1}, "-1"),
        ({"struct_size": 0}, "struct_size"),
        ({"struct_size": 4}, "struct_size"),
        ({"struct_size": 1_000_000}, "struct_size"),
    ],
    ids=str,
)
def test_a_bad_field_is_an_argument_error_that_names_it(ctx: Any, fields: dict[str, Any], named: str) -> None:
    status, message = draw(ctx, **fields)
    assert status == E["ARGUMENT"], message
    assert named in message


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_every_seed_draws(ctx: Any, seed: int) -> None:
    assert draw(ctx, seed=seed) == (lib.DIFFUSIONZ_OK, "")


@pytest.mark.parametrize("strength", [1e-3, 1e-7, 1e-30, 1e-45])
def test_every_strength_draws(ctx: Any, strength: float) -> None:
    """However little it is, one step runs."""
    image = ffi.new("uint8_t[]", 16 * 16 * 3)
    assert draw(ctx, init_image=image, strength=strength, num_steps=1000) == (lib.DIFFUSIONZ_OK, "")


@pytest.mark.parametrize("prompt", [b"", b" ", b"\n", b"a" * 100_000, "日本語 🎨".encode()], ids=len)
def test_every_text_draws(ctx: Any, prompt: bytes) -> None:
    assert draw(ctx, prompt=prompt) == (lib.DIFFUSIONZ_OK, "")


def test_null_where_something_is_needed(ctx: Any) -> None:
    request = ffi.new("DiffusionZRequest *")
    lib.diffusionz_request_init(request)
    result, out, context = ffi.new("DiffusionZResult *"), ffi.new("char **"), ffi.new("DiffusionZContext **")
    options = ffi.new("DiffusionZInitOptions *")
    lib.diffusionz_init_options_init(options)
    byte = ffi.new("uint8_t[]", 3)
    calls: dict[str, Callable[[], int]] = {
        "device_info": lambda: lib.diffusionz_device_info(-1, NULL),
        "init path": lambda: lib.diffusionz_init_with_options(NULL, options, context),
        "init options": lambda: lib.diffusionz_init_with_options(b"x", NULL, context),
        "init out": lambda: lib.diffusionz_init_with_options(b"x", options, NULL),
        "memory ctx": lambda: lib.diffusionz_memory_info(NULL, ffi.new("DiffusionZMemoryInfo *", {"struct_size": 24})),
        "memory info": lambda: lib.diffusionz_memory_info(ctx, NULL),
        "batch ctx": lambda: lib.diffusionz_generate_batch(NULL, request, 1, NULL, result),
        "batch requests": lambda: lib.diffusionz_generate_batch(ctx, NULL, 1, NULL, result),
        "batch results": lambda: lib.diffusionz_generate_batch(ctx, request, 1, NULL, NULL),
        "batch count 0": lambda: lib.diffusionz_generate_batch(ctx, request, 0, NULL, result),
        "batch count -1": lambda: lib.diffusionz_generate_batch(ctx, request, -1, NULL, result),
        "batch count 1025": lambda: lib.diffusionz_generate_batch(ctx, request, 1025, NULL, result),
        "progress task": lambda: lib.diffusionz_task_progress(NULL, ffi.new("DiffusionZProgress *")),
        "progress": lambda: lib.diffusionz_task_progress(lib.diffusionz_task_new(), NULL),
        "keep_previews task": lambda: lib.diffusionz_task_keep_previews(NULL, 1),
        "take_preview task": lambda: lib.diffusionz_task_take_preview(
            NULL, ffi.new("DiffusionZPreview *", {"struct_size": ffi.sizeof("DiffusionZPreview")})
        ),
        "take_preview": lambda: lib.diffusionz_task_take_preview(lib.diffusionz_task_new(), NULL),
        "load_lora ctx": lambda: lib.diffusionz_load_lora(NULL, b"x", 1),
        "load_lora path": lambda: lib.diffusionz_load_lora(ctx, NULL, 1),
        "unload_lora": lambda: lib.diffusionz_unload_lora(NULL),
        "encode rgb": lambda: lib.diffusionz_image_encode(NULL, 1, 1, 0, 90, NULL, result),
        "encode out": lambda: lib.diffusionz_image_encode(byte, 1, 1, 0, 90, NULL, NULL),
        "encode width 0": lambda: lib.diffusionz_image_encode(byte, 0, 1, 0, 90, NULL, result),
        "encode height -1": lambda: lib.diffusionz_image_encode(byte, 1, -1, 0, 90, NULL, result),
        "encode 1e9": lambda: lib.diffusionz_image_encode(byte, 10**9, 10**9, 0, 90, NULL, result),
        "encode format": lambda: lib.diffusionz_image_encode(byte, 1, 1, 9, 90, NULL, result),
        "encode quality": lambda: lib.diffusionz_image_encode(byte, 1, 1, 0, 101, NULL, result),
        "decode data": lambda: lib.diffusionz_image_decode(NULL, 0, result),
        "decode out": lambda: lib.diffusionz_image_decode(byte, 3, NULL),
        "decode size": lambda: lib.diffusionz_image_decode(byte, -1, result),
        "metadata data": lambda: lib.diffusionz_image_metadata(NULL, 0, out),
        "metadata out": lambda: lib.diffusionz_image_metadata(byte, 3, NULL),
        "request_metadata ctx": lambda: lib.diffusionz_request_metadata(NULL, request, out),
        "request_metadata request": lambda: lib.diffusionz_request_metadata(ctx, NULL, out),
        "request_metadata out": lambda: lib.diffusionz_request_metadata(ctx, request, NULL),
    }
    for name, call in calls.items():
        assert call() == E["ARGUMENT"], name
        assert last_error(), name
    assert lib.diffusionz_init(NULL, -1) == NULL
    assert last_error()
    failed = lib.diffusionz_generate(ctx, NULL)
    assert failed.error_code == E["ARGUMENT"]
    lib.diffusionz_free_result(ffi.addressof(failed))
    assert lib.diffusionz_model_info(NULL) == NULL


def test_null_is_fine_where_the_header_says_so() -> None:
    lib.diffusionz_free(NULL)
    lib.diffusionz_free_result(NULL)
    lib.diffusionz_free_string(NULL)
    lib.diffusionz_free_preview(NULL)
    lib.diffusionz_task_free(NULL)
    lib.diffusionz_task_cancel(NULL)
    lib.diffusionz_init_options_init(NULL)
    lib.diffusionz_request_init(NULL)
    result = ffi.new("DiffusionZResult *")
    lib.diffusionz_free_result(result)
    lib.diffusionz_free_result(result)


def test_last_error_is_of_the_last_call_of_this_thread(ctx: Any) -> None:
    draw(ctx, width=17)
    assert "17" in last_error()
    elsewhere: list[str] = []
    thread = threading.Thread(target=lambda: elsewhere.append(last_error()))
    thread.start()
    thread.join()
    assert elsewhere == [""]
    assert draw(ctx) == (lib.DIFFUSIONZ_OK, "")
    assert last_error() == ""


def test_a_batch_with_one_bad_request_draws_none(ctx: Any) -> None:
    prompt = ffi.new("char[]", b"x")
    requests, results = ffi.new("DiffusionZRequest[3]"), ffi.new("DiffusionZResult[3]")
    for i in range(3):
        lib.diffusionz_request_init(ffi.addressof(requests[i]))
        requests[i].prompt, requests[i].width, requests[i].height, requests[i].num_steps = prompt, 16, 16, 1
    requests[2].width = 17
    assert lib.diffusionz_generate_batch(ctx, requests, 3, NULL, results) == E["ARGUMENT"]
    for i in range(3):
        assert results[i].error_code == E["ARGUMENT"]
        assert results[i].image_data == NULL
        assert "17" in text(results[i].error_msg)
        lib.diffusionz_free_result(ffi.addressof(results[i]))


def test_a_prompt_that_no_picture_has_room_for_is_refused_before_anything_is_drawn(ctx: Any) -> None:
    short, long = ffi.new("char[]", b"x"), ffi.new("char[]", b"x" * (5 << 20))
    requests, results = ffi.new("DiffusionZRequest[2]"), ffi.new("DiffusionZResult[2]")
    for request, prompt in zip(requests, (short, long), strict=True):
        lib.diffusionz_request_init(ffi.addressof(request))
        request.prompt, request.width, request.height, request.num_steps = prompt, 16, 16, 1
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    assert lib.diffusionz_generate_batch(ctx, requests, 2, task, results) == E["ARGUMENT"]
    for result in results:
        assert "4194304" in text(result.error_msg)
        lib.diffusionz_free_result(ffi.addressof(result))
    requests[1].embed_metadata = 0
    assert lib.diffusionz_generate_batch(ctx, requests, 2, task, results) == lib.DIFFUSIONZ_OK  # not used up
    for result in results:
        lib.diffusionz_free_result(ffi.addressof(result))


def test_a_batch_is_encoded_as_its_pictures_alone_are(ctx: Any) -> None:
    """More pictures than are encoded at once, in every format."""
    prompt = ffi.new("char[]", b"x")
    count = 20
    requests, results = ffi.new("DiffusionZRequest[]", count), ffi.new("DiffusionZResult[]", count)
    for i in range(count):
        lib.diffusionz_request_init(ffi.addressof(requests[i]))
        requests[i].prompt, requests[i].width, requests[i].height, requests[i].num_steps = prompt, 32, 16, 1
        requests[i].seed, requests[i].format = i, i % 4
    assert lib.diffusionz_generate_batch(ctx, requests, count, NULL, results) == lib.DIFFUSIONZ_OK
    one = ffi.new("DiffusionZResult *")
    for i in range(count):
        assert lib.diffusionz_generate_batch(ctx, ffi.addressof(requests[i]), 1, NULL, one) == lib.DIFFUSIONZ_OK
        alone, together = (bytes(ffi.buffer(r.image_data, r.image_len)) for r in (one[0], results[i]))
        assert alone == together
        lib.diffusionz_free_result(one)
        lib.diffusionz_free_result(ffi.addressof(results[i]))


def test_a_task_serves_one_call(ctx: Any) -> None:
    prompt = ffi.new("char[]", b"x")
    request, result = ffi.new("DiffusionZRequest *"), ffi.new("DiffusionZResult *")
    lib.diffusionz_request_init(request)
    request.prompt, request.width, request.height, request.num_steps = prompt, 16, 16, 1
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    assert lib.diffusionz_generate_batch(ctx, request, 1, task, result) == lib.DIFFUSIONZ_OK
    lib.diffusionz_free_result(result)
    progress = ffi.new("DiffusionZProgress *", {"struct_size": ffi.sizeof("DiffusionZProgress")})
    assert lib.diffusionz_task_progress(task, progress) == lib.DIFFUSIONZ_OK
    assert (progress.stage, progress.step, progress.step_count) == (lib.DIFFUSIONZ_STAGE_DONE, 1, 1)
    assert (progress.image, progress.image_count) == (1, 1)
    assert lib.diffusionz_generate_batch(ctx, request, 1, task, result) == E["ARGUMENT"]
    lib.diffusionz_free_result(result)
    lib.diffusionz_task_cancel(task)  # quiet: its call is over
    assert lib.diffusionz_task_keep_previews(task, 1) == E["ARGUMENT"]
    assert "served a call" in last_error()


@pytest.mark.parametrize("count", [-1, 1000, 2**31 - 1, -(2**31)])
def test_previews_that_cannot_be_asked_for(count: int) -> None:
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    assert lib.diffusionz_task_keep_previews(task, count) == E["ARGUMENT"]
    assert str(count) in last_error()
    assert lib.diffusionz_task_keep_previews(task, 999) == lib.DIFFUSIONZ_OK
    assert lib.diffusionz_task_keep_previews(task, 0) == lib.DIFFUSIONZ_OK


def test_a_task_without_a_preview_gives_none() -> None:
    """All fields are 0 then, also of a struct that was not empty."""
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    lib.diffusionz_task_keep_previews(task, 2)
    preview = ffi.new("DiffusionZPreview *", {"struct_size": ffi.sizeof("DiffusionZPreview"), "step": 7, "width": 16})
    assert lib.diffusionz_task_take_preview(task, preview) == lib.DIFFUSIONZ_OK
    assert not any(bytes(ffi.buffer(preview))[4:])
    for _ in range(2):
        lib.diffusionz_free_preview(preview)
    assert preview.struct_size == ffi.sizeof("DiffusionZPreview")


def test_a_task_cancelled_before_its_call_ends_that_call(ctx: Any) -> None:
    prompt = ffi.new("char[]", b"x")
    request, result = ffi.new("DiffusionZRequest *"), ffi.new("DiffusionZResult *")
    lib.diffusionz_request_init(request)
    request.prompt, request.width, request.height, request.num_steps = prompt, 256, 256, 1000
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    lib.diffusionz_task_cancel(task)
    assert lib.diffusionz_generate_batch(ctx, request, 1, task, result) == E["CANCELLED"]
    lib.diffusionz_free_result(result)
    assert draw(ctx) == (lib.DIFFUSIONZ_OK, "")


def test_a_context_freed_while_a_call_encodes_is_there_until_the_call_is_over(tiny_model: pathlib.Path) -> None:
    """The last picture is drawn, nothing runs or queues on the device, but the call is not done with the context."""
    ctx = lib.diffusionz_init(os.fsencode(tiny_model), -1)
    prompt = ffi.new("char[]", b"x")
    request, result = ffi.new("DiffusionZRequest *"), ffi.new("DiffusionZResult *")
    lib.diffusionz_request_init(request)
    request.prompt, request.width, request.height, request.num_steps = prompt, 512, 512, 1
    request.format = lib.DIFFUSIONZ_FORMAT_WEBP_LOSSLESS  # a tenth of a second
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    progress = ffi.new("DiffusionZProgress *", {"struct_size": ffi.sizeof("DiffusionZProgress")})
    call = threading.Thread(target=lib.diffusionz_generate_batch, args=(ctx, request, 1, task, result))
    call.start()
    while progress.image == 0 and progress.stage != lib.DIFFUSIONZ_STAGE_DONE:
        time.sleep(0.001)
        lib.diffusionz_task_progress(task, progress)
    lib.diffusionz_free(ctx)  # on a busy machine the call may be over by now
    lib.diffusionz_task_progress(task, progress)
    call.join()
    assert progress.stage == lib.DIFFUSIONZ_STAGE_DONE
    assert result.error_code == lib.DIFFUSIONZ_OK
    lib.diffusionz_free_result(result)


def test_devices_that_are_not_there(tiny_model: pathlib.Path) -> None:
    for device_id in (-2, 999, 2**31 - 1, -(2**31)):
        assert lib.diffusionz_init(os.fsencode(tiny_model), device_id) == NULL
        assert str(device_id) in last_error()
        info = ffi.new("DiffusionZDeviceInfo *", {"struct_size": ffi.sizeof("DiffusionZDeviceInfo")})
        assert lib.diffusionz_device_info(device_id, info) == E["DEVICE"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("struct_size", 0),
        ("struct_size", 999),
        ("precision", 4),  # Chronos-2's
        ("precision", 5),
        ("precision", 6),
        ("precision", -1),
        ("device_count", -1),
        ("device_count", 65),
        ("device_count", 1),  # device_ids is NULL
        ("max_vram_bytes", -1),
        ("num_threads", -1),
        ("cuda_graphs", 2),
    ],
)
def test_bad_options(tiny_model: pathlib.Path, field: str, value: int) -> None:
    options, context = ffi.new("DiffusionZInitOptions *"), ffi.new("DiffusionZContext **")
    lib.diffusionz_init_options_init(options)
    setattr(options, field, value)
    assert lib.diffusionz_init_with_options(os.fsencode(tiny_model), options, context) == E["ARGUMENT"]
    assert context[0] == NULL
    assert field in last_error()
    assert str(value) in last_error()


def test_a_precision_that_the_device_has_not(tiny_model: pathlib.Path) -> None:
    options, context = ffi.new("DiffusionZInitOptions *"), ffi.new("DiffusionZContext **")
    lib.diffusionz_init_options_init(options)
    options.precision = lib.DIFFUSIONZ_PRECISION_FP8
    assert lib.diffusionz_init_with_options(os.fsencode(tiny_model), options, context) == E["DEVICE"]
    assert context[0] == NULL
    for named in ("FP8 (3)", "8.9", "cpu"):
        assert named in last_error()


def test_devices_of_two_kinds_or_not_there_are_refused(tiny_model: pathlib.Path) -> None:
    options, context = ffi.new("DiffusionZInitOptions *"), ffi.new("DiffusionZContext **")
    lib.diffusionz_init_options_init(options)
    device_ids = ffi.new("int32_t[]", [-1, 999])
    options.device_ids, options.device_count = device_ids, 2
    assert lib.diffusionz_init_with_options(os.fsencode(tiny_model), options, context) == E["DEVICE"]
    assert "999" in last_error()
    if lib.diffusionz_device_count() > 0:
        device_ids[1] = 0
        assert lib.diffusionz_init_with_options(os.fsencode(tiny_model), options, context) == E["ARGUMENT"]
        assert "device_ids has -1 and 0" in last_error()


def test_a_program_built_with_shorter_structs_goes_on_working(
    tiny_model: pathlib.Path, compile_c: Callable[..., pathlib.Path]
) -> None:
    program = compile_c(pathlib.Path(__file__).with_name("old_caller.c"))
    done = subprocess.run([program, tiny_model], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_defaults_are_written_into_as_much_as_there_is() -> None:
    size = ffi.sizeof("DiffusionZInitOptions")
    for told, written in ((0, 0), (19, 0), (20, 20), (size, size), (size + 100, size)):
        memory = ffi.new("uint8_t[]", [0xA5] * (size + 100))
        lib.diffusionz_init_options_init_sized(ffi.cast("DiffusionZInitOptions *", memory), told)
        assert set(bytes(memory)[written:]) == {0xA5}
        if written:
            assert ffi.cast("DiffusionZInitOptions *", memory).struct_size == written


@pytest.mark.parametrize(
    "kind", ["DiffusionZDeviceInfo", "DiffusionZMemoryInfo", "DiffusionZProgress", "DiffusionZPreview"]
)
def test_bad_struct_size_of_an_output(ctx: Any, kind: str) -> None:
    task = ffi.gc(lib.diffusionz_task_new(), lib.diffusionz_task_free)
    for size in (0, ffi.sizeof(kind) - 1, ffi.sizeof(kind) + 8):
        out = ffi.new(kind + " *", {"struct_size": size})
        status = {
            "DiffusionZDeviceInfo": lambda out=out: lib.diffusionz_device_info(-1, out),
            "DiffusionZMemoryInfo": lambda out=out: lib.diffusionz_memory_info(ctx, out),
            "DiffusionZProgress": lambda out=out: lib.diffusionz_task_progress(task, out),
            "DiffusionZPreview": lambda out=out: lib.diffusionz_task_take_preview(task, out),
        }[kind]()
        assert status == E["ARGUMENT"]
        assert "struct_size" in last_error()


def test_status_names() -> None:
    for name, value in E.items():
        assert text(lib.diffusionz_status_name(value)) == f"DIFFUSIONZ_E_{name}"
    assert text(lib.diffusionz_status_name(0)) == "DIFFUSIONZ_OK"
    for value in (-1, len(E) + 1, 2**31 - 1, -(2**31)):
        assert text(lib.diffusionz_status_name(value)) == "unknown status"


def encode(metadata: bytes, format: int) -> tuple[int, str]:
    """(status, the metadata that the picture gives back or the message) of a picture with that metadata."""
    result, out = ffi.new("DiffusionZResult *"), ffi.new("char **")
    status = lib.diffusionz_image_encode(ffi.new("uint8_t[]", 3), 1, 1, format, 90, metadata, result)
    if status != lib.DIFFUSIONZ_OK:
        message = text(result.error_msg)
        lib.diffusionz_free_result(result)
        return status, message
    assert lib.diffusionz_image_metadata(result.image_data, result.image_len, out) == lib.DIFFUSIONZ_OK
    read = text(out[0])
    lib.diffusionz_free_string(out[0])
    lib.diffusionz_free_result(result)
    return status, read


@pytest.mark.parametrize("format", [lib.DIFFUSIONZ_FORMAT_PNG, lib.DIFFUSIONZ_FORMAT_WEBP])
def test_metadata_comes_back_or_is_refused(format: int) -> None:
    fine = b'{"prompt": "x", "steps": ' + b"[" * 200 + b"]" * 200 + b', "brackets": "' + b"[" * 1000 + b'\\""}'
    assert encode(fine, format) == (lib.DIFFUSIONZ_OK, fine.decode())
    deep = b'{"prompt": "x", "steps": ' + b"[" * 10**6 + b"]" * 10**6 + b"}"
    status, message = encode(deep, format)
    assert status == E["ARGUMENT"]
    assert "deeper than 256" in message
    status, message = encode(b'\xef\xbb\xbf{"prompt": "x"}', format)  # reading would not know it for an object
    assert status == E["ARGUMENT"]
    assert "not a JSON object" in message


# --- Damaged models ---


@pytest.fixture
def broken(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the model whose files a test replaces."""
    return link_copy(tiny_model, tmp_path)


def load_fails(path: pathlib.Path, *named: str) -> None:
    """Loading is an E_MODEL whose message holds each of `named`."""
    options, context = ffi.new("DiffusionZInitOptions *"), ffi.new("DiffusionZContext **")
    lib.diffusionz_init_options_init(options)
    status = lib.diffusionz_init_with_options(os.fsencode(path), options, context)
    if status == lib.DIFFUSIONZ_OK:
        lib.diffusionz_free(context[0])
    assert status == E["MODEL"], f"{status}: {last_error()}"
    for part in named:
        assert part in last_error()


def test_what_is_no_model(tmp_path: pathlib.Path) -> None:
    load_fails(tmp_path / "nowhere", "nowhere")
    load_fails(tmp_path)
    (tmp_path / "file").write_text("not a model")
    load_fails(tmp_path / "file")
    load_fails(pathlib.Path("/dev/null"))


@pytest.mark.parametrize("folder", ["transformer", "text_encoder", "vae", "tokenizer"])
def test_a_missing_component(broken: pathlib.Path, folder: str) -> None:
    for path in (broken / folder).iterdir():
        path.unlink()
    load_fails(broken, folder)


@pytest.mark.parametrize("name", ["transformer", "tokenizer", "model_index.json"])
def test_a_link_to_itself(broken: pathlib.Path, name: str) -> None:
    (broken / name).rename(broken / "elsewhere")
    (broken / name).symlink_to(name)
    load_fails(broken, name)


@pytest.mark.parametrize("folder", ["transformer", "text_encoder", "vae"])
def test_missing_weights(broken: pathlib.Path, folder: str) -> None:
    weights_of(broken / folder).unlink()
    load_fails(broken, folder)


@pytest.mark.parametrize(
    "name", ["transformer/config.json", "text_encoder/config.json", "vae/config.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("data", [*BROKEN_JSON, b"{}"], ids=repr)
def test_damaged_json(broken: pathlib.Path, name: str, data: bytes) -> None:
    replace(broken / name, data)
    # An empty config means the defaults, which another file contradicts.
    load_fails(broken, *([] if data == b"{}" else [name.split("/")[0]]))


@pytest.mark.parametrize(("name", "key"), [("transformer/config.json", "dim"), ("vae/config.json", "_class_name")])
def test_json_of_a_million_levels(broken: pathlib.Path, name: str, key: str) -> None:
    replace(broken / name, f'{{"{key}": {"[" * 10**6}{"]" * 10**6}}}'.encode())
    load_fails(broken, name, "deeper than 256")


@pytest.mark.parametrize("damage", DAMAGES)
def test_lying_weights(broken: pathlib.Path, damage: str) -> None:
    path = weights_of(broken / "vae")
    replace(path, DAMAGES[damage](path.read_bytes()))
    load_fails(broken, "vae")


@pytest.mark.parametrize("folder", ["transformer", "text_encoder", "vae"])
def test_a_missing_tensor_is_named(broken: pathlib.Path, folder: str) -> None:
    path = weights_of(broken / folder)
    header, tensors = header_of(path.read_bytes())
    name = next(name for name in sorted(header) if "norm" in name and "encoder" not in name.split(".")[0])
    del header[name]
    replace(path, with_header(header, tensors))
    load_fails(broken, name.removeprefix("model."))


@pytest.mark.parametrize(
    "target",
    [
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "../vae/diffusion_pytorch_model.safetensors",
        "..",
        "",
        "a/../../b",
        "nowhere",
    ],
)
def test_an_index_that_leads_elsewhere(broken: pathlib.Path, target: str) -> None:
    path = weights_of(broken / "transformer")
    header, _ = header_of(path.read_bytes())
    index = path.with_name(path.name + ".index.json")
    path.unlink()
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(header, target)}))
    load_fails(broken, "transformer")


def test_an_index_without_a_map(broken: pathlib.Path) -> None:
    path = weights_of(broken / "transformer")
    path.unlink()
    for content in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'):
        path.with_name(path.name + ".index.json").write_text(content)
        load_fails(broken, "transformer")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}),
        ("transformer/config.json", {"dim": 0}),
        ("transformer/config.json", {"dim": 10**9}),
        ("transformer/config.json", {"dim": -64}),
        ("transformer/config.json", {"dim": "large"}),
        ("transformer/config.json", {"n_heads": 7}),
        ("transformer/config.json", {"n_heads": 0}),
        ("transformer/config.json", {"n_layers": 1000}),
        ("transformer/config.json", {"n_layers": 10**9}),
        ("transformer/config.json", {"axes_dims": [1, 2]}),
        ("transformer/config.json", {"axes_dims": [3, 5, 7]}),
        ("transformer/config.json", {"axes_lens": [0, 0, 0]}),
        ("transformer/config.json", {"in_channels": 4}),
        ("text_encoder/config.json", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
        ("text_encoder/config.json", {"hidden_size": 3}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}),
        ("text_encoder/config.json", {"num_attention_heads": 0}),
        ("text_encoder/config.json", {"num_key_value_heads": 0}),
        ("vae/config.json", {"latent_channels": 3}),
        ("vae/config.json", {"block_out_channels": []}),
        ("vae/config.json", {"block_out_channels": [0, 0, 0, 0]}),
        ("vae/config.json", {"norm_num_groups": 0}),
        ("vae/config.json", {"norm_num_groups": 7}),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else value,
)
def test_another_architecture(broken: pathlib.Path, name: str, changes: dict[str, Any]) -> None:
    edit(broken / name, **changes)
    load_fails(broken)


@pytest.mark.parametrize("changes", [{"base_image_seq_len": 256, "max_image_seq_len": 256}, {"max_shift": 100}])
def test_a_scheduler_that_gives_no_steps(broken: pathlib.Path, changes: dict[str, Any]) -> None:
    """Known when the size of a picture is, and the model's fault."""
    edit(broken / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True, **changes)
    ctx = lib.diffusionz_init(os.fsencode(broken), -1)
    assert ctx, last_error()
    status, message = draw(ctx, width=512, height=512, num_steps=3)
    lib.diffusionz_free(ctx)
    assert (status, "scheduler" in message) == (E["MODEL"], True), message


# --- Damaged LoRA files ---


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "cut by one byte"])
def test_lying_lora(ctx: Any, tiny_model: pathlib.Path, tmp_path: pathlib.Path, damage: str) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(DAMAGES[damage](weights_of(tiny_model / "vae").read_bytes()))
    assert lib.diffusionz_load_lora(ctx, os.fsencode(path), 1) == E["LORA"]
    assert "lora.safetensors" in last_error()


def test_lora_of_another_model(ctx: Any, tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = weights_of(tiny_model / "vae")
    assert lib.diffusionz_load_lora(ctx, os.fsencode(path), 1) == E["LORA"]  # a checkpoint, no adapter at all
    assert last_error()
    assert lib.diffusionz_load_lora(ctx, os.fsencode(tmp_path / "nowhere"), 1) == E["LORA"]
    assert "nowhere" in last_error()
    assert lib.diffusionz_load_lora(ctx, os.fsencode(path), math.nan) == E["ARGUMENT"]
    assert draw(ctx) == (lib.DIFFUSIONZ_OK, "")


def test_a_pipe_is_no_file(ctx: Any, tmp_path: pathlib.Path) -> None:
    """Opening one waits for a writer, and would hold the context's queue until there is one."""
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(lib.diffusionz_load_lora(ctx, os.fsencode(pipe), 1)))
    thread.start()
    thread.join(20)
    waited = thread.is_alive()
    if waited:
        pipe.write_bytes(b"")
    thread.join()
    assert (waited, done) == (False, [E["LORA"]])


# --- Damaged pictures ---


@pytest.mark.parametrize("format", ["png", "webp"])
def test_damaged_pictures(format: str) -> None:
    code = {"png": lib.DIFFUSIONZ_FORMAT_PNG, "webp": lib.DIFFUSIONZ_FORMAT_WEBP_LOSSLESS}[format]
    rgb = ffi.new("uint8_t[]", bytes(i * 7 % 256 for i in range(48 * 32 * 3)))
    result = ffi.new("DiffusionZResult *")
    assert lib.diffusionz_image_encode(rgb, 48, 32, code, 90, b'{"prompt": "x"}', result) == lib.DIFFUSIONZ_OK
    whole = bytes(ffi.buffer(result.image_data, result.image_len))
    lib.diffusionz_free_result(result)
    for size in (0, 1, 8, 12, 20, 30, len(whole) // 2):
        assert lib.diffusionz_image_decode(whole[:size], size, result) == E["IMAGE"], size
        assert result.error_code == E["IMAGE"]
        assert text(result.error_msg)
        lib.diffusionz_free_result(result)
    out = ffi.new("char **")
    for position in range(len(whole)):  # whatever byte is wrong: a picture or an error, never a crash
        bent = bytearray(whole)
        bent[position] ^= 0xFF
        data = ffi.from_buffer("uint8_t[]", bent)
        status = lib.diffusionz_image_decode(data, len(bent), result)
        assert status in (lib.DIFFUSIONZ_OK, E["IMAGE"])
        lib.diffusionz_free_result(result)
        status = lib.diffusionz_image_metadata(data, len(bent), out)
        assert status in (lib.DIFFUSIONZ_OK, E["IMAGE"])
        lib.diffusionz_free_string(out[0])
