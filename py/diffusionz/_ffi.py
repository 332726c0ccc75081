"""`ffi` and `lib`: the C ABI, bound by cffi from diffusionz_c_api.h when the package was built.

Importing this module loads libdiffusionz and LibTorch, a quarter of a second of linking, so the rest of the package
imports it only when the library is first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def _load() -> Any:
    name = "diffusionz._diffusionz"
    try:
        module: Any = import_module(name)
    except ImportError as error:
        if not _preload_torch():
            raise ImportError(
                "diffusionz needs LibTorch from the `torch` package, which is not installed: pip install torch==2.13.0"
            ) from error
        module = import_module(name)
    built, loaded = module.lib.DIFFUSIONZ_ABI_VERSION, module.lib.diffusionz_abi_version()
    if built != loaded:
        raise ImportError(
            f"{module.__file__} was built for ABI version {built} of libdiffusionz, "
            f"and the library that was loaded has ABI version {loaded}: install diffusionz again"
        )
    return module


def _preload_torch() -> bool:
    """Loads LibTorch from the torch that Python finds, for when the library's own search path does not lead there
    (the two packages lie in different site-packages). Does not import torch. False when there is none."""
    import ctypes
    import importlib.util
    import os

    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = os.path.join(spec.submodule_search_locations[0], "lib")
    for name in ("libc10.so", "libtorch_cpu.so", "libc10_cuda.so", "libtorch_cuda.so"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return True


_module = _load()
ffi: Any = _module.ffi
lib: Any = _module.lib


def text(pointer: Any) -> str:
    """A borrowed `const char *` as a string; "" for NULL."""
    return ffi.string(pointer).decode("utf-8", "replace") if pointer else ""


def take_string(out: Any) -> str:
    """The string that a call left in a `char **`, which is freed."""
    value = text(out[0])
    lib.diffusionz_free_string(out[0])
    return value


def check(status: int) -> None:
    """Raises the error of a status that is not OK, with the message that the library left on this thread."""
    if status != lib.DIFFUSIONZ_OK:
        from diffusionz._errors import error_for

        raise error_for(status, text(lib.diffusionz_last_error()))


def c_string(name: str, value: str) -> Any:
    """`value` as a C string (UTF-8), which lives as long as what is returned."""
    from diffusionz._errors import ArgumentError

    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"{name} is not valid Unicode: it holds a lone surrogate") from None
    if b"\0" in data:
        raise ArgumentError(f"{name} holds a NUL character")
    return ffi.new("char[]", data)


def c_int(name: str, value: int, *, bits: int = 32) -> int:
    """`value`, which must be an integer that a signed C integer of `bits` holds."""
    from operator import index

    from diffusionz._errors import ArgumentError

    number = index(value)
    if not -(1 << (bits - 1)) <= number < 1 << (bits - 1):
        raise ArgumentError(f"{name} is {number}; it does not fit {bits} bits")
    return number
