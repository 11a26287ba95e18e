"""Heads that read features before anything is averaged, their losses and their R1 penalty."""

from __future__ import annotations

import math

import pytest
import torch
from distill.core.diffusion.adversarial import (
    Heads,
    PlacesHead,
    StridedHead,
    discriminator_loss,
    generator_loss,
    level_mean,
    r1_penalty,
)
from torch import nn

KINDS = ("places", "strided")


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def drawn(seed, size=2):
    """A source of named normal numbers for a batch."""
    generator = torch.Generator().manual_seed(seed)
    return lambda name, shape: torch.randn(size, *shape, generator=generator)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_adversarial_losses_equal_their_formulas():
    real, fake = [torch.tensor([[0.5, -2.0]])], [torch.tensor([[0.5, 3.0]])]
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert discriminator_loss(real, fake, kind="hinge").item() == pytest.approx((0.5 + 3.0) / 2 + (1.5 + 4.0) / 2)
    assert generator_loss(fake, kind="hinge").item() == pytest.approx((0.5 + 0.0) / 2)
    expected = (softplus(-0.5) + softplus(2.0)) / 2 + (softplus(0.5) + softplus(3.0)) / 2
    assert discriminator_loss(real, fake, kind="softplus").item() == pytest.approx(expected)
    assert generator_loss(fake, kind="softplus").item() == pytest.approx((softplus(-0.5) + softplus(-3.0)) / 2)


def test_losses_are_of_each_logit_then_means_over_places_then_over_levels():
    """No level outweighs another, and a hinge does not see a mean of logits."""
    many, one = torch.tensor([[3.0, -3.0, 0.0, 0.0]]), torch.tensor([[0.5]])
    assert generator_loss([many, one], kind="hinge").item() == pytest.approx(((0 + 4 + 1 + 1) / 4 + 0.5) / 2)
    assert discriminator_loss([many, one], [one, many], kind="hinge").item() == pytest.approx(
        (6 / 4 + 0.5) / 2 + (1.5 + (4 + 0 + 1 + 1) / 4) / 2
    )
    assert level_mean([many, one]).item() == pytest.approx(0.25)


def test_the_best_softplus_discriminator_is_the_log_density_ratio():
    """Its minimum over all functions is l = log(p / q); the hinge's is the sign of p - q."""
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    for kind, expected in (("softplus", (p / q).log()), ("hinge", (p - q).sign())):
        logits = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.02)
        for _ in range(600):
            x, sure = [logits[:, None]], [torch.full((4, 1), 9.0)]  # of a sure verdict the other half is nothing
            loss = p * discriminator_loss(x, [-sure[0]], kind=kind) + q * discriminator_loss(sure, x, kind=kind)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        torch.testing.assert_close(logits.detach(), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_the_adversarial_loss_moves_the_student_to_the_real_samples(kind):
    logits = torch.tensor([[-3.0], [0.5], [4.0]], requires_grad=True)
    generator_loss([logits], kind=kind).sum().backward()
    slope = logits.grad[:, 0]
    expected = torch.tensor([-1.0, -1.0, 0.0]) if kind == "hinge" else -torch.sigmoid(-logits.detach()[:, 0])
    torch.testing.assert_close(slope, expected)


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_heads_equal_finite_differences(kind):
    heads = seeded(lambda: Heads([8, 12], kind=kind).double())
    generator = torch.Generator().manual_seed(1)
    features = [
        torch.randn(2, width, edge, edge, generator=generator, dtype=torch.float64).requires_grad_()
        for width, edge in ((8, 9), (12, 3))
    ]
    assert torch.autograd.gradcheck(lambda *f: generator_loss(heads(f), kind="softplus"), features, fast_mode=True)
    weights = list(heads.parameters())

    def loss(*_):
        return discriminator_loss(heads(features), heads([-f for f in features]), kind="softplus").sum()

    assert torch.autograd.gradcheck(loss, weights, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_says_where_inside_a_block_of_64_x_64_features(kind):
    """Heads behind a mean over 16 x 16 cells gave one gradient to all of a block."""
    heads = seeded(lambda: Heads([32], kind=kind))
    features = torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (slope,) = torch.autograd.grad(generator_loss(heads([features]), kind="softplus").sum(), features)
    blocks = slope[0].unfold(1, 16, 16).unfold(2, 16, 16)  # (C, 4, 4, 16, 16)
    within = (blocks - blocks.mean((-1, -2), keepdim=True)).square().mean().sqrt()
    assert within > 0.5 * slope.square().mean().sqrt()
    assert (blocks.flatten(-2).std(-1) > 0.1 * slope.std()).all()  # in every block and channel
    detail = torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(2))
    means = nn.functional.avg_pool2d(detail, 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    with torch.no_grad():
        moved = (heads([features + detail - means])[0] - heads([features])[0]).abs().mean()
    assert moved > 1e-2  # the pooled ones did not see it: 7e-8


def test_places_do_not_see_each_other_but_for_the_normalisation():
    head = seeded(lambda: PlacesHead(8))
    for layer in head.layers:
        layer[1] = nn.Identity()
    x = torch.randn(1, 8, 5, 7, generator=torch.Generator().manual_seed(0))
    one_by_one = [head(x[..., row : row + 1, column : column + 1]).item() for row in range(5) for column in range(7)]
    torch.testing.assert_close(head(x).flatten(), torch.tensor(one_by_one))


def test_strided_heads_halve_as_the_authors_network_does():
    """32 -> 16 -> 8 -> 4 -> 1, written with convolutions that pad by one."""
    head = seeded(lambda: StridedHead(8))
    x = torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = x
    for layer in head.halvings:
        expected = nn.functional.conv2d(expected, layer[0].weight, layer[0].bias, stride=2, padding=1)
        expected = layer[2](layer[1](expected))
    assert expected.shape[-2:] == (4, 4)
    expected = nn.functional.conv2d(expected, head.window[0].weight, head.window[0].bias, stride=4)
    expected = head.out(head.window[2](head.window[1](expected)))
    torch.testing.assert_close(head(x), expected)
    assert expected.shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("size", "count"), [((4, 4), 1), ((1, 1), 1), ((5, 3), 1), ((26, 38), 2), ((32, 32), 1), ((64, 64), 25)]
)
def test_strided_heads_take_maps_of_any_size(size, count):
    heads = seeded(lambda: Heads([6], kind="strided"))
    x = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (logits,) = heads([x])
    assert logits.shape == (2, count)
    (slope,) = torch.autograd.grad(logits.sum(), x)
    assert (slope.abs().sum(1) > 0).all()  # every cell of the features is read


def test_heads_are_as_wide_as_the_authors():
    with torch.device("meta"):
        middle = Heads([320, 640, 1280, 1280], kind="strided", levels="middle")
        each = Heads([320, 640, 1280, 1280], kind="places")
        wide = Heads([3072], kind="strided")
    assert sum(weight.numel() for weight in middle.parameters()) == 104_874_241
    assert sum(weight.numel() for weight in each.parameters()) == 7_602_244
    widths = {layer.out_channels for layer in wide.modules() if isinstance(layer, nn.Conv2d)}
    assert widths == {1280, 1}  # a transformer's 3072 would be 604 million


@pytest.mark.parametrize("kind", KINDS)
def test_heads_do_not_mix_samples(kind):
    heads = seeded(lambda: Heads([8], kind=kind).double())
    x = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(heads([x])[0][1:2], heads([x[1:2]])[0], rtol=1e-12, atol=1e-12)


def test_the_middle_alone_is_the_last_level():
    heads = seeded(lambda: Heads([8, 12], kind="places", levels="middle"))
    features = [torch.randn(2, width, 4, 4, generator=torch.Generator().manual_seed(0)) for width in (8, 12)]
    alone = seeded(lambda: Heads([12], kind="places"))
    assert torch.equal(heads(features)[0], alone(features[1:])[0])
    assert len(heads(features)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_fp32_whatever_the_features_the_weights_and_autocast_are(kind):
    heads = seeded(lambda: Heads([8], kind=kind))
    features = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    (expected,) = heads([features.float()])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = heads([features])
    assert torch.equal(found, expected)
    rounded = seeded(lambda: Heads([8], kind=kind)).bfloat16()  # of an optimizer that compensates the rounding
    assert rounded([features])[0].dtype == torch.float32
    torch.testing.assert_close(rounded([features])[0], expected, rtol=0.05, atol=0.02)


# -- a toy: does the gradient point to what is missing? ---------------------------------------------------------------


class PooledHead(nn.Module):
    """The heads as they were: means over a 4 x 4 grid of blocks before the first convolution."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels), nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 1, 1),
        )  # fmt: skip

    def forward(self, features):
        return [self.layers(nn.functional.adaptive_avg_pool2d(features[0], 4)).flatten(1)]


def blurred(x):
    return nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)


def rectangles(generator):
    """Images of 24 rectangles of one colour each, (4, 4, 64, 64)."""
    images = torch.zeros(4, 4, 64, 64)
    for image in images:
        for _ in range(24):
            top, left = torch.randint(64, (2,), generator=generator).tolist()
            height, width = torch.randint(4, 20, (2,), generator=generator).tolist()
            image[:, top : top + height, left : left + width] = torch.randn(4, 1, 1, generator=generator)
    return images


def towards_sharpness(make_heads):
    """Train heads to tell noised sharp images from noised blurred ones, by features of 3 x 3 places.

    Return the cosine of -dL_G/dx with what blurred images x lack.
    """
    generator = torch.Generator().manual_seed(1)
    network, heads = seeded(lambda: nn.Conv2d(4, 48, 3, padding=1)), seeded(make_heads)
    optimizer = torch.optim.Adam(heads.parameters(), 3e-3, betas=(0.0, 0.999))

    def seen(x):
        return [network(x + 0.3 * torch.randn(x.shape, generator=generator))]

    for _ in range(40):
        with torch.no_grad():
            real, fake = seen(rectangles(generator)), seen(blurred(rectangles(generator)))
        loss = discriminator_loss(heads(real), heads(fake), kind="softplus").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sharp = rectangles(generator)
    x = blurred(sharp).requires_grad_()
    (slope,) = torch.autograd.grad(generator_loss(heads(seen(x)), kind="softplus").sum(), x)
    return nn.functional.cosine_similarity(-slope.flatten(), (sharp - x.detach()).flatten(), dim=0).item()


def test_the_gradient_points_to_the_detail_that_is_missing():
    """Heads behind a mean over blocks point anywhere: 0.001. Per place it is 0.06 to 0.09, by seed."""
    pooled = towards_sharpness(lambda: PooledHead(48))
    found = towards_sharpness(lambda: Heads([48], kind="places"))
    assert abs(pooled) < 0.006
    assert found > 5 * max(abs(pooled), 0.003)


# -- R1 ---------------------------------------------------------------------------------------------------------------


def linear(weights):
    """A linear head without a normalisation: logits w_k . h at each place of each level."""
    return lambda features: [
        torch.einsum("bchw,c->bhw", level, weight).flatten(1) for level, weight in zip(features, weights, strict=True)
    ]


def test_exact_r1_of_a_linear_head_is_the_square_of_its_weights():
    """|| d l / d h ||^2 = |w|^2 at each place, and its gradient is 2 w; the mean over levels halves both."""
    weights = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    features = [torch.randn(2, 2, 4, 3), torch.randn(2, 1, 2, 2)]
    penalty = r1_penalty(linear(weights), features, kind="exact", draw=drawn(0))
    torch.testing.assert_close(penalty, torch.full((2,), (5.0 + 9.0) / 2))
    slopes = torch.autograd.grad(penalty.mean(), weights)
    torch.testing.assert_close(slopes[0], torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(slopes[1], torch.tensor([3.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_r1_is_the_squared_gradient_at_each_place(kind):
    """On average over its random signs; for one logit in each draw."""
    heads = seeded(lambda: Heads([8], kind=kind).double())
    features = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    (logits,) = heads([features])
    squares = []
    for place in range(logits.shape[1]):
        (slope,) = torch.autograd.grad(logits[:, place].sum(), features, retain_graph=True)
        squares.append(slope.square().flatten(1).sum(1))
    expected = torch.stack(squares).mean(0)
    draws = 400 if kind == "places" else 1
    many = features.detach().repeat(draws, 1, 1, 1)
    found = r1_penalty(heads, [many], kind="exact", draw=drawn(1, 2 * draws)).unflatten(0, (draws, 2)).mean(0)
    torch.testing.assert_close(found, expected.detach(), rtol=0.03 if draws > 1 else 1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_finite_difference_is_the_exact_penalty_in_the_limit(kind, monkeypatch):
    """On average over its noise; the bias of the step vanishes with it."""
    monkeypatch.setattr("distill.core.diffusion.adversarial.R1_STEP", 1e-4)
    heads = seeded(lambda: Heads([8, 12], kind=kind).double())
    generator, size = torch.Generator().manual_seed(0), 2000
    features = [torch.randn(1, width, 2, 2, generator=generator).double() for width in (8, 12)]
    many = [level.repeat(size, 1, 1, 1) for level in features]
    exact, difference = (
        r1_penalty(heads, many, kind=name, draw=drawn(1, size)).mean() for name in ("exact", "finite_difference")
    )
    torch.testing.assert_close(difference, exact, rtol=0.08, atol=0)


@pytest.mark.parametrize("r1", ["exact", "finite_difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_r1_keeps_its_digits_under_autocast_and_reaches_the_heads_alone(kind, r1):
    heads = seeded(lambda: Heads([8, 12], kind=kind, levels="middle"))
    features = [
        torch.randn(2, width, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        for width in (8, 12)
    ]
    plain = r1_penalty(heads, [level.float() for level in features], kind=r1, draw=drawn(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = r1_penalty(heads, features, kind=r1, draw=drawn(3))
    assert torch.equal(found, plain)
    assert found.dtype == torch.float32
    found.mean().backward()
    assert all(level.grad is None for level in features)
    assert any(weight.grad is not None and weight.grad.any() for weight in heads.parameters())


def test_r1_lowers_the_slope_that_heads_end_with():
    """A discriminator of two points grows steep without, and stays flat with the penalty."""
    slopes = {}
    for weight in (0.0, 1.0):
        slope = torch.tensor([0.1], requires_grad=True)
        optimizer = torch.optim.Adam([slope], 0.05)
        real, fake = [torch.full((2, 1, 1, 1), 0.5)], [torch.full((2, 1, 1, 1), -0.5)]
        heads = linear([slope])
        for _ in range(200):
            loss = discriminator_loss(heads(real), heads(fake), kind="softplus")
            loss = loss + weight * r1_penalty(heads, real, kind="exact", draw=drawn(0))
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        slopes[weight] = slope.item()
    # d/ds [2 softplus(-s/2) + s^2] = 0 at s = sigmoid(-s / 2) / 2
    assert slopes[1.0] == pytest.approx(0.2353, abs=1e-3)
    assert slopes[0.0] > 2
