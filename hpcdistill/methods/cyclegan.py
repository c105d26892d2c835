"""CycleGAN (Zhu, Park, Isola, Efros, ICCV 2017): the Original of the unpaired tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hpcdistill.losses import l1
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Part, Progress, Teachers, Terms
from hpcdistill.methods.gan_settings import A2B, FAMILIES, CycleGANConfig, Direction
from hpcdistill.methods.translation_gan import TranslationGAN, is_batch_free, leave
from hpcdistill.ops.cpu_forms import applies


class CycleGAN(TranslationGAN):
    """L = L_GAN + lambda_cyc * |F(G(a)) - a| + lambda_idt * |G(b) - b| for G: a -> b, and the same for F: b -> a."""

    Config = CycleGANConfig

    def __init__(self, config: CycleGANConfig, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, FAMILIES["cyclegan"], "generator", config.generator, pool=config.pool)
        self.add_weights(cycle=config.weight_cycle, identity=config.weight_identity)

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms | Sequence[Part]:
        return cycle_terms(self, batch, carry)


def cycle_terms(
    method: TranslationGAN, batch: Batch, carry: Carry, layers: Sequence[str] = ()
) -> Terms | Sequence[Part]:
    """CycleGAN's loss of both generators.

    Leaves the translations and, of the direction a to b and back, the feature maps `layers` in `carry`.

    In parts: each identity, then each translation with its way back. All at once where a part would reach one
    generator only, or where a BatchNorm's statistics depend on the order of the passes.
    """
    directions = method.family.directions
    batch_free = is_batch_free(method.translators)
    beside = batch_free and not applies(batch[A2B.source])  # on a CPU two passes are faster than a batch of both
    if not (batch_free and method.uses("cycle")):
        return _at_once(method, batch, carry, layers, beside)
    parts: list[Part] = []
    for direction, back in zip(directions, reversed(directions), strict=True):
        if method.uses("identity") and not beside:
            parts.append(partial(_identity, method, direction, batch))
        parts.append(partial(_there_and_back, method, direction, back, batch, carry, layers, beside))
    return parts


def _at_once(method: TranslationGAN, batch: Batch, carry: Carry, layers: Sequence[str], beside: bool) -> Terms:
    terms: Terms = {}
    fakes: dict[str, Tensor] = {}
    directions = method.family.directions
    for direction in directions:
        fakes[direction.name], found = _translated(method, direction, batch, carry, layers, beside)
        terms |= found
        if method.uses("identity") and not beside:
            terms |= _identity(method, direction, batch)
    for direction, back in zip(directions, reversed(directions), strict=True):
        terms |= _cycle(method, direction, back, batch, fakes[direction.name])
    return terms


def _there_and_back(
    method: TranslationGAN,
    direction: Direction,
    back: Direction,
    batch: Batch,
    carry: Carry,
    layers: Sequence[str],
    beside: bool,
) -> Terms:
    fake, terms = _translated(method, direction, batch, carry, layers, beside)
    return terms | _cycle(method, direction, back, batch, fake)


def _translated(
    method: TranslationGAN, direction: Direction, batch: Batch, carry: Carry, layers: Sequence[str], beside: bool
) -> tuple[Tensor, Terms]:
    """The translation and the terms of its image; `beside`: with the identity's, as one batch."""
    group, suffix = method.teaching, direction.suffix
    source, target = batch[direction.source], batch[direction.target]
    identity: Terms = {}
    if beside and method.uses("identity"):
        both, maps = method.call(group, direction.name, torch.cat([source, target]), layers)
        fake, same = both.split(len(source))
        maps = {name: value[: len(source)] for name, value in maps.items()}
        identity = {f"identity{suffix}": method.weighted("identity", l1(same, target))}
    else:
        fake, maps = method.call(group, direction.name, source, layers)
    leave(carry, group + suffix, fake, maps)
    adversarial = {f"gan{suffix}": method.fooling(direction, batch, fake)}
    return fake, adversarial | method.image_terms(direction, batch, fake) | identity


def _identity(method: TranslationGAN, direction: Direction, batch: Batch) -> Terms:
    target = batch[direction.target]
    same, _ = method.call(method.teaching, direction.name, target)
    return {f"identity{direction.suffix}": method.weighted("identity", l1(same, target))}


def _cycle(method: TranslationGAN, direction: Direction, back: Direction, batch: Batch, fake: Tensor) -> Terms:
    if not method.uses("cycle"):
        return {}
    returned, _ = method.call(method.teaching, back.name, fake)
    return {f"cycle{direction.suffix}": method.weighted("cycle", l1(returned, batch[direction.source]))}
