"""Measure what a configuration's networks take: `python -m hpcdistill.benchmark COMMAND ...`.

`cost CONFIG [CONFIG ...] [key=value ...]` counts parameters and multiply-accumulates; it needs no data, no weights
and no training.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.table import Table

from hpcdistill.command import run_command
from hpcdistill.config import configured_generators, load_config
from hpcdistill.console import out

if TYPE_CHECKING:
    from torch import nn

    from hpcdistill.metrics.cost import Cost

COST_RULES = """\
MACs: multiply-accumulates of the convolutions for one output image of {width}x{height}; nothing else is counted.
  literature: a transposed convolution is charged as a convolution at the size of its output
  true:       the multiplications that it takes, stride x stride times fewer
A teacher's MACs are those of its path from its input to the image; its parameters are all that were trained.
"""
# The one number that the papers' tables repeat at every scale.
FSRCNN_AS_PRINTED = "The papers print 6.0 G for FSRCNN (luma) at every scale: that is x2 by the literature's rule.\n"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hpcdistill.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    cost = commands.add_parser("cost", help="parameters and multiply-accumulates of a configuration's networks")
    cost.add_argument("config", nargs="+", metavar="CONFIG|key=value", help="configuration files and overrides")
    cost.add_argument("--json", action="store_true", help="print one JSON object")
    cost.set_defaults(run=_cost)
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


def _cost(options: argparse.Namespace) -> None:
    networks = configured_generators(load_config(options.config))
    # Imported only now: --help and a misspelt configuration answer at once.
    from hpcdistill.metrics.cost import OUTPUT_SIZE, super_resolution_cost

    costs = {name: super_resolution_cost(network) for name, network in networks.items()}
    if options.json:
        out.out(json.dumps({name: cost._asdict() for name, cost in costs.items()}), highlight=False)
        return
    out.print(_cost_table(networks, costs))
    height, width = OUTPUT_SIZE
    out.print(COST_RULES.format(width=width, height=height), markup=False, soft_wrap=True, end="")
    if any(type(network).__name__ == "FSRCNN" for network in networks.values()):
        out.print(FSRCNN_AS_PRINTED, markup=False, soft_wrap=True, end="")


def _cost_table(networks: dict[str, nn.Module], costs: dict[str, Cost]) -> Table:
    table = Table()
    table.add_column("network")
    for heading in ("parameters", "MACs, literature", "MACs, true"):
        table.add_column(heading, justify="right")
    for name, cost in costs.items():
        kind = f"{name}: {type(networks[name]).__name__} x{networks[name].scale}"
        table.add_row(kind, f"{cost.params:,}", f"{cost.macs / 1e9:,.3f} G", f"{cost.true_macs / 1e9:,.3f} G")
    return table


if __name__ == "__main__":
    run_command(main)
