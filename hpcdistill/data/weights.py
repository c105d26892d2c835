"""Published weights of the networks that metrics and perceptual losses use, found offline once they were fetched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hpcdistill.data.download import Download, fetch_file
from hpcdistill.data.places import weights_folder
from hpcdistill.errors import UserError, nearest
from hpcdistill.storage import sha256_file


@dataclass(frozen=True)
class Weights:
    """One published file."""

    title: str
    download: Download


def _of(title: str, address: str) -> Weights:
    """The file's name ends in the first 8 hex digits of its sha256, torch.hub's habit."""
    file = address.rpartition("/")[2]
    prefix = file.removesuffix(".pth").rpartition("-")[2]
    return Weights(title, Download(file=file, addresses=(address,), sha256_prefix=prefix))


WEIGHTS: dict[str, Weights] = {
    "inception": _of(
        "Inception v3 of FID, converted from TensorFlow (pytorch-fid)",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
    "vgg16": _of("VGG16, ImageNet (torchvision)", "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "alexnet": _of(
        "AlexNet, ImageNet, the trunk of LPIPS (torchvision)",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ),
}


def find_weights(name: str) -> Path:
    """The file of the weights `name`, checked; UserError that says how to get it when it is not on this machine.

    Looked for in `places.weights_folder()`, then where torch.hub keeps what it has downloaded.
    """
    download = _known(name).download
    for folder in (weights_folder(), _hub_folder()):
        path = folder / download.file
        if path.is_file():
            assert download.sha256_prefix
            if not sha256_file(path).startswith(download.sha256_prefix):
                raise UserError(
                    f"{path}: damaged, its sha256 does not begin with {download.sha256_prefix}; remove it and run "
                    f"`python -m hpcdistill.prefetch --weights {name}` where there is a network"
                )
            return path
    raise UserError(
        f"{weights_folder() / download.file}: not here ({WEIGHTS[name].title}); run `python -m hpcdistill.prefetch "
        f"--weights {name}` where there is a network (a login node), with the same HPCDISTILL_DATA"
    )


def fetch_weights(name: str, mirror: str | None = None) -> Path:
    """`find_weights`, or the file fetched from where it was published; UserError when it cannot be had."""
    download = _known(name).download
    in_hub = _hub_folder() / download.file
    return in_hub if in_hub.is_file() else fetch_file(download, weights_folder(), mirror=mirror)


def _known(name: str) -> Weights:
    if name not in WEIGHTS:
        raise UserError(f"no published weights are called '{name}'; {nearest(name, WEIGHTS)}")
    return WEIGHTS[name]


def _hub_folder() -> Path:
    """torch.hub's own rule, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"
