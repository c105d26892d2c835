"""Peak memory and rate of packing: `python bench/packing.py [--images N [N ...]] [--folder DIR] [--json]`.

Packs sets of synthetic images of DIV2K's size with shards/pack.py, each in a process of its own. The peak must stay
below 1 GiB and must not grow with the set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from hpcdistill.command import run_command
from hpcdistill.console import out, say
from hpcdistill.data.images import encode_png
from hpcdistill.errors import UserError

WIDTH, HEIGHT = 2040, 1404  # DIV2K's usual size
DISTINCT = 6  # images that are drawn; the others are the same files under other names
LIMIT = 1 << 30  # bytes of peak memory
GROWTH = 1.1  # by which peaks of sets of different sizes may differ
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
PACK = Path(__file__).resolve().parents[1] / "shards" / "pack.py"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/packing.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # A shard takes about 20 such images, and is in memory until it is full: smaller sets would show less.
    parser.add_argument("--images", type=int, nargs="+", default=[24, 72], help="sizes of the sets (default: 24 72)")
    parser.add_argument("--folder", type=Path, help="where the temporary sets go (default: the system's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if min(options.images) < 1:
        raise UserError(f"--images {min(options.images)}: give 1 or more")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        drawn = draw(Path(folder) / "drawn", min(DISTINCT, max(options.images)))
        rows = [measure(drawn, Path(folder), count) for count in options.images]
    peaks = [row["peak_bytes"] for row in rows]
    report = {
        "image": [WIDTH, HEIGHT],
        "limit_bytes": LIMIT,
        "below_limit": max(peaks) < LIMIT,
        "grows": max(peaks) > GROWTH * min(peaks),
        "sets": rows,
    }
    if options.json:
        out.out(json.dumps(report), highlight=False)
        return
    table = Table(title=f"packing images of {WIDTH}x{HEIGHT}")
    for heading in ("images", "peak MiB", "seconds", "CPU seconds", "images/s", "packed MB", "shards"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = (f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds", "images_per_second"))
        size = f"{row['packed_bytes'] / 1e6:.0f}"
        table.add_row(str(row["images"]), f"{row['peak_bytes'] / 2**20:.0f}", *figures, size, str(row["shards"]))
    out.print(table)
    say(f"below 1 GiB: {'yes' if report['below_limit'] else 'NO'}; grows with the set: {_growth(report)}")


def measure(drawn: list[Path], folder: Path, count: int) -> dict[str, Any]:
    """Pack `count` images in a child process and read its peak memory, times and output size."""
    source, packed = folder / f"{count}-images", folder / f"{count}-packed"
    source.mkdir()
    for number in range(count):
        os.link(drawn[number % len(drawn)], source / f"{number:06d}.png")
    say(f"packing {count} images")
    command = [sys.executable, str(PACK), "folder", "--source", str(source), "--out", str(packed)]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)  # of this child alone, unlike getrusage(RUSAGE_CHILDREN)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise UserError(f"shards/pack.py ended with exit code {child.returncode}; see its message above")
    shards = [path.stat().st_size for path in packed.glob("*.tar")]
    return {
        "images": count,
        "peak_bytes": usage.ru_maxrss * UNIT,
        "seconds": seconds,  # with the start of the process
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "images_per_second": count / seconds,
        "packed_bytes": sum(shards),
        "shards": len(shards),
    }


def draw(folder: Path, count: int) -> list[Path]:
    """`count` images with soft shapes and grain, which compress about as well as DIV2K's (4 to 5 MB each)."""
    folder.mkdir()
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.integers(-3, 4, smooth.shape, dtype=np.int16)
        paths.append(folder / f"{number}.png")
        paths[-1].write_bytes(encode_png((smooth + grain).clip(0, 255).astype(np.uint8)))
    return paths


def _growth(report: dict[str, Any]) -> str:
    if len(report["sets"]) == 1:
        return "one set only"
    return "YES" if report["grows"] else "no"


if __name__ == "__main__":
    run_command(main)
