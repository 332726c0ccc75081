"""Who serves from a ledger: whoever comes and finds nobody there knows that the calls that are open are nobody's.

    presence = Presence("ledger.db")
    presence.enter(if_alone=void_open_calls)
    ...
    presence.leave()

By flock(2) on a file beside the ledger, which the system undoes when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
from collections.abc import Callable

from diffusionz.payments.errors import StorageError


class Presence:
    """One who serves from a ledger, of this machine: SQLite's write-ahead log allows no others."""

    def __init__(self, database: str | os.PathLike[str]) -> None:
        path = pathlib.Path(os.path.realpath(database))  # one file has one lock, however it is called
        self._path = path.with_name(path.name + ".lock")
        self._file = -1

    def enter(self, if_alone: Callable[[], object]) -> None:
        """Does `if_alone` when nobody else is there, and whoever comes meanwhile waits for its end; then is there.

        Raises StorageError when the file cannot be locked, and what `if_alone` raises: then it is not there.
        """
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                if_alone()
            # Between the two locks somebody else may find nobody there, but nothing of ours either.
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except BaseException as error:
            self.leave()
            if isinstance(error, OSError):
                raise StorageError(f"{self._path}: {error.strerror}") from error
            raise

    def leave(self) -> None:
        """Does nothing when it is not there."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
