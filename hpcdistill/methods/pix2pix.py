"""Pix2Pix (Isola, Zhu, Zhou, Efros, CVPR 2017): the Original of the paired tables."""

from __future__ import annotations

from collections.abc import Sequence

from hpcdistill.losses import l1
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Progress, Teachers, Terms
from hpcdistill.methods.gan_settings import A2B, FAMILIES, Pix2PixConfig
from hpcdistill.methods.translation_gan import TranslationGAN, leave


class Pix2Pix(TranslationGAN):
    """L = L_GAN + lambda_rec * |G(a) - b|; the discriminator sees the source and the image, concatenated."""

    Config = Pix2PixConfig

    def __init__(self, config: Pix2PixConfig, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, FAMILIES["pix2pix"], "generator", config.generator)
        self.add_weights(reconstruction=config.weight_reconstruction)

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        return paired_terms(self, batch, carry)


def paired_terms(
    method: TranslationGAN, batch: Batch, carry: Carry, layers: Sequence[str] = (), group: str | None = None
) -> Terms:
    """Pix2Pix's loss of `group`, the teaching one unless it is named; leaves the translation and its maps `layers`."""
    group = group or method.teaching
    fake, maps = method.call(group, A2B.name, batch[A2B.source], layers)
    leave(carry, group, fake, maps)
    terms = {"gan": method.fooling(A2B, batch, fake)} | method.image_terms(A2B, batch, fake)
    if method.uses("reconstruction"):
        terms["reconstruction"] = method.weighted("reconstruction", l1(fake, batch[A2B.target]))
    return terms
