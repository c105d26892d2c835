"""What the methods have in common whose small generator learns beside large ones that are still trained themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpcdistill.methods.base import Batch, Carry, Part, Phase, Progress, Segment, Terms
from hpcdistill.methods.cyclegan import cycle_terms
from hpcdistill.methods.gan_settings import FAMILIES, Direction, GeneratorSettings
from hpcdistill.methods.perceptual import PerceptualTerms
from hpcdistill.methods.pix2pix import paired_terms
from hpcdistill.methods.student_settings import StudentGANConfig
from hpcdistill.methods.translation_gan import Maps, TranslationGAN, leave
from hpcdistill.models.image_generator import build_generator

STUDENT, TEACHER = "student", "teacher"


class StudentGAN(PerceptualTerms, TranslationGAN):
    """The teacher's phase, the perceptual terms and the schedule; a method adds the student and its loss.

    With `student_steps` k an iteration takes k batches. The student is updated on each, one after the other; teacher
    and discriminators see the first, of which the teacher's and the student's images are handed on as with k = 1. On
    the others the teacher, updated by now, is asked anew. An iteration is a step, so `train.epochs` and `train.steps`
    count the teacher's updates, at `train.batch_size` images each, and learning rates follow them: 100 epochs with k =
    4 are as many updates of the teacher as with k = 1, and four times as many of the student, which has then passed
    over the data 400 times; the teacher has seen every fourth batch of these passes.
    """

    layers: tuple[str, ...] = ()  # the maps of the teacher that the student's phase compares

    def __init__(self, config: StudentGANConfig) -> None:
        super().__init__(config, FAMILIES[config.family], TEACHER, config.teacher, pool=config.pool)
        self.add_perceptual_weights()
        if config.family == "cyclegan":
            self.add_weights(cycle=config.weight_cycle, identity=config.weight_identity)
        else:
            self.add_weights(reconstruction=config.weight_reconstruction)

    @property
    def measured(self) -> dict[str, nn.Module]:
        networks = super().measured
        name, arguments = GeneratorSettings(network=self.config.teacher.network).arguments(self.family)
        discriminator = networks.pop("discriminator")
        return {**networks, "original": build_generator(name, **arguments), "discriminator": discriminator}

    # --- when who is trained ---------------------------------------------------------------------------------------

    @property
    def phases(self) -> tuple[Phase, ...]:
        *teachers, discriminator = self.teachers_phases
        students = (self._student_phase(batch) for batch in range(self.config.students_updates))
        return (*teachers, *students, discriminator)

    @property
    def teachers_phases(self) -> tuple[Phase, ...]:
        """Those of an iteration without the student; the discriminators' is the last."""
        return super().phases

    def _student_phase(self, batch: int = 0) -> Phase:
        return Phase(STUDENT, STUDENT, self.student_loss, batch=batch)

    def segments(self) -> tuple[Segment, ...]:
        """One, or the blocks of DCD: the teacher with its discriminators, then the student alone with the best teacher.

        The best teacher so far is the one whose own metric was best, and both its directions are of that step. A
        student's block needs images of its source only, so the discriminators rest; after it the teacher goes on from
        its latest weights. A step is an update of one of them, `train.epochs` counts both: 1000 epochs in 20 blocks
        are 200 of the teacher and 800 of the student, 10 + 40 at a time. Each learning rate follows the group's own
        steps. Without `block_steps` the run is cut evenly; with it the last student's block takes what is left.
        """
        if self.config.schedule == "online":
            return super().segments()
        assert self.config.blocks is not None
        blocks, times, steps = self.config.blocks, self.config.students_updates, self.config.block_steps
        share = None if steps else 1 / (blocks * (1 + times))
        student = (self._student_phase(),)
        which: Literal["best"] = "best"
        names = tuple(self.named(self.teaching, self.translators))
        best = tuple((name, which) for name in names)
        segments = []
        for block in range(blocks):
            of_student: dict[str, Any] = {}
            if block < blocks - 1:
                of_student = {"steps": times * steps} if steps else {"share": times / (blocks * (1 + times))}
            segments += [
                Segment(f"teacher{block}", self.teachers_phases, steps, share),
                Segment(f"student{block}", student, **of_student, load=best, judged=self.teaching, put_back=names),
            ]
        return tuple(segments)

    # --- the phases ------------------------------------------------------------------------------------------------

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms | Sequence[Part]:
        """The teacher's, as an Original's; leaves its translations and maps to the student's phase."""
        if self.config.family == "cyclegan":
            return cycle_terms(self, batch, carry, self.layers)
        return paired_terms(self, batch, carry, self.layers)

    def student_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """The student's terms, on the teacher's images and maps of `taught`."""
        raise NotImplementedError

    def taught(self, direction: Direction, batch: Batch, carry: Carry, group: str = TEACHER) -> tuple[Tensor, Maps]:
        """The translation by a teacher and, of the one that maps are compared with, those: from its phase or, where it
        has none, computed now."""
        name = group + direction.suffix
        layers = self.layers if group == self.teaching else ()
        if name not in carry:
            translators = self.groups[group].module
            with torch.no_grad():
                leave(carry, name, *translators(direction.name, batch[direction.source], layers))
        return carry[name], {layer: carry[f"{name}.{layer}"] for layer in layers}
