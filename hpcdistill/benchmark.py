"""Measure what a configuration's networks take: `python -m hpcdistill.benchmark COMMAND ...`.

`cost CONFIG [CONFIG ...] [key=value ...]` counts parameters and multiply-accumulates; it needs no data, no weights
and no training.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from hpcdistill.command import program, run_command
from hpcdistill.console import Table, out
from hpcdistill.run import Run, load_run

if TYPE_CHECKING:
    from torch import nn

    from hpcdistill.metrics.cost import Cost

COST_RULES = """\
MACs: multiply-accumulates of the convolutions for one {size}; nothing else is counted.
  literature: a transposed convolution is charged as a convolution at the size of its output
  true:       the multiplications that it takes, stride x stride times fewer
"""
# A privileged teacher has parts that make no image.
PRIVILEGED_RULE = (
    "A teacher's MACs are those of its path from its input to the image; its parameters are all that were trained.\n"
)
# The one number that the papers' tables repeat at every scale.
FSRCNN_AS_PRINTED = "The papers print 6.0 G for FSRCNN (luma) at every scale: that is x2 by the literature's rule.\n"
UNET_PRINTED_AS = "UNetGenerator\n  ngf 64"
UNET_AS_PRINTED = "The paper prints 18.60 G for the U-Net with ngf 64; no counting that was tried gives it.\n"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("benchmark"),
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
    networks = _measured(load_run(options.config))
    # Imported only now: --help and a misspelt configuration answer at once.
    from hpcdistill.metrics.cost import IMAGE_SIZE, OUTPUT_SIZE, network_cost, takes_images

    costs = {name: network_cost(network) for name, network in networks.items()}
    if options.json:
        out.out(json.dumps({name: cost._asdict() for name, cost in costs.items()}), highlight=False)
        return
    out.print(_cost_table(networks, costs))
    of_images = any(takes_images(network) for network in networks.values())
    height, width = IMAGE_SIZE if of_images else OUTPUT_SIZE
    size = f"{'input' if of_images else 'output'} image of {width}x{height}"
    out.print(COST_RULES.format(size=size), markup=False, soft_wrap=True, end="")
    if not of_images:
        out.print(PRIVILEGED_RULE, markup=False, soft_wrap=True, end="")
    if any(type(network).__name__ == "FSRCNN" for network in networks.values()):
        out.print(FSRCNN_AS_PRINTED, markup=False, soft_wrap=True, end="")
    if any(_described(network) == UNET_PRINTED_AS for network in networks.values()):
        out.print(UNET_AS_PRINTED, markup=False, soft_wrap=True, end="")


def _measured(run: Run) -> dict[str, nn.Module]:
    """The networks that the configuration's method wants measured and, by role, those of its teachers."""
    method = run.untrained()  # and every check of the configuration
    return {**method.measured, **{role: teacher.untrained() for role, teacher in run.teachers.items()}}


def _cost_table(networks: dict[str, nn.Module], costs: dict[str, Cost]) -> Table:
    table = Table()
    table.add_column("network")
    for heading in ("parameters", "MACs, literature", "MACs, true"):
        table.add_column(heading, justify="right")
    for name, cost in costs.items():
        table.add_row(
            f"{name}: {_described(networks[name])}",
            f"{cost.params:,}",
            f"{cost.macs / 1e9:,.3f} G",
            f"{cost.true_macs / 1e9:,.3f} G",
        )
    return table


def _described(network: nn.Module) -> str:
    """The class and what tells networks of one class apart, widths on a line of their own: 80 columns are narrow."""
    arguments = getattr(network, "arguments", {})
    scale = f" x{network.scale}" if hasattr(network, "scale") else ""
    widths = [f"{key} {arguments[key]}" for key in ("ngf", "ndf") if key in arguments]
    details = widths + (["separable"] if arguments.get("separable") else [])
    return type(network).__name__ + scale + ("\n  " + ", ".join(details) if details else "")


if __name__ == "__main__":
    run_command(main)
