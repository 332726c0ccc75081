"""Goal: a model is the same model in every form in which people have it.

Method: one random checkpoint is written again in another form (another dtype, in shards, under the original's names as
ComfyUI keeps them, with fewer key-value heads) and must draw the same picture: bit for bit where the numbers are the
same, within the bounds of parity where diffusers reads the form itself.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import parity, reference
from tests.models.cases import LONG, complete
from tests.models.ours import draw
from tests.models.random_models import load_pipeline
from tests.models.reference import random_picture

SIZE = (48, 80)
PICTURE = random_picture(*SIZE)
# Both halves of the VAE, and two captions.
REQUEST = complete({"prompt": LONG, "guidance_scale": 2.0, "image": "picture", "strength": 0.7, "steps": 3}, SIZE)


def picture_of(model_path):
    from diffusionz import ZImage

    with ZImage(model_path, device="cpu") as engine:
        return draw(engine, REQUEST, PICTURE)


def weights(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_as_the_numbers_they_hold(random_model, tmp_path, dtype):
    pipe = load_pipeline(random_model("wide").folder)
    pipe.to(dtype).save_pretrained(tmp_path)
    assert weights(tmp_path, "transformer")["layers.0.feed_forward.w1.weight"].dtype == dtype
    (expected,) = reference.pictures(load_pipeline(tmp_path), REQUEST, PICTURE)
    parity.assert_same_pixels(picture_of(tmp_path), expected)


def test_shards_draw_the_same_picture_bit_for_bit(random_model, tmp_path):
    model = random_model("wide")
    model.pipe.save_pretrained(tmp_path, max_shard_size="200KB")
    for component in ("transformer", "text_encoder", "vae"):
        assert len(list((tmp_path / component).glob("*.safetensors"))) > 1, component
    assert torch.equal(picture_of(tmp_path), draw(model.engine, REQUEST, PICTURE))


def test_a_text_encoder_saved_with_its_language_model_draws_the_same_picture(random_model, tmp_path):
    """As in the released checkpoint: names begin with "model." and there may be an output head."""
    model = random_model("wide")
    shutil.copytree(model.folder, tmp_path / "model")
    tensors = {f"model.{name}": tensor for name, tensor in weights(model.folder, "text_encoder").items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "text_encoder" / "model.safetensors")
    assert torch.equal(picture_of(tmp_path / "model"), draw(model.engine, REQUEST, PICTURE))


# --- Grouped queries ------------------------------------------------------------------------------------------------


def test_fewer_key_value_heads_are_the_reference_with_its_heads_repeated(random_model, tmp_path):
    """diffusers' transformer has as many key-value heads as heads. Where groups of its heads are copies of one, the
    same model has fewer key-value heads."""
    model, groups = random_model("wide"), 3
    pipe = load_pipeline(model.folder)
    heads = pipe.transformer.config.n_heads
    for block in (*pipe.transformer.noise_refiner, *pipe.transformer.context_refiner, *pipe.transformer.layers):
        for product in (block.attention.to_k, block.attention.to_v):
            by_head = product.weight.data.unflatten(0, (heads, -1))
            product.weight.data = by_head[:groups].repeat_interleave(heads // groups, 0).flatten(0, 1).contiguous()
    (expected,) = reference.pictures(pipe, REQUEST, PICTURE)

    pipe.save_pretrained(tmp_path)
    tensors = weights(tmp_path, "transformer")
    for name, tensor in tensors.items():
        if name.endswith(("to_k.weight", "to_v.weight")):
            by_head = tensor.unflatten(0, (heads, -1))
            tensors[name] = by_head[:: heads // groups].flatten(0, 1).contiguous()
    save_file(tensors, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"n_kv_heads": groups}))
    parity.assert_same_pixels(picture_of(tmp_path), expected)


# --- The original's names -------------------------------------------------------------------------------------------


def original_transformer(tensors):
    """Tongyi-MAI's names, which ComfyUI keeps: queries, keys and values are one product."""
    renamed = {"norm_final.weight": torch.ones(1)}  # a leftover in the released file
    for name, tensor in tensors.items():
        if name.endswith(("attention.to_k.weight", "attention.to_v.weight")):
            continue
        if name.endswith("attention.to_q.weight"):
            stem = name.removesuffix("to_q.weight")
            parts = [tensors[f"{stem}to_{part}.weight"] for part in "qkv"]
            renamed[stem + "qkv.weight"] = torch.cat(parts)
            continue
        for theirs, original in {
            "attention.to_out.0.": "attention.out.",
            "attention.norm_q.": "attention.q_norm.",
            "attention.norm_k.": "attention.k_norm.",
            "all_x_embedder.2-1.": "x_embedder.",
            "all_final_layer.2-1.": "final_layer.",
        }.items():
            name = name.replace(theirs, original)
        renamed[name] = tensor.clone()
    return renamed


def original_vae(tensors):
    """The first latent diffusion's names: levels counted by resolution, attention written as convolutions."""
    levels = len({name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks.")})
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] == "up_blocks":
            parts[1:3] = ["up", str(levels - 1 - int(parts[2]))]
        elif parts[1] == "down_blocks":
            parts[1] = "down"
        name = ".".join(parts)
        for theirs, original in {
            ".mid_block.resnets.0.": ".mid.block_1.",
            ".mid_block.resnets.1.": ".mid.block_2.",
            ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
            ".mid_block.attentions.0.to_q.": ".mid.attn_1.q.",
            ".mid_block.attentions.0.to_k.": ".mid.attn_1.k.",
            ".mid_block.attentions.0.to_v.": ".mid.attn_1.v.",
            ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
            ".resnets.": ".block.",
            ".upsamplers.0.": ".upsample.",
            ".downsamplers.0.": ".downsample.",
            ".conv_shortcut.": ".nin_shortcut.",
            ".conv_norm_out.": ".norm_out.",
        }.items():
            name = name.replace(theirs, original)
        if ".mid.attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[name] = tensor.contiguous()
    return renamed


@pytest.fixture(scope="module")
def originals(random_model):
    """The "wide" model, whose configs are those that files without a config are taken to have."""
    folder = random_model("wide").folder
    vae = original_vae(weights(folder, "vae"))
    assert {"decoder.up.3.block.0.conv1.weight", "decoder.mid.attn_1.q.weight", "encoder.norm_out.bias"} <= vae.keys()
    text_encoder = {f"model.{name}": tensor for name, tensor in weights(folder, "text_encoder").items()}
    return original_transformer(weights(folder, "transformer")), text_encoder, vae


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_comfyui_folder_draws_the_same_picture_bit_for_bit(random_model, originals, tmp_path, prefix):
    model = random_model("wide")
    transformer, text_encoder, vae = originals
    for folder in ("diffusion_models", "text_encoders", "vae"):
        (tmp_path / folder).mkdir()
    transformer = {prefix + name: tensor for name, tensor in transformer.items()}
    save_file(transformer, tmp_path / "diffusion_models" / "z_image_turbo.safetensors")
    save_file(text_encoder, tmp_path / "text_encoders" / "qwen_3_4b.safetensors")
    save_file(vae, tmp_path / "vae" / "ae.safetensors")
    shutil.copytree(model.folder / "tokenizer", tmp_path / "tokenizer")
    assert torch.equal(picture_of(tmp_path), draw(model.engine, REQUEST, PICTURE))


# What a model without a config is read from: removed, without a side, or with an empty one.
READ = {
    "transformer": [
        "all_x_embedder.2-1.weight", "cap_embedder.1.weight", "layers.0.attention.norm_q.weight",
        "layers.0.attention.to_q.weight", "layers.0.attention.to_k.weight", "layers.1.attention_norm1.weight",
        "noise_refiner.0.attention_norm1.weight", "t_embedder.mlp.0.weight",
    ],
    "text_encoder": [
        "embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.k_proj.weight", "layers.0.mlp.gate_proj.weight", "layers.1.input_layernorm.weight",
    ],
    "vae": [
        "decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight",
        "decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up_blocks.3.resnets.0.conv1.weight",
        "decoder.mid_block.attentions.0.to_q.weight",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("component", "name"), [(part, name) for part, names in READ.items() for name in names])
def test_a_damaged_file_without_a_config_is_refused(random_model, tmp_path, component, name):
    """In a process of its own: what is divided by an empty side ends it."""
    folder = tmp_path / "model"
    shutil.copytree(random_model("wide").folder, folder)
    for config in folder.glob("*/config.json"):
        config.unlink()
    whole = weights(folder, component)
    (file,) = (folder / component).glob("*.safetensors")
    damaged = [torch.tensor(1.0), torch.empty(0), torch.empty(0, whole[name][0].numel()), torch.ones(1, 1), None]
    for i, tensor in enumerate(damaged):
        save_file(whole | {name: tensor} if tensor is not None else {k: v for k, v in whole.items() if k != name},
                  file.with_name(f"{i}.safetensors"))  # fmt: skip
    file.unlink()
    code = """
import os, pathlib, sys
from diffusionz import ModelError, ZImage
folder = pathlib.Path(sys.argv[1])
for file in sorted((folder / sys.argv[2]).glob("*.safetensors")):
    file.rename(file.with_suffix(".kept"))
for file in sorted((folder / sys.argv[2]).glob("*.kept")):
    os.link(file, folder / sys.argv[2] / "model.safetensors")
    try:
        ZImage(folder, device="cpu")
    except ModelError as error:
        print(error)
    (folder / sys.argv[2] / "model.safetensors").unlink()
"""
    done = subprocess.run([sys.executable, "-c", code, folder, component], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert len(done.stdout.splitlines()) == len(damaged), done.stdout


@pytest.mark.parametrize("side", [0, 3])
def test_attention_that_is_no_1x1_convolution_is_refused(random_model, originals, tmp_path, side):
    """Its first numbers would be a matrix of the right size, and of none there would be whatever memory holds."""
    from diffusionz import ModelError, ZImage

    shutil.copytree(random_model("wide").folder, tmp_path / "model")
    vae = originals[2]
    matrix = vae["decoder.mid.attn_1.q.weight"]
    wrong = {"decoder.mid.attn_1.q.weight": torch.zeros(*matrix.shape[:2], side, side)}
    save_file(vae | wrong, tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match="to_q"):
        ZImage(tmp_path / "model", device="cpu")


def in_one_file(originals, encoder="text_encoders."):
    prefixes = ("model.diffusion_model.", encoder, "vae.")
    return {
        prefix + name: tensor for prefix, part in zip(prefixes, originals, strict=True) for name, tensor in part.items()
    }


@pytest.mark.parametrize("encoder", ["text_encoders.qwen3_4b.transformer.", "text_encoders."])
def test_one_file_draws_the_same_picture_bit_for_bit(random_model, originals, tmp_path, encoder):
    model = random_model("wide")
    save_file(in_one_file(originals, encoder), tmp_path / "z_image.safetensors")
    shutil.copy(model.folder / "tokenizer" / "tokenizer.json", tmp_path)
    assert torch.equal(picture_of(tmp_path / "z_image.safetensors"), draw(model.engine, REQUEST, PICTURE))


def test_one_file_that_is_a_link_has_its_tokenizer_beside_the_link(random_model, originals, tmp_path):
    """As a hub's cache keeps it: the file itself is elsewhere, and has no name."""
    model, snapshot = random_model("wide"), tmp_path / "snapshot"
    snapshot.mkdir()
    save_file(in_one_file(originals), tmp_path / "0123abcd")
    (snapshot / "z_image.safetensors").symlink_to(tmp_path / "0123abcd")
    shutil.copy(model.folder / "tokenizer" / "tokenizer.json", snapshot)
    assert torch.equal(picture_of(snapshot / "z_image.safetensors"), draw(model.engine, REQUEST, PICTURE))


def test_one_file_is_read_again_when_its_tokenizer_changes(random_model, originals, tmp_path):
    from diffusionz import ModelError, ZImage

    save_file(in_one_file(originals), tmp_path / "z_image.safetensors")
    shutil.copy(random_model("wide").folder / "tokenizer" / "tokenizer.json", tmp_path)
    with ZImage(tmp_path / "z_image.safetensors", device="cpu"):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelError, match="tokenizer"):
            ZImage(tmp_path / "z_image.safetensors", device="cpu")


def test_a_vae_without_encoder_draws_from_text_and_says_what_it_cannot(random_model, tmp_path):
    from diffusionz import ArgumentError, ZImage

    model = random_model("wide")
    shutil.copytree(model.folder, tmp_path / "model")
    decoder = {k: v for k, v in weights(model.folder, "vae").items() if not k.startswith("encoder.")}
    save_file(decoder, tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    request = complete({"prompt": LONG, "steps": 2}, SIZE)
    with ZImage(tmp_path / "model", device="cpu") as engine:
        assert torch.equal(draw(engine, request), draw(model.engine, request))
        with pytest.raises(ArgumentError, match="encoder"):
            draw(engine, REQUEST, PICTURE)


# --- Models that share a process ------------------------------------------------------------------------------------


def test_models_of_linked_folders_are_each_their_own(random_model, tmp_path):
    """As who keeps components once and links them together: no file of such a model stands in its own folder."""
    models = [random_model("small"), random_model("wide")]
    linked = [tmp_path / "a", tmp_path / "b"]
    for model, folder in zip(models, linked, strict=True):
        folder.mkdir()
        for component in ("transformer", "text_encoder", "vae", "tokenizer"):
            (folder / component).symlink_to(model.folder / component)
    from diffusionz import ZImage

    request = complete({"prompt": LONG, "steps": 2}, SIZE)
    with ZImage(linked[0], device="cpu") as first, ZImage(linked[1], device="cpu") as second:
        for model, engine in zip(models, (first, second), strict=True):
            assert torch.equal(draw(engine, request), draw(model.engine, request))
