"""The real images that a translation's outputs are compared with as a set, and their features, computed once.

Features are kept in `<data root>/features`, named by all they depend on: what the packed sets hold, which of their
domains, the size, the network and its weights. Any run, and any machine that sees the folder, uses them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hpcdistill.console import warn
from hpcdistill.data.index import Index, Kind, index_digest, load_index
from hpcdistill.data.places import data_root
from hpcdistill.data.read.domains import DomainImages
from hpcdistill.errors import UserError
from hpcdistill.metrics.feature_networks import FeatureNetwork
from hpcdistill.storage import write_bytes
from hpcdistill.training.evaluation import never, until_stopped

_FORMAT = 1  # raise it when features are computed differently


def load_translation_index(folder: Path, kind: Kind | None, name: str) -> Index:
    """The index of a packed set of images to translate; UserError, by its `name`, when it is of another kind."""
    index = load_index(folder)
    if index.kind == "lr-hr" or kind not in (None, index.kind):
        raise UserError(f"{name}: {folder} holds {index.kind} samples, not {kind or 'paired or unpaired'} ones")
    return index


class RealFeatures:
    """The features of one domain of some packed sets, joined."""

    def __init__(
        self, folders: Sequence[Path], kind: Kind, direction: str, domain: int, size: int, network: FeatureNetwork
    ) -> None:
        """`domain` as in `DomainImages.domains`. UserError for sets of another kind, or whose shards are missing."""
        self.folders = list(folders)
        indices = [load_translation_index(folder, kind, "eval.real") for folder in folders]
        self.images = DomainImages(self.folders, indices, kind, direction, size)
        self.domain = domain
        self.network = network
        depends = {
            "format": _FORMAT,
            "sets": [index_digest(folder) for folder in folders],
            "domain": self.images.domains[domain].role,
            "size": size,
            "resampling": "Pillow bicubic",
            "network": network.frechet_name,
            "weights": network.digest,
        }
        name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
        self.file = data_root() / "features" / f"{name}.safetensors"

    def __len__(self) -> int:
        return len(self.images.domains[self.domain])

    def image(self, number: int) -> Tensor:
        """Image `number`, uint8 [3, size, size]."""
        return torch.from_numpy(self.images.load(self.domain, number).transpose(2, 0, 1).copy())

    def kept(self) -> Tensor | None:
        """The features that were computed before, [N, D] on the CPU; None where there are none that can be read."""
        try:
            features = load_file(self.file)["features"]
        except (OSError, SafetensorError, KeyError):
            return None
        fits = features.shape == (len(self), self.network.dimensions) and features.dtype == torch.float32
        return features if fits else None

    def keep(self, features: Tensor) -> None:
        """Write them for the next run; where the folder cannot be written, they are computed again."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.file, save({"features": features.cpu().contiguous()}))
        except OSError as error:
            warn(f"{self.file.parent}: features of the real images cannot be kept there ({error.strerror})")

    def compute(
        self,
        numbers: Sequence[int],
        batch: int,
        device: torch.device,
        done: Callable[[int], None],
        stop: Callable[[], bool] = never,
    ) -> Tensor:
        """The features [n, D], on `device`, of the images `numbers`; `done` hears how many more are ready.

        EvaluationStopped when `stop()` says so between two batches.
        """
        found = [torch.empty(0, self.network.dimensions, device=device)]
        for start in until_stopped(range(0, len(numbers), batch), stop):
            images = torch.stack([self.image(number) for number in numbers[start : start + batch]])
            found.append(self.network(images.to(device)))
            done(len(images))
        return torch.cat(found)
