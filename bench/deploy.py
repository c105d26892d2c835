"""What a finished network takes outside the lab: `python bench/deploy.py [--rounds N] [--json]`.

The shipped x4 student, 320x180 pixels of luma to 1280x720, on one thread: what `infer` runs, PyTorch in both memory
layouts, onnxruntime, OpenVINO and ncnn, in turns. Then the peak memory of an 8000x6000 result, and the time from the
command to the first picture beside that of `import torch` alone. Targets: `infer` within 1.15 of onnxruntime, PyTorch
in its better layout within 1.2, 1 GiB, 2.5 times `import torch`. Processor time throughout, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hpcdistill.command import positive, run_command
from hpcdistill.console import Table, out, say, warn
from hpcdistill.deploy.allocator import keep_freed_memory
from hpcdistill.deploy.formats import FORMATS
from hpcdistill.deploy.formats.base import Options
from hpcdistill.deploy.latency.subjects import find_subject
from hpcdistill.deploy.latency.timing import Timing, device_name, turns
from hpcdistill.deploy.latency.variants import Place, prepare
from hpcdistill.deploy.model import load, load_network
from hpcdistill.deploy.shipped import pretrained_file
from hpcdistill.errors import UserError

MODEL = "pretrained:x4"
LARGE = (1500, 2000)  # height and width that become 6000x8000
SMALL = (24, 32)
WARM_UPS = 3
TARGETS = {"infer": 1.15, "eager": 1.2, "large_gib": 1.0, "first_pixel": 2.5}
INFER = "infer, as it is"
RUNTIME = "onnxruntime"
EAGER = ("eager, contiguous", "eager, channels last")
# The command itself, and what the kernel says it took at most.
COMMAND = """
import sys
from hpcdistill.infer import main
code = main(sys.argv[1:])
from hpcdistill.deploy.latency.memory import peak
print(peak())
sys.exit(code)
"""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/deploy.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=31, help="passes of each form (default: 31)")
    parser.add_argument("--starts", type=positive, default=7, help="of each command (default: 7)")
    parser.add_argument("--threads", type=positive, default=1, help="default: 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if (load_average := os.getloadavg()[0]) > 1.5:
        warn(f"load average {load_average:.1f}: other programs are running; processor time suffers less than the clock")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `infer` does: it takes a quarter off PyTorch's times, nothing off the runtimes'
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "device": device_name("cpu"),
            "torch": torch.__version__,
            "threads": options.threads,
            "load_average": load_average,
            "forms": measure_forms(options.rounds, Path(folder)),
            "large": measure_large(options.threads, Path(folder)),
            "first_pixel": measure_start(options.starts, Path(folder)),
        }
    results["targets"] = judge(results)
    if options.json:
        out.out(json.dumps(results), highlight=False)
    else:
        show(results)


def measure_forms(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Each form's times in milliseconds; all in turns."""
    forms = prepare_forms(folder)
    timings = {name: Timing() for name in forms}
    for run in forms.values():
        for _ in range(WARM_UPS):
            run()
    for turn in turns(list(forms), rounds):
        for name in turn:
            timings[name].measure(forms[name], "cpu")
    return {name: timing.summary() for name, timing in timings.items()}


def prepare_forms(folder: Path) -> dict[str, Callable[[], Any]]:
    """What runs the student once on the same luma, by name."""
    subject = find_subject(MODEL)
    luma = subject.example(subject.size())
    place = Place(luma, "cpu", folder)
    session = load(MODEL).session
    forms: dict[str, Callable[[], Any]] = {INFER: lambda: session(luma)}
    forms |= {name: prepare(kind, subject, place) for name, kind in zip(EAGER, ("eager", "channels_last"), strict=True)}
    network, about, _ = load_network(pretrained_file(MODEL))
    for name, kind in (("infer, ONNX file", "onnx"), ("OpenVINO", "openvino"), ("ncnn", "ncnn")):
        form = FORMATS[kind]()
        file = folder / f"{kind}{form.suffix}"
        try:
            form.check(network, about, Options())
        except UserError as error:
            say(f"{name} is left out: {error}")
            continue
        form.write(network, about, file, Options())
        forms[name] = in_runtime(form.open(file).session, luma)
        if kind == "onnx":
            forms[RUNTIME] = onnxruntime_alone(file, luma)
    return forms


def in_runtime(session: Callable[[Any], Any], luma: Any) -> Callable[[], Any]:
    """The session's pass."""
    return lambda: session(luma)


def onnxruntime_alone(file: Path, luma: Any) -> Callable[[], Any]:
    """onnxruntime as its own examples use it: nothing of ours around it."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: luma})


def measure_large(threads: int, folder: Path) -> dict[str, float]:
    """The command on a picture of 2000x1500, in a process of its own."""
    picture = painted(LARGE, folder / "large.png")
    command = [sys.executable, "-c", COMMAND, MODEL, str(picture), "--out", str(folder / "large")]
    before = children_seconds()
    done = subprocess.run(command, env=alone(threads), check=True, capture_output=True, text=True)
    seconds = children_seconds() - before
    with Image.open(folder / "large" / "large.png") as made:
        assert made.size == (8000, 6000)
    return {"peak_gib": int(done.stdout.split()[-1]) / (1 << 30), "cpu_seconds": seconds}


def measure_start(starts: int, folder: Path) -> dict[str, float]:
    """Processor seconds of `import torch`, and of the command with one small picture, in turns."""
    picture = painted(SMALL, folder / "small.png")
    commands = {
        "import_torch": [sys.executable, "-c", "import torch"],
        "infer": [sys.executable, "-m", "hpcdistill.infer", MODEL, str(picture), "--out", str(folder / "small")],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for start in range(starts + 1):
        for name, command in commands.items():
            before = children_seconds()
            subprocess.run(command, env=alone(1), check=True, capture_output=True)
            if start:  # the first reads the disk
                seconds[name].append(children_seconds() - before)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "ratio": medians["infer"] / medians["import_torch"]}


def painted(size: tuple[int, int], file: Path) -> Path:
    """A picture of smooth colour with some noise, as photographs have it."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    noise = np.random.default_rng(0).normal(0, 4, (*size, 3))
    waves = np.stack([np.sin(rows / 40 + phase) * np.cos(columns / 60) for phase in range(3)], axis=-1)
    Image.fromarray((127 + 100 * waves + noise).clip(0, 255).astype(np.uint8)).save(file)
    return file


def alone(threads: int) -> dict[str, str]:
    """The environment of a command with so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def children_seconds() -> float:
    """Processor time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def judge(results: dict[str, Any]) -> dict[str, dict[str, float | bool]]:
    """The four numbers beside their targets."""
    forms = {name: row["cpu_median_ms"] for name, row in results["forms"].items()}
    found = {"large_gib": results["large"]["peak_gib"], "first_pixel": results["first_pixel"]["ratio"]}
    if RUNTIME in forms:
        found["infer"] = forms[INFER] / forms[RUNTIME]
        found["eager"] = min(forms[name] for name in (*EAGER, INFER)) / forms[RUNTIME]  # `infer` is PyTorch too
    return {
        name: {"measured": found[name], "target": target, "met": found[name] <= target}
        for name, target in TARGETS.items()
        if name in found
    }


def show(results: dict[str, Any]) -> None:
    """The forms, and what became of the targets."""
    forms = results["forms"]
    threads = results["threads"]
    table = Table(title=f"x4 student to 1280x720, {results['device']}, {threads} thread(s), torch {results['torch']}")
    for heading in ("form", "CPU median ms", "median ms", "p95 ms", "of onnxruntime's"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    base = forms.get(RUNTIME, {}).get("cpu_median_ms")
    for name, row in sorted(forms.items(), key=lambda form: form[1]["cpu_median_ms"]):
        times = (f"{row[key]:.1f}" for key in ("cpu_median_ms", "median_ms", "p95_ms"))
        table.add_row(name, *times, f"{row['cpu_median_ms'] / base:.2f}" if base else "")
    out.print(table)
    said = {
        "infer": "infer, over onnxruntime alone",
        "eager": "PyTorch in its better layout, over onnxruntime alone",
        "large_gib": "GiB of memory for an 8000x6000 result",
        "first_pixel": "command to first picture, over `import torch`",
    }
    for name, row in results["targets"].items():
        met = "met" if row["met"] else "missed"
        out.print(f"{said[name]}: {row['measured']:.2f} (target: at most {row['target']:.2f}; {met})")


if __name__ == "__main__":
    run_command(main)
