"""Every method on every family, on random tiny models in float64: what docs/matrix.md calls yes, trains.

Its holes that lack an input for a range of guidance train with one scale, those that lack features without their
adversarial term; where a second time or a gradient through the autoencoder is lacking there is nothing to train.
In each cell the student moves, with finite gradients; the teacher stays bitwise what it was; a checkpoint resumes bit
for bit; and the student makes images.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from distill.core.config.docs import hole
from distill.core.testing.trial import base_weights, own_weights, same
from support.cases import SETTINGS, found_of, registry
from support.tiny_families import EDGE, MODELS, NEWER
from support.tiny_parts import Tiny
from support.tiny_sdxl import write_tiny_sdxl
from support.tiny_undescribed import OVIS, write_tiny_ovis
from support.trial import make_trial

pytestmark = pytest.mark.slow

STEPS, HALF = 4, 2
CHOSEN = {
    "sdxl": Tiny("sdxl", write_tiny_sdxl),
    "sd1x": MODELS["sd1x-v-zero-snr"],
    "sd2x": MODELS["sd2x-v"],
    "sd3": MODELS["sd3"],
    "flux": MODELS["flux-dev"],
    "flux without guidance": MODELS["flux-schnell"],
    **NEWER,
    "generic": Tiny("generic", write_tiny_ovis, settings=OVIS),
}
"""A model or two of each family."""
CHEAPER = {name: SETTINGS[name] for name in ("dmd2", "kd", "progressive", "reward")}
METHODS = [name for name in registry().names("method") if name != "recipe"]
EVERY = [(name, method, kind) for name in CHOSEN for method in METHODS for kind in ("lora", "full")]
WITHOUT = {
    "guidance_embedding": {"w_min": 3.0, "w_max": 3.0},
    "features": {"adversarial_weight": 0.0},
}
"""What a family lacks -> the settings with which a method trains all the same."""


def settings_of(cell):
    """The settings that a cell needs beside the defaults; None where there is nothing to train."""
    name, method, kind = cell
    reason = hole(registry(), method, CHOSEN[name].family, kind)
    if reason is None:
        return {}
    return next((settings for lacking, settings in WITHOUT.items() if f"({lacking})" in reason), None)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return cache(lambda name: CHOSEN[name].write(tmp_path_factory.mktemp("matrix") / "model"))


def test_the_matrix_covers_every_family():
    assert {tiny.family for tiny in CHOSEN.values()} == set(registry().names("family"))
    nothing = {
        (CHOSEN[name].family, method) for name, method, kind in EVERY if settings_of((name, method, kind)) is None
    }
    lacking = {"meanflow": "second_time", "reward": "pixels"}
    for family, method in nothing:
        assert not getattr(registry().get("family", family).capabilities, lacking[method])


@pytest.mark.parametrize("cell", EVERY, ids="-".join)
def test_every_method_trains_on_every_family(cell, folder_of, tmp_path):
    name, method, kind = cell
    if settings_of(cell) is None:
        pytest.skip("docs/matrix.md says why")

    def make(**settings):
        folder, found = folder_of(name), found_of(method)
        config = found.Config(**{**CHEAPER.get(method, {}), **settings_of(cell)})
        family = CHOSEN[name].make(folder)
        return make_trial(folder, found, config, kind, total_steps=STEPS, family=family, **settings)

    trial = make(watching=True)
    start = own_weights(trial.networks)
    trial.run(0, HALF)
    trainer = trial.trainer(tmp_path)
    trainer.step = HALF
    trainer.save()
    trial.run(HALF, STEPS)
    check_training(trial, start)
    fresh = make()
    again = fresh.trainer(tmp_path)
    again.resume(again.store.latest())
    fresh.run(HALF, STEPS)
    ours, theirs = own_weights(fresh.networks), own_weights(trial.networks)
    assert all(same(ours[role], theirs[role]) for role in ours)
    check_images(trial)


def check_training(trial, start):
    for taken in trial.loop.taken:
        gradients = [gradient for gradient in taken.gradients if gradient is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients), taken.role
    now = own_weights(trial.networks)
    assert all(not same(start[role], now[role]) for role in trial.networks.trained_roles())
    base = base_weights(trial.networks)
    assert all(torch.equal(base[key], tensor) for key, tensor in trial.pristine.items())


def check_images(trial):
    family, networks = trial.family, trial.networks
    for role in networks.roles:
        networks.module(role).float()
    sampler = trial.method.sampler(family.schedule, num_inference_steps=2)
    with networks.use(trial.method.result_role()) as network:
        images = family.generate(
            network, family.encode_prompts(["a red fox"]), sampler=sampler, seeds=[1], width=EDGE, height=EDGE
        )
    assert images.shape == (1, 3, EDGE, EDGE)
    assert images.isfinite().all()
    assert images.std() > 0
