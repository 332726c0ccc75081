"""Copies of the database, and the way back from one.

    backup(connection, "payments-2026-11-22.db")          # while others read and write
    restored = await restore("payments-2026-11-22.db", "payments.db", new_watcher, network="mainnet")

A copy is a moment of the past, and the chain has gone on. So a restored database reads every history again: what was
deposited since is credited, what it has is not credited twice. What it cannot know, nobody shall profit from:

- Addresses that it takes for free may have been issued since. They are retired (`Addresses.retire_free`).
- Challenges that it takes for open may have been used since. They are dropped.
- What users spent since is theirs again, for the calls were in the lost part of the journal alone. `Restored` says how
  much that can be; and how much it is, when the database that is replaced can still be read.

The replaced database is kept beside the restored one. Until the last step, a rename, nothing has happened to it.
"""

from __future__ import annotations

import os
import pathlib
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from diffusionz.payments.addresses import Addresses
from diffusionz.payments.database import Connection, immediate, open_database
from diffusionz.payments.errors import ChainError, StorageError
from diffusionz.payments.ledger import COLUMNS, Ledger
from diffusionz.payments.watcher import Watcher

if TYPE_CHECKING:
    import sqlite3  # pysqlite3 is the same module, untyped
else:
    import pysqlite3 as sqlite3


@dataclass(frozen=True)
class Backup:
    """A copy that was made and checked. last_at: of its newest transfer, in seconds since 1970; None: it has none."""

    path: str
    size_bytes: int
    transfers: int
    last_at: int | None


@dataclass(frozen=True)
class Tail:
    """What the replaced database knew and the backup did not. Amounts in base units.

    charged is net of refunds: that much credit is the users' again. adjustments: transfers by an operator, by id, which
    somebody has to make again. revoked: API keys, by id; they were revoked again.
    """

    transfers: int
    charged: int
    adjustments: tuple[str, ...]
    revoked: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    """What a restored database is, and is not.

    found: movements on the chain that the backup did not have. retired: addresses that nobody is given any more.
    at_risk: all that users have, in base units; what they spent since the backup and have again is at most this, and is
    tail.charged if the replaced database could be read. unexplained: accounts of the chain that do not add up.
    """

    backup: Backup
    replaced: str | None
    found: int
    retired: int
    at_risk: int
    tail: Tail | None
    unexplained: tuple[str, ...]


def backup(connection: Connection, path: str | os.PathLike[str]) -> Backup:
    """Writes a checked copy of the database to `path`, mode 0600, which must not exist. Nobody has to wait for it.

    Raises StorageError when it cannot be written, or when it is not sound: then the database itself is damaged. A file
    of that name is there only if it is complete and sound.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise StorageError(f"{path}: a file of that name exists; a backup replaces none")
    with _partial(path) as partial:
        with closing(_connect(partial)) as copy:
            with _errors(path):
                connection.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, that needs no other beside it
            about = _checked(copy, path)
        made = Backup(str(path), partial.stat().st_size, *about)
        _sync(partial)
        os.rename(partial, path)
        _sync(path.parent)
    return made


async def restore(
    backup: str | os.PathLike[str],
    database: str | os.PathLike[str],
    new_watcher: Callable[[Connection], Watcher],
    *,
    network: str,
    refill: Callable[[Addresses], object] = lambda addresses: None,
) -> Restored:
    """Puts a backup in the place of the database, once it has caught up with the chain.

    `new_watcher` makes the watcher of a database; `network` is that of its addresses; `refill` may add addresses to the
    emptied pool. The replaced database is kept as <database>.replaced-<time>.

    Raises StorageError when the backup is not sound or the database is in use by anybody, ConfigurationError when the
    backup is of another token or cluster, ChainError when not all of the chain can be read. Then nothing has changed.
    """
    backup, database = pathlib.Path(backup).absolute(), pathlib.Path(database).absolute()
    if not backup.is_file():
        raise StorageError(f"{backup}: there is no such file")
    _require_unused(database)
    with _partial(database) as partial:
        with closing(_connect(backup, "ro")) as source, closing(_connect(partial)) as copy:
            with _errors(backup):
                source.backup(copy)
            if not copy.execute("SELECT 1 FROM sqlite_schema WHERE name = 'transfers'").fetchone():
                raise StorageError(f"{backup}: is not a database of payments")
        with closing(open_database(partial)) as connection:
            about = Backup(str(backup), backup.stat().st_size, *_checked(connection, backup))
            tail = _lost(connection, database)
            watcher = new_watcher(connection)
            await watcher.start()
            addresses = Addresses(connection, network)
            with immediate(connection):
                connection.execute("DELETE FROM challenges")
                retired = addresses.retire_free()
                for key in tail.revoked if tail else ():
                    connection.execute("UPDATE api_keys SET revoked_at = ? WHERE id = ?", (int(time.time()), key))
            scan = await watcher.reconcile()
            if scan.failed:
                account, error = next(iter(scan.failed.items()))
                raise ChainError(f"{len(scan.failed)} histories cannot be read, such as that of {account}: {error}")
            refill(addresses)
            (at_risk,) = connection.execute(
                "SELECT coalesce(sum(credits_posted - debits_posted), 0) FROM accounts WHERE kind = 'user'"
            ).fetchone()
            _checked(connection, backup)
        _sync(partial)
        replaced = _replace(database, partial)
    return Restored(about, replaced, scan.recorded, retired, at_risk, tail, tuple(scan.unexplained))


@contextmanager
def _partial(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty file beside `path`, mode 0600, which is gone afterwards unless it was renamed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    try:
        yield partial
    finally:
        for name in _files(partial):
            name.unlink(missing_ok=True)


@contextmanager
def _errors(path: pathlib.Path) -> Iterator[None]:
    """Turns whatever SQLite has to say of a file, of which all is in question here, into StorageError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise StorageError(f"{path}: {error}") from error


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """A database's file, and those that SQLite may keep beside it."""
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]


def _connect(path: pathlib.Path, mode: str = "rw") -> Connection:
    with _errors(path):
        return sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode={mode}", uri=True, isolation_level=None)


def _checked(connection: Connection, path: pathlib.Path) -> tuple[int, int | None]:
    """(transfers, time of the newest). Raises StorageError unless every invariant of the ledger holds."""
    with _errors(path):
        failed = [line for line in Ledger(connection).check() if not line.holds]
        if failed:
            what = "; ".join(f"{line.name}: {line.detail}" for line in failed)
            raise StorageError(f"{path}: the copy is not sound, and neither is what it was made of: {what}")
        count, last_at = connection.execute("SELECT count(*), max(created_at) FROM transfers").fetchone()
    return int(count), last_at


def _lost(connection: Connection, database: pathlib.Path) -> Tail | None:
    """What `database` has beyond `connection`; None if it cannot be read, or its history is another."""
    if not _has_header(database):
        return None
    try:
        with closing(_connect(database, "ro")) as old, _errors(database):
            last = connection.execute(f"SELECT {COLUMNS} FROM transfers ORDER BY seq DESC LIMIT 1").fetchone()
            seq = 0 if last is None else last[0]
            if last != old.execute(f"SELECT {COLUMNS} FROM transfers WHERE seq = ?", (seq,)).fetchone():
                return None
            count, charged = old.execute(
                "SELECT count(*), coalesce(sum(CASE kind WHEN 'post' THEN amount WHEN 'refund' THEN -amount END), 0)"
                " FROM transfers WHERE seq > ?",
                (seq,),
            ).fetchone()
            adjustments = old.execute(
                "SELECT id FROM transfers WHERE seq > ? AND kind = 'transfer'"
                " AND code NOT IN ('deposit', 'sweep', 'loss') ORDER BY seq",
                (seq,),
            ).fetchall()
            revoked = old.execute("SELECT id FROM api_keys WHERE revoked_at IS NOT NULL ORDER BY id").fetchall()
    except StorageError:
        return None
    known = {id for (id,) in connection.execute("SELECT id FROM api_keys WHERE revoked_at IS NULL")}
    return Tail(count, charged, tuple(id for (id,) in adjustments), tuple(id for (id,) in revoked if id in known))


def _has_header(database: pathlib.Path) -> bool:
    """Whether it is a file of SQLite. Of what is none any more, SQLite would remove the log that may yet be of use."""
    try:
        with open(database, "rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except FileNotFoundError:
        return False


def _require_unused(database: pathlib.Path) -> None:
    """Raises StorageError when a process has the database open. Puts its log into its one file."""
    if not _has_header(database):
        return
    try:
        with closing(_connect(database)) as connection:
            connection.execute("PRAGMA busy_timeout = 0")
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()  # only the last one that has it open may
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise StorageError(f"{database}: is in use; stop the server, the watcher and the sweeper first") from None
        raise StorageError(f"{database}: {error}") from error
    except sqlite3.DatabaseError:
        pass  # it is damaged, which is why somebody restores a backup


def _replace(database: pathlib.Path, partial: pathlib.Path) -> str | None:
    """Renames `partial` to `database`, of which the old file is kept. At no moment is there none."""
    _require_unused(database)
    kept = None
    if database.exists():
        kept = database.with_name(f"{database.name}.replaced-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
        os.link(database, kept)
        # Of a damaged database. Beside the restored one SQLite would take them for its own.
        for name, beside in list(zip(_files(database), _files(kept), strict=True))[1:]:
            if name.exists():
                os.rename(name, beside)
    os.rename(partial, database)
    _sync(database.parent)
    return None if kept is None else str(kept)


def _sync(path: pathlib.Path) -> None:
    """What was written, and for a folder the names, survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
