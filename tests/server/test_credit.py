"""Credit as a server's clients have it: held, charged once for what was delivered, and given back for all else."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from tests.server.conftest import Customer, Running, Start, ended, until
from tests.server.shops import CHRONOS2, ZIMAGE, Shop, devnet, no_traceback

PICTURE = {"service": "zimage", "prompt": "a red circle", "steps": 2}
SLOW = {"service": "zimage", "prompt": "a blue square", "steps": 50, "n": 4}
FORECAST = {"service": "chronos2", "values": [1, 2, 3, 4, 5], "prediction_length": 2}
RESULT_S = 2.0


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with devnet(tmp_path_factory.mktemp("chain")) as url:
        yield url


@pytest.fixture(scope="module")
def shop(chain: str, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shops") / "shop", chain)


@pytest.fixture(scope="module")
def server(shop: Shop, start: Start) -> Iterator[Running]:
    """A server that sells; at the end its books are looked at, and its log."""
    with shop.serving(start) as server:
        yield server
        shop.audit()
        no_traceback(server)


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    return dict(answer.json())


# --- What is charged ---


@pytest.mark.parametrize(
    ("path", "body", "units", "price"),
    [
        ("/api/service", PICTURE, 1, ZIMAGE),
        ("/api/service", PICTURE | {"n": 2}, 2, ZIMAGE),
        ("/generate", {"prompt": "a star", "steps": 1}, 1, ZIMAGE),
        ("/api/service", FORECAST, 1, CHRONOS2),
        ("/api/service", FORECAST | {"values": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}, 3, CHRONOS2),
        ("/forecast", {"values": [1, 2, 3]}, 1, CHRONOS2),
        ("/forecast_batch", {"series": [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10]]}, 4, CHRONOS2),
    ],
)
def test_the_price_is_held_and_charged_once(
    server: Running, shop: Shop, path: str, body: dict[str, Any], units: int, price: int
) -> None:
    buyer = shop.buyer(units * price + 7)
    with buyer.client(server) as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        if path == "/api/service":
            assert answer.json()["cost"] == {
                "usd": f"{units * price / ZIMAGE:.2f}",
                "tokens": units * price,
                "charged": True,
            }
        assert client.get("/api/balance").json()["available"] == 7
    assert shop.lines(buyer) == {"hold": 1, "post": 1} and shop.balance(buyer) == (7, 0)


def test_what_is_held_is_seen_while_it_runs(server: Running, shop: Shop) -> None:
    buyer = shop.buyer(4 * ZIMAGE)
    with buyer.client(server) as client:
        job = client.post("/api/jobs", json=SLOW).json()
        assert job["cost"] == {"usd": "4.00", "tokens": 4 * ZIMAGE, "charged": False}
        balance = client.get("/api/balance").json()
        assert (balance["posted"], balance["held"], balance["available"]) == (4 * ZIMAGE, 4 * ZIMAGE, 0)
        client.delete(job["urls"]["self"])
        assert ended(client, job["id"])["cost"] is None
        assert client.get("/api/balance").json()["available"] == 4 * ZIMAGE


def test_a_balance_that_is_short(server: Running, shop: Shop) -> None:
    buyer = shop.buyer(2 * ZIMAGE - 1)
    with buyer.client(server) as client:
        told = problem(client.post("/api/service", json=PICTURE | {"n": 2}), 402, "insufficient-credit")
        assert (told["available"], told["needed"]) == (2 * ZIMAGE - 1, 2 * ZIMAGE)
        assert client.get(told["deposit_url"]).json()["address"]
        # It never was a job: with credit for less, the same key may be used.
        key = {"idempotency-key": "short"}
        problem(client.post("/api/service", json=PICTURE | {"n": 2}, headers=key), 402, "insufficient-credit")
        assert client.post("/api/service", json=PICTURE, headers=key).status_code == 200
    assert shop.lines(buyer) == {"hold": 1, "post": 1}


@pytest.mark.parametrize("calls", [1, 3])
def test_credit_for_some_of_many_at_once_runs_as_many(server: Running, shop: Shop, calls: int) -> None:
    buyer = shop.buyer(calls * CHRONOS2 + CHRONOS2 // 2)
    with buyer.client(server) as client, concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: client.post("/api/service", json=FORECAST).status_code, range(12)))
    assert Counter(answers) == {200: calls, 402: 12 - calls}
    assert shop.lines(buyer) == {"hold": calls, "post": calls} and shop.balance(buyer) == (CHRONOS2 // 2, 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/service", PICTURE | {"width": 17}),
        ("/api/service", PICTURE | {"steps": 51}),
        ("/api/service", PICTURE | {"n": 5}),
        ("/api/service", PICTURE | {"image": "http://127.0.0.1:1/a.png"}),
        ("/api/service", PICTURE | {"model": "another"}),
        ("/api/service", PICTURE | {"wallet_address": "11111111111111111111111111111111"}),
        ("/api/service", FORECAST | {"values": [None]}),
        ("/api/jobs", FORECAST | {"quantile_levels": [0.5, 0.1]}),
        ("/api/service", {"service": "nothing"}),
        ("/generate", {"prompt": "x", "height": 8}),
        ("/forecast_batch", {"series": [[1, 2, 3]], "constrain_ohlc": True}),
    ],
)
def test_what_is_not_valid_is_refused_before_a_hold(
    server: Running, shop: Shop, path: str, body: dict[str, Any]
) -> None:
    buyer = shop.buyer(10 * ZIMAGE)
    with buyer.client(server) as client:
        assert client.post(path, json=body).status_code in (400, 403, 404)
        assert client.get("/api/jobs").json()["jobs"] == []
    assert shop.lines(buyer) == {}


# --- What is given back ---


def test_a_cancelled_job_costs_nothing(server: Running, shop: Shop) -> None:
    buyer = shop.buyer(8 * ZIMAGE)
    with buyer.client(server) as client:
        running, queued = (client.post("/api/jobs", json=SLOW).json()["id"] for _ in range(2))
        assert shop.balance(buyer) == (8 * ZIMAGE, 8 * ZIMAGE)
        for id in (queued, running):  # the second has begun by now
            client.post(f"/api/jobs/{id}/cancel")
            job = ended(client, id)
            assert (job["status"], job["cost"], job["problem"]["error"]["code"]) == ("cancelled", None, "cancelled")
    assert shop.lines(buyer) == {"hold": 2, "void": 2} and shop.balance(buyer) == (8 * ZIMAGE, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_pays_nothing(server: Running, shop: Shop, stream: bool) -> None:
    buyer = shop.buyer(4 * ZIMAGE)
    if stream:
        with (
            buyer.client(server) as client,
            client.stream("POST", "/api/service", json=SLOW | {"stream": True}) as events,
        ):
            next(events.iter_lines())
    else:
        with server.left("/api/service", SLOW, buyer.headers):
            until(lambda: shop.lines(buyer))  # it is held
    assert shop.settled(buyer) == {"hold": 1, "void": 1} and shop.balance(buyer) == (4 * ZIMAGE, 0)


@pytest.fixture(scope="module")
def hasty(chain: str, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Shop]]:
    """A server that keeps results for a moment, and has a model that cannot be loaded."""
    folder = tmp_path_factory.mktemp("hasty")
    shop = Shop(folder / "shop", chain)
    (folder / "broken" / "transformer").mkdir(parents=True)
    config = folder / "server.toml"
    models = "".join(
        f'[models.{name}]\nfamily = "{family}"\nmodel = "{model}"\n'
        for name, family, model in (
            ("zimage-demo", "zimage", "zimage-demo"),
            ("chronos2-demo", "chronos2", "chronos2-demo"),
            ("broken", "zimage", folder / "broken"),
        )
    )
    config.write_text(f"[limits]\nresult_s = {RESULT_S}\n" + models)
    with shop.serving(start, "--config", str(config)) as server:
        yield server, shop
        shop.audit("--offline")
        no_traceback(server)


def test_a_failure_of_ours_costs_nothing(hasty: tuple[Running, Shop]) -> None:
    server, shop = hasty
    buyer = shop.buyer(ZIMAGE)
    with buyer.client(server) as client:
        answer = client.post("/api/service", json=PICTURE | {"model": "broken"})
        problem(answer, 503, "model-unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert client.post("/api/service", json=PICTURE).status_code == 200
    assert shop.lines(buyer) == {"hold": 2, "void": 1, "post": 1}


def test_what_takes_too_long_costs_nothing(chain: str, start: Start, tmp_path: pathlib.Path) -> None:
    shop, config = Shop(tmp_path / "shop", chain), tmp_path / "server.toml"
    config.write_text("[limits]\njob_s = 2\n")
    buyer = shop.buyer(4 * ZIMAGE)
    with shop.serving(start, "--config", str(config)) as server, buyer.client(server) as client:
        body = SLOW | {"width": 512, "height": 512}
        problem(client.post("/api/service", json=body), 503, "timeout")
        no_traceback(server)
    assert shop.lines(buyer) == {"hold": 1, "void": 1}
    shop.audit("--offline")


def test_a_result_that_was_kept_for_its_time_is_not_paid_back(hasty: tuple[Running, Shop]) -> None:
    server, shop = hasty
    buyer, key = shop.buyer(CHRONOS2), {"idempotency-key": "once"}
    with buyer.client(server) as client:
        job = client.post("/api/service", json=FORECAST, headers=key).json()
        # The ledger's times are whole seconds: a hold's may be one later than it was.
        time.sleep(RESULT_S + 1.1)
        problem(client.get(f"/api/jobs/{job['id']}"), 410, "gone")
        told = problem(client.post("/api/service", json=FORECAST, headers=key), 409, "conflict")
        assert "kept for its time" in told["detail"]
        with shop.buyer().client(server) as other:
            problem(other.get(f"/api/jobs/{job['id']}"), 404, "not-found")
    assert shop.lines(buyer) == {"hold": 1, "post": 1} and shop.balance(buyer) == (0, 0)


# --- Idempotency ---


def test_a_lost_answer_is_asked_for_again_and_charged_once(server: Running, shop: Shop) -> None:
    buyer, key = shop.buyer(10 * ZIMAGE), {"idempotency-key": "lost"}
    body = PICTURE | {"steps": 40}
    with buyer.client(server) as client:
        with server.left("/api/service", body, buyer.headers | key):
            until(lambda: shop.lines(buyer))  # it is held
        # The same bytes, as a client that sends again does.
        sent = {"content": json.dumps(body), "headers": key | {"content-type": "application/json"}}
        again = client.post("/api/service", **sent)
        assert again.headers["idempotency-replayed"] == "true" and again.json()["cost"]["charged"]
        problem(client.post("/api/service", json=PICTURE, headers=key), 422, "idempotency-mismatch")
        with shop.buyer(ZIMAGE).client(server) as other:  # the same key of somebody else is another key
            assert "idempotency-replayed" not in other.post("/api/service", json=PICTURE, headers=key).headers
    assert shop.lines(buyer) == {"hold": 1, "post": 1}


@pytest.mark.parametrize("body", [PICTURE | {"steps": 10}, FORECAST])
def test_equal_requests_at_once_are_charged_once(server: Running, shop: Shop, body: dict[str, Any]) -> None:
    buyer, key = shop.buyer(10 * ZIMAGE), {"idempotency-key": "together"}
    with buyer.client(server) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/api/service", json=body, headers=key), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert shop.lines(buyer) == {"hold": 1, "post": 1}


def test_a_key_that_outlives_its_server(chain: str, start: Start, tmp_path: pathlib.Path) -> None:
    shop = Shop(tmp_path / "shop", chain)
    buyer, done, cut = shop.buyer(10 * ZIMAGE), {"idempotency-key": "done"}, {"idempotency-key": "cut"}
    with shop.serving(start) as server, buyer.client(server) as client:
        assert client.post("/api/service", json=FORECAST, headers=done).status_code == 200
        assert client.post("/api/jobs", json=SLOW, headers=cut).status_code == 202
        server.process.kill()
        server.process.wait()
    assert shop.balance(buyer) == (10 * ZIMAGE - CHRONOS2, 4 * ZIMAGE)
    with shop.serving(start) as server, buyer.client(server) as client:
        assert shop.balance(buyer)[1] == 0
        # Its result is lost, so its price comes back; once.
        for _ in range(2):
            told = problem(client.post("/api/service", json=FORECAST, headers=done), 409, "conflict")
            assert "given back" in told["detail"]
            assert shop.balance(buyer)[0] == 10 * ZIMAGE
        told = problem(client.post("/api/jobs", json=SLOW, headers=cut), 409, "conflict")
        assert "ended without a charge" in told["detail"]
        problem(client.post("/api/jobs", json=PICTURE, headers=cut), 409, "conflict")
        assert client.post("/api/service", json=FORECAST, headers={"idempotency-key": "new"}).status_code == 200
        no_traceback(server)
    shop.audit("--offline")
    assert shop.lines(buyer) == {"hold": 3, "post": 2, "refund": 1, "void": 1}


# --- Who may ---


def test_a_keys_services_and_daily_limit(server: Running, shop: Shop) -> None:
    narrow = shop.buyer(10 * ZIMAGE, services=["chronos2"])
    with narrow.client(server) as client:
        problem(client.post("/api/service", json=PICTURE), 403, "forbidden")
        assert client.post("/api/service", json=FORECAST).status_code == 200
    assert shop.lines(narrow) == {"hold": 1, "post": 1}
    limited = shop.buyer(10 * ZIMAGE, daily_limit=2 * CHRONOS2 + 1)
    with limited.client(server) as client:
        problem(client.post("/api/service", json=PICTURE | {"n": 2}), 403, "forbidden")
        statuses = [client.post("/api/service", json=FORECAST).status_code for _ in range(4)]
        assert statuses == [200, 200, 403, 403]
    assert shop.lines(limited) == {"hold": 2, "post": 2}


def test_a_cancelled_job_does_not_use_up_the_daily_limit(server: Running, shop: Shop) -> None:
    buyer = shop.buyer(10 * ZIMAGE, daily_limit=4 * ZIMAGE)
    with buyer.client(server) as client:
        id = client.post("/api/jobs", json=SLOW).json()["id"]
        problem(client.post("/api/service", json=FORECAST), 403, "forbidden")
        client.delete(f"/api/jobs/{id}")
        ended(client, id)
        assert client.post("/api/service", json=FORECAST).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer cutedsl_nothing"},
        {"authorization": "Basic Zm9vOmJhcg=="},
        {"authorization": "Bearer caf\u00e9".encode("latin-1")},
        {"authorization": "Bearer " + "a" * 8000},
        {"cookie": "diffusionz_session=user:buyer-0"},
        {"cookie": "diffusionz_session=user:buyer-0.abc.def"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/service"), ("POST", "/generate"), ("GET", "/api/balance"), ("GET", "/api/jobs")],
)
def test_nobody(server: Running, shop: Shop, headers: Any, method: str, path: str) -> None:
    calls = shop.calls()
    with server.client() as client:
        answer = client.request(method, path, headers=headers, json=PICTURE if method == "POST" else None)
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer" and shop.calls() == calls


def test_what_is_anothers(server: Running, shop: Shop) -> None:
    one, other = shop.buyer(4 * ZIMAGE), shop.buyer(ZIMAGE)
    with one.client(server) as mine, other.client(server) as theirs:
        id = mine.post("/api/jobs", json=SLOW).json()["id"]
        for method, path in (
            ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/result"), ("GET", "/events"),
        ):  # fmt: skip
            problem(theirs.request(method, f"/api/jobs/{id}{path}"), 404, "not-found")
        assert theirs.get("/api/jobs").json()["jobs"] == []
        assert mine.get(f"/api/jobs/{id}").json()["status"] in ("queued", "running")
        mine.delete(f"/api/jobs/{id}")
        for path in ("/api/balance", "/api/billing-history", "/api/deposit", "/api/account"):
            told = problem(theirs.get(path, params={"wallet": "4" * 44}), 403, "forbidden")
            assert told["error"]["param"] == "wallet"
    assert shop.lines(other) == {}


# --- Browsers ---


def test_a_browsers_cookie(dev_server: Running, customer: Callable[..., Customer]) -> None:
    one = customer()
    browser, host = one.browser, dev_server.url
    body = {"name": "second"}
    for headers, status in (
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": host + ".evil.example"}, 403),
        ({}, 403),
        ({"sec-fetch-site": "same-origin"}, 201),
        ({"origin": host}, 201),
    ):
        for path, sent in (("/api/keys", body), ("/api/service", FORECAST)):
            answer = browser.post(path, json=sent, headers=headers)
            if status == 403:
                problem(answer, 403, "forbidden")
            else:  # there is no credit yet
                assert answer.status_code == (201 if path == "/api/keys" else 402), answer.text
    assert len(browser.get("/api/keys").json()["keys"]) == 3
    # Without a body a HEAD is what a GET is.
    assert browser.head("/api/keys").status_code == 200 and browser.head("/api/jobs").status_code == 200


def test_a_key_makes_no_keys(customer: Callable[..., Customer]) -> None:
    one = customer()
    (first,) = one.browser.get("/api/keys").json()["keys"]
    same = {"sec-fetch-site": "same-origin"}
    for method, path in (
        ("GET", "/api/keys"), ("POST", "/api/keys"), ("DELETE", f"/api/keys/{first['id']}"),
        ("PATCH", f"/api/keys/{first['id']}"),
    ):  # fmt: skip
        body = {"daily_limit": 1} if method in ("POST", "PATCH") else None
        problem(one.client.request(method, path, json=body, headers=same), 401, "unauthorized")
    made = one.browser.post("/api/keys", json={"services": ["chronos2"]}, headers=same).json()
    assert made["secret"].startswith("cutedsl_") and "secret" not in str(one.browser.get("/api/keys").json())
    # Another's keys are not there, and a revoked one opens nothing.
    other = customer()
    for method in ("DELETE", "PATCH"):
        body = {"daily_limit": 1} if method == "PATCH" else None
        path = f"/api/keys/{made['id']}"
        problem(other.browser.request(method, path, json=body, headers=same), 404, "not-found")
    assert one.browser.delete(f"/api/keys/{made['id']}", headers=same).json()["revoked_at"]
    with one.server.client(headers={"authorization": f"Bearer {made['secret']}"}) as client:
        problem(client.get("/api/balance"), 401, "unauthorized")
    for body in ({"services": ["nothing"]}, {"daily_limit": -1}, {"name": "x" * 1000}):
        answer = one.browser.post("/api/keys", json=body, headers=same)
        assert answer.status_code in (400, 404), answer.text
    no_traceback(one.server)


def test_signing_out_and_cookies_that_were_touched(customer: Callable[..., Customer]) -> None:
    one = customer()
    value = one.browser.cookies["diffusionz_session"]
    flipped = ("A" if value[0] != "A" else "B") + value[1:]

    with one.server.client() as client:

        def status(cookie: str) -> int:
            return client.get("/api/balance", headers={"cookie": f"diffusionz_session={cookie}"}).status_code

        assert status(value) == 200
        for other in (flipped, value[:-1], value + "A", one.account, "", "%00", "x" * 5000):
            assert status(other) == 401, other
        out = one.browser.post("/api/sign-out")
        assert out.status_code == 200 and "diffusionz_session" not in one.browser.cookies
        problem(one.browser.get("/api/balance"), 401, "unauthorized")
        assert status(value) == 401  # whoever kept a copy has nothing
    assert one.browser.post("/api/sign-out").status_code == 200


def test_signing_in_needs_a_fresh_nonce_and_the_wallets_signature(customer: Callable[..., Customer]) -> None:
    one, other = customer(), customer()

    def challenge() -> dict[str, Any]:
        return dict(one.browser.post("/api/sign-in/challenge", json={"address": one.address}).json())

    def signed(by: Customer, text: str) -> str:
        return base64.b64encode(bytes(by.wallet.sign_message(text.encode()))).decode()

    given = challenge()
    good = {"address": one.address, "nonce": given["nonce"], "signature": signed(one, given["text"])}
    with one.server.client() as client:
        for change in (
            {"signature": signed(other, given["text"])},
            {"signature": signed(one, given["text"] + " ")},
            {"signature": "x"},
            {"nonce": "nothing"},
            {"address": other.address},
        ):
            assert problem(client.post("/api/sign-in", json=good | change), 400, "invalid-request")
            assert "diffusionz_session" not in client.cookies
        # A refusal may have used the nonce up.
        given = challenge()
        good = {"address": one.address, "nonce": given["nonce"], "signature": signed(one, given["text"])}
        answer = client.post("/api/sign-in", json=good)
        assert answer.status_code == 200 and not answer.json()["new"] and answer.json()["api_key"] is None
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        client.cookies.clear()
        problem(client.post("/api/sign-in", json=good), 400, "invalid-request")
        for address in ("", "nothing", "0" * 44, "x" * 10_000):
            problem(client.post("/api/sign-in/challenge", json={"address": address}), 400, "invalid-request")
    no_traceback(one.server)


def test_a_deposit_is_spent_to_the_last_unit(customer: Callable[..., Customer]) -> None:
    one = customer(75)  # tokens: a picture and a forecast
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: one.client.post("/api/service", json=FORECAST).status_code, range(6)))
    assert Counter(answers) == {200: 3, 402: 3} and one.balance()["available"] == 0
    kinds = Counter(line["kind"] for line in one.client.get("/api/billing-history").json()["lines"])
    assert (kinds["hold"], kinds["post"]) == (3, 3)
    for body in ({"address": "nothing", "tokens": 1}, {"address": one.address}, {"address": one.address, "tokens": -1}):
        problem(one.client.post("/api/dev/faucet", json=body), 400, "invalid-request")
    no_traceback(one.server)
