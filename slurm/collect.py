"""Collect finished runs into the papers' tables; see `hpcdistill.sweep.collect`."""

from __future__ import annotations

from hpcdistill.command import run_command
from hpcdistill.sweep.collect import main

if __name__ == "__main__":
    run_command(main)
