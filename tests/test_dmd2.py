"""DMD2 on a random tiny SDXL: its step against the paper's formulas written out, its turns, its sampler, its runs."""

import io
import json

import numpy as np
import pytest
import torch
from distill.core.diffusion import DDPMSchedule, FlowSchedule
from distill.core.errors import UserError
from distill.core.plugin_api.method import MethodSetup
from distill.core.testing.trial import split
from distill.core.utils.progress import Progress
from distill.core.utils.seeds import RngStreams
from distill.distill_methods.dmd2 import DMD2
from support.sdxl_methods import call, table
from support.small_run import execute, write_run
from support.tiny_sdxl import write_tiny_sdxl
from support.trial import LATENT, held_bytes, make_trial

TIMES = [999, 749, 499, 249]
SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers_per_block=1)


def trial_of(folder, model_type="lora", **config):
    return make_trial(folder, DMD2, DMD2.Config(**config), model_type)


def shaped(value):
    return value.reshape(-1, 1, 1, 1)


class Paper:
    """Algorithm and appendix of arXiv 2405.14867 with the raw UNet, on the draws of one step."""

    def __init__(self, trial, batch, step):
        self.trial, self.batch = trial, batch
        self.rng = RngStreams(0, step, batch.positions)
        self.bar = table()
        self.calls = 1 + self.rng.shared_integer("calls", 4)

    def randn(self, name):
        return self.rng.randn(name, LATENT).double()

    def noised(self, x, t, eps):
        return shaped(self.bar[t].sqrt()) * x + shaped((1 - self.bar[t]).sqrt()) * eps

    def eps(self, role, x_t, t, **options):
        return call(self.trial.networks, role, x_t, t, self.batch.cond, **options)

    def x_0(self, x_t, t, eps):
        return (x_t - shaped((1 - self.bar[t]).sqrt()) * eps) / shaped(self.bar[t].sqrt())

    def times(self, name, low, high):
        return (self.rng.uniform(f"{name}/time", low, high) * 1000).floor().long()

    def simulate(self):
        """Backward simulation with the student as it is; the gradient of the last call alone."""
        x_t = self.randn("start/noise")
        for i, time in enumerate(TIMES[: self.calls]):
            t = torch.full((len(self.batch),), time)
            with torch.set_grad_enabled(i == self.calls - 1):
                x = self.x_0(x_t, t, self.eps("student", x_t, t))
            if i < self.calls - 1:
                x_t = self.noised(x, t - 250, self.randn(f"simulation/{i}"))
        return x

    def student(self, x, *, scale):
        with torch.no_grad():
            t = self.times("matching", 0.02, 0.98)
            x_t = self.noised(x, t, self.randn("matching/noise"))
            fake = self.x_0(x_t, t, self.eps("fake_score", x_t, t))
            cond, uncond = (self.eps("teacher", x_t, t, prompt=prompt) for prompt in (True, False))
            real = self.x_0(x_t, t, uncond + scale * (cond - uncond))
            p_real, p_fake = x - real, x - fake
            grad = (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)
        return 0.5 * torch.nn.functional.mse_loss(x, (x - grad).detach())

    def fake_score(self, x):
        t, eps = self.times("fake", 0, 1), self.randn("fake/noise")
        return ((self.eps("fake_score", self.noised(x.detach(), t, eps), t) - eps) ** 2).mean()


def turns_of_all_lengths():
    """The first turns of the student whose simulations have 1, 2, 3 and 4 calls."""
    lengths = {RngStreams(0, step, ()).shared_integer("calls", 4): step for step in range(99, 0, -5)}
    return [lengths[calls] for calls in range(4)]


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_one_step_equals_the_papers_algorithm(folder, model_type):
    trial, seen = trial_of(folder, model_type), set()
    for step in turns_of_all_lengths():
        batch = trial.batch(step)
        paper = Paper(trial, batch, step)
        x = paper.simulate()
        losses = {"student": paper.student(x, scale=8.0), "fake_score": paper.fake_score(x)}
        seen.add(paper.calls)
        updates = trial.method.updates(trial.context.at(step, batch.positions), batch, step)
        for update, (role, expected) in zip(updates, losses.items(), strict=True):
            assert update.role == role
            assert update.loss.item() == pytest.approx(expected.item(), rel=1e-9)
            weights = trial.networks.parameters(role)
            ours, theirs = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (update.loss, expected))
            assert any(g is not None and g.abs().max() > 0 for g in ours)
            for mine, papers in zip(ours, theirs, strict=True):
                if papers is not None:
                    torch.testing.assert_close(mine, papers, rtol=1e-6, atol=1e-12)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_student_is_stepped_in_the_last_of_every_n_steps(folder, steps):
    trial = trial_of(folder, fake_updates_per_student_update=steps, num_inference_steps=1)
    batch, turns = trial.batch(0), []
    for step in range(10):
        updates = [update.role for update in trial.method.updates(trial.context.at(step, batch.positions), batch, step)]
        assert updates in (["fake_score"], ["student", "fake_score"])
        turns.append(updates[0] == "student")
    assert turns == [(step + 1) % steps == 0 for step in range(10)]
    assert any(f"one in {steps}" in line and f"max_train_steps / {steps}" in line for line in trial.method.notices())


def test_the_length_of_the_simulation_is_shared_and_uniform(folder):
    trial = trial_of(folder)
    batch = trial.batch(0)
    lengths = []
    for step in range(64):
        found = {1 + trial.context.at(step, part.positions).rng.shared_integer("calls", 4) for part in split(batch, 4)}
        assert len(found) == 1
        lengths.append(found.pop())
    assert np.bincount(lengths)[1:].min() > 6
    for parts in (2, 4):
        made = [
            trial.method._simulate(trial.context.at(3, p.positions), p, with_gradient=False)
            for p in split(batch, parts)
        ]
        whole = trial.method._simulate(trial.context.at(3, batch.positions), batch, with_gradient=False)
        assert {sample.calls for sample in made} == {whole.calls}
        torch.testing.assert_close(torch.cat([sample.x for sample in made]), whole.x, rtol=1e-9, atol=1e-9)


def test_only_the_last_call_of_the_simulation_carries_a_gradient(folder):
    trial = trial_of(folder)
    batch = trial.batch(0)
    step = next(s for s in range(50) if trial.context.at(s, (0,)).rng.shared_integer("calls", 4) == 3)
    seen = []
    original = trial.family.predict
    trial.family.predict = lambda *args, **kw: seen.append(torch.is_grad_enabled()) or original(*args, **kw)
    sample = trial.method._simulate(trial.context.at(step, batch.positions), batch, with_gradient=True)
    assert seen == [False, False, False, True]
    assert sample.x.requires_grad
    assert sample.share == 1 / 4


# -- the adversarial term ---------------------------------------------------------------------------------------------


def heads_of(trial, batch, x_t, t):
    features = trial.context.features("fake_score", x_t, t, batch.cond)
    (logits,) = trial.context.logits("discriminator", features)  # of the middle alone
    return logits


def test_the_adversarial_term_adds_its_own_gradient(folder):
    trial = trial_of(folder, gan_weight=0.25, fake_updates_per_student_update=1)
    batch, step = trial.batch(1), 1
    paper = Paper(trial, batch, step)
    x = paper.simulate()
    plain = paper.student(x, scale=8.0)
    t = paper.times("adversarial", 0, 1)
    noisy = paper.noised(x, t, paper.randn("adversarial/noise"))
    logits = heads_of(trial, batch, noisy, t)
    softplus = (-torch.sigmoid(-logits) / logits.numel()).detach()  # d softplus(-l) / dl, of a mean
    weights = trial.networks.parameters("student")
    added = torch.autograd.grad(logits, weights, softplus.to(logits.dtype), retain_graph=True, allow_unused=True)
    base = torch.autograd.grad(plain, weights, allow_unused=True)
    update = next(trial.method.updates(trial.context.at(step, batch.positions), batch, step))
    ours = torch.autograd.grad(update.loss, weights, allow_unused=True)
    for total, first, second in zip(ours, base, added, strict=True):
        torch.testing.assert_close(total, first + 0.25 * second, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("adapt", [True, False])
def test_heads_and_features_learn_to_tell_images_from_samples(folder, adapt):
    trial = trial_of(folder, gan_weight=0.25, discriminator_weight=0.1, adapt_features=adapt)
    batch, step = trial.batch(0), 0
    paper = Paper(trial, batch, step)
    x = paper.simulate().detach()
    t_real, t_fake = paper.times("real", 0, 1), paper.times("sample", 0, 1)
    real = heads_of(trial, batch, paper.noised(batch.latents, t_real, paper.randn("real/noise")), t_real)
    fake = heads_of(trial, batch, paper.noised(x, t_fake, paper.randn("sample/noise")), t_fake)
    slopes = [-0.1 * torch.sigmoid(-real) / real.numel(), 0.1 * torch.sigmoid(fake) / fake.numel()]
    slopes = [slope.detach().to(real.dtype) for slope in slopes]
    denoising = paper.fake_score(x)
    updates = list(trial.method.updates(trial.context.at(step, batch.positions), batch, step))
    assert [update.role for update in updates] == ["fake_score", "discriminator"]
    for update in updates:
        weights = trial.networks.parameters(update.role)
        ours = torch.autograd.grad(update.loss, weights, retain_graph=True, allow_unused=True)
        theirs = [torch.zeros_like(weight) for weight in weights]
        if update.role == "discriminator" or adapt:
            theirs = grads((real, fake), weights, slopes)
        if update.role == "fake_score":
            theirs = [a + b for a, b in zip(theirs, grads((denoising,), weights, None), strict=True)]
        for mine, papers in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, papers, rtol=1e-5, atol=1e-10)


def grads(outputs, weights, slopes):
    found = torch.autograd.grad(outputs, weights, slopes, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(weight) if g is None else g for g, weight in zip(found, weights, strict=True)]


def test_a_density_ratio_weighs_samples(folder):
    """With heads that say the same of all samples the weights are 1; with others they are the formula's."""
    plain, weighed = (
        trial_of(folder, gan_weight={0: 0.0, 100: 0.1}, fake_updates_per_student_update=1, divergence=divergence)
        for divergence in ("reverse_kl", "js")
    )
    batch, step = plain.batch(0), 0
    losses = []
    for trial in (plain, weighed):
        update = next(trial.method.updates(trial.context.at(step, batch.positions), batch, step))
        losses.append(update.per_sample)
    paper = Paper(weighed, batch, step)
    t = paper.times("matching", 0.02, 0.98)
    x_t = paper.noised(paper.simulate().detach(), t, paper.randn("matching/noise"))
    r = heads_of(weighed, batch, x_t, t).double().mean(1).exp().clamp(0.1, 10).detach()
    assert r.std() > 1e-3
    torch.testing.assert_close(losses[1], losses[0] * (2 * r / (1 + r)) ** 2, rtol=1e-6, atol=0)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gan", [0.0, 0.1])
def test_a_lora_run_holds_one_base_and_a_full_run_three(folder, gan):
    lora, full = (trial_of(folder, kind, gan_weight=gan) for kind in ("lora", "full"))
    base = sum(t.untyped_storage().nbytes() for t in lora.family.load_network().double().state_dict().values())
    own = {role: sum(p.nbytes for p in lora.networks.named_parameters(role).values()) for role in lora.networks.roles}
    assert own["student"] == own["fake_score"]
    assert held_bytes(lora.networks) == base + sum(own.values())
    heads = sum(p.nbytes for p in full.networks.named_parameters("discriminator").values()) if gan else 0
    assert held_bytes(full.networks) == 3 * base + heads


# -- sampling ---------------------------------------------------------------------------------------------------------


def method_of(**config):
    return DMD2(DMD2.Config(**config), MethodSetup("lora"))


@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        ({}, None, TIMES),
        ({}, 1, [999]),
        ({}, 2, [999, 499]),
        ({}, 8, [999, 874, 749, 624, 499, 374, 249, 124]),
        ({"num_inference_steps": 1}, None, [399]),
        ({"num_inference_steps": 1, "one_step_time": 249}, None, [249]),
        ({"num_inference_steps": 1}, 4, TIMES),
    ],
)
def test_it_is_sampled_at_the_times_it_was_trained_at(config, steps, expected):
    schedule = DDPMSchedule.from_config(SDXL)
    sampler = method_of(**config).sampler(schedule, num_inference_steps=steps)
    assert sampler.call == {"timesteps": expected}
    assert (sampler.scheduler, sampler.num_inference_steps) == ("LCMScheduler", len(expected))
    assert sampler.guidance_scale == 0


def test_on_a_flow_it_is_sampled_on_the_shifted_grid():
    schedule = FlowSchedule(shift=3.0)
    sampler = method_of().sampler(schedule)
    assert sampler.scheduler == "FlowMatchLCMScheduler"
    assert sampler.call["sigmas"] == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert method_of(num_inference_steps=1).sampler(schedule).call["sigmas"] == [1.0]


def test_a_time_beyond_the_models_is_refused():
    with pytest.raises(UserError, match="one_step_time = 1200"):
        method_of(num_inference_steps=1, one_step_time=1200).sampler(DDPMSchedule.from_config(SDXL))


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_the_scheduler_makes_what_training_simulates(tmp_path, kind):
    """diffusers' scheduler, fed the student's outputs and the simulation's noise, gives the simulation's sample."""
    trial = trial_of(write_tiny_sdxl(tmp_path / "model", prediction_type=kind))
    batch = trial.batch(0)
    step = next(s for s in range(50) if trial.context.at(s, (0,)).rng.shared_integer("calls", 4) == 3)
    context = trial.context.at(step, batch.positions)
    sample = trial.method._simulate(context, batch, with_gradient=False)
    assert sample.calls == 4
    sampler = trial.method.sampler(trial.family.schedule)
    scheduler = trial.family.scheduler(sampler)
    scheduler.set_timesteps(**sampler.call)
    x = context.rng.randn("start/noise", LATENT).double()
    for i, time in enumerate(scheduler.timesteps):
        t = time.expand(len(batch)) if kind == "epsilon" else (time / 1000).double().expand(len(batch))
        with torch.no_grad():
            output = context.predict("student", x, t, batch.cond).output
        noise = context.rng.randn(f"simulation/{i}", LATENT).double()
        x = stepped(scheduler, output, time, x, noise)
    torch.testing.assert_close(x, sample.x, rtol=1e-4, atol=1e-4)


def stepped(scheduler, output, time, x, noise):
    """One step of a scheduler whose noise is given."""
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    original, module.randn_tensor = module.randn_tensor, lambda *args, **kw: noise
    try:
        return scheduler.step(output, time, x).prev_sample.double()
    finally:
        module.randn_tensor = original


# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_from_prompts_alone_logs_the_students_loss_on_its_turns_only(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a noise number {i}" for i in range(9)))
    settings = {
        "distillation_method": "dmd2", "max_train_steps": 7, "log_step_interval": 2,
        "distillation_config": {"dmd2": {"fake_updates_per_student_update": 3, "num_inference_steps": 2}},
    }  # fmt: skip
    config = write_run(tmp_path, **settings)
    data = [{"id": "p", "type": "local", "dataset_type": "prompts", "prompts_file": "prompts.txt"}]
    (tmp_path / "multidatabackend.json").write_text(json.dumps(data))
    result, lines = execute(config)
    assert result.steps == 7
    assert any("one in 3" in line for line in lines)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["step"] for row in rows if "loss" in row] == [3, 6]
    assert all(np.isfinite(row["fake_score/loss"]) for row in rows)
    assert all(row["simulated_calls"] in (1, 2) for row in rows if "loss" in row)
    assert (tmp_path / "out" / "student" / "pytorch_lora_weights.safetensors").is_file()


def test_progress_shows_a_step_without_the_students_loss():
    stream = io.StringIO()
    progress = Progress(10, samples_per_step=4, stream=stream)
    progress.log(1, {"fake_score/loss": 0.5, "fake_score/lr": 1e-4})
    assert stream.getvalue().startswith("step 1/10")
