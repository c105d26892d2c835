"""A finished network that takes pictures and gives pictures, whatever file it came in: `hpcdistill.load`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from hpcdistill.console import warn
from hpcdistill.deploy.description import Description, describe
from hpcdistill.deploy.fast_form import fast_form
from hpcdistill.deploy.formats import FORMATS, format_of
from hpcdistill.deploy.pictures import Picture, Pixels, from_pillow, to_pillow
from hpcdistill.deploy.session import Batch, Session
from hpcdistill.deploy.shipped import DEFAULT, model_path
from hpcdistill.deploy.tiles import TILE, OnProgress, Piece, pieces, receptive_radius
from hpcdistill.errors import UserError, is_out_of_memory
from hpcdistill.models.registry import load_generator
from hpcdistill.models.weights_file import chosen_file, generator_file
from hpcdistill.ops.bicubic import upsample
from hpcdistill.ops.colour import luma, with_luma
from hpcdistill.training.records import is_finished

CHROMA_REACH = 2  # LR pixels that the bicubic enlargement of chroma and alpha reads to each side


class TorchSession:
    """A network in PyTorch, in its inference form."""

    def __init__(self, network: nn.Module, device: str = "cpu") -> None:
        self.device = device
        # Channels last: two thirds of the time for a network of convolutions (bench/deploy.py).
        self.layout = torch.channels_last if cast(Any, network).takes == "lr" else torch.contiguous_format
        self.network = cast(Any, fast_form(cast(Any, network).deploy())).to(device, memory_format=self.layout)

    def __call__(self, images: Batch) -> Batch:
        with torch.inference_mode():
            image = torch.from_numpy(images).to(self.device, memory_format=self.layout)
            result: Batch = self.network(image).float().cpu().contiguous().numpy()
            return result


class Model:
    """Takes a PIL image and gives one; `about` says what is inside."""

    def __init__(self, about: Description, session: Session, origin: str = "the network") -> None:
        self.about = about
        self.session = session
        self.origin = origin

    def __call__(self, image: Image.Image, *, tile: int | None = None) -> Image.Image:
        """The picture enlarged or translated: its mode (gray, alpha) and its colour profile stay.

        UserError for an animation, floating-point pixels, colour of 16 bits.
        """
        if not isinstance(image, Image.Image):
            raise UserError(f"give a PIL image, not a {type(image).__name__}: model(Image.open('photo.png'))")
        picture = from_pillow(image)
        return to_pillow(Picture(np.concatenate(list(self.strips(picture, tile))), picture.profile))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what is made of a picture."""
        return height * self.about.scale, width * self.about.scale

    def strips(
        self, picture: Picture, tile: int | None = None, progress: OnProgress = lambda done: None
    ) -> Iterator[Pixels]:
        """What is made of `picture`, from the top to the bottom, as `[h, W, channels]` of its dtype.

        `tile`: LR pixels on a side that are computed at once (default: `TILE`); tiles equal the whole to 1e-6.
        UserError when a network that has no exact ones is asked for them, and where there is no memory.
        """
        try:
            make = self._enlarged if self.about.task == "super-resolution" else self._translated
            yield from make(picture, tile, progress)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            remedy = "choose a smaller --tile" if self.about.overlap is not None else "make it smaller"
            height, width = picture.pixels.shape[:2]
            raise UserError(f"{self.origin}: no memory for a picture of {width}x{height}; {remedy}") from None

    def _enlarged(self, picture: Picture, tile: int | None, progress: OnProgress) -> Iterator[Pixels]:
        height, width = picture.pixels.shape[:2]
        overlap = self.about.overlap
        self.refuse_tiles(tile)
        size = max(height, width) if overlap is None else TILE if tile is None else tile
        for strip in pieces(height, width, size, max(overlap or 0, CHROMA_REACH)):
            made = []
            for piece in strip:
                made.append(self._enlarged_piece(picture, piece))
                progress((piece.rows[1] - piece.rows[0]) * (piece.columns[1] - piece.columns[0]))
            yield made[0] if len(made) == 1 else np.concatenate(made, axis=1)

    # Not around `strips`: whoever takes them would be in this mode, too, until the last is taken.
    @torch.inference_mode()
    def _enlarged_piece(self, picture: Picture, piece: Piece) -> Pixels:
        scale = self.about.scale
        (top, bottom), (left, right) = piece.from_rows, piece.from_columns
        planes = _planes(picture.pixels[top:bottom, left:right], picture.white)
        count = picture.colour.shape[2]
        colour, alpha = planes[:, :count], planes[:, count:]
        made = self._enlarged_colour(colour)
        if alpha.shape[1]:
            made = torch.cat([made, upsample(alpha, scale)], dim=1)
        y, x = (piece.rows[0] - top) * scale, (piece.columns[0] - left) * scale
        inner = made[..., y : y + _length(piece.rows) * scale, x : x + _length(piece.columns) * scale]
        return _pixels(inner, picture.white)

    def _enlarged_colour(self, colour: Tensor) -> Tensor:
        """`[1, 1 or 3, h, w]` in [0, 1], enlarged: gray stays gray."""
        gray = colour.shape[1] == 1
        if self.about.colour == "rgb":
            made = self._run(colour.expand(-1, 3, -1, -1))
            return made.mean(dim=1, keepdim=True) if gray else made
        if gray:
            made = self._run(colour * (219 / 255) + 16 / 255)
            return (made - 16 / 255) * (255 / 219)
        return with_luma(upsample(colour, self.about.scale), self._run(luma(colour)))

    def _translated(self, picture: Picture, tile: int | None, progress: OnProgress) -> Iterator[Pixels]:
        """The whole picture at once, reflected to a size that the network takes, and cut back; alpha stays."""
        height, width = picture.pixels.shape[:2]
        self.refuse_tiles(tile)
        with torch.inference_mode():
            planes = _planes(picture.colour, picture.white).expand(-1, 3, -1, -1)
            made = self._run(self._fitted(planes) * 2 - 1)[..., :height, :width]
            pixels = _pixels((made + 1) / 2, picture.white)
        progress(height * width)
        yield np.concatenate([pixels, picture.pixels[..., -1:]], axis=2) if picture.has_alpha else pixels

    def refuse_tiles(self, tile: int | None) -> None:
        """UserError for a `tile` that was asked of a network without exact ones."""
        if tile is not None and self.about.overlap is None:
            raise UserError(
                f"--tile {tile}: {self.origin} has no exact tiles, its pixels depend on the whole picture; leave it out"
            )

    def _fitted(self, planes: Tensor) -> Tensor:
        """Reflected at the bottom and on the right until height and width fit the network."""
        multiple, smallest = self.about.multiple, self.about.smallest
        while True:
            height, width = planes.shape[-2:]
            wanted = [max(smallest, -(-side // multiple) * multiple) for side in (height, width)]
            down, across = wanted[0] - height, wanted[1] - width
            if not down and not across:
                return planes
            # One pixel cannot be reflected, and no more than a side less one at a time can.
            mode = "replicate" if (down and height == 1) or (across and width == 1) else "reflect"
            most = [max(1, height - 1), max(1, width - 1)]
            planes = functional.pad(planes, (0, min(across, most[1]), 0, min(down, most[0])), mode=mode)

    def _run(self, planes: Tensor) -> Tensor:
        made = torch.from_numpy(self.session(np.ascontiguousarray(planes.numpy(), dtype=np.float32)))
        if not made.isfinite().all():
            raise UserError(f"{self.origin}: makes values that are no numbers; its weights are damaged: train it again")
        return made


def load(
    model: str | os.PathLike[str] = DEFAULT,
    *,
    which: str | None = None,
    generator: str | None = None,
    device: str = "cpu",
) -> Model:
    """The network that `model` names: takes a PIL image, gives one.

    `model`: a run folder, a generator's .safetensors file, a file that `hpcdistill.export` made, or `pretrained:x4`
    (x2, x3). Of a run, `which` ("best", else "last") of its weights and which `generator`; its student by default.
    UserError for what is no such thing, for a network that makes no picture of a picture, for damaged weights.
    """
    text = os.fspath(model)
    path = model_path(text)
    if path.is_file() and (name := format_of(path)) is not None:
        for option, wanted in (("which", which), ("generator", generator)):
            if wanted is not None:
                raise UserError(f"--{option} {wanted}: {text} is one exported network; leave it out")
        opened = FORMATS[name]().open(path)
        return Model(opened.about, opened.session, text)
    network, about, file = load_network(path, which, generator)
    return Model(about, TorchSession(network, device), str(file) if path.is_dir() else text)


def load_network(
    path: Path, which: str | None = None, generator: str | None = None
) -> tuple[nn.Module, Description, Path]:
    """The network of a run folder or a generator's file, in its inference form, what it is, and its file."""
    file = (
        chosen_file(path) if which is None and generator is None else generator_file(path, which or "best", generator)
    )
    network, notes = load_generator(file)
    about = describe(network, notes, file)
    if (path / "config.yaml").is_file() and not is_finished(path):
        warn(f"{path}: has not finished; taken are the {file.parent.name} weights, of step {about.steps}")
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise UserError(f"{file}: has weights that are no finite numbers; its training went wrong: train it again")
    network = cast(Any, network).deploy()
    if about.task == "super-resolution":
        about = about.tiled(receptive_radius(network, about.channels))
    return network, about, file


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _planes(pixels: Pixels, white: int) -> Tensor:
    """`[H, W, C]` integers to `[1, C, H, W]` float32 in [0, 1]."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)
    return torch.from_numpy(planes).div_(white)


def _pixels(planes: Tensor, white: int) -> Pixels:
    """`[1, C, H, W]` nominally in [0, 1] to integers `[H, W, C]`, clamped and rounded."""
    levels = (planes[0] * white).clamp_(0, white).round_().permute(1, 2, 0).contiguous().numpy()
    return levels.astype(np.uint8 if white == 255 else np.uint16)
