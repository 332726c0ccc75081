"""What is wrong is refused by its name, before anything is held, and does the server no harm."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pathlib
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from diffusionz.server.limits import Limits
from tests.server.conftest import Running, Start
from tests.server.shops import ZIMAGE, Buyer, Shop, devnet, no_traceback

BODY_BYTES, BODY_S, HEAD_S = 2_000_000, 1.0, 4.0


@pytest.fixture(scope="module")
def sold(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Shop, Buyer]]:
    """A server that sells. Of all that is asked here nothing is held, and it is as large afterwards as before."""
    folder = tmp_path_factory.mktemp("malformed")
    config = folder / "server.toml"
    config.write_text(f"[limits]\nbody_bytes = {BODY_BYTES}\n")
    with devnet(folder) as url:
        shop = Shop(folder / "shop", url)
        buyer = shop.buyer(1000 * ZIMAGE)
        with shop.serving(start, "--config", str(config)) as server:
            yield server, shop, buyer
            no_traceback(server)
            with buyer.client(server) as client:
                assert client.get("/healthz").status_code == 200
                assert client.post("/forecast", json={"values": [1, 2, 3]}).status_code == 200
            assert shop.lines(buyer) == {"hold": 1, "post": 1}
        shop.audit("--offline")


@pytest.fixture(scope="module")
def hurried(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that gives requests little time to arrive: on a busy machine, where those of other tests may be late,
    too little for them."""
    config = tmp_path_factory.mktemp("hurried") / "server.toml"
    config.write_text(f"[limits]\nbody_s = {BODY_S}\nhead_s = {HEAD_S}\n")
    with start("--free", "--config", str(config)) as server:
        yield server
        no_traceback(server)


@pytest.fixture
def client(sold: tuple[Running, Shop, Buyer]) -> Iterator[httpx2.Client]:
    server, _, buyer = sold
    with buyer.client(server) as client:
        yield client


def refused(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer that is a problem as the contract has it."""
    assert answer.status_code == status, answer.text[:1000]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(answer.content) < 4000, "what is wrong is not sent back in full"
    body = answer.json()
    assert body["status"] == status and body["instance"] == answer.headers["x-request-id"]
    assert body["error"]["message"] == body["detail"] and "Traceback" not in body["detail"]
    return dict(body["error"])


# --- Bodies that are no JSON, or not of the kind ---

PICTURE, FORECAST = b'{"service":"zimage","prompt":"x"', b'{"service":"chronos2","values":[1,2,3]'
NOT_JSON = {
    "nothing": b"",
    "spaces": b"  \n ",
    "cut off": b'{"service":"zimage","prompt":"x',
    "a comma too many": PICTURE + b",}",
    "two values": PICTURE + b"}{}",
    "single quotes": b"{'service':'zimage'}",
    "a comment": PICTURE + b"/* */}",
    "NaN": b'{"service":"chronos2","values":[1,NaN]}',
    "Infinity": b'{"service":"chronos2","values":[Infinity]}',
    "-Infinity": b'{"service":"chronos2","values":[-Infinity]}',
    "NaN of a field": PICTURE + b',"guidance":NaN}',
    "not UTF-8": b'{"service":"zimage","prompt":"\xff\xfe"}',
    "overlong UTF-8": b'{"service":"zimage","prompt":"\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"service":"zimage","prompt":"\xed\xa0\x80"}',
    "half a surrogate pair": b'{"service":"zimage","prompt":"\\ud800"}',
    "a line break in a string": b'{"service":"zimage","prompt":"a\nb"}',
    "UTF-16": '{"service":"zimage","prompt":"x"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + PICTURE + b"}",
    "deep arrays": PICTURE + b',"a":' + b"[" * 100_000,
    "deep arrays, closed": PICTURE + b',"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(1000),
    "an array": b'[{"service":"zimage"}]',
    "a string": b'"zimage"',
    "null": b"null",
    "a number": b"1e5",
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("path", ["/api/service", "/api/jobs", "/generate", "/forecast", "/forecast_batch"])
def test_not_json(client: httpx2.Client, path: str, body: bytes) -> None:
    refused(client.post(path, content=body, headers={"content-type": "application/json"}))


NINES, MORE = b"9" * 30, b"9" * 5000  # beyond 64 bits, and beyond what Python turns into an int
OF_PICTURES: dict[str, list[bytes]] = {
    "service": [b"1", b"[]", b"{}", b"true"],
    "prompt": [b"1", b"null", b"[]", b"{}", b"true", b'"a\\u0000b"', b'"' + b"x" * 1_000_000 + b'"'],
    "negative_prompt": [b"1", b"[]", b'"\\u0000"', b'"' + b"x" * 4001 + b'"'],
    "width": [b"17", b"0", b"-16", b"8", b"4112", b"16.0", b"1e3", b'"256"', b"[256]", b"true", NINES, MORE],
    "height": [b"17", b"0", b"100000", b"1600000000000", NINES, MORE],
    "steps": [b"0", b"-1", b"51", b"1.5", b'"8"', b"null", NINES, MORE],
    "seed": [b"-1", b"1.5", b"9007199254740992", b'"7"', NINES, MORE],
    "guidance": [b"-0.1", b"100.1", b"1e400", b'"7"', b"true", b"[]"],
    "n": [b"0", b"-1", b"5", b"1.0", b'"1"', b"null", b"true", NINES, MORE, b"1" + b"0" * 400],
    "image": [b"1", b"[]", b'""', b'"a"', b'"aGVsbG8="', b'"\\u00e9"', b'"data:"', b'"data:image/png;base64,"'],
    "strength": [b"0", b"1.01", b"-1", b'"x"'],
    "format": [b'"gif"', b"1", b'"WEBP"', b"null"],
    "quality": [b"-1", b"101", b"1.5"],
    "response_format": [b'"xml"', b"1", b"null"],
    "partial_images": [b"-1", b"9", b"true"],
    "model": [b"1", b"[]", b'"' + b"a" * 201 + b'"'],
    "keep_alive": [b"true", b"[]", b"{}", b'""', b'"10 m"', b'"soon"', b"1e400", MORE, b'"' + b"1m" * 50_000 + b'"'],
    "wallet_address": [b"1", b'"' + b"a" * 65 + b'"'],
    "stream": [b"1", b'"true"', b"null"],
    "background": [b"1", b'"true"', b"null"],
    "widht": [b"256"],
    "__class__": [b'"x"'],
}
OF_FORECASTS: dict[str, list[bytes]] = {
    "values": [
        b"[]", b"[null]", b"[[]]", b"[[1],[1,2]]", b"[1,[2]]", b'["1"]', b"[true]", b"{}", b"1", b'"x"', b"[[[1]]]",
        b"[1e39]", b"[1e400]", b"[" + MORE + b"]", b"[" + b"[1]," * 1100 + b"[1]]", b"[[1],[null]]",
    ],
    "prediction_length": [b"0", b"-1", b"1025", b"1.5", b'"16"', b"null", NINES, MORE],
    "quantile_levels": [
        b"[]", b"[0]", b"[1]", b"[2]", b"[-0.5]", b"[0.5,0.1]", b"[0.5,0.5]", b"[null]", b'["0.5"]', b"0.5",
        b"[" + b",".join(b"%.4f" % (i / 1000) for i in range(1, 110)) + b"]",
    ],
    "past_covariates": [b"[]", b'{"a":[1]}', b'{"a":null}', b'{"a":["1"]}', b'{"a":[1e39,1,2]}', b"1"],
    "future_covariates": [b'{"a":[1]}', b"[]", b"1"],
    "context_length": [b"0", b"-1", b"1.5", NINES, MORE],
    "monotone": [b"1", b'"true"', b"null"],
    "constrain_ohlc": [b"true", b"1"],
    "returns": [b"1"],
    "trend": [b"1"],
    "series": [b"[]", b"[[]]", b"[[null]]", b"[1]", b"null", b"{}", b'[["1"]]'],
    "horizon": [b"1"],
}  # fmt: skip


@pytest.mark.parametrize("field", OF_PICTURES)
def test_a_field_of_a_picture(client: httpx2.Client, field: str) -> None:
    for value in OF_PICTURES[field]:
        # A key that comes twice has its last value, here and everywhere else it is read.
        body = PICTURE + b',"' + field.encode() + b'":' + value + b"}"
        answer = client.post("/api/service", content=body, headers={"content-type": "application/json"})
        assert refused(answer)["param"] == field, (value[:40], answer.text)


@pytest.mark.parametrize("field", OF_FORECASTS)
def test_a_field_of_a_forecast(client: httpx2.Client, field: str) -> None:
    for value in OF_FORECASTS[field]:
        begin = FORECAST if field not in ("values", "series") else b'{"service":"chronos2"'
        body = begin + b',"' + field.encode() + b'":' + value + b"}"
        answer = client.post("/api/service", content=body, headers={"content-type": "application/json"})
        param = refused(answer)["param"]
        # Within lists and tables the place is told, too; and rows are counted under one name.
        assert param and (param.startswith(field) or param == "series"), (value[:40], answer.text)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "service"),
        ({"service": None}, 400, "service"),
        ({"service": "nothing"}, 404, "service"),
        ({"service": "z" * 1_000_000}, 404, "service"),
        ({"service": "../zimage"}, 404, "service"),
        ({"service": "zimage"}, 400, "prompt"),
        ({"service": "chronos2"}, 400, "values"),
        ({"service": "zimage", "prompt": "x", "model": "nothing"}, 404, "model"),
        ({"service": "zimage", "prompt": "x", "model": "../../etc/passwd"}, 404, "model"),
        ({"service": "chronos2", "values": [1], "model": "zimage-demo"}, 404, "model"),
        ({"service": "zimage", "prompt": "x", "width": 4096, "height": 4096}, 400, "width"),
        ({"service": "zimage", "prompt": "x", "n": 2, "response_format": "binary"}, 400, "n"),
        ({"service": "zimage", "prompt": "x", "wallet_address": "1" * 32}, 403, "wallet_address"),
        ({"service": "chronos2", "values": [1], "series": [[1]]}, 400, "values"),
    ],
)
def test_what_does_not_fit_together(client: httpx2.Client, body: Any, status: int, param: str) -> None:
    assert refused(client.post("/api/service", json=body), status)["param"] == param


# --- Sizes, times and types of bodies ---


def raw(server: Running, *parts: bytes, pause_s: float = 0.0, patience_s: float = 20.0) -> bytes:
    """What comes back for these bytes until the server closes, or has nothing more to say for a second."""
    host, _, port = server.url.rpartition("/")[2].partition(":")
    out = b""
    with socket.create_connection((host, int(port)), patience_s) as line, contextlib.suppress(OSError):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                line.sendall(part)
                if pause_s:
                    time.sleep(pause_s)
        line.settimeout(patience_s)
        while data := line.recv(65536):
            out += data
            line.settimeout(1.0)
    return out


def head(key: str, *lines: str, path: str = "/api/service") -> bytes:
    about = [f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {key}", "content-type: application/json"]
    return "\r\n".join([*about, *lines, "", ""]).encode()


def test_heads_that_do_not_end(hurried: Running) -> None:
    """Nothing at all, a byte now and then, or without end; as the first of a connection, and after a request on it."""
    server = hurried
    whole = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    began = time.monotonic()
    assert raw(server) == b""
    assert HEAD_S <= time.monotonic() - began < Limits().head_s  # which holds where nothing is set
    line = b"GET /healthz HTTP/1.1\r\n"
    for before in ([], [whole]):
        began = time.monotonic()
        answer = raw(server, *before, line, *[b"x"] * 30, pause_s=0.2)
        assert answer.count(b"HTTP/1.1 200") == answer.count(b"HTTP/1.1") == len(before), answer
        # Its size, in pieces that are read one by one.
        header = b"x-long: " + b"a" * 8000 + b"\r\n"
        answer = raw(server, *before, line, *[header] * 30, pause_s=0.02)
        assert answer.count(b"HTTP/1.1 400") == 1 or len(answer) < 300, answer
    # Slow, and in time.
    answer = raw(server, line, b"host: x\r\n", b"\r\n", pause_s=HEAD_S / 16)
    assert answer.startswith(b"HTTP/1.1 200"), answer


def test_bodies_that_are_too_large(sold: tuple[Running, Shop, Buyer]) -> None:
    server, _, buyer = sold
    much = BODY_BYTES + 1

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 100_000

    with buyer.client(server) as client:
        json_type = {"content-type": "application/json"}
        for path in ("/api/service", "/forecast", "/api/jobs", "/api/sign-in", "/generate"):
            refused(client.post(path, content=b"x" * much, headers=json_type), 413)
            # It may close while we write.
            with contextlib.suppress(httpx2.WriteError, httpx2.ReadError, httpx2.RemoteProtocolError):
                refused(client.post(path, content=chunks(), headers=json_type), 413)
    # Said, and never sent: it is not waited for.
    began = time.monotonic()
    for length in (much, 10**18):
        assert b" 413 " in raw(server, head(buyer.key, f"content-length: {length}"))
    # Chunked, without end: cut off at the limit.
    answer = raw(server, head(buyer.key, "transfer-encoding: chunked"), *[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 64)
    assert answer == b"" or b" 413 " in answer
    assert time.monotonic() - began < 15
    assert b"HTTP/1.1 400" in raw(server, head(buyer.key, "content-length: " + "9" * 5000))


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_trickle(hurried: Running, chunked: bool) -> None:
    framing, piece = ("transfer-encoding: chunked", b"1\r\n{\r\n") if chunked else ("content-length: 1000", b"{")
    began = time.monotonic()
    answer = raw(hurried, head("none", framing), *[piece] * 15, pause_s=0.2)
    assert b" 413 " in answer and b"did not arrive within" in answer
    assert b"connection: close" in answer.lower()
    assert time.monotonic() - began < Limits().body_s  # which holds where nothing is set
    assert b" 413 " in raw(hurried, head("none", framing))  # nothing comes at all


def test_types_of_bodies(client: httpx2.Client) -> None:
    good = json.dumps({"values": [1, 2, 3]}).encode()
    for kind in (
        "text/plain", "text/html", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
        "application/octet-stream", "image/png", "application/json-seq", "x" * 5000, "application/xml",
    ):  # fmt: skip
        refused(client.post("/forecast", content=good, headers={"content-type": kind}), 415)
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/ld+json"):
        answer = client.post("/forecast", content=b"{", headers={"content-type": kind})
        refused(answer, 400)


# --- Pictures ---


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """A PNG of this size, all black; or one that claims it, with other data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    if data is None:
        data = zlib.compress((b"\0" + bytes(3 * width)) * height, 9)
    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def webp(kind: bytes, width: int, height: int, more: bytes = b"") -> bytes:
    """The beginning of a WebP that claims this size."""
    content = {
        b"VP8 ": lambda: b"\x30\x01\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(20),
        b"VP8L": lambda: b"\x2f" + struct.pack("<I", width - 1 | (height - 1) << 14) + bytes(20),
        b"VP8X": lambda: bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
    }[kind]()
    chunks = kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) + more
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


BOMBS = {
    "a PNG that claims 16000²": png(16000, 16000, b""),
    "a PNG that claims 2^31-1": png(2**31 - 1, 2**31 - 1, b""),
    "a PNG of 0 pixels": png(0, 16, b""),
    "a PNG, 50,000 wide": png(50_000, 16),
    "a PNG, 50,000 high": png(16, 50_000),
    "a PNG that unpacks to more": png(16, 16, zlib.compress(bytes(10**8), 9)),
    "a WebP that claims 16000²": webp(b"VP8 ", 16000, 16000),
    "a lossless WebP that claims 16000²": webp(b"VP8L", 16000, 16000),
    "an extended WebP that claims 2^24": webp(b"VP8X", 2**24, 2**24),
    "a WebP that says small and is large": webp(b"VP8X", 16, 16, webp(b"VP8L", 16000, 16000)[12:]),
    "a WebP without a picture": webp(b"VP8X", 16, 16),
    "a PNG that ends early": png(64, 64)[:60],
    "a PNG with a wrong sum": png(64, 64)[:-20] + bytes(20),
    "garbage": bytes(range(256)) * 64,
    "a GIF": b"GIF89a" + bytes(64),
    "a JPEG": b"\xff\xd8\xff\xe0" + bytes(64),
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/"/></svg>',
    "odd sides": png(17, 16),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_pictures_that_are_none(sold: tuple[Running, Shop, Buyer], client: httpx2.Client, content: bytes) -> None:
    server = sold[0]
    before = resident_mib(server)
    for image in (base64.b64encode(content).decode(), "data:image/png;base64," + base64.b64encode(content).decode()):
        # Some readers take what is whole at the beginning: then it is the width that is wrong.
        body = {"service": "zimage", "prompt": "x", "width": 4096, "image": image}
        assert refused(client.post("/api/service", json=body))["param"] in ("image", "width")
    # 16000² pixels would be 730 MiB.
    assert resident_mib(server) - before < 100
    files = {"image": ("../a\r\nx-evil: 1.png", io.BytesIO(content))}
    answer = client.post("/v1/images/edits", data={"prompt": "x", "size": "8192x8192"}, files=files)
    assert answer.status_code == 400 and "x-evil" not in answer.headers, answer.text


def resident_mib(server: Running) -> float:
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def test_nothing_is_fetched(client: httpx2.Client) -> None:
    """A picture's URL is refused, whatever its scheme: the server asks nobody."""
    asked: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    asked.append(listener.accept())

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        place = f"127.0.0.1:{port}/a.png"
        for image in (
            f"http://{place}", f"https://{place}", f"HTTP://{place}", f" http://{place}", f"\thttp://{place}",
            f"//{place}", f"ftp://{place}", f"gopher://{place}", "file:///etc/passwd", "/etc/passwd", "../../etc/hosts",
            f"data:image/png,{place}", f"data:text/html;charset=utf-8,<img src=http://{place}>", f"url:{place}",
            f"data:image/png;base64,http://{place}", f"http://x@{place}", f"http://localhost:{port}/",
        ):  # fmt: skip
            body = {"service": "zimage", "prompt": "x", "image": image}
            assert refused(client.post("/api/service", json=body))["param"] == "image"
            answer = client.post("/v1/images/edits", json={"prompt": "x", "image": image})
            assert 400 <= answer.status_code < 500, answer.text
        assert client.post(
            "/sdapi/v1/img2img", json={"prompt": "x", "init_images": [f"http://{place}"]}
        ).is_client_error
        listener.close()
    assert asked == []


# --- Texts that other readers might take for more ---

XSS = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_markup_is_only_ever_json(client: httpx2.Client) -> None:
    for path, body in (
        ("/api/service", {"service": XSS}),
        ("/api/service", {"service": "zimage", "prompt": XSS, "model": XSS}),
        ("/api/service", {"service": "zimage", "prompt": "x", XSS: 1}),
        ("/api/service", {"service": "zimage", "prompt": "x", "format": XSS}),
        ("/generate", {"prompt": XSS, "keep_alive": XSS}),
        ("/api/sign-in/challenge", {"address": XSS}),
    ):
        answer = client.post(path, json=body, headers={"accept": "text/html"})
        assert answer.status_code in (400, 404) and answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in (f"/{XSS}", f"/api/jobs/{XSS}", f"/docs/{XSS}", f"/?a={XSS}", f"/docs?q={XSS}", f"/account?x={XSS}"):
        answer = client.get(path, headers={"accept": "text/html"})
        if "html" in answer.headers["content-type"]:
            assert "<script>alert" not in answer.text and "onerror=alert" not in answer.text
        else:
            refused(answer, 404)


def test_ids_with_tricks(client: httpx2.Client) -> None:
    for id in (
        "job-nothing", "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "..%5c..%5cwindows", "%00",
        "a%00.webp", "%0d%0ax-evil:%201", "%ff%fe", "%e2%80%ae", "\u202e\u4e2d", "a" * 5000, "%25%32%66", "'--",
        "${jndi:x}", "{{7*7}}", "-1", "0", "job-" + "A" * 24, "%20", "*", "~root",
    ):  # fmt: skip
        for path in (f"/api/jobs/{id}", f"/api/jobs/{id}/events", f"/api/jobs/{id}/images/0.webp", f"/api/keys/{id}"):
            answer = client.get(path)
            assert answer.status_code in (404, 405) or path.endswith(("/..", "/%2e%2e")), (path, answer.text)
            assert "x-evil" not in answer.headers
            assert "html" not in answer.headers["content-type"] or answer.status_code == 200
        assert client.delete(f"/api/jobs/{id}").status_code in (404, 405)
        assert client.get(f"/v1/models/{id}").status_code in (200, 404)
    for name in (
        "0.exe",
        "0",
        "-1.webp",
        "99999999999999999999.webp",
        "0.webp/../x",
        "00.webp",
        "0x1.webp",
        "..%2f0.webp",
    ):
        refused(client.get(f"/api/jobs/job-nothing/images/{name}"), 404)
    for query, param in (
        ("limit=0", "limit"), ("limit=-1", "limit"), ("limit=1e3", "limit"), ("limit=" + "9" * 5000, "limit"),
        ("limit=%D9%A1", "limit"), ("before=x", "before"), ("before=" + "9" * 30, "before"),
    ):  # fmt: skip
        assert refused(client.get(f"/api/billing-history?{query}"))["param"] == param


def test_headers_with_tricks(sold: tuple[Running, Shop, Buyer], client: httpx2.Client) -> None:
    server, _, buyer = sold
    for id, kept in (
        ("abc-1.2_3", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("<script>", False), ("a;b", False),
        ("caf\u00e9", False), ("\U0001f600", False), ('"x"', False),
    ):  # fmt: skip
        answer = client.get("/nothing", headers={b"x-request-id": id.encode()})
        assert (answer.headers["x-request-id"] == id) is kept and refused(answer, 404)
    for key in ("", "a b", "a" * 256, "caf\u00e9"):
        answer = client.post("/forecast", json={"values": [1]}, headers={b"idempotency-key": key.encode()})
        assert refused(answer)["param"] == "Idempotency-Key"
    for lines in (
        "x-request-id: a\rx-evil: 1",
        "x-request-id: a\nx-evil: 1\r\nidempotency-key: \x00",
        "x-request-id: a\x00b",
        "idempotency-key: a\x01b",
        "x evil: 1",
        ": 1",
    ):
        answer = raw(server, head(buyer.key, lines, "content-length: 2") + b"{}")
        assert b"HTTP/1.1 400" in answer and b"\nx-evil" not in answer.lower(), (lines, answer)


def test_requests_that_two_readers_take_for_different_ones(sold: tuple[Running, Shop, Buyer]) -> None:
    server, _, buyer = sold
    inner = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    for lines, body in (
        (["content-length: 2", "content-length: 3"], b"{} "),
        (["content-length: 2", "content-length: 2"], b"{}"),
        (["content-length: 2, 3"], b"{} "),
        (["content-length: -1"], b"{}"),
        (["content-length: +2"], b"{}"),
        (["content-length: 0x2"], b"{}"),
        (["content-length: 5", "transfer-encoding: chunked"], b"0\r\n\r\n" + inner),
        (["transfer-encoding: chunked", "transfer-encoding: identity"], b"0\r\n\r\n" + inner),
        (["transfer-encoding: xchunked"], b"0\r\n\r\n" + inner),
        (["transfer-encoding: chunked"], b"zz\r\n{}\r\n0\r\n\r\n"),
        (["transfer-encoding: chunked"], b"-1\r\n{}\r\n0\r\n\r\n"),
        (["transfer-encoding: chunked"], b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
    ):
        answer = raw(server, head(buyer.key, *lines) + body)
        assert b"HTTP/1.1 2" not in answer and answer.count(b"HTTP/1.1") <= 1, (lines, answer)
    for request in (
        b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http:///etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FOO /healthz HTTP/1.1\r\nhost: x\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: 1\r\n" % i for i in range(5000)) + b"\r\n",
    ):  # fmt: skip
        answer = raw(server, request, patience_s=3)
        assert answer == b"" or b"HTTP/1.1 4" in answer or b"healthz" in request, (request[:60], answer[:200])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/healthz", 200),
        ("HEAD", "/api/jobs", 200),
        ("HEAD", "/api/balance", 200),
        ("HEAD", "/api/service", 405),
        ("HEAD", "/nothing", 404),
        ("OPTIONS", "/api/service", 405),
        ("OPTIONS", "/healthz", 405),
        ("GET", "/api/service", 405),
        ("PUT", "/api/jobs", 405),
        ("PATCH", "/forecast", 405),
        ("TRACE", "/healthz", 405),
        ("DELETE", "/api/jobs", 405),
        ("POST", "/healthz", 405),
        ("POST", "/api/jobs/job-nothing/events", 405),
        ("PROPFIND", "/api/jobs", 405),
    ],
)
def test_methods(client: httpx2.Client, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status, answer.text
    if status == 405:
        assert answer.headers["allow"] and answer.headers["content-type"] == "application/problem+json"
    if method == "HEAD":
        assert answer.content == b""


def test_memory_stays_what_it_is(sold: tuple[Running, Shop, Buyer], client: httpx2.Client) -> None:
    """The largest of what is refused, again and again."""
    server, shop, buyer = sold
    begin = PICTURE + b',"width":4096,"image":"'
    large = [
        b"x" * 1_900_000,
        PICTURE + b',"prompt":"' + b"x" * 1_000_000 + b'"}',
        b'{"service":"chronos2","values":[' + b"1," * 900_000 + b"null,",
        b'{"service":"chronos2","series":[' + b"[1]," * 400_000 + b"[1]]}",
        json.dumps({"service": "zimage", "prompt": "x", "image": "A" * 1_900_000}).encode(),
        *(begin + base64.b64encode(content) + b'"}' for content in BOMBS.values()),
    ]

    def rounds(count: int) -> float:
        for _ in range(count):
            for body in large:
                refused(client.post("/api/service", content=body, headers={"content-type": "application/json"}))
        return resident_mib(server)

    before = rounds(3)
    assert rounds(6) - before < 30
    assert shop.lines(buyer) == {}
