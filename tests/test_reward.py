"""Rewards of decoded images, against the formulas by hand, and a reward that rises on the miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distill.core.config.load import load_configuration
from distill.core.diffusion.solvers import trailing_timesteps
from distill.core.errors import UserError
from distill.core.plugin_api.pretrained import ImageTextNetwork, processed
from distill.core.registry.registry import Registry
from distill.core.runs.builders import check_method_sources
from distill.core.runs.run import run
from distill.distill_methods.reward import Reward
from pydantic import ValidationError
from support.listening import listening
from support.networks import MeanRed, RedOfPrompt, RedOfTokens, network_file
from support.quickstart import command
from support.tiny_clip import write_tiny_clip
from support.tiny_sdxl import TOKENS, write_tiny_sdxl
from support.trial import make_trial

RED = network_file(MeanRed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("reward") / "model", layers_per_block=1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("networks") / "Tiny-CLIP")


def make(folder, **config):
    trial = make_trial(folder, Reward, Reward.Config(num_inference_steps=2, **config), "lora")
    batch = trial.batch(0)
    captions = tuple(f"a red thing number {i}" for i in range(len(batch)))
    object.__setattr__(batch, "captions", captions)
    return trial, batch, trial.context.at(0, batch.positions)


def by_hand(context, batch):
    """Images of the student of two calls, decoded whole, and the gradient of what is made of them."""
    times = [torch.full((len(batch),), int(t)) for t in trailing_timesteps(context.schedule, 2).times]
    x = context.rng.randn("reward/start/noise", batch.latent_shape).double()
    x_0 = context.predict("student", x, times[0], batch.cond).x0
    eps = context.rng.randn("reward/0", batch.latent_shape).double()
    x_0 = context.predict("student", context.schedule.add_noise(x_0, eps, times[1]), times[1], batch.cond).x0
    return context._runtime.family.decode_pixels(x_0).clamp(0, 1)


@pytest.mark.parametrize("reads", ["images", "embeddings", "tokens"])
@pytest.mark.parametrize("margin", [None, 0.5])
def test_loss_and_gradient_are_those_of_the_reward_of_the_decoded_images(folder, reads, margin):
    kind = {"images": MeanRed, "embeddings": RedOfPrompt, "tokens": RedOfTokens}[reads]
    tokenizer = str(folder / "tokenizer") if reads == "tokens" else None
    trial, batch, context = make(
        folder, network=network_file(kind), reads=reads, tokenizer=tokenizer, margin=margin, gradient_calls=2
    )
    (update,) = trial.method.updates(context, batch, 0)
    images = by_hand(context, batch)
    red = images[:, 0].flatten(1).mean(1)
    if reads == "embeddings":
        red = red * batch.cond["prompt_embeds"].flatten(1).mean(1)
    if reads == "tokens":
        counts = [min(TOKENS, len(caption.replace(" ", "")) + 2) for caption in batch.captions]
        red = red * torch.tensor(counts)
    expected = -red if margin is None else (margin - red).clamp(min=0)
    torch.testing.assert_close(update.loss, expected.mean().to(update.loss), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(update.per_sample, expected.detach().to(update.per_sample), rtol=1e-5, atol=1e-7)
    assert list(update.metrics) == [trial.method.config.role]
    parameters = trial.networks.parameters("student")
    ours = torch.autograd.grad(update.loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.mean(), parameters, allow_unused=True)
    scale = max(float(g.abs().max()) for g in theirs if g is not None)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_an_image_that_is_good_enough_has_no_gradient(folder):
    trial, batch, context = make(folder, network=RED, margin=-1.0)
    (update,) = trial.method.updates(context, batch, 0)
    assert update.loss == 0
    grads = torch.autograd.grad(update.loss, trial.networks.parameters("student"), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


def test_how_red_its_images_are_rises_on_the_miniature(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [
        "max_train_steps=20", "train_batch_size=2", "learning_rate=1e-3", "lora_rank=8", "lr_scheduler=constant",
        "validation_step_interval=0", "evaluation_num_samples=0", "checkpoint_step_interval=0", "report_to=none",
        "use_ema=false", "distillation_config.reward.num_inference_steps=1",
        f"distillation_config.reward.network={RED}",
    ]  # fmt: skip
    flags = {"distillation_method": "reward", "model_family": "sdxl", "output_dir": str(tmp_path / "out")}
    registry = Registry.load(installed=False)
    with listening() as lines:
        run(load_configuration(registry, flags=flags, overrides=overrides), registry)
    lines_of = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["reward_meanred"] for line in lines_of]
    first, last = sum(rows[:4]) / 4, sum(rows[-4:]) / 4
    print(rows)
    assert last > first + 0.1
    assert any("nothing in this loss holds the student to its teacher" in line for line in lines)


# -- a network of images and text -------------------------------------------------------------------------------------


def test_a_clip_gives_the_scaled_cosine_that_its_evaluator_gives(folder, clip):
    from distill.core.plugin_api.evaluator import EvaluationSetting
    from distill.plugins.clip_scores import Reward as Evaluator

    trial, batch, context = make(folder, model=str(clip))
    (update,) = trial.method.updates(context, batch, 0)
    images = by_hand(context, batch).detach().float()
    eight_bit = Evaluator(Evaluator.Config(model=str(clip)), EvaluationSetting(None))._rewards(images, batch.captions)
    torch.testing.assert_close(-update.per_sample.double(), eight_bit, rtol=0, atol=0.1)
    assert list(update.metrics) == ["reward_tiny_clip"]
    gradients = torch.autograd.grad(update.loss, trial.networks.parameters("student"), allow_unused=True)
    assert sum(float(g.square().sum()) for g in gradients if g is not None) > 0
    assert ImageTextNetwork(str(clip)).stored_bytes() > 100_000


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (64, 40)])
def test_images_are_processed_as_the_networks_own_processor_does(clip, size):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(clip)
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, size[0] // 8, size[1] // 8), generator=g).float()
    images = torch.nn.functional.interpolate(coarse, size, mode="bilinear").round() / 255
    theirs = processor(images=list((images * 255).byte()), return_tensors="pt")["pixel_values"]
    ours = processed(processor, images)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.02, "pixels in units of their deviation"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"network": RED, "model": "a/b"}, "network and model are both given"),
        ({"reads": "tokens", "tokenizer": "a/b"}, "reads and tokenizer belong to network"),
        ({"network": RED, "reads": "tokens"}, "a network that reads tokens needs its tokenizer"),
        ({"network": RED, "gradient_calls": 5}, "gradient_calls = 5 is above num_inference_steps = 4"),
        ({"network": RED, "one_step_time": 399}, "one_step_time = 399 is for num_inference_steps = 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, words):
    with pytest.raises(ValidationError, match=words):
        Reward.Config(**config)


def test_a_network_that_is_not_there_is_refused_before_weights_load_with_its_key(tmp_path, folder):
    from support.small_run import write_run

    def said(**settings):
        done = command("config", "check", "--config", str(write_run(tmp_path, model=folder, **settings)))
        assert done.code == 2, done.err
        return " ".join(done.err.split())

    alone = said(distillation_method="reward", distillation_config={"reward": {"network": "no.pt"}})
    assert f"distillation_config.reward.network = {str(tmp_path / 'no.pt')!r}: there is no such file" in alone
    assert "name one that is there: a TorchScript that is called as network(images), and returns (B,)" in alone
    hub = said(distillation_method="reward", distillation_config={"reward": {}})
    assert "distillation_config.reward.model = 'yuvalkirstain/PickScore_v1'" in hub
    assert "or name a TorchScript file of your own (distillation_config.reward.network)" in hub
    terms = [{"method": "lcm"}, {"method": "reward", "weight": 0.1, "config": {"network": "no.pt"}}]
    inside = said(distillation_method="recipe", distillation_config={"recipe": {"terms": terms}})
    assert f"distillation_config.recipe.terms.1.config.network = {str(tmp_path / 'no.pt')!r}" in inside


def test_a_finished_run_is_looked_at_without_the_network(tmp_path):
    """Only a run checks for it: `evaluate` and `generate` need the student alone."""
    registry = Registry.load(installed=False)
    flags = {"distillation_method": "reward", "model_family": "sdxl", "output_dir": str(tmp_path)}
    found = load_configuration(registry, flags=flags, overrides=["distillation_config.reward.network=gone.pt"])
    assert found.method.network == Path("gone.pt").absolute()
    with pytest.raises(UserError, match="there is no such file"):
        check_method_sources(found, registry)
