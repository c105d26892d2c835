"""What each lever of FESD's iteration on a CPU is worth: `python docs/results/gan_levers.py [--rounds N] [--json]`.

The teacher's update, and a student's that asks the teacher anew, with all levers and with one left out, in turns, in
processor seconds of one thread. The levers: hpcdistill/ops/cpu_forms.py, Gram's gradient in losses.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from gan import Ours

from hpcdistill import losses
from hpcdistill.command import positive, run_command
from hpcdistill.console import out
from hpcdistill.methods import cyclegan
from hpcdistill.ops import cpu_forms

THREADS = 1


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="gan_levers.py", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, help="updates with and without each (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    random = torch.Generator().manual_seed(0)
    a, b = (2 * torch.rand(1, 3, 256, 256, generator=random) - 1 for _ in range(2))
    found: dict[str, dict[str, float]] = {}
    for phases in ("student", "teacher"):
        ours = Ours("fesd", phases, "fp32", THREADS)
        times: dict[str, list[float]] = {lever: [] for lever in LEVERS}
        for _ in range(options.rounds + 1):  # the first warms up
            for lever in LEVERS:
                ours.method.vgg.to(memory_format=torch.contiguous_format)  # its first pass changes it
                with without(lever):
                    start = time.process_time()
                    ours(a, b)
                    times[lever].append(time.process_time() - start)
        found[phases] = {lever: statistics.median(values[1:]) for lever, values in times.items()}
    if options.json:
        out.out(json.dumps(found), highlight=False)
        return
    for phases, row in found.items():
        for lever, seconds in row.items():
            name = f"without {lever}" if lever else "as it is"
            out.print(f"{phases:8} {name:18} {seconds:6.2f} s, {seconds - row['']:+.2f}", soft_wrap=True)


def gram(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return flat @ flat.transpose(1, 2) / (x.shape[1] * x.shape[2] * x.shape[3])


# lever -> what takes its place: (where, name, value)
LEVERS: dict[str, list[tuple[Any, str, Callable[..., Any] | int]]] = {
    "": [],
    "layout": [(cpu_forms, "channels_last", lambda x: x.contiguous())],
    "norm": [(cpu_forms, "instance_norm", functional.instance_norm)],
    "columns": [(cpu_forms, "_FEW", 0)],
    "strided": [(cpu_forms._Strided, "apply", lambda x, weight, bias, more: torch.convolution(x, weight, bias, *more))],
    "pointwise": [(cpu_forms.torch, "get_num_threads", lambda: 2)],
    "gram": [(losses, "gram", gram)],
    "identity": [(cyclegan, "applies", lambda x: False)],
    "all": [
        (cpu_forms, "applies", lambda x: False),
        (cyclegan, "applies", lambda x: False),
        (losses, "gram", gram),
    ],
}


@contextmanager
def without(lever: str) -> Iterator[None]:
    """One lever out of use."""
    patches = [patch.object(*parts) for parts in LEVERS[lever]]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


if __name__ == "__main__":
    run_command(main)
