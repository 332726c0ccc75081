"""What `Chronos2.forecast` takes, as the rows that a `ChronosRequest` points to.

Rows of an item stand together: its targets, then the covariates known of the past only, then those known of the future
too, as in the reference implementation (chronos-forecasting 2.3.2).
"""

from __future__ import annotations

import dataclasses
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from diffusionz._errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float32]
    Integers = NDArray[numpy.int64]
    # A covariate of all items, one after the other: numbers, or a pandas.Series of dtype category.
    Column = Any

_INPUTS = (
    "inputs must be numbers of one series, a 2-D array [series, time], a 3-D array [series, variates, time], "
    'a list of 1-D and 2-D arrays, or dicts with "target", "past_covariates", "future_covariates"'
)
_KEYS = ("target", "past_covariates", "future_covariates")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one call."""

    context: Floats
    """[offsets[-1]]: the rows' observations, one row after the other; NaN is missing."""
    offsets: Integers
    """[rows + 1]: row i is context[offsets[i]:offsets[i + 1]]."""
    items: Integers
    """[rows], ascending: which entry of the inputs a row belongs to."""
    is_target: NDArray[numpy.bool_]
    """[rows]: whether a row is forecast; the others are covariates."""
    future: Floats | None
    """[rows, horizon]: values known in advance, NaN where not; None when none are."""

    def row(self, i: int) -> Floats:
        return self.context[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> Integers:
        """[rows]"""
        return numpy.diff(self.offsets)

    def last(self) -> Floats:
        """[rows]: each row's last value, which may be missing."""
        return self.context[self.offsets[1:] - 1]

    def log_returns(self, name: Names) -> Rows:
        """The same rows, one step shorter: targets as log(price / price before), covariates without their first value.

        `name` tells of an item for a message. Raises ArgumentError where there is no price to start from.
        """
        of_target = numpy.repeat(self.is_target, self.lengths)
        with numpy.errstate(invalid="ignore"):
            for i in self.items[_row_of(self.offsets, of_target & (self.context <= 0))]:
                raise ArgumentError(f"{name(i)}: returns need prices over 0, and one is not")
        for i in self.items[self.is_target & (self.lengths < 2)]:
            raise ArgumentError(f"{name(i)}: returns need two prices at least")
        for i in self.items[self.is_target & numpy.isnan(self.last())]:
            raise ArgumentError(f"{name(i)}: returns need the last price of every target, and one is missing")
        logs = numpy.where(of_target, self.context, 1)
        logs = numpy.log(logs, dtype=numpy.float64)
        values = numpy.where(of_target[1:], numpy.diff(logs), self.context[1:]).astype(numpy.float32)
        within = numpy.ones(len(self.context), bool)
        within[self.offsets[:-1]] = False  # a row's first value has none before it
        offsets = self.offsets - numpy.arange(len(self.offsets))
        rows = dataclasses.replace(self, context=values[within[1:]], offsets=offsets)
        rows.refuse_unobserved(name)
        return rows

    def one_step_back(self) -> tuple[Rows, NDArray[numpy.bool_]]:
        """(the rows as they were one step before, horizon 1, with what is known of the future; [rows], whether a row
        could be cut back: the others have nothing observed before their last value, and stay as they are)."""
        seen = ~numpy.isnan(self.context)
        seen[self.offsets[1:] - 1] = False
        cut = numpy.add.reduceat(seen, self.offsets[:-1], dtype=numpy.int64) > 0
        # All rows of an item, or none: they share a time axis.
        cut = numpy.bincount(self.items, ~(cut | ~self.is_target))[self.items] == 0
        cut &= self.lengths > 1
        keep = numpy.ones(len(self.context), bool)
        keep[self.offsets[1:][cut] - 1] = False
        offsets = numpy.concatenate([[0], numpy.cumsum(self.lengths - cut)])
        future = None
        if self.future is not None:
            known = (~numpy.isnan(self.future)).any(axis=1)
            future = numpy.where(known & cut, self.last(), numpy.nan)[:, None].astype(numpy.float32)
        return dataclasses.replace(self, context=self.context[keep], offsets=offsets, future=future), cut

    def refuse_unobserved(self, name: Names) -> None:
        """Raises ArgumentError for a target without an observation."""
        seen = numpy.add.reduceat(~numpy.isnan(self.context), self.offsets[:-1], dtype=numpy.int64)
        for i in self.items[self.is_target & (seen == 0)]:
            raise ArgumentError(f"{name(i)}: every value that the model would read is missing (NaN)")


class Names:
    """How messages call an item of the inputs."""

    def __init__(self, count: int, ids: Sequence[Any] | None = None, only: str = "inputs") -> None:
        """`ids` of the items; without them, an item is an entry of the inputs, or the `only` one."""
        self._ids = ids
        self._count = count
        self._only = only

    def __call__(self, item: Any) -> str:
        if self._ids is not None:
            return f"series {self._ids[int(item)]!r}"
        return self._only if self._count == 1 else f"inputs[{int(item)}]"


def to_rows(inputs: Any, horizon: int, keep: int) -> tuple[Rows, Names]:
    """The rows of any kind of input, with at most `keep` values each, and what to call their items.

    Raises ArgumentError for values that cannot be forecast, TypeError for what holds no numbers.
    """
    if isinstance(inputs, Mapping):
        inputs = [inputs]
    if isinstance(inputs, (str, bytes)) or hasattr(inputs, "columns"):
        frame = ": a frame goes to forecast_df" if hasattr(inputs, "columns") else ""
        raise TypeError(f"{_INPUTS}, not {type(inputs).__name__}{frame}")
    entries: list[Any] | None = None
    if not hasattr(inputs, "__array__"):
        try:
            entries = list(inputs)
        except TypeError:
            raise TypeError(f"{_INPUTS}, not {type(inputs).__name__}") from None
    elif isinstance(inputs, numpy.ndarray) and inputs.dtype.kind == "O" and inputs.ndim == 1 and len(inputs):
        # numbers and None; or an array of arrays
        entries = None if all(map(_is_number, inputs)) else list(inputs)
    if entries is None:
        rows, names = _from_array(to_floats(inputs, "inputs"), keep)
    elif not entries:
        raise ArgumentError("inputs is empty; at least one series is needed")
    elif any(isinstance(entry, Mapping) for entry in entries):
        rows, names = _from_dicts(entries, horizon, keep)
    elif all(map(_is_number, entries)):
        rows, names = _from_array(to_floats(entries, "inputs"), keep)
    else:
        for i, entry in enumerate(entries):
            if not hasattr(entry, "__len__") or isinstance(entry, (str, bytes)):
                raise TypeError(f"inputs[{i}] is {entry!r}; a list is one of numbers, of arrays, or of dicts")
        rows, names = _from_list(entries, keep)
    rows.refuse_unobserved(names)
    return rows, names


def to_floats(value: Any, name: str) -> Floats:
    """`value` as float32 of its own shape. Booleans are 0 and 1; None, NA and masked values are NaN.

    Raises TypeError for what holds no numbers, ArgumentError for infinity and for what float32 cannot hold.
    """
    array = _to_numpy(value, name)
    if array.dtype == object:
        if any(isinstance(entry, str) for entry in array.flat):
            raise TypeError(f"{name} must hold numbers, not text")
        try:
            array = _none_for_na(array).astype(numpy.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must hold numbers: {error}") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, not {array.dtype}")
    with numpy.errstate(over="ignore"):
        floats = array.astype(numpy.float32)
    if numpy.isinf(floats).any():
        place = tuple(int(i) for i in numpy.argwhere(numpy.isinf(floats))[0])
        where = f"{name}[{', '.join(map(str, place))}] is {array[place]}"
        if numpy.isinf(array[place]):
            raise ArgumentError(f"{where}; it must be finite, or NaN where it is missing")
        raise ArgumentError(f"{where}, more than float32 holds ({numpy.finfo(numpy.float32).max:.3g})")
    return floats


def from_columns(
    targets: Floats,
    past: Mapping[str, Column],
    future: Mapping[str, Column | None],
    lengths: Sequence[int],
    horizon: int,
    keep: int,
) -> Rows:
    """The rows of items that lie one after the other in columns.

    Parameters:
        targets: [targets, sum of lengths].
        past: covariate -> [sum of lengths].
        future: covariate known in advance -> [items * horizon], or None when it was announced without values. What
            is categorical in `past` is a pandas.Series here.
        lengths: observations of each item.
    """
    order = [name for name in past if name not in future] + [name for name in past if name in future]
    count, height = len(lengths), len(targets) + len(order)
    ends = numpy.cumsum(lengths, dtype=numpy.int64)
    encoded: list[Floats] = [*targets]
    known = None
    for name in order:
        observed, announced = past[name], future.get(name)
        if not isinstance(observed, numpy.ndarray):
            observed, announced = _encode(observed, announced, targets, lengths, horizon)
        if announced is not None:
            if known is None:
                known = numpy.full((count, height, horizon), numpy.nan, numpy.float32)
            known[:, len(encoded)] = announced.reshape(count, horizon)
        encoded.append(observed)
    rows = numpy.stack(encoded)
    kept = numpy.minimum(numpy.asarray(lengths, numpy.int64), keep)
    return Rows(
        context=numpy.concatenate([rows[:, end - n : end].ravel() for end, n in zip(ends, kept, strict=True)]),
        offsets=_offsets(numpy.repeat(kept, height)),
        items=numpy.repeat(numpy.arange(count), height),
        is_target=numpy.tile(numpy.arange(height) < len(targets), count),
        future=None if known is None else known.reshape(count * height, horizon),
    )


# --- Kinds of input ---


def _from_array(array: Floats, keep: int) -> tuple[Rows, Names]:
    """One series, [series, time], or [series, variates, time]."""
    if not 1 <= array.ndim <= 3:
        raise ArgumentError(f"inputs has {array.ndim} dimensions; {_INPUTS}")
    if array.size == 0:
        raise ArgumentError(f"inputs has the shape {list(array.shape)}: it holds no observation")
    array = array.reshape(1, -1) if array.ndim == 1 else array
    count = len(array)
    array = array[..., -keep:]
    rows = array.reshape(-1, array.shape[-1])
    return (
        Rows(
            context=numpy.ascontiguousarray(rows).reshape(-1),
            offsets=_offsets(numpy.full(len(rows), array.shape[-1])),
            items=numpy.repeat(numpy.arange(count), len(rows) // count),
            is_target=numpy.ones(len(rows), bool),
            future=None,
        ),
        Names(count),
    )


def _from_list(entries: list[Any], keep: int) -> tuple[Rows, Names]:
    """[time] and [variates, time]."""
    names = Names(len(entries))
    arrays = []
    for i, entry in enumerate(entries):
        array = to_floats(entry, names(i))
        if array.ndim not in (1, 2) or array.size == 0:
            raise ArgumentError(
                f"{names(i)} has the shape {list(array.shape)}; it must be [time] or [variates, time], "
                "with one observation at least"
            )
        arrays.append(array.reshape(-1, array.shape[-1])[:, -keep:])
    heights = [len(array) for array in arrays]
    return (
        Rows(
            context=numpy.concatenate([array.ravel() for array in arrays]),
            offsets=_offsets(numpy.repeat([array.shape[1] for array in arrays], heights)),
            items=numpy.repeat(numpy.arange(len(arrays)), heights),
            is_target=numpy.ones(sum(heights), bool),
            future=None,
        ),
        names,
    )


def _from_dicts(entries: list[Any], horizon: int, keep: int) -> tuple[Rows, Names]:
    """Targets with covariates; one schema for all."""
    names = Names(len(entries))
    read = [_Entry.read(entry, names(i), horizon) for i, entry in enumerate(entries)]
    for i, entry in enumerate(read):
        for (what, first), this in zip(read[0].schema.items(), entry.schema.values(), strict=True):
            if first != this:
                raise ArgumentError(f"{names(i)} has other {what} than {names(0)}: {this}, not {first}")
    past: dict[str, Column] = {}
    future: dict[str, Column | None] = {}
    for name in sorted(read[0].past):
        past[name] = _as_column(numpy.concatenate([entry.past[name] for entry in read]), f"the covariate {name!r}")
    for name in sorted(read[0].future):
        values = numpy.concatenate([entry.future[name] for entry in read])
        if len(values) == 0:
            future[name] = None
        elif isinstance(past[name], numpy.ndarray):
            future[name] = to_floats(values, f"the covariate {name!r}'s future")
        else:
            import pandas

            future[name] = pandas.Series(values)
    targets = numpy.concatenate([entry.target for entry in read], axis=1)
    lengths = [entry.target.shape[1] for entry in read]
    return from_columns(targets, past, future, lengths, horizon, keep), names


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A dict of the inputs: target [targets, time], covariates [time] and [horizon], or [0] when that is not known."""

    target: Floats
    past: dict[str, NDArray[Any]]
    future: dict[str, NDArray[Any]]

    @classmethod
    def read(cls, entry: Any, where: str, horizon: int) -> _Entry:
        """Raises ArgumentError, TypeError."""
        if not isinstance(entry, Mapping):
            raise TypeError(f"{where} is a {type(entry).__name__}; all inputs must be dicts, or none")
        for key in entry:
            if key not in _KEYS:
                raise ArgumentError(f"{where} has the key {key!r}; the keys are {', '.join(_KEYS)}")
        if "target" not in entry:
            raise ArgumentError(f'{where} has no "target"')
        target = to_floats(entry["target"], f'{where}["target"]')
        if target.ndim not in (1, 2) or target.size == 0:
            raise ArgumentError(
                f'{where}["target"] has the shape {list(target.shape)}; it must be [time] or [targets, time], '
                "with one observation at least"
            )
        target = target.reshape(-1, target.shape[-1])
        past, future = ({} if entry.get(key) is None else entry[key] for key in _KEYS[1:])
        past = _read_covariates(past, f'{where}["past_covariates"]', target.shape[1], "the target")
        future = _read_covariates(future, f'{where}["future_covariates"]', horizon, "the horizon")
        for name in future:
            if name not in past:
                raise ArgumentError(
                    f'{where}["future_covariates"] has {name!r}, whose past is not in "past_covariates" '
                    f"(there: {', '.join(map(repr, past)) or 'none'})"
                )
        for name, values in past.items():
            if values.size == 0:
                raise ArgumentError(f'{where}["past_covariates"][{name!r}] has no values')
        return cls(target, past, future)

    @property
    def schema(self) -> dict[str, Any]:
        """What all entries must have in common."""
        return {
            "targets": len(self.target),
            "past covariates": sorted(self.past),
            "future covariates": sorted(self.future),
            "future covariates without values": sorted(name for name, values in self.future.items() if not values.size),
        }


def _read_covariates(covariates: Any, where: str, length: int, of: str) -> dict[str, NDArray[Any]]:
    """{name: [length] or, of None, [0]}. Raises ArgumentError, TypeError."""
    if not isinstance(covariates, Mapping):
        raise TypeError(f"{where} must be a dict of name: values")
    read: dict[str, NDArray[Any]] = {}
    for name, given in covariates.items():
        if not isinstance(name, str):
            raise TypeError(f"{where} has the name {name!r}; it must be a str")
        values = _to_numpy([] if given is None else given, f"{where}[{name!r}]")
        if values.size > 0 and values.shape != (length,):
            raise ArgumentError(
                f"{where}[{name!r}] has the shape {list(values.shape)}; it must be [{length}], as long as {of}"
            )
        read[name] = _as_covariate(values)
    return read


# --- Values ---


def _as_column(values: Any, name: str) -> Column:
    """Numbers as float32; all else, and booleans, as categories. As the reference decides it."""
    if numpy.issubdtype(values.dtype, numpy.number):
        return to_floats(values, name)
    import pandas

    try:
        return pandas.Series(values, dtype="category")
    except TypeError as error:
        raise TypeError(f"{name} holds neither numbers nor categories: {error}") from None


def _as_covariate(values: NDArray[Any]) -> NDArray[Any]:
    """`values`; a list of numbers among which some are None is one of numbers."""
    if values.dtype == object and values.size:
        plain = _none_for_na(values)
        if all(value is None or (isinstance(value, numbers.Real) and not isinstance(value, bool)) for value in plain):
            return plain.astype(numpy.float64)
    return values


def _none_for_na(values: NDArray[Any]) -> NDArray[Any]:
    """None in place of pandas' NA, which turns into no float. There is no NA where pandas was not imported."""
    pandas: Any = sys.modules.get("pandas")
    if pandas is not None:
        values = values.copy()
        values[pandas.isna(values)] = None
    return values


def _to_numpy(value: Any, name: str) -> NDArray[Any]:
    if hasattr(value, "detach"):  # a torch tensor, perhaps of a device or of bfloat16; torch is not imported here
        value = value.detach().cpu()
        try:
            return numpy.asarray(value.numpy())
        except TypeError:
            return numpy.asarray(value.float().numpy())
    if isinstance(value, numpy.ma.MaskedArray):
        return numpy.ma.filled(value.astype(numpy.float64), numpy.nan)
    if hasattr(value, "isna") and hasattr(value, "to_numpy") and getattr(value.dtype, "kind", "O") in "iufb":
        # pandas, whose NA is no number
        return numpy.asarray(value.to_numpy(dtype=numpy.float64, na_value=numpy.nan))
    try:
        return numpy.asarray(value)
    except ValueError:
        raise ArgumentError(f"{name} has rows of different lengths; give a list with one array a series") from None


def _is_number(value: Any) -> bool:
    """Whether `value` is no array: a number, or None for a missing one."""
    return not isinstance(value, (str, bytes)) and (not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0)


def _encode(
    past: Any, future: Any, targets: Floats, lengths: Sequence[int], horizon: int
) -> tuple[Floats, Floats | None]:
    """A categorical covariate as numbers: with one target its mean in the category, else the category's number.

    A missing value is a category of its own. A value of the future that the past has not seen gets the item's mean, or
    with several targets NaN.
    """
    categories = past.cat.categories
    missing, unseen = len(categories), len(categories) + 1
    codes = past.cat.codes.to_numpy(numpy.int64)
    codes = numpy.where(codes < 0, missing, codes)
    future_codes = None
    if future is not None:
        found = categories.get_indexer(future)
        future_codes = numpy.where(found < 0, numpy.where(future.isna(), missing, unseen), found)
    if len(targets) > 1:
        numbers = numpy.arange(unseen + 1, dtype=numpy.float32)
        numbers[unseen] = numpy.nan
        return numbers[codes], None if future_codes is None else numbers[future_codes]
    means = _category_means(codes, targets[0], lengths, unseen + 1)
    items = numpy.arange(len(lengths))
    return (
        means[numpy.repeat(items, lengths), codes],
        None if future_codes is None else means[numpy.repeat(items, horizon), future_codes],
    )


def _category_means(codes: Integers, target: Floats, lengths: Sequence[int], slots: int) -> Floats:
    """[items, slots]: the mean of an item's target where it is in a category, drawn to the item's mean by the weight of
    one observation: (mean + sum) / (1 + count)."""
    count = len(lengths)
    items = numpy.repeat(numpy.arange(count), lengths)
    observed = numpy.isfinite(target)
    values = numpy.where(observed, target, 0).astype(numpy.float64)
    cells = items * slots + codes
    sums = numpy.bincount(cells, values, count * slots).reshape(count, slots)
    counts = numpy.bincount(cells, observed, count * slots).reshape(count, slots)
    totals = counts.sum(axis=1, keepdims=True)
    means = sums.sum(axis=1, keepdims=True) / numpy.maximum(totals, 1)
    table: Floats = ((means + sums) / (1 + counts)).astype(numpy.float32)
    return table


def _offsets(lengths: NDArray[Any]) -> Integers:
    return numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)])


def _row_of(offsets: Integers, chosen: NDArray[numpy.bool_]) -> Integers:
    """The rows of the chosen values."""
    return numpy.searchsorted(offsets, numpy.flatnonzero(chosen), side="right") - 1
