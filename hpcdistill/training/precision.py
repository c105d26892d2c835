"""`train.precision: auto`: bf16 where the device computes in it natively, else fp32.

The word `auto` is part of a run's identity, what it stands for is not: a plan made on a login node names the same
folder. So a run that goes on elsewhere keeps what it started with, which its checkpoints say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from hpcdistill.console import say, warn
from hpcdistill.storage import JSON_OBJECT, parse_json

BF16_CAPABILITY: Final = (8, 0)  # CUDA's of the first devices that compute in bf16; older ones emulate it
_NAMES: Final = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # Accelerate's name -> ours


def take_precision(configured: str, cpu: bool, folder: Path | None = None) -> str:
    """fp32, bf16 or fp16: `configured`, or what `auto` stands for on this device.

    With `folder`, the run's own, it is said what was taken, and a run that has a checkpoint keeps its precision. All
    ranks come to the same: a collective call for `auto`.
    """
    if configured != "auto":
        return configured
    state = PartialState(cpu=cpu)
    native, device = has_native_bf16(state.device), describe(state.device)
    started = started_with(folder) if folder else None
    if state.num_processes > 1:
        found = gather_object([(native, device, started)])
        started = found[0][2]
        native, device = next((one for one in found if not one[0]), found[0])[:2]
    taken = started or ("bf16" if native else "fp32")
    if folder and started:
        say(f"train.precision: auto keeps {taken}, which this run started with")
        if taken == "bf16" and not native:
            warn(f"train.precision: {device} does not compute in bf16 natively; this run goes on slowly here")
    elif folder:
        say(f"train.precision: auto takes {taken} on {device}")
    return taken


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bf16 by itself; no CPU counts, as most emulate it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


def describe(device: torch.device) -> str:
    """The device's name for messages."""
    if device.type != "cuda":
        return "a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def started_with(folder: Path) -> str | None:
    """The precision that the checkpoints of the run in `folder` were made with; None where none says so.

    They all say the same, so that a damaged one is passed over.
    """
    for path in sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            found = parse_json(path.read_bytes(), JSON_OBJECT).get("precision")
        except (OSError, ValueError):
            continue
        if isinstance(found, str) and found in _NAMES.values():
            return found
    return None


def precision_of(accelerator: Accelerator) -> str:
    """fp32, bf16 or fp16."""
    return _NAMES[accelerator.mixed_precision]
