"""The packed sets for bench/gpu.py, at most 40 MB: `python bench/gpu_data.py [--sr DIR] [--a DIR --b DIR] [--out DIR]`.

`--sr` photographs for super-resolution, `--a` and `--b` those of two domains for translation (unpaired). Without them
pictures are drawn: enough to measure how long things take, not what is learnt. bench/gpu.py looks for
a folder named gpu-data; git ignores it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from packing import _drawing

from hpcdistill.command import UserPath, run_command
from hpcdistill.console import say
from hpcdistill.data.folders import list_images
from hpcdistill.data.images import encode_png
from hpcdistill.errors import UserError
from hpcdistill.storage import CLONE

LIMIT = 40_000_000  # bytes of all sets together
COUNTS = {"sr": 48, "sr-test": 4, "a": 80, "b": 80}  # pictures taken, evenly from the whole folder
SIDES = {"sr": (480, 320), "a": (256, 256)}  # width and height of drawn ones
PACK = CLONE / "shards" / "pack.py"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sr", action=UserPath, metavar="DIR", help="photographs of at least 192x192 pixels")
    parser.add_argument("--a", action=UserPath, metavar="DIR", help="pictures of one domain; with --b")
    parser.add_argument("--b", action=UserPath, metavar="DIR", help="pictures of the other domain")
    parser.add_argument("--out", action=UserPath, default=CLONE / "gpu-data", help="default: gpu-data in the clone")
    options = parser.parse_args(arguments)
    if (options.a is None) != (options.b is None):
        raise UserError("--a and --b belong together: name both, or neither")
    size = make(options.out, options.sr, (options.a, options.b) if options.a else None)
    say(f"{options.out}: {size / 1e6:.1f} MB")


def make(out: Path, sr: Path | None, domains: tuple[Path, Path] | None, counts: dict[str, int] = COUNTS) -> int:
    """Pack the sets into the new folder `out`, whole or not at all; bytes. UserError where they are too large."""
    if out.exists():
        raise UserError(f"{out} is there already; remove it, or name another folder with --out")
    with tempfile.TemporaryDirectory(dir=_made(out.parent)) as path:
        folder, packed = Path(path) / "pictures", Path(path) / "packed"
        whole = counts["sr"] + counts["sr-test"]
        pictures = _taken(sr, whole) if sr else _drawn(folder / "drawn-sr", whole, SIDES["sr"])
        every = whole // counts["sr-test"]
        _link(pictures[::every], folder / "sr-test")
        _link([file for number, file in enumerate(pictures) if number % every], folder / "sr")
        for name, given in zip("ab", domains or (None, None), strict=True):
            chosen = _taken(given, counts[name]) if given else _drawn(folder / f"d{name}", counts[name], SIDES["a"])
            _link(chosen, folder / "unpaired" / f"train{name.upper()}")
        for recipe, source in (("folder", "sr"), ("folder", "sr-test"), ("unpaired", "unpaired")):
            words = [recipe, "--source", str(folder / source), "--out", str(packed / source)]
            command = [sys.executable, str(PACK), *words]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{source} cannot be packed: {done.stderr.strip().splitlines()[-1]}")
        size = sum(file.stat().st_size for file in packed.rglob("*") if file.is_file())
        if size > LIMIT:
            raise UserError(f"the sets take {size / 1e6:.0f} MB, the limit is {LIMIT / 1e6:.0f}; name smaller pictures")
        packed.replace(out)
    return size


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _taken(folder: Path, count: int) -> list[Path]:
    """`count` pictures of the folder, evenly spread over their names."""
    found = list_images(folder)
    if len(found) < count:
        raise UserError(f"{folder} has {len(found)} pictures; {count} are wanted")
    return [found[len(found) * number // count] for number in range(count)]


def _drawn(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    random = np.random.default_rng(len(folder.name) + ord(folder.name[-1]))
    files = [_made(folder) / f"{number:03d}.png" for number in range(count)]
    for file in files:
        file.write_bytes(encode_png(_drawing(random, *size)))
    return files


def _link(files: Sequence[Path], folder: Path) -> None:
    _made(folder)
    for number, file in enumerate(files):
        shutil.copy(file, folder / f"{number:03d}{file.suffix.lower()}")


if __name__ == "__main__":
    run_command(main)
