"""Where a run is, and what of it goes into a checkpoint and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from hpcdistill.methods.base import Method
from hpcdistill.models.registry import load_weights, save_generator, unique_state
from hpcdistill.training.averaging import Averages
from hpcdistill.training.checkpoint import Checkpoint, Checkpoints
from hpcdistill.training.group import TrainedGroup
from hpcdistill.training.run_folder import RunFolder


@dataclass
class Position:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0  # of all sessions
    best: dict[str, Any] | None = None  # {"step", "metrics"}
    last: dict[str, Any] | None = None
    means: dict[str, Any] = field(default_factory=dict)  # sums since the last log line
    log_bytes: int = 0


def save_generators(
    generators: dict[str, nn.Module], which: str, folder: RunFolder, accelerator: Accelerator, step: int
) -> None:
    if accelerator.is_main_process:
        for name, module in generators.items():
            save_generator(module, folder.generator(which, name), {"step": step, "run": folder.path.name})
    accelerator.wait_for_everyone()


def save_checkpoint(
    checkpoints: Checkpoints,
    method: Method,
    groups: dict[str, TrainedGroup],
    averages: Averages | None,
    position: Position,
) -> None:
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, group in groups.items():
        tensors[f"networks/{name}"] = unique_state(group.module)
        tensors[f"optimizers/{name}"] = group.optimizer_tensors()
    for name, module in averages.generators.items() if averages else ():
        tensors[f"averages/{name}"] = unique_state(module)
    for name, module in method.memory.items():
        tensors[f"memory/{name}"] = unique_state(module)
    state = vars(position) | {"scaler": _scaler_state(groups)}
    checkpoints.save(position.step, tensors, state)


def restore_checkpoint(
    found: Checkpoint, method: Method, groups: dict[str, TrainedGroup], averages: Averages | None
) -> Position:
    for name, group in groups.items():
        load_weights(group.module, found.tensors[f"networks/{name}"], str(found.path / "networks" / name))
        group.load_optimizer_tensors(found.tensors[f"optimizers/{name}"])
    for name, module in averages.generators.items() if averages else ():
        load_weights(module, found.tensors[f"averages/{name}"], str(found.path / "averages" / name))
    for name, module in method.memory.items():
        load_weights(module, found.tensors[f"memory/{name}"], str(found.path / "memory" / name))
    state = dict(found.state)
    scaler = state.pop("scaler")
    accelerator = next(iter(groups.values())).accelerator
    if scaler and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    return Position(**state)


def _scaler_state(groups: dict[str, TrainedGroup]) -> dict[str, Any]:
    scaler = next(iter(groups.values())).accelerator.scaler
    return scaler.state_dict() if scaler is not None else {}
