"""Evaluating a trained super-resolution network, or bicubic enlargement, on the images of one test set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from rich.progress import track
from torch import nn

from hpcdistill.console import err, say, say_here
from hpcdistill.data.outputs import save_image
from hpcdistill.errors import UserError, plural
from hpcdistill.metrics.base import ImageRow, SetResult
from hpcdistill.metrics.psnr_ssim import Rule, gray_as_it_is
from hpcdistill.metrics.sample_grid import colourise
from hpcdistill.metrics.shared_work import shared_work
from hpcdistill.metrics.sr_evaluation import (
    BicubicUpsampler,
    SRImages,
    UnusableImageError,
    bicubic_upsampler,
    evaluate_image,
    evaluating,
    summarise,
)
from hpcdistill.ranks import watchdog


def evaluate_super_resolution(
    generator: nn.Module,
    images: SRImages,
    scale: int,
    rule: Rule,
    device: torch.device | str,
    save_images: Path | None = None,
    *,
    skip: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[SetResult, list[str]]:
    """The result over all images, with bicubic's of the same images, and the names of those that were skipped.

    With `skip` an image that cannot be used is passed over, else it is an error. With `save_images` the enlarged
    images are written there as PNG. With several ranks each takes its share of the images and gets the same result.
    UserError when no image could be used.
    """
    generator.to(device)
    upsampler = None if isinstance(generator, BicubicUpsampler) else bicubic_upsampler(scale)
    rows: list[ImageRow] = []
    bicubic: list[ImageRow] = []  # what every network is to be compared with
    skipped: list[str] = []
    if save_images:
        save_images.mkdir(parents=True, exist_ok=True)
    mine = range(rank, len(images), ranks)
    hidden = rank > 0 or not err.moves
    with shared_work(ranks, device), evaluating(generator) as network:
        for number in track(mine, "evaluating", console=err, transient=True, disable=hidden):
            watchdog.progress()
            try:
                name, hr, lr = images[number]
                gray = images.is_gray(number)
                row, output = evaluate_image(network, name, hr, lr, scale, rule, device, gray=gray)
            except UnusableImageError as error:
                if not skip:
                    raise
                skipped.append(images.names[number])
                say_here(f"warning: skipped {error}", "yellow")  # by any rank
                continue
            rows.append(row)
            if upsampler is not None:
                beside, _ = evaluate_image(upsampler, name, hr, lr, scale, rule, device, gray=gray)
                bicubic.append(beside)
            if save_images:
                save_image(save_images, name, colourise(output[0], lr, scale, gray_as_it_is(rule, gray)))
    if ranks > 1:
        rows, bicubic, skipped = gather_object(rows), gather_object(bicubic), gather_object(skipped)
    if not rows:
        raise UserError(f"{images.path}: none of its images could be evaluated; see the warnings above")
    if save_images:
        say(f"wrote {plural(len(rows), 'image')} to {save_images}")
    by_name = {row["name"]: row for row in rows}
    result = summarise([by_name[name] for name in images.names if name in by_name])
    if bicubic:
        result = replace(result, bicubic=summarise(bicubic).metrics)
    return result, [name for name in images.names if name in skipped]
