"""`python -m hpcdistill.evaluate RUN_OR_CHECKPOINT --data SET`: how good a trained generator is, or bicubic.

RUN is a run folder (`runs/<name>-<8 hex>`), CHECKPOINT a generator's .safetensors file, SET a packed data set or, for
super-resolution, a folder of HR images. Super-resolution is measured by PSNR and SSIM, translation by FID and KID and,
with pairs, PSNR, L1 and LPIPS. Started by torchrun or srun, the ranks share the images and rank 0 prints.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from hpcdistill.command import UserPath, program, run_command, whole
from hpcdistill.console import Table, out, warn
from hpcdistill.errors import UserError, nearest, plural
from hpcdistill.metrics.base import SR_METRICS, SetResult
from hpcdistill.metrics.reference import LEAST, below
from hpcdistill.models.weights_file import generator_file
from hpcdistill.ranks.environment import check_launcher, rank, ranks

if TYPE_CHECKING:
    from torch import nn

BASELINES = ("bicubic",)
BASELINE_SCALES = (2, 3, 4, 8)
TRANSLATION_OPTIONS = ("size", "real", "features", "direction", "kid", "lpips")
STALL = 600.0  # seconds without an image after which ranks count as hanging


def main(argv: list[str]) -> int:
    """Evaluate what the command line names and print the table, or with --json one JSON object."""
    arguments = _parser().parse_args(argv)
    check_launcher("hpcdistill.evaluate")
    code = _run(arguments)
    if ranks() > 1:
        from hpcdistill.ranks.rendezvous import leave

        leave()
    return code


def _run(arguments: argparse.Namespace) -> int:
    if arguments.baseline is None and arguments.model is None:
        raise UserError("nothing to evaluate; name a run folder, a .safetensors file, or --baseline bicubic --scale 4")
    if arguments.baseline is not None:
        model, generator, scale = _baseline(arguments)
    else:
        path = generator_file(arguments.model, arguments.which, arguments.generator)
        from hpcdistill.models.registry import load_generator

        generator = load_generator(path)[0]
        if generator.takes == "image":
            return _translation(generator, path, arguments)
        model, scale = str(path), _scale_of(generator, path, arguments.scale)
    _refuse_translation_options(arguments)
    # Imported only now: --help and a misspelt path answer at once.
    from hpcdistill.data.images import colour
    from hpcdistill.data.outputs import check_images_out
    from hpcdistill.metrics.sr_evaluation import FolderTestSet, load_test_set
    from hpcdistill.metrics.trained_super_resolution import evaluate_super_resolution

    background = colour(arguments.flatten) if arguments.flatten is not None else None
    images = load_test_set(arguments.data, scale, background)
    if not isinstance(images, FolderTestSet):
        _refuse_folder_options(arguments)
    if arguments.save_images:
        check_images_out(arguments.save_images, images.names, (images.path, images.path / "HR"))
    result, skipped = evaluate_super_resolution(
        generator,
        images,
        scale,
        arguments.rule,
        _device(arguments.device),
        arguments.save_images,
        skip=arguments.on_error == "skip",
        rank=rank(),
        ranks=ranks(),
    )
    if rank() > 0:
        return 0
    if skipped:
        warn(f"{plural(len(skipped), 'image')} {'was' if len(skipped) == 1 else 'were'} skipped: {', '.join(skipped)}")
    gray = images.taken_as_gray(arguments.rule)
    if arguments.json:
        report = {
            **result.metrics,
            "images": result.images,
            "scale": scale,
            "rule": arguments.rule,
            "per_image": result.per_image,
            "bicubic": result.bicubic,
            "model": model,
            "data": str(arguments.data),
            "lr": images.lr,
            "gray": gray,
        }
        if arguments.on_error == "skip":
            report["skipped"] = skipped
        out.out(json.dumps(report, allow_nan=False), highlight=False)
    else:
        title = f"{model} on {arguments.data}, x{scale}, rule {arguments.rule}, LR images {images.lr}"
        if gray:
            title += f", taken as gray: {', '.join(gray)}"
        out.print(title, markup=False, soft_wrap=True)
        out.print(_table(result))
        first = SR_METRICS[0].name
        if result.bicubic and result.bicubic[first] - result.metrics[first] >= LEAST:
            warn(below(result.metrics[first], result.bicubic[first]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("evaluate"),
        description="Super-resolution: PSNR and SSIM on luma, per image and mean, of a trained generator or of bicubic "
        "enlargement. Translation: FID and KID; for pairs also PSNR (RGB) and LPIPS.",
    )
    parser.add_argument(
        "model", nargs="?", action=UserPath, metavar="RUN_OR_CHECKPOINT", help="run folder or .safetensors"
    )
    parser.add_argument("--data", action=UserPath, required=True, help="packed data set, or (SR) folder of HR images")
    parser.add_argument("--baseline", metavar="NAME", help="evaluate this instead of a run: bicubic (give --scale)")
    parser.add_argument("--scale", type=whole, help="super-resolution factor; a network knows its own")
    parser.add_argument(
        "--rule",
        choices=("pisr", "matlab"),
        default="pisr",
        help="pisr (default): the output is rounded to 8 bits, the reference is not, gray images are made RGB; matlab: "
        "both are rounded, gray images are taken as they are",
    )
    translation = parser.add_argument_group("translation", "by default as the run was configured")
    translation.add_argument("--size", type=whole, help="side that test images are resized to, pixels")
    translation.add_argument("--real", choices=("train+test", "test"), help="real images that FID compares with")
    translation.add_argument("--features", choices=("inception", "efficientnet-lite0"), help="inception: FID and KID")
    translation.add_argument("--direction", choices=("AtoB", "BtoA"), help="which domain is translated to which")
    translation.add_argument("--kid", action=argparse.BooleanOptionalAction, help="compute KID beside FID")
    translation.add_argument("--lpips", action=argparse.BooleanOptionalAction, help="compute LPIPS of pairs")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which of a run's weights")
    parser.add_argument("--generator", metavar="NAME", help="which of a run's networks; default: its student")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--save-images", action=UserPath, metavar="DIR", help="write the outputs there as PNG")
    folder = parser.add_argument_group("a folder of HR images")
    folder.add_argument("--flatten", metavar="COLOUR", help="lay transparent pixels over it: white, #808080")
    folder.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do with a bad image (default: stop)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _baseline(arguments: argparse.Namespace) -> tuple[str, nn.Module, int]:
    name, scale = arguments.baseline, arguments.scale
    if arguments.model is not None:
        raise UserError(f"--baseline {name} takes the place of {arguments.model}; give one of the two")
    if name not in BASELINES:
        raise UserError(f"--baseline {name}: unknown; {nearest(name, BASELINES)}")
    if arguments.generator is not None:
        raise UserError(f"--generator {arguments.generator} is for runs; leave it out with --baseline {name}")
    if scale is None:
        raise UserError(f"--baseline {name} has no scale of its own; add --scale 2, 3 or 4")
    if scale not in BASELINE_SCALES:
        raise UserError(f"--scale {scale}: expected one of {', '.join(map(str, BASELINE_SCALES))}")
    from hpcdistill.metrics.sr_evaluation import bicubic_upsampler

    return name, bicubic_upsampler(scale), scale


def _scale_of(generator: nn.Module, path: Path, scale: int | None) -> int:
    own = getattr(generator, "scale", None)
    if not isinstance(own, int):
        raise UserError(f"{path}: a {type(generator).__name__} is no super-resolution network; give one that enlarges")
    if scale not in (None, own):
        raise UserError(f"--scale {scale}: {path} enlarges x{own}; leave --scale out or use a network of x{scale}")
    return own


def _refuse_translation_options(arguments: argparse.Namespace) -> None:
    for name in TRANSLATION_OPTIONS:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} is for networks that translate images; leave it out for super-resolution")


def _refuse_folder_options(arguments: argparse.Namespace) -> None:
    for option, given in (("--flatten", arguments.flatten is not None), ("--on-error", arguments.on_error != "stop")):
        if given:
            raise UserError(f"{option} is for folders of images; {arguments.data} is packed: give it when packing")


def _translation(generator: nn.Module, path: Path, arguments: argparse.Namespace) -> int:
    """Evaluate a network that translates images, and print its numbers with how they were made."""
    from hpcdistill.metrics.trained_translation import TranslationOptions, evaluate_translation

    if arguments.scale is not None:
        raise UserError(f"--scale {arguments.scale}: {path} translates images and enlarges none; leave --scale out")
    if arguments.size is not None and arguments.size < 1:
        raise UserError(f"--size {arguments.size}: must be 1 pixel or more")
    _refuse_folder_options(arguments)
    options = TranslationOptions(**{name: getattr(arguments, name) for name in TRANSLATION_OPTIONS})
    device = _device(arguments.device)
    result, about = evaluate_translation(
        generator, path, arguments.data, options, device, arguments.save_images, rank(), ranks()
    )
    if rank() > 0:
        return 0
    if arguments.json:
        report = {
            **result.metrics,
            "images": result.images,
            "protocol": about,
            "per_image": result.per_image,
            "model": str(path),
            "data": str(arguments.data),
        }
        out.out(json.dumps(report, allow_nan=False), highlight=False)
    else:
        out.print(f"{path} on {arguments.data}", markup=False, soft_wrap=True)
        out.print(_metrics_table(result) if result.metrics else "nothing could be measured")
        out.print(about["note"], markup=False, soft_wrap=True)
    return 0


def _device(asked: str) -> str:
    """Where to compute; several ranks meet here, once everything that they can be wrong about alike has been said."""
    import torch

    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu, or run where there is a GPU")
    device = "cuda" if available and asked != "cpu" else "cpu"
    if ranks() > 1:
        from accelerate import PartialState

        from hpcdistill.ranks.rendezvous import join

        join(device == "cpu", STALL)
        PartialState(cpu=device == "cpu")
    return device


def _metrics_table(result: SetResult) -> Table:
    table = Table()
    table.add_column("metric")
    table.add_column(
        f"mean of {result.images}" if result.per_image else plural(result.images, "image"), justify="right"
    )
    for metric, value in result.metrics.items():
        table.add_row(metric, f"{value:.4f}")
    return table


def _table(result: SetResult) -> Table:
    """A row for each image; the means, and bicubic's, below."""
    table = Table(show_footer=True)
    footer = {f"mean of {result.images}": result.metrics, **({"bicubic": result.bicubic} if result.bicubic else {})}
    table.add_column("image", footer="\n".join(footer))
    for metric in SR_METRICS:
        means = "\n".join(f"{values[metric.name]:.{metric.digits}f}" for values in footer.values())
        table.add_column(escape(metric.label), footer=means, justify="right")
    for row in result.per_image:
        values = (f"{row[metric.name]:.{metric.digits}f}" for metric in SR_METRICS)
        table.add_row(escape(row["name"]), *values)
    return table


if __name__ == "__main__":
    run_command(main)
