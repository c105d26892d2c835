"""What the tests of the GAN methods share: small methods in float64, batches, phases, and arithmetic by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from toy import Killed, ToyReader, kill_at, newest_tensors, rows, run, uniform

from hpcdistill.data.counter import draw
from hpcdistill.methods.base import Carry, Method, Progress, Terms, whole
from hpcdistill.methods.cyclegan import CycleGAN
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.methods.image_distillation import ImageDistillation
from hpcdistill.methods.omgd import OMGD
from hpcdistill.methods.pix2pix import Pix2Pix
from hpcdistill.methods.wavelet_kd import WaveletKD
from hpcdistill.models.image_generator import build_generator
from hpcdistill.training.evaluation import Evaluation
from hpcdistill.training.optimization import Freezer

CROP = 48  # maps of 12x12 pixels, the smallest that a discriminator of two strided layers takes
BATCH = 2
FAMILIES = ("cyclegan", "pix2pix")
LAYERS = {"cyclegan": ("down2", "block1", "block2", "block3"), "pix2pix": ("down3", "down4", "up4", "up2")}


def small(settings: dict[str, Any], ngf: int) -> dict[str, Any]:
    return {"ngf": ngf, "blocks": 3, "levels": 4, **settings}


def cyclegan(**values: Any) -> CycleGAN:
    torch.manual_seed(0)
    given = {"crop": CROP, "ndf": 4, "discriminator_strides": 2, "pool": 3, "generator": small({}, 4)}
    return CycleGAN(CycleGAN.Config(**(given | values)))


def pix2pix(**values: Any) -> Pix2Pix:
    torch.manual_seed(0)
    given = {"crop": CROP, "ndf": 4, "discriminator_strides": 2, "generator": small({}, 4)}
    return Pix2Pix(Pix2Pix.Config(**(given | values)))


def _students(vgg: Path | None, values: dict[str, Any]) -> dict[str, Any]:
    """Teacher of width 8, student of 4 (U-Net: 12 and 8); without `vgg` no style and no feature loss."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"crop": CROP, "ndf": 4, "discriminator_strides": 2}
    given |= {"vgg": str(vgg)} if vgg else {"weight_style": 0, "weight_feature": 0}
    if values.get("family", "cyclegan") == "cyclegan":
        given |= {"pool": 3, "teacher": small({}, 8), "student": small({}, 4)}
    else:
        given |= {"teacher": small({}, 12), "student": small({}, 8)}
    return given


def distilled(vgg: Path | None = None, **values: Any) -> DistilledGAN:
    method = DistilledGAN(DistilledGAN.Config(**(_students(vgg, values) | values)))
    method.prepare(CROP)
    return method


def omgd(vgg: Path | None = None, **values: Any) -> OMGD:
    """Of pairs it has a deep teacher of width 4 too."""
    deep = {"deep": {"ngf": 4, "levels": 4}} if values.get("family") == "pix2pix" else {}
    method = OMGD(OMGD.Config(**(_students(vgg, values) | deep | values)))
    method.prepare(CROP)
    return method


def wavelet_kd(teachers: dict[str, nn.Module] | None = None, **values: Any) -> WaveletKD:
    """A student of width 4 and, unless others are given, teachers of width 6 (U-Net: 8 and 12); three levels."""
    torch.manual_seed(0)
    paired = values.get("family") == "pix2pix"
    given: dict[str, Any] = {"crop": CROP, "ndf": 4, "discriminator_strides": 2, "levels": 3}
    given |= {"student": small({}, 8 if paired else 4), "pool": 0 if paired else 3}
    config = WaveletKD.Config(**(given | values))
    if teachers is None:
        shape = {"ngf": 12, "levels": 4} if paired else {"ngf": 6, "blocks": 2}
        teachers = {role: build_generator("unet" if paired else "resnet", **shape) for role in config.roles()}
    return WaveletKD(config, teachers)


def image_distillation(vgg: Path | None = None, **values: Any) -> ImageDistillation:
    """A student of width 4; without `vgg` no style and no feature loss."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"crop": CROP, "student": small(values.pop("student", {}), 4)}
    given |= {"vgg": str(vgg)} if vgg else {"weight_style": 0, "weight_feature": 0}
    method = ImageDistillation(ImageDistillation.Config(**(given | values)))
    method.prepare(CROP)
    return method


def samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    """a: smooth noise, b: its negative with a gradient, both [B, 3, CROP, CROP] in [-1, 1]; float32."""
    drawn = torch.from_numpy(uniform(numbers, 3 * 36)).view(-1, 3, 6, 6).float()
    a = nn.functional.interpolate(2 * drawn - 1, (CROP, CROP), mode="bilinear")
    return {"a": a, "b": 0.7 * torch.linspace(-1, 1, CROP) - 0.3 * a}


def double_samples(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    return {name: images.double() for name, images in samples(numbers).items()}


def batch_of(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    numbers = np.arange(BATCH)
    images = {key: value.to(dtype) for key, value in samples(numbers).items()}
    # Two images of each domain that have nothing to do with each other.
    return {**images, "b": images["b"].flip(0), "number": torch.from_numpy(numbers)}


class Phases:
    """The phases of one iteration as the loop runs them, without updates."""

    def __init__(self, method: Method) -> None:
        self.method = method.train()
        self.freezer = Freezer({name: group.module for name, group in method.groups.items()})
        self.carry = Carry()

    def run(self, name: str, batch: dict[str, Tensor]) -> Terms:
        phase = next(phase for phase in self.method.phases if phase.name == name)
        self.freezer.only(phase.group)
        if phase.before:
            phase.before([batch], [self.carry])
        return whole(phase.loss(batch, self.carry, Progress.at(0, 1)))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def reached(terms: Tensor, module: nn.Module) -> set[str]:
    """The names of the parameters that a term's gradient reaches."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(terms, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name for name, found in zip(parameters, gradients, strict=True) if found is not None}


def write_vgg(path: Path) -> Path:
    """VGG16's convolutions with random weights under torchvision's names, in a file."""
    widths = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    generator = torch.Generator().manual_seed(4)
    tensors, number, channels_in = {}, 0, 3
    for block in widths:
        for channels in block:
            deviation = math.sqrt(2 / (9 * channels_in))
            weight = torch.randn(channels, channels_in, 3, 3, generator=generator) * deviation
            tensors[f"features.{number}.weight"] = weight
            tensors[f"features.{number}.bias"] = 0.1 * torch.randn(channels, generator=generator)
            channels_in = channels
            number += 2
        number += 1
    save_file(tensors, path)
    return path


class Scores:
    """Scores the teacher by a table of steps; the student, which chooses the run's best, never improves.

    `before` is the reader's: it tells the step.
    """

    larger_is_better = True
    selects: str | None = "student/toy/score"

    def __init__(self, teachers: dict[int, float]) -> None:
        self.teachers, self.step = teachers, 0

    def before(self, step: int) -> None:
        self.step = step + 1

    def __call__(self, generators: Any, accelerator: Any, stop: Any = None) -> Evaluation:
        teacher = self.teachers[max(step for step in self.teachers if step <= self.step)]
        return Evaluation({"student/toy/score": 1.0, "teacher/toy/score": teacher})

    def protocol(self) -> dict[str, Any]:
        return {}


def resumed(train: Callable[[Path, Callable[[int], None]], Any], folder: Path, killed: int) -> list[dict[str, Any]]:
    """The rows of a run that is killed before batch `killed` and resumed: the bytes of one that nothing disturbs.

    `train` makes the whole run in a folder; what it is given is to be called before each batch.
    """
    train(folder / "undisturbed", kill_at(-1))
    with pytest.raises(Killed):
        train(folder / "killed", kill_at(killed))
    train(folder / "killed", kill_at(-1))
    assert newest_tensors(folder / "killed") == newest_tensors(folder / "undisturbed")  # bytes
    first, second = ([row for row in rows(folder / name) if "images" in row] for name in ("killed", "undisturbed"))
    assert first == second
    return second


def resumed_blocks(make: Callable[..., Method], folder: Path, killed: int) -> list[dict[str, Any]]:
    """`resumed` of two pairs of blocks, which end at 2 | 10 | 12 | 20.

    In both of the student the teacher is another than the one that goes on, and when it is killed at 11 or 14 a better
    teacher than the checkpoint's may be on the disk.
    """

    def train(place: Path, before: Callable[[int], None]) -> None:
        scores = Scores({1: 3.0, 2: 2.0, 3: 1.0, 11: 4.0, 12: 3.5})

        def both(step: int) -> None:
            scores.before(step)
            before(step)

        method = make(schedule="blocks", blocks=2)
        run(method, ToyReader(BATCH, samples, before=both), place, 20, scores, 1, checkpoint_every=3)

    return resumed(train, folder, killed)


# --- by hand, float64 ------------------------------------------------------------------------------------------------


def l1(first: Tensor, second: Tensor) -> float:
    return float(np.abs(first.detach().numpy() - second.detach().numpy()).mean())


def adversarial(logits: Tensor, to: str, kind: str) -> float:
    """`to`: "real" and "fake" for the discriminator, "fool" for a generator."""
    x = logits.detach().double().numpy()
    values = {
        ("lsgan", "real"): (x - 1) ** 2,
        ("lsgan", "fool"): (x - 1) ** 2,
        ("lsgan", "fake"): x**2,
        ("hinge", "real"): np.maximum(0, 1 - x),
        ("hinge", "fake"): np.maximum(0, 1 + x),
        ("hinge", "fool"): -x,
    }
    return float(values[kind, to].mean())


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    """By the image's own (InstanceNorm) or the batch's statistics, or by the running ones of a BatchNorm at rest."""
    if isinstance(norm, nn.BatchNorm2d) and not norm.training:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    else:
        axes = (0, 2, 3) if isinstance(norm, nn.BatchNorm2d) else (2, 3)
        mean, variance = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
    x = (x - mean) / (variance + norm.eps).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None] if isinstance(norm, nn.BatchNorm2d) else x


@torch.no_grad()
def activation(discriminator: nn.Module, x: Tensor, layer: int) -> Tensor:
    """The layer-th LeakyReLU of a PatchGAN of two strided layers."""
    for number in range(1, layer + 1):
        convolution, *norm, _ = getattr(discriminator, f"layer{number}")
        x = nn.functional.conv2d(x, convolution.weight, convolution.bias, stride=2 if number < 3 else 1, padding=1)
        x = normalised(x, norm[0]) if norm else x
        x = torch.where(x > 0, x, 0.2 * x)
    return x


@torch.no_grad()
def logits(discriminator: nn.Module, x: Tensor) -> Tensor:
    last = discriminator.logit
    return nn.functional.conv2d(activation(discriminator, x, 3), last.weight, last.bias, padding=1)


@torch.no_grad()
def projected(projection: nn.Module, x: Tensor) -> Tensor:
    convolution, norm, _ = projection.body
    x = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], x)
    return normalised(x, norm).clamp_min(0)


def shifted(x: Tensor, number: int, step: int = 2) -> Tensor:
    """`number` channels around the middle: the first half of them down, the other up."""
    y = x.detach().clone()
    middle, half = x.shape[1] // 2, number // 2
    down, up = slice(middle - half, middle), slice(middle, middle + half)
    y[:, down] = 0
    y[:, down, step:] = x[:, down, :-step]
    y[:, up] = 0
    y[:, up, :-step] = x[:, up, step:]
    return y


def profile(images: Tensor) -> Tensor:
    """phi by a loop over the frequencies of the full, shifted spectrum; the last three channels."""
    rows = []
    for image in images.detach().double().numpy()[:, -3:]:
        gray = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        log = np.log(np.abs(np.fft.fftshift(np.fft.fft2(gray))) + 1e-8)
        rings: dict[int, list[float]] = {}
        side = len(gray)
        for i in range(side):
            for j in range(side):
                rings.setdefault(int(math.hypot(i - side // 2, j - side // 2)), []).append(float(log[i, j]))
        values = np.array([np.mean(rings[radius]) for radius in range(1, max(rings) - 1)])
        rows.append((values - values.min()) / (values.max() - values.min()))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def opinion(classifier: nn.Module, profiles: Tensor) -> Tensor:
    """SC's logits with the singular vectors as they are."""
    spectral = classifier.linear.parametrizations.weight
    weight = spectral.original
    sigma = spectral[0]._u @ weight @ spectral[0]._v if hasattr(spectral[0], "_v") else weight.norm()
    return profiles @ (weight / sigma).T + classifier.linear.bias


def area(images: Tensor, side: int) -> Tensor:
    """Means over blocks."""
    block = images.shape[2] // side
    return images.detach().unflatten(3, (side, block)).unflatten(2, (side, block)).mean((3, 5))


def pieces(images: Tensor, side: int, numbers: Tensor, part: int = 0) -> Tensor:
    """The square of each image that its sample's number says: stream 7 of the seed that `distilled` sets."""
    down, right, *_ = draw(0, 7, numbers.numpy(), part)
    room = images.shape[2] - side + 1
    places = zip(images.detach(), (down * room) >> 32, (right * room) >> 32, strict=True)
    return torch.stack([image[:, top : top + side, left : left + side] for image, top, left in places])


def gram(x: Tensor) -> Tensor:
    return torch.einsum("bchw,bdhw->bcd", x, x) / math.prod(x.shape[1:])


@torch.no_grad()
def vgg_maps(vgg: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The four maps, layer by layer."""
    x, maps, number = (image + 1) / 2, {}, 0
    for name, convolutions in (("relu1_2", 2), ("relu2_2", 2), ("relu3_3", 3), ("relu4_3", 3)):
        for _ in range(convolutions):
            layer = vgg.features[number]
            x = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1).clamp_min(0)
            number += 2
        maps[name] = x
        x = nn.functional.max_pool2d(x, 2)
        number += 1
    return maps
