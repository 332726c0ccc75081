"""Real series that come with the package, to try a forecast on: `diffusionz forecast airline`.

    import pandas, diffusionz.datasets
    pandas.read_csv(diffusionz.datasets.path("airline"))

airline: passengers of international airlines, thousands a month, January 1949 to December 1960; columns month,
    passengers. Box and Jenkins, Time Series Analysis: Forecasting and Control (1976), Series G.
"""

from __future__ import annotations

import os

from diffusionz._errors import ArgumentError

_FOLDER = os.path.join(os.path.dirname(__file__), "data")


def names() -> list[str]:
    """The series' names."""
    return sorted(os.path.splitext(file)[0] for file in os.listdir(_FOLDER) if file.endswith(".csv"))


def path(name: str) -> str:
    """The CSV file of a series. Raises ArgumentError for another name than those of `names`."""
    if name not in names():
        raise ArgumentError(f'there is no series "{name}"; there are {", ".join(names())}')
    return os.path.join(_FOLDER, f"{name}.csv")
