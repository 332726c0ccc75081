"""The settings: a file, the environment, every kind of mistake, and secrets that stay in their files."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import importlib.metadata
import os
import pathlib
import sys
import traceback
from typing import Any

import httpx2
import pytest
from solders.pubkey import Pubkey

import diffusionz.payments
from diffusionz.payments.database import Connection
from diffusionz.payments.errors import ConfigurationError
from diffusionz.payments.identity import Identity
from diffusionz.payments.keys import Keys
from diffusionz.payments.ledger import Ledger
from diffusionz.payments.notices import Notices
from diffusionz.payments.prices import SERVICES, PriceBook
from diffusionz.payments.rates import PICO, RateRules, Rates
from diffusionz.payments.settings import KEYS, SECRET_MAX, Settings, create_secret, load, read_secret

MINT = str(Pubkey(bytes([7] * 32)))
TREASURY = str(Pubkey(bytes([8] * 32)))

EVERYTHING = f"""
database = "/var/lib/diffusionz/payments.db"
network = "devnet"
genesis_hash = "{MINT}"
rpc_urls = ["https://rpc.example/?api-key=hunter2", "http://127.0.0.1:8899"]
mint = "{MINT}"
token_program = "token-2022"
token_decimals = 9
token_symbol = "CUTE"
treasury = "{TREASURY}"
seed_file = "/run/secrets/seed"
gas_key_file = "/run/secrets/gas"
pepper_file = "/run/secrets/pepper"
domain = "example.org"
sign_in_uri = "https://example.org/login"
sign_in_statement = "Hello."
rates_token_sources = ["jupiter", "file"]
rates_sol_sources = ["pyth", "jupiter"]
rates_fixed_token = "0.0012"
rates_fixed_sol = "150"
rates_token_file = "/run/token.json"
rates_sol_file = "/run/sol.json"
rates_first_high = "0.05"
rates_interval_s = 10
jupiter_url = "https://jupiter.example/price"
jupiter_key_file = "/run/secrets/jupiter"
pyth_url = "https://pyth.example"
pyth_sol_feed = "{"ab" * 32}"
rates_min_sources = 2
rates_agreement_percent = 5
rates_max_age_s = 60
rates_clock_skew_s = 0
rates_min_liquidity_usd = 0
rates_market_window_s = 120
rates_market_min_samples = 2
rates_jump_percent = 50
rates_high_window_s = 3600
rates_high_min_samples = 10
rates_high_growth_percent = 10
rates_high_max_age_s = 7200
smtp_host = "mail.example"
smtp_port = 25
smtp_security = "tls"
smtp_user = "me"
smtp_password_file = "/run/secrets/smtp"
mail_from = "noreply@example.org"

[prices]
ltx_video = false
[prices.zimage]
usd = "1.20"
[prices.upscale]
usd = "0.01"
first_party = true
"""


def write(tmp_path: pathlib.Path, text: str) -> pathlib.Path:
    path = tmp_path / "payments.toml"
    path.write_text(text)
    return path


def test_nothing_set_is_the_defaults() -> None:
    settings = load(environ={})
    assert settings == Settings()
    assert settings.prices == SERVICES
    assert settings.rates == RateRules()
    assert (settings.mint, settings.rpc_urls, settings.rates_token_sources) == (None, (), ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.treasury = TREASURY  # type: ignore[misc]


def test_everything_can_be_set_in_a_file(tmp_path: pathlib.Path) -> None:
    import tomllib

    assert set(tomllib.loads(EVERYTHING)) == set(KEYS)
    settings, defaults = load(write(tmp_path, EVERYTHING), environ={}), Settings()
    for field in dataclasses.fields(Settings):
        assert getattr(settings, field.name) != getattr(defaults, field.name), field.name
    for field in dataclasses.fields(RateRules):
        if field.name != "min_sources":
            assert getattr(settings.rates, field.name) != getattr(defaults.rates, field.name), field.name
    assert settings.rates_fixed_token == 12 * PICO // 10_000
    assert settings.rates_first_high == 5 * PICO // 100
    assert settings.prices["zimage"].micro_usd == 1_200_000
    assert settings.prices["upscale"].micro_usd == 10_000
    assert "ltx_video" not in settings.prices


def test_the_environment_says_the_same_and_wins(tmp_path: pathlib.Path) -> None:
    import tomllib

    said = tomllib.loads(EVERYTHING)
    environ = {}
    for key, value in said.items():
        if isinstance(value, list):
            value = ", ".join(value)
        if key == "prices":
            value = '{ltx_video = false, zimage = {usd = "1.20"}, upscale = {usd = "0.01", first_party = true}}'
        environ[f"DIFFUSIONZ_PAYMENTS_{key.upper()}"] = str(value)
    path = write(tmp_path, EVERYTHING)
    assert load(environ=environ) == load(path, environ={})
    other = write(tmp_path, 'network = "testnet"\ntoken_decimals = 2\nrates_max_age_s = 7\n')
    assert load(other, environ) == load(environ=environ)
    named = load(environ={"DIFFUSIONZ_PAYMENTS_CONFIG": str(other), "UNRELATED": "1"})
    assert (named.network, named.token_decimals, named.rates.max_age_s) == ("testnet", 2, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tresury = 'x'", r"tresury in .*payments.toml is not a setting; did you mean treasury\?"),
        ("zzz = 1", r"zzz in .* is not a setting; known are: database, domain"),
        ("rates = {}", r"rates in .* is not a setting"),
        ("network = 'main'", r"network in .* is 'main'; it must be one of mainnet, devnet, testnet, localnet"),
        ("network = 1", r"network in .* is 1; it must be one of"),
        ("database = ''", r"database in .* is ''; it must be a path"),
        ("token_decimals = 19", r"token_decimals in .* is 19; it must be a whole number from 0 to 18"),
        ("token_decimals = 6.0", r"token_decimals in .* is 6.0; it must be a whole number"),
        ("token_decimals = true", r"token_decimals in .* is True; it must be a whole number"),
        ("token_decimals = '6 '", r"token_decimals in .* is '6 '; it must be a whole number"),
        ("token_decimals = -1", r"token_decimals in .* is -1"),
        ("mint = 'abc'", r"mint in .* is 'abc'; it must be an address: 32 bytes in base58"),
        (f"treasury = '{TREASURY} '", r"treasury in .*; it must be an address"),
        ("treasury = 5", r"treasury in .* is 5; it must be an address"),
        ("rates_first_high = 0.05", r"rates_first_high in .* is 0.05; it must be USD as a string"),
        ("rates_first_high = '-1'", r"rates_first_high in .* is '-1'; it must be USD as a string"),
        ("rates_first_high = '99999999'", r"rates_first_high in .*; it must be USD .* up to 9000000"),
        ("rates_first_high = 'nan'", r"rates_first_high in .* is 'nan'"),
        (
            "rates_token_sources = ['pyth']",
            r"rates_token_sources in .* is \['pyth'\]; .* a list of jupiter, file, fixed",
        ),
        ("rates_sol_sources = ['pyth', 'pyth']", r"rates_sol_sources in .* must be a list of pyth, jupiter"),
        ("rates_sol_sources = 5", r"rates_sol_sources in .* is 5; it must be a list"),
        ("rates_sol_sources = [[]]", r"rates_sol_sources in .* must be a list"),
        ("rates_min_sources = 0", r"rates_min_sources is 0; it must be a whole number from 1"),
        ("rates_max_age_s = 'soon'", r"rates_max_age_s in .* is 'soon'; it must be a whole number"),
        ("prices = 5", r"prices in .* is 5; it must be a table of services"),
        ("[prices.zimage]\nusd = 1.2", r"prices in .*: prices.zimage.usd is 1.2; it must be USD as a string"),
        ("[prices.zimage]\ncost = '1'", r"prices.zimage.cost is not a setting; allowed are: first_party"),
        ("domain = 'https://example.org'", r"domain in .* is 'https://example.org'; it must be a host"),
        ('sign_in_statement = "a\\nb"', r"sign_in_statement in .*; it must be one line"),
        ("jupiter_url = 'ftp://x'", r"jupiter_url in .* is 'ftp://x'; it must be a URL"),
        ("pyth_sol_feed = 'sol'", r"pyth_sol_feed in .* is 'sol'; it must be a feed's id"),
        ("smtp_security = 'ssl'", r"smtp_security in .* is 'ssl'; it must be one of starttls, tls, none"),
        ("smtp_port = 0", r"smtp_port in .* is 0; it must be a whole number from 1 to 65535"),
        ("mail_from = 'me'", r"mail_from in .* is 'me'; it must be an e-mail address"),
        ("smtp_host = 'h'", r"smtp_host is set and mail_from is not; they go together"),
        ("smtp_user = 'u'", r"smtp_user is set and smtp_password_file is not"),
        ("smtp_user = 'u'\nsmtp_password_file = 'f'\nsmtp_security = 'none'", r"a password is not sent in the clear"),
        ("rates_token_sources = ['fixed']", r'rates_token_sources has "fixed" and rates_fixed_token is not set'),
        ("rates_sol_sources = ['file']", r'rates_sol_sources has "file" and rates_sol_file is not set'),
        ("rates_token_sources = ['jupiter']", r'rates_token_sources has "jupiter" and mint is not set'),
        (
            "rates_token_sources = ['fixed']\nrates_fixed_token = '1'",
            r"rates_min_sources is 2 and rates_token_sources has 1; add a source, or lower rates_min_sources",
        ),
        ("network = ", r"payments.toml: Invalid value"),
        ("network = 'mainnet'\nnetwork = 'devnet'", r"payments.toml: Cannot overwrite a value"),
    ],
)
def test_a_mistake_is_told_by_its_key(tmp_path: pathlib.Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(write(tmp_path, text), environ={})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TRESURY", "x", r"DIFFUSIONZ_PAYMENTS_TRESURY is not a setting; did you mean treasury\?"),
        ("NETWORK", "", "DIFFUSIONZ_PAYMENTS_NETWORK is ''; it must be one of mainnet"),
        ("TOKEN_DECIMALS", "1e1", "DIFFUSIONZ_PAYMENTS_TOKEN_DECIMALS is '1e1'; it must be a whole number"),
        ("TOKEN_DECIMALS", "²", "DIFFUSIONZ_PAYMENTS_TOKEN_DECIMALS is '²'"),
        ("PRICES", "zimage=1", "DIFFUSIONZ_PAYMENTS_PRICES is 'zimage=1'; it must be a table"),
        ("CONFIG", "/nowhere/x.toml", "/nowhere/x.toml: No such file"),
    ],
)
def test_a_mistake_in_the_environment_is_told_by_its_variable(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(environ={f"DIFFUSIONZ_PAYMENTS_{name}": value})


def test_a_file_that_is_no_text_is_told(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "payments.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"payments\.toml: "):
        load(path, environ={})


def test_what_is_needed_and_not_set_is_told() -> None:
    with pytest.raises(ConfigurationError, match=r"mint is not set; put it into .* or DIFFUSIONZ_PAYMENTS_MINT"):
        Settings().require("network", "mint")
    with pytest.raises(ConfigurationError, match="rpc_urls is not set"):
        Settings().require("rpc_urls")
    with pytest.raises(ConfigurationError, match="pepper_file is not set"):
        Settings().secret("pepper_file")


# Secrets.


def test_B15_a_secret_is_for_its_owner_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pepper"
    create_secret(path)
    assert path.stat().st_mode & 0o777 == 0o600
    first = read_secret(path, "pepper_file")
    assert len(first) == 64
    int(first, 16)
    with pytest.raises(ConfigurationError, match="pepper cannot be made: File exists"):
        create_secret(path)
    assert read_secret(path, "pepper_file") == first
    path.chmod(0o400)
    assert read_secret(path, "pepper_file") == first
    for mode in (0o640, 0o604, 0o644, 0o660, 0o610, 0o601, 0o777):
        path.chmod(mode)
        with pytest.raises(ConfigurationError) as caught:
            read_secret(path, "pepper_file")
        assert f"pepper_file: {path} has mode {mode:04o}, so others may use it; chmod 600" in str(caught.value)
        assert first.decode() not in "".join(traceback.format_exception(caught.value))


def test_B15_two_secrets_differ(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        create_secret(tmp_path / name)
    assert read_secret(tmp_path / "a", "x") != read_secret(tmp_path / "b", "x")


def test_what_is_no_secrets_file_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_secret(tmp_path / "none", "pepper_file")
    with pytest.raises(ConfigurationError, match="is not a file"):
        read_secret(tmp_path, "pepper_file")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigurationError, match="is not a file"):  # and does not wait for a writer
        read_secret(tmp_path / "pipe", "pepper_file")
    for content, message in (
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"x" * (SECRET_MAX + 1), "it must have from 1 to"),
    ):
        path = tmp_path / "secret"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigurationError, match=message):
            read_secret(path, "pepper_file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_B15_another_users_file_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "pepper"
    create_secret(path)
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigurationError, match="belongs to the user 12345"):
        read_secret(path, "pepper_file")


def test_B15_no_secret_is_shown(tmp_path: pathlib.Path) -> None:
    """A provider's key is in its URL; the seed, the pepper and the password are not here at all."""
    settings = load(write(tmp_path, EVERYTHING), environ={})
    assert settings.rpc_urls[0].endswith("hunter2")
    assert "hunter2" not in repr(settings)
    for bad in ('rpc_urls = ["gopher://hunter2"]', 'rpc_urls = "https://hunter2 x"', "rpc_urls = 'hunter2'"):
        with pytest.raises(
            ConfigurationError, match=r"rpc_urls in .* is not valid; it must be a list of URLs"
        ) as caught:
            load(write(tmp_path, bad), environ={})
        assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ConfigurationError) as caught:
        load(environ={"DIFFUSIONZ_PAYMENTS_SMTP_PASSWORD": "hunter2", "DIFFUSIONZ_PAYMENTS_SEED": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_B15_where_sweeps_go_is_configured_and_nothing_else(tmp_path: pathlib.Path) -> None:
    """The destination is a setting, read once: no module of payments writes it, and the object is frozen."""
    settings = load(environ={"DIFFUSIONZ_PAYMENTS_TREASURY": TREASURY})
    assert settings.treasury == TREASURY
    os.environ["DIFFUSIONZ_PAYMENTS_TREASURY"] = MINT
    try:
        assert settings.treasury == TREASURY
    finally:
        del os.environ["DIFFUSIONZ_PAYMENTS_TREASURY"]


# From settings to the parts.


def test_the_parts_are_made_from_settings(
    tmp_path: pathlib.Path, ledger: Ledger, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    create_secret(tmp_path / "pepper")
    create_secret(tmp_path / "password")
    now = 1_800_000_000
    (tmp_path / "rate.json").write_text('{"usd": "0.01", "at": 1800000000}')
    text = f"""
        domain = "example.org"
        network = "devnet"
        pepper_file = "{tmp_path}/pepper"
        rates_token_sources = ["fixed", "file"]
        rates_fixed_token = "0.0101"
        rates_token_file = "{tmp_path}/rate.json"
        rates_first_high = "0.04"
        rates_market_min_samples = 1
        smtp_host = "127.0.0.1"
        smtp_user = "me"
        smtp_password_file = "{tmp_path}/password"
        mail_from = "noreply@example.org"
        prices.zimage.usd = "2"
    """
    settings = load(write(tmp_path, text), environ={})
    key = Keys.from_settings(settings, connection).create("user:a")
    assert Keys.from_settings(settings, connection).authenticate(key.secret).account == "user:a"
    assert Identity.from_settings(settings, ledger).challenge(str(Pubkey.default()), "::1").chain == "devnet"
    assert Notices.from_settings(settings, connection)._mail is not None
    assert Notices.from_settings(Settings(), connection)._mail is None

    async def refresh() -> None:
        async with httpx2.AsyncClient() as client:
            rates = Rates.from_settings(settings, connection, client=client)
            rates._clock = lambda: float(now)
            await rates.refresh()

    asyncio.run(refresh())
    book = PriceBook(settings.prices, Rates.from_settings(settings, connection))  # as the web process has it
    assert book.quote("flux_image", now=now).tokens == 4_000_000
    assert book.quote("zimage", now=now).tokens == 50_000_000


def test_sources_that_need_more_say_so(tmp_path: pathlib.Path, connection: Connection) -> None:
    settings = load(write(tmp_path, EVERYTHING.replace("/run/secrets", str(tmp_path))), environ={})

    async def make(slot: Any) -> None:
        async with httpx2.AsyncClient() as client:
            Rates.from_settings(settings, connection, client=client, slot=slot)

    async def slot() -> int:
        return 1

    with pytest.raises(ConfigurationError, match='has "jupiter", which needs a cluster: set rpc_urls'):
        asyncio.run(make(None))
    with pytest.raises(ConfigurationError, match=r"jupiter_key_file: .*/jupiter cannot be read"):
        asyncio.run(make(slot))
    create_secret(tmp_path / "jupiter")
    asyncio.run(make(slot))


# What payments is made of.

DISTRIBUTIONS = {
    "solana": "solana", "spl": "solana", "solders": "solders", "pysqlite3": "pysqlite3", "sqlite_utils": "sqlite-utils",
    "cryptography": "cryptography", "aiosmtplib": "aiosmtplib", "httpx2": "httpx2", "starlette": "starlette",
    "uvicorn": "uvicorn",
}  # fmt: skip


def test_B16_payments_imports_what_it_says_from_whom_it_says() -> None:
    """The names around Solana have been typosquatted with thieves of keys: a new import is a decision, not a habit."""
    folder = pathlib.Path(diffusionz.payments.__file__).parent
    imported = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                imported.add(str(node.module).partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"diffusionz"}
    assert "solders" in foreign
    assert foreign <= set(DISTRIBUTIONS)
    owners = importlib.metadata.packages_distributions()
    for module in foreign:
        assert owners[module] == [DISTRIBUTIONS[module]], module
