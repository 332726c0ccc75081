"""Damaged models: copies of links, whose files a test replaces, and safetensors files that lie about themselves."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any


def link_copy(model: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    for source in model.rglob("*"):
        target = to / source.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            target.symlink_to(source)
    return to


def replace(path: pathlib.Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def edit(path: pathlib.Path, **changes: Any) -> None:
    replace(path, json.dumps(json.loads(path.read_text()) | changes).encode())


def weights_of(folder: pathlib.Path) -> pathlib.Path:
    return next(folder.glob("*.safetensors"))


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def lie(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """Changes the entry of one tensor."""

    def apply(data: bytes) -> bytes:
        header, tensors = header_of(data)
        name = next(name for name in header if name != "__metadata__" and len(header[name]["shape"]) >= 1)
        change(header[name])
        return with_header(header, tensors)

    return apply


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the length": lambda data: data[:7],
    "cut in the header": lambda data: data[:100],
    "cut in the tensors": lambda data: data[: len(data) * 2 // 3],
    "cut by one byte": lambda data: data[:-1],
    "length 0": lambda data: struct.pack("<Q", 0) + data[8:],
    "length beyond the file": lambda data: struct.pack("<Q", len(data) + 1) + data[8:],
    "length 2^63": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "length 2^64-1": lambda data: struct.pack("<Q", 2**64 - 1) + data[8:],
    "length 2^64-8": lambda data: struct.pack("<Q", 2**64 - 8) + data[8:],
    "header is no JSON": lambda data: data[:8] + b"x" * struct.unpack("<Q", data[:8])[0] + data[8:],
    "header is a list": lambda data: with_header([], b""),
    "header without tensors": lambda data: with_header({}, b""),
    "header of depth 100,000": lambda data: (
        struct.pack("<Q", 600_000) + b'{"a":' * 100_000 + b"1" + b"}" * 99_999 + b""
    ),
    "pickle": lambda data: b"\x80\x04\x95" + b"\x00" * 1000,
    "offset beyond the file": lie(lambda entry: entry.update(data_offsets=[2**40, 2**40 + 8])),
    "offset negative": lie(lambda entry: entry.update(data_offsets=[-8, 0])),
    "offset 2^64": lie(lambda entry: entry.update(data_offsets=[2**64, 2**64 + 8])),
    "offsets backwards": lie(lambda entry: entry.update(data_offsets=entry["data_offsets"][::-1])),
    "offsets are text": lie(lambda entry: entry.update(data_offsets="0,8")),
    "one offset": lie(lambda entry: entry.update(data_offsets=[0])),
    "no offsets": lie(lambda entry: entry.pop("data_offsets")),
    "shape greater than the bytes": lie(lambda entry: entry.update(shape=[n * 2 for n in entry["shape"]])),
    "shape overflows": lie(lambda entry: entry.update(shape=[2**32, 2**32])),
    "shape overflows to the right size": lie(lambda entry: entry.update(shape=[2**62, 4, *entry["shape"]])),
    "shape negative": lie(lambda entry: entry.update(shape=[-1, -1])),
    "shape of floats": lie(lambda entry: entry.update(shape=[1.5])),
    "shape is no list": lie(lambda entry: entry.update(shape=3)),
    "dtype unknown": lie(lambda entry: entry.update(dtype="Q7")),
    "dtype missing": lie(lambda entry: entry.pop("dtype")),
    "dtype is a number": lie(lambda entry: entry.update(dtype=16)),
    "entry is no object": lambda data: with_header({"x": 1}, b""),
}

# What a JSON file can be instead of a config.
BROKEN_JSON = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 100_000]
