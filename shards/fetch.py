"""Get data sets: `python shards/fetch.py RECIPE [RECIPE ...]`; see `hpcdistill.fetch`."""

from __future__ import annotations

from hpcdistill.command import run_command
from hpcdistill.fetch import main

if __name__ == "__main__":
    run_command(main)
