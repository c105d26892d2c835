"""The configuration of DistilledGAN: FESD, DCD (BL) and what lies between them are values of it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hpcdistill.methods.student_settings import StudentGANConfig
from hpcdistill.settings import LARGEST_WEIGHT, MOST_PIXELS, Section

DiscriminatorLayer = Annotated[int, Field(gt=0, le=100)]


class ShiftSettings(Section):
    """The partial channel shift h (section 2.1)."""

    mode: Literal["none", "uni", "bi", "cross", "quad"] = Field("bi", description="directions of the shift; none = off")
    rate: float = Field(1 / 8, gt=0, le=1, description="alpha, share of the channels that are moved")
    step: int = Field(2, gt=0, le=MOST_PIXELS, description="how far they are moved, pixels of the map")
    place: Literal["before", "after"] = Field(
        "before", description="before the projection f, on all its input channels; after: h(f(.)) as equation 12 prints"
    )


class DistilledGANConfig(StudentGANConfig):
    """Defaults are FESD-CycleGAN as printed."""

    METHOD: ClassVar[str] = "hpcdistill.methods.distilled_gan:DistilledGAN"

    name: Literal["distilled_gan"] = "distilled_gan"
    direction: Literal["a2b", "both"] = Field("a2b", description="what the student learns; both: cyclegan only")
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
    weight_student: float = Field(
        1.0, ge=0, le=LARGEST_WEIGHT, description="lambda_stu, weight of the student in L_GAN (equation 8)"
    )
    weight_dcd: float = Field(1.0, ge=0, le=LARGEST_WEIGHT, description="lambda_dcd, weight of L_dcd (equation 12)")
    weight_spectral: float = Field(
        0.2, ge=0, le=LARGEST_WEIGHT, description="lambda_spe, weight of L_spectral (equation 13)"
    )
    mix_spectral: bool = Field(
        False, description="the adversarial loss sees half of D, half of SC; equation 8 has D alone"
    )
    spectrum: Literal["shrunk", "crop", "maps"] = Field(
        "shrunk",
        description="what the spectral classifier SC learns to tell apart: real and generated images, shrunk to the "
        "maps' size; pieces of that size cut out of them; or the teacher's projected maps and the student's",
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

    @field_validator("spectrum")
    @classmethod
    def _if_seen(cls, spectrum: str, info: ValidationInfo) -> str:
        """Without a classifier any reading is as good as the default: such runs are one run."""
        return spectrum if info.data.get("weight_spectral") or info.data.get("mix_spectral") else "shrunk"

    @model_validator(mode="after")
    def _fitting(self) -> DistilledGANConfig:
        if self.family == "pix2pix" and self.direction == "both":
            raise ValueError("direction: pix2pix translates a to b only; use a2b, or data.direction=BtoA")
        weights = (self.weight_student, self.weight_style, self.weight_feature, self.weight_dcd, self.weight_spectral)
        if not any(weights):
            raise ValueError("weight_student, weight_style ...: all are 0, the student would learn nothing; set one")
        if self.spectrum == "maps" and self.mix_spectral:
            raise ValueError("mix_spectral: with spectrum=maps the classifier sees no images; use shrunk or crop")
        if self.spectrum == "maps" and self.schedule == "blocks":
            raise ValueError(
                "spectrum: maps needs teacher and student in one iteration, blocks train one of them; use shrunk or "
                "crop, or schedule=online"
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
