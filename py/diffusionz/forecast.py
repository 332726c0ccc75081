"""`Forecast`: what a Chronos-2 expects, as numbers, a frame, a picture and a sentence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from diffusionz._errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diffusionz._series import Names, Rows
    from diffusionz.hub import Path

# Levels that every forecast holds, asked for or not: those of `mean`, `summary`, `trend` and the picture.
ALWAYS = (0.1, 0.5, 0.9)
# Between them the latest observation was to be expected.
SURPRISE = (0.01, 0.99)


@dataclasses.dataclass(frozen=True)
class Times:
    """Where a frame's rows stand in time."""

    past: Any
    """[observations]: timestamps of all items, one item after the other; what slices into the same kind."""
    ends: NDArray[numpy.int64]
    """[items]: past[:ends[i]] ends with item i."""
    future: Any
    """[items * horizon]: timestamps."""
    step: tuple[int, str]
    """What lies between two rows: (2, "hour")."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the series of a forecast are called."""

    names: Names
    """An item, in messages."""
    ids: Any = None
    """[items]; None when they have none."""
    targets: Sequence[str] | None = None
    times: Times | None = None
    id_column: str | None = "item_id"
    time_column: str = "step"
    finish: Callable[[Any], Any] | None = None
    """Turns a pandas frame into one of the kind that came in."""


class Forecast:
    """Forecasts of one or several series. `Chronos2.forecast` makes it.

    Several targets of an entry follow each other. `len`, iteration and indexing, by number, slice or name, give
    forecasts of fewer series. It keeps the history that the model read, and the model itself, for `trend`, until that
    is closed.
    """

    levels: list[float]
    """The quantile levels that were asked for."""
    horizon: int
    """Steps."""

    def __init__(
        self,
        values: NDArray[numpy.float32],
        levels: list[float],
        asked: list[int],
        rows: Rows,
        labels: Labels,
        surprises: Callable[[], NDArray[numpy.bool_]],
        chosen: NDArray[numpy.int64] | None = None,
    ) -> None:
        """
        Parameters:
            values: [series, levels, horizon]
            levels: of `values`, ALWAYS among them.
            asked: which of them the caller wanted.
            rows: with history in the units of `values`; target number i is series i.
            surprises: [targets], whether the latest observation of each lies outside what the model expected.
            chosen: targets that are the series of this forecast; None for all.
        """
        self._values = values
        self._all_levels = levels
        self._asked = asked
        self._rows = rows
        self._labels = labels
        self._surprises = surprises
        self._target_rows = numpy.flatnonzero(rows.is_target)
        self._chosen = numpy.arange(len(values)) if chosen is None else chosen
        self.levels = [levels[i] for i in asked]
        self.horizon = values.shape[2]

    # --- Numbers ---

    @property
    def quantiles(self) -> NDArray[numpy.float32]:
        """float32 [series, levels, horizon]"""
        return self._values if len(self._asked) == len(self._all_levels) else self._values[:, self._asked]

    @property
    def mean(self) -> NDArray[numpy.float32]:
        """float32 [series, horizon]: the point forecast, which is the median, as upstream calls it."""
        return self._at(0.5)

    def quantile(self, level: float) -> NDArray[numpy.float32]:
        """float32 [series, horizon]: one level. Raises ArgumentError for one that was not asked for."""
        for i in self._asked:
            if math.isclose(self._all_levels[i], level, abs_tol=1e-9):
                return self._values[:, i]
        there = ", ".join(f"{asked:g}" for asked in self.levels)
        raise ArgumentError(f"the level {level:g} was not asked for; there are {there}")

    def history(self, series: int) -> NDArray[numpy.float32]:
        """float32 [steps]: what the model read of a series, up to now; NaN is missing."""
        return self._rows.row(int(self._target_rows[self._chosen[series]]))

    def _at(self, level: float) -> NDArray[numpy.float32]:
        return self._values[:, next(i for i, x in enumerate(self._all_levels) if math.isclose(x, level, abs_tol=1e-9))]

    # --- Series ---

    @property
    def item_ids(self) -> list[Any]:
        """[series]: id of the frame's series, else number of the entry."""
        items = self._items()
        return [int(i) for i in items] if self._labels.ids is None else [self._labels.ids[i] for i in items]

    @property
    def target_names(self) -> list[str]:
        """[series]: the frame's column, else "target", or "target_0" and so on."""
        places = self._places()
        if self._labels.targets is not None:
            return [self._labels.targets[i] for i in places]
        heights = numpy.bincount(self._rows.items, self._rows.is_target)[self._items()]
        return [f"target_{i}" if height > 1 else "target" for i, height in zip(places, heights, strict=True)]

    def timestamps(self, series: int) -> Any:
        """[horizon]: when the forecast's steps are; None when the input had no timestamps."""
        times = self._labels.times
        if times is None:
            return None
        item = int(self._items()[series])
        return times.future[item * self.horizon : (item + 1) * self.horizon]

    def history_timestamps(self, series: int) -> Any:
        """[steps]: when those of `history` were; None when the input had no timestamps."""
        times = self._labels.times
        if times is None:
            return None
        end = int(times.ends[self._items()[series]])
        return times.past[end - len(self.history(series)) : end]

    def names(self) -> list[str]:
        """[series]: what to call each in a sentence or above a picture; "" for the only one, when it has no name."""
        ids, targets = self.item_ids, self.target_names
        no_ids, no_targets = self._labels.ids is None, self._labels.targets is None
        if no_ids and no_targets:
            heads = [f"series {i}" for i in ids] if self._rows.items[-1] > 0 else [""] * len(ids)
            tails = ["" if name == "target" else name for name in targets]
        elif no_ids:
            heads, tails = [""] * len(ids), targets
        else:
            heads = [str(i) for i in ids]
            tails = targets if len(self._labels.targets or ()) > 1 else [""] * len(ids)
        return [", ".join(part for part in pair if part) for pair in zip(heads, tails, strict=True)]

    def _items(self) -> NDArray[numpy.int64]:
        return self._rows.items[self._target_rows[self._chosen]]

    def _places(self) -> NDArray[numpy.int64]:
        """[series]: which of its item's targets each is."""
        return self._target_rows[self._chosen] - numpy.searchsorted(self._rows.items, self._items())

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Forecast]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, series: int | slice | str) -> Forecast:
        """The series of a number, a slice, or of a name: a target's, or an id."""
        if isinstance(series, str):
            matches = [
                i
                for i, pair in enumerate(zip(self.item_ids, self.target_names, strict=True))
                if series in (str(pair[0]), pair[1])
            ]
            if not matches:
                raise KeyError(f"no series or target is called {series!r}")
            index = numpy.array(matches)
        else:
            index = numpy.atleast_1d(numpy.arange(len(self))[series])
        return Forecast(
            self._values[index], self._all_levels, self._asked, self._rows, self._labels, self._surprises,
            self._chosen[index],
        )  # fmt: skip

    def __repr__(self) -> str:
        count = f"{len(self)} series" if len(self) > 1 else "1 series"
        return f"<Forecast of {count}, {self.horizon} steps, {len(self.levels)} levels>"

    # --- In words ---

    def summary(self) -> str:
        """One sentence a series, each on a line: "close: 70,465 now, 71,020 expected after 7 days (+0.8%), 80% between
        66,900 and 75,300". Now is the last observation, and what is expected the median of the last step."""
        count, unit = self._labels.times.step if self._labels.times else (1, "step")
        count *= self.horizon
        after = f"after {count:,} {unit}{'s' if count != 1 else ''}"
        lines = []
        for i, (name, now) in enumerate(zip(self.names(), self._now(), strict=True)):
            low, expected, high = (float(self._at(level)[i, -1]) for level in ALWAYS)
            decimals = _decimals(abs(high - low), max(abs(low), abs(high), abs(now)))
            number = f"{{:,.{decimals}f}}" if decimals is not None else "{:.5g}"
            change = f" ({expected / now - 1:+.1%})" if now > 0 and expected > 0 else ""
            lines.append(
                f"{name + ': ' if name else ''}{number.format(now)} now, {number.format(expected)} expected {after}"
                f"{change}, 80% between {number.format(low)} and {number.format(high)}"
            )
        return "\n".join(lines)

    @property
    def trend(self) -> str | list[str]:
        """What the forecast means, a word for one series and a list for several:

        "anomaly": the latest observation lies outside the 98% interval (levels 0.01 to 0.99) that the model gives for
            it from the history before, with the same covariates. Of what goes on as before, one in fifty does when the
            model's intervals hold. After a history without any variation, every other value does.
        "up": no anomaly, and the last step's 80% interval lies over the latest observation: by the model, it will be
            higher with nine chances in ten.
        "down": likewise lower.
        "flat": none of these.

        Its first reading asks the model once more, for one step. Raises ArgumentError when the model was closed.
        """
        surprises = self._surprises()[self._chosen]
        now = self._now()
        low, high = self._at(0.1)[:, -1], self._at(0.9)[:, -1]
        words: list[str] = numpy.select([surprises, low > now, high < now], ["anomaly", "up", "down"], "flat").tolist()
        return words[0] if len(words) == 1 else words

    def _now(self) -> list[float]:
        """[series]: the latest observations."""
        histories = (self.history(i) for i in range(len(self)))
        return [float(history[~numpy.isnan(history)][-1]) for history in histories]

    # --- Frames and pictures ---

    def to_frame(self) -> Any:
        """A long frame, of polars when the input was one, else of pandas: the series' id, the step or timestamp,
        "target_name", "predictions" (the median) and one column a level, "0.1". See `Chronos2.forecast_df`."""
        import pandas

        labels, count = self._labels, len(self)
        columns: dict[str, Any] = {}
        if labels.id_column is not None:
            ids = self.item_ids if labels.ids is None else labels.ids[self._items()]
            columns[labels.id_column] = numpy.repeat(ids, self.horizon)
        if labels.times is None:
            columns[labels.time_column] = numpy.tile(numpy.arange(1, self.horizon + 1), count)
        else:
            steps = (self._items()[:, None] * self.horizon + numpy.arange(self.horizon)).ravel()
            columns[labels.time_column] = labels.times.future[steps]
        columns["target_name"] = numpy.repeat(numpy.array(self.target_names, object), self.horizon)
        columns["predictions"] = self.mean.ravel()
        for i, level in zip(self._asked, self.levels, strict=True):
            columns[str(level)] = self._values[:, i].ravel()
        frame = pandas.DataFrame(columns)
        return frame if labels.finish is None else labels.finish(frame)

    def plot(self, path: Path | None = None, ax: Any = None, *, history: int | None = None) -> Any:
        """Draws history, median and bands, one panel a series; returns matplotlib's Figure.

        Parameters:
            path: a file to write, .png, .svg or .pdf: the same forecast writes the same bytes.
            ax: Axes to draw on, one a series; None makes a Figure, which needs no display.
            history: steps to show of the past; None for four times the horizon, and 48 at least.

        A band is shaded between two levels that lie around the median, as 0.1 and 0.9: the widest, and one about half
        as wide. Raises ArgumentError for more than 24 series: index the forecast to choose.
        """
        from diffusionz._plot import plot

        return plot(self, path, ax, history)


def is_surprise(
    rows: Rows, before: Rows, expected: NDArray[numpy.float32], cut: NDArray[numpy.bool_]
) -> NDArray[numpy.bool_]:
    """[targets]: whether the last value of each target of `rows` lies outside `expected` [targets, 2].

    `before` and `cut` are those of `Rows.one_step_back`: without a history, nothing is a surprise.
    """
    last = rows.last()[rows.is_target]
    outside = (last < expected[:, 0]) | (last > expected[:, 1])
    outside &= cut[rows.is_target]
    targets = numpy.flatnonzero(rows.is_target)
    for i in numpy.flatnonzero(outside):
        past = before.row(int(targets[i]))
        past = past[~numpy.isnan(past)]
        # Without variation there is no interval to speak of, but for rounding.
        outside[i] = past.min() != past.max() or last[i] != past[0]
    return outside


def _decimals(spread: float, size: float) -> int | None:
    """Decimals that show three digits of `spread`; None where a number should be written with an exponent."""
    if size >= 1e15 or not math.isfinite(spread):
        return None
    if spread == 0:
        return 2
    decimals = max(0, 2 - math.floor(math.log10(spread)))
    return decimals if decimals <= 6 else None
