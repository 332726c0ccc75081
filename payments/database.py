"""The SQLite file that every part of payments writes to, and the one way to write to it.

    connection = open_database("ledger.db")
    with immediate(connection):
        connection.execute("INSERT ...")

Each thread and each process opens its own connection. Nothing awaits inside `immediate`: the file has one writer.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from diffusionz.payments.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    import sqlite3  # pysqlite3 is the same module, untyped
else:
    import pysqlite3 as sqlite3

Connection = sqlite3.Connection
IntegrityError = sqlite3.IntegrityError

# Older ones can lose or damage commits when two connections meet at the WAL's reset: https://sqlite.org/wal.html#walresetbug
SQLITE_MIN = (3, 51, 3)

# SQLITE_BUSY, LOCKED, NOMEM, READONLY, IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL, NOTADB: https://sqlite.org/rescode.html
STORAGE_CODES = {5, 6, 7, 8, 10, 11, 13, 14, 15, 26}

# The modules that own tables, in the order in which their MIGRATIONS are applied: tables before those that refer to
# them. MIGRATIONS is a list of (name, SQL); a name once released is never changed nor reused.
OWNERS = ("ledger", "charges", "rates", "addresses", "deposits", "sweeper", "identity", "sessions", "keys", "notices")


def open_database(path: str | os.PathLike[str], *, busy_timeout_s: float = 10.0) -> Connection:
    """Opens the ledger's file for this thread; creates it (mode 0600) when it is missing, and updates its tables.

    The connection is in autocommit: every write goes through `immediate`. It commits to the disk (WAL, synchronous
    FULL): what was acknowledged survives a loss of power. It waits up to busy_timeout_s for another writer.

    Raises ConfigurationError when SQLite is too old, StorageError when the file cannot be used.
    """
    require_sqlite(sqlite3.sqlite_version_info)
    path = pathlib.Path(path).absolute()  # SQLite takes a relative one that begins with "file:" for a URI
    try:
        # SQLite gives the -wal and -shm files beside it the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    with _storage_errors(f"{path}: "):
        connection = sqlite3.connect(str(path), timeout=busy_timeout_s, isolation_level=None)
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StorageError(f"{path}: the file system offers journal mode {mode!r}, the ledger needs 'wal'")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA recursive_triggers = ON")  # else INSERT OR REPLACE deletes without the triggers
            migrate(connection)
        except BaseException:
            connection.close()
            raise
    return connection


def require_sqlite(version: tuple[int, int, int]) -> None:
    """Raises ConfigurationError for a SQLite whose write-ahead log is not safe with two connections."""
    if version < SQLITE_MIN:
        found, needed = (".".join(map(str, v)) for v in (version, SQLITE_MIN))
        raise ConfigurationError(f"SQLite {found} can lose commits; the ledger needs {needed} or later")


def migrate(connection: Connection) -> None:
    """Applies what is missing of every owner's MIGRATIONS. Processes that start together do it once."""
    database = Database(connection)
    owners = [_migrations(owner) for owner in OWNERS]
    if any(owner.pending(database) for owner in owners):  # looked up without the lock: most openings need nothing
        with immediate(connection):
            for owner in owners:
                owner.apply(database)


def _migrations(owner: str) -> Migrations:
    migrations = Migrations(f"payments.{owner}")
    for name, sql in importlib.import_module(f"diffusionz.payments.{owner}").MIGRATIONS:
        migrations(name=name)(lambda database, sql=sql: run_script(database.conn, sql))
    return migrations


def run_script(connection: Connection, sql: str) -> None:
    """Executes statements within the open transaction, which the driver's executescript would commit first."""
    statement = ""
    for line in sql.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
    if statement.strip():
        raise ValueError(f"SQL that does not end with a semicolon: {statement.strip()!r}")


@contextlib.contextmanager
def immediate(connection: Connection) -> Iterator[None]:
    """A transaction that is the only writer from its first line on, or a savepoint within one.

    With a plain BEGIN, two who read before they write both get so far, and one fails with "database is locked".
    Commits at the end of the block; rolls back when it raises. Raises StorageError when the lock is not free in time,
    or the disk is full, read-only or damaged: then nothing was written, and the enclosing block has to end as well.
    """
    with _storage_errors():
        if connection.in_transaction:
            begin, commit, rollback = "SAVEPOINT nested", "RELEASE nested", "ROLLBACK TO nested; RELEASE nested"
        else:
            begin, commit, rollback = "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"
        connection.execute(begin)
        try:
            yield
            connection.execute(commit)
        except BaseException:
            if connection.in_transaction:  # SQLite may have rolled back by itself, as when the disk is full
                for statement in rollback.split("; "):
                    connection.execute(statement)
            raise


@contextlib.contextmanager
def without_waiting(connection: Connection) -> Iterator[None]:
    """A transaction that begins in this block raises StorageError at once where another writer has the lock."""
    (timeout_ms,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        yield
    finally:
        connection.execute(f"PRAGMA busy_timeout = {timeout_ms}")


@contextlib.contextmanager
def snapshot(connection: Connection) -> Iterator[None]:
    """Reads of one moment, while others write. Writes go through `immediate`."""
    if connection.in_transaction:
        yield
        return
    with _storage_errors():
        connection.execute("BEGIN")
        try:
            yield
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


@contextlib.contextmanager
def _storage_errors(where: str = "") -> Iterator[None]:
    """Turns what the disk and the lock do to us into StorageError. A broken constraint stays what it is."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in STORAGE_CODES:
            raise
        raise StorageError(f"{where}{error}") from error
