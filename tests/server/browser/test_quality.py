"""What holds of every page, by day and by night, on a desk and on a phone: names for screen readers, contrast, focus
that is seen, targets that a finger hits, little weight, and nothing that the browser complains of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.server.browser.conftest import DESKTOP, PHONE, Browser, script
from tests.server.browser.test_account import account, forget_everything, rich  # noqa: F401 (fixtures)

WEIGHT = 100_000  # bytes of a first visit, uncompressed

# A page -> what is done to it first, so that everything it has is there.
PAGES = {
    "draw": ("/", "for (const d of document.querySelectorAll('details')) d.open = true"),
    "drawn": ("/", ""),
    "forecast": ("/forecast", ""),
    "forecast-done": ("/forecast", ""),
    "account-out": ("/account", ""),
    "account-in": ("/account", ""),
    "docs": ("/docs", ""),
    "problem": ("/problems/insufficient-credit", ""),
}
PATHS = ["/", "/forecast", "/account", "/docs", "/problems/queue-full"]


def open_page(browser: Browser, dev: str, name: str) -> None:
    """A page, with everything on it that it can show."""
    path, script = PAGES[name]
    browser.visit(dev + path)
    if name == "account-in":
        browser.wait(lambda: browser.shown("#in"))
        browser.wait(lambda: browser.text("#balance") != "…")
        browser.js("document.querySelector('#secret').hidden = false")
    elif name == "account-out":
        browser.wait(lambda: browser.shown("#in") or browser.shown("#wallets button"))
        browser.js("document.querySelector('#in').hidden = true; document.querySelector('#out').hidden = false")
    elif name == "forecast-done":
        browser.click("#example")
        browser.wait(lambda: "144" in browser.text("#found"))
        browser.click("#trend")
        browser.click("#go")
        browser.wait(lambda: browser.shown("#result"))
        browser.js("for (const d of document.querySelectorAll('details')) d.open = true")
    elif name == "drawn":
        # Everything at once: the bar, the picture, a problem, the pictures before.
        browser.fill("#prompt", "a red circle")
        browser.fill("#steps", "1")
        browser.click("#go")
        browser.wait(lambda: browser.shown("#result"))
        browser.click("#again")
        browser.wait(lambda: len(browser.all("#strip button")) == 2 and not browser.shown("#busy"))
        browser.js(
            "for (const id of ['busy', 'result', 'started', 'own']) document.getElementById(id).hidden = false;"
            "document.getElementById('status').textContent = 'Step 3 of 8';"
            "document.getElementById('thumb').src = document.querySelector('#frame img').src;"
            "document.getElementById('problem').innerHTML = '<strong>That</strong><p>did not work</p>'"
        )
    if script:
        browser.js(script)


# --- Names and structure ---

# Everything that a screen reader says something of, without a name.
NAMELESS = {
    "button", "link", "textbox", "combobox", "slider", "spinbutton", "checkbox", "radio", "image",
    "ProgressIndicator", "progressbar", "dialog", "region", "searchbox", "Iframe",
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_everything_has_a_name_and_a_place(account: Browser, dev: str, name: str) -> None:  # noqa: F811
    open_page(account, dev, name)
    assert account.js(script("structure")) == []
    account.cdp("Accessibility.enable")
    nodes = account.cdp("Accessibility.getFullAXTree")["nodes"]
    account.cdp("Accessibility.disable")
    seen = [node for node in nodes if not node["ignored"]]
    nameless = [
        node for node in seen
        if node["role"]["value"] in NAMELESS and not str(node.get("name", {}).get("value", "")).strip()
    ]  # fmt: skip
    assert [(node["role"]["value"], node.get("properties")) for node in nameless] == []
    assert len([node for node in seen if node["role"]["value"] in ("button", "link")]) > 5, "the tree was read"


# --- Contrast ---


@pytest.mark.parametrize("dark", [False, True], ids=["day", "night"])
@pytest.mark.parametrize("name", PAGES)
def test_text_is_read_by_day_and_by_night(account: Browser, dev: str, name: str, dark: bool) -> None:  # noqa: F811
    account.dark(dark)
    open_page(account, dev, name)
    said, count = account.js(script("contrast"))
    assert said == [] and count > 10
    background = account.js("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 128) is dark
    account.shot(f"{name}-{'dark' if dark else 'light'}")


# --- Keyboard ---


@pytest.mark.parametrize("name", ["draw", "drawn", "forecast-done", "account-in", "docs"])
def test_the_focus_is_seen_goes_in_order_and_is_never_caught(account: Browser, dev: str, name: str) -> None:  # noqa: F811
    open_page(account, dev, name)
    account.js(
        "document.activeElement.blur(); window.scrollTo(0, 0);"
        "document.body.tabIndex = -1; document.body.focus(); document.body.blur()"
    )
    stops: list[dict[str, Any]] = []
    for _ in range(150):
        account.press(Keys.TAB)
        stop = account.js(script("focus"))
        if stop is None or (stops and stop["order"] <= stops[0]["order"]):
            break
        stops.append(stop)
    else:
        raise AssertionError("the focus does not come out")
    assert stops[0]["name"].startswith("A# Skip")
    assert [stop["name"] for stop in stops if not stop["seen"]] == []
    assert [stop["name"] for stop in stops if not stop["inside"]] == []
    groups = [stop["order"] for stop in stops]
    assert groups == sorted(groups), [stop["name"] for stop in stops]
    # Nothing that a pointer reaches is left out.
    reachable = account.js(
        "return [...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex=\"0\"]')]"
        ".filter((e) => e.checkVisibility() && !e.disabled && !(e.type === 'radio' && !e.checked)).length"
    )
    assert len(stops) == reachable


def test_the_content_is_one_key_away(browser: Browser, free: str) -> None:
    browser.visit(free + "/docs")
    browser.press(Keys.TAB)
    assert browser.shown(".skip:focus")
    browser.press(Keys.ENTER)
    assert browser.focused() == "main"


# --- Phones ---


@pytest.mark.parametrize("width", [320, PHONE[0], 768])
@pytest.mark.parametrize("name", PAGES)
def test_a_phone_has_room_for_it(account: Browser, dev: str, name: str, width: int) -> None:  # noqa: F811
    account.size(width, PHONE[1], phone=True)
    open_page(account, dev, name)
    assert account.js("return document.documentElement.scrollWidth") <= width
    small = account.js(
        """
        return [...document.querySelectorAll("a, button, input, select, textarea, summary")].filter((e) => {
          const box = e.getBoundingClientRect();
          const inText = getComputedStyle(e).display === "inline";
          const label = e.closest("label") ?? e.labels?.[0];
          const low = Math.max(box.height, label?.getBoundingClientRect().height ?? 0);
          return e.checkVisibility() && !inText && !e.closest(".skip, .filepick") && (low < 24 || box.width < 16);
        }).map((e) => e.outerHTML.slice(0, 100));
        """
    )
    assert small == []
    if width == PHONE[0]:
        account.shot(f"{name}-phone")
    account.size(*DESKTOP)


def test_a_phone_sees_what_it_asked_for(browser: Browser, free: str) -> None:
    browser.size(*PHONE, phone=True)
    browser.dark()
    browser.visit(free + "/")
    browser.fill("#prompt", "a white moon on a dark blue background")
    browser.click("#go")
    browser.wait(lambda: browser.shown("#result"))
    top, bottom = browser.js(
        "const b = document.querySelector('#frame').getBoundingClientRect(); return [b.top, b.bottom]"
    )
    assert 0 <= top and bottom <= PHONE[1], "the picture is in view"
    browser.shot("draw-phone-dark")


def test_a_forecast_on_a_phone_is_touched(browser: Browser, free: str) -> None:
    browser.size(*PHONE, phone=True)
    browser.visit(free + "/forecast")
    browser.click("#example")
    browser.wait(lambda: "144" in browser.text("#found"))
    browser.click("#go")
    browser.wait(lambda: browser.shown("#result"))
    box = browser.js(
        "const b = document.querySelector('.crosshair').getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]"
    )
    browser.cdp(
        "Input.dispatchTouchEvent",
        type="touchStart",
        touchPoints=[{"x": box[0] + box[2] / 2, "y": box[1] + box[3] / 2}],
    )
    browser.cdp("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert 60 < int(browser[".crosshair"].get_attribute("aria-valuenow") or 0) < 100


# --- Weight and quiet ---


@pytest.mark.parametrize("path", PATHS)
def test_a_first_visit_is_light_and_stays_here(browser: Browser, dev: str, path: str) -> None:
    forget_everything(browser, dev)
    browser.cdp("Network.enable")
    browser.cdp("Network.setCacheDisabled", cacheDisabled=True)
    browser.visit(dev + path)
    browser.wait(lambda: browser.js("return document.readyState") == "complete")
    loaded = browser.js(
        "return [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
        ".map((e) => [e.name, e.decodedBodySize, e.transferSize])"
    )
    browser.cdp("Network.setCacheDisabled", cacheDisabled=False)
    assert all(name.startswith((dev, "data:")) for name, *_ in loaded), "nothing comes from elsewhere"
    assert 5_000 < sum(size for _, size, _ in loaded) < WEIGHT, loaded
    assert sum(sent for *_, sent in loaded) < WEIGHT / 2, "it comes compressed"
    print(path, sum(size for _, size, _ in loaded), sum(sent for *_, sent in loaded))


def test_a_second_visit_loads_no_script_again(browser: Browser, free: str) -> None:
    browser.visit(free + "/forecast")
    browser.visit(free + "/forecast")
    sent = browser.js(
        "return performance.getEntriesByType('resource')"
        ".filter((e) => e.name.includes('/static/')).map((e) => e.transferSize)"
    )
    assert len(sent) >= 5 and set(sent) == {0}


def test_nothing_written_into_a_page_runs(browser: Browser, free: str) -> None:
    """The CSP holds, whatever gets into a page."""
    browser.visit(free + "/")
    browser.js(
        "window.broken = []; addEventListener('securitypolicyviolation', (e) => broken.push(e.effectiveDirective));"
        "const box = document.createElement('div'); document.body.append(box);"
        'box.innerHTML = \'<img src="/favicon.ico" onerror="window.hacked=1" onload="window.hacked=1">'
        '<b style="color:red">x</b><iframe src="https://example.org/"></iframe>\';'
        "const script = document.createElement('script'); script.textContent = 'window.hacked = 2';"
        "document.body.append(script);"
        "fetch('https://example.org/').catch(() => {})"
    )
    broken = browser.wait(lambda: len(found := set(browser.js("return broken"))) >= 5 and found, "the refusals")
    assert broken == {"script-src-attr", "style-src-attr", "script-src-elem", "connect-src", "frame-src"}
    assert browser.js("return window.hacked") is None
    browser.errors()


def test_who_wants_no_motion_gets_none(browser: Browser, free: str) -> None:
    for reduced, path in itertools.product([True, False], ["/", "/forecast"]):
        browser.dark(False, reduced_motion=reduced)
        browser.visit(free + path)
        browser.js("document.querySelector('#busy').hidden = false")
        moving = browser.js("return document.getAnimations().length")
        assert (moving == 0) is reduced


def test_without_a_script_the_way_to_the_api_is_shown(browser: Browser, free: str) -> None:
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        for path in ("/", "/forecast", "/docs"):
            browser.visit(free + path)
            assert browser.shown("h1")
            assert path == "/docs" or browser["noscript .notice"].is_displayed()
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)
