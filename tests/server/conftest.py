"""Servers to test against: real processes on free loopback ports, which stop with the tests."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import json
import pathlib
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

PATIENCE_S = 120.0  # for what takes a moment: two cores that others use too may take many times as long


def until(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """What the condition says, once it is true."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value


def ended(client: httpx2.Client, id: str) -> dict[str, Any]:
    """The job, once it is over."""

    def job() -> dict[str, Any] | None:
        found: dict[str, Any] = client.get(f"/api/jobs/{id}").json()
        return None if found["status"] in ("queued", "running") else found

    return dict(until(job))


@dataclasses.dataclass
class Running:
    """A server's process. `log` is the file of its log."""

    url: str
    process: subprocess.Popen[bytes]
    log: pathlib.Path

    def lines(self) -> list[dict[str, Any]]:
        """Its log so far, but for a line that is half written."""
        whole = self.log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def stop(self, patience_s: float = PATIENCE_S) -> int:
        """Asks it to stop; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience_s)

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    @contextlib.contextmanager
    def left(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Iterator[None]:
        """A client that asks, and is gone at the end of the block: without an answer, if there was none until then."""
        address = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE_S)
        try:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"} | (headers or {}))
            yield
        finally:
            connection.close()


@contextlib.contextmanager
def running(folder: pathlib.Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Running]:
    """`diffusionz serve` with these arguments, until the block ends. folder: for its log."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "diffusionz", "serve", "--port", "0", "--log", "json", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stderr=out, stdout=out, env=env, cwd=folder)
    server = Running("", process, log)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not server.url:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            server.url = next((line["url"] for line in server.lines() if line["message"] == "listening"), "")
            time.sleep(0.02)
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(server.url + "/readyz", timeout=PATIENCE_S).status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


Start = Callable[..., contextlib.AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """start(*arguments): `diffusionz serve` with them, as a context manager."""
    folder = tmp_path_factory.mktemp("servers")
    return lambda *arguments, **options: running(folder, *arguments, **options)


@pytest.fixture(scope="session")
def free_server(start: Start) -> Iterator[Running]:
    """A server whose calls are free, with both demo models. Its state is every test's: start another to change it."""
    with start("--free") as server:
        yield server


@pytest.fixture
def free(free_server: Running) -> Iterator[httpx2.Client]:
    """A client of `free_server`."""
    with free_server.client() as client:
        yield client


@pytest.fixture(scope="session")
def dev_server(start: Start) -> Iterator[Running]:
    """A server with a ledger on a dev chain, and a faucet."""
    with start("--dev") as server:
        yield server


class Customer:
    """Somebody with a wallet of his own, signed in to a dev server; `client` has his key, `browser` his cookie."""

    def __init__(self, server: Running) -> None:
        from solders.keypair import Keypair

        self.server = server
        self.wallet = Keypair()
        self.address = str(self.wallet.pubkey())
        self.browser = server.client()
        given = self.browser.post("/api/sign-in/challenge", json={"address": self.address}).raise_for_status().json()
        signature = base64.b64encode(bytes(self.wallet.sign_message(given["text"].encode()))).decode()
        signed = self.browser.post(
            "/api/sign-in", json={"address": self.address, "nonce": given["nonce"], "signature": signature}
        ).raise_for_status()
        self.account: str = signed.json()["account"]
        self.key: str = signed.json()["api_key"]
        self.client = server.client(headers={"authorization": f"Bearer {self.key}"})

    def balance(self) -> dict[str, Any]:
        return dict(self.client.get("/api/balance").raise_for_status().json())

    def deposit(self, tokens: float) -> None:
        """Has the faucet send tokens to the account's address, and waits until they are credited."""
        address = self.client.get("/api/deposit").raise_for_status().json()["address"]
        before = self.balance()["posted"]
        sent = self.client.post("/api/dev/faucet", json={"address": address, "tokens": tokens})
        assert sent.status_code == 200, sent.text
        until(lambda: self.balance()["posted"] != before)

    def close(self) -> None:
        self.client.close()
        self.browser.close()


@pytest.fixture
def customer(dev_server: Running) -> Iterator[Callable[..., Customer]]:
    """customer(tokens=0): a new one, with that much credit."""
    made: list[Customer] = []

    def make(tokens: float = 0) -> Customer:
        made.append(Customer(dev_server))
        if tokens:
            made[-1].deposit(tokens)
        return made[-1]

    yield make
    for one in made:
        one.close()
