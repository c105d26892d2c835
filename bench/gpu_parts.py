"""What bench/gpu.py runs, most valuable first: each part a command, a share of the time, and a reader of its output."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdistill.storage import CLONE
from hpcdistill.training.records import read_row

MINUTES = 10.0  # of all parts, by default
FULL = "cuda"  # the device of a run that counts
# Methods by name: the configuration, and the teacher's configuration that it trains first.
SR = {"fsrcnn": "fsrcnn/x4", "dssd": "dssd/x4", "pisr": "pisr/x4"}
GAN = {"fesd": "fesd/horse2zebra", "dcd": "dcd/horse2zebra", "omgd": "omgd/horse2zebra"}

# Of translation, where only a rehearsal is wanted.
SMALL = (
    "data.crop=64",
    "data.load_size=64",
    "method.discriminator_strides=2",
    "method.ndf=8",
    "method.teacher.ngf=8",
    "method.student.ngf=4",
    "method.style_layers=[relu1_1]",
    "method.feature_layers=[relu1_1]",
)


@dataclass(frozen=True)
class Place:
    """What the commands are made for."""

    device: str  # cuda, or cpu for a rehearsal
    data: Path  # the packed sets of gpu_data.py
    folder: Path  # for runs and weights, thrown away at the end

    @property
    def rehearsal(self) -> bool:
        return self.device != FULL


Reader = Callable[[Path, str], dict[str, Any]]  # the part's folder and its standard output -> what was measured


@dataclass(frozen=True)
class Part:
    """`seconds`: its limit in ten minutes, and what others leave over. `endless`: its limit is how it ends."""

    name: str
    what: str
    seconds: float
    command: Callable[[Place], list[str] | None]  # None: it cannot be run in this checkout
    read: Reader
    endless: bool = False
    absent: str = ""  # why there is no command


def parts() -> list[Part]:
    """All of them, in their order."""
    return [
        Part("tests", "pytest -m gpu: what only a GPU can show", 60, _tests, _read_tests),
        Part("steps", "a step of every method, in both layouts, float32 and bf16", 150, _steps, _json_lines),
        _training("fesd", 45),
        _training("dssd", 55),
        _bench("gan", "FESD, DCD and OMGD beside the released code's arithmetic", 60),
        _bench("step", "super-resolution beside the published trainers'", 60),
        _bench("limits", "bandwidth and matrix rate of the device", 30),
        Part("latency", "the x4 student to 1280x720 in every form", 30, _latency, _json),
        _training("fsrcnn", 25),
        _training("pisr", 35),
        _training("dcd", 30),
        _training("omgd", 30),
        Part("loader", "batches from the packed set, by the host's cores", 25, _loader, _json),
    ]


def _python(script: str, *words: str) -> list[str]:
    return [sys.executable, str(CLONE / script), *words]


def _tests(place: Place) -> list[str]:
    """Only the files that have such tests: others would be imported for nothing, with what they need."""
    every = sorted((CLONE / "tests").rglob("test_*.py"))
    files = [file for file in every if "@pytest.mark.gpu" in file.read_text("utf-8")]
    words = ["-m", "pytest", "-q", "-m", "gpu", "-n", "0", "-rs", "-p", "no:cacheprovider"]
    return [sys.executable, *words, *(str(file.relative_to(CLONE)) for file in files)]


def _read_tests(folder: Path, output: str) -> dict[str, Any]:
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    return {**counts, "failures": re.findall(r"^(?:FAILED|ERROR) .*$", output, re.M)[:20]}


def _steps(place: Place) -> list[str]:
    small = ["--small", "--seconds", "0", "--forms", "contiguous", "--rows", "fsrcnn", "dssd student", "fesd"]
    return _python("bench/gpu_step.py", "--device", place.device, *(small if place.rehearsal else []))


def _json_lines(folder: Path, output: str) -> dict[str, Any]:
    """All whole lines: what was measured before the part was cut."""
    rows = []
    for line in output.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return {"rows": rows}


def _json(folder: Path, output: str) -> dict[str, Any]:
    start = output.find("{")
    found: dict[str, Any] = json.loads(output[start:]) if start >= 0 else {}
    return found


def _bench(name: str, what: str, seconds: float) -> Part:
    """A script of this folder, where it knows --device."""
    file = CLONE / "bench" / f"{name}.py"

    def command(place: Place) -> list[str] | None:
        if not file.is_file() or '"--device"' not in file.read_text("utf-8"):
            return None
        return _python(f"bench/{name}.py", "--device", place.device, "--json")

    return Part(name, what, seconds, command, _json, absent=f"bench/{name}.py is not there, or has no --device")


def _latency(place: Place) -> list[str]:
    words = ["-m", "hpcdistill.benchmark", "latency", "pretrained:x4", "--device", place.device, "--json"]
    short = ["--rounds", "3", "--variants", "eager", "--no-memory", "--size", "32x32"]
    return [sys.executable, *words, *(short if place.rehearsal else ["--rounds", "100"])]


def _loader(place: Place) -> list[str]:
    seconds = "0.02" if place.rehearsal else "0.15"
    return _python("bench/loader.py", "--data", str(place.data / "sr"), "--seconds", seconds, "--json")


def _training(name: str, seconds: float) -> Part:
    kind = "super-resolution" if name in SR else "translation"
    return Part(
        f"train {name}",
        f"a training of {name.upper()} ({kind}) with its reader, log and checkpoints, until its time is over",
        seconds,
        lambda place: training_command(name, place),
        read_training,
        endless=True,
    )


def training_command(name: str, place: Place) -> list[str]:
    """The run as its configuration has it but for the data, an untrained VGG16, and no Frechet distance."""
    config = f"configs/{(SR | GAN)[name]}.yaml"
    words = [sys.executable, "-m", "hpcdistill.train", config, f"runs={place.folder / name}"]
    own = [f"train.device={place.device}", "train.steps=1000000", "train.log_every=20", "train.trackers=[]"]
    if name in SR:
        own += [f"data.train={place.data / 'sr'}", f"data.eval={{packed: {place.data / 'sr-test'}}}", "eval.every=500"]
        if name != "fsrcnn":
            teacher = {"train.steps": 6 if place.rehearsal else 400, "eval.every": 400}
            own += [f"teacher.overrides.{key}={value}" for key, value in teacher.items()]
    else:
        own += [f"data.train={place.data / 'unpaired' / 'train'}", "data.eval={}", "eval.select=null"]
        own += [f"method.vgg={place.folder / 'vgg16-untrained.safetensors'}"]
    if name == "omgd":
        own += ["method.schedule=online", "method.blocks=null"]
    if place.rehearsal:
        own += ["data.workers=0", "train.log_every=1", "train.threads=1"]
        own += ["data.patch=48", "train.batch_size=2"] if name in SR else list(SMALL)
    return [*words, *own]


def read_training(folder: Path, output: str) -> dict[str, Any]:
    """Of each run in the folder: steps, seconds, and the loss terms of the first and the last line of its log."""
    runs = {}
    for log in sorted(folder.glob("*/metrics.jsonl")):
        lines = [row for line in log.read_bytes().splitlines() if (row := read_row(line)) is not None]
        steps = [line for line in lines if "seconds" in line]
        if not steps:
            continue
        first, last = steps[0], steps[-1]
        rate = (last["step"] - first["step"]) / max(last["seconds"] - first["seconds"], 1e-9)
        terms = [key for key in last if "/" in key and not key.startswith(("gradient", "learning_rate", "underflow"))]
        runs[log.parent.name] = {
            "steps": last["step"],
            "seconds": last["seconds"],
            "steps_per_second": rate if last["step"] > first["step"] else last["step"] / max(last["seconds"], 1e-9),
            "first": {key: first.get(key) for key in terms},
            "last": {key: last[key] for key in terms},
            "measured": {key: value for line in lines if "seconds" not in line for key, value in line.items()},
        }
    return {"runs": runs}
