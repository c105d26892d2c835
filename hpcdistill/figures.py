"""`hpcdistill figures MODEL [MODEL ...] --images SET`: what super-resolution makes of images, as one page.

Magnified crops of every method side by side at the place where they differ most (figure 6 of the DSSD paper), how far
each is from HR there, the radial spectra, and the LR image that each teacher's encoder makes of the HR image, beside
bicubic's (figure 5). MODEL is whatever `evaluate` takes: a run folder, a generator's .safetensors file, an exported
file, a folder of pictures, or LABEL=any of these; a student's teacher is found beside its run. SET: a folder of HR
images, or a packed data set.
"""

from __future__ import annotations

import argparse
import shlex
from itertools import groupby
from pathlib import Path

from hpcdistill.command import Parser, UserPath, positive, program, run_command
from hpcdistill.console import say
from hpcdistill.errors import UserError
from hpcdistill.sweep.crop import SMALLEST_CROP, parse_crop


def main(argv: list[str]) -> int:
    """Measure, and write the page; returns the exit code."""
    options = _parser().parse_intermixed_args(argv)
    crops = [parse_crop(text) for text in options.crop]
    if options.side < SMALLEST_CROP:
        raise UserError(f"--side {options.side}: too small to see anything; use {SMALLEST_CROP} pixels or more")
    # Imported only now: --help and a misspelt option answer at once.
    from hpcdistill.deploy.candidates import common_scale, open_candidates, sources_of, split_label
    from hpcdistill.metrics.sr_test_sets import load_test_set
    from hpcdistill.sweep.figures import Figures, check_figures_page, figures_page, with_teachers
    from hpcdistill.sweep.report import write_page

    check_figures_page(options.out, "--out")
    given = open_candidates(options.models, options.which)
    candidates = with_teachers(given, [split_label(word)[1] for word in options.models], options.which)
    parts = [candidates]  # pictures have no scale of their own: with them there is but one
    if all(one.network is not None for one in candidates):
        candidates.sort(key=lambda one: one.scale or 0)
        parts = [list(members) for _, members in groupby(candidates, key=lambda one: one.scale)]
    figures = []
    for members in parts:
        images = load_test_set(options.images, common_scale(members, options.scale))
        part = Figures(
            members, sources_of(members, images), images, options.rule, options.pictures, options.side, crops
        )
        part.measure()
        figures.append(part)
    command = f"{program('figures')} {shlex.join(argv)}"
    write_page(options.out, figures_page(figures, options.images, command))
    say(f"look at {options.out}")
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
        "--images", action=UserPath, required=True, metavar="SET", help="folder of HR images, or packed"
    )
    parser.add_argument(
        "--out", action=UserPath, default=Path("figures.html"), metavar="PAGE", help="default: figures.html"
    )
    parser.add_argument(
        "--crop",
        action="append",
        default=[],
        metavar="IMAGE:TOP,LEFT,SIDE",
        help="show this place, HR pixels; may be given again. Default: where the methods differ most",
    )
    parser.add_argument("--pictures", type=positive, default=3, metavar="N", help="images that are chosen; default: 3")
    parser.add_argument(
        "--side", type=positive, default=64, metavar="PIXELS", help="of a crop that is chosen; default: 64"
    )
    parser.add_argument(
        "--which", choices=("best", "last"), default="last", help="which of a run's weights; default: last"
    )
    parser.add_argument("--rule", choices=("pisr", "matlab"), default="pisr", help="of PSNR and SSIM, as evaluate's")
    parser.add_argument("--scale", type=positive, help="of folders of pictures alone; a network knows its own")
    return parser


if __name__ == "__main__":
    run_command(main)
