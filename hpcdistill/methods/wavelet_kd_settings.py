"""The configuration of Wavelet KD."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hpcdistill.data.index import Kind
from hpcdistill.methods.gan_settings import (
    A2B,
    B2A,
    FAMILIES,
    MOST_CHANNELS,
    MOST_REMEMBERED,
    Direction,
    GANConfig,
    GeneratorSettings,
)
from hpcdistill.methods.settings import Role
from hpcdistill.settings import LARGEST_WEIGHT

ROLES = {A2B.name: "ab", B2A.name: "ba"}  # direction -> the role of the generator that teaches it


class DenseStudentSettings(GeneratorSettings):
    """The default student: the Original's generator with a quarter of its width."""

    ngf: int = Field(16, gt=0, le=MOST_CHANNELS, description="base width, channels")


class WaveletKDConfig(GANConfig):
    """Defaults are those of horse2zebra's logs and scripts, but for the schedule."""

    METHOD: ClassVar[str] = "hpcdistill.methods.wavelet_kd:WaveletKD"

    name: Literal["wavelet_kd"] = "wavelet_kd"
    family: Literal["cyclegan", "pix2pix"] = Field("cyclegan", description="how student and discriminator are trained")
    student: DenseStudentSettings = DenseStudentSettings()
    direction: Literal["a2b", "both"] | None = Field(
        None,
        description="which translations a teacher corrects; a2b: the role ab alone, both: ab and ba; unset = all that "
        "the family learns: cyclegan both, pix2pix a2b",
    )
    pool: int | None = Field(
        None,
        ge=0,
        le=MOST_REMEMBERED,
        description="generated images a discriminator remembers; unset = the family's own: 50, pix2pix 0",
    )
    weight_cycle: float = Field(10.0, ge=0, le=LARGEST_WEIGHT, description="lambda_cyc (cyclegan)")
    weight_identity: float = Field(5.0, ge=0, le=LARGEST_WEIGHT, description="lambda_idt (cyclegan)")
    weight_reconstruction: float = Field(100.0, ge=0, le=LARGEST_WEIGHT, description="lambda_rec (pix2pix)")
    weight_wavelet: float = Field(
        0.4, ge=0, le=LARGEST_WEIGHT, description="lambda, weight of the teacher's term; 0 = without a teacher"
    )
    levels: int = Field(4, gt=0, le=16, description="J, levels of the Haar transform; the crop is a multiple of 2^J")
    power: Literal[1, 2] = Field(
        1, description="of the bands' differences: 1 as the paper's README, 2 as the released training file"
    )

    @field_validator("direction")
    @classmethod
    def _unless_usual(cls, direction: str | None, info: ValidationInfo) -> str | None:
        """What the family learns anyway is as good as unset: such runs are one run."""
        return None if direction == _USUAL.get(info.data.get("family", "")) else direction

    @model_validator(mode="after")
    def _fitting(self) -> WaveletKDConfig:
        if self.family == "pix2pix" and self.direction == "both":
            raise ValueError("direction: pix2pix translates a to b only; use a2b, or data.direction=BtoA")
        return self

    @property
    def taught(self) -> tuple[Direction, ...]:
        """The directions in which a teacher's image is compared with the student's."""
        if not self.weight_wavelet:
            return ()
        return (A2B,) if self.direction == "a2b" else FAMILIES[self.family].directions

    def roles(self) -> dict[str, Role]:
        """A generator for each direction that the family learns; those that are not compared are left out."""
        return {
            ROLES[direction.name]: Role(direction in self.taught, ("image",))
            for direction in FAMILIES[self.family].directions
        }

    def kind(self) -> Kind:
        return FAMILIES[self.family].kind


_USUAL = {"cyclegan": "both", "pix2pix": "a2b"}
