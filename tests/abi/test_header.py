"""The headers are clean for strict compilers, their layouts of ABI version 1, and the library exports exactly them."""

import pathlib
import re
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INCLUDE = ROOT / "diffusionz" / "include"
HEADERS = sorted(INCLUDE.glob("*.h"))
# The program of each header's first screen.
EXAMPLES = {"diffusionz_c_api.h": "generate.c", "chronos_c_api.h": "forecast.c"}

each_header = pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)


def declared() -> set[str]:
    """The functions that the headers declare."""
    pattern = re.compile(r"^DIFFUSIONZ_API .*?(\w+)\(", re.MULTILINE)
    return {name for header in HEADERS for name in pattern.findall(header.read_text())}


@each_header
@pytest.mark.parametrize("compiler", [("cc", "-std=c99"), ("c++", "-x", "c++", "-std=c++17")], ids=["C99", "C++17"])
def test_header_is_clean_for_a_strict_compiler(header: pathlib.Path, compiler: tuple[str, ...]) -> None:
    strict = ["-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror", "-fsyntax-only", f"-I{INCLUDE}"]
    command = [*compiler, *strict, f"-DHEADER=<{header.name}>", str(HERE / "header.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layouts_are_those_of_abi_version_1() -> None:
    done = subprocess.run(
        ["cc", "-std=c11", "-pedantic", "-Werror", "-fsyntax-only", f"-I{INCLUDE}", str(HERE / "layout.c")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_library_exports_what_the_headers_declare_and_nothing_else(package: pathlib.Path) -> None:
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


@each_header
def test_installed_header_is_the_one_of_the_source(package: pathlib.Path, header: pathlib.Path) -> None:
    assert (package / "include" / header.name).read_bytes() == header.read_bytes()


@each_header
def test_example_is_the_program_of_the_first_screen(header: pathlib.Path) -> None:
    """The header's example, without its comment's asterisks, is the one of examples/c after its own comment."""
    lines = [line.removeprefix(" *") for line in header.read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if f"#include <{header.name}>" in line)
    end = lines.index("     }")
    shown = [line.removeprefix("     ").rstrip() for line in lines[start : end + 1]]
    example = (ROOT / "examples" / "c" / EXAMPLES[header.name]).read_text()
    assert example.split("*/\n", 1)[1].splitlines() == shown
    assert end < 40, "the example is on the first screen"


@each_header
def test_every_function_says_what_it_does(header: pathlib.Path) -> None:
    """A comment stands right above each function, or above a neighbour of the same paragraph."""
    paragraphs = header.read_text().split("/* cdef: begin")[1].split("\n\n")
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
