"""`hpcdistill demo`: from photographs to a distilled student, a table and a page, in a few minutes on a CPU.

Trains plain FSRCNN, a DSSD teacher and a DSSD student at x4 by the very configurations and commands that everything
else uses, and measures them on photographs that were not trained on. The same command again uses what is finished.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from hpcdistill.command import Parser, UserPath, positive, program, run_command
from hpcdistill.console import say


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    parser = demo_parser("demo", __doc__, Path("runs/demo"), "configs/variants/demo.yaml")
    parser.add_argument(
        "--data",
        action=UserPath,
        metavar="DIR",
        help="folder of packed sets, where photos/ lies or will be packed; default: $HPCDISTILL_DATA or data/packed",
    )
    options = parser.parse_args(argv)
    say(f"the demo: x4 super-resolution, a few minutes on two CPU cores; everything goes to {options.out}")
    # Imported only now: --help answers at once.
    from hpcdistill.sweep.demos.super_resolution import run_demo

    return timed(run_demo, options, "the demo")


def demo_parser(command: str, text: str, out: Path, variant: str) -> Parser:
    """The options that every demo has; `out`: where its files go by default, `variant`: what it trains."""
    parser = Parser(prog=program(command), description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", action=UserPath, default=out, metavar="DIR", help=f"default: {out}")
    parser.add_argument("--steps", type=positive, metavar="N", help=f"steps; default: as {variant} says")
    return parser


def timed(run_demo: Callable[[argparse.Namespace], int], options: argparse.Namespace, name: str) -> int:
    """Run the demo unless its page would replace somebody else's, and say how long it took; returns the exit code."""
    from hpcdistill.data.outputs import check_page
    from hpcdistill.sweep.demos.base import clock

    started = time.perf_counter()
    check_page(options.out / "report" / "index.html")
    code = run_demo(options)
    if code == 0:
        say(f"{name} took {clock(time.perf_counter() - started)}")
    return code


def start(argv: list[str]) -> int:
    """`main` in a process of its own."""
    few_threads()
    return main(argv)


def few_threads() -> None:
    """Call it before torch is loaded, as OpenMP reads this once.

    Networks this small gain nothing from more threads, and threads that spin while they wait make a training beside
    other work three times as slow.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    run_command(start)
