"""diffusers' side of each stage, and inputs for both sides."""

import warnings

import torch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_picture(height, width, seed=0):
    """Smooth shapes and some noise, uint8 values [height, width, 3]."""
    coarse = torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (255 * smooth + 8 * normal(1, 3, height, width, seed=seed)).clamp(0, 255).round()[0].permute(1, 2, 0)


def ids(pipe, prompt):
    """As ZImagePipeline._encode_prompt makes them."""
    messages = [{"role": "user", "content": prompt}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    text = pipe.tokenizer.apply_chat_template(messages, **options)
    return pipe.tokenizer(text, max_length=512, truncation=True, return_tensors="pt").input_ids[0]


@torch.no_grad()
def features(pipe, prompt):
    return pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[0][0]


@torch.no_grad()
def transformer(pipe, latents, caption, time):
    """latents [n, c, h, w]; one caption for all of them."""
    pictures, times = list(latents.unsqueeze(2)), torch.full((latents.shape[0],), time)
    out = pipe.transformer(pictures, times, [caption] * len(pictures), return_dict=False)[0]
    return torch.stack(out).squeeze(2)


@torch.no_grad()
def decode(pipe, latents):
    return pipe.vae.decode(latents, return_dict=False)[0]


@torch.no_grad()
def encode(pipe, picture, noise):
    """uint8-valued [h, w, 3] to the scaled sample of the posterior that `noise` draws."""
    pixels = picture.permute(2, 0, 1).unsqueeze(0) / 255 * 2 - 1
    posterior = pipe.vae.encode(pixels.to(pipe.vae.dtype)).latent_dist
    sample = posterior.mean + posterior.std * noise
    return (sample - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def draw(pipe, request, picture=None, output="pil"):
    """(the pipeline's pictures, the latents after each of its steps). `request` has stage_probe's fields; its prompt
    and seed may be lists, which makes a batch."""
    from diffusers import ZImageImg2ImgPipeline
    from PIL import Image

    steps = []

    def keep(_pipe, _step, _time, values):
        steps.append(values["latents"].clone())
        return values

    seeds = request["seed"] if isinstance(request["seed"], list) else [request["seed"]]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    options = {
        "prompt": request["prompt"], "height": request["height"], "width": request["width"],
        "num_inference_steps": request["steps"], "guidance_scale": request.get("guidance_scale", 0.0),
        "negative_prompt": request.get("negative_prompt"), "cfg_normalization": request.get("cfg_normalization", 0.0),
        "cfg_truncation": request.get("cfg_truncation", 1.0), "callback_on_step_end": keep, "output_type": output,
        "generator": generators if len(generators) > 1 else generators[0],
    }  # fmt: skip
    if "image" in request:
        pipe = ZImageImg2ImgPipeline(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        options["image"] = Image.fromarray(picture.byte().numpy())
        options["strength"] = request["strength"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(**options).images, steps


def latents(pipe, request, picture=None):
    """The latents after each of the pipeline's steps [steps, c, h, w]."""
    return torch.cat(draw(pipe, request, picture, "latent")[1])


def pictures(pipe, request, picture=None):
    """uint8 [n, height, width, 3]."""
    import numpy

    return torch.stack([torch.from_numpy(numpy.array(image)) for image in draw(pipe, request, picture)[0]])
