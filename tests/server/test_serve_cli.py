"""`diffusionz serve` and `diffusionz ps`, as they are typed."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from diffusionz import cli
from diffusionz.server import serve
from diffusionz.server.models import Spec
from diffusionz.server.settings import Settings

from .conftest import PATIENCE_S, Running, Start

PROGRAM = str(pathlib.Path(sys.executable).with_name("diffusionz"))
CLEAN = {name: value for name, value in os.environ.items() if name not in ("ENABLE_NVFP4", "DIFFUSIONZ_URL")}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[list[Settings]]:
    """What was to be served, in a folder of its own: nothing is started."""
    asked: list[Settings] = []
    monkeypatch.chdir(tmp_path)
    for name in ("ENABLE_NVFP4", "DIFFUSIONZ_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve, "run", lambda settings: asked.append(settings) or 0)
    yield asked


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, env=CLEAN | (env or {})
    )


# --- What is said on the command line ---


def test_every_option_arrives(given: list[Settings]) -> None:
    line = (
        "--host 0.0.0.0 --port 9000 --free --free-for-all --zimage one=zimage-demo --zimage /models/two/ "
        "--device cuda:0,cuda:1 --precision fp8 --forecast-precision tf32 --max-vram 8GB --memory-budget 20GB "
        "--keep-alive 1h --preload one --drain 5 --public-url https://example.org --trusted-proxies 10.0.0.1 "
        "--access-log --log text"
    )
    assert cli.main(["serve", *line.split()]) == 0
    (made,) = given
    drawing = {"device": "cuda:0,cuda:1", "precision": "fp8", "max_vram": "8GB"}
    assert made == Settings(
        host="0.0.0.0",
        port=9000,
        free=True,
        free_for_all=True,
        models=(
            Spec("one", "zimage", "zimage-demo", drawing),
            Spec("two", "zimage", "/models/two/", drawing),
            Spec("chronos2-demo", "chronos2", "chronos2-demo", {"device": "cuda:0", "precision": "tf32"}),
        ),
        preload=("one",),
        keep_alive="1h",
        memory_budget="20GB",
        drain_s=5.0,
        public_url="https://example.org",
        trusted_proxies="10.0.0.1",
        access_log=True,
        log_format="text",
    )
    assert made.device_count == 2


def test_the_command_line_is_over_the_file(given: list[Settings], tmp_path: pathlib.Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        'port = 1\nfree = true\nlog_format = "text"\nkeep_alive = "1h"\n'
        '[models.turbo]\nfamily = "zimage"\nmodel = "x"\n[limits]\nsteps = 9\n'
    )
    assert cli.main(["serve", "--config", str(file)]) == 0
    assert cli.main(["serve", "--config", str(file), "--port", "2", "--dev", "--log", "json"]) == 0
    assert cli.main(["serve", "--config", str(file), "--chronos2", "c=demo"]) == 0
    first, second, third = given
    assert (first.port, first.mode, first.log_format, first.limits.steps) == (1, "free", "text", 9)
    assert [spec.name for spec in first.models] == ["turbo"]
    assert (second.port, second.mode, second.log_format, second.keep_alive) == (2, "dev", "json", "1h")
    assert [spec.name for spec in third.models] == ["zimage-demo", "c"]
    file.write_text("free = true\n[limits]\nsteps = 9\n")  # no models: those of the command line
    assert cli.main(["serve", "--config", str(file), "--device", "cpu"]) == 0
    assert [spec.options["device"] for spec in given[-1].models] == ["cpu", "cpu"]


def test_a_payments_toml_that_is_here_is_meant(given: list[Settings], tmp_path: pathlib.Path) -> None:
    (tmp_path / "payments.toml").write_text("")
    assert cli.main(["serve"]) == 0 and given[-1].payments == "payments.toml"
    assert cli.main(["serve", "--free"]) == 0 and given[-1].mode == "free"


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("", 2, "who pays is not said: --payments payments.toml sells calls, --free gives them away"),
        ("--free --dev", 2, "free and dev exclude each other"),
        ("--free --payments x", 2, "exclude each other"),
        ("--free --host 0.0.0.0", 2, "say --free-for-all if that is meant"),
        ("--dev --host 0.0.0.0", 2, "gives its work away"),
        ("--free --port 99999", 2, "port is 99999"),
        ("--free --port x", 2, "invalid int value: 'x'"),
        ("--free --prot 1", 2, "unrecognized arguments: --prot 1"),
        ("--free --keep-alive soon", 2, "keep_alive is 'soon'"),
        ("--free --memory-budget much", 2, "memory_budget"),
        ("--free --preload x", 2, "preload has 'x'; the models are: zimage-demo, chronos2-demo"),
        ("--free --drain -1", 2, "drain_s is -1"),
        ("--free --zimage =x", 2, "MODEL or NAME=MODEL"),
        ("--free --zimage a=x --chronos2 a=y", 2, "two models are called 'a'"),
        ("--free --precision fp3", 2, "precision is 'fp3'; it must be one of"),
        ("--free --log xml", 2, "invalid choice: 'xml'"),
        ("--config nothing.toml", 1, "nothing.toml: No such file or directory"),
        ("--free --precision nvfp4", 1, "NVFP4 is not in this version yet"),
    ],
)
def test_what_is_wrong_is_one_line(
    given: list[Settings], capsys: pytest.CaptureFixture[str], line: str, status: int, says: str
) -> None:
    try:
        ended: Any = cli.main(["serve", *line.split()])
    except SystemExit as stop:
        ended = stop.code
    shown = capsys.readouterr()
    assert (ended, shown.out, given) == (status, "", [])
    assert says in shown.err and shown.err.count("\n") == 1 and "Traceback" not in shown.err


def test_options_of_models_that_a_file_has(
    given: list[Settings], capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "s.toml").write_text('free = true\n[models.a]\nfamily = "zimage"\nmodel = "x"\n')
    assert cli.main(["serve", "--config", "s.toml", "--device", "cpu"]) == 2 and not given
    assert "said of each model in --config" in capsys.readouterr().err


def test_nvfp4_by_the_environment(
    given: list[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENABLE_NVFP4", "1")
    assert cli.main(["serve", "--free"]) == 1 and not given
    said = capsys.readouterr().err
    assert "compute capability 10.0 or later; this machine has" in said and "--precision fp8" in said
    assert said.count("\n") == 1
    monkeypatch.setenv("ENABLE_NVFP4", "0")
    assert cli.main(["serve", "--free"]) == 0


def test_help_teaches() -> None:
    done = run("serve", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("--free", "--dev", "--payments FILE", "--preload NAME", "curl", "DIFFUSIONZ_ADMIN_TOKEN", "SIGTERM"):
        assert part in done.stdout
    assert len(re.findall(r"^  diffusionz serve ", done.stdout, re.M)) >= 4
    documented = set(re.findall(r"--[a-z0-9-]+", done.stdout))
    examples = set(re.findall(r"--[a-z0-9-]+", done.stdout[done.stdout.index("examples:") :])) - {"--json"}
    assert examples <= documented  # trivially; and each is understood:
    for option in examples:
        assert re.search(rf"^  {option}\b", done.stdout, re.M), option
    assert "http://127.0.0.1:8100" in run("ps", "--help").stdout


# --- Running it ---


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--free", "--port", str(taken.getsockname()[1]))
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be listened at: Address already in use" in done.stderr and done.stderr.count("\n") == 1


def test_a_ledger_that_is_not_there() -> None:
    done = run("serve", "--payments", "/nowhere/payments.toml")
    assert done.returncode == 1 and "/nowhere/payments.toml" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_it(start: Start) -> None:
    with start("--free") as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in server.log.read_text()


CONFIG = """\
free = true
preload = ["forecaster"]
admin_token = "the operator's"

[models.painter]
family = "zimage"
model = "demo"

[models.forecaster]
family = "chronos2"
model = "demo"

[models.precise]
family = "chronos2"
model = "chronos2-demo"
precision = "float32"

[models.lost]
family = "chronos2"
model = "/nowhere"

[limits]
steps = 3
"""


@pytest.fixture(scope="module")
def configured(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("config") / "server.toml"
    file.write_text(CONFIG)
    with start("--config", str(file)) as server:
        yield server


def test_several_models_of_a_file(configured: Running) -> None:
    with configured.client() as client:
        ready = client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["models"] == ["forecaster"]  # preloaded before it was ready
        body = {"values": [1, 2, 3, 4], "prediction_length": 2}
        for model in (None, "forecaster", "precise"):
            answer = client.post("/forecast", json=body | ({"model": model} if model else {}))
            assert answer.status_code == 200, answer.text
        loaded = {row["name"]: row for row in client.get("/api/ps").json()["models"]}
        assert set(loaded) == {"forecaster", "precise"}
        assert loaded["forecaster"]["expires_at"] is None and loaded["precise"]["expires_at"] > time.time()
        wrong = client.post("/forecast", json=body | {"model": "painter"})
        assert wrong.status_code == 404 and "there are: forecaster, precise, lost" in wrong.json()["detail"]
        lost = client.post("/forecast", json=body | {"model": "lost"})
        assert lost.status_code == 503 and lost.json()["error"]["code"] == "model-unavailable"
        assert "/nowhere" not in lost.text and int(lost.headers["retry-after"]) > 0
        assert any("lost is not there" in line["message"] for line in configured.lines())  # said at the start
        steps = client.post("/generate", json={"prompt": "a circle", "steps": 4})
        assert steps.status_code == 400 and steps.json()["error"]["param"] == "steps"


def test_ps_shows_what_is_loaded(configured: Running) -> None:
    with configured.client() as client:
        client.post("/forecast", json={"values": [1, 2, 3], "model": "precise"}).raise_for_status()
    table = run("ps", "--url", configured.url)
    assert (table.returncode, table.stderr) == (0, "")
    head, *rows = table.stdout.splitlines()
    assert head.split() == ["NAME", "FAMILY", "SIZE", "DEVICE", "PRECISION", "UNTIL"]
    cells = {row.split()[0]: row for row in rows}
    assert set(cells) == {"forecaster", "precise"}
    assert re.search(r"chronos2 +[0-9.]+ MB +cpu .*for ever$", cells["forecaster"])
    assert re.search(r"float32 +\d+ s from now$", cells["precise"])
    # A proxy that others are reached through is none for this machine.
    printed = run("ps", "--json", env={"DIFFUSIONZ_URL": configured.url + "/", "http_proxy": "http://127.0.0.1:1"})
    assert {row["name"] for row in json.loads(printed.stdout)} == {"forecaster", "precise"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "nonsense"])
def test_ps_without_a_server(url: str) -> None:
    done = run("ps", "--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert url in done.stderr and "is `diffusionz serve` running?" in done.stderr and done.stderr.count("\n") == 1


def test_the_operators_token_by_the_environment(start: Start) -> None:
    """On a server for everybody, and behind a proxy, this machine's callers are not the operator."""
    token = {"authorization": "Bearer s3cret"}
    env = CLEAN | {"DIFFUSIONZ_ADMIN_TOKEN": "s3cret"}
    with start("--free", "--free-for-all", env=env) as server, server.client() as client:
        load = {"model": "chronos2-demo"}
        refused = client.post("/api/load", json=load)
        assert refused.status_code == 403 and "DIFFUSIONZ_ADMIN_TOKEN" in refused.json()["detail"]
        for wrong in ("Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer", "Bearer é"):
            headers = {"authorization": wrong.encode()}
            assert client.post("/api/load", json=load, headers=headers).status_code == 403
        assert client.post("/api/load", json=load, headers=token).status_code == 200
        assert client.post("/api/unload", json=load).status_code == 403
        assert client.post("/api/unload", json=load, headers=token).json() == {"models": []}
        assert client.get("/metrics").status_code == 200  # a scraper on this machine
        proxied: dict[str, str]
        for proxied in ({"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=127.0.0.1"}, {"x-real-ip": "127.0.0.1"}):
            assert client.get("/metrics", headers=proxied).status_code == 403
            answer: httpx2.Response = client.get("/metrics", headers=proxied | token)
            assert answer.status_code == 200
        assert "s3cret" not in server.log.read_text()
