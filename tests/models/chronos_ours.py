"""The engine's side: chronos_c_api.h as it is, through the binding's raw layer."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from diffusionz._ffi import ffi, lib, text

NULL = ffi.NULL
E = {name.removeprefix("DIFFUSIONZ_E_"): getattr(lib, name) for name in dir(lib) if name.startswith("DIFFUSIONZ_E_")}


@dataclasses.dataclass(frozen=True)
class Request:
    """ChronosRequest in numpy; what is not set is at its default."""

    rows: list[np.ndarray]  # float32 [length] each
    horizon: int
    levels: tuple[float, ...] | None = None
    group_ids: list[int] | None = None
    row_kinds: list[int] | None = None
    future: np.ndarray | None = None  # float32 [rows, horizon]
    context_length: int = 0
    monotone: int = 0
    constrain_ohlc: int = 0

    def select(self, rows: list[int]) -> Request:
        """The request for some of the rows alone, in the order given."""
        return dataclasses.replace(
            self,
            rows=[self.rows[i] for i in rows],
            group_ids=None if self.group_ids is None else [self.group_ids[i] for i in rows],
            row_kinds=None if self.row_kinds is None else [self.row_kinds[i] for i in rows],
            future=None if self.future is None else self.future[rows],
        )

    def native(self) -> tuple[Any, list[Any]]:
        """(ChronosRequest *, the arrays that must live as long)."""
        native = ffi.new("ChronosRequest *")
        lib.chronos_request_init(native)
        values = np.concatenate(self.rows, dtype=np.float32) if self.rows else np.empty(0, np.float32)
        offsets = np.cumsum([0, *map(len, self.rows)], dtype=np.int64)
        arrays = {
            "context": ("float", values),
            "context_offsets": ("int64_t", offsets),
            "group_ids": ("int64_t", self.group_ids),
            "row_kinds": ("int32_t", self.row_kinds),
            "future": ("float", self.future),
            "quantile_levels": ("double", self.levels),
        }
        dtypes = {"float": np.float32, "double": np.float64, "int64_t": np.int64, "int32_t": np.int32}
        kept = []
        for name, (kind, value) in arrays.items():
            if value is None:
                continue
            array = np.ascontiguousarray(value, dtypes[kind])
            kept.append(ffi.from_buffer(f"{kind}[]", array))
            setattr(native, name, kept[-1])
        native.row_count = len(self.rows)
        native.level_count = 0 if self.levels is None else len(self.levels)
        native.prediction_length = self.horizon
        native.context_length = self.context_length
        native.monotone, native.constrain_ohlc = self.monotone, self.constrain_ohlc
        return native, kept


class ChronosError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


def last_error() -> str:
    return text(lib.diffusionz_last_error())


def check(status: int) -> None:
    if status != lib.DIFFUSIONZ_OK:
        raise ChronosError(status, last_error())


def array_of(pointer: Any, kind: str, *shape: int) -> np.ndarray:
    """A copy of C memory."""
    count = int(np.prod(shape))
    dtype = {"float": np.float32, "double": np.float64, "int64_t": np.int64}[kind]
    return np.frombuffer(ffi.buffer(pointer, count * np.dtype(dtype).itemsize), dtype).reshape(shape).copy()


@dataclasses.dataclass(frozen=True)
class Forecast:
    quantiles: np.ndarray  # float32 [targets, levels, horizon]
    levels: np.ndarray  # [levels]
    median_index: int


@dataclasses.dataclass(frozen=True)
class Embedding:
    tokens: list[np.ndarray]  # of each row, float32 [tokens, width]
    loc: np.ndarray  # [rows]
    scale: np.ndarray  # [rows]


class Engine:
    """A loaded model. Options are ChronosInitOptions' fields."""

    FLOAT32: int = lib.DIFFUSIONZ_PRECISION_FLOAT32
    BFLOAT16: int = lib.DIFFUSIONZ_PRECISION_BFLOAT16
    FLOAT16: int = lib.DIFFUSIONZ_PRECISION_FLOAT16
    TF32: int = lib.DIFFUSIONZ_PRECISION_TF32

    def __init__(self, folder: pathlib.Path | str, **options: Any) -> None:
        native, out = ffi.new("ChronosInitOptions *"), ffi.new("ChronosContext **")
        lib.chronos_init_options_init(native)
        native.device_id = -1
        lora = options.pop("lora_path", None)
        kept = ffi.new("char[]", os.fsencode(lora)) if lora is not None else NULL
        native.lora_path = kept
        for name, value in options.items():
            setattr(native, name, value)
        check(lib.chronos_init_with_options(os.fsencode(folder), native, out))
        self.ctx = ffi.gc(out[0], lib.chronos_free)

    @property
    def info(self) -> dict[str, Any]:
        return json.loads(text(lib.chronos_model_info(self.ctx)))

    def forecast(self, request: Request, task: Any = NULL) -> Forecast:
        native, _kept = request.native()
        out = ffi.new("ChronosForecast *")
        try:
            check(lib.chronos_forecast(self.ctx, native, task, out))
            shape = out.target_count, out.level_count, out.prediction_length
            return Forecast(
                array_of(out.quantiles, "float", *shape),
                array_of(out.quantile_levels, "double", out.level_count),
                out.median_index,
            )
        finally:
            lib.chronos_free_forecast(out)

    def embed(self, request: Request, task: Any = NULL) -> Embedding:
        native, _kept = request.native()
        out = ffi.new("ChronosEmbedding *")
        try:
            check(lib.chronos_embed(self.ctx, native, task, out))
            offsets = array_of(out.token_offsets, "int64_t", out.row_count + 1)
            values = array_of(out.values, "float", int(offsets[-1]), out.width)
            return Embedding(
                np.split(values, offsets[1:-1]),
                array_of(out.loc, "float", out.row_count),
                array_of(out.scale, "float", out.row_count),
            )
        finally:
            lib.chronos_free_embedding(out)

    def close(self) -> None:
        ffi.release(self.ctx)
