"""What the tests share: the bundled model, the installed package's C side, and the programs of build/tests/."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `from tests.models import ...`, however pytest is started

# Every run tries the same examples, and none fails for being slow, which says more of the machine than of the code.
# --hypothesis-profile=default tries new ones.
settings.register_profile(
    "repeatable", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

# Whatever is started in the background of a shell ignores Ctrl-C, and so would the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def probe() -> Callable[[str], pathlib.Path]:
    """probe(name): the program tests/.../NAME.cc, which is built beside the library."""

    def find(name: str) -> pathlib.Path:
        path = ROOT / "build" / "tests" / name
        assert path.is_file(), f"{path} is not built: make build"
        return path

    return find


@pytest.fixture(scope="session")
def demo_model() -> pathlib.Path:
    """The bundled Z-Image's folder, as installed."""
    from diffusionz.hub import locate

    return pathlib.Path(locate("demo", "zimage"))


@pytest.fixture(scope="session")
def engine(tiny_model: pathlib.Path) -> Iterator[Any]:
    """The tiny model on the CPU. Whoever changes it (LoRA) puts it back."""
    from diffusionz import ZImage

    with ZImage(tiny_model, device="cpu") as model:
        yield model


@pytest.fixture(scope="session")
def package() -> pathlib.Path:
    """The installed package's folder: include/, lib/."""
    import diffusionz

    return pathlib.Path(diffusionz.__file__).parent


@pytest.fixture(scope="session")
def pkg_config_env(package: pathlib.Path) -> dict[str, str]:
    """An environment in which pkg-config finds the installed library."""
    return os.environ | {"PKG_CONFIG_PATH": str(package / "lib" / "pkgconfig")}


@pytest.fixture(scope="session")
def compile_c(pkg_config_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """compile_c(source, *flags): builds one C file against the installed library, as a user would."""

    def build(source: pathlib.Path, *flags: str) -> pathlib.Path:
        out = tmp_path_factory.mktemp("c") / source.stem
        of_library = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "diffusionz"],
            env=pkg_config_env, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        strict = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-O1", "-g"]
        done = subprocess.run(
            ["cc", *strict, *flags, str(source), "-o", str(out), *of_library], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return out

    return build


def draw_in_a_process(code: str, folder: pathlib.Path) -> pathlib.Path:
    """Runs code that writes a model to sys.argv[1], in a process of its own: most tests need no torch, and need not
    wait for it."""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model of random weights that loads and draws in milliseconds."""
    code = (
        "import pathlib, sys; from tests.models.random_models import Shape, write_model; "
        "write_model(Shape(seed=1), pathlib.Path(sys.argv[1]))"
    )
    return draw_in_a_process(code, tmp_path_factory.mktemp("models") / "tiny")


def draw_chronos(name: str, factory: pytest.TempPathFactory) -> pathlib.Path:
    code = (
        "import pathlib, sys; from tests.models.random_chronos import SHAPES, write_model; "
        f"write_model(SHAPES['{name}'], pathlib.Path(sys.argv[1]))"
    )
    return draw_in_a_process(code, factory.mktemp("models") / name)


@pytest.fixture(scope="session")
def tiny_chronos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Chronos-2 of random weights: 64 wide, two layers, a context of 8192 steps, and 1024 steps a pass."""
    return draw_chronos("released", tmp_path_factory)


@pytest.fixture(scope="session")
def short_chronos(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Chronos-2 of random weights: 32 wide, three layers, a context of 100 steps, and 40 steps a pass."""
    return draw_chronos("unusual", tmp_path_factory)
