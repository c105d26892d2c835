"""What all students have that learn beside their teachers: networks, the teacher's terms, the schedule."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hpcdistill.data.index import Kind
from hpcdistill.methods.gan_settings import FAMILIES, MOST_REMEMBERED, GANConfig, StudentSettings, TeacherSettings
from hpcdistill.methods.perceptual_settings import PerceptualConfig
from hpcdistill.settings import LARGEST_WEIGHT, MOST_STEPS

STUDENT_STEPS = {"online": 1, "blocks": 4}  # student updates for each of the teacher, unless said otherwise


class StudentGANConfig(PerceptualConfig, GANConfig):
    """Defaults are FESD's, DCD's and OMGD's."""

    GENERATORS: ClassVar[tuple[str, ...]] = ("student", "teacher")

    family: Literal["cyclegan", "pix2pix"] = Field("cyclegan", description="how teacher and discriminator are trained")
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    layers: tuple[str, ...] | None = Field(
        None,
        description="i, the generator maps that are compared; unset = the network's own, resnet: down2 and 3 blocks",
    )
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

    @field_validator("student_steps")
    @classmethod
    def _unless_usual(cls, steps: int | None, info: ValidationInfo) -> int | None:
        """What the schedule does anyway is as good as unset: such runs are one run."""
        return None if steps == STUDENT_STEPS.get(info.data.get("schedule", "")) else steps

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schedule == "blocks" and not self.blocks:
            raise ValueError("schedule: blocks needs the number of pairs of blocks; set blocks (DCD: 20)")
        if self.schedule == "online" and (self.block_steps or self.blocks):
            raise ValueError(
                "block_steps and blocks: are of the schedule blocks; set schedule=blocks or leave them out"
            )
        return self

    @property
    def students_updates(self) -> int:
        """Student updates for each of the teacher."""
        return self.student_steps or STUDENT_STEPS[self.schedule]

    def kind(self) -> Kind:
        return FAMILIES[self.family].kind
