"""Every method on every family, on random tiny models in float64: what docs/matrix.md calls yes, trains.

Its holes lack an input for a range of guidance; they train with one scale.
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
from support.tiny_families import EDGE, MODELS, Tiny
from support.tiny_sdxl import write_tiny_sdxl
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
}
"""A model or two of each family."""
CHEAPER = {name: SETTINGS[name] for name in ("dmd2", "kd", "progressive", "reward")}
METHODS = [name for name in registry().names("method") if name != "recipe"]
EVERY = [(name, method, kind) for name in CHOSEN for method in METHODS for kind in ("lora", "full")]
HOLES = [cell for cell in EVERY if hole(registry(), cell[1], CHOSEN[cell[0]].family, cell[2]) is not None]
ONE_SCALE = {"w_min": 3.0, "w_max": 3.0}
"""What the holes lack is an input for a range of guidance: with one scale the methods run there as well."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return cache(lambda name: CHOSEN[name].write(tmp_path_factory.mktemp("matrix") / "model"))


def test_the_matrix_covers_every_family():
    assert {tiny.family for tiny in CHOSEN.values()} == set(registry().names("family"))
    assert all(CHOSEN[name].family == "sd3" and kind == "full" for name, _, kind in HOLES)


@pytest.mark.parametrize("cell", EVERY, ids="-".join)
def test_every_method_trains_on_every_family(cell, folder_of, tmp_path):
    name, method, kind = cell

    def make(**settings):
        folder, found = folder_of(name), found_of(method)
        config = found.Config(**CHEAPER.get(method, {}), **(ONE_SCALE if cell in HOLES else {}))
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
