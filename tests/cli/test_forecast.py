"""`diffusionz forecast`: files in and out, guesses, words and exit statuses, terminals and signals."""

from __future__ import annotations

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy
import pandas
import pytest

from diffusionz import Chronos2

Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = str(pathlib.Path(sys.executable).with_name("diffusionz"))


@pytest.fixture
def run(tiny_chronos: pathlib.Path, tmp_path: pathlib.Path) -> Run:
    """run("prices.csv", ...): the command in an empty folder, on the tests' model."""

    def call(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, "forecast", "--model", str(tiny_chronos), "--device", "cpu", *arguments],
            cwd=tmp_path, capture_output=True, text=True, input=stdin, timeout=120,
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def model(tiny_chronos: pathlib.Path) -> Chronos2:
    return Chronos2(tiny_chronos, device="cpu")


def prices(days: int = 40) -> Any:
    rng = numpy.random.default_rng(0)
    close = 100 * numpy.exp(0.02 * rng.normal(size=days).cumsum())
    columns = {"date": pandas.date_range("2024-01-01", periods=days).strftime("%Y-%m-%d"), "close": close.round(2)}
    for name in ("open", "high", "low"):
        columns[name] = (close + rng.normal(size=days)).round(2)
    return pandas.DataFrame(columns)


def shops() -> Any:
    """Two shops with a price that is known five days ahead."""
    rng = numpy.random.default_rng(1)
    parts = []
    for shop, days in (("b", 30), ("a", 22)):
        part = pandas.DataFrame({"day": pandas.date_range("2024-01-01", periods=days + 5), "shop": shop})
        part["sales"] = rng.integers(0, 50, days + 5).astype(float)
        part.loc[part.index[-5:], "sales"] = numpy.nan
        part["price"] = rng.normal(size=days + 5).round(3)
        part["weather"] = rng.choice(["sun", "rain"], days + 5)
        parts.append(part)
    return pandas.concat(parts, ignore_index=True)


def fails(done: subprocess.CompletedProcess[str], status: int, *named: str) -> None:
    """Exit status, and one line on stderr with each of `named`; nothing on stdout."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("diffusionz")
    for part in named:
        assert part in done.stderr, done.stderr


def test_a_file(run: Run, tmp_path: pathlib.Path, model: Chronos2) -> None:
    frame = prices()
    frame.to_csv(tmp_path / "prices.csv", index=False)
    done = run("prices.csv", "--horizon", "7", "--target", "close", "--timestamp", "date", "--quantiles", "0.1,0.5,0.9",
               "-o", "forecast.csv", "--plot", "forecast.png")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # no bar in a pipe
    sentence, files = done.stdout.splitlines()
    assert sentence.startswith(f"close: {frame['close'].iloc[-1]:,.0f}"[:8])
    assert " expected after 7 days (" in sentence
    assert files.startswith("forecast.csv  forecast.png  1 series, 7 steps, ")
    assert (tmp_path / "forecast.png").read_bytes().startswith(b"\x89PNG")
    written = pandas.read_csv(tmp_path / "forecast.csv")
    assert list(written.columns) == ["date", "target_name", "predictions", "0.1", "0.5", "0.9"]
    assert written["date"].tolist() == [f"2024-02-{day:02}" for day in range(10, 17)]
    expected = model.forecast(frame["close"], 7, [0.1, 0.5, 0.9])
    numpy.testing.assert_allclose(written["0.9"], expected.quantile(0.9)[0], rtol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["forecast.csv", "forecast.png", "prices.csv"]


def test_what_is_not_named_is_guessed(run: Run, tmp_path: pathlib.Path) -> None:
    prices()[["date", "close"]].to_csv(tmp_path / "two.csv", index=False)
    done = run("two.csv", "--horizon", "3")
    assert done.returncode == 0
    assert done.stderr == "diffusionz: date tells the time, close is forecast\n"
    frame = shops().drop(columns=["price", "weather"])
    frame.to_csv(tmp_path / "shops.csv", index=False)
    done = run("shops.csv", "--horizon", "3")
    assert done.stderr == "diffusionz: day tells the time, shop tells series apart, sales is forecast\n"
    assert [line[:2] for line in done.stdout.splitlines()[:2]] == ["b:", "a:"]
    pandas.DataFrame({"year": range(1950, 2000), "v": range(50)}).to_csv(tmp_path / "years.csv", index=False)
    done = run("years.csv", "--horizon", "2", "-o", "-", "--quiet")
    assert [line[:4] for line in done.stdout.splitlines()] == ["year", "2000", "2001"]
    pandas.DataFrame({"v": range(50)}).to_csv(tmp_path / "v.csv", index=False)
    done = run("v.csv", "--horizon", "2", "-o", "-")
    assert done.stdout.startswith("step,target_name,predictions,0.1,")
    assert done.stderr == "diffusionz: v is forecast\n"
    prices().assign(target=1.0).to_csv(tmp_path / "target.csv", index=False)
    assert "target is forecast" in run("target.csv", "--horizon", "2").stderr


def test_stdin_and_stdout(run: Run, model: Chronos2) -> None:
    done = run("-", "--horizon", "2", "--quantiles", "0.5", "-o", "-", stdin="v\n1\n2\n\n4\n")
    assert done.returncode == 0, done.stderr
    written = pandas.read_csv(io.StringIO(done.stdout))
    assert list(written.columns) == ["step", "target_name", "predictions", "0.5"]
    expected = model.forecast([1, 2, 4], 2)  # pandas leaves out lines that are empty
    numpy.testing.assert_allclose(written["predictions"], expected.mean[0], rtol=1e-5)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_and_missing_values(run: Run, model: Chronos2, separator: str) -> None:
    lines = ["t,v", "2024-01-01,1", "2024-01-02,", "2024-01-03,3", "2024-01-04,NA", "2024-01-05,5"]
    text = "\ufeff" + "\n".join(lines).replace(",", separator)
    done = run("-", "--horizon", "2", "-o", "-", "--quiet", stdin=text)
    assert (done.returncode, done.stderr) == (0, "")
    expected = model.forecast([1, None, 3, None, 5], 2)
    numpy.testing.assert_allclose(pandas.read_csv(io.StringIO(done.stdout))["predictions"], expected.mean[0], rtol=1e-5)


def test_parquet(run: Run, tmp_path: pathlib.Path) -> None:
    prices().to_parquet(tmp_path / "prices.parquet")
    done = run("prices.parquet", "--horizon", "3", "--target", "close", "-o", "forecast.parquet", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert pandas.read_parquet(tmp_path / "forecast.parquet").shape == (3, 12)


def test_json(run: Run, tmp_path: pathlib.Path, tiny_chronos: pathlib.Path) -> None:
    shops().to_csv(tmp_path / "shops.csv", index=False)
    done = run("shops.csv", "--horizon", "4", "--target", "sales", "--id", "shop", "--timestamp", "day", "--json",
               "--quantiles", "0.25,0.5,0.75")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert [series["item_id"] for series in result["series"]] == ["b", "a"]
    one = result["series"][1]
    assert one["target"] == "sales"
    assert one["timestamps"] == ["2024-01-28", "2024-01-29", "2024-01-30", "2024-01-31"]
    assert one["mean"] == one["quantiles"]["0.5"]
    assert [len(values) for values in one["quantiles"].values()] == [4, 4, 4]
    assert one["summary"].startswith("a: ")
    assert one["trend"] in ("up", "down", "flat", "anomaly")
    assert (result["horizon"], result["levels"]) == (4, [0.25, 0.5, 0.75])
    assert (result["model"], result["device"], result["precision"]) == (str(tiny_chronos), "cpu", "float32")
    assert result["timings_ms"]["forecast"] > 0


def test_a_known_future_in_the_last_rows_or_in_a_second_file(run: Run, tmp_path: pathlib.Path, model: Chronos2) -> None:
    frame = shops()
    past, future = frame[frame["sales"].notna()], frame[frame["sales"].isna()]
    frame.sample(frac=1, random_state=0).to_csv(tmp_path / "shops.csv", index=False)
    past.to_csv(tmp_path / "past.csv", index=False)
    future.drop(columns="sales").to_csv(tmp_path / "future.csv", index=False)
    names = ("--target", "sales", "--id", "shop", "--timestamp", "day", "--known-future", "price,weather", "-o", "-")
    one, other = run("shops.csv", *names), run("past.csv", "--future", "future.csv", *names)
    assert (one.returncode, one.stderr, other.stderr) == (0, "", "")
    by_shop = [pandas.read_csv(io.StringIO(done.stdout)).sort_values(["shop", "day"]) for done in (one, other)]
    expected = model.forecast_df(
        past, future_df=future.drop(columns="sales"), id_column="shop", timestamp_column="day", target="sales",
        prediction_length=5,
    ).sort_values(["shop", "day"])  # fmt: skip
    for written in by_shop:
        assert written["day"].tolist() == expected["day"].dt.strftime("%Y-%m-%d").tolist()
        numpy.testing.assert_allclose(written["0.9"], expected["0.9"], rtol=1e-5)
    shorter = run("shops.csv", *names, "--horizon", "3")
    assert shorter.stdout.count("\n") == 7
    # Without their future they are of the past only.
    past_only = run("past.csv", *names[:-4], "--past-only", "price,weather", "--horizon", "5", "-o", "-")
    expected = model.forecast_df(past, id_column="shop", timestamp_column="day", target="sales", prediction_length=5)
    written = pandas.read_csv(io.StringIO(past_only.stdout))
    numpy.testing.assert_allclose(written["0.9"], expected["0.9"], rtol=1e-5)


def test_candles_and_returns(run: Run, tmp_path: pathlib.Path, model: Chronos2) -> None:
    frame = prices().rename(columns=str.title)
    frame.to_csv(tmp_path / "candles.csv", index=False)
    done = run("candles.csv", "--ohlc", "--returns", "--horizon", "7", "-o", "out.csv", "--timestamp", "Date")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:4]] == ["Open", "High", "Low", "Close"]
    median = pandas.read_csv(tmp_path / "out.csv").pivot(index="Date", columns="target_name", values="predictions")
    assert (median["High"] == median.max(axis=1)).all()
    assert (median["Low"] == median.min(axis=1)).all()
    expected = model.forecast_df(
        frame, id_column=None, timestamp_column="Date", target=["Open", "High", "Low", "Close"], prediction_length=7,
        returns=True, constrain_ohlc=True,
    )  # fmt: skip
    numpy.testing.assert_allclose(median["High"], expected[expected["target_name"] == "High"]["predictions"], rtol=1e-5)


def test_options_reach_the_model(run: Run, tmp_path: pathlib.Path, model: Chronos2) -> None:
    frame = shops()[["day", "shop", "sales"]].dropna()
    frame.to_csv(tmp_path / "shops.csv", index=False)
    options: dict[str, Any] = {"context_length": 17, "cross_learning": True, "monotone": True, "freq": "W"}
    done = run("shops.csv", "--horizon", "3", "--id", "shop", "--context-length", "17", "--cross-learning",
               "--monotone", "--freq", "W", "-o", "-")  # fmt: skip
    expected = model.forecast_df(
        frame, id_column="shop", timestamp_column="day", target="sales", prediction_length=3, **options
    )
    written = pandas.read_csv(io.StringIO(done.stdout))
    assert written["day"].tolist() == expected["day"].dt.strftime("%Y-%m-%d").tolist()
    numpy.testing.assert_allclose(written["0.1"], expected["0.1"], rtol=1e-5)


def test_the_series_of_the_package(tmp_path: pathlib.Path) -> None:
    """As `make demo` does, with the bundled model."""
    command = [
        PROGRAM,
        "forecast",
        "airline",
        "--horizon",
        "24",
        "-o",
        "out.csv",
        "--plot",
        "out.png",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "diffusionz: month tells the time, passengers is forecast\n"
    assert done.stdout.startswith("passengers: 432 now, ") or done.stdout.startswith("passengers: 432.0 now, ")
    assert "after 24 months" in done.stdout
    assert pandas.read_csv(tmp_path / "out.csv")["month"].iloc[-1] == "1962-12-01"
    (tmp_path / "airline").write_text("v\n1\n2\n3\n")
    done = subprocess.run([*command[:5], "-o", "-", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("step,")  # a file goes first


def test_many_series(run: Run, tmp_path: pathlib.Path) -> None:
    frame = pandas.DataFrame(
        {"item_id": numpy.repeat(range(30), 20), "timestamp": list(range(20)) * 30, "v": range(600)}
    )
    frame.to_csv(tmp_path / "many.csv", index=False)
    done = run("many.csv", "--id", "item_id", "--timestamp", "timestamp", "--horizon", "2", "--plot", "out.svg")
    lines = done.stdout.splitlines()
    assert len(lines) == 22, done.stderr
    assert lines[20] == "and 10 more"
    assert lines[21].startswith("out.svg (the first 24)  30 series, 2 steps, ")


CLOSE = ("prices.csv", "--target", "close")


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        ((), 2, ["FILE"]),
        (("nowhere.csv",), 1, ["nowhere.csv: No such file or directory"]),
        (("nowhere.parquet",), 1, ["nowhere.parquet: No such file or directory"]),
        (("airlines",), 1, ["airlines", "airline)"]),
        (("folder",), 1, ["folder", "directory"]),
        (("empty.csv",), 1, ["empty.csv is empty"]),
        (("header.csv",), 1, ["header.csv", "no rows"]),
        (("broken.csv",), 1, ["broken.csv cannot be read as CSV"]),
        (("latin.csv",), 1, ["latin.csv", "UTF-8"]),
        (("text.csv",), 2, ["no column holds numbers", "a, b"]),
        (("prices.csv",), 2, ["close, open, high, low", "--target"]),
        (("prices.csv", "--target", "volume"), 2, ['"volume"', "date, close, open, high, low"]),
        (("prices.csv", "--target", "close,close"), 2, ['"close"', "twice"]),
        ((*CLOSE, "--timestamp", "when"), 2, ['"when"']),
        ((*CLOSE, "--id", "shop"), 2, ['"shop"']),
        (("prices.csv", "--target", "date"), 2, ["date", "numbers"]),
        (("gaps.csv",), 2, ["irregular", "2024-01-05", "2024-01-09", "freq"]),
        (("twice.csv",), 2, ["2024-01-01", "--id"]),
        ((*CLOSE, "--horizon", "0"), 2, ["--horizon is 0"]),
        ((*CLOSE, "--horizon", "many"), 2, ["--horizon"]),
        ((*CLOSE, "--quantiles", "0.9,0.1"), 2, ["0.1 after 0.9"]),
        ((*CLOSE, "--quantiles", "low"), 2, ["--quantiles", "low"]),
        ((*CLOSE, "--quantiles", "50"), 2, ["50"]),
        ((*CLOSE, "--freq", "often"), 2, ["often"]),
        ((*CLOSE, "--ohlc"), 2, ["1 targets", "four"]),
        (("gaps.csv", "--ohlc"), 2, ['"open"', "--target"]),
        ((*CLOSE, "--known-future", "open"), 2, ["--future", "close", "there are 0"]),
        ((*CLOSE, "--future", "prices.csv"), 2, ["--known-future"]),
        ((*CLOSE, "--known-future", "open", "--future", "gaps.csv"), 2, ["gaps.csv", '"date"']),
        ((*CLOSE, "-o", "out.xlsx"), 2, ["out.xlsx", ".csv or .parquet"]),
        ((*CLOSE, "-o", "nowhere/out.csv"), 1, ["nowhere/out.csv: No such file or directory"]),
        ((*CLOSE, "--plot", "out.jpg"), 2, ["out.jpg", ".png"]),
        ((*CLOSE, "--plot", "nowhere/out.png"), 1, ["nowhere/out.png"]),
        ((*CLOSE, "-o", "-", "--json"), 2, ["stdout"]),
        ((*CLOSE, "--device", "gpu"), 2, ["gpu"]),
        ((*CLOSE, "--precision", "int4"), 2, ["int4"]),
        ((*CLOSE, "--context-length", "0"), 2, ["context_length is 0"]),
        ((*CLOSE, "--horizn", "3"), 2, ["--horizn"]),
        ((*CLOSE, "--model", "nothing"), 1, ["nothing", "demo"]),
        ((*CLOSE, "--model", "zimage-demo"), 1, ["zimage-demo"]),
    ],
)  # fmt: skip
def test_wrong_use(run: Run, tmp_path: pathlib.Path, arguments: tuple[str, ...], status: int, named: list[str]) -> None:
    prices().to_csv(tmp_path / "prices.csv", index=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("t,v\n")
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n1,2,3,4\n")
    (tmp_path / "latin.csv").write_bytes("größe\n1\n".encode("latin-1"))
    (tmp_path / "text.csv").write_text("a,b\nx,y\nz,w\n")
    days = ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05", "2024-01-09"]
    (tmp_path / "gaps.csv").write_text("t,v\n" + "".join(f"{day},1\n" for day in days))
    (tmp_path / "twice.csv").write_text("t,v\n2024-01-01,1\n2024-01-01,2\n2024-01-02,3\n")
    before = sorted(os.listdir(tmp_path))
    done = run(*arguments, "--quiet") if arguments else run()
    fails(done, status, *named)
    assert sorted(os.listdir(tmp_path)) == before


def test_help_teaches() -> None:
    done = subprocess.run([PROGRAM, "forecast", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout
    for line in done.stdout.splitlines():
        assert len(line) <= 120


def test_an_interrupt_stops_it_in_one_line(
    tiny_chronos: pathlib.Path, tmp_path: pathlib.Path, until_at_work: Callable[[subprocess.Popen[str]], None]
) -> None:
    pandas.DataFrame({"v": numpy.random.default_rng(0).normal(size=4000)}).to_csv(tmp_path / "v.csv", index=False)
    process = subprocess.Popen(
        [PROGRAM, "forecast", "v.csv", "-o", "out.csv", "--model", str(tiny_chronos), "--device", "cpu", "--quiet",
         "--horizon", "1000000"],  # a thousand passes over 8192 steps
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until_at_work(process)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert time.monotonic() - start < 30
    assert (process.returncode, out, err) == (130, "", "diffusionz: stopped\n")
    assert os.listdir(tmp_path) == ["v.csv"]


def test_a_bar_in_a_terminal(
    tiny_chronos: pathlib.Path, tmp_path: pathlib.Path, in_a_terminal: Callable[..., str]
) -> None:
    count = 3000
    frame = pandas.DataFrame(
        {"id": numpy.repeat(range(count), 100), "v": numpy.random.default_rng(0).normal(size=count * 100)}
    )
    frame.to_csv(tmp_path / "many.csv", index=False)
    command = [PROGRAM, "forecast", "many.csv", "--id", "id", "--target", "v", "--horizon", "1024", "--device", "cpu",
               "--model", str(tiny_chronos)]  # fmt: skip
    shown = in_a_terminal(command, tmp_path)
    assert f"/{count}" in shown
    assert "row" in shown
    assert "3000 series, 1024 steps" in shown.splitlines()[-1]
    assert in_a_terminal([*command, "--quiet"], tmp_path) == ""


def test_start_is_quick() -> None:
    """--help loads neither pandas nor the library: processor time of the whole process, best of three."""

    def seconds() -> float:
        before = os.times()
        subprocess.run([PROGRAM, "forecast", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.4
