"""What the client makes of bytes, headers, numbers and problems, without a server."""

from __future__ import annotations

import ast
import email.utils
import math
import pathlib
import pickle
import re
import time
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionz import _client_core as core
from diffusionz import _client_errors as errors
from diffusionz.client import ApiError, ArgumentError, Cancelled, Client, InvalidRequest

ROOT = pathlib.Path(__file__).resolve().parents[2]


# --- Events ---

STREAM = (
    "\ufeff: a comment\n\nevent: job.queued\ndata: {}\n\n"
    "id: 7\nevent: job.progress\ndata:one\ndata: two: three\nretry: 10\nunknown\n\n"
    "event: nothing\n\ndata: Zürich 東京\n\nid:\ndata: last\n\ndata: never finished\n"
)
EVENTS = [
    ("job.queued", "{}", None),
    ("job.progress", "one\ntwo: three", "7"),
    ("message", "Zürich 東京", "7"),
    ("message", "last", ""),
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_come_in_any_pieces(end: str, size: int) -> None:
    data = STREAM.replace("\n", end).encode()
    parser = core.EventParser()
    assert [event for at in range(0, len(data), size) for event in parser.feed(data[at : at + size])] == EVENTS


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_bytes_upset_the_parser(data: bytes, size: int) -> None:
    whole, parts = core.EventParser(), core.EventParser()
    cut = [event for at in range(0, len(data), size) for event in parts.feed(data[at : at + size])]
    assert cut == whole.feed(data)


def test_a_large_event_is_read_in_linear_time() -> None:
    parser, began = core.EventParser(), time.process_time()
    parser.feed(b"data: ")
    for _ in range(2000):
        parser.feed(b"x" * 10_000)
    assert len(parser.feed(b"\n\n")[0][1]) == 20_000_000
    assert time.process_time() - began < 2


# --- Waiting ---


def test_retry_after_is_seconds_or_a_date() -> None:
    assert core.retry_after({"retry-after": "3"}) == 3
    assert core.retry_after({"retry-after": "0.5"}) == 0.5
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert core.retry_after({"retry-after": date}) == pytest.approx(20, abs=2)
    # A server whose clock is wrong means its own clock.
    server = {"date": "Tue, 01 Jan 2019 00:00:00 GMT", "retry-after": "Tue, 01 Jan 2019 00:00:07 GMT"}
    assert core.retry_after(server) == 7
    assert core.retry_after({"retry-after": "Tue, 01 Jan 2019 00:00:00 GMT"}) == 0
    for nonsense in ("", "soon", "-1", "1e99", "9" * 40, "Tue, 99 Foo 2019"):
        assert core.retry_after({"retry-after": nonsense}) is None


def test_pauses_grow_and_end() -> None:
    config = core.Config("http://h", None, 1, 5)
    for attempt, most in enumerate([0.25, 0.5, 1, 2, 4, 8, 8, 8]):
        pauses = {config.pause(attempt) for _ in range(20)}
        assert len(pauses) > 1  # not all clients at once
        assert all(most / 2 <= pause <= most for pause in pauses if pause)
    asked = config.pause(0, core.Reply(429, {"retry-after": "7"}))
    assert asked and 7 <= asked <= 8
    assert config.pause(0, core.Reply(429, {"retry-after": "3600"})) is None


# --- Whom the key is for ---


@pytest.mark.parametrize(
    ("base", "url", "ours"),
    [
        ("https://a.example", "/api/ps", True),
        ("https://a.example", "https://a.example:443/x", True),
        ("https://a.example", "https://A.example/x", True),
        ("https://a.example/below", "/api/ps", True),
        ("https://a.example", "http://a.example/x", False),
        ("https://a.example", "https://a.example:444/x", False),
        ("https://a.example", "https://a.example.evil.example/x", False),
        ("https://a.example", "https://a.example@evil.example/x", False),
        ("https://a.example", "https://evil.example/https://a.example", False),
    ],
)
def test_the_key_is_for_the_server_alone(base: str, url: str, ours: bool) -> None:
    request = core.Config(base, "secret", 1, 0).request("GET", url)
    assert ("Authorization" in request.headers) == ours
    assert "secret" not in repr(request)


@pytest.mark.parametrize("url", ["//evil.example/x", "file:///etc/passwd", "x", "", "http://[", "javascript:alert(1)"])
def test_what_is_no_url_is_not_asked(url: str) -> None:
    with pytest.raises(core.UnexpectedAnswer, match="cannot be asked"):
        core.Config("http://a", "secret", 1, 0).request("GET", url)


def test_where_and_who(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSIONZ_URL", raising=False)
    monkeypatch.delenv("DIFFUSIONZ_API_KEY", raising=False)
    config = core.Config(None, None, 1, 0)
    assert config.base_url == "http://127.0.0.1:8100"
    assert "Authorization" not in config.request("GET", "/").headers
    monkeypatch.setenv("DIFFUSIONZ_URL", "https://there.example/")
    monkeypatch.setenv("DIFFUSIONZ_API_KEY", " from-the-environment\n")
    request = core.Config(None, None, 1, 0).request("GET", "/x")
    assert request.url == "https://there.example/x"
    assert request.headers["Authorization"] == "Bearer from-the-environment"
    assert core.Config(None, "mine", 1, 0).request("GET", "/x").headers["Authorization"] == "Bearer mine"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "localhost:8100"}, "base_url"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://h:port"}, "base_url"),
        ({"base_url": "http://h/?a=b"}, "base_url"),
        ({"base_url": "http://secret:word@h"}, "user name"),
        ({"base_url": "http://you:secret@h:port"}, "user name"),
        ({"api_key": "secret\r\nX-Evil: 1"}, "api_key"),
        ({"api_key": "secret ключ"}, "api_key"),
        ({"api_key": "  "}, "api_key"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": math.nan}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
    ],
)
def test_a_client_of_nonsense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        Client(**{"base_url": "http://h"} | fields)
    assert "secret" not in str(caught.value)


# --- Numbers ---


def test_whatever_holds_numbers_is_taken() -> None:
    import datetime
    import decimal
    import fractions

    import pandas
    import polars

    expected = [1.0, None, 3.5]
    for values in (
        [1, math.nan, 3.5],
        (1, None, 3.5),
        (x for x in [1, None, 3.5]),
        numpy.array([1, math.nan, 3.5]),
        numpy.array([1, math.nan, 3.5], numpy.float32),
        [numpy.float32(1), numpy.float64("nan"), numpy.float16(3.5)],
        pandas.Series([1, None, 3.5]),
        pandas.Series([1, pandas.NA, 3.5], dtype="Float64"),
        pandas.Series([1, None, 3.5], dtype=object),
        pandas.DataFrame({"close": [1, None, 3.5]})["close"],
        polars.Series([1.0, None, 3.5]),
        [decimal.Decimal(1), decimal.Decimal("NaN"), fractions.Fraction(7, 2)],
    ):
        assert core.numbers("values", values) == expected
    assert core.numbers("values", numpy.arange(3)) == [0, 1, 2]
    assert core.numbers("values", [True, numpy.int8(2), pandas.NaT]) == [1, 2, None]
    for nested in ([[1, 2], [3, None]], numpy.array([[1, 2], [3, math.nan]]), [numpy.array([1, 2]), (3, math.nan)]):
        assert core.numbers("values", nested, nested=True) == [[1, 2], [3, None]]
    for wrong, message in (
        ("123", "values is a str"),
        (b"123", "values is a bytes"),
        ({"a": 1}, "values is a dict"),
        (5, "values is a int"),
        (numpy.float64(5), "values is a float64"),
        (numpy.array(5), "a single number"),
        (pandas.DataFrame({"close": [1.0]}), r"frame\['close'\]"),
        (["1"], r"values\[0\] is '1'"),
        ([1, math.inf], r"values\[1\] is inf"),
        ([1, -numpy.float32("inf")], r"values\[1\] is -inf"),
        ([datetime.date(2026, 1, 1)], r"values\[0\] is datetime.date"),
        ([1j], r"values\[0\] is 1j"),
        ([10**400 * decimal.Decimal(1)], r"values\[0\]"),
        ([[1, "x"]], r"values\[0\]\[1\] is 'x'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            core.numbers("values", wrong, nested=True)
    with pytest.raises(ArgumentError, match=r"series\[1\]\[0\] is \[3\]"):
        core._series([[1], [[3]]])


def test_a_picture_to_start_from(tmp_path: pathlib.Path) -> None:
    import base64
    import io

    from PIL import Image

    png = io.BytesIO()
    picture = Image.new("RGB", (2, 2), "red")
    picture.save(png, "PNG")
    (tmp_path / "a.png").write_bytes(png.getvalue())
    expected = base64.b64encode(png.getvalue()).decode()
    for image in (png.getvalue(), bytearray(png.getvalue()), tmp_path / "a.png", str(tmp_path / "a.png"), picture):
        assert core.picture_text(image) == expected
    assert core.picture_text("data:image/png;base64,AA==") == "data:image/png;base64,AA=="
    with pytest.raises(FileNotFoundError):
        core.picture_text(tmp_path / "none.png")
    for wrong in ("https://evil.example/a.png", 5, [1], object()):
        with pytest.raises(ArgumentError, match="image is a"):
            core.picture_text(wrong)


def test_what_json_cannot_say_is_refused() -> None:
    for fields in ({"steps": math.nan}, {"prompt": "\ud800"}, {"x": object()}, {"x": {1, 2}}):
        with pytest.raises(ArgumentError, match="JSON"):
            core.encode(fields)


def test_keys_of_repeated_calls_are_the_same_again() -> None:
    assert core.renewed("a") == "a~1"
    assert core.renewed("a~1") == "a~2"
    assert core.renewed("a~9") == "a~10"
    assert core.renewed("~x") == "~x~1"
    assert core.call_of("x", {}).key != core.call_of("x", {}).key
    for wrong in ("", "a b", "ä", "x" * 201, 5):
        with pytest.raises(ArgumentError, match="idempotency_key"):
            core.call_of("x", {"idempotency_key": wrong})


# --- Problems ---


def test_every_problem_of_the_documentation_is_one_class() -> None:
    text = (ROOT / "docs" / "http.md").read_text().partition("| status | type |")[2].partition("\n\n")[0]
    documented = {
        kind: [int(status) for status in row.split("|")[1].split(",")]
        for row in text.splitlines()[2:]
        for kind in re.findall(r"`([a-z-]+)`", row.split("|")[2])
    }
    assert documented
    for kind, statuses in documented.items():
        if kind == "cancelled":
            continue
        assert kind in errors.BY_TYPE, kind
        for status in statuses:
            error = errors.error_of({"type": f"/problems/{kind}", "detail": "it is so"}, status=status)
            assert type(error) is errors.BY_TYPE[kind]
            # A server of another version, whose type is not known, is still understood by the status.
            fallback = errors.BY_STATUS.get(status, errors.ServerError if status >= 500 else ApiError)
            assert issubclass(errors.BY_TYPE[kind], fallback) or kind == "idempotency-mismatch"


def test_the_servers_table_is_this_one() -> None:
    """Read from the source, so that the server's packages need not be there."""
    tree = ast.parse((ROOT / "server" / "problems.py").read_text())
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "KINDS")  # type: ignore[attr-defined]
    assert isinstance(table, ast.Dict)
    kinds = {key.value for key in table.keys if isinstance(key, ast.Constant)}
    assert kinds - {"cancelled"} == errors.BY_TYPE.keys()
    assert type(errors.error_of({"type": "/problems/cancelled", "detail": "x"}, status=409)) is Cancelled


def test_errors_are_one_tree_and_say_what_to_do() -> None:
    import diffusionz.client

    for kind in errors.PUBLIC:
        assert issubclass(kind, diffusionz.DiffusionzError)
        assert kind.__module__ == "diffusionz.client"
        assert getattr(diffusionz.client, kind.__name__) is kind
        assert kind.__name__ in str(errors.__doc__)
    problem = {
        "type": "/problems/insufficient-credit", "status": 402, "detail": "1 image costs 50", "instance": "req-9",
        "available": 12, "needed": 50, "deposit_url": "https://h/api/deposit", "error": {"param": None},
    }  # fmt: skip
    error = errors.error_of(problem)
    assert isinstance(error, errors.InsufficientCredit)
    assert (error.available, error.needed, error.deposit_url) == (12, 50, "https://h/api/deposit")
    assert str(error) == (
        "1 image costs 50. Deposit more: https://h/api/deposit [402 insufficient-credit, request req-9]"
    )
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.needed) == (str(error), 50)
    wrong = errors.error_of({"detail": "must be 16 or more", "error": {"param": "width"}}, status=400)
    assert isinstance(wrong, ValueError)
    assert str(wrong) == "width: must be 16 or more [400]"
    assert "Ask again in 5 seconds" in str(errors.error_of({"type": "queue-full"}, status=429, retry_after=5))
    assert "DIFFUSIONZ_API_KEY" in str(errors.error_of({}, status=401))


@pytest.mark.parametrize(
    "problem",
    [
        {},
        {"type": 5, "detail": [], "error": "no"},
        {"type": None, "error": {"message": 5, "param": {}}},
        {"status": "x"},
    ],
)
def test_problems_of_any_shape_are_errors(problem: dict[str, Any]) -> None:
    assert isinstance(errors.error_of(problem), errors.ServerError)
    assert type(errors.error_of(problem, status=418)) is ApiError
    assert type(errors.error_of({"type": "/problems/of-tomorrow"}, status=400)) is InvalidRequest
    assert str(errors.error_of(problem))
