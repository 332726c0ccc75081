"""A double-entry ledger of token base units: accounts, and transfers that are never changed.

    ledger = Ledger(open_database("ledger.db"))
    ledger.open_account("user:alice", "user")
    ledger.transfer("deposit:1", "chain:token", "user:alice", 5_000, "deposit")
    ledger.hold("call:1:hold", "user:alice", "revenue:first_party", 300, expires_at, "zimage")
    ledger.post("call:1:post", "call:1:hold", 250)       # 50 go back
    ledger.balance("user:alice")                         # Balance(posted=4750, held=0, available=4750)

The model is TigerBeetle's. A transfer moves an amount from the account that it debits to the one that it credits. A
hold reserves it until it is posted, voided or expires, once. A mistake is corrected by another transfer. Whoever asks
chooses the transfer's id and keeps it: asking again changes nothing and answers `exists`, so a lost reply is simply
repeated.

Each request is a ladder of refusals, most basic first; after its last rung the writes succeed, in one transaction.
A refusal writes nothing, so the same id may be tried again. Misspelled arguments raise before the ladder.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from sqlite_utils import Database

from diffusionz.payments.database import Connection, immediate, snapshot
from diffusionz.payments.errors import AmountError, ConflictError, ExpiredError, IdentifierError, NotFoundError

AMOUNT_MAX = 2**63 - 1
NOTE_MAX = 200  # characters
IDENTIFIER = re.compile(r"[A-Za-z0-9:_-]{1,64}")
EXPIRY_ID = "expiry:"  # begins the ids that the ledger gives by itself
ACCOUNT_KINDS = ("user", "chain", "revenue", "adjustments", "expense")

MIGRATIONS = [
    (
        "accounts and transfers",
        f"""
        CREATE TABLE accounts (
            name            TEXT PRIMARY KEY,
            kind            TEXT NOT NULL CHECK (kind IN {ACCOUNT_KINDS}),
            debits_pending  INTEGER NOT NULL DEFAULT 0 CHECK (debits_pending >= 0),
            debits_posted   INTEGER NOT NULL DEFAULT 0 CHECK (debits_posted >= 0),
            credits_pending INTEGER NOT NULL DEFAULT 0 CHECK (credits_pending >= 0),
            credits_posted  INTEGER NOT NULL DEFAULT 0 CHECK (credits_posted >= 0),
            CHECK (name = kind OR substr(name, 1, length(kind) + 1) = kind || ':'),
            CONSTRAINT no_overdraft CHECK (kind <> 'user' OR debits_pending + debits_posted <= credits_posted)
        ) STRICT, WITHOUT ROWID;
        INSERT INTO accounts (name, kind) VALUES
            ('chain:token', 'chain'), ('chain:sol', 'chain'), ('revenue:first_party', 'revenue'),
            ('revenue:proxied', 'revenue'), ('adjustments', 'adjustments'), ('expense:fees', 'expense');

        -- refers_to: of a post, void or expiry its hold, of a refund its post. Times are seconds since 1970, UTC.
        CREATE TABLE transfers (
            seq        INTEGER PRIMARY KEY,
            id         TEXT NOT NULL UNIQUE,
            kind       TEXT NOT NULL CHECK (kind IN ('transfer', 'hold', 'post', 'void', 'expiry', 'refund')),
            debit      TEXT NOT NULL REFERENCES accounts (name),
            credit     TEXT NOT NULL REFERENCES accounts (name),
            amount     INTEGER NOT NULL CHECK (amount >= 1),
            refers_to  INTEGER REFERENCES transfers (seq),
            expires_at INTEGER,
            code       TEXT NOT NULL,
            note       TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            CHECK (debit <> credit),
            CHECK ((refers_to IS NULL) = (kind IN ('transfer', 'hold'))),
            CHECK ((expires_at IS NOT NULL) = (kind = 'hold'))
        ) STRICT;
        CREATE UNIQUE INDEX one_resolution ON transfers (refers_to) WHERE refers_to IS NOT NULL;
        CREATE INDEX transfers_by_debit ON transfers (debit);
        CREATE INDEX transfers_by_credit ON transfers (credit);
        CREATE TRIGGER transfers_are_not_updated BEFORE UPDATE ON transfers
            BEGIN SELECT RAISE (ABORT, 'transfers are never changed'); END;
        CREATE TRIGGER transfers_are_not_deleted BEFORE DELETE ON transfers
            BEGIN SELECT RAISE (ABORT, 'transfers are never deleted'); END;

        -- The holds that are not resolved: what expiry looks through, however long the journal grows.
        CREATE TABLE open_holds (
            expires_at INTEGER NOT NULL,
            hold       INTEGER NOT NULL REFERENCES transfers (seq),
            PRIMARY KEY (expires_at, hold)
        ) STRICT, WITHOUT ROWID;

        -- What each account sees: change of its posted balance and of what is held of it. Their sums are its balance.
        CREATE VIEW history AS
            SELECT debit AS account, seq, id, kind, credit AS counterparty, amount, code, note, created_at,
                   CASE WHEN kind IN ('transfer', 'post', 'refund') THEN -amount ELSE 0 END AS posted,
                   CASE WHEN kind = 'hold' THEN amount
                        WHEN kind IN ('post', 'void', 'expiry')
                        THEN -(SELECT hold.amount FROM transfers AS hold WHERE hold.seq = transfers.refers_to)
                        ELSE 0 END AS held
            FROM transfers
            UNION ALL
            SELECT credit, seq, id, kind, debit, amount, code, note, created_at,
                   CASE WHEN kind IN ('transfer', 'post', 'refund') THEN amount ELSE 0 END,
                   0
            FROM transfers;
        """,
    ),
]


class Result(enum.Enum):
    """The answer to a request; the value is a sentence for people. The order is that of the ladders."""

    created = "created"
    exists = "the same request was accepted before"
    exists_with_different_kind = "the id belongs to a request of another kind"
    exists_with_different_reference = "the id belongs to a request about another hold or post"
    exists_with_different_debit = "the id belongs to a request that debits another account"
    exists_with_different_credit = "the id belongs to a request that credits another account"
    exists_with_different_amount = "the id belongs to a request of another amount"
    exists_with_different_expiry = "the id belongs to a hold that expires at another time"
    exists_with_different_code = "the id belongs to a request with another code"
    exists_with_different_note = "the id belongs to a request with another note"
    accounts_must_be_different = "an account cannot pay itself"
    debit_account_not_found = "there is no such account to debit"
    credit_account_not_found = "there is no such account to credit"
    expiry_must_be_in_the_future = "a hold has to expire in the future"
    hold_not_found = "there is no such hold"
    not_a_hold = "this is not a hold"
    hold_already_posted = "the hold was posted before"
    hold_already_voided = "the hold was voided before"
    hold_expired = "the hold has expired"
    exceeds_held_amount = "this is more than is held"
    post_not_found = "there is no such charge"
    not_a_post = "this is not a posted charge"
    already_refunded = "the charge was refunded before"
    exceeds_posted_amount = "this is more than was charged"
    overflows_debits = "the debited account would leave the range of its numbers"
    overflows_credits = "the credited account would leave the range of its numbers"
    exceeds_credits = "the account's credit does not cover this"

    @property
    def accepted(self) -> bool:
        """Whether the ledger holds the request, now or already."""
        return self in (Result.created, Result.exists)


def require(result: Result, about: str) -> None:
    """Raises what a refusal means: ConflictError, NotFoundError, ExpiredError or AmountError; `about` begins it."""
    if result.accepted:
        return
    if result.name.endswith("_not_found"):
        error: type[Exception] = NotFoundError
    elif result is Result.hold_expired:
        error = ExpiredError
    elif result.name.startswith(("exceeds_", "overflows_")):
        error = AmountError
    else:
        error = ConflictError
    raise error(f"{about}: {result.value}")


@dataclasses.dataclass(frozen=True, slots=True)
class Balance:
    """Base units of the token. What an account that is mostly debited (chain, expense) has posted is negative."""

    posted: int
    held: int

    @property
    def available(self) -> int:
        return self.posted - self.held


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """A row of the journal. Amounts in base units, times in seconds since 1970; refers_to is another transfer's seq."""

    seq: int
    id: str
    kind: str
    debit: str
    credit: str
    amount: int
    refers_to: int | None
    expires_at: int | None
    code: str
    note: str
    created_at: int


@dataclasses.dataclass(slots=True)
class Sums:
    """What went through an account, and what is held on its two sides. Base units."""

    debits_pending: int = 0
    debits_posted: int = 0
    credits_pending: int = 0
    credits_posted: int = 0

    @property
    def debited(self) -> int:
        return self.debits_pending + self.debits_posted

    @property
    def credited(self) -> int:
        return self.credits_pending + self.credits_posted


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line of an account's history. `posted` and `held` are the changes that it made to the account's balance."""

    seq: int
    id: str
    kind: str
    counterparty: str
    amount: int
    code: str
    note: str
    created_at: int
    posted: int
    held: int


@dataclasses.dataclass(frozen=True, slots=True)
class Invariant:
    """Something that is always true of a sound ledger, and whether it is. The detail says what was counted or found."""

    name: str
    holds: bool
    detail: str


COLUMNS, SUMS_COLUMNS, LINE_COLUMNS = (
    ", ".join(field.name for field in dataclasses.fields(row)) for row in (Transfer, Sums, Line)
)

DIFFERENCES = {
    "kind": Result.exists_with_different_kind,
    "refers_to": Result.exists_with_different_reference,
    "debit": Result.exists_with_different_debit,
    "credit": Result.exists_with_different_credit,
    "amount": Result.exists_with_different_amount,
    "expires_at": Result.exists_with_different_expiry,
    "code": Result.exists_with_different_code,
    "note": Result.exists_with_different_note,
}
RESOLVED = {
    "post": Result.hold_already_posted,
    "void": Result.hold_already_voided,
    "expiry": Result.hold_expired,
}

# Invariants as queries that count the exceptions.
COUNTS = [
    ("the journal has no gap", "SELECT coalesce(max(seq), 0) - count(*) FROM transfers"),
    (
        "every post, void and expiry resolves a hold of the same accounts, within its amount and time",
        """SELECT count(*) FROM transfers AS t LEFT JOIN transfers AS hold ON hold.seq = t.refers_to
           WHERE t.kind IN ('post', 'void', 'expiry')
           AND (hold.kind IS NOT 'hold' OR hold.debit <> t.debit OR hold.credit <> t.credit OR t.amount > hold.amount
                OR (t.kind = 'expiry') <> (t.created_at >= hold.expires_at))""",
    ),
    (
        "every refund takes back a post, within its amount",
        """SELECT count(*) FROM transfers AS t LEFT JOIN transfers AS post ON post.seq = t.refers_to
           WHERE t.kind = 'refund' AND (post.kind IS NOT 'post' OR post.debit <> t.credit OR post.credit <> t.debit
                                        OR t.amount > post.amount)""",
    ),
    (
        "nothing is resolved or refunded twice",
        "SELECT count(refers_to) - count(DISTINCT refers_to) FROM transfers",
    ),
    (
        "the open holds are those that nothing resolves",
        """WITH unresolved AS (SELECT expires_at, seq FROM transfers AS hold WHERE kind = 'hold'
                               AND NOT EXISTS (SELECT 1 FROM transfers AS t WHERE t.refers_to = hold.seq))
           SELECT (SELECT count(*) FROM (SELECT * FROM unresolved EXCEPT SELECT * FROM open_holds))
                + (SELECT count(*) FROM (SELECT * FROM open_holds EXCEPT SELECT * FROM unresolved))""",
    ),
    ("every reference leads somewhere", "SELECT count(*) FROM pragma_foreign_key_check"),
    ("the file is sound", "SELECT count(*) FROM pragma_integrity_check WHERE integrity_check <> 'ok'"),
]


class Ledger:
    """The accounts and transfers in one connection's database; `clock` gives seconds since 1970.

    Every method is one transaction, or part of the `immediate` that encloses it. All raise StorageError when the
    database cannot be written: then nothing has happened.
    """

    def __init__(self, connection: Connection, clock: Callable[[], float] = time.time) -> None:
        self.connection = connection
        self.clock = clock

    def open_account(self, name: str, kind: str) -> Result:
        """Opens the account "<kind>" or "<kind>:<anything>", of a kind in ACCOUNT_KINDS: `created` or `exists`.

        A "user" account never spends more than it was credited. The others are the ledger's own sides; those that it
        needs are there from the start. Raises IdentifierError.
        """
        check_identifier("account", name)
        if kind not in ACCOUNT_KINDS or name.partition(":")[0] != kind:
            kinds = ", ".join(ACCOUNT_KINDS)
            raise IdentifierError(f"account {name!r} of kind {kind!r}: a name begins with its kind, one of {kinds}")
        with immediate(self.connection):
            opened = self.connection.execute("INSERT OR IGNORE INTO accounts (name, kind) VALUES (?, ?)", (name, kind))
            return Result.created if opened.rowcount else Result.exists

    def transfer(self, id: str, debit: str, credit: str, amount: int, code: str, note: str = "") -> Result:
        """Moves `amount` base units from `debit` to `credit`. `code` says why in a word, `note` in a sentence.
        Raises IdentifierError, AmountError."""
        return self._create(id, "transfer", debit, credit, amount, None, code, note)

    def hold(self, id: str, debit: str, credit: str, amount: int, expires_at: int, code: str, note: str = "") -> Result:
        """Reserves `amount` base units of `debit` for `credit` until expires_at, in seconds since 1970.
        Raises IdentifierError, AmountError."""
        check_integer("expires_at", expires_at, 1)
        return self._create(id, "hold", debit, credit, amount, expires_at, code, note)

    def _create(
        self, id: str, kind: str, debit: str, credit: str, amount: int, expires_at: int | None, code: str, note: str
    ) -> Result:
        check_id(id)
        check_identifier("debit", debit)
        check_identifier("credit", credit)
        check_integer("amount", amount, 1)
        check_identifier("code", code)
        check_note(note)
        with immediate(self.connection):
            now = self.clock()
            asked = {
                "kind": kind, "debit": debit, "credit": credit, "amount": amount, "expires_at": expires_at,
                "code": code, "note": note,
            }  # fmt: skip
            if existing := self.find(id):
                return compare(existing, asked)
            if debit == credit:
                return Result.accounts_must_be_different
            debits, credits = self._sums(debit), self._sums(credit)
            if debits is None:
                return Result.debit_account_not_found
            if credits is None:
                return Result.credit_account_not_found
            if expires_at is not None and expires_at <= now:
                return Result.expiry_must_be_in_the_future
            if debits.debited + amount > AMOUNT_MAX:
                return Result.overflows_debits
            if credits.credited + amount > AMOUNT_MAX:
                return Result.overflows_credits
            if is_user(debit) and debits.debited + amount > debits.credits_posted:
                return Result.exceeds_credits

            # From here on it succeeds.
            seq = self._write(id, kind, debit, credit, amount, None, expires_at, code, note, now)
            if expires_at is None:
                self._move(debit, credit, pending=0, posted=amount)
            else:
                self._move(debit, credit, pending=amount, posted=0)
                self.connection.execute("INSERT INTO open_holds VALUES (?, ?)", (expires_at, seq))
            return Result.created

    def post(self, id: str, hold_id: str, amount: int | None = None, note: str = "") -> Result:
        """Moves `amount` of what is held (None: all of it) and gives back the rest. At expires_at it is too late,
        whether or not `expire` has come by. Raises IdentifierError, AmountError."""
        if amount is not None:
            check_integer("amount", amount, 1)
        return self._resolve(id, "post", hold_id, amount, note)

    def void(self, id: str, hold_id: str, note: str = "") -> Result:
        """Gives back all that is held. Raises IdentifierError."""
        return self._resolve(id, "void", hold_id, None, note)

    def _resolve(self, id: str, kind: str, hold_id: str, amount: int | None, note: str) -> Result:
        check_id(id)
        check_identifier("hold_id", hold_id)
        check_note(note)
        with immediate(self.connection):
            now = self.clock()
            hold = self.find(hold_id)
            if amount is None and hold:
                amount = hold.amount
            if existing := self.find(id):
                asked = {"kind": kind, "refers_to": hold.seq if hold else None, "amount": amount, "note": note}
                return compare(existing, asked)
            if hold is None or amount is None:
                return Result.hold_not_found
            if hold.kind != "hold" or hold.expires_at is None:
                return Result.not_a_hold
            if resolved := self.resolution(hold):
                return RESOLVED[resolved.kind]
            if hold.expires_at <= now:
                return Result.hold_expired
            if amount > hold.amount:
                return Result.exceeds_held_amount

            # From here on it succeeds.
            self._release(id, kind, hold, amount, note, now)
            return Result.created

    def expire(self, now: float | None = None, batch: int = 1000) -> int:
        """Gives back every hold whose expires_at <= now (None: the clock's) and says how many there were. Each `batch`
        of them is a transaction, so that others write in between. Run it when a server starts, and regularly."""
        now = self.clock() if now is None else now
        count = 0
        while True:
            with immediate(self.connection):
                due = self.connection.execute(
                    f"SELECT {COLUMNS} FROM transfers WHERE seq IN"
                    " (SELECT hold FROM open_holds WHERE expires_at <= ? ORDER BY expires_at, hold LIMIT ?)",
                    (int(now), batch),
                ).fetchall()
                for hold in (Transfer(*row) for row in due):
                    self._release(f"{EXPIRY_ID}{hold.seq}", "expiry", hold, hold.amount, "", now)
            count += len(due)
            if len(due) < batch:
                return count

    def refund(self, id: str, post_id: str, amount: int | None = None, note: str = "") -> Result:
        """Moves `amount` of what was posted (None: all of it) back to the account that paid: at most once a post.
        Raises IdentifierError, AmountError."""
        check_id(id)
        check_identifier("post_id", post_id)
        if amount is not None:
            check_integer("amount", amount, 1)
        check_note(note)
        with immediate(self.connection):
            post = self.find(post_id)
            if amount is None and post:
                amount = post.amount
            if existing := self.find(id):
                asked = {"kind": "refund", "refers_to": post.seq if post else None, "amount": amount, "note": note}
                return compare(existing, asked)
            if post is None or amount is None:
                return Result.post_not_found
            if post.kind != "post":
                return Result.not_a_post
            if self.resolution(post):
                return Result.already_refunded
            if amount > post.amount:
                return Result.exceeds_posted_amount
            debits, credits = self._sums(post.credit), self._sums(post.debit)
            assert debits and credits, "a posted transfer's accounts exist"
            if debits.debited + amount > AMOUNT_MAX:
                return Result.overflows_debits
            if credits.credited + amount > AMOUNT_MAX:
                return Result.overflows_credits

            # From here on it succeeds.
            self._write(id, "refund", post.credit, post.debit, amount, post.seq, None, post.code, note, self.clock())
            self._move(post.credit, post.debit, pending=0, posted=amount)
            return Result.created

    def balance(self, account: str) -> Balance:
        """Raises NotFoundError, IdentifierError."""
        check_identifier("account", account)
        sums = self._sums(account)
        if sums is None:
            raise NotFoundError(f"there is no account {account!r}")
        return Balance(posted=sums.credits_posted - sums.debits_posted, held=sums.debits_pending)

    def history(self, account: str, limit: int = 100, before: int | None = None) -> list[Line]:
        """The account's lines, newest first: at most `limit` of them (1 to 1000), those before the line with seq
        `before`. Raises NotFoundError, IdentifierError, AmountError."""
        check_integer("limit", limit, 1, 1000)
        if before is not None:
            check_integer("before", before, 0)
        self.balance(account)
        rows = Database(self.connection).query(
            f"SELECT {LINE_COLUMNS} FROM history WHERE account = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
            (account, AMOUNT_MAX if before is None else before, limit),
        )
        return [Line(**row) for row in rows]

    def journal(self) -> Iterator[Transfer]:
        """Every transfer, oldest first."""
        for row in self.connection.execute(f"SELECT {COLUMNS} FROM transfers ORDER BY seq"):
            yield Transfer(*row)

    def accounts(self) -> dict[str, Sums]:
        """What went through every account, as the ledger keeps it."""
        rows = self.connection.execute(f"SELECT name, {SUMS_COLUMNS} FROM accounts")
        return {name: Sums(*sums) for name, *sums in rows}

    def check(self) -> list[Invariant]:
        """Every invariant of the ledger with its verdict, all of one moment. Reads the whole journal."""
        with snapshot(self.connection):
            accounts = self.accounts()
            replayed = replay(self.journal())
            overdrawn = [
                name for name, sums in accounts.items() if is_user(name) and sums.debited > sums.credits_posted
            ]
            unlike = [name for name in accounts | replayed if accounts.get(name) != replayed.get(name, Sums())]
            posted = sum(sums.debits_posted - sums.credits_posted for sums in accounts.values())
            pending = sum(sums.debits_pending - sums.credits_pending for sums in accounts.values())
            return [
                Invariant("debits equal credits", not (posted or pending), f"differ by {posted} and {pending} held"),
                Invariant("no user is overdrawn", not overdrawn, named(overdrawn)),
                Invariant("the journal replayed gives the balances", not unlike, named(unlike)),
                *(self._none(name, query) for name, query in COUNTS),
            ]

    def _none(self, name: str, query: str) -> Invariant:
        (count,) = self.connection.execute(query).fetchone()
        return Invariant(name, count == 0, f"{count} exceptions")

    def find(self, id: str) -> Transfer | None:
        """The transfer with this id."""
        row = self.connection.execute(f"SELECT {COLUMNS} FROM transfers WHERE id = ?", (id,)).fetchone()
        return Transfer(*row) if row else None

    def resolution(self, transfer: Transfer) -> Transfer | None:
        """The post, void or expiry of a hold; the refund of a post."""
        row = self.connection.execute(
            f"SELECT {COLUMNS} FROM transfers WHERE refers_to = ?", (transfer.seq,)
        ).fetchone()
        return Transfer(*row) if row else None

    def _sums(self, account: str) -> Sums | None:
        row = self.connection.execute(f"SELECT {SUMS_COLUMNS} FROM accounts WHERE name = ?", (account,)).fetchone()
        return Sums(*row) if row else None

    def _write(
        self, id: str, kind: str, debit: str, credit: str, amount: int, refers_to: int | None, expires_at: int | None,
        code: str, note: str, now: float,
    ) -> int:  # fmt: skip
        """Adds a row to the journal; its seq."""
        written = self.connection.execute(
            f"INSERT INTO transfers ({COLUMNS}) VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (id, kind, debit, credit, amount, refers_to, expires_at, code, note, int(now)),
        )
        assert written.lastrowid is not None
        return written.lastrowid

    def _move(self, debit: str, credit: str, pending: int, posted: int) -> None:
        """Adds to the sums of both sides. Their CHECKs are the second lock on what the ladders have let through."""
        self.connection.execute(
            "UPDATE accounts SET debits_pending = debits_pending + ?, debits_posted = debits_posted + ? WHERE name = ?",
            (pending, posted, debit),
        )
        self.connection.execute(
            "UPDATE accounts SET credits_pending = credits_pending + ?, credits_posted = credits_posted + ?"
            " WHERE name = ?",
            (pending, posted, credit),
        )

    def _release(self, id: str, kind: str, hold: Transfer, amount: int, note: str, now: float) -> None:
        """Resolves the hold: a post moves `amount`, a void or expiry nothing."""
        self._write(id, kind, hold.debit, hold.credit, amount, hold.seq, None, hold.code, note, now)
        self._move(hold.debit, hold.credit, pending=-hold.amount, posted=amount if kind == "post" else 0)
        self.connection.execute("DELETE FROM open_holds WHERE expires_at = ? AND hold = ?", (hold.expires_at, hold.seq))


def replay(journal: Iterable[Transfer]) -> dict[str, Sums]:
    """The sums of every account that the journal names, from nothing but the journal, oldest first."""
    accounts: dict[str, Sums] = {}
    held: dict[int, int] = {}
    for transfer in journal:
        pending = posted = 0
        if transfer.kind == "hold":
            held[transfer.seq] = pending = transfer.amount
        elif transfer.kind in ("post", "void", "expiry"):
            pending = -held.pop(transfer.refers_to or 0, 0)
        if transfer.kind in ("transfer", "post", "refund"):
            posted = transfer.amount
        debit, credit = (accounts.setdefault(name, Sums()) for name in (transfer.debit, transfer.credit))
        debit.debits_pending += pending
        debit.debits_posted += posted
        credit.credits_pending += pending
        credit.credits_posted += posted
    return accounts


def compare(existing: Transfer, asked: Mapping[str, object]) -> Result:
    """`exists` when the transfer is what is asked for, else the first field that differs."""
    for field, difference in DIFFERENCES.items():
        if field in asked and getattr(existing, field) != asked[field]:
            return difference
    return Result.exists


def is_user(account: str) -> bool:
    return account.startswith("user:")


def check_integer(what: str, value: object, least: int, most: int = AMOUNT_MAX) -> None:
    """Raises AmountError for what is not an int (a bool is not) from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise AmountError(f"{what} {shown(value)}: it must be an int from {least} to {most}")


def check_identifier(what: str, value: object) -> None:
    """Raises IdentifierError for what is not 1 to 64 of A-Z, a-z, 0-9, ':', '_' and '-'."""
    if not isinstance(value, str) or not IDENTIFIER.fullmatch(value):
        raise IdentifierError(f"{what} {shown(value)}: it must be 1 to 64 of A-Z, a-z, 0-9, ':', '_' and '-'")


def check_id(value: object) -> None:
    """Raises IdentifierError for what cannot be the id of a request."""
    check_identifier("id", value)
    if str(value).startswith(EXPIRY_ID):
        raise IdentifierError(f"id {value!r}: those that begin with {EXPIRY_ID!r} are the ledger's own")


def check_note(value: object) -> None:
    """Raises IdentifierError for what is not one line of printable text of at most NOTE_MAX characters."""
    if not isinstance(value, str) or len(value) > NOTE_MAX or not value.isprintable():
        raise IdentifierError(f"note {shown(value)}: it must be a line of at most {NOTE_MAX} printable characters")


def shown(value: object) -> str:
    """The value for a message, cut when it is long."""
    if type(value) is int and value.bit_length() > 128:
        return f"of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def named(names: list[str]) -> str:
    """A few of the names, and how many there are."""
    return f"{len(names)} exceptions{': ' if names else ''}{', '.join(names[:5])}"
