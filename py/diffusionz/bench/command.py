"""What `diffusionz bench` does with its arguments, and what it prints."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from diffusionz._errors import ArgumentError, DeviceError


def _say(text: str) -> None:
    """What goes on, while nobody knows the result yet."""
    print(f"diffusionz: {text}", file=sys.stderr, flush=True)


def gpu(args: argparse.Namespace) -> dict[str, Any]:
    """`--gpu`: prints the table, unless it is wanted as JSON, and returns it as that."""
    from diffusionz._ffi import lib
    from diffusionz.bench import gpu, table

    gpu.parts_of(args.only)
    if args.limit is not None and not args.limit > 0:
        raise ArgumentError(f"--limit is {args.limit:g}; it must be over 0")
    if args.device == "cpu":
        raise ArgumentError("--gpu measures a GPU; --device is cpu")
    if lib.diffusionz_device_count() < 1:
        raise DeviceError("there is no GPU here that the library can use: bench --gpu has nothing to measure")
    device = "cuda:0" if args.device == "auto" else args.device
    about = gpu.about(device)
    if not args.json:
        print(f"{about['cpu']}; {about['versions']}")
    families = tuple(args.only) or gpu.FAMILIES
    rows = gpu.run(gpu.Options(device, families, args.model, args.peers, args.scratch, args.limit), _say)
    if args.record is not None:
        table.write_csv(args.record, rows, about)
    if not args.json:
        print(table.as_table(rows))
    return about | {"rows": [row.to_json() for row in rows]}


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """`--quality`: likewise."""
    from diffusionz.bench import quality
    from diffusionz.bench.gpu import is_forecaster
    from diffusionz.chronos2 import Chronos2
    from diffusionz.hub import locate
    from diffusionz.image import format_of
    from diffusionz.zimage import ZImage

    if args.pictures < 1:
        raise ArgumentError(f"--pictures is {args.pictures}; it must be at least 1")
    if args.output is not None:
        format_of(args.output)
    model = args.model or "demo"
    about: dict[str, Any] = {"model": model, "device": args.device, "precision": args.precision}
    forecasts = is_forecaster(locate(model, "zimage"))
    names = [name for name in (Chronos2 if forecasts else ZImage)._PRECISIONS if name != "auto"]
    if args.precision not in names:
        raise ArgumentError(f'--precision is "{args.precision}"; it must be one of {", ".join(names)}')
    if forecasts:
        if args.output is not None or args.layers:
            raise ArgumentError("--output and --layers are for pictures, and this model forecasts")
        rows = quality.compare_forecasts(model, args.precision, args.device, _say)
        text = quality.forecasts_table(rows)
    else:
        rows = quality.compare_pictures(model, args.precision, args.device, args.pictures, args.size, args.output, _say)
        text = quality.pictures_table(rows)
        about["gate"] = quality.gate(rows, args.precision)
        if about["gate"]:
            text += "\n\n" + quality.gate_table(about["gate"])
        if args.layers:
            about["layers"] = quality.compare_layers(model, args.precision, args.device, args.size, _say)
            text += "\n\n" + quality.layers_table(about["layers"])
    if not args.json:
        print(text)
    return about | {"rows": rows}
