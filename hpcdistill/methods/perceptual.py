"""L_sty and L_feat: how far an image is from a teacher's by VGG16's maps of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpcdistill import losses
from hpcdistill.console import say
from hpcdistill.methods.base import Terms
from hpcdistill.methods.weighted_terms import WeightedTerms
from hpcdistill.models import VGG_LAYERS
from hpcdistill.models.vgg import VGG16Features, load_vgg16


class PerceptualTerms(WeightedTerms):
    """The two terms and VGG16, which is loaded in `prepare`. `config` is a `PerceptualConfig`.

    A method calls `add_perceptual_weights` when it is built.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.vgg: VGG16Features | None = None

    def add_perceptual_weights(self) -> None:
        self.add_weights(style=self.config.weight_style, feature=self.config.weight_feature)

    def prepare(self, crop: int) -> None:
        """UserError when the data does not fit or VGG16's weights are not to be had."""
        super().prepare(crop)
        if self.uses("style", "feature"):
            config = self.config
            layers = [layer for layer in VGG_LAYERS if layer in {*config.style_layers, *config.feature_layers}]
            self.vgg = load_vgg16(config.vgg, layers, config.vgg_normalise)
            self.origins["vgg16"] = self.vgg.origin
            say(f"style and feature losses: VGG16, {self.vgg.origin}")

    def style_distance(self, gram: Tensor, target: Tensor) -> Tensor:
        """How far two Gram matrices are apart (0-dim)."""
        return losses.l1(gram, target)

    def perceptual_terms(self, student: Tensor, teachers: Mapping[str, Tensor]) -> Terms:
        """L_sty and L_feat of the student's image and each teacher's; the terms' suffix -> the teacher's image."""
        if self.vgg is None:
            return {}
        config, maps = self.config, self.vgg(student)
        terms: Terms = {}
        for suffix, teacher in teachers.items():
            with torch.no_grad():
                targets = self.vgg(teacher)
            if self.uses("style"):
                own, its = (_chosen(found, config.style_layers) for found in (maps, targets))
                terms[f"style{suffix}"] = self.weighted("style", losses.style(own, its, self.style_distance))
            if self.uses("feature"):
                own, its = (_chosen(found, config.feature_layers) for found in (maps, targets))
                terms[f"feature{suffix}"] = self.weighted("feature", losses.feature(own, its))
        return terms


def _chosen(maps: Mapping[str, Tensor], layers: tuple[str, ...]) -> dict[str, Tensor]:
    return {layer: maps[layer] for layer in layers}
