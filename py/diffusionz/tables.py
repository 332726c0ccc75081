"""Files of numbers for the command line: reading and writing them, and telling which column is what."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from diffusionz._errors import ArgumentError, DiffusionzError
from diffusionz.image import write_atomically

EXTENSIONS = (".csv", ".parquet")  # of what is written; anything else that is read is taken for CSV

_SEPARATORS = ",;\t|"
_TIME_NAMES = ("timestamp", "date", "datetime", "time", "ds", "month", "week", "day", "year", "quarter")
_ID_NAMES = ("item_id", "id", "unique_id", "series", "series_id", "name", "symbol")
_TARGET_NAMES = ("target", "y", "value")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column is what."""

    targets: list[str]
    timestamp: str | None
    id: str | None


def read_table(file: str) -> Any:
    """A pandas frame of a CSV or Parquet file, or of CSV from stdin for "-". Raises OSError, DiffusionzError."""
    import pandas

    if file.lower().endswith(".parquet"):
        with open(file, "rb"):
            pass  # its own OSError, before pandas' many
        try:
            return pandas.read_parquet(file)
        except ImportError:
            raise DiffusionzError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from None
        except Exception as error:
            raise DiffusionzError(f"{file} cannot be read as Parquet: {error}") from None
    if file == "-":
        data, name = sys.stdin.buffer.read(), "stdin"
    else:
        with open(file, "rb") as opened:
            data = opened.read()
        name = file
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DiffusionzError(f"{name} is not UTF-8 text: {error}") from None
    header = text.partition("\n")[0]
    if not header.strip():
        raise DiffusionzError(f"{name} has no header line" if text.strip() else f"{name} is empty")
    separator = max(_SEPARATORS, key=header.count)
    try:
        frame = pandas.read_csv(io.StringIO(text), sep=separator)
    except (ValueError, pandas.errors.ParserError) as error:
        raise DiffusionzError(f"{name} cannot be read as CSV: {error}") from None
    if frame.empty:
        raise DiffusionzError(f"{name} has a header line, and no rows")
    return frame


def write_table(frame: Any, file: str) -> None:
    """Writes a pandas frame to a CSV or Parquet file, or as CSV to stdout for "-". Raises OSError, DiffusionzError."""
    if file == "-":
        frame.to_csv(sys.stdout, index=False)
    elif file.lower().endswith(".parquet"):
        data = io.BytesIO()
        try:
            frame.to_parquet(data, index=False)
        except ImportError:
            raise DiffusionzError(f"{file}: writing Parquet needs pyarrow: pip install pyarrow") from None
        write_atomically(file, data.getvalue())
    else:
        write_atomically(file, frame.to_csv(index=False).encode())


def choose_columns(
    frame: Any,
    *,
    targets: Sequence[str],
    timestamp: str | None,
    id: str | None,
    others: Sequence[str],
) -> tuple[Columns, list[str]]:
    """(which column is what, what was guessed, in words). What is not named is guessed where there is one answer.

    `others` are columns that have a part of their own. Raises ArgumentError, which says what to name.
    """
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    taken = [*targets, *others, *(name for name in (timestamp, id) if name is not None)]
    for name in taken:
        if name not in frame:
            raise ArgumentError(f'there is no column "{name}"; there are {_listed(frame.columns)}')
        if taken.count(name) > 1:
            raise ArgumentError(f'the column "{name}" is named twice')
    guesses: list[str] = []
    free = [column for column in frame.columns if column not in taken]

    if timestamp is None:
        candidates = [column for column in free if _is_time(frame[column], column)]
        timestamp = _only("dates", "--timestamp", candidates, _TIME_NAMES)
        if timestamp is not None:
            guesses.append(f"{timestamp} tells the time")
            free.remove(timestamp)
    if id is None and timestamp is not None and frame[timestamp].duplicated().any():
        candidates = [column for column in free if not is_numeric_dtype(frame[column])]
        id = _only("names of series", "--id", candidates or [c for c in free if c.lower() in _ID_NAMES], _ID_NAMES)
        if id is None:
            when = frame[timestamp][frame[timestamp].duplicated()].iloc[0]
            raise ArgumentError(
                f"two rows have the {timestamp} {when}: name the column that tells series apart by --id"
            )
        guesses.append(f"{id} tells series apart")
        free.remove(id)
    if not targets:
        candidates = [c for c in free if is_numeric_dtype(frame[c]) and not is_bool_dtype(frame[c])]
        target = _only("numbers", "--target", candidates, _TARGET_NAMES)
        if target is None:
            raise ArgumentError(f"no column holds numbers to forecast; there are {_listed(frame.columns)}")
        targets = [target]
        guesses.append(f"{target} is forecast")
    return Columns(list(targets), timestamp, id), guesses


def split_future(frame: Any, columns: Columns, known: Sequence[str], horizon: int | None) -> tuple[Any, Any]:
    """(the past, the future) of a frame whose last rows have the known covariates but no targets yet.

    The future is `horizon` rows a series, or all there are. Raises ArgumentError when there are fewer.
    """
    import pandas

    if columns.timestamp is not None:
        keys = [columns.timestamp] if columns.id is None else [columns.id, columns.timestamp]
        times = frame[columns.timestamp]
        if not pandas.api.types.is_numeric_dtype(times):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    frame = frame.assign(**{columns.timestamp: pandas.to_datetime(times)})
                except (ValueError, TypeError, OverflowError) as error:
                    raise ArgumentError(f'the column "{columns.timestamp}" holds what is no date: {error}') from None
        frame = frame.sort_values(keys, kind="stable")
    observed = frame[columns.targets].notna().any(axis=1)
    series = pandas.Series(0, frame.index) if columns.id is None else frame[columns.id]
    # After a series' last observation nothing is observed: a count from the end that stays at 0.
    ahead = observed[::-1].groupby(series[::-1], sort=False).cumsum()[::-1] == 0
    place = ahead.groupby(series, sort=False).cumsum()
    counts = ahead.groupby(series, sort=False).sum()
    fewest = int(counts.min())
    if fewest == 0 or (horizon is not None and fewest < horizon):
        of = "" if columns.id is None else f" for {columns.id} {counts.idxmin()}"
        raise ArgumentError(
            f"--known-future needs {'rows' if horizon is None else f'{horizon} rows'} at the end whose "
            f"{', '.join(columns.targets)} is empty, and there are {fewest}{of}: add them, or give --future FILE"
        )
    wanted = ahead & (place <= (fewest if horizon is None else horizon))
    keep = [c for c in (columns.id, columns.timestamp) if c is not None]
    return frame[~ahead], frame.loc[wanted, [*keep, *known]]


def _is_time(column: Any, name: str) -> bool:
    """Whether a column tells the time: dates, or rising numbers that are called so."""
    import pandas

    if pandas.api.types.is_bool_dtype(column):
        return False
    if pandas.api.types.is_numeric_dtype(column):
        return str(name).lower() in _TIME_NAMES and bool(column.is_monotonic_increasing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(pandas.to_datetime(column).notna().all())
    except (ValueError, TypeError, OverflowError):
        return False


def _only(what: str, option: str, candidates: Sequence[str], preferred: Sequence[str]) -> str | None:
    """The one candidate, or the one that goes by a usual name; None when there is none. Raises ArgumentError."""
    if len(candidates) > 1:
        usual = [name for name in preferred for column in candidates if str(column).lower() == name]
        named = [column for column in candidates if str(column).lower() in usual[:1]]
        if len(named) != 1:
            raise ArgumentError(f"several columns hold {what} ({_listed(candidates)}): say which with {option}")
        candidates = named
    return candidates[0] if candidates else None


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))


def format_of(file: str) -> None:
    """Raises ArgumentError for a file to write that is neither stdout nor of EXTENSIONS."""
    if file != "-" and os.path.splitext(file)[1].lower() not in EXTENSIONS:
        raise ArgumentError(f"{file} must end in {' or '.join(EXTENSIONS)}, or be - for stdout")
