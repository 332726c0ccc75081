"""diffusionz: a native engine for Z-Image, text to image, and Chronos-2, time-series forecasting.

    from diffusionz import ZImage

    image = ZImage("demo").generate("a red circle on a blue background", width=256, height=256, seed=7)
    image.save("out.png")

    from diffusionz import Chronos2

    forecast = Chronos2("demo").forecast([112, 118, 132, 129, 121, 135], prediction_length=3)
    print(forecast.summary())

Importing this package loads neither the engine nor torch: the first model does.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's, without importing typing
if TYPE_CHECKING:
    from diffusionz._errors import ArgumentError as ArgumentError
    from diffusionz._errors import Cancelled as Cancelled
    from diffusionz._errors import DeviceError as DeviceError
    from diffusionz._errors import DiffusionzError as DiffusionzError
    from diffusionz._errors import ImageError as ImageError
    from diffusionz._errors import InternalError as InternalError
    from diffusionz._errors import LoraError as LoraError
    from diffusionz._errors import ModelError as ModelError
    from diffusionz._errors import OutOfMemoryError as OutOfMemoryError
    from diffusionz.chronos2 import Chronos2 as Chronos2
    from diffusionz.chronos2 import Embedding as Embedding
    from diffusionz.client import ApiError as ApiError
    from diffusionz.client import AsyncClient as AsyncClient
    from diffusionz.client import Client as Client
    from diffusionz.client import ConnectionFailed as ConnectionFailed
    from diffusionz.forecast import Forecast as Forecast
    from diffusionz.image import Image as Image
    from diffusionz.progress import Preview as Preview
    from diffusionz.progress import Progress as Progress
    from diffusionz.zimage import ZImage as ZImage

    __version__: str

# Public name -> the module that holds it; loaded when first asked for.
_HOMES = {
    "ApiError": "client",
    "ArgumentError": "_errors",
    "AsyncClient": "client",
    "Cancelled": "_errors",
    "Chronos2": "chronos2",
    "Client": "client",
    "ConnectionFailed": "client",
    "DeviceError": "_errors",
    "DiffusionzError": "_errors",
    "Embedding": "chronos2",
    "Forecast": "forecast",
    "Image": "image",
    "ImageError": "_errors",
    "InternalError": "_errors",
    "LoraError": "_errors",
    "ModelError": "_errors",
    "OutOfMemoryError": "_errors",
    "Preview": "progress",
    "Progress": "progress",
    "ZImage": "zimage",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(f"diffusionz.{_HOMES[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("diffusionz")
    else:
        raise AttributeError(f"module 'diffusionz' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
