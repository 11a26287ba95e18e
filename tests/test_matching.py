"""Terms of distribution matching: weights are r^2 f''(r), gradients are those of the losses, means see no batches."""

import math

import pytest
import torch
from distill.core.diffusion import DDPMSchedule, FlowSchedule, Prediction
from distill.core.diffusion.distribution_matching import (
    DivergenceWeights,
    augmentation_gradient,
    denoising_target,
    distribution_matching_gradient,
    distribution_matching_loss,
    divergence_weight,
    sid_loss,
)

GENERATORS = {
    "reverse_kl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (r + 1) * (1 / 2 + 1 / (2 * r)).log(),
    "squared_hellinger": lambda r: 4 * (1 - r.sqrt()),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 1 / (2 * r),
}
"""f of D_f(p || q) = E_q f(p / q), written down apart from the code."""


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("divergence", GENERATORS)
def test_the_divergence_weight_is_r_squared_times_the_second_derivative(divergence):
    r = torch.logspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(GENERATORS[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(divergence_weight(r.detach(), divergence), (r**2 * second).detach())


@pytest.mark.parametrize("divergence", GENERATORS)
def test_weighted_score_gaps_are_the_gradient_of_the_divergence(divergence):
    """d/dm D_f(N(0, 1) || N(m, 1)) = E_q[h(r) (s_q - s_p) dx/dm], by quadrature against differences."""
    x = torch.linspace(-14, 14, 20001, dtype=torch.float64)
    width = x[1] - x[0]

    def density(mean):
        return (-((x - mean) ** 2) / 2).exp() / math.sqrt(2 * math.pi)

    def value(m):
        return (density(m) * GENERATORS[divergence](density(0.0) / density(m))).sum() * width

    m, h = 0.7, 1e-4
    ratio = density(0.0) / density(m)
    gap = -(x - m) + x
    ours = (density(m) * divergence_weight(ratio, divergence) * gap).sum() * width
    torch.testing.assert_close(ours, (value(m + h) - value(m - h)) / (2 * h), rtol=1e-6, atol=0)


def test_the_loss_has_the_given_gradient():
    x, gradient = some(3, 4, 2, 2).requires_grad_(), some(3, 4, 2, 2, seed=1)
    losses = distribution_matching_loss(x, gradient)
    torch.testing.assert_close(losses, gradient.square().flatten(1).mean(1) / 2)
    losses.sum().backward()
    torch.testing.assert_close(x.grad, gradient / 16)


def test_the_normaliser_is_of_each_sample_and_never_zero():
    x, real, fake = some(3, 4, 2, 2), some(3, 4, 2, 2, seed=1), some(3, 4, 2, 2, seed=2)
    plain, normalised = (distribution_matching_gradient(x, real, fake, normalise=n) for n in (False, True))
    for i in range(3):
        torch.testing.assert_close(normalised[i], plain[i] / (x[i] - real[i]).abs().mean())
    assert torch.isfinite(distribution_matching_gradient(x, x, fake, normalise=True)).all()


def test_matching_and_augmentation_gradients_sum_to_the_guided_gap():
    x, cond, uncond, fake = (some(3, 5, seed=seed) for seed in range(4))
    guided = uncond + 7.5 * (cond - uncond)
    parts = distribution_matching_gradient(x, cond, fake, normalise=False)
    parts = parts + augmentation_gradient(x, cond, uncond, scale=7.5, normalise=False)
    torch.testing.assert_close(parts, distribution_matching_gradient(x, guided, fake, normalise=False))


def test_sid_is_the_papers_product():
    x, real, fake = (some(3, 5, seed=seed).requires_grad_() for seed in range(3))
    losses = sid_loss(x, real, fake, alpha=1.2, normalise=True)
    scale = (x - real).abs().mean(1, keepdim=True).detach()
    expected = ((real - fake) * ((real - x) - 1.2 * (real - fake)) / scale).mean(1)
    torch.testing.assert_close(losses, expected)
    for ours, theirs in zip(
        torch.autograd.grad(losses.sum(), (x, real, fake), retain_graph=True),
        torch.autograd.grad(expected.sum(), (x, real, fake)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("schedule", [DDPMSchedule.from_config({"beta_schedule": "scaled_linear"}), FlowSchedule(3.0)])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_network_that_predicts_its_target_gives_back_data_and_noise(schedule, kind):
    x_0, eps = some(6, 3), some(6, 3, seed=1)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64) * schedule.t_max
    prediction = Prediction(
        denoising_target(kind, x_0, eps, t, schedule), schedule.add_noise(x_0, eps, t), t, schedule, kind
    )
    torch.testing.assert_close(prediction.x0, x_0)
    torch.testing.assert_close(prediction.eps, eps)


# -- running means ----------------------------------------------------------------------------------------------------


def nothing(tensors):
    """One process."""


def test_reverse_kl_leaves_samples_alone():
    weights = DivergenceWeights("reverse_kl", max_ratio=10)
    for step in range(3):
        assert torch.equal(weights(3 * some(8, seed=step), torch.rand(8)), torch.ones(8, dtype=torch.float64))
        weights.update(nothing)
    assert weights.state_dict() == {}


def test_the_mean_weight_becomes_one_whatever_the_heads_offset():
    """Samples of N(1, 1) against N(0, 1): the exact log ratio plus an error of the heads that is the same for all."""
    weights = DivergenceWeights("js", max_ratio=1e3)
    for step in range(200):
        x = 1 + some(64, seed=step)
        log_ratio = (x - 1) ** 2 / 2 - x**2 / 2
        found = weights(log_ratio - 1.5, torch.rand(64, generator=torch.Generator().manual_seed(step)))
        weights.update(nothing)
    r = log_ratio.exp()
    expected = r / (1 + r)
    assert found.mean().item() == pytest.approx(1, abs=0.15)
    correlation = torch.corrcoef(torch.stack([found, expected]))[0, 1]
    assert correlation > 0.98
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=0.25, atol=0.15)


def test_divergence_weights_depend_on_neither_batches_nor_processes():
    whole, parts = (DivergenceWeights("kl", max_ratio=10) for _ in range(2))
    ranks = [DivergenceWeights("kl", max_ratio=10) for _ in range(2)]
    for step in range(4):
        log_ratio, share = some(8, seed=step), torch.rand(8, generator=torch.Generator().manual_seed(step))
        expected = whole(log_ratio, share)
        whole.update(nothing)
        pieces = [parts(log_ratio[i : i + 2], share[i : i + 2]) for i in range(0, 8, 2)]
        for _ in pieces:  # as each micro-batch's generator goes on
            parts.update(nothing)
        split = [rank(log_ratio[4 * n : 4 * n + 4], share[4 * n : 4 * n + 4]) for n, rank in enumerate(ranks)]
        mean = torch.stack([rank._seen for rank in ranks]).mean(0)
        for rank in ranks:
            rank.update(lambda tensors, mean=mean: tensors[0].copy_(mean))
        torch.testing.assert_close(torch.cat(pieces), expected)
        torch.testing.assert_close(torch.cat(split), expected)
    assert (whole.state_dict()["means"] - 1).abs().max() > 0.01


def test_ratios_are_bounded():
    weights = DivergenceWeights("kl", max_ratio=10)
    found = weights(torch.tensor([-50.0, 50.0]), torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(found, torch.tensor([0.1, 10.0], dtype=torch.float64))
