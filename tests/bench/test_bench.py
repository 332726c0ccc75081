"""Goal: the benchmarks do not rot.

Method: each runs once at tiny sizes, parity check included; its times mean nothing.
"""

import csv
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import gpu, record  # noqa: E402


@pytest.mark.parametrize(
    "family, parities, claims", [("zimage", 4, 7), ("chronos", 5, 9), ("ledger", 3, 8), ("watcher", 3, 3)]
)
def test_every_benchmark_runs_and_checks_parity_first(family, parities, claims):
    command = [sys.executable, "-m", f"tests.bench.{family}", "all", "--quick", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("parity: ") for line in lines) == parities
    assert sum("p10 / p50 / p90" in line for line in lines) == claims


def test_the_servers_benchmark_runs():
    command = [sys.executable, "-m", "tests.bench.server", "all", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity: through HTTP" in done.stdout
    # Two of ours, and a peer's where it is installed; one, one and two.
    assert sum("p10 / p50 / p90" in line for line in done.stdout.splitlines()) >= 6


def test_wrong_work_is_not_timed():
    import numpy

    from tests.bench import zimage

    right = numpy.full((4, 4, 3), 100, numpy.uint8)
    wrong = right.copy()
    wrong[1, 2, 0] += 3
    zimage.check_pixels(right, right)
    with pytest.raises(SystemExit, match="not timed"):
        zimage.check_pixels(wrong, right)
    with pytest.raises(SystemExit, match="not timed"):
        zimage.check_stage("x", numpy.array([1.0, 1.001]), numpy.array([1.0, 1.0]))
    with pytest.raises(SystemExit, match="not timed"):
        zimage.check_stage("x", numpy.array([1.0, numpy.nan]), numpy.array([1.0, 1.0]))


def test_percentiles_and_ratio_are_those_of_the_values():
    comparison = record.Comparison("work", "size", [3.0, 1.0, 2.0], [4.0] * 5, goal=0.5)
    assert [record.percentile(comparison.ours, share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == [
        1.0, pytest.approx(1.2), 2.0, pytest.approx(2.8), 3.0,
    ]  # fmt: skip
    assert comparison.ratio == 0.5 and "reached" in comparison.line()


def test_kept_rows_are_whole_and_say_no_host_name():
    import socket

    for path in record.RESULTS.glob("*.csv"):
        if path.name == "forecast-quality.csv":  # of no machine, and read by tests/models/test_chronos_demo.py
            continue
        columns = gpu.PROFILE_COLUMNS if path.stem.endswith("-profile") else record.COLUMNS
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and all(set(row) == set(columns) and None not in row.values() for row in rows), path
        assert socket.gethostname() not in path.read_text()
