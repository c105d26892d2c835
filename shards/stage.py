"""Copy packed data sets to node-local scratch: `python shards/stage.py DIR --to SCRATCH`; see `hpcdistill.stage`."""

from __future__ import annotations

from hpcdistill.command import run_command
from hpcdistill.stage import main

if __name__ == "__main__":
    run_command(main)
