"""What the GAN methods have in common: generators and discriminators by direction, and the discriminators' phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpcdistill.data.counter import PIECES, below, draw
from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError
from hpcdistill.losses import discriminator_loss, generator_loss
from hpcdistill.methods.base import Batch, Carry, Group, Part, Phase, Progress, Terms
from hpcdistill.methods.gan_settings import A2B, B2A, Direction, Family, GANConfig, GeneratorSettings
from hpcdistill.methods.replay_pool import ReplayPool
from hpcdistill.methods.weighted_terms import WeightedTerms
from hpcdistill.models.discriminator import PatchDiscriminator, SpectralClassifier
from hpcdistill.models.image_generator import ImageGenerator, build_generator
from hpcdistill.ops.crops import cut
from hpcdistill.ops.radial_spectrum import radial_spectrum, ring_count
from hpcdistill.ops.repeatable import resize

Maps = dict[str, Tensor]


class Translators(nn.Module):
    """The generators of one group by direction, behind one forward (one DDP wrapper)."""

    def __init__(self, generators: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.by_direction = nn.ModuleDict(dict(generators))

    def forward(self, direction: str, image: Tensor, maps: Sequence[str] = ()) -> tuple[Tensor, Maps]:
        """The translation of `image` [B, 3, H, W] in [-1, 1], and the feature maps named `maps`."""
        output = self.by_direction[direction](image, maps=tuple(maps)) if maps else self.by_direction[direction](image)
        return output if maps else (output, {})


class Judges(nn.Module):
    """The discriminators, and the spectral classifiers where there are any, by direction, behind one forward."""

    def __init__(self, discriminators: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleDict(dict(discriminators))
        self.classifiers = nn.ModuleDict()

    def forward(self, direction: str, x: Tensor, spectrum: bool = False) -> Tensor:
        """Logits of D's input `x` [B, 3 or 6, H, W] or, with `spectrum`, of the profiles `x` [B, rings]."""
        judges = self.classifiers if spectrum else self.discriminators
        logits: Tensor = judges[direction](x)
        return logits

    def activations(self, direction: str, x: Tensor, layer: int | None) -> Tensor:
        """The discriminator's activation of that number, None = the last."""
        discriminator = self.discriminators[direction]
        assert isinstance(discriminator, PatchDiscriminator)
        return discriminator.activations(x, layer)


class TranslationGAN(WeightedTerms):
    """Generators and discriminators of a family, the adversarial terms and the discriminators' phase.

    `teaching` names the group of the generators of full size: "generator" alone, "teacher" beside a student. What a
    phase leaves to the next is `<group><suffix>`, an image, with the direction's suffix.
    """

    real_share = 1.0  # of the real images in the discriminators' loss, as `shown` has the generated ones'

    def __init__(
        self,
        config: GANConfig,
        family: Family,
        teaching: str,
        settings: GeneratorSettings,
        *,
        pool: int | None = None,
    ) -> None:
        super().__init__(config)
        self.family = family
        self.teaching = teaching
        self.gan = config.gan or family.gan
        self.crop = config.crop
        self.mix_spectral = False
        self.spectrum: Literal["shrunk", "crop", "maps"] = "shrunk"
        self.spectrum_side = 0
        self._pieces_seed = torch.initial_seed()  # the run's, as the pools'
        self.translators = self.built_generators(settings, family.directions)
        generator = self.translators.by_direction[A2B.name]
        assert isinstance(generator, ImageGenerator)
        discriminators = {
            direction.name: PatchDiscriminator(
                channels_in=6 if family.conditional else 3,
                ndf=config.ndf or family.ndf,
                norm=generator.NORM if family.conditional else "instance",
                layers=config.discriminator_strides,
            )
            for direction in family.directions
        }
        for discriminator in discriminators.values():
            discriminator.check_size(config.crop, config.crop)
        self.judges = Judges(discriminators)
        self.groups = {
            teaching: Group(self.translators, config.optimizer),
            "discriminator": Group(self.judges, config.optimizer),
        }
        self.generators = self.named(teaching, self.translators)
        self.saved = {
            f"discriminator{direction.suffix}": discriminators[direction.name] for direction in family.directions
        }
        self.pool_size = family.pool if pool is None else pool
        self.add_pools(teaching, family.directions)

    # --- building --------------------------------------------------------------------------------------------------

    def built_generators(self, settings: GeneratorSettings, directions: Sequence[Direction]) -> Translators:
        """New generators; UserError when the crop does not fit them."""
        name, arguments = settings.arguments(self.family)
        generators = {direction.name: build_generator(name, **arguments) for direction in directions}
        for generator in generators.values():
            generator.check_size(self.crop, self.crop)
        return Translators(generators)

    def named(self, role: str, translators: Translators) -> dict[str, nn.Module]:
        """The generators as they are evaluated and saved: the role itself translates a to b."""
        return {
            role + direction.suffix: translators.by_direction[direction.name]
            for direction in self.family.directions
            if direction.name in translators.by_direction
        }

    def add_pools(self, role: str, directions: Sequence[Direction]) -> None:
        """Pools of the images that the discriminators are shown; saved with every checkpoint.

        They decide by the seed that the method's weights are drawn from: the run's, the same on every rank. Nothing
        is drawn for it, so that the weights do not depend on the pools.
        """
        if self.pool_size:
            for direction in directions:
                part = sum(isinstance(module, ReplayPool) for module in self.memory.values())
                seed = torch.initial_seed()
                pool = ReplayPool(self.pool_size, height=self.crop, width=self.crop, seed=seed, part=part)
                self.memory[f"pool_{role}{direction.suffix}"] = pool
                self.add_module(f"pool_{role}{direction.suffix}", pool)

    def add_classifiers(
        self,
        directions: Sequence[Direction],
        side: int,
        mix: bool,
        spectrum: Literal["shrunk", "crop", "maps"] = "shrunk",
    ) -> None:
        """A spectral classifier for each direction, of what has `side` x `side` pixels.

        `spectrum`: the target images, shrunk to that size; a piece of it of each; or maps, whose profiles the
        student's phase leaves (`spectra_name`). `mix`: the adversarial loss sees it beside the discriminator.
        UserError for a `side` without a spectrum.
        """
        assert not (mix and spectrum == "maps")
        self.spectrum_side, self.mix_spectral, self.spectrum = side, mix, spectrum
        try:
            rings = ring_count(side, side)
        except ValueError as error:
            raise UserError(
                f"method.crop: of {self.crop}x{self.crop} images the spectral classifier sees {side}x{side} pixels, "
                f"too few: {error}; use a larger data.crop, or weight_spectral=0 and mix_spectral=false"
            ) from None
        for direction in directions:
            self.judges.classifiers[direction.name] = SpectralClassifier(rings)

    # --- the contract ----------------------------------------------------------------------------------------------

    @property
    def needs(self) -> Needs:
        return Needs(self.family.kind)

    def prepare(self, crop: int) -> None:
        """UserError when the data's crops have another side than the method was built for."""
        super().prepare(crop)
        check_crop(self.crop, crop)

    @property
    def measured(self) -> dict[str, nn.Module]:
        both = {name: network for name, network in self.generators.items() if not name.endswith(B2A.suffix)}
        return {**both, "discriminator": self.judges.discriminators[A2B.name]}

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(self.teaching, self.teaching, self.generator_loss),
            Phase("discriminator", "discriminator", self.discriminator_loss, self.query_pools),
        )

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms | Sequence[Part]:
        """The terms of the generators of full size; leaves their translations in `carry`."""
        raise NotImplementedError

    # --- what the terms are made of --------------------------------------------------------------------------------

    def judged(self, direction: Direction, batch: Batch, image: Tensor) -> Tensor:
        """The discriminator's input for `image` of the direction's target."""
        return torch.cat([batch[direction.source], image], dim=1) if self.family.conditional else image

    def profile(self, direction: Direction, images: Tensor, numbers: Tensor) -> Tensor:
        """The radial spectra [B, rings] of target images as the classifier sees them, in the size of the feature maps.

        `numbers` [B] are those of their samples. They say where a piece is cut, so that it does not depend on ranks,
        micro-batches and resuming; the images of one sample, real and generated, are compared in one place.
        """
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        side = self.spectrum_side
        if self.spectrum == "crop":
            down, right, *_ = draw(self._pieces_seed, PIECES, numbers, self.family.directions.index(direction))
            height, width = images.shape[2:]
            return radial_spectrum(cut(images, side, below(down, height - side + 1), below(right, width - side + 1)))
        return radial_spectrum(resize(images, side, side, "area"))

    def fooling(self, direction: Direction, batch: Batch, image: Tensor) -> Tensor:
        """The adversarial loss of a generator whose image the frozen judges see."""
        logits = self.judges(direction.name, self.judged(direction, batch, image))
        if self.mix_spectral and direction.name in self.judges.classifiers:
            profiles = self.profile(direction, image, batch["number"])
            logits = mixed(logits, self.judges(direction.name, profiles, spectrum=True))
        return generator_loss(logits, self.gan)

    def image_terms(self, direction: Direction, batch: Batch, image: Tensor) -> Terms:
        """A method's own terms of a translation `image`, beside its family's; as a rule none."""
        return {}

    def shown(self, carry: Carry, direction: Direction) -> dict[str, Tensor | float]:
        """Whose images the discriminator of a direction is shown as generated, and their shares of its loss."""
        return {self.teaching: 1.0}

    def query_pools(self, batches: Sequence[Batch], carries: Sequence[Carry]) -> None:
        """Put what the pools hand back in the place of the generated images in `carries`.

        A whole step at once: in the order of its samples, however it is cut into ranks and micro-batches.
        """
        for direction in self.family.directions:
            for role in self.shown(carries[0], direction):
                name = role + direction.suffix
                pool = self.memory.get(f"pool_{name}")
                if isinstance(pool, ReplayPool):
                    images = torch.cat([carry[name] for carry in carries])
                    images = pool.query(images, torch.cat([batch["number"] for batch in batches]))
                    for carry, piece in zip(carries, images.chunk(len(carries)), strict=True):
                        carry[name] = piece

    def discriminator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """0.5 (real + generated) for every discriminator and spectral classifier, on images from the pools."""
        terms: Terms = {}
        for direction in self.family.directions:
            name, suffix = direction.name, direction.suffix
            shares = self.shown(carry, direction)
            images = [batch[direction.target]]
            images += [carry[role + suffix] for role in shares]
            # "fake", and "fake_student" where the student's images are shown too.
            titles = ["real", *("fake" if role == self.teaching else f"fake_{role}" for role in shares)]
            halves = [0.5 * self.real_share, *(0.5 * share for share in shares.values())]

            def judge(x: Tensor, name: str = name) -> Tensor:
                logits: Tensor = self.call("discriminator", name, x)
                return logits

            exact = is_batch_free(self.judges.discriminators[name])
            logits = one_batch(judge, [self.judged(direction, batch, image) for image in images], exact)
            if name in self.judges.classifiers:
                found, opinions = self._classifier_terms(direction, batch, carry, images, titles, halves)
                terms |= found
                if self.mix_spectral:  # the classifier learns from its own loss alone
                    logits = [mixed(x, opinion.detach()) for x, opinion in zip(logits, opinions, strict=True)]
            for title, half, verdict in zip(titles, halves, logits, strict=True):
                terms[title + suffix] = half * discriminator_loss(verdict, title == "real", self.gan)
        return terms

    def _classifier_terms(
        self,
        direction: Direction,
        batch: Batch,
        carry: Carry,
        images: Sequence[Tensor],
        titles: Sequence[str],
        halves: Sequence[Tensor | float],
    ) -> tuple[Terms, Sequence[Tensor]]:
        """The spectral classifier's own loss, and its logits [B, 1] of each of `images`, or of maps."""
        if self.spectrum == "maps":
            titles, halves = ("real", "fake_student"), (0.5, 0.5)
            seen = [carry[spectra_name(role, direction)] for role in (self.teaching, "student")]
            profiles = torch.cat(seen)
        else:
            profiles = self.profile(direction, torch.cat(list(images)), batch["number"].repeat(len(images)))
        # One pass whatever is seen: each moves the vectors of the spectral norm.
        opinions = self.call("discriminator", direction.name, profiles, spectrum=True).chunk(len(titles))
        terms: Terms = {}
        for title, half, opinion in zip(titles, halves, opinions, strict=True):
            loss = discriminator_loss(opinion, title == "real", self.gan)
            terms[f"spectral_{title}{direction.suffix}"] = half * loss
        return terms, opinions


def check_crop(built_for: int, crop: int) -> None:
    """UserError when the data's crops have another side than a method was built for."""
    if crop != built_for:
        raise UserError(
            f"method.crop: is {built_for}, data.crop is {crop}; set both alike (method.crop: ${{data.crop}})"
        )


def spectra_name(role: str, direction: Direction) -> str:
    """Under which name the profiles [B x layers, rings] of a generator's projected maps are in the carry."""
    return f"{role}{direction.suffix}.spectra"


def mixed(logits: Tensor, opinions: Tensor) -> Tensor:
    """Half the discriminator's logits [B, 1, h, w], half the spectral classifier's [B, 1] (SSD-GAN); in float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return 0.5 * logits.to(dtype) + 0.5 * opinions.to(dtype)[:, :, None, None]


def is_batch_free(module: nn.Module) -> bool:
    """Whether an image's output does not depend on what else is in its batch."""
    return not any(isinstance(part, _BatchNorm) for part in module.modules())


def one_batch(run: Callable[[Tensor], Any], inputs: Sequence[Tensor], exact: bool) -> list[Tensor]:
    """`run` of each input [B, ...]: as one batch where that is `exact`, else one after the other."""
    if not exact or len(inputs) == 1:
        return [run(x) for x in inputs]
    return list(run(torch.cat(list(inputs))).split(len(inputs[0])))


def leave(carry: Carry, name: str, image: Tensor, maps: Maps) -> None:
    """Leave an image under `name` and its maps under `name.<map>` to the next phases, without gradients."""
    carry[name] = image.detach()
    for key, value in maps.items():
        carry[f"{name}.{key}"] = value.detach()
