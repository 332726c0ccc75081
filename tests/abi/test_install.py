"""What is installed serves C, C++ and Go programs: through pkg-config, through CMake, and after it was moved."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPT = "a red circle on a blue background"


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return str(done.stdout)


def is_webp(path: pathlib.Path) -> bool:
    data = path.read_bytes()
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def test_c_example(compile_c: Callable[..., pathlib.Path], tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = compile_c(ROOT / "examples" / "c" / "generate.c", "-std=c99")
    run(program, tiny_model, PROMPT, tmp_path / "out.webp")
    assert is_webp(tmp_path / "out.webp")
    failed = subprocess.run([program, tmp_path, PROMPT, tmp_path / "no.webp"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert not (tmp_path / "no.webp").exists()


@pytest.fixture
def check_forecaster(tiny_chronos: pathlib.Path) -> Callable[[pathlib.Path], None]:
    """check(program): numbers in, three quantiles a step out, the same that the Python binding gives."""
    import numpy as np

    from tests.models.chronos_ours import Engine, Request

    def check(program: pathlib.Path) -> None:
        row = np.round(np.sin(np.arange(100) / 3) * 5, 3).astype(np.float32)
        printed = run(program, tiny_chronos, input=" ".join(map(str, row)))
        ours = Engine(tiny_chronos).forecast(Request([row], 16, levels=(0.1, 0.5, 0.9))).quantiles[0]
        np.testing.assert_allclose(np.array(printed.split(), np.float32).reshape(16, 3), ours.T, rtol=1e-5)
        for wrong in ([program, ROOT], [program, tiny_chronos]):  # no model; no numbers
            failed = subprocess.run(wrong, input="", capture_output=True, text=True)
            assert (failed.returncode, failed.stderr.count("\n"), failed.stdout) == (1, 1, "")

    return check


def test_c_example_of_forecasting(
    compile_c: Callable[..., pathlib.Path], check_forecaster: Callable[[pathlib.Path], None]
) -> None:
    check_forecaster(compile_c(ROOT / "examples" / "c" / "forecast.c", "-std=c99"))


def test_go_examples(
    pkg_config_env: dict[str, str],
    tiny_model: pathlib.Path,
    check_forecaster: Callable[[pathlib.Path], None],
    tmp_path: pathlib.Path,
) -> None:
    """Formatted, vetted, built and run; they do what the C examples do."""
    source = ROOT / "examples" / "go"
    # cgo's tool folder must be writable and outside the source; nothing is fetched.
    env = pkg_config_env | {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOCACHE": str(ROOT / "build" / "go-cache")}
    assert run("gofmt", "-l", source) == ""
    run("go", "vet", "./...", cwd=source, env=env)
    run("go", "build", "-o", tmp_path, "./...", cwd=source, env=env)
    check_forecaster(tmp_path / "forecast")
    draw = tmp_path / "zimage-example"  # the module's name
    run(draw, tiny_model, PROMPT, tmp_path / "out.webp")
    assert is_webp(tmp_path / "out.webp")
    failed = subprocess.run([draw, tmp_path, PROMPT, "no.webp"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)


def test_cmake_package_and_a_moved_prefix(tmp_path: pathlib.Path, package: pathlib.Path) -> None:
    """`cmake --install` to a prefix of the user's, moved after that: both kinds of consumer still build and run."""
    run("cmake", "--install", ROOT / "build", "--prefix", tmp_path / "first", "--component", "library")
    prefix = shutil.move(tmp_path / "first", tmp_path / "moved")
    assert not any(path.suffix == ".py" for path in prefix.rglob("*"))

    consumer = tmp_path / "consumer"
    consumer.mkdir()
    (consumer / "main.cc").write_text(
        "#include <chronos_c_api.h>\n#include <cstdio>\n"
        "int main() { std::puts(diffusionz_version()); return diffusionz_abi_version() != DIFFUSIONZ_ABI_VERSION; }\n"
    )
    (consumer / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(consumer CXX)\n"
        "find_package(diffusionz 0.1 REQUIRED)\n"
        "add_executable(main main.cc)\ntarget_link_libraries(main diffusionz::diffusionz)\n"
    )
    run("cmake", "-S", consumer, "-B", consumer / "build", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", consumer / "build")
    import diffusionz

    version = diffusionz.__version__
    assert run(consumer / "build" / "main").strip() == version

    env = os.environ | {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "diffusionz", env=env).split()
    assert str(prefix) in " ".join(flags) or ".." in " ".join(flags)
    run("c++", consumer / "main.cc", "-o", tmp_path / "by-pkg-config", *flags)
    assert run(tmp_path / "by-pkg-config").strip() == version
    assert run("pkg-config", "--modversion", "diffusionz", env=env).strip() == version
