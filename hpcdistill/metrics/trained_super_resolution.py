"""Evaluating super-resolution on the images of one test set: networks, bicubic enlargement, pictures made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from rich.progress import track
from torch import Tensor, nn

from hpcdistill.console import err, say_here, speaks_alone
from hpcdistill.data.outputs import save_image
from hpcdistill.errors import UserError
from hpcdistill.metrics.base import ImageRow, SetResult
from hpcdistill.metrics.pictures import Pictures
from hpcdistill.metrics.psnr_ssim import Rule, gray_as_it_is
from hpcdistill.metrics.sample_grid import colourise
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.metrics.sr_evaluation import ImagePair, as_tensors, evaluating, image_row, summarise, super_resolve
from hpcdistill.metrics.sr_test_sets import Image, SRImages, UnusableImageError
from hpcdistill.ranks import watchdog

Source = nn.Module | Pictures  # what outputs come from
Seen = Callable[[int, Image, Image, Mapping[str, Tensor]], None]  # number, HR, LR, and each source's [1, c, H, W]


def evaluate_super_resolution(
    sources: Mapping[str, Source],
    images: SRImages,
    rule: Rule,
    device: torch.device | str = "cpu",
    seen: Seen | None = None,
    *,
    skip: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[dict[str, SetResult], list[str]]:
    """The result of each source over all images, and the names of those that were skipped.

    `seen` is called with each image that was measured. With `skip` an image that cannot be used is passed over, else
    it is an error; a picture that cannot is one always. With several ranks each takes its share of the images and gets
    the same result. UserError when no image could be used.
    """
    rows: dict[str, list[ImageRow]] = {label: [] for label in sources}
    skipped: list[str] = []
    mine = range(rank, len(images), ranks)
    hidden = rank > 0 or not (err.moves and speaks_alone())
    with shared_work(ranks, device), all_evaluating(sources, device) as used:
        for number in track(mine, "evaluating", console=err, transient=True, disable=hidden):
            watchdog.progress()
            try:
                name, hr, lr = images.read(number)
                pair = as_tensors(hr, lr, device, gray_as_it_is(rule, images.is_gray(number)))
                made = outputs(used, number, pair)
                found = {label: image_row(name, pair, output, images.scale, rule) for label, output in made.items()}
            except UnusableImageError as error:
                if not skip:
                    raise
                skipped.append(images.names[number])
                say_here(f"warning: skipped {error}", "yellow")  # by any rank
                continue
            for label, row in found.items():
                rows[label].append(row)
            if seen is not None:
                seen(number, hr, lr, made)
    if ranks > 1:
        shares = gather_object([rows])
        rows = {label: [row for share in shares for row in share[label]] for label in sources}
        skipped = gather_object(skipped)
    results = {}
    for label, measured in rows.items():
        if not measured:
            raise UserError(f"{images.path}: none of its images could be evaluated; see the warnings above")
        by_name = {row["name"]: row for row in measured}
        results[label] = summarise([by_name[name] for name in images.names if name in by_name])
    return results, [name for name in images.names if name in skipped]


@contextmanager
def all_evaluating(sources: Mapping[str, Source], device: torch.device | str = "cpu") -> Iterator[dict[str, Source]]:
    """`evaluating` for each network of `sources`, on `device`; pictures stay as they are."""
    with ExitStack() as stack:
        yield {
            label: stack.enter_context(evaluating(source.to(device))) if isinstance(source, nn.Module) else source
            for label, source in sources.items()
        }


def outputs(sources: Mapping[str, Source], number: int, pair: ImagePair) -> dict[str, Tensor]:
    """What each source makes of the image `number` of a test set, `[1, c, H, W]`, nominally in [0, 1].

    Call it inside `all_evaluating`. A picture is an output of three channels (see `psnr_ssim`).
    """
    made = {}
    for label, source in sources.items():
        if isinstance(source, nn.Module):
            made[label] = super_resolve(source, pair)
            continue
        height, width = pair.hr.shape[-2:]
        picture = source.read(number, height, width, "once it is cut to a multiple of the scale")
        made[label] = picture[None].to(pair.hr.device).float() / 255
    return made


def saving(folder: Path, label: str, images: SRImages, rule: Rule) -> Seen:
    """Writes what the source `label` makes of each image to `folder`, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(number: int, hr: Image, lr: Image, made: Mapping[str, Tensor]) -> None:
        gray = gray_as_it_is(rule, images.is_gray(number))
        save_image(folder, images.names[number], colourise(made[label][0], lr, images.scale, gray))

    return save
