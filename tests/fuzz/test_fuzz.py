"""Goal: no input crashes the readers of hostile files, or makes them read outside the input.

Method: each fuzzer of this folder, built with AddressSanitizer and UndefinedBehaviorSanitizer, runs for a bounded time
over the seeds of make_corpus.py. DIFFUSIONZ_FUZZ_SECONDS sets how long; the same seeds give the same inputs.
"""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
SECONDS = os.environ.get("DIFFUSIONZ_FUZZ_SECONDS", "8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    subprocess.run([sys.executable, HERE / "make_corpus.py", folder], check=True)
    return folder


@pytest.mark.parametrize("reader", sorted(path.stem.removesuffix("_fuzzer") for path in HERE.glob("*_fuzzer.cc")))
def test_no_input_crashes_the_reader(probe, corpus, tmp_path, reader):
    seeds = sorted((corpus / reader).iterdir())
    assert seeds
    done = subprocess.run([probe(f"{reader}_fuzzer"), SECONDS, *seeds], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"{reader}: {done.stdout.strip()}")
