"""What one request, one key and the whole server may ask for: one table, shown at /api/limits and in the documentation.

Each can be set in the server's settings (`[limits]`), so a number stands here once, and nowhere in the code that
enforces it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds, unless the name says otherwise."""

    head_bytes: int = 64 * 2**10  # of a request's line and headers
    head_s: float = 10.0  # from the connection, or from a later request's first byte, until they are there
    body_bytes: int = 8 * 2**20  # of a request's body; pictures to edit come in it
    body_s: float = 30.0  # from a request's first byte to its last
    prompt_characters: int = 4000
    pixels: int = 2048 * 2048  # of one picture
    side_pixels: int = 4096
    steps: int = 50  # transformer evaluations of one picture
    pictures: int = 4  # of one request
    rows: int = 1024  # series and covariates of one forecast request
    values: int = 1_000_000  # numbers in them
    horizon: int = 1024  # steps of a forecast
    levels: int = 99  # quantiles
    queue: int = 512  # jobs that wait or run, of all keys together
    queue_per_key: int = 64
    queue_per_service: int = 512
    job_s: float = 600.0  # from its arrival to its end; what takes longer is stopped, and costs nothing
    result_s: float = 3600.0  # that a result is kept for
    result_bytes: int = 256 * 2**20  # of results kept, all together; the oldest go first
    events_per_key: int = 32  # event streams open at once
