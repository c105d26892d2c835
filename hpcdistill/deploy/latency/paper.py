"""Times as the papers take them: FESD's table 7, and the column "runtime" of DSSD's table A.I.

Batch 1, in float32, the network as it is published, nothing compiled or rearranged: warm-ups, then one image after the
other, and the mean of what each takes on the clock. FESD says so of its table (section 3.5: 100 warm-ups, the whole
test set); DSSD says only that its costs are of 1280x720 pixels, so its column is taken in the same way at that size.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from hpcdistill.console import err
from hpcdistill.data.read.domains import DomainImages
from hpcdistill.deploy.latency.subjects import Subject
from hpcdistill.deploy.latency.timing import Timing, device_name, place_name, synchronise, threads
from hpcdistill.errors import UserError
from hpcdistill.metrics.cost import network_cost
from hpcdistill.metrics.measured_cost import save_latency
from hpcdistill.metrics.real_side import load_translation_index
from hpcdistill.metrics.sr_test_sets import load_test_set
from hpcdistill.metrics.trained_translation import DEFAULT_SIZE
from hpcdistill.metrics.translation_evaluation import as_input
from hpcdistill.ops.colour import luma

WARM_UPS = 100
PASSES = 100  # at 1280x720, where the images of a test set go round
SPEC = {
    "translation": "FESD, table 7: batch 1, float32, mean over the test set, one image at a time",
    "super-resolution": "DSSD, table A.I: batch 1, float32, 1280x720 pixels (x3: 1281x720), mean of one at a time",
}


def measure_as_papers(
    subject: Subject,
    data: Path | None,
    *,
    device: str = "cpu",
    count: int | None = None,
    warm_ups: int = WARM_UPS,
    most: int | None = None,
) -> dict[str, Any]:
    """One network's time; JSON values. `data`: its images; None: the run's own test set.

    `count` threads; `most`: passes at most. UserError for an exported file, and where there are no images.
    """
    if subject.network is None:
        raise UserError(
            f"{subject.label}: the papers' protocol is of networks in PyTorch; give the run or its .safetensors file"
        )
    place = data or _own_test_set(subject)
    images = _Translated(subject, place) if subject.about.task == "translation" else _Enlarged(subject, place)
    passes = len(images) if most is None else min(most, len(images))
    count = count or torch.get_num_threads()
    timing = Timing()
    with threads(count), torch.inference_mode():
        network = subject.as_published().to(device)
        first = images[0].to(device)
        for _ in track(range(warm_ups), "warming up", console=err, transient=True, disable=not err.moves):
            network(first)
        synchronise(device)
        for number in track(range(passes), "measuring", console=err, transient=True, disable=not err.moves):
            image = images[number].to(device)
            timing.measure(partial(network, image), device)
    height, width = first.shape[-2:]
    scale = subject.about.scale
    return {
        "metric": "latency_ms" if subject.about.task == "translation" else "runtime_ms",
        "protocol": SPEC[subject.about.task],
        "kind": device,
        "device": device_name(device),
        "threads": count,
        **timing.summary(),
        "passes": passes,
        "images": min(passes, images.count),
        "of_images": images.count,
        "warm_ups": warm_ups,
        "input": [height, width],
        "output": [height * scale, width * scale],
        "data": place.name,
        "trained": subject.trained,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def save(subject: Subject, entry: dict[str, Any]) -> Path | None:
    """Put it into the run's latency.json, with the network's counts; None for a network that lies in no run."""
    if subject.run is None:
        return None
    counted = network_cost(subject.as_published())
    about = {
        "network": subject.about.network,
        "params": counted.params,
        "macs": counted.macs,
        "macs_true": counted.true_macs,
        "macs_rule": "the literature's: a transposed convolution is charged at the size of its output",
    }
    return save_latency(subject.run, subject.name, about, place_name(entry["kind"], entry["threads"]), entry)


class _Translated:
    """Test images `[1, 3, L, L]` in [-1, 1], as the run evaluates them."""

    def __init__(self, subject: Subject, place: Path) -> None:
        data, evaluation = (subject.values.get(name) or {} for name in ("data", "eval"))
        size = evaluation.get("size") or data.get("crop") or DEFAULT_SIZE
        subject.check_size((size, size))
        index = load_translation_index(place, None, "--data")
        self.images = DomainImages([place], [index], index.kind, data.get("direction") or "AtoB", size)
        self.domain = int(subject.backwards)
        self.count = len(self.images.domains[self.domain])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        pixels = self.images.load(self.domain, number).transpose(2, 0, 1)
        return as_input(torch.from_numpy(np.ascontiguousarray(pixels))[None])


class _Enlarged:
    """LR test images `[1, C, H, W]` in [0, 1], mirrored and cut to what 1280x720 pixels are made of, going round."""

    def __init__(self, subject: Subject, place: Path) -> None:
        self.images = load_test_set(place, subject.about.scale)
        self.size, self.gray = subject.size(), subject.about.channels == 1
        self.count = len(self.images)

    def __len__(self) -> int:
        return max(PASSES, self.count)

    def __getitem__(self, number: int) -> Tensor:
        _, _, lr = self.images.read(number % self.count)
        image = torch.from_numpy(np.ascontiguousarray(_filled(lr, self.size).transpose(2, 0, 1)))[None].float() / 255
        return luma(image) if self.gray else image


def _filled(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """`[H, W, 3]` mirrored at the bottom and on the right until it is large enough, and cut to `size`."""
    more = [(0, max(0, side - have)) for side, have in zip(size, pixels.shape, strict=False)]
    return np.pad(pixels, (*more, (0, 0)), mode="symmetric")[: size[0], : size[1]]


def _own_test_set(subject: Subject) -> Path:
    """The test set that chooses the run's weights, else its first."""
    sets = (subject.values.get("data") or {}).get("eval") or {}
    selected = (subject.values.get("eval") or {}).get("select")
    place = sets.get(selected) or next(iter(sets.values()), None)
    if place is None:
        raise UserError(f"{subject.label}: names no test set; give one with --data SET")
    if not Path(place).exists():
        raise UserError(f"{subject.label}: its test set {place} is not here; pack it, or give one with --data SET")
    return Path(place)
