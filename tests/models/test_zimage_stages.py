"""Goal: every stage of the engine alone computes what diffusers computes, so that a failure says where.

Method: random checkpoints are written to disk, diffusers and stage_probe read the same files, and each stage gets the
same input on both sides. Bounds: parity.BOUNDS.
"""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import parity, reference
from tests.models.cases import PROMPTS, REQUESTS, SHORT, complete
from tests.models.reference import normal, random_picture


def test_prompts_become_the_same_token_ids(model):
    ours = model.run([{"stage": "tokens", "prompt": prompt, "out": name} for name, prompt in PROMPTS.items()])
    for name, prompt in PROMPTS.items():
        assert ours[name].int().tolist() == reference.ids(model.pipe, prompt).tolist(), name
    assert len(ours["long"]) == 512


def test_the_text_encoder_gives_the_same_features(model):
    ours = model.run([{"stage": "features", "prompt": prompt, "out": name} for name, prompt in PROMPTS.items()])
    for name, prompt in PROMPTS.items():
        parity.assert_parity("features", ours[name], reference.features(model.pipe, prompt), (model.name, name))


# Tokens of a picture: 1 and 35 are padded to the next 32, 32 and 64 are not; none is square but the first and last.
LATENT_SIZES = [(2, 2), (10, 14), (8, 16), (4, 64), (16, 16)]
CAPTION_TOKENS = [1, 31, 32, 33, 130]


def test_one_transformer_call_gives_the_same_output(model):
    channels, width = model.pipe.transformer.config.in_channels, model.pipe.transformer.config.cap_feat_dim
    inputs = {f"latents {h}x{w}": normal(1, channels, h, w, seed=h * w) for h, w in LATENT_SIZES}
    inputs |= {f"features {n}": 2 * normal(n, width, seed=n) for n in CAPTION_TOKENS}
    inputs["latents of a batch"] = normal(3, channels, 6, 10)
    # Every size with some caption, every caption with some size.
    cases = [(f"latents {h}x{w}", "features 33", 0.25) for h, w in LATENT_SIZES]
    cases += [("latents 10x14", f"features {n}", 0.9) for n in CAPTION_TOKENS]
    cases += [("latents 8x16", "features 32", time) for time in (0.0, 0.045454502, 1.0)]
    cases += [("latents of a batch", "features 31", 0.5)]
    ours = model.run(
        [
            {"stage": "transformer", "latents": x, "features": f, "time": t, "out": f"{i}"}
            for i, (x, f, t) in enumerate(cases)
        ],
        inputs,
    )
    for i, (x, f, t) in enumerate(cases):
        expected = reference.transformer(model.pipe, inputs[x], inputs[f], t)
        parity.assert_parity("transformer", ours[f"{i}"], expected, (model.name, x, f, t))


def test_sigmas_are_the_same_bit_for_bit(model):
    from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas

    multiple = model.pipe.vae_scale_factor * 2
    cases = list(itertools.product([1, 2, 3, 4, 7, 8, 9, 20, 28, 50, 100], [(1, 1), (16, 16), (64, 48)]))
    ours = model.run(
        [
            {"stage": "sigmas", "steps": n, "width": w * multiple, "height": h * multiple, "out": f"{n} {h}x{w}"}
            for n, (h, w) in cases
        ]
    )
    scheduler = model.pipe.scheduler
    for n, (h, w) in cases:
        mu = calculate_shift(h * w)
        scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(n), mu=mu)
        parity.assert_parity("sigmas", ours[f"{n} {h}x{w}"], scheduler.sigmas, (model.name, n, h, w))


def test_the_decoder_gives_the_same_picture(model):
    channels = model.pipe.vae.config.latent_channels
    inputs = {f"{h}x{w}": normal(n, channels, h, w) for n, h, w in [(1, 2, 2), (1, 6, 10), (2, 8, 4)]}
    ours = model.run([{"stage": "decode", "latents": name, "out": name} for name in inputs], inputs)
    for name, latents in inputs.items():
        parity.assert_parity("decode", ours[name], reference.decode(model.pipe, latents), (model.name, name))


def test_the_encoder_gives_the_same_latents(model):
    scale, config = model.pipe.vae_scale_factor, model.pipe.vae.config
    inputs, sizes = {}, [(2, 2), (6, 10), (8, 4)]
    for h, w in sizes:
        inputs[f"image {h}x{w}"] = random_picture(h * scale, w * scale)
        inputs[f"noise {h}x{w}"] = normal(1, config.latent_channels, h, w, seed=5)
    ours = model.run(
        [
            {"stage": "encode", "image": f"image {h}x{w}", "noise": f"noise {h}x{w}", "out": f"{h}x{w}"}
            for h, w in sizes
        ],
        inputs,
    )
    for h, w in sizes:
        expected = reference.encode(model.pipe, inputs[f"image {h}x{w}"], inputs[f"noise {h}x{w}"])
        parity.assert_parity("encode", ours[f"{h}x{w}"], expected, (model.name, h, w))


def test_every_step_leaves_the_same_latents(model):
    multiple = model.pipe.vae_scale_factor * 2
    size = (5 * multiple, 7 * multiple)
    picture = random_picture(*size)
    requests = {name: complete(request, size) for name, request in REQUESTS.items()}
    ours = model.run(
        [{"stage": "latents", "request": request, "out": name} for name, request in requests.items()],
        {"picture": picture},
    )
    for name, request in requests.items():
        expected = reference.latents(model.pipe, request, picture)
        # The engine also tells what it started from.
        parity.assert_parity("latents", ours[name][1:], expected, (model.name, name))


def test_the_first_noise_is_the_reference_generators(random_model):
    model = random_model("small")
    request = complete({"prompt": "", "steps": 1, "seed": 1234}, (48, 80))
    ours = model.run([{"stage": "latents", "request": request, "out": "steps"}])["steps"][0]
    generator = torch.Generator("cpu").manual_seed(1234)
    assert torch.equal(ours, torch.randn(1, 16, 6, 10, generator=generator)[0])


# --- The tests can fail --------------------------------------------------------------------------------------------


def changed(folder, to, component, tensor, change):
    """A copy of a model with one tensor changed."""
    import shutil

    shutil.copytree(folder, to)
    (file,) = (to / component).glob("*.safetensors")
    tensors = load_file(file)
    change(tensors[tensor])
    save_file(tensors, file, {"format": "pt"})
    return to


def scale_one_row(tensor):
    tensor[1] *= 1.1


@pytest.mark.parametrize(
    ("component", "tensor", "stage"),
    [
        ("text_encoder", "layers.1.self_attn.k_norm.weight", "features"),
        ("text_encoder", "layers.0.mlp.up_proj.weight", "features"),
        ("transformer", "cap_pad_token", "transformer"),
        ("transformer", "x_pad_token", "transformer"),
        ("transformer", "context_refiner.0.ffn_norm2.weight", "transformer"),
        ("transformer", "layers.1.adaLN_modulation.0.bias", "transformer"),
        ("transformer", "layers.0.attention.norm_k.weight", "transformer"),
        ("vae", "decoder.mid_block.attentions.0.to_k.weight", "decode"),
        ("vae", "decoder.up_blocks.2.resnets.0.norm1.bias", "decode"),
        ("vae", "encoder.down_blocks.1.resnets.0.conv2.weight", "encode"),
    ],
)
def test_a_tenth_more_in_one_row_of_one_weight_is_seen(random_model, tmp_path, component, tensor, stage):
    model = random_model("small")
    inputs = {"latents": normal(1, 16, 6, 10), "features": normal(9, 32), "image": random_picture(48, 80)}
    stages = {
        "features": {"stage": "features", "prompt": SHORT, "out": "out"},
        "transformer": {
            "stage": "transformer",
            "latents": "latents",
            "features": "features",
            "time": 0.4,
            "out": "out",
        },
        "decode": {"stage": "decode", "latents": "latents", "out": "out"},
        "encode": {"stage": "encode", "image": "image", "noise": "latents", "out": "out"},
    }

    def row_or_value(values):
        scale_one_row(values if values.shape[0] > 1 else values[0])

    other = changed(model.folder, tmp_path / "changed", component, tensor, row_or_value)
    right = model.run([stages[stage]], inputs)["out"]
    wrong = model.run([stages[stage]], inputs, folder=other)["out"]
    assert parity.relative_error(wrong, right) > 3 * parity.BOUNDS[stage]
