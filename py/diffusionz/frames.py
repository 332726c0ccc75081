"""Long frames of pandas and polars, as rows to forecast: one row an observation, series told apart by an id column.

Columns, row order and encodings are those of the reference's `predict_df` (chronos-forecasting 2.3.2).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import pandas

from diffusionz._errors import ArgumentError
from diffusionz._series import Names, Rows, from_columns, to_floats
from diffusionz.forecast import Labels, Times

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What is between two rows, by pandas' name of the frequency; names of its older versions too.
_UNITS = {
    "ns": "nanosecond", "us": "microsecond", "ms": "millisecond", "s": "second", "min": "minute", "h": "hour",
    "bh": "business hour", "D": "day", "B": "business day", "C": "business day", "W": "week", "SM": "half-month",
    "SMS": "half-month", "ME": "month", "MS": "month", "BME": "month", "BMS": "month", "QE": "quarter",
    "QS": "quarter", "BQE": "quarter", "BQS": "quarter", "YE": "year", "YS": "year", "BYE": "year", "BYS": "year",
    "H": "hour", "T": "minute", "S": "second", "M": "month", "BM": "month", "Q": "quarter", "BQ": "quarter",
    "A": "year", "AS": "year", "Y": "year",
}  # fmt: skip

_FEWEST = 3  # rows of a series from which its step can be told


def read_frame(
    df: Any,
    future_df: Any,
    *,
    id_column: str | None,
    timestamp_column: str | None,
    targets: list[str],
    horizon: int,
    freq: str | float | None,
    keep: int,
) -> tuple[Rows, Labels]:
    """The frames' rows, at most `keep` values each, and what they are called. See `Chronos2.forecast_df`.

    Raises ArgumentError, TypeError.
    """
    frame, finish = _to_pandas(df, "df", id_column, timestamp_column)
    future = None if future_df is None else _to_pandas(future_df, "future_df", id_column, timestamp_column)[0]
    _check_columns(frame, future, id_column, timestamp_column, targets)
    frame, lengths, ids = _by_series(frame, id_column, timestamp_column, "df", None)
    names = Names(len(lengths), None if id_column is None else ids, "df")
    times = None
    if timestamp_column is not None:
        times = _extend(frame[timestamp_column], lengths, horizon, freq, names)
    elif freq is not None:
        raise ArgumentError("freq is given, and timestamp_column is None: without timestamps there is no frequency")
    if future is not None:
        future = _match_future(future, id_column, timestamp_column, ids, horizon, times, names)

    covariates = [c for c in frame.columns if c not in (id_column, timestamp_column, *targets)]
    past = {c: _column(frame[c], f"column {c!r}") for c in covariates}
    known = {
        c: _numbers(future[c], f"future_df's column {c!r}") if isinstance(past[c], numpy.ndarray) else future[c]
        for c in covariates
        if future is not None and c in future
    }
    values = numpy.stack([_numbers(frame[target], f"column {target!r}") for target in targets])
    rows = from_columns(values, past, known, lengths, horizon, keep)
    rows.refuse_unobserved(names)
    return rows, Labels(
        names,
        None if id_column is None else ids,
        targets,
        times,
        id_column,
        "step" if timestamp_column is None else timestamp_column,
        finish,
    )


# --- Kinds of frame ---


def _to_pandas(df: Any, name: str, id_column: str | None, timestamp_column: str | None) -> tuple[Any, Any]:
    """(`df` for pandas, what turns a result into a frame of df's kind)."""
    if isinstance(df, pandas.DataFrame):
        return df, None
    if type(df).__module__.partition(".")[0] == "polars":
        import polars

        if isinstance(df, polars.LazyFrame):
            df = df.collect()
    if not hasattr(df, "get_columns"):
        raise TypeError(f"{name} must be a frame of pandas or polars, not {type(df).__name__}")
    # Not `to_pandas`, which needs pyarrow.
    frame = pandas.DataFrame({column: _from_polars(df[column]) for column in df.columns})

    def finish(result: Any) -> Any:
        def column(name: Any, values: Any) -> Any:
            if isinstance(values.dtype, pandas.DatetimeTZDtype):
                utc = polars.Series(name, values.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy())
                return utc.dt.replace_time_zone("UTC").dt.convert_time_zone(str(values.dt.tz))
            if values.dtype == "datetime64[s]":
                values = values.dt.as_unit("ms")  # the coarsest of polars
            plain = getattr(values.dtype, "kind", "O") in "iufbM"
            series = polars.Series(name, values.to_numpy() if plain else values.to_list())
            dtype = df.schema.get(name)
            if name == timestamp_column and series.dtype.is_temporal():
                within_days = dtype == polars.Date and (values != values.dt.normalize()).any()
                return series.cast(dtype) if dtype.is_temporal() and not within_days else series
            return series.cast(dtype) if name == id_column else series

        return polars.DataFrame([column(name, result[name]) for name in result.columns])

    return frame, finish


def _from_polars(series: Any) -> Any:
    zone = getattr(series.dtype, "time_zone", None)
    values = pandas.Series(series.to_numpy())
    if zone is not None:
        values = values.dt.tz_localize("UTC").dt.tz_convert(zone)
    return values


# --- Columns ---


def _check_columns(
    frame: Any, future: Any, id_column: str | None, timestamp_column: str | None, targets: list[str]
) -> None:
    if not targets:
        raise ArgumentError("target is empty; at least one column is needed")
    own = [column for column in (id_column, timestamp_column) if column is not None]
    for what, column in [("id_column", id_column), ("timestamp_column", timestamp_column)]:
        if column is not None and column not in frame:
            raise ArgumentError(f"df has no column {column!r} ({what}); {_listed(frame)}, or None when there is none")
    for column in targets:
        if column not in frame:
            raise ArgumentError(f"df has no column {column!r} (target); {_listed(frame)}")
        if column in own or targets.count(column) > 1:
            raise ArgumentError(f"the column {column!r} is named twice")
    if len(frame) == 0:
        raise ArgumentError("df has no rows")
    if not frame.columns.is_unique:
        raise ArgumentError(f"df has the column {frame.columns[frame.columns.duplicated()][0]!r} twice")
    if future is None:
        return
    for column in own:
        if column not in future:
            raise ArgumentError(f"future_df has no column {column!r}; {_listed(future)}")
    for column in future.columns:
        if column in targets:
            raise ArgumentError(f"future_df has the target {column!r}, which is what is to be forecast")
        if column not in frame:
            raise ArgumentError(f"future_df has the column {column!r}, whose past is not in df")


def _listed(frame: Any) -> str:
    return f"there are {', '.join(map(repr, frame.columns))}"


def _numbers(column: Any, name: str) -> NDArray[numpy.float32]:
    if not pandas.api.types.is_numeric_dtype(column):
        raise ArgumentError(f"{name} holds {column.dtype}; it must be numbers")
    return to_floats(column, name)


def _column(column: Any, name: str) -> Any:
    """A covariate for `from_columns`."""
    if pandas.api.types.is_numeric_dtype(column) and not pandas.api.types.is_bool_dtype(column):
        return to_floats(column, name)
    try:
        return column.astype("category")
    except TypeError as error:
        raise TypeError(f"{name} holds neither numbers nor categories: {error}") from None


# --- Series and time ---


def _by_series(
    frame: Any, id_column: str | None, timestamp_column: str | None, name: str, order: Any
) -> tuple[Any, list[int], Any]:
    """(the frame by series and time, rows of each series, [series] ids): series as in `order`, or as they appear."""
    if timestamp_column is not None:
        frame = frame.assign(**{timestamp_column: _read_times(frame[timestamp_column], timestamp_column, name)})
    if id_column is None:
        codes, ids = numpy.zeros(len(frame), numpy.int64), None
    else:
        if order is None:
            codes, found = pandas.factorize(frame[id_column])
            ids = numpy.asarray(found)
        else:
            codes, ids = pandas.Index(order).get_indexer(frame[id_column]), order
        for place in numpy.flatnonzero(codes < 0)[:1]:
            value = frame[id_column].iloc[int(place)]
            if order is not None and not pandas.isna(value):
                raise ArgumentError(f"{name} has the series {value!r}, which df has not")
            raise ArgumentError(f"{name} has no {id_column!r} in row {int(place)}; every row needs one")
    times = codes if timestamp_column is None else _ticks(frame[timestamp_column])
    permutation = numpy.lexsort([codes] if timestamp_column is None else [times, codes])
    if (permutation[1:] < permutation[:-1]).any():
        frame, codes, times = frame.iloc[permutation], codes[permutation], times[permutation]
    count = 1 if ids is None else len(ids)
    lengths = numpy.bincount(codes, minlength=count).tolist()
    if timestamp_column is not None:
        for place in numpy.flatnonzero((times[1:] == times[:-1]) & (codes[1:] == codes[:-1]))[:1]:
            of = "" if ids is None else f" for {id_column} {ids[codes[place]]!r}"
            raise ArgumentError(
                f"{name} has two rows at {frame[timestamp_column].iloc[int(place)]}{of}; timestamps must differ "
                f"within a series{': does a column tell several series apart (id_column)?' if ids is None else ''}"
            )
    return frame.reset_index(drop=True), lengths, ids


def _ticks(times: Any) -> NDArray[Any]:
    """Timestamps as numbers to sort by."""
    numeric = pandas.api.types.is_numeric_dtype(times)
    return numpy.asarray(times if numeric else pandas.DatetimeIndex(times).asi8)


def _read_times(column: Any, timestamp_column: str, name: str) -> Any:
    """Dates and times, or numbers as they are."""
    if pandas.api.types.is_numeric_dtype(column) and not pandas.api.types.is_bool_dtype(column):
        times = column
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the format is guessed
                times = pandas.to_datetime(column)
        except (ValueError, TypeError, OverflowError) as error:
            raise ArgumentError(f"{name}'s column {timestamp_column!r} holds what is no date: {error}") from None
    for place in numpy.flatnonzero(times.isna())[:1]:
        raise ArgumentError(f"{name} has no {timestamp_column!r} in row {int(place)}; every row needs one")
    return times


def _extend(column: Any, lengths: Sequence[int], horizon: int, freq: str | float | None, names: Names) -> Times:
    """The timestamps, those of the horizon, and what lies between two."""
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    last = ends - 1
    if pandas.api.types.is_numeric_dtype(column):
        past = column.to_numpy()
        step = _step(past, lengths, names) if freq is None else freq
        if not isinstance(step, (int, float, numpy.number)) or isinstance(step, bool) or not step > 0:
            raise ArgumentError(f"freq is {step!r}; for numeric timestamps it must be a number over 0")
        future = past[last][:, None] + numpy.arange(1, horizon + 1) * step
        return Times(past, ends, future.ravel(), (1, "step"))
    past = pandas.DatetimeIndex(column)
    name = _frequency(past, lengths, names) if freq is None else freq
    try:
        offset = pandas.tseries.frequencies.to_offset(name)
    except (ValueError, TypeError):
        offset = None
    if offset is None:
        raise ArgumentError(f'freq is {name!r}; it must be a frequency as pandas calls it, such as "D", "h", "MS"')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pandas.errors.PerformanceWarning)  # offsets that go date by date
            steps = [past[last] + step * offset for step in range(1, horizon + 1)]
    except (ValueError, OverflowError) as error:  # pandas' OutOfBoundsDatetime is a ValueError
        raise ArgumentError(
            f"{horizon} steps of {offset.freqstr} lead to dates that cannot be written: {error}"
        ) from None
    order = numpy.arange(horizon * len(last)).reshape(horizon, len(last)).T.ravel()
    unit = _UNITS.get(offset.rule_code.partition("-")[0])
    return Times(past, ends, steps[0].append(steps[1:])[order], (offset.n, unit) if unit else (1, "step"))


def _frequency(past: Any, lengths: Sequence[int], names: Names) -> str:
    """The one frequency of all series. Raises ArgumentError."""
    of: dict[bytes, str] = {}  # the frequency of timestamps; series often share theirs
    found: tuple[str, int] | None = None
    start = 0
    for i, length in enumerate(lengths):
        times = past[start : start + length]
        start += length
        if length < _FEWEST:
            continue
        key = times.asi8.tobytes()
        if key not in of:
            inferred = pandas.infer_freq(times)
            if inferred is None:
                raise ArgumentError(_irregular(times, names(i)))
            of[key] = inferred
        if found is None:
            found = of[key], i
        elif of[key] != found[0]:
            raise ArgumentError(
                f"{names(found[1])} steps by {found[0]} and {names(i)} by {of[key]}; all must have one frequency: "
                "forecast them apart, or give freq"
            )
    if found is None:
        raise ArgumentError(
            f"no series has {_FEWEST} timestamps, from which the step between them could be told: give freq, such as "
            '"D", "h", "MS"'
        )
    return found[0]


def _irregular(times: Any, name: str) -> str:
    gaps = times[1:] - times[:-1]
    usual = gaps.value_counts().index[0]
    odd = int(numpy.flatnonzero(gaps != usual)[0]) if (gaps != usual).any() else 0
    return (
        f"{name} has irregular timestamps: after {times[odd]} comes {times[odd + 1]}, and most steps are "
        f'{pandas.Timedelta(usual)}. Fill the gaps with NaN (df.asfreq), or give freq, such as "D", to take the rows '
        "as one step apart"
    )


def _step(past: NDArray[Any], lengths: Sequence[int], names: Names) -> Any:
    """The one step of numeric timestamps. Raises ArgumentError."""
    step = None
    start = 0
    for i, length in enumerate(lengths):
        gaps = numpy.diff(past[start : start + length])
        start += length
        if length < _FEWEST:
            continue
        if step is None:
            step = gaps[0] if past.dtype.kind in "iu" else gaps.mean()
        if not numpy.allclose(gaps, step, rtol=1e-3, atol=0):
            odd = int(numpy.abs(gaps - step).argmax()) + start - length
            raise ArgumentError(
                f"{names(i)} has irregular timestamps: after {past[odd]:g} comes {past[odd + 1]:g}, and others "
                f"are {step:g} apart. Fill the gaps with NaN, or give freq, the step as a number"
            )
    if step is None:
        raise ArgumentError(
            f"no series has {_FEWEST} timestamps, from which the step could be told: give freq, a number"
        )
    return step


def _same_times(given: Any, wanted: Any) -> NDArray[numpy.bool_]:
    given = pandas.DatetimeIndex(given)
    if (given.tz is None) != (wanted.tz is None):
        raise ArgumentError("one of df and future_df has time zones, the other has not")
    same: NDArray[numpy.bool_] = given == wanted
    return same


def _match_future(
    future: Any,
    id_column: str | None,
    timestamp_column: str | None,
    ids: Any,
    horizon: int,
    times: Times | None,
    names: Names,
) -> Any:
    """`future` by series, in df's order, checked against the timestamps that are to be forecast."""
    future, lengths, _ = _by_series(future, id_column, timestamp_column, "future_df", ids)
    for i, length in enumerate(lengths):
        if length != horizon:
            raise ArgumentError(f"future_df has {length} rows of {names(i)}; it must have {horizon}, one a step")
    if times is not None and timestamp_column is not None:
        given, wanted = future[timestamp_column], times.future
        if pandas.api.types.is_numeric_dtype(given) != isinstance(wanted, numpy.ndarray):
            raise ArgumentError(f"future_df's column {timestamp_column!r} holds {given.dtype}, and df's another kind")
        same = numpy.isclose(given, wanted) if isinstance(wanted, numpy.ndarray) else _same_times(given, wanted)
        for place in numpy.flatnonzero(~same)[:1]:
            raise ArgumentError(
                f"future_df has {future[timestamp_column].iloc[int(place)]} for {names(int(place) // horizon)} where "
                f"{times.future[int(place)]} follows"
            )
    return future
