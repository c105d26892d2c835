"""Watch a sweep: `python slurm/status.py [GRID ...] [--watch]`; see `hpcdistill.sweep.status_command`."""

from __future__ import annotations

from hpcdistill.command import run_command
from hpcdistill.sweep.status_command import main

if __name__ == "__main__":
    run_command(main)
