"""The pages as HTTP: what caches may keep, what a hostile Host does, and a page for every type of problem."""

from __future__ import annotations

import gzip
import http.client
import re
import urllib.parse

import pytest

from diffusionz.server.limits import Limits
from diffusionz.server.page import CSP, Context, Pages
from diffusionz.server.problems import KINDS

PAGES = ["/", "/forecast", "/account", "/docs", "/problems/conflict"]


def get(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    where = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_asked_for_anew_and_sent_once(free: str, path: str) -> None:
    status, headers, body = get(free, path)
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-cache" and headers["content-security-policy"] == CSP
    assert headers.get_all("x-content-type-options") == ["nosniff"] and "accept-encoding" in headers["vary"]
    assert get(free, path, if_none_match=headers["etag"])[0] == 304
    status, packed, content = get(free, path, accept_encoding="gzip, br")
    assert packed["content-encoding"] == "gzip" and gzip.decompress(content) == body
    assert packed["etag"] != headers["etag"], "other bytes, another name"
    assert get(free, path, accept_encoding="gzip", if_none_match=packed["etag"])[0] == 304
    status, headers, body = get(free, path, "HEAD")
    assert status == 200 and body == b""


def test_files_are_kept_for_ever_under_their_digest(free: str) -> None:
    _, _, page = get(free, "/")
    files = set(re.findall(r'(?:href|src)="(/static/[^"]+)"', page.decode()))
    assert any(file.endswith(".css") for file in files) and any(file.endswith(".js") for file in files)
    for file in files:
        status, headers, _ = get(free, file)
        assert status == 200 and "immutable" in headers["cache-control"], file
    # A page that is older than the server gets the file all the same, to be asked for again.
    status, headers, _ = get(free, "/static/0123456789abcdef/page.css")
    assert status == 200 and headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    ["/static/x/none.js", "/static/x/..%2f__init__.py", "/static/x/%2e%2e/__init__.py", "/static/x/page.css%00",
     "/static/../page/__init__.py", "/problems/none", "/problems/%3Cscript%3E", "/problems/../draw.html"],
)  # fmt: skip
def test_what_is_not_there_is_not_found(free: str, path: str) -> None:
    status, headers, body = get(free, path)
    assert status == 404 and headers["content-type"] == "application/problem+json"
    assert b"<script>" not in body and b"import" not in body


@pytest.mark.parametrize("type", KINDS)
def test_each_type_of_problem_has_a_page(free: str, type: str) -> None:
    status, _, body = get(free, f"/problems/{type}")
    assert status == 200 and str(KINDS[type].status) in body.decode()


@pytest.mark.parametrize(
    "host", ["$(reboot)", "x';reboot;'", "<script>alert(1)</script>", "not a host", "`id`", "x" * 300]
)
def test_a_host_that_is_none_is_in_no_sample(free: str, host: str) -> None:
    status, _, body = get(free, "/docs", host=host)
    if status == 200:
        assert host not in body.decode() and "curl -s -f http://127.0.0.1:" in body.decode()


def test_a_page_says_the_hosts_name_that_it_was_asked_by(free: str) -> None:
    assert "http://example.org/generate" in get(free, "/docs", host="example.org")[2].decode()
    assert "http://[::1]:8100/generate" in get(free, "/docs", host="[::1]:8100")[2].decode()


def test_models_are_a_choice_when_there_are_several() -> None:
    models = [{"name": name, "family": "zimage", "width": 512, "height": 512} for name in ("first", "<b>second</b>")]
    page = Pages(Context("1.0", Limits(steps=7), models=models)).draw.content.decode()
    assert "<option>first</option><option>&lt;b&gt;second&lt;/b&gt;</option>" in page
    assert 'data-width="512"' in page and 'max="7"' in page
    assert '<select id="model"' not in Pages(Context("1.0", Limits(), models=models[:1])).draw.content.decode()
    assert Pages(Context("1.0", Limits())).draw.content, "nor does it need a model to show itself"


def test_pages_are_read_only(free: str) -> None:
    for path in PAGES:
        if path != "/forecast":  # which is also the API's
            assert get(free, path, "POST")[0] == 405
