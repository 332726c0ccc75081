"""/openapi.json and /llms.txt: whole, valid, and true of the server that they describe."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import httpx2
import jsonschema_rs
import pytest
import schemathesis
from starlette.applications import Starlette

from diffusionz.server import openapi
from diffusionz.server.decoding import decode
from diffusionz.server.problems import KINDS
from tests.server.conftest import Running, Start


@pytest.fixture
def document(free: httpx2.Client) -> dict[str, Any]:
    answer = free.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json())


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_it_is_valid(document: dict[str, Any]) -> None:
    schemathesis.openapi.from_dict(document).validate()
    assert document["openapi"] == "3.1.0"
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"}), name


def test_each_route_is_in_it_and_nothing_else(document: dict[str, Any]) -> None:
    from diffusionz.server.app import create_app
    from diffusionz.server.forecasts import Forecasts
    from diffusionz.server.metrics import Metrics
    from diffusionz.server.models import Models
    from diffusionz.server.pictures import Pictures
    from diffusionz.server.settings import Settings

    settings = Settings(free=True)
    metrics = Metrics()
    models = Models(settings.models, metrics)
    services = [Pictures(models, settings.limits), Forecasts(models, settings.limits, metrics)]
    app = create_app(settings, models, services=services).app
    assert isinstance(app, Starlette)
    routes = list(openapi.documented(app))
    assert len(set(routes)) == len(routes)
    assert set(routes) == set(operations(document)) == set(openapi.OPERATIONS)


def test_each_operation_says_what_it_is(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(ids)) == len(ids)
    for (method, path), operation in operations(document).items():
        assert operation["summary"] and operation["tags"], (method, path)
        assert any(code.startswith("2") for code in operation["responses"])
        assert "500" in operation["responses"]
        for name in re.findall(r"{(\w+)}", path):
            assert any(one["name"] == name and one["in"] == "path" for one in operation["parameters"])


def test_each_example_is_valid(document: dict[str, Any]) -> None:
    """By the schema, and by the types that the server decodes with."""
    seen = 0
    for key, operation in operations(document).items():
        for media, content in operation.get("requestBody", {}).get("content", {}).items():
            if media != "application/json":
                continue
            seen += 1
            schema = {"components": document["components"], **content["schema"]}
            jsonschema_rs.validate(schema, content["example"])
            for kind in openapi.OPERATIONS[key].asks[:1]:
                decode(json.dumps(content["example"]).encode(), kind)
    assert seen > 15


def test_limits_are_in_it(start: Start, tmp_path: pathlib.Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("[limits]\nsteps = 12\nhorizon = 100\n")
    with start("--free", "--config", str(config), "--zimage", "zimage-demo") as server, server.client() as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
        assert schemas["ImageRequest"]["properties"]["steps"]["maximum"] == 12
        assert schemas["Generation"]["properties"]["num_inference_steps"]["anyOf"][0]["maximum"] == 12
        assert schemas["Parameters"]["properties"]["prediction_length"]["maximum"] == 100
        assert "- steps: 12\n" in client.get("/llms.txt").text


def test_who_may_call_what(dev_server: Running, document: dict[str, Any]) -> None:
    with dev_server.client() as client:
        paid = client.get("/openapi.json").json()
    assert set(operations(paid)) == set(operations(document))
    assert "security" not in document["paths"]["/generate"]["post"]
    assert {"key": []} in paid["paths"]["/generate"]["post"]["security"]
    assert paid["paths"]["/api/pricing"]["get"]["security"] == []
    assert paid["paths"]["/api/keys"]["post"]["security"] == [{"session": []}]
    for operation in operations(paid).values():
        for requirement in operation["security"]:
            assert set(requirement) <= set(paid["components"]["securitySchemes"])


def test_they_are_constant_bytes(free: httpx2.Client) -> None:
    for url in ("/openapi.json", "/llms.txt"):
        first = free.get(url)
        again = free.get(url, headers={"if-none-match": first.headers["etag"]})
        assert again.status_code == 304 and not again.content
        assert len(first.content) < 200_000 and first.headers["content-encoding"] == "gzip"


# --- For agents ---


def test_llms_txt_has_all_that_is_needed(free: httpx2.Client, free_server: Running) -> None:
    text = free.get("/llms.txt").text
    assert text.startswith("# diffusionz\n") and free_server.url in text
    for name, kind in KINDS.items():
        assert f"| {kind.status} | {name} | {kind.advice} |" in text
    assert "no key" in text and "calls are free" in text
    for name, value in free.get("/api/limits").json().items():
        assert f"- {name}: {value:.12g}\n" in text


def test_llms_txt_where_calls_cost_something(dev_server: Running) -> None:
    with dev_server.client() as client:
        text = client.get("/llms.txt").text
    assert "Bearer $DIFFUSIONZ_API_KEY" in text and "- zimage: 1.00 USD for 1 image" in text


def test_a_host_that_is_none_comes_into_no_command(free: httpx2.Client) -> None:
    answer = free.get("/llms.txt", headers={"host": "x;reboot"})
    assert answer.status_code == 400 and "reboot" not in answer.text


def test_its_commands_run(free: httpx2.Client, tmp_path: pathlib.Path) -> None:
    """Each curl line, in order, as a shell takes it; those about a job with the id of one."""
    text = free.get("/llms.txt").text
    lines = [line.strip() for line in text.splitlines() if line.startswith("    curl ")]
    assert len(lines) > 30
    ran = 0
    for line in lines:
        if any(
            part in line
            for part in ("IN BASE64", "OR BASE64", "faucet", "/api/keys", "/videos/", "sign-in", "/v1/models/")
        ):
            continue  # what needs a picture or a wallet
        if "/ID" in line:
            jobs = free.get("/api/jobs").json()["jobs"]
            line = line.replace("/ID", "/" + next(j["id"] for j in jobs if j["service"] == "zimage" and j["result"]))
        done = subprocess.run(
            ["bash", "-c", f"{line} -w '%{{stderr}}%{{http_code}}'"], capture_output=True, text=True, cwd=tmp_path,
            errors="replace",
        )  # fmt: skip
        account = any(f"/api/{name}" in line for name in ("balance", "billing", "deposit", "account"))
        assert done.stderr[-3:] in (("404",) if account else ("200", "202")), (line, done.stdout[-500:], done.stderr)
        ran += 1
    assert ran > 25
    assert (tmp_path / "out.webp").read_bytes()[8:12] == b"WEBP"


# --- The server does what the document says ---

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_schemathesis(start: Start, tmp_path: pathlib.Path) -> None:
    """What it makes of the document, for a server of its own: it lets models go, and starts jobs."""
    with start("--free") as server:
        done = subprocess.run(
            [
                str(pathlib.Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
                "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "4", "--seed", "1",
                "--request-timeout", "30", "--no-color",
            ],
            capture_output=True, text=True, cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert not [line for line in server.lines() if "traceback" in line]
