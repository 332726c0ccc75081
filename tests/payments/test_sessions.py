"""Sessions: what a browser's token opens, until when, and what the database keeps of it."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from diffusionz.payments.database import IntegrityError
from diffusionz.payments.ledger import Ledger
from diffusionz.payments.sessions import SESSION_S, Sessions


@pytest.fixture
def sessions(ledger: Ledger, clock: Any) -> Sessions:
    return Sessions(ledger.connection, clock=clock)


def test_a_token_opens_its_account_until_it_is_closed(sessions: Sessions) -> None:
    one, two, other = (sessions.open(account) for account in ("user:a", "user:a", "user:b"))
    assert [sessions.account(token) for token in (one, two, other)] == ["user:a", "user:a", "user:b"]
    sessions.close(one)
    sessions.close(one)
    sessions.close("nothing")
    assert [sessions.account(token) for token in (one, two, other)] == [None, "user:a", "user:b"]
    for text in ("", one[:-1], two + "A", "user:a", "\udcff", "x" * 100_000):
        assert sessions.account(text) is None


def test_it_ends_by_itself(sessions: Sessions, ledger: Ledger, clock: Any) -> None:
    token = sessions.open("user:a")
    clock.now += SESSION_S - 1
    assert sessions.account(token) == "user:a"
    clock.now += 1
    assert sessions.account(token) is None
    sessions.open("user:a")  # and what has ended is not kept
    assert ledger.connection.execute("SELECT count(*) FROM sessions").fetchone() == (1,)


def test_the_database_has_no_token(sessions: Sessions, ledger_path: pathlib.Path) -> None:
    token = sessions.open("user:a")
    for file in ledger_path.parent.glob(ledger_path.name + "*"):
        assert token.encode() not in file.read_bytes()
    assert len(token) >= 43  # 256 bits


def test_an_account_that_is_not_there_has_none(sessions: Sessions) -> None:
    with pytest.raises(IntegrityError):
        sessions.open("user:nobody")
