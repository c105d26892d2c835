"""What the GAN demo is made from: edge drawings of scikit-image's photographs, and two networks without training.

One is the baseline, a flat colour; the other the VGG16 of the style and feature losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from safetensors.torch import save
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.data.images import encode_png, read_rgb
from hpcdistill.data.index import INDEX_NAME, Index
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.data.pack.sources import Source, find_sources
from hpcdistill.errors import UserError
from hpcdistill.models.vgg import LAYERS, VGG16Features
from hpcdistill.storage import write_bytes
from hpcdistill.sweep.report import Image

PHOTOGRAPHS = "photos"  # the recipe: six to train on, three to test with
PAIRS = "paired"  # the recipe that the pairs are packed with
# Shorter sides, pixels, that a photograph is shrunk to before it is cut into square tiles: what is trained on is cut at
# three sizes, a little larger than the crops that are taken of it. Pictures of science at one size only: a red retina
# and a black sky would else be half of all there is to learn.
SHORT_SIDES = {"train": (144, 216, 288), "test": (128,)}
OF_SCIENCE = ("retina", "hubble_deep_field", "ihc")
TILE = {"train": 72, "test": 64}
DARKEST = 0.97  # the quantile of a photograph's edge strength that is drawn black
FAINTEST = 0.02  # nothing below this strength is drawn black, however flat a photograph is
VGG_SEED = 16
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Pair:
    """A photograph, shrunk, and its edge drawing of the same size."""

    name: str  # of the photograph, without its suffix
    side: int  # the shorter one
    edges: Image
    photograph: Image

    def tiles(self, size: int) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
        """The tiles without overlap, as many as fit, around the middle: name and (top, left, height, width)."""
        height, width = self.photograph.shape[:2]
        rows, columns = height // size, width // size
        for row in range(rows):
            for column in range(columns):
                top, left = (height - rows * size) // 2 + row * size, (width - columns * size) // 2 + column * size
                yield f"{self.name}-{self.side}-{row}{column}", (top, left, size, size)


def photographs() -> dict[str, list[Source]]:
    """The photographs by split, train and test."""
    return find_sources(load_recipe(PHOTOGRAPHS), None)


def pairs_of(source: Source, split: str) -> list[Pair]:
    """The photograph at each size of its split, with its edges."""
    rgb = read_rgb(source.path)
    name = Path(source.name).stem
    sides = SHORT_SIDES[split][:1] if name in OF_SCIENCE else SHORT_SIDES[split]
    shrunk = [(side, _shrunk(rgb, side)) for side in sides]
    return [Pair(name, side, edge_drawing(image), image) for side, image in shrunk]


def edge_drawing(photograph: Image) -> Image:
    """The strength of the luma's edges (Sobel), dark on white like a pencil drawing; grey, so R = G = B."""
    from skimage import filters  # SciPy takes a second to load

    sobel: Callable[[NDArray[np.float64]], NDArray[np.float64]] = filters.sobel
    strength = sobel(photograph.astype(np.float64) / 255 @ np.array(_LUMA))
    ink = np.clip(strength / max(float(np.quantile(strength, DARKEST)), FAINTEST), 0, 1)
    grey = np.floor(255 * (1 - ink) + 0.5).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def write_pairs(folder: Path) -> bool:
    """Write the tiles as PNG, edges left and photograph right, to `folder`/train and /test; False if all were there.

    UserError for images in these folders that are not the demo's.
    """
    wanted: dict[Path, bytes] = {}
    for split, sources in photographs().items():
        for source in sources:
            for pair in pairs_of(source, split):
                for name, (top, left, height, width) in pair.tiles(TILE[split]):
                    cut = [image[top : top + height, left : left + width] for image in (pair.edges, pair.photograph)]
                    wanted[folder / split / f"{name}.png"] = encode_png(np.concatenate(cut, axis=1))
    for split in TILE:
        (folder / split).mkdir(parents=True, exist_ok=True)
        for path in sorted((folder / split).iterdir()):
            if path not in wanted and not path.name.startswith("."):
                raise UserError(f"{path}: is none of the demo's images; take it away, or choose another --out")
    changed = {
        path: content for path, content in wanted.items() if not (path.is_file() and path.read_bytes() == content)
    }
    for path, content in changed.items():
        write_bytes(path, content)
    return bool(changed)


def pack_pairs(out: Path) -> dict[str, Index]:
    """Make the pairs in `out`/pairs and pack them into `out`/packed; the indices by split. What is there is used."""
    pairs, packed = out / "pairs", out / "packed"
    changed = write_pairs(pairs)
    there = any((packed / split / INDEX_NAME).exists() for split in TILE)
    say(f"{pairs}: {'made' if changed else 'holds'} the pairs, edges left and photograph right")
    return pack(load_recipe(PAIRS), pairs, packed, overwrite=changed and there, processes=1)


class FlatColour(nn.Module):
    """The generator that learns nothing: one colour, RGB in [-1, 1], whatever it is given."""

    colour: Tensor

    def __init__(self, colour: Tensor) -> None:
        super().__init__()
        self.register_buffer("colour", colour.reshape(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` of that colour."""
        return self.colour.expand_as(image)


def mean_colour(pictures: Sequence[Image]) -> Tensor:
    """The mean over the pixels of all photographs, RGB in [-1, 1]."""
    pixels = np.concatenate([image.reshape(-1, 3) for image in pictures])
    return torch.from_numpy(pixels.mean(axis=0, dtype=np.float64) / 127.5 - 1).float()


def write_random_vgg16(path: Path) -> bool:
    """Write VGG16's convolutions with He's initial weights and no bias to `path`, in half precision: 29 MB.

    Always the same weights; a file of another content is replaced. False if it was there. The trained VGG16 is a large
    download. Random filters still tell one picture from another, so that the style and feature losses do what they are
    for; they do not tell what matters to the eye.
    """
    generator = torch.Generator().manual_seed(VGG_SEED)
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


def _shrunk(rgb: Image, side: int) -> Image:
    height, width = rgb.shape[:2]
    factor = side / min(height, width)
    size = (round(width * factor), round(height * factor))
    return np.asarray(PillowImage.fromarray(rgb).resize(size, PillowImage.Resampling.LANCZOS))
