"""CycleGAN (Zhu, Park, Isola, Efros, ICCV 2017): the Original of the unpaired tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hpcdistill.data.index import Kind
from hpcdistill.losses.supervision import l1
from hpcdistill.methods.base import Batch, Carry, Terms
from hpcdistill.methods.gan_settings import FAMILIES, MOST_REMEMBERED, GANConfig, GeneratorSettings
from hpcdistill.methods.translation_gan import TranslationGAN, is_batch_free, leave
from hpcdistill.settings import LARGEST_WEIGHT


class CycleGAN(TranslationGAN):
    """L = L_GAN + lambda_cyc * |F(G(a)) - a| + lambda_idt * |G(b) - b| for G: a -> b, and the same for F: b -> a."""

    class Config(GANConfig):
        name: Literal["cyclegan"] = "cyclegan"
        generator: GeneratorSettings = GeneratorSettings()
        pool: int = Field(
            50, ge=0, le=MOST_REMEMBERED, description="generated images of each domain that its discriminator remembers"
        )
        weight_cycle: float = Field(10.0, ge=0, le=LARGEST_WEIGHT, description="lambda_cyc, weight of the cycle's L1")
        weight_identity: float = Field(
            5.0, ge=0, le=LARGEST_WEIGHT, description="lambda_idt, weight of the identity's L1"
        )

    version: ClassVar[int] = 1

    @classmethod
    def kind(cls, config: Config) -> Kind:
        return "unpaired"

    def __init__(self, config: Config, frozen: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(config, FAMILIES["cyclegan"], "generator", config.generator, pool=config.pool)
        self.config = config
        self.add_weights(cycle=config.weight_cycle, identity=config.weight_identity)

    def generator_loss(self, batch: Batch, carry: Carry) -> Terms:
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
        if identity is not None:
            terms[f"identity{suffix}"] = method.weighted("identity", l1(identity, target))
    if method.uses("cycle"):
        for direction, back in zip(method.family.directions, reversed(method.family.directions), strict=True):
            returned, _ = method.call(group, back.name, fakes[direction.name])
            terms[f"cycle{direction.suffix}"] = method.weighted("cycle", l1(returned, batch[direction.source]))
    return terms
