"""Goal: an adapter of upstream's fit changes the forecasts as it does there.

Method: PEFT makes adapters with random weights on a random model and saves them; upstream's from_pretrained merges
them, and so does the engine.
"""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import chronos_reference as reference
from tests.models import parity
from tests.models.chronos_cases import many
from tests.models.chronos_ours import ChronosError, E, Engine, Request

REQUEST = Request(many(200, 33, 5), 40, group_ids=[0, 0, 1])
# What fit adapts unless it is told otherwise.
DEFAULTS = {
    "r": 8, "lora_alpha": 16,
    "target_modules": ["self_attention.q", "self_attention.v", "self_attention.k", "self_attention.o",
                       "output_patch_embedding.output_layer"],
}  # fmt: skip
CONFIGS = {
    "fit's defaults": {},
    "another scale": {"r": 4, "lora_alpha": 1},
    "rank-stabilized": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "every product": {
        "target_modules": [*DEFAULTS["target_modules"], "mlp.wi", "mlp.wo", "hidden_layer", "residual_layer",
                           "input_patch_embedding.output_layer"],
    },
    "ranks and alphas of some modules": {
        "r": 4, "rank_pattern": {"layer.0.self_attention.q": 2, "output_patch_embedding.output_layer": 7},
        "alpha_pattern": {"self_attention.o": 3, "encoder.block.0.layer.1.self_attention.k": 9},
    },
}  # fmt: skip


def save_adapter(base, to, seed=0, **config):
    """An adapter as fit saves it, with weights as after much training."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(reference.load_pipeline(base).model, LoraConfig(**DEFAULTS | config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) / (2 * parameter.shape[1] ** 0.5)
    model.save_pretrained(to)
    return to


def upstreams(adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = reference.Chronos2Pipeline.from_pretrained(adapter)
    return reference.forecast(pipe, REQUEST)


def assert_same(quantiles, expected, note):
    parity.assert_forecasts(torch.from_numpy(quantiles), *expected, note)


@pytest.fixture(scope="module")
def base(random_chronos):
    return random_chronos("released").folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Of fit's default settings. Whoever changes it works on a copy."""
    return save_adapter(base, tmp_path_factory.mktemp("lora") / "adapter")


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_has_the_effect_that_it_has_upstream(random_chronos, base, tmp_path, name):
    adapter = save_adapter(base, tmp_path / "adapter", **CONFIGS[name])
    expected = upstreams(adapter)
    assert_same(Engine(base, lora_path=adapter).forecast(REQUEST).quantiles, expected, name)
    assert_same(Engine(adapter).forecast(REQUEST).quantiles, expected, f"{name}, by the adapter's folder")
    plain = random_chronos("released").engine.forecast(REQUEST).quantiles
    assert not np.allclose(plain, expected[0], rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_are_read_as_the_numbers_they_hold(adapter, tmp_path, dtype):
    shutil.copytree(adapter, tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert_same(Engine(tmp_path / "half").forecast(REQUEST).quantiles, upstreams(tmp_path / "half"), dtype)


def test_the_base_beside_an_adapter_is_not_changed(random_chronos, base, adapter):
    before = random_chronos("released").engine.forecast(REQUEST).quantiles
    adapted = Engine(base, lora_path=adapter)
    assert np.array_equal(random_chronos("released").engine.forecast(REQUEST).quantiles, before)
    assert not np.array_equal(adapted.forecast(REQUEST).quantiles, before)
    assert np.array_equal(Engine(base).forecast(REQUEST).quantiles, before)


def test_an_adapter_that_was_written_again_is_read_again(base, tmp_path):
    first = Engine(save_adapter(base, tmp_path / "adapter", seed=1)).forecast(REQUEST).quantiles
    again = Engine(save_adapter(base, tmp_path / "adapter", seed=2)).forecast(REQUEST).quantiles
    assert not np.allclose(first, again, rtol=0.01)


# --- What is refused ------------------------------------------------------------------------------------------------


def refused(folder, *named, status="LORA", **options):
    with pytest.raises(ChronosError) as caught:
        Engine(folder, **options)
    assert caught.value.status == E[status], caught.value.message
    for part in named:
        assert part in caught.value.message, caught.value.message


@pytest.fixture
def broken(adapter, tmp_path):
    """broken(change of adapter_config.json, change of the tensors): a changed copy of the adapter."""

    def make(config=None, tensors=None):
        to = tmp_path / "broken"
        shutil.copytree(adapter, to)
        if config is not None:
            content = json.loads((to / "adapter_config.json").read_text())
            config(content)
            (to / "adapter_config.json").write_text(json.dumps(content))
        if tensors is not None:
            content = load_file(to / "adapter_model.safetensors")
            content = tensors(content)
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, to / "adapter_model.safetensors")
        return to

    return make


KEY = "base_model.model.encoder.block.0.layer.0.self_attention.q.lora_A.weight"


def test_keys_that_do_not_fit_are_named(base, broken):
    refused(base, "block.7", lora_path=broken(
        tensors=lambda t: {name.replace("block.1.", "block.7."): tensor for name, tensor in t.items()}
    ))  # fmt: skip


def test_a_half_of_a_pair(base, broken):
    folder = broken(tensors=lambda t: {name: tensor for name, tensor in t.items() if name != KEY})
    refused(base, "block.0.layer.0.self_attention.q", lora_path=folder)


def test_ranks_that_do_not_fit_each_other(base, broken):
    refused(base, "block.0.layer.0.self_attention.q", lora_path=broken(tensors=lambda t: t | {KEY: t[KEY][:5]}))


def test_a_width_that_does_not_fit_the_base(random_chronos, adapter, tmp_path):
    refused(random_chronos("wide").folder, "64", "192", lora_path=adapter)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["final_layer_norm"]}], ids=str
)
def test_an_adapter_with_more_than_low_rank_products(base, tmp_path, config):
    refused(base, "adapter_model.safetensors", lora_path=save_adapter(base, tmp_path / "adapter", **config))


def test_a_scale_that_is_no_number(base, broken):
    refused(base, "lora_alpha", lora_path=broken(config=lambda config: config.update(lora_alpha="much")))


@pytest.mark.parametrize("data", ["", "{", "[]", "7"])
def test_a_config_that_is_no_object(base, broken, data):
    folder = broken()
    (folder / "adapter_config.json").write_text(data)
    refused(base, "adapter_config.json", lora_path=folder)
    refused(folder, "adapter_config.json")


@pytest.mark.parametrize("value", [None, "", "/nowhere/at/all", 7])
def test_a_base_that_is_not_there(broken, value):
    refused(broken(config=lambda config: config.update(base_model_name_or_path=value)), "base_model_name_or_path")


def test_a_base_that_is_itself_an_adapter(adapter, broken):
    refused(broken(config=lambda config: config.update(base_model_name_or_path=str(adapter))), str(adapter))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(base, broken, name):
    folder = broken()
    (folder / name).unlink()
    refused(base, name, lora_path=folder)


def test_what_is_no_adapter(base, tmp_path):
    refused(base, "nowhere", lora_path=tmp_path / "nowhere")
    refused(base, "adapter", lora_path=base)
