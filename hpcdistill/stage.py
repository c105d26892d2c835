"""Copy packed data sets to node-local scratch, or clean it: `python shards/stage.py DIR [DIR ...] --to SCRATCH`."""

from __future__ import annotations

from pathlib import Path

from hpcdistill.command import Parser, UserPath, program, run_command
from hpcdistill.console import out, say
from hpcdistill.data.check.verify import data_sets
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.read.staging import clean, stage
from hpcdistill.errors import plural
from hpcdistill.storage import user_place


def main(arguments: list[str]) -> None:
    parser = Parser(
        prog=program("stage"),
        description="Copy packed data sets to a folder on this node's own disk, verified, and print where they are. "
        "A training does the same by itself with data.stage=SCRATCH, and finds what was staged here.",
        epilog="Stopped or killed, the same command goes on where it was. See docs/data.md.",
    )
    parser.add_argument(
        "places", nargs="*", metavar="DIR", help="packed data sets or folders of their splits; http(s) addresses too"
    )
    parser.add_argument("--to", action=UserPath, required=True, metavar="SCRATCH", help="folder on the node's own disk")
    parser.add_argument(
        "--clean", action="store_true", help="remove the staged sets in SCRATCH that no running process uses"
    )
    options = parser.parse_args(arguments)
    if bool(options.places) == options.clean:
        parser.error("give either data sets to copy, or --clean")
    if options.clean:
        removed = clean(options.to)
        say(f"{options.to}: {plural(len(removed), 'staged data set')} removed")
        return
    for place in map(user_place, options.places):
        for one in [place] if is_remote(place) else map(str, data_sets(Path(place))):
            out.print(str(stage(one, options.to)), markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
