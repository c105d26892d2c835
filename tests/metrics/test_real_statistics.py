"""Statistics of real images from a file, as FID's codes write them: the distance they give, and files that are none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hpcdistill.errors import UserError
from hpcdistill.metrics import torchvision_operators
from hpcdistill.metrics.frechet import frechet, moments
from hpcdistill.metrics.real_statistics import read_statistics

D = 24


def sample(rows: int, seed: int) -> NDArray[np.float64]:
    """[rows, D], variances over three orders of magnitude."""
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, D)) @ (random.normal(size=(D, D)) * np.logspace(0, -1.5, D)[:, None])


def statistics(features: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {"mu": np.mean(features, axis=0), "sigma": np.cov(features, rowvar=False)}


def write(path: Path, arrays: Mapping[str, Any], save: Any = np.savez) -> Path:
    save(path, **arrays)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_equals_pytorch_fid_with_the_same_file(tmp_path: Path, save: Any) -> None:
    torchvision_operators.ready()
    from pytorch_fid.fid_score import calculate_frechet_distance

    real, made = sample(300, 1), sample(90, 2)
    path = write(tmp_path / "set_B.npz", statistics(real), save)
    with np.load(path) as held:
        mine = statistics(made)
        expected = calculate_frechet_distance(mine["mu"], mine["sigma"], held["mu"], held["sigma"])
    found = read_statistics(path, D)
    assert frechet(moments(torch.from_numpy(made)), found.moments) == pytest.approx(float(expected), rel=1e-9)
    assert found.described == f"set_B.npz, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def test_fewer_images_than_features_have_a_singular_covariance(tmp_path: Path) -> None:
    """Against the images themselves: `moments` takes no root of a matrix."""
    real, made = (torch.from_numpy(sample(n, seed)) for n, seed in ((9, 1), (14, 2)))
    found = read_statistics(write(tmp_path / "few.npz", statistics(real.numpy())), D)
    assert frechet(moments(made), found.moments) == pytest.approx(frechet(moments(made), moments(real)), rel=1e-6)


GOOD = statistics(sample(50, 3))
SKEW = GOOD["sigma"] + np.triu(np.ones((D, D)), 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": GOOD["mu"]}, "has no sigma, but mu; statistics of FID have mu and sigma"),
        ({"m": GOOD["mu"], "s": GOOD["sigma"]}, "has no mu, but m, s"),
        ({**GOOD, "mu": np.ones(2048)}, f"mu is 2048 instead of {D}; FID compares {D} features: .* same network"),
        ({**GOOD, "sigma": GOOD["mu"]}, f"sigma is {D} instead of {D}x{D}"),
        ({**GOOD, "mu": GOOD["mu"] * np.nan}, "has values that are no finite numbers"),
        ({**GOOD, "sigma": SKEW}, "sigma is no covariance matrix"),
        ({**GOOD, "sigma": -GOOD["sigma"]}, "sigma is no covariance matrix"),
        ({**GOOD, "mu": np.array([print] * D, dtype=object)}, "mu holds object values, no plain numbers"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_statistics(write(tmp_path / "file.npz", arrays), D)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--real-stats .*file\.npz: not a readable \.npz file"):
        read_statistics(path, D)
    with pytest.raises(UserError, match=r"absent\.npz: no such file"):
        read_statistics(tmp_path / "absent.npz", D)


def test_a_file_with_any_byte_changed_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "file.npz", GOOD)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_statistics(path, D)
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 20
