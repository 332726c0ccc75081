"""The architecture in one place: configurations of the tokenizer, Qwen3, transformer and VAE, and the model folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

SEED = 20261122
VOCABULARY = 1024
CAPTION_MULTIPLE = 32  # the transformer pads captions to a multiple of this
STEPS, SHIFT = 8, 3.0
LATENT_CHANNELS, LATENT_SIDE = 16, 32

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,  # the features are read before the last layer, which is therefore never used
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}
TRANSFORMER = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": LATENT_CHANNELS,
    "dim": 192,  # a multiple of 3, so that the feed-forward width 8/3 dim is 512
    "n_layers": 10,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "n_kv_heads": 6,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": TEXT["hidden_size"],
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1536, 512, 512],
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 96, 96],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 16,
    "sample_size": 256,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
    "mid_block_add_attention": True,
}

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def train_tokenizer(captions: list[str]) -> Tokenizer:
    """A byte-level BPE in Qwen2's form: all 256 bytes are tokens, the specials come last."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return tokenizer


def write_tokenizer(folder: Path) -> Tokenizer:
    """Train on 60,000 captions (the same for the same seed) and write `tokenizer/`."""
    from scenes import caption, sample_scene

    rng = random.Random(SEED)
    captions = [caption(rng, sample_scene(rng)) for _ in range(60000)]
    captions += ["user\n", "assistant\n"] * 2000  # the chat form's own words
    tokenizer = train_tokenizer(captions)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the captions gave {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    write_json(folder / "vocab.json", model["vocab"], indent=None)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]) + "\n")
    added = {
        str(tokenizer.token_to_id(t)): {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for t in SPECIAL
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "add_bos_token": False,
            "added_tokens_decoder": added,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "errors": "replace",
            "split_special_tokens": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "padding_side": "right",
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return tokenizer


def write_json(path: Path, value: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def text_encoder():
    """Qwen3 without a head, as diffusers loads it."""
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**TEXT, attn_implementation="sdpa"))


def transformer():
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(**TRANSFORMER)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("pad_token"):
                p.normal_(std=0.02)
    return model


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def write_model(folder: Path, text, flow, codec, scaling: float, shift: float, dtype=torch.bfloat16) -> None:
    """Write the diffusers folder (all but the tokenizer): weights in `dtype`, one file for each part."""
    parts = (("text_encoder", text), ("transformer", flow), ("vae", codec))
    for name, module in parts:
        (folder / name).mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().to(dtype).cpu().contiguous() for k, v in module.state_dict().items()}
        if name == "text_encoder":  # the keys of the published checkpoints
            state = {f"model.{k}": v for k, v in state.items()}
        file = "model.safetensors" if name == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(state, folder / name / file, metadata={"format": "pt"})
    write_json(
        folder / "text_encoder" / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **TEXT,
            "bos_token_id": None,
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": VOCABULARY - 3,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": TEXT["num_hidden_layers"],
            "rope_scaling": None,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        folder / "transformer" / "config.json",
        {"_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.36.0", **TRANSFORMER},
    )
    write_json(
        folder / "vae" / "config.json",
        {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.36.0",
            **VAE,
            "scaling_factor": scaling,
            "shift_factor": shift,
        },
    )
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.36.0",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": False,
            "shift": SHIFT,
        },
    )
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "ZImagePipeline",
            "_diffusers_version": "0.36.0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def load_state(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    return load_file(path, device=device)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Write the model folder with the tokenizer and random weights.")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    write_tokenizer(args.folder / "tokenizer")
    made = text_encoder(), transformer(), vae()
    write_model(args.folder, *made, scaling=1.0, shift=0.0)
    print({m.__class__.__name__: parameters(m) for m in made})
