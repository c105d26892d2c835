"""metrics.jsonl and the trackers: means of what happened since the last line, read from the device once a line."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hpcdistill.console import warn
from hpcdistill.storage import sync_file, sync_folder, write_bytes
from hpcdistill.training.records import read_row


class RunningMeans:
    """Sums on the device; nothing is read back before `read`.

    They stay where they are in memory, as a captured step adds to them there; `counts` are the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts: Counter[str] = Counter()  # how many values each sum has
        self._sums: dict[str, Tensor] = {}  # also those that have none now

    def add(self, values: dict[str, Tensor]) -> None:
        """Add 0-dim tensors by name."""
        for name, value in values.items():
            # In float64 sums of float32 numbers are exact: the order, and a resume in between, change nothing.
            if name not in self._sums:
                self._sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
            self._sums[name] += value.detach().float().double()
            self.counts[name] += 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and ranks, and a fresh start. A collective call."""
        if not self.counts:
            return {}
        sums = self.state(accelerator)["sums"]
        result = {name: value / self.counts[name] for name, value in sums.items()}
        self.counts = Counter()
        torch._foreach_zero_(list(self._sums.values()))
        return result

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """What `read` has not reported yet, means over the ranks, as JSON values. A collective call."""
        if not self.counts:
            return {"sums": {}, "counts": {}}
        names = sorted(self.counts)  # the same order on every rank
        sums = torch.stack([self._sums[name] for name in names])
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "mean")
        return {"sums": dict(zip(names, sums.tolist(), strict=True)), "counts": dict(self.counts)}

    def load(self, state: dict[str, Any]) -> None:
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in state["sums"].items()
        }
        self.counts = Counter(state["counts"])


class MetricsLog:
    """One JSON object a line, appended by rank 0, and the same numbers to Accelerate's trackers.

    A number that is not finite (a gradient norm that overflowed in fp16, say) becomes null, as JSON has no other word.
    """

    def __init__(self, path: Path, accelerator: Accelerator, confirm: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.confirm = confirm  # called before each line; raises when another process has taken the run over
        self.accelerator = accelerator

    def write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.confirm()
            line = json.dumps({name: _or_null(value) for name, value in row.items()}) + "\n"
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                error.filename = error.filename or str(self.path)  # a full disk does not say which file it is about
                raise
        scalars = {name: value for name, value in row.items() if isinstance(value, float)}
        self.accelerator.log(scalars, step=row["step"])

    def position(self) -> int:
        """Bytes written so far; a checkpoint keeps it, synced, so that no line after it is counted twice."""
        if not self.path.exists():
            return 0
        try:
            sync_file(self.path)
            sync_folder(self.path.parent)  # it may be new
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        return self.path.stat().st_size

    def rewind(self, position: int, step: int | None = None) -> None:
        """Drop what a killed session wrote after its last checkpoint, which was of `step` and gave `position` (bytes).

        Warns when lines from before it are gone (the file was cut or edited); half a line goes too.
        """
        if not self.accelerator.is_main_process:
            return
        content = self.path.read_bytes() if self.path.exists() else b""
        # A file that was cut has grown again when the session after that was killed: so the steps count as well.
        lines = [line for line in content[:position].splitlines(keepends=True) if _is_row(line, step)]
        kept = b"".join(lines)
        if content[: len(kept)] != kept:
            write_bytes(self.path, kept)
        elif len(kept) < len(content):
            os.truncate(self.path, len(kept))
        if len(kept) < position:
            warn(
                f"{self.path}: {position - len(kept)} of the {position} bytes that it had at the checkpoint are gone; "
                "lines of earlier steps are missing from it, training is not affected"
            )

    def start_trackers(self, step: int) -> None:
        """Begin Accelerate's trackers at a run that goes on after `step`. A call for all ranks.

        TensorBoard then hides the points that a killed session drew after its last checkpoint.
        """
        self.accelerator.init_trackers("hpcdistill", init_kwargs={"tensorboard": {"purge_step": step + 1}})


def _is_row(line: bytes, step: int | None) -> bool:
    """Whether it is a whole line of a step up to `step`."""
    row = read_row(line)
    return row is not None and line.endswith(b"\n") and (step is None or bool(row["step"] <= step))


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
