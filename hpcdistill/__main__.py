"""The program `hpcdistill`: all commands by one word each. `python -m hpcdistill` is the same."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from hpcdistill import __version__
from hpcdistill.command import run_command
from hpcdistill.console import out
from hpcdistill.errors import UserError, nearest
from hpcdistill.storage import CLONE

RECIPES, CONFIGS, GRIDS = "shards/recipes", "configs", "configs/grids"


@dataclass(frozen=True)
class Command:
    """One command: the module that it is, and what it is for, in a line."""

    module: str
    about: str
    function: str = "main"  # takes the words after the command's own, returns the exit code or None
    needs: str | None = None  # of the clone, which a copy of the package alone does not have


GROUPS: dict[str, dict[str, Command]] = {
    "See it work": {
        "demo": Command(
            "hpcdistill.demo", "photographs to a distilled student and a page, in minutes on a CPU", "start", CONFIGS
        ),
        "demo-gan": Command("hpcdistill.demo_gan", "the same for a translator of images, a GAN", "start", CONFIGS),
    },
    "Use a trained network": {
        "infer": Command("hpcdistill.infer", "enlarge or translate pictures and folders of them"),
        "export": Command("hpcdistill.export", "write a network for other programs: onnx, shader, ncnn, ..."),
        "convert": Command("hpcdistill.convert", "make a network's file of a published .pth"),
        "card": Command("hpcdistill.card", "a folder to publish: weights, what they eat, how good they are"),
    },
    "Data": {
        "fetch": Command("hpcdistill.fetch", "download data sets, check, unpack and pack them", needs=RECIPES),
        "pack": Command("hpcdistill.pack", "pack images of your own into shards", needs=RECIPES),
        "verify": Command("hpcdistill.verify", "check packed sets, find duplicates, mend what is damaged"),
        "stage": Command("hpcdistill.stage", "copy packed sets to a node's own disk"),
        "prefetch": Command(
            "hpcdistill.prefetch", "get all that runs will need, where there is a network", needs=RECIPES
        ),
    },
    "Train and measure": {
        "train": Command(
            "hpcdistill.train", "train a run, and its teacher where it has none; go on with a stopped one"
        ),
        "train-many": Command(
            "hpcdistill.train_many", "several runs side by side in one process: seeds or cells of a small network"
        ),
        "evaluate": Command("hpcdistill.evaluate", "how good a network is on a test set"),
        "benchmark": Command("hpcdistill.benchmark", "what networks take: parameters, multiply-accumulates, time"),
        "figures": Command("hpcdistill.figures", "what several networks make of the same images, as one page"),
    },
    "Many runs": {
        "sweep": Command("hpcdistill.sweep.submit", "submit grids of runs to SLURM, or run them here", needs=GRIDS),
        "status": Command("hpcdistill.sweep.status_command", "the state of a sweep's runs; watch, cancel, retry"),
        "collect": Command("hpcdistill.sweep.collect", "tables and a report of finished runs", needs=GRIDS),
    },
}
COMMANDS = {word: command for group in GROUPS.values() for word, command in group.items()}


def main(arguments: list[str]) -> int | None:
    """Run the command that the first word names; returns its exit code."""
    word, *rest = arguments or ["--help"]
    if word in ("-h", "--help", "help"):
        out.print(_listing(), markup=False, soft_wrap=True)
        return 0
    if word == "--version":
        out.print(f"hpcdistill {__version__}", markup=False)
        return 0
    if word not in COMMANDS:
        raise UserError(f"hpcdistill {word}: no such command; {nearest(word, COMMANDS)}")
    command = COMMANDS[word]
    if command.needs is not None and not (CLONE / command.needs).exists():
        raise UserError(
            f"hpcdistill {word}: needs {command.needs} of hpcdistill's clone, which is not in {CLONE}; "
            "install it from there: pip install -e CLONE"
        )
    # Imported only now: the list of commands answers at once.
    code: int | None = getattr(importlib.import_module(command.module), command.function)(rest)
    return code


def run() -> None:
    """The console script."""
    run_command(main)


def _listing() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: hpcdistill COMMAND ...", "", "Small image generators, distilled from large ones."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {word:<{width}}  {command.about}" for word, command in commands.items())]
    return "\n".join([*lines, "", "What a command takes: hpcdistill COMMAND --help"])


if __name__ == "__main__":
    run()
