"""What an evaluation computes in batches, reads back once a set and lays out for speed: numbers stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sets import noise, write_set
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpcdistill.metrics.base import SR_METRICS, ImageMetric, SetResult
from hpcdistill.metrics.psnr_ssim import luma_pair, psnr, ssim
from hpcdistill.metrics.sr_evaluation import SREvaluator, bicubic_upsampler, evaluating
from hpcdistill.metrics.translation_evaluation import TranslationEvaluator, TranslationProtocol, translate
from hpcdistill.models.fsrcnn import FSRCNN
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.resnet_generator import ResNetGenerator
from hpcdistill.models.unet_generator import UNetGenerator

SIZES = [(40, 60), (44, 60), (40, 60), (60, 40), (40, 60), (44, 60), (40, 60)]


class HostReads(TorchDispatchMode):
    """Counts what gives Python a number of a tensor: on a GPU each waits for all the work that is queued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        tolist = Tensor.tolist

        def counted(tensor: Tensor) -> Any:  # on a CPU it is no operation that is dispatched
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(Tensor, "tolist", counted)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
        return function(*arguments, **(options or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    def of(work: Callable[[], Any]) -> int:
        with HostReads(monkeypatch) as watch:
            work()
        return watch.count

    return of


def write_photos(folder: Path, sizes: list[tuple[int, int]], gray: int | None = None) -> Path:
    """Noise that is smooth enough for an SSIM between 0 and 1; the image number `gray` is a gray file."""
    folder.mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        small = Image.fromarray(noise(height // 4, width // 4, number)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        (small.convert("L") if number == gray else small).save(folder / f"i{number}.png")
    return folder


def fsrcnn(**options: Any) -> FSRCNN:
    torch.manual_seed(1)
    return FSRCNN(4, **options)


def test_one_read_a_set(tmp_path: Path, reads: Callable[[Callable[[], Any]], int]) -> None:
    sets = {"one": write_photos(tmp_path / "one", SIZES), "two": write_photos(tmp_path / "two", SIZES[:2])}
    evaluator, network = SREvaluator(sets, 4, 1), fsrcnn()
    ssim(*torch.zeros(2, 16, 16))  # its window is a list that is made once
    assert reads(lambda: evaluator.evaluate(network)) == 2  # the first one measures bicubic enlargement too
    assert reads(lambda: evaluator.evaluate(network)) == 2
    assert reads(evaluator.bicubic) == 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_one_size_are_a_batch(tmp_path: Path, channels: int, rank: int) -> None:
    """In the order of the files, each number its own; gray files, which are taken as they are, by themselves."""
    folder = write_photos(tmp_path / "set", SIZES, gray=2)
    network = fsrcnn(channels=channels)
    shapes: list[tuple[int, ...]] = []
    hook = FSRCNN.forward
    evaluators = [SREvaluator({"set": folder}, 4, channels, "matlab") for _ in range(2)]
    assert evaluators[0].batch_pixels == 0  # on a CPU, where batches are slower
    evaluators[1].batch_pixels = 2 * 44 * 60
    expected = [evaluators[0].evaluate(network, rank, 2), evaluators[0].bicubic(rank, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSRCNN, "forward", lambda self, image: (shapes.append(tuple(image.shape)), hook(self, image))[1])
        found = [evaluators[1].evaluate(network, rank, 2), evaluators[1].bicubic(rank, 2)]
    batches = {0: [(2, 10, 15), (1, 10, 15), (1, 10, 15)], 1: [(2, 11, 15), (1, 15, 10)]}[rank]
    assert sorted(shapes) == sorted((count, channels, height, width) for count, height, width in batches)
    for one, other in zip(expected, found, strict=True):
        assert [row["name"] for row in one["set"]] == [f"i{number}" for number in range(rank, len(SIZES), 2)]
        for row, same in zip(one["set"], other["set"], strict=True):
            assert row["name"] == same["name"]
            assert row["psnr"] == pytest.approx(same["psnr"], abs=1e-4)  # a pixel may round to another level
            assert row["ssim"] == pytest.approx(same["ssim"], abs=1e-6)
    assert len({row["psnr"] for row in expected[0]["set"]}) == len(expected[0]["set"])  # they tell images apart


def test_metrics_of_a_batch_are_those_of_its_images() -> None:
    generator = torch.Generator().manual_seed(3)
    reference = torch.randint(0, 256, (3, 3, 40, 60), dtype=torch.uint8, generator=generator)
    output = torch.rand(3, 1, 40, 60, generator=generator)
    together = luma_pair(output, reference, 4, "pisr")
    for number in range(3):
        alone = luma_pair(output[number], reference[number], 4, "pisr")
        for metric in (psnr, ssim):
            assert float(metric(*together)[number]) == pytest.approx(float(metric(*alone)), rel=1e-12)


def test_a_metric_that_takes_one_image_gets_one(tmp_path: Path) -> None:
    """A metric of one's own: PyTorch's L1 is one mean, over a batch too."""
    folder = write_photos(tmp_path / "set", SIZES)
    evaluators = [SREvaluator({"set": folder}, 4, 1) for _ in range(2)]
    evaluators[1].batch_pixels = 1 << 20
    network, metric = bicubic_upsampler(4), ImageMetric("l1", "L1", 2, "lower", "torch.nn.functional:l1_loss")
    SR_METRICS.append(metric)
    try:
        one, other = ([row["l1"] for row in evaluator.evaluate(network)["set"]] for evaluator in evaluators)
    finally:
        SR_METRICS.remove(metric)
    assert other == pytest.approx(one, abs=1e-3)
    assert len(set(other)) == len(SIZES)


@pytest.mark.parametrize("build", [fsrcnn, lambda: PrivilegedTeacher(4)], ids=["student", "teacher"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_the_training_is_kept(build: Callable[[], Any], layout: torch.memory_format) -> None:
    """And computes the same: against the trained form of float64, whose outputs are of the order of 1."""
    torch.manual_seed(2)
    network = build().to(memory_format=layout)
    image = torch.rand(1, 1, *((48, 60) if network.takes == "hr" else (12, 15)))
    with evaluating(network) as used:
        wide = [w for w in used.parameters() if w.ndim == 4 and w.shape[1] > 1 and w.shape[2] > 1]
        kept = [weight.is_contiguous(memory_format=layout) for weight in wide]
        found = used(image)

    assert all(kept[:-1])  # the sub-pixel form is made anew, and follows what it is fed
    with torch.no_grad():
        output = network.double().eval()(image.double())
    assert (found - getattr(output, "sr", output)).abs().max() < 1e-5


class Bands:
    """Features that are cheap: the mean of each row of the image."""

    frechet_name, kernel_name, origin, digest, dimensions = "frechet_rows", "kernel_rows", "rows", "0", 16

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(1, 3))


class Half(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images / 2


@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_no_read_for_each_image_that_is_translated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[[Callable[[], Any]], int], kind: Any
) -> None:
    monkeypatch.setenv("HPCDISTILL_DATA", str(tmp_path / "root"))
    counts = []
    for number in (4, 12):
        images = [noise(16, 32 if kind == "paired" else 16, seed) for seed in range(number)]
        names = ("ab.png",) if kind == "paired" else ("a.png", "b.png")
        write_set(tmp_path / str(number), kind, [{name: image} for name in names for image in images], split="test")
        protocol = TranslationProtocol(kind, "AtoB", 16, "test", kid=False)
        evaluator = TranslationEvaluator({"set": tmp_path / str(number)}, protocol, [], Bands(), None)
        evaluator.evaluate(Half(), "set")  # the real side is computed once
        found: list[SetResult] = []
        counts.append(reads(lambda measured=evaluator, found=found: found.append(measured.evaluate(Half(), "set"))))
        assert found[0].images == number
    assert counts[0] == counts[1] <= 3


@pytest.mark.parametrize(("build", "at_once"), [(ResNetGenerator, 1), (UNetGenerator, 3)])
def test_a_cpu_translates_as_many_images_at_once_as_is_fastest(build: Callable[..., Any], at_once: int) -> None:
    torch.manual_seed(4)
    network = build(ngf=4).eval()
    sources = torch.from_numpy(np.stack([noise(256, 256, seed).transpose(2, 0, 1) for seed in range(3)]))
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with torch.no_grad():
        expected = network(sources.float() / 127.5 - 1)
        sizes.clear()
        found = translate(network, sources)
    assert max(sizes) == at_once
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_measures_in_batches_what_a_cpu_does(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "set", SIZES)
    network = fsrcnn()
    evaluators = [SREvaluator({"set": folder}, 4, 1, device=device) for device in ("cpu", "cuda")]
    assert len(list(evaluators[1]._batches("set", range(len(SIZES))))) == 3
    one = evaluators[0].evaluate(network)["set"]
    other = evaluators[1].evaluate(network.cuda())["set"]
    for row, same in zip(one, other, strict=True):
        assert (row["name"], row["psnr"]) == (same["name"], pytest.approx(same["psnr"], abs=1e-2))
