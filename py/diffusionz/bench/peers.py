"""The peers' side of `diffusionz bench --gpu --peers`, a process of its own: torch and its memory are not ours.

    python -m diffusionz.bench.peers zimage|chronos2 FOLDER SCRATCH

diffusers and chronos-forecasting on the same files, at the fastest that their own switches give: blocks compiled, the
VAE compiled, with and without cuDNN's attention and channels-last; the forecaster compiled into CUDA graphs. One JSON
object a line: {"work", "size", "name", "values"}. What the peer draws and forecasts goes to SCRATCH, to be compared.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from diffusionz.bench.work import PROMPT, SEED, STEPS, STREAM_ROWS, prompt, series


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def wall_ms(call: Callable[[int], object], runs: int, warm_ups: int) -> list[float]:
    """Of whole calls, which end with their result on the host."""
    for i in range(warm_ups):
        call(i)
    values = []
    for i in range(runs):
        begin = time.perf_counter()
        call(warm_ups + i)
        values.append((time.perf_counter() - begin) * 1e3)
    return values


def event_ms(call: Callable[[], object], runs: int = 9, warm_ups: int = 3) -> list[float]:
    """Of work on the device."""
    torch: Any = import_module("torch")
    for _ in range(warm_ups):
        call()
    values = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        values.append(begin.elapsed_time(end))
    return values


# --- Z-Image beside diffusers ---


def open_pipeline(folder: str) -> Any:
    """diffusers' pipeline in bfloat16, its weights read straight to the device."""
    import glob

    diffusers: Any = import_module("diffusers")
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    load_file: Any = import_module("safetensors.torch").load_file

    def config(part: str) -> dict[str, Any]:
        with open(os.path.join(folder, part, "config.json"), encoding="utf-8") as file:
            return dict(json.load(file))

    def fill(part: str, make: Callable[[], Any]) -> Any:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = make()
        torch.set_default_dtype(torch.float32)
        weights: dict[str, Any] = {}
        for file in glob.glob(os.path.join(folder, part, "*.safetensors")):
            weights |= load_file(file, device="cuda")
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        weights.pop("lm_head.weight", None)
        model.load_state_dict(weights, assign=True)
        return model.to(torch.bfloat16).eval()

    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
        vae=fill("vae", lambda: diffusers.AutoencoderKL.from_config(config("vae"))),
        text_encoder=fill(
            "text_encoder", lambda: transformers.Qwen3Model(transformers.Qwen3Config(**config("text_encoder")))
        ),
        tokenizer=transformers.AutoTokenizer.from_pretrained(os.path.join(folder, "tokenizer")),
        transformer=fill("transformer", lambda: diffusers.ZImageTransformer2DModel.from_config(config("transformer"))),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def zimage(folder: str, scratch: str, eager: bool) -> None:
    import numpy

    diffusers: Any = import_module("diffusers")
    torch: Any = import_module("torch")
    begin = time.perf_counter()
    pipe = open_pipeline(folder)
    chat = [{"role": "user", "content": PROMPT}]
    text = pipe.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens = -(-len(pipe.tokenizer(text).input_ids) // 32) * 32  # what the transformer pads captions to
    say(note=f"diffusers loaded in {time.perf_counter() - begin:.1f} s")

    def picture(i: int | None, side: int) -> Any:
        pixels = pipe(
            PROMPT if i is None else prompt(i),
            width=side,
            height=side,
            num_inference_steps=STEPS,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="pt",
            max_sequence_length=tokens,  # its default pads every prompt to 512
        ).images[0]
        return (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()

    def measure(name: str) -> None:
        name = f"diffusers {diffusers.__version__}, {name}"
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        for side in (1024, 512):
            say(work="picture", size=side, name=name, values=wall_ms(partial(picture, side=side), 5, 2))
            latents = torch.randn(16, 1, side // 8, side // 8, **options)
            caption = torch.randn(tokens, pipe.text_encoder.config.hidden_size, **options)
            at = torch.tensor([0.5]).cuda()
            step = event_ms(partial(pipe.transformer, [latents], at, [caption], return_dict=False))
            say(work="step", size=side, name=name, values=step)
            decode = event_ms(partial(pipe.vae.decode, latents.transpose(0, 1), return_dict=False))
            say(work="decode", size=side, name=name, values=decode)
        ids = torch.randint(0, pipe.text_encoder.config.vocab_size, (1, tokens), device="cuda")
        text = event_ms(partial(pipe.text_encoder, input_ids=ids, output_hidden_states=True))
        say(work="text", size=tokens, name=name, values=text)

    with torch.inference_mode():
        numpy.save(os.path.join(scratch, "picture.npy"), picture(None, 512))
        if eager:
            measure("eager")
            return
        eager_decode = pipe.vae.decode
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        pipe.vae.decode = torch.compile(eager_decode)
        measure("compiled")
        pipe.transformer.set_attention_backend("_native_cudnn")
        pipe.vae.to(memory_format=torch.channels_last)
        torch.compiler.reset()
        pipe.vae.decode = torch.compile(eager_decode)
        measure("compiled, cuDNN attention, channels-last VAE")


# --- Chronos-2 beside chronos-forecasting ---


def chronos2(folder: str, scratch: str, eager: bool) -> None:
    import importlib.metadata

    import numpy

    torch: Any = import_module("torch")
    pipeline: Any = import_module("chronos").Chronos2Pipeline
    version = f"chronos-forecasting {importlib.metadata.version('chronos-forecasting')}"
    rows = series(448)
    for precision in ("float32", "bfloat16"):
        # What upstream offers between the two: TF32 products in float32.
        torch.set_float32_matmul_precision("highest")
        pipe = pipeline.from_pretrained(folder, device_map="cuda", dtype=getattr(torch, precision))

        def predict(_: int, rows: Any, pipe: Any = pipe) -> Any:
            found = pipe.predict(torch.from_numpy(rows[:, None]), prediction_length=16, batch_size=512)
            return torch.cat(found).numpy()

        if precision == "float32":
            numpy.save(os.path.join(scratch, "forecast.npy"), predict(0, rows))
            torch.set_float32_matmul_precision("high")
        name = f"{version}, {'tf32' if precision == 'float32' else precision}"
        say(work="forecast", size=1, name=f"{name}, eager", values=wall_ms(partial(predict, rows=rows[:1]), 20, 5))
        say(work="forecast", size=448, name=f"{name}, eager", values=wall_ms(partial(predict, rows=rows), 5, 2))
        many = series(STREAM_ROWS // 10)  # a tenth is enough to tell its rate
        rate = [len(many) / ms * 1e3 for ms in wall_ms(partial(predict, rows=many), 1, 0)]
        say(work="stream", size=STREAM_ROWS, name=f"{name}, eager", values=rate)
        if eager:
            continue
        # The model alone, without what the pipeline does on the host: more than a user gets.
        compiled = torch.compile(pipe.model, mode="reduce-overhead")
        with torch.inference_mode():
            for count in (1, 448):
                context = torch.from_numpy(rows[:count]).cuda()
                values = event_ms(partial(compiled, context=context, num_output_patches=1), 20, 5)
                say(work="forecast", size=count, name=f"{name}, model alone, compiled with graphs", values=values)


if __name__ == "__main__":
    {"zimage": zimage, "chronos2": chronos2}[sys.argv[1]](sys.argv[2], sys.argv[3], "eager" in sys.argv[4:])
