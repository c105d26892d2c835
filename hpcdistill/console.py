"""The one place that writes to the terminal: a rich console and a log that only rank 0 speaks through."""

from __future__ import annotations

from rich.console import Console

from hpcdistill.ranks.environment import rank

# Results (tables, JSON) go to stdout, everything said along the way to stderr, so that output can be piped.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def is_main_process() -> bool:
    """True on global rank 0, read from the environment that torchrun, accelerate and submitit set."""
    return rank() == 0


def say(message: str, style: str | None = None) -> None:
    """Print one line for the user, on rank 0 only; markup in `message` is shown as it is."""
    if is_main_process():
        err.print(message, style=style, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print one warning line, on rank 0 only."""
    say(f"warning: {message}", style="yellow")
