"""Frechet and kernel distances against scipy's matrix root, 50-digit arithmetic, closed forms and plain loops."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg

from hpcdistill.metrics.frechet import frechet, kid, moments


def features(rows: int, columns: int, seed: int, rank: int | None = None) -> NDArray[np.float64]:
    """[rows, columns] around a mean of its own, with variances over three orders of magnitude."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(rank or columns, columns)) * np.logspace(0, -1.5, rank or columns)[:, None]
    return random.normal(size=(rows, rank or columns)) @ mixing + random.normal(size=columns)


def distance(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    return frechet(moments(torch.from_numpy(one)), moments(torch.from_numpy(other)))


def published(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """As pytorch-fid computes it."""
    from hpcdistill.metrics import torchvision_operators

    torchvision_operators.ready()
    from pytorch_fid.fid_score import calculate_frechet_distance

    statistics = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (one, other)]
    return float(calculate_frechet_distance(*statistics[0], *statistics[1]))


@pytest.mark.parametrize(("n", "m"), [(200, 300), (65, 64 * 40), (400, 66)])
def test_equals_pytorch_fid_where_its_root_converges(n: int, m: int) -> None:
    one, other = features(n, 64, 1), features(m, 64, 2)
    assert distance(one, other) == pytest.approx(published(one, other), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "rank"), [(5, 6, None), (5, 40, None), (40, 5, None), (40, 50, 4), (5, 50, 3)])
def test_singular_covariances_against_50_digits(n: int, m: int, rank: int | None) -> None:
    """Fewer images than features, or features in a plane: the eigenvalues of C1 C2 in 50 digits."""
    one, other = features(n, 8, 3, rank), features(m, 8, 4, rank)
    with mpmath.workdps(50):
        means, covariances = [], []
        for x in (one, other):
            rows = mpmath.matrix(x.tolist())
            mean = [mpmath.fsum(rows[i, j] for i in range(rows.rows)) / rows.rows for j in range(8)]
            centred = mpmath.matrix(rows.rows, 8)
            for i in range(rows.rows):
                for j in range(8):
                    centred[i, j] = rows[i, j] - mean[j]
            means.append(mean)
            covariances.append(centred.T * centred / (rows.rows - 1))
        values = mpmath.eig(covariances[0] * covariances[1], left=False, right=False)
        root = mpmath.fsum(mpmath.sqrt(max(mpmath.re(value), 0)) for value in values)
        shift = mpmath.fsum((a - b) ** 2 for a, b in zip(*means, strict=True))
        trace = mpmath.fsum(covariance[j, j] for covariance in covariances for j in range(8))
        expected = float(shift + trace - 2 * root)
    assert distance(one, other) == pytest.approx(expected, rel=1e-9)


def test_closed_forms() -> None:
    one = features(30, 7, 5)
    assert distance(one, one) == pytest.approx(0, abs=1e-10)
    assert distance(one, one + 0.5) == pytest.approx(7 * 0.25)  # only the mean differs
    mean = one.mean(axis=0)
    spread = np.trace(np.cov(one, rowvar=False))
    assert distance(one, mean + 3 * (one - mean)) == pytest.approx(4 * spread)  # deviations s and 3 s


def test_float32_features_are_compared_in_float64() -> None:
    one, other = (features(40, 12, seed).astype(np.float32) + 100 for seed in (8, 9))
    difference = one.astype(np.float64).mean(axis=0) - other.astype(np.float64).mean(axis=0)
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (one, other)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert distance(one, other) == pytest.approx(expected, rel=1e-9)


def naive_discrepancy(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return (math.fsum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    n, m = len(one), len(other)
    within = math.fsum(kernel(one[i], one[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += math.fsum(kernel(other[i], other[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * math.fsum(kernel(x, y) for x in one for y in other) / (n * m)


def test_kid_of_whole_sets_equals_plain_loops() -> None:
    one, other = features(9, 6, 10), features(9, 6, 11)
    found = kid(torch.from_numpy(one), torch.from_numpy(other), subsets=4)
    assert found.mean == pytest.approx(naive_discrepancy(one, other), rel=1e-12)
    assert found.deviation == pytest.approx(0, abs=1e-12 * abs(found.mean))  # each subset is the whole set


def test_kid_of_subsets() -> None:
    """The mean over many subsets is that of the whole sets, of any sizes; each subset is one of the sets' own."""
    one, other = features(12, 5, 12), features(7, 5, 13)
    pair = torch.from_numpy(one), torch.from_numpy(other)
    expected = naive_discrepancy(one, other)
    found = kid(*pair, subsets=3000, subset_size=5)
    assert found.deviation > 0
    assert found.mean == pytest.approx(expected, abs=4 * found.deviation / math.sqrt(3000))
    assert kid(*pair, subsets=5, subset_size=5) == kid(*pair, subsets=5, subset_size=5)
    assert kid(*pair, subsets=5, subset_size=5, seed=1) != kid(*pair, subsets=5, subset_size=5)
