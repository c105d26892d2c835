"""`python -m hpcdistill.figures RUN [RUN ...] --images SET`: what super-resolution runs make of images, as one page.

Magnified crops of every method side by side at the place where they differ most (figure 6 of the DSSD paper), and the
LR image that each teacher's encoder makes of the HR image, beside bicubic's (figure 5). RUN is a run folder, a
generator's .safetensors file, or LABEL=either; a student's teacher is found beside its run. SET: a folder of HR images,
or a packed data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcdistill.command import UserPath, positive, program, run_command
from hpcdistill.console import say
from hpcdistill.errors import UserError
from hpcdistill.storage import user_path
from hpcdistill.sweep.crop import SMALLEST_CROP, parse_crop


def main(argv: list[str]) -> int:
    """Measure, and write the page; returns the exit code."""
    options = _parser().parse_args(argv)
    crops = [parse_crop(text) for text in options.crop]
    if options.side < SMALLEST_CROP:
        raise UserError(f"--side {options.side}: too small to see anything; use {SMALLEST_CROP} pixels or more")
    # Imported only now: --help and a misspelt option answer at once.
    from hpcdistill.data.outputs import check_page
    from hpcdistill.sweep.figures import figures_page, open_runs
    from hpcdistill.sweep.report import write_page

    if options.out.is_dir():
        raise UserError(f"--out {options.out}: is a folder; name the page, e.g. {options.out / 'figures.html'}")
    check_page(options.out)
    runs = open_runs([split_label(word) for word in options.runs], options.which)
    page = figures_page(runs, options, crops, argv)
    write_page(options.out, page)
    say(f"look at {options.out}")
    return 0


def split_label(word: str) -> tuple[str | None, Path]:
    """The label and the path of `LABEL=RUN`, or of a RUN alone."""
    path = user_path(word)
    label, equals, rest = word.partition("=")
    if path.exists() or not equals or not label:
        return None, path
    return label, user_path(rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("figures"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="run folders or .safetensors files")
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
    return parser


if __name__ == "__main__":
    run_command(main)
