"""The student that learns from a privileged teacher: DSSD's and PISR's second stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from hpcdistill.data.needs import Needs
from hpcdistill.errors import UserError, nearest
from hpcdistill.losses import variational
from hpcdistill.losses.supervision import l1
from hpcdistill.methods.base import (
    Batch,
    Carry,
    Group,
    Method,
    MethodConfig,
    OptimizerSettings,
    Phase,
    Terms,
    constant,
    weigh,
)
from hpcdistill.models.estimator import VIDEstimator
from hpcdistill.models.privileged import PrivilegedTeacher
from hpcdistill.models.sr_network import SRNetwork
from hpcdistill.models.super_resolution import NETWORKS, Network, build_network
from hpcdistill.settings import LARGEST_WEIGHT


class StudentOutput(NamedTuple):
    sr: Tensor  # [B, c, sH, sW]
    mu: Tensor | None  # estimate of the teacher's map; FSRCNN [B, 56, H, W], IDN [B, 64, H, W], VDSR [B, 64, sH, sW]
    b: Tensor | None  # its scale, of the same shape


class StudentWithEstimator(nn.Module):
    """The student and the estimator that trains with it, behind one forward (one DDP wrapper)."""

    def __init__(self, network: SRNetwork, estimator: VIDEstimator | None, layer: str) -> None:
        super().__init__()
        self.network = network
        self.estimator = estimator
        self.layer = layer

    def forward(self, lr: Tensor) -> StudentOutput:
        if self.estimator is None:
            return StudentOutput(self.network(lr), None, None)
        sr, maps = self.network(lr, maps=(self.layer,))
        return StudentOutput(sr, *self.estimator(maps[self.layer]))


class PrivilegedStudent(Method):
    """Equation 16: L = L1(Y, F(X)) + lambda_s * VID(F's map, the teacher's map), F started from the teacher's F."""

    class Config(MethodConfig):
        name: Literal["privileged_student"] = "privileged_student"
        scale: Literal[2, 3, 4] = Field(description="s, the super-resolution factor")
        channels: Literal[1, 3] = Field(1, description="c; 1 = luma, 3 = RGB")
        network: Network = Field("fsrcnn", description="F; the teacher has the same")
        initialise: Literal["teacher", "random"] = Field("teacher", description="where the student's weights start")
        vid: Literal["laplace", "gaussian", "none"] = Field(
            "laplace", description="form of the variational information distillation (equation 17: laplace)"
        )
        weight_vid: float = Field(1e-6, ge=0, le=LARGEST_WEIGHT, description="lambda^S, weight of VID")
        layer: str | None = Field(
            None, description="the distilled layer; unset = F's own (fsrcnn: expanding, vdsr: conv19, idn: dblock4)"
        )
        optimizer: OptimizerSettings = OptimizerSettings()

        @field_validator("layer")
        @classmethod
        def _own_layer_is_the_default(cls, layer: str | None, info: ValidationInfo) -> str | None:
            # One run, one identity, whether the layer is spelt out (as older runs' config.yaml do) or not.
            network = NETWORKS.get(info.data.get("network", ""))
            return None if network and layer == network.DISTILLED else layer

    version: ClassVar[int] = 1
    weight_vid: Tensor

    def __init__(self, config: Config, frozen: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.student = build_network(config.network, config.scale, config.channels)
        self.layer = config.layer or self.student.DISTILLED
        teacher = (frozen or {}).get("teacher")
        if self.uses_teacher(config):
            self.teacher = _checked_teacher(teacher, config)
            if config.initialise == "teacher":
                self.student.load_state_dict(self.teacher.network.state_dict())
        if self.layer not in self.student.map_channels:
            raise UserError(f"method.layer: no layer '{self.layer}'; {nearest(self.layer, self.student.map_channels)}")
        estimator = VIDEstimator(self.student.map_channels[self.layer]) if config.vid != "none" else None
        module = StudentWithEstimator(self.student, estimator, self.layer)
        self.groups = {"student": Group(module, config.optimizer)}
        self.generators = {"student": self.student}
        self.register_buffer("weight_vid", constant(config.weight_vid), persistent=False)

    @classmethod
    def uses_teacher(cls, config: Config) -> bool:
        return config.initialise == "teacher" or config.vid != "none"

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", "student", self.student_loss),)

    @property
    def needs(self) -> Needs:
        return Needs("lr-hr", self.config.scale, (self.config.scale,), self.config.channels)

    def student_loss(self, batch: Batch, carry: Carry) -> Terms:
        """Reconstruction and distillation; the teacher's pass has no gradients and stops at the distilled layer."""
        lr = batch[f"lr{self.config.scale}"]
        output = self.call("student", lr)
        terms = {"reconstruction": l1(output.sr, batch["hr"])}
        if self.config.vid != "none":
            with torch.no_grad():
                target = self.teacher.features(batch["hr"] if self.teacher.takes == "hr" else lr, self.layer)
            distance = variational.laplace if self.config.vid == "laplace" else variational.gaussian
            terms["vid"] = weigh(self.weight_vid, distance(output.mu, output.b, target))
        return terms


def _checked_teacher(teacher: nn.Module | None, config: PrivilegedStudent.Config) -> PrivilegedTeacher:
    """The teacher as a privileged one of the same F, scale and channels, or a UserError that says what differs."""
    if teacher is None:
        raise UserError("privileged_student: needs a teacher; name its config under `teacher.config`")
    if not isinstance(teacher, PrivilegedTeacher):
        raise UserError(
            f"teacher: is a {type(teacher).__name__}; a privileged_student needs a privileged_teacher's run"
        )
    for what in ("network", "scale", "channels"):
        its, wanted = teacher.arguments[what], getattr(config, what)
        if its != wanted:
            raise UserError(
                f"teacher: its {what} is {its}, the student's is {wanted}; "
                f"set method.{what} alike in both configs, e.g. teacher.overrides.method.{what}={wanted}"
            )
    return teacher.requires_grad_(False).eval()
