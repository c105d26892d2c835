"""Check packed data sets, find duplicates, mend: `python shards/verify.py DIR`; see `hpcdistill.verify`."""

from __future__ import annotations

from hpcdistill.command import run_command
from hpcdistill.verify import main

if __name__ == "__main__":
    run_command(main)
