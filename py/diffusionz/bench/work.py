"""What is drawn and forecast in the benchmarks, by us and by the peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

STEPS, SEED = 8, 7
STREAM_ROWS = 100_000
HISTORY, HORIZON = 768, 16  # steps

# 62 tokens of the bundled tokenizer, the chat form's included: 64 when they are padded to a multiple of 32.
PROMPT = (
    "a large red circle above a small green square beside a blue triangle on a white background,"
    " and a yellow star left of a small purple circle below a large orange square,"
    " all on a gradient background from black to white with a gray circle, take 00"
)


def prompt(i: int) -> str:
    """Prompts of PROMPT's length that differ: features of a known one are kept, and the text encoder would not run."""
    return f"{PROMPT[:-2]}{10 + i % 90}"


def series(rows: int) -> NDArray[numpy.float32]:
    """Waves on a slope with noise, [rows, HISTORY]."""
    import numpy

    generator = numpy.random.default_rng(rows)
    row, step = numpy.arange(rows, dtype=numpy.float32)[:, None], numpy.arange(HISTORY, dtype=numpy.float32)
    wave = 10 * numpy.sin(step * (0.05 + row % 17 / 20)) + row % 5 * step / 50
    return (wave + 100 + generator.standard_normal((rows, HISTORY), numpy.float32)).astype(numpy.float32)
