"""Distances between two sets of feature vectors, in float64. Scores name their features: none of these is "FID"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Return the squared Fréchet (2-Wasserstein) distance between Gaussians fitted to two sets of features.

    .. math:: |m_a - m_b|^2 + \mathrm{tr}(C_a) + \mathrm{tr}(C_b) - 2 \, \mathrm{tr} (C_a^{1/2} C_b C_a^{1/2})^{1/2}

    The product under the root is symmetric, so that its eigenvalues are real and need no general matrix root. With
    fewer vectors than features the last trace is taken as the nuclear norm of A B^T, of the centred sets over the roots
    of N - 1 and M - 1: the same, of a smaller matrix.

    Args:
        a: Shape (N, F), N >= 2.
        b: Shape (M, F), M >= 2.

    References:
        Dowson and Landau, The Fréchet distance between multivariate normal distributions, 1982.
    """
    a, b = a.double(), b.double()
    mean_term = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    if min(len(a), len(b)) <= a.shape[1]:
        a, b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (a, b))
        return float(mean_term + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())
    covariance_a, covariance_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ covariance_b @ root_a
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float(mean_term + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    r"""Return the unbiased squared maximum mean discrepancy with the cubic kernel :math:`k(x, y) = (x \cdot y / s +
    1)^3`.

    It has no bias at few samples (and may so be slightly negative), where a Fréchet distance has much. Features are
    centred on the mean of `b`, and s is the mean squared norm of `b` around it: the unit is that of the reference.

    Args:
        a: Shape (N, F), N >= 2.
        b: The reference, shape (M, F), M >= 2.

    References:
        Bińkowski et al., Demystifying MMD GANs (the kernel inception distance), arXiv 1801.01401.
    """
    a, b = a.double(), b.double()
    centre = b.mean(dim=0)
    a, b = a - centre, b - centre
    return _cubic_discrepancy(a, b, float(b.square().sum(dim=1).mean().clamp(min=1e-12)))


def polynomial_distance(a: Tensor, b: Tensor) -> float:
    r"""Return the same with uncentred features and s = F: in features of the Inception network, the kernel inception
    distance (KID).

    Args:
        a: Shape (N, F), N >= 2.
        b: Shape (M, F), M >= 2.

    References:
        Bińkowski et al., Demystifying MMD GANs, arXiv 1801.01401.
    """
    return _cubic_discrepancy(a.double(), b.double(), float(a.shape[1]))


def _cubic_discrepancy(a: Tensor, b: Tensor, scale: float) -> float:
    within_a, within_b, across = ((x @ y.T / scale + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    return float(_off_diagonal_mean(within_a) + _off_diagonal_mean(within_b) - 2 * across.mean())


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    count = len(kernel)
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))


def relative_spread(features: Tensor, groups: Sequence[object], reference: Tensor) -> float | None:
    """Measure how different the images of one prompt are: their mean distance, relative to that of two real images.

    Args:
        features: Shape (N, F).
        groups: N prompts; only pairs of one prompt count.
        reference: Features of real images, shape (M, F), M >= 2.

    Returns:
        0 where all images of a prompt are one, 1 where they differ like real images of different prompts; None
        where no prompt has two images.
    """
    numbers = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    labels = torch.tensor([numbers[group] for group in groups])
    same = (labels[:, None] == labels[None, :]).triu(diagonal=1)
    if not same.any():
        return None
    within = torch.cdist(features.double(), features.double())[same].mean()
    return float(within / torch.pdist(reference.double()).mean().clamp(min=1e-12))


def root_mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of each image of `a` to that of `b`, (N, ...) -> (N,), in the units of the values."""
    return (a.double() - b.double()).flatten(1).square().mean(dim=1).sqrt()
