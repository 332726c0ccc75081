"""Drawing, in a browser: previews that arrive, the picture, cancelling, errors, and a picture to start from."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import urllib.request
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.server.browser.conftest import Browser, script


def size(width: int, height: int) -> str:
    """As the page writes it."""
    return f"{width} \N{MULTIPLICATION SIGN} {height}"


def draw(page: Browser, prompt: str, **fields: str) -> None:
    """Fills in the form and sends it."""
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.js(script("watch"))
    page.click("#go")


def done(page: Browser) -> None:
    page.wait(lambda: page.shown("#result"), "the picture")


def facts(page: Browser) -> dict[str, str]:
    pairs = page.js(
        "return [...document.querySelectorAll('#facts div')].map((e) => [...e.children].map((c) => c.textContent))"
    )
    return {name: value for name, value in pairs}


def fetch(page: Browser, selector: str) -> bytes:
    address = page.js(
        "return document.querySelector(arguments[0]).href ?? document.querySelector(arguments[0]).src", selector
    )
    with urllib.request.urlopen(address, timeout=120) as answer:
        return bytes(answer.read())


def call(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def newest_job(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url + "/api/jobs", timeout=120) as answer:
        jobs = json.load(answer)
    newest: dict[str, Any] = (jobs.get("jobs") if isinstance(jobs, dict) else jobs)[0]
    return newest


def test_previews_arrive_and_then_the_picture(draw_page: Browser, free: str) -> None:
    # So many steps that none of the previews is there before the one before it was taken, which then is not shown.
    draw(draw_page, "a white star left of a cyan ring", seed="7", steps="40")
    done(draw_page)
    draw_page.shot("draw")
    seen = draw_page.js("return seen")
    assert [source[:5] for source in seen["pictures"]] == ["data:"] * 4 + ["http:"]
    assert seen["steps"] == sorted(seen["steps"]) and len(seen["steps"]) >= 4, "the bar never goes back"
    assert len([status for status in seen["status"] if re.fullmatch(r"Step \d+ of 40", status)]) >= 4
    assert facts(draw_page)["Seed"] == "7" and facts(draw_page)["Size"] == size(256, 256)
    assert facts(draw_page)["Time"].endswith("s") and "Cost" not in facts(draw_page)
    picture = draw_page["#frame img"]
    assert picture.get_attribute("alt") == "a white star left of a cyan ring"
    assert draw_page.js("return arguments[0].naturalWidth", picture) == 256
    assert draw_page["#save"].get_attribute("download") == "a-white-star-left-of-a-cyan-ring-7.webp"
    # It is the picture that the API draws with this seed.
    assert fetch(draw_page, "#save") == call(
        free + "/generate",
        {"prompt": "a white star left of a cyan ring", "seed": 7, "steps": 40, "width": 256, "height": 256},
    )
    assert "Seed 7" in draw_page.wait(lambda: draw_page.text("#announce"), "the announcement")
    assert not draw_page.shown("#busy") and draw_page["#go"].is_enabled()


def test_previews_are_pictures_of_their_step(draw_page: Browser) -> None:
    draw(draw_page, "a red star", steps="40")
    preview = draw_page.wait(
        lambda: draw_page.js("return document.querySelector('#frame img[src^=data]')?.alt"), "a preview"
    )
    assert preview.startswith("Preview after step ")
    draw_page.shot("draw-busy")
    done(draw_page)
    sizes = draw_page.driver.execute_async_script(
        "const done = arguments[0];"
        "Promise.all(seen.pictures.map((src) => { const image = new Image(); image.src = src;"
        "return image.decode().then(() => image.naturalWidth); })).then(done, (error) => done(String(error)))"
    )
    assert len(sizes) >= 4 and sizes[-1] == 256 and min(sizes) >= 64


def test_again_with_another_seed_and_back_to_the_first(draw_page: Browser) -> None:
    draw(draw_page, "a yellow heart", seed="5")
    done(draw_page)
    first = fetch(draw_page, "#save")
    assert not draw_page.shown("#earlier"), "one picture is no history"
    draw_page.click("#again")
    draw_page.wait(lambda: facts(draw_page).get("Seed") not in (None, "5") and draw_page.shown("#result"))
    assert fetch(draw_page, "#save") != first
    assert len(draw_page.all("#strip button")) == 2
    assert draw_page["#seed"].get_attribute("value") == ""
    draw_page.click("#strip li:last-child button")
    assert draw_page["#seed"].get_attribute("value") == "5" and draw_page.focused() == "prompt"
    draw_page.press(Keys.CONTROL, Keys.ENTER)
    draw_page.wait(lambda: draw_page.shown("#result") and facts(draw_page)["Seed"] == "5")
    assert fetch(draw_page, "#save") == first


def test_the_curl_line_draws_the_same_picture(draw_page: Browser, tmp_path: pathlib.Path) -> None:
    draw(draw_page, 'it\'s a "red" circle $HOME `id` \\ on blue', seed="3", steps="4")
    done(draw_page)
    draw_page.click("#curl")
    draw_page.wait(lambda: draw_page.text("#curl") == "Copied")
    subprocess.run(["bash", "-euc", draw_page.clipboard()], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "picture.webp").read_bytes() == fetch(draw_page, "#save")


def test_a_job_is_cancelled(draw_page: Browser, free: str) -> None:
    draw(draw_page, "a grey moon", steps="50")
    draw_page.wait(lambda: any(status.startswith("Step") for status in draw_page.js("return seen.status")))
    draw_page.click("#cancel")
    draw_page.wait(lambda: not draw_page.shown("#busy"), "the end")
    assert newest_job(free)["status"] == "cancelled"
    assert "Cancelled" in draw_page.wait(lambda: draw_page.text("#announce"))
    assert draw_page["#problem"].text == "" and not draw_page.shown("#result") and draw_page["#go"].is_enabled()
    assert draw_page.shown("#frame .art"), "the empty frame is back"


def test_a_refusal_names_its_field(draw_page: Browser) -> None:
    draw_page.js(
        "const shape = document.querySelector('#shape'); shape.value = 'own'; shape.dispatchEvent(new Event('change'))"
    )
    draw(draw_page, "a red circle", width="4096", height="4096")
    message = draw_page.wait(lambda: draw_page["#problem"].text, "the problem")
    assert "The request is not valid" in message and "pixels in all" in message
    assert draw_page.focused() == "width" and draw_page["#width"].get_attribute("aria-invalid") == "true"
    assert draw_page["#problem"].get_attribute("role") == "alert"
    draw_page.shot("draw-problem")
    draw_page.fill("#width", "64")
    draw_page.fill("#height", "96")
    draw_page.click("#go")
    done(draw_page)
    assert facts(draw_page)["Size"] == size(64, 96)
    assert draw_page["#problem"].text == "" and draw_page["#width"].get_attribute("aria-invalid") is None
    assert any("400" in error for error in draw_page.errors())  # Chromium notes each refusal


def test_the_form_itself_refuses_what_cannot_be(draw_page: Browser, free: str) -> None:
    draw_page.click("#go")
    assert draw_page.focused() == "prompt" and not draw_page.shown("#busy"), "a prompt is wanted"
    draw(draw_page, "a red circle", steps="51")
    assert draw_page.focused() == "steps" and not draw_page.shown("#busy")


def test_a_server_that_is_away_is_said_so(draw_page: Browser) -> None:
    draw_page.network(offline=True)
    draw(draw_page, "a red circle")
    assert "The server does not answer" in draw_page.wait(lambda: draw_page["#problem"].text)
    assert draw_page["#go"].is_enabled()
    draw_page.network()
    draw_page.click("#go")
    done(draw_page)
    assert any("DISCONNECTED" in error for error in draw_page.errors())


def test_a_prompt_is_text_whatever_it_says(draw_page: Browser) -> None:
    prompt = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
    draw(draw_page, prompt, steps="1")
    done(draw_page)
    draw_page.click("#again")
    draw_page.wait(lambda: len(draw_page.all("#strip button")) == 2)
    assert draw_page["#frame img"].get_attribute("alt") == prompt
    assert draw_page["#strip button"].get_attribute("title") == prompt
    assert draw_page.js("return window.hacked") is None
    assert draw_page.all("main script, img[src=x]") == []


@pytest.mark.parametrize("shape, pixels", [("4:3", size(288, 224)), ("3:4", size(224, 288)), ("16:9", size(336, 192))])
def test_shapes_have_the_models_area(draw_page: Browser, shape: str, pixels: str) -> None:
    draw_page.js("document.querySelector('#shape').value = arguments[0]", shape)
    draw(draw_page, "a green diamond", steps="1")
    done(draw_page)
    assert facts(draw_page)["Size"] == pixels


def test_several_pictures_at_once(draw_page: Browser) -> None:
    draw_page.click("details summary")
    draw(draw_page, "a purple moon", n="3", seed="11", steps="2")
    done(draw_page)
    assert facts(draw_page)["Seed"] == "11, 12, 13"
    assert len({picture.get_attribute("src") for picture in draw_page.all("#frame img")}) == 3
    assert len(draw_page.all("#strip button")) == 3


@pytest.fixture(scope="module")
def photograph(free: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A PNG that is not of the picture's shape."""
    path = tmp_path_factory.mktemp("start") / "start.png"
    fields = {"prompt": "a red circle on a blue background", "width": 320, "height": 256, "seed": 1, "format": "png"}
    path.write_bytes(call(free + "/generate", fields))
    return path


def test_it_starts_from_a_picture_that_is_chosen(draw_page: Browser, photograph: pathlib.Path) -> None:
    draw_page.click("#start summary")
    draw_page["#file"].send_keys(str(photograph))
    draw_page.wait(lambda: draw_page.shown("#thumb"), "the thumbnail")
    draw_page.js("const s = document.querySelector('#strength'); s.value = 0.25; s.dispatchEvent(new Event('input'))")
    assert draw_page.text("#strength-shown") == "0.25"
    draw(draw_page, "a red circle on a blue background", seed="2")
    done(draw_page)
    assert facts(draw_page)["Size"] == size(256, 256), "cropped to the shape"
    # So little strength leaves the picture as it was: red in the middle of blue.
    red, blue = draw_page.js(
        "const image = document.querySelector('#frame img'), canvas = document.createElement('canvas');"
        "canvas.width = canvas.height = 256; const context = canvas.getContext('2d', {willReadFrequently: true});"
        "context.drawImage(image, 0, 0);"
        "return [[128, 128], [8, 8]].map(([x, y]) => [...context.getImageData(x, y, 1, 1).data])"
    )
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0], (red, blue)
    draw_page.shot("draw-start")
    # The shell's line reads the picture from a file.
    draw_page.click("#curl")
    draw_page.wait(lambda: draw_page.text("#curl") == "Copied")
    assert '"image":"$(base64 -w0 start.png)"' in draw_page.clipboard()
    draw_page.click("#forget")
    assert not draw_page.shown("#thumb")


def test_it_starts_from_a_picture_that_is_pasted_or_drawn(draw_page: Browser, photograph: pathlib.Path) -> None:
    draw(draw_page, "a red circle on a blue background", seed="1", steps="4")
    done(draw_page)
    draw_page.click("#onward")
    draw_page.wait(lambda: draw_page.shown("#thumb"), "the picture as a start")
    draw_page.click("#forget")
    draw_page.driver.execute_async_script(
        """
        const done = arguments[0], canvas = document.createElement("canvas");
        canvas.width = canvas.height = 64;
        canvas.toBlob((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], "pasted.png", {type: "image/png"}));
          document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
          done();
        });
        """
    )
    draw_page.wait(lambda: draw_page.shown("#thumb"), "the pasted picture")


def test_what_is_no_picture_is_refused(draw_page: Browser, tmp_path: pathlib.Path) -> None:
    (tmp_path / "no.png").write_text("this is no picture")
    draw_page.click("#start summary")
    draw_page["#file"].send_keys(str(tmp_path / "no.png"))
    assert "not a picture" in draw_page.wait(lambda: draw_page["#problem"].text)


def test_examples_fill_the_prompt_and_it_survives_a_way_elsewhere(draw_page: Browser, free: str) -> None:
    draw_page.click(".try:nth-of-type(2)")
    assert draw_page["#prompt"].get_attribute("value") == "a white star left of a cyan ring"
    draw_page.visit(free + "/docs")
    draw_page.visit(free + "/")
    assert draw_page["#prompt"].get_attribute("value") == "a white star left of a cyan ring"


def test_events_that_do_not_come_through_are_asked_for(draw_page: Browser) -> None:
    """A proxy may refuse event streams: the page then asks for the job, again and again."""
    draw_page.cdp("Network.enable")
    draw_page.cdp("Network.setBlockedURLs", urls=["*/events"])
    try:
        draw(draw_page, "a small cyan star", seed="4", steps="2")
        done(draw_page)
        assert facts(draw_page)["Seed"] == "4"
    finally:
        draw_page.cdp("Network.setBlockedURLs", urls=[])
    draw_page.errors()


def test_by_keyboard_alone(draw_page: Browser) -> None:
    order = []
    draw_page.js("document.body.focus()")
    for _ in range(40):
        draw_page.press(Keys.TAB)
        order.append(draw_page.focused())
        if order[-1] == "prompt":
            break
    assert order[-1] == "prompt", order
    draw_page.press("a red ring")
    while draw_page.focused() != "go":
        draw_page.press(Keys.TAB)
        order.append(draw_page.focused())
        assert len(order) < 40, order
    draw_page.press(Keys.ENTER)
    done(draw_page)
    while draw_page.focused() != "save":
        draw_page.press(Keys.TAB)
        order.append(draw_page.focused())
        assert len(order) < 50, order
