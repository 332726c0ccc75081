"""The account, in a browser, from the first signature to the bill: a wallet that signs for real, a deposit that arrives
on a chain of its own, keys that open the API, and pictures that are paid."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.server.browser.conftest import Browser, script

SYMBOL = "CUTEDSL"
MINUS = "\N{MINUS SIGN}"


def get(url: str, key: str | None = None) -> tuple[int, Any]:
    """The status and the JSON of a GET, as a program with this key sees it."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def forget_everything(browser: Browser, dev: str) -> None:
    """No cookie, no wallet."""
    # A page without a script comes first: one that asks for its account would be refused, and its console would say so.
    browser.visit(dev + "/problems/gone")
    browser.driver.delete_all_cookies()
    browser.js("localStorage.clear(); sessionStorage.clear()")


def sign_in(browser: Browser, dev: str, wallet: str = "Dev wallet") -> None:
    browser.visit(dev + "/account")
    choose(browser, wallet)
    browser.wait(lambda: browser.shown("#in"), "the account")


def choose(browser: Browser, wallet: str) -> None:
    """Clicks on a wallet, as soon as it is there; the list grows while wallets register."""
    click = (
        "const found = [...document.querySelectorAll('#wallets button')].find((b) => b.textContent === arguments[0]);"
        "found?.click(); return Boolean(found);"
    )
    browser.wait(lambda: browser.js(click, wallet), f"the wallet {wallet!r}")


def balance(browser: Browser) -> str:
    return browser.text("#balance")


def history(browser: Browser) -> list[tuple[str, str]]:
    """(what, amount) of each line."""
    rows = browser.js(
        "return [...document.querySelectorAll('#history tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return [(row[1], row[2]) for row in rows if len(row) == 4]


@pytest.fixture(scope="module")
def rich(chromium: Browser, dev: str) -> dict[str, str]:
    """A visitor with 1000 tokens: what the browser remembers of him, and his first key.

    Made once, as a deposit takes the seconds that the chain takes to be final; this is the test of all of it.
    """
    chromium.reset()
    forget_everything(chromium, dev)
    chromium.visit(dev + "/account")
    assert chromium.text("#out h1") == "Sign in with your wallet" and chromium.text("#chip") == "Sign in"
    chromium.shot("account-out")
    sign_in(chromium, dev)

    # The first key is shown, once.
    key = chromium["#secret-value"].get_attribute("value") or ""
    assert key.startswith("cutedsl_") and chromium.focused() == "secret-title"
    chromium.shot("account-secret")
    chromium.click("#secret-copy")
    chromium.wait(lambda: chromium.text("#secret-copy") == "Copied")
    assert chromium.clipboard() == key
    chromium.click("#secret-done")
    assert not chromium.shown("#secret") and key not in chromium.driver.page_source
    assert get(dev + "/api/balance", key)[1]["available"] == 0

    # Tokens are sent to the address, are seen to arrive, and become credit, while the page is only looked at.
    address = chromium.text("#address")
    assert get(dev + "/api/deposit", key)[1]["address"] == address
    assert chromium.wait(lambda: chromium.js("return document.querySelector('#qr').naturalWidth")) > 100
    assert balance(chromium) == f"0 {SYMBOL}"
    chromium.fill("#faucet-tokens", "1000")
    chromium.click("#faucet button")
    arriving = chromium.wait(lambda: chromium.text("#arriving"), "the deposit on its way")
    assert f"1,000 {SYMBOL} on the way" in arriving
    chromium.shot("account-arriving")
    chromium.wait(lambda: balance(chromium) == f"1,000 {SYMBOL}", "the credit")
    chromium.wait(lambda: history(chromium) == [("deposit", f"+1,000 {SYMBOL}")], "its line in the history")
    chromium.wait(lambda: chromium.text("#chip") == f"1,000 {SYMBOL}")
    assert chromium.text("#arriving") == ""
    assert "Worth $20.00 here" in chromium.text("#held")
    chromium.wait(lambda: chromium.text("#address") != address, "a new address, for the next deposit")
    chromium.shot("account")
    assert chromium.errors() == []
    return {
        "key": key,
        "wallet": chromium.js("return localStorage.getItem('diffusionz-dev-wallet')"),
        "cookie": chromium.driver.get_cookies()[0]["value"],
    }


@pytest.fixture
def account(browser: Browser, dev: str, rich: dict[str, str]) -> Iterator[Browser]:
    """The account page of the visitor with credit. His session goes on: a client may sign in 30 times in 5 minutes."""
    forget_everything(browser, dev)
    browser.js("localStorage.setItem('diffusionz', 'in')")
    browser.driver.add_cookie({"name": "diffusionz_session", "value": rich["cookie"], "path": "/", "httpOnly": True})
    browser.visit(dev + "/account")
    browser.wait(lambda: browser.shown("#in"), "the account, without another signature")
    yield browser
    forget_everything(browser, dev)


def test_the_same_wallet_opens_the_same_account(browser: Browser, dev: str, rich: dict[str, str]) -> None:
    forget_everything(browser, dev)
    browser.js("localStorage.setItem('diffusionz-dev-wallet', arguments[0])", rich["wallet"])
    sign_in(browser, dev)
    cookie = browser.driver.get_cookie("diffusionz_session")
    assert cookie is not None and cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert browser.js("return document.cookie") == "", "no script reads it"
    assert not browser.shown("#secret"), "a key is made at the first time alone"
    assert balance(browser).endswith(SYMBOL) and balance(browser) != f"0 {SYMBOL}"
    assert len(browser.text("#who")) in range(32, 45), "the wallet's address"


def test_signing_out_and_coming_back(browser: Browser, dev: str, rich: dict[str, str]) -> None:
    forget_everything(browser, dev)
    browser.js("localStorage.setItem('diffusionz-dev-wallet', arguments[0])", rich["wallet"])
    sign_in(browser, dev)  # in a session of its own, as it ends here
    browser.click("#sign-out")
    browser.wait(lambda: browser.shown("#out"))
    assert browser.text("#chip") == "Sign in" and browser.js("return document.activeElement.tagName") == "H1"
    browser.visit(dev + "/account")
    browser.wait(lambda: browser.shown("#out"))
    assert browser.errors() == [], "nobody asks for what nobody may see"


def test_a_session_that_ended_elsewhere(account: Browser, dev: str) -> None:
    account.driver.delete_all_cookies()
    account.click("#older") if account.shown("#older") else account.visit(dev + "/account")
    account.wait(lambda: account.shown("#out"), "the way in")
    account.wait(lambda: account.text("#chip") == "Sign in")
    assert all("401" in error for error in account.errors())


def test_keys_are_made_work_and_are_revoked(account: Browser, dev: str) -> None:
    account.fill("#key-name", "<b>laptop</b>")
    account.fill("#key-limit", "75.5")
    account.click("#new-key button")
    account.wait(lambda: account.shown("#secret"), "the new key")
    secret = account["#secret-value"].get_attribute("value") or ""
    assert get(dev + "/api/balance", secret)[0] == 200
    account.click("#secret-done")
    rows = [row.text for row in account.all("#keys tr")]
    mine = next(row for row in rows if row.startswith("<b>laptop</b>"))
    assert f"75.5 {SYMBOL}" in mine and "never" in mine and secret[:16] in mine and secret not in mine

    # By keyboard: Escape keeps it, the dialog's other button ends it.
    revoke = 'button[aria-label="Revoke <b>laptop</b>"]'
    account.js("document.querySelector(arguments[0]).focus()", revoke)
    account.press(Keys.ENTER)
    account.wait(lambda: account.shown("#confirm"), "the question")
    assert "<b>laptop</b>" in account.text("#confirm-text")
    account.shot("account-revoke", full=False)
    account.press(Keys.ESCAPE)
    account.wait(lambda: not account.shown("#confirm"))
    assert get(dev + "/api/balance", secret)[0] == 200
    account.js("document.querySelector(arguments[0]).focus()", revoke)
    account.press(Keys.ENTER)
    account.wait(lambda: account.shown("#confirm"))
    assert account.js("return document.activeElement.value") == "no", "what is safe has the focus"
    account.press(Keys.SHIFT, Keys.TAB)
    account.press(Keys.ENTER)
    account.wait(lambda: account.all(revoke) == [], "its end")
    assert account.focused() == "keys-title"
    assert get(dev + "/api/balance", secret)[0] == 401


def test_a_limit_that_is_none_is_said(account: Browser) -> None:
    account.fill("#key-name", "x")
    account.js("document.querySelector('#key-limit').value = '0.0000001'")
    account.click("#new-key button")
    assert "at most 6 decimals" in account.wait(lambda: account["#problem"].text)


def test_a_paid_picture_says_its_cost_and_is_in_the_history(account: Browser, dev: str) -> None:
    before = int(balance(account).split()[0].replace(",", ""))
    account.visit(dev + "/")
    account.wait(lambda: account.shown("#price"), "the price")
    assert account.text("#price") == f"$1.00 for each image, 50 {SYMBOL} now. What fails costs nothing."
    account.fill("#prompt", "a red circle on a blue background")
    account.fill("#steps", "2")
    account.click("#go")
    account.wait(lambda: account.shown("#result"), "the picture")
    assert f"$1.00, 50 {SYMBOL}" in account["#facts"].text
    account.wait(lambda: account.text("#chip") == f"{before - 50:,} {SYMBOL}", "what is left")
    account.visit(dev + "/account")
    account.wait(lambda: balance(account) == f"{before - 50:,} {SYMBOL}")
    account.wait(lambda: history(account)[:1] == [("zimage", f"{MINUS}50 {SYMBOL}")])
    account.shot("account-history")


def test_a_paid_forecast_says_its_cost(account: Browser, dev: str) -> None:
    account.visit(dev + "/forecast")
    account.fill("#values", "1 2 3 4 5 6 7 8")
    account.fill("#horizon", "3")
    account.click("#go")
    account.wait(lambda: account.shown("#result"), "the forecast")
    assert f"$0.50, 25 {SYMBOL}" in account["#facts"].text


def test_what_is_cancelled_costs_nothing(account: Browser, dev: str) -> None:
    before = balance(account)
    account.visit(dev + "/")
    account.fill("#prompt", "a grey moon")
    account.fill("#steps", "50")
    account.click("#go")
    account.wait(lambda: account.text("#status").startswith("Step"))
    account.click("#cancel")
    account.wait(lambda: not account.shown("#busy"), "its end")
    account.wait(lambda: account.text("#chip") == before)


def test_without_credit_the_way_to_it_is_shown(browser: Browser, dev: str) -> None:
    forget_everything(browser, dev)
    sign_in(browser, dev)
    browser.visit(dev + "/")
    browser.fill("#prompt", "a red circle")
    browser.click("#go")
    says = browser.wait(lambda: browser["#problem"].text, "the problem")
    assert "Not enough credit" in says and f"It costs 50 {SYMBOL}, and 0 {SYMBOL} are there." in says
    browser.shot("draw-402")
    browser["#problem"].find_element("link text", "Add credit").click()
    browser.wait(lambda: browser.shown("#deposit"), "where to pay")
    browser.visit(dev + "/")
    assert browser["#prompt"].get_attribute("value") == "a red circle", "what was written is still there"
    assert all("402" in error for error in browser.errors())


def test_a_stranger_is_asked_to_sign_in(browser: Browser, dev: str) -> None:
    forget_everything(browser, dev)
    browser.visit(dev + "/")
    browser.fill("#prompt", "a red circle")
    browser.click("#go")
    assert "Sign in first" in browser.wait(lambda: browser["#problem"].text)
    browser["#problem"].find_element("link text", "Sign in").click()
    browser.wait(lambda: browser.shown("#out"))
    assert all("401" in error for error in browser.errors())


WALLETS = ["Signs messages", "Writes its own", "Phantom"]


@pytest.mark.parametrize("name", WALLETS)
def test_wallets_of_all_kinds_sign_in(browser: Browser, dev: str, name: str) -> None:
    forget_everything(browser, dev)
    browser.before_each_page(script("wallets") + f"\nplugIn({name!r});")
    sign_in(browser, dev, name)
    assert browser.shown("#secret"), "a new account"
    assert (
        len([button for button in browser.all("#wallets button") if button.get_attribute("textContent") == name]) == 1
    )
    assert browser.all("#wallets img[src^=javascript]") == []


def test_the_list_of_wallets_stays_while_one_is_on_it(browser: Browser, dev: str) -> None:
    forget_everything(browser, dev)
    browser.visit(dev + "/account")
    browser.wait(lambda: browser.shown("#wallets button"))
    browser.js("document.querySelector('#wallets button').focus()")
    time.sleep(1.2)  # older wallets are looked for after a second
    assert browser.js("return document.activeElement.textContent") == "Dev wallet"


BAD = {
    "Declines": "You declined in the wallet",
    "Breaks": "no device <b>found</b>",
    "Signs wrong": "signature is not",
}


@pytest.mark.parametrize("name", BAD)
def test_a_wallet_that_does_not_sign_is_said_so(browser: Browser, dev: str, name: str) -> None:
    forget_everything(browser, dev)
    browser.before_each_page(script("wallets") + f"\nplugIn({name!r});")
    browser.visit(dev + "/account")
    choose(browser, name)
    assert BAD[name] in browser.wait(lambda: browser["#problem"].text, "the reason")
    assert browser.shown("#out") and all(button.is_enabled() for button in browser.all("#wallets button"))
    assert browser.text("#waiting") == ""
    assert all("400" in error for error in browser.errors())


def test_a_free_server_says_that_nothing_costs(browser: Browser, free: str) -> None:
    browser.visit(free + "/account")
    assert browser.text("h1") == "Everything is free here" and browser.text(".chip") == "free"
    assert browser.all("script") == []
    browser.shot("account-free")


# --- The documentation, which a key goes with ---


def run(code: str, language: str, folder: pathlib.Path, key: str | None) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=os.environ | ({"DIFFUSIONZ_API_KEY": key} if key else {}), timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("language", ["curl", "python"])
@pytest.mark.parametrize("mode", ["free", "dev"])
def test_the_samples_run_as_they_stand(
    browser: Browser, request: pytest.FixtureRequest, mode: str, language: str, tmp_path: pathlib.Path
) -> None:
    url = request.getfixturevalue(mode)
    key = request.getfixturevalue("rich")["key"] if mode == "dev" else None
    browser.visit(url + "/docs")
    samples = browser.js(
        "return [...document.querySelectorAll('section')].filter((s) => s.querySelector(arguments[0]))"
        ".map((s) => [s.id, s.querySelector(arguments[0] + ' code').textContent])",
        f"[data-language={language}]",
    )
    assert [id for id, _ in samples] == ["draw", "forecast", "batch", "job", "openai"]
    for id, code in samples:
        assert url in code
        done = run(code, language, tmp_path, key)
        assert done.returncode == 0, (id, done.stderr)
        if id == "job":
            assert "job.progress" in done.stdout and "job.completed" in done.stdout
        if id == "forecast":
            assert " now, " in done.stdout
    assert (tmp_path / "circle.webp").read_bytes()[:4] == b"RIFF"


def test_the_documentation_knows_prices_and_keys(account: Browser, dev: str, rich: dict[str, str]) -> None:
    account.visit(dev + "/docs")
    account.wait(lambda: account.text("tr[data-service=zimage] td:nth-child(3)") == "50", "the price in tokens")
    assert account.text("tr[data-service=chronos2] td") == "0.50"
    account.wait(lambda: rich["key"][:16] in account.text("#key-hint"), "which key is mine")
    account.shot("docs")
    account.click("[name=language][value=python]")
    assert not account.shown("[data-language=curl]") and account.shown("[data-language=python]")
    account.click("#forecast [data-language=python] button")
    account.wait(
        lambda: (
            "chronos2" in account.clipboard()
            if account.text("#forecast [data-language=python] button") == "Copied"
            else False
        )
    )
    account.visit(dev + "/docs")
    assert account.shown("[data-language=python]"), "the choice is kept"
