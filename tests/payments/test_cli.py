"""`diffusionz wallet`, as it is typed: a whole life on a dev chain, and every mistake in one line."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from diffusionz import cli
from diffusionz.payments.database import open_database
from diffusionz.payments.errors import IdentityError
from diffusionz.payments.keys import Keys
from diffusionz.payments.ledger import Ledger
from diffusionz.payments.rates import Observation
from diffusionz.payments.settings import load
from diffusionz.payments.shop import Shop, opened

PROGRAM = [sys.executable, "-m", "diffusionz", "wallet"]
COMMANDS = [
    "create", "devnet", "faucet", "deposit", "sweep", "audit", "alarms", "rates", "key", "backup", "restore",
]  # fmt: skip
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("DIFFUSIONZ_PAYMENTS_")}
NOWHERE = "http://127.0.0.1:9"  # the port that discards

Wallet = Callable[..., str]


@pytest.fixture(scope="module")
def chain() -> Iterator[str]:
    """A dev chain in its own process, and its URL; final after a second. A blockhash lives for five: for that long the
    machine may be busy between its reading and the sending of a sweep."""
    command = [*PROGRAM, "devnet", "--port", "0", "--slot-ms", "33", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "}\n")
        about = json.loads("".join(lines) + "}")
        assert set(about) == {"url", "genesis_hash", "seed"}
        yield about["url"]
        process.send_signal(2)
        assert process.wait(120) == 0  # Ctrl-C is how it is meant to end


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - ENVIRONMENT.keys():
        monkeypatch.delenv(name)


@pytest.fixture
def shop(chain: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, wallet: Wallet) -> pathlib.Path:
    """A new wallet's folder, where the commands run."""
    wallet("create", str(tmp_path / "shop"), "--rpc-url", chain, "--addresses", "5")
    monkeypatch.chdir(tmp_path / "shop")
    return tmp_path / "shop"


@pytest.fixture
def wallet(capfd: pytest.CaptureFixture[str]) -> Wallet:
    """wallet(*arguments, status=0): what the command prints: to stdout if it succeeds, else its line on stderr."""

    def run(*arguments: str, status: int = 0) -> str:
        try:
            found = cli.main(["wallet", *arguments])
        except SystemExit as left:
            found = left.code if isinstance(left.code, int) else 1
        out, err = capfd.readouterr()
        assert found == status, (arguments, found, out, err)
        if status == 0:
            assert err == ""
            return out
        assert err.startswith("diffusionz") and err.count("\n") == 1, err
        return out + err

    return run


def shop_of(config: str) -> contextlib.AbstractContextManager[Shop]:
    return opened(load(config, environ={}))


def test_a_whole_life(shop: pathlib.Path, wallet: Wallet) -> None:
    address = wallet("deposit", "alice", "--new").strip()
    assert wallet("deposit", "user:alice") == f"{address}\n"  # nothing was deposited: it is given again
    assert address in wallet("faucet", address, "--tokens", "250.5", "--sol", "0.5")
    about = json.loads(wallet("deposit", "alice", "--wait", "120", "--json"))
    assert about["address"] == address and about["account"] == "user:alice"
    credited = about["credited"]
    while credited < 250_500_000 + 7_500_000_000:  # the two may have become final one after the other
        credited += json.loads(wallet("deposit", "alice", "--wait", "120", "--json"))["credited"]
    assert wallet("deposit", "alice") != f"{address}\n"  # it was used: the next one is another

    swept = json.loads(wallet("sweep", "--json"))
    assert swept == {"tokens": 250_500_000, "lamports": 500_000_000, "sweeps": {"landed": 2}}
    assert wallet("sweep") == "swept 0.000000 tokens and 0.000000000 SOL\n"

    audit = wallet("audit", "--thorough")
    assert audit.endswith("\nall is well\n") and "FAIL" not in audit and "treasury on chain" in audit
    report = json.loads(wallet("audit", "--offline", "--json"))
    assert report["clean"] and report["figures"]["owed_to_users"] == 7_750_500_000

    assert "checked" in wallet("backup", "copy.db")
    later = wallet("deposit", "bob", "--new").strip()
    wallet("faucet", later, "--tokens", "7")
    wallet("deposit", "bob", "--wait", "120")
    restored = json.loads(wallet("restore", "copy.db", "--addresses", "3", "--json"))
    assert (restored["found"], restored["retired"], restored["free"]) == (1, 3, 3)
    assert "all is well" in wallet("audit")
    report = json.loads(wallet("audit", "--json"))["figures"]
    assert (report["owed_to_users"], report["adjustments"]) == (7_750_500_000, 7_000_000)  # bob is not known any more
    assert wallet("deposit", "bob", "--new").strip() != later


def test_create_makes_private_files_that_fit_together(shop: pathlib.Path, chain: str) -> None:
    assert {path.name for path in shop.iterdir()} == {
        "payments.toml",
        "payments.db",
        "master.seed",
        "gas.json",
        "pepper",
    }
    assert all(path.stat().st_mode & 0o077 == 0 for path in (shop, *shop.iterdir()))


def test_B15_no_command_shows_or_stores_a_secret(shop: pathlib.Path, wallet: Wallet) -> None:
    secrets = [(shop / "master.seed").read_text().split()[2], (shop / "gas.json").read_text().strip(),
               (shop / "pepper").read_text().strip()]  # fmt: skip
    secrets.append(", ".join(secrets[1].strip("[]").split(",")[:8]))
    shown = wallet("deposit", "alice", "--new")
    shown += wallet("faucet", shown.strip(), "--tokens", "1")
    shown += wallet("deposit", "alice", "--wait", "120") + wallet("sweep") + wallet("audit", "--json")
    shown += wallet("backup", "copy.db") + wallet("restore", "copy.db")
    (shop / "gas.json").write_text((shop / "gas.json").read_text().replace("[", "{"))
    shown += wallet("sweep", status=2)
    (shop / "master.seed").write_text((shop / "master.seed").read_text()[:-2])
    shown += wallet("sweep", status=1)
    assert not [secret for secret in secrets if secret in shown]
    for path in (shop / "payments.db", shop / "copy.db", shop / "payments.toml"):
        content = path.read_bytes()
        for secret in secrets:
            assert secret.encode() not in content
        for raw in (secrets[0], secrets[2]):
            assert bytes.fromhex(raw) not in content


def test_B15_with_another_seed_nothing_is_signed(shop: pathlib.Path, wallet: Wallet) -> None:
    address = wallet("deposit", "alice", "--new").strip()
    wallet("faucet", address, "--tokens", "1")
    wallet("deposit", "alice", "--wait", "120")
    (shop / "master.seed").write_text(f"diffusionz-seed 1 {'00' * 32}\n")
    assert "derives another key" in wallet("sweep", status=1).splitlines()[-1]
    connection = open_database(shop / "payments.db")
    assert connection.execute("SELECT count(*) FROM sweeps").fetchone() == (0,)
    connection.close()


def test_B15_the_treasury_cannot_be_one_of_our_own_addresses(shop: pathlib.Path, wallet: Wallet) -> None:
    address = wallet("deposit", "alice", "--new").strip()
    settings = shop / "payments.toml"
    lines = [
        f'treasury = "{address}"' if line.startswith("treasury") else line for line in settings.read_text().splitlines()
    ]
    settings.write_text("\n".join(lines))
    assert "which is a deposit address" in wallet("sweep", status=2)


def test_an_audit_that_finds_something_says_so_and_fails(shop: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    connection = open_database("payments.db")
    ledger = Ledger(connection)
    ledger.open_account("user:eve", "user")
    ledger.transfer("x", "chain:token", "user:eve", 5, "deposit")
    connection.close()
    for arguments in (["--json"], ["--offline"], []):
        assert cli.main(["wallet", "audit", *arguments]) == 1
        shown = capfd.readouterr()
        assert "nothing is credited without a deposit" in shown.out and shown.err == ""
    assert "FAIL  deposits: nothing is credited without a deposit; 1 exceptions\n" in shown.out
    assert shown.out.endswith("2 of the invariants do not hold\n")


def test_the_pool_is_refilled(shop: pathlib.Path, wallet: Wallet) -> None:
    for name in "abcde":
        wallet("deposit", name, "--new")
    assert "the pool of deposit addresses is empty" in wallet("deposit", "f", "--new", status=1)
    assert json.loads(wallet("deposit", "--refill", "4", "--json")) == {"added": 4, "free": 4}
    wallet("deposit", "f", "--new")


def test_keys_are_made_listed_and_revoked(shop: pathlib.Path, wallet: Wallet) -> None:
    wallet("deposit", "alice", "--new")
    assert wallet("key", "alice", "--list") == "none\n"
    secret = wallet("key", "alice").strip()
    assert secret.startswith("cutedsl_")
    options = ["--name", "tests", "--services", "zimage, chronos2", "--daily-limit", "2.5", "--json"]
    made = json.loads(wallet("key", "user:alice", *options))
    assert (made["name"], made["services"], made["daily_limit"]) == ("tests", ["chronos2", "zimage"], 2_500_000)
    listed = wallet("key", "alice", "--list")
    assert f"cutedsl_{made['id']}…  tests; chronos2, zimage; 2.500000 a day; never used" in listed
    assert secret not in listed and made["secret"] not in listed
    assert made["secret"] not in wallet("key", "alice", "--list", "--json")
    assert made["id"] in wallet("key", "alice", "--revoke", f"cutedsl_{made['id']}…")
    assert "; revoked 20" in wallet("key", "alice", "--list")
    connection = open_database("payments.db")
    keys = Keys.from_settings(load("payments.toml", environ={}), connection)
    assert keys.authenticate(secret).account == "user:alice"
    with pytest.raises(IdentityError):
        keys.authenticate(made["secret"])
    connection.close()


def test_alarms_are_listed_and_cleared(shop: pathlib.Path, wallet: Wallet) -> None:
    assert wallet("alarms") == "none\n"
    with shop_of("payments.toml") as parts:
        parts.deposits.alarm("stray tokens", "Abc", "5 base units")
    assert wallet("alarms") == "stray tokens: Abc: 5 base units\n"
    assert json.loads(wallet("alarms", "--json"))["alarms"] == [
        {"kind": "stray tokens", "subject": "Abc", "detail": "5 base units"}
    ]
    assert "there is no alarm 'stray tokens' about 'Abd'" in wallet(
        "alarms", "--clear", "stray tokens", "Abd", status=1
    )
    assert wallet("alarms", "--clear", "stray tokens", "Abc") == "cleared: stray tokens: Abc\n"
    assert wallet("alarms") == "none\n"


def test_rates_are_shown_and_approved(shop: pathlib.Path, wallet: Wallet) -> None:
    shown = wallet("rates")
    assert "token, market         none: token: there is no rate yet" in shown and "nothing is in quarantine" in shown
    with shop_of("payments.toml") as parts:
        now = int(time.time())
        for usd, at in ((10**10, now - 1), (5 * 10**10, now)):
            parts.rates.record("token", {"fixed": Observation(usd, at)}, at)
    about = json.loads(wallet("rates", "--json"))
    assert about["market"]["usd"] == "0.01" and about["ath"]["usd"] == "0.02" and about["sol"]["usd"] is None
    (waiting,) = about["quarantine"]
    assert (waiting["usd"], waiting["reference"]) == ("0.05", "0.01")
    assert f"{waiting['id']}              0.05 USD for a token" in wallet("rates")
    assert "is not in quarantine" in wallet("rates", "--approve", "sample:99", status=1)
    assert "was approved by ann" in wallet("rates", "--approve", waiting["id"], "--operator", "ann")
    assert json.loads(wallet("rates", "--json"))["market"]["usd"] == "0.05"
    assert "waits for nothing" in wallet("rates", "--approve", waiting["id"], status=1)


def test_nothing_deposited_is_a_failure_after_the_wait(shop: pathlib.Path, wallet: Wallet) -> None:
    wallet("deposit", "alice", "--new")
    assert "nothing was credited within 1 s" in wallet("deposit", "alice", "--wait", "1", status=1)


def test_another_chain_is_refused(shop: pathlib.Path, wallet: Wallet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the dev chain was stopped and started again."""
    wallet("deposit", "alice", "--new")
    settings = shop / "payments.toml"
    old = next(line for line in settings.read_text().splitlines() if line.startswith("genesis_hash"))
    settings.write_text(settings.read_text().replace(old, f'genesis_hash = "{"1" * 32}"'))
    assert "this database was made for" in wallet("audit", status=2)


MISTAKES = [
    ([], 2, "the following arguments are required: COMMAND"),
    (["pay"], 2, "invalid choice: 'pay'"),
    (["audit", "extra"], 2, "unrecognized arguments: extra"),
    (["deposit"], 2, "give an ACCOUNT, or --refill N"),
    (["deposit", "alice", "--refill", "5"], 2, "give an ACCOUNT, or --refill N"),
    (["deposit", "alice"], 1, "there is no account 'user:alice'"),
    (["deposit", "al ice", "--new"], 2, "account 'user:al ice': it must be 1 to 64 of"),
    (["deposit", "alice", "--wait", "0"], 2, "'0' is not a whole number from 1"),
    (["deposit", "alice", "--wait", "1e3"], 2, "'1e3' is not a whole number from 1"),
    (["faucet", "xyz", "--sol", "1"], 2, "'xyz' is not an address; it must be 32 bytes in base58"),
    (["faucet", "1" * 32], 2, "nothing to send: give --tokens, --sol or both"),
    (["faucet", "ADDRESS", "--sol", "0"], 2, "'0' is not a number above 0"),
    (["faucet", "ADDRESS", "--sol", "-1"], 2, "'-1' is not a number above 0"),
    (["faucet", "ADDRESS", "--sol", "NaN"], 2, "'NaN' is not a number above 0"),
    (["faucet", "ADDRESS", "--sol", "inf"], 2, "'inf' is not a number above 0"),
    (["faucet", "ADDRESS", "--sol", "ten"], 2, "'ten' is not a number above 0"),
    (["faucet", "ADDRESS", "--sol", "0.0000000001"], 2, "--sol is 1E-10; it may have 9 decimals"),
    (["faucet", "ADDRESS", "--tokens", "0.0000001"], 2, "--tokens is 1E-7; it may have 6 decimals"),
    (["faucet", "ADDRESS", "--tokens", "9223372036854775808"], 2, "2^63-1 base units"),
    (["audit", "--config", "nowhere.toml"], 2, "nowhere.toml: No such file or directory"),
    (["audit", "--offline", "--thorough"], 2, "it does not go with --offline"),
    (["sweep", "--timeout", "-5"], 2, "'-5' is not a whole number from 1"),
    (["key"], 2, "the following arguments are required: ACCOUNT"),
    (["key", "alice"], 1, "there is no account 'user:alice'"),
    (["key", "alice", "--list"], 1, "there is no account 'user:alice'"),
    (["key", "alice", "--list", "--revoke", "x"], 2, "give --list or --revoke ID"),
    (["key", "alice", "--revoke", "x"], 1, "user:alice has no key 'x'"),
    (["key", "alice", "--services", ""], 2, "services are ['']"),
    (["key", "alice", "--daily-limit", "0"], 2, "'0' is not a number above 0"),
    (["key", "alice", "--daily-limit", "0.0000001"], 2, "--daily-limit is 1E-7; it may have 6 decimals"),
    (["alarms", "--clear", "gas is low"], 2, "expected 2 arguments"),
    (["rates", "--approve", "sample:x"], 1, "'sample:x' is not in quarantine"),
    (["backup", "payments.toml"], 1, "a file of that name exists"),
    (["backup", "nowhere/copy.db"], 1, "No such file or directory"),
    (["restore", "nowhere.db"], 1, "there is no such file"),
    (["restore", "payments.toml"], 1, "file is not a database"),
    (["devnet", "--port", "65536"], 2, "'65536' is not a whole number from 0 to 65535"),
    (["devnet", "--seed", "x"], 2, "'x' is not a whole number from 0"),
    (["create", "."], 1, "File exists"),
    (["create", "new", "--rpc-url", NOWHERE], 1, "127.0.0.1:9"),
    (["create", "new", "--rpc-url", "ftp://example.org"], 2, "the node's URL"),
    (["create", "new", "--rpc-url", "CHAIN", "--mint", "xyz"], 2, "'xyz' is not an address"),
    (["create", "new", "--rpc-url", "CHAIN", "--treasury", "xyz"], 2, "'xyz' is not an address"),
    (["create", "new", "--addresses", "0"], 2, "'0' is not a whole number from 1"),
]  # fmt: skip


def test_every_mistake_is_one_line(shop: pathlib.Path, chain: str, wallet: Wallet) -> None:
    address = "9xQeWvG816bUx9EPjHmaT23yvVM2ZWbrrpZb9PusVFin"
    for arguments, status, message in MISTAKES:
        arguments = [{"ADDRESS": address, "CHAIN": chain}.get(argument, argument) for argument in arguments]
        shown = wallet(*arguments, status=status)
        assert message in shown, (arguments, shown)
        assert not pathlib.Path("new").exists(), arguments


SETTINGS = [
    ("mint", None, 2, "mint is not set"),
    ("rpc_urls", None, 2, "rpc_urls is not set"),
    ("seed_file", None, 2, "seed_file is not set"),
    ("genesis_hash", None, 2, "genesis_hash is not set"),
    ("network", '"mainet"', 2, "it must be one of mainnet"),
    ("tresury", '"x"', 2, "is not a setting; did you mean treasury?"),
    ("database", '"elsewhere.db"', 2, "there is no elsewhere.db"),
    ("rpc_urls", f'["{NOWHERE}/secret-key"]', 1, "127.0.0.1:9"),
]


@pytest.mark.parametrize(("key", "value", "status", "message"), SETTINGS, ids=[entry[3] for entry in SETTINGS])
def test_settings_that_are_wrong(
    shop: pathlib.Path, wallet: Wallet, key: str, value: str | None, status: int, message: str
) -> None:
    path = shop / "payments.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key} =")]
    path.write_text("\n".join(lines + ([f"{key} = {value}"] if value else [])))
    shown = wallet("sweep", status=status)
    assert message in shown and "secret-key" not in shown


def test_the_faucet_is_for_dev_chains(shop: pathlib.Path, wallet: Wallet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIONZ_PAYMENTS_NETWORK", "mainnet")
    assert "there is a faucet on dev chains alone" in wallet("faucet", "1" * 32, "--sol", "1", status=2)


def test_a_second_url_is_asked_when_the_first_is_silent(
    shop: pathlib.Path, chain: str, wallet: Wallet, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DIFFUSIONZ_PAYMENTS_RPC_URLS", f"{NOWHERE},{chain}")
    assert "all is well" in wallet("audit")


def test_without_settings_one_is_told_how_to_make_them(
    tmp_path: pathlib.Path, wallet: Wallet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no payments.toml here: give --config FILE" in wallet("audit", status=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command: str, wallet: Wallet) -> None:
    shown = wallet(command, "--help")
    assert f"examples:\n  diffusionz wallet {command}" in shown
    assert all(len(line) <= 120 for line in shown.splitlines())
    assert f"    {command} " in wallet("--help")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)


def test_without_the_extra_one_is_told_how_to_install_it(tmp_path: pathlib.Path) -> None:
    for package in ("solders", "pysqlite3", "sqlite_utils"):
        done = python(
            f"import sys; sys.modules[{package!r}] = None\n"
            f"from diffusionz.cli import main; sys.exit(main(['wallet', 'create', {str(tmp_path / 'shop')!r}]))"
        )
        assert done.returncode == 1
        assert done.stderr == (
            f"diffusionz: the wallet needs more packages ({package} is missing): pip install 'diffusionz[payments]'\n"
        )
        assert not (tmp_path / "shop").exists()


def test_the_other_commands_load_nothing_of_it() -> None:
    loaded = (
        "print([name for name in sys.modules if 'payments' in name or name in ('solders', 'pysqlite3', 'asyncio')])"
    )
    done = python(f"import sys; from diffusionz.cli import main; main(['info', '--json']); {loaded}")
    assert done.stdout.splitlines()[-1] == "[]"
    for arguments in (["wallet", "--help"], ["wallet", "sweep", "--help"]):
        done = python(
            f"import sys; from diffusionz.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\n"
            "print([name for name in sys.modules if name in ('solders', 'solana', 'pysqlite3', 'uvicorn')])"
        )
        assert done.stdout.splitlines()[-1] == "[]"
