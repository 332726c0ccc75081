"""What the benchmarks of both model families share: the processes that do the work, and the report."""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy

from tests.bench.record import ROOT, Comparison, about, keep


class Bench:
    """One run of a benchmark: its options, its scratch folder, its servers and what it measured."""

    def __init__(self, args: argparse.Namespace, scratch: pathlib.Path) -> None:
        self.args, self.scratch = args, scratch
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        self.comparisons: list[Comparison] = []
        self.servers: dict[tuple[str, pathlib.Path], Server] = {}

    def report(self, comparison: Comparison) -> None:
        self.comparisons.append(comparison)
        print(comparison.line(), flush=True)
        if self.args.record:
            keep(comparison, self.args.threads)

    def write(self, name: str, shape: dict) -> pathlib.Path:
        """Draws a random checkpoint in a process of its own: this one stays small."""
        (self.scratch / f"{name}.json").write_text(json.dumps(shape))
        command = [
            sys.executable,
            "-m",
            "tests.bench.workers",
            "write",
            self.scratch / name,
            self.scratch / f"{name}.json",
        ]
        subprocess.run(command, cwd=ROOT, env=self.environment, check=True, capture_output=True)
        return self.scratch / name

    def server(self, side: str, model: pathlib.Path) -> "Server":
        if (side, model) not in self.servers:
            self.servers[side, model] = Server(side, model, self.environment)
        return self.servers[side, model]

    def close_server(self, side: str, model: pathlib.Path) -> None:
        self.servers.pop((side, model)).close()

    def release(self) -> None:
        """Ends the servers and removes what was drawn."""
        for server in self.servers.values():
            server.close()
        self.servers.clear()
        for path in self.scratch.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Server:
    """One process of workers.py."""

    def __init__(self, side: str, model: pathlib.Path, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.bench.workers", "serve", side, model]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._answer() == "ready"

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} left with {self.process.wait()}")
        return line.strip()

    def run(self, job: dict) -> float:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def result(self, job: dict, scratch: pathlib.Path) -> numpy.ndarray:
        self.run(job | {"save": str(scratch / "result.npy")})
        return numpy.load(scratch / "result.npy")

    def peak_mib(self) -> float:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def run_measured(command: list[object], environment: dict[str, str]) -> tuple[float, float]:
    """(seconds from the start to the end of a process, its peak memory in MiB). This process has no torch in it: a
    child's peak counts what its parent held when it was started."""
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command[0]} left with {process.returncode}: {errors.read()[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


def run_claims(claims: dict, description: str, program: str, argv: list[str] | None) -> list[Comparison]:
    """The command line of a family's benchmarks."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "claims", nargs="+", metavar="CLAIM", choices=["all", *claims], help=f"all, {', '.join(claims)}"
    )
    parser.add_argument(
        "--model", default="demo", help="a folder or a bundled model's name, for the claims that take one"
    )
    parser.add_argument("--precision", default="auto", help="of the forecaster that a server has, for its claims")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--repeats", type=int, help="rounds of a claim; default: enough for its spread")
    parser.add_argument("--quick", action="store_true", help="tiny random models, one repeat")
    parser.add_argument("--record", action="store_true", help="append rows to tests/bench/results/")
    parser.add_argument("--scratch", help="where full-size checkpoints are written for the while; default: /tmp")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 1
    print(about(args.threads), flush=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        bench = Bench(args, pathlib.Path(scratch))
        try:
            for name in claims if "all" in args.claims else args.claims:
                claims[name](bench)
                if not args.quick:  # there every claim uses the same small model
                    bench.release()
        finally:
            bench.release()
    return bench.comparisons
