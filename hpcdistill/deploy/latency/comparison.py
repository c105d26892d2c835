"""How long networks take in each form, side by side: median, mean, p95, images a second, memory.

All forms take turns in one run, so that another program's load hits all alike. On a CPU the median of the processor
time is the steadier number; with several threads it is the sum over them, waiting in circles included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from hpcdistill.console import err
from hpcdistill.deploy.latency.memory import TORCH_ALONE, peak_memory
from hpcdistill.deploy.latency.subjects import Size, Subject
from hpcdistill.deploy.latency.timing import Pass, Timing, device_name, synchronise, threads, turns
from hpcdistill.deploy.latency.variants import RUNTIMES, VARIANTS, Place, Unavailable, exported_file, prepare
from hpcdistill.deploy.session import Batch
from hpcdistill.errors import UserError
from hpcdistill.models.registry import save_generator

ROUNDS, WARM_UPS = 20, 3


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
                if settings.memory and settings.device == "cpu":
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
    if subject.exported is None:
        return settings.variants
    return [next((variant for variant, name in RUNTIMES.items() if name == subject.format), subject.format)]


def _place(subject: Subject, settings: Settings, folder: Path) -> Place:
    size = settings.size or subject.size()
    subject.check_size(size)
    return Place(subject.example(size), settings.device, folder)


def _entrants(
    subjects: Sequence[Subject], settings: Settings, places: dict[int, Place]
) -> tuple[list[_Entrant], list[dict[str, Any]]]:
    """Everything that can be measured, ready to run, and a row for each that cannot."""
    entrants, missing = [], []
    for subject in subjects:
        place = places[id(subject)]
        height, width = place.image.shape[-2:]
        expected = None if subject.exported else _array(prepare("eager", subject, _on_cpu(place))())
        for variant in _forms(subject, settings):
            about = {"model": subject.label, "network": subject.about.network, "variant": variant}
            row: dict[str, Any] = {"_subject": id(subject), **about, "input": [height, width]}
            row["output"] = [height * subject.about.scale, width * subject.about.scale]
            before = torch.cuda.memory_allocated() if settings.device != "cpu" else 0
            try:
                run = prepare(variant, subject, place)
            except Unavailable as reason:
                missing.append({**row, "unavailable": str(reason)})
                continue
            if expected is not None:
                row["difference"] = float(np.abs(_array(run()) - expected).max())
            if settings.memory and settings.device != "cpu":
                row["peak_bytes"] = _gpu_peak(run, settings.device) - before  # without the forms that wait beside it
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


def _peak(entrant: _Entrant, place: Place, count: int, known: dict[tuple[str, str], int | None]) -> int | None:
    """Peak memory of a process that makes a pass and nothing else; None where there cannot be one."""
    subject = entrant.subject
    key = str(id(subject)), entrant.variant
    if key not in known:  # threads change little
        if subject.exported is not None:
            file: Path | str = subject.exported
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


def _gpu_peak(run: Pass, device: str) -> int:
    """The most that PyTorch has allocated on the GPU during a pass, all that lay there before included."""
    run()
    synchronise(device)
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated()


def _array(made: Any) -> Batch:
    return made.float().cpu().numpy() if isinstance(made, torch.Tensor) else made
