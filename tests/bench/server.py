"""The server's claims: what a request costs, what it adds to the engine, what batching gives, and how overload ends.

    python -m tests.bench.server all            every claim; an hour of idle machine is not needed, five minutes are
    python -m tests.bench.server http overhead
        --record                                appends rows to results/<machine>.csv
        --quick                                 tiny, to see that everything runs

http      CPU time of the server a request: GET /healthz, and a JSON POST that goes the whole way of a job
          (decoded, checked, admitted, run, answered) to a service that does nothing; LitServe and FastAPI, where they
          are installed, answering the same POST
overhead  one client's forecast through HTTP, beside the same call of the engine in a process of its own
batching  64 clients at once, beside one engine call a request
overload  ten times as many clients as the queue takes, for two minutes: what is accepted, what is refused, how long
          it takes, and the process's memory before and after

In `http` the server has the first core, and the clients always have the last: with one core alone nothing is measured.
--model is a forecaster for `overhead` and `batching`, with longer series than the demo's; --precision is its. --threads
means nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import numpy

from tests.bench.harness import Bench, run_claims
from tests.bench.record import ROOT, Comparison, percentile

GET_US, POST_US = 110.0, 170.0  # CPU time of a request
OVERHEAD_S = 0.001
BATCH_GAIN = 5.0
CLIENTS = 64
RETRY_S = 0.25  # after a refusal; at 0.01 the refusals alone, 4,700 a second, take one of two cores
SERIES, LONG_SERIES = 64, 768  # values of a forecast's history: with the demo, with another model
Value = TypeVar("Value")
CORES = sorted(os.sched_getaffinity(0))
_TICK = os.sysconf("SC_CLK_TCK")

POST_BODY = {
    "prompt": "a red circle on a blue background",
    "n": 1,
    "width": 1024,
    "height": 1024,
    "seed": 7,
    "steps": 8,
}


# --- Servers ---


class Process:
    """A server of this file's `app_*`, or of `diffusionz serve`, pinned to the first core."""

    def __init__(self, *command: str, env: dict[str, str] | None = None, core: int | None = 0) -> None:
        cores = CORES if core is None else CORES[core : core + 1]
        pin = ["taskset", "-c", ",".join(map(str, cores))]  # what it would inherit is the clients' core
        self.process = subprocess.Popen(
            [*pin, sys.executable, *command], cwd=ROOT, env=os.environ | (env or {}),
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.port = 0

    def cpu_s(self) -> float:
        """CPU time of the process and its children so far."""
        total = 0.0
        for pid in (self.process.pid, *_children(self.process.pid)):
            with contextlib.suppress(OSError):
                fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / _TICK
        return total

    def resident_mib(self) -> float:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        children = [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return children + [grandchild for child in children for grandchild in _children(child)]
    return []


@contextlib.contextmanager
def serving(*arguments: str, core: int | None = 0) -> Iterator[Process]:
    """`diffusionz serve --free` on a free port."""
    process = Process("-m", "diffusionz", "serve", "--free", "--port", "0", "--log", "json", *arguments, core=core)
    try:
        assert process.process.stderr is not None
        for line in process.process.stderr:
            if '"listening"' in line:
                process.port = int(json.loads(line)["url"].rpartition(":")[2])
                break
        assert process.port, "the server did not start"
        os.set_blocking(process.process.stderr.fileno(), False)
        asyncio.run(_until_ready(process.port))
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def peer(kind: str) -> Iterator[Process]:
    """A process of `serve_peer`."""
    port = _free_port()
    process = Process("-m", "tests.bench.server", "--peer", kind, str(port))
    try:
        process.port = port
        asyncio.run(_until_ready(port))
        yield process
    finally:
        process.stop()


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def _until_ready(port: int) -> None:
    for _ in range(6000):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise RuntimeError("the server does not answer")


def serve_peer(kind: str, port: int) -> None:
    """Runs a server that answers POST /echo: ours with a service that does nothing, FastAPI's, or LitServe's."""
    if kind == "diffusionz":
        import uvicorn
        import uvloop

        from diffusionz.server.app import create_app
        from diffusionz.server.connection import Connection
        from diffusionz.server.decoding import decode
        from diffusionz.server.jobs import Job, Order, Result
        from diffusionz.server.metrics import Metrics
        from diffusionz.server.models import Models
        from diffusionz.server.schemas import ImageRequest
        from diffusionz.server.serve import collect_seldom
        from diffusionz.server.settings import Settings

        class Nothing:
            name, schema, lane = "zimage", ImageRequest, None

            async def order(self, body: bytes) -> Order:
                return Order(self, decode(body, ImageRequest))

            async def run(self, job: Job) -> str:
                return str(job.order.request.prompt)

            async def finish(self, job: Job, raw: str) -> Result:
                return Result(json.dumps({"prompt": raw}).encode())

        settings = Settings(free=True)
        app = create_app(settings, Models((), Metrics()), services=[Nothing()])
        config = uvicorn.Config(
            app, port=port, loop="none", access_log=False, log_level="warning", server_header=False, date_header=False,
            proxy_headers=False, http=functools.partial(Connection, limits=settings.limits),  # type: ignore[arg-type]
        )  # fmt: skip
        collect_seldom()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(uvicorn.Server(config).serve())
    elif kind == "FastAPI":
        import fastapi
        import pydantic
        import uvicorn

        fields: Any = {name: (type(value), ...) for name, value in POST_BODY.items()}

        async def echo(request: Any) -> dict[str, str]:
            return {"prompt": request.prompt}

        echo.__annotations__ = {"request": pydantic.create_model("Request", **fields), "return": dict[str, str]}
        fast = fastapi.FastAPI()
        fast.post("/api/service")(echo)
        uvicorn.run(fast, port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning")
    else:
        import litserve

        from tests.bench.lit_echo import Echo

        server = litserve.LitServer(Echo(api_path="/api/service"), accelerator="cpu", workers_per_device=1)
        server.run(port=port, generate_client_file=False, log_level="warning")


# --- Clients ---


class Client:
    """One connection, kept alive; as little as can be between two measurements."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """(status, body)"""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        lowered = head.lower()
        at = lowered.index(b"content-length:") + 15
        length = int(lowered[at : lowered.index(b"\r\n", at)])
        return int(head[9:12]), await self._reader.readexactly(length)


def request_of(method: str, path: str, body: Any = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n"
    return (head + ("content-type: application/json\r\n" if data else "") + "\r\n").encode() + data


async def load(port: int, request: bytes, clients: int, seconds: float) -> tuple[Counter[int], list[float]]:
    """(answers by status, seconds of each that was served), of that many clients that ask again and again."""
    statuses: Counter[int] = Counter()
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def one() -> None:
        async with Client(port) as client:
            while True:  # once at least, however late: else a stall of the machine is nothing served
                began = time.perf_counter()
                status, _ = await client.ask(request)
                statuses[status] += 1
                if status == 200:
                    times.append(time.perf_counter() - began)
                if time.perf_counter() >= end:
                    return
                if status != 200:
                    await asyncio.sleep(RETRY_S)

    await asyncio.gather(*(one() for _ in range(clients)))
    return statuses, times


def as_client(work: Coroutine[Any, Any, Value]) -> Value:
    """Runs it on the last core, so that the clients are not where the server is."""
    os.sched_setaffinity(0, CORES[-1:])
    try:
        return asyncio.run(work)
    finally:
        os.sched_setaffinity(0, CORES)


def cpu_us(process: Process, request: bytes, seconds: float) -> float:
    """Microseconds of the server's CPU time a request, of 16 clients that ask at once."""
    as_client(load(process.port, request, 16, seconds / 4))
    before = process.cpu_s()
    statuses, _ = as_client(load(process.port, request, 16, seconds))
    assert set(statuses) == {200}, statuses
    return (process.cpu_s() - before) / statuses[200] * 1e6


# --- Claims ---


def http(bench: Bench) -> None:
    runs, seconds = (1, 0.5) if bench.args.quick else (bench.args.repeats or 5, 3.0)
    get, post = request_of("GET", "/healthz"), request_of("POST", "/api/service", {"service": "zimage"} | POST_BODY)
    with peer("diffusionz") as ours:
        gets = [cpu_us(ours, get, seconds) for _ in range(runs)]
        posts = [cpu_us(ours, post, seconds) for _ in range(runs)]
    bench.report(Comparison("CPU of a GET", "/healthz", gets, [GET_US], 1.0, "us", "the goal"))
    bench.report(
        Comparison("CPU of a JSON POST, a job that does nothing", "110 bytes", posts, [POST_US], 1.0, "us", "the goal")
    )
    plain = request_of("POST", "/api/service", POST_BODY)
    for kind, package in (("FastAPI", "fastapi"), ("LitServe", "litserve")):
        if _installed(package):
            with peer(kind) as theirs:
                times = [cpu_us(theirs, plain, seconds) for _ in range(runs)]
            bench.report(Comparison("CPU of a JSON POST", "110 bytes", posts, times, 1.0, "us", f"{kind}, echo"))


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def history(length: int) -> list[float]:
    generator = numpy.random.default_rng(0)
    return [round(float(x), 3) for x in numpy.sin(numpy.arange(length) / 7) * 10 + generator.normal(size=length) + 50]


def forecaster(bench: Bench) -> tuple[list[str], list[float], str]:
    """(what the server is told of the model, a series for it, how the work is called)."""
    model, precision = bench.args.model, bench.args.precision
    arguments = ["--forecast-precision", precision]
    said = "" if precision == "auto" else f", {precision}"
    if model == "demo":
        return arguments, history(SERIES), f"{SERIES} → 16, demo{said}"
    name = pathlib.Path(model).name
    return [*arguments, "--chronos2", f"bench={model}"], history(LONG_SERIES), f"{LONG_SERIES} → 16, {name}{said}"


def overhead(bench: Bench) -> None:
    count = 20 if bench.args.quick else 400
    arguments, series, size = forecaster(bench)
    request = request_of("POST", "/forecast", {"values": series, "prediction_length": 16})

    async def ask(port: int, times: list[float]) -> bytes:
        body = b""
        async with Client(port) as client:
            for i in range(count + 20):
                began = time.perf_counter()
                status, body = await client.ask(request)
                assert status == 200, body
                if i >= 20:
                    times.append(time.perf_counter() - began)
        return body

    through: list[float] = []
    with serving(*arguments, core=None) as server:
        body = as_client(ask(server.port, through))
    # The engine in a process of its own, as the server has it, but for the way there.
    code = (
        "import json, sys, time, numpy; from diffusionz import Chronos2; "
        f"model = Chronos2({bench.args.model!r}, precision={bench.args.precision!r})\n"
        f"series = numpy.array({series}, numpy.float32); times = []\n"
        f"for i in range({count + 20}):\n"
        "    began = time.perf_counter(); made = model.forecast(series, 16, [0.1, 0.5, 0.9]); made.quantiles.tolist()\n"
        "    if i >= 20: times.append(time.perf_counter() - began)\n"
        "print(json.dumps([times, made.mean[0].tolist()]))"
    )
    environment = os.environ | {"GOMP_SPINCOUNT": "10000"}
    command = ["taskset", "-c", ",".join(map(str, CORES)), sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    direct, mean = json.loads(done.stdout)
    if not numpy.allclose(json.loads(body)["mean"], mean, rtol=1e-5):
        raise SystemExit("the server's forecast is not the engine's: not timed")
    print("parity: through HTTP the forecast is the engine's")
    added = [percentile(through, share) - percentile(direct, share) for share in (0.1, 0.5, 0.9)]
    print(f"engine {percentile(direct, 0.5) * 1e3:.2f} ms, through HTTP {percentile(through, 0.5) * 1e3:.2f} ms")
    bench.report(Comparison("what HTTP adds to a forecast", size, added, [OVERHEAD_S], 1.0, "s", "the goal"))


def batching(bench: Bench) -> None:
    seconds = 2.0 if bench.args.quick else 10.0
    runs = 1 if bench.args.quick else bench.args.repeats or 3
    arguments, series, size = forecaster(bench)
    request = request_of("POST", "/forecast", {"values": series, "prediction_length": 16})
    with serving(*arguments, core=None) as server:
        as_client(load(server.port, request, CLIENTS, 1.0))
        together = []
        for _ in range(runs):
            statuses, _ = as_client(load(server.port, request, CLIENTS, seconds))
            assert set(statuses) == {200}, statuses
            together.append(seconds / statuses[200])
        alone = []
        for _ in range(runs):
            statuses, _ = as_client(load(server.port, request, 1, seconds))
            alone.append(seconds / statuses[200])
    bench.report(
        Comparison(
            f"a forecast of {CLIENTS} clients at once", size, together, alone, 1 / BATCH_GAIN, "s",
            "one call a request",
        )
    )  # fmt: skip


def overload(bench: Bench) -> None:
    seconds = 5.0 if bench.args.quick else 120.0
    request = request_of("POST", "/generate", {"prompt": "a red circle", "steps": 2, "seed": 1})
    config = bench.scratch / "server.toml"
    queue = 8
    config.write_text(f"[limits]\nqueue = {queue}\nqueue_per_key = {queue}\nqueue_per_service = {queue}\n")
    with serving("--config", str(config), core=None) as server:
        _, normal = as_client(load(server.port, request, queue, seconds / 4))
        before = server.resident_mib()
        statuses, times = as_client(load(server.port, request, 10 * queue, seconds))
        after = server.resident_mib()
    assert set(statuses) <= {200, 429}, statuses
    print(f"overload: {dict(statuses)}, memory {before:.0f} MiB before and {after:.0f} MiB after")
    size = f"{10 * queue} clients that ask every {RETRY_S} s, a queue of {queue}"
    bench.report(Comparison("an accepted picture under overload", size, times, normal, 2.0, "s", "a full queue"))
    bench.report(Comparison("memory of the process after overload", size, [after], [before], 1.1, "MiB", "before it"))


CLAIMS = {"http": http, "overhead": overhead, "batching": batching, "overload": overload}


def main(argv: list[str] | None = None) -> list[Comparison]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return run_claims(CLAIMS, __doc__ or "", "tests.bench.server", argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        serve_peer(sys.argv[2], int(sys.argv[3]))
    else:
        main()
