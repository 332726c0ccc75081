"""A measurement as a line to read and a row to keep: what ran, on what, how long, and the ratio to the peer."""

import csv
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

from diffusionz.bench.table import COLUMNS, percentile

RESULTS = pathlib.Path(__file__).parent / "results"
ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Comparison:
    """The same work done by us and by the peer, lower is better."""

    work: str
    size: str
    ours: list[float]
    peer: list[float]
    goal: float  # of ours / peer, medians
    unit: str = "s"
    peer_name: str = "diffusers"

    @property
    def ratio(self) -> float:
        return percentile(self.ours, 0.5) / percentile(self.peer, 0.5)

    def line(self) -> str:
        def spread(values: list[float]) -> str:
            return " / ".join(f"{percentile(values, share):.4g}" for share in (0.1, 0.5, 0.9))

        verdict = "reached" if self.ratio <= self.goal else "MISSED"
        return (
            f"{self.work}, {self.size}: ours {spread(self.ours)} {self.unit},"
            f" {self.peer_name} {spread(self.peer)} {self.unit}"
            f" (p10 / p50 / p90 of {len(self.ours)} and {len(self.peer)}):"
            f" {self.ratio:.2f}x, goal {self.goal}x {verdict}"
        )


def cpu() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine() -> str:
    """The file name of the results: the CPU's model and how many of its cores there are, not the host's name."""
    model = re.sub(r"\((R|TM)\)|CPU|Processor|@.*|\d+-Core", "", cpu(), flags=re.IGNORECASE)
    return f"{'-'.join(re.findall(r'[a-z0-9]+', model.lower()))}-{len(os.sched_getaffinity(0))}core"


def versions() -> str:
    names = ["diffusionz", "torch", "diffusers", "chronos-forecasting", "transformers"]
    return " ".join(
        [f"python-{platform.python_version()}", *(f"{name}-{importlib.metadata.version(name)}" for name in names)]
    )


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    sources = ("diffusionz", "py", "payments", "CMakeLists.txt")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def about(threads: int) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cpu()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; {threads} threads; {versions()}; {commit()}"
    )


def keep(comparison: Comparison, threads: int) -> pathlib.Path:
    """Appends a row to this machine's file. Rows are not taken out again when we lose."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{machine()}.csv"
    new = not path.exists()
    numbers = [
        f"{percentile(values, share):.4g}" for values in (comparison.ours, comparison.peer) for share in (0.1, 0.5, 0.9)
    ]
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(
            [
                datetime.date.today().isoformat(), commit(), machine(), cpu(), threads, versions(), comparison.work,
                comparison.size, comparison.unit, len(comparison.ours), *numbers, f"{comparison.ratio:.3f}",
                comparison.goal,
            ]
        )  # fmt: skip
    return path
