"""CycleGAN (Zhu, Park, Isola, Efros, ICCV 2017): the Original of the unpaired tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcdistill.losses import l1
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Progress, Teachers, Terms
from hpcdistill.methods.gan_settings import FAMILIES, CycleGANConfig
from hpcdistill.methods.translation_gan import TranslationGAN, is_batch_free, leave


class CycleGAN(TranslationGAN):
    """L = L_GAN + lambda_cyc * |F(G(a)) - a| + lambda_idt * |G(b) - b| for G: a -> b, and the same for F: b -> a."""

    Config = CycleGANConfig

    def __init__(self, config: CycleGANConfig, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, FAMILIES["cyclegan"], "generator", config.generator, pool=config.pool)
        self.add_weights(cycle=config.weight_cycle, identity=config.weight_identity)

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        return cycle_terms(self, batch, carry)


def cycle_terms(method: TranslationGAN, batch: Batch, carry: Carry, layers: Sequence[str] = ()) -> Terms:
    """CycleGAN's loss of both generators.

    Leaves the translations and, of the direction a to b and back, the feature maps `layers` in `carry`.
    """
    terms: Terms = {}
    fakes: dict[str, Tensor] = {}
    group = method.teaching
    for direction in method.family.directions:
        suffix = direction.suffix
        source, target = batch[direction.source], batch[direction.target]
        if not method.uses("identity"):
            fake, maps = method.call(group, direction.name, source, layers)
            identity = None
        elif is_batch_free(method.translators):
            both, maps = method.call(group, direction.name, torch.cat([source, target]), layers)
            fake, identity = both.split(len(source))
            maps = {name: value[: len(source)] for name, value in maps.items()}
        else:
            fake, maps = method.call(group, direction.name, source, layers)
            identity, _ = method.call(group, direction.name, target)
        fakes[direction.name] = fake
        leave(carry, group + suffix, fake, maps)
        terms[f"gan{suffix}"] = method.fooling(direction, batch, fake)
        terms |= method.image_terms(direction, batch, fake)
        if identity is not None:
            terms[f"identity{suffix}"] = method.weighted("identity", l1(identity, target))
    if method.uses("cycle"):
        for direction, back in zip(method.family.directions, reversed(method.family.directions), strict=True):
            returned, _ = method.call(group, back.name, fakes[direction.name])
            terms[f"cycle{direction.suffix}"] = method.weighted("cycle", l1(returned, batch[direction.source]))
    return terms
