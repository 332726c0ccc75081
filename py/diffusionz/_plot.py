"""The picture of a forecast."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

import numpy

from diffusionz._errors import ArgumentError
from diffusionz.image import write_atomically

if TYPE_CHECKING:
    from diffusionz.forecast import Forecast
    from diffusionz.hub import Path

# File extension -> metadata without the time of day or the library's version: the same forecast, the same bytes.
FORMATS: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}

MOST_PANELS = 24
_PAST, _FUTURE, _GRID, _QUIET = "#3d3d3d", "#1b6ac9", "#e4e4e4", "#6b6b6b"
_BANDS = ("#d4e3f6", "#a9c8ed")  # the widest, and the one within


def format_of(path: Path) -> str:
    """The extension of a picture's file. Raises ArgumentError for another than those of FORMATS."""
    extension = os.path.splitext(os.fspath(path))[1].lower()
    if extension not in FORMATS:
        raise ArgumentError(f"{os.fspath(path)} must end in {', '.join(FORMATS)}")
    return extension


def plot(forecast: Forecast, path: Path | None, ax: Any, history: int | None) -> Any:
    """`Forecast.plot`."""
    if path is not None:
        format_of(path)
    count = len(forecast)
    if not 1 <= count <= MOST_PANELS:
        raise ArgumentError(f"the forecast has {count} series; 1 to {MOST_PANELS} can be drawn: index it to choose")
    if history is None:
        history = max(48, 4 * forecast.horizon)
    if history < 1:
        raise ArgumentError(f"history is {history}; it must be at least 1 step")
    if ax is None:
        from matplotlib.figure import Figure  # without pyplot: no display, and nothing to close

        figure = Figure(figsize=(8, 4 if count == 1 else 0.6 + 2.3 * count), dpi=150)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        panels = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    else:
        panels = list(ax) if hasattr(ax, "__len__") else [ax]
        if len(panels) != count:
            raise ArgumentError(f"ax has {len(panels)} axes; the forecast has {count} series")
        figure = panels[0].figure
    for i, panel in enumerate(panels):
        _draw(panel, forecast, i, history)
    handles, labels = panels[0].get_legend_handles_labels()
    handles, labels = handles[-2:] + handles[:-2], labels[-2:] + labels[:-2]  # lines, then bands
    if ax is None:
        if len({panel.get_xlim() for panel in panels}) == 1:
            for panel in panels[:-1]:  # the lowest says it for all
                panel.tick_params(labelbottom=False)
                panel.set_xlabel(None)
                panel.xaxis.get_offset_text().set_visible(False)
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    else:
        panels[0].legend(handles, labels, loc="best", frameon=False, fontsize=9)
    if path is not None:
        import matplotlib

        extension = format_of(path)
        data = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "diffusionz"}):
            figure.savefig(data, format=extension[1:], metadata=FORMATS[extension])
        write_atomically(path, data.getvalue())
    return figure


def _draw(panel: Any, forecast: Forecast, series: int, steps: int) -> None:
    past = forecast.history(series)
    when_past, when_future = forecast.history_timestamps(series), forecast.timestamps(series)
    if when_past is None:
        when_past, when_future = numpy.arange(1 - len(past), 1), numpy.arange(1, forecast.horizon + 1)
        panel.set_xlabel("steps from now", fontsize=9, color=_QUIET)
    past, when_past = past[-steps:], _plain(when_past[-steps:])
    when_future = _plain(when_future)
    median = forecast.mean[series]

    for color, (low, high, share) in zip(_BANDS, _bands(forecast, series), strict=False):
        panel.fill_between(when_future, low, high, color=color, linewidth=0, label=f"{share:.0%} interval")
    # A value between two that are missing has no line to it.
    marker = "." if len(past) < 3 or numpy.isnan(past).any() else None
    panel.plot(when_past, past, color=_PAST, linewidth=1.3, label="history", marker=marker, markersize=4)
    seen = numpy.flatnonzero(~numpy.isnan(past))
    # From the latest observation on, so that the eye is led over.
    panel.plot(
        numpy.concatenate([when_past[seen[-1:]], when_future]),
        numpy.concatenate([past[seen[-1:]], median]),
        color=_FUTURE,
        linewidth=1.8,
        label="median",
    )
    name, sentence = forecast.names()[series], forecast[series].summary()
    if name:
        panel.set_title(name, loc="left", fontsize=11, fontweight="bold", pad=20)
        sentence = sentence.removeprefix(f"{name}: ")
    panel.annotate(
        sentence, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=_QUIET
    )
    _dress(panel, dates=when_future.dtype.kind == "M")


def _bands(forecast: Forecast, series: int) -> list[tuple[Any, Any, float]]:
    """(low, high, share) of at most two bands: the widest that was asked for, and the one nearest to half of it."""
    levels = forecast.levels
    pairs = [
        (forecast.quantile(low)[series], forecast.quantile(high)[series], high - low)
        for low in levels
        for high in levels
        if low < 0.5 and abs(low + high - 1) < 1e-6
    ]
    if not pairs:
        return []
    widest, *others = sorted(pairs, key=lambda pair: -pair[2])
    return [widest, *sorted(others, key=lambda pair: abs(pair[2] - widest[2] / 2))[:1]]


def _plain(times: Any) -> Any:
    """numpy's numbers, or datetime64 in local time."""
    if getattr(times, "tz", None) is not None:
        times = times.tz_localize(None)
    return numpy.asarray(times)


def _dress(panel: Any, dates: bool) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.ticker import FuncFormatter

    panel.grid(axis="y", color=_GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    for side, spine in panel.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    panel.tick_params(length=0, labelsize=9, labelcolor=_QUIET)
    panel.xaxis.get_offset_text().set(fontsize=9, color=_QUIET)
    panel.margins(x=0.01)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace("-", "\N{MINUS SIGN}")))
    if dates:
        locator: Any = AutoDateLocator(minticks=4, maxticks=9)  # type: ignore[no-untyped-call]
        panel.xaxis.set_major_locator(locator)
        panel.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
