"""Mean and covariance of the real side's features as others publish them, in the place of images.

`eval.real_stats` of a run names such a file, `--real-stats` of `evaluate` another one.

pytorch-fid and GAN Compression (`real_stat/edges2shoes-r_B.npz`) write the same file: a NumPy .npz with `mu` [D] and
`sigma` [D, D], the covariance divided by N - 1. How many images there were, and of what size, it does not say.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hpcdistill.errors import UserError
from hpcdistill.metrics.frechet import Moments
from hpcdistill.storage import sha256_file

_HEADER = 1 << 16  # bytes that an array's header has at most
_ASYMMETRY = 1e-6  # of the largest element: what sums in another order leave of a symmetric matrix
_NEGATIVE = 1e-6  # of the largest eigenvalue: what rounding leaves of one that is 0, float32 included


@dataclass(frozen=True)
class RealStatistics:
    """What a file says of the real side."""

    name: str  # of the file, as results name it
    digest: str  # sha256 of the file
    moments: Moments

    @property
    def described(self) -> str:
        """The file and what tells it from others of its name."""
        return f"{self.name}, sha256 {self.digest[:12]}"


def read_statistics(path: Path, dimensions: int, option: str = "--real-stats ") -> RealStatistics:
    """The statistics of `dimensions` features in the .npz file `path`; nothing is unpickled.

    `option` says in messages who named the file.
    UserError for a file that is missing or no such archive, of other dimensions, or whose sigma is no covariance.
    """
    called = f"{option}{path}"
    if not path.is_file():
        raise UserError(f"{called}: no such file; give the .npz file with mu and sigma of the real images")
    try:
        with zipfile.ZipFile(path) as archive:
            mean = _array(archive, called, "mu", (dimensions,))
            covariance = _array(archive, called, "sigma", (dimensions, dimensions))
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{called}: not a readable .npz file ({str(error)[:100]}); copy or fetch it again") from None
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{called}: has values that are no finite numbers; copy or fetch it again")
    return RealStatistics(path.name, sha256_file(path), Moments(torch.from_numpy(mean), _factor(called, covariance)))


def _array(archive: zipfile.ZipFile, called: str, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The array `name` as float64; UserError when there is none, or of another shape."""
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        held = ", ".join(sorted(entry.removesuffix(".npy") for entry in archive.namelist())[:6]) or "nothing"
        raise UserError(f"{called}: has no {name}, but {held}; statistics of FID have mu and sigma") from None
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, _, kind = read_header(file)
    if found != shape:
        wanted = "x".join(map(str, shape))
        raise UserError(
            f"{called}: {name} is {'x'.join(map(str, found))} instead of {wanted}; FID compares {shape[0]} "
            "features: give statistics of the same network"
        )
    if kind.kind not in "fiu" or member.file_size > np.prod(shape) * kind.itemsize + _HEADER:
        raise UserError(f"{called}: {name} holds {kind} values, no plain numbers; give a file that has them")
    with archive.open(member) as file:
        array: NDArray[np.float64] = np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
    return array


def _factor(called: str, covariance: NDArray[np.float64]) -> torch.Tensor:
    """F of the covariance F^T F."""
    matrix = torch.from_numpy(covariance)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    uneven = float((matrix - matrix.T).abs().max()) > _ASYMMETRY * float(matrix.abs().max())
    if uneven or float(values[0]) < -_NEGATIVE * float(values[-1].abs()):
        raise UserError(f"{called}: sigma is no covariance matrix; copy or fetch the file again")
    factor: torch.Tensor = values.clamp(min=0).sqrt()[:, None] * vectors.T
    return factor
