"""What a published trainer of a compressed CycleGAN computes in an iteration, written plainly: what `gan.py` compares.

The networks and the order of the work are those of the code that DCD (CVPR 2023) and OMGD (ICCV 2021) released, without
what crashes in it. As there: the teacher's image for the student is computed with gradients and through its
discriminator, which has no effect on the student; every discriminator pass is one of its own; the VGG16 is random here.
PyTorch's own layers and losses, in contiguous memory, nothing of hpcdistill.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE = 256  # of an image, pixels
LAYERS = (9, 12, 15, 18)  # the generator's modules whose maps are compared: before the blocks, after 3, 6 and 9
VGG = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512))  # widths of its first four stages


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_separable(width), nn.ReLU(True), nn.Dropout(0), *_separable(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


def _separable(width: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(width, width, 3, groups=width)
    norms = nn.InstanceNorm2d(width), nn.InstanceNorm2d(width)
    return [nn.ReflectionPad2d(1), depthwise, norms[0], nn.Conv2d(width, width, 1), norms[1]]


def _generator(ngf: int) -> nn.Sequential:
    def normalised(*convolution: nn.Module, width: int) -> list[nn.Module]:
        return [*convolution, nn.InstanceNorm2d(width), nn.ReLU(True)]

    def up(width: int) -> nn.Module:
        return nn.ConvTranspose2d(width, width // 2, 3, stride=2, padding=1, output_padding=1)

    return nn.Sequential(
        *normalised(nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), width=ngf),
        *normalised(nn.Conv2d(ngf, 2 * ngf, 3, stride=2, padding=1), width=2 * ngf),
        *normalised(nn.Conv2d(2 * ngf, 4 * ngf, 3, stride=2, padding=1), width=4 * ngf),
        *(Block(4 * ngf) for _ in range(9)),
        *normalised(up(4 * ngf), width=2 * ngf),
        *normalised(up(2 * ngf), width=ngf),
        nn.ReflectionPad2d(3),
        nn.Conv2d(ngf, 3, 7),
        nn.Tanh(),
    )


def _discriminator() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
    for before, after, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
        layers += [nn.Conv2d(before, after, 4, stride=stride, padding=1), nn.InstanceNorm2d(after)]
        layers.append(nn.LeakyReLU(0.2, True))
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))


def _projection(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True))


class Vgg(nn.Module):
    """The maps after relu1_2, relu2_2, relu3_3 and relu4_3."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for number, widths in enumerate(VGG):
            stage: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            for before, after in itertools.pairwise(widths):
                stage += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(True)]
            self.stages.append(nn.Sequential(*stage))
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = (image.clone() + 1) / 2, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Pool:
    """Fifty earlier images, each shown instead of a new one with probability 1/2."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def __call__(self, image: Tensor) -> Tensor:
        image = image.detach()
        if len(self.images) < 50:
            self.images.append(image)
        elif random.random() > 0.5:
            place = random.randrange(50)
            image, self.images[place] = self.images[place].clone(), image
        return image


class Reference:
    """Teacher of width 64 in both directions, two discriminators, a student of 16 from a to b; batch 1, Adam."""

    def __init__(self) -> None:
        self.forth, self.back = _generator(64), _generator(64)
        self.judge_b, self.judge_a = _discriminator(), _discriminator()
        self.student_network, self.vgg = _generator(16), Vgg()
        self.own = nn.ModuleList(_projection(64, 3) for _ in LAYERS)
        self.teachers = nn.ModuleList(_projection(256, 3) for _ in LAYERS).eval()
        self.connectors = nn.ModuleList(_projection(64, 256) for _ in LAYERS)
        self.pools = Pool(), Pool()
        self.adam_teacher = _adam(self.forth, self.back)
        self.adam_judges = _adam(self.judge_b, self.judge_a)
        self.adam_student = _adam(self.student_network, self.own, self.connectors)
        self.maps: dict[str, Tensor] = {}
        for name, network in (("teacher", self.forth), ("student", self.student_network)):
            for layer in LAYERS:
                network[layer].register_forward_hook(self._keep(f"{name}{layer}"))
        self.judge_b[10].register_forward_hook(self._keep("judge"))

    def teacher(self, a: Tensor, b: Tensor) -> None:
        """One update of both teachers, one of both discriminators."""
        fake_b, fake_a = self.forth(a), self.back(b)
        returned_a, returned_b = self.back(fake_b), self.forth(fake_a)
        self.adam_judges.zero_grad()
        self.adam_teacher.zero_grad()
        self._freeze_judges(True)
        loss = 5 * functional.l1_loss(self.forth(b), b) + 5 * functional.l1_loss(self.back(a), a)
        loss = loss + _fooled(self.judge_b(fake_b)) + _fooled(self.judge_a(fake_a))
        loss = loss + 10 * functional.l1_loss(returned_a, a) + 10 * functional.l1_loss(returned_b, b)
        loss.backward()
        self.adam_teacher.step()
        self._freeze_judges(False)
        for judge, real, fake, pool in (
            (self.judge_b, b, fake_b, self.pools[0]),
            (self.judge_a, a, fake_a, self.pools[1]),
        ):
            (0.5 * (_fooled(judge(real)) + judge(pool(fake)).square().mean())).backward()
        self.adam_judges.step()

    def student_dcd(self, a: Tensor, b: Tensor) -> None:
        """DCD: style, feature, and what the discriminator makes of the maps."""
        self.adam_student.zero_grad()
        taught, image = self.forth(a), self.student_network(a)
        loss = _fooled(self.judge_b(taught)) + self._perceptual(image, taught.detach())
        for layer, own, teachers in zip(LAYERS, self.own, self.teachers, strict=True):
            theirs = teachers(self.maps[f"teacher{layer}"].detach())
            self.judge_b(own(self.maps[f"student{layer}"]))
            seen = self.maps["judge"]
            self.judge_b(theirs)
            loss = loss + functional.l1_loss(self.maps["judge"], seen)
        loss.backward()
        self.adam_student.step()

    def student_omgd(self, a: Tensor, b: Tensor) -> None:
        """OMGD: structural similarity, style, feature, total variation, and the maps' means by channel."""
        self.adam_student.zero_grad()
        taught, image = self.forth(a), self.student_network(a)
        target = taught.detach()
        loss = self._perceptual(image, target) + 10 * (1 - _similarity(image, target))
        loss = loss + 1e-5 * (image.diff(dim=2).abs().sum() + image.diff(dim=3).abs().sum())
        for layer, connector in zip(LAYERS, self.connectors, strict=True):
            means = connector(self.maps[f"student{layer}"]).mean((2, 3))
            loss = loss + 500 * (means - self.maps[f"teacher{layer}"].detach().mean((2, 3))).square().mean()
        loss.backward()
        self.adam_student.step()

    def iteration(self, a: Tensor, b: Tensor) -> None:
        """An update of the teacher and one of DCD's student."""
        self.teacher(a, b)
        self.student_dcd(a, b)

    def _perceptual(self, image: Tensor, target: Tensor) -> Tensor:
        theirs, maps = self.vgg(target), self.vgg(image)
        loss = 10 * functional.l1_loss(maps[1], theirs[1])
        grams = ((functional.l1_loss(_gram(x), _gram(y))) for x, y in zip(maps, theirs, strict=True))
        return loss + 1e4 * torch.stack(list(grams)).sum()

    def _freeze_judges(self, frozen: bool) -> None:
        for judge in (self.judge_b, self.judge_a):
            judge.requires_grad_(not frozen)

    def _keep(self, name: str) -> Callable[[nn.Module, Sequence[Tensor], Tensor], None]:
        def hook(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
            self.maps[name] = output

        return hook


def _adam(*modules: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(itertools.chain(*(m.parameters() for m in modules)), lr=2e-4, betas=(0.5, 0.999))


def _fooled(logits: Tensor) -> Tensor:
    return (logits - 1).square().mean()


def _gram(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return flat.bmm(flat.transpose(1, 2)) / (x.shape[1] * x.shape[2] * x.shape[3])


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM with an 11x11 Gaussian window, one 2-D convolution for each of five maps."""
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None].expand(3, 1, 11, 11) / line.sum() ** 2

    def smooth(z: Tensor) -> Tensor:
        return functional.conv2d(z, window, padding=5, groups=3)

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    similar = ((2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)) / (
        (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
    )
    return similar.mean()
