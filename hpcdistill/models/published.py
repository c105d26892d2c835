"""Networks as others publish them: what their tensors are called, and the network of ours that they belong to.

A layout is data: their module's name -> ours, and how the network's arguments are read off the tensors' shapes. A file
names no layout: the one that knows all of its tensors is taken. A new one is a `Layout` in `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcdistill.errors import UserError, nearest
from hpcdistill.models.registry import rebuild
from hpcdistill.models.weights_file import PYTORCH, kind_of

State = dict[str, Tensor]
_PREFIX = "module."  # of DataParallel
# Before PyTorch 0.4 an InstanceNorm saved statistics that it never used, and a BatchNorm no count.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Layout:
    """How one family of published code names the tensors of one of our networks."""

    name: str
    about: str  # whose files have it
    network: str  # the class, of `GENERATORS`
    modules: Callable[[Collection[str]], dict[str, str]]  # of all their tensors' names: their module's -> ours
    arguments: Callable[[State], dict[str, Any]]  # of the tensors by our names; KeyError, IndexError: not of it

    def renamed(self, state: State) -> tuple[State, list[str]]:
        """The tensors by our names, and theirs that the layout does not know."""
        modules = self.modules(state)
        known: State = {}
        strange = []
        for name, tensor in state.items():
            module, _, leaf = name.rpartition(".")
            if module in modules:
                known[f"{modules[module]}.{leaf}"] = tensor
            elif leaf not in _STATISTICS:
                strange.append(name)
        for name in [name for name in known if name.endswith(".running_mean")]:
            known.setdefault(name.replace(".running_mean", ".num_batches_tracked"), torch.tensor(0))
        return known, strange


def read_published(path: Path, part: str | None = None) -> tuple[nn.Module, Layout]:
    """The network in a .pth file, in eval mode on the CPU, and its layout. Nothing is executed that the file says.

    `part` names one of several networks in a file. UserError for a file that is none, and for one that holds
    objects, another network's weights, or values that are no finite numbers.
    """
    state = read_state(path, part)
    reasons = []
    for layout in LAYOUTS:
        weights, strange = layout.renamed(state)
        if weights and not strange:
            try:
                arguments = layout.arguments(weights)
            except (KeyError, IndexError, ValueError) as error:
                raise UserError(
                    f"{path}: named as {layout.about}, but incomplete or of another kind ({error}); give a whole file"
                ) from None
            return rebuild(layout.network, arguments, weights, str(path)), layout
        reasons.append((len(strange), f"{strange[0] if strange else 'nothing'} is not in the layout {layout.name}"))
    raise UserError(
        f"{path}: no known network's weights ({min(reasons)[1]}); known: "
        f"{'; '.join(f'{layout.name}, {layout.about}' for layout in LAYOUTS)}. Others: docs/training.md, 'Weights from "
        "elsewhere'"
    )


def read_state(path: Path, part: str | None = None) -> State:
    """The tensors, float32 where they are numbers, in a PyTorch file: of the only network in it, or of `part`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a published .pth file")
    kind = kind_of(path)
    if kind != PYTORCH:
        what = kind or "no PyTorch checkpoint; a .safetensors file that hpcdistill saved is used as it is"
        raise UserError(f"{path}: is {what}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what zip, pickle and the disk have in store
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path}: holds more than tensors, or is damaged ({first[:100]}); only weights are read, no objects: save "
            "its state_dict() with the code that it is of"
        ) from None
    state = _part(path, content, part)
    if all(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    return {name: _checked(path, name, tensor) for name, tensor in state.items()}


def _part(path: Path, content: Any, part: str | None) -> State:
    if _is_state(content):
        if part is not None:
            raise UserError(f"{path}: holds one network; leave --part {part} out")
        return dict(content)
    parts = {str(name): value for name, value in content.items() if _is_state(value)} if _is_named(content) else {}
    if not parts:
        raise UserError(f"{path}: holds no tensors by name; give a file with a state_dict()")
    if part is None and len(parts) > 1:
        raise UserError(f"{path}: holds several networks; choose one with --part: {', '.join(parts)}")
    if part is not None and part not in parts:
        raise UserError(f"--part {part}: not in {path}; {nearest(part, parts)}")
    return dict(parts[part or next(iter(parts))])


def _is_named(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(name, str) for name in content)


def _is_state(content: Any) -> bool:
    return _is_named(content) and all(isinstance(value, Tensor) for value in content.values())


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    # A view may claim any size over few numbers: the network would be built as large.
    if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: {name} is no plain tensor; save the state_dict() of the network itself")
    if not tensor.is_floating_point():
        return tensor
    if not tensor.isfinite().all():
        raise UserError(f"{path}: {name} has values that are no finite numbers; fetch or copy the file again")
    return tensor.float()


# ResNet: `model` is one Sequential, in which a block is one entry with a `conv_block` of its own.
_RESNET_BEFORE = {1: "stem.0", 4: "down1.0", 7: "down2.0"}
_RESNET_FIRST_BLOCK = 10
_RESNET_AFTER = {0: "up1.0", 3: "up2.0", 7: "head.0"}  # counted from behind the last block
# The second convolution is at 5, or at 6 where a dropout lies before it. Separable: `conv` of three layers.
_RESNET_DENSE = {"1": "body.0", "5": "body.3", "6": "body.3"}
_RESNET_SEPARABLE = {
    **{"1.conv.0": "body.0", "1.conv.2": "body.2"},
    **{f"{second}.conv.{layer}": ours for second in (5, 6) for layer, ours in ((0, "body.5"), (2, "body.7"))},
}
_RESNET_BLOCK = re.compile(r"model\.(\d{1,4})\.conv_block\.")
_RESNET_OURS = re.compile(r"block(\d+)\.body\.0\.weight")


def _resnet_modules(names: Collection[str]) -> dict[str, str]:
    numbers = {int(found[1]) for name in names if (found := _RESNET_BLOCK.match(name))}
    behind = max(numbers, default=_RESNET_FIRST_BLOCK - 1) + 1
    ends = _RESNET_BEFORE | {behind + place: ours for place, ours in _RESNET_AFTER.items()}
    modules = {f"model.{number}": ours for number, ours in ends.items()}
    for number in range(_RESNET_FIRST_BLOCK, behind):
        for layer, ours in (_RESNET_DENSE | _RESNET_SEPARABLE).items():
            modules[f"model.{number}.conv_block.{layer}"] = f"block{number - _RESNET_FIRST_BLOCK + 1}.{ours}"
    return modules


def _resnet_arguments(state: State) -> dict[str, Any]:
    blocks = sum(_RESNET_OURS.fullmatch(name) is not None for name in state)
    separable = "block1.body.2.weight" in state
    stem, down1, down2 = (state[f"{name}.0.weight"].shape[0] for name in ("stem", "down1", "down2"))
    up1, up2 = (state[f"{name}.0.weight"].shape[1] for name in ("up1", "up2"))
    pointwise = "body.2" if separable else "body.0"
    widths = [stem, down1, down2, up1, up2]
    inner = [state[f"block{block}.{pointwise}.weight"].shape[0] for block in range(1, blocks + 1)]
    if not blocks:
        raise ValueError("it has no residual blocks")
    arguments: dict[str, Any] = {"ngf": stem, "blocks": blocks, "separable": separable}
    arguments |= {"channels_in": state["stem.0.weight"].shape[1], "channels_out": state["head.0.weight"].shape[0]}
    if widths != [stem, 2 * stem, 4 * stem, 2 * stem, stem] or set(inner) != {4 * stem}:
        arguments |= {"widths": widths, "inner": inner}
    return arguments


# U-Net: each level is the Sequential `model` inside that of the level around it.
_UNET_OUTERMOST = {"0": "down{level}.0", "3": "up{level}.0"}
_UNET_BETWEEN = {"1": "down{level}.0", "2": "down{level}.1", "5": "up{level}.0", "6": "up{level}.1"}
_UNET_INNERMOST = {"1": "down{level}.0", "3": "up{level}.0", "4": "up{level}.1"}
_UNET_LEVEL = re.compile(r"model\.model\.1\.(?:model\.3\.)*model\.")


def _unet_modules(names: Collection[str]) -> dict[str, str]:
    inside = max((found[0].count("model.") for name in names if (found := _UNET_LEVEL.match(name))), default=0)
    levels = inside - 1 if inside else 1
    modules: dict[str, str] = {}
    path = "model.model"
    for level in range(1, levels + 1):
        table = _UNET_OUTERMOST if level == 1 else _UNET_INNERMOST if level == levels else _UNET_BETWEEN
        modules |= {f"{path}.{layer}": ours.format(level=level) for layer, ours in table.items()}
        path += ".1.model" if level == 1 else ".3.model"
    return modules


def _unet_arguments(state: State) -> dict[str, Any]:
    levels = sum(re.fullmatch(r"down\d+\.0\.weight", name) is not None for name in state)
    ngf, channels_in = state["down1.0.weight"].shape[:2]
    return {"ngf": ngf, "levels": levels, "channels_in": channels_in, "channels_out": state["up1.0.weight"].shape[1]}


# PatchGAN: one Sequential; between the first and the last convolution each has a norm and a LeakyReLU behind it.
_PATCH = re.compile(r"model\.(\d{1,3})\.weight")


def _patch_modules(names: Collection[str]) -> dict[str, str]:
    numbers = [int(found[1]) for name in names if (found := _PATCH.fullmatch(name))]
    layers = (max(numbers, default=0) - 2) // 3
    modules = {"model.0": "layer1.0", f"model.{2 + 3 * layers}": "logit"}
    for layer in range(2, layers + 2):
        place = 2 + 3 * (layer - 2)
        modules[f"model.{place}"] = f"layer{layer}.0"
        if f"model.{place + 1}.weight" in names:  # BatchNorm; of an InstanceNorm nothing is needed
            modules[f"model.{place + 1}"] = f"layer{layer}.1"
    return modules


def _patch_arguments(state: State) -> dict[str, Any]:
    ndf, channels_in = state["layer1.0.weight"].shape[:2]
    layers = sum(re.fullmatch(r"layer\d+\.0\.weight", name) is not None for name in state) - 1
    norm = "batch" if "layer2.1.weight" in state else "instance"
    return {"channels_in": channels_in, "ndf": ndf, "norm": norm, "layers": layers}


LAYOUTS = (
    Layout(
        "resnet",
        "the ResNet generator of CycleGAN, OMGD, DCD and GAN Compression, dense or separable, of any widths",
        "ResNetGenerator",
        _resnet_modules,
        _resnet_arguments,
    ),
    Layout("unet", "the U-Net of Pix2Pix and OMGD, with BatchNorm", "UNetGenerator", _unet_modules, _unet_arguments),
    Layout(
        "patchgan",
        "the discriminator of CycleGAN, Pix2Pix and OMGD",
        "PatchDiscriminator",
        _patch_modules,
        _patch_arguments,
    ),
)
