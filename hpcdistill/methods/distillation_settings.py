"""The configuration of DistilledGAN: FESD, DCD (BL) and what lies between them are values of it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hpcdistill.data.index import Kind
from hpcdistill.errors import nearest
from hpcdistill.methods.gan_settings import FAMILIES, MOST_REMEMBERED, GANConfig, StudentSettings, TeacherSettings
from hpcdistill.models import PERCEPTUAL, VGG_LAYERS
from hpcdistill.settings import LARGEST_WEIGHT, MOST_PIXELS, MOST_STEPS, Section

DiscriminatorLayer = Annotated[int, Field(gt=0, le=100)]
STUDENT_STEPS = {"online": 1, "blocks": 4}  # student updates for each of the teacher, unless said otherwise


class ShiftSettings(Section):
    """The partial channel shift h (section 2.1)."""

    mode: Literal["none", "uni", "bi", "cross", "quad"] = Field("bi", description="directions of the shift; none = off")
    rate: float = Field(1 / 8, gt=0, le=1, description="alpha, share of the channels that are moved")
    step: int = Field(2, gt=0, le=MOST_PIXELS, description="how far they are moved, pixels of the map")
    place: Literal["before", "after"] = Field(
        "before", description="before the projection f, on all its input channels; after: h(f(.)) as equation 12 prints"
    )


class DistilledGANConfig(GANConfig):
    """Defaults are FESD-CycleGAN as printed."""

    METHOD: ClassVar[str] = "hpcdistill.methods.distilled_gan:DistilledGAN"
    GENERATORS: ClassVar[tuple[str, ...]] = ("student", "teacher")

    name: Literal["distilled_gan"] = "distilled_gan"
    family: Literal["cyclegan", "pix2pix"] = Field("cyclegan", description="how teacher and discriminator are trained")
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    direction: Literal["a2b", "both"] = Field("a2b", description="what the student learns; both: cyclegan only")
    layers: tuple[str, ...] | None = Field(
        None,
        description="i, the generator maps that are compared; unset = the network's own, resnet: down2 and 3 blocks",
    )
    discriminator_layer: DiscriminatorLayer | tuple[DiscriminatorLayer, ...] | None = Field(
        None,
        description="k, the discriminator's activation that compares them, or I_D, a list over which L_dcd is summed; "
        "unset = the last, number 4",
    )
    projection: Literal["frozen", "trained", "shared"] = Field(
        "frozen",
        description="f^T: random and frozen; trained with the student; or f^S itself (maps of one width). The last two "
        "can bring the loss to zero by collapse",
    )
    shift: ShiftSettings = ShiftSettings()
    pool: int | None = Field(
        None,
        ge=0,
        le=MOST_REMEMBERED,
        description="generated images a discriminator remembers; unset = the family's own: 50, pix2pix 0",
    )
    weight_cycle: float = Field(10.0, ge=0, le=LARGEST_WEIGHT, description="lambda_cyc of the teacher (cyclegan)")
    weight_identity: float = Field(5.0, ge=0, le=LARGEST_WEIGHT, description="lambda_idt of the teacher (cyclegan)")
    weight_reconstruction: float = Field(
        100.0, ge=0, le=LARGEST_WEIGHT, description="lambda_rec of the teacher (pix2pix)"
    )
    weight_student: float = Field(
        1.0, ge=0, le=LARGEST_WEIGHT, description="lambda_stu, weight of the student in L_GAN (equation 8)"
    )
    weight_style: float = Field(1e4, ge=0, le=LARGEST_WEIGHT, description="lambda_sty, weight of L_sty (equation 10)")
    weight_feature: float = Field(
        1e1, ge=0, le=LARGEST_WEIGHT, description="lambda_feat, weight of L_feat (equation 11)"
    )
    weight_dcd: float = Field(1.0, ge=0, le=LARGEST_WEIGHT, description="lambda_dcd, weight of L_dcd (equation 12)")
    weight_spectral: float = Field(
        0.2, ge=0, le=LARGEST_WEIGHT, description="lambda_spe, weight of L_spectral (equation 13)"
    )
    mix_spectral: bool = Field(
        False, description="the adversarial loss sees half of D, half of SC; equation 8 has D alone"
    )
    vgg: str = Field("torchvision", description="VGG16 of L_sty and L_feat: torchvision, stlpips, or a file")
    vgg_normalise: bool = Field(False, description="normalise VGG's input with ImageNet's mean and deviation")
    style_layers: tuple[str, ...] = Field(PERCEPTUAL, min_length=1, description="VGG layers of L_sty")
    feature_layers: tuple[str, ...] = Field(PERCEPTUAL, min_length=1, description="VGG layers of L_feat, J")
    schedule: Literal["online", "blocks"] = Field(
        "online", description="online: every iteration trains all; blocks: the teacher, then the student, in turn"
    )
    student_steps: int | None = Field(
        None,
        gt=0,
        le=1000,
        description="student updates for each of the teacher; online: an iteration takes as many batches, blocks: a "
        "student's block is so many times as long as a teacher's; unset = online 1, blocks 4",
    )
    block_steps: int | None = Field(
        None,
        gt=0,
        le=MOST_STEPS,
        description="blocks: steps of a teacher's block (10 epochs of DCD); unset = the run cut into `blocks` pairs",
    )
    blocks: int | None = Field(
        None,
        gt=0,
        le=10_000,
        description="blocks: how many pairs of blocks; the last student's takes what is left of the run",
    )

    @field_validator("discriminator_layer")
    @classmethod
    def _a_set(cls, layers: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        """In order, each once; a list of one is that one."""
        if not isinstance(layers, tuple):
            return layers
        if not layers:
            raise ValueError("is empty; name a layer, or leave it unset for the last")
        chosen = tuple(sorted(set(layers)))
        return chosen if len(chosen) > 1 else chosen[0]

    @field_validator("student_steps")
    @classmethod
    def _unless_usual(cls, steps: int | None, info: ValidationInfo) -> int | None:
        """What the schedule does anyway is as good as unset: such runs are one run."""
        return None if steps == STUDENT_STEPS.get(info.data.get("schedule", "")) else steps

    @field_validator("style_layers", "feature_layers")
    @classmethod
    def _known(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for layer in layers:
            if layer not in VGG_LAYERS:
                raise ValueError(
                    f"VGG16 has no layer '{layer}', {nearest(layer, VGG_LAYERS)} (all: {', '.join(VGG_LAYERS)})"
                )
        return layers

    @model_validator(mode="after")
    def _fitting(self) -> DistilledGANConfig:
        if self.family == "pix2pix" and self.direction == "both":
            raise ValueError("direction: pix2pix translates a to b only; use a2b, or data.direction=BtoA")
        weights = (self.weight_student, self.weight_style, self.weight_feature, self.weight_dcd, self.weight_spectral)
        if not any(weights):
            raise ValueError("weight_student, weight_style ...: all are 0, the student would learn nothing; set one")
        if self.schedule == "blocks" and not self.blocks:
            raise ValueError("schedule: blocks needs the number of pairs of blocks; set blocks (DCD: 20)")
        if self.schedule == "online" and (self.block_steps or self.blocks):
            raise ValueError(
                "block_steps and blocks: are of the schedule blocks; set schedule=blocks or leave them out"
            )
        return self

    @property
    def version(self) -> int:
        """2 of blocks: the teacher goes on from its latest weights, and rates follow each group's own steps."""
        return 2 if self.schedule == "blocks" else self.VERSION

    @property
    def discriminator_layers(self) -> tuple[int | None, ...]:
        """I_D; None = the discriminator's last."""
        return self.discriminator_layer if isinstance(self.discriminator_layer, tuple) else (self.discriminator_layer,)

    @property
    def students_updates(self) -> int:
        """Student updates for each of the teacher."""
        return self.student_steps or STUDENT_STEPS[self.schedule]

    def kind(self) -> Kind:
        return FAMILIES[self.family].kind

    def weights(self) -> tuple[str, ...]:
        perceptual_terms = self.weight_style > 0 or self.weight_feature > 0
        return ("vgg16",) if perceptual_terms and self.vgg == "torchvision" else ()
