"""Get everything that runs need, on a machine with a network: `hpcdistill prefetch CONFIG [CONFIG ...]`.

Takes the command line of hpcdistill.train, or several configurations one after the other; overlays and overrides belong
to the configuration before them; with --grid, to every run of the grids. Data sets are fetched and packed, published
weights are fetched, all below one folder, $HPCDISTILL_DATA; a compute node without a network finds them there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcdistill.command import Parser, program, run_command
from hpcdistill.config import split_runs
from hpcdistill.console import Table, out, say
from hpcdistill.data.fetch.location import is_remote
from hpcdistill.data.fetch.weights import WEIGHTS, fetch_weights
from hpcdistill.data.pack.fetching import obtain, wanted_at
from hpcdistill.data.places import VARIABLE, data_root
from hpcdistill.errors import UserError, nearest
from hpcdistill.requirements import check_obtainable, is_there, needed_sets, needed_weights
from hpcdistill.run import load_run
from hpcdistill.sweep.grid import load_grids
from hpcdistill.sweep.plan import make_plan


def main(arguments: list[str]) -> None:
    weights = "\n".join(f"  {name:<10} {known.title}" for name, known in WEIGHTS.items())
    parser = Parser(
        prog=program("prefetch"),
        description=__doc__,
        epilog=f"published weights:\n{weights}\n\nEverything lies below ${VARIABLE} (now {data_root()}).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="*", metavar="CONFIG|key=value", help="configuration files and overrides")
    parser.add_argument("--grid", nargs="+", default=[], metavar="GRID", help="what all runs of these grids need")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME", help="published weights to fetch besides")
    parser.add_argument("--mirror", metavar="ADDRESS", help="try ADDRESS/<file> first; checksums are compared as ever")
    options = parser.parse_intermixed_args(arguments)
    if not options.config and not options.weights and not options.grid:
        raise UserError("nothing to fetch: give the configurations you want to run, --grid GRID or --weights NAME")
    for name in options.weights:
        if name not in WEIGHTS:
            raise UserError(f"--weights {name}: unknown; {nearest(name, WEIGHTS)}")
    if options.grid:
        runs = [run.loaded for run in make_plan(load_grids(options.grid), None, options.config).runs.values()]
    else:
        runs = [load_run(run) for run in split_runs(options.config)]
    places = list(dict.fromkeys(place for run in runs for place in needed_sets(run)))
    names = list(dict.fromkeys([*options.weights, *(name for run in runs for name in needed_weights(run))]))
    check_obtainable(places)  # before hours of downloading, not after them
    table = Table("needed", "state")
    for place in places:
        table.add_row(place, _prefetch_set(place, options.mirror))
    for name in names:
        table.add_row(f"weights {name}", str(fetch_weights(name, options.mirror)))
    out.print(table)
    say(f"all is there; on a machine without a network set {VARIABLE}={data_root().resolve()}")


def _prefetch_set(place: str, mirror: str | None) -> str:
    folder = Path(place)
    if is_remote(place):
        return "read from its address"
    if is_there(place):
        return "here"
    wanted = wanted_at(folder)
    assert wanted is not None
    obtain(wanted.recipe, wanted.out, mirror=mirror)
    return "packed"


if __name__ == "__main__":
    run_command(main)
