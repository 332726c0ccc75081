"""A measurement as a row: what ran, how long, beside which peer and which goal; as a table, as JSON, as CSV."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

# Of tests/bench/results/*.csv, which keeps every run.
COLUMNS = [
    "date", "commit", "machine", "cpu", "threads", "versions", "work", "size", "unit", "runs", "ours_p10", "ours_p50",
    "ours_p90", "peer_p10", "peer_p50", "peer_p90", "ratio", "goal",
]  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


@dataclasses.dataclass
class Row:
    """Lower is better, but for rates: units that end in "/s"."""

    work: str
    size: str
    precision: str
    unit: str
    ours: list[float]
    goal: float | None = None  # of the median
    peer: list[float] = dataclasses.field(default_factory=list)
    peer_name: str = ""

    @property
    def is_rate(self) -> bool:
        return self.unit.endswith("/s")

    @property
    def ratio(self) -> float | None:
        """Our median by the peer's."""
        return percentile(self.ours, 0.5) / percentile(self.peer, 0.5) if self.peer else None

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        median = percentile(self.ours, 0.5)
        return median >= self.goal if self.is_rate else median <= self.goal

    def offer(self, name: str, values: list[float]) -> None:
        """A peer's times of the same work; the best peer stays."""
        sign = -1 if self.is_rate else 1
        if not self.peer or sign * percentile(values, 0.5) < sign * percentile(self.peer, 0.5):
            self.peer, self.peer_name = values, name

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio, "reached": self.reached}

    def csv(self, about: dict[str, str]) -> list[str]:
        """The values of COLUMNS; `about` has those that are not the row's own."""
        numbers = {
            f"{side}_p{share}": f"{percentile(values, share / 100):.4g}" if values else ""
            for side, values in (("ours", self.ours), ("peer", self.peer))
            for share in (10, 50, 90)
        }
        names = [self.work, self.precision] + ([f"peer {self.peer_name}"] if self.peer_name else [])
        row = (
            {"date": datetime.date.today().isoformat(), "commit": "", "threads": ""}
            | about
            | {"work": ", ".join(names), "size": self.size, "unit": self.unit, "runs": str(len(self.ours))}
            | numbers
            | {
                "ratio": "" if self.ratio is None else f"{self.ratio:.3f}",
                # With its unit: in rows without one it is of the ratio.
                "goal": "" if self.goal is None else f"{self.goal:g} {self.unit}",
            }
        )
        return [row[column] for column in COLUMNS]


def write_csv(path: str, rows: Sequence[Row], about: dict[str, str]) -> None:
    """Appends the rows to a file, which gets a header when it is new. Raises OSError."""
    import csv
    import os

    new = not os.path.exists(path)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(row.csv(about) for row in rows)


def as_table(rows: Sequence[Row]) -> str:
    """For a terminal: medians, with the 10th and 90th percentile of ours."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    def cells(row: Row) -> list[str]:
        p10, p50, p90 = (number(percentile(row.ours, share)) for share in (0.1, 0.5, 0.9))
        verdict = {None: "", True: "reached", False: "MISSED"}[row.reached]
        return [
            f"{row.work}, {row.size}",
            row.precision,
            f"{p50} {row.unit}",
            f"{p10}-{p90}" if len(row.ours) > 1 else "",
            number(percentile(row.peer, 0.5)) if row.peer else "",
            "" if row.ratio is None else f"{row.ratio:.2f}x",
            "" if row.goal is None else f"{'>=' if row.is_rate else '<='} {number(row.goal)}",
            verdict,
        ]

    lines = [["work", "precision", "median", "p10-p90", "peer", "ratio", "goal", ""], *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    peers = sorted({row.peer_name for row in rows if row.peer_name})
    return "\n".join(text + [f"peer: the best of {'; '.join(peers)}"] * bool(peers))
