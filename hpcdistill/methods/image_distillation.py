"""A small generator learns from a folder of images that any other model has made: AutoGAN-Distiller's last stage.

Fu, Chen, Wang, Li, Lin, Wang (ICML 2020) train their students so: by a teacher's saved images, without a
discriminator. The teacher itself is not asked for: it may be a diffusion model, or anything that is not here.
"""

from __future__ import annotations

from torch import Tensor

from hpcdistill import losses
from hpcdistill.data.needs import Needs
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Group, Phase, Progress, Teachers, Terms
from hpcdistill.methods.gan_settings import A2B, FAMILIES
from hpcdistill.methods.image_distillation_settings import ImageDistillationConfig
from hpcdistill.methods.perceptual import PerceptualTerms
from hpcdistill.methods.translation_gan import check_crop
from hpcdistill.models.image_generator import build_generator

STUDENT = "student"


class ImageDistillation(PerceptualTerms):
    """L = w1 |S - T| + w2 style + w3 feature + w4 TV, of the student's image S of a and the teacher's T, the pair's b.

    Style is the distance of the Gram matrices of four maps of VGG16, feature the L1 of one map; see `losses`.
    """

    Config = ImageDistillationConfig

    def __init__(self, config: ImageDistillationConfig, teachers: Teachers = NO_TEACHERS) -> None:
        """UserError when the crop does not fit the student."""
        super().__init__(config, teachers)
        name, arguments = config.student.arguments(FAMILIES["pix2pix"])
        self.student = build_generator(name, **arguments)
        self.student.check_size(config.crop, config.crop)
        self.add_weights(output=config.weight_output, tv=config.weight_tv)
        self.add_perceptual_weights()
        self.groups = {STUDENT: Group(self.student, config.optimizer)}
        self.generators = {STUDENT: self.student}

    def prepare(self, crop: int) -> None:
        """UserError when the data does not fit or VGG16's weights are not to be had."""
        check_crop(self.config.crop, crop)
        super().prepare(crop)

    @property
    def needs(self) -> Needs:
        return Needs(self.config.kind(), real_targets=self.config.REAL_TARGETS)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(STUDENT, STUDENT, self.student_loss),)

    def style_distance(self, gram: Tensor, target: Tensor) -> Tensor:
        """How far two Gram matrices are apart (0-dim)."""
        return (losses.l2 if self.config.style == "squared" else losses.l1)(gram, target)

    def student_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """The terms that have a weight."""
        taught = batch[A2B.target]
        translated = self.call(STUDENT, batch[A2B.source])
        terms: Terms = {}
        if self.uses("output"):
            terms["output"] = self.weighted("output", losses.l1(translated, taught))
        terms |= self.perceptual_terms(translated, {"": taught})
        if self.uses("tv"):
            terms["tv"] = self.weighted("tv", losses.total_variation(translated))
        return terms
