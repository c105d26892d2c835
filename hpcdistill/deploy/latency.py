"""How long networks take in each form, side by side: median, mean, p95, images a second, memory.

All forms take turns in one run, so that another program's load hits all alike. On a CPU the median of the processor
time is the steadier number; with several threads it is the sum over them, waiting in circles included.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from rich.progress import track

from hpcdistill.console import err
from hpcdistill.deploy.latency_subjects import Size, Subject
from hpcdistill.deploy.latency_variants import (
    RUNTIMES,
    VARIANTS,
    Pass,
    Place,
    Unavailable,
    exported_file,
    prepare,
)
from hpcdistill.deploy.model import Planes
from hpcdistill.errors import UserError, plural
from hpcdistill.models.registry import save_generator

T = TypeVar("T")
ROUNDS, WARM_UPS = 20, 3
TORCH_ALONE = ""  # in place of a variant, to `peak_memory`: what PyTorch and hpcdistill take without a network


@dataclass
class Timing:
    """The passes of one form, in seconds: on the clock, and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, run: Pass, device: str) -> Any:
        """One pass, measured; returns what it makes."""
        synchronise(device)
        wall, cpu = time.perf_counter(), time.process_time()
        made = run()
        synchronise(device)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return made

    def summary(self) -> dict[str, float]:
        """Milliseconds and images a second, for one image a pass."""
        wall, cpu = 1e3 * np.array(self.wall), 1e3 * np.array(self.cpu)
        return {
            "median_ms": float(np.median(wall)),
            "mean_ms": float(wall.mean()),
            "p95_ms": float(np.percentile(wall, 95)),
            "cpu_median_ms": float(np.median(cpu)),
            "cpu_mean_ms": float(cpu.mean()),
            "images_per_second": float(1e3 / wall.mean()),
        }


@dataclass(frozen=True)
class Settings:
    """How it is measured."""

    variants: Sequence[str] = VARIANTS
    threads: Sequence[int] = ()  # none: as many as PyTorch has
    size: Size | None = None  # of the image that goes in; None: the literature's
    rounds: int = ROUNDS
    warm_ups: int = WARM_UPS
    device: str = "cpu"
    memory: bool = True


@dataclass
class _Entrant:
    """A network in one form, and what is known of it."""

    subject: Subject
    variant: str
    run: Pass
    row: dict[str, Any]
    timing: Timing = field(default_factory=Timing)


def compare(subjects: Sequence[Subject], settings: Settings) -> dict[str, Any]:
    """The rows of all subjects, forms and numbers of threads, and what they were measured on; JSON values.

    A form that is not to be had here has a row with `unavailable`, which says why.
    """
    if not settings.rounds:
        raise UserError("--rounds 0: nothing would be measured; give 1 or more")
    rows: list[dict[str, Any]] = []
    peaks: dict[tuple[str, str], int | None] = {}
    with tempfile.TemporaryDirectory(prefix="hpcdistill-latency-") as folder:
        places = {id(subject): _place(subject, settings, Path(folder)) for subject in subjects}
        for count in settings.threads or [torch.get_num_threads()]:
            with threads(count):
                entrants, missing = _entrants(subjects, settings, places)
                _race(entrants, settings)
            for entrant in entrants:
                place = places[id(entrant.subject)]
                if settings.memory:
                    entrant.row["peak_bytes"] = _peak(entrant, place, count, peaks)
                entrant.row |= {"threads": count, **entrant.timing.summary()}
            rows += [entrant.row for entrant in entrants] + [{**row, "threads": count} for row in missing]
        alone = None
        if settings.memory and settings.device == "cpu":
            alone = peak_memory({"variant": TORCH_ALONE})
    order = {(id(s), v): n for n, (s, v) in enumerate((s, v) for s in subjects for v in _forms(s, settings))}
    rows.sort(key=lambda row: order[row.pop("_subject"), row["variant"]])
    about = {"device": device_name(settings.device), "torch": torch.__version__, "torch_alone_bytes": alone}
    return {**about, "rounds": settings.rounds, "warm_ups": settings.warm_ups, "rows": rows}


def _forms(subject: Subject, settings: Settings) -> Sequence[str]:
    """What a subject is run in: an exported file, in its own runtime alone."""
    if subject.session is None:
        return settings.variants
    return [next((variant for variant, name in RUNTIMES.items() if name == subject.format), subject.format)]


def _place(subject: Subject, settings: Settings, folder: Path) -> Place:
    size = settings.size or subject.size()
    subject.check_size(size)
    return Place(example(subject, size), settings.device, folder)


def example(subject: Subject, size: Size) -> Planes:
    """Noise `[1, C, H, W]` in the network's range, the same each time: what a pass takes does not depend on it."""
    about = subject.about
    noise = np.random.default_rng(0).random((1, about.channels, *size), dtype=np.float32)
    return cast(Planes, noise * np.float32(about.high - about.low) + np.float32(about.low))


def _entrants(
    subjects: Sequence[Subject], settings: Settings, places: dict[int, Place]
) -> tuple[list[_Entrant], list[dict[str, Any]]]:
    """Everything that can be measured, ready to run, and a row for each that cannot."""
    entrants, missing = [], []
    for subject in subjects:
        place = places[id(subject)]
        height, width = place.image.shape[-2:]
        expected = None if subject.session else _array(prepare("eager", subject, _on_cpu(place))())
        for variant in _forms(subject, settings):
            about = {"model": subject.label, "network": subject.about.network, "variant": variant}
            row: dict[str, Any] = {"_subject": id(subject), **about, "input": [height, width]}
            row["output"] = [height * subject.about.scale, width * subject.about.scale]
            try:
                run = prepare(variant, subject, place)
            except Unavailable as reason:
                missing.append({**row, "unavailable": str(reason)})
                continue
            if expected is not None:
                row["difference"] = float(np.abs(_array(run()) - expected).max())
            entrants.append(_Entrant(subject, variant, run, row))
    return entrants, missing


def _on_cpu(place: Place) -> Place:
    return Place(place.image, "cpu", place.folder)


def _race(entrants: Sequence[_Entrant], settings: Settings) -> None:
    """The warm-ups of each, then all in turns."""
    for entrant in entrants:
        for _ in range(settings.warm_ups):
            entrant.run()
    rounds = turns(entrants, settings.rounds)
    for turn in track(rounds, "measuring", settings.rounds, console=err, transient=True, disable=not err.moves):
        for entrant in turn:
            entrant.timing.measure(entrant.run, settings.device)


def turns(entrants: Sequence[T], rounds: int) -> Iterator[list[T]]:
    """All of them in each round, each time in another order: a form pays for what the one before has left of caches."""
    order = random.Random(0)
    for _ in range(rounds):
        yield order.sample(entrants, len(entrants))


def _peak(entrant: _Entrant, place: Place, count: int, known: dict[tuple[str, str], int | None]) -> int | None:
    """Peak memory of a pass: on a GPU what PyTorch allocates, else of a process of its own; None where neither is."""
    if place.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        entrant.run()
        synchronise(place.device)
        return int(torch.cuda.max_memory_allocated())
    subject = entrant.subject
    key = str(id(subject)), entrant.variant
    if key not in known:  # threads change little
        if subject.session is not None:
            file: Path | str = subject.label
        elif entrant.variant in RUNTIMES:  # opened, not exported: PyTorch's exporter takes more than any pass
            file = exported_file(RUNTIMES[entrant.variant], subject, place)
        else:
            file = place.folder / f"{id(subject)}.safetensors"
            assert subject.network is not None
            try:
                save_generator(subject.network, file)
            except UserError:  # a class from elsewhere, which could not be loaded again
                file = ""
        size = list(place.image.shape[-2:])
        job = {"file": str(file), "variant": entrant.variant, "size": size, "threads": count}
        known[key] = peak_memory(job) if file else None
    return known[key]


def peak_memory(job: dict[str, Any]) -> int | None:
    """The largest resident memory, in bytes, of a process that does nothing but `job` (see `latency_memory`).

    PyTorch and all other libraries are in it. None where the process could not say.
    """
    command = [sys.executable, "-m", "hpcdistill.deploy.latency_memory", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return None
    return int(done.stdout.split()[-1])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch, and what is opened within, with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """As people call it: the GPU's or the processor's name."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    import platform

    return names[0] if names and names[0] else platform.processor() or platform.machine() or "a CPU"


def place_name(device: str, count: int) -> str:
    """The device's name with, of a CPU, the number of threads: a time belongs to both."""
    return device_name(device) if device != "cpu" else f"{device_name(device)}, {plural(count, 'thread')}"


def _array(made: Any) -> Planes:
    return made.float().cpu().numpy() if isinstance(made, torch.Tensor) else made
