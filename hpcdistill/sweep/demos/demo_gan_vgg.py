"""A VGG16 that was never trained, for the GAN demo's style and feature losses: the trained one is a large download."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from hpcdistill.models.vgg import LAYERS, VGG16Features
from hpcdistill.storage import write_bytes

SEED = 16


def write_random_vgg16(path: Path) -> bool:
    """Write VGG16's convolutions with He's initial weights and no bias to `path`, in half precision: 29 MB.

    Always the same weights; a file of another content is replaced. False if it was there. Random filters still tell
    one picture from another, so that the two losses do what they are for; they do not tell what matters to the eye.
    """
    generator = torch.Generator().manual_seed(SEED)
    network = VGG16Features((list(LAYERS)[-1],))
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    content = save({name: tensor.half() for name, tensor in network.state_dict().items()})
    if path.is_file() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return True
