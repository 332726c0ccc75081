"""deploy/: what can be checked without installing it. Nothing here builds the container: that takes a Docker."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from diffusionz import cli
from diffusionz.server.serve import LINGER_S

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNIT = ROOT / "deploy" / "diffusionz.service"
PROGRAM = str(pathlib.Path(sys.executable).with_name("diffusionz"))
LATE_S = 30  # that Jobs.drain gives those whom it has cancelled


def parsed(command: list[str]) -> argparse.Namespace:
    """The arguments of a `diffusionz serve`, by its own parser."""
    assert pathlib.Path(command[0]).name == "diffusionz" and command[1] == "serve"
    return cli._parser("serve").parse_args(command[1:])


# --- The unit ---


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    """Directive -> its values, in order."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        assert not line.endswith("\\")
        if line and line[0] not in "#[":
            name, sign, value = line.partition("=")
            assert sign and name.isalnum(), line
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_starts_a_server_that_sells(unit: dict[str, list[str]]) -> None:
    (start,) = unit["ExecStart"]
    args = parsed(shlex.split(start))
    assert args.payments.startswith("/var/lib/diffusionz/") and args.log_format == "json"
    assert unit["StateDirectory"] == ["diffusionz"] and unit["User"] == ["diffusionz"]


def test_it_is_given_the_time_that_it_takes_to_stop(unit: dict[str, list[str]]) -> None:
    args = parsed(shlex.split(unit["ExecStart"][0]))
    assert unit["KillSignal"] == ["SIGTERM"]
    assert int(unit["TimeoutStopSec"][0]) > args.drain_s + LATE_S + LINGER_S + 10
    assert int(unit["LimitNOFILE"][0]) >= 65536 and unit["Restart"] == ["on-failure"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_understands_the_unit(tmp_path: pathlib.Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/diffusionz/bin/diffusionz", PROGRAM))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=25", str(copy)],
        capture_output=True,
        text=True,
    )
    assert judged.returncode == 0, judged.stdout[-200:]  # an exposure of 2.5 of 10 at most


# --- The Dockerfile ---


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """(instruction, arguments), in order."""
    text = re.sub(r"^#.*\n", "", (ROOT / "deploy" / "Dockerfile").read_text(), flags=re.M)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def test_the_container_is_built_of_what_is_here(steps: list[tuple[str, str]]) -> None:
    known = "ARG FROM ENV RUN WORKDIR COPY USER VOLUME EXPOSE HEALTHCHECK STOPSIGNAL ENTRYPOINT CMD".split()
    assert {name for name, _ in steps} <= set(known)
    stages = [arguments for name, arguments in steps if name == "FROM"]
    assert len(stages) == 2 and stages[0].endswith(" AS build")
    arguments = {text.partition("=")[0] for name, text in steps if name == "ARG"}
    used = set(re.findall(r"\$\{(\w+)\}", " ".join(text for _, text in steps)))
    assert used <= arguments
    for name, text in steps:
        if name == "COPY" and not text.startswith("--from="):
            assert all((ROOT / source).exists() for source in text.split()[:-1]), text
    makefile = (ROOT / "Makefile").read_text()
    (torch,) = re.findall(r"^TORCH := (.*)$", makefile, re.M)
    assert ("ARG", f"TORCH={torch}") in steps  # the same as `make` takes
    packages = re.search(r"^BUILD_PACKAGES := (.*?[^\\])$", makefile, re.M | re.S)
    assert packages
    install = next(text for name, text in steps if name == "RUN")
    assert set(packages[1].replace("\\\n", " ").split()) <= set(install.split())
    for pin in re.findall(r'"(?:scikit-build-core|cffi)[^"]*"', makefile):
        assert any(pin in text for _, text in steps)


def test_the_shells_lines_of_the_container_are_shell(steps: list[tuple[str, str]]) -> None:
    for name, text in steps:
        if name == "RUN":
            done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_the_container_runs_as_nobody_in_particular_and_says_how_it_is(steps: list[tuple[str, str]]) -> None:
    last = {name: text for name, text in steps}
    assert last["USER"].isdigit() and int(last["USER"]) > 0
    assert f"--uid {last['USER']} " in " ".join(text for name, text in steps if name == "RUN")
    assert last["STOPSIGNAL"] == "SIGTERM" and last["EXPOSE"] == "8100"
    command = json.loads(last["ENTRYPOINT"])
    for more in (json.loads(last["CMD"]), ["--free", "--free-for-all"]):
        args = parsed([*command, *more])
        assert (args.host, args.port) == ("0.0.0.0", 8100)
    probe = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert "/healthz" in probe[-1]
    compile(probe[-1], "HEALTHCHECK", "exec")
