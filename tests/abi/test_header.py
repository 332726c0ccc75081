"""The header is clean for strict compilers, its layouts are of ABI version 1, and the library exports exactly it."""

import pathlib
import re
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
HEADER = ROOT / "diffusionz" / "include" / "diffusionz_c_api.h"


def declared() -> set[str]:
    """The functions that the header declares."""
    return set(re.findall(r"^DIFFUSIONZ_API .*?(\w+)\(", HEADER.read_text(), re.MULTILINE))


@pytest.mark.parametrize("compiler", [("cc", "-std=c99"), ("c++", "-x", "c++", "-std=c++17")], ids=["C99", "C++17"])
def test_header_is_clean_for_a_strict_compiler(compiler: tuple[str, ...]) -> None:
    strict = ["-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror", "-fsyntax-only", f"-I{HEADER.parent}"]
    done = subprocess.run([*compiler, *strict, str(HERE / "header.c")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layouts_are_those_of_abi_version_1() -> None:
    done = subprocess.run(
        ["cc", "-std=c11", "-pedantic", "-Werror", "-fsyntax-only", f"-I{HEADER.parent}", str(HERE / "layout.c")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_library_exports_what_the_header_declares_and_nothing_else(package: pathlib.Path) -> None:
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", "--format=posix", str(package / "lib" / "libdiffusionz.so")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    exported = {line.split()[0] for line in listing.splitlines()}
    assert {name.split("@")[0] for name in exported} == declared()


def test_library_needs_no_python(package: pathlib.Path) -> None:
    dynamic = subprocess.run(
        ["readelf", "-d", str(package / "lib" / "libdiffusionz.so")], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert not [name for name in needed if "python" in name]
    assert any(name.startswith("libtorch_cpu") for name in needed)
    assert "$ORIGIN/../../torch/lib" in dynamic  # found beside the package wherever both are moved to


def test_installed_header_is_the_one_of_the_source(package: pathlib.Path) -> None:
    assert (package / "include" / HEADER.name).read_bytes() == HEADER.read_bytes()


def test_example_is_the_program_of_the_first_screen() -> None:
    """The header's example, without its comment's asterisks, is examples/c/generate.c after its own comment."""
    text = HEADER.read_text()
    lines = [line.removeprefix(" *") for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if "#include <diffusionz_c_api.h>" in line)
    end = next(i for i, line in enumerate(lines) if line.startswith(" Ownership."))
    shown = [line.removeprefix("     ").rstrip() for line in lines[start : end - 1]]
    example = (ROOT / "examples" / "c" / "generate.c").read_text()
    assert example.split("*/\n", 1)[1].splitlines() == shown
    assert end < 32, "the example is on the first screen"


def test_every_function_says_what_it_does() -> None:
    """A comment stands right above each function, or above a neighbour of the same paragraph."""
    paragraphs = HEADER.read_text().split("/* cdef: begin")[1].split("\n\n")
    bare = [
        paragraph
        for paragraph in paragraphs
        if "DIFFUSIONZ_API" in paragraph and "/*" not in paragraph
        and not re.search(r"_init\(", paragraph)  # sets what the struct's own comments say
    ]  # fmt: skip
    assert bare == []


def test_tools_are_there() -> None:
    for tool in ("cc", "c++", "nm", "readelf", "pkg-config", "cmake", "go", "valgrind"):
        assert shutil.which(tool), f"{tool} is missing: make test installs it"
