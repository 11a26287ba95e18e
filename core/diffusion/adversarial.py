r"""Adversarial terms on features of a diffusion network.

Heads D_k read features h_k of noised samples, from inside a network that the discriminator shares with the run. Each
level k has its own head and gives logits l_k (B, P_k) at P_k places; no feature is averaged before a head has read it,
so that the gradient says where a sample is wrong. With m(f) the mean of f(l_k) over places, then over levels,

    hinge       L_D = m(relu(1 - l_real)) + m(relu(1 + l_fake))        L_G = m(relu(1 - l_fake))
    softplus    L_D = m(softplus(-l_real)) + m(softplus(l_fake))       L_G = m(softplus(-l_fake))

so that a level with many places weighs as much as one with few. Two kinds of heads:

    places      1 x 1 convolutions with residuals, a logit at each place (PCM; as LADD, no place sees another)
    strided     4 x 4 convolutions of stride 2, 32 -> 16 -> 8 -> 4 -> 1, one logit for each window of the last (DMD2)

R1 keeps the logits from growing steep at real samples; it is taken at the heads' inputs, as ADD does:

    R1 = m(|| d l_place / d h ||^2)

exact, by differentiating twice, or as the finite difference m((l(h + s n) - l(h))^2) / s^2, n ~ N(0, 1), which is the
same on average as s -> 0 and needs no second derivative (APT; there the noise is added to the network's input).

References:
    Sauer et al., Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation, arXiv 2403.12015.
    Sauer et al., Adversarial Diffusion Distillation, arXiv 2311.17042.
    Yin et al., Improved Distribution Matching Distillation, arXiv 2405.14867.
    Wang et al., Phased Consistency Models, arXiv 2405.18407.
    Lin et al., Diffusion Adversarial Post-Training for One-Step Video Generation (APT), arXiv 2501.08316.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

AdversarialLoss = Literal["hinge", "softplus"]
HeadKind = Annotated[
    Literal["places", "strided"],
    Field(
        description="Kind of the heads. places: 1 x 1 convolutions, a logit at each place of the features; strided: "
        "4 x 4 ones with stride 2, one logit for features of 32 x 32."
    ),
]
"""The setting `heads` of methods with an adversarial term."""
HeadLevels = Annotated[
    Literal["all", "middle"],
    Field(
        description="Features that the heads read: all levels of the network's first half, or its middle (the last "
        "level) alone."
    ),
]
"""Their setting `head_levels`."""
R1Kind = Annotated[
    Literal["exact", "finite_difference"],
    Field(
        description="How the R1 penalty is computed: exact differentiates twice; finite_difference compares the logits "
        "with those of features with a little noise."
    ),
]
"""Their setting `r1`."""
R1Weight = Annotated[
    float, Field(ge=0, le=1e6, description="Weight of the R1 penalty in the heads' loss; 0: none, and no cost.")
]
"""Their setting `r1_weight`."""

ReadsFeatures = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Draw = Callable[[str, Sequence[int]], Tensor]
GROUPS, CHANNELS_PER_GROUP = 32, 8
"""Most groups of a normalisation, as the authors have them, and least channels of one: where few numbers are normalised
together, small differences among them are blown up."""
WINDOW = 4
"""Edge of the strided heads' kernels, and of the windows of their last features that give a logit each."""
WIDTH = 1280
"""Most channels of a strided head, those of the authors at SDXL's middle: 105 million weights, 1.7 GB with AdamW."""
NUM_HALVINGS = 3
"""Convolutions of stride 2 in a strided head: 32 -> 16 -> 8 -> 4, the middle of SDXL at 1024 px."""
R1_STEP = 0.01
"""Noise of the finite difference, relative to the size of a sample's features."""


class Heads(nn.Module):
    """A small convolutional head for each level of features that is read.

    Args:
        channels: C_k of each level, which is also the head's width.
        kind: ``places`` or ``strided``.
        levels: ``all``, or ``middle`` for the last level alone.
    """

    def __init__(self, channels: Sequence[int], *, kind: HeadKind, levels: HeadLevels = "all") -> None:
        super().__init__()
        self._first = len(channels) - 1 if levels == "middle" else 0
        head = {"places": PlacesHead, "strided": StridedHead}[kind]
        self.levels = nn.ModuleList(head(width) for width in channels[self._first :])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits (B, P_k), in at least fp32, of each level that is read.

        Args:
            features: All levels, each of shape (B, C_k, h_k, w_k), in any type.
        """
        read = features[self._first :]
        return [_logits(head, level) for head, level in zip(self.levels, read, strict=True)]


def _logits(head: nn.Module, level: Tensor) -> Tensor:
    """Return the logits (B, P) of one level, computed in at least fp32: heads cost little, and R1 needs the digits."""
    weights = dict(head.named_parameters())
    wide = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
    # on CPUs GroupNorm's backward crashes for channels-last inputs that ask for no gradient (PyTorch 2.13);
    # contiguous() leaves the strides of a 1 x 1 level as they are
    plain = level.to(wide).clone(memory_format=torch.contiguous_format)
    with torch.autocast(level.device.type, enabled=False):
        found = functional_call(head, {name: weight.to(wide) for name, weight in weights.items()}, (plain,))
    return found.flatten(1)


def _normalisation(channels: int) -> nn.GroupNorm:
    fitting = [
        groups
        for groups in range(1, GROUPS + 1)
        if channels % groups == 0 and channels // groups >= min(CHANNELS_PER_GROUP, channels)
    ]
    return nn.GroupNorm(fitting[-1], channels)


class PlacesHead(nn.Module):
    """Two residual layers and a logit at each place, all of 1 x 1 convolutions.

    Args:
        channels: C of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 1), _normalisation(channels), nn.LeakyReLU()) for _ in range(2)
        )
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, level: Tensor) -> Tensor:
        """Return logits (B, 1, h, w) of features (B, C, h, w)."""
        for layer in self.layers:
            level = level + layer(level)
        return self.out(level)


class StridedHead(nn.Module):
    """Three halvings, then a logit for each 4 x 4 window: one for features of 32 x 32 and less.

    Args:
        channels: C of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = min(channels, WIDTH)
        inputs = [channels, *[width] * (NUM_HALVINGS - 1)]
        self.halvings = nn.ModuleList(_strided_layer(each, width, stride=2) for each in inputs)
        self.window = _strided_layer(width, width, stride=1)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, level: Tensor) -> Tensor:
        """Return logits (B, 1, h', w') of features (B, C, h, w) of any size, h' = max(ceil(h / 8) - 3, 1)."""
        for halving in self.halvings:
            height, width = level.shape[-2:]
            level = halving(nn.functional.pad(level, (1, 1 + width % 2, 1, 1 + height % 2)))  # rounds up
        height, width = level.shape[-2:]
        level = nn.functional.pad(level, (0, max(WINDOW - width, 0), 0, max(WINDOW - height, 0)))
        return self.out(self.window(level))


def _strided_layer(channels: int, width: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, WINDOW, stride=stride), _normalisation(width), nn.SiLU())


def level_mean(values: Iterable[Tensor]) -> Tensor:
    """Return the mean over places, then over levels, shape (B,).

    Args:
        values: One number for each place of each level, each of shape (B, P_k).
    """
    return torch.stack([level.mean(1) for level in values]).mean(0)


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor], *, kind: AdversarialLoss) -> Tensor:
    """Return the loss L_D of the heads, shape (B,); see the module's equations.

    Args:
        real: Logits of real samples, (B, P_k) of each level.
        fake: Logits of generated samples, (B, P_k) of each level.
        kind: ``hinge`` or ``softplus``.
    """
    return generator_loss(real, kind=kind) + generator_loss([-logits for logits in fake], kind=kind)


def generator_loss(fake: Sequence[Tensor], *, kind: AdversarialLoss) -> Tensor:
    """Return the student's loss L_G, shape (B,), from logits of its samples `fake`, (B, P_k) of each level."""
    if kind == "hinge":
        return level_mean((1 - logits).relu() for logits in fake)
    return level_mean(nn.functional.softplus(-logits) for logits in fake)


def r1_penalty(heads: ReadsFeatures, features: Sequence[Tensor], *, kind: R1Kind, draw: Draw) -> Tensor:
    """Return R1 at real samples, shape (B,); its gradient reaches the heads' weights alone.

    Args:
        heads: Takes features and gives the logits (B, P_k) of each level that it reads, the last ones of them.
        features: Features of real samples, each (B, C_k, h_k, w_k).
        kind: ``exact`` or ``finite_difference``.
        draw: Takes a name and the shape of one sample, and gives normal numbers for the batch, (B, ...).
    """
    wide = [level.detach().to(torch.promote_types(level.dtype, torch.float32)) for level in features]
    return (_exact_r1 if kind == "exact" else _finite_difference_r1)(heads, wide, draw)


def _exact_r1(heads: ReadsFeatures, features: Sequence[Tensor], draw: Draw) -> Tensor:
    """Return R1 (B,) by differentiating twice.

    The gradient of sum_p s_p l_p with random signs s has the squared length sum_p |dl_p/dh|^2 on average: the places
    need no pass each, and a sum without signs would cancel where a normalisation ties the places to each other.
    """
    varied = [level.requires_grad_() for level in features]
    logits = heads(varied)
    read = varied[-len(logits) :]
    signs = [draw(f"r1/signs/{k}", level.shape[1:]).sign().to(level) for k, level in enumerate(logits)]
    total = torch.stack([(sign * level).sum() for sign, level in zip(signs, logits, strict=True)]).sum()
    slopes = torch.autograd.grad(total, read, create_graph=True)
    lengths = [slope.square().flatten(1).sum(1, keepdim=True) for slope in slopes]
    return level_mean(length / level.shape[1] for length, level in zip(lengths, logits, strict=True))


def _finite_difference_r1(heads: ReadsFeatures, features: Sequence[Tensor], draw: Draw) -> Tensor:
    """Return R1 (B,) from the logits with and without a little noise on the features."""
    before = heads(features)
    unread, read = features[: -len(before)], features[-len(before) :]
    sizes = [R1_STEP * level.square().flatten(1).mean(1, keepdim=True).sqrt().clamp(min=1e-8) for level in read]
    noise = [draw(f"r1/noise/{k}", level.shape[1:]).to(level) for k, level in enumerate(read)]
    moved = [h + size[..., None, None] * n for h, size, n in zip(read, sizes, noise, strict=True)]
    after = heads([*unread, *moved])
    return level_mean(((a - b) / size).square() for a, b, size in zip(after, before, sizes, strict=True))
