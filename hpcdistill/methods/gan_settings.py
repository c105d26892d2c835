"""The configuration sections that the GAN methods share, and what the two families differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpcdistill.data.index import Kind
from hpcdistill.methods.settings import LARGEST_RATE, Beta, MethodConfig, OptimizerSettings
from hpcdistill.models import IMAGE_GENERATORS, GeneratorName
from hpcdistill.settings import LARGEST_WEIGHT, MOST_PIXELS, Section

MOST_CHANNELS = 4096  # of a base width
MOST_REMEMBERED = 100_000  # generated images in a pool

Width = Annotated[int, Field(gt=0, le=MOST_CHANNELS)]
Adversarial = Literal["lsgan", "hinge", "vanilla"]  # `losses.ADVERSARIAL`, named here without importing torch


@dataclass(frozen=True)
class Direction:
    """A translation of images of the domain `source` into `target`, both keys of a batch."""

    name: str
    source: str
    target: str
    suffix: str  # of its terms' and its generators' names


A2B = Direction("a2b", "a", "b", "")
B2A = Direction("b2a", "b", "a", "_b2a")


@dataclass(frozen=True)
class Family:
    """What CycleGAN and Pix2Pix differ in."""

    kind: Kind
    directions: tuple[Direction, ...]
    network: str  # the generator, unless the configuration names another
    gan: Adversarial
    ndf: int
    pool: int  # generated images the discriminator remembers, per domain
    conditional: bool  # the discriminator sees the source beside the image


FAMILIES: dict[str, Family] = {
    "cyclegan": Family("unpaired", (A2B, B2A), "resnet", "lsgan", ndf=64, pool=50, conditional=False),
    "pix2pix": Family("paired", (A2B,), "unet", "hinge", ndf=128, pool=0, conditional=True),
}


class GANOptimizer(OptimizerSettings):
    """Adam as the GAN papers use it: constant for half of the run, then a straight line to zero."""

    learning_rate: float = Field(
        2e-4, gt=0, le=LARGEST_RATE, description="Adam's step size at the start of the schedule"
    )
    final_learning_rate: float = Field(0.0, ge=0, le=LARGEST_RATE, description="the schedule's last value")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "linear", description="by step: constant; half a cosine; constant, then a straight line (see decay_from)"
    )
    betas: tuple[Beta, Beta] = Field((0.5, 0.999), description="Adam's decay rates of the first and second moment")


class GeneratorSettings(Section):
    """A generator's architecture. The defaults are the Original's."""

    network: GeneratorName | None = Field(None, description="unset = the family's own: cyclegan resnet, pix2pix unet")
    ngf: int = Field(64, gt=0, le=MOST_CHANNELS, description="base width, channels")
    separable: bool = Field(False, description="resnet: depthwise-separable blocks instead of dense ones")
    blocks: int = Field(9, gt=0, le=1000, description="resnet: residual blocks")
    levels: int = Field(8, gt=0, le=16, description="unet: down-convolutions; the crop is a multiple of 2^levels")
    widths: tuple[Width, ...] | None = Field(
        None,
        min_length=5,
        max_length=5,
        description="resnet: channels of stem, down1, down2, up1, up2, as a compressed generator has; unset = by ngf",
    )
    inner: tuple[Width, ...] | None = Field(
        None, min_length=1, description="resnet: channels inside each block; unset = as outside"
    )

    def arguments(self, family: Family) -> tuple[str, dict[str, Any]]:
        """The network's name and the arguments it is built with: those of these settings that it has."""
        network = self.network or family.network
        return network, {name: getattr(self, name) for name in IMAGE_GENERATORS[network].SETTINGS}


class TeacherSettings(GeneratorSettings):
    """The default teacher: the separable generator of base width 64."""

    separable: bool = Field(True, description="resnet: depthwise-separable blocks instead of dense ones")


class StudentSettings(TeacherSettings):
    """The default student: the separable generator of base width 16."""

    ngf: int = Field(16, gt=0, le=MOST_CHANNELS, description="base width, channels")


class GANConfig(MethodConfig):
    """What every GAN method's configuration has."""

    crop: int = Field(
        256, gt=0, le=MOST_PIXELS, description="side of the training images, pixels; the same as data.crop"
    )
    gan: Adversarial | None = Field(
        None, description="form of the adversarial loss; unset = the family's own: cyclegan lsgan, pix2pix hinge"
    )
    ndf: int | None = Field(
        None,
        gt=0,
        le=MOST_CHANNELS,
        description="base width of the discriminator; unset = the family's own: cyclegan 64, pix2pix 128",
    )
    discriminator_strides: int = Field(
        3, gt=0, le=16, description="strided layers of the discriminator: 3 for 70x70 patches; fewer for small images"
    )
    optimizer: GANOptimizer = GANOptimizer()


class CycleGANConfig(GANConfig):
    """Defaults are CycleGAN's."""

    METHOD: ClassVar[str] = "hpcdistill.methods.cyclegan:CycleGAN"
    GENERATORS: ClassVar[tuple[str, ...]] = ("generator",)

    name: Literal["cyclegan"] = "cyclegan"
    generator: GeneratorSettings = GeneratorSettings()
    pool: int = Field(
        50, ge=0, le=MOST_REMEMBERED, description="generated images of each domain that its discriminator remembers"
    )
    weight_cycle: float = Field(10.0, ge=0, le=LARGEST_WEIGHT, description="lambda_cyc, weight of the cycle's L1")
    weight_identity: float = Field(5.0, ge=0, le=LARGEST_WEIGHT, description="lambda_idt, weight of the identity's L1")

    def kind(self) -> Kind:
        return "unpaired"


class Pix2PixConfig(GANConfig):
    """Defaults are Pix2Pix's."""

    METHOD: ClassVar[str] = "hpcdistill.methods.pix2pix:Pix2Pix"
    GENERATORS: ClassVar[tuple[str, ...]] = ("generator",)

    name: Literal["pix2pix"] = "pix2pix"
    generator: GeneratorSettings = GeneratorSettings()
    weight_reconstruction: float = Field(
        100.0, ge=0, le=LARGEST_WEIGHT, description="lambda_rec, weight of the L1 to the target"
    )

    def kind(self) -> Kind:
        return "paired"
