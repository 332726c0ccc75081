"""Draws random Z-Image checkpoints in the diffusers layout: small models of real structure, for tests and benchmarks.

Nothing in them is at a value that would hide a mistake: norm weights are not 1, biases and pad tokens not 0, and the
scales keep activations of order one through the depth, so that tokens differ and every parameter shows in the output.
"""

import dataclasses
import math
import pathlib

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What Qwen3's template comes to for one user message; `enable_thinking` is true in the pipeline, which adds nothing.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
CORPUS = [
    "A photo of a cat sitting on a red chair beside the window, soft light, 35mm, highly detailed, 1024x1024",
    "The quick brown fox jumps over the lazy dog. It's what they're told, and we'll say they've done it.",
    "a red circle on a blue background, a green square beside a yellow triangle",
    "一只可爱的熊猫在竹林里吃竹子。水墨画风格。阳光透过树叶洒下来。画面宁静而美丽。",
    "👩‍👩‍👧 👍🏽 ❤️ 😀😃",
]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes; each field goes to the component's own config."""

    seed: int
    transformer: dict = dataclasses.field(default_factory=dict)
    text_encoder: dict = dataclasses.field(default_factory=dict)
    vae: dict = dataclasses.field(default_factory=dict)
    scheduler: dict = dataclasses.field(default_factory=dict)


# Widths, depths and head counts that differ in what can go wrong.
SHAPES = {
    # 16 numbers a head; the caption narrower than the model
    "small": Shape(seed=1),
    # wider than the 256 of the time embedding; more of everything; one key-value head in the text encoder
    "wide": Shape(
        seed=2,
        transformer={"dim": 288, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 9, "axes_dims": (8, 12, 12)},
        text_encoder={"hidden_size": 64, "num_hidden_layers": 5, "num_key_value_heads": 1, "intermediate_size": 160},
        vae={"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 32},
    ),
    # every switch of the configs that the released models leave alone
    "unusual": Shape(
        seed=3,
        transformer={
            "dim": 96, "n_layers": 1, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3, "axes_dims": (16, 8, 8),
            "axes_lens": (700, 24, 40), "qk_norm": False, "rope_theta": 100.0, "t_scale": 500.0, "norm_eps": 1e-3,
            "in_channels": 8,
        },
        text_encoder={
            "attention_bias": True, "num_hidden_layers": 2, "num_attention_heads": 2, "rms_norm_eps": 1e-4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        vae={
            "latent_channels": 8, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": False,
            "block_out_channels": (8, 16, 24), "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3, "scaling_factor": 0.7, "shift_factor": -0.2,
        },
        scheduler={"use_dynamic_shifting": True},
    ),
}  # fmt: skip


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE of Qwen2's form, trained on a few sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    bpe.add_special_tokens(special)
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None, unk_token=None
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@torch.no_grad()
def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter: products keep a normal input's scale, norms and biases are off their neutral values."""
    for name, parameter in module.named_parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if "pad_token" in name or "embed_tokens" in name:
            parameter.copy_(noise)
        elif parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(1 + 0.3 * noise)


def draw_pipeline(shape: Shape) -> ZImagePipeline:
    generator = torch.Generator().manual_seed(shape.seed)
    tokenizer = make_tokenizer()
    text = Qwen3Config(
        **{
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        }
        | shape.text_encoder
    )  # fmt: skip
    transformer = {
        "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "axes_dims": (4, 6, 6),
        "axes_lens": (1536, 512, 512), "cap_feat_dim": text.hidden_size,
    } | shape.transformer  # fmt: skip
    transformer.setdefault("n_kv_heads", transformer["n_heads"])
    vae = {
        "block_out_channels": (16, 32, 32, 64), "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 8,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 64,
    } | shape.vae  # fmt: skip
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | shape.scheduler)),
        vae=AutoencoderKL(**vae),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(**transformer),
    )
    for component in (pipe.text_encoder, pipe.transformer, pipe.vae):
        randomize(component, generator)
        component.eval()
    return pipe


def write_model(shape: Shape, folder: pathlib.Path, **save_options) -> pathlib.Path:
    draw_pipeline(shape).save_pretrained(folder, **save_options)
    return folder


def load_pipeline(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> ZImagePipeline:
    """The reference, read from the files that the engine reads."""
    pipe = ZImagePipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
