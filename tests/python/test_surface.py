"""The public surface: names, defaults, errors, and what importing costs."""

from __future__ import annotations

import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

import diffusionz
from diffusionz import Chronos2, ZImage
from diffusionz._context import PRECISIONS
from diffusionz._errors import BY_STATUS
from diffusionz._ffi import ffi, lib
from diffusionz.progress import STAGES

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADERS = "".join(path.read_text() for path in sorted((ROOT / "diffusionz" / "include").glob("*_c_api.h")))


def constants(prefix: str) -> dict[str, int]:
    """NAME -> value of the headers' constants that begin with `prefix`."""
    return {name.removeprefix(prefix): getattr(lib, name) for name in re.findall(rf"\b{prefix}\w+(?= =)", HEADERS)}


def test_names_are_listed_and_there() -> None:
    for name in diffusionz.__all__:
        assert getattr(diffusionz, name) is not None
    assert sorted(diffusionz.__all__) == dir(diffusionz)
    with pytest.raises(AttributeError, match="nothing"):
        diffusionz.nothing  # noqa: B018


def test_version_is_written_once() -> None:
    written = re.search(r"project\(diffusionz VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert written
    assert diffusionz.__version__ == written[1] == ffi.string(lib.diffusionz_version()).decode()


def test_every_status_is_one_class() -> None:
    statuses = constants("DIFFUSIONZ_E_")
    assert sorted(statuses.values()) == sorted(BY_STATUS)
    assert len(set(BY_STATUS.values())) == len(BY_STATUS)
    for name, value in statuses.items():
        words = BY_STATUS[value].__name__.removesuffix("Error")
        assert words.lower() == name.replace("_", "").lower()
        assert issubclass(BY_STATUS[value], diffusionz.DiffusionzError)
        assert BY_STATUS[value].__module__ == "diffusionz"
        assert f"── {BY_STATUS[value].__name__} " in str(sys.modules["diffusionz._errors"].__doc__)


def test_an_unknown_status_is_still_an_error() -> None:
    from diffusionz._errors import error_for

    assert type(error_for(99, "")) is diffusionz.InternalError
    assert "99" in str(error_for(99, ""))


def test_stages_and_precisions_are_the_headers() -> None:
    assert [name.lower() for name in constants("DIFFUSIONZ_STAGE_")] == list(STAGES)
    assert list(constants("DIFFUSIONZ_STAGE_").values()) == list(range(len(STAGES)))
    assert {name.lower(): value for name, value in constants("DIFFUSIONZ_PRECISION_").items()} == PRECISIONS


def test_defaults_are_the_librarys() -> None:
    request, options = ffi.new("DiffusionZRequest *"), ffi.new("DiffusionZInitOptions *")
    lib.diffusionz_request_init(request)
    lib.diffusionz_init_options_init(options)
    defaults = {name: p.default for name, p in inspect.signature(ZImage.generate).parameters.items()}
    for python, c in {
        "steps": "num_steps",
        "guidance": "guidance_scale",
        "strength": "strength",
        "cfg_normalization": "cfg_normalization",
        "cfg_truncation": "cfg_truncation",
    }.items():
        assert defaults[python] == pytest.approx(getattr(request, c)), python
    load = {name: p.default for name, p in inspect.signature(ZImage).parameters.items()}
    assert (load["threads"], load["cuda_graphs"]) == (options.num_threads, bool(options.cuda_graphs))
    assert PRECISIONS[load["precision"]] == options.precision
    chronos = ffi.new("ChronosRequest *")
    lib.chronos_request_init(chronos)
    defaults = {name: p.default for name, p in inspect.signature(Chronos2.forecast).parameters.items()}
    for name in ("monotone", "constrain_ohlc"):
        assert defaults[name] == getattr(chronos, name), name
    chronos_options = ffi.new("ChronosInitOptions *")
    lib.chronos_init_options_init(chronos_options)
    load = {name: p.default for name, p in inspect.signature(Chronos2).parameters.items()}
    assert load["threads"] == chronos_options.num_threads
    assert load["working_memory_bytes"] == chronos_options.working_memory_bytes
    assert (load["lora"], chronos_options.lora_path) == (None, ffi.NULL)
    assert PRECISIONS[load["precision"]] == chronos_options.precision
    for default in ("quality",):
        assert inspect.signature(diffusionz.Image.save).parameters[default].default == getattr(request, default)
        assert inspect.signature(diffusionz.Image.encode).parameters[default].default == getattr(request, default)


def test_generate_and_generate_batch_have_the_same_parameters() -> None:
    one = inspect.signature(ZImage.generate).parameters
    many = inspect.signature(ZImage.generate_batch).parameters
    shared = [name for name in one if name not in ("self", "prompt")]
    assert shared == [name for name in many if name not in ("self", "prompts", "count")]
    for name in shared:
        assert one[name].default == many[name].default
        assert one[name].annotation == many[name].annotation


def test_forecast_and_forecast_df_have_the_same_parameters() -> None:
    of_arrays = inspect.signature(Chronos2.forecast).parameters
    of_frames = inspect.signature(Chronos2.forecast_df).parameters
    shared = [name for name in of_arrays if name not in ("self", "inputs", "group_ids")]
    for name in shared:
        assert of_arrays[name].default == of_frames[name].default, name
        assert of_arrays[name].annotation == of_frames[name].annotation, name


def test_every_function_of_the_abi_is_used() -> None:
    """What Python does not need is listed, with the reason; whatever else is unused is forgotten."""
    not_needed = {
        "chronos_init",  # _with_options
        "diffusionz_init",
        "diffusionz_init_options_init_sized",  # the name without _sized is a macro that calls it
        "diffusionz_generate",  # _batch
        "diffusionz_status_name",  # the classes' names
    }
    source = "".join(path.read_text() for path in (ROOT / "py" / "diffusionz").glob("*.py"))
    for name in re.findall(r"^DIFFUSIONZ_API .*?(\w+)\(", HEADERS, re.MULTILINE):
        assert bool(re.search(rf"lib\.{name}\b", source)) != (name in not_needed), name


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_neither_torch_nor_the_library() -> None:
    loaded = python(
        "import sys, diffusionz\nfrom diffusionz import ZImage, Image, Progress, DiffusionzError\n"
        "print(any(name in sys.modules for name in ('torch', 'numpy', 'huggingface_hub', 'tqdm')),"
        " 'libtorch' in open('/proc/self/maps').read())"
    )
    assert loaded == "False False"
    assert python("import sys; from diffusionz import Chronos2; print('numpy' in sys.modules)") == "False"


def test_importing_takes_under_a_fifth_of_a_second() -> None:
    """Processor time, so that a busy machine does not count; the best of five, so that a cold cache does not."""
    code = "import time; t = time.process_time(); from diffusionz import ZImage; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.2


def test_drawing_does_not_import_torch(tiny_model: pathlib.Path) -> None:
    code = (
        "import sys; from diffusionz import ZImage\n"
        f"image = ZImage({str(tiny_model)!r}, device='cpu').generate('x', width=32, height=32, steps=1)\n"
        "image.png; image.pixels\n"
        "print('torch' in sys.modules, 'libpython' in open('/proc/self/maps').read().replace('lib/libpython', ''))"
    )
    assert python(code).split()[0] == "False"


def test_a_library_of_another_abi_is_refused(package: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Both versions are named."""
    code = (
        "import sys, types, importlib\n"
        "fake = types.ModuleType('diffusionz._diffusionz'); fake.__file__ = 'there'\n"
        "fake.lib = types.SimpleNamespace(DIFFUSIONZ_ABI_VERSION=1, diffusionz_abi_version=lambda: 2)\n"
        "sys.modules['diffusionz._diffusionz'] = fake\n"
        "try:\n    import diffusionz._ffi\nexcept ImportError as error:\n    print(error)\n"
    )
    message = python(code)
    assert "ABI version 1" in message
    assert "ABI version 2" in message


def test_without_torch_the_error_says_what_to_install() -> None:
    code = (
        "import sys, importlib.util, importlib\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'diffusionz._diffusionz': raise ImportError('libtorch_cpu.so: cannot open')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "try:\n    import diffusionz._ffi\nexcept ImportError as error:\n    print(error)\n"
    )
    assert "pip install torch" in python(code)


def test_types_and_style(tmp_path: pathlib.Path) -> None:
    """mypy strict and ruff find nothing."""
    folders = (
        "py", "payments", "server", "tests/python", "tests/cli", "tests/abi", "tests/payments", "tests/server", "cmake",
        "examples",
    )  # fmt: skip
    # mypy is shown payments/ and server/ where they install to.
    (tmp_path / "diffusionz").mkdir()
    for name in ("payments", "server"):
        (tmp_path / "diffusionz" / name).symlink_to(ROOT / name)
    beside = ["--explicit-package-bases", "--namespace-packages", str(tmp_path / "diffusionz")]
    for command in (["mypy"], ["mypy", *beside], ["ruff", "check", *folders]):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"MYPYPATH": str(tmp_path)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
