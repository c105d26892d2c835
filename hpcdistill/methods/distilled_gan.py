"""A small generator learns from a large one while both are trained: FESD, DCD (BL) and BL + PCS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpcdistill import losses
from hpcdistill.console import warn
from hpcdistill.errors import UserError
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Group, Progress, Teachers, Terms
from hpcdistill.methods.compared_maps import ComparedMaps, check_maps
from hpcdistill.methods.distillation_settings import DistilledGANConfig
from hpcdistill.methods.gan_settings import A2B, Direction
from hpcdistill.methods.student_gan import STUDENT, StudentGAN
from hpcdistill.methods.translation_gan import Maps, Translators, is_batch_free, one_batch, spectra_name
from hpcdistill.models.discriminator import PatchDiscriminator
from hpcdistill.models.image_generator import ImageGenerator
from hpcdistill.ops.radial_spectrum import radial_spectrum

JUDGES = "discriminator"


class StudentOutput(NamedTuple):
    image: Tensor  # [B, 3, H, W] in [-1, 1]
    own: Maps  # f^S of its maps by layer, [B, 3 or 6, h, w] each; empty without distillation
    teachers: Maps  # f^T of the teacher's, where it trains with the student


class Student(nn.Module):
    """The student's generators and the projections that train with them, behind one forward (one DDP wrapper)."""

    def __init__(
        self, translators: Translators, own: Mapping[str, ComparedMaps], teachers: Mapping[str, ComparedMaps]
    ) -> None:
        """`own` and `teachers`: f^S and a trained (or shared) f^T by direction; empty where there is none."""
        super().__init__()
        self.translators = translators
        self.own = nn.ModuleDict(dict(own))
        self.teachers = nn.ModuleDict(dict(teachers))

    def forward(self, direction: str, image: Tensor, layers: Sequence[str], teachers_maps: Maps) -> StudentOutput:
        """The translation, and the projected maps of the student and of the teacher."""
        translated, maps = self.translators(direction, image, layers)
        own = self.own[direction](maps) if direction in self.own else {}
        teachers = self.teachers[direction](teachers_maps) if direction in self.teachers else {}
        return StudentOutput(translated, own, teachers)


class DistilledGAN(StudentGAN):
    """Equation 14: L_GAN + L_sty + L_feat + L_dcd + L_spectral, each with its weight.

    In an iteration the teacher learns as an Original does, then the student, then the discriminators and spectral
    classifiers, which see the images of both. The teacher's images and maps are computed once, before its update.

    The generated half of D's loss is the average of the teacher's with weight 1 and the student's with weight
    lambda_stu, the weights divided by their sum: with lambda_stu = 0 the teacher's GAN is the Original's.
    """

    Config = DistilledGANConfig
    weight_student: Tensor

    def __init__(self, config: DistilledGANConfig, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config)
        self.student_directions = self.family.directions if config.direction == "both" else (A2B,)
        self.add_weights(student=config.weight_student, dcd=config.weight_dcd, spectral=config.weight_spectral)
        students = self.built_generators(config.student, self.student_directions)
        self.compares = self.uses("dcd", "spectral")
        self.layers, self.side = self._chosen_layers(students)
        own: dict[str, ComparedMaps] = {}
        trained: dict[str, ComparedMaps] = {}
        fixed: dict[str, ComparedMaps] = {}
        for direction in self.student_directions if self.compares else ():
            own[direction.name] = self._projections(students, direction)
            if config.projection == "shared":
                trained[direction.name] = own[direction.name]
            else:
                kept = fixed if config.projection == "frozen" else trained
                kept[direction.name] = self._projections(self.translators, direction)
        self.student = Student(students, own, trained)
        # In no group: never trained, always in eval mode.
        self.fixed_projections = nn.ModuleDict(fixed).requires_grad_(False).eval()
        if fixed:
            self.memory["projections"] = self.fixed_projections
        if self.uses("spectral") or config.mix_spectral:
            self.add_classifiers(self.student_directions, self.side, config.mix_spectral, config.spectrum)
        self.groups = {
            name: Group(module, config.optimizer, course="own")
            for name, module in ((self.teaching, self.translators), (STUDENT, self.student), (JUDGES, self.judges))
        }
        self.generators = {**self.named(STUDENT, students), **self.generators}
        if self.uses("student"):
            self.add_pools(STUDENT, self.student_directions)

    def prepare(self, crop: int) -> None:
        """UserError when the data does not fit or VGG16's weights are not to be had."""
        super().prepare(crop)
        if self.compares and self.config.projection != "frozen":
            warn(f"method.projection is {self.config.projection}: watch student/dcd, it can fall to zero by collapse")

    # --- the phases ------------------------------------------------------------------------------------------------

    def student_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """Equations 8 to 13 for the student."""
        terms: Terms = {}
        for direction in self.student_directions:
            image, maps = self.taught(direction, batch, carry)
            output = self.call(STUDENT, direction.name, batch[direction.source], self.layers, maps)
            carry[STUDENT + direction.suffix] = output.image.detach()
            found: Terms = {}
            if self.uses("student"):
                found["gan"] = self.weighted("student", self.fooling(direction, batch, output.image))
            found |= self.perceptual_terms(output.image, {"": image})
            if self.compares:
                found |= self._comparison_terms(direction, output, maps, carry)
            terms |= {name + direction.suffix: term for name, term in found.items()}
        assert terms, "checked when the method was built"
        return terms

    def shown(self, carry: Carry, direction: Direction) -> dict[str, Tensor | float]:
        """The teacher's image and, where it was translated and lambda_stu > 0, the student's: a weighted average."""
        if not self.uses("student") or STUDENT + direction.suffix not in carry:
            return {self.teaching: 1.0}
        weight = self.weight_student
        return {self.teaching: 1 / (1 + weight), STUDENT: weight / (1 + weight)}

    def _comparison_terms(self, direction: Direction, output: StudentOutput, maps: Maps, carry: Carry) -> Terms:
        """L_dcd and L_spectral: what the frozen judges make of the projected maps.

        Leaves the maps' spectra to the classifier's own loss, where it learns from them.
        """
        seen = [output.own, output.teachers]
        if self.config.projection == "frozen":
            with torch.no_grad():
                seen[1] = self.fixed_projections[direction.name](maps)
        terms: Terms = {}
        if self.uses("dcd"):
            batch_free, distances = is_batch_free(self.judges.discriminators), []
            for layer in self.config.discriminator_layers:
                look = partial(self.judges.activations, direction.name, layer=layer)
                students, teachers = (_looked_at(found, look, batch_free) for found in seen)
                distances.append(losses.dcd(students, teachers))
            terms["dcd"] = self.weighted("dcd", distances[0] if len(distances) == 1 else torch.stack(distances).sum())
        if self.uses("spectral"):
            spectra = [_looked_at(found, radial_spectrum, True) for found in seen]
            if self.spectrum == "maps":
                for role, found in zip((STUDENT, self.teaching), spectra, strict=True):
                    carry[spectra_name(role, direction)] = torch.cat(list(found.values())).detach()
            opinions = (_looked_at(found, partial(self._opinion, direction.name), True) for found in spectra)
            terms["spectral"] = self.weighted("spectral", losses.spectral(*opinions))
        return terms

    def _opinion(self, direction: str, spectra: Tensor) -> Tensor:
        opinion: Tensor = self.judges(direction, spectra, spectrum=True)
        return opinion

    # --- building --------------------------------------------------------------------------------------------------

    def _chosen_layers(self, students: Translators) -> tuple[tuple[str, ...], int]:
        """The compared layers and the side of the map that the discriminator sees; UserError for what does not fit."""
        config = self.config
        student, teacher = (found.by_direction[A2B.name] for found in (students, self.translators))
        assert isinstance(student, ImageGenerator)
        assert isinstance(teacher, ImageGenerator)
        discriminator = self.judges.discriminators[A2B.name]
        assert isinstance(discriminator, PatchDiscriminator)
        if not self.compares:
            return (), self.crop // 4
        if config.projection == "shared" and config.teacher.ngf != config.student.ngf:
            raise UserError(
                f"method.projection: shared needs maps of one width, teacher.ngf is {config.teacher.ngf}, student.ngf "
                f"{config.student.ngf}; use trained or frozen"
            )
        layers = config.layers or student.DISTILLED
        networks = {"teacher": teacher, "student": student}
        side = check_maps(networks, layers, self.crop, discriminator.channels_in, config.shift)
        if self.uses("dcd"):
            try:
                discriminator.check_size(side, side)
            except UserError as error:
                raise UserError(
                    f"method.layers: the maps of {self.crop}x{self.crop} images have {side}x{side} pixels, too few for "
                    f"the discriminator: {error} (method.discriminator_strides)"
                ) from None
            valid = discriminator.activation_channels
            for number in config.discriminator_layers:
                if number is not None and number not in valid:
                    raise UserError(f"method.discriminator_layer: {number} is not one of {list(valid)}")
        return tuple(layers), side

    def _projections(self, translators: Translators, direction: Direction) -> ComparedMaps:
        generator = translators.by_direction[direction.name]
        assert isinstance(generator, ImageGenerator)
        widths = {layer: generator.map_channels[layer] for layer in self.layers}
        channels = 6 if self.family.conditional else 3
        return ComparedMaps(widths, channels, self.config.shift, self.side)


def _looked_at(maps: Maps, look: Callable[[Tensor], Tensor], exact: bool) -> Maps:
    """`look` at the maps of all layers, as one batch where that is `exact`; without gradients where they have none."""
    with torch.set_grad_enabled(any(x.requires_grad for x in maps.values())):
        found = one_batch(look, list(maps.values()), exact)
    return dict(zip(maps, found, strict=True))
