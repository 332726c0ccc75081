"""What programs written for AUTOMATIC1111 do: ask what there is, draw, look on, interrupt."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy
import PIL.Image
import pytest

from diffusionz import ZImage
from diffusionz.server import a1111
from tests.server.conftest import PATIENCE_S, Customer, Running, Start, until

RED = "a red circle on a blue background"
SLOW = {"prompt": "a blue square", "steps": 50, "batch_size": 4}


def draw(client: httpx2.Client, kind: str = "txt2img", **body: Any) -> dict[str, Any]:
    answer = client.post(f"/sdapi/v1/{kind}", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json() | {"info": json.loads(answer.json()["info"])})


def opened(text: str) -> PIL.Image.Image:
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(text)))
    picture.load()
    return picture


def in_base64(picture: PIL.Image.Image, format: str = "PNG") -> str:
    out = io.BytesIO()
    picture.save(out, format)
    return base64.b64encode(out.getvalue()).decode()


GREY = PIL.Image.linear_gradient("L").convert("RGB")


@pytest.fixture(scope="module")
def zimage() -> Iterator[ZImage]:
    with ZImage("demo", device="cpu") as model:
        yield model


# --- Drawing ---


def test_a_picture_is_the_engines(free: httpx2.Client, zimage: ZImage) -> None:
    made = draw(free, prompt=RED, steps=4, seed=7, width=256, height=256)
    assert base64.b64decode(made["images"][0]) == zimage.generate(RED, steps=4, seed=7).png
    info = made["info"]
    assert (info["seed"], info["width"], info["steps"], info["ignored"]) == (7, 256, 4, [])
    assert info["infotexts"] == [
        f"{RED}\nSteps: 4, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 256x256, Model: zimage-demo"
    ]


def test_batches_and_seeds(free: httpx2.Client) -> None:
    made = draw(free, prompt=RED, negative_prompt="green", steps=1, seed=5, width=64, height=48, batch_size=2, n_iter=2)
    assert [opened(image).size for image in made["images"]] == [(64, 48)] * 4
    assert made["info"]["all_seeds"] == [5, 6, 7, 8] and len(made["info"]["infotexts"]) == 4
    assert "Negative prompt: green" in made["info"]["infotexts"][3]
    assert "Seed: 8" in made["info"]["infotexts"][3]


def test_what_programs_send_is_taken_as_a1111_takes_it(free: httpx2.Client) -> None:
    """Numbers as text, null, -1, fields of extensions, sizes of no use."""
    body = {
        "prompt": RED, "negative_prompt": "", "steps": "2", "seed": -1, "subseed": -1, "width": 70, "height": "65",
        "sampler_name": "DPM++ 2M", "scheduler": "Karras", "cfg_scale": "7", "batch_size": None, "styles": [],
        "enable_hr": False, "alwayson_scripts": {"ControlNet": {"args": []}}, "override_settings": {},
        "save_images": False, "tiling": None, "hr_scale": 2,
    }  # fmt: skip
    made = draw(free, **body)
    assert opened(made["images"][0]).size == (64, 64)
    assert made["info"]["ignored"] == ["alwayson_scripts", "hr_scale", "sampler_name", "scheduler", "subseed"]
    assert made["parameters"] == body
    assert made["info"]["seed"] >= 0


def test_nothing_at_all_draws_with_the_models_defaults(free: httpx2.Client) -> None:
    info = draw(free)["info"]
    assert (info["width"], info["height"], info["steps"], info["guidance"]) == (256, 256, 8, 0)


@pytest.mark.parametrize(
    ("cfg_scale", "guidance"), [(None, 0), (7, 0), (7.0, 0), (1, 0), (0, 0), (2.5, 1.5), (7.01, 6.01)]
)
def test_cfg_scale(free: httpx2.Client, cfg_scale: float | None, guidance: float, zimage: ZImage) -> None:
    options = {} if cfg_scale is None else {"cfg_scale": cfg_scale}
    made = draw(free, prompt=RED, negative_prompt="green", steps=2, seed=1, width=64, height=64, **options)
    assert made["info"]["guidance"] == pytest.approx(guidance)
    assert made["info"]["cfg_scale"] == pytest.approx(guidance + 1)
    if cfg_scale == 2.5:
        expected = zimage.generate(RED, negative_prompt="green", steps=2, seed=1, width=64, height=64, guidance=1.5)
        assert base64.b64decode(made["images"][0]) == expected.png


def test_pictures_need_not_be_sent(free: httpx2.Client) -> None:
    assert draw(free, prompt=RED, steps=1, width=64, height=64, send_images=False)["images"] == []


def test_img2img_is_the_engines(free: httpx2.Client, zimage: ZImage) -> None:
    body = {"prompt": RED, "steps": 4, "seed": 3, "denoising_strength": 0.5}
    made = draw(free, "img2img", init_images=["data:image/png;base64," + in_base64(GREY)], **body)
    expected = zimage.generate(RED, steps=4, seed=3, init_image=numpy.asarray(GREY), strength=0.5)
    assert base64.b64decode(made["images"][0]) == expected.png
    assert made["info"]["denoising_strength"] == 0.5 and "init_images" not in made["parameters"]


@pytest.mark.parametrize("mode", [0, 1])
def test_img2img_brings_the_picture_to_size(free: httpx2.Client, mode: int) -> None:
    left_half = PIL.Image.new("RGB", (200, 100), "white")
    left_half.paste("black", (0, 0, 50, 100))
    made = draw(
        free, "img2img", init_images=[in_base64(left_half, "WEBP")], width=64, height=64, resize_mode=mode, steps=50,
        denoising_strength=0.02, prompt=RED,
    )  # fmt: skip
    pixels = numpy.asarray(opened(made["images"][0])).mean(axis=(0, 2))
    assert len(pixels) == 64
    # Stretched, the black quarter is a quarter still; cut to a square, it is gone.
    assert (pixels[:8].mean() < pixels[-8:].mean() - 40) == (mode == 0)


@pytest.mark.parametrize(("kind", "body", "param", "says"), [
    ("txt2img", {"steps": 99}, "steps", "50"),
    ("txt2img", {"steps": "many"}, "steps", "int"),
    ("txt2img", {"width": 8}, "width", "16"),
    ("txt2img", {"width": 8192}, "width", "4096"),
    ("txt2img", {"batch_size": 3, "n_iter": 3}, "batch_size", "9"),
    ("txt2img", {"prompt": ["a"]}, "prompt", "str"),
    ("txt2img", {"seed": -2}, "seed", ">= -1"),
    ("img2img", {}, "init_images", "init_images"),
    ("img2img", {"init_images": ["%%%"]}, "init_images", ""),
    ("img2img", {"init_images": ["é"]}, "init_images", "base64"),
    ("img2img", {"init_images": [in_base64(GREY, "JPEG")]}, "init_images", "PNG"),
    ("img2img", {"init_images": [in_base64(GREY)] * 2}, "init_images", "<= 1"),
    ("img2img", {"init_images": [in_base64(GREY)], "mask": in_base64(GREY)}, "mask", "no masks"),
    ("img2img", {"init_images": [in_base64(GREY)], "resize_mode": 2}, "resize_mode", "<= 1"),
    ("img2img", {"init_images": [in_base64(GREY)], "denoising_strength": 0}, "denoising_strength", "> 0"),
])  # fmt: skip
def test_a_refusal_names_the_field_as_a1111_does(
    free: httpx2.Client, kind: str, body: dict[str, Any], param: str, says: str
) -> None:
    answer = free.post(f"/sdapi/v1/{kind}", json={"prompt": RED} | body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and says in answer.json()["detail"], answer.text


def test_a_body_that_is_no_object(free: httpx2.Client) -> None:
    for content in (b"[]", b"nothing", b"1", b""):
        assert free.post("/sdapi/v1/txt2img", content=content).status_code == 400


# --- Models ---


def test_choosing_a_model(start: Start) -> None:
    with (
        start("--free", "--zimage", "zimage-demo", "--zimage", "other=zimage-demo") as server,
        server.client() as client,
    ):
        titles = [model["title"] for model in client.get("/sdapi/v1/sd-models").json()]
        assert titles == ["zimage-demo", "other"]
        assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "zimage-demo"
        small = {"prompt": RED, "steps": 1, "width": 64, "height": 64}
        assert draw(client, **small)["info"]["sd_model_name"] == "zimage-demo"
        # As A1111's page shows it, with a hash; what else is in it is ignored.
        chosen = {"sd_model_checkpoint": "other [0123456789]", "CLIP_stop_at_last_layers": 2, "eta_noise_seed_delta": 1}
        assert client.post("/sdapi/v1/options", json=chosen).status_code == 200
        assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "other"
        assert draw(client, **small)["info"]["sd_model_name"] == "other"
        override = {"override_settings": {"sd_model_checkpoint": "zimage-demo"}}
        assert draw(client, **small, **override)["info"]["sd_model_name"] == "zimage-demo"
        answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "v1-5-pruned"})
        assert answer.status_code == 404 and answer.json()["error"]["param"] == "sd_model_checkpoint"
        answer = client.post("/sdapi/v1/txt2img", json={"override_settings": {"sd_model_checkpoint": ["x"]}})
        assert answer.status_code == 404
        assert client.post("/sdapi/v1/options", json={}).json() is None


def test_what_programs_ask_for_at_their_start(free: httpx2.Client) -> None:
    for name, value in a1111.CONSTANT.items():
        answer = free.get(f"/sdapi/v1/{name}")
        assert answer.status_code == 200 and answer.json() == value
    assert free.get("/sdapi/v1/samplers").json()[0]["name"] == "Euler"


# --- Looking on ---


def test_progress_and_interrupt(free: httpx2.Client) -> None:
    idle = free.get("/sdapi/v1/progress").json()
    assert (idle["progress"], idle["current_image"], idle["state"]["job_count"]) == (0, None, 0)
    assert free.post("/sdapi/v1/interrupt").json() == {}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(free.post, "/sdapi/v1/txt2img", json=SLOW | {"force_task_id": "task(mine)"})
        seen = until(lambda: (now := free.get("/sdapi/v1/progress").json())["current_image"] and now)
        assert 0 < seen["progress"] < 1 and seen["eta_relative"] > 0
        assert seen["state"]["job"] == "task(mine)" and seen["state"]["sampling_steps"] == 200
        assert opened(seen["current_image"]).size == (128, 128)
        assert free.get("/sdapi/v1/progress", params={"skip_current_image": "true"}).json()["current_image"] is None
        asked = {"id_task": "task(mine)", "id_live_preview": -1, "live_preview": True}
        task = free.post("/internal/progress", json=asked).json()
        assert task["active"] and not task["completed"] and 0 < task["progress"] < 1
        assert opened(task["live_preview"].partition(",")[2]).size == (128, 128)
        assert free.post("/internal/progress", json=asked | {"id_live_preview": 99}).json()["live_preview"] is not None
        other = free.post("/internal/progress", json={"id_task": "another"}).json()
        assert not (other["active"] or other["queued"] or other["completed"])
        assert free.post("/sdapi/v1/interrupt").json() == {}
        answer = drawing.result(PATIENCE_S)
    assert answer.status_code == 409 and answer.json()["type"] == "/problems/cancelled"
    assert free.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0
    assert free.post("/internal/progress", json={"id_task": "task(mine)"}).json()["completed"]


def test_interrupt_is_for_tasks_of_this_api_alone(free: httpx2.Client) -> None:
    job = free.post(
        "/api/jobs", json={"service": "zimage", **{"prompt": RED, "steps": 2, "width": 64, "height": 64}}
    ).json()
    free.post("/sdapi/v1/interrupt")
    ended = until(lambda: (now := free.get(f"/api/jobs/{job['id']}").json())["status"] != "running" and now)
    assert until(lambda: free.get(f"/api/jobs/{job['id']}").json()["status"] in ("completed", "cancelled"))
    assert free.get(f"/api/jobs/{job['id']}").json()["status"] == "completed", ended


def test_keys_by_basic_authentication(dev_server: Running, customer: Callable[..., Customer]) -> None:
    """The only one that A1111's programs know."""
    payer = customer(tokens=100)
    small = {"prompt": RED, "steps": 1, "width": 64, "height": 64}
    with dev_server.client() as nobody:
        assert nobody.post("/sdapi/v1/txt2img", json=small).status_code == 401
        assert nobody.post("/sdapi/v1/txt2img", json=small, auth=("me", "wrong")).status_code == 401
        assert nobody.get("/sdapi/v1/progress", headers={"authorization": "Basic %%"}).status_code == 401
        before = payer.balance()["posted"]
        answer = nobody.post("/sdapi/v1/txt2img", json=small, auth=("me", payer.key))
        assert answer.status_code == 200, answer.text
    assert payer.balance()["posted"] < before and payer.balance()["held"] == 0
