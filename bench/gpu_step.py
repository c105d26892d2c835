"""What a training step costs on a device: `python bench/gpu_step.py [--device cpu] [--rows NAME ...]`.

One JSON object a line, each as soon as it is measured: super-resolution at x4, batch 16, HR 192, luma; translation
256x256, batch 1. The data are noise that lies ready. The clock is read after a synchronisation, around five steps of
the real updates, log lines not included; a step is the median over such blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_parts import SMALL
from torch import Tensor

from hpcdistill.command import run_command
from hpcdistill.console import say
from hpcdistill.errors import UserError, is_out_of_memory
from hpcdistill.methods.base import Method
from hpcdistill.run import load_run
from hpcdistill.storage import CLONE
from hpcdistill.sweep.demos.shape_pairs import write_random_vgg16
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.loop import Training
from hpcdistill.training.run_folder import RunFolder

CONFIGS = {  # row -> the run whose step it is
    "fsrcnn": ("configs/fsrcnn/x4.yaml",),
    "dssd student": ("configs/dssd/x4.yaml",),
    "fesd": ("configs/fesd/horse2zebra.yaml", "method.student_steps=1"),
    "dssd teacher": ("configs/dssd/teacher_x4.yaml",),
    "pisr student": ("configs/pisr/x4.yaml",),
    "pisr teacher": ("configs/pisr/teacher_x4.yaml",),
    "dcd": ("configs/dcd/horse2zebra.yaml", "method.student_steps=1"),
    "omgd": ("configs/omgd/horse2zebra.yaml", "method.schedule=online", "method.blocks=null", "method.student_steps=1"),
}
# On a GPU: what a user has by default first. A CPU rehearses the first alone.
FORMS: dict[str, dict[str, Any]] = {
    "contiguous": {"channels_last": False},
    "one graph": {"channels_last": False, "graph": "auto"},
    "channels last": {"channels_last": True},
    "bf16": {"channels_last": False, "precision": "bf16"},
    "bf16, channels last": {"channels_last": True, "precision": "bf16"},
}
TRANSLATION = ("fesd", "dcd", "omgd")
WARM_UPS, BLOCK, BLOCKS = 3, 5, 3  # steps before, steps between two readings of the clock, readings at least
STEPS = 10**6  # of the run that the steps pretend to be part of


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/gpu_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of each measurement (default: 1.5)")
    parser.add_argument("--rows", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="NAME")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--small", action="store_true", help="small pictures and batches: to see that it runs")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu, or run where there is a GPU")
    with tempfile.TemporaryDirectory() as path:
        vgg = Path(path) / "vgg16-untrained.safetensors"
        write_random_vgg16(vgg)
        for name in options.rows:
            for form in options.forms:
                say(f"{name}, {form}")
                try:
                    row = measure(name, FORMS[form], options.device, options.seconds, vgg, options.small)
                except Exception as error:  # the rows after it are worth having all the same
                    row = {"error": f"{type(error).__name__}: {error}".strip()[:500]}
                    if is_out_of_memory(error):
                        row["error"] = f"no memory is left: {row['error']}"
                sys.stdout.write(json.dumps({"row": name, "form": form} | row) + "\n")
                sys.stdout.flush()


def measure(
    name: str, form: dict[str, Any], device: str, seconds: float, vgg: Path, small: bool
) -> dict[str, float | int]:
    """Median seconds of a step, and the most memory that PyTorch had taken on the device."""
    translation = name in TRANSLATION
    own = [f"method.vgg={vgg}", *(SMALL if small else ())] if translation else []
    torch.manual_seed(0)
    run = load_run([str(CLONE / part) if part.startswith("configs/") else part for part in CONFIGS[name]] + own)
    method = run.untrained()
    method.prepare(run.config.data.crop)
    size = 1 if translation else 2 if small else 16
    batches = noise(translation, size, 64 if small else 256 if translation else 192)
    config = TrainConfig(device=device, batch_size=size, gradient_norms_every=0, trackers=(), **form)  # type: ignore[arg-type]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        folder.create("", {})
        try:
            times = block_seconds(method, folder, config, batches, seconds)
        finally:
            folder.release()
    memory = {"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    return {"seconds": statistics.median(times), "best": min(times), "steps": BLOCK * len(times), **memory}


def block_seconds(
    method: Method, folder: RunFolder, config: TrainConfig, batches: list[dict[str, Tensor]], seconds: float
) -> list[float]:
    """Seconds a step of blocks of steps, for `seconds` and three blocks at least."""
    accelerator = make_accelerator(config, folder.path)
    options: dict[str, Any] = {"steps": STEPS, "evaluate_every": STEPS, "seed": 0}
    training = Training(method, None, None, folder, accelerator, config, **options)  # type: ignore[arg-type]
    phases, count = training.stretches[0].segment.phases, training.batches
    placed = [{key: value.to(accelerator.device) for key, value in batch.items()} for batch in batches]
    number = 0

    def block(steps: int) -> float:
        nonlocal number
        synchronise(accelerator.device)
        start = time.perf_counter()
        for _ in range(steps):
            training.updates.make(phases, number, [placed[(number + part) % len(placed)] for part in range(count)])
            number += 1
        synchronise(accelerator.device)
        return (time.perf_counter() - start) / steps

    block(WARM_UPS)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < BLOCKS or time.perf_counter() - started < seconds:
        times.append(block(BLOCK))
    if stopped := training.guard.found(accelerator):
        raise UserError(f"{stopped} became NaN or infinite")
    return times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def noise(translation: bool, size: int, side: int) -> list[dict[str, Tensor]]:
    """Eight batches of noise, as the readers give them."""
    random = torch.Generator().manual_seed(0)

    def images(channels: int, pixels: int) -> Tensor:
        return torch.rand(size, channels, pixels, pixels, generator=random)

    if translation:
        return [{name: 2 * images(3, side) - 1 for name in ("a", "b")} for _ in range(8)]
    return [{"hr": images(1, side), "lr2": images(1, side // 2), "lr4": images(1, side // 4)} for _ in range(8)]


if __name__ == "__main__":
    run_command(main)
