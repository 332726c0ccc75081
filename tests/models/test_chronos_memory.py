"""Goal: a request of any number of rows is worked off in a fixed working set.

Method: processes of their own forecast 20,000 and 200,000 rows. Of each process's peak of resident memory what it held
before the call, the result's bytes, and the few bytes a row of bookkeeping are taken off; the rest is the working set.
"""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MIB = 1 << 20
STEPS, LENGTH = 8, 24
PROGRAM = """
import sys
import numpy as np
from tests.models.chronos_ours import Engine, Request, ffi, lib

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

rows, grouped, budget = int(sys.argv[2]), sys.argv[3] == "groups", int(sys.argv[4])
engine = Engine(sys.argv[1], num_threads=1, working_memory_bytes=budget)
row = np.sin(np.arange(%d, dtype=np.float32))
engine.forecast(Request([row] * 400, %d, levels=(0.1, 0.5, 0.9)))
request = ffi.new("ChronosRequest *")
lib.chronos_request_init(request)
values = np.tile(row, rows)
offsets = np.arange(rows + 1, dtype=np.int64) * len(row)
groups = np.arange(rows, dtype=np.int64) // 3
levels = np.array([0.1, 0.5, 0.9])
kept = [ffi.from_buffer("float[]", values), ffi.from_buffer("int64_t[]", offsets), ffi.from_buffer("double[]", levels)]
request.context, request.context_offsets, request.quantile_levels = kept
if grouped:
    kept.append(ffi.from_buffer("int64_t[]", groups))
    request.group_ids = kept[-1]
request.row_count, request.level_count, request.prediction_length = rows, 3, %d
before = kib("VmRSS:")
out = ffi.new("ChronosForecast *")
assert lib.chronos_forecast(engine.ctx, request, ffi.NULL, out) == 0
peak = kib("VmHWM:")
result = 4 * out.target_count * out.level_count * out.prediction_length
print((peak - before) * 1024 - result)
"""


def working_set(folder, rows, groups, budget):
    """Bytes beside input and result at the peak of the call."""
    program = PROGRAM % (LENGTH, STEPS, STEPS)
    command = [sys.executable, "-c", program, str(folder), str(rows), groups, str(budget)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("groups", ["alone", "groups"])
def test_ten_times_the_rows_take_the_same_working_set(random_chronos, groups):
    folder = random_chronos("least").folder
    few, many = (working_set(folder, rows, groups, 8 * MIB) for rows in (20_000, 200_000))
    # The order of rows and their groups, which is a hundred bytes or two for each.
    assert many - few < 180_000 * 200, f"{few / MIB:.1f} MiB, then {many / MIB:.1f} MiB"


def test_the_budget_is_kept(random_chronos):
    folder = random_chronos("released").folder
    sizes = {budget: working_set(folder, 20_000, "alone", budget * MIB) / MIB for budget in (4, 16, 64)}
    for budget, size in sizes.items():
        assert size < 2.5 * budget + 8, sizes
