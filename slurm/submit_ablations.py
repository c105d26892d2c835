"""Submit whole ablation grids: `python slurm/submit_ablations.py [GRID ...]`; see `hpcdistill.sweep.submit`."""

from __future__ import annotations

from hpcdistill.command import run_command
from hpcdistill.sweep.submit import main

if __name__ == "__main__":
    run_command(main)
