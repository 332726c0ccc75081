"""Writes seeds for the fuzzers: make_corpus.py FOLDER makes FOLDER/tokenizer/, image/ and safetensors/."""

import io
import json
import pathlib
import sys

from PIL import Image, PngImagePlugin

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_seeds():
    visible = [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in visible] + [chr(0x100 + i) for i in range(256 - len(visible))]
    vocab = {letter: i for i, letter in enumerate(letters)} | {"ab": 256, "Ġa": 257}
    split = {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    token = {
        "id": 258,
        "content": "<|im_end|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [["a", "b"], ["Ġ", "a"]],
    }
    full = {
        "version": "1.0",
        "added_tokens": [token],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    plain = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "added_tokens": [token | {"normalized": True}],
        "pre_tokenizer": byte_level | {"use_regex": True},
        "model": model | {"merges": ["a b", "Ġ a"], "ignore_merges": True},
    }
    for content in (full, plain):
        yield b"\0" + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    for text in (
        "It's a café e\u0301\u0316 <|im_end|>\r\n  abc 123",
        "👩‍👩‍👧 가각 ᄀ\u1161 مَرْ",
        "\u00a0\u0085\u2028\t'\u017f",
        "<|im_" * 40,
        "\u0301\u0316" * 50,
    ):
        yield b"\1" + text.encode()


def image_seeds():
    rgb = Image.radial_gradient("L").resize((24, 17)).convert("RGB")
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 8, Seed: 7")
    info.add_itxt("diffusionz", '{"prompt":"漢字"}')
    zipped = PngImagePlugin.PngInfo()
    zipped.add_text("parameters", "x" * 500, zip=True)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "猫".encode("utf-16-be")
    images = [
        (rgb, {"format": "PNG", "pnginfo": info}),
        (rgba, {"format": "PNG", "pnginfo": zipped}),
        (rgb.convert("P"), {"format": "PNG", "bits": 4}),
        (rgb.convert("L").convert("I;16"), {"format": "PNG"}),
        (rgb, {"format": "WEBP", "exif": exif.tobytes(), "xmp": b"<diffusionz:parameters>{}</diffusionz:parameters>"}),
        (rgba, {"format": "WEBP", "quality": 30}),
        (rgba, {"format": "WEBP", "lossless": True}),
        (rgb, {"format": "WEBP", "save_all": True, "append_images": [rgba]}),
    ]
    for image, options in images:
        out = io.BytesIO()
        image.save(out, **options)
        yield out.getvalue()
    metadata = {"prompt": "a \0 cat", "negative_prompt": "<&>", "steps": 8, "guidance_scale": 3.5, "seed": 7}
    yield json.dumps(metadata | {"model": "a,b", "lora": "x.safetensors", "lora_weight": 1}).encode()
    directory = b"MM\0*\0\0\0\x08\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x1a\0\0\0\0"
    yield directory + b"\0\1\x92\x86\0\7\0\0\0\x0e\0\0\0\x2c\0\0\0\0UNICODE\0\0a\xd8\0\xdc\0"


def safetensors_seeds():
    def file(header, body=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    def tensor(dtype, shape, begin, end):
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    metadata = {"__metadata__": {"k": "v"}}
    yield file({"a": tensor("F32", [2, 3], 0, 24), "b.c": tensor("BF16", [2], 24, 28)} | metadata, bytes(28))
    odd = {"scalar": tensor("F64", [], 0, 8), "empty": tensor("F16", [0, 4], 8, 8), "ids": tensor("I64", [1], 8, 16)}
    yield file(odd, bytes(16))
    # Lies: about its own length, a shape's product, offsets, two tensors in one place.
    yield file({"a": tensor("F32", [2**33, 2**33], 0, 24)}, bytes(24))
    yield file({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12))
    yield file({"a": tensor("U8", [4], 8, 4)}, bytes(8))
    yield (2**63).to_bytes(8, "little") + b"{}"
    yield file(b"[" * 5000)


def main():
    corpus = {"tokenizer": tokenizer_seeds(), "image": image_seeds(), "safetensors": safetensors_seeds()}
    for name, seeds in corpus.items():
        folder = pathlib.Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(seeds):
            (folder / f"{i:02}").write_bytes(seed)


if __name__ == "__main__":
    main()
