"""Rate and peak memory of packing: `python bench/packing.py [--images N [N ...]] [--processes N] [--json]`.

Packs sets of synthetic images of DIV2K's size, and one of JPEG pairs, with shards/pack.py, each in a command of its
own. Beside them the codec's own rate: the same number of processes that decode the same sources and encode what the
packer writes, and do nothing else. The packer must reach 80 % of it on DIV2K's size; its peak memory must stay below
1 GiB (on two cores), and must not grow with the set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from hpcdistill.command import UserPath, run_command
from hpcdistill.console import Table, out, say
from hpcdistill.data.images import encode_png, read_rgb
from hpcdistill.data.pack.pack_pool import available_cores
from hpcdistill.data.pack.packed_image import SCALES
from hpcdistill.errors import UserError
from hpcdistill.ops.downsampling import downsample_uint8

WIDTH, HEIGHT = 2040, 1404  # DIV2K's usual size
PAIR = 256  # side of each image of a pair
DISTINCT = 6  # images that are drawn; the others are the same files under other names
LIMIT = 1 << 30  # bytes of peak memory
GROWTH = 1.1  # by which peaks of sets of different sizes may differ
TARGET = 0.8  # of the codec's own rate
CODEC_IMAGES = {"png": 8, "jpeg": 2000}  # that each process decodes and encodes for the codec's rate
PACK = Path(__file__).resolve().parents[1] / "shards" / "pack.py"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/packing.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # A shard takes about 20 such images, and is in memory until it is full: smaller sets would show less.
    parser.add_argument("--images", type=int, nargs="+", default=[24, 72], help="sizes of the sets (default: 24 72)")
    parser.add_argument("--pairs", type=int, default=10000, help="JPEG pairs, 0 for none (default: 10000)")
    parser.add_argument("--processes", type=int, default=available_cores(), help="default: all cores")
    parser.add_argument("--folder", action=UserPath, help="where the temporary sets go (default: the system's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if min(*options.images, options.processes, options.pairs + 1) < 1:
        raise UserError("--images and --processes must be 1 or more, --pairs 0 or more")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        drawn = draw(Path(folder) / "drawn", min(DISTINCT, max(options.images)))
        rows = measure_all(drawn, Path(folder), "folder", options.images, options.processes)
        pairs = []
        if options.pairs:
            drawn = draw_pairs(Path(folder) / "pairs", DISTINCT)
            pairs = measure_all(drawn, Path(folder), "paired", [options.pairs], options.processes)
    peaks = [row["peak_bytes"] for row in rows]
    report = {
        "image": [WIDTH, HEIGHT],
        "processes": options.processes,
        "limit_bytes": LIMIT,
        "below_limit": max(peaks) < LIMIT,
        "grows": max(peaks) > GROWTH * min(peaks),
        "target_ratio": TARGET,
        "reaches_target": rows[-1]["ratio"] >= TARGET,
        "sets": rows,
        "jpeg_pairs": pairs,
    }
    if options.json:
        out.out(json.dumps(report), highlight=False)
        return
    table = Table(title=f"packing in {options.processes} processes")
    table.add_column("set")
    for heading in ("images", "peak MiB", "seconds", "CPU s", "per s", "codec", "ratio", "CPU ratio", "MB", "shards"):
        table.add_column(heading, justify="right")
    for name, row in [("PNG", row) for row in rows] + [("JPEG", row) for row in pairs]:
        times = (f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds", "images_per_second", "codec_per_second"))
        ratios = (f"{row[key]:.2f}" for key in ("ratio", "cpu_ratio"))
        size = f"{row['packed_bytes'] / 1e6:.0f}"
        peak = f"{row['peak_bytes'] / 2**20:.0f}"
        table.add_row(name, str(row["images"]), peak, *times, *ratios, size, str(row["shards"]))
    out.print(table)
    reached = "yes" if report["reaches_target"] else "NO"
    say(f"{TARGET:.0%} of the codec's rate: {reached} ({rows[-1]['ratio']:.0%} with {rows[-1]['images']} images)")
    say(f"below 1 GiB: {'yes' if report['below_limit'] else 'NO'}; grows with the set: {_growth(report)}")


def measure_all(
    drawn: list[Path], folder: Path, recipe: str, counts: Sequence[int], processes: int
) -> list[dict[str, Any]]:
    """Pack sets of `counts` images; the codec alone runs before and after each, so that both see the same machine."""
    rows = []
    before = codec(drawn, recipe, processes)
    for count in counts:
        row = measure(drawn, folder, recipe, count, processes)
        after = codec(drawn, recipe, processes)
        rate = (before["images_per_second"] + after["images_per_second"]) / 2
        cpu_seconds = (before["cpu_seconds_per_image"] + after["cpu_seconds_per_image"]) / 2
        row["codec_per_second"] = rate
        row["codec_cpu_seconds_per_image"] = cpu_seconds
        row["ratio"] = row["images_per_second"] / rate
        row["cpu_ratio"] = cpu_seconds * count / row["cpu_seconds"]  # what is left when nothing else runs
        rows.append(row)
        before = after
    return rows


def measure(drawn: list[Path], folder: Path, recipe: str, count: int, processes: int) -> dict[str, Any]:
    """Pack `count` images in a child process and read its peak memory, times and output size."""
    source, packed = folder / f"{recipe}-{count}-images", folder / f"{recipe}-{count}-packed"
    source.mkdir()
    for number in range(count):
        path = drawn[number % len(drawn)]
        os.link(path, source / f"{number:06d}{path.suffix}")
    say(f"packing {count} images")
    command = [sys.executable, str(PACK), recipe, "--source", str(source), "--out", str(packed)]
    start = time.perf_counter()
    child = subprocess.Popen([*command, "--processes", str(processes)], stdout=subprocess.DEVNULL)
    peak, status = 0, None
    while status is None:
        peak = max(peak, _memory(child.pid))
        time.sleep(0.05)
        pid, ended, usage = os.wait4(child.pid, os.WNOHANG)  # with the processes that it has waited for
        status = ended if pid else None
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise UserError(f"shards/pack.py ended with exit code {child.returncode}; see its message above")
    shards = [path.stat().st_size for path in packed.glob("*.tar")]
    return {
        "images": count,
        "peak_bytes": peak,  # of all processes together, sampled 20 times a second
        "seconds": seconds,  # with the start of the processes
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "images_per_second": count / seconds,
        "packed_bytes": sum(shards),
        "shards": len(shards),
    }


def codec(drawn: list[Path], recipe: str, processes: int) -> dict[str, float]:
    """What `processes` decode and encode a second when they do nothing else."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    started = [context.Process(target=_codec, args=(drawn, recipe, barrier, results)) for _ in range(processes)]
    for process in started:
        process.start()
    times = [results.get() for _ in started]
    for process in started:
        process.join()
    images = sum(count for count, _, _, _ in times)
    seconds = max(stop for _, _, stop, _ in times) - min(start for _, start, _, _ in times)
    return {"images_per_second": images / seconds, "cpu_seconds_per_image": sum(cpu for *_, cpu in times) / images}


def _codec(drawn: list[Path], recipe: str, barrier: Barrier, results: SimpleQueue[tuple[int, float, float, float]]):
    """One process: sources and pixels are in memory before the clock starts."""
    contents = [path.read_bytes() for path in drawn]
    members: list[list[np.ndarray]] = [[] for _ in drawn]
    if recipe == "folder":
        for hr, images in zip(map(read_rgb, drawn), members, strict=True):
            images += [hr, *(_down(hr, scale) for scale in SCALES)]
    count = CODEC_IMAGES["png" if recipe == "folder" else "jpeg"]
    barrier.wait()
    start, cpu = time.monotonic(), time.process_time()
    for number in range(count):
        read_rgb(contents[number % len(drawn)])
        for image in members[number % len(drawn)]:
            encode_png(image)
    results.put((count, start, time.monotonic(), time.process_time() - cpu))


def _down(hr: np.ndarray, scale: int) -> np.ndarray:
    return downsample_uint8(hr[: len(hr) - len(hr) % scale, : hr.shape[1] - hr.shape[1] % scale], scale)


def _memory(pid: int) -> int:
    """Bytes of memory of a process and all below it, what they share (libraries) once; 0 when it has ended."""
    private, shared = 0, [0]
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                shared.append(getattr(memory, "shared", 0))  # Linux alone
                private += memory.rss - shared[-1]
    return private + max(shared)


def draw(folder: Path, count: int) -> list[Path]:
    """`count` images with soft shapes and grain, which compress about as well as DIV2K's (4 to 5 MB each)."""
    folder.mkdir()
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        paths.append(folder / f"{number}.png")
        paths[-1].write_bytes(encode_png(_drawing(random, WIDTH, HEIGHT)))
    return paths


def draw_pairs(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs of two images side by side, as Pix2Pix's sets have them."""
    folder.mkdir()
    random = np.random.default_rng(1)
    paths = []
    for number in range(count):
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(_drawing(random, 2 * PAIR, PAIR)).save(paths[-1], "JPEG", quality=90)
    return paths


def _drawing(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    coarse = Image.fromarray(random.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = random.integers(-3, 4, smooth.shape, dtype=np.int16)
    return (smooth + grain).clip(0, 255).astype(np.uint8)


def _growth(report: dict[str, Any]) -> str:
    if len(report["sets"]) == 1:
        return "one set only"
    return "YES" if report["grows"] else "no"


if __name__ == "__main__":
    run_command(main)
