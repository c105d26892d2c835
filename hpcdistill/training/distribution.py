"""The processes of a run: Accelerate set up from the configuration, with clear words for what cannot work."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType

from hpcdistill.errors import UserError, nearest
from hpcdistill.ranks.rendezvous import join
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.determinism import prepare_determinism
from hpcdistill.training.engines import requested_settings
from hpcdistill.training.memory import keep_freed_memory
from hpcdistill.training.precision import take_precision

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


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
