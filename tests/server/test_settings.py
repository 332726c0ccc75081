"""The server's settings: a file, the command line over it, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from diffusionz import ArgumentError, DiffusionzError
from diffusionz.server.limits import Limits
from diffusionz.server.models import Spec
from diffusionz.server.settings import Settings, load

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Write:
    """write(toml): the path of a file of it."""

    def file(text: str) -> str:
        path = tmp_path / "server.toml"
        path.write_text(text)
        return str(path)

    return file


FULL = """\
host = "::1"
port = 8200
free = true
preload = ["turbo"]
keep_alive = "1h"
memory_budget = "8GB"
drain_s = 5
public_url = "https://example.org"
trusted_proxies = "10.0.0.1"
admin_token = "from the file"
access_log = true
log_format = "text"

[models.turbo]
family = "zimage"
model = "Tongyi-MAI/Z-Image-Turbo"
precision = "fp8"
device = "cuda:0,cuda:1"
max_vram = "20GB"
cuda_graphs = false

[models.chronos]
family = "chronos2"
model = "demo"
threads = 2

[limits]
steps = 20
body_s = 2.5

[providers.fal]
services = ["flux_image"]
"""


def test_a_file_says_all(write: Write) -> None:
    made = load(write(FULL))
    assert (made.host, made.port, made.mode, made.preload, made.keep_alive) == ("::1", 8200, "free", ("turbo",), "1h")
    assert (made.memory_budget, made.drain_s, made.access_log, made.log_format) == ("8GB", 5, True, "text")
    assert (made.trusted_proxies, made.admin_token, made.https) == ("10.0.0.1", "from the file", True)
    turbo, chronos = made.models
    options = {"precision": "fp8", "device": "cuda:0,cuda:1", "max_vram": "20GB", "cuda_graphs": False}
    assert turbo == Spec("turbo", "zimage", "Tongyi-MAI/Z-Image-Turbo", options) and made.device_count == 2
    assert chronos == Spec("chronos", "chronos2", "demo", {"threads": 2})
    assert made.limits == dataclasses.replace(Limits(), steps=20, body_s=2.5)
    assert made.providers == {"fal": {"services": ["flux_image"]}}
    assert "from the file" not in repr(made)


def test_the_command_line_is_over_the_file_and_the_file_over_defaults(write: Write) -> None:
    path = write('free = true\nport = 1\nkeep_alive = "1h"\naccess_log = true\n')
    made = load(path, {"port": 2, "log_format": "text"}, port=3, keep_alive=None)
    assert (made.port, made.keep_alive, made.access_log, made.log_format) == (3, "1h", True, "text")
    assert load(path, {"port": 2}).port == 1
    assert load(None, {"port": 2}, free=True).port == 2
    assert load(None, free=True) == Settings(free=True)


def test_who_pays_is_one_choice_and_the_command_lines_when_it_says_so(write: Write) -> None:
    path = write('payments = "shop/payments.toml"\n')
    assert load(path).mode == "payments"
    assert load(path, dev=True).mode == "dev" and load(path, free=True).payments is None
    path = write('free = true\nfree_for_all = true\nhost = "0.0.0.0"\n')
    made = load(path, payments="payments.toml")
    assert (made.mode, made.free_for_all, made.host) == ("payments", False, "0.0.0.0")


def test_the_operators_token_may_be_in_the_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIONZ_ADMIN_TOKEN", "of the environment")
    assert load(free=True).admin_token == "of the environment"
    assert load(write('free = true\nadmin_token = "of the file"')).admin_token == "of the file"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, ["who pays", "--payments", "--free", "--dev"]),
        ({"free": True, "dev": True}, ["free and dev exclude each other"]),
        ({"free": True, "payments": "x"}, ["free and payments exclude each other"]),
        ({"dev": True, "payments": "x"}, ["dev and payments exclude each other"]),
        ({"free_for_all": True, "dev": True}, ["without free"]),
        ({"free": True, "host": "0.0.0.0"}, ["0.0.0.0", "--free-for-all"]),
        ({"free": True, "host": "192.168.1.5"}, ["--free-for-all"]),
        ({"free": True, "host": "::"}, ["--free-for-all"]),
        ({"free": True, "host": "example.org"}, ["--free-for-all"]),
        ({"dev": True, "host": "0.0.0.0"}, ["--dev server gives its work away"]),
        ({"free": True, "port": 65536}, ["port is 65536", "0..65535"]),
        ({"free": True, "port": -1}, ["port is -1"]),
        ({"free": True, "public_url": "example.org"}, ["public_url", "https://HOST"]),
        ({"free": True, "public_url": "https://example.org/path"}, ["public_url"]),
        ({"free": True, "preload": ("x",)}, ["preload has 'x'", "zimage-demo, chronos2-demo"]),
        ({"free": True, "memory_budget": "much"}, ["memory_budget", "8GB"]),
        ({"free": True, "memory_budget": "-1GB"}, ["memory_budget"]),
        ({"free": True, "keep_alive": "long"}, ["keep_alive is 'long'", "10m"]),
        ({"free": True, "drain_s": -1.0}, ["drain_s"]),
        ({"free": True, "drain_s": float("nan")}, ["drain_s"]),
        ({"free": True, "models": ()}, ["no models"]),
        ({"free": True, "models": (Spec("a", "zimage", "x"), Spec("a", "chronos2", "y"))}, ["two models", "'a'"]),
        ({"free": True, "models": (Spec("a", "zimage", "x", {"precision": "fp3"}),)}, ["a: precision is 'fp3'", "fp8"]),
        ({"free": True, "models": (Spec("a", "chronos2", "x", {"precision": "fp8"}),)}, ["precision", "tf32"]),
    ],
)
def test_what_cannot_be(given: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ArgumentError) as caught:
        load(**given)
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
@pytest.mark.parametrize("mode", ["free", "dev"])
def test_this_machine_alone_is_fine(host: str, mode: str) -> None:
    assert load(host=host, **{mode: True}).mode == mode
    assert load(host="0.0.0.0", free=True, free_for_all=True).mode == "free"
    assert load(host="0.0.0.0", payments="payments.toml").mode == "payments"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", ["'prot' is no setting", "did you mean port?"]),
        ("xyzzy = 1", ["'xyzzy' is no setting", "there are access_log, admin_token"]),
        ("[limits]\nstep = 1", ["limits", "'step' is no setting", "did you mean steps?"]),
        ("[limits]\nsteps = 0", ["limits.steps is 0", "a whole number above 0"]),
        ("[limits]\nsteps = 2.5", ["limits.steps is 2.5", "a whole number above 0"]),
        ("[limits]\nsteps = true", ["limits.steps is True"]),
        ("[limits]\njob_s = nan", ["limits.job_s is nan"]),
        ("[limits]\njob_s = inf", ["limits.job_s is inf"]),
        ('[limits]\njob_s = "long"', ["limits.job_s is 'long'"]),
        ("limits = 3", ["limits is 3", "table"]),
        ('port = "8100"', ["port is '8100'", "a whole number"]),
        ("port = true", ["port is True"]),
        ("port = 1.5", ["port is 1.5"]),
        ("host = 5", ["host is 5", "a string"]),
        ('free = "yes"', ["free is 'yes'", "true or false"]),
        ("free = 1", ["free is 1", "true or false"]),
        ('drain_s = "5"', ["drain_s is '5'", "a number"]),
        ("drain_s = true", ["drain_s is True"]),
        ("payments = 5", ["payments is 5", "a string"]),
        ("admin_token = 5", ["admin_token is 5"]),
        ("memory_budget = true", ["memory_budget is True", "a whole number or a string"]),
        ("keep_alive = [1]", ["keep_alive is [1]"]),
        ('preload = "zimage-demo"', ["preload is 'zimage-demo'", "a list"]),
        ("preload = [1]", ["preload is [1]"]),
        ('log_format = "xml"', ["log_format is 'xml'", "json or text"]),
        ("models = 5", ["models must be tables"]),
        ("[models]\na = 5", ["models.a must say family"]),
        ('[models.a]\nfamily = "zimage"', ["models.a must say family (zimage or chronos2) and model"]),
        ('[models.a]\nfamily = "flux"\nmodel = "x"', ["models.a must say family"]),
        ('[models.a]\nfamily = "zimage"\nmodel = "x"\nprecison = "fp8"', ["models.a", "did you mean precision?"]),
        ('[models.a]\nfamily = "chronos2"\nmodel = "x"\nmax_vram = "8GB"', ["models.a", "'max_vram' is no setting"]),
        ('[models.a]\nfamily = "zimage"\nmodel = "x"\nthreads = "2"', ["models.a: threads is '2'", "a whole number"]),
        ('[models.a]\nfamily = "zimage"\nmodel = "x"\ndevice = 0', ["models.a: device is 0", "a string"]),
        ("free = ", ["server.toml"]),
        ("free = true\nfree = true", ["server.toml"]),
    ],
)
def test_a_file_that_is_wrong_says_where(write: Write, text: str, says: list[str]) -> None:
    path = write(text if "free" in text else "free = true\n" + text)
    with pytest.raises(ArgumentError) as caught:
        load(path)
    for part in says:
        assert part in str(caught.value), str(caught.value)


def test_nvfp4_is_said_to_be_missing(write: Write) -> None:
    path = write('free = true\n[models.a]\nfamily = "zimage"\nmodel = "x"\nprecision = "nvfp4"')
    with pytest.raises(DiffusionzError, match=r"not in this version yet.*10\.0 or later; this machine has .*fp8"):
        load(path)


def test_files_that_are_not_there_or_are_no_text(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "nothing.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match=r"binary\.toml"):
        load(str(tmp_path / "binary.toml"))
