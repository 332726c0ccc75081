"""The command `diffusionz`: generate, info, pull.

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

_DESCRIPTION = "Draw pictures with Z-Image."

_EPILOG = """\
examples:
  diffusionz generate "a red circle on a blue background" -o out.png --width 256 --height 256 --seed 7
  diffusionz info out.png                        what drew this picture
  diffusionz pull Tongyi-MAI/Z-Image-Turbo       fetch a model, then: generate --model Tongyi-MAI/Z-Image-Turbo
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

_INFO_EPILOG = """\
examples:
  diffusionz info                  version, devices, bundled models, where C programs find the library
  diffusionz info demo             a model: a bundled one's name, a folder, or a hub id that was pulled
  diffusionz info out.png          the parameters that drew a picture
"""

_PULL_EPILOG = """\
examples:
  diffusionz pull Tongyi-MAI/Z-Image-Turbo
  diffusionz pull Tongyi-MAI/Z-Image-Turbo@main        a branch, a tag or a commit

The files go to the hub's local cache (HF_HOME says where), and only those that are needed. An interrupted download is
resumed. Nothing else ever downloads.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    def command(name: str, help: str, epilog: str, run: Any) -> argparse.ArgumentParser:
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

    parser = _Parser(
        prog="diffusionz",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    generate = command("generate", "draw a picture of a prompt", _GENERATE_EPILOG, _generate)
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
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--precision", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    add("--json", action="store_true", help="print the result as JSON")
    add("-q", "--quiet", action="store_true", help="print nothing but errors")

    info = command("info", "say what the library, a model or a picture is", _INFO_EPILOG, _info)
    info.add_argument("target", metavar="MODEL_OR_FILE", nargs="?", help="a model or a picture")
    info.add_argument("--json", action="store_true", help="print JSON")

    pull = command("pull", "fetch a model from the hub into the local cache", _PULL_EPILOG, _pull)
    pull.add_argument("model", metavar="ORG/NAME", help="a hub id")
    pull.add_argument("--json", action="store_true", help="print the result as JSON")
    pull.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
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

    with ZImage(args.model, device=args.device, precision=args.precision) as model:
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


# --- Helpers ---


def _numbered(file: str, count: int) -> list[str]:
    """`file` itself for one picture, else out-1.png, out-2.png, ..., padded so that they sort."""
    if count == 1:
        return [file]
    stem, extension = os.path.splitext(file)
    return [f"{stem}-{i:0{len(str(count))}}{extension}" for i in range(1, count + 1)]


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
