"""How near a training step is to what the machine can do: `python bench/limits.py [--profile STEP] [--json]`.

Two limits are measured: bytes a second (a sum of two arrays too large for a cache) and multiply-accumulates a second
(the faster of a product of matrices and a 3x3 convolution of 64 channels). Two numbers are counted for each step: its
arithmetic (convolutions, forward and back) and the bytes that PyTorch's operations read and write, each its inputs and
its outputs once. A step that did nothing else takes the longer of the two times; that is the floor of a step of these
operations. All times are the processor's, of all threads: other programs hardly count then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import step as single
import torch
from published import CASES
from rich.box import SIMPLE_HEAD
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hpcdistill.command import run_command
from hpcdistill.console import Table, out, say
from hpcdistill.methods.base import Carry, Method, Progress
from hpcdistill.ops import own_backward
from hpcdistill.training.accelerator import keep_freed_memory
from hpcdistill.training.layout import FORMATS, faster_layout

LARGE = 2**26  # float32 numbers of an array: 256 MiB, eight times the cache
SIDE, CHANNELS, PIXELS = 1024, 64, 192


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/limits.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help="of PyTorch; default: the cores there are")
    parser.add_argument("--steps", type=int, default=5, help="measured of each method (default: 5)")
    parser.add_argument("--cases", nargs="*", default=[name for name in CASES if "released" not in name])
    parser.add_argument("--profile", choices=list(CASES), help="what the operations of one step take, and nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    report: dict[str, Any] = {"machine": single.machine(options.threads, os.getloadavg()[0])}
    if options.profile:
        report["profile"] = profile(options.profile, options.steps)
    else:
        report["limits"] = limits()
        report["rows"] = [row(name, report["limits"], options.steps) for name in options.cases]
    if options.json:
        out.out(json.dumps(report), highlight=False)
    else:
        show(report)


def limits() -> dict[str, float]:
    """Bytes and multiply-accumulates a second of processor time."""
    say("limits of the machine")
    one, other = torch.rand(LARGE), torch.rand(LARGE)
    total = torch.empty(LARGE)
    memory = best(lambda: torch.add(one, other, out=total))
    matrix = torch.rand(SIDE, SIDE)
    product = best(lambda: matrix @ matrix)
    image = torch.rand(4, CHANNELS, PIXELS, PIXELS).contiguous(memory_format=torch.channels_last)
    kernel = torch.rand(CHANNELS, CHANNELS, 3, 3).contiguous(memory_format=torch.channels_last)
    convolution = best(lambda: torch.nn.functional.conv2d(image, kernel, padding=1))
    rates = {
        "matrix_product": SIDE**3 / product,
        "convolution": image.numel() * CHANNELS * 9 / convolution,
    }
    return {"bytes_a_second": 3 * 4 * LARGE / memory, "macs_a_second": max(rates.values()), **rates}


def best(call: Callable[[], Any], times: int = 8) -> float:
    """Seconds of the fastest of several calls: what the machine can do, whatever else it did meanwhile."""
    call()
    taken = []
    for _ in range(times):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return min(taken)


def row(name: str, limit: dict[str, float], steps: int) -> dict[str, Any]:
    """The step's arithmetic and bytes, its floor and what it takes."""
    say(name)
    case = CASES[name]
    run = bare_step(case.build(), case.patch)
    run()
    with mock.patch.object(own_backward, "_is_ours", return_value=False):
        run()
        with FlopCounterMode(display=False) as flops:
            run()
        with Traffic() as traffic:
            run()
    run()
    taken = []
    for _ in range(steps):
        before = single.Times.now()
        run()
        taken.append(single.Times.now() - before)
    macs = flops.get_total_flops() / 2
    arithmetic, memory = macs / limit["macs_a_second"], traffic.bytes / limit["bytes_a_second"]
    return {
        "step": name,
        "patch": case.patch,
        "macs": macs,
        "bytes": traffic.bytes,
        "operations": traffic.operations,
        "arithmetic_seconds": arithmetic,
        "memory_seconds": memory,
        "cpu_seconds": statistics.median(one.cpu for one in taken),
        "fastest_cpu_seconds": min(one.cpu for one in taken),
        "floor_of_fastest": max(arithmetic, memory) / min(one.cpu for one in taken),
    }


def bare_step(method: Method, patch: int) -> Callable[[], None]:
    """The method's step without the loop, in the layout that the loop takes."""
    layout = FORMATS[faster_layout(method, torch.device("cpu"))]
    method.to(memory_format=layout).train()  # type: ignore[call-overload]
    batch = {key: value.contiguous(memory_format=layout) for key, value in single.random_batches(patch)[0].items()}
    [phase] = method.phases
    adam = torch.optim.Adam(method.groups[phase.group].module.parameters(), fused=True)

    def run() -> None:
        terms = phase.loss(batch, Carry(), Progress.at(0, 1))
        torch.stack(list(terms.values())).sum().backward()
        adam.step()
        adam.zero_grad()

    return run


def profile(name: str, steps: int) -> list[dict[str, Any]]:
    """The operations of a step, the longest first: the processor time of the fastest of `steps` calls of each."""
    run = bare_step(CASES[name].build(), CASES[name].patch)
    run()
    found: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for _ in range(steps):
        with Clock() as clock:
            run()
        for operation, taken in clock.taken.items():
            found.setdefault(operation, []).append(sum(taken))
            calls[operation] = len(taken)
    rows = [{"operation": key, "calls": calls[key], "cpu_seconds": min(value)} for key, value in found.items()]
    return sorted(rows, key=lambda one: -one["cpu_seconds"])


class Clock(TorchDispatchMode):
    """Times each operation by its name and the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[str, list[float]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        started = time.process_time()
        result = function(*arguments, **(options or {}))
        taken = time.process_time() - started
        shapes = [list(leaf.shape) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        wanted = f" {arguments[-1]}" if "backward" in str(function) and "convolution" in str(function) else ""
        self.taken.setdefault(f"{function} {shapes}{wanted}", []).append(taken)
        return result


class Traffic(TorchDispatchMode):
    """Counts operations, and the bytes of the tensors that they read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        given = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(("empty", "detach")):
            self.operations += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        return result


def show(report: dict[str, Any]) -> None:
    what, limit = report["machine"], report.get("limits")
    out.print(f"{what['cpu']}, {what['threads']} threads, torch {what['torch']}, load {what['load']}", soft_wrap=True)
    if limit is None:
        rows = report["profile"]
        for found in [
            *rows[:40],
            {"operation": "all", "calls": "", "cpu_seconds": sum(r["cpu_seconds"] for r in rows)},
        ]:
            milliseconds = f"{found['cpu_seconds'] * 1e3:8.2f} ms"
            out.print(f"{milliseconds} {found['calls']:>4} {found['operation']}", markup=False, soft_wrap=True)
        return
    out.print(f"{limit['bytes_a_second'] / 1e9:.1f} GB/s, {limit['macs_a_second'] / 1e9:.0f} GMAC/s")
    table = Table(title=f"a step, x{single.SCALE}, batch {single.BATCH}, float32", box=SIMPLE_HEAD)
    headings = ("step", "HR", "GMAC", "GB", "operations", "arithmetic ms", "memory ms", "takes ms", "floor / it")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for found in report["rows"]:
        seconds = ("arithmetic_seconds", "memory_seconds", "fastest_cpu_seconds")
        table.add_row(
            found["step"],
            str(found["patch"]),
            f"{found['macs'] / 1e9:.2f}",
            f"{found['bytes'] / 1e9:.2f}",
            str(found["operations"]),
            *(f"{found[key] * 1e3:.1f}" for key in seconds),
            f"{found['floor_of_fastest']:.0%}",
        )
    out.print(table)


if __name__ == "__main__":
    run_command(main)
