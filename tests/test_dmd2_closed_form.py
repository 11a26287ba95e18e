"""A DMD2 student trained by the engine ends at the teacher's Gaussian, from prompts alone; its gradients are known.

Data N(c, q^2), the student's samples N(c + shift, width^2): both scores, the guided one too, are closed forms.
"""

import pytest
import torch
from distill.core.diffusion import append_dims
from distill.core.testing.gaussian import Q
from distill.distill_methods import dmd2
from support.scores import CASES, MEAN, make_loop, score_batch, score_setup

SHIFT, WIDTH = 0.35, 0.8


def follow(networks, *, shift=SHIFT, width=WIDTH):
    """Make the fake score the exact one of N(c + shift, width^2)."""
    network = networks.module("fake_score")
    network.shift.data.fill_(shift)
    network.log_width.data.copy_(torch.tensor(width, dtype=torch.float64).log())


def samples(size=64, dims=3, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    return MEAN + SHIFT + WIDTH * torch.randn(size, dims, generator=g, dtype=torch.float64)


def score(schedule, x_t, t, mean, width):
    """Of N(alpha mean, alpha^2 width^2 + sigma^2) at x_t."""
    a, s = (append_dims(part, x_t) for part in (schedule.alpha(t), schedule.sigma(t)))
    return -(x_t - a * mean) / (a**2 * width**2 + s**2)


def noised(context, x, name, low, high):
    """x_t and t as the method draws them."""
    share = context.rng.uniform(f"{name}/time", low, high)
    schedule = context.schedule
    t = schedule.shifted(share) if schedule.clean_at_zero else (share * 1000).floor().long()
    return schedule.add_noise(x, context.rng.randn(f"{name}/noise", x.shape[1:]).double(), t), t


def gradient_of(method, context, batch, x, *, share=1.0):
    """The gradient that the student's samples get, per sample (not divided by their number of elements)."""
    x = x.clone().requires_grad_()
    update = method._student(context, batch, dmd2._Sample(x, calls=1, share=share))
    update.loss.backward()
    return x.grad * x.numel()


def bound(case, **config):
    method, networks, context = score_setup(case, **config)
    batch = score_batch(64, dims=3)
    return method, networks, context.at(3, batch.positions), batch


def snr(schedule, x, t):
    a, s = (append_dims(part, x) for part in (schedule.alpha(t), schedule.sigma(t)))
    return s**2 / a


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("g", [1.0, 4.0])
def test_the_gradient_is_the_gap_of_the_scores(case, g):
    method, networks, context, batch = bound(case, normalise=False, guidance_scale=g)
    follow(networks)
    x = samples()
    x_t, t = noised(context, x, "matching", 0.02, 0.98)
    fake = score(context.schedule, x_t, t, MEAN + SHIFT, WIDTH)
    cond, uncond = (score(context.schedule, x_t, t, mean, Q) for mean in (MEAN, 0.0))
    expected = snr(context.schedule, x, t) * (fake - (uncond + g * (cond - uncond)))
    torch.testing.assert_close(gradient_of(method, context, batch, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_normaliser_is_the_samples_distance_to_its_denoised_version(case):
    x = samples()
    gradients = []
    for normalise in (False, True):
        method, networks, context, batch = bound(case, normalise=normalise, guidance_scale=1.0)
        follow(networks)
        gradients.append(gradient_of(method, context, batch, x))
    x_t, t = noised(context, x, "matching", 0.02, 0.98)
    a = append_dims(context.schedule.alpha(t), x)
    denoised = (x_t + a * snr(context.schedule, x, t) * score(context.schedule, x_t, t, MEAN, Q)) / a
    distance = (x - denoised).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradients[1], gradients[0] / distance, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", ["dm", "sid"])
def test_no_sample_moves_where_fake_equals_real(case, loss):
    method, _, context, batch = bound(case, guidance_scale=1.0, loss=loss)
    assert gradient_of(method, context, batch, samples()).abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_decoupled_guidance_has_times_of_its_own(case):
    g, share = 5.0, 0.5
    method, networks, context, batch = bound(case, normalise=False, guidance_scale=g, guidance="decoupled")
    follow(networks)
    x, schedule = samples(), context.schedule
    x_t, t = noised(context, x, "matching", 0.02, 0.98)
    gap = score(schedule, x_t, t, MEAN + SHIFT, WIDTH) - score(schedule, x_t, t, MEAN, Q)
    x_a, t_a = noised(context, x, "augmentation", 0.02, share)
    assert t_a.max() <= (schedule.shifted(torch.tensor(share)) if schedule.clean_at_zero else 1000 * share)
    guidance = score(schedule, x_a, t_a, MEAN, Q) - score(schedule, x_a, t_a, 0.0, Q)
    expected = snr(schedule, x, t) * gap - (g - 1) * snr(schedule, x, t_a) * guidance
    ours = gradient_of(method, context, batch, x, share=share)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("alpha", [0.0, 1.2])
def test_sid_differentiates_through_both_denoisers(case, alpha):
    method, networks, context, batch = bound(
        case, normalise=False, guidance_scale=1.0, loss="sid", sid_alpha=alpha
    )  # fmt: skip
    follow(networks)
    x, schedule = samples(), context.schedule
    x_t, t = noised(context, x, "matching", 0.02, 0.98)
    a, s = (append_dims(part, x) for part in (schedule.alpha(t), schedule.sigma(t)))
    slopes, denoised = [], []
    for mean, width in ((MEAN, Q), (MEAN + SHIFT, WIDTH)):
        slopes.append(a * width**2 / (a**2 * width**2 + s**2))  # dD / dx_t
        denoised.append(mean + slopes[-1] * (x_t - a * mean))
    gap, steepness = denoised[0] - denoised[1], a * (slopes[0] - slopes[1])  # and its derivative by x
    expected = steepness * (denoised[0] - x - alpha * gap) + gap * (a * slopes[0] - 1 - alpha * steepness)
    torch.testing.assert_close(gradient_of(method, context, batch, x), expected, rtol=1e-8, atol=1e-10)


# -- training ---------------------------------------------------------------------------------------------------------


def moments(method, context):
    """Mean and standard deviation of what the student makes, pooled over rollouts of all lengths in equal shares.

    A fake score that is one Gaussian sees no more of a student of two calls: what both make together must be right.
    """
    batch, made = score_batch(64, dims=256), {}
    for step in range(20):
        with torch.no_grad():
            sample = method._simulate(context.at(10_000 + step, batch.positions), batch, with_gradient=False)
        made[sample.calls] = sample.x
    assert len(made) == method.config.num_inference_steps
    x = torch.cat(list(made.values()))
    return x.mean().item(), x.std().item()


def train(case, *, count=1, steps=700, rate=3e-2, **config):
    """The moments of a student before and after training; the numbers of a sample are independent of each other."""
    config = {"guidance_scale": 1.0, "normalise": False, "fake_updates_per_student_update": 2, **config}
    method, networks, context = score_setup(case, num_inference_steps=count, **config)
    networks.module("student").offset.data += 0.7  # far off, and much too narrow
    before = {name: tensor.clone() for name, tensor in networks.base.state_dict().items()}
    start = moments(method, context)
    rates = {"student": rate, "fake_score": rate}
    loop = make_loop(method, networks, context, rates=rates, steps=steps)
    for step in range(steps):
        loop.step(step, [score_batch(16, dims=128)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in networks.base.state_dict().items())
    return start, moments(method, context)


SLOWER = {"count": 2, "steps": 1000, "rate": 2e-2}


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("eps", {}),
        ("v", {}),
        ("x0", {}),
        ("flow", {}),
        ("eps", SLOWER),
        ("flow", SLOWER),
        ("eps", {"normalise": True}),
        ("eps", {"loss": "sid", "sid_alpha": 1.0}),
        ("flow", {"loss": "sid", "sid_alpha": 1.2}),
    ],
    ids=["eps-1", "v-1", "x0-1", "flow-1", "eps-2", "flow-2", "normalised", "sid-eps", "sid-flow"],
)
def test_training_moves_a_wrong_gaussian_onto_the_right_one(case, settings):
    (mean, std), (new_mean, new_std) = train(case, **settings)
    print(f"{case} {settings}: {mean:.3f} {std:.3f} -> {new_mean:.4f} {new_std:.4f}")
    assert abs(mean - MEAN) > 0.5
    assert abs(std - Q) > 0.4 * Q
    assert new_mean == pytest.approx(MEAN, abs=0.03)
    assert new_std == pytest.approx(Q, rel=0.05)


def teacher_alone(x, real, fake, *, normalise):
    return x - real


def wrong_sign(x, real, fake, *, normalise):
    return real - fake


@pytest.mark.parametrize("wrong", [teacher_alone, wrong_sign])
def test_a_wrong_gradient_does_not_move_the_gaussian_onto_the_right_one(monkeypatch, wrong):
    monkeypatch.setattr(dmd2, "distribution_matching_gradient", wrong)
    _, (mean, std) = train("eps")
    print(f"{wrong.__name__}: {mean:.3f} {std:.3f}")
    assert abs(mean - MEAN) > 0.3 or abs(std - Q) > 0.5 * Q
