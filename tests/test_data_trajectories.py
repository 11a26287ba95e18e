"""The distillation cache: made once from captions, keyed by what it is made of, and in every batch that asks for it."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from distill.core.cli import app
from distill.core.data.cache.cache_paths import CachePaths
from distill.core.data.cache.encode import WorkerShard
from distill.core.data.cache.tensor_cache import TensorCache, cache_folders
from distill.core.data.cache.trajectory_cache import (
    TrajectoryMaker,
    WantedTrajectories,
    noise,
    noise_seed,
    trajectory_descriptor,
)
from distill.core.diffusion.solvers import deterministic_sampler, trailing_timesteps
from distill.core.evaluation.plan import fast_solver
from distill.core.plugin_api.family import ModelSettings
from distill.core.settings.dataset_settings import DatasetSettings
from distill.core.testing.paths import TABLE
from distill.model_families.sdxl import SDXL
from support.config_files import PLUGIN, distill, link_model, said
from support.data_helpers import entry, fill, prompts, take
from support.small_run import execute, losses, write_run
from support.torchrun import launched
from support.trajectory_cache import TrajectoryFamily, cache_entry, trajectory_pipeline
from test_data_prompts import lines_file
from typer.testing import CliRunner


def entries(root: Path) -> dict[bytes, dict[str, torch.Tensor]]:
    """Everything that the caches of trajectories under `root` hold, by key."""
    found = {}
    for folder, descriptor in cache_folders(root / "cache" / "trajectories" / "pairs"):
        cache = TensorCache(folder.parent, descriptor, label="")
        cache.load(thorough=True)
        keys = cache.keys()
        for key, place in zip(keys, cache.locate(keys), strict=True):
            found[key.tobytes()] = {name: value[0] for name, value in cache.read([place]).items()}
    return found


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key][name], theirs[key][name]) for key in ours for name in ("points", "data")
    )


def build(root, family=None, datasets=None, pipeline=None, **settings):
    """(family, report, lines) of one build of ten prompts."""
    family = family or TrajectoryFamily()
    datasets = datasets or [prompts("p", prompts_file=lines_file(root))]
    data, lines = trajectory_pipeline(
        *datasets, entry=cache_entry(**settings), root=root, family=family, **(pipeline or {})
    )
    return family, data.prepare(), lines


# -- what is in a batch ------------------------------------------------------------------------------------------------


def sampled(family, batch, row, scale, num_steps):
    """DDIM written out for one sample, guidance included: where the teacher ends, from its noise."""
    x, timesteps = batch.trajectories.noise[row : row + 1], trailing_timesteps(TABLE, num_steps)
    cond = {name: value[row : row + 1] for name, value in batch.trajectories.cond.items()}
    bar = [float(TABLE.alpha(t)) ** 2 for t in timesteps.times] + [1.0]
    for number, t in enumerate(timesteps.times):
        with_, without = (family.predict(None, x, t[None], each) for each in (cond, family.uncond(cond)))
        eps = without + scale * (with_ - without)
        x_0 = (x - (1 - bar[number]) ** 0.5 * eps) / bar[number] ** 0.5
        x = bar[number + 1] ** 0.5 * x_0 + (1 - bar[number + 1]) ** 0.5 * eps
    return x[0]


def test_a_batch_has_the_teachers_trajectory_for_each_of_its_captions(tmp_path):
    family = TrajectoryFamily()
    captions = prompts("p", prompts_file=lines_file(tmp_path), caption_dropout_probability=1.0)
    data, _ = trajectory_pipeline(captions, entry=cache_entry(trajectory_points=2), root=tmp_path, family=family)
    seen = {}
    for (batch,) in take(data, 5):
        found = batch.trajectories
        assert batch.latents is None
        assert found.times.tolist() == [999, 499]
        assert found.points.shape == (2, 2, 3, 4, 4)
        assert found.cond["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
        assert not batch.cond["pooled"].any(), "the caption is dropped for the method"
        assert torch.equal(found.cond["pooled"], TrajectoryFamily().encode_prompts(list(batch.captions))["pooled"])
        for row, caption in enumerate(batch.captions):
            torch.testing.assert_close(found.data[row], sampled(family, batch, row, 3.0, 10), rtol=0, atol=1e-4)
            seen[caption] = found.noise[row]
        moved = batch.to("cpu").trajectories
        assert torch.equal(moved.points, found.points)
        assert moved.cond.keys() == found.cond.keys()
    assert len(seen) == 10
    assert len({tuple(each.flatten().tolist()) for each in seen.values()}) == 10, "each has a noise of its own"
    every = torch.cat([each.flatten() for each in seen.values()])
    assert abs(float(every.mean())) < 0.2
    assert abs(float(every.std()) - 1) < 0.15


def test_images_have_trajectories_of_their_buckets_size(tmp_path):
    images = entry(fill(tmp_path / "a", [(32, 32), (64, 32), (32, 32), (64, 32)]))
    data, _ = trajectory_pipeline(images, entry=cache_entry(), root=tmp_path, family=TrajectoryFamily(), images=True)
    sizes = set()
    for (batch,) in take(data, 4):
        height, width = batch.latents.shape[-2:]
        assert batch.trajectories.data.shape == batch.latents.shape
        assert (
            batch.trajectories.cond["time_ids"].tolist() == [[8 * height, 8 * width, 0, 0, 8 * height, 8 * width]] * 2
        )
        sizes.add((height, width))
    assert len(sizes) == 2


def test_several_noises_of_a_caption_are_drawn_from(tmp_path):
    family, report, _ = build(tmp_path, num_pairs_per_prompt=3)
    assert report.trajectories_made == 30
    one = prompts("p", prompts_file=lines_file(tmp_path))
    data, _ = trajectory_pipeline(one, entry=cache_entry(num_pairs_per_prompt=3), root=tmp_path, family=family)
    found: dict[str, set[float]] = {}
    for (batch,) in take(data, 50):
        for caption, start in zip(batch.captions, batch.trajectories.noise, strict=True):
            found.setdefault(caption, set()).add(float(start[0, 0, 0]))
    assert {len(noises) for noises in found.values()} == {3}
    again, first = take(data, 3, start=20), take(data, 23)[20:]
    for (ours,), (theirs,) in zip(again, first, strict=True):
        assert torch.equal(ours.trajectories.points, theirs.trajectories.points)


# -- when it is made ---------------------------------------------------------------------------------------------------


def test_trajectories_are_made_once_and_their_cost_is_said(tmp_path):
    family, report, lines = build(tmp_path)
    assert (report.trajectories_made, family.loads, family.predicted) == (10, 1, 10 * 10 * 2)
    assert any("10 of 10 are made: 10 steps of the teacher at guidance 3, 200 predictions" in line for line in lines)
    assert any(line.endswith("10 captions encoded, 10 trajectories made") for line in lines)
    again, report, lines = build(tmp_path)
    assert (report.trajectories_made, again.loads, again.calls) == (0, 0, 0)
    assert any(line.endswith("everything was cached") for line in lines)
    unguided, _, _ = build(tmp_path, guidance_scale=1.0)
    assert unguided.predicted == 10 * 10


def test_a_run_that_needs_no_trajectories_makes_none(tmp_path):
    family = TrajectoryFamily()
    data, _ = trajectory_pipeline(
        prompts("p", prompts_file=lines_file(tmp_path)), entry=cache_entry(), root=tmp_path, family=family,
        trajectories=False,
    )  # fmt: skip
    assert data.prepare().trajectories_made == family.loads == 0
    ((batch,),) = take(data, 1)
    assert batch.trajectories is None


@pytest.mark.parametrize(
    ("settings", "prints", "why"),
    [
        ({"num_inference_steps": 20}, {}, "steps 10 -> 20"),
        ({"guidance_scale": 4.0}, {}, "guidance 3.0 -> 4.0"),
        ({"solver": "dpm++"}, {}, "solver ddim -> dpm++"),
        ({"trajectory_points": 2}, {}, "points [0] -> [0, 5]"),
        ({}, {"denoiser": "d2"}, "the teacher is another one"),
        ({}, {"text": "t2"}, "the text encoders are another one"),
    ],
)
def test_changed_settings_make_trajectories_anew_and_say_why(tmp_path, settings, prints, why):
    build(tmp_path)
    _, report, lines = build(tmp_path, TrajectoryFamily(**prints), **settings)
    assert report.trajectories_made == 10
    assert any(f"trajectories of 'pairs': {why}, so they are made anew" in line for line in lines), lines


def test_more_noises_or_captions_extend_the_cache(tmp_path):
    build(tmp_path)
    first = entries(tmp_path)
    _, report, _ = build(tmp_path, num_pairs_per_prompt=2)
    assert report.trajectories_made == 10
    both = [prompts("p", prompts_file=lines_file(tmp_path)), prompts("q", prompts_file=lines_file(tmp_path / "q", 12))]
    _, report, _ = build(tmp_path, datasets=both, num_pairs_per_prompt=2)
    assert report.trajectories_made == 4, "two captions that are new; the others are shared"
    _, report, _ = build(tmp_path, noise_seed=1)
    assert report.trajectories_made == 10, "other noises"
    now = entries(tmp_path)
    assert len(now) == 34
    assert same(first, {key: now[key] for key in first})


def test_a_killed_build_of_trajectories_is_resumed_bit_for_bit(tmp_path):
    small = {"write_batch_size": 3, "pair_batch_size": 1, "num_pairs_per_prompt": 2}
    build(tmp_path / "whole", **small)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cut", TrajectoryFamily(stop_after=25), **small)
    assert len(entries(tmp_path / "cut")) == 6, "two whole shards of three, ten calls each"
    _, report, _ = build(tmp_path / "cut", **small)
    assert report.trajectories_made == 14
    assert same(entries(tmp_path / "cut"), entries(tmp_path / "whole"))


def test_processes_that_share_the_work_make_what_one_makes(tmp_path):
    small = {"write_batch_size": 3, "pair_batch_size": 1, "num_pairs_per_prompt": 2}
    one = prompts("p", prompts_file=lines_file(tmp_path))
    data, _ = trajectory_pipeline(one, entry=cache_entry(**small), root=tmp_path, family=TrajectoryFamily())
    data.prepare()
    (source,) = data._loader.datasets
    wanted, made = WantedTrajectories(source.dataset, cache_entry(**small)), []
    for rank in range(2):
        family = TrajectoryFamily()
        descriptor = trajectory_descriptor(family, wanted.settings)
        cache = TensorCache(tmp_path / "shared" / "cache" / "trajectories" / "pairs", descriptor, label="")
        jobs = wanted.missing(cache)  # each sees what was there before any began
        TrajectoryMaker(family, progress=quiet).run(wanted, WorkerShard(rank, 2).of(jobs), cache, source.texts)
        made.append(family.predicted // 20)  # ten steps, twice with guidance
    assert made == [12, 8], "every second shard of 3, 3, 3 and 1, for two noises"
    assert same(entries(tmp_path / "shared"), entries(tmp_path))


@contextmanager
def quiet(title, total):
    yield lambda count: None


def test_a_damaged_file_is_dropped_and_made_again(tmp_path):
    build(tmp_path, write_batch_size=5)
    before = entries(tmp_path)
    shard = next((tmp_path / "cache" / "trajectories").rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    _, report, lines = build(tmp_path, write_batch_size=5)
    assert report.damaged_shards == 1
    assert report.trajectories_made == 5
    assert any(shard.name in line for line in lines)
    assert same(entries(tmp_path), before)


def test_the_noise_is_a_function_of_the_key_alone():
    key = np.array([1, 2], np.uint64)
    expected = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(noise_seed(key)))
    assert torch.equal(noise(key, (3, 4, 4)), expected)
    assert not torch.equal(noise(np.array([2, 1], np.uint64), (3, 4, 4)), expected)


def test_a_resumed_run_must_have_the_same_trajectories(tmp_path):
    one = prompts("p", prompts_file=lines_file(tmp_path))
    prints = set()
    for settings in ({}, {"num_pairs_per_prompt": 2}, {"noise_seed": 1}, {"num_inference_steps": 20}):
        data, _ = trajectory_pipeline(one, entry=cache_entry(**settings), root=tmp_path, family=TrajectoryFamily())
        prints.add(data.fingerprint())
    assert len(prints) == 4


# -- runs and commands on a tiny SDXL ----------------------------------------------------------------------------------

KD = {
    "distillation_method": "kd",
    "distillation_config": {"kd": {"num_inference_steps": 2}},
    "max_train_steps": 4,
    "gradient_accumulation_steps": 1,
    "validation_step_interval": 0,
    "checkpoint_step_interval": 2,
}


def add_pairs(root: Path, *more: dict, **settings) -> None:
    """A distillation cache in the data file."""
    file = root / "multidatabackend.json"
    entry = {"id": "pairs", "dataset_type": "distillation_cache", "num_inference_steps": 4, "guidance_scale": 2.0}
    file.write_text(json.dumps([*json.loads(file.read_text())[:1], {**entry, **settings}, *more]))


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_trajectories_end_in_the_images_of_the_plain_pipeline(tmp_path, solver):
    config = write_run(tmp_path, **KD)
    add_pairs(tmp_path, solver=solver)
    built = CliRunner().invoke(app, ["cache", "build", "--config", str(config)], catch_exceptions=False)
    assert built.exit_code == 0, built.output
    assert "13 trajectories made" in built.output
    family = SDXL(SDXL.Config(), ModelSettings(str(tmp_path / "model")))
    ((folder, descriptor),) = cache_folders(tmp_path / "out" / "cache" / "trajectories" / "pairs")
    cache = TensorCache(folder.parent, descriptor, label="")
    cache.load()
    from distill.core.config.load import load_configuration
    from distill.core.data.loader import BatchContents, BatchLayout
    from distill.core.data.pipeline import DataPipeline
    from distill.core.registry.registry import Registry

    registry = Registry.load(installed=False)
    data = DataPipeline(
        load_configuration(registry, config_file=config), registry, family, layout=BatchLayout(3, 1), seed=1,
        cache_root=tmp_path / "out" / "cache", contents=BatchContents(images=False, trajectories=True),
    )  # fmt: skip
    ((batch,),) = take(data, 1)
    keys = cache.keys()
    made = [(noise(key, (4, 16, 16)), noise_seed(key)) for key in keys]
    seeds = [seed for each in batch.trajectories.noise for start, seed in made if torch.equal(start, each)]
    samplers = {"ddim": deterministic_sampler(family.schedule, 4, 2.0), "dpm++": fast_solver(family, 4, 2.0).sampler}
    asked = {"sampler": samplers[solver], "seeds": seeds, "width": 32, "height": 32}
    embeds = family.encode_prompts(list(batch.captions))
    images = family.generate(family.load_network(), embeds, **asked)
    torch.testing.assert_close(family.decode_latents(batch.trajectories.data), images, rtol=0, atol=2e-4)


def test_cache_verify_and_clear_cover_trajectories(tmp_path):
    config = write_run(tmp_path, **KD)
    add_pairs(tmp_path, cache_dir=str(tmp_path / "kept"))

    def cache(*arguments):
        return CliRunner().invoke(app, ["cache", *arguments, "--config", str(config)], catch_exceptions=False)

    assert cache("build").exit_code == 0
    shard = next((tmp_path / "kept").rglob("*.safetensors"))
    assert cache("verify").output.count("13 entries") == 2, "texts and trajectories; no latents, for none are needed"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    damaged = cache("verify")
    assert damaged.exit_code == 1
    assert shard.name in damaged.output
    assert "0 captions encoded, 13 trajectories made" in cache("build").output
    cleared = cache("clear", "--dataset", "pairs", "--yes")
    assert cleared.exit_code == 0, cleared.output
    assert not list((tmp_path / "kept").rglob("*.safetensors"))
    assert list((tmp_path / "out" / "cache" / "text").rglob("*.safetensors")), "the texts stay"


def test_a_run_makes_missing_trajectories_and_resumes_bit_for_bit(tmp_path):
    write_run(tmp_path)
    add_pairs(tmp_path, num_inference_steps=2)
    whole, lines = execute(write_run_kept(tmp_path, output="out", **KD))
    assert any(line.endswith("13 trajectories made") for line in lines)
    assert whole.student.joinpath("pytorch_lora_weights.safetensors").exists()
    execute(write_run_kept(tmp_path, output="cut", **{**KD, "max_train_steps": 2}))
    _, lines = execute(write_run_kept(tmp_path, output="cut", **KD))
    assert any(line.endswith("everything was cached") for line in lines)
    assert losses(tmp_path / "cut") == losses(tmp_path / "out")


def test_regression_is_a_term_beside_distribution_matching(tmp_path):
    """The first DMD: a distribution matching gradient, and trajectories that hold the student to the teacher."""
    matching = {"num_inference_steps": 2, "fake_updates_per_student_update": 1, "guidance_scale": 2.0}
    terms = [
        {"method": "dmd2", "config": matching},
        {"method": "kd", "weight": {"0": 1, "4": 0.25}, "config": {"num_inference_steps": 2}},
    ]
    config = write_run(
        tmp_path, **{**KD, "distillation_method": "recipe", "distillation_config": {"recipe": {"terms": terms}}}
    )
    add_pairs(tmp_path)
    execute(config)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for row, weight in zip(rows, (1.0, 0.8125, 0.625, 0.4375), strict=True):
        assert row["kd/weight"] == weight
        assert row["loss"] == pytest.approx(row["dmd2/loss"] + weight * row["kd/loss"], rel=1e-6)
        assert row["kd/loss"] > 0
        assert "fake_score/loss" in row


@pytest.mark.slow
def test_two_processes_share_the_work_and_train_as_one(tmp_path):
    write_run(tmp_path)
    add_pairs(tmp_path, write_batch_size=3)
    execute(write_run_kept(tmp_path, output="one", **{**KD, "train_batch_size": 4}))
    config = write_run_kept(tmp_path, output="two", **{**KD, "train_batch_size": 2, "device": "cpu"})
    launched("-m", "distill", "run", "--config", config, timeout=400)
    for (_, ours, _), (_, theirs, _) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    manifests = list((tmp_path / "two" / "cache" / "trajectories").rglob("*.jsonl"))
    assert len(manifests) == 2, "each process wrote shards of its own"


def write_run_kept(root: Path, **settings) -> Path:
    """As `write_run`, with the data file as it is."""
    kept = (root / "multidatabackend.json").read_text()
    config = write_run(root, **settings)
    (root / "multidatabackend.json").write_text(kept)
    return config


# -- the data file -----------------------------------------------------------------------------------------------------


def check(tmp_path, *entries: dict, **config):
    """`distill config check` of a kd run over images and these entries."""
    link_model(tmp_path / "model")
    write_run(tmp_path, model=tmp_path / "model", **{**KD, **config})
    data = [{"id": "noise", "instance_data_dir": "images"}, *entries]
    (tmp_path / "multidatabackend.json").write_text(json.dumps(data))
    return distill("config", "check", "--config", str(tmp_path / "out.json"), "--plugin", str(PLUGIN))


CACHE = {"id": "pairs", "dataset_type": "distillation_cache"}


def caches(**values):
    return [{**CACHE, **values}]


@pytest.mark.parametrize(
    ("entries", "key", "problem", "remedy"),
    [
        (caches(trajectory_points=3), "pairs.trajectory_points", "needs 2 even points", "set trajectory_points"),
        (caches(num_inference_steps=25), "pairs.num_inference_steps", "of the 2 points", "set it to 26"),
        (caches(num_inference_steps=25, trajectory_points=2), "pairs.num_inference_steps", "no multiple", "26"),
        (caches(crop=True), "pairs.crop", "is not for a distillation cache", "a dataset of images or prompts"),
        (caches(instance_data_dir="x"), "pairs.instance_data_dir", "is not for a distillation cache", "may name"),
        (caches(resolution=512), "pairs.resolution", "is not for a distillation cache", "may name this cache"),
        (caches(solver="euler"), "pairs.solver", "'ddim', 'dpm++'", ""),
        (caches(num_pairs_per_prompt=0), "pairs.num_pairs_per_prompt", "at least 1", ""),
        ([*caches(default=True), *caches(id="b", default=True)], "b.default", "only one", "keep it on one"),
        ([CACHE, {**CACHE, "id": "b"}], "noise.distillation_cache", "there are several, pairs, b", '"default": true'),
        (
            [{"id": "t", "dataset_type": "text_embeds", "solver": "dpm++"}],
            "t.solver", "is for a distillation cache", '"dataset_type": "distillation_cache"',
        ),
        (
            [{"id": "two", "instance_data_dir": "images", "distillation_cache": "gone"}, CACHE],
            "two.distillation_cache", "is not the id of a distillation_cache entry", "entries: pairs",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_of_a_distillation_cache_are_refused_with_a_remedy(tmp_path, entries, key, problem, remedy):
    result = check(tmp_path, *entries)
    text = said(result.output)
    assert result.exit_code == 2, text
    assert f"data.{key} = " in text
    assert problem in text
    assert remedy in text


def test_missing_settings_of_a_distillation_cache_are_filled_in_and_said(tmp_path):
    result = check(tmp_path)
    assert result.exit_code == 0, result.output
    text = said(result.output)
    assert "50 steps at guidance 5 for each caption and size (100 predictions)" in text
    assert '"dataset_type": "distillation_cache"} of the data file can say otherwise' in text
    given = check(tmp_path, CACHE, distillation_config={"kd": {"num_inference_steps": 4}})
    assert given.exit_code == 0, given.output
    assert "can say otherwise" not in said(given.output)
    unused = check(tmp_path, CACHE, distillation_method="lcm", distillation_config={})
    assert "data.pairs: not used by runs of lcm, which needs no trajectories" in said(unused.output)


def test_each_dataset_may_have_its_own_distillation_cache(tmp_path):
    from distill.core.config.load import load_configuration
    from distill.core.registry.registry import Registry

    other = {"id": "other", "instance_data_dir": "images", "distillation_cache": "fast"}
    fast = {**CACHE, "id": "fast", "num_inference_steps": 8, "solver": "dpm++", "guidance_scale": 1}
    assert check(tmp_path, other, {**CACHE, "default": True}, fast).exit_code == 0
    registry = Registry.load([PLUGIN], installed=False)
    configuration = load_configuration(registry, config_file=tmp_path / "out.json")
    assert [each.distillation_cache for each in configuration.datasets] == ["pairs", "fast"]
    found = {each.id: each for each in configuration.distillation_caches}
    assert (found["pairs"].num_inference_steps, found["pairs"].guidance_scale) == (50, 5.0)
    assert (found["fast"].num_inference_steps, found["fast"].trajectory_points) == (8, 2)
    resolved = tmp_path / "resolved.json"
    resolved.write_text(json.dumps(configuration.resolved()))
    again = load_configuration(Registry.load([PLUGIN], installed=False), config_file=resolved)
    assert again.resolved() == configuration.resolved()
    paths = CachePaths(configuration, tmp_path)
    assert paths.trajectories(found["fast"]) == tmp_path / "trajectories" / "fast"
    assert isinstance(paths.trajectory_entry(configuration.datasets[1]), DatasetSettings)
