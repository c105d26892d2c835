"""What the GAN demo is made from: drawings and paintings of shapes, both by rule, and two networks without training.

A drawing decides its painting: what kind a shape is says its colour, light falls from the upper left, shadows to the
lower right. So a distance from the painting judges a translation, which it does not where colours are guessed. It is no
filter's task either: the inside of an outline is as white as its outside, and its colour depends on the whole outline.

Of the networks one is the baseline, a flat colour; the other the VGG16 of the style and feature losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.data.images import encode_png
from hpcdistill.data.index import INDEX_NAME, Index
from hpcdistill.data.pack.packing import pack
from hpcdistill.data.pack.recipes import load_recipe
from hpcdistill.errors import UserError
from hpcdistill.models.vgg import LAYERS, VGG16Features
from hpcdistill.storage import write_bytes
from hpcdistill.sweep.report import Image

Kind = Literal["disc", "square", "triangle"]
Plane = NDArray[np.float64]  # [SIDE, SIDE]

RECIPE = "paired"  # the recipe that the pairs are packed with
SIDE = 64  # of a picture, pixels
COUNTS = {"train": 1000, "test": 64}  # pictures
SEEDS = {"train": 1, "test": 3}  # a picture is drawn from its split's seed and its number
SHAPES = (2, 3, 4)  # how many a picture has; fewer where they found no room
RADII = (8.0, 16.0)  # of the circle around a shape, pixels
ATTEMPTS = 40  # places that are tried for the shapes of a picture
COLOURS: dict[Kind, tuple[int, int, int]] = {
    "disc": (220, 60, 50),
    "square": (50, 100, 210),
    "triangle": (240, 190, 40),
}
TABLE_TOP, DARKER_BELOW = (
    (235, 228, 214),
    50,
)  # the colour of the ground's first row, and by how much its last is darker
SHADOW_SHIFT, SHADOW_BLUR, SHADOW_DEPTH = 3.0, 5.0, 0.45  # pixels, pixels, share of the light
LINE = 1.2  # half the width of an outline with its soft edge, pixels
VGG_SEED = 16


@dataclass(frozen=True)
class Shape:
    """A shape in a circle of `radius` around (x, y), pixels, y downwards; all of them stand upright."""

    kind: Kind
    x: float
    y: float
    radius: float

    def distance(self, shift: float = 0.0) -> Plane:
        """How far each pixel's centre is outside the outline, negative inside; `shift`: moved right and down.

        Exact along straight sides and for the disc, and all that is needed near an outline.
        """
        rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
        right, down = columns - self.x - shift, rows - self.y - shift
        if self.kind == "disc":
            found = np.hypot(right, down) - self.radius
        elif self.kind == "square":
            found = np.maximum(abs(right), abs(down)) - 0.7 * self.radius
        else:
            normals = np.pi / 2 + np.arange(3) * 2 * np.pi / 3  # the first side lies below
            sides = [np.cos(normal) * right + np.sin(normal) * down for normal in normals]
            found = np.max(sides, axis=0) - 0.5 * self.radius
        return np.asarray(found, np.float64)


@dataclass(frozen=True)
class Pair:
    """A drawing and its painting, uint8 [SIDE, SIDE, 3]; the name begins with the number of shapes."""

    name: str
    drawing: Image
    painting: Image


def some_shapes(random: np.random.Generator) -> list[Shape]:
    """Shapes that lie side by side, none over another's."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    wanted = random.choice(SHAPES)
    found: list[Shape] = []
    for _ in range(ATTEMPTS):
        radius = random.uniform(*RADII)
        x, y = random.uniform(radius + 1, SIDE - radius - 1, 2)
        kind = kinds[random.integers(len(kinds))]
        if len(found) < wanted and all(np.hypot(x - one.x, y - one.y) > radius + one.radius for one in found):
            found.append(Shape(kind, float(x), float(y), radius))
    return found


def drawn(shapes: Sequence[Shape]) -> Image:
    """The outlines, dark on white; grey, so R = G = B."""
    ink = np.max([np.clip(LINE - abs(shape.distance()), 0, 1) for shape in shapes], axis=0)
    return np.repeat(_eight_bits(255 * (1 - ink))[:, :, None], 3, axis=2)


def painted(shapes: Sequence[Shape]) -> Image:
    """The shapes in their kinds' colours on a ground that darkens downwards, with light and shadows."""
    depth = np.arange(SIDE)[:, None, None] / (SIDE - 1)
    picture = np.broadcast_to(np.array(TABLE_TOP) - DARKER_BELOW * depth, (SIDE, SIDE, 3)).copy()
    for shape in shapes:
        shadow = np.clip(0.5 - shape.distance(SHADOW_SHIFT) / SHADOW_BLUR, 0, 1)
        picture *= 1 - SHADOW_DEPTH * shadow[:, :, None]
    for shape in shapes:
        covered = np.clip(0.5 - shape.distance(), 0, 1)[:, :, None]
        picture += covered * (_lit(shape) - picture)
    return _eight_bits(picture)


def _lit(shape: Shape) -> NDArray[np.float64]:
    """The shape's colour under the light from the upper left, `[SIDE, SIDE, 3]`; a disc is a ball and shines."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    right, down = columns - shape.x, rows - shape.y
    towards_light = -(right + down) / (np.sqrt(2) * shape.radius)
    body = np.array(COLOURS[shape.kind]) * np.clip(0.85 + 0.35 * towards_light, 0, 1.4)[:, :, None]
    if shape.kind == "disc":
        spot = 0.35 * shape.radius
        shine = np.exp(-((right + spot) ** 2 + (down + spot) ** 2) / (0.18 * shape.radius**2))
        body += (255 - body) * 0.8 * shine[:, :, None]
    return np.asarray(np.clip(body, 0, 255), np.float64)


@lru_cache(maxsize=2)
def pairs_of(split: str) -> tuple[Pair, ...]:
    """All pairs of a split, the same at every call; no picture is in both splits."""
    found = []
    for number in range(COUNTS[split]):
        shapes = some_shapes(np.random.default_rng([SEEDS[split], number]))
        found.append(Pair(f"{len(shapes)}-{number:04d}", drawn(shapes), painted(shapes)))
    return tuple(found)


def write_pairs(folder: Path) -> bool:
    """Write the pairs as PNG, drawing left and painting right, to `folder`/train and /test; False if all were there.

    UserError for images in these folders that are not the demo's.
    """
    wanted = {
        folder / split / f"{pair.name}.png": encode_png(np.concatenate([pair.drawing, pair.painting], axis=1))
        for split in COUNTS
        for pair in pairs_of(split)
    }
    for split in COUNTS:
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
    there = any((packed / split / INDEX_NAME).exists() for split in COUNTS)
    say(f"{pairs}: {'made' if changed else 'holds'} the pairs, drawing left and painting right")
    return pack(load_recipe(RECIPE), pairs, packed, overwrite=changed and there, processes=1)


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
    """The mean over the pixels of all pictures, RGB in [-1, 1]."""
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


def _eight_bits(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Rounded half up; outside 0..255 clamped."""
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)
