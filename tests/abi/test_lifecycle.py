"""A context can be made and freed without end, used by many threads at once, and leaks nothing."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
# The threads of a small model wait for each other most of the time, and memory does not depend on them.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def test_a_thousand_contexts_leave_memory_flat(
    compile_c: Callable[..., pathlib.Path], tiny_model: pathlib.Path
) -> None:
    program = compile_c(HERE / "cycles.c", "-D_POSIX_C_SOURCE=200809L")
    done = subprocess.run([program, tiny_model, "1000"], env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kibibytes = [int(line) for line in done.stdout.split()]
    # The first tenth warms the allocators. After that, a leak of one small tensor a cycle would show.
    assert max(kibibytes[1:]) - kibibytes[1] < 4096, kibibytes


def test_eight_threads_on_one_context(compile_c: Callable[..., pathlib.Path], tiny_model: pathlib.Path) -> None:
    program = compile_c(HERE / "hammer.c", "-pthread", "-D_POSIX_C_SOURCE=200809L")
    done = subprocess.run([program, tiny_model], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_no_call_leaks(compile_c: Callable[..., pathlib.Path], tiny_model: pathlib.Path) -> None:
    """Under valgrind, three rounds of calls lose not a byte more than one: what torch allocates once and keeps is in
    both. No read or write is invalid."""
    program = compile_c(HERE / "calls.c")

    def lost(rounds: int) -> tuple[int, int]:
        done = subprocess.run(
            [
                "valgrind", "--leak-check=full", "--show-leak-kinds=none", "--num-callers=30",
                program, tiny_model, str(rounds),
            ],
            env=ONE_THREAD, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        invalid = re.findall(r"Invalid (?:read|write|free).*(?:\n.*){8}", done.stderr)
        assert not invalid, invalid
        counts = re.findall(r"(?:definitely|indirectly) lost: ([\d,]+) bytes", done.stderr)
        total = sum(int(count.replace(",", "")) for count in counts)
        held = re.search(r"in use at exit: ([\d,]+) bytes", done.stderr)
        assert held
        return total, int(held.group(1).replace(",", ""))

    one, three = lost(1), lost(3)
    assert three[0] <= one[0]
    # Still reachable: caches keyed by shape may add a little, a picture or a context may not.
    assert three[1] - one[1] < 4096


def test_out_of_memory_is_a_status_and_the_context_stays_usable(tiny_model: pathlib.Path) -> None:
    """A process whose address space is all but full asks for a picture that does not fit, then for one that does."""
    code = """
import resource, sys
import diffusionz
model = diffusionz.ZImage(sys.argv[1], device="cpu", threads=1)
draw = lambda side: model.generate("x", width=side, height=side, steps=1, seed=1, progress=False).pixels.sum()
before = draw(64)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (taken + 100 * 2**20, hard))
try:
    draw(1024)
except diffusionz.OutOfMemoryError as error:
    print(error)
else:
    sys.exit("a picture of 1024 x 1024 was drawn in 100 MiB")
assert draw(64) == before
"""
    done = subprocess.run([sys.executable, "-c", code, tiny_model], env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
