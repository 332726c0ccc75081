# %% [markdown]
# # Forecasting Bitcoin candles
#
# Daily prices of BTC/USDT, forecast a week ahead: the close alone, the four prices of a candle together, and the close
# by its log returns. The cells run in order, in an editor that knows `# %%`, or all at once:
#
#     python examples/python/bitcoin_ohlc.py [FOLDER]
#
# writes bitcoin_close.png, bitcoin_ohlc.png, bitcoin_returns.png and bitcoin_ohlc.csv there; without FOLDER, here.

# %%
import pathlib
import sys

import pandas

from diffusionz import Chronos2

folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
folder.mkdir(parents=True, exist_ok=True)
prices = pandas.read_csv(pathlib.Path(__file__).parents[1] / "data" / "btc_ohlc.csv", parse_dates=["date"])
print(prices.tail(3).to_string(index=False))

# %% [markdown]
# ## One series
#
# The bundled model knows nothing of Bitcoin: it was trained on synthetic series alone, and reads what comes next from
# the thirty closes. The levels 0.1 and 0.9 are the ends of the 80% interval.

# %%
model = Chronos2("demo", device="cpu")
week = {"id_column": None, "timestamp_column": "date", "prediction_length": 7, "to_frame": False}

close = model.forecast_df(prices[["date", "close"]], target="close", **week)
print(close.summary())
print("trend:", close.trend)
close.plot(folder / "bitcoin_close.png")

# %% [markdown]
# ## The four prices of a candle
#
# As four targets of one series they inform each other. Nothing in the model says that the high is the highest of the
# four: `constrain_ohlc` makes it so, at each step and level, and likewise the low the lowest. Open, high and low are
# there for the first twenty days.

# %%
candles = prices.dropna()
ohlc = model.forecast_df(candles, target=["open", "high", "low", "close"], constrain_ohlc=True, **week)
print(ohlc.summary())
ohlc.plot(folder / "bitcoin_ohlc.png")
frame = ohlc.to_frame()
frame.to_csv(folder / "bitcoin_ohlc.csv", index=False)

median = frame.pivot(index="date", columns="target_name", values="predictions")
assert (median.max(axis=1) == median["high"]).all()
assert (median.min(axis=1) == median["low"]).all()
print(median[["open", "high", "low", "close"]].round(0).to_string())

# %% [markdown]
# ## Returns in place of prices
#
# Log returns have no level to learn. `returns=True` forecasts log(price / price before), and adds them up to prices:
# the medians as they are, the distances from them as independent ones add up, by their squares. The bands are therefore
# an approximation, exact where returns are normal and independent (`diffusionz.returns`).

# %%
returns = model.forecast_df(prices[["date", "close"]], target="close", returns=True, **week)
print(returns.summary())
returns.plot(folder / "bitcoin_returns.png")
model.close()
