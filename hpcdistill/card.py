"""`hpcdistill card MODEL --out hub/`: a folder to publish a trained network with, in the form of Hugging Face's hub.

README.md (the hub's fields, how to use it, what it eats, how good it is and how that was measured, training, licence,
limits), config.json, model.safetensors and LICENSE. Nothing is uploaded, and nothing is made up: what was not recorded
is said to be so. `hpcdistill.load("hub/")` and every command that takes a network take the folder.
"""

from __future__ import annotations

import argparse

from hpcdistill.command import Parser, UserPath, program, run_command
from hpcdistill.console import say, warn
from hpcdistill.errors import plural


def main(argv: list[str]) -> int:
    """Write the folder; returns the exit code."""
    options = _parser().parse_args(argv)
    # Imported only now: --help answers at once.
    from hpcdistill.deploy.card import write_card
    from hpcdistill.deploy.description import UNKNOWN

    about, known = write_card(options.model, options.out, options.which, options.generator)
    if not known.finished:
        warn(f"{options.model}: its run has not finished; the card says so, and has no numbers")
    if about.licence == UNKNOWN:
        warn("what the training data may be used for is not recorded; find out before you publish the weights")
    say(f"{options.out}: {about.network} x{about.scale}" if about.scale > 1 else f"{options.out}: {about.network}")
    say(f"{plural(len(known.measured), 'number')} with their protocol; nothing was uploaded: read README.md first")
    return 0


def _parser() -> Parser:
    parser = Parser(prog=program("card"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="run folder, generator's .safetensors file, or pretrained:x4")
    parser.add_argument("--out", action=UserPath, required=True, metavar="DIR", help="an empty folder, or a card's")
    parser.add_argument("--which", choices=("best", "last"), help="which of a run's weights; default: best, else last")
    parser.add_argument("--generator", metavar="NAME", help="which of a run's networks; default: its student")
    return parser


if __name__ == "__main__":
    run_command(main)
