"""`Image`: files that other programs read, parameters inside, and saving that never leaves half a file."""

from __future__ import annotations

import io
import os
import pathlib
import stat

import numpy
import PIL.Image
import pytest

from diffusionz import ArgumentError, Image, ImageError, ZImage
from diffusionz.image import read_metadata, write_atomically


@pytest.fixture(scope="module")
def image(engine: ZImage) -> Image:
    return engine.generate('a "quoted" prompt, 日本語', width=48, height=32, steps=1, seed=3, progress=False)


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data))


@pytest.mark.parametrize("extension", [".png", ".PNG", ".webp"])
def test_a_saved_file_is_what_it_says(image: Image, tmp_path: pathlib.Path, extension: str) -> None:
    path = tmp_path / f"out{extension}"
    image.save(path, lossless=True)
    with PIL.Image.open(path) as picture:
        assert picture.format == extension[1:].upper()
        assert (numpy.asarray(picture.convert("RGB")) == image.pixels).all()
    assert read_metadata(path.read_bytes()) == image.metadata
    assert os.listdir(tmp_path) == [path.name]


def test_lossy_webp_is_close_and_smaller(engine: ZImage) -> None:
    image = engine.generate("x", width=128, height=128, steps=1, seed=1, progress=False)
    image.pixels[:] = numpy.linspace(0, 255, 128)[None, :, None]  # noise would be as large at any quality
    low, high = image.encode("webp", quality=10), image.encode("webp", quality=100)
    assert len(low) < len(high)
    assert numpy.abs(numpy.asarray(opened(high).convert("RGB")).astype(int) - image.pixels).mean() < 3
    assert image.webp == image.encode("webp", quality=90)
    assert read_metadata(low) == image.metadata


def test_png_and_notebooks(image: Image) -> None:
    assert (numpy.asarray(opened(image.png)) == image.pixels).all()
    assert image._repr_png_() == image.png


def test_other_programs_find_the_parameters(image: Image) -> None:
    """In a PNG's text chunk of the name that image viewers and web UIs look for."""
    text = opened(image.png).text  # type: ignore[attr-defined]
    assert "parameters" in text
    assert 'a "quoted" prompt, 日本語' in text["parameters"]
    assert "Seed: 3" in text["parameters"]


def test_arrays(image: Image) -> None:
    assert (numpy.asarray(image) == image.pixels).all()
    assert numpy.asarray(image, dtype=numpy.float32).dtype == numpy.float32
    assert PIL.Image.fromarray(image.pixels).size == (48, 32)


def test_what_is_painted_on_the_pixels_is_saved(engine: ZImage) -> None:
    image = engine.generate("x", width=16, height=16, steps=1, seed=0, progress=False)
    image.pixels[:] = 200
    assert (numpy.asarray(opened(image.png)) == 200).all()


def test_wrong_arguments(image: Image, tmp_path: pathlib.Path) -> None:
    for name in ("out.jpg", "out", ".png", "out.png.bak"):
        with pytest.raises(ArgumentError, match=r"\.png"):
            image.save(tmp_path / name)
    with pytest.raises(ArgumentError, match="gif"):
        image.encode("gif")
    with pytest.raises(ArgumentError, match="101"):
        image.encode(quality=101)
    assert os.listdir(tmp_path) == []


def test_files_that_cannot_be_written(image: Image, tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError):
        image.save(tmp_path / "folder.png")
    with pytest.raises(FileNotFoundError) as raised:
        image.save(tmp_path / "nowhere" / "out.png")
    assert raised.value.filename == str(tmp_path / "nowhere" / "out.png")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        image.save(tmp_path / "file" / "out.png")


def test_what_is_no_picture() -> None:
    for data in (b"", b"x", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n", b"RIFF\x04\0\0\0WEBP"):
        with pytest.raises(ImageError):
            read_metadata(data)


def test_a_picture_without_parameters() -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(file, "PNG")
    assert read_metadata(file.getvalue()) == {}


def test_a_failed_write_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.png"]


def test_mode_links_and_pipes(tmp_path: pathlib.Path) -> None:
    path, link, pipe = tmp_path / "out.png", tmp_path / "link.png", tmp_path / "pipe.png"
    path.write_bytes(b"old")
    path.chmod(0o600)
    link.symlink_to(path)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "fresh.png", b"x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "fresh.png").stat().st_mode) == 0o640

    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
