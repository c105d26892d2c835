"""The forms that `benchmark latency` runs a network in: PyTorch in several ways, and what it is exported to."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpcdistill.deploy.formats import FORMATS
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.latency.subjects import Subject
from hpcdistill.deploy.latency.timing import Pass
from hpcdistill.deploy.session import Batch
from hpcdistill.errors import UserError, nearest

RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino", "ncnn": "ncnn"}  # variant -> the format that it reads
IN_TORCH = ("eager", "channels_last", "compiled", "bf16", "cuda_graph")
VARIANTS = (*IN_TORCH, *RUNTIMES)


class Unavailable(Exception):
    """Why a variant cannot be measured here: no fault, the others are."""


@dataclass(frozen=True)
class Place:
    """Where a variant runs, and on what."""

    image: Batch  # [1, C, H, W]
    device: str  # cpu or cuda
    folder: Path  # for exported files, which later thread counts and the memory's process open again


def chosen_variants(text: str | None) -> tuple[str, ...]:
    """The variants of a comma-separated list, all without one; UserError for an unknown one."""
    if text is None:
        return VARIANTS
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--variants: no variant '{name}'; {nearest(name, VARIANTS)}")
    if not names:
        raise UserError(f"--variants: is empty; choose of {', '.join(VARIANTS)}")
    return names


def prepare(variant: str, subject: Subject, place: Place) -> Pass:
    """What runs `subject` once in this form, with as many threads as PyTorch has now. Raises Unavailable."""
    if subject.exported is not None:
        return _in_runtime(subject.format, subject.exported, place)
    if variant in RUNTIMES:
        return _in_runtime(RUNTIMES[variant], _export(RUNTIMES[variant], subject, place), place)
    layout = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    image = torch.from_numpy(place.image).to(place.device, memory_format=layout)
    network: nn.Module = cast(Any, subject.inference_form()).to(place.device, memory_format=layout)
    if variant == "cuda_graph":
        return _in_cuda_graph(network, image)
    if variant == "compiled":
        return _compiled(network, image)
    return _in_torch(network, image, torch.bfloat16 if variant == "bf16" else None)


def _in_torch(network: Any, image: Tensor, autocast: torch.dtype | None = None) -> Pass:
    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast(image.device.type, autocast, enabled=autocast is not None):
            made: Tensor = network(image)
            return made

    return run


def _compiled(network: nn.Module, image: Tensor) -> Pass:
    """torch.compile for this one size; needs a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise Unavailable(f"no C++ compiler ({compiler}); install one, or name it in CXX")
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = 256  # beyond 8 networks of one class it would run them eagerly, in silence
    torch._inductor.config.cpp.threads = torch.get_num_threads()  # part of what its cache is looked up by
    run = _in_torch(torch.compile(network), image)
    try:
        run()
    except Exception as error:  # its own class for each of a compiler's misfortunes
        raise Unavailable(f"torch.compile: {_first_line(error)}") from None
    return run


def _in_cuda_graph(network: nn.Module, image: Tensor) -> Pass:
    """Captured once and replayed: no Python and no launches between the kernels."""
    if image.device.type != "cuda":
        raise Unavailable("no GPU here" if not torch.cuda.is_available() else "is for --device cuda")
    with torch.inference_mode():
        side = cast(Any, torch.cuda.Stream)()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are chosen and workspaces taken before the capture
                network(image)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = network(image)

    def run() -> Any:
        graph.replay()
        return made

    return run


def _in_runtime(name: str, file: Path, place: Place) -> Pass:
    """Opened anew: a session has the threads that PyTorch had then."""
    if place.device != "cpu":
        raise Unavailable("is measured on the CPU alone; leave --device out")
    try:
        session = FORMATS[name]().open(file).session
        session(place.image)
    except (UserError, ImportError) as error:
        raise Unavailable(_first_line(error)) from None
    return lambda: session(place.image)


def _export(name: str, subject: Subject, place: Place) -> Path:
    """The file of `subject` in the format `name`, written unless it is there. Raises Unavailable."""
    try:
        file = exported_file(name, subject, place)
        if not file.exists() and place.device == "cpu":
            form, network = FORMATS[name](), subject.inference_form()
            form.check(network, subject.about, Options())
            form.write(network, subject.about, file, Options())
    except (UserError, ImportError) as error:
        raise Unavailable(_first_line(error)) from None
    return file


def exported_file(name: str, subject: Subject, place: Place) -> Path:
    """Where the exported file of `subject` in the format `name` is: it is one, or it is written there."""
    return (
        subject.exported or place.folder / f"{name}-{id(subject)}{FORMATS[name].suffix}"
    )  # two formats have a .bin beside


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
