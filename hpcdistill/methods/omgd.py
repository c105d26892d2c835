"""OMGD (Ren, Wu, Xiao, Yang, ICCV 2021): a student beside its teachers that sees neither truth nor discriminator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hpcdistill import losses
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Group, Phase, Progress, Teachers, Terms
from hpcdistill.methods.compared_maps import check_maps
from hpcdistill.methods.distillation_settings import ShiftSettings
from hpcdistill.methods.gan_settings import A2B, Direction
from hpcdistill.methods.omgd_settings import OMGDConfig
from hpcdistill.methods.pix2pix import paired_terms
from hpcdistill.methods.student_gan import STUDENT, TEACHER, StudentGAN
from hpcdistill.methods.translation_gan import Maps, Translators
from hpcdistill.models.discriminator import Projection
from hpcdistill.models.image_generator import ImageGenerator

DEEP = "deep"


class ConnectedStudent(nn.Module):
    """The student and the connectors that bring its maps to the teacher's channels, behind one forward."""

    def __init__(self, translators: Translators, widths: Mapping[str, tuple[int, int]]) -> None:
        """`widths`: layer -> channels of the student's map and of the teacher's."""
        super().__init__()
        self.translators = translators
        self.connectors = nn.ModuleDict({layer: Projection(*channels) for layer, channels in widths.items()})

    def forward(self, image: Tensor, layers: Sequence[str]) -> tuple[Tensor, Maps]:
        """The translation [B, 3, H, W] in [-1, 1], and the connected maps [B, C of the teacher, h, w] by layer."""
        translated, maps = self.translators(A2B.name, image, layers)
        return translated, {layer: self.connectors[layer](maps[layer]) for layer in layers}


class OMGD(StudentGAN):
    """L = SSIM + style + feature + TV + channel, each with its weight, of the student's image and the teachers'.

    CycleGAN: one teacher, of both directions, and in blocks the best so far teaches. Pix2Pix: two of complementary
    shape, a wide one, `teacher`, and a deep one, `deep`, whose terms add up; the maps are the wide one's. Both learn
    as Originals do, from one discriminator whose loss is the sum of theirs.
    """

    Config = OMGDConfig

    def __init__(self, config: OMGDConfig, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config)
        self.add_weights(ssim=config.weight_ssim, tv=config.weight_tv, channel=config.weight_channel)
        students = self.built_generators(config.student, (A2B,))
        self.student = ConnectedStudent(students, self._compared_widths(students))
        self.layers = tuple(self.student.connectors)
        modules: dict[str, nn.Module] = {TEACHER: self.translators}
        self.generators = {**self.named(STUDENT, students), **self.generators}
        self.teachers: tuple[str, ...] = (TEACHER,)
        if config.family == "pix2pix":
            self.deep = self.built_generators(config.deep, (A2B,))
            self.add_pools(DEEP, (A2B,))
            self.teachers = (TEACHER, DEEP)
            self.real_share = 2.0
            modules[DEEP] = self.deep
            self.generators |= self.named(DEEP, self.deep)
        modules |= {STUDENT: self.student, "discriminator": self.judges}
        self.groups = {name: Group(module, config.optimizer, course="own") for name, module in modules.items()}

    @property
    def teachers_phases(self) -> tuple[Phase, ...]:
        first, *discriminator = super().teachers_phases
        return (first, *(Phase(name, name, self.deep_loss) for name in self.teachers[1:]), *discriminator)

    def deep_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """The deep teacher's, as the wide one's; leaves its translation to the others' phases."""
        return paired_terms(self, batch, carry, group=DEEP)

    def shown(self, carry: Carry, direction: Direction) -> dict[str, Tensor | float]:
        """The teachers' images, each in full; never the student's."""
        return dict.fromkeys(self.teachers, 1.0)

    def student_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """The terms that have a weight; those of the deep teacher's image end in `_deep`."""
        wide, maps = self.taught(A2B, batch, carry)
        images = {"": wide} | {f"_{name}": self.taught(A2B, batch, carry, name)[0] for name in self.teachers[1:]}
        translated, connected = self.call(STUDENT, batch[A2B.source], self.layers)
        terms: Terms = {}
        if self.uses("ssim"):
            for suffix, image in images.items():
                distance = losses.ssim(self._ranged(translated), self._ranged(image))
                terms[f"ssim{suffix}"] = self.weighted("ssim", distance)
        terms |= self.perceptual_terms(translated, images)
        if self.uses("tv"):  # once for each teacher, although no teacher enters it
            terms["tv"] = self.weighted("tv", len(images) * losses.total_variation(translated))
        if self.layers:
            terms["channel"] = self.weighted("channel", losses.channel(connected, maps))
        return terms

    def _ranged(self, image: Tensor) -> Tensor:
        """As SSIM sees it; in float32 or better."""
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        return image if self.config.ssim_range == "signed" else (image + 1) / 2

    def _compared_widths(self, students: Translators) -> dict[str, tuple[int, int]]:
        """Layer -> channels of the student's map and of the teacher's; UserError for a layer that one of them lacks."""
        if not self.uses("channel"):
            return {}
        student, teacher = (found.by_direction[A2B.name] for found in (students, self.translators))
        assert isinstance(student, ImageGenerator)
        assert isinstance(teacher, ImageGenerator)
        layers = self.config.layers or student.DISTILLED
        networks = {"teacher": teacher, "student": student}
        check_maps(networks, layers, self.crop, 3, ShiftSettings(mode="none"))
        return {layer: (student.map_channels[layer], teacher.map_channels[layer]) for layer in layers}
