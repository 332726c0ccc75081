"""WebP and PNG: Pillow reads what we write and writes what we read, and the metadata comes back byte for byte."""

import io
import json
import random
import struct
import subprocess
import zlib

import pytest
from PIL import Image, PngImagePlugin

LOSSLESS = ["png", "webp_lossless"]
FORMATS = ["png", "webp_lossless", "webp"]
PARAMETERS = {
    "prompt": "a red circle",
    "negative_prompt": "blurry",
    "width": 48,
    "height": 32,
    "steps": 8,
    "guidance_scale": 3.2,
    "seed": 2**63 - 1,
    "model": "demo",
    "lora": "ink.safetensors",
    "lora_weight": 0.8,
    "strength": 0.6,
    "version": "diffusionz 0.1.0",
}
TEXT = (
    "a red circle <lora:ink:0.8>\nNegative prompt: blurry\n"
    "Steps: 8, Sampler: Euler, CFG scale: 4.2, Seed: 9223372036854775807, Size: 48x32, Model: demo, "
    "Denoising strength: 0.6, Version: diffusionz 0.1.0"
)


def picture(width=48, height=32):
    """Smooth colours with sharp edges and a little noise."""
    rng = random.Random(width * 1000 + height)
    image = Image.new("RGB", (width, height))
    for y in range(height):
        for x in range(width):
            edge = 255 if (x // 8 + y // 8) % 2 else 0
            image.putpixel((x, y), (x * 255 // width, edge, (y * 255 // height + rng.randrange(8)) % 256))
    return image


@pytest.fixture
def tool(probe, tmp_path):
    """Runs image_probe on bytes."""

    class Tool:
        def call(self, *args):
            done = subprocess.run(
                [probe("image_probe"), *map(str, args)], capture_output=True, timeout=600, check=False
            )
            if done.returncode:
                message = done.stderr.decode()
                assert done.returncode == 1 and message.count("\n") == 1, message
                raise RuntimeError(message.strip())
            assert done.stderr == b""
            return done.stdout

        def encode(self, image, kind, quality=90, metadata=None):
            (tmp_path / "in.rgb").write_bytes(image.tobytes())
            if metadata is not None:
                (tmp_path / "in.json").write_bytes(metadata.encode())
            json_path = tmp_path / "in.json" if metadata is not None else "-"
            self.call("encode", kind, *image.size, quality, tmp_path / "in.rgb", json_path, tmp_path / "out.img")
            return (tmp_path / "out.img").read_bytes()

        def decode(self, data):
            (tmp_path / "in.img").write_bytes(data)
            width, height = map(int, self.call("decode", tmp_path / "in.img", tmp_path / "out.rgb").split())
            return Image.frombytes("RGB", (width, height), (tmp_path / "out.rgb").read_bytes())

        def metadata(self, data):
            (tmp_path / "in.img").write_bytes(data)
            return self.call("metadata", tmp_path / "in.img").decode()

        def check(self, many):
            """'ok' or the message for each of many files."""
            paths = []
            for i, data in enumerate(many):
                paths.append(tmp_path / f"{i}.img")
                paths[-1].write_bytes(data)
            return self.call("check", *paths).decode().splitlines()

    return Tool()


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def difference(a, b):
    """The largest and the mean difference of two pictures' channels."""
    assert a.size == b.size
    pairs = list(zip(a.convert("RGB").tobytes(), b.convert("RGB").tobytes(), strict=True))
    return max(abs(x - y) for x, y in pairs), sum(abs(x - y) for x, y in pairs) / len(pairs)


def user_comment(data):
    raw = opened(data).getexif().get_ifd(0x8769)[0x9286]
    assert raw[:8] == b"UNICODE\0"
    return raw[8:].decode("utf-16-be")


# --- Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (48, 32), (257, 16)])
@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_are_exact(tool, kind, size):
    image = picture(*size)
    data = tool.encode(image, kind)
    assert opened(data).mode == "RGB"
    assert difference(opened(data), image) == (0, 0)
    assert difference(tool.decode(data), image) == (0, 0)


def test_lossy_webp_is_close_and_obeys_quality(tool):
    smooth = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * k).resize((96, 64)) for k in range(3)])
    sizes = [len(tool.encode(smooth, "webp", quality)) for quality in (0, 50, 88, 89, 100)]
    assert sizes == sorted(set(sizes))
    data = tool.encode(smooth, "webp", 95)
    assert difference(opened(data), smooth)[1] < 2
    assert difference(tool.decode(data), opened(data)) == (0, 0)


@pytest.mark.parametrize("size", [(48, 32), (70, 300), (71, 301)])  # the tall ones have several strips
def test_sharp_chroma(tool, size):
    """Edges between colours: halving chroma by the plain average, as Pillow does, loses more with the same encoder."""
    image = picture(*size)
    ours = difference(opened(tool.encode(image, "webp", 90)), image)[1]
    assert ours < 0.88 * difference(opened(saved(image, "WEBP", quality=90, method=0)), image)[1]


@pytest.mark.parametrize("size", [(1, 1), (3, 300), (300, 3), (4, 4), (5, 137), (33, 128), (33, 129)])
def test_lossy_webp_of_any_size(tool, size):
    image = Image.new("RGB", size, (200, 100, 50))
    assert difference(tool.decode(tool.encode(image, "webp", 95)), image)[0] <= 3


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_call_gives_the_same_bytes(tool, kind):
    assert tool.encode(picture(), kind, 80, json.dumps(PARAMETERS)) == tool.encode(
        picture(), kind, 80, json.dumps(PARAMETERS)
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_metadata_leaves_the_picture_alone(tool, kind):
    plain, told = tool.encode(picture(), kind), tool.encode(picture(), kind, metadata="{}")
    assert tool.decode(plain).tobytes() == tool.decode(told).tobytes()


# --- Metadata ---------------------------------------------------------------------------------------------------------

AWKWARD = [
    "{}",
    ' {"prompt" : "spaces outside", "a":[1, 2.50, null]}\r\n',
    json.dumps({"prompt": "emoji 👩‍👩‍👧‍👦 🇩🇪 and 一只熊猫 \U0010ffff"}, ensure_ascii=False),
    json.dumps({"prompt": "quotes \" ' \\ and <tags> & &amp; ]]> </diffusionz:parameters>"}),
    json.dumps({"prompt": "lines\nand\r\ntabs\t and \x00 control \x1b"}),
    json.dumps({"prompt": "Latin-1: café"}, ensure_ascii=False),
    json.dumps({"prompt": "long 长 " * 10_000}, ensure_ascii=False),
    json.dumps(PARAMETERS),
]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("metadata", AWKWARD, ids=range(len(AWKWARD)))
def test_metadata_comes_back_byte_for_byte(tool, kind, metadata):
    data = tool.encode(picture(), kind, metadata=metadata)
    assert tool.metadata(data) == metadata
    prompt = json.loads(metadata).get("prompt")
    if prompt is not None:  # and other tools see the prompt
        text = opened(data).text["parameters"] if kind == "png" else user_comment(data)
        assert text.startswith(prompt.replace("\0", " "))


@pytest.mark.parametrize("kind", FORMATS)
def test_parameters_are_written_as_a1111_does(tool, kind):
    data = tool.encode(picture(), kind, metadata=json.dumps(PARAMETERS))
    assert (opened(data).text["parameters"] if kind == "png" else user_comment(data)) == TEXT


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"parameters": "as it is"}, "as it is"),
        ({"prompt": "p", "parameters": "wins"}, "wins"),
        ({"prompt": "p"}, "p\nSampler: Euler"),
        ({"prompt": "", "negative_prompt": "", "steps": 4, "lora": None}, "\nSteps: 4, Sampler: Euler"),
        ({"prompt": "p", "guidance_scale": 0}, "p\nSampler: Euler, CFG scale: 1"),
        ({"prompt": "p", "model": 'a, "b": c'}, 'p\nSampler: Euler, Model: "a, \\"b\\": c"'),
    ],
)
def test_parameters_text(tool, metadata, text):
    assert opened(tool.encode(picture(), "png", metadata=json.dumps(metadata))).text["parameters"] == text


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("metadata", ["[]", "not JSON", '{"a":', '"text"', "{} {}"])
def test_metadata_must_be_an_object(tool, kind, metadata):
    with pytest.raises(RuntimeError, match="the metadata is not a JSON object"):
        tool.encode(picture(), kind, metadata=metadata)
    with pytest.raises(RuntimeError, match="the metadata has 5000002 bytes; at most 4194304"):
        tool.encode(picture(), kind, metadata="{" + " " * 5_000_000 + "}")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_without_metadata(tool, kind):
    assert tool.metadata(tool.encode(picture(), kind)) == "{}"


@pytest.mark.parametrize("text", ["plain", "café", "漢字 👍\nSteps: 8", "x" * 100_000])
@pytest.mark.parametrize("compressed", [False, True])
def test_parameters_of_other_tools_in_png(tool, text, compressed):
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "other")
    info.add_text("parameters", text, zip=compressed)  # tEXt or zTXt, iTXt where Latin-1 does not do
    assert json.loads(tool.metadata(saved(picture(), "PNG", pnginfo=info))) == {"parameters": text}


def test_text_behind_the_picture_is_read(tool):
    data = saved(picture(), "PNG")
    chunk = b"tEXtparameters\0late"
    late = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert tool.metadata(data[:-12] + late + data[-12:]) == '{"parameters":"late"}'


@pytest.mark.parametrize("text", ["plain", "漢字 👍\nSteps: 8"])
@pytest.mark.parametrize("encoding", ["MM", "II", "ascii"])
def test_parameters_of_other_tools_in_webp(tool, text, encoding):
    order, codec = ("<", "utf-16-le") if encoding == "II" else (">", "utf-16-be")
    comment = b"ASCII\0\0\0" + text.encode() if encoding == "ascii" else b"UNICODE\0" + text.encode(codec)
    exif = b"II*\0" if order == "<" else b"MM\0*"
    exif += struct.pack(order + "IHHHIII", 8, 1, 0x8769, 4, 1, 26, 0) + struct.pack(
        order + "HHHIII", 1, 0x9286, 7, len(comment), 44, 0
    )
    for marker in (b"", b"Exif\0\0"):
        data = saved(picture(), "WEBP", exif=marker + exif + comment)
        assert json.loads(tool.metadata(data)) == {"parameters": text}


# --- What Pillow writes -----------------------------------------------------------------------------------------------


def rgba():
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def over_black(image):
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")


PNGS = {
    "rgb": picture(),
    "gray": picture().convert("L"),
    "one bit": picture().convert("1"),
    "palette": picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=200),
    "small palette": picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=5),
    "alpha": rgba(),
    "gray alpha": rgba().convert("LA"),
}


@pytest.mark.parametrize("name", PNGS)
def test_png_of_every_kind(tool, name):
    image = PNGS[name]
    assert difference(tool.decode(saved(image, "PNG")), over_black(image))[0] <= 1  # rounding of alpha


def test_png_with_a_transparent_colour(tool):
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    image.putpixel((1, 1), (200, 100, 50))
    decoded = tool.decode(saved(image, "PNG", transparency=(10, 20, 30)))
    assert decoded.getpixel((0, 0)) == (0, 0, 0) and decoded.getpixel((1, 1)) == (200, 100, 50)


def make_png(width, height, depth, color_type, rows, interlace=0):
    """A PNG of raw filtered rows."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_png_of_16_bits(tool):
    values = [0, 128, 257, 32768, 65535, 1000]
    row = b"\0" + struct.pack(">6H", *values)
    decoded = tool.decode(make_png(2, 1, 16, 2, row)).tobytes()
    assert list(decoded) == [round(value / 257) for value in values]


def test_interlaced_png(tool):
    image = picture(9, 11)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b""
    for x0, y0, dx, dy in passes:
        for y in range(y0, image.height, dy):
            line = b"".join(bytes(image.getpixel((x, y))) for x in range(x0, image.width, dx))
            rows += b"\0" + line if line else b""
    data = make_png(9, 11, 8, 2, rows, interlace=1)
    assert difference(opened(data), image) == (0, 0)
    assert difference(tool.decode(data), image) == (0, 0)


@pytest.mark.parametrize("lossless", [False, True])
def test_webp_with_alpha(tool, lossless):
    data = saved(rgba(), "WEBP", lossless=lossless, exact=True)
    assert difference(tool.decode(data), over_black(opened(data)))[0] <= 1


# --- What is refused --------------------------------------------------------------------------------------------------


def test_other_formats_are_named_by_their_first_bytes(tool):
    for data, first in (
        (saved(picture(), "JPEG"), "ff d8 ff e0"),
        (b"GIF89a", "47 49 46 38 39 61"),
        (b"", "0 bytes that begin with nothing"),
    ):
        with pytest.raises(RuntimeError, match=f"not a PNG or WebP.*{first}"):
            tool.decode(data)
        with pytest.raises(RuntimeError, match="not a PNG or WebP"):
            tool.metadata(data)


def test_animations_are_refused(tool):
    data = saved(picture(), "WEBP", save_all=True, append_images=[Image.new("RGB", (48, 32))], duration=100)
    with pytest.raises(RuntimeError, match="WebP: it is an animation; only still pictures are read"):
        tool.decode(data)


@pytest.mark.parametrize(("kind", "most"), [("webp", 16383), ("webp_lossless", 16383), ("png", 16384)])
@pytest.mark.parametrize(("width", "height"), [(16385, 1), (1, 16385), (0, 1), (1, -1)])
def test_sizes_out_of_range(tool, tmp_path, kind, most, width, height):
    (tmp_path / "in.rgb").write_bytes(b"")
    with pytest.raises(RuntimeError, match=f"the picture is {width} x {height}; each side must be 1..{most}"):
        tool.call("encode", kind, width, height, 90, tmp_path / "in.rgb", "-", tmp_path / "out")


@pytest.mark.parametrize(("kind", "side"), [("webp", 16383), ("png", 16384)])
def test_the_longest_side(tool, kind, side):
    image = Image.new("RGB", (side, 1), (1, 2, 3))
    assert tool.decode(tool.encode(image, kind)).size == (side, 1)


@pytest.mark.parametrize("quality", [-1, 101])
def test_quality_out_of_range(tool, quality):
    with pytest.raises(RuntimeError, match=f"quality is {quality}; it must be 0..100"):
        tool.encode(picture(), "webp", quality)


def test_decompression_bombs(tool):
    with pytest.raises(RuntimeError, match=r"the picture is 100000 x 100000; each side must be 1\.\.16384"):
        tool.decode(make_png(100_000, 100_000, 8, 2, b""))
    with pytest.raises(RuntimeError, match=r"PNG: .* bytes are too few for 16384 x 16384"):
        tool.decode(make_png(16384, 16384, 8, 2, b"\0" * 100))
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 50_000_000, zip=True)
    assert tool.metadata(saved(picture(), "PNG", pnginfo=info)) in ("{}", '{"parameters":""}')


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_are_refused(tool, kind):
    data = tool.encode(picture(), kind, metadata=json.dumps(PARAMETERS))
    ends = [*range(0, len(data), 50), len(data) - 1]
    for end, line in zip(ends, tool.check(data[:end] for end in ends), strict=True):
        assert line.startswith(("PNG: ", "WebP: ", "not a PNG or WebP")), (end, line)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_end_in_a_picture_or_an_error(tool, kind):
    data = tool.encode(picture(), kind, metadata=json.dumps(PARAMETERS))
    damaged = [
        data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :] for i in range(0, len(data), 50) for flip in (0xFF, 0x01)
    ]
    for line in tool.check(damaged):
        assert line.startswith(("ok", "PNG: ", "WebP: ", "not a PNG or WebP")), line
