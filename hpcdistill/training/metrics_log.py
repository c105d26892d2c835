"""metrics.jsonl and the trackers: means of what happened since the last line, read from the device once a line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class RunningMeans:
    """Sums on the device; nothing is read back before `read`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add 0-dim tensors by name."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and ranks, and a fresh start. A collective call."""
        if not self._sums:
            return {}
        means = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
        if accelerator.num_processes > 1:
            means = accelerator.reduce(means, "mean")
        result = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return result

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """What `read` has not reported yet, means over the ranks, as JSON values. A collective call."""
        if not self._sums:
            return {"sums": {}, "counts": {}}
        sums = torch.stack(list(self._sums.values()))
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "mean")
        return {"sums": dict(zip(self._sums, sums.tolist(), strict=True)), "counts": dict(self._counts)}

    def load(self, state: dict[str, Any]) -> None:
        self._sums = {name: torch.tensor(value, device=self.device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])


class MetricsLog:
    """One JSON object a line, appended by rank 0, and the same numbers to Accelerate's trackers.

    A number that is not finite (a gradient norm that overflowed in fp16, say) becomes null, as JSON has no other word.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator

    def write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: _or_null(value) for name, value in row.items()}) + "\n")
        scalars = {name: value for name, value in row.items() if isinstance(value, float)}
        self.accelerator.log(scalars, step=row["step"])

    def position(self) -> int:
        """Bytes written so far; a checkpoint keeps it, synced, so that no line after it is counted twice."""
        if not self.path.exists():
            return 0
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def rewind(self, position: int) -> None:
        """Drop the lines that a killed session wrote after its last checkpoint."""
        if self.accelerator.is_main_process and self.path.exists():
            with self.path.open("rb+") as file:
                file.truncate(min(position, self.path.stat().st_size))  # never fill up a file that was cut by hand


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
