"""Modules that methods bring: trained ones with seeded weights, in checkpoints, and frozen ones beside the base."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from distill.core.cli.plugins import _network
from distill.core.engine.modules import build_module
from distill.core.engine.networks import Networks
from distill.core.engine.returned import roles_of
from distill.core.errors import PluginError, UserError
from distill.core.plugin_api.method import Method, MethodSetup, Requirements, Role, Update
from distill.core.testing.paths import PATHS
from distill.core.testing.smooth import SmoothFamily, smooth_batch
from distill.core.testing.trial import make_trial
from distill.distill_methods.recipe import Recipe
from support.cases import registry
from support.networks import MeanRed, RedOfPrompt, Vgg, network_file
from support.recipes import recipe, term
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

STEPS, HALF = 4, 2


class ErrorOf(nn.Module):
    """Predicts how large an error is from features and the prompt; its norm keeps vectors that change as it runs."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first, self.last = spectral_norm(nn.Linear(channels + width, 16)), nn.Linear(16, 1)

    def forward(self, features, prompt):
        return self.last(torch.tanh(self.first(torch.cat([features.flatten(1), prompt], 1))))[:, 0]


def error_of(setup):
    (channels,) = setup.feature_channels(blocks="all")
    return ErrorOf(channels, setup.prompt_dimensions["mean"])


@dataclass(frozen=True)
class Frozen:
    """Frozen random features."""

    width: int

    def __call__(self, setup):
        assert setup.seed == torch.initial_seed()
        return nn.Linear(1, self.width, dtype=torch.float64)


class Weighted(Method):
    """Regression in a frozen network's space, weighted by an error that a module of its own predicts."""

    name = "weighted"

    @classmethod
    def roles(cls, config, setup):
        return [
            Role("teacher"),
            Role("student", trains=setup.model_type),
            Role("error", trains="module", build=error_of, learning_rate=3e-3),
            Role("slow_error", ema_of="error", ema_decay=0.5),
            Role("space", build=Frozen(5)),
        ]

    @classmethod
    def requires(cls, config, setup):
        return Requirements(features=True)

    def updates(self, context, batch, step):
        t = torch.full((len(batch),), 500.0, dtype=torch.float64)
        x_t = context.schedule.add_noise(batch.latents, context.rng.randn("noise", (1,)).double(), t)
        x_0 = context.predict("student", x_t, t, batch.cond).x0
        gap = context.call("space", x_0) - context.call("space", batch.latents)
        with torch.no_grad():
            features = context.features("teacher", x_t, t, batch.cond)[0]
            expected = context.call("slow_error", features, batch.cond["mean"]).exp()
        losses = gap.square().mean(1) / expected
        yield Update("student", losses.mean(), per_sample=losses.detach())
        error = context.call("error", features, batch.cond["mean"])
        yield Update("error", (error - gap.detach().square().mean(1)).square().mean())

    def sampler(self, schedule, *, num_inference_steps=None, guidance_scale=None):
        raise NotImplementedError


def make(**settings):
    kind, schedule = PATHS["eps"]
    family = SmoothFamily(schedule, kind)
    batch_of = lambda needs, step: smooth_batch(schedule, step, 4, mean=0.3, images=True)  # noqa: E731
    return make_trial(family, Weighted, Weighted.Config(), "full", batch_of=batch_of, total_steps=STEPS, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps, its checkpoint after two, and the groups of tensors that it holds."""
    trial, folder = make(watching=True), tmp_path_factory.mktemp("run")
    trial.run(0, HALF)
    trainer = trial.trainer(folder)
    trainer.step = HALF
    trainer.save()
    trial.run(HALF, STEPS)
    return SimpleNamespace(trial=trial, folder=folder, store=trainer.store)


def test_a_module_resumes_bit_for_bit_with_its_buffers_and_its_average(whole):
    torch.manual_seed(99)
    fresh = make()
    trainer = fresh.trainer(whole.folder)
    trainer.resume(trainer.store.latest())
    fresh.run(HALF, STEPS)
    later = whole.trial.loop.taken[-len(fresh.loop.taken) :]
    assert [(taken.role, taken.loss) for taken in fresh.loop.taken] == [(taken.role, taken.loss) for taken in later]
    ours, theirs = fresh.networks.state(), whole.trial.networks.state()
    assert ours.keys() == theirs.keys() == {"network-student", "network-error", "network-slow_error"}
    for group in ours:
        assert all(torch.equal(value, theirs[group][name]) for name, value in ours[group].items())
    vectors = [name for name in ours["network-error"] if name.endswith(("_u", "_v"))]
    assert len(vectors) == 2, "the vectors of the spectral norm"


def test_the_average_of_a_module_moves_by_its_decay_and_takes_its_buffers():
    trial = make()
    networks = trial.networks
    before = {name: p.detach().clone() for name, p in networks.named_parameters("slow_error").items()}
    trial.run(0, 1)
    own, slow = networks.named_parameters("error"), networks.named_parameters("slow_error")
    for name, old in before.items():
        torch.testing.assert_close(slow[name], 0.5 * old + 0.5 * own[name], rtol=1e-12, atol=1e-14)
    for name, value in networks._buffers("error").items():
        assert torch.equal(value, networks._buffers("slow_error")[name])


def test_a_frozen_network_gets_no_gradient_passes_it_on_and_is_in_no_checkpoint(whole):
    networks = whole.trial.networks
    weights = list(networks.module("space").parameters())
    assert all(not weight.requires_grad and weight.grad is None for weight in weights)
    assert not networks.module("space").training
    assert networks.named_parameters("space") == {}
    saved = whole.store.load(whole.store.latest()).tensors
    assert {"network-error", "network-slow_error", "optimizer-error"} <= saved.keys()
    assert not [name for name in saved if "space" in name]
    again = make().networks.module("space")
    assert all(torch.equal(p, q) for p, q in zip(weights, again.parameters(), strict=True)), "it is made alike again"
    moved = next(taken for taken in whole.trial.loop.taken if taken.role == "student")
    assert sum(float(g.square().sum()) for g in moved.gradients if g is not None) > 0, "the gradient runs through it"


def build(*roles, seed=0, dtype=torch.float32):
    kind, schedule = PATHS["eps"]
    return Networks(SmoothFamily(schedule, kind), roles, lora=None, seed=seed, parameter_dtype=dtype)


def test_weights_depend_on_the_seed_and_the_role_alone():
    def weight(name="error", seed=0, drawn=0):
        family = SmoothFamily(PATHS["eps"][1], PATHS["eps"][0])
        base = family.load_network()
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        role = Role(name, trains="module", build=error_of)
        made = build_module(role, family, base, seed=seed, dtype=torch.float32)
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left as it was"
        return made.last.weight

    assert torch.equal(weight(), weight(drawn=5))
    assert not torch.equal(weight(), weight(seed=1))
    assert not torch.equal(weight(), weight(name="other"))


def test_a_trained_module_takes_the_parameters_type_and_a_frozen_one_keeps_its_own():
    roles = [Role("error", trains="module", build=error_of), Role("space", build=Frozen(2))]
    networks = build(Role("teacher"), *roles, dtype=torch.bfloat16)
    assert networks.module("error").last.weight.dtype == torch.bfloat16
    assert networks.module("space").weight.dtype == torch.float64
    assert [parameter.dtype for parameter in networks.parameters("error")] == [torch.bfloat16] * 4
    assert networks.trained_roles() == ["error"]


def test_the_gradients_of_a_module_are_averaged_over_processes():
    trial, seen = make(), []
    trial.loop._reduce = lambda tensors: seen.append({id(tensor) for tensor in tensors})
    parameters = trial.networks.parameters("error")
    take = trial.loop._take

    def watched(step, accumulated, result):
        if accumulated.role == "error":
            seen.append({id(p.grad) for p in parameters})
        take(step, accumulated, result)

    trial.loop._take = watched
    trial.run(0, 1)
    _, gradients, reduced = seen
    assert gradients <= reduced
    assert len(gradients) == 4


@pytest.mark.parametrize(
    ("role", "words"),
    [
        (Role("x", trains="module"), "declares 'x' with trains='module' and without build"),
        (Role("x", trains="full", build=error_of), "declares 'x' with build and trains='full'"),
        (Role("x", ema_of="student", build=error_of), "declares 'x' with build, and as made of 'student'"),
        (Role("student", trains="module", build=error_of), "declares 'student' with build; this one is a network"),
    ],
)
def test_a_role_that_contradicts_itself_is_reported(role, words):
    class Wrong(Weighted):
        @classmethod
        def roles(cls, config, setup):
            return [role]

    with pytest.raises(PluginError, match="trains='none'") as error:
        roles_of(Wrong, Wrong.Config(), MethodSetup("full"))
    assert words in str(error.value)


def test_a_factory_that_makes_no_module_or_nothing_to_train_is_reported():
    with pytest.raises(PluginError, match=r"the factory of the role 'x' returned int, not a torch.nn.Module"):
        build(Role("x", build=lambda setup: 3))
    with pytest.raises(PluginError, match=r"the module of the role 'x' has no weights to train"):
        build(Role("x", trains="module", build=lambda setup: nn.Tanh()))


def test_plugins_show_says_what_a_module_is():
    said = [_network(role) for role in Weighted.roles(None, MethodSetup("lora"))]
    assert said[2:] == [
        "error (a module of its own, learning rate 0.003)",
        "slow_error (average of error)",
        "space (frozen, of its own)",
    ]


# -- terms that share them --------------------------------------------------------------------------------------------


def roles_of_recipe(*terms):
    return {role.name for role in Recipe.roles(recipe(registry(), *terms), MethodSetup("lora"))}


def test_terms_share_equal_auxiliary_networks_and_have_others_beside_them():
    lpips = {"loss_type": "lpips", "lpips_network": str(network_file(Vgg))}
    red = {"network": str(network_file(MeanRed))}
    prompt = {"network": str(network_file(RedOfPrompt)), "reads": "embeddings"}
    names = roles_of_recipe(
        term("kd", 1.0, **lpips), term("kd", 0.5, **lpips), term("reward", 0.1, **red), term("reward", 0.1, **prompt)
    )
    assert names == {"teacher", "student", "perceptual_distance", "reward_meanred", "reward_redofprompt"}
    with pytest.raises(UserError, match="cannot share the network 'perceptual_distance': build is"):
        roles_of_recipe(term("kd", 1.0, **lpips), term("kd", 1.0, loss_type="lpips", lpips_network="other.pt"))
