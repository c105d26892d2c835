"""`hpcdistill demo-gan`: from nothing to a distilled image translator and a page, in minutes on a CPU.

Draws outlines of shapes and trains FESD-Pix2Pix (a teacher, a student and their discriminator, together) to paint
them, by the very configuration and command that everything else uses. It says whether the student learned to, on
drawings it has not seen. The same command again goes on, or uses what is finished.
"""

from __future__ import annotations

from pathlib import Path

from hpcdistill.command import positive, run_command
from hpcdistill.console import say
from hpcdistill.demo import demo_parser, few_threads, timed


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    variant = "configs/variants/demo-gan.yaml"
    parser = demo_parser("demo-gan", __doc__, Path("runs/demo-gan"), variant)
    parser.add_argument("--seed", type=positive, metavar="N", help="of the training, not of the pictures; default: 0")
    options = parser.parse_args(argv)
    say(f"the GAN demo: from outlines to paintings, minutes on two CPU cores; everything goes to {options.out}")
    # Imported only now: --help answers at once.
    from hpcdistill.sweep.demos.translation import run_demo

    return timed(run_demo, options, "the GAN demo")


def start(argv: list[str]) -> int:
    """`main` in a process of its own."""
    few_threads()
    return main(argv)


if __name__ == "__main__":
    run_command(start)
