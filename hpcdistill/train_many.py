"""Train several runs side by side, in one process on one device: small networks leave most of it idle alone.

What stands before the options holds for every run. Each run has its own folder, log and checkpoints: it is the very run
that `hpcdistill train` makes alone, and either command goes on with what the other has begun. A run that fails does not
end the others. The same command again resumes.
"""

from __future__ import annotations

import argparse
import shlex
import threading
from pathlib import Path

from hpcdistill.command import Parser, program, run_command, whole
from hpcdistill.console import say, warn
from hpcdistill.errors import EXIT_FAILED, EXIT_STOPPED, UserError
from hpcdistill.run import Run, load_run
from hpcdistill.storage import write_json

_EXAMPLES = """\
examples:
  python -m hpcdistill.train_many configs/fsrcnn/x4.yaml --seeds 0 1 2 3
  python -m hpcdistill.train_many configs/dssd/x4.yaml --cell method.weight_vid=1e-6 --cell method.weight_vid=2e-6
"""


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    runs = [load_run(words) for words in _commands(options)]
    if options.log and len(options.log) != len(runs):
        raise UserError(f"--log: named {len(options.log)} times for {len(runs)} runs; give each run its own")
    # Imported only now: a misspelt configuration is refused without torch.
    from hpcdistill.ranks.signals import StopSignals
    from hpcdistill.side_by_side import Cell, train_side_by_side

    logs: list[Path | None] = [*map(Path, options.log)] or [None] * len(runs)

    def note(_: Cell | None = None) -> None:
        if options.outcomes:
            said = [{"run": str(cell.run.folder), "code": cell.ended.code if cell.ended else None} for cell in cells]
            with writing:
                write_json(Path(options.outcomes), said)

    writing = threading.Lock()
    cells = [Cell(run, log, told=note) for run, log in zip(runs, logs, strict=True)]
    note()
    with StopSignals(last=True) as signals:
        train_side_by_side(cells, signals)
    for cell in cells:
        _say_end(cell.run, cell.ended.code if cell.ended else EXIT_FAILED, cell.ended.message if cell.ended else None)
    codes = {cell.ended.code if cell.ended else EXIT_FAILED for cell in cells}
    return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_FAILED if codes != {0} else 0


def _parser() -> Parser:
    parser = Parser(
        prog=program("train-many"),
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="*", metavar="CONFIG|key=value", help="configurations and overrides of all runs"
    )
    parser.add_argument("--seeds", nargs="+", type=whole, metavar="N", help="a run for each of these seeds")
    parser.add_argument(
        "--cell",
        action="append",
        default=[],
        metavar="WORDS",
        help="a run (for each seed) with these words, laid over the others: files and overrides, quoted together",
    )
    parser.add_argument(
        "--log", action="append", default=[], metavar="FILE", help="where each run's lines go (default: the terminal)"
    )
    parser.add_argument(
        "--outcomes", metavar="FILE", help="JSON: each run's folder, and its exit code once it has ended"
    )
    return parser


def _commands(options: argparse.Namespace) -> list[list[str]]:
    """What `hpcdistill train` would be given for each of the runs."""
    cells = [_words(cell) for cell in options.cell] or [[]]
    seeds = [[f"seed={seed}"] for seed in options.seeds] if options.seeds else [[]]
    commands = [[*options.config, *cell, *seed] for cell in cells for seed in seeds]
    if not all(commands):
        raise UserError("no configuration; name a file, and --seeds or --cell for each run")
    return commands


def _words(cell: str) -> list[str]:
    """The words of one --cell."""
    try:
        return shlex.split(cell)
    except ValueError as error:  # a quote that is not closed
        raise UserError(f"--cell {cell}: {error}; quote its words as in a shell") from None


def _say_end(run: Run, code: int, message: str | None) -> None:
    if code == 0:
        say(f"{run.folder}: finished")
    elif code == EXIT_STOPPED:
        say(f"{run.folder}: stopped; the same command goes on from here")
    else:
        warn(f"{run.folder}: failed: {message}")


if __name__ == "__main__":
    run_command(main)
