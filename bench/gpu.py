"""All that waits for a GPU, in ten minutes on one: `python bench/gpu.py [--minutes N] [--only PART ...]`.

The GPU tests, a step of every method, the benches that know --device, and a short training of each method. Every part
is a process of its own with its own time; one that fails or is cut is named with its last lines, and the others go on.
gpu.json is written anew after every part, so that a run that is cut at any moment has left what it had measured;
gpu.html and gpu.md show it. `--rehearse` does the same on a CPU with tiny budgets, and says so: no result.

The packed sets (40 MB at most) are made before, by gpu_data.py; without any, pictures are drawn. What must be there:
torch with CUDA, and the packages in WHEELS where a machine has only what comes with PyTorch (`--wheels` prints them
with their versions; docs/results/gpu_queue.md).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_data import COUNTS, make
from gpu_page import write_pages
from gpu_parts import MINUTES, Part, Place, parts

from hpcdistill.command import UserPath, end_in_order_when_terminated, run_command
from hpcdistill.console import say
from hpcdistill.errors import UserError, nearest
from hpcdistill.storage import CLONE, write_json
from hpcdistill.sweep.demos.shape_pairs import write_random_vgg16
from hpcdistill.training.run_folder import describe_session

# Of pyproject.toml, what an image with PyTorch, Accelerate, NumPy, SciPy, scikit-image, Jinja, Matplotlib and pytest
# does not have, with what they need themselves; 3.5 MB for Python 3.12. No part uses imagecodecs, submitit and lpips.
WHEELS = (
    "omegaconf",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "simplejpeg",
    "webdataset",
    "braceexpand",
    "pytorch-fid",
)
REHEARSAL = 2.8  # minutes
FEW = {"sr": 6, "sr-test": 2, "a": 6, "b": 6}  # pictures drawn for a rehearsal
GRACE = 8.0  # seconds to save and end before a part is killed; at most a third of its time
TAIL = 30  # lines of a part's output that are kept


def main(arguments: Sequence[str]) -> int:
    names = [part.name for part in parts()]
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", action=UserPath, help="packed sets of gpu_data.py (default: gpu-data in the clone)")
    parser.add_argument("--out", action=UserPath, default=CLONE / "gpu-out", help="default: gpu-out in the clone")
    parser.add_argument("--minutes", type=float, help=f"for all parts together (default: {MINUTES:g})")
    parser.add_argument("--only", nargs="+", metavar="PART", help=", ".join(names))
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny budgets: not a result")
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if name not in names:
            raise UserError(f"--only: no part '{name}'; {nearest(name, names)}")
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible; run it where there is a GPU, or try it with --rehearse")
    minutes = options.minutes or (REHEARSAL if options.rehearse else MINUTES)
    if minutes <= 0:
        raise UserError(f"--minutes: {minutes:g} is not more than 0")
    chosen = [part for part in parts() if not options.only or part.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        place = Place("cpu" if options.rehearse else "cuda", find_data(options, Path(folder)), Path(folder))
        write_random_vgg16(place.folder / "vgg16-untrained.safetensors")
        report = run_all(chosen, place, minutes, options.out)
    bad = [part["name"] for part in report["parts"] if part["status"] in ("failed", "cut")]
    told = f"{len(bad)} of {len(chosen)} parts failed or were cut{': ' if bad else ''}{', '.join(bad)}"
    say(f"{options.out / 'gpu.html'}: {told}")
    return 1 if bad else 0


def find_data(options: argparse.Namespace, folder: Path) -> Path:
    """The packed sets that are named or lie in the clone; else some that are drawn, which is said."""
    data: Path = options.data or CLONE / "gpu-data"
    if (data / "sr" / "index.json").is_file() and not (options.rehearse and options.data is None):
        return data
    if options.data:
        raise UserError(
            f"{data}: no packed sets of bench/gpu_data.py; make them with `python bench/gpu_data.py --out {data}`"
        )
    say("the training pictures are drawn (bench/gpu_data.py packs photographs)")
    make(folder / "data", None, None, FEW if options.rehearse else COUNTS)
    return folder / "data"


def run_all(chosen: Sequence[Part], place: Place, minutes: float, out: Path) -> dict[str, Any]:
    """Run the parts one after the other; the report, which `out` holds at every moment."""
    out.mkdir(parents=True, exist_ok=True)
    commands = {part.name: part.command(place) for part in chosen}
    left = sum(part.seconds for part in chosen if commands[part.name])
    report: dict[str, Any] = {"rehearsal": place.rehearsal, "minutes": minutes, "machine": machine(place), "parts": []}
    records: list[dict[str, Any]] = report["parts"]
    for part in chosen:
        absent = commands[part.name] is None
        told = {"status": "absent", "why": part.absent} if absent else {"status": "not reached", "why": ""}
        records.append({"name": part.name, "what": part.what, **told})
    deadline = time.monotonic() + 60 * minutes
    for part, record in zip(chosen, records, strict=True):
        command = commands[part.name]
        if command is None:
            continue
        limit = (deadline - time.monotonic()) * part.seconds / left  # what others have not needed is shared
        left -= part.seconds
        if limit < 1:
            continue
        record |= {"command": shlex.join(command), "limit_seconds": round(limit, 1), "status": "running"}
        write_json(out / "gpu.json", report)
        say(f"{part.name}: {limit:.0f} s")
        record |= run_part(part, command, limit, place)
        write_json(out / "gpu.json", report)
        write_pages(report, out)
    write_pages(report, out)
    return report


def run_part(part: Part, command: Sequence[str], limit: float, place: Place) -> dict[str, Any]:
    """Run one part for at most `limit` seconds: its status, what it measured, and its last lines."""
    folder = place.folder / part.name.removeprefix("train ")
    folder.mkdir(parents=True, exist_ok=True)
    standard, errors = place.folder / "stdout", place.folder / "stderr"
    paths = [str(CLONE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = time.monotonic()
    with standard.open("wb") as to, standard.parent.joinpath("stderr").open("wb") as told:
        child = subprocess.Popen(command, cwd=CLONE, env=environment, stdout=to, stderr=told, process_group=0)
        try:
            ended = wait(child, limit)
        finally:
            kill(child, signal.SIGKILL)  # whatever it has left running, and itself when this program is stopped
            child.wait()
    output, said = (file.read_text("utf-8", errors="replace") for file in (standard, errors))
    record: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1), "exit_code": child.returncode}
    try:
        record["result"] = part.read(folder, output)
    except Exception as error:  # output of a part that was cut, or that broke
        record["result"], said = {}, f"{said}\nits output cannot be read: {type(error).__name__}: {error}"
    reached = bool(record["result"].get("runs"))
    record["status"] = _status(part, child.returncode, ended, reached)
    if record["status"] != "done":
        record["last_lines"] = (output.splitlines()[-TAIL:] + said.splitlines()[-TAIL:])[-2 * TAIL :]
    return record


def _status(part: Part, code: int, ended: bool, reached: bool) -> str:
    """done, failed or cut. `ended`: by itself; `reached`: a training has log lines."""
    if part.endless:
        return "done" if reached and (not ended or code == 0) else "failed" if ended else "cut"
    if not ended:
        return "cut"
    return "done" if code == 0 else "failed"


def wait(child: subprocess.Popen[bytes], limit: float) -> bool:
    """Wait until it ends, asking it to when `limit` seconds are nearly over; False when it did not end by itself."""
    grace = min(GRACE, limit / 3)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(limit - grace)
        return True
    kill(child, signal.SIGTERM, group=False)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace)
    return False


def kill(child: subprocess.Popen[bytes], number: signal.Signals, group: bool = True) -> None:
    """A signal to the part's own process group, or to its first process alone; nothing where there is none any more."""
    with contextlib.suppress(ProcessLookupError):
        if group:
            os.killpg(child.pid, number)
        elif child.poll() is None:
            child.send_signal(number)


def machine(place: Place) -> dict[str, Any]:
    """Where it runs: what `describe_session` says, the driver, CUDA, cuDNN and the load."""
    cudnn: Any = torch.backends.cudnn
    found = describe_session() | {
        "load": [round(value, 2) for value in os.getloadavg()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if torch.cuda.is_available() else None,
        "driver": None,
        "data": "drawn" if place.data.parent == place.folder else "packed",
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    return found


def wheels(versions: Mapping[str, str]) -> list[str]:
    """NAME==VERSION of WHEELS, by a lock's versions."""
    return [f"{name}=={versions[name]}" for name in WHEELS]


if __name__ == "__main__":
    if "--wheels" in sys.argv[1:2]:
        lines = (line.split("==") for line in (CLONE / "requirements.lock").read_text().splitlines() if "==" in line)
        locked = {name.lower().replace("_", "-"): version for name, version in lines if not name.startswith("#")}
        sys.stdout.write("\n".join(wheels(locked)) + "\n")
    else:
        end_in_order_when_terminated()
        run_command(main)
