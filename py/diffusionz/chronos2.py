"""`Chronos2`: a loaded Chronos-2 model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffusionz._context import Model, watched
from diffusionz._errors import ArgumentError
from diffusionz.hub import Path
from diffusionz.progress import Progress

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from diffusionz._series import Rows
    from diffusionz.forecast import Forecast

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# A forecast of one series is over before a bar could be read.
_PATIENCE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Embedding:
    """The encoder's last hidden states, one entry an entry of the inputs. `Chronos2.embed` makes it."""

    values: list[NDArray[numpy.float32]]
    """[targets, tokens, width]: an entry's context patches, the register token when the model has one, and the first
    future patch; NaN for patches without an observation."""
    loc: list[NDArray[numpy.float32]]
    """[targets]: mean of the observations."""
    scale: list[NDArray[numpy.float32]]
    """[targets]: their standard deviation."""


class Chronos2(Model):
    """A Chronos-2 model, loaded on a device.

        with Chronos2("demo", device="cpu") as model:
            forecast = model.forecast([112, 118, 132, 129, 121, 135], prediction_length=3)
            forecast.quantiles                     # float32 [series, levels, horizon]

    Parameters:
        model: a folder in upstream's layout (config.json, model.safetensors), the name of a bundled model ("demo"), or
            a hub id "org/name" that `diffusionz pull` has fetched. Nothing is downloaded here.
        device: "auto" (the first CUDA device, else the CPU), "cpu", "cuda", or "cuda:1".
        precision: of the encoder's matrix products: "auto" (float32), "float32", "tf32" (CUDA devices), "float16" or
            "bfloat16". All else is float32.
        threads: CPU threads of the whole process; 0 leaves them as they are.
        lora: folder of an adapter that upstream's `fit` wrote, merged into the weights.
        working_memory_bytes: budget of a call beside its input and result; 0 picks one. A request of any size is cut
            to fit it.

    Raises ArgumentError, ModelError, LoraError, DeviceError, OutOfMemoryError.

    Calls may come from several threads; on one object they queue in the order of their arrival. Objects of one model
    on one device share its weights. Reference: Ansari et al. 2025, arXiv 2510.15821, as in chronos-forecasting 2.3.2.
    """

    _FAMILY = "chronos2"
    _PRECISIONS = ("auto", "float32", "tf32", "float16", "bfloat16")

    info: dict[str, Any]
    """What the model is: family, path, device, precision, parameters, context_length and prediction_length (of one
    pass) in steps, quantile_levels."""

    def __init__(
        self,
        model: Path = "demo",
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int = 0,
        lora: Path | None = None,
        working_memory_bytes: int = 0,
    ) -> None:
        super().__init__(model, precision)
        from diffusionz._ffi import c_int, c_string, ffi, lib

        options = ffi.new("ChronosInitOptions *")
        lib.chronos_init_options_init(options)
        lora_path = ffi.NULL if lora is None else c_string("lora", os.fspath(lora))
        options.lora_path = lora_path
        options.working_memory_bytes = c_int("working_memory_bytes", working_memory_bytes, bits=64)
        self._load(
            options,
            device,
            precision,
            threads,
            lib.chronos_init_with_options,
            lib.chronos_free,
            lib.chronos_model_info,
            lib.chronos_memory_info,
        )

    def forecast(
        self,
        inputs: Any,
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] | None = LEVELS,
        *,
        context_length: int | None = None,
        cross_learning: bool = False,
        group_ids: Sequence[int] | None = None,
        batch_size: int = 256,
        monotone: bool = False,
        constrain_ohlc: bool = False,
        returns: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
        progress: bool | None = None,
    ) -> Forecast:
        """Forecasts every target of `inputs`.

        Parameters:
            inputs: one series as numbers; several as a 2-D array [series, time]; several multivariate ones as a 3-D
                array [series, variates, time]; a list of 1-D and 2-D arrays [variates, time] of any lengths; or a dict,
                or a list of dicts of one schema, with
                    "target": [time] or [targets, time],
                    "past_covariates": {name: [time]}, numbers or categories,
                    "future_covariates": {name: [prediction_length]}, of those whose future is known.
                Whatever numpy can read is an array, torch's tensors too. NaN, None and NA are missing. Entries are
                independent of each other (but for a category of entries with several targets: its number is its place
                among those of all entries); within one, all rows inform all.
            prediction_length: steps; None for the model's horizon of one pass. Longer ones are unrolled.
            quantile_levels: ascending, each between 0 and 1; None for the model's own. Levels between the model's are
                interpolated, and those beyond its outermost are the outermost.
            context_length: steps of history to read; None, and anything longer, is the model's.
            cross_learning: all entries inform each other, in batches of entries until they have `batch_size` rows, as
                upstream does it. What is forecast then depends on the batches.
            group_ids: one number an entry: entries of one number inform each other.
            batch_size: rows; of `cross_learning` alone. Otherwise results do not depend on how rows are batched.
            monotone: sorts each step's quantiles, so that they never cross.
            constrain_ohlc: the targets of each entry are open, high, low, close: high becomes the four's maximum and
                low their minimum, at each step and level.
            returns: forecasts the targets' log returns and gives prices back (see `diffusionz.returns`).
            on_progress: called with a `Progress` (rows done, rows in all) some twenty times a second, and once at the
                end. What it raises stops the call and is raised here: raise `Cancelled` to stop.
            progress: whether to show a bar on stderr when it takes longer; None shows it in a terminal.

        Ctrl-C raises KeyboardInterrupt; the model stays usable.
        Raises ArgumentError, TypeError, OutOfMemoryError, DeviceError.
        """
        from diffusionz._series import to_rows
        from diffusionz.forecast import Labels

        horizon = self._horizon(prediction_length)
        rows, names = to_rows(inputs, horizon, self._keep(context_length) + bool(returns))
        return self._forecast(
            rows,
            Labels(names),
            horizon,
            quantile_levels,
            cross_learning=cross_learning,
            group_ids=group_ids,
            batch_size=batch_size,
            monotone=monotone,
            constrain_ohlc=constrain_ohlc,
            returns=returns,
            on_progress=on_progress,
            progress=progress,
        )

    def forecast_df(
        self,
        df: Any,
        *,
        future_df: Any = None,
        id_column: str | None = "item_id",
        timestamp_column: str | None = "timestamp",
        target: str | Sequence[str] = "target",
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] | None = LEVELS,
        freq: str | float | None = None,
        context_length: int | None = None,
        cross_learning: bool = False,
        batch_size: int = 256,
        monotone: bool = False,
        constrain_ohlc: bool = False,
        returns: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
        progress: bool | None = None,
        to_frame: bool = True,
    ) -> Any:
        """Forecasts a long frame of pandas or polars, and gives a frame of the same kind, as upstream's `predict_df`.

        Parameters:
            df: one row an observation. Columns beside id, timestamp and targets are covariates: known of the past, and
                of the future when `future_df` has them; numbers, or categories.
            future_df: the covariates that are known in advance: ids, timestamps and values of the horizon.
            id_column: tells the series apart; None when there is but one.
            timestamp_column: dates and times, or evenly spaced numbers; None when rows are in order, one step apart.
            target: the columns to forecast.
            freq: pandas' name of the step between rows ("D", "h", "MS"), or a number for numeric timestamps. None
                infers it, which needs a series of three rows. A given one is not compared with the timestamps.
            to_frame: False gives the `Forecast`, which plots and sums up, and whose `to_frame()` is that frame.

        The other parameters are those of `forecast`. The result has the columns id, timestamp ("step" where there is
        none), "target_name", "predictions" (the median), and one a level ("0.1"); series in the order in which they
        first appear, in each the targets, in each the steps.

        Raises ArgumentError also for timestamps that are missing, repeated, irregular, or too few to infer `freq`.
        """
        from diffusionz.frames import read_frame

        horizon = self._horizon(prediction_length)
        rows, labels = read_frame(
            df,
            future_df,
            id_column=id_column,
            timestamp_column=timestamp_column,
            targets=[target] if isinstance(target, str) else list(target),
            horizon=horizon,
            freq=freq,
            keep=self._keep(context_length) + bool(returns),
        )
        forecast = self._forecast(
            rows,
            labels,
            horizon,
            quantile_levels,
            cross_learning=cross_learning,
            group_ids=None,
            batch_size=batch_size,
            monotone=monotone,
            constrain_ohlc=constrain_ohlc,
            returns=returns,
            on_progress=on_progress,
            progress=progress,
        )
        return forecast.to_frame() if to_frame else forecast

    def embed(
        self,
        inputs: Any,
        *,
        context_length: int | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        progress: bool | None = None,
    ) -> Embedding:
        """The encoder's last hidden states of every target of `inputs`, which are those of `forecast`, without
        future_covariates. Raises as `forecast` does."""
        import numpy

        from diffusionz._ffi import check, ffi, lib
        from diffusionz._series import to_rows

        context = self._alive()
        rows, _ = to_rows(inputs, 0, self._keep(context_length))
        request = _Request(rows)

        def work(task: Any) -> Any:
            out = ffi.gc(ffi.new("ChronosEmbedding *"), lib.chronos_free_embedding)
            check(lib.chronos_embed(context, request.struct, task, out))
            return out

        out, _ = watched(work, on_progress, progress, unit="row", patience=_PATIENCE_SECONDS)
        count, width = len(rows.items), out.width
        offsets = _view(out, out.token_offsets, numpy.int64, count + 1)
        loc, scale = (_view(out, pointer, numpy.float32, count) for pointer in (out.loc, out.scale))
        tokens = _view(out, out.values, numpy.float32, int(offsets[-1]) * width).reshape(-1, width)
        starts = numpy.searchsorted(rows.items, numpy.arange(int(rows.items[-1]) + 1))
        ends = starts + numpy.bincount(rows.items, rows.is_target).astype(int)
        return Embedding(
            [tokens[offsets[a] : offsets[b]].reshape(b - a, -1, width) for a, b in zip(starts, ends, strict=True)],
            [loc[a:b] for a, b in zip(starts, ends, strict=True)],
            [scale[a:b] for a, b in zip(starts, ends, strict=True)],
        )

    # --- Parts of a forecast ---

    def _horizon(self, prediction_length: int | None) -> int:
        from diffusionz._ffi import c_int

        self._alive()
        horizon = int(self.info["prediction_length"]) if prediction_length is None else prediction_length
        horizon = c_int("prediction_length", horizon, bits=64)
        if horizon < 1:
            raise ArgumentError(f"prediction_length is {horizon}; it must be at least 1")
        return horizon

    def _keep(self, context_length: int | None) -> int:
        """How many values of a series the model reads."""
        from diffusionz._ffi import c_int

        self._alive()
        longest = int(self.info["context_length"])
        if context_length is None:
            return longest
        if c_int("context_length", context_length, bits=64) < 1:
            raise ArgumentError(f"context_length is {context_length}; it must be at least 1")
        return min(context_length, longest)

    def _forecast(
        self,
        rows: Rows,
        labels: Any,
        horizon: int,
        quantile_levels: Sequence[float] | None,
        *,
        cross_learning: bool,
        group_ids: Sequence[int] | None,
        batch_size: int,
        monotone: bool,
        constrain_ohlc: bool,
        returns: bool,
        on_progress: Callable[[Progress], object] | None,
        progress: bool | None,
    ) -> Forecast:
        import numpy

        from diffusionz.forecast import ALWAYS, Forecast
        from diffusionz.returns import to_prices

        if constrain_ohlc:
            counts = numpy.bincount(rows.items[rows.is_target])
            for item in numpy.flatnonzero(counts % 4):
                raise ArgumentError(
                    f"{labels.names(item)} has {counts[item]} targets; constrain_ohlc needs four: "
                    "open, high, low, close, in this order"
                )
        groups = _groups(rows, labels, cross_learning, group_ids, batch_size)
        asked = _levels(self.info["quantile_levels"] if quantile_levels is None else quantile_levels)
        levels = asked + [level for level in ALWAYS if all(abs(level - other) > 1e-9 for other in asked)]
        levels.sort()
        read = rows.log_returns(labels.names) if returns else rows

        def run(rows: Rows, horizon: int, levels: Sequence[float], **watching: Any) -> NDArray[numpy.float32]:
            request = _Request(rows, horizon, levels, groups)
            request.struct.monotone = bool(monotone)
            request.struct.constrain_ohlc = bool(constrain_ohlc) and not returns
            return self._run(request, **watching)

        values = run(read, horizon, levels, on_progress=on_progress, progress=progress)
        if returns:
            values = to_prices(values, levels, rows.last()[rows.is_target], constrain_ohlc=constrain_ohlc)

        @functools.cache
        def surprises() -> NDArray[numpy.bool_]:
            from diffusionz.forecast import SURPRISE, is_surprise

            before, cut = read.one_step_back()
            expected = run(before, 1, SURPRISE, on_progress=None, progress=None)
            return is_surprise(read, before, expected[:, :, 0], cut)

        return Forecast(values, levels, [levels.index(level) for level in asked], rows, labels, surprises)

    def _run(
        self, request: _Request, *, on_progress: Callable[[Progress], object] | None, progress: bool | None
    ) -> NDArray[numpy.float32]:
        """float32 [targets, levels, horizon], in the library's own memory."""
        import numpy

        from diffusionz._ffi import check, ffi, lib

        context = self._alive()

        def work(task: Any) -> Any:
            out = ffi.gc(ffi.new("ChronosForecast *"), lib.chronos_free_forecast)
            check(lib.chronos_forecast(context, request.struct, task, out))
            return out

        out, _ = watched(work, on_progress, progress, unit="row", patience=_PATIENCE_SECONDS)
        shape = (out.target_count, out.level_count, out.prediction_length)
        return _view(out, out.quantiles, numpy.float32, shape[0] * shape[1] * shape[2]).reshape(shape)


class _Request:
    """A `ChronosRequest` with all that it points to."""

    def __init__(
        self,
        rows: Rows,
        horizon: int | None = None,
        levels: Sequence[float] = (),
        groups: NDArray[numpy.int64] | None = None,
    ) -> None:
        from diffusionz._ffi import ffi, lib

        struct = ffi.new("ChronosRequest *")
        lib.chronos_request_init(struct)
        struct.row_count = len(rows.items)
        self._kept = [
            ffi.from_buffer("float[]", rows.context),
            ffi.from_buffer("int64_t[]", rows.offsets),
            ffi.from_buffer("int64_t[]", rows.items if groups is None else groups),
        ]
        struct.context, struct.context_offsets, struct.group_ids = self._kept
        if not rows.is_target.all():
            struct.row_kinds = self._keep("int32_t[]", (~rows.is_target).astype("int32"))  # CHRONOS_ROW_*
        if horizon is not None:
            struct.prediction_length = horizon
            struct.quantile_levels = self._keep_new("double[]", levels)
            struct.level_count = len(levels)
            if rows.future is not None:
                struct.future = self._keep("float[]", rows.future)
        self.struct: Any = struct

    def _keep(self, kind: str, array: NDArray[Any]) -> Any:
        from diffusionz._ffi import ffi

        self._kept.append(ffi.from_buffer(kind, array))
        return self._kept[-1]

    def _keep_new(self, kind: str, values: Sequence[float]) -> Any:
        from diffusionz._ffi import ffi

        self._kept.append(ffi.new(kind, list(values)))
        return self._kept[-1]


def _view(owner: Any, pointer: Any, dtype: Any, count: int) -> NDArray[Any]:
    """`count` values of C memory that `owner` frees: what is returned keeps it alive."""
    import numpy

    from diffusionz._ffi import ffi

    pointer = ffi.gc(pointer, lambda _, owner=owner: None)  # nothing to do but to hold the owner
    return numpy.frombuffer(ffi.buffer(pointer, count * numpy.dtype(dtype).itemsize), dtype)


def _levels(levels: Sequence[float]) -> list[float]:
    try:
        numbers = [float(level) for level in levels]
    except (TypeError, ValueError):
        raise TypeError(f"quantile_levels is {levels!r}; it must be numbers between 0 and 1") from None
    if not numbers:
        raise ArgumentError("quantile_levels is empty; at least one level is needed")
    for level in numbers:
        if not 0 < level < 1:
            raise ArgumentError(f"quantile_levels has {level:g}; each must be over 0 and under 1")
    for before, level in itertools.pairwise(numbers):
        if before >= level:
            raise ArgumentError(f"quantile_levels has {level:g} after {before:g}; they must ascend")
    return numbers


def _groups(
    rows: Rows, labels: Any, cross_learning: bool, group_ids: Sequence[int] | None, batch_size: int
) -> NDArray[numpy.int64] | None:
    """[rows]: which rows inform each other; None for those of an item."""
    import numpy

    count = int(rows.items[-1]) + 1
    if group_ids is not None:
        if cross_learning:
            raise ArgumentError("cross_learning and group_ids exclude each other")
        ids = numpy.asarray(group_ids)
        if ids.dtype.kind not in "iu" or ids.shape != (count,):
            raise ArgumentError(
                f"group_ids has the shape {list(ids.shape)} and the type {ids.dtype}; it must be {count} integers, one "
                "an entry of the inputs"
            )
        return ids.astype(numpy.int64)[rows.items]
    if not cross_learning:
        return None
    from diffusionz._ffi import c_int

    if c_int("batch_size", batch_size, bits=64) < 1:
        raise ArgumentError(f"batch_size is {batch_size}; it must be at least 1")
    # As upstream fills them: entry after entry, until a batch has `batch_size` rows or more.
    batches = numpy.empty(count, numpy.int64)
    batch = filled = 0
    for item, height in enumerate(numpy.bincount(rows.items)):
        batches[item] = batch
        filled += int(height)
        if filled >= batch_size:
            batch, filled = batch + 1, 0
    return batches[rows.items]
