"""The demo: what it prints is what happened, and can be repeated."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

from diffusionz.payments.audit import audit_records
from diffusionz.payments.database import open_database
from diffusionz.payments.ledger import Ledger

DEMO = pathlib.Path(__file__).parents[2] / "examples" / "payments" / "demo.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIFFUSIONZ_PAYMENTS_")}
    return subprocess.run([sys.executable, str(DEMO), *arguments], capture_output=True, text=True, env=environment)


def test_the_demo(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "demo"
    done = run(str(folder))
    assert done.returncode == 0 and done.stderr == ""
    shown = done.stdout
    order = [
        "signed in", "alice sends", "landed: 2 deposits", "her balance is 0.00", "her balance is 550.00 tokens",
        "call 1: 0.50 USD are 25.00 tokens, held", "it is posted", "call 2", "it is refunded", "call 3", "it failed",
        "it is voided", "swept: the treasury has 250.00 tokens", "audit:", "the history of",
    ]  # fmt: skip
    places = [shown.index(text) for text in order]
    assert places == sorted(places)
    assert "FAIL" not in shown and shown.count("\n  ok  ") > 25

    # The table is the journal's, read here by other means.
    (account,) = re.findall(r"the history of (user:\w+):", shown)
    rows = [line.split() for line in shown.rstrip().splitlines()[-9:]]
    assert [row[1:3] for row in rows] == [
        ["transfer", "deposit"], ["transfer", "deposit"], ["hold", "chronos2"], ["post", "chronos2"],
        ["hold", "chronos2"], ["post", "chronos2"], ["refund", "chronos2"], ["hold", "chronos2"], ["void", "chronos2"],
    ]  # fmt: skip
    connection = open_database(folder / "payments.db")
    ledger = Ledger(connection)
    assert ledger.balance(account).posted == ledger.balance(account).available == 525_000_000
    assert "525.00" in rows[-1]
    assert ledger.balance("revenue:first_party").posted == 25_000_000
    assert audit_records(ledger).clean
    connection.close()

    again = run(str(folder))  # it keeps to itself what a folder has
    assert (again.returncode, again.stderr) == (1, f"{folder}: File exists\n")


def test_the_demo_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, str(DEMO)], check=True, stdout=subprocess.DEVNULL, env=environment)
    assert list(tmp_path.iterdir()) == []
