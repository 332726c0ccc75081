"""Is the ledger sound, and is every token that it owes where it says? Every invariant, with its verdict.

    report = audit_records(ledger)                       # the database by itself: the journal replayed, the evidence
    report = await audit(watcher)                        # and the chain beside it
    report.clean, report.invariants, report.figures

Nothing is taken from sums that are kept along the way: the journal is replayed, prices are reckoned again from what
their holds froze, and the chain is asked for every balance and, if `thorough`, for every transaction that was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from solders.pubkey import Pubkey
from solders.signature import Signature

from diffusionz.payments import tokens
from diffusionz.payments.chain import MAX_ACCOUNTS, Chain, Transaction
from diffusionz.payments.database import Connection, snapshot
from diffusionz.payments.deposits import SOL, TREASURY, Deposits, Movement, transfer_id
from diffusionz.payments.errors import AmountError, ChainError, ConfigurationError
from diffusionz.payments.ledger import Invariant, Ledger, named
from diffusionz.payments.rates import Rate
from diffusionz.payments.watcher import Watcher

EVER_S = 1e10  # 317 years
LATE_S = 3600  # after which a hold that has expired, or a sweep that is open, was forgotten by somebody

# Invariants as queries that count the exceptions; :now is in seconds since 1970.
CALLS = [
    (
        "every call has its hold",
        "SELECT count(*) FROM calls AS c LEFT JOIN transfers AS t ON t.id = 'call:' || c.call_id || ':hold'"
        " WHERE t.kind IS NOT 'hold'",
    ),
    (
        "revenue is what was charged, less refunds and what was moved on",
        """SELECT count(*) FROM accounts AS a WHERE kind = 'revenue' AND credits_posted - debits_posted <>
           (SELECT coalesce(sum(CASE WHEN credit = a.name THEN amount ELSE -amount END), 0) FROM transfers
            WHERE kind IN ('transfer', 'post', 'refund') AND a.name IN (debit, credit))""",
    ),
    (
        "no hold is open long after its time",
        f"SELECT count(*) FROM open_holds WHERE expires_at <= :now - {LATE_S}",
    ),
]
DEPOSITS = [
    (
        "each balance is the sum of its account's movements",
        """SELECT count(*) FROM chain_accounts AS c
           WHERE balance <> (SELECT coalesce(sum(delta), 0) FROM movements AS m WHERE m.account = c.account)""",
    ),
    (
        "every deposit is credited once, or waits",
        """SELECT count(*) FROM movements AS m
           WHERE (kind = 'deposit') <> (EXISTS (SELECT 1 FROM credited WHERE movement = m.id)
                                        + EXISTS (SELECT 1 FROM waiting WHERE movement = m.id))""",
    ),
    (
        "every credit goes to the account that its address was given to",
        """SELECT count(*) FROM credited AS d JOIN movements AS m ON m.id = d.movement
           JOIN chain_accounts AS c ON c.account = m.account JOIN deposit_addresses AS a ON a.address = c.address
           JOIN transfers AS t ON t.id = d.transfer
           WHERE t.kind <> 'transfer' OR t.credit IS NOT a.account
           OR t.debit <> CASE m.mint WHEN 'SOL' THEN 'chain:sol' ELSE 'chain:token' END""",
    ),
    (
        "tokens are credited one to one",
        """SELECT count(*) FROM credits AS c JOIN transfers AS t ON t.id = c.transfer
           WHERE t.debit = 'chain:token' AND t.amount IS NOT
           (SELECT sum(m.delta) FROM credited AS d JOIN movements AS m ON m.id = d.movement
            WHERE d.transfer = c.transfer AND m.mint <> 'SOL')""",
    ),
    (
        "nothing is credited without a deposit",
        """SELECT count(*) FROM transfers AS t WHERE kind = 'transfer'
           AND (debit IN ('chain:token', 'chain:sol') OR (credit LIKE 'user:%' AND debit LIKE 'chain:%'))
           AND NOT EXISTS (SELECT 1 FROM credited WHERE transfer = t.id)""",
    ),
    (
        "no user is credited but by a deposit, a refund or an adjustment",
        """SELECT count(*) FROM transfers WHERE kind = 'transfer' AND credit LIKE 'user:%'
           AND debit NOT IN ('chain:token', 'chain:sol', 'adjustments')""",
    ),
    (
        "an account is in one open sweep at most, and no sweep is open for long",
        f"""SELECT (SELECT count(*) FROM sweep_parts AS p JOIN sweeps AS s ON s.id = p.sweep
                    WHERE (p.open IS 1) <> (s.status = 'open'))
                 + (SELECT count(*) FROM sweeps WHERE status = 'open' AND created_at <= :now - {LATE_S})""",
    ),
]


@dataclass
class Report:
    """The invariants by what they are about, and figures in base units of the token (or lamports, if so named)."""

    invariants: dict[str, list[Invariant]] = field(default_factory=dict)
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[Invariant]:
        return [line for lines in self.invariants.values() for line in lines if not line.holds]


def audit_records(ledger: Ledger) -> Report:
    """What the database says of itself, all of one moment. Reads all of it."""
    connection = ledger.connection
    now = {"now": int(ledger.clock())}

    def count(name: str, query: str) -> Invariant:
        (exceptions,) = connection.execute(query, now if ":now" in query else ()).fetchone()
        return Invariant(name, exceptions == 0, f"{exceptions} exceptions")

    with snapshot(connection):
        figures = _figures(ledger)
        return Report(
            {
                "ledger": ledger.check(),
                "calls": [*(count(*entry) for entry in CALLS), _prices(connection)],
                "deposits": [
                    *(count(*entry) for entry in DEPOSITS),
                    _outgoing(connection),
                    _sums(ledger, figures),
                    _alarms(connection),
                ],
            },
            figures,
        )


async def audit(watcher: Watcher, *, thorough: bool = False) -> Report:
    """Records what is new on the chain first, as the watcher does, so that it makes no difference; then compares.

    That is some six requests for a hundred addresses. `thorough`: reads every history and every recorded transaction.
    Raises ChainError when the cluster does not answer.
    """
    chain, deposits = watcher.chain, watcher.deposits
    # One to which no address is too old to be looked at in every scan.
    tireless = Watcher(
        chain,
        deposits,
        hot_s=EVER_S,
        extensions=watcher.extensions,
        allow_freeze=watcher.allow_freeze,
        clock=watcher.clock,
    )
    pinned = "the cluster and the token are the database's own"
    try:
        await tireless.start()
    except ConfigurationError as error:
        report = audit_records(deposits.ledger)
        report.invariants["chain"] = [Invariant(pinned, False, str(error))]
        return report
    scan = await (tireless.reconcile() if thorough else tireless.scan())
    lines = [
        Invariant(pinned, True, f"token {deposits.pins.mint}"),
        Invariant("every history that is needed can be read", not scan.failed, named(list(scan.failed))),
        await _balances(deposits, chain),
    ]
    if thorough:
        lines.append(await _evidence(deposits, chain))
    report = audit_records(deposits.ledger)
    report.invariants["chain"] = lines
    report.figures["treasury_on_chain"] = await _treasury(deposits, chain)
    return report


def _prices(connection: Connection) -> Invariant:
    """Reckons each hold again from the price and the rate that are frozen beside it."""
    wrong = []
    calls = connection.execute(
        "SELECT call_id, c.units, usd_micro, micro_usd, per, first_party, pico_usd, decimals, rate_at, rate_evidence,"
        " t.amount, t.credit FROM calls AS c JOIN transfers AS t ON t.id = 'call:' || call_id || ':hold'"
    )
    count = 0
    for call_id, units, usd_micro, micro_usd, per, first_party, pico_usd, decimals, at, evidence, held, credit in calls:
        count += 1
        rate = Rate(pico_usd, decimals, "ath" if first_party else "market", at, evidence)
        try:
            right = (-(-units // per) * micro_usd, rate.base_units(usd_micro))
        except AmountError:
            right = (0, 0)
        bucket = "revenue:first_party" if first_party else "revenue:proxied"
        if (usd_micro, held, credit) != (*right, bucket):
            wrong.append(call_id)
    return Invariant("every call was held at its frozen price and rate", not wrong, f"{count} calls, {named(wrong)}")


def _outgoing(connection: Connection) -> Invariant:
    """Tokens that left an address are in the ledger too."""
    missing = []
    rows = connection.execute(
        "SELECT signature, account, mint, kind, delta FROM movements WHERE kind <> 'deposit' AND mint <> ?", (SOL,)
    ).fetchall()
    for movement in (Movement(*row) for row in rows):
        debit = TREASURY if movement.kind == "sweep" else "adjustments"
        found = connection.execute(
            "SELECT debit, credit, amount FROM transfers WHERE id = ?", (transfer_id(movement.kind, [movement]),)
        ).fetchone()
        if found != (debit, "chain:token", -movement.delta):
            missing.append(movement.signature)
    return Invariant("every sweep and loss is in the ledger", not missing, named(missing))


def _figures(ledger: Ledger) -> dict[str, int]:
    """What there is, in base units; SOL in lamports."""
    connection = ledger.connection

    def total(query: str, *values: str) -> int:
        return int(connection.execute(f"SELECT coalesce(sum({query}", values).fetchone()[0])

    figures = {}
    for kind in ("deposit", "sweep", "loss"):
        figures[f"{kind}_tokens"] = total("abs(delta)), 0) FROM movements WHERE kind = ? AND mint <> 'SOL'", kind)
        figures[f"{kind}_lamports"] = total("abs(delta)), 0) FROM movements WHERE kind = ? AND mint = 'SOL'", kind)
    for name, condition in (("tokens", "<>"), ("lamports", "=")):
        figures[f"waiting_{name}"] = total(
            f"m.delta), 0) FROM waiting AS w JOIN movements AS m ON m.id = w.movement WHERE m.mint {condition} 'SOL'"
        )
        figures[f"at_addresses_{name}"] = total(f"balance), 0) FROM chain_accounts WHERE mint {condition} 'SOL'")
    figures["credited_for_tokens"] = total("amount), 0) FROM transfers JOIN credits ON transfer = id"
                                           " WHERE debit = 'chain:token'")  # fmt: skip
    figures["credited_for_sol"] = total("amount), 0) FROM transfers JOIN credits ON transfer = id"
                                        " WHERE debit = 'chain:sol'")  # fmt: skip
    users = "credits_posted - debits_posted), 0) FROM accounts WHERE kind = 'user'"
    figures["owed_to_users"] = total(users)
    figures["held_of_users"] = total("debits_pending), 0) FROM accounts WHERE kind = 'user'")
    figures["revenue"] = total("credits_posted - debits_posted), 0) FROM accounts WHERE kind = 'revenue'")
    figures["adjustments"] = total("credits_posted - debits_posted), 0) FROM accounts WHERE kind = 'adjustments'")
    return figures


def _sums(ledger: Ledger, figures: dict[str, int]) -> Invariant:
    """What came in is where it went: to users' credit and to the treasury."""

    def given(account: str) -> int:
        sums = ledger.accounts().get(account)
        return 0 if sums is None else sums.debits_posted - sums.credits_posted

    at_addresses = figures["deposit_tokens"] - figures["sweep_tokens"] - figures["loss_tokens"]
    sides = {
        "at the addresses": (figures["at_addresses_tokens"], at_addresses),
        "in chain:token": (given("chain:token"), at_addresses - figures["waiting_tokens"]),
        "in chain:treasury": (given(TREASURY), figures["sweep_tokens"]),
        "credited": (figures["credited_for_tokens"], figures["deposit_tokens"] - figures["waiting_tokens"]),
        "in chain:sol": (given("chain:sol"), figures["credited_for_sol"]),
    }
    unlike = [f"{name}: {found}, expected {expected}" for name, (found, expected) in sides.items() if found != expected]
    return Invariant(
        "at addresses + swept + lost = credited + waiting",
        not unlike,
        "; ".join(unlike) or f"{figures['deposit_tokens']} base units",
    )


def _alarms(connection: Connection) -> Invariant:
    alarms = [f"{kind} ({subject}): {detail}" for kind, subject, detail in connection.execute(
        "SELECT kind, subject, detail FROM alarms WHERE cleared_at IS NULL ORDER BY id"
    )]  # fmt: skip
    return Invariant("no alarm is raised", not alarms, "; ".join(alarms[:5]) or "0 alarms")


async def _balances(deposits: Deposits, chain: Chain) -> Invariant:
    """Compares what each account has on the chain with what is recorded up to the same slot."""
    rows = iter(deposits.connection.execute("SELECT account, address, mint FROM chain_accounts").fetchall())
    wrong, count = [], 0
    while some := list(islice(rows, MAX_ACCOUNTS)):  # one request, so that one slot holds for all of it
        found = await chain.accounts([Pubkey.from_string(account) for account, _, _ in some])
        for (account, address, mint), state in zip(some, found.values, strict=True):
            count += 1
            if mint == SOL:
                has = 0 if state is None else state.lamports
            else:
                held = None if state is None else deposits.token_state(address, state)
                has = 0 if held is None else held.amount
            recorded = deposits.balance_at(account, found.slot)
            if has != recorded:
                wrong.append(f"{account} has {has}, recorded are {recorded}")
    return Invariant("every balance on the chain is the recorded one", not wrong, f"{count} accounts, {named(wrong)}")


async def _evidence(deposits: Deposits, chain: Chain) -> Invariant:
    """Asks the chain for each transaction that was recorded, and takes its delta again."""
    wrong, count = [], 0
    for signature, movements in _by_signature(deposits.connection):
        try:
            transaction = await chain.transaction(Signature.from_string(signature))
        except ChainError as error:
            wrong.append(f"{signature} ({error})")
            continue
        for movement, address in movements:
            count += 1
            if transaction.error is not None or _delta(deposits, transaction, movement, address) != movement.delta:
                wrong.append(signature)
    return Invariant("the chain confirms every recorded movement", not wrong, f"{count} movements, {named(wrong)}")


def _by_signature(connection: Connection) -> Iterator[tuple[str, list[tuple[Movement, str]]]]:
    signatures = connection.execute("SELECT DISTINCT signature FROM movements").fetchall()
    for (signature,) in signatures:
        rows = connection.execute(
            "SELECT m.signature, m.account, m.mint, m.kind, m.delta, c.address FROM movements AS m"
            " JOIN chain_accounts AS c ON c.account = m.account WHERE m.signature = ?",
            (signature,),
        ).fetchall()
        yield signature, [(Movement(*row[:5]), row[5]) for row in rows]


def _delta(deposits: Deposits, transaction: Transaction, movement: Movement, address: str) -> int:
    key = Pubkey.from_string(movement.account)
    if movement.mint == SOL:
        return transaction.lamports_delta(key)
    owner = Pubkey.from_string(address)
    return transaction.token_delta(key, mint=deposits.mint, owner=owner, program=deposits.token_program)


async def _treasury(deposits: Deposits, chain: Chain) -> int:
    """What is in the treasury's token account. Its owner may take from it, so this is no invariant."""
    state = (await chain.accounts([Pubkey.from_string(deposits.treasury_tokens)])).values[0]
    account = None if state is None else tokens.parse_account(state.owner, state.data)
    return 0 if account is None else account.amount
