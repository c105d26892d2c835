"""Every export verifies itself before it counts as done: written aside, run, compared with PyTorch, put in its place.

Compared on a photograph that scikit-image brings along and on three sizes that nothing was traced with. What differs by
more than a format allows is removed.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpcdistill.deploy.description import Description
from hpcdistill.deploy.formats.base import (
    Format,
    NotVerified,
    Options,
    Verified,
    in_eval_mode,
    other_sizes,
)
from hpcdistill.deploy.session import Batch, Session
from hpcdistill.errors import UserError, plural
from hpcdistill.ops.colour import luma
from hpcdistill.ops.downsampling import downsample_uint8
from hpcdistill.storage import sync_folder

PHOTOGRAPH = "astronaut"  # of NASA, in the public domain: inside scikit-image's wheel
SIDE = 240  # of the part of it: a multiple of 2, 3, 4 and 8, and VDSR takes seconds
_ROUNDING = 2e-5  # of 1; what float32 may be off by where it is compared with
_CORNER = (0, 110)  # of that part: face, hair and embroidery


def export(
    exporter: Format, network: nn.Module, about: Description, path: Path, options: Options
) -> tuple[tuple[Path, ...], Verified | NotVerified]:
    """Write `network` to `path`, compare it with PyTorch, and only then put it there; the files, `path` first.

    UserError for what differs too much, for a file at `path` that hpcdistill did not export, for what the format
    cannot hold. Then nothing is changed.
    """
    exporter.check(network, about, options)
    check_replaceable(exporter, path)
    network = in_eval_mode(network)
    path.parent.mkdir(parents=True, exist_ok=True)
    allowed = exporter.half_tolerance if options.half else exporter.tolerance
    with _folder_beside(path) as folder:
        written = exporter.write(network, about, folder / path.name, options)
        report = exporter.verify(network, about, written[0], options, allowed)
        targets = [path.parent / file.name for file in written]
        replaced = path.exists()
        for target in targets[1:]:
            if target.exists() and not replaced:
                raise UserError(f"{target}: exists already; give --out another name")
        for file, target in reversed(list(zip(written, targets, strict=True))):  # the one that is opened comes last
            file.replace(target)
    sync_folder(path.parent)
    return tuple(targets), report


def check_replaceable(exporter: Format, path: Path) -> None:
    """UserError for a path that is taken by what hpcdistill did not export."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file that ends in {exporter.suffix}")
    if path.exists() and not exporter.is_ours(path):
        raise UserError(f"{path}: exists and was not exported by hpcdistill; give --out another name, or remove it")


def compare(network: nn.Module, about: Description, session: Session, runtime: str, allowed: float) -> Verified:
    """`session` against `network` in PyTorch, both as `about` says; UserError for a difference beyond `allowed`."""
    original, image = photograph(about)
    expected, made = _both(network, about, session, image, runtime)
    worst = _difference(about, expected, made)
    smallest, *others = other_sizes(about)
    smallest = _steady(network, about, image, smallest)
    images = [image, *(_crop(image, *size) for size in (smallest, *others))]
    for other in images[1:]:
        worst = max(worst, _difference(about, *_both(network, about, session, other, runtime)))
    sizes = tuple((other.shape[2], other.shape[3]) for other in images)
    before = after = None
    if about.task == "super-resolution":
        before, after = psnr(expected, original), psnr(made, original)
    change = None if before is None or after is None else after - before
    report = Verified(runtime, sizes, worst, allowed, before, change)
    if not worst <= allowed:
        raise UserError(f"{in_words(report)}: more than the {allowed:.1e} that is allowed; nothing was written")
    return report


def in_words(report: Verified | NotVerified) -> str:
    """One line for people."""
    if isinstance(report, NotVerified):
        return f"not verified: {report.reason}"
    sizes = ", ".join(f"{height}x{width}" for height, width in report.sizes)
    words = f"{report.runtime} differs from PyTorch by at most {report.difference:.1e} (of 1) at {sizes}"
    if report.psnr is None or report.psnr_change is None:
        return words
    change = round(report.psnr_change, 4) + 0.0  # no -0.0000
    return f"{words}; a photograph's PSNR is {report.psnr:.2f} dB, {change:+.4f} dB from PyTorch's"


def photograph(about: Description) -> tuple[Batch, Batch]:
    """A real image as `about` wants it, `[1, channels, h, w]`, and before it the original that it was made smaller of.

    For translation, where nothing is made smaller, both are one image.
    """
    from skimage.data import astronaut

    side = SIDE // about.scale * about.scale
    if about.task == "translation":
        side = -(-max(SIDE, about.smallest) // about.multiple) * about.multiple
    top, left = _CORNER
    whole: NDArray[np.uint8] = astronaut()  # type: ignore[no-untyped-call]
    original = whole[top : top + side, left : left + side]
    short = [(0, side - length) for length in original.shape[:2]]
    original = np.ascontiguousarray(np.pad(original, (*short, (0, 0)), mode="symmetric"))
    image = original if about.scale == 1 else downsample_uint8(original, about.scale)
    return _planes(original, about), _planes(image, about)


def psnr(made: Batch, original: Batch) -> float:
    """dB, of values in [0, 1]; clamped, as a picture is, but not rounded, so that small differences show."""
    error = float(np.mean((np.clip(made, 0, 1).astype(np.float64) - original) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def _planes(pixels: NDArray[np.uint8], about: Description) -> Batch:
    rgb = torch.from_numpy(pixels.transpose(2, 0, 1)[None] / np.float32(255))
    planes = luma(rgb) if about.colour == "luma" else rgb * (about.high - about.low) + about.low
    return np.ascontiguousarray(planes.numpy(), dtype=np.float32)


def _crop(image: Batch, height: int, width: int) -> Batch:
    """That much of the image from its middle on; mirrored where it is smaller."""
    top, left = (max(0, (have - want) // 2) for have, want in zip(image.shape[2:], (height, width), strict=True))
    part = image[:, :, top : top + height, left : left + width]
    missing = [(0, want - have) for have, want in zip(part.shape[2:], (height, width), strict=True)]
    return np.ascontiguousarray(np.pad(part, ((0, 0), (0, 0), *missing), mode="symmetric"))


def _steady(network: nn.Module, about: Description, image: Batch, size: tuple[int, int]) -> tuple[int, int]:
    """`size`, doubled until float32 gives what float64 does: of what is only rounding no two runtimes make the same.

    A ResNet generator normalises four values of an 8x8 image, and may differ from itself by 0.05 there.
    """
    precise = copy.deepcopy(network).double()
    while size[0] < image.shape[2]:
        part = _crop(image, *size)
        with torch.inference_mode():
            exact: Tensor = precise(torch.from_numpy(part).double())
            made: Tensor = network(torch.from_numpy(part))
        if _difference(about, exact.numpy(), made.numpy()) <= _ROUNDING:
            break
        size = (2 * size[0], 2 * size[1])
    return size


def _both(network: nn.Module, about: Description, session: Session, image: Batch, runtime: str) -> tuple[Batch, Batch]:
    """What PyTorch makes of `image`, and what the export does."""
    with torch.inference_mode():
        expected: Tensor = network(torch.from_numpy(image))
    if not expected.isfinite().all():
        raise UserError("the network makes values that are no numbers: its weights are damaged; train it again")
    made = session(image)
    if made.shape != tuple(expected.shape):
        raise UserError(
            f"{runtime} makes {made.shape} of an image of {image.shape}, PyTorch {tuple(expected.shape)}; "
            "nothing was written"
        )
    return expected.numpy(), made


def _difference(about: Description, expected: Batch, made: Batch) -> float:
    """The largest, of values that span 1; infinite where one of the two is no number."""
    largest = float(np.max(np.abs(expected.astype(np.float64) - made))) / (about.high - about.low)
    return largest if math.isfinite(largest) else math.inf


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder on the same disk, in which files have their names already; gone afterwards with all that is left."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def files_in_words(files: tuple[Path, ...]) -> str:
    """The files and how large they are together."""
    size = sum(file.stat().st_size for file in files) / 1000
    more = f" and {plural(len(files) - 1, 'file')} beside it" if len(files) > 1 else ""
    return f"{files[0]}{more} ({size:,.1f} kB)"
