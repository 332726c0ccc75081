"""A circuit breaker: who fails again and again is left alone for a while."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from diffusionz.server.problems import Problem

logger = logging.getLogger(__name__)

_THEIRS = ("provider-error", "provider-timeout")


class Breaker:
    """Closed, it lets every job through. After `failures` in a row it is open for `pause_s`: jobs are refused at once,
    rather than that each waits for the same failure. Then one job a pause is let through, until one succeeds."""

    def __init__(
        self, name: str, failures: int = 5, pause_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._most = failures
        self._pause_s = pause_s
        self._clock = clock
        self._failures = 0  # in a row
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether a job would be refused now."""
        return self._failures >= self._most and self._clock() < self._until

    def check(self) -> None:
        """Raises Problem while it is open."""
        if self.is_open:
            raise Problem(
                "provider-error",
                f"{self._name} fails at the moment, and is left alone for a while",
                retry_after_s=self._until - self._clock(),
            )

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """Around one job. Only what is the provider's fault counts; a job that is cancelled says nothing of it. Raises
        Problem while it is open."""
        self.check()
        if self._failures >= self._most:  # this one tries it for all; another does after a pause, if nobody hears of it
            self._until = self._clock() + self._pause_s
        try:
            yield
        except Problem as problem:
            if problem.kind in _THEIRS:
                self._failed()
            else:
                self._failures = 0  # it answered
            raise
        else:
            self._failures = 0

    def _failed(self) -> None:
        self._failures += 1
        if self._failures >= self._most:
            self._until = self._clock() + self._pause_s
            logger.warning("%s failed %d times in a row; it is left alone", self._name, self._failures)
