"""What a model, the library and the machine are, without loading a model."""

from __future__ import annotations

import json
import os
from typing import Any

from diffusionz._errors import ModelError
from diffusionz.hub import bundled, locate

# Larger than any real header; a file that claims more is damaged or means harm.
_MAX_HEADER_BYTES = 100_000_000


def describe_library() -> dict[str, Any]:
    """Version, ABI version, devices, bundled models, and where C programs find the library."""
    from diffusionz._ffi import ffi, lib, text

    devices = []
    for device_id in range(-1, lib.diffusionz_device_count()):
        info = ffi.new("DiffusionZDeviceInfo *", {"struct_size": ffi.sizeof("DiffusionZDeviceInfo")})
        if lib.diffusionz_device_info(device_id, info) != lib.DIFFUSIONZ_OK:
            continue  # a device that faults is left out rather than hiding all others
        devices.append(
            {
                "device": "cpu" if device_id < 0 else f"cuda:{device_id}",
                "name": text(info.name),
                "memory_total_bytes": info.memory_total_bytes,
                "memory_free_bytes": info.memory_free_bytes,
                "compute_capability": info.compute_capability,
            }
        )
    package = os.path.dirname(__file__)
    return {
        "version": text(lib.diffusionz_version()),
        "abi_version": lib.diffusionz_abi_version(),
        "devices": devices,
        "bundled_models": bundled(),
        "include_dir": os.path.join(package, "include"),
        "library_dir": os.path.join(package, "lib"),
        "pkgconfig_dir": os.path.join(package, "lib", "pkgconfig"),
    }


def describe_model(model: str) -> dict[str, Any]:
    """A model's layout, and the parameters, precision and bytes of each component, from its files' headers.

    `model` is what `ZImage` or `Chronos2` takes; a short name that several bundled models share describes each, under
    its full name. Raises ModelError.
    """
    full_names = [name for name in bundled() if name.partition("-")[2] == model]
    if len(full_names) > 1:
        return {name: describe_model(name) for name in full_names}
    path = locate(full_names[0] if full_names else model)
    about: dict[str, Any] = {"model": model, "path": path}
    if os.path.isfile(path):
        return about | {"layout": "single file", "components": {"all": _component([path])}}
    config = os.path.join(path, "config.json")
    if os.path.isfile(config) and (forecasting := _read_json(config).get("chronos_config")):
        return about | _forecaster(path, forecasting)
    index = os.path.join(path, "model_index.json")
    if os.path.isfile(index):
        about |= {"layout": "diffusers", "pipeline": _read_json(index).get("_class_name")}
        scheduler = os.path.join(path, "scheduler", "scheduler_config.json")
        if os.path.isfile(scheduler):
            about["scheduler"] = {k: v for k, v in _read_json(scheduler).items() if not k.startswith("_")}
    else:
        about["layout"] = "single files in folders"
    components = {}
    for folder in sorted(os.listdir(path)):
        files = _safetensors_in(os.path.join(path, folder))
        if files:
            components[folder] = _component(files)
    if not components:
        raise ModelError(f"{path} holds no safetensors files in its folders: it is not a model")
    return about | {"components": components}


def _forecaster(path: str, config: Any) -> dict[str, Any]:
    """A Chronos-2's context length and horizon of one pass, in steps, its quantile levels and its files."""
    try:
        about = {
            "layout": "chronos2",
            "context_length": int(config["context_length"]),
            "prediction_length": int(config["max_output_patches"]) * int(config["output_patch_size"]),
            "quantile_levels": [float(level) for level in config["quantiles"]],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: config.json's chronos_config is damaged: {error!r}") from None
    files = _safetensors_in(path)
    if not files:
        raise ModelError(f"{path} holds no safetensors file: it is not a model")
    return about | {"components": {"model": _component(files)}}


def _safetensors_in(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]


def _component(files: list[str]) -> dict[str, Any]:
    parameters, size, kinds = 0, 0, set()
    for path in files:
        for name, tensor in _header(path).items():
            if name == "__metadata__":
                continue
            try:
                count = 1
                for length in tensor["shape"]:
                    count *= length
                parameters += count
                kinds.add(str(tensor["dtype"]))
            except (KeyError, TypeError):
                raise ModelError(f"{path}: the header's entry {name!r} has no shape or dtype") from None
        size += os.path.getsize(path)
    return {"parameters": parameters, "dtypes": sorted(kinds), "bytes": size, "files": len(files)}


def _header(path: str) -> dict[str, Any]:
    """The JSON header of a safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, os.path.getsize(path)):
            raise ModelError(f"{path} is not a safetensors file: its header would have {length} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ModelError(f"{path} has a damaged header: {error}") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path} has a damaged header: it is no JSON object")
    return header


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value
