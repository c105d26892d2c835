"""Distances between two sets of features: Frechet's (FID, Heusel et al. 2017) and the kernel one (KID, 2018).

The Frechet distance of two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), needs no square root of a matrix:
with factors C = F^T F the trace of the root is the sum of the singular values of F1 F2^T. So it is exact for fewer
images than features too, where `scipy.linalg.sqrtm` of the singular product is not. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcdistill.training.evaluation import never, until_stopped


@dataclass(frozen=True)
class Moments:
    """A set's mean [D] and a factor F [R, D] of its covariance F^T F, R <= D; float64."""

    mean: Tensor
    factor: Tensor


def moments(features: Tensor) -> Moments:
    """The moments of `features` [N, D], N >= 2; the covariance is the unbiased one (divided by N - 1)."""
    assert features.ndim == 2
    assert features.shape[0] >= 2
    features = features.double()
    mean = features.mean(dim=0)
    factor = (features - mean) / (features.shape[0] - 1) ** 0.5
    if factor.shape[0] > factor.shape[1]:
        # The triangle of a QR decomposition is a factor of the same covariance, with D rows instead of N.
        factor = torch.linalg.qr(factor, mode="r").R
    return Moments(mean, factor)


def frechet(one: Moments, other: Moments) -> float:
    """The squared Frechet distance of two Gaussians, which is what FID prints."""
    roots = torch.linalg.svdvals(one.factor @ other.factor.T).sum()
    variances = one.factor.square().sum() + other.factor.square().sum()
    return float((one.mean - other.mean).square().sum() + variances - 2 * roots)


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets, and their standard deviation (0 for one subset)."""

    mean: float
    deviation: float


def kid(
    features_a: Tensor,
    features_b: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    stop: Callable[[], bool] = never,
) -> KernelDistance:
    """The squared maximum mean discrepancy of [N, D] and [M, D] under the kernel (x.y / D + 1)^3, unbiased (KID).

    The mean over `subsets` pairs of random subsets of `subset_size` features (at most N and M), drawn from `seed`
    without replacement, as it is usual to report it; it can be below zero. On a CPU that takes a minute:
    EvaluationStopped when `stop()` says so between two subsets.
    """
    assert min(features_a.shape[0], features_b.shape[0]) >= 2
    size = min(subset_size, features_a.shape[0], features_b.shape[0])
    random = torch.Generator().manual_seed(seed)
    values = []
    for _ in until_stopped(range(subsets), stop):
        one, other = (
            features[torch.randperm(features.shape[0], generator=random)[:size].to(features.device)].double()
            for features in (features_a, features_b)
        )
        values.append(_discrepancy(one, other))
    found = torch.stack(values)
    return KernelDistance(float(found.mean()), float(found.std(unbiased=False)))


def _discrepancy(one: Tensor, other: Tensor) -> Tensor:
    """The unbiased estimate from two sets of the same size [S, D]: pairs of one feature with itself are left out."""
    size, dimensions = one.shape
    within = one.new_zeros(())
    for features in (one, other):
        kernel = _kernel(features @ features.T, dimensions)
        within = within + (kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1))
    return within - 2 * _kernel(one @ other.T, dimensions).mean()


def _kernel(products: Tensor, dimensions: int) -> Tensor:
    return (products / dimensions + 1) ** 3
