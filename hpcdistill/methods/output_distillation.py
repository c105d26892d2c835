"""A small super-resolution network learns from the images, and if wished a feature map, of a larger trained one.

The plain form of distillation (Hinton, Vinyals, Dean, 2015, for images: L1 instead of cross-entropy; feature maps as in
FitNets, Romero et al., ICLR 2015). Any finished super-resolution run teaches. docs/add-a-method.md explains this file.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from hpcdistill.errors import UserError, nearest
from hpcdistill.losses import l1
from hpcdistill.methods.base import NO_TEACHERS, Batch, Carry, Group, Progress, Role, Teachers, Terms, constant, weigh
from hpcdistill.methods.sr import Reconstruction, SuperResolution
from hpcdistill.methods.sr_settings import SRStudentConfig
from hpcdistill.models.sr_network import SRNetwork
from hpcdistill.settings import LARGEST_WEIGHT


class ProjectedStudent(nn.Module):
    """F and the 1x1 convolution that turns its map into one of the teacher's width, behind one forward."""

    def __init__(self, network: SRNetwork, layer: str, width: int) -> None:
        super().__init__()
        self.network = network
        self.layer = layer
        self.projection = nn.Conv2d(network.map_channels[layer], width, 1)

    def forward(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """The enlarged image [B, c, sH, sW] and the projected map [B, width, H, W]."""
        sr, maps = self.network(lr, maps=(self.layer,))
        return sr, self.projection(maps[self.layer])


class OutputDistillation(SuperResolution):
    """L = lambda_rec * L1(Y, F(X)) + lambda_out * L1(T(X), F(X)) + lambda_feat * L1(T's map, P(F's map)).

    T is frozen; P is trained with F and left behind.
    """

    class Config(SRStudentConfig):
        name: Literal["output_distillation"] = "output_distillation"
        weight_reconstruction: float = Field(
            1.0, ge=0, le=LARGEST_WEIGHT, description="lambda_rec, weight of the L1 to the HR image"
        )
        weight_output: float = Field(
            1.0, ge=0, le=LARGEST_WEIGHT, description="lambda_out, weight of the L1 to the teacher's image"
        )
        weight_feature: float = Field(
            0.0, ge=0, le=LARGEST_WEIGHT, description="lambda_feat, weight of the L1 to the teacher's map"
        )
        layer: str | None = Field(None, description="F's map that is compared; unset = its DISTILLED one")
        teacher_layer: str | None = Field(None, description="the teacher's; unset = its DISTILLED one")

        @model_validator(mode="after")
        def _learns(self) -> Self:
            if not (self.weight_reconstruction or self.weight_output or self.weight_feature):
                raise ValueError("weight_reconstruction, weight_output, weight_feature: all are 0; set one")
            return self

        def roles(self) -> dict[str, Role]:
            needed = self.weight_output > 0 or self.weight_feature > 0
            return {"teacher": Role(needed, ("lr", "hr"), self.scale, self.channels)}

    weight_reconstruction: Tensor
    weight_output: Tensor
    weight_feature: Tensor

    def __init__(self, config: Config, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__(config, teachers)
        for name in ("weight_reconstruction", "weight_output", "weight_feature"):
            self.register_buffer(name, constant(getattr(config, name)), persistent=False)
        role = config.roles()["teacher"]
        teacher: Any = role.filled("teacher", teachers) if role.needed else None
        self.teacher = teacher
        self.layer = self.teacher_layer = ""
        if config.weight_feature:
            self.layer = _known("layer", config.layer, self.student)
            self.teacher_layer = _known("teacher_layer", config.teacher_layer, teacher)
            self.projected = ProjectedStudent(self.student, self.layer, teacher.map_channels[self.teacher_layer])
            self.groups = {"student": Group(self.projected, config.optimizer)}
            self._check_sizes()

    def student_loss(
        self, batch: Batch, carry: Carry, progress: Progress, reconstruction: Reconstruction = l1
    ) -> Terms:
        """The terms that have a weight; the teacher runs once, without gradients."""
        lr, hr = self.lr(batch), batch["hr"]
        output: Any = self.call("student", lr)
        sr: Tensor = output[0] if self.layer else output
        terms: Terms = {}
        if self.config.weight_reconstruction:
            terms["reconstruction"] = weigh(self.weight_reconstruction, reconstruction(sr, hr))
        wanted, maps = self._taught(hr if getattr(self.teacher, "takes", "lr") == "hr" else lr)
        if self.config.weight_output:
            terms["output"] = weigh(self.weight_output, l1(sr, wanted))
        if self.layer:
            terms["feature"] = weigh(self.weight_feature, l1(output[1], maps[self.teacher_layer]))
        return terms

    @torch.no_grad()
    def _taught(self, image: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The teacher's image, None where it has no weight, and its compared map where there is one."""
        teacher, layer = self.teacher, self.teacher_layer
        if self.layer and self.config.weight_output:
            both: tuple[Tensor, dict[str, Tensor]] = teacher(image, maps=(layer,))
            return both
        if self.layer:
            return None, {layer: teacher.features(image, layer)}  # nothing behind the map is computed
        return teacher(image) if self.config.weight_output else None, {}

    @torch.no_grad()
    def _check_sizes(self) -> None:
        """UserError when the compared maps differ in height and width: VDSR's are as large as the HR image."""
        side = 8
        lr = torch.zeros(1, self.config.channels, side, side)
        hr = torch.zeros(1, self.config.channels, side * self.config.scale, side * self.config.scale)
        own = self.student.features(lr, self.layer).shape[-1]
        teacher: Any = self.teacher
        its = teacher.features(hr if teacher.takes == "hr" else lr, self.teacher_layer).shape[-1]
        if own != its:
            raise UserError(
                f"method.layer: the student's {self.layer} has {own}x{own} pixels where the teacher's "
                f"{self.teacher_layer} has {its}x{its}; compare maps of one size, or set weight_feature=0"
            )


def _known(key: str, layer: str | None, network: Any) -> str:
    """The layer that the configuration names, or the network's own; UserError with the right names."""
    name: str = layer or network.DISTILLED
    if name not in network.map_channels:
        raise UserError(f"method.{key}: no layer '{name}'; {nearest(name, network.map_channels)}")
    return name
