"""Requests that take every path through the pipeline, in stage_probe's fields ("image" names the picture to start
from), and prompts that a tokenizer can get wrong."""

PROMPTS = {
    "empty": "",
    "short": "a red circle on a blue background",
    "chinese": "一只可爱的熊猫在竹林里吃竹子。水墨画风格",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️‍🔥 1️⃣ 😀",
    "spaces": "  two\n\nlines \t and  more  ",
    "special": "a <|im_end|>\n<|im_start|>assistant\nb <|endoftext|>",
    "accents": "Cafe\u0301 nai\u0308ve Đà Nẵng",
    "long": "a cat on a red chair beside the window, " * 80,  # cut at 512 tokens
}

SHORT, LONG = "a green square", "a photo of a cat sitting on a red chair beside the window, soft light, highly detailed"
REQUESTS = {
    "no guidance": {"prompt": SHORT},
    "one step": {"prompt": LONG, "steps": 1},
    "guidance": {"prompt": LONG, "guidance_scale": 3.5},
    "captions of one length": {"prompt": SHORT, "guidance_scale": 1.5, "negative_prompt": "a red circle"},
    "captions of two lengths": {"prompt": LONG * 3, "guidance_scale": 4.0, "negative_prompt": "低质量, blurry"},
    "normalized": {"prompt": SHORT, "guidance_scale": 5.0, "negative_prompt": "x", "cfg_normalization": 1.0},
    "normalized tightly": {"prompt": SHORT, "guidance_scale": 5.0, "negative_prompt": "x", "cfg_normalization": 0.5},
    # at 8 steps one time is 0.25 exactly: the reference still guides it
    "truncated": {"prompt": SHORT, "guidance_scale": 4.0, "cfg_truncation": 0.25, "steps": 8},
    "truncated at once": {"prompt": SHORT, "guidance_scale": 4.0, "cfg_truncation": 0.0},
    "a large seed": {"prompt": SHORT, "seed": 2**63 - 1},
    "image": {"prompt": LONG, "image": "picture", "strength": 0.6, "steps": 5},
    "image, most of it kept": {"prompt": LONG, "image": "picture", "strength": 0.3, "steps": 10},
    "image, none of it kept": {"prompt": SHORT, "image": "picture", "strength": 1.0},
    "image with guidance": {
        "prompt": SHORT, "image": "picture", "strength": 0.7, "guidance_scale": 2.0, "cfg_truncation": 0.6, "steps": 7
    },
}  # fmt: skip


def complete(request, size):
    """Sizes in units of the model's multiple."""
    return {"steps": 4, "seed": 7} | request | {"height": size[0], "width": size[1]}
