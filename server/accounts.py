"""Accounts over HTTP: signing in with a wallet, keys, deposits, prices, balance and history."""

from __future__ import annotations

import binascii
import io
import re
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import msgspec
import segno
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusionz.server.caller import COOKIE, Caller
from diffusionz.server.calls import check_wallet, json_body, json_response, state_of
from diffusionz.server.decoding import decode
from diffusionz.server.problems import Problem, invalid

if TYPE_CHECKING:
    from diffusionz.payments.keys import Key
    from diffusionz.server.credits import Credits

HISTORY_MAX = 1000  # lines of one answer
_BASE58 = re.compile(r"[1-9A-HJ-NP-Za-km-z]{64,90}")


class Address(msgspec.Struct, forbid_unknown_fields=True):
    address: str


class Signed(msgspec.Struct, forbid_unknown_fields=True):
    address: str
    nonce: str
    signature: str


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""
    services: list[str] | None = None
    daily_limit: int | None = None


class ChangedKey(msgspec.Struct, forbid_unknown_fields=True):
    daily_limit: int | None


class Faucet(msgspec.Struct, forbid_unknown_fields=True):
    address: str
    tokens: str | int | float | None = None
    sol: str | int | float | None = None


def _credits(request: Request) -> Credits:
    """The ledger. Raises Problem where nothing costs anything."""
    credits = state_of(request).credits
    if credits is None:
        raise Problem("not-found", "this server keeps no credit: its calls are free")
    return credits


async def _caller(request: Request) -> tuple[Credits, Caller]:
    """The ledger and whose account is meant: the caller's, which a `wallet` in the query must belong to."""
    credits = _credits(request)
    caller = await state_of(request).callers.caller(request)
    await check_wallet(request, caller, request.query_params.get("wallet"), "wallet")
    return credits, caller


async def _owner(request: Request) -> tuple[Credits, Caller]:
    """The same for what only the owner may do, in the browser that signed in: a key makes no keys."""
    credits = _credits(request)
    owner = await state_of(request).callers.owner(request)
    if owner is None:
        raise Problem("unauthorized", "sign in with a wallet first, at /account; a key is not enough for this")
    return credits, owner


async def pricing(request: Request) -> Response:
    """GET /api/pricing, for anybody"""
    state = state_of(request)
    if state.credits is None:
        free = [{"name": name, "usd": "0", "tokens": 0} for name in state.services]
        return json_response({"free": True, "services": free, "token": None, "rates": None})
    prices = await state.credits.pricing()
    for_sale = [service for service in prices["services"] if service["name"] in state.services]
    return json_response({"free": False} | prices | {"services": for_sale})


async def balance(request: Request) -> Response:
    """GET /api/balance"""
    credits, caller = await _caller(request)
    return json_response(await credits.balance(caller.account))


async def history(request: Request) -> Response:
    """GET /api/billing-history"""
    credits, caller = await _caller(request)
    limit = _whole(request, "limit", 100, HISTORY_MAX)
    before = _whole(request, "before", None, 2**62)
    lines = await credits.history(caller.account, limit or 1, before)
    return json_response({"lines": lines, "next_before": lines[-1]["seq"] if len(lines) == limit else None})


def _whole(request: Request, name: str, default: int | None, most: int) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 19 or not 1 <= int(text) <= most:
        raise invalid(f"{name} is {text[:40]!r}; it must be a whole number from 1 to {most}", param=name)
    return int(text)


async def deposit(request: Request) -> Response:
    """GET /api/deposit"""
    credits, caller = await _caller(request)
    return json_response(await credits.deposit_address(caller.account))


async def deposit_code(request: Request) -> Response:
    """GET /api/deposit/qr.svg: a Solana Pay transfer request of the address, which wallets scan."""
    credits, caller = await _caller(request)
    about = await credits.deposit_address(caller.account)
    code, out = segno.make(f"solana:{about['address']}?spl-token={about['mint']}", micro=False), io.BytesIO()
    code.save(out, kind="svg", scale=4, border=2, dark="#000", light="#fff", xmldecl=False, title="Deposit address")
    return Response(out.getvalue(), headers={"cache-control": "no-store"}, media_type="image/svg+xml")


# --- Signing in ---


async def challenge(request: Request) -> Response:
    """POST /api/sign-in/challenge"""
    asked = decode(await json_body(request), Address)
    client = request.client.host if request.client else ""
    given = await _checked(_credits(request).challenge(asked.address, client), "address")
    return json_response({"nonce": given.nonce, "text": given.text, "input": given.sign_in_input()})


async def sign_in(request: Request) -> Response:
    """POST /api/sign-in"""
    from diffusionz.payments.sessions import SESSION_S

    credits = _credits(request)
    asked = decode(await json_body(request), Signed)
    signed = await _checked(credits.sign_in(asked.address, asked.nonce, _signature(asked.signature)), "signature")
    key = (await credits.create_key(signed.account, name="first")).secret if signed.new else None
    about = {"account": signed.account, "address": signed.address, "new": signed.new, "api_key": key}
    response = json_response(about, headers={"cache-control": "no-store"})
    secure = request.url.scheme == "https" or state_of(request).settings.https
    response.set_cookie(
        COOKIE,
        await credits.open_session(signed.account),
        max_age=SESSION_S,
        httponly=True,
        samesite="strict",
        secure=secure,
    )
    return response


async def _checked(work: Any, param: str) -> Any:
    """What signing in says of a wallet or a signature is about the request, not about a key. Raises Problem."""
    from diffusionz.payments.errors import IdentityError

    try:
        return await work
    except IdentityError as error:
        raise invalid(str(error), param=param) from None


def _signature(text: str) -> str | bytes:
    """In base58, as wallets show it, or in base64, as browsers make it."""
    if _BASE58.fullmatch(text) and len(text) != 88:
        return text
    try:
        data = binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (ValueError, UnicodeEncodeError):
        return text
    return data if len(data) == 64 else text


async def sign_out(request: Request) -> Response:
    """POST /api/sign-out"""
    cookie, credits = request.cookies.get(COOKIE), state_of(request).credits
    if cookie is not None and credits is not None:
        await credits.close_session(cookie)
    response = json_response({})
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


async def account(request: Request) -> Response:
    """GET /api/account"""
    credits, caller = await _caller(request)
    return json_response({"account": caller.account, "wallets": await credits.wallets(caller.account)})


# --- Keys ---


async def keys(request: Request) -> Response:
    """GET and POST /api/keys"""
    credits, owner = await _owner(request)
    if request.method != "POST":  # HEAD is a GET, too
        return json_response({"keys": [_shown(key) for key in await credits.keys(owner.account)]})
    asked = decode(await json_body(request), NewKey)
    made = await credits.create_key(owner.account, asked.name, asked.services, asked.daily_limit)
    return json_response(_shown(made.key) | {"secret": made.secret}, 201, {"cache-control": "no-store"})


async def key(request: Request) -> Response:
    """DELETE and PATCH /api/keys/{id}"""
    credits, owner = await _owner(request)
    id = request.path_params["id"]
    if request.method == "DELETE":
        return json_response(_shown(await credits.revoke_key(owner.account, id)))
    asked = decode(await json_body(request), ChangedKey)
    return json_response(_shown(await credits.set_daily_limit(owner.account, id, asked.daily_limit)))


def _shown(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "shown": key.shown,
        "name": key.name,
        "services": key.services,
        "daily_limit": key.daily_limit,
        "created_at": key.created_at,
        "used_at": key.used_at,
        "revoked_at": key.revoked_at,
    }


# --- A dev chain ---


async def faucet(request: Request) -> Response:
    """POST /api/dev/faucet"""
    state = state_of(request)
    if state.ledger is None or state.ledger.faucet is None:
        raise Problem("not-found", "there is a faucet on dev chains alone")
    asked = decode(await json_body(request), Faucet)
    from diffusionz.payments.errors import AddressError

    tokens, sol = _amount("tokens", asked.tokens), _amount("sol", asked.sol)
    try:
        return json_response(await state.ledger.faucet(asked.address, tokens=tokens, sol=sol))
    except AddressError as error:  # elsewhere it means that the shop has none left
        raise invalid(str(error), param="address") from None


def _amount(name: str, value: str | float | None) -> Decimal | None:
    if value is None:
        return None
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or not 0 <= amount <= 10**9:
        raise invalid(f"{name} is {str(value)[:40]!r}; it must be a number from 0 to 10^9", param=name)
    return amount


def routes() -> list[Route]:
    return [
        Route("/api/pricing", pricing),
        Route("/api/balance", balance),
        Route("/api/billing-history", history),
        Route("/api/deposit", deposit),
        Route("/api/deposit/qr.svg", deposit_code),
        Route("/api/sign-in/challenge", challenge, methods=["POST"]),
        Route("/api/sign-in", sign_in, methods=["POST"]),
        Route("/api/sign-out", sign_out, methods=["POST"]),
        Route("/api/account", account),
        Route("/api/keys", keys, methods=["GET", "POST"]),
        Route("/api/keys/{id}", key, methods=["DELETE", "PATCH"]),
        Route("/api/dev/faucet", faucet, methods=["POST"]),
    ]
