"""`hpcdistill evaluate MODEL [MODEL ...] --data SET`: how good trained generators are, or bicubic.

MODEL is a run folder (`runs/<name>-<8 hex>`), a generator's .safetensors file, `pretrained:x4`, a file that
`hpcdistill.export` made, or a folder of pictures that any program has made of the test images and named after them;
LABEL=MODEL calls it LABEL. SET is a packed data set or, for super-resolution, a folder of HR images. Super-resolution
is measured by PSNR and SSIM, translation by FID and KID and, with pairs, PSNR, L1 and LPIPS. Started by torchrun or
srun, the ranks share the images and rank 0 prints.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdistill.command import Parser, UserPath, program, run_command, whole
from hpcdistill.console import out, say, warn
from hpcdistill.errors import UserError, nearest, plural
from hpcdistill.metrics.base import PAIR_METRICS, SR_METRICS, SetResult
from hpcdistill.metrics.reference import BICUBIC, LEAST, below
from hpcdistill.ranks.environment import check_launcher, rank, ranks

if TYPE_CHECKING:
    from hpcdistill.deploy.candidates import Candidate
    from hpcdistill.metrics.sr_test_sets import SRImages
    from hpcdistill.metrics.trained_super_resolution import Source

BASELINES = (BICUBIC,)
BASELINE_SCALES = (2, 3, 4, 8)
TRANSLATION_OPTIONS = ("size", "real", "real_stats", "bits", "features", "direction", "kid", "lpips")
STALL = 600.0  # seconds without an image after which ranks count as hanging


def main(argv: list[str]) -> int:
    """Evaluate what the command line names and print the table, or with --json one JSON object."""
    arguments = _parser().parse_intermixed_args(argv)
    arguments.line = argv
    check_launcher("hpcdistill.evaluate")
    code = _run(arguments)
    if ranks() > 1:
        from hpcdistill.ranks.rendezvous import leave

        leave()
    return code


def _run(arguments: argparse.Namespace) -> int:
    if arguments.baseline is None and not arguments.models:
        raise UserError(
            "nothing to evaluate; name a run folder, a .safetensors file, an exported file, a folder of pictures, or "
            "--baseline bicubic --scale 4"
        )
    if arguments.csv is not None:
        from hpcdistill.metrics.result_tables import check_csv

        check_csv(arguments.csv)
    if arguments.page and ranks() > 1:
        raise UserError(f"--page {arguments.page}: is made by one process; start evaluate without a launcher for it")
    if arguments.page and (arguments.save_images or arguments.baseline):
        other = f"--baseline {arguments.baseline}" if arguments.baseline else f"--save-images {arguments.save_images}"
        raise UserError(f"--page {arguments.page}: is not made together with {other}; leave one of them out")
    from hpcdistill.deploy.candidates import all_translate, open_candidates

    if arguments.baseline is not None:
        candidates = [_baseline(arguments)]
    else:
        candidates = open_candidates(arguments.models, arguments.which, arguments.generator)
    if arguments.save_images and (len(candidates) > 1 or candidates[0].network is None):
        raise UserError(f"--save-images {arguments.save_images}: is for one network; leave it out, or name one MODEL")
    if all_translate(candidates, arguments.data):
        return _translation(candidates, arguments)
    return _super_resolution(candidates, arguments)


def _super_resolution(candidates: list[Candidate], arguments: argparse.Namespace) -> int:
    """Evaluate what enlarges, and print and write what is asked for."""
    from hpcdistill.deploy.candidates import common_scale, sources_of

    scale = common_scale(candidates, arguments.scale)
    if all(candidate.network is None for candidate in candidates):
        _check_baseline_scale(scale)
    _refuse_translation_options(arguments)
    # Imported only now: --help and a misspelt path answer at once.
    from hpcdistill.data.images import colour
    from hpcdistill.data.outputs import check_images_out
    from hpcdistill.metrics.sr_evaluation import bicubic_upsampler
    from hpcdistill.metrics.sr_test_sets import FolderTestSet, load_test_set
    from hpcdistill.metrics.trained_super_resolution import evaluate_super_resolution, saving

    background = colour(arguments.flatten) if arguments.flatten is not None else None
    images = load_test_set(arguments.data, scale, background)
    if not isinstance(images, FolderTestSet):
        _refuse_folder_options(arguments)
    folder: Path | None = arguments.save_images
    if folder:
        check_images_out(folder, images.names, (images.path, images.path / "HR"))
    sources = {BICUBIC: bicubic_upsampler(scale)} | sources_of(candidates, images, background)
    skip = arguments.on_error == "skip"
    if arguments.page:
        results, skipped = _page(candidates, sources, images, arguments)
    else:
        seen = saving(folder, candidates[0].label, images, arguments.rule) if folder else None
        results, skipped = evaluate_super_resolution(
            sources, images, arguments.rule, _device(arguments.device), seen, skip=skip, rank=rank(), ranks=ranks()
        )
    if rank() > 0:
        return 0
    if folder:
        say(f"wrote {plural(results[BICUBIC].images, 'image')} to {folder}")
    if skipped:
        warn(f"{plural(len(skipped), 'image')} {'was' if len(skipped) == 1 else 'were'} skipped: {', '.join(skipped)}")
    _report(candidates, images, results, arguments, {"skipped": skipped} if skip else {})
    return 0


def _report(
    candidates: list[Candidate],
    images: SRImages,
    results: Mapping[str, SetResult],
    arguments: argparse.Namespace,
    further: Mapping[str, Any],
) -> None:
    """Print the table, or the JSON with what is `further` to be said, and write the CSV file."""
    bicubic, scale = results[BICUBIC], images.scale
    gray = images.taken_as_gray(arguments.rule)
    measured = {
        candidate.label: replace(
            results[candidate.label], bicubic=None if candidate.label == BICUBIC else bicubic.metrics
        )
        for candidate in candidates
    }
    _write_csv(arguments.csv, measured, [metric.name for metric in SR_METRICS], bicubic)
    if arguments.json:
        about = {"scale": scale, "rule": arguments.rule}
        end = {"lr": images.lr, "gray": gray, **further}
        _print_json(candidates, arguments.data, [
            {**result.metrics, "images": result.images, **about, "per_image": result.per_image,
             "bicubic": result.bicubic} for result in measured.values()
        ], end)  # fmt: skip
        return
    name = candidates[0].origin if len(candidates) == 1 else plural(len(candidates), "model")
    title = f"{name} on {arguments.data}, x{scale}, rule {arguments.rule}, LR images {images.lr}"
    if gray:
        title += f", taken as gray: {', '.join(gray)}"
    out.print(title, markup=False, soft_wrap=True)
    _print_tables(measured | {BICUBIC: bicubic} if len(measured) > 1 else measured, len(measured))
    first = SR_METRICS[0].name
    for label, result in measured.items():
        if bicubic.metrics[first] - result.metrics[first] >= LEAST:
            line = below(result.metrics[first], bicubic.metrics[first])
            warn(line if len(measured) == 1 else f"{label}: {line}")


def _parser() -> Parser:
    parser = Parser(
        prog=program("evaluate"),
        description="Super-resolution: PSNR and SSIM on luma, per image and mean, of a trained generator or of bicubic "
        "enlargement. Translation: FID and KID; for pairs also PSNR (RGB) and LPIPS.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="[LABEL=]MODEL",
        help="run folder, .safetensors, pretrained:x4, exported file, or folder of pictures with the images' names; of "
        "several, each is compared with the first",
    )
    parser.add_argument("--data", action=UserPath, required=True, help="packed data set, or (SR) folder of HR images")
    parser.add_argument("--baseline", metavar="NAME", help="evaluate this instead of a run: bicubic (give --scale)")
    parser.add_argument("--scale", type=whole, help="super-resolution factor; a network knows its own, pictures do not")
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
    translation.add_argument(
        "--real-stats",
        action=UserPath,
        metavar="FILE",
        help=".npz with mu and sigma of the real images, as published: FID compares with it; there is no KID then",
    )
    translation.add_argument("--bits", choices=("round", "floor"), help="how outputs become 8 bits")
    translation.add_argument("--features", choices=("inception", "efficientnet-lite0"), help="inception: FID and KID")
    translation.add_argument("--direction", choices=("AtoB", "BtoA"), help="which domain is translated to which")
    translation.add_argument("--kid", action=argparse.BooleanOptionalAction, help="compute KID beside FID")
    translation.add_argument("--lpips", action=argparse.BooleanOptionalAction, help="compute LPIPS of pairs")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="which of a run's weights")
    parser.add_argument("--generator", metavar="NAME", help="which of a run's networks; default: its student")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--save-images", action=UserPath, metavar="DIR", help="write the outputs there as PNG")
    parser.add_argument("--csv", action=UserPath, metavar="FILE", help="write a line for each model and image")
    parser.add_argument(
        "--page", action=UserPath, metavar="PAGE", help="(SR) write a page: crops, errors and spectra of each model"
    )
    folder = parser.add_argument_group("a folder of HR images")
    folder.add_argument("--flatten", metavar="COLOUR", help="lay transparent pixels over it: white, #808080")
    folder.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do with a bad image (default: stop)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; of several models their list")
    return parser


def _baseline(arguments: argparse.Namespace) -> Candidate:
    name, scale = arguments.baseline, arguments.scale
    if arguments.models:
        raise UserError(f"--baseline {name} takes the place of {arguments.models[0]}; give one of the two")
    if name not in BASELINES:
        raise UserError(f"--baseline {name}: unknown; {nearest(name, BASELINES)}")
    if arguments.generator is not None:
        raise UserError(f"--generator {arguments.generator} is for runs; leave it out with --baseline {name}")
    if scale is None:
        raise UserError(f"--baseline {name} has no scale of its own; add --scale 2, 3 or 4")
    _check_baseline_scale(scale)
    from hpcdistill.deploy.candidates import Candidate
    from hpcdistill.metrics.sr_evaluation import bicubic_upsampler

    return Candidate(name, name, Path(name), bicubic_upsampler(scale))


def _check_baseline_scale(scale: int) -> None:
    if scale not in BASELINE_SCALES:
        raise UserError(f"--scale {scale}: expected one of {', '.join(map(str, BASELINE_SCALES))}")


def _refuse_translation_options(arguments: argparse.Namespace) -> None:
    for name in TRANSLATION_OPTIONS:
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for networks that translate images; leave it out for super-resolution"
            )


def _refuse_folder_options(arguments: argparse.Namespace) -> None:
    for option, given in (("--flatten", arguments.flatten is not None), ("--on-error", arguments.on_error != "stop")):
        if given:
            raise UserError(f"{option} is for folders of images; {arguments.data} is packed: give it when packing")


def _translation(candidates: list[Candidate], arguments: argparse.Namespace) -> int:
    """Evaluate what translates images, and print its numbers with how they were made."""
    from hpcdistill.metrics.real_side import load_translation_index
    from hpcdistill.metrics.trained_translation import TranslationOptions, evaluate_translation

    if arguments.scale is not None:
        raise UserError(
            f"--scale {arguments.scale}: {candidates[0].path} translates images and enlarges none; leave --scale out"
        )
    if arguments.page:
        raise UserError(
            f"--page {arguments.page}: is of super-resolution; leave it out, `{program('figures')}` makes a page of "
            "networks that translate"
        )
    if arguments.size is not None and arguments.size < 1:
        raise UserError(f"--size {arguments.size}: must be 1 pixel or more")
    if arguments.real_stats is not None and (arguments.real or arguments.kid):
        other = f"--real {arguments.real}" if arguments.real else "--kid"
        raise UserError(f"--real-stats {arguments.real_stats}: takes the place of the real images; leave {other} out")
    _refuse_folder_options(arguments)
    if arguments.csv and load_translation_index(arguments.data, None, "--data").kind == "unpaired":
        raise UserError(f"--csv {arguments.csv}: without pairs nothing is measured of one image; leave it out")
    options = TranslationOptions(**{name: getattr(arguments, name) for name in TRANSLATION_OPTIONS})
    device = _device(arguments.device)
    results: dict[str, SetResult] = {}
    about: dict[str, dict[str, Any]] = {}
    opened: dict[str, Any] = {}
    for one in candidates:
        results[one.label], about[one.label] = evaluate_translation(
            one.network, one.path, arguments.data, options, device, arguments.save_images, rank(), ranks(), opened
        )
    if rank() > 0:
        return 0
    first = results[candidates[0].label]
    if first.per_image:
        _write_csv(arguments.csv, results, [name for name in first.per_image[0] if name != "name"])
    if arguments.json:
        _print_json(candidates, arguments.data, [
            {**result.metrics, "images": result.images, "protocol": about[label], "per_image": result.per_image}
            for label, result in results.items()
        ])  # fmt: skip
        return 0
    name = candidates[0].origin if len(candidates) == 1 else plural(len(candidates), "model")
    out.print(f"{name} on {arguments.data}", markup=False, soft_wrap=True)
    if first.metrics:
        _print_tables(results, len(results))
    else:
        out.print("nothing could be measured")
    notes = {label: said["note"] for label, said in about.items()}
    for label, note in notes.items() if len(set(notes.values())) > 1 else [("", notes[candidates[0].label])]:
        out.print(f"{label}: {note}" if label else note, markup=False, soft_wrap=True)
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


def _page(
    candidates: list[Candidate], sources: Mapping[str, Source], images: SRImages, arguments: argparse.Namespace
) -> tuple[dict[str, SetResult], list[str]]:
    """Measure, and write the page that shows where the candidates differ."""
    from hpcdistill.sweep.figures import Figures, check_figures_page, figures_page
    from hpcdistill.sweep.report import write_page

    check_figures_page(arguments.page, "--page")
    figures = Figures(candidates, sources, images, arguments.rule, device=_device(arguments.device))
    results, skipped = figures.measure(skip=arguments.on_error == "skip")
    command = f"{program('evaluate')} {shlex.join(arguments.line)}"
    write_page(arguments.page, figures_page([figures], arguments.data, command))
    say(f"look at {arguments.page}")
    return results, skipped


def _write_csv(
    path: Path | None, results: Mapping[str, SetResult], metrics: Sequence[str], bicubic: SetResult | None = None
) -> None:
    if path is not None:
        from hpcdistill.metrics.result_tables import write_csv

        write_csv(path, results, metrics, bicubic)
        say(f"wrote {path}")


def _print_json(
    candidates: Sequence[Candidate],
    data: Path,
    reports: Sequence[dict[str, Any]],
    end: Mapping[str, Any] | None = None,
) -> None:
    """One object: of one model its report, of several `{"models": [...]}` with such reports and their labels."""
    whole_reports = [
        {**report, "model": candidate.origin, "data": str(data), **(end or {})}
        for candidate, report in zip(candidates, reports, strict=True)
    ]
    value: dict[str, Any] = whole_reports[0]
    if len(candidates) > 1:
        labelled = zip(candidates, whole_reports, strict=True)
        value = {"models": [{"label": candidate.label, **report} for candidate, report in labelled]}
    out.out(json.dumps(value, allow_nan=False), highlight=False)


def _print_tables(results: Mapping[str, SetResult], models: int) -> None:
    """The table of one model, or of several: their means, and each image beside the first one's."""
    from hpcdistill.metrics.result_tables import images_table, metrics_table, models_table, one_table

    first = next(iter(results.values()))
    if models == 1:
        out.print(one_table(first, SR_METRICS) if "ssim" in first.metrics else metrics_table(first))
        return
    known = SR_METRICS if "ssim" in first.metrics else PAIR_METRICS
    out.print(models_table(results, known))
    if first.per_image:
        out.print(images_table(results, known[0]))


if __name__ == "__main__":
    run_command(main)
