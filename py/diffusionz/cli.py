"""The command `diffusionz`: generate, forecast, serve, ps, info, pull, bench, wallet.

Exit status: 0 done, 1 it failed, 2 wrong use, 130 stopped by Ctrl-C. Results go to stdout; a failure is one line on
stderr (`python -X dev -m diffusionz ...` shows the traceback instead). What a command does not need is not imported: a
picture of a small model should not wait for Python.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from diffusionz._errors import ArgumentError, DiffusionzError, ImageError

_MOST_SENTENCES = 20  # that are printed of a forecast

_DESCRIPTION = "Draw pictures with Z-Image, forecast time series with Chronos-2."

_EPILOG = """\
examples:
  diffusionz generate "a red circle on a blue background" -o out.png --width 256 --height 256 --seed 7
  diffusionz info out.png                        what drew this picture
  diffusionz forecast airline --horizon 12 --plot forecast.png
  diffusionz forecast prices.csv --horizon 7 --target close -o forecast.csv
  diffusionz pull Tongyi-MAI/Z-Image-Turbo       fetch a model, then: generate --model Tongyi-MAI/Z-Image-Turbo
  diffusionz serve --dev                         a server of both, with a page; then open http://127.0.0.1:8100
  diffusionz wallet --help                       prepaid credit for a server of models
"""

_GENERATE_EPILOG = """\
examples:
  diffusionz generate "a red circle on a blue background" -o out.png --width 256 --height 256
  diffusionz generate "a green square" -o out.webp --count 4 --seed 10       out-1.webp to out-4.webp, seeds 10 to 13
  diffusionz generate "a castle" -o out.webp --model ./Z-Image --steps 28 --guidance 4 --negative "fog"
  diffusionz generate "a castle" -o out.webp --lora watercolor.safetensors:0.8
  diffusionz generate "the same in winter" -o winter.png --init-image summer.png --strength 0.5

The file's extension says its format: .png, or .webp (lossy of --quality, or --lossless). The parameters are written
into the file; `diffusionz info FILE` reads them back. The same parameters and seed draw the same picture.
"""

_FORECAST_EPILOG = """\
examples:
  diffusionz forecast airline --horizon 12 --plot forecast.png         a series that came with the package
  diffusionz forecast prices.csv --horizon 7 --target close --timestamp date -o forecast.csv --plot forecast.png
  diffusionz forecast prices.csv --horizon 7 --target close --returns --quantiles 0.05,0.5,0.95 -o -
  diffusionz forecast candles.csv --horizon 7 --ohlc                   open, high, low and close together
  diffusionz forecast shops.csv --id shop --target sales --known-future holiday,price --future plan.csv -o out.csv
  cat load.csv | diffusionz forecast - --horizon 24 --json

The file has a header line and one row an observation; an empty cell is a missing value. Columns that are not named are
guessed where there is one answer. What is known in advance (--known-future) comes from a second file (--future), or
from the last rows of the first, where the target is empty. The forecast has the columns id, timestamp (or step),
target_name, predictions (the median) and one a quantile level.

--returns forecasts log(price / price before) and gives prices back; its bands are exact for independent normal returns
and an approximation for others (the module diffusionz.returns has the formula).
"""

_INFO_EPILOG = """\
examples:
  diffusionz info                  version, devices, bundled models, where C programs find the library
  diffusionz info zimage-demo      a model: a bundled one's name, a folder, or a hub id that was pulled
  diffusionz info out.png          the parameters that drew a picture
"""

_PULL_EPILOG = """\
examples:
  diffusionz pull Tongyi-MAI/Z-Image-Turbo
  diffusionz pull Tongyi-MAI/Z-Image-Turbo@main        a branch, a tag or a commit

The files go to the hub's local cache (HF_HOME says where), and only those that are needed. An interrupted download is
resumed. Nothing else ever downloads.
"""

_BENCH_EPILOG = """\
examples:
  diffusionz bench --gpu                           pictures and forecasts of the released models' sizes, random weights
  diffusionz bench --gpu --peers --record runs.csv beside diffusers and chronos-forecasting, where they are installed
  diffusionz bench --gpu --only webp,forecasts --limit 60
  diffusionz bench --gpu --model ./Z-Image-Turbo   your own weights
  diffusionz bench --quality --model ./Z-Image-Turbo --precision fp8 -o sheet.png
                                                   how far pictures in fp8 are from float32's, beside bfloat16's
  diffusionz bench --quality --model ./chronos-2 --precision float16

--gpu times whole calls, warm: medians, with the 10th and 90th percentile. The random models take 21 GB of --scratch
while it runs. --quality draws and forecasts in float32, in bfloat16 and in --precision, and runs on the CPU as well.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv[0] if argv else "").parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("diffusionz: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        print(f"diffusionz: {_reason(error)}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1


def _reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (DiffusionzError, ImportError)):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return " ".join(reason.split())


def _command(commands: Any, name: str, help: str, epilog: str, run: Any) -> argparse.ArgumentParser:
    """A command's parser, among `commands` (what `add_subparsers` gives), of the form that all of them have."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _parser(command: str = "") -> argparse.ArgumentParser:
    """With all that `command` understands; what "wallet", "serve" and "ps" do is imported for them alone."""
    parser = _Parser(
        prog="diffusionz",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    generate = _command(commands, "generate", "draw a picture of a prompt", _GENERATE_EPILOG, _generate)
    add = generate.add_argument
    add("prompt", metavar="PROMPT", help="what to draw")
    add("-o", "--output", metavar="FILE", required=True, help="the file to write, .png or .webp")
    add("--model", default="demo", help="a bundled model's name, a folder, or a pulled hub id (default: demo)")
    add("--width", type=int, metavar="N", help="pixels, a multiple of 16 (default: what the model was made for)")
    add("--height", type=int, metavar="N", help="likewise")
    add("--steps", type=int, default=8, metavar="N", help="transformer evaluations (default: 8)")
    add("--seed", type=int, metavar="N", help="default: a random one, which is printed")
    add("--guidance", type=float, default=0.0, metavar="X", help="classifier-free guidance (default: 0, off)")
    add("--negative", metavar="TEXT", help="what to keep away from, with --guidance")
    add("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help="an adapter; may be repeated")
    add("--init-image", metavar="FILE", help="a picture (.png, .webp) of the same size to start from")
    add("--strength", type=float, default=0.6, metavar="X", help="with --init-image: share of the steps (default: 0.6)")
    add("--count", type=int, default=1, metavar="N", help="pictures to draw, of seeds SEED, SEED+1, ... (default: 1)")
    add("--quality", type=int, default=90, metavar="Q", help="of lossy .webp, 0..100 (default: 90)")
    add("--lossless", action="store_true", help="lossless .webp")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N, or several: cuda:0,cuda:1 (default: auto)")
    add("--precision", default="auto", help="auto, float32, bfloat16, or fp8 on newer GPUs (default: auto)")
    add("--max-vram", metavar="SIZE", help="GPU memory to take at most, 8GB or so (default: no limit)")
    add("--json", action="store_true", help="print the result as JSON")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")

    forecast = _command(
        commands, "forecast", "forecast time series from a file of numbers", _FORECAST_EPILOG, _forecast
    )
    add = forecast.add_argument
    add("file", metavar="FILE", help=".csv or .parquet, - for CSV from stdin, or the name of a series of the package")
    add("-o", "--output", metavar="FILE", help="the file to write, .csv or .parquet, or - for CSV to stdout")
    add("--plot", metavar="FILE", help="a picture to write, .png, .svg or .pdf")
    add("--horizon", type=int, metavar="N", help="steps to forecast (default: rows of --future, else one pass's)")
    add("--target", type=_names, default=[], metavar="COLUMN,...", help="what to forecast")
    add("--timestamp", metavar="COLUMN", help="dates, or evenly spaced numbers")
    add("--id", metavar="COLUMN", help="tells several series apart")
    add("--past-only", type=_names, default=[], metavar="COLUMN,...", help="covariates whose future is not known")
    add("--known-future", type=_names, default=[], metavar="COLUMN,...", help="covariates whose future is known")
    add("--future", metavar="FILE", help="the known future: id, timestamp and those columns")
    add("--quantiles", type=_levels, metavar="LEVEL,...", help="(default: 0.1,0.2,...,0.9)")
    add("--freq", metavar="NAME", help="step between rows as pandas calls it: D, h, MS (default: told from the dates)")
    add("--context-length", type=int, metavar="N", help="steps of history to read (default: as many as the model can)")
    add("--returns", action="store_true", help="forecast log returns, give prices")
    add("--ohlc", action="store_true", help="the targets are open, high, low, close: keep high highest and low lowest")
    add("--monotone", action="store_true", help="sort each step's quantiles, so that they never cross")
    add("--cross-learning", action="store_true", help="let all series inform each other")
    add("--model", default="demo", help="a bundled model's name, a folder, or a pulled hub id (default: demo)")
    add("--lora", metavar="FOLDER", help="an adapter that upstream's fit wrote")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--precision", default="auto", help="auto, float32, tf32, float16 or bfloat16 (default: auto)")
    add("--json", action="store_true", help="print the result as JSON")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")

    info = _command(commands, "info", "say what the library, a model or a picture is", _INFO_EPILOG, _info)
    info.add_argument("target", metavar="MODEL_OR_FILE", nargs="?", help="a model or a picture")
    info.add_argument("--json", action="store_true", help="print JSON")

    pull = _command(commands, "pull", "fetch a model from the hub into the local cache", _PULL_EPILOG, _pull)
    pull.add_argument("model", metavar="ORG/NAME", help="a hub id")
    pull.add_argument("--json", action="store_true", help="print the result as JSON")
    pull.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")

    bench = _command(commands, "bench", "measure this machine's speed, or a precision's quality", _BENCH_EPILOG, _bench)
    add = bench.add_argument
    what = bench.add_mutually_exclusive_group(required=True)
    what.add_argument("--gpu", action="store_true", help="speed on a GPU")
    what.add_argument("--quality", action="store_true", help="pictures or forecasts in --precision beside float32's")
    add("--model", metavar="MODEL", help="a bundled model's name, a folder, or a pulled hub id (--quality: demo)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    only = "--gpu: zimage, chronos2, or their parts: pictures, webp, load; forecasts (default: all)"
    add("--only", type=_names, default=[], metavar="PART,...", help=only)
    add(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="--gpu: begin nothing more after this time, and print what there is",
    )
    add("--peers", action="store_true", help="--gpu: measure diffusers and chronos-forecasting beside it")
    add("--record", metavar="CSV", help="--gpu: append the rows to this file")
    add("--scratch", metavar="FOLDER", help="--gpu: where the random models are written for the while")
    add("--precision", default="bfloat16", help="--quality: of which precision (default: bfloat16)")
    add("--pictures", type=int, default=8, metavar="N", help="--quality: how many to draw (default: 8)")
    add("--size", type=int, metavar="N", help="--quality: side in pixels (default: what the model was made for)")
    add("--layers", action="store_true", help="--quality: the error after each block of the transformer, too")
    add("-o", "--output", metavar="FILE", help="--quality: a contact sheet to write, .png or .webp")
    add("--json", action="store_true", help="print the result as JSON")

    if command in ("serve", "ps"):
        from diffusionz.server import cli as server

        server.add_serve(_command(commands, "serve", "serve models over HTTP", server.SERVE_EPILOG, server.serve))
        server.add_ps(_command(commands, "ps", "list the models that a server has loaded", server.PS_EPILOG, server.ps))
    else:
        commands.add_parser("serve", help="serve models over HTTP, with a page, and sell calls")
        commands.add_parser("ps", help="list the models that a server has loaded")

    payments = commands.add_parser("wallet", help="keep prepaid credit: deposits, sweeps, audits", allow_abbrev=False)
    if command == "wallet":
        from diffusionz.payments.cli import add_commands

        add_commands(payments, _command)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import diffusionz

        print(f"diffusionz {diffusionz.__version__}")
        parser.exit()


# --- Commands ---


def _generate(args: argparse.Namespace) -> int:
    # What can be known to be wrong is said before a model is loaded and minutes are spent on drawing.
    from diffusionz.image import format_of

    format_of(args.output)
    if args.count < 1:
        raise ArgumentError(f"--count is {args.count}; it must be at least 1")
    if not 0 <= args.quality <= 100:
        raise ArgumentError(f"--quality is {args.quality}; it must be 0..100")
    files = _numbered(args.output, args.count)
    for file in files:
        _check_writable(file)
    loras = [_lora(text) for text in args.lora]

    from diffusionz.zimage import ZImage

    with ZImage(args.model, device=args.device, precision=args.precision, max_vram=args.max_vram) as model:
        for path, weight in loras:
            model.load_lora(path, weight)
        images = model.generate_batch(
            args.prompt,
            count=args.count,
            width=args.width,
            height=args.height,
            steps=args.steps,
            seed=args.seed,
            guidance=args.guidance,
            negative_prompt=args.negative,
            init_image=args.init_image,
            strength=args.strength,
            progress=False if args.quiet else None,
        )
        device, precision = model.device, model.precision
    for file, image in zip(files, images, strict=True):
        image.save(file, quality=args.quality, lossless=args.lossless)
        if not (args.json or args.quiet):
            print(f"{file}  {image.width}x{image.height}, seed {image.seed}, {image.timings['total'] / 1e3:.2f} s")
    if args.json:
        _print_json(
            {
                "images": [
                    {"path": file, "width": image.width, "height": image.height, "seed": image.seed}
                    for file, image in zip(files, images, strict=True)
                ],
                "prompt": args.prompt,
                "model": args.model,
                "device": device,
                "precision": precision,
                "timings_ms": {stage: round(value, 3) for stage, value in images[0].timings.items()},
            }
        )
    return 0


def _forecast(args: argparse.Namespace) -> int:
    import time

    from diffusionz import _plot, tables

    # What can be known to be wrong is said before anything is read or loaded.
    if args.output is not None:
        tables.format_of(args.output)
    if args.plot is not None:
        _plot.format_of(args.plot)
    for file in (args.output, args.plot):
        if file not in (None, "-"):
            _check_writable(file)
    if args.output == "-" and args.json:
        raise ArgumentError("--output - and --json would both write to stdout")
    if args.horizon is not None and args.horizon < 1:
        raise ArgumentError(f"--horizon is {args.horizon}; it must be at least 1")
    if args.future is not None and not args.known_future:
        raise ArgumentError("--future needs --known-future, which names its columns")

    frame = tables.read_table(_series_file(args.file))
    if args.ohlc and not args.target:
        args.target = [_called(frame, name) for name in ("open", "high", "low", "close")]
    others = [*args.past_only, *args.known_future]
    columns, guesses = tables.choose_columns(
        frame, targets=args.target, timestamp=args.timestamp, id=args.id, others=others
    )
    if guesses and not args.quiet:
        print(f"diffusionz: {', '.join(guesses)}", file=sys.stderr)
    keys = [column for column in (columns.id, columns.timestamp) if column is not None]
    frame, future = frame[[*keys, *columns.targets, *others]], None
    if args.future is not None:
        future = tables.read_table(args.future)
        for column in [*keys, *args.known_future]:
            if column not in future:
                raise ArgumentError(f'{args.future} has no column "{column}"')
        future = future[[*keys, *args.known_future]]
    elif args.known_future:
        frame, future = tables.split_future(frame, columns, args.known_future, args.horizon)
    horizon = args.horizon
    if horizon is None and future is not None:
        horizon = len(future) if columns.id is None else int(future.groupby(columns.id).size().max())

    from diffusionz.chronos2 import LEVELS, Chronos2

    with Chronos2(args.model, device=args.device, precision=args.precision, lora=args.lora) as model:
        start = time.perf_counter()
        forecast = model.forecast_df(
            frame,
            future_df=future,
            id_column=columns.id,
            timestamp_column=columns.timestamp,
            target=columns.targets,
            prediction_length=horizon,
            quantile_levels=args.quantiles or LEVELS,
            freq=_number_or_name(args.freq),
            context_length=args.context_length,
            cross_learning=args.cross_learning,
            monotone=args.monotone,
            constrain_ohlc=args.ohlc,
            returns=args.returns,
            progress=False if args.quiet else None,
            to_frame=False,
        )
        seconds = time.perf_counter() - start
        trends = forecast.trend if args.json else []
        device, precision = model.device, model.precision
    if args.output is not None:
        tables.write_table(forecast.to_frame(), args.output)
    if args.plot is not None:
        forecast[: _plot.MOST_PANELS].plot(args.plot)
    sentences = forecast.summary().splitlines()
    if args.json:
        trends = [trends] if isinstance(trends, str) else trends
        _print_json(
            {
                "series": [
                    _series_json(forecast, i, columns.id) | {"summary": sentence, "trend": trend}
                    for i, (sentence, trend) in enumerate(zip(sentences, trends, strict=True))
                ],
                "horizon": forecast.horizon,
                "levels": forecast.levels,
                "model": args.model,
                "device": device,
                "precision": precision,
                "timings_ms": {"forecast": round(seconds * 1e3, 3)},
            }
        )
    elif not args.quiet and args.output != "-":
        for sentence in sentences[:_MOST_SENTENCES]:
            print(sentence)
        if len(sentences) > _MOST_SENTENCES:
            print(f"and {len(sentences) - _MOST_SENTENCES} more")
        files = [file for file in (args.output, args.plot) if file is not None]
        if args.plot is not None and len(forecast) > _plot.MOST_PANELS:
            files[-1] += f" (the first {_plot.MOST_PANELS})"
        about = f"{len(forecast)} series, {forecast.horizon} steps, {seconds:.2f} s"
        print("  ".join([*files, about]))
    return 0


def _info(args: argparse.Namespace) -> int:
    if args.target is None:
        from diffusionz.describe import describe_library

        about = describe_library()
    elif _is_picture(args.target):
        from diffusionz.image import read_metadata

        with open(args.target, "rb") as file:
            data = file.read()
        try:
            about = read_metadata(data)
        except ImageError as error:
            raise ImageError(f"{args.target}: {error}") from None
        if not (about or args.json):
            print("no generation parameters")
    else:
        from diffusionz.describe import describe_model

        about = describe_model(args.target)
    if args.json:
        _print_json(about)
    else:
        _print_tree(about)
    return 0


def _pull(args: argparse.Namespace) -> int:
    from diffusionz.hub import pull

    folder = pull(args.model, progress=not args.quiet and sys.stderr.isatty())
    if args.json:
        _print_json({"model": args.model, "path": folder})
    elif not args.quiet:
        print(folder)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from diffusionz.bench import command

    result = command.quality(args) if args.quality else command.gpu(args)
    if args.json:
        _print_json(result)
    return 0


# --- Helpers ---


def _numbered(file: str, count: int) -> list[str]:
    """`file` itself for one picture, else out-1.png, out-2.png, ..., padded so that they sort."""
    if count == 1:
        return [file]
    stem, extension = os.path.splitext(file)
    return [f"{stem}-{i:0{len(str(count))}}{extension}" for i in range(1, count + 1)]


def _names(text: str) -> list[str]:
    """The names in COLUMN,..."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _levels(text: str) -> list[float]:
    """The numbers in LEVEL,...; argparse says what was wrong."""
    return [float(part) for part in text.split(",")]


_levels.__name__ = "list of levels"  # argparse's word for it


def _number_or_name(text: str | None) -> str | float | None:
    """A frequency: a number, or pandas' name of one."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _series_file(file: str) -> str:
    """`file`, or that of a series of the package when there is no such file."""
    if file == "-" or os.path.exists(file):
        return file
    from diffusionz import datasets

    if file in datasets.names():
        return datasets.path(file)
    if os.path.basename(file) == file and not os.path.splitext(file)[1]:
        raise FileNotFoundError(2, f"no such file, and no series of that name ({', '.join(datasets.names())})", file)
    return file


def _called(frame: Any, name: str) -> str:
    """The column that is called `name`, in any case."""
    matches = [column for column in frame.columns if str(column).lower() == name]
    if len(matches) != 1:
        raise ArgumentError(f'--ohlc needs one column "{name}"; name the four with --target OPEN,HIGH,LOW,CLOSE')
    return str(matches[0])


def _series_json(forecast: Any, i: int, id_column: str | None) -> dict[str, Any]:
    """One series of a forecast, in numbers."""
    times = forecast.timestamps(i)
    about: dict[str, Any] = {} if id_column is None else {"item_id": _json_value(forecast.item_ids[i])}
    about["target"] = forecast.target_names[i]
    if times is not None:
        about["timestamps"] = [_json_value(time) for time in times]
    about["mean"] = forecast.mean[i].tolist()
    about["quantiles"] = {str(level): forecast.quantile(level)[i].tolist() for level in forecast.levels}
    return about


def _json_value(value: Any) -> Any:
    if hasattr(value, "isoformat"):
        return value.isoformat().removesuffix("T00:00:00")
    return value.item() if hasattr(value, "item") else value


def _check_writable(file: str) -> None:
    """Raises the OSError that writing `file` would meet, as far as that can be known beforehand."""
    import errno

    folder = os.path.dirname(os.path.realpath(file))
    if os.path.isdir(file):
        problem = errno.EISDIR
    elif not os.path.exists(folder):
        problem = errno.ENOENT
    elif not os.path.isdir(folder):
        problem = errno.ENOTDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = errno.EACCES
    else:
        return
    raise OSError(problem, os.strerror(problem), file)


def _lora(text: str) -> tuple[str, float]:
    """(path, weight) of PATH or PATH:WEIGHT. A path may hold colons: only a number after the last one is a weight."""
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0


def _is_picture(target: str) -> bool:
    """Whether `target` is a file that is no model: whatever else it is, the picture reader says best."""
    return os.path.isfile(target) and not target.endswith(".safetensors")


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, ensure_ascii=False, indent=2))


def _print_tree(value: dict[str, Any], indent: str = "") -> None:
    """A dictionary as indented `name: value` lines."""
    for name, item in value.items():
        if isinstance(item, dict):
            print(f"{indent}{name}:")
            _print_tree(item, indent + "  ")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            print(f"{indent}{name}:")
            for entry in item:
                print(f"{indent}  - " + ", ".join(f"{key}: {_plain(key, part)}" for key, part in entry.items()))
        else:
            print(f"{indent}{name}: {_plain(name, item)}")


def _plain(name: str, item: Any) -> str:
    if name.endswith("bytes") and isinstance(item, int):
        return f"{item / 2**20:,.1f} MiB"
    if isinstance(item, list):
        return ", ".join(map(str, item))
    return f"{item:,}" if name == "parameters" and isinstance(item, int) else str(item)
