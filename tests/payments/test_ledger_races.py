"""Goal: whatever processes do at the same time, and wherever they are killed, money moves once or not at all.

Method: this file is also the program that the tests start. Its workers, processes each, open the ledger, say "ready",
and work when all are: each line that they write is what the ledger has acknowledged.
"""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from diffusionz.payments.database import open_database
from diffusionz.payments.ledger import Balance, Ledger, Result

NOW = 1_800_000_000
T, A, OURS = "chain:token", "user:a", "revenue:first_party"
WORKERS = 8


# --- The workers: each says what the ledger answered ---


def hold_calls(ledger: Ledger, worker: str) -> None:
    """Calls of its own, more than there is money for."""
    for i in range(25):
        say(ledger.hold(f"{worker}-{i}", A, OURS, 100, NOW + 60, "zimage"))


def hold_the_same_calls(ledger: Ledger, worker: str) -> None:
    for i in range(25):
        say(ledger.hold(f"same-{i}", A, OURS, 100, NOW + 60, "zimage"), i)


def resolve_the_same_holds(ledger: Ledger, worker: str) -> None:
    """Each in another order, and every second one by a void."""
    order = list(range(40))
    random.Random(worker).shuffle(order)
    for i in order:
        verb = ("post", "void")[(i + int(worker)) % 2]
        say(getattr(ledger, verb)(f"{worker}-{i}", f"hold-{i}"), verb, i)


def post_or_expire(ledger: Ledger, worker: str) -> None:
    """Half of them live a second later than the others."""
    if int(worker) % 2:
        for i in range(40):
            say(ledger.post(f"post-{i}", f"hold-{i}"), "post", i)
    else:
        ledger.clock = lambda: NOW + 60
        for _ in range(20):
            say(ledger.expire(batch=3), "expire")


def work_until_killed(ledger: Ledger, worker: str) -> None:
    for i in itertools.count():
        call = f"{os.getpid()}-{i}"
        for request, arguments in (
            ("hold", (f"{call}:hold", A, OURS, 3, NOW + 60, "zimage")),
            ("post", (f"{call}:post", f"{call}:hold", 2)),
            ("refund", (f"{call}:refund", f"{call}:post")),
        ):
            if getattr(ledger, request)(*arguments) is Result.created:
                say(arguments[0])


def say(answer: Result | int | str, *about: object) -> None:
    """One write: the lines of different workers do not mix."""
    answer = answer.name if isinstance(answer, Result) else answer
    os.write(1, (" ".join(map(str, (answer, *about))) + "\n").encode())


def work(program: str, path: str, worker: int) -> None:
    ledger = Ledger(open_database(path, busy_timeout_s=120.0), lambda: NOW)
    say("ready")
    sys.stdin.read()  # until the test closes it
    globals()[program](ledger, str(worker))


if __name__ == "__main__":
    program, path, workers = sys.argv[1:]
    children = []
    for worker in range(int(workers)):  # forked before anything is opened: what is imported is imported once
        children.append(os.fork())
        if not children[-1]:
            work(program, path, worker)
            sys.exit()
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


# --- The tests ---


def start(path: pathlib.Path, program: Callable[[Ledger, str], None], workers: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, __file__, program.__name__, path, str(workers)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for _ in range(workers):
        assert process.stdout.readline() == "ready\n"
    process.stdin.close()
    return process


def race(path: pathlib.Path, program: Callable[[Ledger, str], None]) -> list[list[str]]:
    """The words of every line that the workers wrote."""
    process = start(path, program, WORKERS)
    lines = [line.split() for line in process.stdout]
    assert process.wait() == 0
    return lines


def sound(ledger: Ledger) -> bool:
    return all(invariant.holds for invariant in ledger.check())


@pytest.mark.parametrize("k", [1, 10])
def test_B1_eight_processes_with_balance_for_k_calls_run_exactly_k(ledger, ledger_path, k):
    ledger.transfer("d", T, A, k * 100 + 99, "deposit")
    answers = collections.Counter(word for (word,) in race(ledger_path, hold_calls))
    assert answers == {"created": k, "exceeds_credits": WORKERS * 25 - k}
    assert ledger.balance(A) == Balance(posted=k * 100 + 99, held=k * 100) and sound(ledger)


def test_B2_eight_processes_resolve_each_hold_once(ledger, ledger_path):
    ledger.transfer("d", T, A, 4000, "deposit")
    for i in range(40):
        ledger.hold(f"hold-{i}", A, OURS, 100, NOW + 60, "zimage")
    lines = race(ledger_path, resolve_the_same_holds)
    winners = {int(i): verb for answer, verb, i in lines if answer == "created"}
    assert len(winners) == sum(answer == "created" for answer, _, _ in lines) == 40
    for answer, _, i in lines:
        assert (
            answer == "created"
            or answer == {"post": "hold_already_posted", "void": "hold_already_voided"}[winners[int(i)]]
        )
    posted = sum(verb == "post" for verb in winners.values())
    assert 0 < posted < 40
    assert ledger.balance(A) == Balance(posted=4000 - 100 * posted, held=0) and sound(ledger)


def test_B3_processes_that_post_race_with_some_that_expire(ledger, ledger_path):
    ledger.transfer("d", T, A, 4000, "deposit")
    for i in range(40):
        ledger.hold(f"hold-{i}", A, OURS, 100, NOW + 60, "zimage")
    lines = race(ledger_path, post_or_expire)
    expired = sum(int(answer) for answer, verb, *_ in lines if verb == "expire")
    posted = {int(i) for answer, verb, *rest in lines if verb == "post" and answer == "created" for i in rest}
    late = {int(i) for answer, verb, *rest in lines if answer == "hold_expired" for i in rest}
    assert expired + len(posted) == 40 and not posted & late
    assert ledger.balance(A) == Balance(posted=4000 - 100 * len(posted), held=0) and sound(ledger)


def test_B5_eight_processes_with_the_same_ids_are_one_request_each(ledger, ledger_path):
    ledger.transfer("d", T, A, 100_000, "deposit")
    lines = race(ledger_path, hold_the_same_calls)
    created = [i for answer, i in lines if answer == "created"]
    assert sorted(created, key=int) == [str(i) for i in range(25)]
    assert sum(answer == "exists" for answer, _ in lines) == 25 * (WORKERS - 1)
    assert ledger.balance(A).held == 2500 and sound(ledger)


def test_B10_kill_9_what_was_acknowledged_is_stored_and_nothing_else(ledger, ledger_path, clock):
    """Two workers at a time are killed at any moment. Each has at most one request that it has not heard about."""
    ledger.transfer("d", T, A, 10**9, "deposit")
    chance, known = random.Random(5), {"d"}
    for _ in range(6):
        process = start(ledger_path, work_until_killed, workers=2)
        heard = {process.stdout.readline().strip() for _ in range(5)}  # however long the disk takes
        time.sleep(chance.uniform(0.0, 0.4))
        os.killpg(process.pid, signal.SIGKILL)
        heard |= {line.strip() for line in process.stdout}
        assert process.wait() == -signal.SIGKILL
        stored = {transfer.id for transfer in ledger.journal()} - known
        assert stored >= heard and len(stored - heard) <= 2
        known |= stored
        assert sound(ledger)
    assert len(known) > 20
    clock.now = NOW + 60
    ledger.expire()
    assert ledger.balance(A).held == 0 and sound(ledger)
