"""Configuration: formats, aliases, units, defaults, paths, overrides, round trip."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from distill.core.config.load import load_configuration
from distill.core.config.requirements import check_requirements
from distill.core.errors import ConfigError
from distill.core.registry.registry import Registry
from distill.core.settings.run_settings import RunSettings
from distill.model_families.sdxl import SDXL
from support.config_files import PLUGIN, Pair, distill

QUICKSTART = Path(__file__).resolve().parent.parent / "docs" / "quickstart"


@pytest.fixture
def registry():
    found = Registry.load(installed=False)
    found.add_file(PLUGIN)
    return found


@pytest.fixture
def load(tmp_path, registry):
    """Loads a pair of files made of the run's keys and of the first dataset's."""

    def loaded(run=None, dataset=None, *, more=(), **options):
        pair = Pair(tmp_path, run or {})
        pair.data[0].update(dataset or {})
        pair.data += more
        pair.write()
        return load_configuration(registry, config_file=pair.config_file, data_file=pair.data_file, **options)

    return loaded


def findings(load, *arguments, **options):
    with pytest.raises(ConfigError) as error:
        load(*arguments, **options)
    return {finding.key: finding for finding in error.value.findings}


# -- the quickstart ---------------------------------------------------------------------------------------------------


MINIATURE = SDXL.miniature
"""A model whose files `config check` finds whole."""


def quickstart(tmp_path, *more):
    images = tmp_path / "images"
    images.mkdir()
    files = ["--config", QUICKSTART / "config.json", "--data", QUICKSTART / "multidatabackend.json"]
    paths = ["--model", MINIATURE, "--set", f"data.your-dataset-name.instance_data_dir={images}"]
    return distill("config", "check", *files, *paths, *more)


def test_the_quickstart_files_are_valid_with_the_expected_notices_only(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(
        "distill.core.engine.tracking.missing_packages", lambda packages: "not there" if packages else None
    )
    result = quickstart(tmp_path)
    assert result.exit_code == 0, result.output
    expected = (
        "aspect_bucket_rounding = 64 is above 9 decimals",
        "minimum_image_size = 0.5, maximum_image_size = 1: below 8 under resolution_type pixel",
        "validation_negative_prompt has no effect",
        "wandb",
        "hub",
    )
    for line in result.stdout.splitlines():
        assert any(part in line for part in expected), line
    for part in expected:
        assert part in result.stdout


def test_the_low_vram_variant_is_usable_and_says_what_has_no_effect(tmp_path):
    low = json.loads((QUICKSTART.parent / "quickstart" / "low-vram.json").read_text())
    sets = [part for key, value in low.items() for part in ("--set", f"{key}={value}")]
    result = quickstart(tmp_path, *sets)
    assert result.exit_code == 0, result.output
    assert "adam_beta1 = 0.9 has no effect: the optimizer 'optimi-lion' has no such setting" in result.stdout


# -- how values are written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "yaml", "toml"])
def test_json_yaml_and_toml_give_the_same_configuration(suffix, tmp_path, registry):
    pair = Pair(tmp_path, {"seed": 7, "learning_rate": "2e-4"})
    pair.write()
    texts = {
        "json": (json.dumps(pair.config), json.dumps(pair.data)),
        "yaml": (yaml.safe_dump(pair.config), yaml.safe_dump(pair.data)),
        "toml": (
            "\n".join(
                [f"{key} = {json.dumps(value)}" for key, value in pair.config.items() if not isinstance(value, dict)]
                + ["[distillation_config.lcm]", "num_ddim_timesteps = 50"]
            ),
            "[[data]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in pair.data[0].items()),
        ),
    }
    config, data = tmp_path / f"c.{suffix}", tmp_path / f"d.{suffix}"
    config.write_text(texts[suffix][0])
    data.write_text(texts[suffix][1])
    found = load_configuration(registry, config_file=config, data_file=data)
    assert (
        found.resolved()
        == load_configuration(registry, config_file=pair.config_file, data_file=pair.data_file).resolved()
    )
    assert (found.run.seed, found.run.learning_rate) == (7, 2e-4)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"learning_rate": "1e-5"}, "learning_rate", 1e-5),
        ({"max_train_steps": "1e3"}, "max_train_steps", 1000),
        ({"gradient_checkpointing": "false"}, "gradient_checkpointing", False),
        ({"--train_batch_size": "3"}, "train_batch_size", 3),
        ({"checkpoints_total_limit": "none"}, "checkpoints_total_limit", None),
        ({"report_to": "tensorboard, wandb"}, "report_to", ("tensorboard", "wandb")),
        ({"report_to": ["tensorboard"]}, "report_to", ("tensorboard",)),
        ({"report_to": "none"}, "report_to", ()),
        ({"evaluation_steps": "1,4"}, "evaluation_steps", (1, 4)),
        ({"validation_resolution": "1024x768, 64"}, "validation_resolution", ((1024, 768), (64, 64))),
        ({"validation_resolution": [[32, 64]]}, "validation_resolution", ((32, 64),)),
        ({"validation_prompt": "a, b"}, "validation_prompt", ("a, b",)),
        ({"lora_target_modules": ["to_q", "to_v"]}, "lora_target_modules", ("to_q", "to_v")),
    ],
)
def test_values_may_be_written_as_texts(given, key, value, load):
    assert getattr(load(given).run, key) == value


def test_yaml_no_is_the_precision_no(tmp_path, registry):
    pair = Pair(tmp_path)
    pair.write()
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(pair.config) + "mixed_precision: no\n")
    assert load_configuration(registry, config_file=file, data_file=pair.data_file).run.mixed_precision == "no"


def test_environment_variables_are_filled_in(load, monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILL_TEST_NAME", "blue")
    monkeypatch.setenv("DISTILL_TEST_STEPS", "12")
    found = load({"tracker_run_name": "run-{env:DISTILL_TEST_NAME}", "max_train_steps": "{env:DISTILL_TEST_STEPS}"})
    assert found.run.tracker_run_name == "run-blue"
    assert found.run.max_train_steps == 12


def test_a_key_that_stands_twice_is_refused(load):
    assert "is given twice" in findings(load, {"--seed": 1, "seed": 2})["seed"].problem


# -- names and units --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "key"),
    [
        ("validation_steps", "validation_step_interval"),
        ("checkpointing_steps", "checkpoint_step_interval"),
        ("save_total_limit", "checkpoints_total_limit"),
    ],
)
def test_aliases_are_read_and_said(alias, key, load):
    found = load({alias: 17})
    assert getattr(found.run, key) == 17
    assert [line for line in found.notices if alias in line] == [f"{alias} is read as {key} = 17"]


@pytest.mark.parametrize(
    ("alias", "keys"),
    [
        ("base_offload", {"parallel": "fsdp", "parallel_offload": True}),
        ("enable_group_offload", {"parallel": "fsdp", "parallel_offload": True}),
        ("fsdp_enable", {"parallel": "fsdp", "parallel_offload": False}),
    ],
)
def test_switches_are_read_as_the_keys_that_do_so(alias, keys, load):
    found = load({alias: "true", "parallel": "auto"})
    assert {key: getattr(found.run, key) for key in keys} == keys
    (line,) = [line for line in found.notices if alias in line]
    assert line.startswith(f"{alias} is read as parallel = fsdp")
    assert load({alias: False}).run.parallel == "auto"


def test_an_alias_on_the_command_line_beats_the_file(load):
    assert load({"validation_step_interval": 5}, overrides=["validation_steps=9"]).run.validation_step_interval == 9


def test_aliases_of_plugins_become_their_names(load):
    found = load({"model_family": "plainfam", "distillation_method": "needy", "distillation_config": {}})
    assert found.run.model_family == "plain-family"
    assert "model_family = 'plainfam' is read as 'plain-family'" in found.notices


def test_rounding_above_nine_is_an_alignment(load):
    found = load({"aspect_bucket_rounding": 32})
    assert (found.run.aspect_bucket_alignment, found.run.aspect_bucket_rounding) == (32, 2)
    assert found.datasets[0].aspect_bucket_alignment == 32
    assert len([line for line in found.notices if "aspect_bucket_rounding = 32 is above 9" in line]) == 1
    kept = load({"aspect_bucket_rounding": 3})
    assert (kept.run.aspect_bucket_alignment, kept.run.aspect_bucket_rounding) == (64, 3)


def test_small_sizes_under_pixel_are_megapixels(load):
    found = load(
        {}, {"resolution": 512, "resolution_type": "pixel", "minimum_image_size": 0.5, "maximum_image_size": 768}
    )
    entry = found.datasets[0]
    assert entry.edge_and_area(0.5) == (None, 0.5)
    assert entry.edge_and_area(768) == (768, None)
    assert [line for line in found.notices if "read as megapixels" in line] == [
        "data.pets: minimum_image_size = 0.5: below 8 under resolution_type pixel, read as megapixels"
    ]


def test_other_spellings_of_dataset_values_are_read(load):
    entry = load(
        {}, {"caption_strategy": "instance_prompt", "instance_prompt": "a cat", "crop_style": "centre"}
    ).datasets[0]
    assert (entry.caption_strategy, entry.crop_style) == ("instanceprompt", "center")


def test_datasets_inherit_the_runs_sizes_in_their_own_unit(load):
    run = {"resolution": 1000, "resolution_type": "pixel_area", "minimum_image_size": 500, "random_flip": True}
    same = load(run).datasets[0]
    assert (same.resolution, same.resolution_type, same.minimum_image_size) == (1000, "pixel_area", 500)
    assert same.random_flip
    other = load(run, {"resolution_type": "area", "random_flip": False}).datasets[0]
    assert (other.resolution, other.minimum_image_size) == (1.0, 0.25)
    assert not other.random_flip
    own = load(run, {"resolution_type": "area", "resolution": 0.5}).datasets[0]
    assert own.square_edge == pytest.approx(707.1, abs=0.1)


def test_micro_conditioning_is_a_default_of_datasets_that_only_some_families_have(load):
    found = load({"micro_conditioning": "plain"})
    assert found.datasets[0].micro_conditioning == "plain"
    assert not [notice for notice in found.notices if "micro_conditioning" in notice]
    own = load({"micro_conditioning": "plain"}, {"micro_conditioning": "crop_only"})
    assert own.datasets[0].micro_conditioning == "crop_only"
    other = load({"model_family": "plain-family", "distillation_config": {}}, {"micro_conditioning": "plain"})
    no_effect = "has no effect: the network of 'plain-family' is not told the sizes of images"
    assert f"data.pets.micro_conditioning = plain {no_effect}" in other.notices
    found = findings(load, {"micro_conditioning": "fixed"})
    assert set(found) == {"micro_conditioning"}


# -- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults_follow_the_model_type_and_each_other(load):
    lora = load({"lora_rank": 8}).run
    assert (lora.learning_rate, lora.lora_alpha) == (1e-4, 8)
    assert load({"model_type": "full"}).run.learning_rate == 1e-6
    assert load({"lora_rank": 8, "lora_alpha": 3}).run.lora_alpha == 3


def test_the_default_output_folder_is_named_after_family_and_method(tmp_path, registry, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = Pair(tmp_path, {"model_family": "plain-family", "distillation_method": "needy", "distillation_config": {}})
    del pair.config["output_dir"]
    pair.write()
    found = load_configuration(registry, config_file=pair.config_file)
    assert found.run.output_dir == tmp_path / "output" / "plain-family-needy"


def test_parts_may_be_nested_by_name_or_flat(load):
    nested = load({"distillation_config": {"lcm": {"w_min": 2}}})
    flat = load({"distillation_config": {"w_min": "2"}})
    assert nested.method == flat.method
    assert flat.method.w_min == 2
    over = load({"distillation_config": {"w_min": 2, "w_max": 3}}, overrides=["distillation_config.lcm.w_max=5"])
    assert (over.method.w_min, over.method.w_max) == (2, 5)


def test_parts_of_what_is_not_chosen_are_checked_and_said_to_have_no_effect(load):
    found = load({"distillation_config": {"lcm": {}, "needy": {"grid": 10}}})
    assert "distillation_config.needy has no effect: the method is 'lcm'" in found.notices
    assert "distillation_config.needy.grid" in findings(load, {"distillation_config": {"needy": {"grid": 0}}})


# -- paths ------------------------------------------------------------------------------------------------------------


def test_relative_paths_are_relative_to_their_file(tmp_path, registry, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b" / "images").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    pair = Pair(tmp_path / "a", {"data_backend_config": "../b/data.json", "validation_prompt_library": "prompts.txt"})
    pair.write()
    (tmp_path / "a" / "prompts.txt").write_text("one\ntwo\n")
    data = [{"id": "pets", "instance_data_dir": "images", "cache_dir_vae": "cache"}]
    (tmp_path / "b" / "data.json").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path / "here")
    found = load_configuration(registry, config_file=pair.config_file)
    assert found.run.pretrained_model_name_or_path == str(tmp_path / "a" / "model")
    assert found.run.output_dir == tmp_path / "a" / "out"
    assert found.datasets[0].instance_data_dir == str(tmp_path / "b" / "images")
    assert found.datasets[0].backend.instance_data_dir == str(tmp_path / "b" / "images")
    assert found.datasets[0].cache_dir_vae == tmp_path / "b" / "cache"
    assert found.validation_prompts == ("one", "two")
    flags = load_configuration(registry, config_file=pair.config_file, flags={"output_dir": "mine"})
    assert flags.run.output_dir == tmp_path / "here" / "mine"


def test_a_hub_id_stays_as_it_is(load):
    found = load({"pretrained_model_name_or_path": "stabilityai/sdxl", "init_lora": "me/lora"})
    assert (found.run.pretrained_model_name_or_path, found.run.init_lora) == ("stabilityai/sdxl", "me/lora")


def test_the_data_file_is_looked_for_beside_the_config_then_in_the_output_then_here(tmp_path, registry, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    pair = Pair(tmp_path)
    pair.write()
    pair.data_file.unlink()
    folders = [here, tmp_path / "out", tmp_path]
    for number, place in enumerate(folders):  # from the weakest to the strongest
        place.mkdir(exist_ok=True)
        entry = {"id": f"set-{number}", "instance_data_dir": str(tmp_path / "images")}
        (place / "multidatabackend.json").write_text(json.dumps([entry]))
        found = load_configuration(registry, config_file=pair.config_file)
        assert found.datasets[0].id == f"set-{number}"
        assert f"datasets: {place / 'multidatabackend.json'}" in found.notices


def test_a_cache_folder_that_cannot_be_made_goes_under_the_output_and_is_said(load, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = load({}, {"cache_dir_vae": "cache"})
    assert found.datasets[0].cache_dir_vae is None
    assert any("cannot be made: the cache goes under output_dir" in line for line in found.notices)


# -- overrides --------------------------------------------------------------------------------------------------------


def test_flags_beat_the_file_and_overrides_beat_flags(load):
    found = load({"seed": 1, "max_train_steps": 5}, flags={"seed": 2, "max_train_steps": 6}, overrides=["seed=3"])
    assert (found.run.seed, found.run.max_train_steps) == (3, 6)


def test_overrides_reach_datasets_by_id_even_with_dots(load):
    more = [{"id": "pets.v2", "instance_data_dir": "images"}]
    found = load({}, {}, more=more, overrides=["data.pets.v2.repeats=2", "data.pets.repeats=1"])
    assert [entry.repeats for entry in found.datasets] == [1, 2]


def test_overrides_may_hold_json_and_equals_signs(load):
    found = load(overrides=["validation_prompt=a = b", 'teacher_lora=[{"path": "me/style", "weight": 0.5}]'])
    assert found.run.validation_prompt == ("a = b",)
    assert found.run.teacher_lora[0].weight == 0.5


def test_null_resets_a_key_to_its_default(load):
    assert (
        load({"checkpoint_step_interval": 7}, overrides=["checkpoint_step_interval=null"]).run.checkpoint_step_interval
        == 500
    )


# -- plugins ----------------------------------------------------------------------------------------------------------


def test_plugins_of_the_configuration_are_loaded_before_names_resolve(tmp_path):
    pair = Pair(
        tmp_path, {"plugins": [str(PLUGIN)], "distillation_method": "needy", "distillation_config": {"grid": 20}}
    )
    pair.write()
    found = load_configuration(Registry.load(installed=False), config_file=pair.config_file)
    assert found.method.grid == 20
    assert found.plugin_files == (PLUGIN.resolve(),)
    assert found.resolved()["plugins"] == [str(PLUGIN.resolve())]


# -- notices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ({"num_train_epochs": 3}, "max_train_steps = 10 and num_train_epochs = 3: whichever ends first"),
        ({"lr_warmup_steps": 20}, "never reaches"),
        ({"ema_decay": 0.5}, "ema_decay = 0.5 has no effect"),
        ({"model_type": "full", "lora_rank": 8}, "lora_rank: no effect"),
        ({"validation_negative_prompt": "blurry"}, "validation_negative_prompt has no effect"),
        ({"push_to_hub": True}, "without hub_model_id"),
        ({"hub_model_id": "me/x"}, "no effect without push_to_hub"),
        (
            {"distillation_config": {"num_ddim_timesteps": 30}},
            "does not divide the 1000 training timesteps: the grid ends at timestep 989",
        ),
    ],
)
def test_each_notice_is_given_once(run, line, load):
    assert len([notice for notice in load(run).notices if line in notice]) == 1


@pytest.mark.parametrize("zero", [0, "0"])
@pytest.mark.parametrize(
    ("key", "other", "how"),
    [("max_train_steps", "num_train_epochs", "by epochs"), ("num_train_epochs", "max_train_steps", "by steps")],
)
def test_a_length_of_0_beside_the_other_one_means_the_other(zero, key, other, how, load):
    found = load({key: zero, other: 3})
    assert (getattr(found.run, key), getattr(found.run, other)) == (None, 3)
    assert found.notices == (f"{key} = 0 beside {other} = 3: the run's length is told {how}",)


def test_a_length_of_0_alone_is_refused(load):
    for run in ({"max_train_steps": 0}, {"max_train_steps": 0, "num_train_epochs": 0}):
        with pytest.raises(ConfigError, match=r"max_train_steps = 0: "):
            load(run)


def test_a_negative_prompt_with_guidance_needs_no_notice(load):
    assert not load({"validation_negative_prompt": "blurry", "validation_guidance": 5}).notices


def test_the_default_files_give_no_notice(load):
    assert load().notices == ()


# -- requirements -----------------------------------------------------------------------------------------------------


def test_needs_and_capabilities_are_compared_for_each_model_type(registry):
    lcm, plain = registry.get("method", "lcm"), registry.get("family", "plain-family")
    for model_type, wanted in (("lora", 0), ("full", 1)):
        run = RunSettings(model_type=model_type, max_train_steps=1)
        assert len(check_requirements(lcm, lcm.Config(), plain, run)[0]) == wanted
    dropped = check_requirements(lcm, lcm.Config(), plain, RunSettings(lora_dropout=0.1))[0]
    assert [finding.key for finding in dropped] == ["lora_dropout"]
    sdxl = registry.get("family", "sdxl")
    assert check_requirements(lcm, lcm.Config(), sdxl, RunSettings(model_type="full")) == ([], [])


def test_a_grid_finer_than_the_schedule_is_refused(registry):
    needy, plain = registry.get("method", "needy"), registry.get("family", "plain-family")
    found, _ = check_requirements(needy, needy.Config(grid=200), plain, RunSettings(), num_timesteps=100)
    assert [finding.key for finding in found] == ["distillation_config.needy.grid"]


# -- round trip -------------------------------------------------------------------------------------------------------


def test_the_resolved_configuration_reproduces_itself_and_is_complete(load, registry, tmp_path):
    run = {
        "validation_steps": 5,
        "aspect_bucket_rounding": 16,
        "resolution": 512,
        "minimum_image_size": 256,
        "validation_resolution": "64x32",
        "teacher_lora": [{"path": "me/style"}],
        "report_to": "tensorboard",
    }
    more = [{"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "texts"}]
    first = load(run, {"resolution_type": "area", "caption_filter_list": ["a", "b"]}, more=more).resolved()
    assert set(RunSettings.model_fields) <= set(first)
    file = tmp_path / "config.resolved.json"
    file.write_text(json.dumps(first))
    again = load_configuration(registry, config_file=file)
    assert again.resolved() == first
    assert again.text_cache.cache_dir == tmp_path / "texts"
    assert again.notices == ()
    moved = load_configuration(registry, config_file=file, flags={"output_dir": str(tmp_path / "new")}).resolved()
    assert {key for key in first if first[key] != moved[key]} == {"output_dir"}


def test_secrets_are_left_out_of_what_is_written(load):
    found = load({"report_to": "far-tracker", "tracker_config": {"far-tracker": {"api_key": "s3cr3t", "room": "a"}}})
    assert found.trackers["far-tracker"].api_key == "s3cr3t"
    assert found.resolved()["tracker_config"] == {"far-tracker": {"room": "a"}}


def test_overwriting_is_not_reproduced(load):
    assert load({"overwrite": True}).resolved()["overwrite"] is False


def test_a_finished_run_loads_without_its_data(load, registry, tmp_path):
    file = tmp_path / "config.resolved.json"
    file.write_text(json.dumps(load().resolved()))
    (tmp_path / "images").rmdir()
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ConfigError):
        load_configuration(registry, config_file=file)
    assert load_configuration(registry, config_file=file, to_train=False).datasets[0].id == "pets"


# -- the miniature ----------------------------------------------------------------------------------------------------


@pytest.fixture
def miniature(registry, tmp_path, monkeypatch):
    folder = tmp_path / "miniature"
    (folder / "images").mkdir(parents=True)
    recipe = {
        "max_train_steps": 300,
        "learning_rate": 3e-4,
        "resolution": 32,
        "aspect_bucket_alignment": 8,
        "distillation_config": {"lcm": {"w_min": 2, "w_max": 6}, "needy": {"grid": 10}},
        "validation_prompt": ["a cat"],
        "data": [{"id": "shipped", "instance_data_dir": "images"}],
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setattr(registry.get("family", "plain-family"), "miniature", folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_without_a_model_the_miniature_and_its_recipe_are_used(miniature, registry):
    found = load_configuration(registry, flags={"model_family": "plain-family"})
    assert found.miniature
    assert found.run.pretrained_model_name_or_path == str(miniature)
    assert (found.run.max_train_steps, found.run.learning_rate) == (300, 3e-4)
    assert (found.method.w_min, found.method.w_max) == (2, 6)
    assert found.datasets[0].instance_data_dir == str(miniature / "images")
    assert found.datasets[0].resolution == 32
    assert found.notices == ()


def test_the_recipe_is_weaker_than_anything_given(miniature, registry, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"distillation_config": {"w_max": 9}, "learning_rate": 1e-5, "num_train_epochs": 2}))
    found = load_configuration(registry, config_file=file, flags={"model_family": "plain-family"}, overrides=["seed=5"])
    assert (found.method.w_min, found.method.w_max, found.run.learning_rate) == (2, 9, 1e-5)
    assert (found.run.max_train_steps, found.run.num_train_epochs, found.run.seed) == (None, 2, 5)


def test_the_recipe_does_not_lend_its_learning_rate_to_another_model_type(miniature, registry):
    flags = {"model_family": "plain-family", "distillation_method": "needy", "model_type": "full"}
    found = load_configuration(registry, flags=flags)
    assert found.run.learning_rate == 1e-6
    assert found.method.grid == 10
    same = load_configuration(registry, flags={"model_family": "plain-family", "model_type": "lora"})
    assert same.run.learning_rate == 3e-4


def test_own_images_with_the_miniature(miniature, registry, tmp_path):
    pair = Pair(tmp_path)
    pair.write()
    found = load_configuration(registry, data_file=pair.data_file, flags={"model_family": "plain-family"})
    assert found.miniature
    assert [entry.id for entry in found.datasets] == ["pets"]


def test_a_resolved_run_on_the_miniature_is_still_known_as_one(miniature, registry, tmp_path):
    file = tmp_path / "config.resolved.json"
    first = load_configuration(registry, flags={"model_family": "plain-family"}).resolved()
    file.write_text(json.dumps(first))
    again = load_configuration(registry, config_file=file)
    assert again.miniature
    assert again.resolved() == first


def test_a_miniature_that_was_named_is_not_said_to_be_for_want_of_a_model(miniature, registry, tmp_path, monkeypatch):
    from distill.core.runs.run import miniature_note

    pair = Pair(tmp_path)
    pair.write()
    flags = {"model_family": "plain-family"}
    assert miniature_note(load_configuration(registry, flags=flags)).startswith("no model named: ")
    monkeypatch.chdir(miniature.parent)
    for named in (str(miniature), f"./{miniature.name}"):
        flags["pretrained_model_name_or_path"] = named
        found = load_configuration(registry, data_file=pair.data_file, flags=flags, overrides=["max_train_steps=3"])
        assert found.miniature
        assert miniature_note(found) == "the model named is plain-family's miniature"


@pytest.mark.parametrize("rank", ["many", 0, -3])
def test_a_bad_rank_is_one_finding_and_none_of_the_alpha_that_is_made_of_it(load, rank):
    with pytest.raises(ConfigError) as refused:
        load({"lora_rank": rank})
    assert [finding.key for finding in refused.value.findings] == ["lora_rank"]


def test_a_bad_alpha_that_was_given_is_said_beside_a_bad_rank(load):
    with pytest.raises(ConfigError) as refused:
        load({"lora_rank": "many", "lora_alpha": -1})
    assert {finding.key for finding in refused.value.findings} == {"lora_rank", "lora_alpha"}
