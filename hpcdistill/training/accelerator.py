"""Accelerate set up from the configuration: device, processes, precision, memory; one line for what cannot work.

`train.precision: auto` is bf16 where the device computes in it natively, else fp32. The word `auto` is part of a run's
identity, what it stands for is not: a plan made on a login node names the same folder. So a run that goes on elsewhere
keeps what it started with, which its checkpoints say.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from pathlib import Path
from typing import Final

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, gather_object

from hpcdistill.console import say, warn
from hpcdistill.default_generator import is_shared
from hpcdistill.errors import Crowded, UserError, nearest
from hpcdistill.ranks.rendezvous import join
from hpcdistill.storage import json_object, parse_json
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.deepspeed import requested_settings
from hpcdistill.training.determinism import prepare_determinism

BF16_CAPABILITY: Final = (8, 0)  # CUDA's of the first devices that compute in bf16; older ones emulate it
_PRECISION: Final = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # our name -> Accelerate's
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)


def make_accelerator(config: TrainConfig, folder: Path | None = None) -> Accelerator:
    """An Accelerator for this configuration. A process may make several, one after the other (teacher, student)."""
    cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: no CUDA device is visible; use train.device=cpu, or check nvidia-smi")
    if cpu and config.precision == "fp16":
        raise UserError("train.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
    _check_trackers(config.trackers)
    requested_settings(config)  # refuses what cannot be, before anything is started
    if config.deterministic:
        prepare_determinism()
    join(cpu, config.timeout)
    precision = _PRECISION[take_precision(config.precision, cpu, folder)]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        if is_shared():
            raise Crowded(f"train.precision: this run goes on in {precision}, the runs beside it in another")
        AcceleratorState._reset_state()  # a teacher of another precision came before in this process
    if cpu:
        keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    # Accelerate has no word yet for torch's new name of it.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=cpu,
        log_with=list(config.trackers) if folder and config.trackers else None,
        project_dir=str(folder) if folder else None,
        # Buffers are alike on every rank (seeded, or synchronised by their layer); broadcasting them at each forward
        # would also overwrite statistics that autograd still needs.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    share, rest = divmod(config.batch_size, accelerator.num_processes)
    if rest:
        valid = max(1, share) * accelerator.num_processes
        raise UserError(
            f"train.batch_size: {config.batch_size} is global and cannot be cut over {accelerator.num_processes} "
            f"ranks; use {valid}"
        )
    if share % config.accumulation:
        raise UserError(
            f"train.accumulation: {config.batch_size} samples over {accelerator.num_processes} ranks cannot be cut "
            f"into {config.accumulation} equal micro-batches; choose a divisor of {share}"
        )
    return accelerator


def _check_trackers(names: tuple[str, ...]) -> None:
    known = [str(name) for name in LoggerType if str(name) != "all"]
    for name in names:
        if name not in known:
            raise UserError(f"train.trackers: no tracker '{name}'; {nearest(name, known)}")
        if name not in {str(available) for available in get_available_trackers()}:
            raise UserError(f"train.trackers: {name} is not installed; `pip install {name}`, or leave it out")


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
            found = parse_json(path.read_bytes(), json_object).get("precision")
        except (OSError, ValueError):
            continue
        if isinstance(found, str) and found in _PRECISION:
            return found
    return None


def precision_of(accelerator: Accelerator) -> str:
    """fp32, bf16 or fp16."""
    return next(ours for ours, name in _PRECISION.items() if name == accelerator.mixed_precision)


def keep_freed_memory() -> bool:
    """Let glibc keep the pages of freed feature maps instead of returning them to the system; True when it could.

    By default it maps every large tensor anew and the kernel zeroes its pages: two fifths of a super-resolution
    step's processor time. The process then keeps the most it has ever used, a twelfth more at its peak.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
