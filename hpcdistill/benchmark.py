"""Measure what networks take: `hpcdistill benchmark COMMAND ...`.

`cost CONFIG [CONFIG ...] [key=value ...]` counts parameters and multiply-accumulates; it needs no data, no weights
and no training. `latency MODEL [MODEL ...]` measures times, in PyTorch and in what networks are exported to; with
`--protocol paper` as the papers' tables do, which sweeps then show.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from hpcdistill.command import Parser, UserPath, positive, program, run_command, whole
from hpcdistill.console import Table, out
from hpcdistill.errors import UserError
from hpcdistill.run import Run, load_run
from hpcdistill.storage import user_path

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
    parser = Parser(
        prog=program("benchmark"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    cost = commands.add_parser("cost", help="parameters and multiply-accumulates of a configuration's networks")
    cost.add_argument("config", nargs="+", metavar="CONFIG|key=value", help="configuration files and overrides")
    cost.add_argument("--json", action="store_true", help="print one JSON object")
    cost.set_defaults(run=_cost)
    latency = commands.add_parser("latency", help="how long finished networks take, and how much memory")
    latency.add_argument(
        "models",
        nargs="+",
        metavar="MODEL|key=value",
        help="run folders, .safetensors or exported files, pretrained:x4 (x2, x3), or configurations (measured "
        "untrained, with the overrides)",
    )
    latency.add_argument(
        "--protocol", choices=("paper",), help="the mean over a test set, one image at a time; kept in a run's folder"
    )
    latency.add_argument("--data", action=UserPath, metavar="SET", help="paper: the images; default: the run's own")
    latency.add_argument("--variants", metavar="A,B", help="forms to compare; default: all that are to be had")
    latency.add_argument("--threads", type=_counts, metavar="N,N", help="of the processor; default: as PyTorch has")
    latency.add_argument("--size", type=_size, metavar="HxW", help="of the input; default: for 1280x720, or 256x256")
    latency.add_argument("--rounds", type=positive, metavar="N", help="passes; default 20; paper: the test set, or 100")
    latency.add_argument("--warm-ups", type=whole, metavar="N", help="passes before; default 3; paper: 100")
    latency.add_argument("--no-memory", action="store_true", help="do not start a process for each form's memory")
    latency.add_argument("--generator", metavar="NAME", help="which network of runs and configurations")
    latency.add_argument("--which", choices=("best", "last"), help="which of a run's weights; default: best, else last")
    latency.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    latency.add_argument("--json", action="store_true", help="print one JSON object")
    latency.set_defaults(run=_latency)
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


def _latency(options: argparse.Namespace) -> None:
    overrides = [word for word in options.models if "=" in word and not user_path(word).exists()]
    words = [word for word in options.models if word not in overrides]
    if not words:
        raise UserError(f"{' '.join(overrides)}: and of which network? name a configuration, a run or a file")
    if overrides and (others := [word for word in words if not word.endswith((".yaml", ".yml"))]):
        raise UserError(f"{overrides[0]}: is for configurations, and {others[0]} is none; leave it out")
    if options.warm_ups is not None and options.warm_ups < 0:
        raise UserError(f"--warm-ups {options.warm_ups}: give 0 or more")
    unwanted = ("variants", "size") if options.protocol else ("data",)
    for name in unwanted:
        if getattr(options, name) is not None:
            remedy = "the protocol says it; leave it out" if options.protocol else "goes with --protocol paper"
            raise UserError(f"--{name}: {remedy}")
    # Imported only now: --help and what is plainly wrong are answered at once.
    import torch

    from hpcdistill.deploy.latency.report import report, report_as_papers
    from hpcdistill.deploy.latency.subjects import find_subject

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; leave it out, or run where there is a GPU")
    subjects = [find_subject(word, options.generator, options.which, overrides) for word in words]
    (report_as_papers if options.protocol else report)(subjects, options)


def _counts(text: str) -> list[int]:
    return list(dict.fromkeys(positive(part) for part in text.split(",")))


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text}: must be HEIGHTxWIDTH, as in 180x320")
    return positive(height), positive(width)


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
