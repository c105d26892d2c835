"""Collect finished runs into the papers' tables: `python slurm/collect.py [RUNS]`; see `hpcdistill.sweep.collector`."""

from __future__ import annotations

from hpcdistill.command import run_command
from hpcdistill.sweep.collector import main

if __name__ == "__main__":
    run_command(main)
