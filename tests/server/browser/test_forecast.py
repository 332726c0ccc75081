"""Forecasting, in a browser: numbers in whatever form, the plot and its crosshair, the table, and the files."""

from __future__ import annotations

import json
import pathlib
import subprocess
import urllib.request
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.server.browser.conftest import Browser

AIRLINE_24 = ["1961-01", "1962-12"]


def forecast(page: Browser) -> None:
    page.click("#go")
    page.wait(lambda: page.shown("#result") and not page.shown("#busy"), "the forecast")


def at(page: Browser) -> str:
    """What the crosshair says, as a screen reader hears it."""
    return str(page[".crosshair"].get_attribute("aria-valuetext"))


def test_the_example_is_forecast(forecast_page: Browser, free: str) -> None:
    forecast_page.click("#example")
    forecast_page.wait(lambda: "144 values, 1949-01-01 to 1960-12-01" in forecast_page.text("#found"))
    forecast(forecast_page)
    forecast_page.shot("forecast")
    assert " now, " in forecast_page.text("#summary")
    assert forecast_page.text("#facts dt") == "Time"
    assert len(forecast_page.all(".plot path.band")) == 2 and len(forecast_page.all(".plot path.median")) == 1
    # The table is what the API says.
    values = forecast_page.driver.execute_async_script(
        "fetch(document.querySelector('#forecast').dataset.example).then((r) => r.text()).then(arguments[0])"
    )
    body = {
        "values": [float(line.split(",")[1]) for line in values.split()[1:]],
        "prediction_length": 24, "quantile_levels": [0.1, 0.25, 0.5, 0.75, 0.9],
    }  # fmt: skip
    request = urllib.request.Request(
        free + "/forecast", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        expected: dict[str, Any] = json.load(answer)
    forecast_page.click("#result summary")
    rows = [
        [cell.text for cell in row.find_elements("css selector", "th, td")]
        for row in forecast_page.all("#table tbody tr")
    ]
    assert [rows[0][0], rows[-1][0]] == AIRLINE_24 and len(rows) == 24
    for i, row in enumerate(rows):
        wanted = [
            expected["mean"][i],
            *(expected["quantiles"][level][i] for level in ("0.1", "0.25", "0.5", "0.75", "0.9")),
        ]
        assert [float(cell.replace(",", "")) for cell in row[1:]] == pytest.approx(wanted, rel=1e-5)


def test_the_crosshair_by_keyboard_and_by_pointer(forecast_page: Browser) -> None:
    forecast_page.click("#example")
    forecast_page.wait(lambda: "144" in forecast_page.text("#found"))
    forecast(forecast_page)
    slider = forecast_page[".crosshair"]
    assert (
        slider.get_attribute("role") == "slider"
        and slider.get_attribute("aria-label") == "passengers: history and forecast, step by step"
    )
    assert at(forecast_page).startswith("1961-01: median ") and "10 % to 90 %" in at(forecast_page)
    forecast_page.js("arguments[0].focus()", slider)
    forecast_page.press(Keys.ARROW_LEFT)
    assert at(forecast_page) == "1960-12: passengers 432"
    forecast_page.press(Keys.HOME)
    assert at(forecast_page) == "1949-01: passengers 112" and slider.get_attribute("aria-valuenow") == "1"
    forecast_page.press(Keys.ARROW_LEFT)
    assert slider.get_attribute("aria-valuenow") == "1", "it stops at the edge"
    forecast_page.press(Keys.PAGE_UP)
    assert slider.get_attribute("aria-valuenow") == "18"
    forecast_page.press(Keys.END)
    assert at(forecast_page).startswith("1962-12: median ") and slider.get_attribute("aria-valuenow") == "168"
    assert forecast_page.text(".legend").startswith("1962-12"), "what is heard is also seen"
    # A pointer in the middle is at the middle.
    ActionChains(forecast_page.driver).move_to_element(slider).perform()
    assert 70 < int(slider.get_attribute("aria-valuenow") or 0) < 95
    before = slider.get_attribute("aria-valuenow")
    ActionChains(forecast_page.driver).move_by_offset(100, 0).perform()
    assert int(slider.get_attribute("aria-valuenow") or 0) > int(before or 0)


# What people paste -> the columns that it is read as, and the labels.
TEXTS: list[tuple[str, dict[str, list[float | None]], list[str] | None]] = [
    ("1 2 3", {"value": [1, 2, 3]}, None),
    ("1, 2,3 ,4", {"value": [1, 2, 3, 4]}, None),
    ("[1, 2, null, 4.5e1]", {"value": [1, 2, None, 45]}, None),
    ("1\n2\r\n\r\n3\n", {"value": [1, 2, 3]}, None),
    ("1\t2\t3", {"value": [1, 2, 3]}, None),
    ("1,5; 2,25; -3", {"value": [1.5, 2.25, -3]}, None),
    ("1,,3", {"value": [1, None, 3]}, None),
    ("nan 1 N/A 2", {"value": [None, 1, None, 2]}, None),
    ("$1.5 | $2", {"value": [1.5, 2]}, None),
    ("close\n10\n11\n12", {"close": [10, 11, 12]}, None),
    ("# a note\n1 2", {"value": [1, 2]}, None),
    ("day,open,close\n2024-01-01,1,2\n2024-01-02,3,4", {"open": [1, 3], "close": [2, 4]}, ["2024-01-01", "2024-01-02"]),
    ('name;"a;b"\nx;1,5\ny;2,5', {"a;b": [1.5, 2.5]}, None),
    ("2024-01,5\n2024-02,6", {"column 2": [5, 6]}, ["2024-01", "2024-02"]),
    ("a\tb\n1\t\n2\t3", {"a": [1, 2], "b": [None, 3]}, None),
    ("1, 2, 3\n4, 5, 6", {"value": [1, 2, 3, 4, 5, 6]}, None),
    ("\ufeffvalue\n1\n2", {"value": [1, 2]}, None),
    ("", {}, None),
]


def test_numbers_are_read_in_whatever_form(forecast_page: Browser) -> None:
    read = forecast_page.driver.execute_async_script(
        "const [texts, done] = arguments; const page = document.querySelector('#forecast').dataset.example;"
        "import(page.replace('airline.csv', 'series.js')).then(({parse}) => done(texts.map((text) => parse(text))),"
        "(error) => done(String(error)))",
        [text for text, *_ in TEXTS],
    )
    for (text, columns, labels), found in zip(TEXTS, read, strict=True):
        assert {column["name"]: column["values"] for column in found["columns"]} == columns, text
        assert found["labels"] == labels, text


# The last two labels -> the next two.
STEPS = [
    (["2024-01-30", "2024-01-31"], ["2024-02-01", "2024-02-02"]),
    (["2024-10-01", "2024-11-01"], ["2024-12-01", "2025-01-01"]),
    (["2023-10", "2023-11"], ["2023-12", "2024-01"]),
    (["2024-01-01 10:00", "2024-01-01 11:30"], ["2024-01-01 13:00", "2024-01-01 14:30"]),
    (["2020-01-01", "2021-01-01"], ["2022-01-01", "2023-01-01"]),
    (None, ["+1", "+2"]),
]


def test_dates_go_on_as_they_went(forecast_page: Browser) -> None:
    went = forecast_page.driver.execute_async_script(
        "const [labels, done] = arguments; const page = document.querySelector('#forecast').dataset.example;"
        "import(page.replace('airline.csv', 'series.js'))"
        ".then(({continued}) => done(labels.map((some) => continued(some, 2))), (error) => done(String(error)))",
        [labels for labels, _ in STEPS],
    )
    assert went == [after for _, after in STEPS]


def test_pasted_numbers_with_some_missing(forecast_page: Browser) -> None:
    forecast_page.fill("#values", "112; 118; nan; 129; 121; 135; 148; 148")
    forecast_page.fill("#horizon", "3")
    forecast_page.wait(lambda: forecast_page.text("#found") == "8 values, 1 of them missing.")
    forecast(forecast_page)
    forecast_page.js("document.querySelector('.crosshair').focus()")
    forecast_page.press(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert at(forecast_page) == "3: value missing"
    forecast_page.press(Keys.END)
    assert at(forecast_page).startswith("+3: median")


def test_a_file_and_its_columns(forecast_page: Browser, tmp_path: pathlib.Path) -> None:
    lines = ["date,open,close,note"] + [f"2024-01-{i:02},{i * 2},{100 + i},x" for i in range(1, 31)]
    (tmp_path / "prices.csv").write_text("\n".join(lines))
    forecast_page["#upload"].send_keys(str(tmp_path / "prices.csv"))
    forecast_page.wait(lambda: forecast_page.shown("#column"), "the choice of columns")
    assert [option.text for option in forecast_page.all("#column option")] == ["open", "close"]
    forecast_page["#column"].send_keys("open")
    forecast_page.fill("#horizon", "5")
    forecast_page.click("#trend")
    forecast(forecast_page)
    forecast_page.js("document.querySelector('.crosshair').focus()")
    forecast_page.press(Keys.HOME)
    assert at(forecast_page) == "2024-01-01: open 2"
    forecast_page.press(Keys.END)
    assert at(forecast_page).startswith("2024-02-04: median")
    assert forecast_page.text("#facts dt") == "Trend" and forecast_page.text("#facts dd") in (
        "up",
        "down",
        "flat",
        "anomaly",
    )


def test_its_files_and_its_curl_line(forecast_page: Browser, tmp_path: pathlib.Path) -> None:
    forecast_page.fill("#values", "3 1 4 1 5 9 2 6 5 3 5 8")
    forecast_page.fill("#horizon", "4")
    forecast_page.fill("#levels", "0.2 0.8")
    forecast(forecast_page)
    assert "mean" in at(forecast_page) and "20 % to 80 %" in at(forecast_page), "no median was asked for"
    for old in forecast_page.downloads.iterdir():
        old.unlink()
    forecast_page.click("#save")
    file = forecast_page.downloads / "forecast.csv"
    forecast_page.wait(file.exists, "the file")
    head, *rows = file.read_text().split()
    assert head == "step,mean,0.2,0.8" and len(rows) == 4
    forecast_page.click("#curl")
    forecast_page.wait(lambda: forecast_page.text("#curl") == "Copied")
    called = subprocess.run(
        ["bash", "-euc", forecast_page.clipboard()], cwd=tmp_path, check=True, timeout=60, capture_output=True
    )
    result = json.loads(called.stdout)
    assert [float(row.split(",")[2]) for row in rows] == pytest.approx(result["quantiles"]["0.2"])


@pytest.mark.parametrize(
    "field, text, says",
    [
        ("values", "1 2 three 4", "“three” is not a number (value 3)"),
        ("levels", "0.1 2", "Quantiles are over 0 and under 1"),
        ("levels", "many", "Quantiles are over 0 and under 1"),
    ],
)
def test_what_cannot_be_forecast_is_said_at_its_field(forecast_page: Browser, field: str, text: str, says: str) -> None:
    forecast_page.fill("#values", "1 2 3 4 5 6")
    forecast_page.fill(f"#{field}", text)
    forecast_page.click("#go")
    assert says in forecast_page.wait(lambda: forecast_page["#problem"].text)
    assert forecast_page.focused() == field and forecast_page[f"#{field}"].get_attribute("aria-invalid") == "true"


def test_a_refusal_of_the_server_names_its_field(forecast_page: Browser) -> None:
    forecast_page.fill("#values", "1 2 3 4 5 6")
    forecast_page.js("document.querySelector('#horizon').max = 9999")
    forecast_page.fill("#horizon", "9999")
    forecast_page.click("#go")
    assert "1024" in forecast_page.wait(lambda: forecast_page["#problem"].text)
    assert forecast_page.focused() == "horizon"
    assert any("400" in error for error in forecast_page.errors())


def test_a_long_history_shows_its_end_first(forecast_page: Browser) -> None:
    forecast_page.paste("#values", " ".join(str(100 + i % 24) for i in range(1000)))
    forecast_page.fill("#horizon", "10")
    forecast(forecast_page)
    assert forecast_page[".crosshair"].get_attribute("aria-valuemax") == "310"
    forecast_page.click("#whole")
    assert forecast_page[".crosshair"].get_attribute("aria-valuemax") == "1010"


def test_a_forecast_is_cancelled(forecast_page: Browser) -> None:
    forecast_page.fill("#values", "1 2 3 4 5 6")
    forecast_page.network(latency_ms=120_000)
    forecast_page.click("#go")
    forecast_page.wait(lambda: forecast_page.shown("#cancel"))
    forecast_page.click("#cancel")
    forecast_page.wait(lambda: not forecast_page.shown("#busy"), seconds=60)  # no answer was waited for
    assert "Cancelled" in forecast_page.wait(lambda: forecast_page.text("#announce"))
    assert forecast_page["#problem"].text == "" and forecast_page.shown("#empty")


def test_names_in_a_file_are_text(forecast_page: Browser, tmp_path: pathlib.Path) -> None:
    name = "<img src=x onerror=window.hacked=1>"
    (tmp_path / "x.csv").write_text(f"t,{name}\na,1\nb,2\nc,3\nd,4\n")
    forecast_page["#upload"].send_keys(str(tmp_path / "x.csv"))
    forecast_page.wait(lambda: "4 values" in forecast_page.text("#found"))
    forecast(forecast_page)
    forecast_page.js("document.querySelector('.crosshair').focus()")
    forecast_page.press(Keys.HOME)
    assert at(forecast_page) == f"1: {name} 1"
    assert forecast_page.js("return window.hacked") is None and forecast_page.all("img[src=x]") == []
