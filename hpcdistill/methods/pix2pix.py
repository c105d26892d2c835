"""Pix2Pix (Isola, Zhu, Zhou, Efros, CVPR 2017): the Original of the paired tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from hpcdistill.data.index import Kind
from hpcdistill.losses.supervision import l1
from hpcdistill.methods.base import Batch, Carry, Terms
from hpcdistill.methods.gan_settings import A2B, FAMILIES, GANConfig, GeneratorSettings
from hpcdistill.methods.translation_gan import TranslationGAN, leave
from hpcdistill.settings import LARGEST_WEIGHT


class Pix2Pix(TranslationGAN):
    """L = L_GAN + lambda_rec * |G(a) - b|; the discriminator sees the source and the image, concatenated."""

    class Config(GANConfig):
        name: Literal["pix2pix"] = "pix2pix"
        generator: GeneratorSettings = GeneratorSettings()
        weight_reconstruction: float = Field(
            100.0, ge=0, le=LARGEST_WEIGHT, description="lambda_rec, weight of the L1 to the target"
        )

    version: ClassVar[int] = 1

    @classmethod
    def kind(cls, config: Config) -> Kind:
        return "paired"

    def __init__(self, config: Config, frozen: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(config, FAMILIES["pix2pix"], "generator", config.generator)
        self.config = config
        self.add_weights(reconstruction=config.weight_reconstruction)

    def generator_loss(self, batch: Batch, carry: Carry) -> Terms:
        return paired_terms(self, batch, carry)


def paired_terms(method: TranslationGAN, batch: Batch, carry: Carry, layers: Sequence[str] = ()) -> Terms:
    """Pix2Pix's loss; leaves the translation and its feature maps `layers` in `carry`."""
    fake, maps = method.call(method.teaching, A2B.name, batch[A2B.source], layers)
    leave(carry, method.teaching, fake, maps)
    terms = {"gan": method.fooling(A2B, batch, fake)}
    if method.uses("reconstruction"):
        terms["reconstruction"] = method.weighted("reconstruction", l1(fake, batch[A2B.target]))
    return terms
