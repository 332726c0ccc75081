"""Checkpoints of the released models' sizes with random weights: speed does not depend on what the weights are.

Z-Image (6.2 G parameters in its transformer, 4.0 G in its text encoder; 20.5 GB) in the diffusers layout, and
Chronos-2 (120 M; 0.5 GB) in upstream's. The tokenizer is the bundled model's, which knows but a few words: the
embedding keeps its full size.

Weights are normal numbers with the deviation 1 / sqrt(inputs), norms are near 1 and biases near 0, so that activations
keep their scale. Drawing ten thousand million numbers would take longer than the benchmark: every tensor is a stretch
of one pool of 2^24 numbers, from an offset of its own. The pool's length is prime, so that rows of a matrix differ.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from diffusionz.hub import locate

if TYPE_CHECKING:
    from numpy.typing import NDArray

Shapes = dict[str, tuple[int, ...]]

_POOL = 2**24 - 3  # a prime
_SHARD_BYTES = 4 * 2**30
_THREADS = 8

TRANSFORMER = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
TEXT_ENCODER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "mid_block_add_attention": True,
}
CHRONOS = {
    "architectures": ["Chronos2Model"],
    "chronos_pipeline_class": "Chronos2Pipeline",
    "model_type": "t5",
    "d_model": 768,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "d_ff": 3072,
    "feed_forward_proj": "relu",
    "dense_act_fn": "relu",
    "is_gated_act": False,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 2,
    "pad_token_id": 0,
    "reg_token_id": 1,
    "torch_dtype": "float32",
    "chronos_config": {
        "context_length": 8192,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "output_patch_size": 16,
        "max_output_patches": 64,
        "quantiles": [0.01, *(round(0.05 * i, 2) for i in range(1, 20)), 0.99],
        "time_encoding_scale": 8192,
        "use_reg_token": True,
        "use_arcsinh": True,
    },
}


def write_zimage(
    folder: str,
    transformer: dict[str, Any] = TRANSFORMER,
    text_encoder: dict[str, Any] = TEXT_ENCODER,
    vae: dict[str, Any] = VAE,
) -> None:
    """Writes a model of these configurations, in bfloat16. Raises OSError, also when the disk is too small."""
    parts = {
        "transformer": (transformer, transformer_shapes(transformer), "diffusion_pytorch_model"),
        "text_encoder": (text_encoder, text_encoder_shapes(text_encoder), "model"),
        "vae": (vae, vae_shapes(vae), "diffusion_pytorch_model"),
    }
    _check_space(folder, sum(_count(shapes) for _, shapes, _ in parts.values()) * 2)
    bundled = locate("demo", "zimage")
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(os.path.join(bundled, name), os.path.join(folder, name), dirs_exist_ok=True)
    shutil.copy(os.path.join(bundled, "model_index.json"), folder)
    jobs: list[Callable[[], None]] = []
    pool = _Pool("BF16")
    for name, (config, shapes, stem) in parts.items():
        part = os.path.join(folder, name)
        os.makedirs(part, exist_ok=True)
        _write_json(os.path.join(part, "config.json"), config)
        jobs += _shards(part, stem, shapes, pool)
    _run(jobs)


def write_chronos(folder: str, config: dict[str, Any] = CHRONOS) -> None:
    """Writes a model of this configuration, in float32. Raises OSError, also when the disk is too small."""
    shapes = chronos_shapes(config)
    _check_space(folder, _count(shapes) * 4)
    _write_json(os.path.join(folder, "config.json"), config)
    _run(_shards(folder, "model", shapes, _Pool("F32")))


# --- Names and shapes ---


def transformer_shapes(config: dict[str, Any]) -> Shapes:
    dim, head = config["dim"], config["dim"] // config["n_heads"]
    hidden, pixels = dim // 3 * 8, config["in_channels"] * config["all_patch_size"][0] ** 2
    shapes: Shapes = {
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        "all_final_layer.2-1.linear.weight": (pixels, dim),
        "all_final_layer.2-1.linear.bias": (pixels,),
        "cap_embedder.0.weight": (config["cap_feat_dim"],),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    modulation = min(dim, 256)  # width of the time embedding
    linear("all_x_embedder.2-1", dim, pixels)
    linear("all_final_layer.2-1.adaLN_modulation.1", dim, modulation)
    linear("t_embedder.mlp.0", 1024, 256)
    linear("t_embedder.mlp.2", modulation, 1024)
    linear("cap_embedder.1", dim, config["cap_feat_dim"])
    counts = {
        "noise_refiner": config["n_refiner_layers"],
        "context_refiner": config["n_refiner_layers"],
        "layers": config["n_layers"],
    }
    for stack, count in counts.items():
        for i in range(count):
            block = f"{stack}.{i}"
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes[f"{block}.attention.{part}.weight"] = (dim, dim)
            for part in ("norm_q", "norm_k"):
                shapes[f"{block}.attention.{part}.weight"] = (head,)
            shapes[f"{block}.feed_forward.w1.weight"] = shapes[f"{block}.feed_forward.w3.weight"] = (hidden, dim)
            shapes[f"{block}.feed_forward.w2.weight"] = (dim, hidden)
            for part in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                shapes[f"{block}.{part}.weight"] = (dim,)
            if stack != "context_refiner":
                linear(f"{block}.adaLN_modulation.0", 4 * dim, modulation)
    return shapes


def text_encoder_shapes(config: dict[str, Any]) -> Shapes:
    width, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (queries, width),
            f"{layer}.self_attn.k_proj.weight": (keys, width),
            f"{layer}.self_attn.v_proj.weight": (keys, width),
            f"{layer}.self_attn.o_proj.weight": (width, queries),
            f"{layer}.self_attn.q_norm.weight": (head,),
            f"{layer}.self_attn.k_norm.weight": (head,),
            f"{layer}.mlp.gate_proj.weight": (hidden, width),
            f"{layer}.mlp.up_proj.weight": (hidden, width),
            f"{layer}.mlp.down_proj.weight": (width, hidden),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes


def vae_shapes(config: dict[str, Any]) -> Shapes:
    widths, latents, layers = config["block_out_channels"], config["latent_channels"], config["layers_per_block"]
    shapes: Shapes = {}

    def convolution(name: str, outputs: int, inputs: int, side: int = 3) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def block(name: str, outputs: int, inputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        convolution(f"{name}.conv1", outputs, inputs)
        norm(f"{name}.norm2", outputs)
        convolution(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            convolution(f"{name}.conv_shortcut", outputs, inputs, 1)

    def middle(side: str, width: int) -> None:
        for i in range(2):
            block(f"{side}.mid_block.resnets.{i}", width, width)
        norm(f"{side}.mid_block.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            name = f"{side}.mid_block.attentions.0.{part}"
            shapes.update({f"{name}.weight": (width, width), f"{name}.bias": (width,)})

    for side, order, depth, part in (
        ("encoder", widths, layers, "down"),
        ("decoder", widths[::-1], layers + 1, "up"),
    ):
        inputs = order[0]
        for i, outputs in enumerate(order):
            for j in range(depth):
                block(f"{side}.{part}_blocks.{i}.resnets.{j}", outputs, inputs if j == 0 else outputs)
            if i < len(order) - 1:
                convolution(f"{side}.{part}_blocks.{i}.{part}samplers.0.conv", outputs, outputs)
            inputs = outputs
        middle(side, widths[-1])
        norm(f"{side}.conv_norm_out", order[-1])
    convolution("encoder.conv_in", widths[0], config["in_channels"])
    convolution("encoder.conv_out", 2 * latents, widths[-1])
    convolution("decoder.conv_in", widths[-1], latents)
    convolution("decoder.conv_out", config["out_channels"], widths[0])
    return shapes


def chronos_shapes(config: dict[str, Any]) -> Shapes:
    width, hidden, inner = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    forecasting = config["chronos_config"]
    outputs = len(forecasting["quantiles"]) * forecasting["output_patch_size"]
    shapes: Shapes = {"shared.weight": (config["vocab_size"], width), "encoder.final_layer_norm.weight": (width,)}
    for name, rows, columns in (
        ("input_patch_embedding", width, 3 * forecasting["input_patch_size"]),
        ("output_patch_embedding", outputs, width),
    ):
        for layer, size in {
            "hidden_layer": (hidden, columns),
            "output_layer": (rows, hidden),
            "residual_layer": (rows, columns),
        }.items():
            shapes |= {f"{name}.{layer}.weight": size, f"{name}.{layer}.bias": size[:1]}
    for i in range(config["num_layers"]):
        for j in range(3):
            shapes[f"encoder.block.{i}.layer.{j}.layer_norm.weight"] = (width,)
        for j in range(2):
            attention = f"encoder.block.{i}.layer.{j}.self_attention"
            shapes |= {f"{attention}.{part}.weight": (inner, width) for part in "qkv"}
            shapes[f"{attention}.o.weight"] = (width, inner)
        shapes[f"encoder.block.{i}.layer.2.mlp.wi.weight"] = (hidden, width)
        shapes[f"encoder.block.{i}.layer.2.mlp.wo.weight"] = (width, hidden)
    return shapes


# --- Files ---


class _Pool:
    """Normal numbers in the form of a file, ready at any scale."""

    def __init__(self, dtype: str) -> None:
        import numpy

        self.dtype = dtype
        self.itemsize = 2 if dtype == "BF16" else 4
        self._normal = numpy.random.default_rng(7).standard_normal(_POOL, numpy.float32)
        self._scaled: dict[tuple[float, float], NDArray[Any]] = {}

    def of(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """(mean, deviation) of a tensor."""
        if len(shape) > 1:
            return 0.0, 1.0 if min(shape) == 1 or "embed_tokens" in name else 1 / math.sqrt(math.prod(shape[1:]))
        return (0.0, 0.1) if name.endswith("bias") else (1.0, 0.1)

    def scaled(self, mean: float, deviation: float) -> NDArray[Any]:
        import numpy

        if (mean, deviation) not in self._scaled:
            values = self._normal * numpy.float32(deviation) + numpy.float32(mean)
            if self.dtype == "BF16":
                bits = values.view(numpy.uint32)
                bits += 0x8000  # rounds to nearest
                self._scaled[mean, deviation] = bits.view(numpy.uint16)[1::2].copy()
            else:
                self._scaled[mean, deviation] = values
        return self._scaled[mean, deviation]

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
        values = self.scaled(*self.of(name, shape))
        at, left = zlib.crc32(name.encode()) % _POOL, math.prod(shape)
        while left:
            part = values[at : at + left]
            yield part.data.cast("B")
            at, left = 0, left - len(part)


def _shards(folder: str, stem: str, shapes: Shapes, pool: _Pool) -> list[Callable[[], None]]:
    """What writes the files of a checkpoint, one job a file; the index is written at once."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        pool.scaled(*pool.of(name, shape))  # not by several threads at once
        bytes_here = math.prod(shape) * pool.itemsize
        if size and size + bytes_here > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_here
    files = [f"{stem}.safetensors"]
    if len(groups) > 1:
        files = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        names = {name: file for group, file in zip(groups, files, strict=True) for name in group}
        index = {"metadata": {"total_size": _count(shapes) * pool.itemsize}, "weight_map": names}
        _write_json(os.path.join(folder, f"{stem}.safetensors.index.json"), index)

    def job(group: Iterable[str], file: str) -> Callable[[], None]:
        return lambda: _write_safetensors(os.path.join(folder, file), {name: shapes[name] for name in group}, pool)

    return [job(group, file) for group, file in zip(groups, files, strict=True)]


def _write_safetensors(path: str, shapes: Shapes, pool: _Pool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * pool.itemsize
        header[name] = {"dtype": pool.dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name, shape in shapes.items():
            for piece in pool.pieces(name, shape):
                _write_all(file, piece)


def _write_all(file: Any, data: memoryview) -> None:
    while data:  # Linux writes at most 2 GB at a time
        data = data[file.write(data) :]


def _write_json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def _run(jobs: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        for done in [threads.submit(job) for job in jobs]:
            done.result()


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _check_space(folder: str, size: int) -> None:
    import errno

    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size + 2**28 > free:
        raise OSError(
            errno.ENOSPC, f"a random model of {size / 1e9:.1f} GB does not fit the {free / 1e9:.1f} GB free", folder
        )
