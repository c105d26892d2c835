"""Training patches a second and core: `python bench/loader.py [--data PACKED] [--seconds S] [--json]`.

One process, one thread, batches of 16 luma pairs (HR 192, LR 48 at x4). The rows with "NumPy" are what a plain reader
does without any augmentation: crop, convert, stack.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch start their threads

import numpy as np
import torch
from rich.table import Table

from hpcdistill.command import run_command
from hpcdistill.console import out, say
from hpcdistill.data.cache import PackedImages
from hpcdistill.data.config import DataConfig
from hpcdistill.data.images import encode_png
from hpcdistill.data.index import Index, Member, Sample, Shard, load_index
from hpcdistill.data.needs import Needs
from hpcdistill.data.reader import PatchReader
from hpcdistill.ops.colour import luma_uint8
from hpcdistill.storage import sha256_file

BATCH, PATCH, SCALE = 16, 192, 4
TARGET = 10_000  # augmented pairs a second and core from `ram`
ROUNDS = 5


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench/loader.py", description=__doc__)
    parser.add_argument("--data", type=Path, help="packed training set; default: 48 synthetic images of 480x320")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each of the 5 measurements of a row")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with nullcontext(options.data) if options.data else tempfile.TemporaryDirectory() as folder:
        if not options.data:
            make_set(Path(folder), images=48, height=320, width=480)
        rows = measure(Path(folder), options.seconds)
    report = {
        "unit": "pairs per second of one core's time; wall_best: per second on the clock",
        "patch": PATCH,
        "scale": SCALE,
        "batch": BATCH,
        "target": TARGET,
        "reached": rows["ram"]["best"] >= TARGET,
        "rates": rows,
    }
    if options.json:
        out.print_json(json.dumps(report))
        return
    table = Table(title="training pairs per second and core")
    for heading in ("reader", "best", "median", "wall best"):
        table.add_column(heading, justify="left" if heading == "reader" else "right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:,.0f}" for column in ("best", "median", "wall_best")))
    out.print(table)
    say(f"target {TARGET:,} from ram: {'reached' if report['reached'] else 'NOT reached'}")


def measure(folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Best and median rate of each reader."""
    readers: dict[str, Callable[[int], Any]] = {}
    needs = Needs(kind="lr-hr", scale=SCALE, lr_scales=(SCALE,))
    for cache, flip in (("ram", True), ("ram", False), ("none", True)):
        config = DataConfig(patch=PATCH, cache=cache, flip=flip, rotate=flip)
        name = cache if flip else f"{cache}, no flips and rotations"
        readers[name] = PatchReader([folder], needs, config, seed=0, batch_size=BATCH).__getitem__
    rgb = DataConfig(patch=PATCH, cache="ram")
    colour = Needs(kind="lr-hr", scale=SCALE, lr_scales=(SCALE,), channels=3)
    readers["ram, RGB"] = PatchReader([folder], colour, rgb, seed=0, batch_size=BATCH).__getitem__
    images = PackedImages([folder], [load_index(folder)], ("hr", f"lr{SCALE}"), channels=3)
    pairs = [
        tuple(np.ascontiguousarray(images.load(image, sample).transpose(1, 2, 0)) for image in (0, 1))
        for sample in range(min(48, len(images.sources)))
    ]
    readers["NumPy, cached RGB, not augmented"] = naive(pairs, luma_crop)
    lumas = [tuple(luma_uint8(image) for image in pair) for pair in pairs]
    readers["NumPy, cached luma, not augmented"] = naive(lumas, lambda crop: crop)

    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for read in readers.values():
        read(0)  # the first permutation, the first page faults
    for turn in range(ROUNDS):  # in turns: a load from outside hits all rows alike
        say(f"round {turn + 1} of {ROUNDS}")
        for name, read in readers.items():
            rates[name].append(rate(read, seconds))
    rows = {}
    for name, pairs_a_second in rates.items():
        of_core, of_wall = zip(*pairs_a_second, strict=True)
        rows[name] = {"best": max(of_core), "median": statistics.median(of_core), "wall_best": max(of_wall)}
    return rows


def rate(read: Callable[[int], Any], seconds: float) -> tuple[float, float]:
    """Pairs a second of processor time and of wall time, reading one batch after the other for `seconds`.

    On a machine that others use, the two differ by the share of the core that this process did not get.
    """
    step = 0
    start, start_of_core = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        step += 1
        read(step)
    wall, core = time.perf_counter() - start, time.process_time() - start_of_core
    return step * BATCH / core, step * BATCH / wall


def luma_crop(crop: np.ndarray) -> np.ndarray:
    """Luma as one writes it down: a product with the weights in float32."""
    weights = np.array([65.481, 128.553, 24.966], dtype=np.float32) / np.float32(255 * 255)
    return crop.astype(np.float32) @ weights + np.float32(16 / 255)


def naive(pairs: list[tuple[np.ndarray, ...]], convert: Callable[[np.ndarray], np.ndarray]) -> Callable[[int], Any]:
    """The reader of many published trainers, without their augmentation: random crops, converted and stacked."""
    random = np.random.default_rng(0)

    def read(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        hr_crops, lr_crops = [], []
        for number in random.integers(len(pairs), size=BATCH):
            hr, lr = pairs[number]
            side = PATCH // SCALE
            top = int(random.integers(lr.shape[0] - side + 1))
            left = int(random.integers(lr.shape[1] - side + 1))
            lr_crops.append(convert(lr[top : top + side, left : left + side]))
            hr_crops.append(convert(hr[top * SCALE :, left * SCALE :][:PATCH, :PATCH]))
        return torch.from_numpy(np.stack(hr_crops)[:, None]), torch.from_numpy(np.stack(lr_crops)[:, None])

    return read


def make_set(folder: Path, images: int, height: int, width: int) -> None:
    """Pack smooth random images; the LR is a plain block mean, which costs the same to read as a real one."""
    random = np.random.default_rng(0)
    shard = folder / "train-000000.tar"
    samples = []
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(images):
            coarse = random.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
            hr = coarse.repeat(8, axis=0).repeat(8, axis=1) // 2 + random.integers(0, 16, (height, width, 3), np.uint8)
            blocks = hr.reshape(height // SCALE, SCALE, width // SCALE, SCALE, 3)
            lr = blocks.mean(axis=(1, 3)).astype(np.uint8)
            members = {}
            for suffix, image in (("hr.png", hr), (f"lr{SCALE}.png", lr)):
                members[suffix] = add_member(tar, f"{number:06d}.{suffix}", encode_png(image), image.shape)
            samples.append(Sample(f"{number:06d}", f"synthetic {number}", 0, members))
    Index(
        recipe="synthetic",
        split="train",
        kind="lr-hr",
        scales=(SCALE,),
        licence="none needed",
        origin="bench/loader.py",
        shards=(Shard(shard.name, shard.stat().st_size, sha256_file(shard)),),
        samples=tuple(samples),
    ).save(folder)


def add_member(tar: tarfile.TarFile, name: str, content: bytes, shape: tuple[int, ...]) -> Member:

    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    offset = tar.offset + 512  # behind the header, one block in ustar
    tar.addfile(entry, io.BytesIO(content))
    return Member(offset, len(content), shape[0], shape[1])


if __name__ == "__main__":
    run_command(main)
