"""Shops to test servers with: a ledger on the disk, which a server sells from (`--payments`) and a test looks into,
also while the server runs, is killed, or is started again. Their dev chain is a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2

from diffusionz.payments import database, settings, shop
from diffusionz.payments.keys import Keys
from diffusionz.payments.settings import Settings
from tests.server.conftest import PATIENCE_S, Running, until

ZIMAGE, CHRONOS2 = 50_000_000, 25_000_000  # base units of a picture and a forecast at the dev chain's fixed rate


@contextlib.contextmanager
def devnet(folder: pathlib.Path) -> Iterator[str]:
    """The URL of a dev chain, which ends with the block."""
    out = folder / "devnet.json"
    command = [sys.executable, "-m", "diffusionz", "wallet", "devnet", "--port", "0", "--json"]
    with out.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(ValueError):
                yield json.loads(out.read_text())["url"]
                return
            assert process.poll() is None and time.monotonic() < deadline, out.read_text()
            time.sleep(0.02)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@dataclasses.dataclass(frozen=True)
class Buyer:
    """An account with a key."""

    account: str
    key: str
    headers: dict[str, str]

    def client(self, server: Running, **options: Any) -> httpx2.Client:
        return server.client(headers=self.headers, **options)


class Shop:
    """A shop's folder, as `diffusionz wallet create` makes it."""

    def __init__(self, folder: pathlib.Path, url: str) -> None:
        asyncio.run(shop.create(folder, rpc_url=url, addresses=5))
        self.config = str(folder / "payments.toml")
        self.settings: Settings = settings.load(self.config, environ={})
        self.database = pathlib.Path(str(self.settings.database))
        self._numbers = itertools.count()

    def buyer(self, tokens: int = 0, *, services: list[str] | None = None, daily_limit: int | None = None) -> Buyer:
        """Somebody new with so many base units, as a correction of the books: a deposit takes seconds."""
        account = f"user:buyer-{next(self._numbers)}"
        with self._open() as connection:
            ledger = shop.assemble(self.settings, connection).ledger
            ledger.open_account(account, "user")
            if tokens:
                result = ledger.transfer(f"given:{account}", "adjustments", account, tokens, "adjustment")
                assert result.value == "created", result
            keys = Keys.from_settings(self.settings, connection)
            key = keys.create(account, services=services, daily_limit=daily_limit).secret
        return Buyer(account, key, {"authorization": f"Bearer {key}"})

    def balance(self, buyer: Buyer) -> tuple[int, int]:
        """(posted, held)"""
        with self._open() as connection:
            balance = shop.assemble(self.settings, connection).ledger.balance(buyer.account)
        return balance.posted, balance.held

    def lines(self, buyer: Buyer) -> Counter[str]:
        """How many movements of each kind its account has had, besides what it was given."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT kind FROM transfers WHERE ? IN (debit, credit) AND code <> 'adjustment'", (buyer.account,)
            )
            return Counter(kind for (kind,) in rows)

    def settled(self, buyer: Buyer, patience_s: float = PATIENCE_S) -> Counter[str]:
        """`lines`, once nothing is held any more."""
        until(lambda: not self.balance(buyer)[1], patience_s)
        return self.lines(buyer)

    def calls(self) -> int:
        """How many holds there ever were."""
        with self._open() as connection:
            return int(connection.execute("SELECT count(*) FROM calls").fetchone()[0])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes to the ledger for the time of the block."""
        with self._open() as connection:
            connection.execute("BEGIN EXCLUSIVE")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")

    def audit(self, *arguments: str) -> None:
        """`diffusionz wallet audit` finds nothing."""
        command = [sys.executable, "-m", "diffusionz", "wallet", "audit", "--config", self.config, "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout), done.stdout

    @contextlib.contextmanager
    def _open(self) -> Iterator[database.Connection]:
        with contextlib.closing(database.open_database(self.database)) as connection:
            yield connection

    @contextlib.contextmanager
    def serving(self, start: Any, *arguments: str, **options: Any) -> Iterator[Running]:
        """A server that sells from it, once it says that it is ready."""
        with start("--payments", self.config, *arguments, **options) as server:
            prices = httpx2.get(server.url + "/api/pricing", timeout=PATIENCE_S).json()["services"]
            assert all(service["tokens"] for service in prices), server.log.read_text()
            yield server


def no_traceback(server: Running) -> None:
    """Nothing went wrong that nobody expected."""
    text = server.log.read_text()
    assert "Traceback" not in text and '"traceback"' not in text, text[-4000:]
