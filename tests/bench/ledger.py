"""The ledger's claims: how many calls a second it holds and posts, how long one waits, and that growth costs nothing.

    python -m tests.bench.ledger all            every claim
    python -m tests.bench.ledger pairs growth
        --record                                appends rows to results/<machine>.csv
        --quick                                 tiny, to see that everything runs

pairs   a hold and its post, one after the other, committed to the disk (synchronous = FULL)
growth  the same in a ledger that already holds up to 10 million transfers (2 GB), beside one of 200 thousand; and
        the newest page of a user's history

A pair is two commits, so the disk decides; use an idle machine, and --scratch on the disk that the ledger is to live
on. Before anything is timed the invariants are checked, and after it the balances are those of the work done.
--threads and --model mean nothing here. The peer of `pairs` is the goal itself: 1/900 s a pair, and 10 ms for the
slowest of a hundred.
"""

from __future__ import annotations

import os
import pathlib
import time

from diffusionz.payments.database import immediate, open_database
from diffusionz.payments.ledger import Balance, Ledger, Result
from tests.bench.harness import Bench, run_claims
from tests.bench.record import Comparison, percentile

PAIRS_A_SECOND = 900
P99_S = 0.010
FLAT = 1.25  # of a pair's time in a full ledger to that in an empty one
# Transfers. In the smallest ledger every user's page of history is full already.
BASE, SIZES = 200_000, (1_000_000, 3_000_000, 10_000_000)
QUICK_BASE, QUICK_SIZES = 1_000, (2_000, 5_000)
USERS = 1000
NOW = 1_800_000_000
CREDIT = 10**12


def new_ledger(path: pathlib.Path, transfers: int) -> Ledger:
    """A ledger with this many transfers, valid ones: of each user a deposit, then holds and their posts in turn. They
    are written in bulk, as rows that the ledger would have written."""
    ledger = Ledger(open_database(path), lambda: NOW)
    connection = ledger.connection
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -2000000")  # KiB: the index of ids is filled in no order
    with immediate(connection):
        for user in range(USERS):
            ledger.open_account(f"user:{user}", "user")
            assert (
                ledger.transfer(f"deposit:{user}", "chain:token", f"user:{user}", CREDIT, "deposit") is Result.created
            )
    calls = transfers // 2
    for begin in range(0, calls, 50_000):
        end = min(begin + 50_000, calls)
        with immediate(connection):
            connection.executemany(
                "INSERT INTO transfers VALUES (?, ?, ?, ?, 'revenue:first_party', ?, ?, ?, 'zimage', '1 image', ?)",
                (row for call in range(begin, end) for row in hold_and_post(call)),
            )
    with immediate(connection):
        each = [calls // USERS + (user < calls % USERS) for user in range(USERS)]
        connection.executemany(
            "UPDATE accounts SET debits_posted = ? WHERE name = ?",
            [(90 * count, f"user:{user}") for user, count in enumerate(each)],
        )
        connection.execute("UPDATE accounts SET credits_posted = ? WHERE name = 'revenue:first_party'", (90 * calls,))
    connection.close()  # and what it had set for itself
    os.sync()
    return Ledger(open_database(path), lambda: NOW)


def hold_and_post(call: int) -> list[tuple[object, ...]]:
    seq, user = USERS + 1 + 2 * call, f"user:{call % USERS}"
    name = identifier(call)
    return [
        (seq, f"{name}:hold", "hold", user, 100, None, NOW + 60, NOW),
        (seq + 1, f"{name}:post", "post", user, 90, seq, None, NOW),
    ]


def identifier(call: int) -> str:
    """Of the length of a real one, and like one in no order."""
    return f"call:{call * 0x9E3779B97F4A7C15 % 2**64:016x}"


def sound(ledger: Ledger) -> None:
    if broken := [invariant for invariant in ledger.check() if not invariant.holds]:
        raise SystemExit(f"parity: {broken[0].name}: {broken[0].detail}: not timed")


def pairs(ledger: Ledger, count: int, first: int) -> list[float]:
    """Seconds of each hold and post of `count` calls of users in turn."""
    times = []
    for call in range(first, first + count):
        name, user = identifier(call), f"user:{call % USERS}"
        begin = time.perf_counter()
        held = ledger.hold(f"{name}:hold", user, "revenue:first_party", 100, NOW + 60, "zimage", "1 image")
        posted = ledger.post(f"{name}:post", f"{name}:hold", 90, "1 image")
        times.append(time.perf_counter() - begin)
        if not held is posted is Result.created:
            raise SystemExit(f"parity: call {call} was answered {held.name} and {posted.name}: not timed")
    return times


def pages(ledger: Ledger, count: int) -> list[float]:
    """Seconds of the newest 100 lines of a user's history."""
    times = []
    for user in range(count):
        begin = time.perf_counter()
        lines = ledger.history(f"user:{user % USERS}", limit=100)
        times.append(time.perf_counter() - begin)
        assert lines
    return times


def time_pairs(bench: Bench) -> None:
    count = 50 if bench.args.quick else bench.args.repeats or 5000
    ledger = new_ledger(bench.scratch / "pairs.db", 0)
    sound(ledger)
    pairs(ledger, count // 10, 0)  # not timed: the file's first growth
    times = pairs(ledger, count, count // 10)
    sound(ledger)
    spent = ledger.balance("revenue:first_party")
    if spent != Balance(posted=90 * (count + count // 10), held=0):
        raise SystemExit(f"parity: {spent} was spent: not timed")
    print(f"parity: {count} calls are paid, every invariant holds")
    print(f"{count / sum(times):.0f} pairs a second; p99 {percentile(times, 0.99) * 1e3:.2f} ms")
    ledger.connection.close()
    mean = sum(times) / count
    late = percentile(times, 0.99)
    size = f"{count} pairs of a hold and its post, synchronous FULL"
    goal = "the goal"
    bench.report(Comparison("ledger-pair-mean", size, [mean], [1 / PAIRS_A_SECOND], goal=1.0, peer_name=goal))
    bench.report(Comparison("ledger-pair-p99", size, [late], [P99_S], goal=1.0, peer_name=goal))


def time_growth(bench: Bench) -> None:
    """Each size beside the smallest, in blocks by turns: what the machine does meanwhile meets both."""
    count = 20 if bench.args.quick else bench.args.repeats or 2000
    block = max(count // 20, 1)
    base, sizes = (QUICK_BASE, QUICK_SIZES) if bench.args.quick else (BASE, SIZES)
    small = new_ledger(bench.scratch / "small.db", base)
    sound(small)
    for number, size in enumerate(sizes):
        path = bench.scratch / f"{size}.db"
        large = new_ledger(path, size)
        sound(large)
        print(f"parity: {size} transfers, {path.stat().st_size / 1e9:.2f} GB, every invariant holds", flush=True)
        times: dict[Ledger, list[float]] = {large: [], small: []}
        for at in range(0, count + block, block):
            for ledger, first in ((large, size), (small, base + 2 * number * count)):
                taken = pairs(ledger, block, first + at)
                if at:  # the first block warms the caches
                    times[ledger] += taken
        ours, peer = times[large], times[small]
        work, name = f"{size} transfers", f"{base} transfers"
        late = ([percentile(ours, 0.99)], [percentile(peer, 0.99)])
        read = (pages(large, count), pages(small, count))
        bench.report(Comparison("ledger-growth-pair", work, ours, peer, goal=FLAT, peer_name=name))
        bench.report(Comparison("ledger-growth-pair-p99", work, *late, goal=2 * FLAT, peer_name=name))
        bench.report(Comparison("ledger-growth-history", work, *read, goal=FLAT, peer_name=name))
        large.connection.close()
        path.unlink()
    small.connection.close()


CLAIMS = {"pairs": time_pairs, "growth": time_growth}


def main(argv: list[str] | None = None) -> list[Comparison]:
    return run_claims(CLAIMS, __doc__, "tests.bench.ledger", argv)


if __name__ == "__main__":
    main()
