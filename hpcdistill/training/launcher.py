"""Whether the launcher started as many processes as it was asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil

from hpcdistill.errors import UserError


def check_launcher() -> None:
    """Raise UserError when `accelerate launch` was asked for several processes and silently started one.

    It does so with `--cpu`: without an MPI launcher its `--num_processes` is ignored.
    """
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:  # gone, or another user's: nothing to compare with
        return
    asked = asked_processes(command)
    if asked > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise UserError(
            f"accelerate launch was asked for {asked} processes and started one (--cpu ignores --num_processes); "
            f"use `torchrun --nproc-per-node {asked} -m hpcdistill.train ...`"
        )


def asked_processes(command: Sequence[str]) -> int:
    """The number of processes in an `accelerate launch` command line; 1 for any other command."""
    launches = any(part.endswith(("accelerate", "accelerate-launch", "accelerate.commands.launch")) for part in command)
    if not launches:
        return 1
    for position, part in enumerate(command):
        name, _, value = part.partition("=")
        if name in ("--num_processes", "--num-processes"):
            value = value or (command[position + 1] if position + 1 < len(command) else "")
            return int(value) if value.isdigit() else 1
    return 1
