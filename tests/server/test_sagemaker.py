"""POST /invocations against what Chronos2 forecasts, in the words of the container's own documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy
import pytest

from diffusionz import Chronos2
from tests.server.conftest import Customer

A = [1.0, 2.0, 3.0, 2.0, 0.5, 2.0, 3.0, 2.0, 1.0]
B = [5.4, 3.0, 3.0, 2.0, 1.5, 2.0, -1.0]
THREE = [[1.0, 2.0, 3.0, 2.0, 1.0, 2.0, 3.0, 4.0], [5.0, 4.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0], [2.0, 2.5, 3.0, 2.5] * 2]
WITH_COVARIATES: list[dict[str, Any]] = [
    {
        "target": A,
        "past_covariates": {"feat_1": [3 * x for x in A], "feat_2": list("ABBBAAAAB"), "feat_3": [10 * x for x in A]},
        "future_covariates": {"feat_1": [2.5, 2.2, 3.3], "feat_2": ["B", "A", "A"]},
    },
    {
        "target": B,
        "past_covariates": {"feat_1": [0.6, 1.2, 1.8, 1.2, 0.3, 1.2, 1.8], "feat_2": list("ABBBAAA"), "feat_3": B},
        "future_covariates": {"feat_1": [1.2, 0.3, 4.4], "feat_2": ["A", "B", "A"]},
    },
]


@pytest.fixture(scope="module")
def model() -> Iterator[Chronos2]:
    with Chronos2("demo", device="cpu") as model:
        yield model


def invoke(client: httpx2.Client, inputs: list[dict[str, Any]], **parameters: Any) -> list[dict[str, Any]]:
    answer = client.post("/invocations", json={"inputs": inputs, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["predictions"])


def close(ours: Any, theirs: Any) -> None:
    numpy.testing.assert_allclose(numpy.array(ours), theirs, rtol=1e-5, atol=1e-6)


def test_the_smallest_request(free: httpx2.Client, model: Chronos2) -> None:
    predictions = free.post("/invocations", json={"inputs": [{"target": A}]}).json()["predictions"]
    made = model.forecast([A], 1, [0.1, 0.5, 0.9])
    assert list(predictions[0]) == ["mean", "0.1", "0.5", "0.9"]
    for i, level in enumerate(["0.1", "0.5", "0.9"]):
        close(predictions[0][level], made.quantiles[0, i])
    assert predictions[0]["mean"] == predictions[0]["0.5"]


def test_several_with_names_and_times(free: httpx2.Client, model: Chronos2) -> None:
    inputs = [
        {"target": A, "item_id": "product_A", "start": "2024-01-01T01:00:00"},
        {"target": B, "item_id": "product_B", "start": "2024-02-02T03:00:00"},
    ]
    made = invoke(free, inputs, prediction_length=5, freq="1h", quantile_levels=[0.9, 0.25], batch_size=2)
    expected = model.forecast([A, B], 5, [0.25, 0.9])
    assert [list(one) for one in made] == [["mean", "0.9", "0.25", "item_id", "start"]] * 2
    # The container's own answers to this.
    assert [one["start"] for one in made] == ["2024-01-01T10:00:00", "2024-02-02T10:00:00"]
    assert [one["item_id"] for one in made] == ["product_A", "product_B"]
    for i, one in enumerate(made):
        close(one["0.25"], expected.quantiles[i, 0])
        close(one["0.9"], expected.quantiles[i, 1])
        close(one["mean"], expected.mean[i])


@pytest.mark.parametrize(("began", "freq"), [
    ("2024-01-01", "D"), ("2024-01-03", "W"), ("2024-01-31", "ME"), ("2024-01-10", "2W-MON"), ("2023-12-30", "B"),
    ("2024-01-01T00:30:00", "15min"), ("2024-03-30T01:00:00+01:00", "6h"), ("2024-01-01", "QS"),
])  # fmt: skip
def test_a_forecast_starts_where_pandas_goes_on(free: httpx2.Client, began: str, freq: str) -> None:
    import pandas

    made = invoke(free, [{"target": A, "start": began}], freq=freq)
    assert made[0]["start"] == pandas.date_range(began, periods=len(A) + 1, freq=freq)[-1].isoformat()


def test_several_targets(free: httpx2.Client, model: Chronos2) -> None:
    made = invoke(free, [{"target": THREE}, {"target": A}, {"target": [A]}], prediction_length=4)
    expected = model.forecast([numpy.array(THREE), A, A], 4, [0.1, 0.5, 0.9])
    close(made[0]["0.1"], expected.quantiles[:3, 0])
    close(made[0]["mean"], expected.mean[:3])
    close(made[1]["0.9"], expected.quantiles[3, 2])
    close(made[2]["0.9"], expected.quantiles[4:, 2])  # a list of one series is answered as one


def test_covariates_and_categories(free: httpx2.Client, model: Chronos2) -> None:
    made = invoke(free, WITH_COVARIATES, prediction_length=3)
    expected = model.forecast(WITH_COVARIATES, 3, [0.1, 0.5, 0.9])
    for i, one in enumerate(made):
        for j, level in enumerate(["0.1", "0.5", "0.9"]):
            close(one[level], expected.quantiles[i, j])


def test_entries_of_different_schemas_are_each_as_alone(free: httpx2.Client) -> None:
    """What the container refuses. With several targets a category is a number among those of its own entry."""
    several = {"target": THREE, "past_covariates": {"c": list("zyxzyxzy")}}
    other = {"target": THREE, "past_covariates": {"c": list("abcabcab")}}
    covariates = {"c": ["a", None, "b", "a", "b"], "x": [1, 2, 3, 4, None]}
    missing = {"target": [1.0, None, 3.0, 2.0, 4.0], "past_covariates": covariates}
    flags = {"target": A, "past_covariates": {"c": [True, False, True, True, False, True, False, True, True]}}
    inputs = [several, {"target": A}, WITH_COVARIATES[0], other, {"target": B}, missing, flags]
    together = invoke(free, inputs, prediction_length=3)
    for one, made in zip(inputs, together, strict=True):
        alone = invoke(free, [one], prediction_length=3)[0]
        for name in alone:
            close(made[name], alone[name])


@pytest.mark.parametrize("name", ["cross_learning", "predict_batches_jointly"])
@pytest.mark.parametrize("batch_size", [2, 256])
def test_cross_learning(free: httpx2.Client, model: Chronos2, name: str, batch_size: int) -> None:
    series = [A, B, A[::-1]]
    made = invoke(free, [{"target": one} for one in series], prediction_length=3, batch_size=batch_size, **{name: True})
    expected = model.forecast(series, 3, [0.1, 0.5, 0.9], cross_learning=True, batch_size=batch_size)
    alone = model.forecast(series, 3, [0.1, 0.5, 0.9])
    close([one["0.9"] for one in made], expected.quantiles[:, 2])
    assert not numpy.allclose(expected.quantiles, alone.quantiles)


ONE: dict[str, Any] = {"target": A}
PAST = ONE | {"past_covariates": {"x": A}}


@pytest.mark.parametrize(("inputs", "parameters", "param", "says"), [
    ([], {}, "inputs", "length >= 1"),
    ([{"target": []}], {}, "inputs[0].target", ">= 1"),
    ([{"target": [None, None]}], {}, "inputs[0].target", "no values"),
    ([{"target": [1, 1e300]}], {}, "inputs[0].target", "float32"),
    ([{"target": ["1", "2"]}], {}, "inputs[0].target[0]", "str"),
    ([{"target": [[1, 2], [1]]}], {}, "inputs[0].target", "one length"),
    ([{"target": [[1, 2], 1]}], {}, "inputs[0].target", "one length"),
    ([{"target": [1, [1, 2]]}], {}, "inputs[0].target", "one length"),
    ([ONE], {"prediction_length": 0}, "parameters.prediction_length", ">= 1"),
    ([ONE], {"prediction_length": 2000}, "parameters.prediction_length", "1024"),
    ([ONE], {"quantile_levels": [1.5]}, "parameters.quantile_levels", "under 1"),
    ([ONE], {"num_samples": 20}, "parameters.num_samples", "no field"),
    ([ONE], {"model": "zimage-demo"}, "parameters.model", "chronos2-demo"),
    ([ONE], {"freq": "1h"}, "inputs[0].start", "come together"),
    ([ONE | {"start": "2024-01-01"}], {}, "parameters.freq", "come together"),
    ([ONE | {"start": "yesterday"}], {"freq": "1h"}, "inputs[0].start", "ISO 8601"),
    ([ONE | {"start": "2024-01-01"}], {"freq": "often"}, "parameters.freq", "pandas"),
    ([ONE | {"start": "2024-01-01"}], {"freq": "-1D"}, "parameters.freq", "forward"),
    ([ONE | {"start": "2024-01-01"}], {"freq": "99999YE"}, "inputs[0].start", "beyond"),
    ([ONE | {"item_id": "a"}, ONE | {"item_id": "a"}], {}, "inputs[1].item_id", "one's alone"),
    ([ONE | {"past_covariates": {"x": [1]}}], {}, "inputs[0].past_covariates.x", "must have 9"),
    ([ONE | {"past_covariates": {"x": [1] * 8 + ["a"]}}], {}, "inputs[0].past_covariates.x", "all numbers, or all"),
    ([ONE | {"future_covariates": {"x": [1]}}], {}, "inputs[0].future_covariates.x", "no past"),
    ([PAST | {"future_covariates": {"x": [1, 2]}}], {}, "inputs[0].future_covariates.x", "must have 1"),
    ([PAST | {"future_covariates": {"x": ["a"]}}], {}, "inputs[0].future_covariates.x", "categories"),
    ([ONE, {"target": THREE}, PAST], {"cross_learning": True}, "inputs", "same covariates"),
    ([ONE] * 1025, {}, "inputs", "1024"),
])  # fmt: skip
def test_a_refusal_names_the_place(
    free: httpx2.Client, inputs: list[Any], parameters: dict[str, Any], param: str, says: str
) -> None:
    answer = free.post("/invocations", json={"inputs": inputs, "parameters": parameters})
    problem = answer.json()
    assert answer.status_code == (404 if "model" in parameters else 400), answer.text
    assert problem["error"]["param"] == param and says in problem["detail"], problem


def test_a_ping(free: httpx2.Client) -> None:
    assert free.get("/ping").status_code == 200


def test_each_target_is_charged(customer: Callable[..., Customer]) -> None:
    payer = customer(tokens=200)
    before, prices = payer.balance()["posted"], list[int]()
    for inputs, count in (([{"target": A}], 1), ([{"target": THREE}, {"target": A}, WITH_COVARIATES[0]], 5)):
        now = payer.balance()["posted"]
        invoke(payer.client, inputs, prediction_length=3)
        paid = now - payer.balance()["posted"]
        prices.append(paid // count)
        assert paid == count * prices[0] > 0
    assert (payer.balance()["posted"], payer.balance()["held"]) == (before - 6 * prices[0], 0)
