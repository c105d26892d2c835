"""What evaluations cost: `python bench/evaluation.py [--part share|frechet] [--against REVISION] [--json]`.

share: an evaluation as a part of a run of the shipped configurations, here and in an older build, in turns.
frechet: the Frechet distance of n images' features from as many others, beside pytorch-fid's.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import make_pairs
from PIL import Image
from rich.box import SIMPLE_HEAD
from safetensors.torch import save_file
from step import SCALE, _EnoughError, machine, random_batches, run_loop, student
from torch import Tensor, nn

from hpcdistill.command import positive, run_command
from hpcdistill.console import Table, err, out, say
from hpcdistill.methods.base import Batch, Method
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.methods.plain_sr import PlainSR
from hpcdistill.metrics import torchvision_operators
from hpcdistill.metrics.feature_networks import InceptionFeatures
from hpcdistill.metrics.frechet import frechet, kid, moments
from hpcdistill.metrics.sr_evaluation import SREvaluator
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol
from hpcdistill.training.segments import batches_a_step

CLONE = Path(__file__).resolve().parents[1]
TARGET = 0.05  # of a run
# HR pixels of the test sets, millions: of their files; Urban100's are 984x797 on average.
MEGAPIXELS = 0.57 + 3.22 + 15.44 + 78.4
IMAGES = 12  # of B100's size, that stand for them
# What configs/base/*.yaml say, and horse2zebra's test and training images.
SR_EVERY, GAN_EVERY, GAN_STEPS = 10_000, 6_670, 200 * 1334
HORSES, ZEBRAS = 120, 140 + 1334
PAIRS = 4  # of 256x256, that stand for the horses
CROP = 128  # of the step of FESD, whose networks are convolutions: 256x256 is taken as four times its seconds
DIMENSIONS = 2048


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench/evaluation.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("share", "frechet", "all"), default="all")
    parser.add_argument("--against", default="6c70ece", metavar="REVISION", help="the older build (default: 6c70ece)")
    parser.add_argument("--runs", type=positive, default=3, help="of each build, in turns (default: 3)")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of PyTorch")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--worker", choices=("evaluations", "steps"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.worker:
        err.quiet = True
        found = evaluations() if options.worker == "evaluations" else steps(options.threads)
        out.out(json.dumps(found), highlight=False)
        return
    report: dict[str, Any] = {"machine": machine(options.threads, os.getloadavg()[0])}
    if options.part != "frechet":
        report["share"] = measure_share(options.against, options.runs, options.threads)
    if options.part != "share":
        report["frechet"] = [measure_frechet(count) for count in (140, 3000)]
    if options.json:
        out.out(json.dumps(report), highlight=False)
    else:
        show(report)


def measure_share(against: str, runs: int, threads: int) -> dict[str, Any]:
    """The pieces of both builds, the smallest of their turns in processor seconds, and what they come to."""
    pieces: dict[str, list[dict[str, float]]] = {"now": [], against: []}
    with tempfile.TemporaryDirectory() as folder:
        older = Path(folder) / "older"
        git = ["git", "-C", str(CLONE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(older), against], check=True)
        try:
            builds = {"now": CLONE, against: older}
            for turn, name in itertools.product(range(runs), builds):
                say(f"turn {turn + 1} of {runs}: {name}")
                pieces[name].append(worker("evaluations", builds[name], threads))
        finally:
            subprocess.run([*git, "remove", "--force", str(older)], check=True)
    say("steps")
    of_steps = worker("steps", CLONE, threads)
    best = {name: {key: min(turn[key] for turn in turns) for key in turns[0]} for name, turns in pieces.items()}
    return {
        "target": TARGET,
        "pieces": best,
        "steps": of_steps,
        "rows": {name: shares(found, of_steps) for name, found in best.items()},
    }


def worker(what: str, clone: Path, threads: int) -> dict[str, float]:
    """This script on the package of the checkout `clone`, in a process of its own."""
    words = [sys.executable, str(CLONE / "bench" / "evaluation.py"), "--worker", what, "--threads", str(threads)]
    environment = os.environ | {"PYTHONPATH": str(clone)}
    done = subprocess.run(words, env=environment, cwd=clone, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def shares(pieces: Mapping[str, float], of_steps: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Configuration -> seconds of an evaluation, of the steps between two, and the share of the whole run."""
    of_gan = HORSES * (pieces["teacher_image"] + pieces["student_image"]) + 2 * pieces["distances"]
    rows = {}
    for name, evaluation, once, every, step in (
        ("fsrcnn x4", MEGAPIXELS * pieces["sr_megapixel"], MEGAPIXELS * pieces["sr_once"], SR_EVERY, "fsrcnn"),
        ("dssd x4", MEGAPIXELS * pieces["sr_megapixel"], MEGAPIXELS * pieces["sr_once"], SR_EVERY, "dssd"),
        ("fesd horse2zebra", of_gan, ZEBRAS * pieces["real_image"], GAN_EVERY, "fesd"),
    ):
        times = GAN_STEPS // GAN_EVERY if step == "fesd" else 100
        training = every * of_steps[step]
        whole = times * (evaluation + training) + once
        rows[name] = {
            "evaluation_seconds": evaluation,
            "once_seconds": once,
            "between_seconds": training,
            "share": (times * evaluation + once) / whole,
        }
    return rows


def evaluations() -> dict[str, float]:
    """Processor seconds of each piece of an evaluation, on made-up images, with random weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HPCDISTILL_DATA"] = str(folder)
        return super_resolution(folder / "sr") | translation(folder)


def super_resolution(folder: Path) -> dict[str, float]:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8))
        coarse.resize((480, 320), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    method = PlainSR(PlainSR.Config(scale=SCALE))
    network = method.to(memory_format=layout_of(method)).generators["student"]
    evaluator = SREvaluator({"set": folder}, SCALE, 1)
    once = seconds(evaluator.preload) + seconds(lambda: evaluator.bicubic())
    evaluator.evaluate(network)
    megapixels = IMAGES * 480 * 320 / 1e6
    return {
        "sr_once": once / megapixels,
        "sr_megapixel": min(seconds(lambda: evaluator.evaluate(network)) for _ in range(3)) / megapixels,
    }


def translation(folder: Path) -> dict[str, float]:
    make_pairs(folder / "pairs", PAIRS, 256, "PNG")
    features = InceptionFeatures(random_inception(folder / "inception.pth"))
    protocol = TranslationProtocol("paired", "AtoB", 256, "test", kid=False, spectral_error=True)
    evaluator = TranslationEvaluator({"set": folder / "pairs"}, protocol, [], features, None)
    networks = fesd(folder, 256).generators
    with torch.no_grad():
        real = torch.stack([evaluator.image("set", 1, number) for number in range(PAIRS)])
        evaluator.evaluate(networks["student"], "set")
        found = {"real_image": seconds(lambda: features(real)) / PAIRS}
        for name in ("teacher", "student"):
            found[f"{name}_image"] = seconds(lambda n=name: evaluator.evaluate(networks[n], "set")) / PAIRS
        one, other = made_features(HORSES, 0), made_features(ZEBRAS, 1)
        known = moments(other)
        found["distances"] = seconds(lambda: (frechet(moments(one), known), kid(one, other)))
    return found


def steps(threads: int) -> dict[str, float]:
    """Processor seconds of a step of each method, in the layout that the loop takes by itself."""
    found = {}
    for name, method in (("fsrcnn", PlainSR(PlainSR.Config(scale=SCALE))), ("dssd", student("hfrm"))):
        found[name] = statistics.median(timed_steps(method, random_batches(192), threads, 8))
    with tempfile.TemporaryDirectory() as folder:
        random = torch.Generator().manual_seed(0)
        images = {key: 2 * torch.rand(1, 3, CROP, CROP, generator=random) - 1 for key in "ab"}
        batch = {**images, "number": torch.zeros(1, dtype=torch.int64)}
        of_crop = statistics.median(timed_steps(fesd(Path(folder), CROP), [batch], threads, 2))
        found["fesd"] = of_crop * (256 / CROP) ** 2
    return found


def timed_steps(method: Method, batches: list[dict[str, Tensor]], threads: int, count: int) -> list[float]:
    """Processor seconds of `count` steps of the real loop behind a first one."""
    taken = batches_a_step(method.segments())
    starts: list[float] = []

    def delivered() -> Iterator[Batch]:
        cycle = itertools.cycle(batches)
        while len(starts) < count + 2:  # it asks for more once it is through with the last step
            starts.append(time.process_time())
            yield from itertools.islice(cycle, taken)
        raise _EnoughError

    run_loop(method, delivered, None, threads, trackers=())
    return [end - start for start, end in itertools.pairwise(starts[1:])]


def layout_of(method: Method) -> torch.memory_format:
    """What a training on a CPU has by itself; older builds know no other than contiguous."""
    try:
        layouts: Any = importlib.import_module("hpcdistill.training.layout")
    except ModuleNotFoundError:
        return torch.contiguous_format
    found: torch.memory_format = layouts.FORMATS[layouts.faster_layout(method, torch.device("cpu"))]
    return found


def fesd(folder: Path, crop: int) -> DistilledGAN:
    """FESD-CycleGAN of horse2zebra, with random weights of VGG16."""
    tensors, number, before = {}, 0, 3
    for block in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for channels in block:
            tensors[f"features.{number}.weight"] = torch.randn(channels, before, 3, 3) * (2 / (9 * before)) ** 0.5
            tensors[f"features.{number}.bias"] = torch.zeros(channels)
            before, number = channels, number + 2
        number += 1
    save_file(tensors, folder / "vgg.safetensors")
    options: dict[str, Any] = {"crop": crop, "spectrum": "crop", "family": "cyclegan", "student_steps": 4}
    method = DistilledGAN(DistilledGAN.Config(**options, vgg=str(folder / "vgg.safetensors")))
    method.prepare(crop)
    return method


def random_inception(file: Path) -> Path:
    """Weights with the names and shapes of FID's Inception, in a file."""
    torchvision_operators.ready()
    inception: Any = importlib.import_module("pytorch_fid.inception")
    network = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    parts: dict[str, nn.Module] = {
        **{name: inception.FIDInceptionA(c, p) for name, c, p in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64))},
        **{
            f"6{name}": inception.FIDInceptionC(768, channels_7x7=c)
            for name, c in zip("bcde", (128, 160, 160, 192), strict=True)
        },
        "7b": inception.FIDInceptionE_1(1280),
        "7c": inception.FIDInceptionE_2(2048),
    }
    for name, part in parts.items():
        setattr(network, f"Mixed_{name}", part)
    torch.save(network.state_dict(), file)
    return file


def made_features(count: int, seed: int) -> Tensor:
    """`[count, 2048]`, float32, with variances over three orders of magnitude."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((DIMENSIONS, DIMENSIONS)) * np.logspace(0, -1.5, DIMENSIONS)[:, None] / 10
    return torch.from_numpy((np.abs(random.standard_normal((count, DIMENSIONS))) @ mixing + 0.4).astype(np.float32))


def measure_frechet(count: int) -> dict[str, Any]:
    """Both from the features of two sets to the distance, once each: pytorch-fid takes a minute."""
    torchvision_operators.ready()
    score: Any = importlib.import_module("pytorch_fid.fid_score")
    sets = [made_features(count, seed) for seed in (0, 1)]
    values: dict[str, float] = {}

    def ours() -> None:
        values["ours"] = frechet(moments(sets[0]), moments(sets[1]))

    def theirs() -> None:
        statistics_ = [(x.numpy().mean(axis=0), np.cov(x.numpy(), rowvar=False)) for x in sets]
        values["theirs"] = float(score.calculate_frechet_distance(*statistics_[0], *statistics_[1]))

    ours()
    found = {"n": count, "seconds": min(seconds(ours) for _ in range(3)), "pytorch_fid_seconds": seconds(theirs)}
    return {**found, "ratio": found["pytorch_fid_seconds"] / found["seconds"], **values}


def seconds(work: Callable[[], Any]) -> float:
    """Of processor time, all threads together: what other programs do hardly changes it."""
    start = time.process_time()
    work()
    return time.process_time() - start


def show(report: dict[str, Any]) -> None:
    what = report["machine"]
    out.print(f"{what['cpu']}, {what['threads']} threads, torch {what['torch']}, load {what['load']}", soft_wrap=True)
    if "share" in report:
        table = Table(title="processor seconds of an evaluation, and its share of a run", box=SIMPLE_HEAD)
        for heading in ("build", "configuration", "evaluation s", "once s", "steps between s", "share"):
            table.add_column(heading, justify="left" if heading in ("build", "configuration") else "right")
        for build, rows in report["share"]["rows"].items():
            for name, row in rows.items():
                numbers = (f"{row[key]:.1f}" for key in ("evaluation_seconds", "once_seconds", "between_seconds"))
                table.add_row(build, name, *numbers, f"{row['share']:.2%}")
        out.print(table)
        worst = max(row["share"] for row in report["share"]["rows"]["now"].values())
        say(f"target {TARGET:.0%} of a run: {'reached' if worst <= TARGET else 'NOT reached'}")
    if "frechet" in report:
        table = Table(title=f"Frechet distance of n and n features of {DIMENSIONS}", box=SIMPLE_HEAD)
        for heading in ("n", "s", "pytorch-fid s", "ratio", "value", "pytorch-fid's"):
            table.add_column(heading, justify="right")
        for row in report["frechet"]:
            numbers = (f"{row[key]:.4g}" for key in ("seconds", "pytorch_fid_seconds", "ratio"))
            table.add_row(str(row["n"]), *numbers, f"{row['ours']:.6f}", f"{row['theirs']:.6f}")
        out.print(table)


if __name__ == "__main__":
    run_command(main)
