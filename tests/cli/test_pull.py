"""`diffusionz pull` against a hub that the test serves on loopback, and what was pulled found again without it."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

PROGRAM = str(pathlib.Path(sys.executable).with_name("diffusionz"))
Run = Callable[..., subprocess.CompletedProcess[str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNNEEDED = {"README.md": b"# a model", "assets/sample.png": b"\x89PNG", "transformer/weights.bin": b"pickle"}


class Hub:
    """One model on a server that speaks as much of the hub's protocol as its client needs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        } | UNNEEDED
        self.asked: list[str] = []
        self.down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.asked.append(f"{self.command} {path}")
                if hub.down:
                    return self.answer(503, b"")
                if path.startswith("/api/") and path.split("/")[-1] not in ("main", COMMIT):
                    return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                if path.startswith("/api/models/org/tiny/revision/"):
                    return self.answer(200, json.dumps(hub.about()).encode(), {"Content-Type": "application/json"})
                if path.startswith("/api/models/org/tiny/tree/"):
                    return self.answer(200, json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"})
                name = path.split("/resolve/", 1)[-1].partition("/")[2]
                if not path.startswith("/org/tiny/resolve/") or name not in hub.files:
                    return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
                data = hub.files[name]
                etag = hashlib.sha256(data).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                return self.answer(206 if start else 200, data[start:], headers)

            def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def about(self) -> dict[str, Any]:
        return {
            "_id": "0", "id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "private": False, "gated": False,
            "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "siblings": [{"rfilename": name} for name in sorted(self.files)],
        }  # fmt: skip

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in sorted(self.files.items())
        ]

    def fetched(self) -> set[str]:
        """Files whose content was asked for."""
        return {line.split("/resolve/")[1].partition("/")[2] for line in self.asked if line.startswith("GET /org")}


@pytest.fixture
def hub(tiny_model: pathlib.Path) -> Iterator[Hub]:
    hub = Hub(tiny_model)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def environment(hub: Hub, tmp_path: pathlib.Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return env | {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: pathlib.Path) -> Run:
    def call(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *arguments],
            cwd=tmp_path, env=environment | changes, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return call


def test_pull_fetches_what_is_needed_and_the_model_is_found_without_the_hub(
    run: Run, hub: Hub, tiny_model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = run("generate", "x", "-o", "out.png", "--model", "org/tiny", "--device", "cpu")
    assert done.returncode == 1
    assert "diffusionz pull org/tiny" in done.stderr
    assert hub.asked == []  # nothing but pull asks the hub

    done = run("pull", "org/tiny")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    folder = pathlib.Path(done.stdout.strip())
    for path in tiny_model.rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(tiny_model)).read_bytes() == path.read_bytes()
    assert not hub.fetched() & set(UNNEEDED)

    hub.down = True
    hub.asked.clear()
    arguments = ("x", "-o", "out.png", "--device", "cpu", "--width", "32", "--height", "32", "--steps", "1")
    for model in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        done = run("generate", *arguments, "--model", model)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").is_file()
    assert json.loads(run("info", "org/tiny", "--json").stdout)["path"] == str(folder)
    assert hub.asked == []


def test_a_forecaster(tiny_chronos: pathlib.Path, environment: dict[str, str], tmp_path: pathlib.Path) -> None:
    hub = Hub(tiny_chronos)
    try:
        env = environment | {"HF_ENDPOINT": hub.url}
        command = [
            PROGRAM,
            "forecast",
            "airline",
            "--model",
            "org/tiny",
            "--horizon",
            "2",
            "--device",
            "cpu",
            "--quiet",
        ]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert "diffusionz pull org/tiny" in done.stderr
        assert subprocess.run([PROGRAM, "pull", "org/tiny", "--quiet"], env=env).returncode == 0
        assert hub.fetched() == {"config.json", "model.safetensors"}
        hub.down = True
        assert subprocess.run(command, env=env, cwd=tmp_path).returncode == 0
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def test_a_second_pull_fetches_nothing_again(run: Run, hub: Hub) -> None:
    assert run("pull", "org/tiny", "--json").returncode == 0
    hub.asked.clear()
    done = run("pull", "org/tiny", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert hub.fetched() == set()


def test_bars_in_a_terminal(
    environment: dict[str, str], tmp_path: pathlib.Path, in_a_terminal: Callable[..., str]
) -> None:
    shown = in_a_terminal([PROGRAM, "pull", "org/tiny"], tmp_path, environment)
    assert "100%" in shown
    assert str(tmp_path / "hub") in shown


@pytest.mark.parametrize("model", ["org/nothing", "org/tiny@nowhere"])
def test_what_the_hub_does_not_have_is_one_line(run: Run, model: str) -> None:
    done = run("pull", model)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert model in done.stderr


def test_a_hub_that_cannot_be_reached_is_one_line(run: Run, hub: Hub) -> None:
    done = run("pull", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")  # the discard port: nobody listens
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("model", ["tiny", "a/b/c", "", "../x", "org/.."])
def test_what_is_no_hub_id_is_wrong_use(run: Run, hub: Hub, model: str) -> None:
    done = run("pull", model)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert hub.asked == []
