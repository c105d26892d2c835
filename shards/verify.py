"""Check a packed data set against its index: `python shards/verify.py DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.table import Table

from hpcdistill.command import run_command
from hpcdistill.console import out, say
from hpcdistill.data.verify import Report, data_sets, verify

EXIT_FAULTS = 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python shards/verify.py",
        description="Read every byte of a packed data set: shard lengths, checksums, and each image at its place.",
        epilog=f"Exit code {EXIT_FAULTS} when something is wrong, with one line a fault.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a packed data set, or the folder of its splits")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args(arguments)
    reports = [verify(folder) for folder in data_sets(options.folder)]
    if options.json:
        out.print_json(
            json.dumps({"ok": not any(report.faults for report in reports), "data_sets": [*map(_plain, reports)]})
        )
    else:
        out.print(_table(reports))
    for report in reports:
        for fault in report.faults:
            say(f"fault: {fault}", style="bold red")
    return EXIT_FAULTS if any(report.faults for report in reports) else 0


def _plain(report: Report) -> dict[str, object]:
    return {
        "folder": str(report.folder),
        "recipe": report.recipe,
        "split": report.split,
        "samples": report.samples,
        "shards": [
            {"shard": shard.shard, "samples": shard.samples, "images": shard.members, "faults": list(shard.faults)}
            for shard in report.shards
        ],
        "faults": list(report.faults),
    }


def _table(reports: list[Report]) -> Table:
    table = Table("data set", "shard", "samples", "images", "MB", "state")
    for report in reports:
        for shard in report.shards:
            state = "damaged" if shard.faults else "ok"
            name = f"{report.recipe} ({report.split})"
            table.add_row(name, shard.shard, str(shard.samples), str(shard.members), f"{shard.length / 1e6:.1f}", state)
    return table


if __name__ == "__main__":
    run_command(main)
