"""Published weights of the networks that metrics and perceptual losses use, found offline once they were fetched."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hpcdistill.data.fetch.digests import file_digest
from hpcdistill.data.fetch.download import Download, fetch_file
from hpcdistill.data.places import weights_folder
from hpcdistill.errors import UserError, nearest
from hpcdistill.models.weights_file import PYTORCH, kind_of
from hpcdistill.storage import replacing, user_path


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
    there = [folder / download.file for folder in (weights_folder(), _hub_folder())]
    there = [path for path in there if path.is_file()]
    for path in there:
        if _is_whole(download, path):
            return path
    if there:
        kind = kind_of(there[0])
        found = f" (it is {kind})" if kind not in (None, PYTORCH) else ""
        raise UserError(
            f"{there[0]}: damaged{found}, its sha256 does not begin with {download.sha256_prefix}; remove it and run "
            f"`hpcdistill prefetch --weights {name}` where there is a network"
        )
    raise UserError(
        f"{weights_folder() / download.file}: not here ({WEIGHTS[name].title}); run `hpcdistill prefetch "
        f"--weights {name}` where there is a network (a login node), with the same HPCDISTILL_DATA"
    )


def fetch_weights(name: str, mirror: str | None = None) -> Path:
    """The file in `places.weights_folder()`, copied from torch.hub's cache or fetched from where it was published.

    UserError when it cannot be had.
    """
    download, folder = _known(name).download, weights_folder()
    path, in_hub = folder / download.file, _hub_folder() / download.file
    if not path.exists() and in_hub.is_file() and _is_whole(download, in_hub):
        folder.mkdir(parents=True, exist_ok=True)  # one folder has it all: a node may not see this user's home
        with replacing(path) as temporary:
            shutil.copyfile(in_hub, temporary)
    return fetch_file(download, folder, mirror=mirror)


def _is_whole(download: Download, path: Path) -> bool:
    assert download.sha256_prefix
    return file_digest(path, keep=False).startswith(download.sha256_prefix)


def _known(name: str) -> Weights:
    if name not in WEIGHTS:
        raise UserError(f"no published weights are called '{name}'; {nearest(name, WEIGHTS)}")
    return WEIGHTS[name]


def _hub_folder() -> Path:
    """torch.hub's own rule, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{cache}/torch"
    return user_path(home, "the folder of torch.hub") / "hub" / "checkpoints"
