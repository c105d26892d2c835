"""What several processes cost: `python bench/distributed.py [--ranks N] [--seconds S] [--part P] [--json]`.

It starts itself with torchrun. step: the real loop on N ranks against a bare loop of the same networks in torch's
DistributedDataParallel, in turns, in one run. checkpoint: how long a checkpoint takes, and the delay it puts on a step.
deepspeed: step time and memory a rank under DDP and ZeRO 1, 2 and 3; only when named, it needs the extra.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import step as single
import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hpcdistill.command import run_command
from hpcdistill.console import Table, is_main_process, out, say, warn
from hpcdistill.methods.base import Batch, Method
from hpcdistill.ranks.rendezvous import join, leave
from hpcdistill.run import load_run
from hpcdistill.training.accelerator import make_accelerator
from hpcdistill.training.checkpoint import Checkpoints
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.loop import Training
from hpcdistill.training.networks import Networks
from hpcdistill.training.position import Position, save_checkpoint
from hpcdistill.training.run_folder import RunFolder

GAN = "configs/original/horse2zebra.yaml"  # CycleGAN: the largest checkpoint there is, two generators of 11 M weights
SAVES = 5
ENGINES = ("DDP", "ZeRO 1", "ZeRO 2", "ZeRO 3")
SIDE = 64  # pixels of CycleGAN's images: its weights are what is measured, not its feature maps
STEPS = 8
SETTINGS = Path(__file__).resolve().parents[1] / "configs" / "deepspeed"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/distributed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine (default: 2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the comparison (default: 60)")
    parser.add_argument("--part", choices=("step", "checkpoint", "deepspeed", "all"), default="all")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.ranks)))
        os.execv(sys.executable, [sys.executable, *torchrun, __file__, *arguments])
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]
    if load > single.IDLE:
        warn(f"the load average is {load:.1f}: other programs slow this down; run it again idle")
    report: dict[str, Any] = {"machine": single.machine(threads, load), "ranks": options.ranks}
    join(cpu=True, stall=600)
    if options.part == "deepspeed":
        report["deepspeed"] = measure_deepspeed(threads)
    if options.part in ("step", "all"):
        report["step"] = [measure_step(layout, options.seconds, threads) for layout in single.LAYOUTS]
    if options.part in ("checkpoint", "all") and is_main_process():
        report["checkpoint"] = measure_checkpoints()
    if is_main_process():
        if options.json:
            out.out(json.dumps(report), highlight=False)
        else:
            show(report)
    leave()


def measure_step(layout: str, seconds: float, threads: int) -> dict[str, Any]:
    """DSSD's student: blocks of the loop's steps and of bare steps in turns; all ranks go through them together."""
    say(f"step: {layout}")
    method = single.student("hfrm")
    bare = BareStep(copy.deepcopy(method), layout)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share = single.BATCH // ranks
    prepared = [
        {name: value[rank * share : (rank + 1) * share] for name, value in batch.items()}
        for batch in single.random_batches(single.PATCH)
    ]
    of_loop: list[float] = []
    of_bare: list[float] = []

    def batches() -> Iterator[Batch]:
        delivered, wanted = itertools.cycle(prepared), itertools.cycle(prepared)
        started = time.perf_counter()
        for turn in itertools.count():
            start = time.perf_counter()
            yield from itertools.islice(delivered, single.BLOCK)
            middle = time.perf_counter()  # the loop asks for the next batch once it is through with the last
            for batch in itertools.islice(wanted, single.BLOCK):
                bare(batch)
            if turn == 0:  # the first block warms up
                single.check_equal(method, bare.method)
                continue
            of_loop.append(middle - start)
            of_bare.append(time.perf_counter() - middle)
            enough = torch.tensor(float(turn >= 3 and time.perf_counter() - started > seconds))
            dist.all_reduce(enough)
            if enough:
                raise single._EnoughError

    single.run_loop(method, batches, layout, threads, trackers=("tensorboard",))
    pairs = list(zip(of_loop, of_bare, strict=True))
    return {
        "layout": layout,
        "steps": single.BLOCK * len(pairs),
        "loop_seconds": statistics.median(of_loop) / single.BLOCK,
        "bare_seconds": statistics.median(of_bare) / single.BLOCK,
        "overhead": statistics.median(loop / step for loop, step in pairs) - 1,
        "overhead_total": sum(of_loop) / sum(of_bare) - 1,  # with the log lines, which most blocks do not have
        "target": single.TARGET,
    }


class BareStep:
    """`step.BareStep` with its trained networks in DistributedDataParallel, as one writes it without a library."""

    def __init__(self, method: Any, layout: str) -> None:
        self.method = method.to(memory_format=single.memory_format(layout)).train()
        self.teacher = method.teacher
        module: Any = method.groups["student"].module
        self.trained = DistributedDataParallel(_Both(method.student, module.estimator), gradient_as_bucket_view=True)
        rate, eps = single.OPTIMIZER.learning_rate, single.OPTIMIZER.eps
        self.adam = torch.optim.Adam(module.parameters(), lr=rate, eps=eps, fused=True)

    def __call__(self, batch: Batch) -> None:
        hr, lr = batch["hr"], batch[f"lr{single.SCALE}"]
        sr, mu, b = self.trained(lr)
        with torch.no_grad():
            target = self.teacher.features(hr, "expanding")
        vid = (torch.log(2 * b) + (target - mu).abs() / b).mean()
        loss = functional.l1_loss(sr, hr) + 1e-6 * vid
        loss.backward()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


class _Both(nn.Module):
    """The student and its estimator behind one forward pass: DistributedDataParallel wraps one."""

    def __init__(self, network: Any, estimator: Any) -> None:
        super().__init__()
        self.network, self.estimator = network, estimator

    def forward(self, lr: torch.Tensor) -> Any:
        sr, maps = self.network(lr, maps=("expanding",))
        return sr, *self.estimator(maps["expanding"])


def measure_checkpoints() -> list[dict[str, Any]]:
    """Rank 0's part of a checkpoint: DSSD's student and CycleGAN at full width, on this machine's temporary folder."""
    config = load_run([GAN]).config
    gan = config.method.build()
    return [_checkpoint("DSSD student", single.student("hfrm")), _checkpoint("CycleGAN, both directions", gan)]


def _checkpoint(name: str, method: Method) -> dict[str, Any]:
    say(f"checkpoint: {name}")
    config = TrainConfig(batch_size=dist.get_world_size(), device="cpu", trackers=())
    accelerator = make_accelerator(config)
    accelerator.prepare = lambda module, adam: (module, adam)  # no wrapper: only rank 0 is here
    networks = Networks(method, accelerator, config)
    for group in networks.groups.values():  # Adam has its moments from the first step on
        for parameter in group.parameters:
            parameter.grad = torch.zeros_like(parameter)
        group.update(torch.zeros((), dtype=torch.bool))
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        folder.create("", {})
        checkpoints = Checkpoints(folder.checkpoints)
        position = Position()
        at_once, delay, whole = [], [], []
        for number in range(SAVES):
            for background in (False, True):
                position.step = 2 * number + background
                start = time.perf_counter()
                save_checkpoint(checkpoints, networks, position, folder, {}, background=background)
                begun = time.perf_counter() - start
                checkpoints.wait()
                ended = time.perf_counter() - start
                if background:
                    delay.append(begun)
                    whole.append(ended)
                else:
                    at_once.append(ended)
        size = sum(file.stat().st_size for file in max(folder.checkpoints.iterdir()).rglob("*") if file.is_file())
        folder.release()
    return {
        "what": name,
        "bytes": size,
        "at_once_seconds": statistics.median(at_once),
        "delay_seconds": statistics.median(delay),  # what the step with a checkpoint takes longer
        "background_seconds": statistics.median(whole),
        "saves": SAVES,
    }


def measure_deepspeed(threads: int) -> list[dict[str, Any]]:
    """The loop under each engine: DSSD's student (13 k weights) and CycleGAN of full width (28 M), small images."""
    config = load_run([GAN, f"data.crop={SIDE}"]).config
    rows = []
    for engine in ENGINES:
        rows.append(_under(engine, "DSSD student", single.student("hfrm"), single.BATCH, threads))
        gan = config.method.build()
        rows.append(_under(engine, "CycleGAN, both directions", gan, dist.get_world_size(), threads))
    return rows


def _under(engine: str, what: str, method: Method, size: int, threads: int) -> dict[str, Any]:
    say(f"deepspeed: {what}, {engine}")
    weights = sum(p.numel() for group in method.groups.values() for p in group.module.parameters())
    share = size // dist.get_world_size()
    if what.startswith("DSSD"):
        batch = {name: values[:share] for name, values in single.random_batches(single.PATCH)[0].items()}
    else:
        batch = {name: 2 * torch.rand(share, 3, SIDE, SIDE) - 1 for name in ("a", "b")}
    before, largest, times = tensor_bytes() - 4 * weights, 0, []

    def note(adam: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal largest
        if len(times) == 1:  # the second step: Adam has its moments
            largest = max(largest, tensor_bytes())

    def batches(first: int, last: int, workers: int, pin_memory: bool) -> Iterator[Batch]:
        for _ in range(first, last):
            start = time.perf_counter()
            yield batch
            times.append(time.perf_counter() - start)

    number = engine.removeprefix("ZeRO ")
    config = TrainConfig(
        batch_size=size,
        device="cpu",
        threads=threads,
        deepspeed=None if engine == "DDP" else str(SETTINGS / f"zero{number}.json"),
        log_every=single.ENDLESS,
        gradient_norms_every=0,
        checkpoint_every=single.ENDLESS,
        trackers=(),
    )
    hook = register_optimizer_step_pre_hook(note)
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        accelerator = make_accelerator(config)
        if accelerator.is_main_process:
            folder.create("", {})
        reader: Any = SimpleNamespace(loader=batches)
        options = {"steps": STEPS, "evaluate_every": 1, "seed": 0, "name": "bench"}
        Training(method, reader, None, folder, accelerator, config, **options).run()
        folder.release()
    hook.remove()
    held = torch.tensor(float(largest - before))
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return {
        "engine": engine,
        "what": what,
        "weights": weights,
        "seconds": statistics.median(times[2:-1]),  # the last one holds the checkpoint
        "bytes": int(held.item()),
    }


def tensor_bytes() -> int:
    """Of all tensors of this process: what is alive at an update are weights, moments and gradients, no feature maps.

    The gradients that autograd holds have no Python object until they are asked for.
    """
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def show(report: dict[str, Any]) -> None:
    what = report["machine"]
    out.print(
        f"{what['cpu']}, {report['ranks']} ranks x {what['threads']} threads, torch {what['torch']}, "
        f"load {what['load']}",
        soft_wrap=True,
    )
    if "step" in report:
        table = Table(title="what the loop adds to a bare DDP step: DSSD student x4, batch 16", box=SIMPLE_HEAD)
        for heading in ("layout", "loop ms", "bare ms", "added", "with log lines", "steps"):
            table.add_column(heading, justify="left" if heading == "layout" else "right")
        for row in report["step"]:
            milliseconds = (f"{row[key] * 1e3:.1f}" for key in ("loop_seconds", "bare_seconds"))
            added = (f"{row[key]:+.1%}" for key in ("overhead", "overhead_total"))
            table.add_row(row["layout"], *milliseconds, *added, str(row["steps"]))
        out.print(table)
        say(f"target: {single.TARGET:.0%}")
    if "checkpoint" in report:
        table = Table(
            title="a checkpoint: copied for the thread that writes it, against written at once", box=SIMPLE_HEAD
        )
        for heading in ("what", "MB", "delay of the step ms", "until it is verified ms", "at once ms"):
            table.add_column(heading, justify="left" if heading == "what" else "right")
        for row in report["checkpoint"]:
            times = (f"{row[key] * 1e3:.1f}" for key in ("delay_seconds", "background_seconds", "at_once_seconds"))
            table.add_row(row["what"], f"{row['bytes'] / 1e6:.1f}", *times)
        out.print(table)

    if "deepspeed" in report:
        table = Table(title="engines: a step, and the tensors a rank holds at an update", box=SIMPLE_HEAD)
        for heading in ("what", "weights", "engine", "MB a rank", "step ms"):
            table.add_column(heading, justify="left" if heading in ("what", "engine") else "right")
        for row in sorted(report["deepspeed"], key=lambda row: row["weights"]):
            numbers = (f"{row['bytes'] / 1e6:.1f}", f"{row['seconds'] * 1e3:.0f}")
            table.add_row(row["what"], f"{row['weights']:,}", row["engine"], *numbers)
        out.print(table)


if __name__ == "__main__":
    run_command(main)
