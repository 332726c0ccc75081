"""What the tests of the page share: two real servers, and one headless Chromium that looks at them.

DIFFUSIONZ_SCREENSHOTS=FOLDER keeps pictures of what the tests see.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

WAIT_S = 90  # for what takes a moment: two busy cores draw slowly
SCRIPTS = pathlib.Path(__file__).parent / "scripts"
DESKTOP = (1280, 860)
PHONE = (390, 844)


def script(name: str) -> str:
    """What is run within a page."""
    return (SCRIPTS / f"{name}.js").read_text()


def serve(*options: str, log: pathlib.Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server in a process of its own, and where it listens."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "diffusionz", "serve", "--port", "0", "--device", "cpu", "--log", "json", *options],
            stdout=out, stderr=out, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    end = time.monotonic() + 2 * WAIT_S
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            if '"listening"' in line and line.endswith("}"):  # all of it
                return process, json.loads(line)["url"]
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def served(factory: pytest.TempPathFactory, name: str, *options: str) -> Iterator[str]:
    log = factory.mktemp("server") / f"{name}.log"
    process, url = serve(*options, log=log)
    yield url
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(WAIT_S) == 0, log.read_text()
    finally:
        process.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="session")
def free(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server where nothing costs anything."""
    yield from served(tmp_path_factory, "free", "--free")


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with a ledger, a chain of its own and a faucet."""
    yield from served(tmp_path_factory, "dev", "--dev")


class Browser:
    """Chromium, as the tests use it. Elements are named by CSS selectors."""

    def __init__(self, driver: webdriver.Chrome, downloads: pathlib.Path) -> None:
        self.driver = driver
        self.downloads = downloads
        self.scripts: list[str] = []

    # --- Where it looks, and how ---

    def visit(self, url: str) -> None:
        self.driver.get(url)

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def dark(self, dark: bool = True, *, reduced_motion: bool = True) -> None:
        self.cdp(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
            ],
        )

    def before_each_page(self, script: str) -> None:
        """Runs a script before those of each page, until `reset`: as an extension does."""
        self.scripts.append(self.cdp("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"])

    def network(self, *, offline: bool = False, latency_ms: int = 0) -> None:
        self.cdp("Network.enable")
        self.cdp(
            "Network.emulateNetworkConditions",
            offline=offline, latency=latency_ms, downloadThroughput=-1, uploadThroughput=-1,
        )  # fmt: skip

    def reset(self) -> None:
        """A new visitor: nothing remembered, a desktop by day."""
        for script in self.scripts:
            self.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
        self.scripts.clear()
        self.network()
        self.size(*DESKTOP)
        self.dark(False)
        self.driver.get_log("browser")

    def shot(self, name: str, *, full: bool = True) -> None:
        """Keeps a picture of the page, where pictures are wanted."""
        if folder := os.environ.get("DIFFUSIONZ_SCREENSHOTS"):
            picture = self.cdp("Page.captureScreenshot", captureBeyondViewport=full)["data"]
            path = pathlib.Path(folder) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(picture))

    # --- What is there ---

    def __getitem__(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector)).strip()

    def shown(self, selector: str) -> bool:
        return any(element.is_displayed() for element in self.all(selector))

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], what: str = "", seconds: float = WAIT_S) -> Any:
        """What `condition` gives, as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.03)
        raise AssertionError(f"{what or 'it'} did not come to be; the page says: {self['main'].text[:2000]}")

    def errors(self) -> list[str]:
        """What the console has complained of since the last time, a breach of the CSP among it."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    # --- What a visitor does ---

    def click(self, selector: str) -> None:
        element = self[selector]
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def fill(self, selector: str, text: str) -> None:
        element = self[selector]
        element.clear()
        element.send_keys(text)

    def paste(self, selector: str, text: str) -> None:
        """Puts a long text into a field at once."""
        self.js(
            "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}))",
            selector, text,
        )  # fmt: skip

    def press(self, *keys: str) -> None:
        """Types into whatever has the focus; a modifier that comes first is held."""
        actions = ActionChains(self.driver)
        held = [key for key in keys if key in (Keys.CONTROL, Keys.SHIFT)]
        for key in held:
            actions.key_down(key)
        actions.send_keys(*(key for key in keys if key not in held))
        for key in held:
            actions.key_up(key)
        actions.perform()

    def focused(self) -> str:
        """The id of what has the focus, or its tag."""
        return str(self.js("return document.activeElement.id || document.activeElement.tagName"))

    def clipboard(self) -> str:
        return str(self.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])"))


def _binary(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = _binary("chromium", "chromium-browser", "google-chrome")
    chromedriver = _binary("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("no browser is installed: apt-get install chromium chromium-driver")
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(WAIT_S)
    browser = Browser(driver, downloads)
    browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    browser.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    yield browser
    driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser, as new. Whatever the console complains of fails the test that did not expect it."""
    chromium.reset()
    yield chromium
    assert chromium.errors() == []


@pytest.fixture
def draw_page(browser: Browser, free: str) -> Browser:
    browser.visit(free + "/docs")
    browser.js("sessionStorage.clear()")  # what was drawn before is kept there
    browser.visit(free + "/")
    return browser


@pytest.fixture
def forecast_page(browser: Browser, free: str) -> Browser:
    browser.visit(free + "/forecast")
    return browser
