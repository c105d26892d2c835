"""Networks as the exporters get them, images that they take, and PyTorch's answers: for the tests of each format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from hpcdistill.deploy.description import Description, describe
from hpcdistill.deploy.model import load_network
from hpcdistill.deploy.rgb_graph import rgb_graph
from hpcdistill.deploy.shipped import pretrained_file
from hpcdistill.models.image_generator import build_generator
from hpcdistill.models.sr_network import build_network
from hpcdistill.ops.colour import luma
from hpcdistill.ops.downsampling import downsample_uint8

Planes = NDArray[np.float32]

# Smallest, narrow, odd, and larger than what the exporters trace with.
SR_SIZES = ((1, 1), (1, 2), (2, 1), (3, 2), (17, 31), (64, 5), (61, 90))
SR_NETWORKS = ("shipped-x2", "shipped-x3", "shipped-x4", "fsrcnn-rgb", "idn-x2", "idn-x3", "idn-x4", "vdsr-x2")
# InstanceNorm of 2x2 pixels, as at 8x8, makes rounding large: PyTorch itself is up to 5e-3 from float64 there.
RESNET_SIZES = ((16, 16), (64, 48), (100, 128))
UNET_SIZES = ((8, 8), (64, 48), (72, 96))


def named_network(name: str) -> tuple[nn.Module, Description]:
    """A network in its inference form, with weights that are the same each time, and what it is."""
    kind, _, form = name.partition("-")
    if kind == "shipped":
        network, about, _ = load_network(pretrained_file(f"pretrained:{form}"))
        return network, about
    torch.manual_seed(1)
    if kind == "resnet":
        network = build_generator("resnet", ngf=8, blocks=3, separable=form == "separable")
    elif kind == "unet":
        network = _with_statistics(build_generator("unet", ngf=8, levels=3))
    else:
        scale, channels = (2, 3) if form == "rgb" else (int(form[1:]), 1)
        network = build_network(kind, scale, channels, first_weights="pytorch")
    network = network.deploy()
    return network, describe(network, {"licence": "a licence", "data": "a set"}, Path("random.safetensors"))


def as_rgb(name: str) -> tuple[nn.Module, Description]:
    """The same with colour inside."""
    return rgb_graph(*named_network(name))


def difference(network: nn.Module, session: Any, shape: tuple[int, ...]) -> float:
    """The largest between what PyTorch and `session` make of random images of that shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    images = torch.rand(shape, generator=generator)
    with torch.no_grad():
        expected = network(images).numpy()
    made = session(images.numpy())
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    assert made.shape == expected.shape
    return float(np.abs(made - expected).max())


def set5_psnr(folder: Path, make: Any, scale: int = 4) -> list[float]:
    """PSNR-Y of each image of Set5, a border of `scale` pixels left out, as the papers do it."""
    found = []
    for file in sorted(folder.glob("*.png")):
        pixels = np.asarray(Image.open(file).convert("RGB"))
        height, width = (side // scale * scale for side in pixels.shape[:2])
        high = np.ascontiguousarray(pixels[:height, :width])
        made = make(_luma(downsample_uint8(high, scale)))
        expected = _luma(high)
        error = (255 * made).clip(0, 255).round() - (255 * expected).round()
        inner = error[..., scale:-scale, scale:-scale].astype(np.float64)
        found.append(float(10 * np.log10(255**2 / np.mean(inner**2))))
    assert len(found) == 5
    return found


def outcome_without_memory(file: Path) -> str:
    """What becomes of an image of 350,000 pixels when the process may take 40 MB more: its shape, or the error."""
    program = f"""
import resource
import numpy as np
from hpcdistill.deploy.model import load
session = load({str(file)!r}).session
session(np.zeros((1, 1, 16, 16), np.float32))
with open("/proc/self/statm") as sizes:
    limit = int(sizes.read().split()[0]) * resource.getpagesize() + 40 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    print(session(np.zeros((1, 1, 500, 700), np.float32)).shape)
except Exception as error:
    print(type(error).__name__)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    ).stdout.strip()


def _luma(rgb: NDArray[np.uint8]) -> Planes:
    planes = torch.from_numpy(rgb.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    return np.ascontiguousarray(luma(planes).numpy())


def _with_statistics(network: Any) -> Any:
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return network
