"""The configuration of image distillation."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from hpcdistill.data.index import Kind
from hpcdistill.methods.gan_settings import GANOptimizer, StudentSettings
from hpcdistill.methods.perceptual_settings import PerceptualConfig
from hpcdistill.models import GeneratorName
from hpcdistill.settings import LARGEST_WEIGHT, MOST_PIXELS


class TaughtStudentSettings(StudentSettings):
    """The default student: the separable ResNet of base width 16."""

    network: GeneratorName = Field("resnet", description="the student's generator: resnet, unet or deep_unet")


class ImageDistillationConfig(PerceptualConfig):
    """Defaults are AutoGAN-Distiller's for the last training of its students."""

    METHOD: ClassVar[str] = "hpcdistill.methods.image_distillation:ImageDistillation"
    REAL_TARGETS: ClassVar[bool] = False

    name: Literal["image_distillation"] = "image_distillation"
    crop: int = Field(
        256, gt=0, le=MOST_PIXELS, description="side of the training images, pixels; the same as data.crop"
    )
    student: TaughtStudentSettings = TaughtStudentSettings()
    optimizer: GANOptimizer = GANOptimizer()
    weight_output: float = Field(
        1e-2, ge=0, le=LARGEST_WEIGHT, description="w1, weight of the L1 to the teacher's image"
    )
    weight_style: float = Field(1e5, ge=0, le=LARGEST_WEIGHT, description="w2, weight of the Gram matrices' distance")
    weight_feature: float = Field(1.0, ge=0, le=LARGEST_WEIGHT, description="w3, weight of the L1 of VGG16's maps")
    weight_tv: float = Field(
        0.0, ge=0, le=LARGEST_WEIGHT, description="w4, weight of the total variation of an image, a sum"
    )
    style: Literal["squared", "absolute"] = Field(
        "squared", description="the Gram matrices' distance: mean square, as AutoGAN-Distiller; absolute, as FESD, OMGD"
    )
    feature_layers: tuple[str, ...] = Field(("relu2_2",), min_length=1, description="VGG layers of the L1 of maps")

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not (self.weight_output or self.weight_style or self.weight_feature):
            raise ValueError("weight_output, weight_style, weight_feature: all are 0; set one")
        return self

    def kind(self) -> Kind:
        return "paired"
