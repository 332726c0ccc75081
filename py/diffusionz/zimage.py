"""`ZImage`: a loaded Z-Image model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from diffusionz._context import Model, _device_id, byte_count, watched
from diffusionz._errors import ArgumentError, error_for
from diffusionz.hub import Path
from diffusionz.image import Image, to_rgb
from diffusionz.progress import Preview, Progress, take_preview

_MAX_PICTURES = 1024  # of one diffusionz_generate_batch


class ZImage(Model):
    """A Z-Image model, loaded on a device.

        with ZImage("demo", device="cpu") as model:
            model.generate("a red circle on a blue background", width=256, height=256, seed=7).save("out.png")

    Parameters:
        model: a folder in the diffusers layout (or ComfyUI's, or one safetensors file), the name of a bundled model
            ("demo"), or a hub id "org/name" that `diffusionz pull` has fetched. Nothing is downloaded here.
        device: "auto" (the first CUDA device, else the CPU), "cpu", "cuda", or "cuda:1". Several, as a list or
            "cuda:0,cuda:1", draw side by side: a batch's pictures, and calls that queue, go to whichever is free.
        precision: "auto" (bfloat16 on CUDA, float32 on the CPU), "float32", "bfloat16", or "fp8" (bfloat16, and the
            transformer's large products in 8 bits; CUDA devices of compute capability 8.9 and later).
        threads: CPU threads of the whole process; 0 leaves them as they are.
        cuda_graphs: whether CUDA graphs may be captured: faster steps for some more memory.
        max_vram: device memory that this process may take, on each device: bytes, or "8GB". Where the model does not
            fit, its text encoder and VAE stay on the host and come for their stage only. The pictures are the same.

    Raises ArgumentError, ModelError, DeviceError, OutOfMemoryError.

    Calls may come from several threads; on one object they queue in the order of their arrival. Objects of one model
    on one device share its weights.
    """

    _FAMILY = "zimage"
    _PRECISIONS = ("auto", "float32", "bfloat16", "fp8")

    info: dict[str, Any]
    """What the model is: family, path, device, precision, parameter counts, sizes allowed, scheduler."""

    def __init__(
        self,
        model: Path = "demo",
        *,
        device: str | Sequence[str] = "auto",
        precision: str = "auto",
        threads: int = 0,
        cuda_graphs: bool = True,
        max_vram: int | str | None = None,
    ) -> None:
        super().__init__(model, precision)
        vram_bytes = byte_count("max_vram", max_vram)
        from diffusionz._ffi import ffi, lib

        names = device if isinstance(device, (list, tuple)) else str(device).split(",")
        devices = [str(name).strip() for name in names]
        if not devices:
            raise ArgumentError("device is an empty list; it must name a device at least")
        options = ffi.new("DiffusionZInitOptions *")
        lib.diffusionz_init_options_init(options)
        options.cuda_graphs = bool(cuda_graphs)
        options.max_vram_bytes = vram_bytes
        device_ids = ffi.new("int32_t[]", [_device_id(name) for name in devices])
        options.device_ids, options.device_count = device_ids, len(devices)
        self._load(
            options,
            devices[0],
            precision,
            threads,
            lib.diffusionz_init_with_options,
            lib.diffusionz_free,
            lib.diffusionz_model_info,
            lib.diffusionz_memory_info,
        )

    # --- Drawing ---

    def generate(
        self,
        prompt: str,
        *,
        width: int | None = None,
        height: int | None = None,
        steps: int = 8,
        seed: int | None = None,
        guidance: float = 0.0,
        negative_prompt: str | None = None,
        lora: Path | tuple[Path, float] | None = None,
        init_image: Any = None,
        strength: float = 0.6,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        previews: int = 0,
        on_preview: Callable[[Preview], object] | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        progress: bool | None = None,
    ) -> Image:
        """Draws one picture.

        Parameters:
            prompt: what to draw.
            width, height: pixels, multiples of 16. Default: those of `init_image`, else what the model was made for,
                1024 as a rule and 256 for the bundled one.
            steps: transformer evaluations, 1..1000.
            seed: of torch's CPU generator, an int64; None draws a random one, and `Image.seed` says which.
            guidance: 0 is off; else prediction = positive + guidance * (positive - negative).
            negative_prompt: what to keep away from; used with guidance.
            lora: an adapter for this call alone: a safetensors file, or (file, weight).
            init_image: a picture to start from: a path or the bytes of a PNG or WebP file, an `Image`, or uint8
                [height, width, 3]. Its size must be that of the picture.
            strength: with `init_image`, 0 < strength <= 1: the share of the steps that run.
            cfg_normalization: with guidance, bounds the prediction's norm to this multiple of the unguided one; 0 off.
            cfg_truncation: guidance is off once 1 - sigma exceeds this.
            previews: how many to make of each picture for `on_preview`, 0..999. They are spread evenly over the steps:
                preview k of n comes after step k * steps // (n + 1), and none after the last step. Each takes about a
                quarter of the time of decoding the picture, which is the same with and without.
            on_preview: called with a `Preview`, at the same times as `on_progress` after it, when there is a new one.
                Of several since the last time it gets the newest. What it raises stops the call, too.
            on_progress: called with a `Progress` some twenty times a second, and once at the end. What it raises
                stops the call and is raised here: raise `Cancelled` to stop.
            progress: whether to show a bar on stderr; None shows it in a terminal.

        Ctrl-C stops within one step and raises KeyboardInterrupt; the model stays usable.
        Raises ArgumentError, LoraError, ImageError, OutOfMemoryError, DeviceError.
        """
        return self.generate_batch(
            [prompt],
            width=width,
            height=height,
            steps=steps,
            seed=seed,
            guidance=guidance,
            negative_prompt=negative_prompt,
            lora=lora,
            init_image=init_image,
            strength=strength,
            cfg_normalization=cfg_normalization,
            cfg_truncation=cfg_truncation,
            previews=previews,
            on_preview=on_preview,
            on_progress=on_progress,
            progress=progress,
        )[0]

    def generate_batch(
        self,
        prompts: str | Sequence[str],
        *,
        count: int = 1,
        width: int | None = None,
        height: int | None = None,
        steps: int = 8,
        seed: int | None = None,
        guidance: float = 0.0,
        negative_prompt: str | None = None,
        lora: Path | tuple[Path, float] | None = None,
        init_image: Any = None,
        strength: float = 0.6,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        previews: int = 0,
        on_preview: Callable[[Preview], object] | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        progress: bool | None = None,
    ) -> list[Image]:
        """Draws `count` pictures of each prompt in one place of the queue, at most 1024 in all. Picture i of the list
        has the seed `seed + i`, and is the one that `generate` draws with that seed.

        The other parameters and the errors are those of `generate`. All or none: when one fails, the call raises.
        """
        from diffusionz._ffi import c_int, ffi, lib

        context = self._alive()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [text for text in texts for _ in range(count)]
        if not 1 <= len(texts) <= _MAX_PICTURES:
            raise ArgumentError(f"{len(texts)} pictures were asked for; 1 to {_MAX_PICTURES} can be drawn in one call")
        c_int("previews", previews)
        if previews and on_preview is None:
            raise ArgumentError(f"previews is {previews} without an on_preview; there is no other way to see them")
        if seed is None:
            seed = int.from_bytes(os.urandom(4), "little")  # short enough to be typed in again
        c_int("seed", seed, bits=64)
        c_int("the last picture's seed", seed + len(texts) - 1, bits=64)

        rgb = None
        if init_image is not None:
            rgb, init_width, init_height = to_rgb(init_image)
            width = init_width if width is None else width
            height = init_height if height is None else height
            if (width, height) != (init_width, init_height):
                raise ArgumentError(
                    f"init_image is {init_width}x{init_height} and the picture {width}x{height}; they must be equal"
                )
        if width is None or height is None:
            side = int(self.info["size"]["default"])
            width = side if width is None else width
            height = side if height is None else height
        requests = _Requests(len(texts))
        requests.fill(
            width=c_int("width", width),
            height=c_int("height", height),
            num_steps=c_int("steps", steps),
            guidance_scale=guidance,
            strength=strength,
            cfg_normalization=cfg_normalization,
            cfg_truncation=cfg_truncation,
            format=lib.DIFFUSIONZ_FORMAT_RGB,  # encoded when a file is asked for
        )
        if negative_prompt is not None:
            requests.fill(negative_prompt=requests.string("negative_prompt", negative_prompt))
        if lora is not None:
            lora_path, lora_weight = lora if isinstance(lora, tuple) else (lora, 1.0)
            requests.fill(lora_path=requests.string("lora", os.fspath(lora_path)), lora_weight=lora_weight)
        if rgb is not None:
            requests.fill(init_image=requests.keep(ffi.from_buffer("uint8_t[]", rgb)))
        for i, text in enumerate(texts):
            requests.structs[i].prompt = requests.string("prompt", text)
            requests.structs[i].seed = seed + i

        start = time.perf_counter()

        def show(task: Any) -> None:
            preview = take_preview(task, seed)
            if preview is not None and on_preview is not None:
                on_preview(preview)

        drawn, end = watched(
            lambda task: requests.draw(context, task, previews),
            on_progress,
            progress,
            on_tick=show if previews else None,
        )
        timings = {
            "queue": end.queue_ms,
            "text": end.text_ms,
            "denoise": end.denoise_ms,
            "decode": end.decode_ms,
            "total": (time.perf_counter() - start) * 1e3,
        }
        return [
            Image(rgb, width, height, seed=seed + i, timings=timings, metadata_json=metadata)
            for i, (rgb, width, height, metadata) in enumerate(drawn)
        ]

    # --- LoRA ---

    def load_lora(self, path: Path, weight: float = 1.0) -> None:
        """Adds an adapter (safetensors of diffusers', PEFT's or kohya's naming) to every later call, on top of those
        loaded before; the same path again sets its weight. Raises LoraError, ArgumentError, OutOfMemoryError."""
        from diffusionz._ffi import c_string, check, lib

        check(lib.diffusionz_load_lora(self._alive(), c_string("path", os.fspath(path)), weight))

    def unload_lora(self) -> None:
        """Removes all adapters: later pictures are bit for bit those of the base model."""
        from diffusionz._ffi import check, lib

        check(lib.diffusionz_unload_lora(self._alive()))


class _Requests:
    """The `DiffusionZRequest`s of one call, with all that they point to."""

    def __init__(self, count: int) -> None:
        from diffusionz._ffi import ffi, lib

        self.count = count
        self.structs: Any = ffi.new("DiffusionZRequest[]", count)
        self._kept: list[Any] = []
        for i in range(count):
            lib.diffusionz_request_init(ffi.addressof(self.structs[i]))

    def keep(self, pointer: Any) -> Any:
        self._kept.append(pointer)
        return pointer

    def string(self, name: str, value: str) -> Any:
        from diffusionz._ffi import c_string

        return self.keep(c_string(name, value))

    def fill(self, **fields: Any) -> None:
        """Sets fields of every request."""
        for i in range(self.count):
            for name, value in fields.items():
                setattr(self.structs[i], name, value)

    def draw(self, context: Any, task: Any, previews: int = 0) -> list[tuple[bytearray, int, int, str]]:
        """(pixels, width, height, metadata) of each picture."""
        from diffusionz._ffi import check, ffi, lib, take_string, text

        if previews:
            check(lib.diffusionz_task_keep_previews(task, previews))
        results = ffi.new("DiffusionZResult[]", self.count)
        try:
            status = lib.diffusionz_generate_batch(context, self.structs, self.count, task, results)
            if status != lib.DIFFUSIONZ_OK:
                raise error_for(status, text(lib.diffusionz_last_error()))
            drawn = []
            for i in range(self.count):
                out = ffi.new("char **")
                check(lib.diffusionz_request_metadata(context, ffi.addressof(self.structs[i]), out))
                pixels = bytearray(ffi.buffer(results[i].image_data, results[i].image_len))
                drawn.append((pixels, results[i].width, results[i].height, take_string(out)))
            return drawn
        finally:
            for i in range(self.count):
                lib.diffusionz_free_result(ffi.addressof(results[i]))
