"""The official client of OpenAI's API, against a server of ours."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy
import openai
import PIL.Image
import pytest

from diffusionz import ZImage
from tests.server.conftest import PATIENCE_S, Customer, Running, Start, ended, until

RED = "a red circle on a blue background"


@pytest.fixture(scope="module")
def zimage() -> Iterator[ZImage]:
    with ZImage("demo", device="cpu") as model:
        yield model


@pytest.fixture(scope="session")
def client(free_server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{free_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def opened(b64: str | None) -> PIL.Image.Image:
    assert b64 is not None
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(b64)))
    picture.load()
    return picture


def refusal(work: Callable[[], Any]) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        work()
    return caught.value


def test_a_picture_is_the_engines(client: openai.OpenAI, zimage: ZImage) -> None:
    made = client.images.generate(
        prompt=RED, model="zimage-demo", size="256x256", extra_body={"seed": 7, "num_inference_steps": 4}
    )
    assert made.data and len(made.data) == 1
    assert made.created and made.output_format == "png" and made.size == "256x256" and made.background == "opaque"
    assert made.usage is not None and made.usage.total_tokens == 0
    assert made.data[0].url is None and made.data[0].seed == 7  # type: ignore[attr-defined]
    assert base64.b64decode(made.data[0].b64_json or "") == zimage.generate(RED, seed=7, steps=4).png


def test_several_as_webp_by_absolute_urls(client: openai.OpenAI, free_server: Running) -> None:
    made = client.images.generate(
        prompt=RED, n=2, size="128x192", response_format="url", output_format="webp", output_compression=50,
        extra_body={"num_inference_steps": 2},
    )  # fmt: skip
    assert made.data and len(made.data) == 2
    for image in made.data:
        assert image.b64_json is None and image.url is not None and image.url.startswith(free_server.url + "/")
        file = httpx2.get(image.url, timeout=PATIENCE_S)
        assert file.headers["content-type"] == "image/webp"
        assert PIL.Image.open(io.BytesIO(file.content)).size == (128, 192)


def test_urls_of_a_server_behind_a_proxy(start: Start) -> None:
    with start("--free", "--public-url", "https://pictures.example") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            body = {"num_inference_steps": 1}
            made = client.images.generate(prompt=RED, size="64x64", response_format="url", extra_body=body)
        assert made.data and (made.data[0].url or "").startswith("https://pictures.example/api/jobs/")
        assert "https://pictures.example/generate" in httpx2.get(server.url + "/llms.txt", timeout=PATIENCE_S).text


def test_what_openai_has_and_a_picture_here_has_not_does_no_harm(client: openai.OpenAI) -> None:
    made = client.images.generate(
        prompt=RED, size="auto", quality="high", moderation="low", background="auto", style="vivid", user="me", n=None,
        complexity="low", safety_identifier="me",
        extra_body={"num_inference_steps": 1, "negative_prompt": "green", "guidance_scale": 1.5},
    )  # fmt: skip
    assert made.quality == "high" and made.data
    assert opened(made.data[0].b64_json).size == (256, 256)


def test_a_stream_has_the_clients_events(client: openai.OpenAI) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydantic warns of what is not as its types say
        # So many steps that none of the previews is there before the one before it was taken, which then is not shown.
        body = {"seed": 3, "num_inference_steps": 40}
        events = list(client.images.generate(prompt=RED, stream=True, partial_images=2, extra_body=body))
        told = [event.model_dump() for event in events]
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    for i, event in enumerate(events[:2]):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == i
        assert opened(event.b64_json).format == "WEBP" and event.output_format == "webp"
        assert opened(event.b64_json).size == (128, 128) and event.size == "128x128"
    last = events[-1]
    assert last.type == "image_generation.completed" and last.usage.total_tokens == 0 and last.size == "256x256"
    assert all(isinstance(one["created_at"], int) and one["background"] == "opaque" for one in told)
    alone = client.images.generate(prompt=RED, extra_body=body)
    assert alone.data and alone.data[0].b64_json == last.b64_json


def test_async_clients_at_once(free_server: Running) -> None:
    async def work() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{free_server.url}/v1", api_key="none", max_retries=0) as client:
            body = {"num_inference_steps": 2}
            one = client.images.generate(prompt=RED, size="128x128", extra_body=body)
            stream = await client.images.generate(
                prompt=RED, size="128x128", stream=True, partial_images=1, extra_body=body
            )
            return [await one, [event.type async for event in stream], (await client.models.list()).data]

    made, events, models = asyncio.run(work())
    assert opened(made.data[0].b64_json).size == (128, 128)
    assert events == ["image_generation.partial_image", "image_generation.completed"]
    assert [model.id for model in models] == ["zimage-demo", "chronos2-demo"]


# --- Edits ---


def file_of(picture: PIL.Image.Image, format: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, format)
    return out.getvalue()


GREY = PIL.Image.linear_gradient("L").convert("RGB")


def test_an_edit_is_the_engines(client: openai.OpenAI, zimage: ZImage) -> None:
    made = client.images.edit(
        image=("grey.png", file_of(GREY)), prompt=RED, extra_body={"seed": 5, "strength": 0.5, "num_inference_steps": 4}
    )
    assert made.data
    image = zimage.generate(RED, seed=5, steps=4, init_image=numpy.asarray(GREY), strength=0.5)
    assert base64.b64decode(made.data[0].b64_json or "") == image.png


@pytest.mark.parametrize(("given", "size", "made"), [
    ((250, 100), None, (240, 96)), ((250, 100), "auto", (240, 96)), ((100, 90), "128x64", (128, 64)),
    ((9, 5), None, (16, 16)),
])  # fmt: skip
def test_an_edit_brings_the_picture_to_size(
    client: openai.OpenAI, given: tuple[int, int], size: Any, made: tuple[int, int]
) -> None:
    options: dict[str, Any] = {} if size is None else {"size": size}
    webp = ("grey.webp", file_of(GREY.resize(given), "WEBP"))
    answer = client.images.edit(image=[webp], prompt=RED, extra_body={"num_inference_steps": 1}, **options)
    assert answer.data and opened(answer.data[0].b64_json).size == made


@pytest.mark.parametrize(
    ("old", "new"), [((64, 48), (32, 16)), ((16, 16), (48, 80)), ((100, 7), (33, 64)), ((5, 5), (5, 5))]
)
def test_resizing_is_pillows(old: tuple[int, int], new: tuple[int, int]) -> None:
    from diffusionz.server.pictures import resized

    pixels = numpy.random.default_rng(1).integers(0, 256, (old[1], old[0], 3), numpy.uint8)
    ours = numpy.frombuffer(resized(pixels.tobytes(), *old, *new), numpy.uint8).reshape(new[1], new[0], 3)
    theirs = numpy.asarray(PIL.Image.fromarray(pixels).resize(new, PIL.Image.Resampling.BILINEAR))
    assert numpy.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_an_edits_stream(client: openai.OpenAI) -> None:
    events = list(client.images.edit(image=("grey.png", file_of(GREY)), prompt=RED, stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_an_edit_with_an_idempotency_key_is_made_once(client: openai.OpenAI) -> None:
    """Though each attempt has a boundary of its own."""
    key = {"Idempotency-Key": f"edit-{time.monotonic_ns()}"}
    made = [
        client.images.edit(
            image=("grey.png", file_of(GREY)), prompt=RED, extra_headers=key, extra_body={"num_inference_steps": 1}
        )
        for _ in range(2)
    ]
    assert made[0].id == made[1].id  # type: ignore[attr-defined]
    error = refusal(lambda: client.images.edit(image=("x.png", file_of(GREY)), prompt="a star", extra_headers=key))
    assert error.status_code == 422


# --- Refusals ---


@pytest.mark.parametrize(("body", "param", "says"), [
    ({"output_format": "jpeg"}, "output_format", "png or webp"),
    ({"output_format": "gif"}, "output_format", "png or webp"),
    ({"output_compression": 50}, "output_compression", "webp"),
    ({"background": "transparent"}, "background", "opaque or auto"),
    ({"response_format": "file"}, "response_format", "b64_json or url"),
    ({"size": "100x100"}, "size", "multiples of 16"),
    ({"size": "0x0"}, "size", "multiples of 16"),
    ({"size": "large"}, "size", "regex"),
    ({"size": "8192x16"}, "size", "4096"),
    ({"size": "4096x4096"}, "size", "4194304"),
    ({"n": 99}, "n", "4"),
    ({"n": 0}, "n", ">= 1"),
    ({"num_inference_steps": 99}, "num_inference_steps", "50"),
    ({"guidance_scale": -1}, "guidance_scale", ">= 0"),
    ({"seed": -1}, "seed", ">= 0"),
    ({"prompt": "x" * 5000}, "prompt", "4000"),
    ({"prompt": None}, "prompt", "str"),
    ({"widht": 256}, "widht", "the fields are"),
])  # fmt: skip
def test_a_refusal_names_the_field_as_the_request_does(
    client: openai.OpenAI, body: dict[str, Any], param: str, says: str
) -> None:
    error = refusal(lambda: client.images.generate(prompt=RED, extra_body=body))
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param and says in error.message and error.code == "invalid-request"


def test_an_unknown_model(client: openai.OpenAI) -> None:
    for name in ("dall-e-3", "chronos2-demo"):  # the second draws nothing
        error = refusal(lambda name=name: client.images.generate(prompt=RED, model=name))  # type: ignore[misc]
        assert isinstance(error, openai.NotFoundError)
        assert (error.code, error.type, error.param) == ("model_not_found", "invalid_request_error", "model")
        assert name in error.message and "zimage-demo" in error.message


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [(model.id, model.object, model.owned_by) for model in models] == [
        ("zimage-demo", "model", "diffusionz"),
        ("chronos2-demo", "model", "diffusionz"),
    ]
    assert client.models.retrieve("zimage-demo") == models[0]
    assert refusal(lambda: client.models.retrieve("of/nobody")).code == "model_not_found"


def test_refusals_of_an_edit(client: openai.OpenAI, free: httpx2.Client) -> None:
    png = ("grey.png", file_of(GREY))
    jpeg = ("grey.jpg", file_of(GREY, "JPEG"))
    for work, param, says in (
        (lambda: client.images.edit(image=png, prompt=RED, mask=png), "mask", "no masks"),
        (lambda: client.images.edit(image=[png, png], prompt=RED), "image", "2 images"),
        (lambda: client.images.edit(image=jpeg, prompt=RED), "image", "PNG"),
        (lambda: client.images.edit(image=("x", b""), prompt=RED), "image", "image"),
        (lambda: client.images.edit(image=png, prompt=RED, extra_body={"strength": "0"}), "strength", "> 0"),
        (lambda: client.images.edit(image=png, prompt=RED, extra_body={"n": "many"}), "n", "int"),
        (lambda: client.images.edit(image=png, prompt=RED, size="8192x16"), "size", "4096"),
    ):
        error = refusal(work)
        assert (error.status_code, error.param) == (400, param) and says in error.message, error.message
    url = "/v1/images/edits"
    assert free.post(url, json={"prompt": RED}).status_code == 415
    assert free.post(url, content=b"xx", headers={"content-type": "multipart/form-data"}).status_code == 400
    broken = free.post(url, content=b"xx", headers={"content-type": "multipart/form-data; boundary=a"})
    assert broken.status_code == 400 and broken.json()["error"]["type"] == "invalid-request"
    many = free.post(url, data={f"f{i}": "x" for i in range(200)}, files={"image": png})
    assert many.status_code == 400
    text = free.post(url, data={"prompt": RED, "image": "data:image/png;base64,AAAA"}, files={"x": png})
    assert text.status_code == 400


def test_a_stream_that_fails_says_so(client: openai.OpenAI, free: httpx2.Client) -> None:
    """What comes after the stream has begun is an event that the client raises."""
    stream = client.images.generate(
        prompt=RED, n=4, stream=True, partial_images=1, extra_body={"num_inference_steps": 50}
    )

    def cancel() -> None:
        for job in free.get("/api/jobs").json()["jobs"]:
            free.post(f"/api/jobs/{job['id']}/cancel")

    with pytest.raises(openai.APIError, match="cancelled"):
        for _ in stream:
            cancel()


def test_a_client_that_leaves_cancels_its_call(free_server: Running, free: httpx2.Client) -> None:
    before = {job["id"] for job in free.get("/api/jobs").json()["jobs"]}
    impatient = openai.OpenAI(base_url=f"{free_server.url}/v1", api_key="none", max_retries=0, timeout=2)
    # A picture of minutes, so that it is not the server that ends it.
    with pytest.raises(openai.APITimeoutError):
        impatient.images.generate(prompt="left behind", n=4, size="512x512", extra_body={"num_inference_steps": 50})
    id = until(lambda: [job["id"] for job in free.get("/api/jobs").json()["jobs"] if job["id"] not in before])[0]
    assert ended(free, id)["status"] == "cancelled"


# --- Where calls cost something ---


def test_a_call_is_charged_and_a_refusal_is_not(dev_server: Running, customer: Callable[..., Customer]) -> None:
    poor, rich = customer(), customer(tokens=150)
    url = f"{dev_server.url}/v1"
    nobody = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    assert isinstance(refusal(lambda: nobody.images.generate(prompt=RED)), openai.AuthenticationError)
    error = refusal(lambda: openai.OpenAI(base_url=url, api_key=poor.key, max_retries=0).images.generate(prompt=RED))
    assert error.status_code == 402 and error.code == "insufficient-credit"
    client = openai.OpenAI(base_url=url, api_key=rich.key, max_retries=0)
    before = rich.balance()["posted"]
    refusal(lambda: client.images.generate(prompt=RED, size="100x100"))
    assert rich.balance()["posted"] == before
    made = client.images.generate(prompt=RED, size="128x128", extra_body={"num_inference_steps": 1})
    cost = made.cost  # type: ignore[attr-defined]
    assert cost["charged"] and rich.balance()["posted"] == before - cost["tokens"]
    events = list(
        client.images.generate(prompt=RED, size="128x128", stream=True, extra_body={"num_inference_steps": 1})
    )
    assert json.loads(events[-1].model_dump_json())["cost"]["charged"]
    after = rich.balance()
    assert (after["posted"], after["held"]) == (before - 2 * cost["tokens"], 0)
