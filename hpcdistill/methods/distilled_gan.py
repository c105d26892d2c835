"""A small generator learns from a large one while both are trained: FESD, DCD (BL) and BL + PCS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hpcdistill import losses
from hpcdistill.console import say, warn
from hpcdistill.errors import UserError
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Group, Phase, Progress, Segment, Teachers, Terms
from hpcdistill.methods.compared_maps import ComparedMaps, check_maps
from hpcdistill.methods.cyclegan import cycle_terms
from hpcdistill.methods.distillation_settings import DistilledGANConfig
from hpcdistill.methods.gan_settings import A2B, FAMILIES, Direction, GeneratorSettings
from hpcdistill.methods.pix2pix import paired_terms
from hpcdistill.methods.translation_gan import Maps, TranslationGAN, Translators, is_batch_free, leave, one_batch
from hpcdistill.models import VGG_LAYERS
from hpcdistill.models.discriminator import PatchDiscriminator
from hpcdistill.models.image_generator import ImageGenerator, build_generator
from hpcdistill.models.vgg import VGG16Features, load_vgg16
from hpcdistill.ops.radial_spectrum import radial_spectrum

STUDENT, JUDGES = "student", "discriminator"


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


class DistilledGAN(TranslationGAN):
    """Equation 14: L_GAN + L_sty + L_feat + L_dcd + L_spectral, each with its weight.

    In an iteration the teacher learns as an Original does, then the student, then the discriminators and spectral
    classifiers, which see the images of both. The teacher's images and maps are computed once, before its update.

    With `student_steps` k an iteration takes k batches. The student is updated on each, one after the other; teacher
    and discriminators see the first, of which the teacher's and the student's images are handed on as with k = 1. On
    the others the teacher, updated by now, is asked anew. An iteration is a step, so `train.epochs` and `train.steps`
    count the teacher's updates, at `train.batch_size` images each, and learning rates follow them: 100 epochs with k =
    4 are as many updates of the teacher as with k = 1, and four times as many of the student, which has then passed
    over the data 400 times; the teacher has seen every fourth batch of these passes.

    The generated half of D's loss is the average of the teacher's with weight 1 and the student's with weight
    lambda_stu, the weights divided by their sum: with lambda_stu = 0 the teacher's GAN is the Original's.
    """

    Config = DistilledGANConfig
    weight_student: Tensor

    def __init__(self, config: DistilledGANConfig, teachers: Teachers = NO_TEACHERS) -> None:
        family = FAMILIES[config.family]
        super().__init__(config, family, "teacher", config.teacher, pool=config.pool)
        self.student_directions = family.directions if config.direction == "both" else (A2B,)
        self.add_weights(
            student=config.weight_student,
            style=config.weight_style,
            feature=config.weight_feature,
            dcd=config.weight_dcd,
            spectral=config.weight_spectral,
        )
        if config.family == "cyclegan":
            self.add_weights(cycle=config.weight_cycle, identity=config.weight_identity)
        else:
            self.add_weights(reconstruction=config.weight_reconstruction)
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
            self.add_classifiers(self.student_directions, self.side, config.mix_spectral)
        self.groups = {
            name: Group(module, config.optimizer, course="own")
            for name, module in ((self.teaching, self.translators), (STUDENT, self.student), (JUDGES, self.judges))
        }
        self.generators = {**self.named(STUDENT, students), **self.generators}
        if self.uses("student"):
            self.add_pools(STUDENT, self.student_directions)
        self.vgg: VGG16Features | None = None

    def prepare(self, crop: int) -> None:
        """UserError when the data does not fit or VGG16's weights are not to be had."""
        super().prepare(crop)
        if self.uses("style", "feature"):
            config = self.config
            layers = [layer for layer in VGG_LAYERS if layer in {*config.style_layers, *config.feature_layers}]
            self.vgg = load_vgg16(config.vgg, layers, config.vgg_normalise)
            self.origins["vgg16"] = self.vgg.origin
            say(f"style and feature losses: VGG16, {self.vgg.origin}")
        if self.compares and self.config.projection != "frozen":
            warn(f"method.projection is {self.config.projection}: watch student/dcd, it can fall to zero by collapse")

    @property
    def measured(self) -> dict[str, nn.Module]:
        networks = super().measured
        name, arguments = GeneratorSettings(network=self.config.teacher.network).arguments(self.family)
        discriminator = networks.pop("discriminator")
        return {**networks, "original": build_generator(name, **arguments), "discriminator": discriminator}

    @property
    def phases(self) -> tuple[Phase, ...]:
        teacher, discriminator = super().phases
        students = (self._student_phase(batch) for batch in range(self.config.students_updates))
        return (teacher, *students, discriminator)

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
        teacher, student = super().phases, (self._student_phase(),)
        which: Literal["best"] = "best"
        names = tuple(self.named(self.teaching, self.translators))
        best = tuple((name, which) for name in names)
        segments = []
        for block in range(blocks):
            of_student: dict[str, Any] = {}
            if block < blocks - 1:
                of_student = {"steps": times * steps} if steps else {"share": times / (blocks * (1 + times))}
            segments += [
                Segment(f"teacher{block}", teacher, steps, share),
                Segment(f"student{block}", student, **of_student, load=best, judged=self.teaching, put_back=names),
            ]
        return tuple(segments)

    # --- the phases ------------------------------------------------------------------------------------------------

    def generator_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """The teacher's, as an Original's; leaves its translations and maps to the student's phase."""
        terms = cycle_terms if self.config.family == "cyclegan" else paired_terms
        return terms(self, batch, carry, self.layers)

    def student_loss(self, batch: Batch, carry: Carry, progress: Progress) -> Terms:
        """Equations 8 to 13 for the student."""
        terms: Terms = {}
        for direction in self.student_directions:
            image, maps = self._teachers(direction, batch, carry)
            output = self.call(STUDENT, direction.name, batch[direction.source], self.layers, maps)
            carry[STUDENT + direction.suffix] = output.image.detach()
            found: Terms = {}
            if self.uses("student"):
                found["gan"] = self.weighted("student", self.fooling(direction, batch, output.image))
            if self.vgg is not None:
                found |= self._perceptual_terms(output.image, image)
            if self.compares:
                found |= self._comparison_terms(direction, output, maps)
            terms |= {name + direction.suffix: term for name, term in found.items()}
        assert terms, "checked when the method was built"
        return terms

    def shown(self, carry: Carry, direction: Direction) -> dict[str, Tensor | float]:
        """The teacher's image and, where it was translated and lambda_stu > 0, the student's: a weighted average."""
        if not self.uses("student") or STUDENT + direction.suffix not in carry:
            return {self.teaching: 1.0}
        weight = self.weight_student
        return {self.teaching: 1 / (1 + weight), STUDENT: weight / (1 + weight)}

    def _teachers(self, direction: Direction, batch: Batch, carry: Carry) -> tuple[Tensor, Maps]:
        """The teacher's translation and maps, from its phase or, where it has none, computed now."""
        name = self.teaching + direction.suffix
        if name not in carry:
            with torch.no_grad():
                leave(carry, name, *self.translators(direction.name, batch[direction.source], self.layers))
        return carry[name], {layer: carry[f"{name}.{layer}"] for layer in self.layers}

    def _perceptual_terms(self, student: Tensor, teacher: Tensor) -> Terms:
        """L_sty and L_feat."""
        assert self.vgg is not None
        with torch.no_grad():
            targets = self.vgg(teacher)
        maps = self.vgg(student)
        terms: Terms = {}
        for name, distance, layers in (
            ("style", losses.style, self.config.style_layers),
            ("feature", losses.feature, self.config.feature_layers),
        ):
            if self.uses(name):
                chosen = ({layer: found[layer] for layer in layers} for found in (maps, targets))
                terms[name] = self.weighted(name, distance(*chosen))
        return terms

    def _comparison_terms(self, direction: Direction, output: StudentOutput, maps: Maps) -> Terms:
        """L_dcd and L_spectral: what the frozen judges make of the projected maps."""
        seen = [output.own, output.teachers]
        if self.config.projection == "frozen":
            with torch.no_grad():
                seen[1] = self.fixed_projections[direction.name](maps)
        terms: Terms = {}
        batch_free = is_batch_free(self.judges.discriminators)
        if self.uses("dcd"):
            distances = []
            for layer in self.config.discriminator_layers:
                look = partial(self.judges.activations, direction.name, layer=layer)
                students, teachers = (_looked_at(found, look, batch_free) for found in seen)
                distances.append(losses.dcd(students, teachers))
            terms["dcd"] = self.weighted("dcd", distances[0] if len(distances) == 1 else torch.stack(distances).sum())
        if self.uses("spectral"):
            look = partial(self._opinion, direction.name)
            students, teachers = (_looked_at(found, look, True) for found in seen)
            terms["spectral"] = self.weighted("spectral", losses.spectral(students, teachers))
        return terms

    def _opinion(self, direction: str, x: Tensor) -> Tensor:
        opinion: Tensor = self.judges(direction, radial_spectrum(x), spectrum=True)
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
