"""Pack images into shards: `python shards/pack.py RECIPE`; see `hpcdistill.pack`."""

from __future__ import annotations

from hpcdistill.command import run_command
from hpcdistill.pack import main

if __name__ == "__main__":
    run_command(main)
