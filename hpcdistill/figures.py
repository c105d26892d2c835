"""`hpcdistill figures MODEL [MODEL ...] --images SET`: what networks make of the same images, as one page.

MODEL is whatever `evaluate` takes: a run folder, a generator's .safetensors file, an exported file, a folder of
pictures, or LABEL=any of these.

Super-resolution: magnified crops of every method side by side at the place where they differ most (figure 6 of the DSSD
paper), how far each is from HR there, the radial spectra, and the LR image that each teacher's encoder makes of the HR
image, beside bicubic's (figure 5); a student's teacher is found beside its run. SET: a folder of HR images, or packed.

Translation (figures 5 to 7 of the FESD paper): input, target of a pair, and what every method makes of it, whole and
magnified where the input has most contrast, in both directions where a run has both; and the same as one PNG beside the
page. SET: packed.
"""

from __future__ import annotations

import argparse
import shlex
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from hpcdistill.command import Parser, UserPath, positive, program, run_command
from hpcdistill.console import say
from hpcdistill.errors import UserError
from hpcdistill.sweep.crop import SMALLEST_CROP, Wanted, parse_crop

if TYPE_CHECKING:
    from hpcdistill.deploy.candidates import Candidate

TRANSLATION_OPTIONS = ("teachers", "size", "direction")


def main(argv: list[str]) -> int:
    """Compute, and write the page; returns the exit code."""
    options = _parser().parse_intermixed_args(argv)
    crops = [parse_crop(text) for text in options.crop]
    if options.side is not None and options.side < SMALLEST_CROP:
        raise UserError(f"--side {options.side}: too small to see anything; use {SMALLEST_CROP} pixels or more")
    # Imported only now: --help and a misspelt option answer at once.
    from hpcdistill.deploy.candidates import all_translate, open_candidates
    from hpcdistill.sweep.figures import check_figures_page

    check_figures_page(options.out, "--out")
    command = f"{program('figures')} {shlex.join(argv)}"
    given = open_candidates(options.models, options.which)
    if all_translate(given, options.images):
        return _translation(given, crops, options, command)
    return _super_resolution(given, crops, options, command)


def _super_resolution(given: list[Candidate], crops: list[Wanted], options: argparse.Namespace, command: str) -> int:
    """The page of what enlarges."""
    from hpcdistill.deploy.candidates import common_scale, sources_of, split_label
    from hpcdistill.metrics.sr_test_sets import load_test_set
    from hpcdistill.sweep.figures import SIDE, Figures, figures_page, with_teachers
    from hpcdistill.sweep.report import write_page

    for name in TRANSLATION_OPTIONS:
        if getattr(options, name):
            raise UserError(f"--{name} is for networks that translate images; leave it out for super-resolution")
    candidates = with_teachers(given, [split_label(word)[1] for word in options.models], options.which)
    parts = [candidates]  # pictures have no scale of their own: with them there is but one
    if all(one.network is not None for one in candidates):
        candidates.sort(key=lambda one: one.scale or 0)
        parts = [list(members) for _, members in groupby(candidates, key=lambda one: one.scale)]
    figures = []
    for members in parts:
        images = load_test_set(options.images, common_scale(members, options.scale))
        part = Figures(
            members,
            sources_of(members, images),
            images,
            options.rule,
            options.pictures,
            options.side or SIDE,
            crops,
            shown=options.show,
        )
        part.measure()
        figures.append(part)
    write_page(options.out, figures_page(figures, options.images, command))
    say(f"look at {options.out}")
    return 0


def _translation(given: list[Candidate], crops: list[Wanted], options: argparse.Namespace, command: str) -> int:
    """The page of what translates, and the same as one picture beside it."""
    from hpcdistill.data.outputs import check_picture, save_image
    from hpcdistill.sweep.report import write_page
    from hpcdistill.sweep.translation_figures import TranslationFigures, with_teachers_beside
    from hpcdistill.sweep.translation_page import translation_page, translation_picture

    if options.scale is not None:
        raise UserError(f"--scale {options.scale}: {given[0].label} translates images and enlarges none; leave it out")
    picture = options.out.with_suffix(".png")
    if picture == options.out:
        raise UserError(f"--out {options.out}: names the page, and the picture is put beside it; end it in .html")
    check_picture(picture, f"--out {options.out}")
    candidates = with_teachers_beside(given, options.which) if options.teachers else given
    figures = TranslationFigures(
        candidates,
        options.images,
        options.size,
        options.direction,
        options.pictures,
        options.side,
        crops,
        options.show,
    )
    write_page(options.out, translation_page(figures, options.which, command))
    save_image(picture.parent, picture.stem, translation_picture(figures))
    say(f"look at {options.out}; as one picture: {picture}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog=program("figures"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[LABEL=]MODEL",
        help="run folders, .safetensors, exported files, folders of pictures",
    )
    parser.add_argument(
        "--images", action=UserPath, required=True, metavar="SET", help="packed data set, or (SR) folder of HR images"
    )
    parser.add_argument(
        "--out", action=UserPath, default=Path("figures.html"), metavar="PAGE", help="default: figures.html"
    )
    parser.add_argument(
        "--crop",
        action="append",
        default=[],
        metavar="IMAGE:TOP,LEFT,SIDE",
        help="show this place, in pixels (SR: of HR); may be given again. Default: where the methods differ most "
        "(translation: where the input has most contrast)",
    )
    parser.add_argument(
        "--show",
        action="append",
        default=[],
        metavar="IMAGE",
        help="show this image, by its name or its number from 0; may be given again. Default: where the methods differ "
        "most (translation: images spread evenly over the set)",
    )
    parser.add_argument("--pictures", type=positive, default=3, metavar="N", help="images that are chosen; default: 3")
    parser.add_argument(
        "--side",
        type=positive,
        metavar="PIXELS",
        help="of a crop that is chosen; default: 64 (translation: a quarter of the image)",
    )
    parser.add_argument(
        "--which", choices=("best", "last"), default="last", help="which of a run's weights; default: last"
    )
    parser.add_argument("--rule", choices=("pisr", "matlab"), default="pisr", help="(SR) of PSNR and SSIM: evaluate's")
    parser.add_argument("--scale", type=positive, help="(SR) of folders of pictures alone; a network knows its own")
    translation = parser.add_argument_group("translation", "size and direction by default as the runs were configured")
    translation.add_argument("--teachers", action="store_true", help="show the teachers of students beside them")
    translation.add_argument("--size", type=positive, metavar="PIXELS", help="side that test images are resized to")
    translation.add_argument("--direction", choices=("AtoB", "BtoA"), help="which domain is translated to which")
    return parser


if __name__ == "__main__":
    run_command(main)
