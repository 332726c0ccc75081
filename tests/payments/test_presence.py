"""Who is alone in a ledger, and who is not."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from diffusionz.payments.errors import StorageError
from diffusionz.payments.presence import Presence


@pytest.fixture
def database(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "ledger.db"


def enter(presence: Presence) -> bool:
    """Whether it was alone."""
    alone = []
    presence.enter(if_alone=lambda: alone.append(True))
    return bool(alone)


def visit(database: pathlib.Path) -> bool:
    """Enters and leaves; whether it was alone."""
    presence = Presence(database)
    try:
        return enter(presence)
    finally:
        presence.leave()


@pytest.fixture
def killed(database: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is there."""
    code = (
        "import sys, time; from diffusionz.payments.presence import Presence\n"
        "presence = Presence(sys.argv[1]); presence.enter(lambda: None); print('there', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(database)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "there\n"
            yield process
        finally:
            process.kill()


def test_who_comes_first_is_alone(database: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = Presence(database), Presence(database)
    assert enter(first) and not enter(second)
    link = tmp_path / "link.db"
    link.symlink_to(database)
    assert not visit(link)  # the same ledger by another name
    assert visit(tmp_path / "another.db")
    first.leave()
    first.leave()
    assert not visit(database)
    second.leave()
    assert visit(database)


def test_who_was_killed_is_gone(database: pathlib.Path, killed: subprocess.Popen[str]) -> None:
    assert not visit(database)
    killed.kill()
    killed.wait()
    assert visit(database)


def test_nobody_enters_while_the_first_tidies_up(database: pathlib.Path) -> None:
    tidying, done = threading.Event(), threading.Event()
    order = []

    def tidy_up() -> None:
        tidying.set()
        assert not done.wait(0.3), "the second came in meanwhile"
        order.append("tidied up")

    def second() -> None:
        tidying.wait()
        assert not visit(database)
        order.append("second")
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    first = Presence(database)
    first.enter(tidy_up)
    thread.join()
    assert order == ["tidied up", "second"]
    first.leave()


def test_who_fails_is_not_there(database: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def fails() -> None:
        raise RuntimeError("the disk is full")

    failed = Presence(database)
    with pytest.raises(RuntimeError):
        failed.enter(fails)
    assert visit(database)
    with pytest.raises(StorageError, match=r"ledger\.db\.lock: No such file or directory"):
        Presence(tmp_path / "nowhere" / "ledger.db").enter(lambda: None)
