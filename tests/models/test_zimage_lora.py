"""Goal: a LoRA file of any trainer changes the picture as it does in diffusers, and taking it away changes nothing.

Method: adapters with random weights are made with PEFT, saved by PEFT and diffusers, and rewritten as other trainers
name them; diffusers' load_lora_weights on the same random model says what each step's latents must be.
"""

import os
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models import parity, reference
from tests.models.cases import SHORT, complete
from tests.models.ours import draw
from tests.models.random_models import load_pipeline

# Every product; the final layer's adaLN_modulation.0 is an activation.
MODULES = (
    r".*(to_[qkv]|to_out\.0|w[123]|(layers|refiner)\.\d\.adaLN_modulation\.0|final_layer.*\.1|linear"
    r"|cap_embedder\.1|x_embedder\.2-1|mlp\.[02])"
)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
REQUEST = complete({"prompt": SHORT, "guidance_scale": 1.0, "steps": 3}, (48, 80))


def make_adapter(folder, config, seed=0):
    """(the pipeline with an adapter of random weights, its adapter's tensors by name)."""
    from peft import get_peft_model_state_dict

    pipe = load_pipeline(folder)
    pipe.transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise / parameter.shape[1] ** 0.5
    return pipe, get_peft_model_state_dict(pipe.transformer)


def save_adapter(folder, to, seed=0, metadata=True, **config):
    """An adapter as diffusers' training scripts save it."""
    from diffusers import ZImagePipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig

    config = {"r": 4, "lora_alpha": 4, "target_modules": MODULES, "init_lora_weights": False} | config
    pipe, tensors = make_adapter(folder, LoraConfig(**config), seed)
    options = _collate_lora_metadata({"transformer": pipe.transformer}) if metadata else {}
    ZImagePipeline.save_lora_weights(to, tensors, **options)
    (file,) = to.glob("*.safetensors")
    return file


def reference_latents(folder, *adapters, request=REQUEST):
    """Each step's latents in diffusers with (file, weight)..."""
    pipe = load_pipeline(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (file, _) in enumerate(adapters):
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"adapter{i}")
        pipe.set_adapters([f"adapter{i}" for i in range(len(adapters))], [weight for _, weight in adapters])
    return reference.latents(pipe, request)


def our_latents(model, file, weight=1.0):
    request = REQUEST | {"lora": str(file), "lora_weight": weight}
    return model.run([{"stage": "latents", "request": request, "out": "steps"}])["steps"][1:]


def modules_of(file):
    """{module: (down, up)} of a file that diffusers wrote."""
    tensors = load_file(file)
    names = {name.removeprefix("transformer.").split(".lora_")[0] for name in tensors}
    return {n: (tensors[f"transformer.{n}.lora_A.weight"], tensors[f"transformer.{n}.lora_B.weight"]) for n in names}


def differ(a, b):
    return ((a.int() - b.int()).abs() > 8).float().mean().item()


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("small")


# --- Files ----------------------------------------------------------------------------------------------------------

# PEFT matches the end of a module's name.
CONFIGS = {
    "plain": {},
    "alpha": {"lora_alpha": 1, "r": 8},
    "alpha of some modules": {"lora_alpha": 2, "alpha_pattern": {"^layers.0.attention.to_k": 9, "to_q": 16, "w2": 1}},
    "alpha of whole names": {"lora_alpha": 2, "alpha_pattern": {"^to_k": 9, "^layers.1.feed_forward.w2": 16}},
    "rank of some modules": {"lora_alpha": 6, "rank_pattern": {"to_v": 2, "layers.0.feed_forward.w1": 7}},
    "rank-stabilized": {"use_rslora": True, "lora_alpha": 3},
    "attention only": {"target_modules": ATTENTION, "lora_alpha": 8},
    "without metadata": {"lora_alpha": 8, "metadata": False},  # the alpha is lost: 4, the rank
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_that_diffusers_saves_has_the_effect_it_has_there(model, tmp_path, name):
    file = save_adapter(model.folder, tmp_path, **CONFIGS[name])
    with safe_open(file, "pt") as opened:
        assert ("lora_adapter_metadata" in (opened.metadata() or {})) == CONFIGS[name].get("metadata", True)
    expected = reference_latents(model.folder, (file, 1.0))
    parity.assert_parity("latents", our_latents(model, file), expected, name)
    without = reference.latents(model.pipe, REQUEST)
    assert parity.relative_error(expected, without) > 0.05


@pytest.mark.parametrize("weight", [0.35, -1.0, 2.0])
def test_the_weight_scales_the_correction(model, tmp_path, weight):
    file = save_adapter(model.folder, tmp_path, lora_alpha=2)
    expected = reference_latents(model.folder, (file, weight))
    parity.assert_parity("latents", our_latents(model, file, weight), expected, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_are_read_as_the_numbers_they_hold(model, tmp_path, dtype):
    file = save_adapter(model.folder, tmp_path, metadata=False)
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    parity.assert_parity("latents", our_latents(model, file), reference_latents(model.folder, (file, 1.0)), dtype)


def test_a_folder_that_peft_saves_has_the_effect_it_has_there(model, tmp_path):
    """PEFT keeps the scale beside the file, in adapter_config.json."""
    from peft import LoraConfig, PeftModel, get_peft_model

    pipe = load_pipeline(model.folder)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=MODULES, init_lora_weights=False)
    get_peft_model(pipe.transformer, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert next(iter(load_file(file))).startswith("base_model.model.")

    pipe = load_pipeline(model.folder)
    PeftModel.from_pretrained(pipe.transformer, tmp_path)  # puts the adapter into the model itself
    parity.assert_parity("latents", our_latents(model, file), reference.latents(pipe, REQUEST))


# down, up, alpha
TRAINERS = {
    "kohya": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight", "lora_unet_{flat}.alpha"),
    "ComfyUI": ("diffusion_model.{module}.lora_A.weight", "diffusion_model.{module}.lora_B.weight", None),
    "ComfyUI, down": (
        "diffusion_model.{module}.lora_down.weight", "diffusion_model.{module}.lora_up.weight",
        "diffusion_model.{module}.alpha",
    ),
    "named default": ("{module}.lora_A.default.weight", "{module}.lora_B.default.weight", None),
    "dots": ("{module}.lora.down.weight", "{module}.lora.up.weight", "{module}.alpha"),
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_other_trainers_names_are_understood_as_diffusers_does(model, tmp_path, trainer):
    names = TRAINERS[trainer]
    made = save_adapter(model.folder, tmp_path / "made", metadata=False)
    tensors = {}
    for module, (down, up) in modules_of(made).items():
        flat = module.replace(".", "_")
        tensors[names[0].format(module=module, flat=flat)] = down
        tensors[names[1].format(module=module, flat=flat)] = up
        if names[2]:
            tensors[names[2].format(module=module, flat=flat)] = torch.tensor(2.5)
    file = tmp_path / "adapter.safetensors"
    save_file(tensors, file)
    # The same in diffusers' own form: the alpha is multiplied in.
    scale = 2.5 / 4 if names[2] else 1.0
    same = tmp_path / "same.safetensors"
    save_file({n: t * scale if ".lora_B." in n else t for n, t in load_file(made).items()}, same)
    expected = reference_latents(model.folder, (same, 1.0))
    parity.assert_parity("latents", our_latents(model, file), expected, trainer)
    # The form was written here: diffusers must read it so too.
    parity.assert_parity("latents", reference_latents(model.folder, (file, 1.0)), expected, f"{trainer}, in diffusers")


@pytest.mark.parametrize("twice", [False, True], ids=["alone", "beside its parts"])
def test_a_correction_of_the_fused_product_corrects_its_three_parts(model, tmp_path, twice):
    """The original's modules have one product for queries, keys and values. Some trainers write it beside its parts,
    which count once."""
    made = save_adapter(model.folder, tmp_path / "made", target_modules=["to_q", "to_out.0"], metadata=False)
    generator = torch.Generator().manual_seed(3)
    alpha = torch.tensor(1.0)  # of rank 4
    kohya, same = {}, {}
    for module, (down, up) in modules_of(made).items():
        if module.endswith("to_q"):
            module, up = module.replace("to_q", "qkv"), torch.randn(3 * 64, 4, generator=generator) / 2
            for part, rows in zip("qkv", up.chunk(3), strict=True):
                stem = f"transformer.{module.replace('qkv', f'to_{part}')}"
                same |= {f"{stem}.lora_A.weight": down.clone(), f"{stem}.lora_B.weight": rows * 0.25}
                if twice:
                    stem = f"lora_unet_{module.replace('qkv', f'to_{part}')}".replace(".", "_")
                    kohya |= {f"{stem}.lora_down.weight": down.clone(), f"{stem}.lora_up.weight": rows.clone()}
                    kohya[f"{stem}.alpha"] = alpha.clone()
        else:
            same |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up * 0.25}
            module = module.replace("to_out.0", "out")
        stem = f"lora_unet_{module}".replace(".", "_")
        kohya |= {
            f"{stem}.lora_down.weight": down.clone(),
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(1.0),
        }
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in same.items()}, tmp_path / "same.safetensors")
    expected = reference_latents(model.folder, (tmp_path / "same.safetensors", 1.0))
    parity.assert_parity("latents", our_latents(model, tmp_path / "kohya.safetensors"), expected)


# --- Loading and unloading ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Two that overlap."""
    folder = tmp_path_factory.mktemp("lora")
    first = save_adapter(model.folder, folder / "first", lora_alpha=2)
    second = save_adapter(model.folder, folder / "second", seed=1, r=2, lora_alpha=3, target_modules=[*ATTENTION, "w2"])
    return first, second


@pytest.fixture
def engine(model):
    yield model.engine
    model.engine.unload_lora()


def reference_picture(model, *weighted):
    pipe = load_pipeline(model.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (file, _) in enumerate(weighted):
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"adapter{i}")
        pipe.set_adapters([f"adapter{i}" for i in range(len(weighted))], [weight for _, weight in weighted])
    return reference.pictures(pipe, REQUEST)[0]


def test_adapters_stack_and_the_same_path_sets_its_weight(model, engine, adapters):
    first, second = adapters
    engine.load_lora(first, 0.9)
    engine.load_lora(second, -0.4)
    parity.assert_same_pixels(draw(engine, REQUEST), reference_picture(model, (first, 0.9), (second, -0.4)))
    engine.load_lora(first, 0.2)
    parity.assert_same_pixels(draw(engine, REQUEST), reference_picture(model, (first, 0.2), (second, -0.4)))


def test_an_adapter_of_one_call_comes_on_top_and_goes_with_it(model, engine, adapters):
    first, second = adapters
    engine.load_lora(first, 0.9)
    loaded = draw(engine, REQUEST)
    size = {name: REQUEST[name] for name in ("width", "height", "steps", "seed")}
    image = engine.generate(SHORT, guidance=1.0, lora=(second, 0.5), **size)
    expected = reference_picture(model, (first, 0.9), (second, 0.5))
    parity.assert_same_pixels(torch.from_numpy(image.pixels.copy()), expected)
    assert differ(loaded, expected) > 0.05
    assert torch.equal(draw(engine, REQUEST), loaded)


def test_a_file_that_was_written_again_is_read_again(engine, adapters, tmp_path):
    file = tmp_path / "adapter.safetensors"
    size = {name: REQUEST[name] for name in ("width", "height", "steps", "seed")}

    def pictures():
        """With the adapter of one call, and loaded."""
        once = engine.generate(SHORT, lora=file, **size).pixels.copy()
        engine.load_lora(file)
        loaded = engine.generate(SHORT, **size).pixels.copy()
        return torch.from_numpy(once), torch.from_numpy(loaded)

    drawn = []
    for i, adapter in enumerate(adapters):
        file.write_bytes(adapter.read_bytes())
        os.utime(file, (i + 1, i + 1))
        engine.unload_lora()
        fresh = pictures()
        assert torch.equal(*fresh)
        drawn.append(fresh[0])
    assert differ(*drawn) > 0.01
    # And without an unload in between.
    file.write_bytes(adapters[0].read_bytes())
    os.utime(file, (9, 9))
    engine.load_lora(file)
    assert torch.equal(torch.from_numpy(engine.generate(SHORT, **size).pixels.copy()), drawn[0])


def test_unloading_restores_the_base_model_bit_for_bit(engine, adapters):
    before = draw(engine, REQUEST)
    for file in adapters:
        engine.load_lora(file)
    assert engine.memory["lora_bytes"] > 0
    assert differ(draw(engine, REQUEST), before) > 0.05
    engine.unload_lora()
    assert torch.equal(draw(engine, REQUEST), before)
    assert engine.memory["lora_bytes"] == 0


def test_two_engines_of_one_model_have_their_own_adapters(model, engine, adapters):
    from diffusionz import ZImage

    before = draw(engine, REQUEST)
    with ZImage(model.folder, device="cpu") as other:
        other.load_lora(adapters[0])
        assert torch.equal(draw(engine, REQUEST), before)
        assert differ(draw(other, REQUEST), before) > 0.05


# --- What is refused ------------------------------------------------------------------------------------------------


def refused(engine, file):
    """The message; the engine draws the base model's picture as before."""
    from diffusionz import LoraError

    before = draw(engine, REQUEST)
    with pytest.raises(LoraError) as caught:
        engine.load_lora(file)
    assert torch.equal(draw(engine, REQUEST), before)
    return str(caught.value)


def with_strangers(file, to, count):
    """The adapter with `count` keys that no Z-Image has."""
    tensors = load_file(file)
    strangers = {f"transformer.double_blocks.{i}.img_attn.lora_A.weight": torch.zeros(4, 64) for i in range(count)}
    save_file(tensors | strangers, to)
    return len(tensors), to


def test_a_file_of_which_under_95_percent_match_is_refused_with_keys_named(engine, adapters, tmp_path):
    count, file = with_strangers(adapters[1], tmp_path / "most.safetensors", 3)
    assert count / (count + 3) < 0.95
    message = refused(engine, file)
    assert f"{count} of {count + 3}" in message and "double_blocks.0.img_attn" in message and str(file) in message


def test_a_few_keys_that_do_not_match_are_left_out(engine, adapters, tmp_path):
    count, file = with_strangers(adapters[0], tmp_path / "nearly.safetensors", 1)
    assert count / (count + 1) > 0.95
    engine.load_lora(adapters[0])
    expected = draw(engine, REQUEST)
    engine.unload_lora()
    save_file(load_file(file), file, safe_open(adapters[0], "pt").metadata())
    engine.load_lora(file)
    assert torch.equal(draw(engine, REQUEST), expected)


def test_another_models_adapter_is_refused_with_both_shapes(random_model, engine, tmp_path):
    file = save_adapter(random_model("wide").folder, tmp_path, target_modules=r"layers\.0\.attention\.to_q")
    assert "[4, 288] and [288, 4]; this model needs [rank, 64] and [64, rank]" in refused(engine, file)


def test_files_that_are_no_adapters_are_refused(model, engine, adapters, tmp_path):
    assert "No such file" in refused(engine, tmp_path / "missing.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(adapters[0].read_bytes()[:1000])
    refused(engine, tmp_path / "damaged.safetensors")
    assert "0 of" in refused(engine, model.folder / "vae" / "diffusion_pytorch_model.safetensors")
    halves = {name: tensor for name, tensor in load_file(adapters[0]).items() if "lora_A" in name}
    save_file(halves, tmp_path / "halves.safetensors")
    assert "lora_B" in refused(engine, tmp_path / "halves.safetensors")


BAD_METADATA = {
    "not a JSON object": '{"transformer.lora_alpha": 4',
    "alpha_pattern has 'to_q'": '{"transformer.alpha_pattern": {"to_q": "four"}}',
    "alpha_pattern has 'to_(q|k)'": '{"transformer.alpha_pattern": {"to_(q|k)": 4}}',
    "deeper than 256": '{"transformer.lora_alpha": ' + "[" * 10**6 + "]" * 10**6 + "}",
}


@pytest.mark.parametrize("message", BAD_METADATA)
def test_a_scale_that_is_not_understood_is_refused(engine, adapters, tmp_path, message):
    save_file(load_file(adapters[0]), tmp_path / "file.safetensors", {"lora_adapter_metadata": BAD_METADATA[message]})
    assert message in refused(engine, tmp_path / "file.safetensors")


def test_the_same_numbers_at_another_place_in_the_file_draw_the_same_bits(model, adapters, tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file(load_file(adapters[0]), file, {"comment": "x" * 8 * i})
    first, *others = [our_latents(model, file) for file in files]
    assert all(torch.equal(first, other) for other in others)
