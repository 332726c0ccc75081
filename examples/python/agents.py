# %% [markdown]
# # How agents put services together
#
# Three patterns, against a server: a chain, where each call needs the answer before it; a fan-out, where many go at
# once; and a branch, where an answer decides what comes next. The cells run in order, in an editor that knows `# %%`,
# or all at once:
#
#     diffusionz serve --free &
#     python examples/python/agents.py [FOLDER]
#
# writes chart.webp, and for each metric a card, there; without FOLDER, here. DIFFUSIONZ_URL and DIFFUSIONZ_API_KEY say
# which server is asked, and with which key.

# %%
import asyncio
import pathlib
import sys

import pandas

from diffusionz import AsyncClient, Client

folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
folder.mkdir(parents=True, exist_ok=True)
prices = pandas.read_csv(pathlib.Path(__file__).parents[1] / "data" / "btc_ohlc.csv", parse_dates=["date"])
data = prices["close"]
cutedsl = Client()

# %% [markdown]
# ## A chain
#
# What the forecast says in words goes into the prompt of the picture.

# %%
forecast = cutedsl.chronos2(values=data, prediction_length=64)
print(forecast.summary)
chart = cutedsl.zimage(prompt=f"line chart showing {forecast.summary}", seed=7)
print(chart.url)
chart.save(folder / "chart.webp")

# %% [markdown]
# ## A fan-out
#
# Twenty forecasts are one call, which the engine runs as one batch; a call each would be found by the server and put
# together, too, but each has its own way there and back.

# %%
windows = [data[start:] for start in range(20)]
forecasts = cutedsl.chronos2_batch(series=windows, prediction_length=7)
week_ahead = [forecast.mean[-1] for forecast in forecasts]
print(f"a week ahead, by {len(forecasts)} lengths of history: {min(week_ahead):,.0f} to {max(week_ahead):,.0f}")

# %% [markdown]
# What differs in kind goes at once with the asynchronous client. If one call fails, the others are cancelled with
# their task, and cost nothing.


# %%
async def card(client: AsyncClient, name: str) -> str:
    values = prices[name].dropna()
    forecast = await client.chronos2(values=values, prediction_length=7)
    picture = await client.zimage(prompt=f"dashboard card: {name}, {forecast.trend}", steps=4, seed=7)
    await picture.save(folder / f"card_{name}.webp")
    return f"{name}: {forecast.summary}"


async def dashboard() -> list[str]:
    async with AsyncClient() as client:
        return await asyncio.gather(*(card(client, name) for name in ("open", "high", "low", "close")))


print("\n".join(asyncio.run(dashboard())))

# %% [markdown]
# ## A branch
#
# A day that no one would have expected after the days before it is an anomaly, and worth a closer look.

# %%
for name, values in {"bitcoin": data, "bitcoin, had it crashed": [*data, data.iloc[-1] / 2]}.items():
    forecast = cutedsl.chronos2(values=values)
    print(f"{name}: {forecast.trend}")
    if forecast.trend == "anomaly":
        detailed = cutedsl.chronos2(values=values, prediction_length=128)
        alert_image = cutedsl.zimage(prompt="warning alert dashboard", seed=7)
        print(f"  {detailed.summary}\n  {alert_image.url}")

cutedsl.close()
