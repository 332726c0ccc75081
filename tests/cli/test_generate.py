"""`diffusionz generate`: files, words on stdout and stderr, exit statuses, terminals and signals."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from diffusionz.image import read_metadata

Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = str(pathlib.Path(sys.executable).with_name("diffusionz"))
SMALL = ("--width", "48", "--height", "32", "--steps", "2")


@pytest.fixture
def run(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> Run:
    """run("generate", ...): the command in an empty folder, on the tests' model."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        model = ("--model", str(tiny_model), "--device", "cpu") if arguments[:1] == ("generate",) else ()
        return subprocess.run(
            [PROGRAM, *arguments[:1], *model, *arguments[1:]],
            cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
        )  # fmt: skip

    return call


def fails(done: subprocess.CompletedProcess[str], status: int, *named: str) -> None:
    """Exit status, and one line on stderr with each of `named`; nothing on stdout."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("diffusionz")
    for part in named:
        assert part in done.stderr


def test_a_picture(run: Run, tmp_path: pathlib.Path) -> None:
    done = run("generate", "a red circle", "-o", "out.png", "--seed", "7", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")  # no bar in a pipe
    assert done.stdout.startswith("out.png  48x32, seed 7, ")
    assert done.stdout.count("\n") == 1
    metadata = read_metadata((tmp_path / "out.png").read_bytes())
    assert (metadata["prompt"], metadata["seed"], metadata["steps"]) == ("a red circle", 7, 2)
    assert os.listdir(tmp_path) == ["out.png"]


def test_the_same_arguments_write_the_same_bytes(run: Run, tmp_path: pathlib.Path) -> None:
    for name in ("a.webp", "b.webp"):
        assert run("generate", "x", "-o", name, "--seed", "1", "--quality", "80", *SMALL).returncode == 0
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()


def test_json(run: Run, tmp_path: pathlib.Path, tiny_model: pathlib.Path) -> None:
    done = run("generate", "x", "-o", "out.webp", "--json", "--count", "2", "--seed", "10", *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert [image["path"] for image in result["images"]] == ["out-1.webp", "out-2.webp"]
    assert [image["seed"] for image in result["images"]] == [10, 11]
    assert result["images"][0]["width"] == 48
    assert (result["model"], result["device"], result["precision"]) == (str(tiny_model), "cpu", "float32")
    assert result["timings_ms"]["total"] > 0


def test_numbered_files_sort_and_have_their_seeds(run: Run, tmp_path: pathlib.Path) -> None:
    done = run("generate", "x", "-o", "out.png", "--count", "10", "--seed", "3", "--width", "16", "--height", "16",
               "--steps", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted(os.listdir(tmp_path))
    assert files == [f"out-{i:02}.png" for i in range(1, 11)]
    assert [read_metadata((tmp_path / name).read_bytes())["seed"] for name in files] == list(range(3, 13))


def test_quiet(run: Run) -> None:
    done = run("generate", "x", "-o", "out.png", "--quiet", *SMALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lossless_webp(run: Run, tmp_path: pathlib.Path) -> None:
    assert run("generate", "x", "-o", "out.webp", "--lossless", "--seed", "1", *SMALL).returncode == 0
    assert (tmp_path / "out.webp").read_bytes()[12:16] in (b"VP8L", b"VP8X")
    assert b"VP8L" in (tmp_path / "out.webp").read_bytes()


def test_guidance_and_negative_prompt(run: Run, tmp_path: pathlib.Path) -> None:
    done = run("generate", "x", "-o", "out.png", "--guidance", "3", "--negative", "blur", *SMALL)
    assert done.returncode == 0, done.stderr
    metadata = read_metadata((tmp_path / "out.png").read_bytes())
    assert (metadata["guidance_scale"], metadata["negative_prompt"]) == (3, "blur")


def test_image_to_image(run: Run, tmp_path: pathlib.Path) -> None:
    assert run("generate", "x", "-o", "start.png", "--seed", "1", *SMALL).returncode == 0
    done = run("generate", "y", "-o", "out.png", "--init-image", "start.png", "--strength", "0.5", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "48x32" in done.stdout
    assert read_metadata((tmp_path / "out.png").read_bytes())["strength"] == 0.5


def test_a_prompt_that_looks_like_an_option(run: Run) -> None:
    assert run("generate", "-o", "out.png", *SMALL, "--", "--help me").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        ((), 2, "required"),
        (("x",), 2, "--output"),
        (("-o", "out.png"), 2, "PROMPT"),
        (("x", "-o", "out.png", "--width", "large"), 2, "--width"),
        (("x", "-o", "out.png", "--widht", "16"), 2, "--widht"),
        (("x", "-o", "out.png", "--wid", "16"), 2, "--wid"),
        (("x", "-o", "out.jpg"), 2, ".png"),
        (("x", "-o", "out"), 2, ".png"),
        (("x", "-o", "out.png", "--width", "17"), 2, "17"),
        (("x", "-o", "out.png", "--width", "99999999999"), 2, "99999999999"),
        (("x", "-o", "out.png", "--steps", "0"), 2, "0"),
        (("x", "-o", "out.png", "--guidance", "nan"), 2, "guidance"),
        (("x", "-o", "out.png", "--count", "0"), 2, "--count"),
        (("x", "-o", "out.png", "--count", "5000"), 2, "1024"),
        (("x", "-o", "out.png", "--quality", "101"), 2, "--quality"),
        (("x", "-o", "out.png", "--device", "gpu"), 2, "gpu"),
        (("x", "-o", "out.png", "--device", "cuda:99"), 1, "99"),
        (("x", "-o", "out.png", "--device", "cpu,gpu"), 2, "gpu"),
        (("x", "-o", "out.png", "--precision", "int4"), 2, "int4"),
        (("x", "-o", "out.png", "--precision", "fp8", "--device", "cpu"), 1, "FP8"),
        (("x", "-o", "out.png", "--max-vram", "lots"), 2, "max_vram"),
        (("x", "-o", "nowhere/out.png"), 1, "nowhere/out.png: No such file or directory"),
        (("x", "-o", "folder.png"), 1, "folder.png: Is a directory"),
        (("x", "-o", "out.png", "--model", "nothing"), 1, "demo"),
        (("x", "-o", "out.png", "--model", "a/b"), 1, "diffusionz pull a/b"),
        (("x", "-o", "out.png", "--model", "folder.png"), 1, "folder.png"),
        (("x", "-o", "out.png", "--lora", "nowhere.safetensors:0.5"), 1, "nowhere.safetensors"),
        (("x", "-o", "out.png", "--init-image", "nowhere.png"), 1, "nowhere.png"),
        (("x", "-o", "out.png", "--init-image", "text.png"), 1, "text.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_failures_are_one_line(
    run: Run, tmp_path: pathlib.Path, arguments: tuple[str, ...], status: int, named: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    fails(run("generate", *arguments), status, named)
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "text.png"]


def test_wrong_commands(run: Run) -> None:
    fails(run(), 2, "COMMAND")
    fails(run("draw"), 2, "draw")
    fails(run("serve"), 2, "--free", "--payments")


def test_help_teaches(run: Run) -> None:
    for command in ((), ("generate",), ("info",), ("pull",)):
        done = run(*command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert "examples:" in done.stdout
        assert f"diffusionz {' '.join(command)}".strip() in done.stdout
    import diffusionz

    assert run("--version").stdout == f"diffusionz {diffusionz.__version__}\n"


def test_an_unwritable_folder(run: Run, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may write anywhere: a file system without room for names stands in
        fails(run("generate", "x", "-o", "/proc/out.png", *SMALL), 1, "/proc/out.png")
    else:
        fails(run("generate", "x", "-o", "locked/out.png", *SMALL), 1, "Permission denied")


def test_a_full_disk_leaves_nothing_behind(run: Run) -> None:
    done = run("generate", "x", "-o", "/dev/full", *SMALL)
    fails(done, 2)  # no extension


def test_the_reader_may_leave(tiny_model: pathlib.Path) -> None:
    """`diffusionz info | head -0` says nothing on stderr."""
    process = subprocess.Popen([PROGRAM, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1


def test_an_interrupt_stops_it_in_one_line(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, until_at_work: Callable[[subprocess.Popen[str]], None]
) -> None:
    process = subprocess.Popen(
        [PROGRAM, "generate", "x", "-o", "out.png", "--model", tiny_model, "--device", "cpu", "--steps", "1000",
         "--count", "500"],  # minutes of work, on any machine
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until_at_work(process)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()  # quiet when it has ended; else it would draw on for minutes
    assert time.monotonic() - start < 30
    assert (process.returncode, out, err) == (130, "", "diffusionz: stopped\n")
    assert os.listdir(tmp_path) == []


def test_a_bar_in_a_terminal(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, in_a_terminal: Callable[..., str]
) -> None:
    command = [PROGRAM, "generate", "x", "-o", "out.png", "--model", str(tiny_model), "--device", "cpu"]
    size = ["--width", "128", "--height", "128", "--steps", "4"]
    shown = in_a_terminal([*command, *size], tmp_path)
    assert "4/4" in shown
    assert "out.png  128x128" in shown.splitlines()[-1]
    assert "step" not in in_a_terminal([*command, *size, "--quiet"], tmp_path)


def test_start_is_quick() -> None:
    """Wrong use and --help load neither torch nor the library: processor time of the whole process, best of three."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([PROGRAM, "generate", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.4
