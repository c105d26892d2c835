"""Where a run is, and what of it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Method
from hpcdistill.models.registry import load_weights, unique_state
from hpcdistill.storage import Damaged, parse_json, write_bytes
from hpcdistill.training.checkpoint import Checkpoint, Checkpoints
from hpcdistill.training.layout import Layout
from hpcdistill.training.networks import Networks
from hpcdistill.training.run_folder import RunFolder


@dataclass
class Position:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0  # of all sessions
    best: dict[str, Any] | None = None  # {"step", "metrics"}
    last: dict[str, Any] | None = None
    bests: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `best`, by `Segment.judged`
    means: dict[str, Any] = field(default_factory=dict)  # sums since the last log line
    log_bytes: int = 0
    due: bool = False  # the evaluation of this step was interrupted, or never begun
    precision: str | None = None  # what train.precision came to, for `precision.started_with`
    layout: Layout | None = None  # what train.channels_last came to; None of before there was `auto`

    def kept(self) -> list[str]:
        """The folders of the best weights that there are."""
        return [*(["best"] if self.best else []), *map(best_of, self.bests)]


@dataclass
class _Saved(Position):
    """state.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    scaler: dict[str, Any] = field(default_factory=dict)


_STATE: TypeAdapter[_Saved] = TypeAdapter(_Saved)


def best_of(judged: str | None) -> str:
    """The folder of the weights that were best by the metric of generator `judged`, None: by the selected one."""
    return f"best-{judged}" if judged else "best"


def newest_checkpoint(checkpoints: Checkpoints, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint to go on from. Rank 0 chooses: a file system may show the others an older folder."""
    found = checkpoints.newest() if accelerator.is_main_process else None
    if accelerator.num_processes > 1:
        [step] = broadcast_object_list([found.step if found else None])
        if step is not None and not accelerator.is_main_process:
            found = checkpoints.read(step)
    return found


def started_layout(found: Checkpoint | None) -> Layout | None:
    """The memory layout that the run has had so far; None for one that begins."""
    if found is None:
        return None
    return _position(found)[0].layout or "contiguous"  # what the default was when checkpoints did not say


def save_checkpoint(
    checkpoints: Checkpoints,
    networks: Networks,
    position: Position,
    folder: RunFolder,
    put_back: Mapping[str, Mapping[str, Tensor]],
    background: bool = False,
) -> None:
    """Write everything that the rest of the run depends on: also the best weights, which a segment may take back and
    a session that is killed after this may replace.

    Every rank calls it: rank 0 writes, the others help where weights are cut over the ranks.
    With `background` it is copied to the CPU and written by a thread while training goes on; what goes wrong there
    is raised by the next save or by `checkpoints.wait`.
    """
    writes, method = networks.accelerator.is_main_process, networks.method
    if writes:
        folder.confirm()
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, group in networks.groups.items():
        if not (writes or group.collective):
            continue
        with group.gathered():
            if writes:
                state = unique_state(group.module)
                tensors[f"networks/{name}"] = _copied(state) if group.collective else state
        tensors[f"optimizers/{name}"] = group.optimizer_tensors()
    if not writes:
        return
    tensors |= {f"averages/{name}": unique_state(module) for name, module in networks.averaged.items()}
    tensors |= {f"memory/{name}": unique_state(module) for name, module in method.memory.items()}
    tensors |= {name: dict(state) for name, state in put_back.items()}  # see segments.PutBack
    scaler = networks.accelerator.scaler
    record = vars(position) | {"scaler": scaler.state_dict() if scaler is not None else {}}
    best = _best_files(position, method, folder)
    # A best save of an earlier version has no folder of networks beside its generators.
    files = {name: file.read_bytes() for name, file in best.items() if file.parent.is_dir()}
    if background:
        # Copies also on the CPU: the next update changes the weights in place.
        collective = [name for name, group in networks.groups.items() if group.collective]
        copied = {f"{kind}/{name}" for kind in ("networks", "optimizers") for name in collective}
        copies = {name: values if name in copied else _copied(values) for name, values in tensors.items()}
        checkpoints.start(position.step, copies, record, files)
    else:
        checkpoints.save(position.step, tensors, record, files)


def restore_checkpoint(found: Checkpoint, networks: Networks, folder: RunFolder) -> Position:
    """Take back what `save_checkpoint` wrote; a UserError when it is of another method or architecture."""
    method, accelerator = networks.method, networks.accelerator
    for name, group in networks.groups.items():
        with group.replaced():
            load_weights(group.module, *_tensors(found, f"networks/{name}"))
        group.load_optimizer_tensors(_tensors(found, f"optimizers/{name}")[0])
    for name, module in networks.averaged.items():
        load_weights(module, *_tensors(found, f"averages/{name}"))
    for name, module in method.memory.items():
        load_weights(module, *_tensors(found, f"memory/{name}"))
    position, scaler = _position(found)
    if scaler and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    if accelerator.is_main_process:
        for name, file in _best_files(position, method, folder).items():
            if (content := found.files.get(name)) is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(file, content)
    accelerator.wait_for_everyone()
    return position


def _position(found: Checkpoint) -> tuple[Position, dict[str, Any]]:
    """Where the run was, and the state of the scaler; Damaged when state.json says what this version does not write."""
    try:
        saved = parse_json(found.files["state.json"], _STATE)
    except ValueError as error:
        remedy = f"the run goes on from the checkpoint before it once {found.path} is removed"
        raise Damaged(found.path / "state.json", str(error), remedy) from None
    values = dict(vars(saved))
    scaler = values.pop("scaler")
    return Position(**values), scaler


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _best_files(position: Position, method: Method, folder: RunFolder) -> dict[str, Path]:
    """The best weights that there are, by their name in a checkpoint."""
    files: dict[str, Path] = {}
    for which in position.kept():
        files |= {f"{which}/{name}.safetensors": folder.generator(which, name) for name in method.generators}
        files |= {f"{which}-saved/{name}.safetensors": folder.saved(which, name) for name in method.saved}
    return files


def _tensors(found: Checkpoint, name: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of one file of the checkpoint, and where they come from."""
    if name not in found.tensors:
        raise UserError(
            f"{found.path}: a checkpoint of another method: it holds no {name}; "
            "use a checkpoint of the same configuration, or another folder under `runs`"
        )
    return found.tensors[name], str(found.path / f"{name}.safetensors")
