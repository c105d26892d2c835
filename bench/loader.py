"""Training images a second and core: `python bench/loader.py [--data PACKED] [--pairs PACKED] [--device D] [--json]`.

One process, one thread, batches of 16 pairs; a pair is two images.

- Super-resolution: luma, HR 192, LR 48 at x4, from images of 480x320. The rows with "NumPy" are what a plain reader
  does without any augmentation: crop, convert, stack.
- Translation: RGB, 512x256 AB images cut in two, resized to 286 and cropped to 256, like edges2shoes.

"raw" is the bound that no image format can pass: the same reader, with the decoded bytes lying in the shard and nothing
to decode. It is no format that we pack.

"device" keeps the set on `--device`, a GPU where there is one. With a GPU a core's time is what launching the kernels
takes, and `wall best` is what the two together do; on a CPU it is a rehearsal, and slower than "ram".

The shares are of the processor time of the same batches, read once more with a clock around the functions that do it:
*reading* is pread, or for `stream` the whole way from the shard to a file's bytes with its sha256;
*decoding* is from a file's bytes to RGB; *augmenting* is luma, resizing, crops, flips and the conversion to float.
What is left is drawing numbers, mixing, and memory for the batch. Files come from the page cache, so reading is a copy.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch start their threads

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD

from hpcdistill.command import UserPath, run_command
from hpcdistill.console import Table, out, say
from hpcdistill.data.config import DataConfig
from hpcdistill.data.images import encode_png
from hpcdistill.data.index import Index, Kind, Member, Sample, Shard, load_index
from hpcdistill.data.needs import Needs
from hpcdistill.data.read.cache import PackedImages
from hpcdistill.data.read.reader import PatchReader, TranslationReader
from hpcdistill.data.read.stream import StreamReader
from hpcdistill.ops.colour import luma_uint8
from hpcdistill.storage import sha256_file

BATCH, PATCH, SCALE = 16, 192, 4
LOAD_SIZE, CROP = 286, 256
TARGET = 10_000  # augmented pairs a second and core from `ram`
ROUNDS = 5
SHARES = ("reading", "decoding", "augmenting", "other")
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "raw": "png"}  # of the members; nobody asks those of "raw" for their format
SR = Needs(kind="lr-hr", scale=SCALE, lr_scales=(SCALE,))
TRANSLATION = Needs(kind="paired")

Read = Callable[[int], Any]  # a batch by its step
Row = dict[str, float]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench/loader.py", description=__doc__)
    parser.add_argument("--data", action=UserPath, help="packed training set; default: 48 synthetic images of 480x320")
    parser.add_argument(
        "--pairs", action=UserPath, help="packed paired set; default: 48 synthetic AB images of 512x256"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each of the 5 measurements of a row")
    parser.add_argument("--device", type=torch.device, help="of the rows `device`; default: a GPU where there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        readers = sr_readers(Path(folder) / "sr", options.data, device)
        pairs = translation_readers(Path(folder) / "translation", options.pairs, device)
        rows = measure(readers | {("translation", name): read for name, read in pairs.items()}, options.seconds)
    translation = {name[1]: rows.pop(name) for name in list(rows) if isinstance(name, tuple)}
    report = {
        "unit": "pairs per second of one core's time; wall_best: per second on the clock; the rest: shares of the time",
        "patch": PATCH,
        "scale": SCALE,
        "batch": BATCH,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "target": TARGET,
        "reached": rows["ram"]["best"] >= TARGET,
        "rates": rows,
        "translation": {"load_size": LOAD_SIZE, "crop": CROP, "rates": translation},
    }
    if options.json:
        out.out(json.dumps(report, indent=2), highlight=False)
        return
    out.print(table(f"luma pairs, HR {PATCH} and LR {PATCH // SCALE}, per second and core", rows))
    out.print(table(f"translation pairs, {LOAD_SIZE} to {CROP}, per second and core", translation))
    say(f"target {TARGET:,} from ram: {'reached' if report['reached'] else 'NOT reached'}")


def table(title: str, rows: dict[str, Row]) -> Table:
    """Rates and, where they were taken, the shares of reading, decoding and augmenting (r/d/a)."""
    result = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
    result.add_column("reader")
    for heading in ("best", "median", "wall best", "r/d/a %"):
        result.add_column(heading, justify="right")
    for name, row in rows.items():
        rates = (f"{row[column]:,.0f}" for column in ("best", "median", "wall_best"))
        parts = "/".join(f"{100 * row[share]:.0f}" for share in SHARES[:-1]) if SHARES[0] in row else ""
        result.add_row(name, *rates, parts)
    return result


def sr_readers(folder: Path, data: Path | None, device: torch.device) -> dict[str, Read]:
    """The readers of LR-HR sets; `data` is a packed set to read in place of the synthetic one."""
    sets = {kind: folder / kind for kind in SUFFIXES}
    for kind, place in sets.items():
        if not (kind == "PNG" and data):
            make_set(place, images=48, height=320, width=480, kind=kind)
    packed = data or sets["PNG"]
    readers: dict[str, Read] = {}
    for cache, flip in (("ram", True), ("ram", False), ("none", True)):
        config = DataConfig(patch=PATCH, cache=cache, flip=flip, rotate=flip)
        name = cache if flip else f"{cache}, no flips and rotations"
        readers[name] = PatchReader([packed], SR, config, seed=0, batch_size=BATCH).__getitem__
    plain = DataConfig(patch=PATCH)
    readers["none, JPEG"] = PatchReader([sets["JPEG"]], SR, plain, seed=0, batch_size=BATCH).__getitem__
    readers["none, raw"] = raw(PatchReader([sets["raw"]], SR, plain, seed=0, batch_size=BATCH).__getitem__)
    readers["stream"] = stream(packed, SR, plain)
    readers["stream, JPEG"] = stream(sets["JPEG"], SR, plain)
    rgb = DataConfig(patch=PATCH, cache="ram")
    colour = Needs(kind="lr-hr", scale=SCALE, lr_scales=(SCALE,), channels=3)
    readers["ram, RGB"] = PatchReader([packed], colour, rgb, seed=0, batch_size=BATCH).__getitem__
    on_device = DataConfig(patch=PATCH, cache="device")
    for name, needs in (("device", SR), ("device, RGB", colour)):
        kept = PatchReader([packed], needs, on_device, seed=0, batch_size=BATCH, device=device)
        readers[f"{name} ({device.type})"] = kept.__getitem__
    images = PackedImages([packed], [load_index(packed)], ("hr", f"lr{SCALE}"), channels=3)
    pairs = [
        tuple(np.ascontiguousarray(images.load(image, sample).transpose(1, 2, 0)) for image in (0, 1))
        for sample in range(min(48, len(images.sources)))
    ]
    readers["NumPy, cached RGB, not augmented"] = naive(pairs, luma_crop)
    lumas = [tuple(luma_uint8(image) for image in pair) for pair in pairs]
    readers["NumPy, cached luma, not augmented"] = naive(lumas, lambda crop: crop)
    return readers


def translation_readers(folder: Path, data: Path | None, device: torch.device) -> dict[str, Read]:
    """The readers of image-to-image sets; `data` is a packed set to read in place of the synthetic one in JPEG."""
    sets = {kind: folder / kind for kind in SUFFIXES}
    for kind, place in sets.items():
        if not (kind == "JPEG" and data):
            make_pairs(place, images=48, side=256, kind=kind)
    packed = data or sets["JPEG"]

    def indexed(place: Path, cache: str) -> Read:
        config = DataConfig(load_size=LOAD_SIZE, crop=CROP, cache=cache)
        return TranslationReader([place], TRANSLATION, config, seed=0, batch_size=BATCH, device=device).__getitem__

    config = DataConfig(load_size=LOAD_SIZE, crop=CROP)
    return {
        "ram": indexed(packed, "ram"),
        f"device ({device.type})": indexed(packed, "device"),
        "none, JPEG": indexed(packed, "none"),
        "none, PNG": indexed(sets["PNG"], "none"),
        "none, raw": raw(indexed(sets["raw"], "none")),
        "stream, JPEG": stream(packed, TRANSLATION, config),
        "stream, PNG": stream(sets["PNG"], TRANSLATION, config),
    }


def stream(folder: Path, needs: Needs, config: DataConfig) -> Read:
    """The reader `stream` in this process, without a loader's workers."""
    batches = iter(StreamReader([str(folder)], needs, config, seed=0, batch_size=BATCH).loader(0, 1 << 40))
    return lambda _: next(batches)


def raw(read: Read) -> Read:
    """`read` with members that are the decoded pixels themselves."""

    def view(content: bytes, size: tuple[int, int], *_: str) -> np.ndarray:
        return np.frombuffer(content, np.uint8).reshape(*size, 3)

    def read_raw(step: int) -> Any:
        with patch("hpcdistill.data.read.cache.read_packed", view):
            return read(step)

    return read_raw


def measure(readers: dict[Any, Read], seconds: float) -> dict[Any, Row]:
    """Best and median rate of each reader, and where the time went."""
    rates: dict[Any, list[tuple[float, float]]] = {name: [] for name in readers}
    for read in readers.values():
        read(0)  # the first permutation, the first page faults
    for turn in range(ROUNDS):  # in turns: a load from outside hits all rows alike
        say(f"round {turn + 1} of {ROUNDS}")
        for name, read in readers.items():
            rates[name].append(rate(read, seconds))
    rows: dict[Any, Row] = {}
    for name, pairs_a_second in rates.items():
        of_core, of_wall = zip(*pairs_a_second, strict=True)
        rows[name] = {"best": max(of_core), "median": statistics.median(of_core), "wall_best": max(of_wall)}
        if not str(name).startswith("NumPy"):
            rows[name] |= shares(readers[name], seconds)
    return rows


class Stopwatch:
    """Adds up the processor time of each stage while the library's functions are replaced by timed ones."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(SHARES[:-1], 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the functions that do each stage, wherever they are called from."""
        data = "hpcdistill.data"
        stages = {
            "reading": ("os.pread",),
            "decoding": (f"{data}.read.cache.read_packed", f"{data}.read.stream.read_packed"),
            "augmenting": (
                f"{data}.read.domains.resized",
                f"{data}.read.device.gathered",
                *(f"{data}.read.augmentation.{f}" for f in ("luma_uint8", "resized", "place_patch", "place_crop")),
            ),
        }
        with ExitStack() as stack:
            for stage, names in stages.items():
                for name in names:
                    module, _, function = name.rpartition(".")
                    original = getattr(importlib.import_module(module), function)
                    stack.enter_context(patch(name, self._timed(stage, original)))
            pipeline = importlib.import_module(f"{data}.read.stream")
            stack.enter_context(patch(f"{data}.read.stream.read_samples", self._timed_items(pipeline.read_samples)))
            yield

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[stage] += time.process_time() - start

        return timed

    def _timed_items(self, files: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def timed(*arguments: Any) -> Iterator[Any]:
            following = self._timed("reading", files(*arguments).__next__)
            while True:
                try:
                    file = following()
                except StopIteration:
                    return
                yield file

        return timed


def shares(read: Read, seconds: float) -> Row:
    """The share of the processor time in each of `SHARES`."""
    stopwatch = Stopwatch()
    with stopwatch.running():
        start, start_of_core = time.perf_counter(), time.process_time()
        step = 0
        while time.perf_counter() - start < seconds:
            step += 1
            read(step)
        total = time.process_time() - start_of_core
    found = {stage: spent / total for stage, spent in stopwatch.spent.items()}
    return {**found, "other": 1 - sum(found.values())}


def rate(read: Callable[[int], Any], seconds: float) -> tuple[float, float]:
    """Pairs a second of processor time and of wall time, reading one batch after the other for `seconds`.

    On a machine that others use, the two differ by the share of the core that this process did not get.
    """
    step = 0
    start, start_of_core = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        step += 1
        read(step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was launched ahead counts once it is done
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


def make_set(folder: Path, images: int, height: int, width: int, kind: str = "PNG") -> None:
    """Pack smooth random images; the LR is a plain block mean, which costs the same to read as a real one."""
    random = np.random.default_rng(0)
    samples = []
    for _ in range(images):
        coarse = random.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
        hr = coarse.repeat(8, axis=0).repeat(8, axis=1) // 2 + random.integers(0, 16, (height, width, 3), np.uint8)
        blocks = hr.reshape(height // SCALE, SCALE, width // SCALE, SCALE, 3)
        samples.append({"hr": hr, f"lr{SCALE}": blocks.mean(axis=(1, 3)).astype(np.uint8)})
    write_set(folder, "lr-hr", samples, kind)


def make_pairs(folder: Path, images: int, side: int, kind: str) -> None:
    """Pack AB images like edges2shoes: black lines on white, and a coloured thing on white, with a little noise."""
    random = np.random.default_rng(0)
    samples = []
    for _ in range(images):
        coarse = Image.fromarray(random.integers(0, 200, (6, 6, 3), np.uint8))
        thing = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int64)
        rows, columns = np.mgrid[:side, :side] / side - 0.5
        inside = (rows / 0.3) ** 2 + (columns / 0.45) ** 2 < 1 + 0.2 * np.sin(8 * rows + random.uniform(0, 6))
        photo = np.where(inside[:, :, None], thing + random.integers(-8, 9, thing.shape), 255).clip(0, 255)
        levels = thing.sum(axis=2) // 40 * inside
        lines = (np.diff(levels, axis=0, prepend=0) != 0) | (np.diff(levels, axis=1, prepend=0) != 0)
        edges = np.where(lines[:, :, None], 0, np.full_like(photo, 255))
        samples.append({"ab": np.concatenate((edges, photo), axis=1).astype(np.uint8)})
    write_set(folder, "paired", samples, kind)


def write_set(folder: Path, kind_of_set: Kind, samples: Sequence[dict[str, np.ndarray]], kind: str) -> None:
    """One shard with the images of each sample by role, stored as PNG, JPEG or raw pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / "train-000000.tar"
    listed = []
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples):
            members = {}
            for role, image in sample.items():
                suffix = f"{role}.{SUFFIXES[kind]}"
                members[suffix] = add_member(tar, f"{number:06d}.{suffix}", encoded(image, kind), image.shape)
            listed.append(Sample(f"{number:06d}", f"synthetic {number}", 0, members))
    Index(
        recipe="synthetic",
        split="train",
        kind=kind_of_set,
        scales=(SCALE,) if kind_of_set == "lr-hr" else (),
        licence="none needed",
        origin="bench/loader.py",
        shards=(Shard(shard.name, shard.stat().st_size, sha256_file(shard)),),
        samples=tuple(listed),
    ).save(folder)


def encoded(image: np.ndarray, kind: str) -> bytes:
    if kind == "PNG":
        return encode_png(image)
    if kind == "raw":
        return image.tobytes()
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=95)
    return content.getvalue()


def add_member(tar: tarfile.TarFile, name: str, content: bytes, shape: tuple[int, ...]) -> Member:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    offset = tar.offset + 512  # behind the header, one block in ustar
    tar.addfile(entry, io.BytesIO(content))
    return Member(offset, len(content), shape[0], shape[1])


if __name__ == "__main__":
    run_command(main)
