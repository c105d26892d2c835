"""The configuration of OMGD."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hpcdistill.methods.gan_settings import MOST_CHANNELS, GeneratorSettings
from hpcdistill.methods.student_settings import StudentGANConfig
from hpcdistill.models import GeneratorName
from hpcdistill.settings import LARGEST_WEIGHT


class DeepTeacherSettings(GeneratorSettings):
    """The default deep teacher: as narrow as the student."""

    network: GeneratorName = Field("deep_unet", description="a generator with more layers than the student's")
    ngf: int = Field(16, gt=0, le=MOST_CHANNELS, description="base width, channels")


class OMGDConfig(StudentGANConfig):
    """Defaults are those of horse2zebra but for the schedule; `configs/omgd` has what was run."""

    METHOD: ClassVar[str] = "hpcdistill.methods.omgd:OMGD"

    name: Literal["omgd"] = "omgd"
    deep: DeepTeacherSettings = DeepTeacherSettings()  # pix2pix; its wide teacher is `teacher`
    weight_ssim: float = Field(1e1, ge=0, le=LARGEST_WEIGHT, description="lambda_ssim, weight of 1 - SSIM")
    weight_tv: float = Field(
        1e-5, ge=0, le=LARGEST_WEIGHT, description="lambda_tv, weight of the total variation of an image, a sum"
    )
    weight_channel: float = Field(
        5e2, ge=0, le=LARGEST_WEIGHT, description="lambda_CD, weight of the channels' means against the teacher's"
    )
    ssim_range: Literal["signed", "unit"] = Field(
        "signed", description="SSIM of images in [-1, 1], as the released code has it, or moved to [0, 1]"
    )
    feature_layers: tuple[str, ...] = Field(("relu2_2",), min_length=1, description="VGG layers of L_feat, J")

    @model_validator(mode="after")
    def _fitting(self) -> OMGDConfig:
        weights = (self.weight_ssim, self.weight_style, self.weight_feature, self.weight_channel)
        if not any(weights):
            raise ValueError("weight_ssim, weight_style ...: all are 0, the student would learn nothing; set one")
        if self.family == "pix2pix" and self.schedule == "blocks":
            raise ValueError(
                "schedule: blocks is of cyclegan; with the two teachers of pix2pix there is no best one, use online"
            )
        return self
