"""Accounts over HTTP: prices, balance, history, deposits, and keys that open what they should and no more."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
import segno

from .conftest import Customer, Running

Make = Callable[..., Customer]
SITE = {"sec-fetch-site": "same-origin"}
FORECAST = {"values": [1, 2, 3, 4], "prediction_length": 2}


@pytest.fixture(scope="module")
def pair(dev_server: Running) -> Iterator[tuple[Customer, Customer]]:
    """Two customers without credit, for tests that change nothing of theirs: signing in is limited for each client."""
    made = Customer(dev_server), Customer(dev_server)
    yield made
    for one in made:
        one.close()


def prices(client: httpx2.Client) -> dict[str, dict[str, Any]]:
    about = client.get("/api/pricing").raise_for_status().json()
    return {service["name"]: service for service in about["services"]}


# --- Prices ---


def test_a_free_server_has_no_prices(free: httpx2.Client) -> None:
    about = free.get("/api/pricing").json()
    assert about["free"] is True and about["token"] is None
    assert about["services"][:2] == [{"name": name, "usd": "0", "tokens": 0} for name in ("zimage", "chronos2")]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/balance"),
        ("GET", "/api/billing-history"),
        ("GET", "/api/deposit"),
        ("GET", "/api/deposit/qr.svg"),
        ("GET", "/api/account"),
        ("GET", "/api/keys"),
        ("POST", "/api/sign-in/challenge"),
        ("POST", "/api/sign-in"),
        ("POST", "/api/dev/faucet"),
    ],
)
def test_a_free_server_keeps_no_credit(free: httpx2.Client, method: str, path: str) -> None:
    body = {"address": "x", "nonce": "x", "signature": "x"} if path == "/api/sign-in" else {"address": "x"}
    answer = free.request(method, path, json=body if method == "POST" else None)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not-found"


def test_what_a_call_costs_is_what_was_shown(customer: Make, dev_server: Running) -> None:
    someone = customer(500)
    with dev_server.client() as anybody:
        about = anybody.get("/api/pricing").json()
        shown = prices(anybody)
    assert about["free"] is False and about["rates"] and about["token"]
    assert list(shown) == ["zimage", "chronos2"]  # what is for sale and is served
    had = someone.balance()["available"]
    job = someone.client.post("/api/service", json=FORECAST | {"service": "chronos2"}).raise_for_status().json()
    assert job["cost"]["tokens"] == shown["chronos2"]["tokens"] and job["cost"]["charged"] is True
    assert float(job["cost"]["usd"]) == float(shown["chronos2"]["usd"])
    now = someone.balance()
    assert had - now["available"] == shown["chronos2"]["tokens"] and now["held"] == 0
    batch = {"service": "chronos2", "series": [[1, 2], [3, 4], [5, 6]]}
    three = someone.client.post("/api/service", json=batch).raise_for_status().json()
    assert three["cost"]["tokens"] == 3 * shown["chronos2"]["tokens"]


# --- Balance and history ---


def test_a_new_account_has_nothing(customer: Make) -> None:
    someone = customer()
    balance = someone.balance()
    assert (balance["account"], balance["posted"], balance["held"], balance["available"]) == (someone.account, 0, 0, 0)
    assert balance["decimals"] > 0 and balance["symbol"] and balance["arriving"] == balance["waiting"] == []
    history = someone.client.get("/api/billing-history").json()
    assert history == {"lines": [], "next_before": None}
    refused = someone.client.post("/forecast", json=FORECAST)
    assert refused.status_code == 402
    problem = refused.json()
    assert (problem["available"], problem["deposit_url"]) == (0, "/api/deposit") and problem["needed"] > 0
    assert someone.client.get("/api/billing-history").json()["lines"] == []


def test_history_pages_without_a_gap_or_a_double(customer: Make) -> None:
    someone = customer(1000)
    for _ in range(6):
        someone.client.post("/forecast", json=FORECAST).raise_for_status()
    whole = someone.client.get("/api/billing-history?limit=1000").json()
    assert whole["next_before"] is None
    lines, before = [], None
    while True:
        query = "/api/billing-history?limit=3" + (f"&before={before}" if before else "")
        page = someone.client.get(query).raise_for_status().json()
        assert len(page["lines"]) <= 3
        lines += page["lines"]
        before = page["next_before"]
        if before is None:
            break
    assert lines == whole["lines"] and len(lines) >= 7
    numbers = [line["seq"] for line in lines]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == len(numbers)
    now = someone.balance()
    # Each line is what it changed.
    assert (sum(line["posted"] for line in lines), sum(line["held"] for line in lines)) == (now["posted"], now["held"])
    assert lines[-1]["posted"] == 1000 * 10 ** now["decimals"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"), ("limit=1001", "limit"), ("limit=-1", "limit"), ("limit=x", "limit"), ("limit=", "limit"),
        ("limit=1.5", "limit"), ("limit=%D9%A3", "limit"), ("before=0", "before"), ("before=x", "before"),
        ("before=99999999999999999999", "before"), ("limit=" + "9" * 5000, "limit"),
    ],
)  # fmt: skip
def test_pages_that_are_not_there(pair: tuple[Customer, Customer], query: str, param: str) -> None:
    answer = pair[0].client.get("/api/billing-history?" + query)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert len(answer.text) < 1000


# --- Deposits ---


def test_a_deposit_goes_to_the_address_and_its_code(customer: Make, pair: tuple[Customer, Customer]) -> None:
    someone = customer()
    about = someone.client.get("/api/deposit").json()
    assert re.fullmatch(r"[1-9A-HJ-NP-Za-km-z]{32,44}", about["address"])
    assert [one["mint"] for one in about["currencies"]] == [about["mint"], None] and about["deposits"] == []
    assert someone.client.get("/api/deposit").json()["address"] == about["address"]  # until something came
    assert pair[0].client.get("/api/deposit").json()["address"] != about["address"]
    code = someone.client.get("/api/deposit/qr.svg")
    assert code.headers["content-type"] == "image/svg+xml" and code.headers["cache-control"] == "no-store"
    expected = io.BytesIO()
    uri = f"solana:{about['address']}?spl-token={about['mint']}"
    segno.make(uri, micro=False).save(
        expected, kind="svg", scale=4, border=2, dark="#000", light="#fff", xmldecl=False, title="Deposit address"
    )
    assert code.content == expected.getvalue()
    someone.deposit(12.5)
    credited = someone.client.get("/api/deposit").json()["deposits"]
    assert [one["tokens"] for one in credited] == [someone.balance()["posted"]]
    assert someone.balance()["posted"] == 12.5 * 10 ** about["decimals"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tokens": 5}, "address"), ({"address": 5}, "address"), ({"address": "x", "coins": 1}, "coins"),
        ({"address": "x", "tokens": -1}, "tokens"), ({"address": "x", "tokens": "much"}, "tokens"),
        ({"address": "x", "tokens": "NaN"}, "tokens"), ({"address": "x", "sol": 1e10}, "sol"),
        ({"address": "x", "sol": "Infinity"}, "sol"),
    ],
)  # fmt: skip
def test_the_faucet_refuses(dev_server: Running, body: dict[str, Any], param: str) -> None:
    with dev_server.client() as client:
        answer = client.post("/api/dev/faucet", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


# --- Whose ---

OWN = ["/api/balance", "/api/billing-history", "/api/deposit", "/api/deposit/qr.svg", "/api/account"]


@pytest.mark.parametrize("path", OWN)
def test_a_wallets_address_opens_nothing(pair: tuple[Customer, Customer], dev_server: Running, path: str) -> None:
    one, other = pair
    assert one.client.get(f"{path}?wallet={one.address}").status_code == 200
    assert one.browser.get(path).status_code == 200
    for wallet in (other.address, "x", ""):
        refused = one.client.get(path, params={"wallet": wallet})
        assert refused.status_code == 403 and refused.json()["error"]["param"] == "wallet"
    with dev_server.client() as nobody:
        for headers in ({}, {"authorization": "Bearer cutedsl_no"}, {"authorization": f"Basic {one.key}"}):
            refused = nobody.get(f"{path}?wallet={one.address}", headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"


def test_naming_anothers_wallet_in_a_call(customer: Make, pair: tuple[Customer, Customer]) -> None:
    one, other = customer(100), pair[0]
    own = one.client.post("/forecast", json=FORECAST | {"wallet_address": one.address})
    assert own.status_code == 200, own.text
    before = one.balance()
    refused = one.client.post("/forecast", json=FORECAST | {"wallet_address": other.address})
    assert refused.status_code == 403 and refused.json()["error"]["param"] == "wallet_address"
    assert one.balance() == before


def test_signing_in_and_out(customer: Make, dev_server: Running) -> None:
    someone = customer()
    about = someone.browser.get("/api/account").json()
    assert about["account"] == someone.account and about["wallets"] == [someone.address]
    assert someone.client.get("/api/account").json() == about
    (cookie,) = [cookie for cookie in someone.browser.cookies.jar if cookie.name == "diffusionz_session"]
    assert cookie.has_nonstandard_attr("HttpOnly") and cookie.get_nonstandard_attr("SameSite") == "strict"
    with dev_server.client() as thief:
        for value in (cookie.value[:-1], someone.account, someone.account + ".x.y", cookie.value + "x"):
            thief.cookies.set("diffusionz_session", value)
            assert thief.get("/api/account").status_code == 401
            thief.cookies.clear()
    someone.browser.post("/api/sign-out").raise_for_status()
    assert someone.browser.get("/api/account").status_code == 401


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "address"), ({"address": "x"}, "address"), ({"address": "0" * 44}, "address"),
        ({"address": 5}, "address"), ({"address": "x" * 100_000}, "address"),
    ],
)  # fmt: skip
def test_challenges_for_no_wallet(dev_server: Running, body: dict[str, Any], param: str) -> None:
    with dev_server.client() as client:
        answer = client.post("/api/sign-in/challenge", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_signature_of_another_or_used_twice(pair: tuple[Customer, Customer], dev_server: Running) -> None:
    from solders.keypair import Keypair

    someone = pair[0]
    with dev_server.client() as client:

        def challenge() -> dict[str, Any]:
            return dict(client.post("/api/sign-in/challenge", json={"address": someone.address}).json())

        def answer(nonce: str, signature: str) -> httpx2.Response:
            return client.post(
                "/api/sign-in", json={"address": someone.address, "nonce": nonce, "signature": signature}
            )

        given = challenge()
        text = given["text"].encode()
        for wrong in (str(Keypair().sign_message(text)), str(someone.wallet.sign_message(text + b"x")), "x", ""):
            refused = answer(given["nonce"], wrong)
            assert refused.status_code == 400 and "diffusionz_session" not in refused.headers.get("set-cookie", "")
        given = challenge()
        signature = str(someone.wallet.sign_message(given["text"].encode()))  # base58, as wallets show it
        done = answer(given["nonce"], signature)
        assert done.status_code == 200, done.text
        assert (done.json()["account"], done.json()["new"], done.json()["api_key"]) == (someone.account, False, None)
        assert answer(given["nonce"], signature).status_code == 400  # a nonce is good for once


# --- Keys ---


def test_the_life_of_a_key(customer: Make) -> None:
    someone = customer(500)
    browser = someone.browser
    body = {"name": "for forecasts", "services": ["chronos2"], "daily_limit": 30_000_000}
    made = browser.post("/api/keys", json=body, headers=SITE)
    assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
    key = made.json()
    assert {name: key[name] for name in body} == body and key["revoked_at"] is None and key["secret"]
    listed = {one["id"]: one for one in browser.get("/api/keys").json()["keys"]}
    assert len(listed) == 2 and "secret" not in listed[key["id"]] and key["secret"] not in str(listed)
    with someone.server.client(headers={"authorization": f"Bearer {key['secret']}"}) as client:
        assert client.get("/api/balance").json()["account"] == someone.account
        other = client.post("/generate", json={"prompt": "a circle", "steps": 1})
        assert other.status_code == 403 and "chronos2" in other.json()["detail"]
        assert client.post("/forecast", json=FORECAST).status_code == 200
        over = client.post("/forecast", json=FORECAST)  # 25 tokens a forecast; the second is over the day's 30
        assert over.status_code == 403 and "30000000" in over.json()["detail"]
        changed = browser.patch(f"/api/keys/{key['id']}", json={"daily_limit": None}, headers=SITE)
        assert changed.status_code == 200 and changed.json()["daily_limit"] is None
        assert client.post("/forecast", json=FORECAST).status_code == 200
        # A key makes no keys, and changes none.
        for method, path in (
            ("GET", "/api/keys"), ("POST", "/api/keys"), ("DELETE", f"/api/keys/{key['id']}"),
            ("PATCH", f"/api/keys/{key['id']}"),
        ):  # fmt: skip
            refused = client.request(method, path, json={} if method == "POST" else None)
            assert refused.status_code == 401, refused.text
        gone = browser.delete(f"/api/keys/{key['id']}", headers=SITE)
        assert gone.status_code == 200 and gone.json()["revoked_at"] <= time.time()
        assert client.get("/api/balance").status_code == 401
        assert client.post("/forecast", json=FORECAST).status_code == 401
    assert browser.delete(f"/api/keys/{key['id']}", headers=SITE).status_code == 200  # again is fine


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "x" * 65}, 400), ({"name": "line\nbreak"}, 400), ({"name": 5}, 400), ({"limit": 1}, 400),
        ({"services": ["nothing"]}, 404), ({"services": []}, 400), ({"services": "zimage"}, 400),
        ({"daily_limit": -1}, 400), ({"daily_limit": 2**63}, 400), ({"daily_limit": 10**30}, 400),
        ({"daily_limit": 1.5}, 400), ({"daily_limit": True}, 400),
    ],
)  # fmt: skip
def test_keys_that_cannot_be(pair: tuple[Customer, Customer], body: dict[str, Any], status: int) -> None:
    answer = pair[0].browser.post("/api/keys", json=body, headers=SITE)
    assert answer.status_code == status, answer.text


def test_anothers_key(pair: tuple[Customer, Customer]) -> None:
    one, other = pair
    (key,) = one.browser.get("/api/keys").json()["keys"]
    for path in (f"/api/keys/{key['id']}", "/api/keys/nothing", "/api/keys/" + "x" * 1000):
        assert other.browser.delete(path, headers=SITE).status_code == 404
        assert other.browser.patch(path, json={"daily_limit": 1}, headers=SITE).status_code == 404
    assert one.client.get("/api/balance").status_code == 200


@pytest.mark.parametrize("headers", [{}, {"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}])
def test_another_site_cannot_use_the_cookie(pair: tuple[Customer, Customer], headers: dict[str, str]) -> None:
    someone = pair[0]
    before = someone.browser.get("/api/keys").json()
    refused = someone.browser.post("/api/keys", json={"name": "theirs"}, headers=headers)
    assert refused.status_code == 403
    assert someone.browser.get("/api/keys").json() == before
