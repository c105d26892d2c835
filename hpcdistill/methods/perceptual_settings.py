"""The configuration of methods that compare two images by VGG16's maps of them."""

from __future__ import annotations

from pydantic import Field, field_validator

from hpcdistill.errors import nearest
from hpcdistill.methods.settings import MethodConfig
from hpcdistill.models import PERCEPTUAL, VGG_LAYERS
from hpcdistill.settings import LARGEST_WEIGHT


class PerceptualConfig(MethodConfig):
    """Defaults are FESD's and DCD's."""

    weight_style: float = Field(1e4, ge=0, le=LARGEST_WEIGHT, description="lambda_sty, weight of L_sty (equation 10)")
    weight_feature: float = Field(
        1e1, ge=0, le=LARGEST_WEIGHT, description="lambda_feat, weight of L_feat (equation 11)"
    )
    vgg: str = Field("torchvision", description="VGG16 of L_sty and L_feat: torchvision, stlpips, or a file")
    vgg_normalise: bool = Field(False, description="normalise VGG's input with ImageNet's mean and deviation")
    style_layers: tuple[str, ...] = Field(PERCEPTUAL, min_length=1, description="VGG layers of L_sty")
    feature_layers: tuple[str, ...] = Field(PERCEPTUAL, min_length=1, description="VGG layers of L_feat, J")

    @field_validator("style_layers", "feature_layers")
    @classmethod
    def _known(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for layer in layers:
            if layer not in VGG_LAYERS:
                raise ValueError(
                    f"VGG16 has no layer '{layer}', {nearest(layer, VGG_LAYERS)} (all: {', '.join(VGG_LAYERS)})"
                )
        return layers

    def weights(self) -> tuple[str, ...]:
        perceptual_terms = self.weight_style > 0 or self.weight_feature > 0
        return ("vgg16",) if perceptual_terms and self.vgg == "torchvision" else ()
