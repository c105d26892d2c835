"""500 seeded damages to pictures and model files that are given to `infer`: success or one line, in little memory.

Each kind of file has a process of its own, so that the memory is its own, and what a decoder in C does ends no test.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damages import damaged, ends_well

GIB = 1 << 30
PICTURES, MODELS = 60, 20  # damages of each file


def picture_files() -> dict[str, bytes]:
    """Small pictures of all kinds that are read."""
    from imagecodecs import png_encode
    from PIL import Image

    random = np.random.default_rng(0)
    rgb = Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "rgb.png": (rgb, {}),
        "palette.png": (rgb.quantize(16), {"transparency": 2}),
        "gray.png": (Image.fromarray(random.integers(0, 65536, (9, 8), dtype=np.uint16)), {}),
        "turned.jpg": (rgb, {"exif": exif}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "alpha.webp": (rgb.convert("RGBA"), {"lossless": True}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, name.rpartition(".")[2].replace("jpg", "jpeg"), **options)
        files[name] = buffer.getvalue()
    files["deep.png"] = png_encode(random.integers(0, 65536, (9, 8, 4), dtype=np.uint16))
    return files


def model_files(folder: Path) -> dict[str, bytes]:
    """The files of a small network in the formats that are opened again."""
    from hpcdistill.deploy.formats import SUFFIXES
    from hpcdistill.export import main
    from hpcdistill.models.registry import save_generator
    from hpcdistill.models.sr_network import build_network

    save_generator(build_network("fsrcnn", 2), folder / "n.safetensors")
    files = {"n.safetensors": (folder / "n.safetensors").read_bytes()}
    for suffix, name in SUFFIXES.items():
        file = folder / f"{name}{suffix}"  # ncnn and OpenVINO both put a .bin beside it
        main([name, str(folder / "n.safetensors"), "--out", str(file)])
        files[file.name] = file.read_bytes()
    return files


def give(kind: str, folder: Path) -> dict[str, int]:
    """Damage the files of a kind and give them to the command; how many were taken, how many refused."""
    from hpcdistill.deploy.latency.memory import peak
    from hpcdistill.infer import main

    whole = picture_files()
    files = whole if kind == "pictures" else model_files(folder)
    taken = {True: 0, False: 0}
    (folder / "p.png").write_bytes(whole["rgb.png"])
    for name, content in files.items():
        for seed in range(PICTURES if kind == "pictures" else MODELS):
            file = folder / name
            file.write_bytes(damaged(content, seed))
            words = [str(file)] if kind == "pictures" else [str(file), str(folder / "p.png")]
            taken[ends_well(lambda words=words: main([*words, "--out", str(folder / "out")]))] += 1
        (folder / name).write_bytes(content)
    return {"files": len(files), "taken": taken[True], "refused": taken[False], "memory": peak()}


@pytest.mark.parametrize("kind", ["pictures", "models"])
def test_damaged_files_are_success_or_one_line(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, __file__, kind, str(tmp_path)]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=here)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] > 0
    assert counts["taken"] + counts["refused"] == counts["files"] * (PICTURES if kind == "pictures" else MODELS)
    assert counts["memory"] < 2 * GIB


if __name__ == "__main__":
    print(json.dumps(give(sys.argv[1], Path(sys.argv[2]))))
