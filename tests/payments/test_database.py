"""Goal: what `immediate` has acknowledged is on the disk, whatever happens, and what it has not is nowhere.

Method: a real file each time. The lock is held by others, the disk fills, the power fails at a random byte of the
write-ahead log; afterwards the file is opened anew and looked at.
"""

from __future__ import annotations

import pathlib
import random
import stat
import subprocess
import sys
import threading
import types

import pytest

from diffusionz.payments import database
from diffusionz.payments.database import IntegrityError, immediate, open_database, require_sqlite, run_script, snapshot
from diffusionz.payments.errors import ConfigurationError, StorageError
from diffusionz.payments.ledger import Ledger, Result

ROOT = pathlib.Path(__file__).resolve().parents[2]
T, A, OURS = "chain:token", "user:a", "revenue:first_party"


def notes(connection):
    return [note for (note,) in connection.execute("SELECT note FROM transfers ORDER BY seq")]


def add(connection, note):
    connection.execute(
        "INSERT INTO transfers VALUES (NULL, ?, 'transfer', ?, ?, 1, NULL, NULL, 'c', ?, 0)",
        (f"t{note}", T, OURS, note),
    )


# --- Opening ---


@pytest.mark.parametrize("version", [(3, 40, 1), (3, 50, 7), (3, 51, 2)])
def test_a_sqlite_that_can_lose_commits_is_refused(version):
    found = ".".join(map(str, version))
    with pytest.raises(ConfigurationError, match=f"SQLite {found} can lose commits; the ledger needs 3.51.3 or later"):
        require_sqlite(version)


@pytest.mark.parametrize("version", [(3, 51, 3), (3, 53, 4), (4, 0, 0)])
def test_a_later_sqlite_is_accepted(version):
    require_sqlite(version)


def test_the_version_is_looked_at_before_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(database.sqlite3, "sqlite_version_info", (3, 51, 2))
    with pytest.raises(ConfigurationError, match=r"3\.51\.2"):
        open_database(tmp_path / "ledger.db")
    assert not list(tmp_path.iterdir())


def test_every_connection_commits_to_the_disk(ledger_path):
    for _ in range(2):  # a new file, and one that is there
        connection = open_database(ledger_path)
        pragmas = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys", "recursive_triggers", "busy_timeout")
        }
        assert pragmas == {
            "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "recursive_triggers": 1, "busy_timeout": 10_000,
        }  # fmt: skip
        connection.close()


def test_only_the_owner_may_read_the_files(connection, ledger_path):
    with immediate(connection):
        add(connection, "a")
    files = list(ledger_path.parent.iterdir())
    assert {file.name for file in files} == {"ledger.db", "ledger.db-wal", "ledger.db-shm"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize("what", ["no folder", "a folder", "a text", "nothing in it"])
def test_a_file_that_cannot_be_opened(tmp_path, what):
    path = tmp_path / "ledger.db"
    if what == "no folder":
        path = tmp_path / "missing" / "ledger.db"
    elif what == "a folder":
        path.mkdir()
    elif what == "a text":
        path.write_text("the ledger of the shop\n" * 100)
    elif what == "nothing in it":
        path.touch()
        open_database(path).close()
        return
    with pytest.raises(StorageError) as error:
        open_database(path)
    assert str(error.value).startswith(f"{path}: ") and isinstance(error.value, OSError)


def test_a_name_is_a_file_and_not_a_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_database("file:x?mode=memory").close()
    assert (tmp_path / "file:x?mode=memory").is_file()


def test_a_connection_belongs_to_its_thread(connection):
    refused = []

    def work():
        try:
            connection.execute("SELECT 1")
        except Exception as error:
            refused.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(refused) == 1 and "thread" in str(refused[0])


# --- Migrations ---


@pytest.fixture
def owner(monkeypatch):
    """A module that owns a table, applied after the real ones."""
    module = types.ModuleType("diffusionz.payments.made_up")
    module.MIGRATIONS = [("first", "CREATE TABLE things (a INTEGER) STRICT;\nINSERT INTO things VALUES (1);\n")]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(database, "OWNERS", (*database.OWNERS, "made_up"))
    return module


def test_a_migration_is_applied_once_and_a_new_one_later(owner, ledger_path):
    for _ in range(2):
        connection = open_database(ledger_path)
        assert connection.execute("SELECT * FROM things").fetchall() == [(1,)]
        connection.close()
    owner.MIGRATIONS.append(("second", "INSERT INTO things VALUES (2);"))
    connection = open_database(ledger_path)
    assert connection.execute("SELECT * FROM things").fetchall() == [(1,), (2,)]
    connection.close()


@pytest.mark.parametrize("wrong", ["INSERT INTO things VALUES ('x');", "INSERT INTO nowhere VALUES (1);", "SELECT 1"])
def test_a_migration_that_fails_leaves_the_database_as_it_was(owner, ledger_path, wrong):
    open_database(ledger_path).close()
    owner.MIGRATIONS.append(("second", f"INSERT INTO things VALUES (2);\n{wrong}"))
    with pytest.raises((IntegrityError, database.sqlite3.OperationalError, ValueError)):
        open_database(ledger_path)
    owner.MIGRATIONS.pop()
    connection = open_database(ledger_path)
    assert connection.execute("SELECT * FROM things").fetchall() == [(1,)]
    connection.close()


def test_the_names_of_migrations_are_unique():
    import importlib

    for name in database.OWNERS:
        names = [name for name, _ in importlib.import_module(f"diffusionz.payments.{name}").MIGRATIONS]
        assert len(names) == len(set(names)) > 0


def test_opening_needs_no_lock_when_nothing_is_new(connection, ledger_path):
    with immediate(connection):
        open_database(ledger_path, busy_timeout_s=0.0).close()


def test_processes_that_start_together_make_the_tables_once(ledger_path):
    code = (
        "import sys; from diffusionz.payments.database import open_database; sys.stdin.read(); "
        "c = open_database(sys.argv[1], busy_timeout_s=120.0); "
        "print(c.execute('SELECT count(*) FROM accounts').fetchone()[0])"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, ledger_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.close()
    assert [(process.stdout.read(), process.wait()) for process in processes] == [("6\n", 0)] * 4


def test_a_script_runs_within_the_transaction(connection):
    trigger = "CREATE TRIGGER x BEFORE DELETE ON things BEGIN\n  SELECT RAISE (ABORT, 'a; b');\nEND;\n"
    with pytest.raises(ZeroDivisionError), immediate(connection):
        run_script(connection, f"-- things; and more\nCREATE TABLE things (a);\n{trigger}")
        assert connection.in_transaction
        raise ZeroDivisionError
    assert not connection.execute("SELECT * FROM sqlite_schema WHERE name = 'things'").fetchall()


# --- Transactions ---


def test_immediate_commits_at_the_end_of_the_block(connection, ledger_path):
    with immediate(connection):
        add(connection, "a")
        other = open_database(ledger_path)
        assert notes(other) == []
    assert notes(other) == ["a"]
    other.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, StorageError])
def test_immediate_rolls_back_and_passes_the_error_on(connection, error):
    with pytest.raises(error), immediate(connection):
        add(connection, "a")
        raise error("x")
    assert notes(connection) == [] and not connection.in_transaction


def test_immediate_within_immediate_is_a_part_of_it(connection):
    with immediate(connection):
        add(connection, "a")
        with pytest.raises(ValueError), immediate(connection):
            add(connection, "b")
            with immediate(connection):
                add(connection, "c")
            raise ValueError
        with immediate(connection):
            add(connection, "d")
    assert notes(connection) == ["a", "d"]
    with pytest.raises(ValueError), immediate(connection):
        with immediate(connection):
            add(connection, "e")
        raise ValueError
    assert notes(connection) == ["a", "d"]


def test_immediate_is_the_only_writer_from_its_first_line(connection, ledger_path):
    other = open_database(ledger_path, busy_timeout_s=0.05)
    assert other.execute("PRAGMA busy_timeout").fetchone() == (50,)
    with immediate(connection):
        with pytest.raises(StorageError, match="database is locked"), immediate(other):
            pytest.fail("there are two writers")
    with immediate(other):
        add(other, "a")
    other.close()


def test_a_broken_constraint_or_statement_is_no_storage_error(connection):
    with immediate(connection):
        add(connection, "a")
    with pytest.raises(IntegrityError), immediate(connection):
        add(connection, "a")
    with pytest.raises(database.sqlite3.OperationalError, match="syntax"), immediate(connection):
        connection.execute("INSRET")


def test_a_snapshot_is_of_one_moment(connection, ledger_path):
    other = open_database(ledger_path)
    with snapshot(connection):
        assert notes(connection) == []
        with immediate(other):
            add(other, "a")
        assert notes(connection) == []
    assert notes(connection) == ["a"] and not connection.in_transaction
    with immediate(connection):
        add(connection, "b")
        with snapshot(connection):
            assert notes(connection) == ["a", "b"]
        assert connection.in_transaction
    other.close()


# --- What goes wrong ---


def test_B10_locked_no_hold_without_its_commit(ledger, ledger_path):
    ledger.transfer("d", T, A, 100, "deposit")
    other = open_database(ledger_path, busy_timeout_s=0.05)
    late = Ledger(other, ledger.clock)
    with immediate(ledger.connection):
        with pytest.raises(StorageError, match="database is locked"):
            late.hold("h", A, OURS, 10, int(ledger.clock()) + 60, "zimage")
        assert late.balance(A).available == 100  # reading goes on
    assert late.find("h") is None
    assert late.hold("h", A, OURS, 10, int(ledger.clock()) + 60, "zimage") is Result.created
    other.close()


def test_B10_read_only_no_hold(ledger):
    ledger.transfer("d", T, A, 100, "deposit")
    ledger.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError, match="readonly"):
        ledger.hold("h", A, OURS, 10, int(ledger.clock()) + 60, "zimage")
    ledger.connection.execute("PRAGMA query_only = OFF")
    assert ledger.balance(A).available == 100 and not ledger.connection.in_transaction


FILL = """
import os, resource, signal, sys
from diffusionz.payments.database import immediate, open_database
from diffusionz.payments.errors import StorageError
from diffusionz.payments.ledger import Ledger
ledger = Ledger(open_database(sys.argv[1]), lambda: 0.0)
ledger.open_account("user:a", "user")
ledger.transfer("d", "chain:token", "user:a", 10**6, "deposit")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
largest = os.path.getsize(f"{sys.argv[1]}-wal") + 200_000
resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
held = failed = 0
while failed < 5:
    try:
        assert ledger.hold(f"h{held}", "user:a", "revenue:first_party", 1, 60, "zimage").accepted
        held += 1
    except StorageError as error:
        failed += 1
        assert not ledger.connection.in_transaction
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert ledger.hold("after", "user:a", "revenue:first_party", 1, 60, "zimage").accepted
print(held)
"""


def test_B10_full_disk_what_was_acknowledged_stays_and_work_goes_on_when_there_is_room(ledger_path):
    """The process may not make files larger than they are, by some pages, which SQLite meets as a failing write."""
    done = subprocess.run([sys.executable, "-c", FILL, ledger_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held = int(done.stdout)
    connection = open_database(ledger_path)
    ledger = Ledger(connection)
    assert held > 2 and ledger.balance(A).held == held + 1
    assert all(invariant.holds for invariant in ledger.check())
    connection.close()


@pytest.mark.parametrize("tail", ["cut off", "zeros", "garbage"])
def test_B10_power_loss_leaves_a_prefix_of_the_journal(ledger, ledger_path, tmp_path, tail):
    """The write-ahead log ends anywhere, and what follows was never written, or is what lay on the disk before.
    (That an acknowledged commit does not end up in that tail is synchronous = FULL's promise, tested above.)"""
    ledger.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger.connection.execute("PRAGMA wal_autocheckpoint = 0")
    ledger.transfer("d", T, A, 1000, "deposit")
    for i in range(8):
        ledger.hold(f"h{i}", A, OURS, 100, int(ledger.clock()) + 60, "zimage")
        ledger.post(f"p{i}", f"h{i}", 40 + i)
    journal = list(ledger.journal())
    log = pathlib.Path(f"{ledger_path}-wal").read_bytes()
    chance = random.Random(7)
    seen = set()
    for number in range(15):
        end = chance.randrange(len(log))
        rest = b"" if tail == "cut off" else (bytes if tail == "zeros" else chance.randbytes)(len(log) - end)
        lost = tmp_path / f"lost{number}.db"
        lost.write_bytes(ledger_path.read_bytes())
        pathlib.Path(f"{lost}-wal").write_bytes(log[:end] + rest)
        connection = open_database(lost)
        survivor = Ledger(connection, ledger.clock)
        survived = list(survivor.journal())
        assert survived == journal[: len(survived)]
        assert all(invariant.holds for invariant in survivor.check())
        seen.add(len(survived))
        connection.close()
    assert len(seen) > 5
