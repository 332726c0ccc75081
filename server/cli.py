"""`diffusionz serve` and `diffusionz ps`. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from diffusionz._errors import ArgumentError, DiffusionzError

EXTRA = "pip install 'diffusionz[server]'"
PAYMENTS_CONFIG = "payments.toml"

SERVE_EPILOG = """\
examples:
  diffusionz serve --dev                         the page, both demo models, a chain of its own and a faucet
  diffusionz serve --free                        for programs on this machine; nothing costs anything
  diffusionz serve --payments shop/payments.toml sells calls; `diffusionz wallet create shop` makes that folder
  diffusionz serve --free --zimage Tongyi-MAI/Z-Image-Turbo --device cuda --precision fp8 --preload Z-Image-Turbo
  diffusionz serve --config server.toml          several models, limits, providers

then:
  curl -s 127.0.0.1:8100/generate --json '{"prompt": "a red circle on a blue background"}' -o out.webp
  curl -s 127.0.0.1:8100/forecast --json '{"values": [112, 118, 132, 129, 121, 135, 148, 148], "prediction_length": 4}'

One of --free, --dev and --payments says who pays; --payments is meant where there is a payments.toml. Models are loaded
when they are first asked for and let go after --keep-alive, or when --memory-budget wants another. SIGTERM lets running
jobs end first.
DIFFUSIONZ_ADMIN_TOKEN in the environment opens /metrics, /api/load and /api/unload to who sends it.
"""

PS_EPILOG = """\
examples:
  diffusionz ps
  diffusionz ps --url http://127.0.0.1:8100 --json
"""


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Fills in the parser of `diffusionz serve`."""
    add = parser.add_argument
    add("--host", metavar="ADDRESS", help="to listen at (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, metavar="N", help="0 takes a free one (default: 8100)")
    add("--free", action="store_true", default=None, help="nothing costs anything, for callers on this machine")
    add("--free-for-all", action="store_true", default=None, help="with --free: for callers on other machines, too")
    add("--dev", action="store_true", default=None, help="a dev chain, a ledger and a faucet of its own, in memory")
    add("--payments", metavar="FILE", help=f"sell calls, by these settings (default: {PAYMENTS_CONFIG}, if it is here)")
    add("--config", metavar="FILE", help="the server's settings, in TOML: models, limits, providers")
    add(
        "--zimage",
        action="append",
        metavar="[NAME=]MODEL",
        help="a model that draws; may be repeated (default: the demo)",
    )
    add("--chronos2", action="append", metavar="[NAME=]MODEL", help="a model that forecasts; may be repeated")
    add(
        "--device", help="of the models: auto, cpu, cuda, cuda:N; of those that draw also cuda:0,cuda:1 (default: auto)"
    )
    add("--precision", help="of those that draw: auto, float32, bfloat16, fp8 (default: auto)")
    add("--forecast-precision", help="of those that forecast: auto, float32, tf32, float16, bfloat16 (default: auto)")
    add("--max-vram", metavar="SIZE", help="GPU memory to take at most, 8GB or so (default: no limit)")
    add("--memory-budget", metavar="SIZE", help="of all models' weights together (default: no limit)")
    add("--keep-alive", metavar="TIME", help="how long a model stays after its last use: 10m, 0, -1 (default: 4m)")
    add("--preload", action="append", metavar="NAME", help="load this model at the start, and keep it")
    add("--drain", type=float, dest="drain_s", metavar="SECONDS", help="for running jobs at the end (default: 30)")
    add("--public-url", metavar="URL", help="where the outside reaches it, behind a proxy: https://example.org")
    add("--trusted-proxies", metavar="IP,...", help="whose X-Forwarded-For is believed (default: nobody's)")
    add("--access-log", action="store_true", default=None, help="a log line for every request")
    add("--log", dest="log_format", choices=["json", "text"], help="(default: text in a terminal, else json)")


def add_ps(parser: argparse.ArgumentParser) -> None:
    """Fills in the parser of `diffusionz ps`."""
    add = parser.add_argument
    add("--url", metavar="URL", help="of the server (default: DIFFUSIONZ_URL, else http://127.0.0.1:8100)")
    add("--json", action="store_true", help="print JSON")


def serve(args: argparse.Namespace) -> int:
    if sys.version_info < (3, 11):
        raise ImportError(f"the server needs Python 3.11 or later; this is {sys.version.split()[0]}")
    try:
        from diffusionz.server import serve as server
        from diffusionz.server import settings
        from diffusionz.server.models import Spec

        if os.environ.get("ENABLE_NVFP4") == "1":
            raise DiffusionzError(settings.no_nvfp4())
        given = {
            name: getattr(args, name)
            for name in (
                "host",
                "port",
                "free",
                "free_for_all",
                "dev",
                "payments",
                "memory_budget",
                "keep_alive",
                "drain_s",
                "public_url",
                "trusted_proxies",
                "access_log",
                "log_format",
            )
        }
        given["preload"] = tuple(args.preload) if args.preload else None
        defaults: dict[str, Any] = {"log_format": "text" if sys.stderr.isatty() else "json"}
        if args.config is None and not (args.free or args.dev or args.payments) and os.path.exists(PAYMENTS_CONFIG):
            defaults["payments"] = PAYMENTS_CONFIG
        options: dict[str, dict[str, Any]] = {
            "zimage": {"device": args.device, "precision": args.precision, "max_vram": args.max_vram},
            "chronos2": {
                "device": args.device.split(",")[0] if args.device else None,
                "precision": args.forecast_precision,
            },
        }
        options = {family: {k: v for k, v in about.items() if v is not None} for family, about in options.items()}
        defaults["models"] = tuple(
            Spec(*_named(text, family), options[family])
            for family, texts in (("zimage", args.zimage), ("chronos2", args.chronos2))
            for text in texts or [f"{family}-demo"]
        )
        given["models"] = defaults["models"] if args.zimage or args.chronos2 else None
        loaded = settings.load(args.config, defaults, **given)
        if any(options.values()) and loaded.models != defaults["models"]:
            raise ArgumentError("--device, --precision and --max-vram are said of each model in --config")
        return server.run(loaded)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "diffusionz":
            raise
        raise ImportError(f"the server needs more packages ({error.name} is missing): {EXTRA}") from error
    except Exception as error:
        if type(error).__module__ == "diffusionz.payments.errors":
            raise DiffusionzError(str(error)) from error
        raise


def _named(text: str, family: str) -> tuple[str, str, str]:
    """(name, family, model) of "NAME=MODEL", or of a model that is called by the end of its path."""
    name, sign, model = text.partition("=")
    if not sign:
        name, model = text.rstrip("/").rpartition("/")[2], text
    if not name or not model or len(name) > 200 or not name.isprintable():
        raise ArgumentError(f"--{family} is {text!r}; it must be MODEL or NAME=MODEL")
    return name, family, model


def ps(args: argparse.Namespace) -> int:
    import json
    import time
    import urllib.error
    import urllib.request
    from urllib.parse import urlsplit

    url = (args.url or os.environ.get("DIFFUSIONZ_URL") or "http://127.0.0.1:8100").rstrip("/")
    try:
        host = urlsplit(url).hostname or ""
        # A proxy of the environment's does not reach this machine's own addresses.
        own = host in ("localhost", "::1") or host.startswith("127.")
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if own else []))
        with opener.open(url + "/api/ps", timeout=10) as answer:
            models = json.load(answer)["models"]
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        raise DiffusionzError(
            f"{url} does not answer: {getattr(error, 'reason', error)}; is `diffusionz serve` running?"
        ) from None
    if args.json:
        print(json.dumps(models, indent=2))
        return 0
    rows = [("NAME", "FAMILY", "SIZE", "DEVICE", "PRECISION", "UNTIL")]
    for model in models:
        until = f"{model['running']} running" if model["running"] else "for ever"
        if model["expires_at"] is not None:
            until = f"{max(0, round(model['expires_at'] - time.time()))} s from now"
        size = f"{model['size'] / 1e9:.1f} GB" if model["size"] >= 1e9 else f"{model['size'] / 1e6:.0f} MB"
        rows.append((model["name"], model["family"], size, model["device"], model["precision"], until))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
