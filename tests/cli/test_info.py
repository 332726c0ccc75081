"""`diffusionz info`: the library, a model, a picture."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import PIL.Image
import pytest

import diffusionz

PROGRAM = str(pathlib.Path(sys.executable).with_name("diffusionz"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, "info", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_the_library() -> None:
    about = json.loads(run("--json").stdout)
    assert about["version"] == diffusionz.__version__
    assert about["abi_version"] == 1
    assert about["devices"][0]["device"] == "cpu"
    assert about["devices"][0]["memory_total_bytes"] > about["devices"][0]["memory_free_bytes"] > 0
    assert pathlib.Path(about["include_dir"], "diffusionz_c_api.h").is_file()
    assert pathlib.Path(about["library_dir"], "libdiffusionz.so").is_file()
    assert pathlib.Path(about["pkgconfig_dir"], "diffusionz.pc").is_file()
    for name, folder in about["bundled_models"].items():
        config = "model_index.json" if name.startswith("zimage-") else "config.json"
        assert pathlib.Path(folder, config).is_file()
    text = run().stdout
    assert f"version: {diffusionz.__version__}\n" in text
    assert "demo" in text


def test_a_model(tiny_model: pathlib.Path) -> None:
    about = json.loads(run(tiny_model, "--json").stdout)
    assert about["layout"] == "diffusers"
    assert about["pipeline"] == "ZImagePipeline"
    assert set(about["components"]) == {"transformer", "text_encoder", "vae"}
    for component in about["components"].values():
        assert component["parameters"] > 0
        assert component["bytes"] > 0
    assert "scheduler" in about
    text = run(tiny_model).stdout
    assert "transformer:" in text
    assert "MiB" in text


def test_a_bundled_model_by_name() -> None:
    bundled = json.loads(run("--json").stdout)["bundled_models"]
    for name in bundled:
        done = run(name, "--json")
        assert json.loads(done.stdout)["model"] == name, done.stderr


def test_a_name_that_models_share_describes_each() -> None:
    bundled = json.loads(run("--json").stdout)["bundled_models"]
    sharing = [name for name in bundled if name.endswith("-demo")]
    about = json.loads(run("demo", "--json").stdout)
    assert list(about) == sharing if len(sharing) > 1 else about["model"] == "demo"


def test_a_forecaster(tiny_chronos: pathlib.Path) -> None:
    about = json.loads(run(tiny_chronos, "--json").stdout)
    assert about["layout"] == "chronos2"
    assert (about["context_length"], about["prediction_length"], len(about["quantile_levels"])) == (8192, 1024, 21)
    assert about["components"]["model"]["parameters"] > 0


def test_a_picture(engine: diffusionz.ZImage, tmp_path: pathlib.Path) -> None:
    image = engine.generate("a red circle", width=32, height=32, steps=1, seed=5, progress=False)
    for name in ("out.png", "out.webp"):
        image.save(tmp_path / name)
        assert json.loads(run(tmp_path / name, "--json").stdout) == image.metadata
        assert "prompt: a red circle\n" in run(tmp_path / name).stdout


def test_a_picture_without_parameters(tmp_path: pathlib.Path) -> None:
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert run(tmp_path / "plain.png").stdout == "no generation parameters\n"
    assert json.loads(run(tmp_path / "plain.png", "--json").stdout) == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("nothing", None),
        ("text.png", b"no picture"),
        ("empty.png", b""),
        ("short.safetensors", b"\x01"),
        ("long.safetensors", b"\xff" * 100),
        ("list.safetensors", b"\x02\0\0\0\0\0\0\0[]"),
        ("damaged.safetensors", b'\x07\0\0\0\0\0\0\0{"a":1}'),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: pathlib.Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run(tmp_path / name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert name in done.stderr


def test_a_folder_that_is_no_model(tmp_path: pathlib.Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
