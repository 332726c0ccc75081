"""The samples of /docs: each runs as it stands, in a shell or in Python, with DIFFUSIONZ_API_KEY in the environment."""

from __future__ import annotations

import dataclasses

_KEY = ' \\\n  -H "Authorization: Bearer $DIFFUSIONZ_API_KEY"'


@dataclasses.dataclass(frozen=True)
class Sample:
    """One thing to do: `about` says what comes of it."""

    id: str
    title: str
    about: str
    curl: str
    python: str


_SAMPLES = (
    Sample(
        "draw",
        "Draw a picture",
        "The answer is the file; the header X-Seed has its seed, which draws the same picture again.",
        """curl -s -f @ORIGIN@/generate@KEY@ \\
  -H "Content-Type: application/json" \\
  -d '{"prompt": "a red circle on a blue background", "seed": 7}' \\
  -o circle.webp""",
        """from diffusionz import Client

client = Client("@ORIGIN@")
picture = client.zimage("a red circle on a blue background", seed=7)
picture.save("circle.webp")
print(picture.seed, picture.cost)""",
    ),
    Sample(
        "forecast",
        "Forecast a series",
        "Oldest value first, null for a missing one. The answer has the mean, a list a quantile, and a sentence.",
        """curl -s -f @ORIGIN@/forecast@KEY@ \\
  -H "Content-Type: application/json" \\
  -d '{"values": [112, 118, 132, 129, 121, 135, 148, 148], "prediction_length": 4}'""",
        """from diffusionz import Client

client = Client("@ORIGIN@")
forecast = client.chronos2([112, 118, 132, 129, 121, 135, 148, 148], prediction_length=4)
print(forecast.summary)
print(forecast.quantiles["0.5"])""",
    ),
    Sample(
        "batch",
        "Forecast many at once",
        "Each series is a forecast of its own; they need not be of one length.",
        """curl -s -f @ORIGIN@/forecast_batch@KEY@ \\
  -H "Content-Type: application/json" \\
  -d '{"series": [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]], "prediction_length": 2}'""",
        """from diffusionz import Client

client = Client("@ORIGIN@")
for forecast in client.chronos2_batch([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]], prediction_length=2):
    print(forecast.mean)""",
    ),
    Sample(
        "job",
        "Start a job, and watch it",
        "Its events say its place in the queue and each step, and bring previews. POST to its cancel URL stops it.",
        """job=$(curl -s -f @ORIGIN@/api/jobs@KEY@ \\
  -H "Content-Type: application/json" \\
  -d '{"service": "zimage", "prompt": "a small violet heart", "partial_images": 2}' |
  grep -o '"id":"[^"]*"' | head -1 | cut -d '"' -f 4)
curl -s -f -N "@ORIGIN@/api/jobs/$job/events"@KEY@ |
  grep '^event:'""",
        """from diffusionz import Client

client = Client("@ORIGIN@")
job = client.submit("zimage", prompt="a small violet heart")
for event in job.events():
    print(event.type, event.progress)
job.result().save("heart.webp")""",
    ),
    Sample(
        "openai",
        "With OpenAI's client",
        "Whatever speaks OpenAI's images API draws here when its base URL is @ORIGIN@/v1.",
        """curl -s -f @ORIGIN@/v1/images/generations@KEY@ \\
  -H "Content-Type: application/json" \\
  -d '{"prompt": "a white moon on a dark green background", "response_format": "url"}'""",
        """import base64
import os

from openai import OpenAI

client = OpenAI(base_url="@ORIGIN@/v1", api_key=os.environ.get("DIFFUSIONZ_API_KEY", "none"))
answer = client.images.generate(prompt="a white moon on a dark green background", response_format="b64_json")
open("moon.webp", "wb").write(base64.b64decode(answer.data[0].b64_json))""",
    ),
)


def samples(origin: str, *, keyed: bool) -> list[Sample]:
    """The samples for the server at `origin`; keyed: with the key that its calls want."""

    def fill(text: str) -> str:
        return text.replace("@ORIGIN@", origin).replace("@KEY@", _KEY if keyed else "")

    return [
        dataclasses.replace(sample, about=fill(sample.about), curl=fill(sample.curl), python=fill(sample.python))
        for sample in _SAMPLES
    ]
