"""Goal: after any sequence of requests, expiries, restarts and crashes the ledger is what thirty lines say that it is.

Method: Hypothesis chooses the sequence and shrinks one that goes wrong. The model below keeps the accepted requests in
a list and adds them up anew for each question; it knows nothing of SQL, sums that are kept, or the order of refusals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from diffusionz.payments.database import immediate, open_database
from diffusionz.payments.ledger import Balance, Ledger, Result, Sums, replay

NOW = 1_800_000_000
USERS = ["user:a", "user:b"]
ACCOUNTS = [*USERS, "chain:token", "revenue:first_party"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A request as it was accepted: of a post, void, expiry or refund `about` is the entry that it refers to."""

    id: str
    kind: str
    debit: str
    credit: str
    amount: int
    expires_at: int = 0
    about: Entry | None = None


class Model:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def find(self, id: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.id == id), None)

    def referring_to(self, about: Entry) -> Entry | None:
        return next((entry for entry in self.entries if entry.about is about), None)

    def posted(self, account: str) -> int:
        moved = [entry for entry in self.entries if entry.kind in ("transfer", "post", "refund")]
        return sum(entry.amount * ((entry.credit == account) - (entry.debit == account)) for entry in moved)

    def open_holds(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == "hold" and not self.referring_to(entry)]

    def held(self, account: str) -> int:
        return sum(hold.amount for hold in self.open_holds() if hold.debit == account)

    def accepts(self, entry: Entry, now: float) -> bool:
        if entry.kind in ("transfer", "hold"):
            covered = entry.debit not in USERS or entry.amount <= self.posted(entry.debit) - self.held(entry.debit)
            return covered and entry.debit != entry.credit and (entry.kind == "transfer" or entry.expires_at > now)
        about, needed = entry.about, "post" if entry.kind == "refund" else "hold"
        if about is None or about.kind != needed or self.referring_to(about) or entry.amount > about.amount:
            return False
        return entry.kind == "refund" or now < about.expires_at


# Mostly a new id; the others collide.
IDS = st.sampled_from(["new"] * 9 + ["id:1", "id:2", "id:3"])
AMOUNTS = st.integers(1, 12)
VERBS = st.sampled_from(["post", "void", "refund"])


class LedgerMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ledger-machine-"))
        self.model, self.now = Model(), NOW
        self.open()
        for name in USERS:
            self.ledger.open_account(name, "user")
            self.transfer(f"first:{name[-1]}", "chain:token", name, 40)

    def open(self) -> None:
        connection = open_database(self.folder / "ledger.db")
        connection.execute("PRAGMA synchronous = OFF")  # the machine does not lose power here
        self.ledger = Ledger(connection, lambda: self.now)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            assert [invariant for invariant in self.ledger.check() if not invariant.holds] == []
            self.ledger.connection.close()
            shutil.rmtree(self.folder)

    def named(self, id: str) -> str:
        return f"id:{len(self.model.entries)}" if id == "new" else id

    def judge(self, entry: Entry, answer: Result) -> None:
        known = self.model.find(entry.id)
        if known:
            assert answer is Result.exists if entry == known else answer.name.startswith("exists_with_different_")
        elif self.model.accepts(entry, self.now):
            assert answer is Result.created
            self.model.entries.append(entry)
        else:
            assert not answer.accepted and not answer.name.startswith("exists")

    @rule(id=IDS, debit=st.sampled_from(ACCOUNTS), credit=st.sampled_from(ACCOUNTS), amount=AMOUNTS)
    def transfer(self, id: str, debit: str, credit: str, amount: int) -> None:
        id = self.named(id)
        answer = self.ledger.transfer(id, debit, credit, amount, "c")
        self.judge(Entry(id, "transfer", debit, credit, amount), answer)

    @rule(id=IDS, user=st.sampled_from(USERS), amount=AMOUNTS)
    def deposit(self, id: str, user: str, amount: int) -> None:
        self.transfer(id, "chain:token", user, amount)

    @rule(id=IDS, debit=st.sampled_from(USERS), amount=AMOUNTS, lasts=st.integers(0, 9))
    def hold(self, id: str, debit: str, amount: int, lasts: int) -> None:
        id = self.named(id)
        answer = self.ledger.hold(id, debit, ACCOUNTS[-1], amount, self.now + lasts, "c")
        self.judge(Entry(id, "hold", debit, ACCOUNTS[-1], amount, self.now + lasts), answer)

    def post(self, id: str, hold_id: str, amount: int | None = None) -> None:
        id = self.named(id)
        self.judge(self.about(id, "post", hold_id, amount), self.ledger.post(id, hold_id, amount))

    def void(self, id: str, hold_id: str) -> None:
        id = self.named(id)
        self.judge(self.about(id, "void", hold_id, None), self.ledger.void(id, hold_id))

    def refund(self, id: str, post_id: str, amount: int | None = None) -> None:
        id = self.named(id)
        post = self.about(id, "refund", post_id, amount)
        entry = dataclasses.replace(post, debit=post.credit, credit=post.debit)
        self.judge(entry, self.ledger.refund(id, post_id, amount))

    def about(self, id: str, kind: str, other: str, amount: int | None) -> Entry:
        about = self.model.find(other)
        if about is None:
            return Entry(id, kind, "", "", amount or 0)
        return Entry(id, kind, about.debit, about.credit, amount or about.amount, about=about)

    @rule(
        id=IDS, verb=st.sampled_from(["post", "void", "refund"]), more=st.sampled_from([None, -1, 0, 1]), data=st.data()
    )
    def resolve(self, id: str, verb: str, more: int | None, data: st.DataObject) -> None:
        """By `more` than there is, or less, or None: all of it."""
        fitting = self.model.open_holds() if verb != "refund" else [e for e in self.model.entries if e.kind == "post"]
        about = data.draw(st.sampled_from(fitting or self.model.entries))
        amount = None if more is None else max(1, about.amount + more)
        self.void(id, about.id) if verb == "void" else getattr(self, verb)(id, about.id, amount)

    @rule(id=IDS, verb=VERBS, other=IDS)
    def resolve_what_is_not_there(self, id: str, verb: str, other: str) -> None:
        getattr(self, verb)(id, other)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.model.entries))
        if entry.kind == "transfer":
            self.transfer(entry.id, entry.debit, entry.credit, entry.amount)
        elif entry.about and entry.kind != "expiry":
            amount = () if entry.kind == "void" else (entry.amount,)
            getattr(self, entry.kind)(entry.id, entry.about.id, *amount)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        due = [hold for hold in self.model.open_holds() if hold.expires_at <= self.now]
        assert self.ledger.expire(batch=2) == len(due)
        for hold in due:
            id = f"expiry:{1 + self.model.entries.index(hold)}"
            self.model.entries.append(Entry(id, "expiry", hold.debit, hold.credit, hold.amount, about=hold))

    @rule()
    def restart(self) -> None:
        self.ledger.connection.close()
        self.open()

    @rule(user=st.sampled_from(USERS), amount=AMOUNTS)
    def crash_before_the_commit(self, user: str, amount: int) -> None:
        """What goes on is what lies on the disk in the middle of a transaction."""
        found = pathlib.Path(tempfile.mkdtemp(prefix="ledger-machine-"))
        with contextlib.suppress(ZeroDivisionError), immediate(self.ledger.connection):
            assert self.ledger.transfer("lost", "chain:token", user, amount, "c") is Result.created
            for file in self.folder.glob("ledger.db*"):
                shutil.copy(file, found)
            raise ZeroDivisionError
        self.ledger.connection.close()
        shutil.rmtree(self.folder)
        self.folder = found
        self.open()

    @invariant()
    def balances_are_the_models(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for account in ACCOUNTS:
            assert self.ledger.balance(account) == Balance(self.model.posted(account), self.model.held(account))
        for user in USERS:
            assert self.ledger.balance(user).available >= 0
        assert [transfer.kind for transfer in self.ledger.journal()] == [entry.kind for entry in self.model.entries]
        replayed = replay(self.ledger.journal())
        assert self.ledger.accounts() == {name: replayed.get(name, Sums()) for name in self.ledger.accounts()}


LedgerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
TestLedgerAgainstTheModel = LedgerMachine.TestCase
