"""`Image`: a picture that was drawn, and reading pictures back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from diffusionz._errors import ArgumentError, ImageError
from diffusionz.hub import Path

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

# File extension -> what it is written as.
FORMATS = {".webp": "webp", ".png": "png"}


class Image:
    """A picture in memory, uint8 RGB, with what it was drawn from. `ZImage.generate` makes it."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    seed: int
    """The seed that drew it, also when none was given."""
    timings: dict[str, float]
    """Milliseconds of the call that drew it (a batch shares them): "queue", "text", "denoise", "decode", "total"."""

    def __init__(
        self, rgb: bytearray, width: int, height: int, *, seed: int, timings: dict[str, float], metadata_json: str
    ) -> None:
        self._rgb = rgb
        self.width = width
        self.height = height
        self.seed = seed
        self.timings = timings
        self._metadata_json = metadata_json

    @property
    def metadata(self) -> dict[str, Any]:
        """The parameters that `save` writes into the file, and that `diffusionz info FILE` reads back."""
        import json

        return dict(json.loads(self._metadata_json))

    @property
    def pixels(self) -> NDArray[numpy.uint8]:
        """uint8 [height, width, 3], rows from the top. A view of the picture's own memory: what is written there is
        what is saved."""
        import numpy

        return numpy.frombuffer(self._rgb, numpy.uint8).reshape(self.height, self.width, 3)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        import numpy

        return numpy.array(self.pixels, dtype=dtype, copy=copy)

    @property
    def webp(self) -> bytes:
        """The picture as a lossy WebP file of quality 90, encoded anew each time."""
        return self.encode("webp")

    @property
    def png(self) -> bytes:
        """The picture as a PNG file, encoded anew each time."""
        return self.encode("png")

    def encode(self, format: str = "webp", *, quality: int = 90, lossless: bool = False) -> bytes:
        """The bytes of a file with the generation parameters inside.

        `format` is "webp" or "png"; `quality` (0..100) is that of lossy WebP; `lossless` asks for lossless WebP.
        Raises ArgumentError.
        """
        from diffusionz._ffi import c_string, check, ffi, lib

        if format not in FORMATS.values():
            raise ArgumentError(f'format is "{format}"; it must be one of {", ".join(FORMATS.values())}')
        code = (
            lib.DIFFUSIONZ_FORMAT_PNG
            if format == "png"
            else lib.DIFFUSIONZ_FORMAT_WEBP_LOSSLESS
            if lossless
            else lib.DIFFUSIONZ_FORMAT_WEBP
        )
        out = ffi.new("DiffusionZResult *")
        rgb = ffi.from_buffer("uint8_t[]", self._rgb)
        metadata = c_string("metadata", self._metadata_json)
        try:
            check(lib.diffusionz_image_encode(rgb, self.width, self.height, code, quality, metadata, out))
            return bytes(ffi.buffer(out.image_data, out.image_len))
        finally:
            lib.diffusionz_free_result(out)

    def save(self, path: Path, *, quality: int = 90, lossless: bool = False) -> None:
        """Writes the picture to `path`, in the format of its extension: .webp or .png.

        The file appears whole or not at all. Raises ArgumentError for another extension or quality, OSError when the
        file cannot be written.
        """
        write_atomically(path, self.encode(format_of(path), quality=quality, lossless=lossless))

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return f"<Image {self.width}x{self.height}, seed {self.seed}>"


def format_of(path: Path) -> str:
    """The format that a file's extension asks for. Raises ArgumentError."""
    extension = os.path.splitext(os.fspath(path))[1]
    if extension.lower() not in FORMATS:
        raise ArgumentError(f'"{os.fspath(path)}" ends in "{extension}"; it must end in {" or ".join(FORMATS)}')
    return FORMATS[extension.lower()]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, then renames it there: a reader never sees half a file, and a failure leaves the
    old one. What is no regular file (a pipe, a device) is written to directly. Raises OSError."""
    target = os.path.realpath(path)  # the file that a symbolic link leads to, not the link, is replaced
    if os.path.exists(target) and not os.path.isfile(target):
        with open(target, "wb") as file:  # a directory raises the error that says so
            file.write(data)
        return
    temporary = os.path.join(os.path.dirname(target), f".{os.urandom(8).hex()}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:  # the caller knows the file by its own name
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        if os.path.exists(target):
            os.chmod(temporary, os.stat(target).st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def read_metadata(data: bytes) -> dict[str, Any]:
    """The generation parameters inside a PNG or WebP file's bytes; {} when it has none. Raises ImageError."""
    import json

    from diffusionz._ffi import check, ffi, lib, take_string

    out = ffi.new("char **")
    check(lib.diffusionz_image_metadata(ffi.from_buffer("uint8_t[]", data), len(data), out))
    return dict(json.loads(take_string(out)))


def to_rgb(source: Any) -> tuple[Any, int, int]:
    """`source` as contiguous uint8 RGB: (buffer, width, height).

    `source` is a path of or the bytes of a PNG or WebP file, an `Image`, or anything that numpy reads as uint8
    [height, width, 3] (an array, a PIL picture in mode RGB). Raises ImageError, ArgumentError, OSError.
    """
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            data = file.read()
        try:
            return _decode(data)
        except ImageError as error:
            raise ImageError(f"{os.fspath(source)}: {error}") from None
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source))
    if isinstance(source, Image):
        return bytes(source._rgb), source.width, source.height
    import numpy

    array = numpy.asarray(source)
    if array.dtype != numpy.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ArgumentError(
            f"init_image is {array.dtype} {list(array.shape)}; it must be uint8 [height, width, 3], "
            "or the path or bytes of a PNG or WebP file"
        )
    return numpy.ascontiguousarray(array), array.shape[1], array.shape[0]


def _decode(data: bytes) -> tuple[bytes, int, int]:
    from diffusionz._ffi import check, ffi, lib

    out = ffi.new("DiffusionZResult *")
    try:
        check(lib.diffusionz_image_decode(ffi.from_buffer("uint8_t[]", data), len(data), out))
        return bytes(ffi.buffer(out.image_data, out.image_len)), out.width, out.height
    finally:
        lib.diffusionz_free_result(out)
