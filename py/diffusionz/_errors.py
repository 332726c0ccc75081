"""The errors of the package, one class a status of the C ABI.

DiffusionzError
├── ArgumentError      (also a ValueError)   a parameter is out of its documented range
├── ModelError         (also an OSError)     the model's files are missing, damaged, or of another architecture
├── LoraError                                the LoRA file is missing, damaged, or does not fit the model
├── ImageError         (also a ValueError)   the bytes are not a picture that can be read, or it cannot be encoded
├── OutOfMemoryError   (also a MemoryError)  of the host or of the device; the engine stays usable
├── DeviceError                              there is no such device, or it reported a fault
├── Cancelled                                the call was stopped; raise it in `on_progress` to stop one
└── InternalError                            a defect in the library; please report the message
"""

from __future__ import annotations


class DiffusionzError(Exception):
    """Base of every error that the package raises on its own account."""


class ArgumentError(DiffusionzError, ValueError):
    """A parameter is out of its documented range."""


class ModelError(DiffusionzError, OSError):
    """The model's files are missing, damaged, or of another architecture."""


class LoraError(DiffusionzError):
    """The LoRA file is missing, damaged, or does not fit the model."""


class ImageError(DiffusionzError, ValueError):
    """The given bytes are not a picture that can be read, or it cannot be encoded."""


class OutOfMemoryError(DiffusionzError, MemoryError):
    """Memory of the host or of the device ran out; the engine stays usable."""


class DeviceError(DiffusionzError):
    """There is no such device, or it reported a fault."""


class Cancelled(DiffusionzError):
    """The call was stopped. Raise it in `on_progress` to stop one."""


class InternalError(DiffusionzError):
    """A defect in the library; please report the message."""


# Indexed by DIFFUSIONZ_E_*. The numbers are the ABI's and never change; tests/python holds them against the header.
BY_STATUS: dict[int, type[DiffusionzError]] = {
    1: ArgumentError,
    2: ModelError,
    3: LoraError,
    4: ImageError,
    5: OutOfMemoryError,
    6: DeviceError,
    7: Cancelled,
    8: InternalError,
}

# Users meet these classes as `diffusionz.ModelError`; tracebacks should say so too.
for _class in (DiffusionzError, *BY_STATUS.values()):
    _class.__module__ = "diffusionz"


def error_for(status: int, message: str) -> DiffusionzError:
    """The exception for a status that is not OK. A status newer than this package is an InternalError."""
    return BY_STATUS.get(status, InternalError)(message or f"the library returned status {status} without a message")
