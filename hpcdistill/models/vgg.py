"""VGG16's convolutions (Simonyan and Zisserman, ICLR 2015), frozen: the feature maps of the perceptual losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.data.fetch.weights import find_weights
from hpcdistill.errors import UserError
from hpcdistill.models import PERCEPTUAL
from hpcdistill.models.weights_file import PYTORCH, is_safetensors, kind_of
from hpcdistill.ops import cpu_forms
from hpcdistill.ops.repeatable import largest_of_four, reflection_pad
from hpcdistill.storage import sha256_file, user_path

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions; pooling after each
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]

_STLPIPS_FILE = "weights/vST0.0/vgg_shift_tolerant.pth"
_STLPIPS_SHA256 = "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"
_PLAIN, _SHIFT_TOLERANT = "torchvision", "stlpips"


def _numbered() -> dict[str, int]:
    """Layer -> its number in torchvision's `features`: convolution, ReLU, ..., pooling, one after the other."""
    numbers, number = {}, 0
    for block, (_, convolutions) in enumerate(_BLOCKS, 1):
        for convolution in range(1, convolutions + 1):
            numbers[f"relu{block}_{convolution}"] = number + 1
            number += 2
        number += 1
    return numbers


LAYERS: Final[Mapping[str, int]] = _numbered()


class BlurPool(nn.Module):
    """Halves a map without aliasing (Zhang, ICML 2019): maximum over 2x2 at stride 1, binomial blur at stride 2.

    `[B, C, H, W]` -> `[B, C, H // 2 + 1, W // 2 + 1]`: shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022) pads by 2
    pixels, mirrored.
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        binomial = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(binomial, binomial)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The smaller map."""
        largest = reflection_pad(largest_of_four(x), 2, 2, 2, 2)
        channels = x.shape[1]
        kernel = self.kernel.to(largest.dtype).expand(channels, 1, 3, 3)
        return functional.conv2d(largest, kernel, stride=2, groups=channels)


class VGG16Features(nn.Module):
    """RGB images `[B, 3, H, W]` in [-1, 1] -> {layer: map after its ReLU}; nothing behind the last layer is computed.

    `layers` are relu1_1 ... relu5_3, `LAYERS`; relu<b>_<c> has 64, 128, 256, 512, 512 channels for b = 1 ... 5 and is
    2^(b-1) times smaller than the image. The network sees [0, 1] (DCD's way), with `normalise` ImageNet's mean and
    deviation taken out. Frozen and in eval mode for good; gradients flow to the images. `shift_tolerant` replaces the
    pooling by `BlurPool`, which the weights of stlpips were trained with. UserError for an unknown layer.
    """

    origin: str = "random weights"  # which weights these are, for logs and results
    mean: Tensor
    deviation: Tensor

    def __init__(
        self, layers: Iterable[str] = PERCEPTUAL, normalise: bool = False, shift_tolerant: bool = False
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        for layer in self.layers:
            if layer not in LAYERS:
                raise UserError(f"VGG16 has no layer '{layer}'; valid: {', '.join(LAYERS)}")
        if not self.layers:
            raise UserError(f"VGG16: no layer is named; give one or more of {', '.join(LAYERS)}")
        self.normalise = normalise
        self.shift_tolerant = shift_tolerant
        self._wanted = {LAYERS[layer]: layer for layer in self.layers}
        stack: list[nn.Module] = []
        channels_in = 3
        for channels, convolutions in _BLOCKS:
            for _ in range(convolutions):
                # ReLU in place: a convolution's own output is needed by nobody.
                stack += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU(inplace=True)]
                channels_in = channels
            stack.append(BlurPool() if shift_tolerant else nn.MaxPool2d(2))
        self.features = nn.Sequential(*stack[: max(self._wanted) + 1])
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever `mode` is."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps, in the order in which they are computed."""
        x = (images + 1) / 2
        if self.normalise:
            x = (x - self.mean) / self.deviation
        x = cpu_forms.channels_last(x)
        if not x.is_contiguous() and next(self.features.parameters()).is_contiguous():
            with torch.inference_mode(False):  # once; weights moved in an evaluation could not be used in training
                self.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        maps = {}
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self._wanted:
                maps[self._wanted[number]] = x
        return maps


def load_vgg16(
    source: str | Path = "torchvision", layers: Iterable[str] = PERCEPTUAL, normalise: bool = False
) -> VGG16Features:
    """VGG16 with published weights, `.origin` saying which.

    `source` is "torchvision" (the original ImageNet weights, found by `find_weights`), "stlpips" (the
    shift-tolerant trunk inside the installed package stlpips-pytorch, fine-tuned for another pooling: other maps,
    another loss), or a .pth or .safetensors file with the keys of either. UserError when the file is missing, damaged
    or holds another network.
    """
    if source == _PLAIN:
        path = find_weights("vgg16")
        origin = f"torchvision {path.stem}"
    elif source == _SHIFT_TOLERANT:
        path = _stlpips_file()
        origin = "stlpips-pytorch trunk"
    else:
        path = user_path(source, "VGG16's weights")
        if not path.is_file():
            raise UserError(f"{path}: no such file; VGG16's weights are '{_PLAIN}', '{_SHIFT_TOLERANT}' or a file")
        origin = f"{path.name} (sha256 {sha256_file(path)[:8]})"
    weights, shift_tolerant = _weights(path)
    network = VGG16Features(layers, normalise, shift_tolerant)
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    network.origin = origin
    return network


def _stlpips_file() -> Path:
    # Only found, not imported: the package's modules want torchvision and more.
    spec = importlib.util.find_spec("stlpips_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package stlpips-pytorch is not installed; `pip install stlpips-pytorch`, or take another VGG"
        )
    path = Path(spec.submodule_search_locations[0]) / _STLPIPS_FILE
    if not path.is_file() or sha256_file(path) != _STLPIPS_SHA256:
        raise UserError(f"{path}: missing or not the file of stlpips-pytorch 0.0.2; install that version again")
    return path


def _weights(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The 26 tensors under torchvision's names, and whether they are of the shift-tolerant form."""
    content = _read(path)
    shift_tolerant = any(str(name).startswith("net.slice") for name in content)
    shapes = VGG16Features(("relu5_3",)).state_dict()
    names = _stlpips_names() if shift_tolerant else {name: name for name in shapes}
    weights = {}
    for name, tensor in shapes.items():
        its = content.get(names[name])
        if not isinstance(its, Tensor) or its.shape != tensor.shape:
            found = list(its.shape) if isinstance(its, Tensor) else "missing"
            raise UserError(
                f"{path}: not VGG16's weights: {names[name]} is {found} instead of {list(tensor.shape)}; give "
                "torchvision's vgg16-397923af.pth or a file with its keys"
            )
        weights[name] = its
    others = [name for name in content if str(name).startswith("features.") and name not in weights]
    if not shift_tolerant and others:
        raise UserError(
            f"{path}: not VGG16's weights: it has {others[0]} too; a VGG with more layers, or with BatchNorm"
        )
    return weights, shift_tolerant


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if is_safetensors(path):
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise almost anything
        kind = kind_of(path)
        why = kind if kind and kind != PYTORCH else type(error).__name__
        raise UserError(f"{path}: not a readable file of weights ({why}); copy it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not tensors by name; give a state_dict")
    return content


def _stlpips_names() -> dict[str, str]:
    """torchvision's name -> stlpips': its pooling counts as two layers, and each block is a slice."""
    names = {}
    for block, (_, convolutions) in enumerate(_BLOCKS, 1):
        for convolution in range(1, convolutions + 1):
            number = LAYERS[f"relu{block}_{convolution}"] - 1
            for kind in ("weight", "bias"):
                names[f"features.{number}.{kind}"] = f"net.slice{block}.{number + block - 1}.{kind}"
    return names
