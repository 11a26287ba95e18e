"""Published settings: what methods recommend, recipes by name, and defaults that follow the teacher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from distill.core.config.load import load_configuration
from distill.core.engine.networks import Networks
from distill.core.errors import ConfigError, UserError
from distill.core.plugin_api.batch import Batch
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.family import LoraSettings, MicroConditioning
from distill.core.plugin_api.method import MethodSetup, completed
from distill.core.registry.registry import Registry
from distill.distill_methods.dmd2 import DMD2
from distill.distill_methods.guidance import Guidance
from distill.distill_methods.lcm import LCM
from distill.distill_methods.pcm import PCM
from distill.distill_methods.progressive import Progressive
from distill.distill_methods.recipe import Recipe
from distill.model_families.sdxl import SDXL
from support.config_files import Pair, distill, said
from support.tiny_families import MODELS

TOLD = MethodSetup("lora", prediction_type="flow", guided_by_input=True, usual_guidance=3.5)
RECIPES = (
    "dmd2-sdxl-1",
    "dmd2-sdxl-4",
    "dmd2-sdxl-4-lora",
    "hyper-sdxl-tscd",
    "lcm-lora-sdxl",
    "lightning-sdxl",
    "pcm-sdxl-4",
    "tcd-sdxl",
)


@pytest.fixture(scope="module")
def registry():
    return Registry.load(installed=False)


@pytest.fixture
def load(tmp_path, registry, monkeypatch):
    def loaded(method, run=None, *, settings=None, recipe=None):
        pair = Pair(tmp_path)
        pair.config |= {"distillation_method": method, "distillation_config": {method: settings or {}}, **(run or {})}
        if recipe is not None:
            monkeypatch.setenv("LPIPS_VGG16", str(tmp_path / "vgg16.pt"))
            (tmp_path / "vgg16.pt").touch()
            pair.config = {key: pair.config[key] for key in ("pretrained_model_name_or_path", "output_dir")}
            pair.config |= {"recipe": recipe, "mixed_precision": "bf16", **(run or {})}
            pair.config["pixel_decoder"] = str(SDXL.miniature / "vae")
        pair.write()
        return load_configuration(registry, config_file=pair.config_file, data_file=pair.data_file)

    return loaded


# -- the teacher's guidance -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux_dev(tmp_path_factory):
    return MODELS["flux-dev"].make(MODELS["flux-dev"].write(tmp_path_factory.mktemp("flux")))


def told(family, method, config, monkeypatch):
    """Calls of the teacher in one step: (samples, guidance scales told)."""
    config = completed(method, config, TOLD)
    roles = method.roles(config, TOLD)
    networks = Networks(family, roles, lora=LoraSettings(4, 4.0), seed=0)
    context = Context(Runtime(family, networks, 0, torch.device("cpu"), stages=method.stages(config, total_steps=5)))
    embeds = family.encode_prompts(["a", "b"])
    cond = family.condition(embeds, MicroConditioning([(8, 8)] * 2, [(0, 0)] * 2, [(8, 8)] * 2))
    latents = torch.randn(2, family.latent_channels, 4, 4)
    batch = Batch(latents, cond, ("a", "b"), (0, 1), latent_shape=tuple(latents.shape[1:]))
    calls, predict, use, role_of = [], family.predict, networks.use, []

    def spying(network, x_t, *rest, guidance=None, **more):
        if role_of[-1] == "teacher":
            calls.append((len(x_t), None if guidance is None else [round(float(g) + 1, 3) for g in guidance]))
        return predict(network, x_t, *rest, guidance=guidance, **more)

    monkeypatch.setattr(family, "predict", spying)
    monkeypatch.setattr(networks, "use", lambda role: (role_of.append(role), use(role))[1])
    for _ in method(config, TOLD).updates(context.at(4, (0, 1)), batch, 4):
        pass
    return calls


@pytest.mark.parametrize(
    ("method", "settings", "scale"),
    [
        (DMD2, {"num_inference_steps": 1}, 3.5),
        (DMD2, {"num_inference_steps": 1, "guidance_scale": 2.0}, 2.0),
        (LCM, {}, 3.5),
        (LCM, {"guidance_convention": "paper"}, 3.5),
        (PCM, {"adversarial_weight": 0.0}, 3.5),
    ],
)
def test_a_teacher_that_is_told_its_scale_is_called_once_with_its_usual_one(
    method, settings, scale, flux_dev, monkeypatch
):
    assert told(flux_dev, method, method.Config(**settings), monkeypatch) == [(2, [scale, scale])]


def test_defaults_stay_for_a_teacher_guided_by_two_calls():
    setup = MethodSetup("lora")
    for method in (LCM, PCM, DMD2):
        config = method.Config()
        assert completed(method, config, setup) is config


def test_terms_of_a_recipe_follow_the_teacher_too(registry):
    config = Recipe.Config(terms=[{"method": "lcm"}])
    config.terms[0].bind(LCM, LCM.Config())
    completed(Recipe, config, TOLD)
    assert config.terms[0].settings.scales == (3.5, 3.5)


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        (DMD2, {"guidance": "decoupled"}, "distillation_config.dmd2.guidance"),
        (PCM, {"cfg_free": True}, "distillation_config.pcm.cfg_free"),
        (Progressive, {"w_min": 1.0, "w_max": 1.0}, "distillation_config.progressive: w_min = w_max = 1"),
        (Guidance, {}, "distillation_method = 'guidance'"),
    ],
)
def test_what_needs_a_teacher_without_guidance_is_refused(method, settings, named):
    method.requires(method.Config(**settings), MethodSetup("lora"))
    with pytest.raises(UserError, match=re.escape(named)) as error:
        method.requires(method.Config(**settings), TOLD)
    assert "takes" in error.value.message
    assert "input" in error.value.message


def test_config_check_says_the_scale_and_refuses_before_weights_load(tmp_path):
    model = MODELS["flux-dev"].write(tmp_path / "flux")
    (tmp_path / "pair").mkdir()
    pair = Pair(tmp_path / "pair", {"model_family": "flux", "pretrained_model_name_or_path": str(model)})
    pair.config |= {"distillation_method": "dmd2", "distillation_config": {}, "resolution": 64}
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 0, result.stderr
    assert "takes the guidance scale as an input: guidance_scale 3.5, its usual one" in said(result.stdout)
    result = distill("config", "check", *pair.options(), "--set", "distillation_config.dmd2.guidance=decoupled")
    assert result.exit_code == 2
    assert "needs the teacher without guidance" in said(result.stderr)


def test_an_unknown_kind_of_student_is_refused_as_a_value(tmp_path):
    pair = Pair(tmp_path, {"model_type": " "})
    pair.write()
    result = distill("config", "check", *pair.options())
    assert result.exit_code == 2
    assert "model_type" in said(result.stderr)


# -- what methods recommend -------------------------------------------------------------------------------------------


def test_what_nobody_set_is_as_published_and_said_in_one_line(load):
    found = load("pcm")
    run = found.run
    assert (run.learning_rate, run.lora_rank, run.lora_alpha, run.adam_weight_decay) == (2e-6, 64, 8, 0.0)
    lines = [line for line in found.notices if "as published" in line]
    assert len(lines) == 1
    assert "learning_rate 2e-06, lora_alpha 8, as published, in batches of 10" in lines[0]
    assert "train_pcm_lora_sdxl.sh" in lines[0]


def test_what_the_user_sets_wins_and_another_rank_keeps_the_published_scale(load):
    found = load("pcm", {"learning_rate": 1e-5, "lora_rank": 16})
    assert (found.run.learning_rate, found.run.lora_rank, found.run.lora_alpha) == (1e-5, 16, 2)
    assert load("pcm", {"lora_rank": 16, "lora_alpha": 16}).run.lora_alpha == 16
    assert load("lcm", settings={"loss_type": "l2"}).method.loss_type == "l2"
    assert load("lcm").method.loss_type == "huber"


def test_it_depends_on_the_kind_of_student_and_the_family(load, registry):
    assert load("dmd2").run.learning_rate == 5e-5
    full = load("dmd2", {"model_type": "full"}).run
    assert (full.learning_rate, full.max_grad_norm, full.lr_warmup_steps) == (5e-7, 10.0, 500)
    pcm = registry.get("method", "pcm").recommended
    merged = {}
    for each in pcm:
        merged |= each.method if each.fits(model_type="lora", family="sd3") else {}
    assert merged == {"num_ddim_timesteps": 100, "w_min": 5.0, "w_max": 6.0}


def test_other_optimizers_keep_their_own_rates(load):
    lion = load("pcm", {"optimizer": "lion"}).run
    assert lion.learning_rate == pytest.approx(4e-7)
    assert lion.adam_weight_decay == 0.0


def test_fp16_is_recommended_where_the_card_has_it(load, monkeypatch):
    assert load("lcm").run.mixed_precision == "bf16"
    monkeypatch.setattr("distill.core.config.published.cuda_available", lambda: True)
    monkeypatch.setattr("distill.core.config.checks.cuda_available", lambda: True)
    assert load("lcm").run.mixed_precision == "fp16"
    assert load("lcm", {"device": "cpu"}).run.mixed_precision == "bf16"


def test_the_miniature_keeps_its_own_settings(registry):
    run = load_configuration(registry, flags={"distillation_method": "pcm"}).run
    assert (run.learning_rate, run.lora_alpha) == (1e-3, 64)


def test_plugins_show_has_the_table_with_sources():
    shown = distill("plugins", "show", "dmd2").stdout
    assert "published settings, which stand in for keys that nobody set" in shown
    assert "learning_rate 5e-05, lora_rank 64, lora_alpha 8" in said(shown)
    assert "not set: a batch of 128, gan_weight 0.005, fake_score full" in said(shown)
    assert "tianweiy/DMD2" in shown


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_all_are_listed(registry):
    assert tuple(registry.recipes) == RECIPES
    listed = distill("recipes", "list").stdout
    assert all(re.search(rf"^{name} ", listed, re.MULTILINE) for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_each_resolves_and_the_run_has_every_value_of_it(name, load, registry, tmp_path):
    text = registry.recipes[name][0].read_text().replace("{env:LPIPS_VGG16}", str(tmp_path / "vgg16.pt"))
    settings = yaml.safe_load(text)
    found = load(None, recipe=name)
    own = {key: value for key, value in settings.items() if key in type(found.run).model_fields}
    own |= dict.fromkeys(("pretrained_model_name_or_path", "pixel_decoder"))  # given beside the recipe, as this:
    own["mixed_precision"] = "bf16"
    for key, value in own.items():
        if value is not None:
            assert getattr(found.run, key) == value or str(getattr(found.run, key)) == str(value), key
    part = settings["distillation_config"][settings["distillation_method"]]
    kept = found.method.model_dump(exclude_unset=True, mode="json")
    assert {key: kept[key] for key in part} == {key: _filled(kept[key], value) for key, value in part.items()}
    assert not [line for line in found.notices if "as published" in line]


def _filled(kept, given):
    """What was given, with what validation adds below it (settings of a recipe's terms)."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return {key: _filled(kept[key], given.get(key, kept[key])) for key in kept}
    if isinstance(given, list) and isinstance(kept, list):
        return [_filled(one, other) for one, other in zip(kept, given, strict=True)]
    return given


@pytest.mark.parametrize("name", RECIPES)
def test_every_line_names_its_source(name, registry):
    lines = registry.recipes[name][0].read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    sources = {match.group(1) for line in header if (match := re.match(r"# \[([\w-]+)\] \S", line))}
    assert sources
    for line in lines:
        if line.startswith("#") or re.fullmatch(r"\s*(- )?[\w-]+:", line):  # a comment, an object's key
            continue
        tag = re.search(r"  # \[([\w-]+)\]", line)
        assert tag, f"{name}: {line!r} names no source"
        assert tag.group(1) in sources, f"{name}: {line!r}"


def test_what_the_user_sets_wins_over_a_recipe(load):
    found = load(None, {"learning_rate": 3e-4, "max_train_steps": 7}, recipe="lcm-lora-sdxl").run
    assert (found.learning_rate, found.max_train_steps, found.lora_alpha) == (3e-4, 7, 64)
    epochs = load(None, {"num_train_epochs": 2}, recipe="lcm-lora-sdxl").run
    assert (epochs.num_train_epochs, epochs.max_train_steps) == (2, None)
    full = load(None, {"model_type": "full"}, recipe="lcm-lora-sdxl")
    assert full.run.learning_rate == 1e-6
    assert any("learning_rate, lora_rank, lora_alpha of the recipe lcm-lora-sdxl are for" in it for it in full.notices)


def test_another_optimizer_takes_a_recipes_rate_in_its_own_form(load):
    assert load(None, {"optimizer": "lion"}, recipe="lcm-lora-sdxl").run.learning_rate == pytest.approx(2e-5)


@pytest.mark.parametrize(
    ("run", "recipe", "words"),
    [
        ({}, "lcm-lora-sdx", "there is no recipe 'lcm-lora-sdx'"),
        ({"distillation_method": "pcm"}, "lcm-lora-sdxl", "is for the method 'lcm', and distillation_method is 'pcm'"),
        ({"recipe": 3}, "lcm-lora-sdxl", "recipe"),
    ],
)
def test_what_cannot_be_meant_is_refused(run, recipe, words, load):
    with pytest.raises(ConfigError) as error:
        load(None, run, recipe=recipe)
    assert any(words in f"{finding.key} {finding.problem}" for finding in error.value.findings)


def test_a_plugin_brings_its_own_and_clashes_are_refused(tmp_path, registry):
    (tmp_path / "mine.yaml").write_text("# Mine.\nmodel_family: sdxl\ndistillation_method: lcm\n")
    text = "import distill\nfrom pathlib import Path\n"
    text += "@distill.hookimpl\ndef register_recipes():\n    return [Path({!r})]\n"
    (tmp_path / "one.py").write_text(text.format(str(tmp_path / "mine.yaml")))
    (tmp_path / "two.py").write_text(text.format(str(tmp_path / "mine.yaml")))
    (tmp_path / "gone.py").write_text(text.format(str(tmp_path / "none.yaml")))
    found = Registry.load([tmp_path / "one.py"], installed=False)
    assert found.recipes["mine"][1].source == str(tmp_path / "one.py")
    shown = distill("recipes", "show", "mine", "--plugin", tmp_path / "one.py")
    assert shown.stdout.startswith("# Mine.")
    with pytest.raises(UserError, match="two plugins claim the recipe 'mine'"):
        found.add_file(tmp_path / "two.py")
    with pytest.raises(UserError, match="which is no file"):
        found.add_file(tmp_path / "gone.py")
    assert Path(found.recipes["mine"][0]).name == "mine.yaml"
