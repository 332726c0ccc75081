"""Prices from forecasts of log returns.

A price at step h is the last price times exp(the sum of h returns), and the quantiles of a sum are not the sums of the
quantiles. With m_t the median and q_t(p) the quantile p of the return of step t, the price's quantile p is taken as

    price(h, p) = last * exp(sum of m_t ± sqrt(sum of (q_t(p) - m_t)²)),    t = 1..h, + above the median, - below

which is exact for independent normal returns, and an approximation for all others: returns whose signs go together
spread wider than this, and those that alternate narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_prices(
    returns: NDArray[numpy.float32], levels: Sequence[float], last: NDArray[numpy.float32], *, constrain_ohlc: bool
) -> NDArray[numpy.float32]:
    """float32 [targets, levels, horizon]: quantiles of prices.

    Parameters:
        returns: [targets, levels, horizon], quantiles of log returns.
        levels: ascending; the median is one of them.
        last: [targets], the last prices.
        constrain_ohlc: the targets are open, high, low, close, and again: high becomes the four's maximum, low their
            minimum.
    """
    off_median = numpy.asarray(levels) - 0.5
    middle = numpy.abs(off_median).argmin()
    off_median[middle] = 0
    median = returns[:, middle, None].astype(numpy.float64)
    signs = numpy.sign(off_median)[:, None]
    outwards = numpy.maximum((returns - median) * signs, 0)  # crossed quantiles count as none
    spread = numpy.sqrt(numpy.cumsum(outwards**2, axis=2)) * signs
    prices = last[:, None, None] * numpy.exp(numpy.cumsum(median, axis=2) + spread)
    if constrain_ohlc:
        candles: NDArray[Any] = prices.reshape(-1, 4, *prices.shape[1:])
        candles[:, 1], candles[:, 2] = candles.max(axis=1), candles.min(axis=1)
    floats: NDArray[numpy.float32] = prices.astype(numpy.float32)
    return floats
